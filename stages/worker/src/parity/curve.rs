//! A whole curve of a tiny DiT, through the training loop itself: [`fit`], a [`Learner`] and a [`FlowStep`] as in stages 1 and
//! 2. The case states latents and conditions in place of images and prompts, and every number that is drawn.

use std::ops::Range;

use burn::tensor::TensorData;
use deepgen_contract::train::{CheckpointSettings, FloatKind, OnNonFinite, Schedule};
use deepgen_model::dit::{Condition, Dit};
use deepgen_model::flow::TrainingTable;
use deepgen_model::host::copy_out;
use deepgen_model::weights::{WeightFile, for_each_param};
use deepgen_model::{IntTensor, Tensor};
use serde_json::Value;

use super::case::Case;
use super::compare::{Checker, OUTPUTS, Quantity};
use super::error::{ParityError, ParityResult};
use super::hub;
use super::optimizer::{select, settings};
use crate::checkpoint::NamedTensors;
use crate::emit::Metrics;
use crate::error::{JobError, JobResult};
use crate::fit::{FitPlan, Trainer, fit};
use crate::flow_step::{Draws, FlowStep, Recorded, Sigmas};
use crate::job::JobContext;
use crate::learner::{Learner, Loss, Losses, UpdateRule};

/// Name of the loss among the metrics.
const LOSS: &str = "train/loss";

/// The stated samples, and what is drawn for each micro-batch.
struct Stated {
    latents: Tensor<4>,
    text: Tensor<3>,
    pooled: Tensor<2>,
    /// Samples of each micro-batch.
    order: Vec<Vec<i64>>,
    /// Noise of each micro-batch.
    noise: Tensor<5>,
    uniforms: Vec<f32>,
    flow: FlowStep,
    /// Noise levels that were used.
    levels: Vec<f32>,
}

impl Losses<Dit> for Stated {
    /// Rows of the stated samples.
    type Batch = Vec<i64>;

    fn batch(&mut self, iteration: u64, _context: &mut JobContext) -> JobResult<Vec<i64>> {
        let place = iteration as usize;
        let chosen = self.order[place].clone();
        let uniforms = &self.uniforms[place * chosen.len()..][..chosen.len()];
        let noise = self.noise.clone().narrow(0, place, 1).squeeze_dim::<4>(0);
        let rows = |noise: Tensor<4>| noise.into_data().iter::<f32>().collect::<Vec<f32>>();
        self.flow.draws = Draws::Recorded(Recorded {
            uniforms: uniforms.iter().map(|&u| f64::from(u)).collect(),
            noise: noise.split(1, 0).into_iter().map(rows).collect(),
            targets: Vec::new(),
            references: Vec::new(),
        });
        self.levels.extend(self.flow.levels(0..chosen.len(), "", &Sigmas::Drawn));
        Ok(chosen)
    }

    fn num_samples(batch: &Vec<i64>) -> usize {
        batch.len()
    }

    fn loss(&self, model: &Dit, _iteration: u64, batch: &Vec<i64>, part: Range<usize>) -> JobResult<Loss> {
        let chosen = &batch[part.clone()];
        let rows = IntTensor::<1>::from_data(TensorData::new(chosen.to_vec(), [chosen.len()]), &self.flow.device);
        let text = self.text.clone().select(0, rows.clone());
        let pooled = self.pooled.clone().select(0, rows.clone());
        let velocity = |latents, timestep_b| {
            model.forward(latents, &Condition { timestep_b, text_btc: text, pooled_bc: pooled }, &[])
        };
        let clean = self.latents.clone().select(0, rows);
        let value = self.flow.loss_of_latents(clean, part, "", &Sigmas::Drawn, velocity);
        Ok(Loss { name: LOSS.into(), value, keys: chosen.iter().map(|row| format!("row {row}")).collect() })
    }

    fn keep(&self, iteration: u64, _why: &str, _context: &JobContext) -> JobResult<String> {
        Ok(format!("row {iteration} of `batch_index`"))
    }
}

struct CurveTrainer {
    learner: Learner<Dit>,
    stated: Stated,
}

impl Trainer for CurveTrainer {
    fn step(&mut self, step: u64, context: &mut JobContext) -> JobResult<Metrics> {
        self.learner.iterate(&mut self.stated, step, context)
    }

    fn validate(&mut self, _step: u64, _context: &mut JobContext) -> JobResult<Metrics> {
        Ok(Metrics::new())
    }

