//! Rollouts of stage 3: groups of images per prompt, with every step of their trajectories (docs/spec/rl.md section 3).
//!
//! Knows the model and the process, neither rewards nor the loss. No gradient is taken here. Every draw is a function of
//! the seed and the iteration.

use deepgen_contract::rl::RolloutSettings;
use deepgen_model::bridge::Condition;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::nn::to_f32;
use deepgen_model::random::noise;
use deepgen_model::sampler::sigmas;
use deepgen_model::{Device, Tensor};
use image::RgbImage;

use crate::error::JobResult;
use crate::objective::Transition;
use crate::sampling::decode;

/// One denoising step of all images.
pub struct Step {
    /// The process at this step.
    pub transition: Transition,
    /// Latents before it [b, c, h, w].
    pub before: Tensor<4>,
    /// Latents after it.
    pub after: Tensor<4>,
    /// Log-probability of that outcome [b], f32.
    pub log_prob: Tensor<1>,
}

/// Images of an iteration, group after group, and how they came about.
pub struct Rollout {
    /// Every denoising step in order.
    pub steps: Vec<Step>,
    /// The results.
    pub images: Vec<RgbImage>,
    /// Conditions, a row per image; the same rows serve the update.
    pub condition: Condition,
}

/// Returns the transitions of a run, first to last.
pub fn transitions(settings: &RolloutSettings, shift: f64) -> Vec<Transition> {
    let levels: Vec<f64> = sigmas(settings.steps, shift).into_iter().map(f64::from).collect();
    let second_sigma = levels.get(1).copied().unwrap_or(0.0);
    levels
        .windows(2)
        .map(|pair| Transition { sde: settings.sde, eta: settings.eta, sigma: pair[0], next: pair[1], second_sigma })
        .collect()
}

/// Repeats each row of a condition `times` times: an image's row for each prompt's.
pub fn repeat_rows(condition: &Condition, times: usize) -> Condition {
    let [p, t, d] = condition.sequence.dims();
    let width = condition.pooled.dims()[1];
    let sequence = condition.sequence.clone().unsqueeze_dim::<4>(1).expand([p, times, t, d]).reshape([p * times, t, d]);
    let pooled = condition.pooled.clone().unsqueeze_dim::<3>(1).expand([p, times, width]).reshape([p * times, width]);
    Condition { sequence, pooled }
}

/// Draws `group_size` images for each of the prompts that `condition` has a row for.
///
/// # Errors
/// When the images cannot be decoded.
pub fn roll_out(
    model: &DeepGen,
    settings: &RolloutSettings,
    condition: &Condition,
    draws: (u64, &str),
    device: &Device,
) -> JobResult<Rollout> {
    let (seed, stream) = draws;
    let num_prompts = condition.pooled.dims()[0];
    let condition = repeat_rows(condition, settings.group_size);
    let vae = &model.spec().base.vae;
    let [c, h, w] = [vae.latent_channels, settings.height / vae.downscale(), settings.width / vae.downscale()];
    let count = num_prompts * settings.group_size;
    let mut latents = if settings.same_noise {
        noise(seed, &format!("{stream}/initial"), [num_prompts, 1, c, h * w], device)
            .expand([num_prompts, settings.group_size, c, h * w])
            .reshape([count, c, h, w])
    } else {
        noise(seed, &format!("{stream}/initial"), [count, c, h, w], device)
    };
    let mut steps = Vec::with_capacity(settings.steps);
    for (number, transition) in transitions(settings, model.spec().base.scheduler_shift).into_iter().enumerate() {
        let velocity = velocity(model, latents.clone(), &transition, &condition);
        let mean = transition.mean(latents.clone(), velocity);
        let std = transition.noise_std();
        let after = if std > 0.0 {
            let eps = noise(seed, &format!("{stream}/step/{number}"), [count, c, h, w], device);
            mean.clone() + eps.mul_scalar(std)
        } else {
            mean.clone()
        };
        let log_prob = transition.log_prob(after.clone(), mean);
        steps.push(Step { transition, before: latents, after: after.clone(), log_prob });
        latents = after;
    }
    Ok(Rollout { images: decode(&model.vae, latents)?, steps, condition })
}

/// Predicts the velocity at a step: one conditional pass, as the release trains without guidance.
pub fn velocity(model: &DeepGen, latents: Tensor<4>, transition: &Transition, condition: &Condition) -> Tensor<4> {
    let rows = latents.dims()[0];
    let timestep = Tensor::full([rows], transition.sigma * 1000.0, &latents.device());
    // What follows, log-probabilities above all, is f32.
    to_f32(model.velocity(latents, timestep, condition, &[]))
}
