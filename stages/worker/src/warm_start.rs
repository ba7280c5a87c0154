//! Warm start of the bridge: regression of its conditions on those of the base's own text encoder.
//!
//! Not in the paper, and off in its profile: in the shapes world, where stage 1 has minutes, it moves the bridge to where
//! the frozen DiT can already read it. The last positions of the bridge's sequence are to equal the encoder's sequence, all
//! earlier ones its last vector, the pooled condition its pooled vector; each error is divided by its target's variance.
//!
//! The base knows literal captions alone. With `literal`, a caption that determines its image ("a red circle left of a blue
//! square") is put to the encoder as what a reader finds in the image ("a red circle at the top left and a blue square at
//! the top right"): the bridge learns to say in the base's language what the VLM has read.

use burn::module::Module;
use deepgen_contract::model::BaseModelConfig;
use deepgen_contract::shapes::{Cell, Object, Scene, ShapesWorld, Word};
use deepgen_contract::train::{OptimizerSettings, Schedule, WarmStartSettings};
use deepgen_data::batch::Batch;
use deepgen_data::sample::Task;
use deepgen_data::shapes::{describe, expectation_of};
use deepgen_data::tokenizer::Tokenizer;
use deepgen_judge::reading::{FoundObject, Reader};
use deepgen_model::conditioner::Conditioner;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::weights::WeightFile;
use deepgen_model::{Device, Tensor};

use crate::checkpoint::NamedTensors;
use crate::emit::Metrics;
use crate::error::{JobError, JobResult, OrFail};
use crate::fit::ensure_finite_loss;
use crate::flow_step::{FlowStep, Part};
use crate::learner::Learner;
use crate::optimize::{AdamW, GradientSum, schedule_factor};
use crate::padded_ids::pad_right;

/// Name prefix of its optimiser's state in a checkpoint.
const PREFIX: &str = "warm.";

/// The regression's state.
pub struct WarmStart {
    settings: WarmStartSettings,
    conditioner: Conditioner,
    tokenizer: Tokenizer,
    num_tokens: usize,
    optimizer: AdamW,
    gradients: GradientSum,
    schedule: Schedule,
    /// Batches per update, as in the training that follows.
    accumulation: u64,
    world: ShapesWorld,
    reader: Reader,
}

/// Most objects and words of a literal description: the base has read no longer ones.
const MAX_DESCRIBED: usize = 2;

impl WarmStart {
    /// Prepares the regression on the conditions of `conditioner`.
    ///
    /// # Errors
    /// When the base does not describe its text encoder.
    pub fn new(
        settings: &WarmStartSettings,
        conditioner: Conditioner,
        tokenizer: Tokenizer,
        base: &BaseModelConfig,
        accumulation: u64,
    ) -> JobResult<Self> {
        let config = base.conditioner.as_ref();
        let config = config.ok_or_else(|| JobError::input("`model.json` does not describe the text encoder"))?;
        let world = ShapesWorld::default();
        let schedule = Schedule::WarmupDecay { warmup_steps: 20, decay_share: 0.8 };
        let optimizer = OptimizerSettings {
            lr: settings.lr,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.0,
            clip_norm: 1.0,
            schedule: schedule.clone(),
        };
        Ok(Self {
            settings: settings.clone(),
            conditioner: conditioner.valid(),
            tokenizer,
            num_tokens: config.num_tokens,
            optimizer: AdamW::new(&optimizer),
            gradients: GradientSum::default(),
            schedule,
            accumulation: accumulation.max(1),
            reader: Reader::new(&world).map_err(JobError::input)?,
            world,
        })
    }

    /// Returns its iterations, rounded up so that updates stay on boundaries.
    pub fn iters(&self) -> u64 {
        self.settings.iters.next_multiple_of(self.accumulation)
    }

