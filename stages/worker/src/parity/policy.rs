//! Stage 3 without a network: transitions, advantages, policy losses, divergence, averages, text rewards.

use deepgen_contract::rl::{AdvantageKind, KlKind, SdeKind};
use deepgen_contract::train::EmaSettings;
use deepgen_judge::text::{TextScoring, edit_distance, similarity, single_segment_reward};
use deepgen_model::Tensor;
use deepgen_model::flow::NUM_TRAIN_TIMESTEPS;
use deepgen_model::sampler::sigmas;
use serde::Deserialize;

use super::case::{Case, Inputs, Settings};
use super::compare::{Checker, OUTPUTS, Quantity};
use super::error::{ParityError, ParityResult};
use crate::advantage::RewardTable;
use crate::ema::Ema;
use crate::guard::{GuardInputs, guarded_loss, guarded_loss_of_paper};
use crate::nft::{NftInputs, NftSettings, nft_loss};
use crate::objective::{PolicyLoss, Prediction, Transition, bounded_ratio, clipped_loss};

/// Bound of the difference of log-probabilities where the settings say that it is clamped.
const LOG_PROB_BOUND: f64 = 10.0;
/// Clamp of advantages that is not part of the comparison.
const NO_CLIP: f32 = f32::INFINITY;

/// `grpo_sde`.
///
/// # Errors
/// When the case is not whole.
pub fn run(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let (steps, shift): (usize, f64) = (case.config.get("steps")?, case.config.get("shift")?);
    let levels = sigmas(steps, shift);
    let timesteps = levels[..steps].iter().map(|sigma| sigma * NUM_TRAIN_TIMESTEPS as f32).collect();
    check.floats(OUTPUTS, "timesteps", timesteps, &[steps], Quantity::Schedule)?;
    let levels_f64: Vec<f64> = levels.iter().map(|&sigma| f64::from(sigma)).collect();
    check.floats(OUTPUTS, "sigmas", levels, &[steps + 1], Quantity::Schedule)?;
    for (sde, name) in SAMPLERS {
        for eta in case.config.get::<Vec<f64>>("etas")? {
            // Debug writes whole numbers as Python does: 1.0.
            let prefix = format!("{name}.eta{eta:?}.");
            transitions(check, &inputs, &at_steps(&inputs, &levels_f64, sde, eta)?, &prefix)?;
        }
    }
    advantages(case, check, &inputs)?;
    policy_losses(case, check, &inputs)?;
    divergence(case, check, &inputs, &levels_f64)?;
    nft(case, check, &inputs)?;
    averages(case, check, &inputs)?;
    text_rewards(case, check)
}

const SAMPLERS: [(SdeKind, &str); 3] =
    [(SdeKind::CpsSde, "cps_sde"), (SdeKind::FlowgrpoSde, "flowgrpo_sde"), (SdeKind::DanceSde, "dance_sde")];

/// Returns the transition of each row, which are at different steps.
fn at_steps(inputs: &Inputs<'_>, levels: &[f64], sde: SdeKind, eta: f64) -> ParityResult<Vec<Transition>> {
    let rows = inputs.archive.rows("step_index")?.concat();
    let transition = |step: i64| {
        let step = step as usize;
        Transition { sde, eta, sigma: levels[step], next: levels[step + 1], second_sigma: levels[1] }
    };
    Ok(rows.into_iter().map(transition).collect())
}

fn row(x: &Tensor<4>, i: usize) -> Tensor<4> {
    x.clone().narrow(0, i, 1)
}

