//! The DiT, uniform and ragged, and the samplers that follow it.

use burn::tensor::TensorData;
use deepgen_model::dit::{Condition, Dit};
use deepgen_model::flow::{NUM_TRAIN_TIMESTEPS, TrainingTable, loss, ragged_loss};
use deepgen_model::host::copy_out;
use deepgen_model::probe;
use deepgen_model::sampler::{Guided, TimeShift, dynamic_mu, euler, shifted_sigmas, sigmas};
use deepgen_model::{Tensor, dit};

use super::case::{Case, Inputs};
use super::compare::{Checker, GRADS, OUTPUTS, Quantity};
use super::error::{ParityError, ParityResult};
use super::hub;
use super::readings::Readings;

fn condition(inputs: &Inputs<'_>, prefix: &str, timestep: &str) -> ParityResult<Condition> {
    Ok(Condition {
        timestep_b: inputs.tensor(timestep)?,
        text_btc: inputs.tensor(&format!("{prefix}encoder_hidden_states"))?,
        pooled_bc: inputs.tensor(&format!("{prefix}pooled_projections"))?,
    })
}

/// Compares what passed the DiT's probes with the expected tensors of the same names under `prefix`.
fn check_probes(check: &mut Checker, readings: &Readings, prefix: &str, names: &[(&str, &str)]) -> ParityResult<()> {
    let blocks = check.outputs().count(&format!("{prefix}block."));
    let mut pairs: Vec<(String, String)> =
        names.iter().map(|(name, place)| (format!("{prefix}{name}"), format!("dit.{place}"))).collect();
    for block in 0..blocks {
        for stream in ["hidden", "context"] {
            let name = format!("block.{block}.{stream}");
            pairs.push((format!("{prefix}{name}"), format!("dit.{name}")));
        }
    }
    for (name, place) in pairs {
        // The reference records no text stream of its last block.
        if !check.outputs().has(&name) {
            continue;
        }
        let reading = readings.last(&place).ok_or_else(|| ParityError::Unsupported(format!("no probe at {place}")))?;
        check.data(OUTPUTS, &name, &reading.data, Quantity::Forward)?;
    }
    Ok(())
}

/// `sd3_transformer`.
///
/// # Errors
/// When the case is not whole.
pub fn uniform(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let dit = hub::load_dit(case)?;
    let num_sizes = inputs.archive.count("");
    for size in 0..num_sizes {
        let latents: Tensor<4> = inputs.tensor(&format!("{size}.hidden_states"))?;
        for row in 0..inputs.archive.count(&format!("{size}.timestep.")) {
            let condition = condition(&inputs, &format!("{size}."), &format!("{size}.timestep.{row}"))?;
            let (velocity, readings) = probe::record(|| dit.forward(latents.clone(), &condition, &[]));
            check.tensor(&format!("{size}.sample.{row}"), velocity, Quantity::Forward)?;
            if row == 1 {
                let names = [("pos_embed", "tokens"), ("temb", "temb"), ("context", "context")];
                check_probes(check, &Readings::new(readings), &format!("{size}."), &names)?;
            }
        }
    }
    // The reference takes gradients where it states a loss: at the second timestep row.
    for size in 0..num_sizes {
        let name = format!("{size}.loss");
        if !check.outputs().has(&name) {
            continue;
        }
        let mut condition = condition(&inputs, &format!("{size}."), &format!("{size}.timestep.1"))?;
        condition.text_btc = condition.text_btc.require_grad();
        let latents = inputs.tensor::<4>(&format!("{size}.hidden_states"))?.require_grad();
        let velocity = dit.forward(latents.clone(), &condition, &[]);
        let total = loss(velocity, inputs.tensor(&format!("{size}.target"))?);
        check.scalar(&name, total.clone(), Quantity::Forward)?;
        let gradients = total.backward();
        for (name, gradient) in [
            ("input.hidden_states", latents.grad(&gradients).map(copy_out)),
            ("input.encoder_hidden_states", condition.text_btc.grad(&gradients).map(copy_out)),
        ] {
            let gradient = gradient.ok_or_else(|| ParityError::Unsupported(format!("no gradient of {name}")))?;
            check.data(GRADS, name, &gradient, Quantity::Gradient)?;
        }
        let sum = check.gradients(&dit, gradients, |name| (!name.starts_with("input.")).then(|| name.to_owned()))?;
        check_norms(case, check, |name| sum.get(name));
    }
    Ok(())
}

