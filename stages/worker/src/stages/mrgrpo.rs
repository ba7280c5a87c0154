//! `rl`: MR-GRPO, stage 3 (docs/spec/rl.md). One iteration: roll out groups, score them, normalise each reward within its
//! group, update the DiT at some of the denoising steps, and once on an auxiliary flow-matching batch.
//!
//! Departures from the release, all of them settings or listed there: `old_logp_dtype` defaults to f32; prompts never
//! repeat their sequence; every random draw is a function of the seed and the iteration, so that a resume is exact.

use std::collections::BTreeSet;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, FloatDType, TensorData};
use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::flops::{RlIteration, rl_iteration};
use deepgen_contract::rl::{RlSettings, RolloutSettings, UpdateGranularity};
use deepgen_contract::train::FloatKind;
use deepgen_data::batch::{Batch, Loader};
use deepgen_data::mixture::Mixture;
use deepgen_data::prompt::encode_text_to_image;
use deepgen_data::sample::{SetKind, Task};
use deepgen_data::stream::{ItemRef, Shard};
use deepgen_data::tokenizer::Tokenizer;
use deepgen_model::checkpointing::with_activation_checkpointing;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::flow::TrainingTable;
use deepgen_model::random::Stream;
use deepgen_model::vlm::PromptBatch;
use deepgen_model::weights::WeightFile;
use deepgen_model::{Device, Tensor, trainable};

use crate::advantage::RewardTable;
use crate::checkpoint::NamedTensors;
use crate::device;
use crate::emit::Metrics;
use crate::error::{JobError, JobResult, OrFail};
use crate::fit::{FitEnd, FitPlan, Trainer, ensure_finite_loss, fit};
use crate::flow_step::{Draws, FlowStep, Part, Sigmas};
use crate::frozen_cache::FrozenCache;
use crate::job::{JobContext, JobEnd, JobReport};
use crate::learner::{Learner, UpdateRule, leave_out};
use crate::model_folder;
use crate::objective::{Prediction, policy_loss};
use crate::optimize::schedule_factor;
use crate::precision;
use crate::rewards::{Rewards, WeightedPrompt};
use crate::rollout::{Rollout, roll_out, velocity};
use crate::sampling::{Sampling, draw, initial_noise};
use crate::suspects;

/// Images of an evaluation batch.
const EVALUATION_BATCH: usize = 48;
/// Images of an evaluation that are shown beside the curves.
const SHOWN_SAMPLES: usize = 8;

/// Trains and writes the checkpoint artifact.
///
/// # Errors
/// When inputs and settings do not fit together, a reward fails, or a loss is not finite.
pub fn run(settings: &RlSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let mut notes = Vec::new();
    let mut trainer = RlTrainer::open(settings, context, &mut notes)?;
    let plan = FitPlan {
        total: settings.policy.iterations,
        unit: "iterations",
        boundary: 1,
        log_every: 1,
        validate_every: settings.evaluation.every,
        sample_every: 0,
        checkpoint: settings.checkpoint.clone(),
        on_non_finite: settings.policy.on_non_finite,
    };
    let is_checkpointing = settings.policy.activation_checkpointing;
    let end = with_activation_checkpointing(is_checkpointing, || fit(&mut trainer, &plan, context))?;
    let metrics = match end {
        FitEnd::Finished(metrics) => metrics,
        FitEnd::Stopped(step) => return Ok(JobEnd::Stopped(step)),
    };
    notes.extend(model_folder::write_checkpoint(&trainer.learner, &context.out())?);
    notes.push(format!("{} updates of the optimiser", trainer.learner.updates()));
    if let Some(cache) = &trainer.flow.cache {
        cache.summarise(&mut context.emitter);
    }
    Ok(JobEnd::Done(JobReport { metrics, notes }))
}

struct RlTrainer {
    learner: Learner<DeepGen>,
    /// The policy as it was before the first update; never changed (docs/spec/rl.md section 8).
    reference: DeepGen,
    prompts: Mixture,
    tokenizer: Tokenizer,
    rewards: Rewards,
    auxiliary: Option<Loader>,
    flow: FlowStep,
    settings: RlSettings,
    seed: u64,
    plain: Device,
}

