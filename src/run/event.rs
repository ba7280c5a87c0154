//! The one record of what happened to a run: resume, `status` and the report are folds over these events.
//!
//! Knows what can happen to a run and its nodes; not how events are stored ([`crate::store::journal`]) nor what comes
//! next ([`crate::run::scheduler`]). What a worker says while it runs stays in the job directory and is no run event.

use std::fmt;

use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::job::FailureCause;
use serde::{Deserialize, Serialize};

/// Something that happened to a run. New kinds may be added; raise [`crate::store::journal::JOURNAL_VERSION`] when one
/// changes its meaning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RunEvent {
    /// The run was opened; always the first event.
    RunStarted {
        /// Name of the run: that of its folder.
        run: String,
        /// Name of the pipeline or experiment.
        pipeline: String,
        /// Chosen profile.
        profile: String,
        /// Seed of the pipeline.
        seed: u64,
        /// Identity of the plan: the same names with the same fingerprints give the same value.
        plan: String,
        /// The command line.
        command: Vec<String>,
        /// Orchestrator process.
        pid: u32,
        /// Its host.
        host: String,
    },
    /// Another orchestrator process goes on with the run.
    RunResumed {
        /// Orchestrator process.
        pid: u32,
        /// Its host.
        host: String,
    },
    /// A node entered a state.
    Node {
        /// The node.
        node: NodeName,
        /// Identity of its result.
        fingerprint: Fingerprint,
        /// The state it entered.
        state: NodeState,
    },
    /// Nothing is left to do.
    RunFinished {
        /// How it ended.
        result: RunResult,
    },
}

/// Where a node stands. A node without an event is `Waiting`.
///
/// ```text
/// Waiting -> Ready -> Running -> Sealing -> Done
///    |         ^         |          |
///    |         +- Retrying          +--> Failed
///    +-> Blocked         +-> Failed | Stopped
/// ```
/// `Done` is also reached at once, by a node whose result is sealed already.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum NodeState {
    /// An input is not done.
    Waiting,
    /// Inputs are done; slots are not free.
    Ready,
    /// A worker has it.
    Running {
        /// Number of the attempt, from 1.
        attempt: u32,
    },
    /// The worker is done; its result is being hashed and moved into the store.
    Sealing {
        /// Number of the attempt.
        attempt: u32,
    },
    /// An attempt failed and another one follows.
    Retrying {
        /// Number of the failed attempt.
        attempt: u32,
        /// What it failed of.
        failure: Failure,
        /// Earliest start of the next attempt, milliseconds since 1970.
        until_ms: u64,
    },
    /// Its result is sealed.
    Done {
        /// How that came about.
        origin: Origin,
    },
    /// It ended without a result.
    Failed {
        /// Number of the attempt, 0 when none was started.
        attempt: u32,
        /// What happened.
        failure: Failure,
    },
    /// An ancestor failed.
    Blocked {
        /// That ancestor.
        by: NodeName,
    },
    /// The run was told to stop.
    Stopped {
        /// Number of the attempt.
        attempt: u32,
        /// Step of the checkpoint it wrote, if it wrote one.
        step: Option<u64>,
    },
}

/// How a node came to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum Origin {
    /// Its result had been sealed before the run.
    Cached,
    /// Another node of the run has the same fingerprint and made it.
    Shared {
        /// That node.
        with: NodeName,
    },
    /// An attempt made it.
    Ran {
        /// Number of the attempt.
        attempt: u32,
    },
}

/// Why an attempt gave no result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Which remedy may help.
    pub cause: FailureCause,
    /// For a person.
    pub message: String,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunResult {
    /// Every node is done.
    Done,
    /// A node failed.
    Failed,
    /// It was told to stop; the same command goes on with it.
    Stopped,
}

impl NodeState {
    /// Returns the word used in tables and logs.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Ready => "ready",
            Self::Running { .. } => "running",
            Self::Sealing { .. } => "sealing",
            Self::Retrying { .. } => "retrying",
            Self::Done { origin: Origin::Cached } => "cached",
            Self::Done { origin: Origin::Shared { .. } } => "shared",
            Self::Done { origin: Origin::Ran { .. } } => "done",
            Self::Failed { .. } => "failed",
            Self::Blocked { .. } => "blocked",
            Self::Stopped { .. } => "stopped",
        }
    }

    /// Returns the attempt the state belongs to.
    pub fn attempt(&self) -> Option<u32> {
        match self {
            Self::Running { attempt }
            | Self::Sealing { attempt }
            | Self::Retrying { attempt, .. }
            | Self::Failed { attempt, .. }
            | Self::Stopped { attempt, .. }
            | Self::Done { origin: Origin::Ran { attempt } } => Some(*attempt),
            _ => None,
        }
    }

    /// Returns true when the node will not change any more in this run.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Failed { .. } | Self::Blocked { .. } | Self::Stopped { .. })
    }

    /// Returns true when a worker or the sealing of its result occupies slots.
    pub fn is_active(&self) -> bool {
        matches!(self, Self::Running { .. } | Self::Sealing { .. })
    }

    /// Returns true when the result is sealed.
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done { .. })
    }
}

impl RunResult {
    /// Returns the word used in tables and logs.
    pub fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