fn transitions(check: &mut Checker, inputs: &Inputs<'_>, rows: &[Transition], prefix: &str) -> ParityResult<()> {
    let at = |name: &str| inputs.tensor::<4>(name);
    let (x, v, eps, fixed) = (at("sample")?, at("model_output")?, at("noise")?, at("fixed_next_sample")?);
    let (mut means, mut nexts, mut drawn, mut given, mut slopes) = (vec![], vec![], vec![], vec![], vec![]);
    for (i, transition) in rows.iter().enumerate() {
        let velocity = row(&v, i).require_grad();
        let mean = transition.mean(row(&x, i), velocity.clone());
        let next = mean.clone().detach() + row(&eps, i).mul_scalar(transition.noise_std());
        drawn.push(transition.log_prob(next.clone(), mean.clone()));
        let log_prob = transition.log_prob(row(&fixed, i), mean.clone());
        given.push(log_prob.clone());
        let slope = velocity.grad(&log_prob.sum().backward());
        slopes.push(slope.unwrap_or_else(|| Tensor::zeros(velocity.dims(), &velocity.device().without_autodiff())));
        means.push(mean);
        nexts.push(next);
    }
    let column = |f: &dyn Fn(&Transition) -> f64| -> Vec<f32> { rows.iter().map(|row| f(row) as f32).collect() };
    let shape = [rows.len(), 1, 1, 1];
    for (name, values) in [
        ("std_dev_t", column(&Transition::kl_std)),
        ("noise_scale", column(&Transition::noise_std)),
        ("sqrt_dt", column(&|row| (row.sigma - row.next).sqrt())),
    ] {
        check.floats(OUTPUTS, &format!("{prefix}{name}"), values, &shape, Quantity::Schedule)?;
    }
    check.tensor(&format!("{prefix}prev_mean"), Tensor::cat(means, 0), Quantity::Forward)?;
    check.tensor(&format!("{prefix}rollout_next"), Tensor::cat(nexts, 0), Quantity::Forward)?;
    check.tensor(&format!("{prefix}rollout_log_prob"), Tensor::cat(drawn, 0), Quantity::Schedule)?;
    check.tensor(&format!("{prefix}fixed_log_prob"), Tensor::cat(given, 0), Quantity::Schedule)?;
    check.tensor(&format!("{prefix}fixed_log_prob_grad"), Tensor::cat(slopes, 0), Quantity::Gradient)
}

fn advantages(case: &Case, check: &mut Checker, inputs: &Inputs<'_>) -> ParityResult<()> {
    let group_size = case.config.get("rollout_n")?;
    let table = |name: &str| -> ParityResult<Vec<Vec<f32>>> {
        let array = inputs.archive.get(name)?;
        let width = array.shape.last().copied().unwrap_or(1).max(1);
        Ok(array.floats().chunks(width).map(<[f32]>::to_vec).collect())
    };
    let (rewards, weights) = (table("rewards_per_func")?, table("weights")?);
    let ones = rewards.iter().map(|row| vec![1.0; row.len()]).collect();
    for (suffix, weights) in [("plain", ones), ("weighted", weights)] {
        let table = RewardTable { rewards: rewards.clone(), weights, group_size };
        let totals: Vec<f32> = (0..rewards.len()).map(|image| table.total(image)).collect();
        let name = format!("total_rewards.{suffix}");
        check.extra(&name, &totals, &inputs.archive.floats(&name)?, Quantity::Schedule);
        for (kind, name) in [
            (AdvantageKind::Gdpo, "gdpo"),
            (AdvantageKind::Grpo, "grpo"),
            (AdvantageKind::GrpoGlobalStd, "grpo_global_std"),
            (AdvantageKind::Reinforcepp, "reinforcepp"),
        ] {
            let ours = table.advantages(kind, NO_CLIP);
            let count = ours.len();
            check.floats(OUTPUTS, &format!("advantages.{name}.{suffix}"), ours, &[count], Quantity::Schedule)?;
        }
    }
    Ok(())
}

/// Returns the bounds of the ratio and whether the difference of log-probabilities is clamped, as a variant of the case's
/// settings words them: `clip 0.05`, `clip (-0.02, +0.1): ...`, `..., dlogp clamped to +-10`.
fn clip_of(words: &str) -> Option<([f64; 2], bool)> {
    let after = words.split("clip ").nth(1)?;
    let number = |text: &str| text.trim_matches(|c: char| "(),:; ".contains(c)).parse::<f64>().ok();
    let range = match after.strip_prefix('(') {
        Some(pair) => {
            let (low, high) = pair.split(')').next()?.split_once(',')?;
            [1.0 + number(low)?, 1.0 + number(high)?]
        }
        None => {
            let clip = number(after.split([',', ' ']).next()?)?;
            [1.0 - clip, 1.0 + clip]
        }
    };
    Some((range, words.contains("dlogp clamped")))
}

