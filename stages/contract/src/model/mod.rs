//! Architecture settings of every part of the model, and the arithmetic that follows from them: element counts,
//! the layers that Stacked Channel Bridging reads, sequence lengths.
//!
//! Knows no tensor. Real sizes and shapes-world sizes are the same types with other numbers (docs/spec/model.md).

mod counts;
mod presets;

pub use counts::ParameterCounts;
pub use presets::Preset;

use serde::{Deserialize, Serialize};

/// Qwen2.5-VL text decoder (docs/spec/model.md section 2.1).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct LanguageConfig {
    /// Tokens in the vocabulary, special tokens included.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads; head size is `hidden_size / num_attention_heads`.
    pub num_attention_heads: usize,
    /// Key and value heads, each shared by a group of query heads.
    pub num_key_value_heads: usize,
    /// Epsilon of RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Rotary channels (pairs) for the temporal, height and width axes; they sum to half the head size.
    pub mrope_section: [usize; 3],
}

/// Qwen2.5-VL vision tower (docs/spec/model.md section 2.8).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width inside the tower.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Image channels.
    pub in_channels: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Frames in a patch; a single image is repeated.
    pub temporal_patch_size: usize,
    /// Patches merged per side into one token.
    pub spatial_merge_size: usize,
    /// Side of an attention window in pixels.
    pub window_size: usize,
    /// Blocks with full attention; the others attend inside windows.
    pub fullatt_block_indexes: Vec<usize>,
    /// Width of the merged tokens: the decoder's hidden size.
    pub out_hidden_size: usize,
    /// Numerator and denominator of the bilinear scale before patching (28/32 in the release).
    pub input_scale: [usize; 2],
}

/// Ids of the Qwen special tokens in the tokenizer at hand.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SpecialTokens {
    /// `<|endoftext|>`: padding.
    pub pad: u32,
    /// `<|vision_start|>`.
    pub vision_start: u32,
    /// `<|vision_end|>`.
    pub vision_end: u32,
    /// `<|image_pad|>`: replaced by a vision token.
    pub image_pad: u32,
    /// `<|video_pad|>`.
    pub video_pad: u32,
}

/// The vision-language model that reads prompts and reference images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VlmConfig {
    /// Text decoder.
    pub language: LanguageConfig,
    /// Vision tower.
    pub vision: VisionConfig,
    /// Special token ids.
    pub tokens: SpecialTokens,
}

/// SD3.5 MMDiT-X (docs/spec/model.md section 4.1).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DitConfig {
    /// Latent side, in latent pixels, at which the position table is anchored (`sample_size`).
    pub sample_size: usize,
    /// Side of a patch in latent pixels.
    pub patch_size: usize,
    /// Latent channels in and out.
    pub in_channels: usize,
    /// Joint blocks.
    pub num_layers: usize,
    /// Heads; width is `num_attention_heads * attention_head_dim`.
    pub num_attention_heads: usize,
    /// Channels of a head.
    pub attention_head_dim: usize,
    /// Width of the text condition.
    pub joint_attention_dim: usize,
    /// Width of the pooled condition.
    pub pooled_projection_dim: usize,
    /// Side of the stored position table in patches.
    pub pos_embed_max_size: usize,
    /// The first this many blocks carry a second, image-only attention.
    pub num_dual_attention_layers: usize,
}

/// SD3 AutoencoderKL (docs/spec/model.md section 5).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VaeConfig {
    /// Image channels.
    pub in_channels: usize,
    /// Latent channels.
    pub latent_channels: usize,
    /// Width of each level; every level but the last halves the side.
    pub block_out_channels: Vec<usize>,
    /// ResNets of an encoder level; decoder levels have one more.
    pub layers_per_block: usize,
    /// Groups of every GroupNorm.
    pub norm_num_groups: usize,
    /// Latents are `(z - shift_factor) * scaling_factor`.
    pub scaling_factor: f64,
    /// See `scaling_factor`.
    pub shift_factor: f64,
}

/// Which decoder states the bridge reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum BridgeLayers {
    /// `num_layers - 1, num_layers - 7, ... > 0`: Stacked Channel Bridging of the release, for 32 to 37 layers.
    Rule,
    /// The last, normalised hidden state only: the paper's "w/o SCB".
    Last,
    /// These entries of the hidden-state tuple (0 = embeddings), in this channel order.
    Listed(Vec<usize>),
}

