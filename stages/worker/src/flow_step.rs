//! One flow-matching loss on a batch, with every random draw a function of seed, name and step
//! (docs/spec/sft.md sections 1 and 2). The same for stages 1 and 2, their validation, and the auxiliary loss of stage 3.
//!
//! Knows the model and a batch, no optimiser.

use burn::tensor::{FloatDType, TensorData};
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
    /// Where every draw comes from.
    pub draws: Draws,
    /// Where the loss is computed; with autodiff in training.
    pub device: Device,
}

/// Where the random numbers of a loss come from.
pub enum Draws {
    /// Streams of a seed, one for each name.
    Seeded(u64),
    /// Numbers that were drawn before, for a single loss: comparisons with a reference state them.
    Recorded(Recorded),
}

/// The random numbers of one loss, sample by sample.
pub struct Recorded {
    /// Uniform numbers that pick the noise levels.
    pub uniforms: Vec<f64>,
    /// Noise that each clean latent is mixed with.
    pub noise: Vec<Vec<f32>>,
    /// Noise of the posterior of each target image.
    pub targets: Vec<Vec<f32>>,
    /// Noise of the posterior of each reference of each sample.
    pub references: Vec<Vec<Vec<f32>>>,
}

/// What normal numbers are for.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    Noise,
    Target,
    /// The reference at this place.
    Reference(usize),
}

impl Draws {
    fn uniforms(&self, name: &str, count: usize) -> Vec<f64> {
        match self {
            Self::Seeded(seed) => {
                let mut stream = Stream::new(*seed, name);
                (0..count).map(|_| stream.unit()).collect()
            }
            Self::Recorded(recorded) => recorded.uniforms.clone(),
        }
    }

    /// Returns normal numbers of `shape`, the first axis being the samples from `first` on.
    fn normals(&self, name: &str, purpose: Purpose, first: usize, shape: [usize; 4], device: &Device) -> Tensor<4> {
        match self {
            Self::Seeded(seed) => noise(*seed, name, shape, device),
            Self::Recorded(recorded) => {
                let rows = first..first + shape[0];
                let values: Vec<f32> = match purpose {
                    Purpose::Noise => recorded.noise[rows].concat(),
                    Purpose::Target => recorded.targets[rows].concat(),
                    Purpose::Reference(place) => {
                        recorded.references[rows].iter().flat_map(|own| own[place].iter().copied()).collect()
                    }
                };
                Tensor::from_data(TensorData::new(values, shape), device)
            }
        }
    }
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
        let num_references = batch.references.first().map_or(0, Vec::len);
        let columns: Vec<Vec<Pixels>> = (0..num_references)
            .map(|column| batch.references.iter().filter_map(|own| own.get(column).cloned()).collect())
            .collect();
        let is_uniform = have_one_size(&batch.images)
            && batch.references.iter().all(|own| own.len() == num_references)
            && columns.iter().all(|column| have_one_size(column));
        if is_uniform {
            // One size: everything in a few large operations.
            let pixels = stack(&batch.images, &self.device)?;
            let clean = self.encode(model, pixels, &format!("target/{stream}"), (Purpose::Target, 0));
            let mut references = Vec::new();
            for (i, column) in columns.iter().enumerate() {
                let pixels = stack(column, &self.device)?;
                let name = format!("reference-{i}/{stream}");
                references.push(self.encode(model, pixels, &name, (Purpose::Reference(i), 0)));
            }
            let velocity = |latents, timestep_b| model.velocity(latents, timestep_b, condition, &references);
            return Ok(self.loss_of_latents(clean, stream, sigmas, velocity));
        }
        let one = |image: &Pixels, name: String, purpose: Purpose, sample: usize| -> Tensor<3> {
            let pixels = tensor(image, &self.device).unsqueeze::<4>();
            self.encode(model, pixels, &name, (purpose, sample)).squeeze_dim::<3>(0)
        };
        let target = |(i, image): (usize, &Pixels)| one(image, format!("target/{stream}/{i}"), Purpose::Target, i);
        let references = batch.references.iter().enumerate().map(|(i, own)| {
            let reference = |(j, image): (usize, &Pixels)| {
                one(image, format!("reference-{j}/{stream}/{i}"), Purpose::Reference(j), i)
            };
            own.iter().enumerate().map(reference).collect()
        });
        let references: Vec<Vec<Tensor<3>>> = references.collect();
        let latents: Vec<Tensor<3>> = batch.images.iter().enumerate().map(target).collect();
        let noise = latents.iter().enumerate().map(|(i, latent)| {
            let [c, h, w] = latent.dims();
            let name = format!("noise/{stream}/{i}");
            self.draws.normals(&name, Purpose::Noise, i, [1, c, h, w], &self.device).squeeze_dim::<3>(0)
        });
        let levels = self.levels(stream, sigmas, batch.images.len());
        let targets = FlowTargets { noise: noise.collect(), latents, sigmas: levels, references };
        Ok(model.flow_loss_under(condition, &targets, self.mixing_dtype()).loss)
    }

    /// Returns the mean loss [1] of clean latents `[b, c, h, w]`, of which `velocity` predicts where they come from after
    /// they were mixed with noise: it is given them, and 1000 times their noise levels `[b]`.
    pub fn loss_of_latents(
        &self,
        clean: Tensor<4>,
        stream: &str,
        sigmas: &Sigmas,
        velocity: impl FnOnce(Tensor<4>, Tensor<1>) -> Tensor<4>,
    ) -> Tensor<1> {
        let levels = self.levels(stream, sigmas, clean.dims()[0]);
        let eps = self.draws.normals(&format!("noise/{stream}"), Purpose::Noise, 0, clean.dims(), &self.device);
        let noisy = add_noise(clean, eps, &levels, self.mixing_dtype());
        loss(velocity(noisy.latents, noisy.timestep_b), noisy.target)
    }

    /// Returns the noise levels of `count` samples.
    pub fn levels(&self, stream: &str, sigmas: &Sigmas, count: usize) -> Vec<f32> {
        match sigmas {
            Sigmas::Drawn => {
                let draws = self.draws.uniforms(&format!("sigma/{stream}"), count);
                draws.into_iter().map(|u| self.table.sigma(u)).collect()
            }
            Sigmas::Fixed(sigma) => vec![*sigma; count],
        }
    }

    fn mixing_dtype(&self) -> FloatDType {
        match self.sigma_dtype {
            FloatKind::Bf16 => FloatDType::BF16,
            FloatKind::F32 => FloatDType::F32,
        }
    }

    /// Encodes images `[b, 3, h, w]` of the samples from `draw.1` on to sampled latents.
    fn encode(&self, model: &DeepGen, pixels: Tensor<4>, name: &str, draw: (Purpose, usize)) -> Tensor<4> {
        let [b, _, h, w] = pixels.dims();
        let vae = &model.spec().base.vae;
        let shape = [b, vae.latent_channels, h / vae.downscale(), w / vae.downscale()];
        model.encode(pixels, self.draws.normals(&format!("posterior/{name}"), draw.0, draw.1, shape, &self.device))
    }
}
