//! Runs in the background: a child in a session of its own, which the terminal's end does not reach.
//!
//! The child is this program with the same arguments; it writes into a log, which moves into the run's folder as soon
//! as there is a run, and then tells its parent the run's name through a file beside the log.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cli::Exit;
use crate::environment;
use crate::progress::format::now_ms;
use crate::store::Layout;
use crate::store::external::write_atomically;
use crate::store::lock::{Holder, Lock};

/// Hidden option by which the child knows that it is one.
pub const DETACHED_FLAG: &str = "--detached";
/// What a detached orchestrator says lies here in its run's folder.
pub const LOG_FILE: &str = "orchestrator.log";
/// Time between two looks for a word of the child.
const POLL: Duration = Duration::from_millis(10);

/// Starts this very command line in the background and returns once its run is open.
///
/// # Errors
/// When another orchestrator holds the folder, or the child ends before it has a run.
pub fn start(layout: &Layout) -> Result<Exit> {
    let pid = std::process::id();
    // Taken and given back, so that the answer is the same as in the foreground.
    Lock::take(&layout.state().join("lock"), &Holder { pid, host: environment::host(), since_ms: now_ms() })?;
    let log = layout.state().join(format!("detached-{pid}.log"));
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    // `-d` may stand in a cluster of short options only after those; clap accepts it alone as well.
    arguments.retain(|argument| argument != "--detach" && argument != "-d");
    let mut child = Command::new(std::env::current_exe().context("cannot tell where this program lies")?)
        .args(arguments)
        .arg(DETACHED_FLAG)
        .arg(&log)
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("cannot share the log")?)
        .stderr(output)
        .spawn()
        .context("cannot start this program again")?;
    loop {
        if let Ok(run) = fs::read_to_string(word_file(&log)) {
            // Already read; a left-over does no harm.
            let _ = fs::remove_file(word_file(&log));
            println!("run {run} goes on as process {}", child.id());
            println!("deepgen attach    shows it here        deepgen stop      stops it; workers write a checkpoint");
            println!("deepgen status    where it stands      deepgen logs NODE what a worker says");
            return Ok(Exit::Done);
        }
        if let Some(status) = child.try_wait().context("cannot wait for the child")? {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let _ = fs::remove_file(&log);
            eprint!("{said}");
            return match status.code() {
                Some(code) if code == Exit::Wrong as i32 => Ok(Exit::Wrong),
                Some(code) if code == Exit::Busy as i32 => Ok(Exit::Busy),
                _ => bail!("the run did not start"),
            };
        }
        std::thread::sleep(POLL);
    }
}

/// Gives the child a session of its own.
pub fn leave_terminal() {
    // It fails only for the leader of a process group, which a child just started is not.
    if let Err(error) = rustix::process::setsid() {
        tracing::warn!(%error, "still in the session of the terminal");
    }
}

/// Moves the log into the run's folder and tells the parent the name of the run.
///
/// # Errors
/// When the folder cannot be written.
pub fn tell_parent(log: &Path, run_dir: &Path) -> io::Result<()> {
    fs::rename(log, run_dir.join(LOG_FILE))?;
    let run = run_dir.file_name().unwrap_or_default();
    write_atomically(&word_file(log), run.as_encoded_bytes())
}

fn word_file(log: &Path) -> PathBuf {
    log.with_extension("run")
}
