//! What sealed results took, as far as it tells the cost of what will run.
//!
//! Reads manifests only; which record a node is compared with is decided by [`crate::plan::Costs`].

use std::cmp::Reverse;
use std::collections::HashMap;

use deepgen_contract::id::Fingerprint;
use deepgen_contract::settings::Settings;

use super::ArtifactStore;
use super::sealed::SealedResult;
use crate::plan::{PastJob, PastResult, Work, past_jobs};

/// Newest results of each stage that are looked at: enough to find one with a like amount of work, and soon read.
const MAX_RESULTS_PER_STAGE: usize = 32;

/// Returns the newest sealed results of each stage whose settings are of this program's types, the newest first.
pub fn read(store: &ArtifactStore) -> Vec<PastJob> {
    let mut all: Vec<&(Fingerprint, SealedResult)> = store.results().iter().collect();
    all.sort_by_key(|(fingerprint, result)| (Reverse(result.sealed_ms), *fingerprint));
    let mut seen: HashMap<&str, usize> = HashMap::new();
    all.retain(|(_, result)| {
        let seen = seen.entry(&result.stage).or_default();
        *seen += 1;
        *seen <= MAX_RESULTS_PER_STAGE
    });
    past_jobs(all.into_iter().filter_map(|(fingerprint, _)| past_result(store, *fingerprint)).collect())
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
