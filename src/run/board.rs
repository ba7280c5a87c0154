//! Where every node of a run stands: states, attempts and slots, with one function through which every change passes.
//!
//! Knows which changes are legal and what they occupy; not why they happen.

use std::collections::BTreeMap;

use deepgen_contract::id::{Fingerprint, NodeName};

use super::event::{NodeState, Origin};

/// What the scheduler knows of a node at its start.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its name.
    pub name: NodeName,
    /// Identity of its result.
    pub fingerprint: Fingerprint,
    /// Nodes whose results it reads.
    pub inputs: Vec<NodeName>,
    /// Share of the slots it takes while it runs.
    pub slots: BTreeMap<String, f64>,
    /// Further attempts after one that failed for a cause that may pass.
    pub retries: u32,
    /// Attempts of this run that failed already.
    pub failures: u32,
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
    /// What was known at the start.
    pub entry: Entry,
    /// Number of the next attempt.
    pub next_attempt: u32,
    /// Attempts of this run that failed.
    pub failures: u32,
    state: NodeState,
}

impl Cell {
    /// Returns where the node stands.
    pub fn state(&self) -> &NodeState {
        &self.state
    }
}

/// All nodes of a run.
#[derive(Debug, Clone)]
pub struct Board {
    cells: Vec<Cell>,
    index: BTreeMap<NodeName, usize>,
    free: BTreeMap<String, f64>,
    num_active: usize,
}

/// Slots are sums of decimal fractions; a third and two thirds must fit into one.
const SLOT_TOLERANCE: f64 = 1e-9;

impl Board {
    /// Puts every node in `Waiting`; `entries` stand after their inputs.
    pub fn new(entries: Vec<Entry>, slots: BTreeMap<String, f64>) -> Self {
        let index = entries.iter().enumerate().map(|(at, entry)| (entry.name.clone(), at)).collect();
        let cell = |entry: Entry| Cell {
            next_attempt: match entry.start {
                Start::Fresh { next_attempt } => next_attempt,
                Start::Alive { attempt } | Start::Finished { attempt } => attempt + 1,
                Start::Sealed(_) => 1,
            },
            failures: entry.failures,
            state: NodeState::Waiting,
            entry,
        };
        Self { cells: entries.into_iter().map(cell).collect(), index, free: slots, num_active: 0 }
    }

    /// Returns all nodes in the order of the plan.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// Returns a node by name.
    pub fn get(&self, name: &NodeName) -> Option<&Cell> {
        self.index.get(name).map(|&at| &self.cells[at])
    }

    /// Returns the number of nodes that occupy slots.
    pub fn num_active(&self) -> usize {
        self.num_active
    }

    /// Returns true when the node's share of every slot is free.
    pub fn fits(&self, entry: &Entry) -> bool {
        let free = |slot: &str| self.free.get(slot).copied().unwrap_or(0.0);
        entry.slots.iter().all(|(slot, share)| *share <= free(slot) + SLOT_TOLERANCE)
    }

    /// Moves a node to a state: the only way a state changes. Slots, attempts and failures follow from it.
    pub fn set(&mut self, name: &NodeName, state: NodeState) {
        let Some(&at) = self.index.get(name) else { return };
        let cell = &mut self.cells[at];
        debug_assert!(!cell.state.is_final(), "{name} is {} and cannot become {}", cell.state.word(), state.word());
        let (was_active, is_active) = (cell.state.is_active(), state.is_active());
        if let NodeState::Running { attempt } = state {
            cell.next_attempt = attempt + 1;
        }
        if matches!(state, NodeState::Retrying { .. } | NodeState::Failed { .. }) {
            cell.failures += 1;
        }
        cell.state = state;
        let sign = match (was_active, is_active) {
            (false, true) => -1.0,
            (true, false) => 1.0,
            _ => return,
        };
        for (slot, share) in &cell.entry.slots {
            *self.free.entry(slot.clone()).or_default() += sign * share;
        }
        self.num_active = if is_active { self.num_active + 1 } else { self.num_active - 1 };
    }
}
