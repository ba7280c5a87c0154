//! `prepare`: reads, validates and indexes one data source; what cannot be used is listed with its reason.

use std::collections::BTreeMap;

use deepgen_contract::data::PrepareSettings;
use deepgen_data::prepare::{PreparePlace, prepare};

use crate::error::{JobError, JobResult, OrFail};
use crate::job::{JobContext, JobEnd, JobReport};

/// Examples of broken records that are reported as warnings.
const NUM_WARNINGS: usize = 5;

/// Writes the prepared data set.
///
/// # Errors
/// When the source cannot be read or holds no good record.
pub fn run(settings: &PrepareSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let out = context.out();
    let root = context.spec.project_root.clone();
    let place = PreparePlace {
        seed: context.spec.seed,
        project_root: &root,
        out_dir: &out,
        num_threads: context.spec.threads.max(1),
    };
    let mut last = 0;
    let mut is_stopped = false;
    let summary = prepare(settings, &place, &mut |num_seen| {
        last = num_seen;
        context.emitter.progress(num_seen, num_seen, "records");
        is_stopped = context.is_stop_requested();
        !is_stopped
    });
    if is_stopped {
        return Ok(JobEnd::Stopped(last));
    }
    let summary = summary.or_input(|| "prepare the source")?;
    let dataset = &summary.dataset;
    for broken in summary.examples.iter().take(NUM_WARNINGS) {
        context.emitter.warn(format!("set aside: {}: {}", broken.key, broken.reason));
    }
    if dataset.num_samples == 0 {
        return Err(JobError::input("the source holds no usable record"));
    }
    let mut metrics = BTreeMap::from([
        ("data/num_samples".to_owned(), dataset.num_samples as f64),
        ("data/num_quarantined".to_owned(), dataset.num_quarantined as f64),
        ("data/num_duplicates".to_owned(), dataset.num_duplicates as f64),
    ]);
    for (cause, count) in &dataset.causes {
        metrics.insert(format!("data/set_aside/{cause}"), *count as f64);
    }
    Ok(JobEnd::Done(JobReport { metrics, notes: Vec::new() }))
}
