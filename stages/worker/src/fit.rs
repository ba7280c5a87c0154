//! The training loop: step, check, report, validate, save, until done or asked to stop. The same for every trainer.
//!
//! Knows no model and no loss. A resumed loop reports and computes what an undisturbed one would: everything that carries
//! over a step is in the checkpoint, and every random draw is a function of the seed and the step. After a roll-back too: the
//! steps that are left out are part of the state.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use deepgen_contract::event::WorkerEventKind;
use deepgen_contract::job::FailureCause;
use deepgen_contract::train::{CheckpointSettings, OnNonFinite};
use deepgen_model::weights::WeightFile;

use crate::checkpoint::{self, NamedTensors, Snapshot, Writer};
use crate::emit::Metrics;
use crate::error::{JobError, JobResult};
use crate::job::JobContext;
use crate::spikes::Spikes;

/// Roll-backs after which a job gives up: more of them are no accident of the data.
const MAX_ROLL_BACKS: usize = 5;
/// Losses are watched for spikes by this prefix of their names.
const WATCHED: &str = "train/loss";

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

    /// Draws images to look at; `step` steps are done. Nothing that is computed later may depend on it.
    ///
    /// # Errors
    /// As [`Trainer::validate`].
    fn sample(&mut self, _step: u64, _context: &mut JobContext) -> JobResult<()> {
        Ok(())
    }

    /// Returns everything that a later step depends on.
    fn tensors(&self) -> NamedTensors;

    /// Takes up the state of a checkpoint, whatever state the trainer is in.
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
    /// Steps between drawings of images; 0 turns them off. One follows the last step.
    pub sample_every: u64,
    /// When to save.
    pub checkpoint: CheckpointSettings,
    /// What to do about a step whose numbers are not finite. Leaving out a single loss is the trainer's matter.
    pub on_non_finite: OnNonFinite,
}

/// How the loop ended.
pub enum FitEnd {
    /// All steps are done; the numbers on held-out data after the last.
    Finished(Metrics),
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
    let mut course = Course::default();
    let mut writer = Writer::new(context, &plan.checkpoint);
    let mut spikes = Spikes::default();
    let mut last_validation = None;
    let passed_over = context.spec.remedies.roll_back;
    if !course.resume(trainer, passed_over, context)? && plan.validate_every > 0 {
        let metrics = trainer.validate(0, context)?;
        report(0, metrics, context)?;
    }
    context.meter.restart();
    while course.done < plan.total {
        let step = course.done;
        let outcome = match course.left_out.contains(&step) {
            true => Ok(Metrics::new()),
            false => trainer.step(step, context).and_then(|metrics| ensure_finite(step, &metrics).map(|()| metrics)),
        };
        let metrics = match outcome {
            Ok(metrics) => metrics,
            Err(error) if error.cause == FailureCause::NonFinite && plan.on_non_finite == OnNonFinite::Rollback => {
                writer.finish(context)?;
                course.roll_back(step, error, trainer, plan, context)?;
                context.meter.restart();
                continue;
            }
            Err(error) => {
                // The last checkpoint is told of before the job ends; that it failed matters less than why the job did.
                if let Err(unwritten) = writer.finish(context) {
                    context.emitter.warn(unwritten.message);
                }
                return Err(error);
            }
        };
        for (name, value) in metrics.iter().filter(|(name, _)| name.starts_with(WATCHED)) {
            if let Some(bound) = spikes.see(name, *value) {
                context.emitter.warn(format!("{name} leapt to {value:.4} at step {}: above {bound:.4}", step + 1));
            }
        }
        course.window.add(metrics);
        course.done += 1;
        context.meter.step();
        let done = course.done;
        context.emitter.progress(done, plan.total, plan.unit);
        if done.is_multiple_of(plan.log_every.max(1)) || done == plan.total {
            let means = course.window.take_means();
            report(done, means, context)?;
            let measured = context.meter.take();
            context.emitter.timing(done, measured);
        }
        if plan.validate_every > 0 && (done.is_multiple_of(plan.validate_every) || done == plan.total) {
            let begun = Instant::now();
            let metrics = trainer.validate(done, context)?;
            report(done, metrics.clone(), context)?;
            context.meter.leave_out_since(begun);
            last_validation = Some(metrics);
        }
        if plan.sample_every > 0 && (done.is_multiple_of(plan.sample_every) || done == plan.total) {
            let begun = Instant::now();
            trainer.sample(done, context)?;
            context.meter.leave_out_since(begun);
        }
        writer.poll(context)?;
        let is_boundary = done.is_multiple_of(plan.boundary.max(1));
        let is_stopping = context.is_stop_requested() && is_boundary && done < plan.total;
        if is_stopping || (is_due(done, plan) && done < plan.total) {
            // The meter is of the context, which writing needs too.
            let begun = Instant::now();
            writer.begin(course.snapshot(trainer, context), context)?;
            let stall = context.meter.saved_since(begun);
            context.emitter.timing(done, BTreeMap::from([("time/checkpoint_stall_seconds".into(), stall)]));
        }
        if is_stopping {
            writer.finish(context)?;
            return Ok(FitEnd::Stopped(done));
        }
    }
    writer.finish(context)?;
    match last_validation {
        Some(metrics) => Ok(FitEnd::Finished(metrics)),
        None => trainer.validate(plan.total, context).map(FitEnd::Finished),
    }
}