impl RlTrainer {
    fn open(settings: &RlSettings, context: &mut JobContext, notes: &mut Vec<String>) -> JobResult<Self> {
        let seed = context.spec.seed;
        let plain = context.device.clone();
        let device = device::for_training(&plain, settings.policy.activation_checkpointing);
        let weights = context.input_path("weights", ArtifactKind::Weights)?;
        let parts = model_folder::load_parts(&weights, &settings.precision, &device)?;
        let compute = precision::compute_type(&settings.precision, &device);
        let model = DeepGen::from_parts(parts).or_input(|| "put the parts together")?.computing_in(compute);
        let (model, trained) = trainable::select(model, &settings.trainable).or_input(|| "`trainable`")?;
        notes.push(format!("{} parameters in {} tensors train", trained.num_elements, trained.names.len()));
        if model.dtype() == DType::BF16 {
            context.meter.computes_in_bf16();
        }

        let prompts = Mixture::open(&context.input_path("prompts", ArtifactKind::Mixture)?)
            .and_then(|mixture| mixture.hold_out_per_member(settings.evaluation.num_prompts as u64))
            .or_input(|| "the prompts")?;
        let members = &prompts.description().members;
        let wanted: BTreeSet<String> = members.iter().flat_map(|member| member.rewards.keys().cloned()).collect();
        let rewards = Rewards::new(&settings.rewards, &wanted)?;
        let auxiliary = match context.spec.inputs.contains_key("data") && settings.sft.coef > 0.0 {
            false => None,
            true => Some(Loader {
                mixture: Mixture::open(&context.input_path("data", ArtifactKind::Mixture)?).or_input(|| "the data")?,
                tokenizer: model_folder::load_tokenizer(&weights)?,
                image: settings.image.clone(),
                vision: model.spec().base.vlm.vision.clone(),
                caption_dropout: settings.sft.caption_dropout,
            }),
        };
        if settings.policy.old_logp_dtype == FloatKind::Bf16 {
            notes.push("old log-probabilities are rounded to bf16, as in the release".into());
        }
        notes.push(match settings.policy.update_granularity {
            UpdateGranularity::PerBackward => "the optimiser steps after every backward pass, as in the release".into(),
            UpdateGranularity::PerIteration => "the optimiser steps once an iteration".into(),
        });
        let cache = context.spec.frozen_cache.as_ref();
        let cache = cache.map(|place| FrozenCache::open(place, &model, &trained.names)).transpose()?;
        Ok(Self {
            reference: model.clone().valid(),
            flow: FlowStep {
                table: TrainingTable::new(model.spec().base.scheduler_shift),
                sigma_dtype: settings.sft.sigma_dtype,
                draws: Draws::Seeded(seed),
                device,
                cache: cache.map(Arc::new),
            },
            learner: Learner::new(
                model,
                UpdateRule {
                    optimizer: settings.optimizer.clone(),
                    accumulation: 1,
                    division: 1,
                    total: settings.policy.iterations,
                    steps_before: 0,
                    on_non_finite: settings.policy.on_non_finite,
                    ema: None,
                    keeps_best: settings.policy.keep_best,
                },
            ),
            tokenizer: model_folder::load_tokenizer(&weights)?,
            prompts,
            rewards,
            auxiliary,
            settings: settings.clone(),
            seed,
            plain,
        })
    }

    fn weighted_prompts(&self, items: &[ItemRef]) -> JobResult<Vec<WeightedPrompt>> {
        items
            .iter()
            .map(|&item| {
                let prompt = self.prompts.prompt(item).or_io(|| "read a prompt")?;
                let member = &self.prompts.description().members[prompt.member];
                Ok(WeightedPrompt { text: prompt.text, set: member.name.clone(), weights: member.rewards.clone() })
            })
            .collect()
    }

