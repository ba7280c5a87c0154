//! What comes next: a pure function from an event and the time to actions.
//!
//! It touches no disk, clock or process. The driver performs the actions in order; every `Set` is durable before what
//! follows it happens. A failure blocks the descendants of its node and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use deepgen_contract::id::NodeName;
use deepgen_contract::job::FailureCause;

use super::board::{Board, Cell, Entry, Start};
use super::event::{Failure, NodeState, Origin, RunResult};

/// First pause before another attempt; doubled each time.
const RETRY_PAUSE_MS: u64 = 500;
/// Longest pause before another attempt.
const LONGEST_PAUSE_MS: u64 = 60_000;

/// Something the world did.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The run begins.
    Begin,
    /// An attempt ended.
    Ended {
        /// Its node.
        node: NodeName,
        /// Its number.
        attempt: u32,
        /// How.
        ended: Ended,
    },
    /// The result of an attempt is in the store.
    Sealed {
        /// Its node.
        node: NodeName,
        /// Its number.
        attempt: u32,
    },
    /// Time has passed.
    Tick,
    /// A person or the system wants the run to stop.
    Stop {
        /// How soon.
        how: Cancel,
    },
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ended {
    /// Its output is complete.
    Done,
    /// It stopped on request after writing a checkpoint.
    Stopped {
        /// Step of the checkpoint.
        step: u64,
    },
    /// It said why it gave no result.
    Failed(Failure),
    /// It died without a word, or never started; counts as [`FailureCause::Internal`].
    Died {
        /// What is known of its end.
        message: String,
    },
}

/// How a worker is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancel {
    /// It may write a checkpoint first.
    Gently,
    /// It dies now.
    AtOnce,
}

/// Something the driver must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make the state of a node durable.
    Set {
        /// The node.
        node: NodeName,
        /// The state it entered.
        state: NodeState,
    },
    /// Start a worker.
    Launch {
        /// For this node.
        node: NodeName,
        /// As this attempt.
        attempt: u32,
    },
    /// Follow a worker that runs already.
    Attach {
        /// Of this node.
        node: NodeName,
        /// Its attempt.
        attempt: u32,
    },
    /// Move the output of an attempt into the store.
    Seal {
        /// Of this node.
        node: NodeName,
        /// The attempt.
        attempt: u32,
    },
    /// Stop a worker.
    Cancel {
        /// Of this node.
        node: NodeName,
        /// Its attempt.
        attempt: u32,
        /// How.
        how: Cancel,
    },
    /// Nothing is left to do.
    Finish(RunResult),
}

/// The state of a run and the rules by which it changes.
#[derive(Debug, Clone)]
pub struct Scheduler {
    board: Board,
    capacity: BTreeMap<String, f64>,
    max_active: usize,
    stopping: Option<Cancel>,
    is_finished: bool,
}

impl Scheduler {
    /// Returns a scheduler of `entries`, which stand after their inputs, over slots of `capacity`; at most `max_active`
    /// workers run at a time.
    pub fn new(entries: Vec<Entry>, capacity: BTreeMap<String, f64>, max_active: usize) -> Self {
        let board = Board::new(entries, capacity.clone());
        Self { board, capacity, max_active, stopping: None, is_finished: false }
    }

    /// Returns where the nodes stand.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Returns true while a stop was asked for and workers still run.
    pub fn is_stopping(&self) -> bool {
        self.stopping.is_some()
    }

