//! What sealed results took, as far as it tells the cost of what will run.
//!
//! Reads manifests only; which record a node is compared with is decided by [`crate::plan::Costs`].

use std::fs;
use std::time::SystemTime;

use deepgen_contract::id::Fingerprint;
use deepgen_contract::settings::Settings;

use super::ArtifactStore;
use crate::plan::{PastJob, PastResult, Work, past_jobs};

/// Newest results that are looked at; enough to know every stage of a project, and soon read.
const MAX_RESULTS: usize = 1000;

/// Returns the newest sealed results whose settings are of this program's types.
pub fn read(store: &ArtifactStore) -> Vec<PastJob> {
    let modified = |fingerprint: &Fingerprint| {
        fs::metadata(store.path(fingerprint)).and_then(|folder| folder.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
    };
    let mut all: Vec<(SystemTime, Fingerprint)> =
        store.fingerprints().into_iter().map(|fingerprint| (modified(&fingerprint), fingerprint)).collect();
    all.sort_by(|a, b| b.cmp(a));
    all.truncate(MAX_RESULTS);
    past_jobs(all.into_iter().filter_map(|(_, fingerprint)| past_result(store, fingerprint)).collect())
}

fn past_result(store: &ArtifactStore, fingerprint: Fingerprint) -> Option<(Fingerprint, PastResult)> {
    let manifest = store.manifest(&fingerprint).ok()?;
    let settings: Settings = serde_json::from_value(manifest.settings).ok()?;
    let job = PastJob {
        node: manifest.node,
        stage: manifest.stage,
        kind: manifest.stage_kind,
        device: manifest.environment.device,
        work: Work { time: 1.0, disk: 1.0 },
        seconds: manifest.run_seconds,
        bytes: manifest.files.iter().map(|file| file.bytes).sum(),
        sealed_ms: manifest.sealed_ms,
    };
    Some((fingerprint, PastResult { job, settings, inputs: manifest.inputs }))
}