    fn prompt_batch<'a>(&self, texts: impl Iterator<Item = &'a str>) -> JobResult<PromptBatch> {
        let ids = texts.map(|text| encode_text_to_image(&self.tokenizer, text).or_input(|| format!("encode {text:?}")));
        Ok(PromptBatch::text(ids.collect::<JobResult<_>>()?))
    }

    /// Returns the operations of an iteration.
    fn flops(&self) -> Option<f64> {
        let RolloutSettings { height, width, .. } = self.settings.rollout;
        let iteration = RlIteration::of(&self.settings, self.auxiliary.is_some());
        rl_iteration(self.learner.model().spec(), &iteration, (height, width))
    }

    /// Draws the denoising steps that are trained: without replacement, the last one excluded, in ascending order
    /// (docs/spec/rl.md section 5).
    fn trained_steps(&self, iteration: u64) -> Vec<usize> {
        let steps = self.settings.rollout.steps;
        let mut candidates: Vec<usize> = (0..steps.saturating_sub(1)).collect();
        let wanted =
            ((steps as f64 * self.settings.policy.timestep_fraction) as usize).clamp(1, candidates.len().max(1));
        let mut draws = Stream::new(self.seed, &format!("rl/{iteration}/timesteps"));
        let mut chosen: Vec<usize> = (0..wanted.min(candidates.len()))
            .map(|_| candidates.swap_remove((draws.unit() * candidates.len() as f64) as usize))
            .collect();
        chosen.sort_unstable();
        chosen
    }

    /// Adds gradients and, when every backward pass is an update, makes it.
    fn absorb(
        &mut self,
        loss: Tensor<1>,
        place: Place<'_>,
        metrics: &mut Sums,
        context: &mut JobContext,
    ) -> JobResult<()> {
        self.learner.add(loss, 1.0);
        match self.settings.policy.update_granularity {
            UpdateGranularity::PerBackward => self.update(place, metrics, context),
            UpdateGranularity::PerIteration => Ok(()),
        }
    }

    fn update(&mut self, place: Place<'_>, metrics: &mut Sums, context: &mut JobContext) -> JobResult<()> {
        let optimizer = &self.settings.optimizer;
        let lr = optimizer.lr * schedule_factor(&optimizer.schedule, self.learner.updates(), place.total);
        match self.learner.update(place.iteration, lr) {
            Ok(None) => {}
            Ok(Some(norm)) => {
                metrics.add("train/grad_norm", norm);
                metrics.add("train/lr", lr);
            }
            Err(error) => self.leave_out(error, place, context)?,
        }
        Ok(())
    }

    /// Does what the policy says about a number that is not finite, with the drawn images and the auxiliary batch kept.
    fn leave_out(&self, error: JobError, place: Place<'_>, context: &mut JobContext) -> JobResult<()> {
        let kept = self.keep(&error.message, place, context);
        leave_out(self.settings.policy.on_non_finite, error, kept, context)
    }

    fn keep(&self, why: &str, place: Place<'_>, context: &JobContext) -> JobResult<String> {
        let drawn = (place.prompts, place.rollout.images.as_slice(), place.advantages);
        let drawn = suspects::keep_rollout(context, place.iteration, why, drawn)?;
        match self.auxiliary_batch(place.iteration)? {
            Some(batch) => Ok(format!("{drawn}, {}", suspects::keep(context, place.iteration, why, &batch)?)),
            None => Ok(drawn),
        }
    }

    /// Returns the batch of the auxiliary loss, if the iteration has one.
    fn auxiliary_batch(&self, iteration: u64) -> JobResult<Option<Batch>> {
        let Some(loader) = &self.auxiliary else { return Ok(None) };
        if !iteration.is_multiple_of(self.settings.sft.every.max(1)) {
            return Ok(None);
        }
        let batch = self.settings.sft.batch as u64;
        let items = loader.mixture.items(SetKind::Generation, Shard::single(self.seed), iteration * batch, batch);
        let items = items.or_input(|| "the auxiliary data")?;
        let loaded = loader.load_items_with_dropout(Task::TextToImage, &items, self.seed, iteration);
        loaded.or_input(|| "load an auxiliary batch").map(Some)
    }

    /// Makes the policy updates of an iteration.
    fn improve(
        &mut self,
        iteration: u64,
        (rollout, advantages): (&Rollout, &[f32]),
        prompts: &[String],
        metrics: &mut Sums,
        context: &mut JobContext,
    ) -> JobResult<()> {
        let policy = self.settings.policy.clone();
        let chosen = self.trained_steps(iteration);
        let total = policy.iterations * (chosen.len() as u64 + 1);
        let place = Place { iteration, total, rollout, advantages, prompts };
        let weight = (1.0 - self.settings.sft.coef) / chosen.len() as f64;
        let device = self.flow.device.clone();
        let advantage = Tensor::<1>::from_data(TensorData::new(advantages.to_vec(), [advantages.len()]), &device);
        let condition = lift(rollout);
        for (order, &number) in chosen.iter().enumerate() {
            let step = &rollout.steps[number];
            let before = Tensor::from_inner(step.before.clone());
            let v = velocity(self.learner.model(), before.clone(), &step.transition, &condition);
            let mean = step.transition.mean(before, v.clone());
            let new_log_prob = step.transition.log_prob(Tensor::from_inner(step.after.clone()), mean.clone());
            let old = match policy.old_logp_dtype {
                FloatKind::F32 => step.log_prob.clone(),
                FloatKind::Bf16 => step.log_prob.clone().cast(FloatDType::BF16).cast(FloatDType::F32),
            };
            let result = policy_loss(new_log_prob, Tensor::from_inner(old), advantage.clone(), policy.clip_range);
            let ratios: Vec<f64> = result.ratio.into_data().iter::<f32>().map(f64::from).collect();
            let mut loss = result.loss;
            let mut divergence = None;
            if policy.beta > 0.0 {
                let reference_v = velocity(&self.reference, step.before.clone(), &step.transition, &rollout.condition);
                let reference_mean = step.transition.mean(step.before.clone(), reference_v.clone());
                let reference =
                    Prediction { velocity: Tensor::from_inner(reference_v), mean: Tensor::from_inner(reference_mean) };
                let kl = step.transition.kl(policy.kl, Prediction { velocity: v, mean }, reference);
                divergence = Some(scalar(kl.clone()));
                loss = loss + kl.mul_scalar(policy.beta);
            }
            let value = scalar(loss.clone());
            if let Err(error) = ensure_finite_loss(iteration, "rl/policy_loss", value, prompts) {
                self.leave_out(error, place, context)?;
                continue;
            }
            let off = ratios.iter().map(|ratio| (ratio - 1.0).abs()).sum::<f64>() / ratios.len() as f64;
            let clipped = ratios.iter().filter(|ratio| (*ratio - 1.0).abs() > policy.clip_range).count();
            metrics.add("rl/ratio_deviation", off);
            metrics.add("rl/clipped_share", clipped as f64 / ratios.len() as f64);
            if order == 0 {
                // Before the first update the policy is the one that drew the images.
                metrics.add("rl/first_ratio_deviation", off);
            }
            if let Some(divergence) = divergence {
                metrics.add("rl/kl", divergence);
            }
            metrics.add("rl/policy_loss", value);
            self.absorb(loss.mul_scalar(weight), place, metrics, context)?;
        }
        if let Some(batch) = self.auxiliary_batch(iteration)? {
            let stream = format!("rl/{iteration}/sft");
            let loss = self.flow.loss(self.learner.model(), &Part::whole(&batch), &stream, &Sigmas::Drawn)?;
            if let Some(cache) = &self.flow.cache {
                cache.report(&mut context.emitter);
            }
            let value = scalar(loss.clone());
            match ensure_finite_loss(iteration, "train/loss_text2image", value, &batch.keys) {
                Ok(()) => {
                    metrics.add("train/loss_text2image", value);
                    self.absorb(loss.mul_scalar(self.settings.sft.coef), place, metrics, context)?;
                }
                Err(error) => self.leave_out(error, place, context)?,
            }
        }
        self.update(place, metrics, context)
    }
}