fn policy_losses(case: &Case, check: &mut Checker, inputs: &Inputs<'_>) -> ParityResult<()> {
    let settings = case.config.at("loss_settings").unwrap_or_else(|| case.config.clone());
    let (beta, kl, scale): (f64, f64, f64) =
        (settings.get("beta")?, settings.get("kl_loss")?, settings.get("loss_scale")?);
    let suffix = ".policy_loss";
    let named = check.outputs().names().filter(|name| name.starts_with("policy."));
    let variants: Vec<String> =
        named.filter_map(|name| Some(name.strip_prefix("policy.")?.strip_suffix(suffix)?.to_owned())).collect();
    for variant in variants {
        // A settings key holds dots, so it is looked up as it is.
        let words = settings.value[variant.as_str()].as_str().unwrap_or(&variant);
        // Where the settings give a formula instead, the variant's name holds the range: `guard.clip0.05`.
        let named = variant.split("clip").nth(1).map(|number| format!("clip {number}"));
        let (range, is_clamped) = clip_of(words)
            .or_else(|| clip_of(&named?))
            .ok_or_else(|| ParityError::Unsupported(format!("no clip range in the settings of {variant}: {words}")))?;
        let far = if words.contains("new_log_prob_far") { "loss.new_log_prob_far" } else { "loss.new_log_prob" };
        let new = inputs.tensor::<1>(far)?.require_grad();
        let advantage: Tensor<1> = inputs.tensor("loss.advantages")?;
        let old: Tensor<1> = inputs.tensor("loss.old_log_prob")?;
        let guard = || -> ParityResult<GuardInputs> {
            Ok(GuardInputs {
                new_log_prob: new.clone(),
                old_log_prob: old.clone(),
                new_mean: inputs.tensor("loss.prev_mean_new")?,
                old_mean: inputs.tensor("loss.prev_mean_old")?,
                sqrt_dt: inputs.tensor("loss.sqrt_dt")?,
                std: inputs.tensor("loss.std_dev_t")?,
            })
        };
        let PolicyLoss { loss, ratio } = match variant.split('.').next() {
            Some("guard") => guarded_loss(&guard()?, advantage, range),
            Some("guard_paper") => guarded_loss_of_paper(&guard()?, advantage, range),
            Some("plain") => {
                let bound = if is_clamped { LOG_PROB_BOUND } else { f64::MAX };
                clipped_loss(bounded_ratio(new.clone(), old.clone(), bound), advantage, range)
            }
            _ => return Err(ParityError::Unsupported(format!("the policy loss `{variant}`"))),
        };
        let at = |name: &str| format!("policy.{variant}.{name}");
        check.tensor(&at("ratio"), ratio, Quantity::Schedule)?;
        check.scalar(&at("policy_loss"), loss.clone(), Quantity::Schedule)?;
        let total = (loss.clone() + beta * kl).mul_scalar(scale);
        check.scalar(&at("total_loss"), total, Quantity::Schedule)?;
        let gradient =
            new.grad(&loss.backward()).map_or_else(|| vec![0.0; new.dims()[0]], |g| g.into_data().iter().collect());
        let count = gradient.len();
        check.floats(OUTPUTS, &at("grad_log_prob"), gradient, &[count], Quantity::Gradient)?;
    }
    Ok(())
}