/// Where the loop stands.
#[derive(Default)]
struct Course {
    /// Steps done.
    done: u64,
    window: Window,
    /// Steps that roll-backs leave out.
    left_out: BTreeSet<u64>,
    num_roll_backs: usize,
}

impl Course {
    /// Goes on from the newest checkpoint that verifies, but for the `passed_over` newest; returns whether there is one.
    fn resume(&mut self, trainer: &mut dyn Trainer, passed_over: u32, context: &mut JobContext) -> JobResult<bool> {
        let Some(found) = checkpoint::find_newest(context, passed_over) else { return Ok(false) };
        trainer.restore(&found.tensors()?)?;
        context.restore_files(found.files()?)?;
        let (step, path) = (found.state.step, found.path.display().to_string());
        context.emitter.restore_metric_lines(found.state.metric_lines);
        self.done = step;
        self.window = Window::from_bits(found.state.window);
        self.left_out.extend(found.state.left_out);
        context.emitter.emit(WorkerEventKind::Resumed { step, checkpoint: path });
        Ok(true)
    }

    /// Goes back to the newest checkpoint, to leave out the whole update that `step` belongs to on the way forward.
    fn roll_back(
        &mut self,
        step: u64,
        error: JobError,
        trainer: &mut dyn Trainer,
        plan: &FitPlan,
        context: &mut JobContext,
    ) -> JobResult<()> {
        self.num_roll_backs += 1;
        if self.num_roll_backs > MAX_ROLL_BACKS {
            let message = format!("{}. It was rolled back {MAX_ROLL_BACKS} times before", error.message);
            return Err(JobError { message, ..error });
        }
        if !self.resume(trainer, 0, context)? {
            let message = format!("{}. There is no checkpoint yet to roll back to", error.message);
            return Err(JobError { message, ..error });
        }
        let boundary = plan.boundary.max(1);
        let first = step - step % boundary;
        self.left_out.extend(first..first + boundary);
        context.emitter.warn(format!(
            "rolled back from step {} to {}, to go on without the update of steps {} to {}: {}",
            step + 1,
            self.done,
            first + 1,
            first + boundary,
            error.message
        ));
        Ok(())
    }

    fn snapshot(&self, trainer: &dyn Trainer, context: &JobContext) -> Snapshot {
        Snapshot {
            step: self.done,
            tensors: trainer.tensors(),
            metric_lines: context.emitter.metric_lines().to_vec(),
            window: self.window.to_bits(),
            left_out: self.left_out.clone(),
            files: context.kept_files().clone(),
        }
    }
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

    fn plan(total: u64, boundary: u64, on_non_finite: OnNonFinite) -> FitPlan {
        let checkpoint = CheckpointSettings { every: 10, keep: 2, max_bytes: None };
        FitPlan {
            total,
            unit: "steps",
            boundary,
            log_every: 1,
            validate_every: 0,
            sample_every: 0,
            checkpoint,
            on_non_finite,
        }
    }

