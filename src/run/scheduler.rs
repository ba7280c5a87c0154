//! What comes next: a pure function from an event and the time to actions.
//!
//! It touches no disk, clock or process. The driver performs the actions in order; every `Set` is written down before
//! what follows it happens. A failure blocks the descendants of its node and nothing else. The work for an event grows
//! with what changes, not with the number of nodes.

use std::collections::{BTreeMap, BTreeSet};

use deepgen_contract::id::NodeName;
use deepgen_contract::job::{FailureCause, JobRemedies};

use super::board::{Board, Entry, Start};
use super::event::{Failure, NodeState, Origin, RunResult};
use super::slots::Slots;
use crate::spec::Remedies;

/// Time that a worker has to write a checkpoint and go, before it is killed.
const GRACE_MS: u64 = 60_000;
/// A micro-batch is never divided further than this; one of a single sample stays what it is.
const MOST_DIVISION: u32 = 1 << 16;

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
    /// A worker gave a sign of life.
    Heard {
        /// Its node.
        node: NodeName,
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
    /// It died without a word; counts as [`FailureCause::Lost`].
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
        /// With these GPUs and other things.
        slot_ids: BTreeMap<String, Vec<u32>>,
        /// With these changes against the first attempt.
        remedies: JobRemedies,
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

/// How an executor may be used.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Capacity by slot.
    pub capacity: BTreeMap<String, f64>,
    /// Identities of a slot's things, where they do not count from 0.
    pub slot_ids: BTreeMap<String, Vec<u32>>,
    /// Workers at a time.
    pub max_active: usize,
    /// False when nothing starts after the first failure.
    pub keep_going: bool,
}

/// An attempt that is watched.
#[derive(Debug, Clone)]
struct Watch {
    begun_ms: u64,
    heard_ms: u64,
    /// Why it was told to end, and when.
    ending: Option<(FailureCause, String, u64)>,
    is_killed: bool,
}

/// The state of a run and the rules by which it changes.
#[derive(Debug, Clone)]
pub struct Scheduler {
    board: Board,
    idle: Slots,
    watches: BTreeMap<usize, Watch>,
    max_active: usize,
    keep_going: bool,
    stopping: Option<Cancel>,
    has_begun: bool,
    is_finished: bool,
}

