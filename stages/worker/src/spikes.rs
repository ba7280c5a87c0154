//! Notices when a loss leaps: the first sign of a bad batch or of a rate that is too high.
//!
//! Knows numbers by name, not what they measure. It warns and changes nothing; a resumed job learns its bounds anew.

use std::collections::BTreeMap;

/// Values that are seen before one can be a spike.
const LEARN: u64 = 50;
/// Weight of the past in the running mean and variance: about the last hundred values.
const DECAY: f64 = 0.99;
/// Standard deviations above the mean from which a value is a spike.
const THRESHOLD: f64 = 6.0;

/// Running mean and variance of a loss.
#[derive(Debug, Clone, Copy, Default)]
struct Course {
    count: u64,
    mean: f64,
    variance: f64,
}

/// The losses of a job.
#[derive(Debug, Default)]
pub struct Spikes(BTreeMap<String, Course>);

impl Spikes {
    /// Takes in a value; returns the bound that it exceeds, if it is a spike.
    pub fn see(&mut self, name: &str, value: f64) -> Option<f64> {
        let course = self.0.entry(name.to_owned()).or_default();
        let bound = course.mean + THRESHOLD * course.variance.sqrt();
        let is_spike = course.count >= LEARN && value > bound;
        // A spike counts as the bound: one leap must not hide the next.
        let value = if is_spike { bound } else { value };
        course.count += 1;
        let weight = (1.0 - DECAY).max(1.0 / course.count as f64);
        let off = value - course.mean;
        course.mean += weight * off;
        course.variance = (1.0 - weight) * (course.variance + weight * off * off);
        is_spike.then_some(bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leap_is_noticed_and_noise_is_not() {
        let mut spikes = Spikes::default();
        for i in 0..500 {
            let noise = 0.1 * ((i * 7919 % 101) as f64 / 50.0 - 1.0);
            assert_eq!(spikes.see("loss", 1.0 + noise), None, "value {i}");
        }
        let bound = spikes.see("loss", 3.0).unwrap();
        assert!((1.2..1.6).contains(&bound), "{bound}");
        assert!(spikes.see("loss", 3.0).is_some(), "the second leap hides behind the first");
        assert_eq!(spikes.see("another", 3.0), None);
    }
}
