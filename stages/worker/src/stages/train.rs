//! `train`: flow-matching training of stages 1 and 2. The same code: what is in the model and what trains are settings.
//!
//! docs/spec/sft.md sections 1 to 4. An iteration is a micro-batch of one task; an update follows every `accumulation` of
//! them. A warm start of the bridge, which the paper does not have, may come first (`warm_start`).

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::DType;
use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::flops::Trained;
use deepgen_contract::job::FailureCause;
use deepgen_contract::model::ModelSpec;
use deepgen_contract::train::TrainSettings;
use deepgen_data::batch::{Batch, LoadError, Loader};
use deepgen_data::mixture::Mixture;
use deepgen_data::sample::{SetKind, Task};
use deepgen_model::checkpointing::with_activation_checkpointing;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::flow::TrainingTable;
use deepgen_model::trainable;
use deepgen_model::weights::WeightFile;

use crate::checkpoint::NamedTensors;
use crate::device;
use crate::emit::Metrics;
use crate::error::{JobError, JobResult, OrFail};
use crate::fit::{FitEnd, FitPlan, Trainer, fit};
use crate::flow_step::{Draws, FlowStep, Part, Sigmas, divide, loss_name};
use crate::frozen_cache::FrozenCache;
use crate::job::{JobContext, JobEnd, JobReport};
use crate::learner::{Learner, UpdateRule, leave_out};
use crate::micro_batches::MicroBatches;
use crate::model_folder;
use crate::precision;
use crate::samples::Samples;
use crate::warm_start::WarmStart;

/// Samples of a validation batch.
const VALIDATION_BATCH: usize = 32;

/// Trains and writes the checkpoint artifact.
///
/// # Errors
/// When inputs and settings do not fit together, the data cannot be read, or a loss is not finite.
pub fn run(settings: &TrainSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let mut notes = Vec::new();
    let mut trainer = StageTrainer::open(settings, context, &mut notes)?;
    let warm = trainer.num_warm_iters();
    let plan = FitPlan {
        total: warm + settings.train.max_iters,
        unit: "iterations",
        boundary: settings.train.accumulation,
        log_every: settings.train.log_every,
        validate_every: settings.validation.every,
        sample_every: settings.samples.as_ref().map_or(0, |samples| samples.every),
        checkpoint: settings.checkpoint.clone(),
        on_non_finite: settings.train.on_non_finite,
    };
    let is_checkpointing = settings.train.activation_checkpointing;
    let end = with_activation_checkpointing(is_checkpointing, || fit(&mut trainer, &plan, context))?;
    let mut metrics = match end {
        FitEnd::Finished(metrics) => metrics,
        FitEnd::Stopped(step) => return Ok(JobEnd::Stopped(step)),
    };
    let mixture = &trainer.batches.loader.mixture;
    let num_drawn = mixture.num_drawn(trainer.seed, 1, settings.train.max_iters);
    let total = num_drawn.iter().sum::<u64>().max(1) as f64;
    for (member, &count) in mixture.description().members.iter().zip(&num_drawn) {
        metrics.insert(format!("data/share/{}", member.name), count as f64 / total);
    }
    context.emitter.note(mixture.realised_table(&num_drawn));
    if let Some(cache) = &trainer.batches.flow.cache {
        cache.summarise(&mut context.emitter);
    }
    if let Some(samples) = &trainer.samples {
        samples.finish(context)?;
    }
    notes.extend(model_folder::write_checkpoint(&trainer.learner, &context.out())?);
    Ok(JobEnd::Done(JobReport { metrics, notes }))
}

struct StageTrainer {
    learner: Learner<DeepGen>,
    batches: MicroBatches,
    held_out: Vec<(Task, Vec<Batch>)>,
    warm_start: Option<WarmStart>,
    /// Images drawn on the way.
    samples: Option<Samples>,
    settings: TrainSettings,
    /// Parts that micro-batches, and held-out batches, are divided into.
    division: usize,
    seed: u64,
}

