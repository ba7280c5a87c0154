//! The training loop's arithmetic: AdamW, clipping, accumulation, learning rates.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::TensorData;
use deepgen_contract::train::{OptimizerSettings, Schedule};
use deepgen_model::host::copy_out;
use deepgen_model::init::Init;
use deepgen_model::nn::{LayerNorm, Linear, gelu_tanh};
use deepgen_model::weights::{WeightFile, for_each_param, load_into};
use deepgen_model::{Tensor, trainable};

use super::case::{Case, Inputs, Settings};
use super::compare::{Checker, OUTPUTS, Quantity};
use super::error::{ParityError, ParityResult};
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
///
/// # Errors
/// When there is none.
pub fn select<M: Module>(module: M) -> ParityResult<M> {
    let selected = trainable::select(module, &["*".into()]);
    selected.map(|(module, _)| module).map_err(|error| ParityError::Unsupported(error.to_string()))
}

/// Returns the optimiser's numbers.
///
/// # Errors
/// When one is missing.
pub fn settings(config: &Settings, schedule: Schedule) -> ParityResult<OptimizerSettings> {
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
        state.insert(name.to_owned(), copy_out(param.value()));
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
