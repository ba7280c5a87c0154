//! Losses to updates: the weights that train, their gradients, the optimiser and the moving average, under one policy for
//! numbers that are not finite.
//!
//! Knows parameters by name, neither data nor what a loss means: [`Losses`] gives them. A loss or a gradient that is NaN or
//! infinite changes nothing: weights, moments and average stay as they were before the update it belongs to.

use std::ops::Range;
use std::time::Instant;

use burn::module::Module;
use deepgen_contract::job::FailureCause;
use deepgen_contract::train::{EmaSettings, OnNonFinite, OptimizerSettings};
use deepgen_model::weights::WeightFile;
use deepgen_model::{Device, Tensor};

use crate::best::BestWeights;
use crate::checkpoint::NamedTensors;
use crate::ema::EmaWeights;
use crate::emit::Metrics;
use crate::error::{JobError, JobResult};
use crate::fit::ensure_finite_loss;
use crate::flow_step::divide;
use crate::job::JobContext;
use crate::model_folder;
use crate::optimize::{self, AdamW, GradientSum, schedule_factor};

/// Name prefix of trained parameters in a checkpoint.
const PREFIX: &str = "trained.";

/// The loss of a micro-batch, or of a part of it.
pub struct Loss {
    /// Its name among the metrics.
    pub name: String,
    /// Its value [1], on the tape.
    pub value: Tensor<1>,
    /// Samples that it is made of, for a message.
    pub keys: Vec<String>,
}

/// What a learner descends.
pub trait Losses<M> {
    /// The samples of a micro-batch.
    type Batch;

    /// Gets micro-batch `iteration`, which is a function of its number.
    ///
    /// # Errors
    /// When the data cannot be read.
    fn batch(&mut self, iteration: u64, context: &mut JobContext) -> JobResult<Self::Batch>;

    /// Returns the number of its samples.
    fn num_samples(batch: &Self::Batch) -> usize;

    /// Returns the operations of a step on it; nothing where they are not counted.
    fn flops(&self, _batch: &Self::Batch) -> Option<f64> {
        None
    }

    /// Returns the mean loss of the samples at `rows` of micro-batch `iteration`. What is drawn for a sample does not depend
    /// on the rows beside it.
    ///
    /// # Errors
    /// When the samples do not fit the model.
    fn loss(&self, model: &M, iteration: u64, batch: &Self::Batch, rows: Range<usize>) -> JobResult<Loss>;

    /// Keeps micro-batch `iteration` for a person to look at, and returns where.
    ///
    /// # Errors
    /// When it cannot be read again or the disk is full.
    fn keep(&self, iteration: u64, why: &str, context: &JobContext) -> JobResult<String>;
}

/// How losses become updates.
#[derive(Debug, Clone)]
pub struct UpdateRule {
    /// Learning rate, its course, clipping, AdamW's numbers.
    pub optimizer: OptimizerSettings,
    /// Micro-batches of an update, whose gradients are averaged.
    pub accumulation: u64,
    /// Parts of a micro-batch, one after the other: less memory for the same update.
    pub division: usize,
    /// Micro-batches in all: the length of the learning rate's course.
    pub total: u64,
    /// Steps of the job that come before the first micro-batch.
    pub steps_before: u64,
    /// What to do about a loss or gradient norm that is NaN or infinite.
    pub on_non_finite: OnNonFinite,
    /// Moving average of what trains.
    pub ema: Option<EmaSettings>,
    /// Whether the weights at the best look at held-out data are kept.
    pub keeps_best: bool,
}

/// A module that learns.
pub struct Learner<M> {
    /// Absent only while an update is made.
    model: Option<M>,
    optimizer: AdamW,
    gradients: GradientSum,
    ema: Option<EmaWeights>,
    best: Option<BestWeights>,
    rule: UpdateRule,
}

