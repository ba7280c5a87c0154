//! One flow-matching loss on a batch, with every random draw a function of seed, name and step
//! (docs/spec/sft.md sections 1 and 2). The same for stages 1 and 2, their validation, and the auxiliary loss of stage 3.
//!
//! Knows the model and a batch, no optimiser.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{FloatDType, TensorData};
use deepgen_contract::train::FloatKind;
use deepgen_data::batch::Batch;
use deepgen_data::resize::Pixels;
use deepgen_data::sample::Task;
use deepgen_model::bridge::Condition;
use deepgen_model::deepgen::{DeepGen, FlowTargets};
use deepgen_model::flow::{TrainingTable, add_noise, loss};
use deepgen_model::random::Stream;
use deepgen_model::rope::Grid;
use deepgen_model::vlm::{Frame, PromptBatch};
use deepgen_model::{Device, Tensor};

use crate::error::{JobResult, OrFail};
use crate::feed::{have_one_size, stack, tensor};
use crate::frozen_cache::FrozenCache;

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
    /// What frozen parts made of images before.
    pub cache: Option<Arc<FrozenCache>>,
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

/// Whose numbers are drawn.
#[derive(Debug, Clone)]
enum Whose {
    /// Of these samples, from a stream that the whole batch shares: any part of it has the same numbers.
    Samples(Range<usize>),
    /// Of one sample, from a stream of its own.
    Sample(usize),
}

impl Draws {
    /// Returns the uniform numbers of the samples at `rows` of a batch.
    fn uniforms(&self, name: &str, rows: Range<usize>) -> Vec<f64> {
        match self {
            Self::Seeded(seed) => {
                let mut stream = Stream::new(*seed, name);
                let drawn: Vec<f64> = (0..rows.end).map(|_| stream.unit()).collect();
                drawn[rows].to_vec()
            }
            Self::Recorded(recorded) => recorded.uniforms[rows].to_vec(),
        }
    }

    /// Returns normal numbers `[samples, c, h, w]`.
    fn normals(
        &self,
        name: &str,
        purpose: Purpose,
        whose: &Whose,
        [c, h, w]: [usize; 3],
        device: &Device,
    ) -> Tensor<4> {
        let rows = match whose {
            Whose::Samples(rows) => rows.clone(),
            Whose::Sample(sample) => *sample..sample + 1,
        };
        let size = c * h * w;
        let values: Vec<f32> = match (self, whose) {
            (Self::Seeded(seed), Whose::Samples(rows)) => {
                Stream::new(*seed, name).normals(rows.end * size, 1.0).split_off(rows.start * size)
            }
            (Self::Seeded(seed), Whose::Sample(sample)) => {
                Stream::new(*seed, &format!("{name}/{sample}")).normals(size, 1.0)
            }
            (Self::Recorded(recorded), _) => match purpose {
                Purpose::Noise => recorded.noise[rows.clone()].concat(),
                Purpose::Target => recorded.targets[rows.clone()].concat(),
                Purpose::Reference(place) => {
                    recorded.references[rows.clone()].iter().flat_map(|own| own[place].iter().copied()).collect()
                }
            },
        };
        Tensor::from_data(TensorData::new(values, [rows.len(), c, h, w]), device)
    }
}

/// Some of a batch's samples: those that one pass takes. What is drawn for a sample, and how its prompt is laid out, is the same
/// in every part of its batch.
#[derive(Debug, Clone)]
pub struct Part<'a> {
    /// The whole batch.
    pub batch: &'a Batch,
    /// Which of its samples.
    pub rows: Range<usize>,
}

impl<'a> Part<'a> {
    /// Returns all of a batch.
    pub fn whole(batch: &'a Batch) -> Self {
        Self { batch, rows: 0..batch.images.len() }
    }

    /// Returns the samples at `rows`.
    pub fn of(batch: &'a Batch, rows: Range<usize>) -> Self {
        Self { batch, rows }
    }

    /// Returns the images.
    fn images(&self) -> &'a [Pixels] {
        &self.batch.images[self.rows.clone()]
    }

    /// Returns the references of each sample.
    fn references(&self) -> &'a [Vec<Pixels>] {
        &self.batch.references[self.rows.clone()]
    }

    fn is_whole(&self) -> bool {
        self.rows == (0..self.batch.images.len())
    }
}

