//! An exponential moving average of weights (docs/spec/rl.md section 9).
//!
//! Knows flat vectors, no module. The decay is small at first, so that the start is forgotten soon.

use deepgen_model::Tensor;

/// How the average moves.
#[derive(Debug, Clone, Copy)]
pub struct EmaSettings {
    /// Largest decay: the share of the old average that an update keeps.
    pub decay: f64,
    /// Steps between updates.
    pub interval: u64,
}

impl EmaSettings {
    /// Returns the share that the update after `done` earlier steps keeps.
    fn decay_at(&self, done: u64) -> f64 {
        let done = done as f64;
        ((1.0 + done) / (10.0 + done)).min(self.decay)
    }
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
            let share = 1.0 - self.settings.decay_at(done);
            self.average = self.average.clone() + (weights - self.average.clone()).mul_scalar(share);
        }
    }

    /// Returns the average.
    pub fn average(&self) -> Tensor<1> {
        self.average.clone()
    }
}