impl<M: Module> Learner<M> {
    /// Creates a learner without history.
    pub fn new(model: M, rule: UpdateRule) -> Self {
        Self {
            ema: rule.ema.as_ref().map(|ema| EmaWeights::new(ema, &model)),
            optimizer: AdamW::new(&rule.optimizer),
            model: Some(model),
            gradients: GradientSum::default(),
            best: None,
            rule,
        }
    }

    /// Returns the module.
    pub fn model(&self) -> &M {
        self.model.as_ref().expect("the weights are away only while an update is made")
    }

    /// Returns the moving average, if there is one.
    pub fn ema(&self) -> Option<&EmaWeights> {
        self.ema.as_ref()
    }

    /// Returns the weights at the best look at held-out data, if they are kept and there was one.
    pub fn best(&self) -> Option<&BestWeights> {
        self.best.as_ref()
    }

    /// Takes note of a look at held-out data after `step` steps; a higher score is better.
    pub fn looked(&mut self, step: u64, score: f64) {
        if self.rule.keeps_best {
            let model = self.model.as_ref().expect("no update is being made");
            BestWeights::take(&mut self.best, model, step, score);
        }
    }

    /// Returns the updates made.
    pub fn updates(&self) -> u64 {
        self.optimizer.updates()
    }

    /// Puts another module in the place of this one; what it made of it before an update is no concern of the learner.
    pub fn replace(&mut self, change: impl FnOnce(M) -> M) {
        self.model = self.model.take().map(change);
    }

    /// Forgets gradients and average: what comes now begins at the weights as they are.
    pub fn start_here(&mut self) {
        self.gradients = GradientSum::default();
        self.ema = self.rule.ema.as_ref().map(|ema| EmaWeights::new(ema, self.model()));
    }

    /// Adds the gradient of `loss`, times `scale`, to those of the next update.
    pub fn add(&mut self, loss: Tensor<1>, scale: f64) {
        self.gradients.add(self.model.as_ref().expect("no update is being made"), loss.backward(), scale);
    }

    /// Makes an update at rate `lr` with the gradients added since the last one, and returns their norm before clipping;
    /// nothing when none was added.
    ///
    /// # Errors
    /// When the norm is NaN or infinite: the gradients are given up, everything else is as before.
    pub fn update(&mut self, step: u64, lr: f64) -> JobResult<Option<f64>> {
        if self.gradients.is_empty() {
            return Ok(None);
        }
        let gradients = std::mem::take(&mut self.gradients).ensure_finite(step)?;
        let model = self.model.take().expect("no other update is being made");
        let (model, norm) = self.optimizer.update(model, gradients, lr);
        if let Some(ema) = &mut self.ema {
            ema.step(&model);
        }
        self.model = Some(model);
        Ok(Some(norm))
    }

    /// Makes iteration `iteration`: the gradient of one micro-batch and, after the last one of an update, the update.
    ///
    /// # Errors
    /// When there is no loss, or one or the gradients' norm is not finite and the policy is not to leave it out.
    pub fn iterate<L: Losses<M>>(
        &mut self,
        losses: &mut L,
        iteration: u64,
        context: &mut JobContext,
    ) -> JobResult<Metrics> {
        let step = self.rule.steps_before + iteration;
        let accumulation = self.rule.accumulation.max(1);
        let begun = Instant::now();
        let batch = losses.batch(iteration, context)?;
        context.meter.waited_since(begun);
        context.meter.count(L::num_samples(&batch) as u64, losses.flops(&batch));
        let mut metrics = Metrics::new();
        match self.descend(losses, iteration, &batch) {
            Ok((name, value)) => {
                metrics.insert(name, value);
            }
            Err(error) if error.cause == FailureCause::NonFinite => {
                let kept = losses.keep(iteration, &error.message, context);
                leave_out(self.rule.on_non_finite, error, kept, context)?;
            }
            Err(error) => return Err(error),
        }
        if (iteration + 1).is_multiple_of(accumulation) {
            let optimizer = &self.rule.optimizer;
            let lr = optimizer.lr * schedule_factor(&optimizer.schedule, iteration, self.rule.total);
            match self.update(step, lr) {
                Ok(None) => {}
                Ok(Some(norm)) => {
                    metrics.insert("train/grad_norm".into(), norm);
                    metrics.insert("train/lr".into(), lr);
                }
                Err(error) => {
                    let kept = keep_all(losses, iteration + 1 - accumulation..iteration + 1, &error.message, context);
                    leave_out(self.rule.on_non_finite, error, kept, context)?;
                }
            }
        }
        Ok(metrics)
    }

