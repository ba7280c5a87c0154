//! Transitions of the sampling process, their log-probabilities, and the clipped policy loss with its KL penalty
//! (docs/spec/rl.md sections 4, 7 and 8).
//!
//! Knows latents and velocities, no network. `sigma` is the noise level at a step, `next` the one after it.

use std::f64::consts::{FRAC_PI_2, PI};

use deepgen_contract::rl::{KlKind, SdeKind};
use deepgen_model::Tensor;

/// One step of the process: the sampler, its strength, and the two noise levels.
#[derive(Debug, Clone, Copy)]
pub struct Transition {
    /// Which process.
    pub sde: SdeKind,
    /// Strength of the noise.
    pub eta: f64,
    /// Noise level before the step.
    pub sigma: f64,
    /// Noise level after it.
    pub next: f64,
    /// Second noise level of the schedule: stands in for 1 where 1 - sigma would divide by zero.
    pub second_sigma: f64,
}

/// Added to variances in the Gaussian log-probability.
const LOG_EPS: f64 = 1e-8;
/// Added to twice the variance in the KL penalty.
const KL_EPS: f64 = 1e-7;

impl Transition {
    /// Returns the standard deviation of the noise that a step adds.
    pub fn noise_std(&self) -> f64 {
        match self.sde {
            SdeKind::CpsSde => self.next * (self.eta * FRAC_PI_2).sin(),
            SdeKind::FlowgrpoSde => self.flow_strength() * (self.sigma - self.next).sqrt(),
            SdeKind::DanceSde => self.eta * (self.sigma - self.next).sqrt(),
        }
    }

    /// Returns the scale that the KL penalty and GRPO-Guard divide by: what the released code calls "std".
    pub fn kl_std(&self) -> f64 {
        match self.sde {
            SdeKind::FlowgrpoSde => self.flow_strength(),
            SdeKind::CpsSde | SdeKind::DanceSde => self.noise_std(),
        }
    }

    fn flow_strength(&self) -> f64 {
        let sigma = if self.sigma >= 1.0 { self.second_sigma } else { self.sigma };
        self.eta * (self.sigma / (1.0 - sigma)).sqrt()
    }

    /// Returns the mean of the latents after the step.
    ///
    /// # Shapes
    /// latents [b, c, h, w], velocity [b, c, h, w] -> [b, c, h, w]
    pub fn mean(&self, x: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        let (s, next, eta) = (self.sigma, self.next, self.eta);
        let delta = next - s;
        match self.sde {
            SdeKind::CpsSde => {
                let clean = x.clone() - v.clone().mul_scalar(s);
                // The radicand is zero at eta = 1 up to rounding: the noise term then drops out of value and gradient.
                let rest = (next.powi(2) - self.noise_std().powi(2)).max(0.0).sqrt();
                let mean = clean.mul_scalar(1.0 - next);
                if rest < 1e-12 { mean } else { mean + (x + v.mul_scalar(1.0 - s)).mul_scalar(rest) }
            }
            SdeKind::FlowgrpoSde => {
                let a2 = self.flow_strength().powi(2);
                x.mul_scalar(1.0 + a2 * delta / (2.0 * s)) + v.mul_scalar((1.0 + a2 * (1.0 - s) / (2.0 * s)) * delta)
            }
            SdeKind::DanceSde => {
                let clean = x.clone() - v.clone().mul_scalar(s);
                let score = (x.clone() - clean.mul_scalar(1.0 - s)).mul_scalar(0.5 * eta * eta / (s * s + 1e-8));
                x + (v + score).mul_scalar(delta)
            }
        }
    }

    /// Returns the log-probability of `after` given the step's mean: a mean over all axes but the batch.
    ///
    /// # Shapes
    /// [b, c, h, w], [b, c, h, w] -> [b]
    pub fn log_prob(&self, after: Tensor<4>, mean: Tensor<4>) -> Tensor<1> {
        let squared = mean_per_image((after - mean).square());
        match self.sde {
            SdeKind::CpsSde => squared.neg(),
            SdeKind::FlowgrpoSde | SdeKind::DanceSde => {
                let std = self.noise_std();
                let constant = (std + LOG_EPS).ln() + (2.0 * PI).sqrt().ln();
                squared.div_scalar(-2.0 * (std * std + LOG_EPS)).sub_scalar(constant)
            }
        }
    }

    /// Returns the KL penalty of a policy step against the reference's, a scalar of shape [1].
    ///
    /// # Shapes
    /// two pairs of [b, c, h, w]: velocities or means, as `kind` says -> [1]
    pub fn kl(&self, kind: KlKind, policy: Prediction, reference: Prediction) -> Tensor<1> {
        let difference = match kind {
            KlKind::Velocity => policy.velocity - reference.velocity,
            KlKind::Mean => policy.mean - reference.mean,
        };
        difference.square().mean().div_scalar(2.0 * self.kl_std().powi(2) + KL_EPS)
    }
}

/// A velocity and the transition's mean that follows from it.
#[derive(Debug, Clone)]
pub struct Prediction {
    /// [b, c, h, w].
    pub velocity: Tensor<4>,
    /// [b, c, h, w].
    pub mean: Tensor<4>,
}

