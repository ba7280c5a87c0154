//! The machine, the programs and the checkout that make an artifact: what its manifest says of its origin.
//!
//! Asks the system and git; a question without an answer leaves its field empty and stops nothing.

use std::path::Path;
use std::process::Command;

use deepgen_contract::artifact::Environment;
use sysinfo::{CpuRefreshKind, RefreshKind, System};

use crate::store::FileHashes;

/// Returns this host's name.
pub fn host() -> String {
    System::host_name().unwrap_or_else(|_| "localhost".into())
}

/// Returns what is known of this machine, of the checkout at `root`, and of the worker that makes the artifacts.
/// Device and threads belong to a job and are filled in there.
pub fn capture(root: &Path, worker: Option<&Path>, hashes: &FileHashes) -> Environment {
    let system = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
    let worker_blake3 = worker.map_or(Ok(String::new()), |worker| hashes.file_hash(worker));
    Environment {
        host: host(),
        os: System::long_os_version().unwrap_or_default(),
        cpu: system.map_or(String::new(), |system| cpu_model(&system)),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        device: String::new(),
        threads: 0,
        deepgen_version: env!("CARGO_PKG_VERSION").into(),
        worker_blake3: worker_blake3.unwrap_or_default(),
        git_commit: git(root, &["rev-parse", "HEAD"]).filter(|commit| !commit.is_empty()),
        git_dirty: git(root, &["status", "--porcelain"]).is_some_and(|changes| !changes.is_empty()),
    }
}

fn cpu_model(system: &System) -> String {
    system.cpus().first().map_or(String::new(), |cpu| cpu.brand().trim().to_owned())
}

fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_git_has_no_commit_and_the_worker_is_hashed() {
        let dir = tempfile::tempdir().unwrap();
        let worker = dir.path().join("worker");
        std::fs::write(&worker, "program").unwrap();
        let hashes = FileHashes::open(dir.path().to_owned(), dir.path().join("memory.json"));
        let environment = capture(dir.path(), Some(&worker), &hashes);
        assert_eq!(environment.worker_blake3, blake3::hash(b"program").to_hex().to_string());
        assert_eq!((environment.git_commit, environment.git_dirty), (None, false));
        assert!(environment.cores > 0);
    }
}
