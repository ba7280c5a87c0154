//! `train`: flow-matching training of stages 1 and 2. The same code: what is in the model and what trains are settings.
//!
//! docs/spec/sft.md sections 1 to 4. An iteration is a micro-batch of one task; an update follows every `accumulation` of
//! them. A warm start of the bridge, which the paper does not have, may come first (`warm_start`).

use std::sync::Arc;

use burn::module::Module;
use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::model::ModelSpec;
use deepgen_contract::train::{OnNonFinite, TrainSettings};
use deepgen_data::batch::{Batch, LoadError, Loader};
use deepgen_data::mixture::Mixture;
use deepgen_data::prefetch::Prefetch;
use deepgen_data::sample::{SetKind, Task};
use deepgen_data::stream::Shard;
use deepgen_model::checkpointing::with_activation_checkpointing;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::flow::TrainingTable;
use deepgen_model::random::with_dropout;
use deepgen_model::trainable;
use deepgen_model::weights::WeightFile;

use crate::checkpoint::NamedTensors;
use crate::device;
use crate::ema::EmaWeights;
use crate::emit::Metrics;
use crate::error::{JobError, JobResult, OrFail};
use crate::fit::{FitEnd, FitPlan, Trainer, ensure_finite_loss, fit};
use crate::flow_step::{Draws, FlowStep, Sigmas, loss_name};
use crate::job::{JobContext, JobEnd, JobReport};
use crate::model_folder;
use crate::optimize::{AdamW, GradientSum, schedule_factor};
use crate::precision;
use crate::suspects;
use crate::warm_start::WarmStart;

/// Name prefix of trained parameters in a checkpoint.
const PREFIX: &str = "trained.";
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
        checkpoint: settings.checkpoint.clone(),
        on_non_finite: settings.train.on_non_finite,
    };
    let is_checkpointing = settings.train.activation_checkpointing;
    let end = with_activation_checkpointing(is_checkpointing, || fit(&mut trainer, &plan, context))?;
    let mut metrics = match end {
        FitEnd::Finished(metrics) => metrics,
        FitEnd::Stopped(step) => return Ok(JobEnd::Stopped(step)),
    };
    let mixture = &trainer.loader.mixture;
    let num_drawn = mixture.num_drawn(trainer.seed, 1, settings.train.max_iters);
    let total = num_drawn.iter().sum::<u64>().max(1) as f64;
    for (member, &count) in mixture.description().members.iter().zip(&num_drawn) {
        metrics.insert(format!("data/share/{}", member.name), count as f64 / total);
    }
    context.emitter.note(mixture.realised_table(&num_drawn));
    model_folder::write_checkpoint(trainer.model(), trainer.ema.as_ref(), &context.out())?;
    Ok(JobEnd::Done(JobReport { metrics, notes }))
}

