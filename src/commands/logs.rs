//! `deepgen logs NODE`: what a node's worker said and printed, once or as it comes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use deepgen_contract::event::{WorkerEvent, WorkerEventKind};
use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::job::{STDERR_FILE, STDOUT_FILE};

use super::artifacts_layout;
use super::status::choose_run;
use crate::cli::{Exit, Wrong};
use crate::exec::jobdir::{self, EventTail, JobDir};
use crate::progress::format::utc;
use crate::spec::nearest;
use crate::store::runs::{RunView, SavedPlan};

/// Time between two looks with `-f`.
const POLL: Duration = Duration::from_millis(200);

/// Arguments of `deepgen logs`.
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// Name of a node
    pub node: String,
    /// Follow: print what comes until the attempt ends
    #[arg(long, short)]
    pub follow: bool,
    /// Name of a run [default: the newest]
    #[arg(long)]
    pub run: Option<String>,
    /// Number of an attempt [default: the newest]
    #[arg(long, value_name = "N")]
    pub attempt: Option<u32>,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// Prints events and output of an attempt.
///
/// # Errors
/// When there is no such run, node or attempt.
pub fn logs(args: &LogsArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let run = choose_run(&layout, args.run.as_deref())?;
    let fingerprint = find_node(&layout.run(&run), &args.node)?;
    let dir = JobDir::new(&layout.jobs(), &fingerprint);
    let attempts = dir.attempts();
    let attempt = match args.attempt {
        Some(attempt) if attempts.contains(&attempt) => attempt,
        Some(attempt) => return Err(Wrong(format!("`{}` has no attempt {attempt}", args.node)).into()),
        None => *attempts.first().ok_or_else(|| Wrong(format!("`{}` has not run here", args.node)))?,
    };
    let folder = dir.attempt(attempt);
    let mut logs = Logs::new(&folder);
    loop {
        // Looked at first, so that what was written before the end is still printed.
        let has_ended = jobdir::outcome(&folder)?.is_some() || !is_alive(&dir, attempt);
        logs.print(&mut io::stdout().lock())?;
        if !args.follow || has_ended {
            return Ok(Exit::Done);
        }
        std::thread::sleep(POLL);
    }
}

fn is_alive(dir: &JobDir, attempt: u32) -> bool {
    let host = crate::environment::host();
    let is_elsewhere = dir.lease().is_some_and(|lease| lease.attempt == attempt && lease.host != host);
    is_elsewhere || dir.live_worker(attempt, &host).is_some()
}

fn find_node(run_dir: &Path, node: &str) -> Result<Fingerprint> {
    let view = RunView::read(run_dir)?;
    if let Some(seen) = view.nodes.get(&NodeName(node.to_owned())) {
        return Ok(seen.fingerprint);
    }
    let saved = SavedPlan::read(run_dir)?;
    if let Some(planned) = saved.plan.nodes.iter().find(|planned| planned.node.name.0 == node) {
        return Ok(planned.fingerprint);
    }
    let names: Vec<&str> = saved.plan.nodes.iter().map(|planned| planned.node.name.0.as_str()).collect();
    let hint = nearest(node, &names).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
    Err(Wrong(format!("run {} has no node `{node}`{hint}", view.run)).into())
}

/// The three sources of a worker's words, each read on from where it was left.
struct Logs {
    events: EventTail,
    outputs: [(PathBuf, u64); 2],
}

impl Logs {
    fn new(folder: &Path) -> Self {
        Self { events: EventTail::new(folder), outputs: [STDOUT_FILE, STDERR_FILE].map(|name| (folder.join(name), 0)) }
    }

    fn print(&mut self, out: &mut impl Write) -> io::Result<()> {
        for line in self.events.read().iter().filter_map(line) {
            writeln!(out, "{line}")?;
        }
        for (path, offset) in &mut self.outputs {
            let Ok(mut file) = File::open(path) else { continue };
            file.seek(SeekFrom::Start(*offset))?;
            let mut text = Vec::new();
            *offset += file.read_to_end(&mut text)? as u64;
            out.write_all(&text)?;
        }
        out.flush()
    }
}

/// Returns an event as a line; positions and metrics are for `status` and the report.
fn line(event: &WorkerEvent) -> Option<String> {
    let text = match &event.event {
        WorkerEventKind::Started { pid, device } => format!("started as process {pid} on {device}"),
        WorkerEventKind::Resumed { step, checkpoint } => format!("goes on from step {step}: {checkpoint}"),
        WorkerEventKind::Checkpoint { step, path, .. } => format!("checkpoint at step {step}: {path}"),
        WorkerEventKind::Warning { message } => format!("warning: {message}"),
        WorkerEventKind::Note { message } => message.clone(),
        WorkerEventKind::Progress { .. } | WorkerEventKind::Metrics { .. } => return None,
    };
    Some(format!("{}  {text}", utc(event.ts_ms)))
}
