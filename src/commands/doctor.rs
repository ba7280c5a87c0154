//! `deepgen doctor`: what this machine can do for a run, what is missing, and what to do about it.
//!
//! Looks and asks programs; starts no job and changes nothing but a probe file in the artifacts folder.

use std::fmt;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde::Serialize;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use super::artifacts_layout;
use super::table::Table;
use crate::cli::Exit;
use crate::progress::format::{bytes, now_ms};
use crate::store::lock::Lock;

/// Free space below which a person is warned.
const LOW_DISK: u64 = 10 << 30;

/// Arguments of `deepgen doctor`.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Worker program [default: the deepgen-worker beside this program]
    #[arg(long, value_name = "FILE")]
    pub worker: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// How something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Health {
    /// It is there.
    Good,
    /// It is not there, and only some uses need it.
    Absent,
    /// A run would fail or suffer.
    Bad,
}

/// One finding.
#[derive(Debug, Clone, Serialize)]
struct Finding {
    about: &'static str,
    health: Health,
    /// What was found.
    found: String,
    /// What to do about it, where something is missing.
    #[serde(skip_serializing_if = "String::is_empty")]
    remedy: String,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Good => "ok",
            Self::Absent => "--",
            Self::Bad => "!!",
        })
    }
}

fn good(about: &'static str, found: impl Into<String>) -> Finding {
    Finding { about, health: Health::Good, found: found.into(), remedy: String::new() }
}

fn missing(about: &'static str, health: Health, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { about, health, found: found.into(), remedy: remedy.into() }
}

/// Prints what was found; exit code 1 when a run would fail.
///
/// # Errors
/// When the working directory is gone.
pub fn doctor(args: &DoctorArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let mut findings = machine();
    findings.extend([disk(layout.root()), holder(&layout.state().join("lock"))]);
    findings.extend([nvidia(), vulkan()]);
    findings.push(worker(args.worker.clone()));
    findings.extend([slurm(), git(), terminal()]);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        let mut table = Table::new(&["", "", "", ""]);
        for Finding { about, health, found, remedy } in &findings {
            table.row([health.to_string(), (*about).to_owned(), found.clone(), remedy.clone()]);
        }
        print!("{}", table.to_string().trim_start());
    }
    let is_bad = findings.iter().any(|finding| finding.health == Health::Bad);
    Ok(if is_bad { Exit::Failed } else { Exit::Done })
}

fn machine() -> Vec<Finding> {
    let wanted =
        RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()).with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(wanted);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let mut findings = vec![good("system", System::long_os_version().unwrap_or_default())];
    match system {
        Ok(system) => {
            let model = system.cpus().first().map_or("", |cpu| cpu.brand()).trim().to_owned();
            findings.push(good("cpu", format!("{cores} threads, {model}")));
            let (total, free) = (system.total_memory(), system.available_memory());
            findings.push(good("memory", format!("{} of {} free", bytes(free), bytes(total))));
        }
        Err(error) => findings.push(missing("cpu", Health::Absent, format!("{cores} threads; {error}"), "")),
    }
    findings
}

/// The disk under the artifacts folder, or under the folder that will hold it.
fn disk(folder: &Path) -> Finding {
    let Some(there) = folder.ancestors().find(|folder| folder.is_dir()) else {
        return missing("disk", Health::Bad, "no folder", "name one with --artifacts");
    };
    let probe = there.join(format!(".deepgen-doctor-{}-{}", std::process::id(), now_ms()));
    let is_writable = std::fs::write(&probe, "probe");
    // Nothing is left where nothing could be written.
    let _ = std::fs::remove_file(&probe);
    if let Err(error) = is_writable {
        let remedy = "make it writable, or name another folder with --artifacts";
        return missing("disk", Health::Bad, format!("{} cannot be written: {error}", there.display()), remedy);
    }
    match rustix::fs::statvfs(there) {
        Ok(fs) => {
            let free = fs.f_bavail.saturating_mul(fs.f_frsize);
            let found = format!("{} free for {}", bytes(free), folder.display());
            if free < LOW_DISK {
                return missing("disk", Health::Absent, found, "`deepgen gc` says what may go");
            }
            good("disk", found)
        }
        Err(error) => missing("disk", Health::Absent, format!("cannot be asked: {error}"), ""),
    }
}

