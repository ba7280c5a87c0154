//! Sampling: the noise levels of a run, the Euler steps, and guidance (docs/spec/sft.md section 8).
//!
//! Knows no network: a velocity field is a trait. Draws nothing: the initial noise is an argument.
//! Shapes: b batch, c channels, h and w latent sides.

use crate::Tensor;
use crate::flow::{NUM_TRAIN_TIMESTEPS, shift_sigma};
use crate::nn::{to_dtype, to_f32};

/// Something that says where noisy latents should go.
pub trait VelocityField {
    /// Returns the velocity at `latents` [b, c, h, w]; `timestep` is 1000 sigma, the same for all samples.
    fn velocity(&self, latents: Tensor<4>, timestep: f64) -> Tensor<4>;
}

impl<F: Fn(Tensor<4>, f64) -> Tensor<4>> VelocityField for F {
    fn velocity(&self, latents: Tensor<4>, timestep: f64) -> Tensor<4> {
        self(latents, timestep)
    }
}

/// Returns the noise levels of a run of `steps` steps, and the final zero: `steps + 1` values.
///
/// The shift acts twice on the lower end, as in the reference, whose smallest level is shifted already when the grid is
/// laid out.
pub fn sigmas(steps: usize, shift: f64) -> Vec<f32> {
    let count = NUM_TRAIN_TIMESTEPS as f64;
    let (high, low) = (count, shift_sigma(1.0 / count, shift) * count);
    let grid = |j: usize| if steps == 1 { high } else { high + (low - high) * j as f64 / (steps - 1) as f64 };
    let levels = (0..steps).map(|j| shift_sigma(grid(j) / count, shift) as f32);
    levels.chain(std::iter::once(0.0)).collect()
}

/// How a schedule with dynamic shifting moves its noise levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeShift {
    /// By e to the power of mu.
    Exponential,
    /// By mu itself.
    Linear,
}

/// Returns mu of dynamic shifting for an image of `num_tokens`: linear between two lengths, and beyond them.
pub fn dynamic_mu(num_tokens: usize, [short, long]: [f64; 2], [low, high]: [f64; 2]) -> f64 {
    let slope = (high - low) / (long - short);
    num_tokens as f64 * slope + low - slope * short
}

/// Returns the noise levels of a run with dynamic shifting: `steps + 1` values.
///
/// Unlike in [`sigmas`] the lower end of the grid is not shifted beforehand.
pub fn shifted_sigmas(steps: usize, kind: TimeShift, mu: f64) -> Vec<f32> {
    let low = 1.0 / NUM_TRAIN_TIMESTEPS as f64;
    let grid = |j: usize| if steps == 1 { 1.0 } else { 1.0 + (low - 1.0) * j as f64 / (steps - 1) as f64 };
    let strength = match kind {
        TimeShift::Exponential => mu.exp(),
        TimeShift::Linear => mu,
    };
    let levels = (0..steps).map(|j| (strength / (strength + (1.0 / grid(j) - 1.0))) as f32);
    levels.chain(std::iter::once(0.0)).collect()
}

/// Follows `field` from `noise` at the first level to the last one, in Euler steps.
///
/// The state is raised to f32 for each addition and rounded back to the noise's type.
///
/// # Shapes
/// [b, c, h, w] -> [b, c, h, w]
pub fn euler(field: &impl VelocityField, noise: Tensor<4>, sigmas: &[f32]) -> Tensor<4> {
    let dtype = noise.dtype();
    sigmas.windows(2).fold(noise, |latents, pair| {
        let timestep = f64::from(pair[0]) * NUM_TRAIN_TIMESTEPS as f64;
        let velocity = to_f32(field.velocity(latents.clone(), timestep));
        to_dtype(to_f32(latents) + velocity.mul_scalar(pair[1] - pair[0]), dtype)
    })
}

