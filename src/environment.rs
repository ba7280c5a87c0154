//! The machine, the programs and the checkout that make an artifact: what its manifest says of its origin.
//!
//! Asks the system and git; a question without an answer leaves its field empty and stops nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use deepgen_contract::artifact::Environment;
use sysinfo::{CpuRefreshKind, RefreshKind, System};

use crate::store::FileHashes;

/// Longest file outside git that goes into a patch; larger ones are named in it.
const MAX_UNTRACKED_BYTES: u64 = 1 << 20;
/// Most files outside git that go into a patch.
const MAX_UNTRACKED_FILES: usize = 500;
/// Lock file that this program was built from: it names every dependency and its hash.
const LOCK_FILE: &[u8] = include_bytes!("../Cargo.lock");

/// What is known of this machine and this checkout.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Captured {
    /// What manifests say.
    pub environment: Environment,
    /// Uncommitted changes as a patch for `git apply`; nothing when there are none.
    pub changes: Option<Vec<u8>>,
}

/// Returns this host's name.
pub fn host() -> String {
    System::host_name().unwrap_or_else(|_| "localhost".into())
}

/// Returns the user's name, for records of who decided something.
pub fn user() -> String {
    let named = ["USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
    named.filter(|name| !name.is_empty()).unwrap_or_else(|| rustix::process::getuid().as_raw().to_string())
}

/// Returns what is known of this machine, of the checkout at `root`, and of the worker that makes the artifacts.
/// Device and threads belong to a job and are filled in there.
pub fn capture(root: &Path, worker: Option<&Path>, hashes: &FileHashes) -> Captured {
    let system = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
    let hash = |file: Option<&Path>| file.and_then(|file| hashes.file_hash(file).ok()).unwrap_or_default();
    let own = std::env::current_exe().ok();
    let commit = git(root, &["rev-parse", "HEAD"]).map(|commit| text(&commit)).filter(|commit| !commit.is_empty());
    // Without a commit there is nothing to compare with.
    let changes = commit.as_ref().and_then(|_| changes(root));
    let environment = Environment {
        host: host(),
        os: System::long_os_version().unwrap_or_default(),
        cpu: system.map_or(String::new(), |system| cpu_model(&system)),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        device: String::new(),
        threads: 0,
        gpus: gpus(Path::new("/")),
        deepgen_version: env!("CARGO_PKG_VERSION").into(),
        deepgen_blake3: hash(own.as_deref()),
        worker_blake3: hash(worker),
        git_commit: commit,
        git_dirty: changes.is_some(),
        git_diff_blake3: changes.as_ref().map(|changes| blake3::hash(changes).to_hex().to_string()),
        lock_blake3: blake3::hash(LOCK_FILE).to_hex().to_string(),
    };
    Captured { environment, changes }
}

fn cpu_model(system: &System) -> String {
    system.cpus().first().map_or(String::new(), |cpu| cpu.brand().trim().to_owned())
}

/// Returns the accelerators that the kernel shows below `root`, each with its driver. Starts no program: asking
/// `nvidia-smi` takes a second.
fn gpus(root: &Path) -> Vec<String> {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let nvidia = root.join("proc/driver/nvidia");
    let version = read(&nvidia.join("version")).and_then(|text| nvidia_driver(&text)).unwrap_or_default();
    let mut all: Vec<String> = entries(&nvidia.join("gpus"))
        .iter()
        .filter_map(|gpu| nvidia_model(&read(&gpu.join("information"))?))
        .map(|model| format!("{model}, driver {version}"))
        .collect();
    for card in entries(&root.join("sys/class/drm")) {
        // `card0` is a device, `card0-HDMI-A-1` one of its plugs.
        let name = card.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let is_card = name.strip_prefix("card").is_some_and(|number| number.chars().all(|c| c.is_ascii_digit()));
        let device = card.join("device");
        let Some(vendor) = read(&device.join("vendor")).filter(|_| is_card) else { continue };
        let id = read(&device.join("device")).unwrap_or_default();
        let driver =
            fs::read_link(device.join("driver")).ok().and_then(|link| Some(text(link.file_name()?.as_encoded_bytes())));
        let driver = driver.unwrap_or_default();
        if driver != "nvidia" {
            all.push(format!("{} {}, driver {driver}", vendor.trim(), id.trim()));
        }
    }
    all
}

fn entries(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut all: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    all.sort();
    all
}

/// Finds the version in `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar ...`.
fn nvidia_driver(text: &str) -> Option<String> {
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

/// Finds the name in lines such as `Model:  NVIDIA H100 80GB HBM3`.
fn nvidia_model(text: &str) -> Option<String> {
    text.lines().find_map(|line| Some(line.strip_prefix("Model:")?.trim().to_owned()))
}

/// Returns what the checkout at `root` holds beyond its commit, as one patch: changed files, and new ones that git does
/// not ignore. Nothing where there is no checkout or nothing has changed.
fn changes(root: &Path) -> Option<Vec<u8>> {
    let mut patch = git(root, &["diff", "--binary", "--no-color", "--no-ext-diff", "HEAD"])?;
    let top = git(root, &["rev-parse", "--show-toplevel"]).map(|top| text(&top))?;
    let listed = git(Path::new(&top), &["ls-files", "--others", "--exclude-standard", "-z"])?;
    let names = listed.split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(text);
    for (at, name) in names.enumerate() {
        let bytes = fs::metadata(Path::new(&top).join(&name)).map_or(0, |metadata| metadata.len());
        if at >= MAX_UNTRACKED_FILES || bytes > MAX_UNTRACKED_BYTES {
            patch.extend_from_slice(format!("# not in this patch: {name}, {bytes} bytes\n").as_bytes());
            continue;
        }
        patch.extend(untracked(Path::new(&top), &name));
    }
    (!patch.is_empty()).then_some(patch)
}

/// Returns a new file as a patch. Git ends with 1 when files differ, as these always do.
fn untracked(top: &Path, name: &str) -> Vec<u8> {
    let arguments = ["diff", "--binary", "--no-color", "--no-ext-diff", "--no-index", "--", "/dev/null", name];
    Command::new("git").arg("-C").arg(top).args(arguments).output().map_or_else(|_| Vec::new(), |output| output.stdout)
}

fn git(root: &Path, arguments: &[&str]) -> Option<Vec<u8>> {
    let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
    output.status.success().then_some(output.stdout)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_git_has_no_commit_and_the_programs_are_hashed() {
        let dir = tempfile::tempdir().unwrap();
        let worker = dir.path().join("worker");
        fs::write(&worker, "program").unwrap();
        let hashes = FileHashes::open(dir.path().to_owned(), dir.path().join("memory.json"));
        let Captured { environment, changes } = capture(dir.path(), Some(&worker), &hashes);
        assert_eq!(environment.worker_blake3, blake3::hash(b"program").to_hex().to_string());
        assert_eq!((environment.git_commit, environment.git_dirty, changes), (None, false, None));
        assert_eq!((environment.deepgen_blake3.len(), environment.lock_blake3.len()), (64, 64));
        assert!(environment.cores > 0);
    }

    #[test]
    fn uncommitted_changes_are_a_patch_that_gives_them_back() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let must = |arguments: &[&str]| {
            let who = ["-c", "user.name=a", "-c", "user.email=a@b"];
            git(root, &[&who, arguments].concat()).unwrap_or_else(|| panic!("git {arguments:?}"))
        };
        must(&["init", "-q"]);
        fs::write(root.join("a.txt"), "one\n").unwrap();
        fs::write(root.join(".gitignore"), "ignored\n").unwrap();
        must(&["add", "."]);
        must(&["commit", "-q", "-m", "first"]);
        assert_eq!(super::changes(root), None);

        fs::write(root.join("a.txt"), "two\n").unwrap();
        fs::write(root.join("new.bin"), [0, 159, 146, 150]).unwrap();
        fs::write(root.join("ignored"), "x").unwrap();
        fs::write(root.join("large"), vec![b'x'; MAX_UNTRACKED_BYTES as usize + 1]).unwrap();
        let patch = super::changes(root).unwrap();
        let said = String::from_utf8_lossy(&patch);
        assert!(said.contains("# not in this patch: large, 1048577 bytes") && !said.contains("b/ignored"), "{said}");

        let patch_file = dir.path().join(".git/changes.diff");
        fs::write(&patch_file, &patch).unwrap();
        must(&["checkout", "-q", "--", "."]);
        fs::remove_file(root.join("new.bin")).unwrap();
        must(&["apply", ".git/changes.diff"]);
        assert_eq!(fs::read_to_string(root.join("a.txt")).unwrap(), "two\n");
        assert_eq!(fs::read(root.join("new.bin")).unwrap(), [0, 159, 146, 150]);
    }

    #[test]
    fn gpus_are_read_from_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(gpus(dir.path()), Vec::<String>::new());
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12.2.0\n",
        );
        write("proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n");
        write("sys/class/drm/card0/device/vendor", "0x1002\n");
        write("sys/class/drm/card0/device/device", "0x740f\n");
        write("sys/class/drm/card0-DP-1/device/vendor", "0x1002\n");
        assert_eq!(gpus(dir.path()), ["NVIDIA H100 80GB HBM3, driver 550.54.15", "0x1002 0x740f, driver "]);
    }
}
