//! The rewards of a stage-3 job, by the names that its prompt sets weigh them under.
//!
//! Knows settings and the judge crate's rewards, not what is done with the numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use deepgen_contract::rl::RewardSettings;
use deepgen_contract::shapes::ShapesWorld;
use deepgen_data::shapes::expectation_of;
use deepgen_judge::reading::Reader;
use deepgen_judge::reward::{Reward, RewardPrompt};
use deepgen_judge::rewards::{
    AnswerKey, ChatComparator, JpegCompressibility, ObjectsReward, OcrReward, PairwiseReward, RuleComparator,
};
use deepgen_judge::scoring;
use image::RgbImage;

use crate::advantage::RewardTable;
use crate::error::{JobError, JobResult, OrFail};

/// Reward columns in order of their names.
pub struct Rewards {
    columns: Vec<Column>,
}

struct Column {
    name: String,
    reward: Box<dyn Reward>,
    /// True when an image is compared with those of its group: a single image has no such reward.
    is_relative: bool,
}

/// A prompt with the weights of its set.
#[derive(Debug, Clone)]
pub struct WeightedPrompt {
    /// Text.
    pub text: String,
    /// Name of its set in the mixture.
    pub set: String,
    /// Weights of rewards by name; a reward that is not listed weighs nothing.
    pub weights: BTreeMap<String, f64>,
}

impl Rewards {
    /// Builds the rewards that `wanted` names.
    ///
    /// # Errors
    /// When a name has no settings, or its reward cannot run here.
    pub fn new(settings: &BTreeMap<String, RewardSettings>, wanted: &BTreeSet<String>) -> JobResult<Self> {
        if wanted.is_empty() {
            return Err(JobError::input("no prompt set weighs a reward: set `members.<name>.rewards` of the mixture"));
        }
        let columns = wanted.iter().map(|name| {
            let reward = settings.get(name).ok_or_else(|| {
                let known = settings.keys().cloned().collect::<Vec<_>>().join(", ");
                JobError::input(format!("the prompts weigh the reward `{name}`, but `rewards` has only {known}"))
            })?;
            let is_relative = matches!(reward, RewardSettings::Pairwise { .. } | RewardSettings::ShapesPairwise { .. });
            Ok(Column { name: name.clone(), reward: build(name, reward)?, is_relative })
        });
        Ok(Self { columns: columns.collect::<JobResult<_>>()? })
    }

    /// Returns the names of the columns.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|column| column.name.as_str())
    }

    /// Returns names and indices of the columns that mean something for groups of `group_size`.
    pub fn meaningful(&self, group_size: usize) -> impl Iterator<Item = (usize, &str)> {
        let columns = self.columns.iter().enumerate().filter(move |(_, column)| group_size > 1 || !column.is_relative);
        columns.map(|(index, column)| (index, column.name.as_str()))
    }

    /// Scores images, `group_size` for each prompt, by every reward whatever its weight (docs/spec/rl.md section 6).
    ///
    /// # Errors
    /// When a judge fails.
    pub fn score(&self, prompts: &[WeightedPrompt], images: &[RgbImage], group_size: usize) -> JobResult<RewardTable> {
        let per_image: Vec<RewardPrompt> = prompts
            .iter()
            .enumerate()
            .flat_map(|(group, prompt)| {
                // The answer key reads the prompt itself.
                let one = RewardPrompt { key: prompt.text.clone(), text: prompt.text.clone(), group };
                std::iter::repeat_n(one, group_size)
            })
            .collect();
        let mut rewards = vec![Vec::new(); images.len()];
        for Column { name, reward, .. } in &self.columns {
            let column = reward.score(&per_image, images).or_input(|| format!("reward `{name}`"))?;
            for (row, value) in rewards.iter_mut().zip(column) {
                row.push(value);
            }
        }
        let weights = prompts.iter().flat_map(|prompt| {
            let row: Vec<f32> =
                self.names().map(|name| prompt.weights.get(name).copied().unwrap_or(0.0) as f32).collect();
            std::iter::repeat_n(row, group_size)
        });
        Ok(RewardTable { rewards, weights: weights.collect(), group_size })
    }
}

fn build(name: &str, settings: &RewardSettings) -> JobResult<Box<dyn Reward>> {
    let reader = |world: &ShapesWorld| Reader::new(world).map_err(JobError::input);
    Ok(match settings {
        RewardSettings::ShapesText { world } => Box::new(OcrReward::new(reader(world)?)),
        RewardSettings::ShapesObjects { world } => Box::new(ObjectsReward::new(reader(world)?, answer_key(world))),
        RewardSettings::ShapesPairwise { world } => {
            Box::new(PairwiseReward::new(RuleComparator::new(reader(world)?, answer_key(world))))
        }
        RewardSettings::Pairwise { judge } => {
            let judge = scoring::judge(judge).map_err(JobError::input)?;
            let judge = judge.ok_or_else(|| JobError::input(format!("`rewards.{name}.judge` must be `http`")))?;
            Box::new(PairwiseReward::new(ChatComparator::new(judge)))
        }
        RewardSettings::JpegCompressibility => Box::new(JpegCompressibility),
        RewardSettings::External { path, origin } => {
            return Err(JobError::input(format!(
                "reward `{name}` needs {path} ({origin}), which this version cannot run: give it the weight 0 in the \
                 prompt sets, or another kind in `rewards.{name}`"
            )));
        }
    })
}

fn answer_key(world: &ShapesWorld) -> AnswerKey {
    let world = world.clone();
    Arc::new(move |prompt: &str| expectation_of(prompt, &world))
}
