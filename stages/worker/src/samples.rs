//! Images drawn from fixed prompts while a model trains, all of a step in one grid.
//!
//! Knows the model and the prompts, no training. Noise is a function of the prompt's place and a seed of its own: nothing that the
//! training draws depends on whether images are drawn.

use deepgen_contract::job::{SAMPLES_DIR, SAMPLES_FILE, SamplesRecord};
use deepgen_contract::train::SampleSettings;
use deepgen_data::prompt::encode_text_to_image;
use deepgen_data::tokenizer::Tokenizer;
use deepgen_model::Device;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::vlm::PromptBatch;
use image::RgbImage;

use crate::error::{JobResult, OrFail};
use crate::job::JobContext;
use crate::png;
use crate::sampling::{Sampling, draw, initial_noise};

/// Images drawn at once.
const BATCH: usize = 8;
/// Tiles of a row of the grid.
const COLUMNS: usize = 4;

/// Draws the images of a job.
pub struct Samples {
    settings: SampleSettings,
    sampling: Sampling,
    /// Ids of each prompt in its template.
    ids: Vec<Vec<u32>>,
    /// Ids of the empty prompt, for guidance.
    negative: Vec<u32>,
}

impl Samples {
    /// Prepares the prompts; images are squares of `side` pixels.
    ///
    /// # Errors
    /// When a prompt cannot be encoded.
    pub fn new(settings: &SampleSettings, side: u32, tokenizer: &Tokenizer) -> JobResult<Self> {
        let encode = |text: &str| encode_text_to_image(tokenizer, text).or_input(|| format!("`samples`: {text:?}"));
        let SampleSettings { steps, guidance, .. } = *settings;
        let (height, width) = (side as usize, side as usize);
        Ok(Self {
            settings: settings.clone(),
            sampling: Sampling { steps: steps.max(1), guidance, height, width },
            ids: settings.prompts.iter().map(|text| encode(text)).collect::<JobResult<_>>()?,
            negative: encode("")?,
        })
    }

    /// Draws an image of each prompt with `model`, which is without autodiff and lies on `device`.
    ///
    /// # Errors
    /// When a prompt does not fit the padding.
    fn draw(&self, model: &DeepGen, device: &Device) -> JobResult<Vec<RgbImage>> {
        let mut images = Vec::new();
        let places: Vec<usize> = (0..self.ids.len()).collect();
        for places in places.chunks(BATCH) {
            let positive = PromptBatch::text(places.iter().map(|&place| self.ids[place].clone()).collect());
            let condition = if self.sampling.is_guided() {
                let negative = PromptBatch::text(vec![self.negative.clone(); places.len()]);
                model.guidance_condition(negative, positive)
            } else {
                model.condition(&positive)
            };
            let condition = condition.or_input(|| "read the prompts of `samples`")?;
            let names: Vec<String> = places.iter().map(|place| format!("samples/{place}")).collect();
            let noise = initial_noise(&model.spec().base, &self.sampling, self.settings.seed, &names, device);
            images.extend(draw(model.into(), &self.sampling, &condition, &[], noise)?);
        }
        Ok(images)
    }

    /// Draws the images after step `step`, keeps them with the result and shows them.
    ///
    /// # Errors
    /// When a prompt does not fit the padding, or the disk is full.
    pub fn take(&self, model: &DeepGen, step: u64, context: &mut JobContext) -> JobResult<()> {
        let images = self.draw(model, &context.device.clone())?;
        for (prompt, image) in self.settings.prompts.iter().zip(&images) {
            context.emitter.image(step, &format!("samples/{prompt}"), image);
        }
        let bytes = png::encode(&grid(&images), None).or_io(|| "write the samples as PNG")?;
        context.keep_file(&format!("{SAMPLES_DIR}/step-{step:08}.png"), bytes)
    }

    /// Writes what the images show.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn finish(&self, context: &mut JobContext) -> JobResult<()> {
        let prefix = format!("{SAMPLES_DIR}/step-");
        let step = |name: &str| name.strip_prefix(&prefix)?.strip_suffix(".png")?.parse().ok();
        let record = SamplesRecord {
            prompts: self.settings.prompts.clone(),
            columns: COLUMNS.min(self.ids.len()),
            side: self.sampling.width as u32,
            steps: context.kept_files().keys().filter_map(|name| step(name)).collect(),
        };
        let text = serde_json::to_vec_pretty(&record).or_io(|| "write what the samples show")?;
        context.keep_file(&format!("{SAMPLES_DIR}/{SAMPLES_FILE}"), text)
    }
}

/// Lays images of one size side by side, [`COLUMNS`] to a row.
fn grid(images: &[RgbImage]) -> RgbImage {
    let (width, height) = images.first().map_or((1, 1), RgbImage::dimensions);
    let columns = COLUMNS.min(images.len()).max(1);
    let rows = images.len().div_ceil(columns).max(1);
    let mut whole = RgbImage::new(width * columns as u32, height * rows as u32);
    for (place, image) in images.iter().enumerate() {
        let (x, y) = ((place % columns) as i64 * i64::from(width), (place / columns) as i64 * i64::from(height));
        image::imageops::replace(&mut whole, image, x, y);
    }
    whole
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    #[test]
    fn a_grid_fills_rows_of_four_in_order() {
        let images: Vec<RgbImage> = (0..6).map(|i| RgbImage::from_pixel(2, 3, Rgb([i, 0, 0]))).collect();
        let whole = grid(&images);
        assert_eq!(whole.dimensions(), (8, 6));
        for (place, (x, y)) in [(0, 0), (2, 0), (4, 0), (6, 0), (0, 3), (2, 3)].into_iter().enumerate() {
            assert_eq!(whole.get_pixel(x + 1, y + 2).0, [place as u8, 0, 0]);
        }
        assert_eq!(grid(&images[..1]).dimensions(), (2, 3));
    }
}
