//! An exponential moving average of weights (docs/spec/rl.md section 9).
//!
//! Knows names and flat vectors, no module's structure. The decay is small at first, so that the start is forgotten soon.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::TensorData;
use deepgen_contract::train::EmaSettings;
use deepgen_model::weights::{self, WeightFile};
use deepgen_model::{Device, Tensor};

use crate::checkpoint::NamedTensors;
use crate::error::{JobResult, OrFail};
use crate::optimize::{join_count, split_count};

/// Prefix of the averages' names in a checkpoint.
pub const PREFIX: &str = "ema.";
/// Name under which the number of steps is saved.
const STEPS: &str = "ema_steps";

/// Returns the share that the update after `done` earlier steps keeps.
fn decay_at(settings: &EmaSettings, done: u64) -> f64 {
    let done = done as f64;
    ((1.0 + done) / (10.0 + done)).min(settings.decay)
}

/// The average of one vector of weights.
#[derive(Debug, Clone)]
pub struct Ema {
    settings: EmaSettings,
    average: Tensor<1>,
    steps: u64,
}

impl Ema {
    /// Starts at `weights`.
    pub fn new(settings: EmaSettings, weights: Tensor<1>) -> Self {
        Self { settings, average: weights, steps: 0 }
    }

    /// Takes note of the weights after a step, and moves towards them if an update is due.
    pub fn step(&mut self, weights: Tensor<1>) {
        let done = self.steps;
        self.steps += 1;
        if self.steps.is_multiple_of(self.settings.interval.max(1)) {
            let share = 1.0 - decay_at(&self.settings, done);
            self.average = self.average.clone() + (weights - self.average.clone()).mul_scalar(share);
        }
    }

    /// Returns the average.
    pub fn average(&self) -> Tensor<1> {
        self.average.clone()
    }
}

/// The averages of all parameters that train.
pub struct EmaWeights {
    settings: EmaSettings,
    averages: BTreeMap<String, (Ema, Vec<usize>)>,
}

impl EmaWeights {
    /// Starts at the weights of `module`.
    pub fn new<M: Module>(settings: &EmaSettings, module: &M) -> Self {
        let mut averages = BTreeMap::new();
        weights::for_each_param(module, |name, param| {
            if param.is_trainable() {
                let average = Ema::new(*settings, param.value());
                averages.insert(name.to_owned(), (average, param.shape()));
            }
        });
        Self { settings: *settings, averages }
    }

    /// Takes note of the weights after an update of the optimiser.
    pub fn step<M: Module>(&mut self, module: &M) {
        weights::for_each_param(module, |name, param| {
            if let Some((average, _)) = self.averages.get_mut(name) {
                average.step(param.value());
            }
        });
    }

    /// Returns names and values of the averaged parameters.
    pub fn averages(&self) -> NamedTensors {
        let values = self.averages.iter().map(|(name, (ema, shape))| {
            let values: Vec<f32> = ema.average().into_data().iter::<f32>().collect();
            (name.clone(), TensorData::new(values, shape.clone()))
        });
        values.collect()
    }

    /// Returns the state by name, for a checkpoint; names of averages begin with [`PREFIX`].
    pub fn tensors(&self) -> NamedTensors {
        let steps = self.averages.values().next().map_or(0, |(ema, _)| ema.steps);
        let mut tensors = vec![(STEPS.to_owned(), split_count(steps))];
        tensors.extend(self.averages().into_iter().map(|(name, data)| (format!("{PREFIX}{name}"), data)));
        tensors
    }

    /// Restores the state of a checkpoint.
    ///
    /// # Errors
    /// When the checkpoint holds no average of a parameter that trains.
    pub fn restore(&mut self, file: &WeightFile, device: &Device) -> JobResult<()> {
        let read = |name: &str| file.get(name).or_io(|| "read the moving average");
        let steps = join_count(&read(STEPS)?);
        for (name, (ema, _)) in &mut self.averages {
            let data = read(&format!("{PREFIX}{name}"))?;
            let count = data.num_elements();
            let values = TensorData::new(data.iter::<f32>().collect::<Vec<_>>(), [count]);
            *ema = Ema { settings: self.settings, average: Tensor::from_data(values, device), steps };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::LinearConfig;

    use super::*;

    #[test]
    fn the_average_follows_slowly_and_survives_a_checkpoint() {
        let device = Device::flex();
        let linear = |value: f64| {
            let linear = LinearConfig::new(2, 2).with_bias(false).init(&device.clone().autodiff());
            weights::map_params(linear, |_, x| x.mul_scalar(0.0).add_scalar(value))
        };
        let settings = EmaSettings { decay: 0.9, interval: 1 };
        let mut ema = EmaWeights::new(&settings, &linear(0.0));
        let value = |ema: &EmaWeights| ema.averages()[0].1.iter::<f32>().next().unwrap();
        // The first update keeps (1 + 0) / (10 + 0) of the start, the second 2 / 11.
        ema.step(&linear(1.0));
        assert!((value(&ema) - 0.9).abs() < 1e-6);
        ema.step(&linear(1.0));
        assert!((value(&ema) - (1.0 - 0.1 * 2.0 / 11.0)).abs() < 1e-6);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        weights::save(&path, &ema.tensors(), weights::StoredType::F32, &BTreeMap::new()).unwrap();
        let mut again = EmaWeights::new(&settings, &linear(0.0));
        again.restore(&WeightFile::open(&path).unwrap(), &device).unwrap();
        ema.step(&linear(0.5));
        again.step(&linear(0.5));
        assert_eq!(value(&ema).to_bits(), value(&again).to_bits());
    }
}
