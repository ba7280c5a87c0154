//! `mix`: checks and writes a mixture over prepared data sets, and looks for benchmark prompts among its texts.

use std::collections::BTreeMap;
use std::path::PathBuf;

use deepgen_contract::data::MixSettings;
use deepgen_contract::shapes::{ShapesSuite, ShapesWorld};
use deepgen_data::contamination::BenchmarkPrompts;
use deepgen_data::mix::mix;
use deepgen_data::shapes::benchmark;

use crate::error::{JobResult, OrFail};
use crate::job::{JobContext, JobEnd, JobReport};

/// Prompts of each embedded benchmark that texts are compared with, and the seed that the pipelines draw them with.
const BENCHMARK_SAMPLE: (u64, usize) = (11, 400);

/// Writes `mixture.json`, and a table of shares as a note.
///
/// # Errors
/// When an input or setting is wrong, or an overlap is found and the policy is `fail`.
pub fn run(settings: &MixSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let inputs: Vec<(String, PathBuf)> =
        context.spec.inputs.iter().map(|(name, input)| (name.clone(), input.path.clone())).collect();
    let file = mix(settings, &inputs, &embedded_benchmarks()?, &context.out()).or_input(|| "mix")?;
    context.emitter.note(file.table());
    let overlaps: Vec<String> = file
        .overlaps
        .iter()
        .filter(|overlap| !overlap.is_clean())
        .map(|overlap| {
            format!(
                "{} of {} texts of {} equal a prompt of {} ({} share an n-gram)",
                overlap.num_equal, overlap.num_texts, overlap.member, overlap.benchmark, overlap.num_sharing
            )
        })
        .collect();
    if !overlaps.is_empty() {
        context.emitter.warn(format!("benchmark prompts among the texts: {}", overlaps.join("; ")));
    }
    let mut metrics = BTreeMap::new();
    for member in &file.members {
        metrics.insert(format!("share/{}", member.name), member.share);
        if let Some(nominal) = member.nominal_share {
            metrics.insert(format!("nominal_share/{}", member.name), nominal);
        }
    }
    Ok(JobEnd::Done(JobReport { metrics, notes: Vec::new() }))
}

/// Returns the prompts of the embedded benchmarks. Those of edits are left out: an edit is an instruction and an image, and
/// an equal instruction about another image is no overlap.
fn embedded_benchmarks() -> JobResult<Vec<BenchmarkPrompts>> {
    let (seed, count) = BENCHMARK_SAMPLE;
    let world = ShapesWorld::default();
    let mut all = Vec::new();
    for suite in [ShapesSuite::Geneval, ShapesSuite::Cvtg, ShapesSuite::Unireason] {
        let items = benchmark(suite, &world, seed, count).or_input(|| format!("the benchmark {}", suite.name()))?;
        let prompts = items.into_iter().map(|item| item.prompt).collect();
        all.push(BenchmarkPrompts { name: format!("shapes {}", suite.name()), prompts });
    }
    Ok(all)
}
