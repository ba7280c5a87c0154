//! The training loop: step, check, report, validate, save, until done or asked to stop. The same for every trainer.
//!
//! Knows no model and no loss. A resumed loop reports and computes what an undisturbed one would: everything that carries
//! over a step is in the checkpoint, and every random draw is a function of the seed and the step.

use std::collections::BTreeMap;
use std::time::Instant;

use deepgen_contract::event::WorkerEventKind;
use deepgen_contract::train::CheckpointSettings;
use deepgen_model::weights::WeightFile;

use crate::checkpoint::{self, NamedTensors};
use crate::emit::Metrics;
use crate::error::{JobError, JobResult};
use crate::job::JobContext;

/// What trains: one step at a time, with all its state in named tensors.
pub trait Trainer {
    /// Makes step `step`, counted from 0, and returns its numbers.
    ///
    /// # Errors
    /// When a number is not finite or the data cannot be read. The update of the step was then not made.
    fn step(&mut self, step: u64, context: &mut JobContext) -> JobResult<Metrics>;

    /// Returns numbers on held-out data; `step` steps are done.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    fn validate(&mut self, step: u64, context: &mut JobContext) -> JobResult<Metrics>;

    /// Returns everything that a later step depends on.
    fn tensors(&self) -> NamedTensors;

    /// Takes up the state of a checkpoint.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    fn restore(&mut self, file: &WeightFile) -> JobResult<()>;
}

/// The loop's numbers.
pub struct FitPlan {
    /// Steps in all.
    pub total: u64,
    /// What a step is, for the progress line.
    pub unit: &'static str,
    /// Checkpoints are written only at multiples of this: no state lives between updates.
    pub boundary: u64,
    /// Steps between metric lines, which hold means.
    pub log_every: u64,
    /// Steps between validations; 0 turns them off. One precedes the first step and one follows the last.
    pub validate_every: u64,
    /// When to save.
    pub checkpoint: CheckpointSettings,
}

/// How the loop ended.
pub enum FitEnd {
    /// All steps are done.
    Finished,
    /// A stop was asked for; a checkpoint of this step was written.
    Stopped(u64),
}

/// Sums and counts since the last metric line.
#[derive(Default)]
struct Window(BTreeMap<String, (f64, u64)>);

impl Window {
    fn add(&mut self, metrics: Metrics) {
        for (name, value) in metrics {
            let entry = self.0.entry(name).or_default();
            *entry = (entry.0 + value, entry.1 + 1);
        }
    }

    fn take_means(&mut self) -> Metrics {
        std::mem::take(&mut self.0).into_iter().map(|(name, (sum, count))| (name, sum / count as f64)).collect()
    }

    fn to_bits(&self) -> BTreeMap<String, (u64, u64)> {
        self.0.iter().map(|(name, (sum, count))| (name.clone(), (sum.to_bits(), *count))).collect()
    }

    fn from_bits(bits: BTreeMap<String, (u64, u64)>) -> Self {
        Self(bits.into_iter().map(|(name, (sum, count))| (name, (f64::from_bits(sum), count))).collect())
    }
}

/// Runs `trainer` to the end of `plan`, from the newest checkpoint that verifies.
///
/// # Errors
/// What the trainer reports, and failures to write a checkpoint. Checkpoints on disk stay.
pub fn fit(trainer: &mut dyn Trainer, plan: &FitPlan, context: &mut JobContext) -> JobResult<FitEnd> {
    let mut window = Window::default();
    let start = match checkpoint::find_newest(context) {
        Some(found) => {
            trainer.restore(&found.tensors()?)?;
            let (step, path) = (found.state.step, found.path.display().to_string());
            context.emitter.restore_metric_lines(found.state.metric_lines);
            window = Window::from_bits(found.state.window);
            context.emitter.emit(WorkerEventKind::Resumed { step, checkpoint: path });
            step
        }
        None => {
            if plan.validate_every > 0 {
                let metrics = trainer.validate(0, context)?;
                report(0, metrics, context)?;
            }
            0
        }
    };
    let mut timer = (Instant::now(), start);
    for step in start..plan.total {
        let metrics = trainer.step(step, context)?;
        ensure_finite(step, &metrics)?;
        window.add(metrics);
        let done = step + 1;
        context.emitter.progress(done, plan.total, plan.unit);
        if done.is_multiple_of(plan.log_every.max(1)) || done == plan.total {
            let means = window.take_means();
            report(done, means, context)?;
            let seconds = timer.0.elapsed().as_secs_f64();
            let rate = (done - timer.1) as f64 / seconds.max(1e-9);
            context.emitter.timing(done, BTreeMap::from([("time/steps_per_second".into(), rate)]));
            timer = (Instant::now(), done);
        }
        if plan.validate_every > 0 && (done.is_multiple_of(plan.validate_every) || done == plan.total) {
            let metrics = trainer.validate(done, context)?;
            report(done, metrics, context)?;
        }
        let is_boundary = done.is_multiple_of(plan.boundary.max(1));
        let is_stopping = context.is_stop_requested() && is_boundary && done < plan.total;
        if is_stopping || (is_due(done, plan) && done < plan.total) {
            checkpoint::save(context, done, &trainer.tensors(), window.to_bits(), plan.checkpoint.keep)?;
        }
        if is_stopping {
            return Ok(FitEnd::Stopped(done));
        }
    }
    Ok(FitEnd::Finished)
}

/// Returns true at the first boundary at or after each multiple of the checkpoint interval.
fn is_due(done: u64, plan: &FitPlan) -> bool {
    let (every, boundary) = (plan.checkpoint.every, plan.boundary.max(1));
    every > 0 && done.is_multiple_of(boundary) && done / every != (done - boundary) / every
}

fn report(step: u64, metrics: Metrics, context: &mut JobContext) -> JobResult<()> {
    ensure_finite(step, &metrics)?;
    context.emitter.metrics(step, metrics);
    Ok(())
}

/// Checks a loss before its gradient is taken.
///
/// # Errors
/// When it is NaN or infinite: names the step and the samples it came from.
pub fn ensure_finite_loss(step: u64, name: &str, loss: f64, keys: &[String]) -> JobResult<()> {
    if loss.is_finite() {
        return Ok(());
    }
    Err(JobError::non_finite(format!(
        "{name} is {loss} at step {}; the update was not made and the last checkpoint stays. Lower `optimizer.lr`, or \
         look at the samples of that step: {}",
        step + 1,
        keys.join(", ")
    )))
}

fn ensure_finite(step: u64, metrics: &Metrics) -> JobResult<()> {
    match metrics.iter().find(|(_, value)| !value.is_finite()) {
        Some((name, value)) => {
            Err(JobError::non_finite(format!("{name} is {value} after step {step}; the last checkpoint stays")))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_fall_on_boundaries_only() {
        let checkpoint = CheckpointSettings { every: 10, keep: 2 };
        let plan = FitPlan { total: 40, unit: "steps", boundary: 3, log_every: 1, validate_every: 0, checkpoint };
        let due: Vec<u64> = (1..=40).filter(|&done| is_due(done, &plan)).collect();
        assert_eq!(due, [12, 21, 30]);
    }

    #[test]
    fn a_window_survives_its_bits() {
        let mut window = Window::default();
        window.add(BTreeMap::from([("a/b".to_owned(), 0.1)]));
        window.add(BTreeMap::from([("a/b".to_owned(), 0.2)]));
        let mut again = Window::from_bits(window.to_bits());
        assert_eq!(again.take_means(), window.take_means());
    }
}
