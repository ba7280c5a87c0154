//! Rectified flow in training: the table of noise levels, the noisy latent, the target and the loss (docs/spec/sft.md 2).
//!
//! Knows no network and draws nothing: uniforms and noise are arguments.
//! Shapes: b batch, c channels, h and w latent sides.

use burn::tensor::{FloatDType, TensorData};

use crate::nn::{to_dtype, to_f32};
use crate::{Device, Tensor};

/// Entries of the training table.
pub const NUM_TRAIN_TIMESTEPS: usize = 1000;

/// Maps a noise level through the schedule's shift.
pub fn shift_sigma(sigma: f64, shift: f64) -> f64 {
    shift * sigma / (1.0 + (shift - 1.0) * sigma)
}

/// The 1000 noise levels that training draws from, the noisiest first.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingTable {
    sigmas: Vec<f32>,
}

impl TrainingTable {
    /// Builds the table of a scheduler with this shift.
    pub fn new(shift: f64) -> Self {
        let count = NUM_TRAIN_TIMESTEPS as f64;
        let sigmas = (0..NUM_TRAIN_TIMESTEPS).map(|i| shift_sigma((count - i as f64) / count, shift) as f32).collect();
        Self { sigmas }
    }

    /// Returns the noise level for `u` uniform in [0, 1).
    pub fn sigma(&self, u: f64) -> f32 {
        self.sigmas[((u * NUM_TRAIN_TIMESTEPS as f64) as usize).min(NUM_TRAIN_TIMESTEPS - 1)]
    }

    /// Returns all noise levels.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }
}

/// Noisy latents with what the network has to predict for them.
#[derive(Debug, Clone)]
pub struct NoisyBatch {
    /// (1 - sigma) x + sigma noise [b, c, h, w].
    pub latents: Tensor<4>,
    /// noise - x [b, c, h, w].
    pub target: Tensor<4>,
    /// 1000 sigma, f32 [b].
    pub timestep_b: Tensor<1>,
}

/// Puts host values on a device.
fn vector(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

/// Mixes clean latents with noise, one noise level per sample.
///
/// The release rounds sigma to bf16 before mixing, while the timestep keeps the exact value; `sigma_dtype` decides.
///
/// # Shapes
/// clean, noise [b, c, h, w], b noise levels
pub fn add_noise(clean: Tensor<4>, noise: Tensor<4>, sigmas: &[f32], sigma_dtype: FloatDType) -> NoisyBatch {
    let (device, dtype) = (clean.device(), clean.dtype());
    let exact = vector(sigmas.to_vec(), &device);
    let rounded = to_dtype(exact.clone().cast(sigma_dtype), dtype).reshape([sigmas.len(), 1, 1, 1]);
    let target = noise.clone() - clean.clone();
    let latents = clean * (rounded.clone().neg() + 1.0) + noise * rounded;
    NoisyBatch { latents, target, timestep_b: exact.mul_scalar(NUM_TRAIN_TIMESTEPS as f64) }
}

/// Returns the mean squared error of each sample, in f32.
///
/// # Shapes
/// [b, c, h, w] twice -> [b]
pub fn losses(prediction: Tensor<4>, target: Tensor<4>) -> Tensor<1> {
    let [b, c, h, w] = prediction.dims();
    let error = to_f32(prediction) - to_f32(target);
    error.square().reshape([b, c * h * w]).mean_dim(1).reshape([b])
}

/// Returns the plain mean over samples of [`losses`]: every image counts the same, whatever its size.
pub fn loss(prediction: Tensor<4>, target: Tensor<4>) -> Tensor<1> {
    losses(prediction, target).mean()
}

/// Returns the loss of samples whose sizes may differ: as in [`loss`], every image counts the same.
///
/// # Shapes
/// a prediction and a target [1, c, h, w] of each sample -> [1]
pub fn ragged_loss(pairs: impl IntoIterator<Item = (Tensor<4>, Tensor<4>)>) -> Tensor<1> {
    Tensor::cat(pairs.into_iter().map(|(prediction, target)| losses(prediction, target)).collect(), 0).mean()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::noise;

    #[test]
    fn the_table_has_the_release_values_for_shift_three() {
        let table = TrainingTable::new(3.0);
        for (index, expected) in [(0, 1.0), (1, 0.999666), (500, 0.75), (750, 0.5), (999, 0.002994)] {
            assert!((table.sigmas()[index] - expected).abs() < 1e-6, "{index}");
        }
        assert_eq!(table.sigma(0.0), 1.0);
        assert_eq!(table.sigma(0.5), 0.75);
        assert_eq!(table.sigma(0.999_999_9), table.sigmas()[999]);
    }

    #[test]
    fn following_the_target_back_by_sigma_gives_the_clean_latent() {
        let device = Device::flex();
        let (clean, eps) = (noise(1, "x", [2, 3, 4, 4], &device), noise(1, "e", [2, 3, 4, 4], &device));
        let batch = add_noise(clean.clone(), eps, &[0.25, 0.9], FloatDType::F32);
        let sigma = Tensor::<1>::from_floats([0.25, 0.9], &device).reshape([2, 1, 1, 1]);
        let back = batch.latents - batch.target * sigma;
        assert!((back - clean).abs().max().into_scalar::<f32>() < 1e-5);
        assert_eq!(batch.timestep_b.into_data().try_to_vec::<f32>().unwrap(), [250.0, 900.0]);
    }

    #[test]
    fn sigma_is_rounded_for_the_mix_but_not_for_the_timestep() {
        let device = Device::flex();
        let (zeros, ones) = (Tensor::zeros([1, 1, 1, 1], &device), Tensor::ones([1, 1, 1, 1], &device));
        let batch = add_noise(zeros, ones, &[0.7003], FloatDType::BF16);
        assert_eq!(batch.latents.into_scalar::<f32>(), half::bf16::from_f32(0.7003).to_f32());
        assert!((batch.timestep_b.into_scalar::<f32>() - 700.3).abs() < 1e-3);
    }
}