/// Where an update stands and what it is made of.
#[derive(Clone, Copy)]
struct Place<'a> {
    iteration: u64,
    /// Updates in all.
    total: u64,
    rollout: &'a Rollout,
    /// One for each image.
    advantages: &'a [f32],
    prompts: &'a [String],
}

impl Trainer for RlTrainer {
    fn step(&mut self, iteration: u64, context: &mut JobContext) -> JobResult<Metrics> {
        let rollout_settings = self.settings.rollout.clone();
        let count = rollout_settings.prompts as u64;
        let items = self
            .prompts
            .items(SetKind::Prompts, Shard::single(self.seed), iteration * count, count)
            .or_input(|| "the prompts")?;
        let prompts = self.weighted_prompts(&items)?;
        let batch = self.prompt_batch(prompts.iter().map(|prompt| prompt.text.as_str()))?;
        let policy = self.learner.model().clone().valid();
        let condition = policy.condition(&batch).or_input(|| "read the prompts")?;
        let draws = (self.seed, format!("rl/{iteration}"));
        let rollout = roll_out(&policy, &rollout_settings, &condition, (draws.0, &draws.1), &self.plain)?;
        let table = self.rewards.score(&prompts, &rollout.images, rollout_settings.group_size)?;
        let policy_settings = &self.settings.policy;
        let advantages = table.advantages(policy_settings.advantage, policy_settings.advantage_clip as f32);
        let mut metrics = Sums::default();
        self.report_rewards("reward", &table, &mut metrics);
        context.meter.count(rollout.images.len() as u64, self.flops());
        let keys: Vec<String> = prompts.into_iter().map(|prompt| prompt.text).collect();
        self.improve(iteration, (&rollout, &advantages), &keys, &mut metrics, context)?;
        Ok(metrics.means())
    }