    /// Adds the gradient of a micro-batch, part by part; returns the name and the value of its loss.
    fn descend<L: Losses<M>>(&mut self, losses: &L, iteration: u64, batch: &L::Batch) -> JobResult<(String, f64)> {
        let accumulation = self.rule.accumulation.max(1) as f64;
        let count = L::num_samples(batch);
        // Where a micro-batch may be left out, its parts are summed apart: a later one may turn out not to be finite. Else the
        // sum is given up with the update.
        let earlier = match self.rule.on_non_finite {
            OnNonFinite::Skip => std::mem::take(&mut self.gradients),
            OnNonFinite::Stop | OnNonFinite::Rollback => GradientSum::default(),
        };
        let mut found = (String::new(), 0.0);
        let mut outcome = Ok(());
        for rows in divide(count, self.rule.division) {
            let share = rows.len() as f64 / count as f64;
            let loss = losses.loss(self.model(), iteration, batch, rows)?;
            let value = f64::from(loss.value.clone().into_scalar::<f32>());
            outcome = ensure_finite_loss(self.rule.steps_before + iteration, &loss.name, value, &loss.keys);
            if outcome.is_err() {
                break;
            }
            self.add(loss.value, share / accumulation);
            found = (loss.name, found.1 + share * value);
        }
        if self.rule.on_non_finite == OnNonFinite::Skip {
            let own = std::mem::replace(&mut self.gradients, earlier);
            if outcome.is_ok() {
                self.gradients.merge(own);
            }
        }
        outcome.map(|()| found)
    }

    /// Returns everything that a later update depends on.
    pub fn tensors(&self) -> NamedTensors {
        let weights = model_folder::trained(self.model()).into_iter();
        let mut tensors: NamedTensors = weights.map(|(name, data)| (format!("{PREFIX}{name}"), data)).collect();
        tensors.extend(self.optimizer.tensors());
        tensors.extend(self.ema.iter().flat_map(EmaWeights::tensors));
        tensors.extend(self.best.iter().flat_map(BestWeights::tensors));
        tensors
    }

    /// Takes up the state of a checkpoint; `device` is without autodiff.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape. The weights are then not to be used.
    pub fn restore(&mut self, file: &WeightFile, device: &Device) -> JobResult<()> {
        let model = self.model.take().expect("no update is being made");
        self.model = Some(model_folder::lay_over(model, file, PREFIX)?);
        self.gradients = GradientSum::default();
        self.optimizer.restore(file, optimize::PREFIX, device)?;
        self.best = BestWeights::restored(file)?;
        match &mut self.ema {
            Some(ema) => ema.restore(file, device),
            None => Ok(()),
        }
    }
}

fn keep_all<M>(losses: &impl Losses<M>, iterations: Range<u64>, why: &str, context: &JobContext) -> JobResult<String> {
    let kept = iterations.map(|iteration| losses.keep(iteration, why, context)).collect::<JobResult<Vec<_>>>()?;
    Ok(kept.join(", "))
}

