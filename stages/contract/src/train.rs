//! Settings of the training stages 1 and 2 and of the checkpoint hand-off (docs/spec/sft.md sections 1 to 3 and 9).
//!
//! Stages 1 and 2 are one kind with other values. Defaults live in `stages/pretrain.toml` and `stages/sft.toml`.

use serde::{Deserialize, Serialize};

use crate::data::ImageSettings;
use crate::model::{BridgeConfig, LoraConfig};
use crate::precision::PrecisionSettings;

/// Settings of a `train` stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TrainSettings {
    /// Parts that training adds to the base model.
    pub model: TrainModel,
    /// Path patterns of the parameters that train, such as `bridge.*`; everything else is frozen.
    pub trainable: Vec<String>,
    /// Optimiser and its schedule.
    pub optimizer: OptimizerSettings,
    /// The loop.
    pub train: LoopSettings,
    /// Regression of the bridge on the base's own text conditions before the first iteration; the paper has none.
    pub warm_start: WarmStartSettings,
    /// Loss on held-out samples.
    pub validation: ValidationSettings,
    /// Images drawn from fixed prompts while it trains; none by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<SampleSettings>,
    /// When to save.
    pub checkpoint: CheckpointSettings,
    /// How images are brought to size.
    pub image: ImageSettings,
    /// Number types.
    #[serde(default)]
    pub precision: PrecisionSettings,
}

/// Parts that training adds to the base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TrainModel {
    /// The bridge: created when the incoming weights hold none, compared with theirs otherwise.
    pub bridge: BridgeConfig,
    /// Adapters on the VLM.
    pub lora: LoraSetting,
}

/// Whether the VLM gets adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LoraSetting {
    /// No adapters: the paper's "w/o activating the VLM" in stage 2.
    None,
    /// Adapters of this shape.
    Adapters {
        /// Their shape.
        config: LoraConfig,
    },
}

impl LoraSetting {
    /// Returns the adapters' shape, if there are any.
    pub fn config(&self) -> Option<&LoraConfig> {
        match self {
            Self::None => None,
            Self::Adapters { config } => Some(config),
        }
    }
}

/// AdamW and the learning rate's course.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct OptimizerSettings {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of parameters with two or more dimensions; the others have none.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 turns clipping off.
    pub clip_norm: f64,
    /// The learning rate's course.
    pub schedule: Schedule,
}

/// The learning rate's course over micro-iterations (docs/spec/sft.md section 3, docs/spec/rl.md section 9).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Linear from `1e-5` of the peak over a share of all iterations, then a half cosine to zero.
    WarmupCosine {
        /// Share of the iterations that warms up.
        warmup_ratio: f64,
    },
    /// Linear over the first steps, then constant, then linear to 2 % over a share of all steps.
    WarmupDecay {
        /// Steps that warm up.
        warmup_steps: u64,
        /// Share of the steps that decays.
        decay_share: f64,
    },
    /// Linear over the first steps, then a half cosine to zero: the usual schedule of the Hugging Face libraries.
    HalfCosine {
        /// Steps that warm up.
        warmup_steps: u64,
        /// The first step has rate zero (`k / steps`); else `1 / steps` of the peak.
        starts_at_zero: bool,
    },
    /// `k / steps` of the peak for the first updates, then constant.
    WarmupConstant {
        /// Updates that warm up.
        warmup_steps: u64,
    },
}

/// Numbers as sigma, the noise level, is stored before blending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum FloatKind {
    /// 16 bits, 8 of exponent.
    Bf16,
    /// 32 bits.
    F32,
}

/// What to do about a loss or gradient that is NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OnNonFinite {
    /// End the node before the update; the last checkpoint stays.
    Stop,
    /// Leave the update out and go on.
    Skip,
    /// Go back to the newest checkpoint and on from there without the update that failed.
    Rollback,
}

