//! `deepgen attach`: watch a run that goes on elsewhere as if it had been started here.
//!
//! Reads the run's journal and its workers' events as they grow; opens no state, takes no lock and stops nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use deepgen_contract::id::NodeName;

use super::artifacts_layout;
use super::status::{choose_run, is_owner_alive};
use super::summary::summarise;
use crate::cli::Exit;
use crate::exec::jobdir::{EventTail, JobDir};
use crate::progress::format::now_ms;
use crate::progress::{self, Progress};
use crate::run::event::{NodeState, RunEvent, RunResult};
use crate::store::index::RunIndex;
use crate::store::runs::RunView;
use crate::store::tail::JournalTail;
use crate::store::{ArtifactStore, Layout};

/// Time between two looks.
const POLL: Duration = Duration::from_millis(100);
/// Longest wait for the report after the last event.
const PATIENCE: Duration = Duration::from_secs(10);

/// Arguments of `deepgen attach`.
#[derive(Debug, clap::Args)]
pub struct AttachArgs {
    /// Name of a run [default: the newest]
    pub run: Option<String>,
    /// Tell only how the run ends
    #[arg(long, short, conflicts_with = "json")]
    pub quiet: bool,
    /// Print every event as a JSON line on standard output
    #[arg(long)]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// Shows a run until it ends; Ctrl-C leaves it alone.
///
/// # Errors
/// When there is no such run or its journal cannot be read.
pub fn attach(args: &AttachArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let run = choose_run(&layout, args.run.as_deref())?;
    let run_dir = layout.run(&run);
    let index = RunIndex::read(&run_dir)?;
    let mut progress = progress::choose(args.json, args.quiet);
    progress.begin(index.nodes.len());
    let mut watched = Watched { layout: &layout, view: RunView::default(), workers: BTreeMap::new() };
    let mut tail = JournalTail::new(&run_dir);
    loop {
        // Looked at first, so that what was written before the end is still shown.
        let is_alive = is_owner_alive(&watched.view) || watched.view.last_seq == 0;
        for record in tail.read()? {
            watched.view.apply(&record);
            watched.take(record.ts_ms, &record.event, progress.as_mut());
        }
        watched.hear(progress.as_mut());
        progress.tick(now_ms());
        if watched.view.result.is_some() || !is_alive {
            break;
        }
        std::thread::sleep(POLL);
    }
    let view = &watched.view;
    if view.result.is_none() {
        progress.note("its orchestrator has gone without a word; the same command goes on with the run");
    }
    let begun = Instant::now();
    while is_owner_alive(view) && begun.elapsed() < PATIENCE {
        std::thread::sleep(POLL);
    }
    let mut summary = summarise(&index, view, &ArtifactStore::open(layout.clone()), &run_dir);
    summary.seconds = view.updated_ms.saturating_sub(view.started_ms) as f64 / 1000.0;
    summary.report = Some(run_dir.join(crate::report::REPORT_FILE)).filter(|report| report.exists());
    progress.summary(&summary);
    Ok(if view.result == Some(RunResult::Done) { Exit::Done } else { Exit::Failed })
}

/// A run as seen so far, and the workers that are listened to.
struct Watched<'a> {
    layout: &'a Layout,
    view: RunView,
    workers: BTreeMap<NodeName, (u32, EventTail)>,
}

impl Watched<'_> {
    /// Shows an event and listens to the worker that it tells of.
    fn take(&mut self, ts_ms: u64, event: &RunEvent, progress: &mut dyn Progress) {
        if let RunEvent::Node { node, fingerprint, state } = event {
            if let NodeState::Running { attempt } = state {
                let folder = JobDir::new(&self.layout.jobs(), fingerprint).attempt(*attempt);
                self.workers.insert(node.clone(), (*attempt, EventTail::new(&folder)));
            } else if let Some((attempt, mut events)) = self.workers.remove(node) {
                events.read().iter().for_each(|event| progress.worker_event(node, attempt, event));
            }
        }
        progress.run_event(ts_ms, event);
    }

    /// Shows what workers said since the last call.
    fn hear(&mut self, progress: &mut dyn Progress) {
        for (node, (attempt, events)) in &mut self.workers {
            events.read().iter().for_each(|event| progress.worker_event(node, *attempt, event));
        }
    }
}