    /// Makes one iteration on the texts of `batch`; an update follows the last of every `accumulation`.
    ///
    /// # Errors
    /// When a text does not fit the padding, or the loss or the gradients are not finite: nothing is changed by them.
    pub fn step(
        &mut self,
        learner: &mut Learner<DeepGen>,
        flow: &FlowStep,
        batch: &Batch,
        step: u64,
    ) -> JobResult<Metrics> {
        let model = learner.model();
        let plain = flow.device.clone().without_autodiff();
        let texts: Vec<String> = match self.settings.literal {
            true => (0..batch.texts.len()).map(|i| self.literal(batch, i)).collect::<JobResult<_>>()?,
            false => batch.texts.clone(),
        };
        let ids = pad_right(&self.tokenizer, &texts, self.num_tokens, &plain)?;
        let (sequence, pooled) = self.conditioner.forward(ids);
        let prompts = flow.prompts(model, &Part::whole(batch))?;
        let condition = model.training_condition(&prompts).or_input(|| "read the prompts of a batch")?;
        let [b, t, d] = condition.sequence.dims();
        let wanted = self.num_tokens.min(t);
        let last = sequence.clone().narrow(1, self.num_tokens - 1, 1).expand([b, t - wanted, d]);
        let target = Tensor::cat(vec![last, sequence.narrow(1, self.num_tokens - wanted, wanted)], 1);
        let loss = relative_error(condition.sequence, target) + relative_error(condition.pooled, pooled);
        let value = f64::from(loss.clone().into_scalar::<f32>());
        ensure_finite_loss(step, "warm_start/loss", value, &batch.keys)?;
        self.gradients.add(model, loss.backward(), 1.0 / self.accumulation as f64);
        let mut metrics = Metrics::from([("warm_start/loss".to_owned(), value)]);
        if !(step + 1).is_multiple_of(self.accumulation) {
            return Ok(metrics);
        }
        let lr = self.settings.lr * schedule_factor(&self.schedule, step, self.iters());
        let gradients = std::mem::take(&mut self.gradients).ensure_finite(step)?;
        learner.replace(|model| self.optimizer.update(model, gradients, lr).0);
        metrics.insert("warm_start/lr".to_owned(), lr);
        Ok(metrics)
    }

    /// Returns what the encoder reads for sample `i`: the caption, or a description of the image that it determines.
    fn literal(&self, batch: &Batch, i: usize) -> JobResult<String> {
        let text = &batch.texts[i];
        let Some(wanted) = expectation_of(text, &self.world) else { return Ok(text.clone()) };
        let is_determined = wanted.include.iter().all(|clause| clause.colour.is_some() && !clause.exact);
        if batch.task != Task::TextToImage || !is_determined || wanted.include.is_empty() {
            return Ok(text.clone());
        }
        let found = self.reader.read(&batch.images[i].to_rgb().or_input(|| "an image of the batch")?);
        let object = |object: &FoundObject| {
            let Cell { row, col } = found.cell(&object.at);
            Object { shape: object.shape, colour: object.colour, row, col }
        };
        let word = found.words.first().map(|word| Word { text: word.text.clone(), row: found.cell(&word.at).row });
        let objects: Vec<Object> = found.objects.iter().map(object).collect();
        let mut scene = Scene { objects, word, background: found.background };
        scene.sort();
        let num_described = scene.objects.len() + usize::from(scene.word.is_some());
        // What cannot be described in the base's language keeps its caption.
        Ok(if num_described <= MAX_DESCRIBED { describe(&scene, &self.world) } else { text.clone() })
    }

    /// Returns its optimiser's state.
    pub fn tensors(&self) -> NamedTensors {
        self.optimizer.tensors().into_iter().map(|(name, data)| (format!("{PREFIX}{name}"), data)).collect()
    }

    /// Restores its optimiser's state.
    ///
    /// # Errors
    /// When the checkpoint holds none.
    pub fn restore(&mut self, file: &WeightFile, device: &Device) -> JobResult<()> {
        self.optimizer.restore(file, &format!("{PREFIX}optimizer."), device)
    }
}

/// Mean squared error over the variance of the target, which is off the tape.
fn relative_error<const D: usize>(found: Tensor<D>, target: Tensor<D>) -> Tensor<1> {
    let mean = target.clone().mean().into_scalar::<f32>();
    let variance = (target.clone() - mean).square().mean().into_scalar::<f32>();
    (found - Tensor::from_inner(target)).square().mean().div_scalar(variance.max(1e-6))
}
