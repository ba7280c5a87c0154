//! Keeps the batch that a non-finite loss or gradient came from, for a person to look at.
//!
//! Knows batches, not losses. A batch is a folder `non_finite/step-<n>` in the job directory: `batch.json` with key, text and
//! images of each sample, and the images as the model got them; in stage 3 also the drawn images, in `rollout/`.

use std::path::Path;

use deepgen_data::batch::Batch;
use deepgen_data::resize::Pixels;
use image::RgbImage;
use serde::Serialize;

use crate::error::{JobResult, OrFail};
use crate::files;
use crate::job::JobContext;

/// Folder of kept batches within a job directory.
const SUSPECTS_DIR: &str = "non_finite";
/// Description of a kept batch, written last.
const BATCH_FILE: &str = "batch.json";

#[derive(Serialize)]
struct KeptBatch<'a> {
    step: u64,
    why: &'a str,
    samples: Vec<KeptSample<'a>>,
}

#[derive(Serialize)]
struct KeptRollout<'a> {
    step: u64,
    why: &'a str,
    images: Vec<KeptImage<'a>>,
}

#[derive(Serialize)]
struct KeptImage<'a> {
    text: &'a str,
    image: String,
    /// Absent when it is NaN or infinite.
    advantage: Option<f64>,
}

#[derive(Serialize)]
struct KeptSample<'a> {
    key: &'a str,
    text: &'a str,
    ids: &'a [u32],
    image: String,
    references: Vec<String>,
    /// Values of the image that are NaN or infinite.
    num_non_finite: usize,
}

/// Writes a batch and returns its folder, relative to the job directory.
///
/// # Errors
/// When the disk is full or cannot be written.
pub fn keep(context: &JobContext, step: u64, why: &str, batch: &Batch) -> JobResult<String> {
    let name = folder_of(step);
    // What was kept before says more closely why: its own loss was not finite.
    if !context.dir.join(&name).join(BATCH_FILE).exists() {
        write(&context.dir.join(&name), step, why, batch).or_io(|| format!("keep a batch in {name}"))?;
    }
    Ok(name)
}

/// Writes a group of drawn images for each prompt, with what became of each, and returns the folder.
///
/// # Errors
/// As [`keep`].
pub fn keep_rollout(
    context: &JobContext,
    step: u64,
    why: &str,
    (prompts, images, advantages): (&[String], &[RgbImage], &[f32]),
) -> JobResult<String> {
    let name = folder_of(step);
    let folder = context.dir.join(&name).join("rollout");
    let doing = || format!("keep drawn images in {name}");
    std::fs::create_dir_all(&folder).or_io(doing)?;
    let group_size = images.len() / prompts.len().max(1);
    let mut kept = Vec::new();
    for (number, image) in images.iter().enumerate() {
        let file = format!("{number}.png");
        image.save(folder.join(&file)).or_io(doing)?;
        let advantage = advantages.get(number).map(|&value| f64::from(value)).filter(|value| value.is_finite());
        kept.push(KeptImage { text: &prompts[number / group_size.max(1)], image: file, advantage });
    }
    let rollout = KeptRollout { step: step + 1, why, images: kept };
    files::write_json(&folder.join("rollout.json"), &rollout).or_io(doing)?;
    Ok(format!("{name}/rollout"))
}

fn folder_of(step: u64) -> String {
    format!("{SUSPECTS_DIR}/step-{:08}", step + 1)
}

fn write(folder: &Path, step: u64, why: &str, batch: &Batch) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let save = |pixels: &Pixels, name: String| {
        let image = pixels.to_rgb().map_err(std::io::Error::other)?;
        image.save(folder.join(&name)).map(|()| name).map_err(std::io::Error::other)
    };
    let mut samples = Vec::new();
    for (number, image) in batch.images.iter().enumerate() {
        let references = batch.references.get(number).into_iter().flatten().enumerate();
        let references = references.map(|(index, image)| save(image, format!("{number}-reference-{index}.png")));
        samples.push(KeptSample {
            key: &batch.keys[number],
            text: &batch.texts[number],
            ids: &batch.ids[number],
            references: references.collect::<Result<_, _>>()?,
            num_non_finite: image.values.iter().filter(|value| !value.is_finite()).count(),
            image: save(image, format!("{number}.png"))?,
        });
    }
    files::write_json(&folder.join(BATCH_FILE), &KeptBatch { step: step + 1, why, samples })
}

#[cfg(test)]
mod tests {
    use deepgen_data::sample::Task;

    use super::*;

    #[test]
    fn a_kept_batch_names_every_sample_and_shows_its_pixels() {
        let folder = tempfile::tempdir().unwrap();
        let pixels = |value: f32| Pixels { height: 1, width: 2, values: [vec![value; 2], vec![-1.0; 4]].concat() };
        let batch = Batch {
            task: Task::ImageToImage,
            keys: vec!["a.tar:3".into()],
            texts: vec!["make it red".into()],
            ids: vec![vec![1, 2]],
            images: vec![pixels(f32::NAN)],
            references: vec![vec![pixels(1.0)]],
            replaced: vec![],
        };
        write(folder.path(), 6, "the loss is NaN", &batch).unwrap();
        let text = std::fs::read_to_string(folder.path().join("batch.json")).unwrap();
        let kept: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(kept["step"], 7);
        assert_eq!(kept["samples"][0]["key"], "a.tar:3");
        assert_eq!(kept["samples"][0]["num_non_finite"], 2);
        let reference = image::open(folder.path().join("0-reference-0.png")).unwrap().to_rgb8();
        assert_eq!(reference.get_pixel(1, 0).0, [255, 0, 0]);
    }
}