/// Compares the gradient norm of every parameter that the settings list, in one line.
pub fn check_norms(case: &Case, check: &mut Checker, gradient: impl Fn(&str) -> Option<Tensor<1>>) {
    let Some(norms) = case.config.value["grad_norms"].as_object() else { return };
    let norm = |name: &str| gradient(name).map_or(0.0, |g| g.square().sum().into_scalar::<f32>().sqrt());
    let pairs = norms.iter().map(|(name, theirs)| (norm(name), theirs.as_f64().unwrap_or(f64::NAN) as f32));
    let (ours, theirs): (Vec<f32>, Vec<f32>) = pairs.unzip();
    let label = format!("gradient norms of {} parameters", norms.len());
    check.extra(&label, &ours, &theirs, Quantity::Gradient);
    // Over all norms at once small ones do not count, so each is looked at by itself too.
    let worst = ours.iter().zip(&theirs).zip(norms.keys()).map(|((a, b), name)| {
        let scale = b.abs().max(NORM_FLOOR);
        ((a - b).abs() / scale, name)
    });
    let worst = worst.max_by(|a, b| a.0.total_cmp(&b.0));
    if let Some((relative, name)) = worst {
        let holds = f64::from(relative) <= 1e-3;
        check.claim("each gradient norm within 1e-3", holds, format!("worst {relative:.1e} at {name}"));
    }
}

/// Gradient norms below this are compared absolutely.
const NORM_FLOOR: f32 = 1e-4;

/// `sd3_transformer_dynamic`.
///
/// # Errors
/// When the case is not whole.
pub fn ragged(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let dit = hub::load_dit(case)?;
    let condition = condition(&inputs, "", "timestep")?;
    let latents: Vec<Tensor<3>> = inputs.list("hidden_states.")?;
    let references: Vec<Vec<Tensor<3>>> =
        (0..latents.len()).map(|i| inputs.list(&format!("cond_hidden_states.{i}."))).collect::<ParityResult<_>>()?;
    let (velocities, readings) = probe::record(|| dit.forward_ragged(&latents, &condition, &references));
    let mut pairs = Vec::new();
    for (i, velocity) in velocities.into_iter().enumerate() {
        check.tensor(&format!("sample.{i}"), velocity.clone(), Quantity::Forward)?;
        let target: Tensor<3> = inputs.tensor(&format!("target.{i}"))?;
        pairs.push((velocity.unsqueeze::<4>(), target.unsqueeze::<4>()));
    }
    let readings = Readings::new(readings);
    check_probes(check, &readings, "", &[("tokens", "tokens")])?;
    let [b, n] = *check.outputs().get("token_mask")?.shape.as_slice() else {
        return Err(ParityError::Unsupported("token_mask is no matrix".into()));
    };
    let mask = match readings.last("dit.token_mask") {
        Some(reading) => reading.data.iter::<f32>().map(|value| value as i64).collect(),
        // A uniform batch has no padding and needs no mask.
        None => vec![1; b * n],
    };
    check.integers("token_mask", mask, &[b, n])?;
    let total = ragged_loss(pairs);
    check.scalar("loss", total.clone(), Quantity::Forward)?;
    let sum = check.gradients(&dit, total.backward(), |name| Some(name.to_owned()))?;
    check_norms(case, check, |name| sum.get(name));
    stacked(check, &inputs, &dit, &condition)
}

/// The uniform batch without references of a ragged case, also with one block left out.
fn stacked(check: &mut Checker, inputs: &Inputs<'_>, dit: &Dit, condition: &Condition) -> ParityResult<()> {
    if !inputs.archive.has("stacked.hidden_states") {
        return Ok(());
    }
    let latents: Tensor<4> = inputs.tensor("stacked.hidden_states")?;
    let rows = latents.dims()[0];
    let condition = Condition {
        timestep_b: condition.timestep_b.clone().narrow(0, 0, rows),
        text_btc: condition.text_btc.clone().narrow(0, 0, rows),
        pooled_bc: condition.pooled_bc.clone().narrow(0, 0, rows),
    };
    check.tensor("stacked.sample", dit.forward(latents.clone(), &condition, &[]), Quantity::Forward)?;
    let skipped: Vec<String> =
        check.outputs().names().filter(|name| name.starts_with(SKIP)).map(str::to_owned).collect();
    for name in skipped {
        let block: usize =
            name[SKIP.len()..].parse().map_err(|_| ParityError::Unsupported(format!("{name} names no block")))?;
        let mut shorter = dit.clone();
        shorter.transformer_blocks.remove(block);
        check.tensor(&name, shorter.forward(latents.clone(), &condition, &[]), Quantity::Forward)?;
    }
    Ok(())
}

