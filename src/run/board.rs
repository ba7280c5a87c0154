//! Where every node of a run stands: states, attempts and slots, with one function through which every change passes.
//!
//! Knows which changes are legal, what they occupy and who waits for them; not why they happen. Every question of the
//! scheduler is answered without looking at all nodes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::job::JobRemedies;

use super::event::{NodeState, Origin};
use super::slots::{Held, Request, Slots};
use crate::spec::{Backoff, Remedies};

/// What the scheduler knows of a node at its start.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its name.
    pub name: NodeName,
    /// Identity of its result.
    pub fingerprint: Fingerprint,
    /// Nodes whose results it reads, and nodes that it needs done before it; unknown names are passed over.
    pub inputs: Vec<NodeName>,
    /// What it takes of the slots while its worker runs.
    pub request: Request,
    /// Of the nodes that are ready and fit, the highest starts first.
    pub priority: i64,
    /// Further attempts after one that failed for a cause that may pass.
    pub retries: u32,
    /// Pauses between attempts.
    pub backoff: Backoff,
    /// What may be done about a failure.
    pub remedies: Remedies,
    /// Longest time of an attempt, milliseconds.
    pub timeout_ms: Option<u64>,
    /// Longest silence of a worker, milliseconds.
    pub stall_ms: Option<u64>,
    /// Attempts of this run that failed already.
    pub failures: u32,
    /// What the newest attempt did differently.
    pub applied: JobRemedies,
    /// What earlier processes left.
    pub start: Start,
}

/// What earlier processes left of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// Its result is sealed, and this is how that came about.
    Sealed(Origin),
    /// Nothing that counts; this is the number of the next attempt.
    Fresh {
        /// From 1.
        next_attempt: u32,
    },
    /// A worker that still runs.
    Alive {
        /// Number of its attempt.
        attempt: u32,
    },
    /// A worker that finished after its orchestrator died.
    Finished {
        /// Number of its attempt.
        attempt: u32,
    },
}

/// A node and where it stands.
#[derive(Debug, Clone)]
pub struct Cell {
    /// What was known at the start, but for its inputs, which are in `inputs`, and its request: [`Board::request`].
    pub entry: Entry,
    /// Places of the nodes that it reads or needs, in ascending order.
    pub inputs: Box<[usize]>,
    /// Number of the next attempt.
    pub next_attempt: u32,
    /// Attempts of this run that failed.
    pub failures: u32,
    /// What the next attempt does differently.
    pub applied: JobRemedies,
    /// Losses that were not finite, so far.
    pub num_non_finite: u32,
    state: NodeState,
    held: Option<Box<Held>>,
    num_unmet: usize,
    readers: Vec<usize>,
    /// Nodes that ask for the same slots are of one class.
    class: usize,
}

impl Cell {
    /// Returns where the node stands.
    pub fn state(&self) -> &NodeState {
        &self.state
    }

    /// Returns what it has of the slots.
    pub fn held(&self) -> Option<&Held> {
        self.held.as_deref()
    }

    /// Returns true when everything it reads and needs is done.
    pub fn is_unblocked(&self) -> bool {
        self.num_unmet == 0
    }
}

/// Place of a ready node among those of its class: the highest priority first, then the order of the plan.
type Rank = (std::cmp::Reverse<i64>, usize);

/// All nodes of a run.
#[derive(Debug, Clone)]
pub struct Board {
    cells: Vec<Cell>,
    index: HashMap<NodeName, usize>,
    twins: HashMap<Fingerprint, Vec<usize>>,
    classes: Vec<Request>,
    slots: Slots,
    ready: BTreeMap<usize, BTreeSet<Rank>>,
    retrying: BTreeSet<(u64, usize)>,
    running: BTreeSet<usize>,
    num_sealing: usize,
    num_open: usize,
    num_failed: usize,
    num_stopped: usize,
}

impl Board {
    /// Puts every node in `Waiting`; `entries` stand after their inputs.
    pub fn new(entries: Vec<Entry>, slots: Slots) -> Self {
        let index: HashMap<NodeName, usize> =
            entries.iter().enumerate().map(|(at, entry)| (entry.name.clone(), at)).collect();
        let mut classes: Vec<Request> = Vec::new();
        let mut cells = Vec::with_capacity(entries.len());
        let mut twins: HashMap<Fingerprint, Vec<usize>> = HashMap::new();
        let num_open = entries.len();
        for (at, mut entry) in entries.into_iter().enumerate() {
            twins.entry(entry.fingerprint).or_default().push(at);
            let request = std::mem::take(&mut entry.request);
            let class = classes.iter().position(|known| *known == request).unwrap_or_else(|| {
                classes.push(request);
                classes.len() - 1
            });
            let names = std::mem::take(&mut entry.inputs);
            let mut inputs: Vec<usize> = names.iter().filter_map(|name| index.get(name).copied()).collect();
            inputs.sort_unstable();
            inputs.dedup();
            cells.push(Cell {
                next_attempt: match entry.start {
                    Start::Fresh { next_attempt } => next_attempt,
                    Start::Alive { attempt } | Start::Finished { attempt } => attempt + 1,
                    Start::Sealed(_) => 1,
                },
                failures: entry.failures,
                applied: entry.applied,
                num_non_finite: entry.applied.roll_back,
                state: NodeState::Waiting,
                held: None,
                num_unmet: inputs.len(),
                readers: Vec::new(),
                class,
                inputs: inputs.into(),
                entry,
            });
        }
        twins.retain(|_, all| all.len() > 1);
        twins.shrink_to_fit();
        for at in 0..cells.len() {
            for place in 0..cells[at].inputs.len() {
                let input = cells[at].inputs[place];
                cells[input].readers.push(at);
            }
        }
        Self {
            cells,
            index,
            twins,
            classes,
            slots,
            ready: BTreeMap::new(),
            retrying: BTreeSet::new(),
            running: BTreeSet::new(),
            num_sealing: 0,
            num_open,
            num_failed: 0,
            num_stopped: 0,
        }
    }