    /// Takes in an event and returns what to do about it, in order.
    pub fn on(&mut self, event: Event, now_ms: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Begin => self.begin(&mut actions),
            Event::Ended { node, attempt, ended } => self.ended(&node, attempt, ended, now_ms, &mut actions),
            Event::Sealed { node, attempt } => self.sealed(&node, attempt, &mut actions),
            Event::Tick => {}
            Event::Stop { how } => self.stop(how, &mut actions),
        }
        self.advance(now_ms, &mut actions);
        actions
    }

    fn set(&mut self, node: &NodeName, state: NodeState, actions: &mut Vec<Action>) {
        self.board.set(node, state.clone());
        actions.push(Action::Set { node: node.clone(), state });
    }

    fn begin(&mut self, actions: &mut Vec<Action>) {
        let starts: Vec<_> = self.board.cells().iter().map(|cell| cell.entry.clone()).collect();
        for entry in starts {
            let node = entry.name.clone();
            match entry.start {
                Start::Sealed(origin) => self.set(&node, NodeState::Done { origin }, actions),
                Start::Alive { attempt } => {
                    self.set(&node, NodeState::Running { attempt }, actions);
                    actions.push(Action::Attach { node, attempt });
                }
                Start::Finished { attempt } => {
                    self.set(&node, NodeState::Sealing { attempt }, actions);
                    actions.push(Action::Seal { node, attempt });
                }
                Start::Fresh { .. } => {
                    if let Some(message) = self.never_fits(&entry) {
                        let failure = Failure { cause: FailureCause::Input, message };
                        self.set(&node, NodeState::Failed { attempt: 0, failure }, actions);
                    }
                }
            }
        }
    }

    /// Returns why a node could wait for ever.
    fn never_fits(&self, entry: &Entry) -> Option<String> {
        entry.slots.iter().find_map(|(slot, share)| {
            let capacity = self.capacity.get(slot).copied().unwrap_or(0.0);
            (*share > capacity + 1e-9)
                .then(|| format!("it needs {share} of slot `{slot}`, and the executor has {capacity}"))
        })
    }

    fn ended(&mut self, node: &NodeName, attempt: u32, ended: Ended, now_ms: u64, actions: &mut Vec<Action>) {
        let Some(cell) = self.board.get(node) else { return };
        // A worker of an earlier attempt has no say any more.
        if !cell.state().is_active() || cell.state().attempt() != Some(attempt) {
            return;
        }
        let (retries, failures) = (cell.entry.retries, cell.failures);
        let failure = match ended {
            Ended::Done => {
                self.set(node, NodeState::Sealing { attempt }, actions);
                actions.push(Action::Seal { node: node.clone(), attempt });
                return;
            }
            Ended::Stopped { step } if self.stopping.is_some() => {
                return self.set(node, NodeState::Stopped { attempt, step: Some(step) }, actions);
            }
            Ended::Stopped { step } => Failure {
                cause: FailureCause::Internal,
                message: format!("the worker was stopped at step {step} by someone else"),
            },
            Ended::Died { .. } if self.stopping.is_some() => {
                return self.set(node, NodeState::Stopped { attempt, step: None }, actions);
            }
            Ended::Died { message } => Failure { cause: FailureCause::Internal, message },
            Ended::Failed(failure) => failure,
        };
        if !failure.cause.may_retry() || failures >= retries || self.stopping.is_some() {
            return self.set(node, NodeState::Failed { attempt, failure }, actions);
        }
        let pause = RETRY_PAUSE_MS.saturating_mul(1 << failures.min(16)).min(LONGEST_PAUSE_MS);
        self.set(node, NodeState::Retrying { attempt, failure, until_ms: now_ms + pause }, actions);
    }

    fn sealed(&mut self, node: &NodeName, attempt: u32, actions: &mut Vec<Action>) {
        let Some(cell) = self.board.get(node).filter(|cell| cell.state().is_active()) else { return };
        let fingerprint = cell.entry.fingerprint;
        self.set(node, NodeState::Done { origin: Origin::Ran { attempt } }, actions);
        let same = |cell: &&Cell| cell.entry.fingerprint == fingerprint && !cell.state().is_final();
        let twins: Vec<_> = self.board.cells().iter().filter(same).map(|cell| cell.entry.name.clone()).collect();
        for twin in twins {
            self.set(&twin, NodeState::Done { origin: Origin::Shared { with: node.clone() } }, actions);
        }
    }

    fn stop(&mut self, how: Cancel, actions: &mut Vec<Action>) {
        self.stopping = Some(how);
        for cell in self.board.cells() {
            if let NodeState::Running { attempt } = *cell.state() {
                actions.push(Action::Cancel { node: cell.entry.name.clone(), attempt, how });
            }
        }
    }

    /// Blocks what cannot be reached, wakes what can, launches what fits, and notices the end.
    fn advance(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        if self.is_finished {
            return;
        }
        let names: Vec<_> = self.board.cells().iter().map(|cell| cell.entry.name.clone()).collect();
        // Inputs stand before their readers, so one pass reaches all descendants.
        for name in &names {
            if let Some(state) = self.next_state(name, now_ms) {
                self.set(name, state, actions);
            }
        }
        if self.stopping.is_none() {
            names.iter().for_each(|name| self.launch_if_possible(name, actions));
        }
        if let Some(result) = self.result() {
            self.is_finished = true;
            actions.push(Action::Finish(result));
        }
    }

    fn next_state(&self, name: &NodeName, now_ms: u64) -> Option<NodeState> {
        let cell = self.board.get(name)?;
        let inputs = || cell.entry.inputs.iter().filter_map(|input| Some((input, self.board.get(input)?.state())));
        match cell.state() {
            NodeState::Waiting => {
                let blocked = inputs().find_map(|(input, state)| match state {
                    NodeState::Failed { .. } => Some(input.clone()),
                    NodeState::Blocked { by } => Some(by.clone()),
                    _ => None,
                });
                match blocked {
                    Some(by) => Some(NodeState::Blocked { by }),
                    None if inputs().all(|(_, state)| state.is_done()) => Some(NodeState::Ready),
                    None => None,
                }
            }
            NodeState::Retrying { until_ms, .. } if *until_ms <= now_ms => Some(NodeState::Ready),
            _ => None,
        }
    }

    fn launch_if_possible(&mut self, name: &NodeName, actions: &mut Vec<Action>) {
        let Some(cell) = self.board.get(name) else { return };
        // A twin that runs will make this node's result too.
        let active = || self.board.cells().iter().filter(|other| other.state().is_active());
        let has_twin = active().any(|other| other.entry.fingerprint == cell.entry.fingerprint);
        let is_ready = *cell.state() == NodeState::Ready;
        if !is_ready || has_twin || self.board.num_active() >= self.max_active || !self.board.fits(&cell.entry) {
            return;
        }
        let attempt = cell.next_attempt;
        self.set(name, NodeState::Running { attempt }, actions);
        actions.push(Action::Launch { node: name.clone(), attempt });
    }

    fn result(&self) -> Option<RunResult> {
        let words: BTreeSet<&str> = self.board.cells().iter().map(|cell| cell.state().word()).collect();
        let is_active = self.board.num_active() > 0;
        let is_open = self.board.cells().iter().any(|cell| !cell.state().is_final());
        if is_active || (is_open && self.stopping.is_none()) {
            return None;
        }
        Some(match (words.contains("failed"), is_open || words.contains("stopped")) {
            (true, _) => RunResult::Failed,
            (false, true) => RunResult::Stopped,
            (false, false) => RunResult::Done,
        })
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
