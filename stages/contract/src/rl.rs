//! Settings of MR-GRPO, stage 3 (docs/spec/rl.md). Defaults live in `stages/mrgrpo.toml`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::data::ImageSettings;
use crate::eval::JudgeSettings;
use crate::precision::PrecisionSettings;
use crate::settings::ExternalPath;
use crate::shapes::ShapesWorld;
use crate::train::{CheckpointSettings, FloatKind, OnNonFinite, OptimizerSettings};

/// Settings of an `rl` stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RlSettings {
    /// Path patterns of the parameters that train: the whole DiT in the release.
    pub trainable: Vec<String>,
    /// Optimiser and its schedule.
    pub optimizer: OptimizerSettings,
    /// How images are drawn.
    pub rollout: RolloutSettings,
    /// Rewards by the names that the prompt sets weigh them under.
    pub rewards: BTreeMap<String, RewardSettings>,
    /// How the policy is updated.
    pub policy: PolicySettings,
    /// The auxiliary flow-matching loss.
    pub sft: AuxiliarySettings,
    /// Reward on fixed prompts that are never trained on.
    pub evaluation: RewardEvaluation,
    /// When to save.
    pub checkpoint: CheckpointSettings,
    /// How images of the auxiliary loss are brought to size.
    pub image: ImageSettings,
    /// Number types.
    #[serde(default)]
    pub precision: PrecisionSettings,
}

/// A reward (docs/spec/rewards.md sections 3 to 5).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RewardSettings {
    /// How much of the text in double quotes the image renders, read in the shapes world: `ocr`.
    ShapesText {
        /// World of the images.
        #[serde(default)]
        world: ShapesWorld,
    },
    /// How much of the prompt the image obeys, graded: the shapes world's `clip_sim`.
    ShapesObjects {
        /// World of the images.
        #[serde(default)]
        world: ShapesWorld,
    },
    /// Share of the comparisons within its group that an image wins, by rule: the shapes world's `unifiedreward_think`.
    ShapesPairwise {
        /// World of the images.
        #[serde(default)]
        world: ShapesWorld,
    },
    /// Share of the comparisons within its group that an image wins, by a chat server: `unifiedreward_think`.
    Pairwise {
        /// Server.
        judge: JudgeSettings,
    },
    /// Size as JPEG, the smaller the better.
    JpegCompressibility,
    /// A model that this version does not run, such as CLIP ViT-L/14 or PaddleOCR.
    External {
        /// Folder of its weights, relative to the project's root.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        path: String,
        /// Where it can be had.
        origin: String,
    },
}

/// Transition of the sampling process (docs/spec/rl.md section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum SdeKind {
    /// Coefficient-preserving sampling: the release's default.
    CpsSde,
    /// Flow-GRPO.
    FlowgrpoSde,
    /// DanceGRPO.
    DanceSde,
}

/// How images are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RolloutSettings {
    /// Prompts per iteration.
    pub prompts: usize,
    /// Images per prompt: the group.
    pub group_size: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale; 0 is a single conditional pass.
    pub guidance: f64,
    /// Transition.
    pub sde: SdeKind,
    /// Strength of the noise.
    pub eta: f64,
    /// One initial noise per prompt, shared by its group.
    pub same_noise: bool,
    /// Image height in pixels.
    pub height: usize,
    /// Image width in pixels.
    pub width: usize,
}

/// How advantages are normalised (docs/spec/rl.md section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum AdvantageKind {
    /// Each reward within its group, weighted sum, then over the batch: the release's default.
    Gdpo,
    /// The weighted total within its group.
    Grpo,
    /// The weighted total, centred in its group, scaled over the batch.
    GrpoGlobalStd,
    /// The weighted total over the batch.
    Reinforcepp,
}

/// What the KL penalty compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum KlKind {
    /// Velocities.
    Velocity,
    /// Means of the transition.
    Mean,
}

/// When the optimiser steps (docs/spec/rl.md section 9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum UpdateGranularity {
    /// After every backward pass: what the released stack does.
    PerBackward,
    /// Once an iteration, over the sum of all its gradients.
    PerIteration,
}

/// How the policy is updated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PolicySettings {
    /// Iterations: a rollout and its updates each.
    pub iterations: u64,
    /// Share of the denoising steps that is trained on.
    pub timestep_fraction: f64,
    /// Advantage normalisation.
    pub advantage: AdvantageKind,
    /// Advantages are clamped to plus or minus this.
    pub advantage_clip: f64,
    /// The ratio is clipped to 1 plus or minus this.
    pub clip_range: f64,
    /// Weight of the KL penalty; 0 turns it off.
    pub beta: f64,
    /// What the KL penalty compares.
    pub kl: KlKind,
    /// Rounding of the recorded log-probability: `bf16` in the release, where it swamps the clip range.
    pub old_logp_dtype: FloatKind,
    /// When the optimiser steps.
    pub update_granularity: UpdateGranularity,
    /// What to do about a non-finite loss or gradient.
    pub on_non_finite: OnNonFinite,
    /// Keep the weights of the evaluation with the highest total reward beside the last ones for a `handoff` that asks for them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_best: bool,
    /// Keep a block's inputs only and run it again on the way back: less memory for a third more time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub activation_checkpointing: bool,
}

/// The auxiliary flow-matching loss (docs/spec/rl.md section 10).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct AuxiliarySettings {
    /// Convex weight: the policy's losses get `1 - coef`; 0 turns it off.
    pub coef: f64,
    /// Iterations between auxiliary batches.
    pub every: u64,
    /// Samples in a batch.
    pub batch: usize,
    /// Chance that a caption is replaced by the empty text.
    pub caption_dropout: f64,
    /// Rounding of sigma before blending.
    pub sigma_dtype: FloatKind,
}

/// Reward on fixed prompts that are never trained on, sampled without transition noise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RewardEvaluation {
    /// Iterations between evaluations; 0 turns them off. One precedes the first iteration.
    pub every: u64,
    /// Prompts of each set, taken from its end and never trained on.
    pub num_prompts: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
}

impl RlSettings {
    /// Returns the files and folders outside the artifact store that rewards read.
    pub fn external_paths(&self) -> Vec<ExternalPath> {
        let external = self.rewards.iter().filter_map(|(name, reward)| match reward {
            RewardSettings::External { path, origin } => Some(ExternalPath {
                key: format!("rewards.{name}.path"),
                path: path.clone(),
                remedy: format!(
                    "get it from {origin}; this version cannot run it yet: give `{name}` the weight 0 in the prompt sets, \
                     or another kind"
                ),
            }),
            _ => None,
        });
        external.collect()
    }
}