/// Splits `count` samples into `division` parts, as equal as can be; into fewer where there are fewer samples.
pub fn divide(count: usize, division: usize) -> impl Iterator<Item = Range<usize>> {
    let division = division.clamp(1, count.max(1));
    (0..division).map(move |i| count * i / division..count * (i + 1) / division)
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
    /// Returns the prompts of a part of a batch, with their reference images.
    ///
    /// # Errors
    /// When the cache cannot compute what it lacks.
    pub fn prompts(&self, model: &DeepGen, part: &Part<'_>) -> JobResult<PromptBatch> {
        let images = |own: &Vec<Pixels>| own.iter().map(|image| tensor(image, &self.device)).collect();
        let ids = part.batch.ids[part.rows.clone()].to_vec();
        let mut prompts = PromptBatch::new(ids, part.references().iter().map(images).collect());
        if let Some(cache) = &self.cache {
            prompts.vision = cache.vision(model, &part.references().concat(), &self.device)?;
        }
        if !part.is_whole() {
            let grid = |image: &Pixels| model.vlm.visual.grid(image.height, image.width);
            let grids: Vec<Vec<Grid>> =
                part.batch.references.iter().map(|own| own.iter().map(grid).collect()).collect();
            prompts.within = Frame::of(&part.batch.ids, &grids);
        }
        Ok(prompts)
    }

    /// Returns the mean loss of a part of a batch, of shape [1]; `stream` names its draws.
    ///
    /// # Errors
    /// When a prompt does not fit the padding.
    pub fn loss(&self, model: &DeepGen, part: &Part<'_>, stream: &str, sigmas: &Sigmas) -> JobResult<Tensor<1>> {
        let prompts = self.prompts(model, part)?;
        let condition = model.training_condition(&prompts).or_input(|| "read the prompts of a batch")?;
        self.loss_under(model, &condition, part, stream, sigmas)
    }

    /// Returns the mean loss of a part of a batch under conditions that were made before.
    ///
    /// # Errors
    /// When images cannot be stacked.
    pub fn loss_under(
        &self,
        model: &DeepGen,
        condition: &Condition,
        part: &Part<'_>,
        stream: &str,
        sigmas: &Sigmas,
    ) -> JobResult<Tensor<1>> {
        let rows = part.rows.clone();
        let columns = columns(&part.batch.references);
        // The whole batch decides how its numbers are drawn.
        if let (true, Some(columns)) = (have_one_size(&part.batch.images), columns) {
            // One size: everything in a few large operations.
            let whose = Whose::Samples(rows.clone());
            let clean = self.encode(model, part.images(), &format!("target/{stream}"), (Purpose::Target, &whose))?;
            let mut references = Vec::new();
            for (i, column) in columns.iter().enumerate() {
                let name = format!("reference-{i}/{stream}");
                references.push(self.encode(model, &column[rows.clone()], &name, (Purpose::Reference(i), &whose))?);
            }
            let velocity = |latents, timestep_b| model.velocity(latents, timestep_b, condition, &references);
            return Ok(self.loss_of_latents(clean, rows, stream, sigmas, velocity));
        }
        let one = |image: &Pixels, name: String, purpose: Purpose, sample: usize| -> JobResult<Tensor<3>> {
            let (image, draw) = (std::slice::from_ref(image), (purpose, &Whose::Sample(sample)));
            Ok(self.encode(model, image, &name, draw)?.squeeze_dim::<3>(0))
        };
        let target = |(i, image): (usize, &Pixels)| one(image, format!("target/{stream}"), Purpose::Target, i);
        let references = rows.clone().zip(part.references()).map(|(i, own)| {
            let reference =
                |(j, image): (usize, &Pixels)| one(image, format!("reference-{j}/{stream}"), Purpose::Reference(j), i);
            own.iter().enumerate().map(reference).collect()
        });
        let references: Vec<Vec<Tensor<3>>> = references.collect::<JobResult<_>>()?;
        let latents: Vec<Tensor<3>> = rows.clone().zip(part.images()).map(target).collect::<JobResult<_>>()?;
        let noise = rows.clone().zip(&latents).map(|(i, latent)| {
            let (name, whose) = (format!("noise/{stream}"), Whose::Sample(i));
            self.draws.normals(&name, Purpose::Noise, &whose, latent.dims(), &self.device).squeeze_dim::<3>(0)
        });
        let noise = noise.collect();
        let targets = FlowTargets { noise, sigmas: self.levels(rows, stream, sigmas), latents, references };
        Ok(model.flow_loss_under(condition, &targets, self.mixing_dtype()).loss)
    }

    /// Returns the mean loss [1] of clean latents `[rows, c, h, w]` of the samples at `rows` of a batch. `velocity` predicts
    /// where they come from after they were mixed with noise; it is given them, and 1000 times their noise levels `[rows]`.
    pub fn loss_of_latents(
        &self,
        clean: Tensor<4>,
        rows: Range<usize>,
        stream: &str,
        sigmas: &Sigmas,
        velocity: impl FnOnce(Tensor<4>, Tensor<1>) -> Tensor<4>,
    ) -> Tensor<1> {
        let levels = self.levels(rows.clone(), stream, sigmas);
        let [_, c, h, w] = clean.dims();
        let (name, whose) = (format!("noise/{stream}"), Whose::Samples(rows));
        let eps = self.draws.normals(&name, Purpose::Noise, &whose, [c, h, w], &self.device);
        let noisy = add_noise(clean, eps, &levels, self.mixing_dtype());
        loss(velocity(noisy.latents, noisy.timestep_b), noisy.target)
    }

    /// Returns the noise levels of the samples at `rows` of a batch.
    pub fn levels(&self, rows: Range<usize>, stream: &str, sigmas: &Sigmas) -> Vec<f32> {
        match sigmas {
            Sigmas::Drawn => {
                let draws = self.draws.uniforms(&format!("sigma/{stream}"), rows);
                draws.into_iter().map(|u| self.table.sigma(u)).collect()
            }
            Sigmas::Fixed(sigma) => vec![*sigma; rows.len()],
        }
    }

    fn mixing_dtype(&self) -> FloatDType {
        match self.sigma_dtype {
            FloatKind::Bf16 => FloatDType::BF16,
            FloatKind::F32 => FloatDType::F32,
        }
    }

    /// Encodes images of one size to sampled latents.
    fn encode(&self, model: &DeepGen, images: &[Pixels], name: &str, draw: (Purpose, &Whose)) -> JobResult<Tensor<4>> {
        let posterior = match &self.cache {
            Some(cache) => cache.posterior(model, images, &self.device)?,
            None => model.posterior(stack(images, &self.device)?),
        };
        let [_, c, h, w] = posterior.mean.dims();
        let noise = self.draws.normals(&format!("posterior/{name}"), draw.0, draw.1, [c, h, w], &self.device);
        Ok(model.latents(posterior, noise))
    }
}

