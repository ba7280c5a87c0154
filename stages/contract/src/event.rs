//! What a running job says: one JSON line per event in `events.jsonl` of its attempt.
//!
//! Knows what can be said, not who listens. The line format is stable: new kinds may be added, none changes its meaning.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One line of `events.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerEvent {
    /// Milliseconds since 1970.
    pub ts_ms: u64,
    /// What happened.
    pub event: WorkerEventKind,
}

/// What a worker reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum WorkerEventKind {
    /// The job was read and its device opened.
    Started {
        /// Process id of the worker.
        pid: u32,
        /// Device in words.
        device: String,
    },
    /// Work goes on from a checkpoint of an earlier attempt.
    Resumed {
        /// Step of the checkpoint.
        step: u64,
        /// Folder of the checkpoint.
        checkpoint: String,
    },
    /// Position within the job.
    Progress {
        /// Steps done.
        step: u64,
        /// Steps in all.
        total: u64,
        /// What a step is, such as `iterations` or `images`.
        unit: String,
    },
    /// Numbers at a step, named `group/name`.
    Metrics {
        /// Step they belong to.
        step: u64,
        /// Values; none of them is NaN or infinite.
        values: BTreeMap<String, f64>,
    },
    /// A checkpoint was written and verified.
    Checkpoint {
        /// Its step.
        step: u64,
        /// Its folder, relative to the attempt.
        path: String,
        /// Its size.
        bytes: u64,
    },
    /// Something a person should know, which did not stop the job.
    Warning {
        /// The message.
        message: String,
    },
    /// A line for the log.
    Note {
        /// The message.
        message: String,
    },
}
