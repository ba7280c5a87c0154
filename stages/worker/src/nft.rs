//! DiffusionNFT's loss: the prediction is pulled towards good images and away from bad ones (docs/spec/rl.md 7.1).
//!
//! Knows velocities and latents, no network.

use deepgen_model::Tensor;

use crate::objective::mean_per_image;

/// Smallest weight of a branch.
const MIN_WEIGHT: f64 = 1e-5;

/// The loss's two constants.
#[derive(Debug, Clone, Copy)]
pub struct NftSettings {
    /// How far the two branches lie apart.
    pub beta: f64,
    /// Advantages are clamped to plus or minus this.
    pub advantage_clip: f64,
}

/// Noisy latents with what was predicted for them.
#[derive(Debug, Clone)]
pub struct NftInputs {
    /// Latents before the step [b, c, h, w].
    pub noisy: Tensor<4>,
    /// Target latents [b, c, h, w].
    pub clean: Tensor<4>,
    /// Noise level of each image [b].
    pub sigma: Tensor<1>,
    /// Velocity under the policy that learns [b, c, h, w].
    pub velocity: Tensor<4>,
    /// Velocity under the policy that drew the images, off the tape [b, c, h, w].
    pub old_velocity: Tensor<4>,
    /// Advantage of each image [b].
    pub advantage: Tensor<1>,
}

/// Returns the loss [1].
pub fn nft_loss(inputs: &NftInputs, settings: NftSettings) -> Tensor<1> {
    let NftSettings { beta, advantage_clip } = settings;
    let b = inputs.sigma.dims()[0];
    let sigma = inputs.sigma.clone().reshape([b, 1, 1, 1]);
    let (new, old) = (inputs.velocity.clone(), inputs.old_velocity.clone());
    let branch = |velocity: Tensor<4>| {
        let error = inputs.noisy.clone() - velocity * sigma.clone() - inputs.clean.clone();
        let weight = mean_per_image(error.clone().detach().abs()).clamp_min(MIN_WEIGHT);
        mean_per_image(error.square()) / weight
    };
    let positive = branch(new.clone().mul_scalar(beta) + old.clone().mul_scalar(1.0 - beta));
    let negative = branch(old.mul_scalar(1.0 + beta) - new.mul_scalar(beta));
    let share = inputs.advantage.clone().div_scalar(advantage_clip).clamp(-1.0, 1.0).mul_scalar(0.5).add_scalar(0.5);
    let mixed = share.clone() * positive + (share.neg() + 1.0) * negative;
    mixed.mean().mul_scalar(advantage_clip / beta)
}
