//! The weights at the best look at held-out data so far, kept beside those that go on learning.
//!
//! Knows names and numbers, not what the score means: higher is better. Part of the state of a training, so that a resumed one
//! keeps what an undisturbed one would.

use burn::module::Module;
use burn::tensor::TensorData;
use deepgen_model::weights::WeightFile;

use crate::checkpoint::NamedTensors;
use crate::error::{JobResult, OrFail};
use crate::model_folder;
use crate::optimize::{join_count, split_count};

/// Prefix of the weights' names in a checkpoint.
const PREFIX: &str = "best.";
const STEP: &str = "best_at.step";
/// The score: a checkpoint holds f32 only.
const SCORE: &str = "best_at.score";

/// Weights and when they were.
#[derive(Debug, Clone)]
pub struct BestWeights {
    /// Steps that were done.
    pub step: u64,
    /// Score, higher is better.
    pub score: f64,
    /// What trains, by name.
    pub weights: NamedTensors,
}

impl BestWeights {
    /// Takes the weights of `module` in place of those in `best` when `score` is higher. An equal score changes nothing: of two
    /// the earlier stays.
    pub fn take<M: Module>(best: &mut Option<Self>, module: &M, step: u64, score: f64) {
        if best.as_ref().is_none_or(|best| score > best.score) {
            *best = Some(Self { step, score, weights: model_folder::trained(module) });
        }
    }

    /// Returns the state by name, for a checkpoint.
    pub fn tensors(&self) -> NamedTensors {
        let mut tensors = vec![(STEP.to_owned(), split_count(self.step)), (SCORE.to_owned(), split_bits(self.score))];
        tensors.extend(self.weights.iter().map(|(name, data)| (format!("{PREFIX}{name}"), data.clone())));
        tensors
    }

    /// Reads the state of a checkpoint; nothing when it was written before the first look.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn restored(file: &WeightFile) -> JobResult<Option<Self>> {
        let doing = || "read the best weights so far";
        if !file.names().any(|name| name == STEP) {
            return Ok(None);
        }
        let names: Vec<&str> = file.names().filter(|name| name.starts_with(PREFIX)).collect();
        let weights = names.into_iter().map(|name| Ok((name[PREFIX.len()..].to_owned(), file.get(name).or_io(doing)?)));
        Ok(Some(Self {
            step: join_count(&file.get(STEP).or_io(doing)?),
            score: join_bits(&file.get(SCORE).or_io(doing)?),
            weights: weights.collect::<JobResult<_>>()?,
        }))
    }
}

/// Returns the bits of a number, 16 in each float.
fn split_bits(number: f64) -> TensorData {
    let bits = number.to_bits();
    TensorData::new((0..4).map(|part| ((bits >> (16 * part)) & 0xFFFF) as f32).collect::<Vec<f32>>(), [4])
}

/// Returns the number that [`split_bits`] split.
fn join_bits(data: &TensorData) -> f64 {
    f64::from_bits(data.iter::<f32>().enumerate().fold(0, |bits, (part, value)| bits | (value as u64) << (16 * part)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;
    use deepgen_model::weights::{self, StoredType};

    use super::*;

    fn linear(value: f64) -> Linear {
        let linear = LinearConfig::new(2, 1).with_bias(false).init(&Device::flex().autodiff());
        let linear = weights::map_params(linear, |_, x| x.mul_scalar(0.0).add_scalar(value));
        deepgen_model::trainable::select(linear, &["*".into()]).unwrap().0
    }

    fn value(best: Option<&BestWeights>) -> f32 {
        best.unwrap().weights[0].1.iter::<f32>().next().unwrap()
    }

    #[test]
    fn the_best_stays_and_survives_a_checkpoint() {
        let mut best = None;
        for (step, (weight, score)) in [(0.1, -2.0), (0.2, -0.3), (0.3, -0.3), (0.4, -0.7)].into_iter().enumerate() {
            BestWeights::take(&mut best, &linear(weight), step as u64, score);
        }
        assert_eq!((value(best.as_ref()), best.as_ref().unwrap().step), (0.2, 1));

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        weights::save(&path, &best.as_ref().unwrap().tensors(), StoredType::F32, &BTreeMap::new()).unwrap();
        let mut again = BestWeights::restored(&WeightFile::open(&path).unwrap()).unwrap();
        let known = again.as_ref().unwrap();
        assert_eq!((value(again.as_ref()), known.step, known.score.to_bits()), (0.2, 1, (-0.3f64).to_bits()));
        BestWeights::take(&mut again, &linear(0.5), 9, -0.31);
        assert_eq!(again.as_ref().unwrap().step, 1);
    }
}