/// Does what the policy says about a loss or a gradient that is not finite, with what it came from kept in `kept`.
///
/// # Errors
/// `error` itself, unless it is to be left out.
pub fn leave_out(
    policy: OnNonFinite,
    error: JobError,
    kept: JobResult<String>,
    context: &mut JobContext,
) -> JobResult<()> {
    let message = match kept {
        Ok(path) => format!("{error}. What it came from is kept in {path}"),
        Err(unkept) => format!("{error}. What it came from could not be kept: {unkept}"),
    };
    if policy != OnNonFinite::Skip {
        return Err(JobError { message, ..error });
    }
    context.emitter.warn(format!("left out: {message}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::nn::{Linear, LinearConfig};
    use deepgen_contract::train::{CheckpointSettings, Schedule};
    use deepgen_model::weights;

    use super::*;
    use crate::fit::{FitPlan, Trainer, fit};

    /// Micro-batches of an update.
    const ACCUMULATION: u64 = 2;
    const TOTAL: u64 = 24;
    /// A micro-batch in the middle of an update: 12 and 13 make up the seventh.
    const BAD: u64 = 13;

    /// How the bad micro-batch is bad; its loss is finite in every case.
    #[derive(Debug, Clone, Copy)]
    enum Bad {
        Nothing,
        InfiniteGradient,
        NanGradient,
    }

    /// Squared errors of a linear layer; at [`BAD`] something else.
    struct Toy(Bad);

    impl Losses<Linear> for Toy {
        type Batch = ();

        fn batch(&mut self, _iteration: u64, _context: &mut JobContext) -> JobResult<()> {
            Ok(())
        }

        fn num_samples((): &()) -> usize {
            1
        }

        fn loss(&self, model: &Linear, iteration: u64, (): &(), _rows: Range<usize>) -> JobResult<Loss> {
            let weight = model.weight.val();
            let value = match (self.0, iteration) {
                // The root's slope at 0 is infinite.
                (Bad::InfiniteGradient, BAD) => (weight.clone() - weight.detach()).sqrt().mean(),
                (Bad::NanGradient, BAD) => weight.mul_scalar(0.0).sqrt().mean(),
                _ => (weight - (iteration as f64 + 0.3).sin()).square().mean(),
            };
            Ok(Loss { name: "train/loss".into(), value, keys: vec![format!("sample {iteration}")] })
        }

        fn keep(&self, iteration: u64, _why: &str, _context: &JobContext) -> JobResult<String> {
            Ok(format!("kept-{iteration}"))
        }
    }

    struct Job {
        learner: Learner<Linear>,
        losses: Toy,
    }

    impl Trainer for Job {
        fn step(&mut self, step: u64, context: &mut JobContext) -> JobResult<Metrics> {
            self.learner.iterate(&mut self.losses, step, context)
        }

        fn validate(&mut self, _step: u64, _context: &mut JobContext) -> JobResult<Metrics> {
            Ok(Metrics::new())
        }

        fn tensors(&self) -> NamedTensors {
            self.learner.tensors()
        }

        fn restore(&mut self, file: &WeightFile) -> JobResult<()> {
            self.learner.restore(file, &Device::flex())
        }
    }

    fn job(bad: Bad, on_non_finite: OnNonFinite) -> Job {
        let linear = LinearConfig::new(3, 2).with_bias(false).init(&Device::flex().autodiff());
        let linear = weights::map_params(linear, |_, x| x.mul_scalar(0.0).add_scalar(0.5));
        let (linear, _) = deepgen_model::trainable::select(linear, &["*".into()]).unwrap();
        let optimizer = OptimizerSettings {
            lr: 0.1,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.05,
            clip_norm: 1.0,
            schedule: Schedule::WarmupCosine { warmup_ratio: 0.1 },
        };
        let rule = UpdateRule {
            optimizer,
            accumulation: ACCUMULATION,
            division: 1,
            total: TOTAL,
            steps_before: 0,
            on_non_finite,
            ema: Some(EmaSettings { decay: 0.9, interval: 1 }),
            keeps_best: false,
        };
        Job { learner: Learner::new(linear, rule), losses: Toy(bad) }
    }

    /// Runs the whole job; returns how it ended, and its metric lines.
    fn run(job: &mut Job, on_non_finite: OnNonFinite, folder: &Path) -> (JobResult<()>, Vec<String>) {
        let plan = FitPlan {
            total: TOTAL,
            unit: "iterations",
            boundary: ACCUMULATION,
            log_every: 1,
            validate_every: 0,
            sample_every: 0,
            checkpoint: CheckpointSettings { every: 4, keep: 2, max_bytes: None },
            on_non_finite,
        };
        let mut context = JobContext::for_test(folder, &[]);
        let end = fit(job, &plan, &mut context).map(|_| ());
        (end, context.emitter.metric_lines().to_vec())
    }

    /// What a job would be without the update of the bad micro-batch: weights, moments, average, as bits.
    fn without_the_bad_update(updates: std::ops::Range<u64>) -> Vec<(String, Vec<u32>)> {
        let mut job = job(Bad::Nothing, OnNonFinite::Stop);
        let folder = tempfile::tempdir().unwrap();
        let mut context = JobContext::for_test(folder.path(), &[]);
        for update in updates.filter(|update| *update != BAD / ACCUMULATION) {
            for iteration in update * ACCUMULATION..(update + 1) * ACCUMULATION {
                job.step(iteration, &mut context).unwrap();
            }
        }
        bits(&job)
    }

    fn bits(job: &Job) -> Vec<(String, Vec<u32>)> {
        let tensors = job.tensors().into_iter();
        tensors.map(|(name, data)| (name, data.iter::<f32>().map(f32::to_bits).collect())).collect()
    }

    #[test]
    fn an_update_whose_gradient_is_not_finite_is_left_out_and_changes_nothing() {
        for bad in [Bad::InfiniteGradient, Bad::NanGradient] {
            let folder = tempfile::tempdir().unwrap();
            let mut job = job(bad, OnNonFinite::Skip);
            let (end, lines) = run(&mut job, OnNonFinite::Skip, folder.path());
            end.unwrap();
            assert_eq!(bits(&job), without_the_bad_update(0..TOTAL / ACCUMULATION), "{bad:?}");
            assert_eq!(lines.len() as u64, TOTAL);
            assert!(lines.iter().all(|line| !line.contains("null")), "{lines:?}");
            assert!(!lines[BAD as usize].contains("grad_norm") && lines[BAD as usize].contains("train/loss"));
            let events = std::fs::read_to_string(folder.path().join("events.jsonl")).unwrap();
            let said = events.lines().find(|line| line.contains("left out")).expect("it is said");
            // Every micro-batch of the update is kept: which of them it was is not known.
            for part in ["kept-12, kept-13", "at step 14", "1 of 1 tensors (weight)"] {
                assert!(said.contains(part), "{part}: {said}");
            }
        }
    }

    #[test]
    fn under_stop_the_job_ends_before_the_update_with_its_last_state_intact() {
        let folder = tempfile::tempdir().unwrap();
        let mut job = job(Bad::InfiniteGradient, OnNonFinite::Stop);
        let (end, _) = run(&mut job, OnNonFinite::Stop, folder.path());
        let error = end.unwrap_err();
        assert_eq!(error.cause, deepgen_contract::job::FailureCause::NonFinite);
        assert!(error.message.contains("kept-12, kept-13"), "{error}");
        assert_eq!(bits(&job), without_the_bad_update(0..BAD / ACCUMULATION));
    }

    #[test]
    fn after_a_roll_back_the_update_is_missing_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let mut job = job(Bad::NanGradient, OnNonFinite::Rollback);
        let (end, lines) = run(&mut job, OnNonFinite::Rollback, folder.path());
        end.unwrap();
        assert_eq!(bits(&job), without_the_bad_update(0..TOTAL / ACCUMULATION));
        assert!(lines.iter().all(|line| !line.contains("null")), "{lines:?}");
        let events = std::fs::read_to_string(folder.path().join("events.jsonl")).unwrap();
        assert!(events.contains("rolled back from step 14 to 12"), "{events}");
    }
}
