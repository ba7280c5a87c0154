//! Gradients by parameter name, their accumulation and clipping, AdamW, and the learning rate's course.
//!
//! Knows names and flat vectors, no module's structure. docs/spec/sft.md section 3 gives the formulas.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Gradients, TensorData};
use deepgen_contract::train::{OptimizerSettings, Schedule};
use deepgen_model::fused::{self, AdamWStep, Moments};
use deepgen_model::host::copy_out;
use deepgen_model::weights::{self, WeightFile};
use deepgen_model::{Device, Tensor};

use crate::checkpoint::NamedTensors;
use crate::error::{JobError, JobResult, OrFail};

/// Gradients of one update, by parameter name.
#[derive(Default)]
pub struct GradientSum {
    by_name: BTreeMap<String, Tensor<1>>,
}

impl GradientSum {
    /// Adds the gradients of `module`'s trainable parameters, times `scale`.
    pub fn add<M: Module>(&mut self, module: &M, mut gradients: Gradients, scale: f64) {
        weights::for_each_param(module, |name, param| {
            if !param.is_trainable() {
                return;
            }
            let Some(gradient) = param.take_grad(&mut gradients) else { return };
            let gradient = if scale == 1.0 { gradient } else { gradient.mul_scalar(scale) };
            let sum = match self.by_name.remove(name) {
                Some(sum) => sum + gradient,
                None => gradient,
            };
            self.by_name.insert(name.to_owned(), sum);
        });
    }

    /// Returns the gradient of a parameter as a vector.
    pub fn get(&self, name: &str) -> Option<Tensor<1>> {
        self.by_name.get(name).cloned()
    }

    /// Lists names and gradients, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor<1>)> {
        self.by_name.iter().map(|(name, gradient)| (name.as_str(), gradient))
    }

    /// Returns true when nothing was added.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Adds the gradients of another sum.
    pub fn merge(&mut self, other: Self) {
        for (name, gradient) in other.by_name {
            let sum = match self.by_name.remove(&name) {
                Some(sum) => sum + gradient,
                None => gradient,
            };
            self.by_name.insert(name, sum);
        }
    }

    /// Checks the norm over all gradients together, before anything is changed by them.
    ///
    /// # Errors
    /// When it is NaN or infinite: names the step and the tensors that it comes from.
    pub fn ensure_finite(self, step: u64) -> JobResult<FiniteGradients> {
        let squares: Vec<f64> = self.by_name.values().map(|g| fused::sum_of_squares(g.clone())).collect();
        let norm = squares.iter().sum::<f64>().sqrt();
        if norm.is_finite() {
            return Ok(FiniteGradients { sum: self, norm });
        }
        let named = self.by_name.keys().zip(&squares).filter(|(_, square)| !square.is_finite());
        let bad: Vec<&str> = named.map(|(name, _)| name.as_str()).collect();
        Err(JobError::non_finite(format!(
            "the gradient norm is {norm} at step {}, by {} of {} tensors ({}{}), though every loss is finite; the update was \
             not made and the last checkpoint stays. Lower `optimizer.lr`, or look at the samples of that update",
            step + 1,
            bad.len(),
            squares.len(),
            bad.iter().take(NUM_NAMED).copied().collect::<Vec<_>>().join(", "),
            if bad.len() > NUM_NAMED { ", ..." } else { "" },
        )))
    }
}

/// Gradients whose norm is a number: all that an update is made of.
pub struct FiniteGradients {
    sum: GradientSum,
    norm: f64,
}

/// Tensors that an error names.
const NUM_NAMED: usize = 3;

/// AdamW with decoupled decay of parameters that have two or more dimensions.
pub struct AdamW {
    settings: OptimizerSettings,
    moments: BTreeMap<String, Moments>,
    updates: u64,
}

/// Name under which the number of updates is saved, as two floats of 24 bits each.
const UPDATES: &str = "updates";
/// Prefix of an optimiser's names in a checkpoint.
pub const PREFIX: &str = "optimizer.";

impl AdamW {
    /// Creates an optimiser without history.
    pub fn new(settings: &OptimizerSettings) -> Self {
        Self { settings: settings.clone(), moments: BTreeMap::new(), updates: 0 }
    }