    fn tensors(&self) -> NamedTensors {
        self.learner.tensors()
    }

    fn restore(&mut self, _file: &WeightFile) -> JobResult<()> {
        Err(JobError::internal("a case is run in one go"))
    }
}

/// `train_curve`.
///
/// # Errors
/// When the case is not whole, or the training ends early.
pub fn run(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let schedule = Schedule::HalfCosine { warmup_steps: case.config.get("warmup")?, starts_at_zero: false };
    let optimizer = settings(&case.config, schedule)?;
    let total: u64 = case.config.get("steps")?;
    // The case's rule names the schedule's shift in words; the timesteps it led to are compared below.
    let rule: String = case.config.get("loss")?;
    let shift = rule.split("shift-").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    let flow = FlowStep {
        table: TrainingTable::new(shift.ok_or_else(|| ParityError::Unsupported("`loss` names no shift".into()))?),
        sigma_dtype: FloatKind::F32,
        // Replaced by what the case states before each loss.
        draws: Draws::Seeded(0),
        device: case.device.clone(),
        cache: None,
    };
    let stated = Stated {
        latents: inputs.tensor("data")?,
        text: inputs.tensor("encoder_hidden_states")?,
        pooled: inputs.tensor("pooled_projections")?,
        order: inputs.archive.rows("batch_index")?,
        noise: inputs.tensor("noise")?,
        uniforms: inputs.archive.floats("u")?,
        flow,
        levels: Vec::new(),
    };
    let on_non_finite = OnNonFinite::Stop;
    let update = UpdateRule {
        optimizer,
        accumulation: 1,
        division: 1,
        total,
        steps_before: 0,
        on_non_finite,
        ema: None,
        keeps_best: false,
    };
    let mut trainer = CurveTrainer { learner: Learner::new(select(hub::load_dit(case)?)?, update), stated };
    let plan = FitPlan {
        total,
        unit: "updates",
        boundary: 1,
        log_every: 1,
        validate_every: 0,
        sample_every: 0,
        checkpoint: CheckpointSettings { every: 0, keep: 1, max_bytes: None },
        on_non_finite,
    };
    let folder = tempfile::tempdir().map_err(|source| ParityError::Io { path: std::env::temp_dir(), source })?;
    let mut context = JobContext::outside_of_a_job(folder.path(), case.device.clone().without_autodiff())?;
    fit(&mut trainer, &plan, &mut context)?;

    let logged = |name: &str| -> ParityResult<Vec<f32>> {
        let number = |line: &String| serde_json::from_str::<Value>(line).ok()?.get(name)?.as_f64();
        let found: Vec<f32> = context.emitter.metric_lines().iter().filter_map(number).map(|x| x as f32).collect();
        match found.len() as u64 == total {
            true => Ok(found),
            false => Err(ParityError::Unsupported(format!("{} of {total} steps logged {name}", found.len()))),
        }
    };
    let losses = logged(LOSS)?;
    let worst = losses.iter().zip(check.outputs().floats("losses")?).map(|(a, b)| ((a - b) / b).abs());
    let worst = worst.fold(0.0, f32::max);
    check.claim("every loss within 1e-4", worst <= 1e-4, format!("worst step {worst:.1e}"));
    for (name, values, quantity) in [
        ("losses", losses, Quantity::Forward),
        ("grad_norms", logged("train/grad_norm")?, Quantity::Gradient),
        ("lrs", logged("train/lr")?, Quantity::Schedule),
    ] {
        let count = values.len();
        check.floats(OUTPUTS, name, values, &[count], quantity)?;
    }
    let levels = &trainer.stated.levels;
    check.extra("sigmas drawn", levels, &inputs.archive.floats("sigmas")?, Quantity::Schedule);
    let timesteps: Vec<f32> = levels.iter().map(|sigma| sigma * 1000.0).collect();
    check.extra("timesteps drawn", &timesteps, &inputs.archive.floats("timesteps")?, Quantity::Schedule);
    let mut finals: Vec<(String, TensorData)> = Vec::new();
    for_each_param(trainer.learner.model(), |name, param| {
        finals.push((format!("final.{name}"), copy_out(param.value())));
    });
    for (name, values) in finals {
        if check.outputs().has(&name) {
            let shape = check.outputs().get(&name)?.shape.clone();
            check.floats(OUTPUTS, &name, values.iter::<f32>().collect(), &shape, Quantity::Gradient)?;
        }
    }
    Ok(())
}
