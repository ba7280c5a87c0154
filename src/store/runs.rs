//! Runs as read from disk: the fold of a journal into a table of nodes, and the plan saved beside it.
//!
//! This is all that `status`, `logs`, `report` and `runs` need, so they work while a run goes on and never open the
//! state. Knows how to read; what to show is decided by the commands and the report.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use deepgen_contract::id::{Fingerprint, NodeName};
use serde::{Deserialize, Serialize};

use super::journal::{self, JOURNAL_FILE, JournalError, JournalRecord};
use super::layout::Layout;
pub use super::saved::{PLAN_VERSION, SavedPlan};
use crate::run::event::{NodeState, RunEvent, RunResult};

/// One node of a run, as its events tell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    /// Identity of its result.
    pub fingerprint: Fingerprint,
    /// Where it stands.
    pub state: NodeState,
    /// When it entered that state, milliseconds since 1970.
    pub since_ms: u64,
    /// Start of its first attempt in this run.
    pub started_ms: Option<u64>,
    /// Attempts of this run that failed.
    pub failures: u32,
}

/// A run, as its events tell.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RunView {
    /// Name of the run.
    pub run: String,
    /// Name of the pipeline or experiment.
    pub pipeline: String,
    /// Chosen profile.
    pub profile: String,
    /// Seed of the pipeline.
    pub seed: u64,
    /// Identity of its plan.
    pub plan: String,
    /// Command line that started it.
    pub command: Vec<String>,
    /// Start, milliseconds since 1970.
    pub started_ms: u64,
    /// Newest event, milliseconds since 1970.
    pub updated_ms: u64,
    /// Orchestrator processes that worked on it, oldest first: process id and host.
    pub owners: Vec<(u32, String)>,
    /// How it ended, if it did.
    pub result: Option<RunResult>,
    /// Nodes with an event.
    pub nodes: BTreeMap<NodeName, NodeView>,
    /// Number of the newest event.
    pub last_seq: u64,
}

impl RunView {
    /// Returns the run that these records tell of.
    pub fn fold(records: &[JournalRecord]) -> Self {
        let mut view = Self::default();
        records.iter().for_each(|record| view.apply(record));
        view
    }

    /// Takes in the next record.
    pub fn apply(&mut self, record: &JournalRecord) {
        self.last_seq = record.seq;
        self.updated_ms = record.ts_ms;
        match &record.event {
            RunEvent::RunStarted { run, pipeline, profile, seed, plan, command, pid, host } => {
                self.run.clone_from(run);
                self.pipeline.clone_from(pipeline);
                self.profile.clone_from(profile);
                self.seed = *seed;
                self.plan.clone_from(plan);
                self.command.clone_from(command);
                self.started_ms = record.ts_ms;
                self.owners.push((*pid, host.clone()));
            }
            RunEvent::RunResumed { pid, host } => {
                self.owners.push((*pid, host.clone()));
                self.result = None;
            }
            RunEvent::Node { node, fingerprint, state } => {
                let is_failure = matches!(state, NodeState::Retrying { .. } | NodeState::Failed { .. });
                let starts = matches!(state, NodeState::Running { .. });
                let mut view = NodeView {
                    fingerprint: *fingerprint,
                    state: state.clone(),
                    since_ms: record.ts_ms,
                    started_ms: starts.then_some(record.ts_ms),
                    failures: u32::from(is_failure),
                };
                match self.nodes.get_mut(node) {
                    // A resumed run tells again what it found done; that is no new transition.
                    Some(before) if before.state == *state && state.is_done() => {}
                    Some(before) => {
                        view.started_ms = before.started_ms.or(view.started_ms);
                        view.failures += before.failures;
                        *before = view;
                    }
                    None => drop(self.nodes.insert(node.clone(), view)),
                }
            }
            RunEvent::RunFinished { result } => self.result = Some(*result),
        }
    }

    /// Reads the journal of a run.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn read(run_dir: &Path) -> Result<Self, JournalError> {
        Ok(Self::fold(&journal::read(&run_dir.join(JOURNAL_FILE))?.records))
    }

    /// Returns the state of a node; one without an event waits.
    pub fn state(&self, node: &NodeName) -> &NodeState {
        self.nodes.get(node).map_or(&NodeState::Waiting, |view| &view.state)
    }
}

/// Returns the names of all runs, oldest first: names start with the time.
pub fn list(layout: &Layout) -> Vec<String> {
    let Ok(entries) = fs::read_dir(layout.runs()) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        // A run without a line was never started.
        .filter(|entry| fs::metadata(entry.path().join(JOURNAL_FILE)).is_ok_and(|journal| journal.len() > 0))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::event::{Failure, Origin};
    use deepgen_contract::job::FailureCause;

    #[test]
    fn a_fold_counts_failures_and_keeps_the_first_start() {
        let node = NodeName("sft".into());
        let failure = Failure { cause: FailureCause::Io, message: "disk full".into() };
        let states = [
            NodeState::Running { attempt: 1 },
            NodeState::Retrying { attempt: 1, failure, until_ms: 30 },
            NodeState::Running { attempt: 2 },
            NodeState::Done { origin: Origin::Ran { attempt: 2 } },
        ];
        let records = states.into_iter().enumerate().map(|(i, state)| JournalRecord {
            version: 1,
            seq: i as u64 + 1,
            ts_ms: 10 * (i as u64 + 1),
            prev: String::new(),
            event: RunEvent::Node { node: node.clone(), fingerprint: Fingerprint([0; 32]), state },
        });
        let view = RunView::fold(&records.collect::<Vec<_>>());
        let sft = &view.nodes[&node];
        assert_eq!((sft.started_ms, sft.since_ms, sft.failures), (Some(10), 40, 1));
        assert!(view.state(&node).is_done());
        assert_eq!(view.state(&NodeName("rl".into())), &NodeState::Waiting);
    }
}
