//! Images that a node drew from fixed prompts while it trained: the same pictures after more and more steps.
//!
//! Reads them from the result and shows some of the steps, the first and the last among them. Knows the files' names and the look.

use std::fs;
use std::path::Path;

use deepgen_contract::job::{SAMPLES_DIR, SAMPLES_FILE, SamplesRecord};

use super::data::{Picture, TrainingSamples};
use super::markup::{Markup, data_url, details, el};
use super::samples::picture;
use crate::progress::format::count;

/// Steps that are shown.
const MAX_STEPS: usize = 6;
/// Bytes of images of one node: larger ones are left in the result.
const MAX_BYTES: usize = 8 << 20;
/// Tiles no wider than this are enlarged without smoothing.
const MAX_PIXELATED: u32 = 128;

/// Reads the images of a result in `folder`; nothing when it holds none.
pub fn read(folder: &Path) -> Option<TrainingSamples> {
    let text = fs::read(folder.join(SAMPLES_DIR).join(SAMPLES_FILE)).ok()?;
    let record: SamplesRecord = serde_json::from_slice(&text).ok()?;
    let mut num_bytes = 0;
    let mut pictures: Vec<(u64, Picture)> = Vec::new();
    // The last ones say most.
    for step in spread(&record.steps, MAX_STEPS).into_iter().rev() {
        let Some(picture) = picture(folder, &format!("{SAMPLES_DIR}/step-{step:08}.png"), None) else { continue };
        num_bytes += picture.bytes.len();
        if num_bytes > MAX_BYTES && !pictures.is_empty() {
            break;
        }
        pictures.insert(0, (step, picture));
    }
    (!pictures.is_empty()).then_some(TrainingSamples { record, pictures })
}

/// Returns about `num` of the steps, evenly spread, the first and the last among them.
fn spread(steps: &[u64], num: usize) -> Vec<u64> {
    let last = steps.len().saturating_sub(1);
    match steps.len() <= num {
        true => steps.to_vec(),
        false => (0..num).map(|i| steps[i * last / (num - 1)]).collect(),
    }
}

/// Returns the images with their prompts, folded away.
pub fn figures(samples: &TrainingSamples, step_name: &str) -> Markup {
    let TrainingSamples { record, pictures } = samples;
    let class = if record.side <= MAX_PIXELATED { "pixelated" } else { "smooth" };
    let figure = |(step, picture): &(u64, Picture)| {
        let alt = format!("images of {} after {step_name} {step}", count(record.prompts.len(), "prompt"));
        let image = el("img").attr("src", data_url(picture.mime, &picture.bytes)).attr("alt", alt);
        let image = image.attr("loading", "lazy").class(class);
        el("figure").add(image).add(el("figcaption").text(format!("{step_name} {step}")))
    };
    let prompts = el("ol").class("muted").add_all(record.prompts.iter().map(|prompt| el("li").text(prompt)));
    let drawn = el("div").class("drawn").add_all(pictures.iter().map(figure));
    let order = format!("Prompts, {} to a row:", record.columns);
    let body = Markup::join([drawn.into(), el("p").class("muted").text(order).into(), Markup::from(prompts)]);
    let summary = format!("Images while it trained: {} of {}", pictures.len(), count(record.steps.len(), "drawing"));
    details(Markup::text(summary), body).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_the_last_step_are_always_shown() {
        assert_eq!(spread(&[5, 10, 15], 6), [5, 10, 15]);
        let steps: Vec<u64> = (1..=20).collect();
        assert_eq!(spread(&steps, 6), [1, 4, 8, 12, 16, 20]);
    }

    #[test]
    fn a_result_shows_its_pictures_and_prompts_and_one_without_them_shows_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()), None);
        let samples = folder.path().join(SAMPLES_DIR);
        fs::create_dir(&samples).unwrap();
        let record =
            SamplesRecord { prompts: vec!["a <red> circle".into()], columns: 1, side: 32, steps: vec![10, 20] };
        fs::write(samples.join(SAMPLES_FILE), serde_json::to_vec(&record).unwrap()).unwrap();
        fs::write(samples.join("step-00000020.png"), "png").unwrap();
        let found = read(folder.path()).unwrap();
        assert_eq!(found.pictures.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [20], "a lost file is left out");
        let shown = figures(&found, "iteration").to_string();
        for part in ["a &lt;red&gt; circle", "iteration 20", "1 of 2 drawings", "data:image/png;base64,cG5n"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
    }
}