    /// Returns the updates made.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Clips by the global norm and updates `module`; returns it and the norm before clipping.
    pub fn update<M: Module>(&mut self, module: M, gradients: FiniteGradients, lr: f64) -> (M, f64) {
        let FiniteGradients { sum: mut gradients, norm } = gradients;
        self.updates += 1;
        let OptimizerSettings { betas, eps, weight_decay, clip_norm, .. } = self.settings;
        let gradient_scale = if clip_norm > 0.0 { (clip_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let mut ranks = BTreeMap::new();
        weights::for_each_param(&module, |name, param| {
            ranks.insert(name.to_owned(), param.shape().len());
        });
        let module = weights::map_params(module, |name, value| {
            let Some(gradient) = gradients.by_name.remove(name) else { return value };
            let decay = if ranks[name] >= 2 { 1.0 - lr * weight_decay } else { 1.0 };
            let step = AdamWStep { updates: self.updates, lr, betas, eps, decay, gradient_scale };
            let (value, moments) = fused::adamw(value, gradient, self.moments.remove(name), &step);
            self.moments.insert(name.to_owned(), moments);
            value
        });
        (module, norm)
    }

    /// Returns the state by name, for a checkpoint; names begin with [`PREFIX`].
    pub fn tensors(&self) -> NamedTensors {
        let mut tensors = vec![(format!("{PREFIX}{UPDATES}"), split_count(self.updates))];
        for (name, moments) in &self.moments {
            tensors.push((format!("{PREFIX}first.{name}"), copy_out(moments.first.clone())));
            tensors.push((format!("{PREFIX}second.{name}"), copy_out(moments.second.clone())));
        }
        tensors
    }

    /// Restores the state from the names of a checkpoint that begin with `prefix`.
    ///
    /// # Errors
    /// When the checkpoint holds no such state.
    pub fn restore(&mut self, file: &WeightFile, prefix: &str, device: &Device) -> JobResult<()> {
        let read = |name: &str| file.get(name).or_io(|| "read the optimiser state");
        self.updates = join_count(&read(&format!("{prefix}{UPDATES}"))?);
        self.moments.clear();
        let first_prefix = format!("{prefix}first.");
        for stored in file.names() {
            let Some(name) = stored.strip_prefix(&first_prefix) else { continue };
            let first = Tensor::from_data(read(stored)?, device);
            let second = Tensor::from_data(read(&format!("{prefix}second.{name}"))?, device);
            self.moments.insert(name.to_owned(), Moments { first, second });
        }
        Ok(())
    }
}

/// Returns a count as two floats: f32 holds integers of 24 bits exactly; checkpoints hold f32.
pub fn split_count(count: u64) -> TensorData {
    TensorData::new(vec![(count & 0xFF_FFFF) as f32, (count >> 24) as f32], [2])
}

/// Returns the count that [`split_count`] split.
pub fn join_count(data: &TensorData) -> u64 {
    let parts: Vec<f32> = data.iter::<f32>().collect();
    parts[0] as u64 | (parts[1] as u64) << 24
}

/// Lowest factor of the warm-up (docs/spec/sft.md section 3).
const WARMUP_START: f64 = 1e-5;

/// Lowest factor of the linear decay.
const DECAY_END: f64 = 0.02;

/// Returns the learning rate's factor at `k` of `total` steps, both counted from 0.
pub fn schedule_factor(schedule: &Schedule, k: u64, total: u64) -> f64 {
    let (k, total) = (k as f64, total as f64);
    match schedule {
        Schedule::WarmupConstant { warmup_steps } => {
            let warmup = *warmup_steps as f64;
            if k < warmup { k / warmup } else { 1.0 }
        }
        Schedule::WarmupDecay { warmup_steps, decay_share } => {
            let warmup = ((k + 1.0) / (*warmup_steps as f64).max(1.0)).min(1.0);
            let left = (1.0 - k / total) / decay_share.max(1e-9);
            warmup * left.clamp(DECAY_END, 1.0)
        }
        Schedule::HalfCosine { warmup_steps, starts_at_zero } => {
            let warmup = *warmup_steps as f64;
            let done = if *starts_at_zero { k } else { k + 1.0 };
            if k < warmup {
                return done / warmup;
            }
            (1.0 + (std::f64::consts::PI * (k - warmup) / (total - warmup).max(1.0)).cos()) / 2.0
        }
        Schedule::WarmupCosine { warmup_ratio } => {
            let warmup = (warmup_ratio * total).floor();
            if k < warmup {
                let done = if warmup > 1.0 { k / (warmup - 1.0) } else { 1.0 };
                return WARMUP_START + (1.0 - WARMUP_START) * done;
            }
            (1.0 + (std::f64::consts::PI * (k - warmup) / (total - warmup)).cos()) / 2.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_follows_the_released_curve() {
        // docs/spec/sft.md section 3, pre-training: peak 1e-4, 200,000 iterations, warm-up 2,000.
        let schedule = Schedule::WarmupCosine { warmup_ratio: 0.01 };
        let lr = |k| 1e-4 * schedule_factor(&schedule, k, 200_000);
        for (k, expected) in [(0, 1e-9), (1000, 5.0026e-5), (1999, 1e-4), (2000, 1e-4), (101_000, 5e-5)] {
            assert!((lr(k) - expected).abs() < 1e-9, "lr({k}) = {}", lr(k));
        }
    }

    #[test]
    fn the_first_rl_update_has_learning_rate_zero() {
        // docs/spec/rl.md section 9.
        let schedule = Schedule::WarmupConstant { warmup_steps: 20 };
        assert_eq!(schedule_factor(&schedule, 0, 100), 0.0);
        assert_eq!(schedule_factor(&schedule, 10, 100), 0.5);
        assert_eq!(schedule_factor(&schedule, 20, 100), 1.0);
    }

    #[test]
    fn a_count_survives_two_floats() {
        for count in [0, 1, 0xFF_FFFF, 0x100_0000, 123_456_789_012] {
            assert_eq!(join_count(&split_count(count)), count);
        }
    }
}