/// Classifier-free guidance over a field that takes a doubled batch: negative conditions first, then positive ones.
#[derive(Debug, Clone)]
pub struct Guided<F> {
    /// The field for 2b samples.
    pub field: F,
    /// Guidance scale; the reference doubles the batch only above 1.
    pub scale: f64,
}

impl<F: VelocityField> VelocityField for Guided<F> {
    fn velocity(&self, latents: Tensor<4>, timestep: f64) -> Tensor<4> {
        let b = latents.dims()[0];
        let both = self.field.velocity(Tensor::cat(vec![latents.clone(), latents], 0), timestep);
        let (negative, positive) = (both.clone().narrow(0, 0, b), both.narrow(0, b, b));
        negative.clone() + (positive - negative).mul_scalar(self.scale)
    }
}

/// Maps pixels in [-1, 1] to bytes: clamp(127.5 x + 128), truncated (docs/spec/model.md section 5).
///
/// # Shapes
/// [b, 3, h, w] -> b * h * w * 3 bytes, rows of RGB
pub fn to_bytes(pixels: Tensor<4>) -> Vec<u8> {
    let scaled = to_f32(pixels).mul_scalar(127.5) + 128.0;
    scaled.clamp(0.0, 255.0).permute([0, 2, 3, 1]).into_data().iter::<f32>().map(|value| value as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::random::noise;

    #[test]
    fn fifty_steps_with_shift_three_have_the_release_levels() {
        let levels = sigmas(50, 3.0);
        let expected =
            [(0, 1.0), (1, 0.993124), (2, 0.986057), (10, 0.921533), (24, 0.758652), (25, 0.743436), (48, 0.066900)];
        for (index, value) in expected.into_iter().chain([(49, 0.008929), (50, 0.0)]) {
            assert!((levels[index] - value).abs() < 1e-6, "{index}: {}", levels[index]);
        }
        assert_eq!(levels.len(), 51);
    }

    #[test]
    fn a_straight_field_is_followed_exactly_in_any_number_of_steps() {
        let device = Device::flex();
        let (data, start) = (noise(1, "data", [2, 3, 4, 4], &device), noise(1, "noise", [2, 3, 4, 4], &device));
        let velocity = start.clone() - data.clone();
        for steps in [1, 4, 28] {
            let field = |_: Tensor<4>, _: f64| velocity.clone();
            let end = euler(&field, start.clone(), &sigmas(steps, 3.0));
            assert!((end - data.clone()).abs().max().into_scalar::<f32>() < 1e-5, "{steps}");
        }
    }

    #[test]
    fn a_curved_field_converges_to_its_analytic_end() {
        // dz/dsigma = z has the solution z(0) = z(1) / e; Euler's error falls with the number of steps.
        let device = Device::flex();
        let start = Tensor::<4>::ones([1, 1, 1, 1], &device);
        let error = |steps: usize| {
            let end = euler(&|z: Tensor<4>, _: f64| z, start.clone(), &sigmas(steps, 1.0)).into_scalar::<f32>();
            (end - (-1.0f32).exp()).abs()
        };
        assert!(error(200) < 2e-3, "{}", error(200));
        assert!(error(200) < 0.6 * error(100));
    }

    #[test]
    fn guidance_extrapolates_from_negative_to_positive() {
        let device = Device::flex();
        let field = |z: Tensor<4>, _: f64| {
            let halves = Tensor::<1>::from_floats([1.0, 3.0], &z.device()).reshape([2, 1, 1, 1]);
            z.ones_like() * halves
        };
        let guided = Guided { field, scale: 4.0 };
        let velocity = guided.velocity(Tensor::zeros([1, 1, 1, 1], &device), 500.0);
        assert_eq!(velocity.into_scalar::<f32>(), 1.0 + 4.0 * 2.0);
    }

    #[test]
    fn bytes_are_truncated_and_interleaved() {
        let pixels = Tensor::<1>::from_floats([-1.0, 0.0, 1.0], &Device::flex()).reshape([1, 3, 1, 1]);
        assert_eq!(to_bytes(pixels), [0, 128, 255]);
    }
}