/// The training loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct LoopSettings {
    /// Micro-iterations: batches, not updates.
    pub max_iters: u64,
    /// Micro-iterations per update.
    pub accumulation: u64,
    /// Chance that a text-to-image caption is replaced by the empty text; edits never lose theirs.
    pub caption_dropout: f64,
    /// Rounding of sigma before blending: `bf16` in the release.
    pub sigma_dtype: FloatKind,
    /// What to do about a non-finite loss or gradient.
    pub on_non_finite: OnNonFinite,
    /// Micro-iterations between metric lines.
    pub log_every: u64,
    /// Batches prepared ahead.
    pub prefetch: usize,
    /// A moving average of what trains, kept beside it; none in the release. `handoff` says which of the two goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaSettings>,
    /// Keep the weights of the validation with the lowest loss, the mean over tasks, beside the last ones for a `handoff` that
    /// asks for them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_best: bool,
    /// Keep a block's inputs only and run it again on the way back: less memory for a third more time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub activation_checkpointing: bool,
}

/// An exponential moving average of the weights (docs/spec/rl.md section 9).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct EmaSettings {
    /// Largest decay: the share of the old average that an update keeps. It begins small and grows.
    pub decay: f64,
    /// Updates of the optimiser between updates of the average.
    pub interval: u64,
}

/// Regression of the bridge on the conditions that the base's own text encoder gives (shapes world only).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct WarmStartSettings {
    /// Iterations, with as many to an update as in the training that follows; 0 turns it off, as in the paper.
    pub iters: u64,
    /// Peak learning rate; it falls linearly over most of the iterations.
    pub lr: f64,
    /// The encoder reads a literal description of the image in place of a caption that fully determines it: the base
    /// was trained on such, and knows no relation and no riddle.
    pub literal: bool,
}

/// Loss on fixed held-out samples with fixed noise at fixed noise levels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ValidationSettings {
    /// Micro-iterations between validations; 0 turns them off.
    pub every: u64,
    /// Samples of each task, taken from the end of each source and never trained on.
    pub num_samples: usize,
    /// Noise levels, in 0..=1.
    pub sigmas: Vec<f64>,
}

/// Images drawn from fixed prompts with fixed noise while a model trains: the same pictures at every step but for what it has
/// learned. They are as large as a square of `image.size`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SampleSettings {
    /// Micro-iterations between drawings, of which one follows the last; 0 turns them off.
    pub every: u64,
    /// What is drawn, an image of each.
    pub prompts: Vec<String>,
    /// Seed of the noise that images begin as: no other number of the training depends on it.
    pub seed: u64,
    /// Denoising steps of an image.
    pub steps: usize,
    /// Guidance scale; at most 1 is a single pass without guidance.
    pub guidance: f64,
}

/// When training state is saved and how much of it is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CheckpointSettings {
    /// Steps between checkpoints.
    pub every: u64,
    /// Newest checkpoints kept.
    pub keep: usize,
    /// Bytes that all of them together may take; the newest is kept in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
}

/// Settings of a `handoff` stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct HandoffSettings {
    /// What becomes of adapters.
    pub lora: LoraHandoff,
    /// Number format of the written weights.
    pub dtype: FloatKind,
    /// Which weights of the checkpoint go on.
    #[serde(default, skip_serializing_if = "TrainedSource::is_last")]
    pub from: TrainedSource,
}

/// Which weights of a checkpoint are handed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum TrainedSource {
    /// Those after the last update.
    #[default]
    Last,
    /// Their moving average, which the training must have kept (`train.ema`).
    Ema,
    /// Those of the best look at held-out data, which the training must have kept (`train.keep_best`, `policy.keep_best`).
    Best,
}

impl TrainedSource {
    fn is_last(&self) -> bool {
        *self == Self::Last
    }
}

/// What becomes of adapters at a hand-off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum LoraHandoff {
    /// Added into the weights they adapt.
    Merge,
    /// Carried beside them.
    Carry,
}
