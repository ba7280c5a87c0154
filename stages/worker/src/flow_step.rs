//! One flow-matching loss on a batch, with every random draw a function of seed, name and step
//! (docs/spec/sft.md sections 1 and 2). The same for stages 1 and 2, their validation, and the auxiliary loss of stage 3.
//!
//! Knows the model and a batch, no optimiser.

use burn::tensor::FloatDType;
use deepgen_contract::train::FloatKind;
use deepgen_data::batch::Batch;
use deepgen_data::resize::Pixels;
use deepgen_data::sample::Task;
use deepgen_model::bridge::Condition;
use deepgen_model::deepgen::{DeepGen, FlowTargets};
use deepgen_model::flow::{TrainingTable, add_noise, loss};
use deepgen_model::random::{Stream, noise};
use deepgen_model::vlm::PromptBatch;
use deepgen_model::{Device, Tensor};

use crate::error::{JobResult, OrFail};
use crate::feed::{have_one_size, stack, tensor};

/// What a flow-matching loss needs beside the model and the batch.
pub struct FlowStep {
    /// Noise levels that are drawn from.
    pub table: TrainingTable,
    /// Rounding of a noise level before mixing.
    pub sigma_dtype: FloatKind,
    /// Seed of every draw.
    pub seed: u64,
    /// Where the loss is computed; with autodiff in training.
    pub device: Device,
}

/// How noise levels are chosen.
pub enum Sigmas {
    /// Drawn per sample from the training table.
    Drawn,
    /// The same for every sample.
    Fixed(f32),
}

/// Returns the name of a task's loss.
pub fn loss_name(group: &str, task: Task) -> String {
    match task {
        Task::TextToImage => format!("{group}/loss_text2image"),
        Task::ImageToImage => format!("{group}/loss_image2image"),
    }
}

impl FlowStep {
    /// Returns the prompts of a batch, with their reference images.
    pub fn prompts(&self, batch: &Batch) -> PromptBatch {
        let images = |own: &Vec<Pixels>| own.iter().map(|image| tensor(image, &self.device)).collect();
        PromptBatch { ids: batch.ids.clone(), images: batch.references.iter().map(images).collect() }
    }

    /// Returns the mean loss of a batch, of shape [1]; `stream` names its draws.
    ///
    /// # Errors
    /// When a prompt does not fit the padding.
    pub fn loss(&self, model: &DeepGen, batch: &Batch, stream: &str, sigmas: &Sigmas) -> JobResult<Tensor<1>> {
        let condition = model.training_condition(&self.prompts(batch)).or_input(|| "read the prompts of a batch")?;
        self.loss_under(model, &condition, batch, stream, sigmas)
    }

    /// Returns the mean loss of a batch under conditions that were made before.
    ///
    /// # Errors
    /// When images cannot be stacked.
    pub fn loss_under(
        &self,
        model: &DeepGen,
        condition: &Condition,
        batch: &Batch,
        stream: &str,
        sigmas: &Sigmas,
    ) -> JobResult<Tensor<1>> {
        let count = batch.images.len();
        let mut draws = Stream::new(self.seed, &format!("sigma/{stream}"));
        let levels: Vec<f32> = match sigmas {
            Sigmas::Drawn => (0..count).map(|_| self.table.sigma(draws.unit())).collect(),
            Sigmas::Fixed(sigma) => vec![*sigma; count],
        };
        let sigma_dtype = match self.sigma_dtype {
            FloatKind::Bf16 => FloatDType::BF16,
            FloatKind::F32 => FloatDType::F32,
        };
        let num_references = batch.references.first().map_or(0, Vec::len);
        let columns: Vec<Vec<Pixels>> = (0..num_references)
            .map(|column| batch.references.iter().filter_map(|own| own.get(column).cloned()).collect())
            .collect();
        let is_uniform = have_one_size(&batch.images)
            && batch.references.iter().all(|own| own.len() == num_references)
            && columns.iter().all(|column| have_one_size(column));
        if is_uniform {
            // One size: everything in a few large operations.
            let clean = self.encode(model, stack(&batch.images, &self.device)?, &format!("target/{stream}"));
            let mut references = Vec::new();
            for (i, column) in columns.iter().enumerate() {
                let pixels = stack(column, &self.device)?;
                references.push(self.encode(model, pixels, &format!("reference-{i}/{stream}")));
            }
            let eps = noise(self.seed, &format!("noise/{stream}"), clean.dims(), &self.device);
            let noisy = add_noise(clean, eps, &levels, sigma_dtype);
            let velocity = model.velocity(noisy.latents, noisy.timestep_b, condition, &references);
            return Ok(loss(velocity, noisy.target));
        }
        let one = |image: &Pixels, name: String| -> Tensor<3> {
            self.encode(model, tensor(image, &self.device).unsqueeze::<4>(), &name).squeeze_dim::<3>(0)
        };
        let latents: Vec<Tensor<3>> =
            batch.images.iter().enumerate().map(|(i, image)| one(image, format!("target/{stream}/{i}"))).collect();
        let references = batch.references.iter().enumerate().map(|(i, own)| {
            own.iter().enumerate().map(|(j, image)| one(image, format!("reference-{j}/{stream}/{i}"))).collect()
        });
        let references: Vec<Vec<Tensor<3>>> = references.collect();
        let noise = latents
            .iter()
            .enumerate()
            .map(|(i, latent)| noise(self.seed, &format!("noise/{stream}/{i}"), latent.dims(), &self.device));
        let targets = FlowTargets { noise: noise.collect(), latents, sigmas: levels, references };
        Ok(model.flow_loss_under(condition, &targets, sigma_dtype).loss)
    }

    /// Encodes images `[b, 3, h, w]` to sampled latents.
    fn encode(&self, model: &DeepGen, pixels: Tensor<4>, name: &str) -> Tensor<4> {
        let [b, _, h, w] = pixels.dims();
        let vae = &model.spec().base.vae;
        let shape = [b, vae.latent_channels, h / vae.downscale(), w / vae.downscale()];
        model.encode(pixels, noise(self.seed, &format!("posterior/{name}"), shape, &self.device))
    }
}
