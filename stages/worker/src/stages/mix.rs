//! `mix`: checks and writes a mixture over prepared data sets, and looks for benchmark prompts among its texts.

use std::collections::BTreeMap;
use std::path::PathBuf;

use deepgen_contract::data::{ContaminationPolicy, ContaminationSettings, MixSettings};
use deepgen_contract::eval::BenchmarkItems;
use deepgen_contract::shapes::{ShapesSuite, ShapesWorld};
use deepgen_data::contamination::BenchmarkPrompts;
use deepgen_data::mix::mix;
use deepgen_data::shapes::benchmark;

use crate::error::{JobError, JobResult, OrFail};
use crate::items;
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
    let mut benchmarks = embedded_benchmarks()?;
    benchmarks.extend(named_benchmarks(&settings.contamination, context)?);
    let file = mix(settings, &inputs, &benchmarks, &context.out()).or_input(|| "mix")?;
    context.emitter.note(file.table());
    if settings.contamination.policy != ContaminationPolicy::Off {
        let names = benchmarks.iter().map(|benchmark| format!("{} ({})", benchmark.name, benchmark.prompts.len()));
        let names = names.collect::<Vec<_>>().join(", ");
        context.emitter.note(format!("texts compared with the prompts of {names}"));
    }
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

/// Returns the prompts of the benchmarks that the settings name.
fn named_benchmarks(settings: &ContaminationSettings, context: &JobContext) -> JobResult<Vec<BenchmarkPrompts>> {
    let all = settings.benchmarks.iter().map(|(name, benchmark)| {
        if let BenchmarkItems::EditsJson { .. } = benchmark {
            let text = format!("`contamination.benchmarks.{name}` holds edits; only prompts are compared");
            return Err(JobError::input(text));
        }
        let items = items::load(benchmark, |path| context.spec.project_root.join(path))?;
        Ok(BenchmarkPrompts { name: name.clone(), prompts: items.into_iter().map(|item| item.prompt).collect() })
    });
    all.collect()
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