impl StageTrainer {
    fn open(settings: &TrainSettings, context: &mut JobContext, notes: &mut Vec<String>) -> JobResult<Self> {
        let seed = context.spec.seed;
        let device = device::for_training(&context.device, settings.train.activation_checkpointing);
        let weights = context.input_path("weights", ArtifactKind::Weights)?;
        let mut parts = model_folder::load_parts(&weights, &settings.precision, &device)?;
        let conditioner = parts.conditioner.take();
        let spec = ModelSpec {
            bridge: Some(settings.model.bridge.clone()),
            lora: settings.model.lora.config().cloned(),
            ..parts.spec.clone()
        };
        let parts = model_folder::extend(parts, &spec, seed, &device)?;
        let compute = precision::compute_type(&settings.precision, &device);
        let model = DeepGen::from_parts(parts).or_input(|| "put the parts together")?.computing_in(compute);
        let (model, trained) = trainable::select(model, &settings.trainable).or_input(|| "`trainable`")?;
        let counted = format!("{} parameters in {} tensors train", trained.num_elements, trained.names.len());
        context.emitter.note(counted.clone());
        notes.push(counted);

        let data = context.input_path("data", ArtifactKind::Mixture)?;
        let mixture = Mixture::open(&data)
            .and_then(|mixture| mixture.hold_out_per_task(settings.validation.num_samples as u64))
            .or_input(|| "the mixture")?;
        let loader = Loader {
            tokenizer: model_folder::load_tokenizer(&weights)?,
            image: settings.image.clone(),
            vision: model.spec().base.vlm.vision.clone(),
            caption_dropout: settings.train.caption_dropout,
            mixture,
        };
        let warm_start = match (settings.warm_start.iters, conditioner) {
            (0, _) => None,
            (_, None) => {
                return Err(JobError::input(
                    "`warm_start` needs the base's own text encoder, which these weights do not hold: set \
                     `warm_start.iters` to 0",
                ));
            }
            (iters, Some(conditioner)) => {
                notes.push(format!(
                    "warm start: {iters} iterations of regression on the base's own conditions came before the first \
                     of the stage; the paper has none"
                ));
                let tokenizer = model_folder::load_tokenizer(&weights)?;
                let accumulation = settings.train.accumulation;
                Some(WarmStart::new(&settings.warm_start, conditioner, tokenizer, &model.spec().base, accumulation)?)
            }
        };
        let cache = context.spec.frozen_cache.as_ref();
        let cache = cache.map(|place| FrozenCache::open(place, &model, &trained.names)).transpose()?;
        let flow = FlowStep {
            table: TrainingTable::new(model.spec().base.scheduler_shift),
            sigma_dtype: settings.train.sigma_dtype,
            draws: Draws::Seeded(seed),
            device,
            cache: cache.map(Arc::new),
        };
        let division = division(loader.mixture.description().micro_batch, context);
        let steps_before = warm_start.as_ref().map_or(0, WarmStart::iters);
        let rule = UpdateRule {
            optimizer: settings.optimizer.clone(),
            accumulation: settings.train.accumulation,
            division,
            total: settings.train.max_iters,
            steps_before,
            on_non_finite: settings.train.on_non_finite,
            ema: settings.train.ema,
            keeps_best: settings.train.keep_best,
        };
        let held_out = held_out_batches(&loader)?;
        let wanted = settings.samples.as_ref().filter(|samples| samples.every > 0 && !samples.prompts.is_empty());
        let samples = wanted.map(|wanted| Samples::new(wanted, settings.image.size, &loader.tokenizer)).transpose()?;
        if warm_start.is_some() {
            context
                .warn_of_undivided("all of this stage is divided but `warm_start`, which compares whole micro-batches");
        }
        let prepared = (settings.train.prefetch, context.spec.threads);
        let counted = (model.spec().clone(), Trained::of_names(trained.names.iter().map(String::as_str)));
        if model.dtype() == DType::BF16 {
            context.meter.computes_in_bf16();
        }
        Ok(Self {
            learner: Learner::new(model, rule),
            batches: MicroBatches::new(loader, flow, prepared, seed, steps_before, counted),
            held_out,
            warm_start,
            samples,
            settings: settings.clone(),
            division,
            seed,
        })
    }

    fn num_warm_iters(&self) -> u64 {
        self.warm_start.as_ref().map_or(0, WarmStart::iters)
    }

    fn warm_step(&mut self, step: u64, context: &mut JobContext) -> JobResult<Metrics> {
        let batch = self.batches.next(step)?;
        let warm = self.warm_start.as_mut().expect("warm steps exist only with a warm start");
        match warm.step(&mut self.learner, &self.batches.flow, &batch, step) {
            Err(error) if error.cause == FailureCause::NonFinite => {
                let kept = self.batches.keep_as(step, step, &error.message, context);
                leave_out(self.settings.train.on_non_finite, error, kept, context)?;
                Ok(Metrics::new())
            }
            result => result,
        }
    }
}

