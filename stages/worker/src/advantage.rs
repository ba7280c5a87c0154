//! Advantages of a rollout from its rewards: plain arithmetic over f32 tables (docs/spec/rl.md section 6).
//!
//! Knows no image and no model. Images are in group-major order: `group_size` consecutive images share a prompt.

use deepgen_contract::rl::AdvantageKind;

/// Added to every standard deviation before dividing.
const EPS: f32 = 1e-4;

/// Rewards of a rollout.
pub struct RewardTable {
    /// One row per image, one column per reward.
    pub rewards: Vec<Vec<f32>>,
    /// Weights of the columns, a row per image: those of its prompt.
    pub weights: Vec<Vec<f32>>,
    /// Images per prompt.
    pub group_size: usize,
}

impl RewardTable {
    /// Returns the weighted sum of an image's rewards.
    pub fn total(&self, image: usize) -> f32 {
        self.rewards[image].iter().zip(&self.weights[image]).map(|(reward, weight)| reward * weight).sum()
    }

    /// Returns the share of groups whose rewards of `column` do not differ: they teach nothing.
    pub fn constant_groups(&self, column: usize) -> f32 {
        let groups = self.rewards.chunks(self.group_size);
        let num_groups = groups.len();
        let constant = groups.filter(|group| group.iter().all(|row| row[column] == group[0][column])).count();
        constant as f32 / num_groups.max(1) as f32
    }

    /// Returns an advantage per image, clamped to plus or minus `clip`.
    pub fn advantages(&self, kind: AdvantageKind, clip: f32) -> Vec<f32> {
        let totals: Vec<f32> = (0..self.rewards.len()).map(|image| self.total(image)).collect();
        let advantages = match kind {
            AdvantageKind::Gdpo => standardize(&self.combined_scores(), &Moments::of(&self.combined_scores())),
            AdvantageKind::Grpo => self.per_group(&totals, standardize),
            AdvantageKind::GrpoGlobalStd => {
                let std = Moments::of(&totals).std;
                self.per_group(&totals, |group, moments| standardize(group, &Moments { mean: moments.mean, std }))
            }
            AdvantageKind::Reinforcepp => standardize(&totals, &Moments::of(&totals)),
        };
        advantages.into_iter().map(|advantage| advantage.clamp(-clip, clip)).collect()
    }

    /// Returns the weighted sum of every reward's scores within its group; a column of weight zero is scored all the same.
    fn combined_scores(&self) -> Vec<f32> {
        let num_columns = self.rewards.first().map_or(0, Vec::len);
        let mut combined = vec![0.0; self.rewards.len()];
        for column in 0..num_columns {
            let values: Vec<f32> = self.rewards.iter().map(|row| row[column]).collect();
            let scores = self.per_group(&values, standardize);
            for ((sum, score), weights) in combined.iter_mut().zip(scores).zip(&self.weights) {
                *sum += weights[column] * score;
            }
        }
        combined
    }

    fn per_group(&self, values: &[f32], f: impl Fn(&[f32], &Moments) -> Vec<f32>) -> Vec<f32> {
        values.chunks(self.group_size).flat_map(|group| f(group, &Moments::of(group))).collect()
    }
}

/// Mean and unbiased standard deviation.
struct Moments {
    mean: f32,
    std: f32,
}

impl Moments {
    fn of(values: &[f32]) -> Self {
        let count = values.len() as f32;
        let mean = values.iter().sum::<f32>() / count.max(1.0);
        // A constant group has exactly zero spread, whatever rounding its mean suffered.
        if values.iter().all(|value| *value == values[0]) {
            return Self { mean: values.first().copied().unwrap_or(0.0), std: 0.0 };
        }
        let squares: f32 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Self { mean, std: (squares / (count - 1.0).max(1.0)).sqrt() }
    }
}

fn standardize(values: &[f32], moments: &Moments) -> Vec<f32> {
    values.iter().map(|value| (value - moments.mean) / (moments.std + EPS)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rewards: &[f32], group_size: usize) -> RewardTable {
        let rewards: Vec<Vec<f32>> = rewards.iter().map(|&reward| vec![reward]).collect();
        let weights = vec![vec![1.0]; rewards.len()];
        RewardTable { rewards, weights, group_size }
    }

    #[test]
    fn gdpo_scores_equal_the_documented_vector() {
        // docs/spec/rl.md section 15; tolerance: its six decimals.
        let scores = table(&[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 8).combined_scores();
        assert!((scores[0] + 2.474_174).abs() < 1e-5, "{scores:?}");
        assert!((scores[1] - 0.353_454).abs() < 1e-5, "{scores:?}");
    }

    #[test]
    fn a_constant_group_has_advantage_zero() {
        for kind in [AdvantageKind::Gdpo, AdvantageKind::Grpo] {
            assert!(table(&[0.3; 8], 4).advantages(kind, 5.0).iter().all(|&advantage| advantage == 0.0));
        }
    }

    #[test]
    fn each_reward_is_scaled_within_its_group_before_the_sum() {
        // The second reward is a hundred times the first; after normalisation only the weights decide.
        let rewards = vec![vec![0.0, 100.0], vec![1.0, 0.0], vec![0.0, 0.0], vec![1.0, 100.0]];
        let table = RewardTable { rewards, weights: vec![vec![1.0, 1.0]; 4], group_size: 4 };
        let advantages = table.advantages(AdvantageKind::Gdpo, 5.0);
        assert!((advantages[0] - advantages[1]).abs() < 1e-2, "{advantages:?}");
        assert!(advantages[3] > advantages[0] && advantages[0] > advantages[2]);
        let naive = table.advantages(AdvantageKind::Grpo, 5.0);
        assert!(naive[0] > naive[1] + 1.0, "{naive:?}");
    }

    #[test]
    fn the_global_std_mode_keeps_the_spread_between_groups() {
        let advantages = table(&[0.0, 1.0, 10.0, 30.0], 2).advantages(AdvantageKind::GrpoGlobalStd, 5.0);
        assert!(advantages[3] > 10.0 * advantages[1]);
    }

    #[test]
    fn advantages_are_clamped() {
        let mut rewards = vec![0.0; 64];
        rewards[0] = 1.0;
        assert_eq!(table(&rewards, 64).advantages(AdvantageKind::Reinforcepp, 5.0)[0], 5.0);
    }

    #[test]
    fn constant_groups_are_counted() {
        assert_eq!(table(&[1.0, 1.0, 0.0, 1.0], 2).constant_groups(0), 0.5);
    }
}
