//! What a reward is: a number for each image of a batch, given the prompt it was made from.
//!
//! Knows neither weights nor advantages (docs/spec/rl.md section 6); columns are named by [`Reward::name`].

use image::RgbImage;

use crate::judge::JudgeError;

/// The prompt of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RewardPrompt {
    /// Identity of the prompt in its set: what answer keys are looked up by.
    pub key: String,
    /// Text.
    pub text: String,
    /// Index of the group of images that compete with each other.
    pub group: usize,
}

/// Why a batch has no rewards. One image that cannot be scored fails the batch: the released code would set the
/// whole column to 0 and train on.
#[derive(Debug, thiserror::Error)]
pub enum RewardError {
    /// The answer key lacks a prompt.
    #[error("reward `{reward}` has no answer key for prompt `{key}`")]
    NoExpectation {
        /// Reward.
        reward: &'static str,
        /// Prompt's key.
        key: String,
    },
    /// Prompts and images do not pair up.
    #[error("{prompts} prompts came with {images} images")]
    Unpaired {
        /// Prompts.
        prompts: usize,
        /// Images.
        images: usize,
    },
    /// The judge behind the reward failed.
    #[error("reward `{reward}`")]
    Judge {
        /// Reward.
        reward: &'static str,
        /// Cause.
        source: JudgeError,
    },
}

/// A reward.
pub trait Reward: Send + Sync {
    /// Returns the name of its column.
    fn name(&self) -> &'static str;

    /// Returns one number for each image; `prompts[i]` is that of `images[i]`.
    ///
    /// # Errors
    /// When an image cannot be scored.
    fn score(&self, prompts: &[RewardPrompt], images: &[RgbImage]) -> Result<Vec<f32>, RewardError>;
}

/// Checks that there is one prompt for each image.
///
/// # Errors
/// When there is not.
pub fn check_paired(prompts: &[RewardPrompt], images: &[RgbImage]) -> Result<(), RewardError> {
    if prompts.len() == images.len() {
        return Ok(());
    }
    Err(RewardError::Unpaired { prompts: prompts.len(), images: images.len() })
}

/// Returns the share of comparisons each of `count` images won, given who won each pair `i < j`: `Some(true)` for
/// the first, `Some(false)` for the second, nothing for a draw or an unread answer. Rounded to 3 decimals; an image
/// that was compared with none gets 0.5 (docs/spec/rewards.md section 3).
pub fn win_rates(count: usize, mut is_first_better: impl FnMut(usize, usize) -> Option<bool>) -> Vec<f32> {
    if count < 2 {
        return vec![0.5; count];
    }
    let mut wins = vec![0.0; count];
    for i in 0..count {
        for j in i + 1..count {
            let first = is_first_better(i, j).map_or(0.5, |is_first| if is_first { 1.0 } else { 0.0 });
            wins[i] += first;
            wins[j] += 1.0 - first;
        }
    }
    wins.into_iter().map(|wins: f64| ((wins / (count - 1) as f64 * 1000.0).round() / 1000.0) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/spec/rewards.md section 8.
    #[test]
    fn the_documented_win_rates_hold() {
        let answers = |i, j| match (i, j) {
            (0, 1) => Some(true),
            (0, 2) => None,
            _ => Some(false),
        };
        assert_eq!(win_rates(3, answers), [0.75, 0.0, 0.75]);
        assert_eq!(win_rates(1, answers), [0.5]);
        assert!(win_rates(0, answers).is_empty());
    }

    #[test]
    fn rates_are_rounded_and_average_to_a_half() {
        let rates = win_rates(8, |i, j| Some((i + j) % 3 == 0));
        assert!((rates.iter().sum::<f32>() / 8.0 - 0.5).abs() < 1e-3);
        assert_eq!(win_rates(4, |_, _| Some(true)), [1.0, 0.667, 0.333, 0.0]);
    }
}
