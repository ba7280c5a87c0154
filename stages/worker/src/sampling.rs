//! Conditions to images: the guided Euler sampler over the model, with one noise per image.
//!
//! Knows DiT and autoencoder, neither who makes the conditions nor what the images are for. Image `i` depends on its own noise seed and prompt only, as far as padding allows.

use burn::tensor::{DType, TensorData};
use deepgen_contract::model::BaseModelConfig;
use deepgen_model::bridge::Condition;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::dit::{self, Dit};
use deepgen_model::nn::{to_dtype, to_f32};
use deepgen_model::random::Stream;
use deepgen_model::sampler::{Guided, euler, sigmas, to_bytes};
use deepgen_model::vae::Vae;
use deepgen_model::{Device, Tensor};
use image::RgbImage;

use crate::error::{JobError, JobResult};

/// How images are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// Euler steps.
    pub steps: usize,
    /// Guidance scale; at most 1 is a single conditional pass.
    pub guidance: f64,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
}

impl Sampling {
    /// Returns true when negative conditions are needed.
    pub fn is_guided(&self) -> bool {
        self.guidance > 1.0
    }
}

/// The parts of a model that turn conditions into images.
#[derive(Clone, Copy)]
pub struct Drawer<'a> {
    /// Predicts velocities.
    pub dit: &'a Dit,
    /// Latents to images.
    pub vae: &'a Vae,
    /// Their sizes, and the schedule's shift.
    pub base: &'a BaseModelConfig,
    /// The type they compute in; between steps, latents are f32.
    pub compute: DType,
}

impl<'a> From<&'a DeepGen> for Drawer<'a> {
    fn from(model: &'a DeepGen) -> Self {
        Self { dit: &model.dit, vae: &model.vae, base: &model.spec().base, compute: model.dtype() }
    }
}

/// Returns one initial noise per name, `[names, c, h, w]`.
pub fn initial_noise(
    base: &BaseModelConfig,
    sampling: &Sampling,
    seed: u64,
    names: &[String],
    device: &Device,
) -> Tensor<4> {
    let vae = &base.vae;
    let [c, h, w] = [vae.latent_channels, sampling.height / vae.downscale(), sampling.width / vae.downscale()];
    let values: Vec<f32> =
        names.iter().flat_map(|name| Stream::new(seed, &format!("image/{name}")).normals(c * h * w, 1.0)).collect();
    Tensor::from_data(TensorData::new(values, [names.len(), c, h, w]), device)
}

/// Draws images from `noise` under `condition`, whose rows are the negative ones and then the positive ones when
/// guidance is on; `references` have one row per image.
///
/// # Errors
/// When the decoded images do not have the size asked for.
pub fn draw(
    drawer: Drawer<'_>,
    sampling: &Sampling,
    condition: &Condition,
    references: &[Tensor<4>],
    noise: Tensor<4>,
) -> JobResult<Vec<RgbImage>> {
    let row = |i: usize| references.iter().map(|latent| latent.clone().narrow(0, i, 1).squeeze_dim::<3>(0)).collect();
    let references: Vec<Vec<Tensor<3>>> = (0..noise.dims()[0]).map(row).collect();
    let latents = draw_latents(drawer, sampling, condition, &references, noise);
    decode(drawer.vae, to_dtype(latents, drawer.compute))
}

/// Draws latents as [`draw`] does images; `references` lists those of each image, which may differ in number and size.
pub fn draw_latents(
    drawer: Drawer<'_>,
    sampling: &Sampling,
    condition: &Condition,
    references: &[Vec<Tensor<3>>],
    noise: Tensor<4>,
) -> Tensor<4> {
    let levels = sigmas(sampling.steps, drawer.base.scheduler_shift);
    let references = if sampling.is_guided() { [references, references].concat() } else { references.to_vec() };
    let field = |latents: Tensor<4>, timestep: f64| {
        let rows = latents.dims()[0];
        let condition = dit::Condition {
            timestep_b: Tensor::full([rows], timestep, &latents.device()),
            text_btc: to_dtype(condition.sequence.clone(), drawer.compute),
            pooled_bc: to_dtype(condition.pooled.clone(), drawer.compute),
        };
        let latents = to_dtype(latents, drawer.compute);
        if references.iter().all(Vec::is_empty) {
            return to_f32(drawer.dit.forward(latents, &condition, &[]));
        }
        let rows: Vec<Tensor<3>> = latents.split(1, 0).into_iter().map(|row| row.squeeze_dim::<3>(0)).collect();
        to_f32(Tensor::stack(drawer.dit.forward_ragged(&rows, &condition, &references), 0))
    };
    match sampling.is_guided() {
        true => euler(&Guided { field, scale: sampling.guidance }, noise, &levels),
        false => euler(&field, noise, &levels),
    }
}

/// Decodes latents to images.
///
/// # Errors
/// When the bytes do not make up images: a broken invariant.
pub fn decode(vae: &Vae, latents: Tensor<4>) -> JobResult<Vec<RgbImage>> {
    let pixels = vae.from_latents(latents);
    let [count, _, height, width] = pixels.dims();
    let bytes = to_bytes(pixels);
    let images: Option<Vec<RgbImage>> = bytes
        .chunks(height * width * 3)
        .map(|image| RgbImage::from_raw(width as u32, height as u32, image.to_vec()))
        .collect();
    images.filter(|images| images.len() == count).ok_or_else(|| JobError::internal("decoded bytes make up no images"))
}
