//! What a sealed artifact is: its kind, its files with their hashes, the numbers it reports, and where it came from.
//!
//! Knows the layout on disk, not how an artifact is made or found.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::id::{Fingerprint, NodeName};
use crate::stage::StageKind;

/// Name of the manifest inside an artifact's folder; written last.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Version of [`Manifest`]; raised when a field changes its meaning.
pub const MANIFEST_VERSION: u32 = 1;

/// What an artifact holds; ports are typed by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ArtifactKind {
    /// `model.json` and safetensors of each part: what a stage starts from.
    Weights,
    /// Validated, indexed samples of one source.
    Dataset,
    /// A mixture over datasets.
    Mixture,
    /// The parameters that a training stage trained, and no others.
    Checkpoint,
    /// Generated images with a record of each.
    Images,
    /// A table of scores.
    Scores,
    /// Whatever a command left: no port but a command's takes it.
    #[default]
    Data,
}

impl ArtifactKind {
    /// Every kind.
    pub const ALL: [Self; 7] =
        [Self::Weights, Self::Dataset, Self::Mixture, Self::Checkpoint, Self::Images, Self::Scores, Self::Data];

    /// Returns the name used in messages and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Dataset => "dataset",
            Self::Mixture => "mixture",
            Self::Checkpoint => "checkpoint",
            Self::Images => "images",
            Self::Scores => "scores",
            Self::Data => "data",
        }
    }
}

impl fmt::Display for ArtifactKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Path inside the artifact's folder, with `/` between parts.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// blake3 of the content, hexadecimal.
    pub blake3: String,
}

/// The machine and the program that made an artifact.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Environment {
    /// Host name.
    pub host: String,
    /// Operating system and version.
    pub os: String,
    /// Processor model.
    pub cpu: String,
    /// Logical cores.
    pub cores: usize,
    /// Device the job ran on, such as `cpu` or `cuda:0`.
    pub device: String,
    /// Threads the job was given.
    pub threads: usize,
    /// Accelerators that the system shows, each with its driver.
    pub gpus: Vec<String>,
    /// Version of this project.
    pub deepgen_version: String,
    /// blake3 of the orchestrator's binary.
    pub deepgen_blake3: String,
    /// blake3 of the worker binary.
    pub worker_blake3: String,
    /// Commit of the project's checkout, if there is one.
    pub git_commit: Option<String>,
    /// True when the checkout held uncommitted changes.
    pub git_dirty: bool,
    /// blake3 of the uncommitted changes as a patch; the patch itself lies in the run's folder.
    pub git_diff_blake3: Option<String>,
    /// blake3 of the `Cargo.lock` that the orchestrator was built from.
    pub lock_blake3: String,
}

/// Description of a sealed artifact: `manifest.json` in its folder.
///
/// Settings are kept as they were written, and fields that a newer program added are passed over: a manifest stays
/// readable when a settings type changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`] of the writer.
    pub version: u32,
    /// What the artifact holds.
    pub kind: ArtifactKind,
    /// Identity of the node's result.
    pub fingerprint: Fingerprint,
    /// Name of the node that made it first.
    pub node: NodeName,
    /// Stage file's name.
    pub stage: String,
    /// Kind of that stage.
    pub stage_kind: StageKind,
    /// Code version of the stage's kind.
    pub code_version: u32,
    /// Resolved settings as [`crate::settings::Settings`] writes them: `{"stage_kind": .., "settings": {..}}`.
    pub settings: Value,
    /// Seed of the job.
    pub seed: u64,
    /// Fingerprints of the inputs by port.
    pub inputs: BTreeMap<String, Fingerprint>,
    /// Hashes of the external content that it was made from, by settings key; manifests of older programs have none.
    #[serde(default)]
    pub content: BTreeMap<String, String>,
    /// True when it, or something that it is made from, was cut to a few steps: no real result.
    #[serde(default)]
    pub is_smoke: bool,
    /// Every file but the manifest, sorted by path.
    pub files: Vec<FileEntry>,
    /// Final numbers, named `group/name`.
    pub metrics: BTreeMap<String, f64>,
    /// What the machine made of the last attempt, named `group/name`: rates, shares of time, memory. No part of the result.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub throughput: BTreeMap<String, f64>,
    /// Remarks that the report repeats, such as a warm start that the paper does not have.
    pub notes: Vec<String>,
    /// Start of the first attempt, milliseconds since 1970.
    pub started_ms: u64,
    /// Sealing, milliseconds since 1970.
    pub sealed_ms: u64,
    /// Seconds that attempts ran, all together.
    pub run_seconds: f64,
    /// Attempts it took.
    pub attempts: u32,
    /// Machine and program.
    pub environment: Environment,
}