const SKIP: &str = "stacked.sample_skip_layer_";

/// `flow_match_sampler`.
///
/// # Errors
/// When the case is not whole.
pub fn sampler(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let scheduler = case.settings("scheduler/scheduler_config.json")?;
    let shift: f64 = scheduler.get("shift")?;
    let names: Vec<String> = check.outputs().names().map(str::to_owned).collect();
    for name in names.iter().filter(|name| !name.starts_with("denoise.")) {
        let parts: Vec<&str> = name.split('.').collect();
        let number = |text: &str| {
            text.parse::<usize>().map_err(|_| ParityError::Unsupported(format!("{name} does not name a schedule")))
        };
        let mu = |length: &str| -> ParityResult<f64> {
            let tokens = |key: &str| case.config.get::<f64>(key);
            let base = tokens("base_seq").or_else(|_| scheduler.get("base_image_seq_len"))?;
            let top = tokens("max_seq").or_else(|_| scheduler.get("max_image_seq_len"))?;
            let range = [scheduler.get("base_shift")?, scheduler.get("max_shift")?];
            Ok(dynamic_mu(number(length)?, [base, top], range))
        };
        let levels = match parts[..] {
            ["static", "train", _] => TrainingTable::new(shift).sigmas().to_vec(),
            ["static", steps, _] => sigmas(number(steps)?, shift),
            ["dynamic", length, "mu"] => {
                check.floats(OUTPUTS, name, vec![mu(length)? as f32], &[], Quantity::Schedule)?;
                continue;
            }
            ["dynamic", kind, length, steps, _] => {
                let kind = match kind {
                    "exponential" => TimeShift::Exponential,
                    "linear" => TimeShift::Linear,
                    other => return Err(ParityError::Unsupported(format!("the time shift `{other}`"))),
                };
                shifted_sigmas(number(steps)?, kind, mu(length)?)
            }
            _ => return Err(ParityError::Unsupported(format!("{name} does not name a schedule"))),
        };
        let values: Vec<f32> = match parts[parts.len() - 1] {
            "sigmas" => levels,
            // The last level is the clean image and has no timestep; the training table has no such end.
            _ => levels.into_iter().filter(|&sigma| sigma > 0.0).map(|s| s * NUM_TRAIN_TIMESTEPS as f32).collect(),
        };
        let count = values.len();
        check.floats(OUTPUTS, name, values, &[count], Quantity::Schedule)?;
    }
    denoise(case, check, shift, &names)
}

/// The guided runs of the sampler's case.
fn denoise(case: &Case, check: &mut Checker, shift: f64, names: &[String]) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let dit = hub::load_dit(case)?;
    let start: Tensor<4> = inputs.tensor("init_noise")?;
    let rows = start.dims()[0];
    let (text, pooled): (Tensor<3>, Tensor<2>) =
        (inputs.tensor("encoder_hidden_states")?, inputs.tensor("pooled_projections")?);
    let field = |latents: Tensor<4>, timestep: f64| {
        let condition = dit::Condition {
            timestep_b: Tensor::full([latents.dims()[0]], timestep, &case.device),
            text_btc: text.clone(),
            pooled_bc: pooled.clone(),
        };
        dit.forward(latents, &condition, &[])
    };
    let guided = Guided { field, scale: case.config.get("cfg_scale")? };
    for steps in case.config.get::<Vec<usize>>("denoise_steps")? {
        let (end, readings) = probe::record(|| euler(&guided, start.clone(), &sigmas(steps, shift)));
        let readings = Readings::new(readings);
        let mut states = readings.of("dit.latents").into_iter().skip(1).map(|reading| first_rows(&reading.data, rows));
        for step in 0..steps {
            // What the next step starts from.
            let after = states.next().unwrap_or_else(|| end.clone().into_data());
            let name = format!("denoise.{steps}.latents_after.{step}");
            if names.contains(&name) {
                check.data(OUTPUTS, &name, &after, Quantity::Forward)?;
            }
        }
        check.tensor(&format!("denoise.{steps}.final"), end, Quantity::Forward)?;
    }
    Ok(())
}

/// Returns the first rows of a batch.
pub fn first_rows(data: &TensorData, rows: usize) -> TensorData {
    let mut shape = data.shape().to_vec();
    let size: usize = shape[1..].iter().product();
    shape[0] = rows;
    TensorData::new(data.iter::<f32>().take(rows * size).collect::<Vec<f32>>(), shape)
}
