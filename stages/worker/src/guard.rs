//! GRPO-Guard's ratios, which bring the ratios of all noise levels to one scale (docs/spec/rl.md section 7.1).
//!
//! Knows log-probabilities and means of transitions, no network and no clipping.

use deepgen_model::Tensor;

use crate::objective::{PolicyLoss, clipped_loss, mean_per_image};

/// Smallest scale of a ratio.
const MIN_SCALE: f64 = 1e-8;

/// What the new policy and the one that drew the images say of the same transitions.
#[derive(Debug, Clone)]
pub struct GuardInputs {
    /// Log-probability under the new policy [b].
    pub new_log_prob: Tensor<1>,
    /// Log-probability at the time of drawing [b].
    pub old_log_prob: Tensor<1>,
    /// Mean of the transition under the new policy [b, c, h, w].
    pub new_mean: Tensor<4>,
    /// Mean of the transition at the time of drawing [b, c, h, w].
    pub old_mean: Tensor<4>,
    /// Root of the step in noise level [b, 1, 1, 1].
    pub sqrt_dt: Tensor<4>,
    /// The process's "std" [b, 1, 1, 1], see [`crate::objective::Transition::kl_std`].
    pub std: Tensor<4>,
}

/// Returns the clipped loss over the released code's ratios: `exp(d q + m / (2 q))` with `d` the difference of the
/// log-probabilities, `m` the mean squared difference of the means and `q` the scale, each of its image.
pub fn guarded_loss(inputs: &GuardInputs, advantage: Tensor<1>, range: [f64; 2]) -> PolicyLoss {
    let scale = mean_per_image(inputs.sqrt_dt.clone() * inputs.std.clone()).clamp_min(MIN_SCALE);
    let moved = mean_per_image((inputs.new_mean.clone() - inputs.old_mean.clone()).square());
    let difference = inputs.new_log_prob.clone() - inputs.old_log_prob.clone();
    let ratio = (difference * scale.clone() + moved / scale.mul_scalar(2.0)).exp();
    clipped_loss(ratio, advantage, range)
}

/// Returns the loss of the release's `ATRAIN_GRPOGUARD_PAPER_IMPL`: one scale and one offset for the whole batch, and the
/// loss divided by the mean step.
pub fn guarded_loss_of_paper(inputs: &GuardInputs, advantage: Tensor<1>, range: [f64; 2]) -> PolicyLoss {
    let mean = |x: &Tensor<4>| f64::from(x.clone().mean().into_scalar::<f32>());
    let (step, std) = (mean(&inputs.sqrt_dt), mean(&inputs.std));
    let scale = step * std;
    let offset = (inputs.new_mean.clone() - inputs.old_mean.clone()).square().mean().div_scalar(2.0 * scale * scale);
    let difference = inputs.new_log_prob.clone() - inputs.old_log_prob.clone();
    let PolicyLoss { loss, ratio } = clipped_loss((difference + offset).mul_scalar(scale).exp(), advantage, range);
    PolicyLoss { loss: loss.div_scalar(step * step), ratio }
}
