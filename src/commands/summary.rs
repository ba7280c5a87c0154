//! What a run came to, from its events and the manifests of what it made or found.

use std::path::Path;

use crate::progress::Summary;
use crate::run::event::{NodeState, Origin, RunResult};
use crate::store::ArtifactStore;
use crate::store::index::RunIndex;
use crate::store::runs::RunView;

/// Returns the summary of a run; its seconds and its report are left to the caller.
pub fn summarise(index: &RunIndex, view: &RunView, store: &ArtifactStore, run_dir: &Path) -> Summary {
    let mut summary = Summary {
        run: view.run.clone(),
        result: view.result.unwrap_or(RunResult::Stopped),
        num_ran: 0,
        num_cached: 0,
        num_failed: 0,
        num_left: 0,
        seconds: 0.0,
        saved_seconds: 0.0,
        failures: Vec::new(),
        run_dir: run_dir.to_owned(),
        report: None,
    };
    for (node, _, fingerprint) in &index.nodes {
        match view.state(node) {
            NodeState::Done { origin: Origin::Ran { .. } } => summary.num_ran += 1,
            NodeState::Done { .. } => {
                summary.num_cached += 1;
                summary.saved_seconds += store.result(fingerprint).map_or(0.0, |made| made.run_seconds);
            }
            NodeState::Failed { failure, .. } => {
                summary.num_failed += 1;
                summary.failures.push((node.clone(), failure.message.clone()));
            }
            _ => summary.num_left += 1,
        }
    }
    summary
}