    #[test]
    fn checkpoints_fall_on_boundaries_only() {
        let plan = plan(40, 3, OnNonFinite::Stop);
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

    /// Adds up its steps, two to an update; `bad` gives NaN, `fatal` dies as by `kill -9`.
    #[derive(Default)]
    struct Adder {
        sum: f32,
        pending: f32,
        bad: Option<u64>,
        fatal: Option<u64>,
        stop_at: Option<u64>,
    }

    impl Trainer for Adder {
        fn step(&mut self, step: u64, context: &mut JobContext) -> JobResult<Metrics> {
            if self.fatal == Some(step) {
                return Err(JobError::internal("killed"));
            }
            if self.stop_at == Some(step) {
                context.request_stop();
            }
            let value = if self.bad == Some(step) { f32::NAN } else { (step as f32 + 0.1).sin() };
            self.pending += value;
            if !(step + 1).is_multiple_of(2) {
                return Ok(Metrics::new());
            }
            self.sum += std::mem::take(&mut self.pending);
            Ok(Metrics::from([("train/loss_x".into(), f64::from(self.sum))]))
        }

        fn validate(&mut self, _step: u64, _context: &mut JobContext) -> JobResult<Metrics> {
            Ok(Metrics::from([("validation/x".into(), f64::from(self.sum))]))
        }

        fn tensors(&self) -> NamedTensors {
            vec![("sum".into(), burn::tensor::TensorData::new(vec![self.sum], [1]))]
        }

        fn restore(&mut self, file: &WeightFile) -> JobResult<()> {
            self.sum = file.get("sum").unwrap().iter::<f32>().next().unwrap();
            self.pending = 0.0;
            Ok(())
        }
    }

    /// What a job leaves: the final number as bits, and its metric lines.
    fn run(adder: &mut Adder, plan: &FitPlan, context: &mut JobContext) -> JobResult<(Option<u64>, Vec<String>)> {
        let end = fit(adder, plan, context)?;
        let value = match end {
            FitEnd::Finished(metrics) => Some(metrics["validation/x"].to_bits()),
            FitEnd::Stopped(_) => None,
        };
        Ok((value, context.emitter.metric_lines().to_vec()))
    }

    #[test]
    fn killed_or_stopped_and_resumed_it_leaves_what_an_undisturbed_job_leaves() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("1"), folder.path().join("2"));
        let plan = plan(60, 2, OnNonFinite::Stop);
        let whole = folder.path().join("whole");
        let expected = run(&mut Adder::default(), &plan, &mut JobContext::for_test(&whole, &[])).unwrap();
        for disturbed in
            [Adder { fatal: Some(35), ..Adder::default() }, Adder { stop_at: Some(34), ..Adder::default() }]
        {
            let mut disturbed = disturbed;
            let is_stopped = disturbed.stop_at.is_some();
            let end = run(&mut disturbed, &plan, &mut JobContext::for_test(&first, &[]));
            assert_eq!(end.is_ok_and(|(value, _)| value.is_none()), is_stopped);
            let mut context = JobContext::for_test(&second, &[&first]);
            assert_eq!(run(&mut Adder::default(), &plan, &mut context).unwrap(), expected);
            std::fs::remove_dir_all(&first).unwrap();
            std::fs::remove_dir_all(&second).unwrap();
        }
    }

    #[test]
    fn a_roll_back_leaves_out_the_update_that_failed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(40, 2, OnNonFinite::Rollback);
        let mut bad = Adder { bad: Some(26), ..Adder::default() };
        let (value, lines) = run(&mut bad, &plan, &mut JobContext::for_test(&folder.path().join("1"), &[])).unwrap();
        // Steps 26 and 27 are one update.
        let mut sum = 0.0f32;
        for update in (0..20).filter(|update| *update != 13) {
            sum += (0.0 + (2.0 * update as f32 + 0.1).sin()) + (2.0 * update as f32 + 1.0 + 0.1).sin();
        }
        assert_eq!(value, Some(f64::from(sum).to_bits()));
        assert!(lines.iter().all(|line| !line.contains("null") && !line.contains("NaN")), "{lines:?}");
        let events = std::fs::read_to_string(folder.path().join("1/events.jsonl")).unwrap();
        assert!(events.contains("rolled back from step 28 to 20"), "{events}");
        // A job that is killed after the roll-back and resumed from a later checkpoint leaves the same.
        let (first, second) = (folder.path().join("2"), folder.path().join("3"));
        let mut killed = Adder { bad: Some(26), fatal: Some(35), ..Adder::default() };
        assert!(run(&mut killed, &plan, &mut JobContext::for_test(&first, &[])).is_err());
        let mut context = JobContext::for_test(&second, &[&first]);
        assert_eq!(run(&mut Adder::default(), &plan, &mut context).unwrap(), (value, lines));
    }

    #[test]
    fn without_a_checkpoint_and_under_stop_a_bad_step_ends_the_job_before_anything_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let mut bad = Adder { bad: Some(4), ..Adder::default() };
        let mut context = JobContext::for_test(&folder.path().join("1"), &[]);
        let error = run(&mut bad, &plan(40, 2, OnNonFinite::Rollback), &mut context).unwrap_err();
        assert!(error.message.contains("no checkpoint yet"), "{error}");
        let mut bad = Adder { bad: Some(24), ..Adder::default() };
        let mut context = JobContext::for_test(&folder.path().join("2"), &[]);
        let error = run(&mut bad, &plan(40, 2, OnNonFinite::Stop), &mut context).unwrap_err();
        assert_eq!(error.cause, FailureCause::NonFinite);
        // The orchestrator's remedy for a second such failure: one checkpoint further back.
        assert_eq!(checkpoint::find_newest(&mut context, 1).unwrap().state.step, 10);
        assert!(checkpoint::find_newest(&mut context, 2).is_none());
        assert_eq!(checkpoint::find_newest(&mut context, 0).unwrap().state.step, 20);
    }

    #[test]
    fn a_checkpoint_that_cannot_be_written_ends_the_job_and_keeps_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let mut context = JobContext::for_test(folder.path(), &[]);
        // A file stands where the folder of step 20 must go: writing it fails as on a full disk.
        std::fs::create_dir_all(context.checkpoints()).unwrap();
        std::fs::write(context.checkpoints().join("step-00000020.partial"), "").unwrap();
        let error = run(&mut Adder::default(), &plan(40, 2, OnNonFinite::Stop), &mut context).unwrap_err();
        assert_eq!(error.cause, FailureCause::Io, "{error}");
        assert_eq!(checkpoint::find_newest(&mut context, 0).unwrap().state.step, 10);
    }
}
