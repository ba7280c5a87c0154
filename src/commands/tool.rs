//! Starts the worker on one request outside of any pipeline, shows how far it is, and tells how it ended.
//!
//! Shared by `generate`, `import-weights` and `export`. Knows the request's envelope, not its content.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use deepgen_contract::event::WorkerEventKind;
use deepgen_contract::job::{FailureCause, Outcome, STDERR_FILE};
use deepgen_contract::tool::{TOOL_FILE, TOOL_VERSION, ToolRequest, ToolSpec};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{Exit, Wrong};
use crate::exec::jobdir::{self, EventTail};

/// Time between two looks at what the worker says.
const POLL: Duration = Duration::from_millis(100);
const BAR: &str = "[{bar:32}] {pos}/{len} {msg}  {elapsed} gone, {eta} left";

/// Where a tool runs.
#[derive(Debug, Clone, clap::Args)]
pub struct Where {
    /// Worker program [default: the deepgen-worker beside this program]
    #[arg(long, value_name = "FILE")]
    pub worker: Option<PathBuf>,
}

impl Where {
    fn program(&self) -> Result<PathBuf> {
        let beside = || std::env::current_exe().ok().map(|own| own.with_file_name("deepgen-worker"));
        let worker = self.worker.clone().or_else(beside).context("cannot tell where this program lies")?;
        worker.canonicalize().map_err(|error| {
            Wrong(format!(
                "no worker at {} ({error}): build it with `cargo build --release -p deepgen-worker`, or name it with \
                 --worker",
                worker.display()
            ))
            .into()
        })
    }
}

/// Returns a path of the command line as an absolute one; it need not exist.
///
/// # Errors
/// When the working directory is gone.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot make {} absolute", path.display()))
}

/// Lets a worker do `request` on `device` and prints what it made, a line each.
///
/// # Errors
/// When no worker can be started, or the request asks for something wrong.
pub fn run(request: ToolRequest, device: &str, place: &Where) -> Result<Exit> {
    let program = place.program()?;
    let dir =
        tempfile::Builder::new().prefix("deepgen-").tempdir().context("cannot create a folder for the request")?;
    let spec = ToolSpec { version: TOOL_VERSION, device: device.to_owned(), request };
    std::fs::write(dir.path().join(TOOL_FILE), serde_json::to_vec_pretty(&spec)?)
        .context("cannot write the request")?;
    let log = std::fs::File::create(dir.path().join(STDERR_FILE)).context("cannot create the worker's log")?;
    let mut child = Command::new(&program)
        .arg("tool")
        .arg(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start the worker {}", program.display()))?;
    let status = follow(&mut child, dir.path())?;
    match jobdir::outcome(dir.path()).context("cannot read the worker's outcome")? {
        Some(Outcome::Done { notes, .. }) => {
            for note in notes {
                println!("{note}");
            }
            Ok(Exit::Done)
        }
        Some(Outcome::Failed { cause: FailureCause::Input, message }) => Err(Wrong(message).into()),
        Some(Outcome::Failed { message, .. }) => Err(anyhow::anyhow!(message)),
        Some(Outcome::Stopped { .. }) | None => {
            let log = std::fs::read_to_string(dir.path().join(STDERR_FILE)).unwrap_or_default();
            Err(anyhow::anyhow!("the worker left no outcome: {status}\n{}", log.trim_end()))
        }
    }
}

/// Shows what the worker says until it ends; returns how.
fn follow(child: &mut Child, dir: &Path) -> Result<String> {
    let mut tail = EventTail::new(dir);
    let is_terminal = std::io::stderr().is_terminal();
    let bar = if is_terminal { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    bar.enable_steady_tick(Duration::from_millis(200));
    let mut is_told = false;
    loop {
        let status = child.try_wait().context("cannot wait for the worker")?;
        for event in tail.read() {
            match event.event {
                WorkerEventKind::Progress { step, total, unit } => {
                    if bar.length().is_none() {
                        let style = ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
                        bar.set_style(style.progress_chars("=> "));
                    }
                    bar.set_length(total);
                    bar.set_position(step);
                    bar.set_message(unit.clone());
                    // Without a terminal there is no bar: one line at the end.
                    if !is_terminal && step == total && !std::mem::replace(&mut is_told, true) {
                        eprintln!("{step}/{total} {unit}");
                    }
                }
                WorkerEventKind::Note { message } => bar.set_message(message),
                WorkerEventKind::Warning { message } => bar.suspend(|| eprintln!("warning: {message}")),
                _ => {}
            }
        }
        if let Some(status) = status {
            bar.finish_and_clear();
            return Ok(status.to_string());
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_parses_and_a_missing_worker_says_what_to_do() {
        assert!(ProgressStyle::with_template(BAR).is_ok());
        let place = Where { worker: Some("/no/such/worker".into()) };
        let error = place.program().unwrap_err();
        assert!(error.is::<Wrong>() && error.to_string().contains("cargo build"), "{error}");
    }
}