/// Returns the references place by place, if every sample has as many, and those of a place have one size.
fn columns(references: &[Vec<Pixels>]) -> Option<Vec<Vec<Pixels>>> {
    let count = references.first().map_or(0, Vec::len);
    if references.iter().any(|own| own.len() != count) {
        return None;
    }
    let column = |place: usize| references.iter().map(|own| own[place].clone()).collect::<Vec<Pixels>>();
    let columns: Vec<Vec<Pixels>> = (0..count).map(column).collect();
    columns.iter().all(|column| have_one_size(column)).then_some(columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_equal_as_far_as_they_can_be_and_miss_no_sample() {
        let sizes = |count, division| divide(count, division).map(|rows| rows.len()).collect::<Vec<_>>();
        assert_eq!(sizes(8, 2), [4, 4]);
        assert_eq!(sizes(7, 3), [2, 2, 3]);
        assert_eq!(sizes(3, 8), [1, 1, 1]);
        assert_eq!(sizes(1, 4), [1]);
        assert_eq!(divide(7, 3).flatten().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn a_part_of_a_batch_draws_what_the_whole_would_draw_for_it() {
        let draws = Draws::Seeded(5);
        let device = Device::flex();
        let normals = |whose: Whose| -> Vec<f32> {
            draws.normals("a", Purpose::Noise, &whose, [3, 1, 3], &device).into_data().iter::<f32>().collect()
        };
        let whole = normals(Whose::Samples(0..4));
        assert_eq!(normals(Whose::Samples(1..3)), whole[9..27]);
        assert_eq!(draws.uniforms("u", 2..5), draws.uniforms("u", 0..5)[2..]);
        assert_ne!(normals(Whose::Sample(1)), whole[9..18]);
    }
}