fn divergence(case: &Case, check: &mut Checker, inputs: &Inputs<'_>, levels: &[f64]) -> ParityResult<()> {
    // "computed at the given timesteps with eta 0.7, flowgrpo_sde std_dev_t"
    let words: String = case.config.get("kl")?;
    let eta = words.split("eta ").nth(1).and_then(|rest| rest.split([',', ' ']).next()?.parse().ok());
    let eta = eta.ok_or_else(|| ParityError::Unsupported(format!("no eta in `kl`: {words}")))?;
    let sde = SAMPLERS.iter().find(|(_, name)| words.contains(name)).map(|(sde, _)| *sde);
    let sde = sde.ok_or_else(|| ParityError::Unsupported(format!("no sampler in `kl`: {words}")))?;
    let rows = at_steps(inputs, levels, sde, eta)?;
    let (x, policy, reference): (Tensor<4>, Tensor<4>, Tensor<4>) =
        (inputs.tensor("sample")?, inputs.tensor("loss.model_pred")?, inputs.tensor("loss.ref_pred")?);
    let stds: Vec<f32> = rows.iter().map(|row| row.kl_std() as f32).collect();
    check.extra("kl.std_policy", &stds, &inputs.archive.floats("kl.std_policy")?, Quantity::Schedule);
    for (kind, name) in [(KlKind::Velocity, "v-based"), (KlKind::Mean, "x-based")] {
        let each: Vec<Tensor<1>> = rows
            .iter()
            .enumerate()
            .map(|(i, transition)| {
                let predict =
                    |v: &Tensor<4>| Prediction { velocity: row(v, i), mean: transition.mean(row(&x, i), row(v, i)) };
                transition.kl(kind, predict(&policy), predict(&reference))
            })
            .collect();
        let each = Tensor::cat(each, 0);
        // Means that hardly differ are subtracted here: f32 keeps few digits of the difference.
        check.tensor(&format!("kl.{name}.per_sample"), each.clone(), Quantity::Forward)?;
        check.scalar(&format!("kl.{name}.mean"), each.mean(), Quantity::Forward)?;
    }
    Ok(())
}

fn nft(case: &Case, check: &mut Checker, inputs: &Inputs<'_>) -> ParityResult<()> {
    let advantage_clip = case.config.get("nft_settings/adv_clip")?;
    for policy in ["on_policy", "off_policy"] {
        let beta = case.config.get(&format!("nft_settings/{policy}/nft_beta"))?;
        let velocity = inputs.tensor::<4>("loss.model_pred")?.require_grad();
        let old_velocity = match policy {
            "on_policy" => velocity.clone().detach(),
            _ => inputs.tensor("nft.old_v_pred")?,
        };
        let given = NftInputs {
            noisy: inputs.tensor("sample")?,
            clean: inputs.tensor("nft.x0")?,
            sigma: inputs.tensor::<1>("nft.timesteps")?.div_scalar(NUM_TRAIN_TIMESTEPS as f64),
            velocity: velocity.clone(),
            old_velocity,
            advantage: inputs.tensor("nft.advantages")?,
        };
        let loss = nft_loss(&given, NftSettings { beta, advantage_clip });
        check.scalar(&format!("nft.{policy}.policy_loss"), loss.clone(), Quantity::Forward)?;
        let gradient = velocity.grad(&loss.backward());
        let gradient = gradient.ok_or_else(|| ParityError::Unsupported("no gradient of the NFT loss".into()))?;
        check.tensor(&format!("nft.{policy}.grad_model_pred"), gradient, Quantity::Gradient)?;
    }
    Ok(())
}

fn averages(case: &Case, check: &mut Checker, inputs: &Inputs<'_>) -> ParityResult<()> {
    let settings = EmaSettings {
        decay: case.config.get("ema_settings/decay")?,
        interval: case.config.get("ema_settings/update_step_interval")?,
    };
    let mut ema = Ema::new(settings, inputs.tensor("ema.init")?);
    let sequence: Tensor<2> = inputs.tensor("ema.sequence")?;
    let [steps, width] = sequence.dims();
    let mut trace = Vec::new();
    for step in 0..steps {
        ema.step(sequence.clone().narrow(0, step, 1).squeeze_dim(0));
        trace.extend(ema.average().into_data().iter::<f32>());
    }
    check.floats(OUTPUTS, "ema.trace", trace, &[steps, width], Quantity::Schedule)
}

