//! The job directory: what the orchestrator puts in, what the worker leaves, under which names.
//!
//! `artifacts/jobs/<fingerprint>/<attempt>/` holds `job.json` in; `events.jsonl`, `checkpoints/`, `out/`, `outcome.json`
//! out. Knows the layout; starts nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::artifact::ArtifactKind;
use crate::id::{Fingerprint, NodeName};
use crate::settings::Settings;

/// Version of [`JobSpec`] and [`Outcome`].
pub const JOB_VERSION: u32 = 1;
/// The job's description, written by the orchestrator before the worker starts.
pub const JOB_FILE: &str = "job.json";
/// Appended by the worker, a [`crate::event::WorkerEvent`] a line.
pub const EVENTS_FILE: &str = "events.jsonl";
/// Standard output of the worker.
pub const STDOUT_FILE: &str = "stdout.log";
/// Standard error of the worker.
pub const STDERR_FILE: &str = "stderr.log";
/// Checkpoints of the attempt, a folder each, named by step.
pub const CHECKPOINTS_DIR: &str = "checkpoints";
/// The result; becomes the artifact.
pub const OUT_DIR: &str = "out";
/// The worker's last word, written by rename.
pub const OUTCOME_FILE: &str = "outcome.json";
/// Metrics of a training job inside [`OUT_DIR`]: a JSON object a line with `step` and `group/name` values.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// Images drawn while a model trained inside [`OUT_DIR`]: `step-<n>.png` with all prompts, and [`SAMPLES_FILE`].
pub const SAMPLES_DIR: &str = "samples";
/// What the images in [`SAMPLES_DIR`] show: a [`SamplesRecord`].
pub const SAMPLES_FILE: &str = "samples.json";

/// What the images of a training show: one tile for each prompt, row by row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplesRecord {
    /// Prompts, in the order of the tiles.
    pub prompts: Vec<String>,
    /// Tiles of a row.
    pub columns: usize,
    /// Side of a tile in pixels.
    pub side: u32,
    /// Steps after which images were drawn.
    pub steps: Vec<u64>,
}

/// One input of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobInput {
    /// What it holds.
    pub kind: ArtifactKind,
    /// Its sealed folder, absolute.
    pub path: PathBuf,
    /// Its identity.
    pub fingerprint: Fingerprint,
    /// Node that made it.
    pub node: NodeName,
}

/// `job.json`: everything a worker needs to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// [`JOB_VERSION`] of the writer.
    pub version: u32,
    /// Node the job belongs to.
    pub node: NodeName,
    /// Stage file's name.
    pub stage: String,
    /// Identity of the result.
    pub fingerprint: Fingerprint,
    /// 1 for the first attempt.
    pub attempt: u32,
    /// Every random stream of the job derives from it, by name.
    pub seed: u64,
    /// `cpu`, `wgpu[:i]` or `cuda[:i]`.
    pub device: String,
    /// Threads for computation.
    pub threads: usize,
    /// Folder against which relative paths in the settings are resolved, absolute.
    pub project_root: PathBuf,
    /// What to do, with its resolved settings.
    pub settings: Settings,
    /// Inputs by port; members of a mixture by their names.
    pub inputs: BTreeMap<String, JobInput>,
    /// Attempt folders whose checkpoints may be continued, newest first, absolute.
    pub earlier_attempts: Vec<PathBuf>,
    /// Identities of the slots that the job has, such as its GPUs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub slot_ids: BTreeMap<String, Vec<u32>>,
    /// Operations a second that the device reaches at most, in tera, for the share of it that is used; absent when unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_tflops: Option<f64>,
    /// Where a job that trains keeps what frozen parts make of images; absent when it computes that each time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_cache: Option<FrozenCache>,
    /// What is done differently because earlier attempts failed.
    #[serde(default)]
    pub remedies: JobRemedies,
}

/// A folder for what frozen parts make of images, by content: the autoencoder's moments, the vision tower's tokens. Jobs may
/// share it, and no result depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrozenCache {
    /// The folder, absolute in a job; made if it is not there.
    pub path: PathBuf,
    /// Bytes that it may take; what is beyond is computed each time.
    pub max_bytes: u64,
}

/// What an attempt does differently from the first, so that it does not fail of the same cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobRemedies {
    /// The micro-batch is divided by this, and as many more of them are accumulated: the global batch stays. A job that
    /// cannot divide so far divides as far as it can.
    pub micro_batch_division: u32,
    /// Newest checkpoints that are passed over when the job looks for one to continue from.
    pub roll_back: u32,
}

impl Default for JobRemedies {
    fn default() -> Self {
        Self { micro_batch_division: 1, roll_back: 0 }
    }
}

/// `outcome.json`: how an attempt ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    /// `out/` is complete.
    Done {
        /// Final numbers, named `group/name`.
        metrics: BTreeMap<String, f64>,
        /// Remarks for the report.
        notes: Vec<String>,
        /// Seconds the attempt ran.
        seconds: f64,
        /// What the machine made of it, named `group/name`: rates, shares of time, memory. No part of the result.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        throughput: BTreeMap<String, f64>,
    },
    /// The attempt cannot go on.
    Failed {
        /// Which remedy may help.
        cause: FailureCause,
        /// For a person: what happened, where, and what to do.
        message: String,
    },
    /// Stopped on request, after writing a checkpoint.
    Stopped {
        /// Step of that checkpoint.
        step: u64,
    },
}

/// Why an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCause {
    /// Settings or inputs that no retry can mend.
    Input,
    /// A loss or gradient that is NaN or infinite.
    NonFinite,
    /// The device or the host ran out of memory.
    OutOfMemory,
    /// Reading or writing failed.
    Io,
    /// A broken invariant of the worker.
    Internal,
    /// An external program ended with a failure.
    Program,
    /// The attempt was over its time.
    TimedOut,
    /// Nothing was heard of the worker for too long.
    Stalled,
    /// The worker, or the machine under it, vanished without a word.
    Lost,
}
