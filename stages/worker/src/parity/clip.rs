//! CLIP's towers and its image processor.

use deepgen_data::processor::{Normalization, clip_pixels};
use deepgen_model::Tensor;
use deepgen_model::clip::{Clip, ClipConfig, similarities, unit};
use deepgen_model::init::Init;

use super::case::{Case, Inputs, Settings};
use super::compare::{Checker, Quantity};
use super::error::{ParityError, ParityResult};

/// `resample` of a bicubic image processor.
const BICUBIC: u8 = 3;

/// `clip_text_image`.
///
/// # Errors
/// When the case is not whole.
pub fn run(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let path = case.folder.join("model/config.json");
    let config: ClipConfig = serde_json::from_value(Settings::read(&path)?.value)
        .map_err(|error| ParityError::Format { path, reason: error.to_string() })?;
    let clip = Clip::new(&Init::new(0, &case.device), &config).load(&case.weights("model")?)?;
    let flags = |name: &str| inputs.archive.rows(name);
    let ids: Vec<Vec<u32>> = flags("input_ids")?.iter().map(|row| row.iter().map(|&id| id as u32).collect()).collect();
    let is_real: Vec<Vec<bool>> =
        flags("attention_mask")?.iter().map(|row| row.iter().map(|&real| real != 0).collect()).collect();
    let pixels = prepare(&inputs, &case.settings("model/preprocessor_config.json")?, &case.device)?;
    check.tensor("pixel_values", pixels.clone(), Quantity::Forward)?;
    let (texts, images) = (clip.read(&ids, &is_real), clip.see(pixels));
    let (text_units, image_units) = (unit(texts.features.clone()), unit(images.features.clone()));
    for (name, ours) in [("text_last_hidden_state", texts.states), ("vision_last_hidden_state", images.states)] {
        check.tensor(name, ours, Quantity::Forward)?;
    }
    for (name, ours) in [
        ("vision_pooler_output", images.pooled),
        ("text_features", texts.features.clone()),
        ("image_features", images.features.clone()),
        ("text_embeds_normalized", text_units.clone()),
        ("image_embeds_normalized", image_units.clone()),
        ("logits_per_image", clip.logits_per_image(image_units, text_units)),
    ] {
        check.tensor(name, ours, Quantity::Forward)?;
    }
    check.tensor("clip_sim_pairs", similarities(texts.features, images.features), Quantity::Forward)
}

/// Runs the image processor that the settings describe on every picture of the inputs.
fn prepare(inputs: &Inputs<'_>, settings: &Settings, device: &deepgen_model::Device) -> ParityResult<Tensor<4>> {
    for step in ["do_resize", "do_center_crop", "do_rescale", "do_normalize"] {
        if !settings.get::<bool>(step)? {
            return Err(ParityError::Unsupported(format!("an image processor without `{step}`")));
        }
    }
    let resample: u8 = settings.get("resample")?;
    if resample != BICUBIC {
        return Err(ParityError::Unsupported(format!("resample {resample}: only bicubic ({BICUBIC}) is implemented")));
    }
    let normalization = Normalization {
        scale: settings.get("rescale_factor")?,
        mean: settings.get("image_mean")?,
        std: settings.get("image_std")?,
    };
    let size = settings.get("size/shortest_edge")?;
    let crop = [settings.get("crop_size/height")?, settings.get("crop_size/width")?];
    let mut prepared = Vec::new();
    for i in 0..inputs.archive.count("image.") {
        let image = inputs.image(&format!("image.{i}"))?;
        let pixels = clip_pixels(&image, size, crop, &normalization);
        let pixels = pixels.map_err(|error| ParityError::Unsupported(error.to_string()))?;
        prepared.push(crate::feed::tensor(&pixels, device));
    }
    Ok(Tensor::stack(prepared, 0))
}
