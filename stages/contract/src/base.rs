//! Settings of the stages that make, import and assemble base weights.
//!
//! The paper starts from Qwen2.5-VL-3B and SD3.5-Medium; the shapes world starts from small models of the same
//! architecture, trained by the `base_*` stages.

use serde::{Deserialize, Serialize};

use crate::data::ImageSettings;
use crate::model::{BaseModelConfig, ConditionerConfig, DitConfig, VaeConfig, VlmConfig};
use crate::shapes::ShapesWorld;
use crate::train::{CheckpointSettings, FloatKind, OptimizerSettings};

/// Layout of imported weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum WeightsLayout {
    /// A folder as this project writes it: one safetensors file a part, and `model.json`.
    Deepgen,
    /// The released folders: `vlm/`, `transformer/`, `vae/` in the Hugging Face layouts.
    Diffusers,
}

/// Settings of an `import` stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ImportSettings {
    /// Folder. A path in a file is relative to that file; here, as in every resolved path, to the project's root.
    #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
    pub path: String,
    /// How the folder is laid out.
    pub layout: WeightsLayout,
    /// blake3 over the names and contents of its files (`deepgen-worker hash DIR` prints it); empty accepts any.
    pub blake3: String,
    /// Where the folder can be had; shown when it is missing.
    pub origin: String,
    /// Sizes that the weights must have.
    pub model: BaseModelConfig,
}

/// Settings of a `base_tokenizer` stage: byte-level BPE over the texts of a mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BaseTokenizerSettings {
    /// Tokens, the special ones included; the texts must yield as many.
    pub vocab_size: usize,
}

/// Settings of a `base_vae` stage: phases of reconstruction training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BaseVaeSettings {
    /// Sizes; `shift_factor` and `scaling_factor` are measured at the end and written to `model.json`.
    pub model: VaeConfig,
    /// Optimiser; its learning rate is the first phase's peak and falls linearly in the second half of each phase.
    pub optimizer: OptimizerSettings,
    /// Phases in order.
    pub phases: Vec<VaePhase>,
    /// When to save.
    pub checkpoint: CheckpointSettings,
    /// How images are brought to size.
    pub image: ImageSettings,
}

/// One phase of autoencoder training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VaePhase {
    /// Steps.
    pub steps: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Weight of the KL term, which is a mean over latent elements.
    pub kl: f64,
    /// Weight of the absolute error beside the squared error.
    pub l1: f64,
    /// Trains the decoder alone, on means: latents stay as they are.
    pub decoder_only: bool,
}

/// Settings of a `base_vlm` stage: captioning, question answering and text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BaseVlmSettings {
    /// Sizes.
    pub model: VlmConfig,
    /// Optimiser.
    pub optimizer: OptimizerSettings,
    /// Steps.
    pub steps: u64,
    /// Every this many steps is text alone; 0 never.
    pub text_every: u64,
    /// When to save.
    pub checkpoint: CheckpointSettings,
    /// How images are brought to size.
    pub image: ImageSettings,
}

/// Settings of a `base_dit` stage: flow matching under the base's own text encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BaseDitSettings {
    /// Sizes.
    pub model: DitConfig,
    /// Text encoder that stands for T5 and CLIP.
    pub conditioner: ConditionerConfig,
    /// Optimiser.
    pub optimizer: OptimizerSettings,
    /// Text encoder first, alone: it learns to say what the images of its captions show.
    pub pretrain: ConditionerPretraining,
    /// Steps of flow matching after that.
    pub steps: u64,
    /// Chance that a caption is replaced by the empty text.
    pub caption_dropout: f64,
    /// Shift of the training schedule.
    pub shift: f64,
    /// Steps between evaluations on fixed noise; 0 never.
    pub validate_every: u64,
    /// When to save.
    pub checkpoint: CheckpointSettings,
    /// How images are brought to size.
    pub image: ImageSettings,
}

/// Pre-training of the base's text encoder, which stands for the pre-training of T5 and CLIP: from a caption it predicts
/// what a reader of the shapes world finds in the image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ConditionerPretraining {
    /// Steps; 0 leaves it out.
    pub steps: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// World of the images.
    pub world: ShapesWorld,
}

/// Settings of an `assemble` stage: members are named `vae`, `vlm`, `dit`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct AssembleSettings {
    /// Number format of the written weights.
    pub dtype: FloatKind,
}
