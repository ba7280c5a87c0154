//! The training loop's arithmetic: AdamW, clipping, accumulation, learning rates, and a whole curve of a tiny DiT.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{FloatDType, TensorData};
use deepgen_contract::train::{OptimizerSettings, Schedule};
use deepgen_model::dit::Condition;
use deepgen_model::flow::{TrainingTable, add_noise, loss};
use deepgen_model::init::Init;
use deepgen_model::nn::{LayerNorm, Linear, gelu_tanh};
use deepgen_model::weights::{WeightFile, for_each_param, load_into};
use deepgen_model::{IntTensor, Tensor, trainable};

use super::case::{Case, Inputs, Settings};
use super::compare::{Checker, OUTPUTS, Quantity};
use super::error::{ParityError, ParityResult};
use super::hub;
use crate::optimize::{AdamW, GradientSum, PREFIX, schedule_factor};

/// Epsilon of the case's norm: the library's default.
const NORM_EPS: f64 = 1e-5;

/// The network of the optimiser's case.
#[derive(Module, Debug)]
struct Net {
    fc1: Linear,
    norm: LayerNorm,
    fc2: Linear,
}

impl Net {
    fn load(case: &Case) -> ParityResult<Self> {
        let [inputs, hidden, outputs] = case.config.get("dims")?;
        let init = Init::new(0, &case.device);
        let net = Self {
            fc1: Linear::with_default_init(&init.at("fc1"), inputs, hidden),
            norm: LayerNorm::new(&init.at("norm"), hidden, NORM_EPS),
            fc2: Linear::with_default_init(&init.at("fc2"), hidden, outputs),
        };
        let file: WeightFile = case.weights("inputs.safetensors")?;
        let net = load_into(net, &file.rename(|name| name.starts_with("init.").then(|| name.to_owned())), "init.")?;
        select(net)
    }

    fn loss(&self, x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
        (self.fc2.forward(gelu_tanh(self.norm.forward(self.fc1.forward(x)))) - y).square().mean()
    }
}

/// Makes every parameter that can train do so, as a stage does with its patterns.
fn select<M: Module>(module: M) -> ParityResult<M> {
    let selected = trainable::select(module, &["*".into()]);
    selected.map(|(module, _)| module).map_err(|error| ParityError::Unsupported(error.to_string()))
}

fn settings(config: &Settings, schedule: Schedule) -> ParityResult<OptimizerSettings> {
    Ok(OptimizerSettings {
        lr: config.get("lr")?,
        betas: config.get("betas")?,
        eps: config.get("eps")?,
        weight_decay: config.get("weight_decay")?,
        clip_norm: config.get("clip")?,
        schedule,
    })
}

fn value(loss: &Tensor<1>) -> f32 {
    loss.clone().into_scalar::<f32>()
}

/// Row `i` of the first axis.
fn row(x: &Tensor<3>, i: usize) -> Tensor<2> {
    x.clone().narrow(0, i, 1).squeeze_dim(0)
}

/// `adamw_schedule`.
///
/// # Errors
/// When the case is not whole.
pub fn adamw(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let warmup_steps = case.config.get("warmup")?;
    let schedule = Schedule::HalfCosine { warmup_steps, starts_at_zero: true };
    let total: u64 = case.config.get("steps")?;
    let rates: Vec<f64> = (0..total).map(|step| schedule_factor(&schedule, step, total)).collect();
    let options = settings(&case.config, schedule)?;
    let rates: Vec<f64> = rates.into_iter().map(|factor| options.lr * factor).collect();
    let run = Run { prefix: "", accumulation: 1, rates: rates.clone(), options: options.clone() };
    run.follow(case, check, &inputs)?;
    check.floats(OUTPUTS, "lrs", rates.iter().map(|&lr| lr as f32).collect(), &[total as usize], Quantity::Schedule)?;
    let accumulation = case.config.get("accum")?;
    let constant = vec![options.lr; total as usize];
    Run { prefix: "accum.", accumulation, rates: constant, options }.follow(case, check, &inputs)?;
    released_curves(case, check)
}

/// One run of the network.
struct Run {
    prefix: &'static str,
    /// Micro-batches of an update.
    accumulation: usize,
    /// Learning rate of each update.
    rates: Vec<f64>,
    options: OptimizerSettings,
}