/// Returns the mean over all axes but the first.
pub fn mean_per_image(x: Tensor<4>) -> Tensor<1> {
    let b = x.dims()[0];
    x.reshape([b as i32, -1]).mean_dim(1).reshape([b])
}

/// The clipped policy loss of a batch and what became of its ratios.
pub struct PolicyLoss {
    /// [1], to be minimised.
    pub loss: Tensor<1>,
    /// [b], off the tape.
    pub ratio: Tensor<1>,
}

/// Returns the mean over images of `max(-A r, -A clamp(r, 1 - c, 1 + c))` with `r = exp(new - old)`.
///
/// # Shapes
/// each [b]
pub fn policy_loss(
    new_log_prob: Tensor<1>,
    old_log_prob: Tensor<1>,
    advantage: Tensor<1>,
    clip_range: f64,
) -> PolicyLoss {
    clipped_loss((new_log_prob - old_log_prob).exp(), advantage, [1.0 - clip_range, 1.0 + clip_range])
}

/// Returns the mean over images of `max(-A r, -A clamp(r, low, high))` for ratios that were made elsewhere.
///
/// # Shapes
/// each [b]
pub fn clipped_loss(ratio: Tensor<1>, advantage: Tensor<1>, [low, high]: [f64; 2]) -> PolicyLoss {
    let clipped = ratio.clone().clamp(low, high);
    let plain = (advantage.clone() * ratio.clone()).neg();
    let bounded = (advantage * clipped).neg();
    PolicyLoss { loss: plain.max_pair(bounded).mean(), ratio: ratio.without_autodiff() }
}

/// Returns the ratio of two policies, the difference of their log-probabilities clamped to plus or minus `bound`.
///
/// # Shapes
/// each [b]
pub fn bounded_ratio(new_log_prob: Tensor<1>, old_log_prob: Tensor<1>, bound: f64) -> Tensor<1> {
    (new_log_prob - old_log_prob).clamp(-bound, bound).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use deepgen_model::Device;

    fn full(value: f32) -> Tensor<4> {
        Tensor::full([1, 2, 2, 2], value, &Device::flex())
    }

    fn scalar(x: Tensor<1>) -> f32 {
        x.into_scalar::<f32>()
    }

    #[test]
    fn cps_sde_with_eta_one_renoises_the_clean_prediction() {
        // docs/spec/rl.md section 15.
        let step = Transition { sde: SdeKind::CpsSde, eta: 1.0, sigma: 0.9931, next: 0.9861, second_sigma: 0.9931 };
        let mean = step.mean(full(1.0), full(0.0));
        assert!((scalar(mean.clone().mean()) - 0.0139).abs() < 1e-6);
        assert!((step.noise_std() - 0.9861).abs() < 1e-12);
        assert_eq!(scalar(step.log_prob(mean.clone(), mean)), 0.0);
    }

    #[test]
    fn without_noise_every_process_is_an_euler_step() {
        // x' = x + (next - sigma) v; f32 rounding.
        for sde in [SdeKind::CpsSde, SdeKind::FlowgrpoSde, SdeKind::DanceSde] {
            let step = Transition { sde, eta: 0.0, sigma: 0.7, next: 0.5, second_sigma: 0.9 };
            let mean = step.mean(full(0.3), full(-1.1));
            assert!((scalar(mean.mean()) - (0.3 + 0.2 * 1.1)).abs() < 1e-6, "{sde:?}");
        }
    }

    #[test]
    fn the_clip_stops_gradients_where_documented() {
        // docs/spec/rl.md section 15: (advantage, ratio) -> loss, gradient with respect to the log-probability.
        let device = Device::flex().autodiff();
        for (advantage, ratio, loss, gradient) in
            [(1.0, 1.001, -1.0001, 0.0), (1.0, 0.999, -0.999, -0.999), (-1.0, 0.999, 0.9999, 0.0)]
        {
            let new = Tensor::<1>::from_floats([(ratio as f32).ln()], &device).require_grad();
            let old = Tensor::<1>::zeros([1], &device);
            let result = policy_loss(new.clone(), old, Tensor::from_floats([advantage as f32], &device), 1e-4);
            let gradients = result.loss.backward();
            assert!((scalar(result.loss) - loss).abs() < 1e-6, "{advantage} {ratio}");
            let found = new.grad(&gradients).map_or(0.0, scalar);
            assert!((found - gradient).abs() < 1e-5, "{advantage} {ratio}: {found}");
        }
    }

    #[test]
    fn equal_policies_have_no_kl() {
        let step = Transition { sde: SdeKind::CpsSde, eta: 1.0, sigma: 0.7, next: 0.5, second_sigma: 0.9 };
        let at = |v: f32| Prediction { velocity: full(v), mean: full(v) };
        assert_eq!(scalar(step.kl(KlKind::Velocity, at(1.0), at(1.0))), 0.0);
        // 1 / (2 * 0.25 + 1e-7)
        assert!((scalar(step.kl(KlKind::Velocity, at(1.0), at(2.0))) - 2.0).abs() < 1e-5);
    }
}
