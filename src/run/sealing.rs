//! From a finished attempt to a sealed artifact: checks the lease and the outcome, and writes down where it came from.
//!
//! Blocking work, run beside the loop. Knows nothing of the scheduler.

use std::path::PathBuf;

use deepgen_contract::artifact::{Environment, MANIFEST_VERSION, Manifest};
use deepgen_contract::job::{OUT_DIR, Outcome};
use deepgen_contract::stage::StageKind;

use crate::exec::jobdir::{self, EventTail, JobDir};
use crate::plan::PlannedNode;
use crate::progress::format::now_ms;
use crate::store::Layout;
use crate::store::artifacts::{self, ArtifactError};

/// An attempt whose output shall become an artifact.
#[derive(Debug, Clone)]
pub struct Sealing {
    /// Where things lie.
    pub layout: Layout,
    /// The node.
    pub node: PlannedNode,
    /// The attempt.
    pub attempt: u32,
    /// Machine and programs.
    pub environment: Environment,
}

/// An attempt that cannot be sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Another attempt has the lease.
    #[error("attempt {attempt} does not hold the lease of its result any more")]
    Lease {
        /// The attempt.
        attempt: u32,
    },
    /// The worker did not say that it is done.
    #[error("the outcome in {path} is not `done`")]
    NotDone {
        /// Directory of the attempt.
        path: PathBuf,
    },
    /// The artifact cannot be written.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
}

impl Sealing {
    /// Seals the output of an attempt that wrote its outcome down, and returns the manifest.
    ///
    /// # Errors
    /// When the attempt may not be sealed or its output cannot be moved.
    pub fn run(self) -> Result<Manifest, SealError> {
        let path = JobDir::new(&self.layout.jobs(), &self.node.fingerprint).attempt(self.attempt);
        match jobdir::outcome(&path) {
            Ok(Some(outcome)) => self.seal(outcome),
            _ => Err(SealError::NotDone { path }),
        }
    }

    /// Seals the output of an attempt with this outcome, and returns the manifest.
    ///
    /// # Errors
    /// When the attempt may not be sealed or its output cannot be moved.
    pub fn seal(self, outcome: Outcome) -> Result<Manifest, SealError> {
        let dir = JobDir::new(&self.layout.jobs(), &self.node.fingerprint);
        let folder = dir.attempt(self.attempt);
        if !dir.has_lease(self.attempt) {
            return Err(SealError::Lease { attempt: self.attempt });
        }
        let Outcome::Done { metrics, notes, seconds, throughput } = outcome else {
            return Err(SealError::NotDone { path: folder });
        };
        let now_ms = now_ms();
        let earlier: Vec<_> = match self.attempt {
            1 => Vec::new(),
            own => dir.attempts().into_iter().filter(|attempt| *attempt < own).collect(),
        };
        let spans: Vec<_> = earlier.iter().filter_map(|attempt| span_ms(&dir, *attempt)).collect();
        // A command tells of no events.
        let own = if self.node.node.kind == StageKind::Command { None } else { span_ms(&dir, self.attempt) };
        let earlier_seconds: f64 = spans.iter().map(|(first, last)| last.saturating_sub(*first) as f64 / 1000.0).sum();
        let resolved = &self.node.node;
        let device = if resolved.settings.uses_device() { resolved.device.clone() } else { "cpu".into() };
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            kind: resolved.settings.output(),
            fingerprint: self.node.fingerprint,
            node: resolved.name.clone(),
            stage: resolved.stage.clone(),
            stage_kind: resolved.kind,
            code_version: resolved.kind.code_version(),
            settings: serde_json::to_value(&resolved.settings).unwrap_or_default(),
            seed: resolved.seed,
            inputs: self.node.inputs.clone().into_iter().collect(),
            content: self.node.content.clone().into_iter().collect(),
            is_smoke: self.node.is_smoke,
            files: Vec::new(),
            metrics,
            throughput,
            notes,
            started_ms: spans.iter().chain(&own).map(|(first, _)| *first).min().unwrap_or(now_ms),
            sealed_ms: now_ms,
            run_seconds: seconds + earlier_seconds,
            attempts: earlier.len() as u32 + 1,
            environment: Environment { device, threads: resolved.threads, ..self.environment },
        };
        Ok(artifacts::seal(&self.layout, &folder.join(OUT_DIR), manifest)?)
    }
}

/// Returns the times of an attempt's first and last event.
fn span_ms(dir: &JobDir, attempt: u32) -> Option<(u64, u64)> {
    let events = EventTail::new(&dir.attempt(attempt)).read();
    Some((events.first()?.ts_ms, events.last()?.ts_ms))
}