impl Run {
    fn follow(&self, case: &Case, check: &mut Checker, inputs: &Inputs<'_>) -> ParityResult<()> {
        let prefix = self.prefix;
        let (x, y): (Tensor<3>, Tensor<3>) =
            (inputs.tensor(&format!("{prefix}x"))?, inputs.tensor(&format!("{prefix}y"))?);
        let mut net = Net::load(case)?;
        let mut optimizer = AdamW::new(&self.options);
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        let mut states = Vec::new();
        for (update, &lr) in self.rates.iter().enumerate() {
            let mut sum = GradientSum::default();
            for micro in 0..self.accumulation {
                let i = update * self.accumulation + micro;
                let loss = net.loss(row(&x, i), row(&y, i));
                losses.push(value(&loss));
                sum.add(&net, loss.backward(), 1.0 / self.accumulation as f64);
            }
            let norm;
            (net, norm) = optimizer.update(net, sum.ensure_finite(update as u64)?, lr);
            norms.push(norm as f32);
            states.push(snapshot(&net, &optimizer));
        }
        self.compare_states(check, &states)?;
        let (num_losses, num_norms) = (losses.len(), norms.len());
        check.floats(OUTPUTS, &format!("{prefix}losses"), losses, &[num_losses], Quantity::Forward)?;
        check.floats(OUTPUTS, &format!("{prefix}grad_norms"), norms, &[num_norms], Quantity::Forward)
    }

    /// Compares parameters and moments with the records of the case, called `step5.` and so on.
    ///
    /// The generator that made the public case recorded live tensors and wrote them at its end, so that every record holds the
    /// state after the last update. Records that are all alike are taken as such, others as what their names say.
    fn compare_states(&self, check: &mut Checker, states: &[State]) -> ParityResult<()> {
        let recorded: Vec<usize> = (1..=states.len())
            .filter(|updates| states[updates - 1].keys().all(|name| check.outputs().has(&self.record(*updates, name))))
            .collect();
        let Some((&last, earlier)) = recorded.split_last() else {
            let message = format!("no state of the network is recorded under {}step", self.prefix);
            return Err(ParityError::Unsupported(message));
        };
        let mut are_alike = true;
        for &updates in earlier {
            for name in states[updates - 1].keys() {
                let (a, b) = (self.record(updates, name), self.record(last, name));
                are_alike &= check.outputs().get(&a)? == check.outputs().get(&b)?;
            }
        }
        for updates in recorded {
            let state = if are_alike { &states[states.len() - 1] } else { &states[updates - 1] };
            for (name, data) in state {
                let record = self.record(updates, name);
                let shape = check.outputs().get(&record)?.shape.clone();
                check.floats(OUTPUTS, &record, data.iter::<f32>().collect(), &shape, Quantity::Forward)?;
                if are_alike && updates != states.len() {
                    check.note("the record holds the state after the last update");
                }
            }
        }
        Ok(())
    }

    /// Returns the name of a record after `updates` updates.
    fn record(&self, updates: usize, name: &str) -> String {
        format!("{}step{updates}.{name}", self.prefix)
    }
}

/// Parameters and moments by the case's names.
type State = BTreeMap<String, TensorData>;

fn snapshot(net: &Net, optimizer: &AdamW) -> State {
    let mut state = State::new();
    for_each_param(net, |name, param| {
        state.insert(name.to_owned(), param.value().into_data());
    });
    for (name, data) in optimizer.tensors() {
        for (ours, theirs) in [("first.", "exp_avg."), ("second.", "exp_avg_sq.")] {
            if let Some(name) = name.strip_prefix(PREFIX).and_then(|name| name.strip_prefix(ours)) {
                state.insert(format!("{theirs}{name}"), data.clone());
            }
        }
    }
    state
}

/// The released recipe's learning rates, of which the case states the lengths in words.
fn released_curves(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let names: Vec<String> =
        check.outputs().names().filter(|name| name.starts_with("mmengine.")).map(str::to_owned).collect();
    if names.is_empty() {
        return Ok(());
    }
    let rule: String = case.config.get("mmengine_rule")?;
    let words: Vec<&str> = rule.split([' ', ';', ',', ':']).filter(|word| !word.is_empty()).collect();
    let after = |mark: &[&str]| -> ParityResult<f64> {
        let place = words.windows(mark.len()).position(|window| window == mark);
        let number = place.and_then(|place| words.get(place + mark.len())?.parse().ok());
        number.ok_or_else(|| ParityError::Unsupported(format!("no number after {mark:?} in `mmengine_rule`")))
    };
    let (lr, scale) = (after(&["base", "lr"])?, after(&["multiplied", "by"])?);
    for name in names {
        let tag = name.split('.').nth(1).unwrap_or_default();
        let total = after(&[tag, "total"])?;
        let total_word = words.windows(3).find(|window| window[..2] == [tag, "total"]).map_or("", |window| window[2]);
        let warmup = after(&[tag, "total", total_word, "warm"])?;
        let schedule = Schedule::WarmupCosine { warmup_ratio: warmup / total };
        let rates = (0..total as u64).map(|k| (lr * schedule_factor(&schedule, k, total as u64) * scale) as f32);
        check.floats(OUTPUTS, &name, rates.collect(), &[total as usize], Quantity::Schedule)?;
    }
    Ok(())
}