    /// Returns all nodes in the order of the plan.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// Returns the place of a name.
    pub fn at(&self, name: &NodeName) -> Option<usize> {
        self.index.get(name).copied()
    }

    /// Returns a node by name.
    pub fn get(&self, name: &NodeName) -> Option<&Cell> {
        self.at(name).map(|at| &self.cells[at])
    }

    /// Returns a node by place, to be changed in all but its state.
    pub fn cell_mut(&mut self, at: usize) -> &mut Cell {
        &mut self.cells[at]
    }

    /// Returns what a node takes of the slots while its worker runs.
    pub fn request(&self, at: usize) -> &Request {
        &self.classes[self.cells[at].class]
    }

    /// Returns the slots.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Returns the nodes whose workers run.
    pub fn running(&self) -> impl Iterator<Item = usize> + '_ {
        self.running.iter().copied()
    }

    /// Returns the number of workers that run.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Returns true when a worker runs or a result is being sealed.
    pub fn is_active(&self) -> bool {
        !self.running.is_empty() || self.num_sealing > 0
    }

    /// Returns the numbers of nodes that are not final, that failed, and that were stopped.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.num_open, self.num_failed, self.num_stopped)
    }

    /// Returns the nodes that read or need the node at `at`.
    pub fn readers(&self, at: usize) -> &[usize] {
        &self.cells[at].readers
    }

    /// Returns the other nodes with the same fingerprint.
    pub fn twins(&self, at: usize) -> impl Iterator<Item = usize> + '_ {
        let all = self.twins.get(&self.cells[at].entry.fingerprint);
        all.into_iter().flatten().copied().filter(move |twin| *twin != at)
    }

    /// Returns a node whose pause is over.
    pub fn due(&self, now_ms: u64) -> Option<usize> {
        self.retrying.first().filter(|(until, _)| *until <= now_ms).map(|(_, at)| *at)
    }

    /// Returns the node that starts next and what it gets: of those that are ready, fit and have no twin at work, the
    /// first by priority and plan.
    pub fn next(&self) -> Option<(usize, Held)> {
        let mut best: Option<(Rank, Held)> = None;
        for (class, ranks) in &self.ready {
            let is_alone = |at: usize| self.twins(at).all(|twin| !self.cells[twin].state.is_active());
            let Some(rank) = ranks.iter().find(|rank| is_alone(rank.1)) else { continue };
            if best.as_ref().is_some_and(|(first, _)| first < rank) {
                continue;
            }
            if let Ok(held) = self.slots.fit(&self.classes[*class]) {
                best = Some((*rank, held));
            }
        }
        best.map(|((_, at), held)| (at, held))
    }

    /// Gives a node what it will hold while its worker runs; called right before it becomes `Running`.
    pub fn hold(&mut self, at: usize, held: Held) {
        self.slots.take(&held);
        self.cells[at].held = Some(Box::new(held));
    }

    /// Moves a node to a state: the only way a state changes. Slots, queues and counts follow from it.
    pub fn set(&mut self, at: usize, state: NodeState) {
        let cell = &mut self.cells[at];
        debug_assert!(
            !cell.state.is_final(),
            "{} is {} and cannot become {}",
            cell.entry.name,
            cell.state.word(),
            state.word()
        );
        let rank = (std::cmp::Reverse(cell.entry.priority), at);
        match &cell.state {
            NodeState::Ready => drop(self.ready.get_mut(&cell.class).map(|ranks| ranks.remove(&rank))),
            NodeState::Retrying { until_ms, .. } => drop(self.retrying.remove(&(*until_ms, at))),
            NodeState::Running { .. } => drop(self.running.remove(&at)),
            NodeState::Sealing { .. } => self.num_sealing -= 1,
            _ => {}
        }
        match &state {
            NodeState::Ready => drop(self.ready.entry(cell.class).or_default().insert(rank)),
            NodeState::Retrying { until_ms, .. } => {
                cell.failures += 1;
                self.retrying.insert((*until_ms, at));
            }
            NodeState::Running { attempt } => {
                cell.next_attempt = attempt + 1;
                self.running.insert(at);
            }
            NodeState::Sealing { .. } => self.num_sealing += 1,
            NodeState::Failed { .. } => {
                cell.failures += 1;
                self.num_failed += 1;
            }
            NodeState::Stopped { .. } => self.num_stopped += 1,
            _ => {}
        }
        if !matches!(state, NodeState::Running { .. })
            && let Some(held) = cell.held.take()
        {
            self.slots.give(&held);
        }
        self.num_open -= usize::from(state.is_final());
        let is_done = state.is_done();
        cell.state = state;
        if is_done {
            for reader in std::mem::take(&mut self.cells[at].readers) {
                self.cells[reader].num_unmet -= 1;
                self.cells[at].readers.push(reader);
            }
        }
    }
}