impl Scheduler {
    /// Returns a scheduler of `entries`, which stand after their inputs.
    pub fn new(entries: Vec<Entry>, rules: Rules) -> Self {
        let named: BTreeSet<String> = entries.iter().flat_map(|entry| entry.request.ids.keys().cloned()).collect();
        let idle = Slots::new(&rules.capacity, &rules.slot_ids, &named);
        let board = Board::new(entries, idle.clone());
        Self {
            board,
            idle,
            watches: BTreeMap::new(),
            max_active: rules.max_active,
            keep_going: rules.keep_going,
            stopping: None,
            has_begun: false,
            is_finished: false,
        }
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
            Event::Begin => self.begin(now_ms, &mut actions),
            Event::Ended { node, attempt, ended } => self.ended(&node, attempt, ended, now_ms, &mut actions),
            Event::Sealed { node, attempt } => self.sealed(&node, attempt, &mut actions),
            Event::Heard { node } => self.heard(&node, now_ms),
            Event::Tick => self.watch(now_ms, &mut actions),
            Event::Stop { how } => self.stop(how, &mut actions),
        }
        self.advance(now_ms, &mut actions);
        actions
    }

    /// Moves a node, and with it those that wait for it.
    fn set(&mut self, at: usize, state: NodeState, actions: &mut Vec<Action>) {
        let node = self.board.cells()[at].entry.name.clone();
        let is_failure = matches!(state, NodeState::Failed { .. });
        let is_done = state.is_done();
        if !matches!(state, NodeState::Running { .. }) {
            self.watches.remove(&at);
        }
        self.board.set(at, state.clone());
        actions.push(Action::Set { node: node.clone(), state });
        if is_done {
            for reader in self.board.readers(at).to_vec() {
                self.wake(reader, actions);
            }
        }
        if is_failure {
            self.block_descendants(at, &node, actions);
        }
    }

    fn wake(&mut self, at: usize, actions: &mut Vec<Action>) {
        let cell = &self.board.cells()[at];
        if self.may_wait(at) && *cell.state() == NodeState::Waiting && cell.is_unblocked() {
            self.set(at, NodeState::Ready, actions);
        }
    }

    /// Returns false for a node that is about to be found sealed or at work: it does not wait for anything.
    fn may_wait(&self, at: usize) -> bool {
        self.has_begun || matches!(self.board.cells()[at].entry.start, Start::Fresh { .. })
    }

    fn block_descendants(&mut self, at: usize, by: &NodeName, actions: &mut Vec<Action>) {
        let mut left: BTreeSet<usize> = self.board.readers(at).iter().copied().collect();
        while let Some(at) = left.pop_first() {
            if *self.board.cells()[at].state() != NodeState::Waiting || !self.may_wait(at) {
                continue;
            }
            self.set(at, NodeState::Blocked { by: by.clone() }, actions);
            left.extend(self.board.readers(at));
        }
    }

    fn begin(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        for at in 0..self.board.cells().len() {
            self.fail_if_it_never_fits(at, actions);
        }
        for at in 0..self.board.cells().len() {
            let entry = &self.board.cells()[at].entry;
            let node = entry.name.clone();
            match entry.start.clone() {
                Start::Sealed(origin) => self.set(at, NodeState::Done { origin }, actions),
                Start::Alive { attempt } => {
                    // It runs whether its slots are free or not; the books are kept if they are.
                    if let Ok(held) = self.board.slots().fit(self.board.request(at)) {
                        self.board.hold(at, held);
                    }
                    self.set(at, NodeState::Running { attempt }, actions);
                    self.begin_watch(at, now_ms);
                    actions.push(Action::Attach { node, attempt });
                }
                Start::Finished { attempt } => {
                    self.set(at, NodeState::Sealing { attempt }, actions);
                    actions.push(Action::Seal { node, attempt });
                }
                Start::Fresh { .. } => self.wake(at, actions),
            }
        }
        self.has_begun = true;
    }

    /// Fails a node that would wait for ever.
    fn fail_if_it_never_fits(&mut self, at: usize, actions: &mut Vec<Action>) {
        let cell = &self.board.cells()[at];
        if *cell.state() != NodeState::Waiting || !self.may_wait(at) {
            return;
        }
        let request = self.board.request(at);
        if let Err(slot) = self.idle.fit(request) {
            let share = request.shares.get(&slot).copied().unwrap_or(0.0);
            let message = format!("it needs {share} of slot `{slot}`, which the executor never has");
            let failure = Failure { cause: FailureCause::Input, message };
            self.set(at, NodeState::Failed { attempt: 0, failure }, actions);
        }
    }

    fn begin_watch(&mut self, at: usize, now_ms: u64) {
        let watch = Watch { begun_ms: now_ms, heard_ms: now_ms, ending: None, is_killed: false };
        self.watches.insert(at, watch);
    }

    fn heard(&mut self, node: &NodeName, now_ms: u64) {
        let watch = self.board.at(node).and_then(|at| self.watches.get_mut(&at));
        if let Some(watch) = watch {
            watch.heard_ms = now_ms;
        }
    }

    /// Ends attempts that take too long or say nothing any more.
    fn watch(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        for (&at, watch) in &mut self.watches {
            let cell = &self.board.cells()[at];
            let Some(attempt) = cell.state().attempt() else { continue };
            let cancel = |how| Action::Cancel { node: cell.entry.name.clone(), attempt, how };
            if let Some((_, _, since_ms)) = watch.ending {
                if !watch.is_killed && now_ms.saturating_sub(since_ms) >= GRACE_MS {
                    watch.is_killed = true;
                    actions.push(cancel(Cancel::AtOnce));
                }
                continue;
            }
            let over = |limit: Option<u64>, since: u64| limit.filter(|limit| now_ms.saturating_sub(since) >= *limit);
            let is_stalled = cell.entry.remedies.stalled;
            if let Some(limit) = over(cell.entry.timeout_ms, watch.begun_ms) {
                let message = format!("it was over its time of {} s", limit / 1000);
                watch.ending = Some((FailureCause::TimedOut, message, now_ms));
                actions.push(cancel(Cancel::Gently));
            } else if let Some(limit) = over(cell.entry.stall_ms, watch.heard_ms).filter(|_| is_stalled) {
                let message = format!("nothing was heard of it for {} s", limit / 1000);
                watch.ending = Some((FailureCause::Stalled, message, now_ms));
                watch.is_killed = true;
                actions.push(cancel(Cancel::AtOnce));
            }
        }
    }

    fn ended(&mut self, node: &NodeName, attempt: u32, ended: Ended, now_ms: u64, actions: &mut Vec<Action>) {
        let Some(at) = self.board.at(node) else { return };
        let cell = &self.board.cells()[at];
        // A worker of an earlier attempt has no say any more.
        if !cell.state().is_active() || cell.state().attempt() != Some(attempt) {
            return;
        }
        let told = self.watches.get(&at).and_then(|watch| watch.ending.clone());
        let failure = match (ended, told) {
            (Ended::Done, _) => {
                self.set(at, NodeState::Sealing { attempt }, actions);
                actions.push(Action::Seal { node: node.clone(), attempt });
                return;
            }
            (Ended::Stopped { step }, _) if self.stopping.is_some() => {
                return self.set(at, NodeState::Stopped { attempt, step: Some(step) }, actions);
            }
            (Ended::Died { .. }, _) if self.stopping.is_some() => {
                return self.set(at, NodeState::Stopped { attempt, step: None }, actions);
            }
            (Ended::Stopped { .. } | Ended::Died { .. }, Some((cause, message, _))) => Failure { cause, message },
            (Ended::Stopped { step }, None) => Failure {
                cause: FailureCause::Lost,
                message: format!("the worker was stopped at step {step} by someone else"),
            },
            (Ended::Died { message }, None) => Failure { cause: FailureCause::Lost, message },
            (Ended::Failed(failure), _) => failure,
        };
        let cell = &self.board.cells()[at];
        let is_last = cell.failures >= cell.entry.retries || self.stopping.is_some();
        if is_last || !is_curable(failure.cause, cell.entry.remedies) {
            return self.set(at, NodeState::Failed { attempt, failure }, actions);
        }
        let until_ms = now_ms.saturating_add(cell.entry.backoff.pause_ms(cell.failures + 1));
        self.apply_remedy(at, failure.cause);
        self.set(at, NodeState::Retrying { attempt, failure, until_ms }, actions);
    }

    /// Changes what the next attempt does, so that it need not fail of the same cause.
    fn apply_remedy(&mut self, at: usize, cause: FailureCause) {
        let cell = self.board.cell_mut(at);
        match cause {
            FailureCause::OutOfMemory => {
                let division = &mut cell.applied.micro_batch_division;
                *division = division.saturating_mul(2).min(MOST_DIVISION);
            }
            FailureCause::NonFinite => {
                // The newest checkpoint was written before the loss went wrong; if that is not enough, an older one.
                cell.applied.roll_back = cell.num_non_finite;
                cell.num_non_finite += 1;
            }
            _ => {}
        }
    }

    fn sealed(&mut self, node: &NodeName, attempt: u32, actions: &mut Vec<Action>) {
        let is_it = |state: &NodeState| state.is_active() && state.attempt() == Some(attempt);
        let Some(at) = self.board.at(node).filter(|at| is_it(self.board.cells()[*at].state())) else { return };
        self.set(at, NodeState::Done { origin: Origin::Ran { attempt } }, actions);
        let twins: Vec<usize> = self.board.twins(at).collect();
        for twin in twins {
            let state = self.board.cells()[twin].state();
            if !state.is_final() && !state.is_active() {
                self.set(twin, NodeState::Done { origin: Origin::Shared { with: node.clone() } }, actions);
            }
        }
    }

    fn stop(&mut self, how: Cancel, actions: &mut Vec<Action>) {
        self.stopping = Some(how);
        for at in self.board.running() {
            let cell = &self.board.cells()[at];
            if let NodeState::Running { attempt } = *cell.state() {
                actions.push(Action::Cancel { node: cell.entry.name.clone(), attempt, how });
            }
        }
    }

    /// Ends pauses, launches what fits, and notices the end.
    fn advance(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        if self.is_finished {
            return;
        }
        while let Some(at) = self.board.due(now_ms) {
            match self.board.cells()[at].is_unblocked() {
                true => self.set(at, NodeState::Ready, actions),
                // It was found at work though an input is not there any more.
                false => self.wait_again(at, actions),
            }
        }
        let (_, num_failed, _) = self.board.counts();
        let may_start = self.stopping.is_none() && (self.keep_going || num_failed == 0);
        while may_start
            && self.board.num_running() < self.max_active
            && let Some((at, held)) = self.board.next()
        {
            let slot_ids = held.ids();
            let cell = &self.board.cells()[at];
            let (node, attempt, remedies) = (cell.entry.name.clone(), cell.next_attempt, cell.applied);
            self.board.hold(at, held);
            self.set(at, NodeState::Running { attempt }, actions);
            self.begin_watch(at, now_ms);
            actions.push(Action::Launch { node, attempt, slot_ids, remedies });
        }
        if let Some(result) = self.result(may_start) {
            self.is_finished = true;
            actions.push(Action::Finish(result));
        }
    }

    fn wait_again(&mut self, at: usize, actions: &mut Vec<Action>) {
        let cells = self.board.cells();
        let by = cells[at].inputs.iter().find_map(|input| match cells[*input].state() {
            NodeState::Failed { .. } => Some(cells[*input].entry.name.clone()),
            NodeState::Blocked { by } => Some(by.clone()),
            _ => None,
        });
        let state = by.map_or(NodeState::Waiting, |by| NodeState::Blocked { by });
        self.set(at, state, actions);
    }

    fn result(&self, may_start: bool) -> Option<RunResult> {
        let (num_open, num_failed, num_stopped) = self.board.counts();
        if self.board.is_active() || (num_open > 0 && may_start) {
            return None;
        }
        Some(match (num_failed > 0, num_open + num_stopped > 0) {
            (true, _) => RunResult::Failed,
            (false, true) => RunResult::Stopped,
            (false, false) => RunResult::Done,
        })
    }
}

/// Returns true when another attempt may end differently.
fn is_curable(cause: FailureCause, remedies: Remedies) -> bool {
    match cause {
        FailureCause::Input => false,
        FailureCause::OutOfMemory => remedies.out_of_memory,
        FailureCause::NonFinite => remedies.non_finite,
        FailureCause::Stalled => remedies.stalled,
        FailureCause::Lost => remedies.lost,
        FailureCause::Io | FailureCause::Internal | FailureCause::Program | FailureCause::TimedOut => true,
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