/// `train_curve`.
///
/// # Errors
/// When the case is not whole.
pub fn curve(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let schedule = Schedule::HalfCosine { warmup_steps: case.config.get("warmup")?, starts_at_zero: false };
    let options = settings(&case.config, schedule)?;
    let total: u64 = case.config.get("steps")?;
    // The case's rule names the schedule's shift in words; the timesteps it led to are compared below.
    let rule: String = case.config.get("loss")?;
    let shift = rule.split("shift-").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    let table = TrainingTable::new(shift.ok_or_else(|| ParityError::Unsupported("`loss` names no shift".into()))?);
    let order = inputs.archive.rows("batch_index")?;
    let (data, text, pooled): (Tensor<4>, Tensor<3>, Tensor<2>) =
        (inputs.tensor("data")?, inputs.tensor("encoder_hidden_states")?, inputs.tensor("pooled_projections")?);
    let (noise, uniforms): (Tensor<5>, _) = (inputs.tensor("noise")?, inputs.archive.floats("u")?);
    let mut dit = select(hub::load_dit(case)?)?;
    let mut optimizer = AdamW::new(&options);
    let (mut losses, mut norms, mut rates, mut levels) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (step, chosen) in order.iter().enumerate() {
        let rows = IntTensor::<1>::from_data(TensorData::new(chosen.clone(), [chosen.len()]), &case.device);
        let draws = &uniforms[step * chosen.len()..][..chosen.len()];
        let sigmas: Vec<f32> = draws.iter().map(|&u| table.sigma(f64::from(u))).collect();
        let eps: Tensor<4> = noise.clone().narrow(0, step, 1).squeeze_dim(0);
        let noisy = add_noise(data.clone().select(0, rows.clone()), eps, &sigmas, FloatDType::F32);
        let condition = Condition {
            timestep_b: noisy.timestep_b,
            text_btc: text.clone().select(0, rows.clone()),
            pooled_bc: pooled.clone().select(0, rows),
        };
        let found = loss(dit.forward(noisy.latents, &condition, &[]), noisy.target);
        losses.push(value(&found));
        let mut sum = GradientSum::default();
        sum.add(&dit, found.backward(), 1.0);
        let lr = options.lr * schedule_factor(&options.schedule, step as u64, total);
        let norm;
        (dit, norm) = optimizer.update(dit, sum.ensure_finite(step as u64)?, lr);
        norms.push(norm as f32);
        rates.push(lr as f32);
        levels.extend(sigmas);
    }
    let worst = losses.iter().zip(check.outputs().floats("losses")?).map(|(a, b)| ((a - b) / b).abs());
    let worst = worst.fold(0.0, f32::max);
    check.claim("every loss within 1e-4", worst <= 1e-4, format!("worst step {worst:.1e}"));
    for (name, values, quantity) in [
        ("losses", losses, Quantity::Forward),
        ("grad_norms", norms, Quantity::Gradient),
        ("lrs", rates, Quantity::Schedule),
    ] {
        let count = values.len();
        check.floats(OUTPUTS, name, values, &[count], quantity)?;
    }
    check.extra("sigmas drawn", &levels, &inputs.archive.floats("sigmas")?, Quantity::Schedule);
    let timesteps: Vec<f32> = levels.iter().map(|sigma| sigma * 1000.0).collect();
    check.extra("timesteps drawn", &timesteps, &inputs.archive.floats("timesteps")?, Quantity::Schedule);
    let mut finals: Vec<(String, TensorData)> = Vec::new();
    for_each_param(&dit, |name, param| finals.push((format!("final.{name}"), param.value().into_data())));
    for (name, values) in finals {
        if check.outputs().has(&name) {
            let shape = check.outputs().get(&name)?.shape.clone();
            check.floats(OUTPUTS, &name, values.iter::<f32>().collect(), &shape, Quantity::Gradient)?;
        }
    }
    Ok(())
}
