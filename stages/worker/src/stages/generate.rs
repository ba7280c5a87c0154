//! `generate`: the prompts of a benchmark to images, each with a record of how it was made.
//!
//! `painter` draws; this file knows items, files and records.

use std::collections::BTreeMap;

use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::data::{ImageMode, ImageSettings};
use deepgen_contract::eval::{EVAL_VERSION, GenerateSettings, IMAGES_FILE, ImageRecord};
use deepgen_data::resize::fit;
use deepgen_model::random::Stream;

use crate::error::{JobError, JobResult, OrFail};
use crate::files;
use crate::items::{self, Item};
use crate::job::{JobContext, JobEnd, JobReport};
use crate::painter::{Order, Painter};
use crate::sampling::Sampling;

/// Writes the images and `images.jsonl`.
///
/// # Errors
/// When the weights lack a part, or the items cannot be read.
pub fn run(settings: &GenerateSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let root = context.spec.project_root.clone();
    let items = items::load(&settings.items, |path| root.join(path))?;
    let weights = context.input_path("weights", ArtifactKind::Weights)?;
    let painter = Painter::open(&weights, settings.conditioning, &settings.precision, &context.device)?;
    let sampler = &settings.sampler;
    let sampling =
        Sampling { steps: sampler.steps, guidance: sampler.guidance, height: sampler.height, width: sampler.width };
    let side = u32::try_from(sampler.height).map_err(|_| JobError::input("`sampler.height` is too large"))?;
    // Sources of edits are squashed to the output's square (docs/spec/evaluation.md section 0).
    let image = ImageSettings { size: side, unit: 1, mode: ImageMode::Exact };
    let out = context.out();
    for folder in ["images", "sources"] {
        std::fs::create_dir_all(out.join(folder)).or_io(|| format!("create {folder}"))?;
    }
    let copies = settings.sampler.images_per_prompt.max(1);
    let total = (items.len() * copies) as u64;
    // One pass per kind, so that a batch has sources in all rows or in none.
    let (edits, prompts): (Vec<&Item>, Vec<&Item>) = items.iter().partition(|item| item.source.is_some());
    let mut lines: BTreeMap<(usize, usize), String> = BTreeMap::new();
    let position: BTreeMap<&str, usize> = items.iter().enumerate().map(|(i, item)| (item.id.as_str(), i)).collect();
    for group in [prompts, edits] {
        let wanted: Vec<(&Item, usize)> =
            (0..copies).flat_map(|copy| group.iter().map(move |item| (*item, copy))).collect();
        for batch in wanted.chunks(settings.batch.max(1)) {
            if context.is_stop_requested() {
                return Ok(JobEnd::Stopped(lines.len() as u64));
            }
            let orders: Vec<Order> =
                batch.iter().map(|(item, copy)| order(settings, item, *copy, &image)).collect::<JobResult<_>>()?;
            let images = painter.paint(&orders, &sampling, settings.seed, &sampler.negative)?;
            for ((item, copy), picture) in batch.iter().zip(images) {
                let file = format!("images/{}.{copy}.png", file_name(&item.id));
                picture.save(out.join(&file)).or_io(|| format!("write {file}"))?;
                let source = match &item.source {
                    Some(source) => {
                        let file = format!("sources/{}.png", file_name(&item.id));
                        source.save(out.join(&file)).or_io(|| format!("write {file}"))?;
                        Some(file)
                    }
                    None => None,
                };
                let record = record(settings, item, *copy, (file, source), context)?;
                let line = serde_json::to_string(&record).or_io(|| "write a record")?;
                lines.insert((position[item.id.as_str()], *copy), line);
            }
            context.emitter.progress(lines.len() as u64, total, "images");
        }
    }
    let text: String = lines.values().map(|line| format!("{line}\n")).collect();
    files::write_text(&out.join(IMAGES_FILE), &text).or_io(|| "write the records")?;
    let metrics = [("images/count".to_owned(), lines.len() as f64)].into();
    Ok(JobEnd::Done(JobReport { metrics, notes: Vec::new() }))
}

/// Item identities hold only what a file name may.
fn file_name(id: &str) -> String {
    id.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect()
}

fn noise_name(settings: &GenerateSettings, item: &Item, copy: usize) -> String {
    format!("{}/{}/{copy}", settings.benchmark, item.id)
}

fn order(settings: &GenerateSettings, item: &Item, copy: usize, image: &ImageSettings) -> JobResult<Order> {
    let fitted = item.source.iter().map(|source| fit(source, image).or_input(|| "a source image"));
    let references = fitted.collect::<JobResult<_>>()?;
    Ok(Order { prompt: item.prompt.clone(), references, noise: noise_name(settings, item, copy) })
}

fn record(
    settings: &GenerateSettings,
    item: &Item,
    copy: usize,
    (file, source): (String, Option<String>),
    context: &JobContext,
) -> JobResult<ImageRecord> {
    let sampler = &settings.sampler;
    Ok(ImageRecord {
        version: EVAL_VERSION,
        benchmark: settings.benchmark.clone(),
        item: item.id.clone(),
        tag: item.tag.clone(),
        copy,
        prompt: item.prompt.clone(),
        seed: Stream::new(settings.seed, &format!("image/{}", noise_name(settings, item, copy))).next_u64(),
        guidance: sampler.guidance,
        steps: sampler.steps,
        height: sampler.height,
        width: sampler.width,
        weights: context.input("weights")?.fingerprint,
        file,
        source,
        expectation: item.expectation.clone(),
    })
}