struct StageTrainer {
    model: Option<DeepGen>,
    optimizer: AdamW,
    ema: Option<EmaWeights>,
    gradients: GradientSum,
    flow: FlowStep,
    loader: Arc<Loader>,
    prefetch: Option<(u64, Prefetch<Result<Batch, LoadError>>)>,
    held_out: Vec<(Task, Vec<Batch>)>,
    warm_start: Option<WarmStart>,
    settings: TrainSettings,
    /// Threads that prepare batches: as many as the job may use. The batches do not depend on it.
    loader_threads: usize,
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
        let flow = FlowStep {
            table: TrainingTable::new(model.spec().base.scheduler_shift),
            sigma_dtype: settings.train.sigma_dtype,
            draws: Draws::Seeded(seed),
            device,
        };
        Ok(Self {
            held_out: held_out_batches(&loader)?,
            ema: settings.train.ema.as_ref().map(|ema| EmaWeights::new(ema, &model)),
            model: Some(model),
            optimizer: AdamW::new(&settings.optimizer),
            gradients: GradientSum::default(),
            flow,
            loader: Arc::new(loader),
            prefetch: None,
            warm_start,
            settings: settings.clone(),
            loader_threads: context.spec.threads.max(1),
            seed,
        })
    }

    fn model(&self) -> &DeepGen {
        self.model.as_ref().expect("a step leaves the weights in place")
    }

    fn num_warm_iters(&self) -> u64 {
        self.warm_start.as_ref().map_or(0, WarmStart::iters)
    }

    /// Returns batch `iteration`, prepared ahead by other threads; a jump, as after a resume, starts them anew.
    fn batch(&mut self, iteration: u64) -> JobResult<Batch> {
        if self.prefetch.as_ref().is_none_or(|(next, _)| *next != iteration) {
            let (loader, shard) = (Arc::clone(&self.loader), Shard::single(self.seed));
            let (depth, threads) = (self.settings.train.prefetch.max(1), self.loader_threads);
            let job = move |number| loader.load(shard, number);
            self.prefetch = Some((iteration, Prefetch::new(iteration..u64::MAX, depth, threads, job)));
        }
        let (next, prefetch) = self.prefetch.as_mut().expect("it was started above");
        *next += 1;
        let batch = prefetch.next().ok_or_else(|| JobError::internal("the loader ended"))?;
        batch.or_input(|| format!("load batch {iteration}"))
    }

    fn warm_step(&mut self, step: u64) -> JobResult<Metrics> {
        let batch = self.batch(step)?;
        let warm = self.warm_start.as_mut().expect("warm steps exist only with a warm start");
        let model = self.model.take().expect("a step leaves the weights in place");
        let (model, metrics) = warm.step(model, &self.flow, &batch, step)?;
        self.model = Some(model);
        Ok(metrics)
    }
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
            return self.warm_step(step);
        }
        if step == warm {
            // Nothing of the warm start but the weights carries over.
            self.gradients = GradientSum::default();
            self.ema = self.settings.train.ema.as_ref().map(|ema| EmaWeights::new(ema, self.model()));
        }
        let iteration = step - warm;
        let batch = self.batch(iteration)?;
        for replaced in &batch.replaced {
            context.emitter.warn(format!("a sample was replaced: {replaced}"));
        }
        let stream = format!("train/{iteration}");
        let dropout_seed = self.seed ^ (iteration + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let loss = with_dropout(dropout_seed, || self.flow.loss(self.model(), &batch, &stream, &Sigmas::Drawn))?;
        let name = loss_name("train", batch.task);
        let value = f64::from(loss.clone().into_scalar::<f32>());
        let accumulation = self.settings.train.accumulation.max(1);
        let mut metrics = Metrics::new();
        match ensure_finite_loss(step, &name, value, &batch.keys) {
            Ok(()) => {
                let model = self.model.take().expect("a step leaves the weights in place");
                self.gradients.add(&model, loss.backward(), 1.0 / accumulation as f64);
                self.model = Some(model);
                metrics.insert(name, value);
            }
            Err(error) => {
                let path = suspects::keep(context, step, &error.message, &batch)?;
                let message = format!("{error}. The batch is kept in {path}");
                if self.settings.train.on_non_finite != OnNonFinite::Skip {
                    return Err(JobError { message, ..error });
                }
                context.emitter.warn(format!("left out: {message}"));
            }
        }
        if (iteration + 1).is_multiple_of(accumulation) && !self.gradients.is_empty() {
            let lr = self.settings.optimizer.lr
                * schedule_factor(&self.settings.optimizer.schedule, iteration, self.settings.train.max_iters);
            let gradients = std::mem::take(&mut self.gradients);
            let model = self.model.take().expect("a step leaves the weights in place");
            let (model, norm) = self.optimizer.update(model, gradients, lr)?;
            if let Some(ema) = &mut self.ema {
                ema.step(&model);
            }
            self.model = Some(model);
            metrics.insert("train/grad_norm".into(), norm);
            metrics.insert("train/lr".into(), lr);
        }
        Ok(metrics)
    }

    fn validate(&mut self, _step: u64, context: &mut JobContext) -> JobResult<Metrics> {
        let model = self.model().clone().valid();
        let flow = FlowStep {
            table: self.flow.table.clone(),
            sigma_dtype: self.flow.sigma_dtype,
            draws: Draws::Seeded(self.seed),
            device: context.device.clone(),
        };
        let mut metrics = Metrics::new();
        for (task, batches) in &self.held_out {
            let (mut sum, mut count) = (0.0, 0.0);
            for (number, batch) in batches.iter().enumerate() {
                let condition =
                    model.training_condition(&flow.prompts(batch)).or_input(|| "read the held-out prompts")?;
                for &sigma in &self.settings.validation.sigmas {
                    let stream = format!("validation/{number}/{sigma}");
                    let fixed = Sigmas::Fixed(sigma as f32);
                    let loss = flow.loss_under(&model, &condition, batch, &stream, &fixed)?;
                    sum += f64::from(loss.into_scalar::<f32>()) * batch.images.len() as f64;
                    count += batch.images.len() as f64;
                }
            }
            metrics.insert(loss_name("validation", *task), sum / count);
        }
        Ok(metrics)
    }

    fn tensors(&self) -> NamedTensors {
        let weights = model_folder::trained(self.model()).into_iter();
        let mut tensors: NamedTensors = weights.map(|(name, data)| (format!("{PREFIX}{name}"), data)).collect();
        tensors.extend(self.optimizer.tensors());
        tensors.extend(self.ema.iter().flat_map(EmaWeights::tensors));
        if let Some(warm) = &self.warm_start {
            tensors.extend(warm.tensors());
        }
        tensors
    }

    fn restore(&mut self, file: &WeightFile) -> JobResult<()> {
        let model = self.model.take().expect("a step leaves the weights in place");
        self.model = Some(model_folder::lay_over(model, file, PREFIX)?);
        self.gradients = GradientSum::default();
        let device = self.flow.device.clone().without_autodiff();
        self.optimizer.restore(file, "optimizer.", &device)?;
        if let Some(ema) = &mut self.ema {
            ema.restore(file, &device)?;
        }
        match &mut self.warm_start {
            Some(warm) => warm.restore(file, &device),
            None => Ok(()),
        }
    }
}