fn holder(lock: &Path) -> Finding {
    match Lock::holder(lock) {
        Ok(None) => good("artifacts", "no run goes on"),
        Ok(Some(holder)) => good("artifacts", format!("process {} on {} works here", holder.pid, holder.host)),
        Err(error) => {
            missing("artifacts", Health::Bad, error.to_string(), "file locks must work there: use a local disk")
        }
    }
}

/// Runs a program and returns what it printed, or nothing when it is missing or failed.
fn ask(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(std::process::Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn nvidia() -> Finding {
    let query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"];
    match ask("nvidia-smi", &query).filter(|text| !text.is_empty()) {
        Some(text) => good("cuda", text.lines().map(str::trim).collect::<Vec<_>>().join("; ")),
        None => {
            let remedy = "for device = \"cuda\" install the NVIDIA driver; runs on the CPU need none";
            missing("cuda", Health::Absent, "no NVIDIA driver answers", remedy)
        }
    }
}

fn vulkan() -> Finding {
    match ask("vulkaninfo", &["--summary"]) {
        Some(text) => {
            let devices: Vec<&str> = text
                .lines()
                .filter(|line| line.contains("deviceName"))
                .filter_map(|line| line.split('=').nth(1))
                .collect();
            good("wgpu", devices.iter().map(|name| name.trim()).collect::<Vec<_>>().join("; "))
        }
        None => {
            let has_loader =
                ["/usr/lib/x86_64-linux-gnu/libvulkan.so.1", "/usr/lib64/libvulkan.so.1", "/usr/lib/libvulkan.so.1"];
            match has_loader.iter().find(|path| Path::new(path).exists()) {
                Some(path) => good("wgpu", format!("{path}; vulkaninfo would say which devices")),
                None => missing("wgpu", Health::Absent, "no Vulkan loader", "for device = \"wgpu\" install libvulkan1"),
            }
        }
    }
}

fn worker(named: Option<PathBuf>) -> Finding {
    let beside = || std::env::current_exe().ok().map(|own| own.with_file_name("deepgen-worker"));
    let Some(path) = named.or_else(beside) else {
        return missing("worker", Health::Bad, "cannot tell where this program lies", "name the worker with --worker");
    };
    if !path.is_file() {
        let remedy = "build it: cargo build --release -p deepgen-worker; `command` nodes need none";
        return missing("worker", Health::Absent, format!("none at {}", path.display()), remedy);
    }
    match ask(&path.to_string_lossy(), &["features"]) {
        Some(text) => good("worker", format!("{}: {text}", path.display())),
        None => {
            let remedy = "build it again: cargo build --release -p deepgen-worker";
            missing("worker", Health::Bad, format!("{} does not say what it can do", path.display()), remedy)
        }
    }
}

fn slurm() -> Finding {
    let found: Vec<&str> = ["sbatch", "squeue", "sacct", "scancel"].into_iter().filter(|name| on_path(name)).collect();
    match found.len() {
        4 => good("slurm", ask("sinfo", &["--version"]).unwrap_or_else(|| "its commands are there".into())),
        0 => missing("slurm", Health::Absent, "no Slurm commands", "only a run on a cluster needs them"),
        _ => missing(
            "slurm",
            Health::Absent,
            format!("only {}", found.join(", ")),
            "put all of Slurm's commands on the PATH",
        ),
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

fn git() -> Finding {
    match ask("git", &["--version"]) {
        Some(version) => good("git", version),
        None => missing("git", Health::Absent, "not there", "install it: manifests then name the commit"),
    }
}

fn terminal() -> Finding {
    if !std::io::stderr().is_terminal() {
        return missing(
            "terminal",
            Health::Absent,
            "standard error is no terminal",
            "progress is shown as plain lines",
        );
    }
    let term = std::env::var("TERM").unwrap_or_default();
    match term.as_str() {
        "" | "dumb" => missing("terminal", Health::Absent, format!("TERM is `{term}`"), "set TERM for a live view"),
        _ => good("terminal", format!("{term}, live view")),
    }
}