    /// Scores images of fixed prompts that are never trained on, drawn without transition noise and with guidance.
    fn validate(&mut self, step: u64, context: &mut JobContext) -> JobResult<Metrics> {
        let RolloutSettings { height, width, .. } = self.settings.rollout;
        let evaluation = &self.settings.evaluation;
        let sampling = Sampling { steps: evaluation.steps, guidance: evaluation.guidance, height, width };
        let model = self.learner.model().clone().valid();
        let mut metrics = Sums::default();
        let mut num_shown = 0;
        for items in self.prompts.held_out(SetKind::Prompts).chunks(EVALUATION_BATCH) {
            let prompts = self.weighted_prompts(items)?;
            let positive = self.prompt_batch(prompts.iter().map(|prompt| prompt.text.as_str()))?;
            let condition = if sampling.is_guided() {
                let negative = self.prompt_batch(prompts.iter().map(|_| ""))?;
                model.guidance_condition(negative, positive)
            } else {
                model.condition(&positive)
            };
            let condition = condition.or_input(|| "read the held-out prompts")?;
            let names: Vec<String> = items.iter().map(|item| format!("rl/{}/{}", item.member, item.index)).collect();
            let noise = initial_noise(&model.spec().base, &sampling, self.seed, &names, &self.plain);
            let images = draw((&model).into(), &sampling, &condition, &[], noise)?;
            for (prompt, image) in prompts.iter().zip(&images).take(SHOWN_SAMPLES - num_shown) {
                context.emitter.image(step, &format!("evaluation/{}", prompt.text), image);
                num_shown += 1;
            }
            let table = self.rewards.score(&prompts, &images, 1)?;
            self.report_rewards("evaluation", &table, &mut metrics);
            for (prompt, (rewards, weights)) in prompts.iter().zip(table.rewards.iter().zip(&table.weights)) {
                for (column, name) in self.rewards.meaningful(1).filter(|(column, _)| weights[*column] > 0.0) {
                    metrics.add(&format!("evaluation/{name}_{}", prompt.set), f64::from(rewards[column]));
                }
            }
        }
        let metrics = metrics.means();
        if let Some(total) = metrics.get("evaluation/total") {
            self.learner.looked(step, *total);
        }
        Ok(metrics)
    }

    fn tensors(&self) -> NamedTensors {
        self.learner.tensors()
    }

    fn restore(&mut self, file: &WeightFile) -> JobResult<()> {
        self.learner.restore(file, &self.plain)
    }
}

impl RlTrainer {
    /// Adds the mean of every reward over the images whose prompts weigh it, and of their weighted total.
    fn report_rewards(&self, group: &str, table: &RewardTable, metrics: &mut Sums) {
        for (rewards, weights) in table.rewards.iter().zip(&table.weights) {
            let mut total = 0.0;
            for (column, name) in self.rewards.meaningful(table.group_size) {
                if weights[column] > 0.0 {
                    metrics.add(&format!("{group}/{name}"), f64::from(rewards[column]));
                    total += f64::from(rewards[column] * weights[column]);
                }
            }
            metrics.add(&format!("{group}/total"), total);
        }
        if table.group_size > 1 {
            for (column, name) in self.rewards.names().enumerate() {
                metrics.add(&format!("rl/constant_groups_{name}"), f64::from(table.constant_groups(column)));
            }
        }
    }
}

/// Sums and counts of named numbers.
#[derive(Default)]
struct Sums(std::collections::BTreeMap<String, (f64, f64)>);

impl Sums {
    fn add(&mut self, name: &str, value: f64) {
        let entry = self.0.entry(name.to_owned()).or_default();
        *entry = (entry.0 + value, entry.1 + 1.0);
    }

    fn means(self) -> Metrics {
        self.0.into_iter().map(|(name, (sum, count))| (name, sum / count)).collect()
    }
}

/// Returns the rollout's conditions as constants on the tape.
fn lift(rollout: &Rollout) -> deepgen_model::bridge::Condition {
    deepgen_model::bridge::Condition {
        sequence: Tensor::from_inner(rollout.condition.sequence.clone()),
        pooled: Tensor::from_inner(rollout.condition.pooled.clone()),
    }
}

fn scalar(x: Tensor<1>) -> f64 {
    f64::from(x.into_scalar::<f32>())
}