/// Number of layers stacked by the release's rule; its projector fits no other number.
pub const NUM_STACKED_LAYERS: usize = 6;
/// Distance between stacked layers in the release's rule.
pub const STACKED_LAYER_STEP: usize = 6;

impl BridgeLayers {
    /// Returns the entries of the hidden-state tuple to concatenate, in channel order.
    ///
    /// Entry 0 holds the embeddings, entry `k` the state after `k` layers, entry `num_layers` the normalised last state.
    ///
    /// # Errors
    /// Says what to write instead when the rule does not give six layers or a listed layer does not exist.
    pub fn resolve(&self, num_layers: usize) -> Result<Vec<usize>, String> {
        match self {
            Self::Last => Ok(vec![num_layers]),
            Self::Rule => {
                let layers: Vec<usize> = (1..num_layers).rev().step_by(STACKED_LAYER_STEP).collect();
                if layers.len() == NUM_STACKED_LAYERS {
                    return Ok(layers);
                }
                Err(format!(
                    "the rule (num_layers - 1, step {STACKED_LAYER_STEP}) gives {} layers for a decoder of {num_layers}; \
                     it needs 32 to 37 layers: list six layers instead, as layers = {{ listed = [..] }}",
                    layers.len()
                ))
            }
            Self::Listed(layers) => match layers.iter().find(|&&l| l >= num_layers) {
                Some(l) => Err(format!("layer {l} is not below the decoder's {num_layers} layers")),
                None if layers.is_empty() => Err("the list of layers is empty: write layers = \"last\"".into()),
                None => Ok(layers.clone()),
            },
        }
    }
}

/// How prompts of a batch are padded on the left; padding reaches the bridge (docs/spec/model.md section 2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// To the longest prompt of the batch, as the release does.
    Longest,
    /// To this many tokens (queries not counted), so that a prompt's condition does not depend on its neighbours.
    Fixed(usize),
}

/// Bridge between VLM and DiT: think tokens, projectors, connector (docs/spec/model.md section 3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BridgeConfig {
    /// Decoder states that are stacked.
    pub layers: BridgeLayers,
    /// Learned think tokens appended to the prompt; 0 is the paper's "w/o think tokens".
    pub num_queries: usize,
    /// Width of the connector.
    pub hidden_size: usize,
    /// Width of its feed-forward layer.
    pub intermediate_size: usize,
    /// Its layers.
    pub num_hidden_layers: usize,
    /// Its heads.
    pub num_attention_heads: usize,
    /// Epsilon of its LayerNorms.
    pub layer_norm_eps: f64,
    /// How prompts are padded.
    pub padding: Padding,
    /// Longest prompt in training, in tokens; longer ones lose their beginning.
    pub max_length: usize,
}

/// Where LoRA is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum LoraTargets {
    /// Every decoder projection and the token embedding: the part of the release's `auto` set that can learn.
    Language,
    /// The release's `auto` set: also the vision tower and the language head, where no gradient ever arrives.
    Auto,
}

/// Low-rank adapters on the VLM (docs/spec/model.md section 6).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Where adapters are put.
    pub targets: LoraTargets,
    /// Rank.
    pub rank: usize,
    /// The adapter's output is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Dropout on the adapter's input, linear layers only.
    pub dropout: f64,
}

/// The shapes world's own text encoder, which stands for the T5 and CLIP that SD3.5 was trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ConditionerConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width; equals the DiT's `joint_attention_dim` and `pooled_projection_dim`.
    pub hidden_size: usize,
    /// Pre-LN encoder layers.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Captions are padded on the right, or cut, to this many tokens.
    pub num_tokens: usize,
}

/// The parts that an imported set of base weights holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BaseModelConfig {
    /// Vision-language model.
    pub vlm: VlmConfig,
    /// Diffusion transformer.
    pub dit: DitConfig,
    /// Autoencoder.
    pub vae: VaeConfig,
    /// Shift of the flow-matching schedule (docs/spec/sft.md section 2).
    pub scheduler_shift: f64,
    /// The base's own text encoder; the shapes world alone has one.
    pub conditioner: Option<ConditionerConfig>,
}

/// Everything that weights on disk say of themselves: `model.json` of a weights or checkpoint artifact.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// The base parts.
    pub base: BaseModelConfig,
    /// Present from stage 1 on.
    pub bridge: Option<BridgeConfig>,
    /// Present between stage 2 and the hand-off that merges it.
    pub lora: Option<LoraConfig>,
}
