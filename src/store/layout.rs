//! Where things lie under the artifacts folder.
//!
//! ```text
//! artifacts/  state/{db,lock,external.json}  jobs/<fp>/{lease.json,<attempt>/}  store/<fp>/  runs/<id>/
//! accepted/<fp>.json
//! ```
//! Knows paths only; reads and writes nothing.

use std::path::{Path, PathBuf};

use deepgen_contract::id::Fingerprint;

/// Name of the plan in a run's folder.
pub const PLAN_FILE: &str = "plan.json";
/// Name of the resolved pipeline in a run's folder.
pub const RESOLVED_FILE: &str = "resolved.toml";
/// Machine, programs and checkout of a run's newest process, in its folder.
pub const ENVIRONMENT_FILE: &str = "environment.json";
/// Links from node names to sealed results in a run's folder.
pub const NODES_DIR: &str = "nodes";

/// Returns the name of a patch of uncommitted changes in a run's folder, by its hash.
pub fn changes_file(blake3: &str) -> String {
    format!("changes-{}.diff", blake3.get(..12).unwrap_or(blake3))
}

/// The artifacts folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Returns the layout under `root`, which need not exist.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Returns the artifacts folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the folder of the resumable state.
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// Returns the folder of all jobs.
    pub fn jobs(&self) -> PathBuf {
        self.root.join("jobs")
    }

    /// Returns the folder of all sealed artifacts.
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// Returns the folder of a sealed artifact.
    pub fn artifact(&self, fingerprint: &Fingerprint) -> PathBuf {
        self.store().join(fingerprint.to_string())
    }

    /// Returns the folder of what people accepted.
    pub fn accepted(&self) -> PathBuf {
        self.root.join("accepted")
    }

    /// Returns the folder of all runs.
    pub fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// Returns the folder of a run.
    pub fn run(&self, id: &str) -> PathBuf {
        self.runs().join(id)
    }
}