/// `rewards.json`.
#[derive(Deserialize)]
struct TextRewards {
    levenshtein: Vec<Distance>,
    cases: Vec<RewardCase>,
}

#[derive(Deserialize)]
struct Distance {
    a: String,
    b: String,
    distance: usize,
    normalized: f64,
}

#[derive(Deserialize)]
struct RewardCase {
    scorer: String,
    settings: std::collections::BTreeMap<String, String>,
    rows: Vec<RewardRow>,
}

#[derive(Deserialize)]
struct RewardRow {
    prompt: String,
    tokens: Vec<(String, f64)>,
    reward: f64,
}

fn text_rewards(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let file: Settings = case.settings("rewards.json")?;
    let rewards: TextRewards = serde_json::from_value(file.value)
        .map_err(|error| ParityError::Format { path: case.folder.join("rewards.json"), reason: error.to_string() })?;
    let column =
        |f: &dyn Fn(&Distance) -> f64| -> Vec<f32> { rewards.levenshtein.iter().map(|d| f(d) as f32).collect() };
    let ours = column(&|d| edit_distance(&d.a, &d.b) as f64);
    check.extra("rewards: edit distances", &ours, &column(&|d| d.distance as f64), Quantity::Exact);
    let ours = column(&|d| 1.0 - similarity(&d.a, &d.b));
    check.extra("rewards: normalised distances", &ours, &column(&|d| d.normalized), Quantity::Schedule);
    for reward_case in &rewards.cases {
        let (scoring, min_confidence) = scoring(&reward_case.settings)?;
        let score = |row: &RewardRow| match reward_case.scorer.as_str() {
            "multi_segment" => Ok(scoring.reward_of_pieces(&row.prompt, &row.tokens, min_confidence)),
            "single_segment" => Ok(single_segment_reward(&row.prompt, &row.tokens).unwrap_or(f32::NAN)),
            other => Err(ParityError::Unsupported(format!("the text scorer `{other}`"))),
        };
        let ours = reward_case.rows.iter().map(score).collect::<ParityResult<Vec<f32>>>()?;
        let theirs: Vec<f32> = reward_case.rows.iter().map(|row| row.reward as f32).collect();
        let label = format!("rewards: {} {:?}, {} images", reward_case.scorer, reward_case.settings, ours.len());
        check.extra(&label, &ours, &theirs, Quantity::Schedule);
    }
    Ok(())
}

/// Reads the release's environment variables.
fn scoring(settings: &std::collections::BTreeMap<String, String>) -> ParityResult<(TextScoring, f64)> {
    let mut scoring = TextScoring::default();
    let mut min_confidence = 0.0;
    for (name, value) in settings {
        let wrong = || ParityError::Unsupported(format!("the text setting {name} = {value}"));
        let is_on = value == "1";
        match name.as_str() {
            "OCR_CASE_SENSITIVE" => scoring.is_case_sensitive = is_on,
            "OCR_IGNORE_PUNCT" => scoring.ignores_punctuation = is_on,
            "OCR_USE_CONFUSION_FOLD" => scoring.folds_confusions = is_on,
            "OCR_NGRAM_MAX" => scoring.ngram_max = value.parse().map_err(|_| wrong())?,
            "OCR_MIN_CONF" => min_confidence = value.parse().map_err(|_| wrong())?,
            _ => return Err(wrong()),
        }
    }
    Ok((scoring, min_confidence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clip_ranges_are_read_from_words() {
        assert_eq!(clip_of("clip 0.05"), Some(([0.95, 1.05], false)));
        assert_eq!(clip_of("clip 1e-4, dlogp clamped to +-10"), Some(([0.9999, 1.0001], true)));
        assert_eq!(clip_of("clip (-0.02, +0.1): clamp(ratio, 0.98, 1.1)"), Some(([0.98, 1.1], false)));
        assert_eq!(clip_of("guarded ratio"), None);
    }
}