/// Returns the parts that the micro-batches are divided into because an earlier attempt ran out of memory.
fn division(micro_batch: usize, context: &mut JobContext) -> usize {
    let asked = context.spec.remedies.micro_batch_division.max(1) as usize;
    let division = asked.min(micro_batch.max(1));
    if division > 1 {
        context.emitter.note(format!(
            "each micro-batch of {micro_batch} samples is computed in {division} parts; the update is the same but for rounding"
        ));
    }
    if division < asked {
        context.emitter.warn(format!(
            "memory ran out before: {asked} parts were asked for, but a micro-batch has {micro_batch} samples. Set \
             `train.activation_checkpointing`, or a smaller `image.size`"
        ));
    }
    division
}

/// Returns the held-out samples of each task in batches.
fn held_out_batches(loader: &Loader) -> JobResult<Vec<(Task, Vec<Batch>)>> {
    let mut all = Vec::new();
    for kind in [SetKind::Generation, SetKind::Edit] {
        let (Some(task), items) = (kind.task(), loader.mixture.held_out(kind)) else { continue };
        let batches: Result<Vec<Batch>, LoadError> =
            items.chunks(VALIDATION_BATCH).map(|items| loader.load_items(task, items)).collect();
        let batches = batches.or_input(|| "load the held-out samples")?;
        if !batches.is_empty() {
            all.push((task, batches));
        }
    }
    Ok(all)
}

impl Trainer for StageTrainer {
    fn step(&mut self, step: u64, context: &mut JobContext) -> JobResult<Metrics> {
        let warm = self.num_warm_iters();
        if step < warm {
            return self.warm_step(step, context);
        }
        if step == warm {
            // Nothing of the warm start but the weights carries over.
            self.learner.start_here();
        }
        self.learner.iterate(&mut self.batches, step - warm, context)
    }

    fn validate(&mut self, step: u64, context: &mut JobContext) -> JobResult<Metrics> {
        let model = self.learner.model().clone().valid();
        let flow = FlowStep {
            table: self.batches.flow.table.clone(),
            sigma_dtype: self.batches.flow.sigma_dtype,
            draws: Draws::Seeded(self.seed),
            device: context.device.clone(),
            cache: self.batches.flow.cache.clone(),
        };
        let mut metrics = Metrics::new();
        for (task, batches) in &self.held_out {
            let (mut sum, mut count) = (0.0, 0.0);
            let parts = |batch: &Batch| divide(batch.images.len(), self.division);
            let parts = batches
                .iter()
                .enumerate()
                .flat_map(|(number, batch)| parts(batch).map(move |rows| (number, Part::of(batch, rows))));
            for (number, part) in parts {
                let prompts = flow.prompts(&model, &part)?;
                let condition = model.training_condition(&prompts).or_input(|| "read the held-out prompts")?;
                for &sigma in &self.settings.validation.sigmas {
                    let stream = format!("validation/{number}/{sigma}");
                    let fixed = Sigmas::Fixed(sigma as f32);
                    let loss = flow.loss_under(&model, &condition, &part, &stream, &fixed)?;
                    sum += f64::from(loss.into_scalar::<f32>()) * part.rows.len() as f64;
                    count += part.rows.len() as f64;
                }
            }
            metrics.insert(loss_name("validation", *task), sum / count);
        }
        if !metrics.is_empty() {
            // Both tasks count alike.
            let mean = metrics.values().sum::<f64>() / metrics.len() as f64;
            self.learner.looked(step, -mean);
        }
        Ok(metrics)
    }

    fn sample(&mut self, step: u64, context: &mut JobContext) -> JobResult<()> {
        match &self.samples {
            Some(samples) => samples.take(&self.learner.model().clone().valid(), step, context),
            None => Ok(()),
        }
    }

    fn tensors(&self) -> NamedTensors {
        let mut tensors = self.learner.tensors();
        tensors.extend(self.warm_start.iter().flat_map(WarmStart::tensors));
        tensors
    }

    fn restore(&mut self, file: &WeightFile) -> JobResult<()> {
        let device = self.batches.flow.device.clone().without_autodiff();
        self.learner.restore(file, &device)?;
        match &mut self.warm_start {
            Some(warm) => warm.restore(file, &device),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
