//! A run that has nothing to do: every result is sealed, and an earlier run of the very same plan came to its end.
//!
//! It opens no state and leaves no trace, so that asking again costs no more than planning. Reads journals; a plan with
//! anything left to do, or another way to the same results, is opened as a run by [`super::opening`].

use super::opening::plan_identity;
use super::selection::Selected;
use super::settled::Settled;
use crate::plan::PlannedNode;
use crate::progress::Summary;
use crate::report::REPORT_FILE;
use crate::run::event::{RunEvent, RunResult};
use crate::spec::Resolved;
use crate::store::journal::{self, JOURNAL_FILE};
use crate::store::{ArtifactStore, Layout, runs};

/// Returns what the newest run of this very plan came to, when it is done and all its results are still sealed.
pub fn finished(resolved: &Resolved, selected: &Selected, store: &ArtifactStore) -> Option<Summary> {
    if !selected.plan.is_cached() {
        return None;
    }
    let seconds = |planned: &PlannedNode| store.result(&planned.fingerprint).map(|made| made.run_seconds);
    let saved_seconds = selected.plan.nodes.iter().filter_map(seconds).sum();
    let identity = plan_identity(resolved, selected);
    summary(store.layout(), (&resolved.name, &identity), selected.plan.nodes.len(), saved_seconds)
}

/// Returns what the newest run of a plan came to whose results are all known to be sealed, when it is done.
pub fn of_settled(settled: &Settled, layout: &Layout) -> Option<Summary> {
    summary(layout, (&settled.name, &settled.identity), settled.num_nodes, settled.saved_seconds)
}

fn summary(layout: &Layout, plan: (&str, &str), num_cached: usize, saved_seconds: f64) -> Option<Summary> {
    let run = finished_run(layout, plan)?;
    let run_dir = layout.run(&run);
    let report = Some(run_dir.join(REPORT_FILE)).filter(|report| report.is_file());
    Some(Summary {
        run,
        result: RunResult::Done,
        num_ran: 0,
        num_cached,
        num_failed: 0,
        num_left: 0,
        seconds: 0.0,
        saved_seconds,
        failures: Vec::new(),
        run_dir,
        report,
    })
}

/// Returns the newest run of a plan, if it is done.
fn finished_run(layout: &Layout, (pipeline, identity): (&str, &str)) -> Option<String> {
    let mut names = runs::list(layout).into_iter().rev();
    let run = names.find(|name| {
        let first = journal::first(&layout.run(name).join(JOURNAL_FILE));
        matches!(first.map(|first| first.event), Some(RunEvent::RunStarted { pipeline: of, plan, .. })
            if of == pipeline && plan == identity)
    })?;
    let last = journal::last(&layout.run(&run).join(JOURNAL_FILE)).ok()??;
    (last.event == RunEvent::RunFinished { result: RunResult::Done }).then_some(run)
}
