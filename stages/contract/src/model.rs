//! Architecture settings of every part of the model, and the arithmetic that follows from them: element counts,
//! the layers that Stacked Channel Bridging reads, sequence lengths.
//!
//! Knows no tensor. Real sizes and shapes-world sizes are the same types with other numbers (docs/spec/model.md).

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

/// Elements of each part of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ParameterCounts {
    /// Text decoder with its tied embedding.
    pub language: u64,
    /// Vision tower and merger.
    pub vision: u64,
    /// Diffusion transformer, without its position table.
    pub dit: u64,
    /// The DiT's stored position table, which is not trained.
    pub dit_position_table: u64,
    /// Autoencoder.
    pub vae: u64,
    /// Connector, projectors and think tokens.
    pub bridge: u64,
    /// Adapters.
    pub lora: u64,
    /// The base's own text encoder.
    pub conditioner: u64,
}

fn linear(inputs: usize, outputs: usize) -> u64 {
    (inputs * outputs + outputs) as u64
}

fn matrix(inputs: usize, outputs: usize) -> u64 {
    (inputs * outputs) as u64
}

impl LanguageConfig {
    /// Returns the channels of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Returns the inputs and outputs of a decoder layer's projections, in the order q, k, v, o, gate, up, down.
    pub fn projections(&self) -> [(usize, usize); 7] {
        let (h, kv, m) = (self.hidden_size, self.num_key_value_heads * self.head_dim(), self.intermediate_size);
        [(h, h), (h, kv), (h, kv), (h, h), (h, m), (h, m), (m, h)]
    }

    /// Returns the number of elements, the tied language head counted once.
    pub fn num_elements(&self) -> u64 {
        let projections: u64 = self.projections().iter().map(|&(i, o)| matrix(i, o)).sum();
        let biases = (self.hidden_size + 2 * self.num_key_value_heads * self.head_dim()) as u64;
        let layer = projections + biases + 2 * self.hidden_size as u64;
        layer * self.num_hidden_layers as u64 + matrix(self.vocab_size, self.hidden_size) + self.hidden_size as u64
    }
}

impl VisionConfig {
    /// Returns the number of elements of the tower and its merger.
    pub fn num_elements(&self) -> u64 {
        let (h, m) = (self.hidden_size, self.intermediate_size);
        let patch = self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size;
        let block = 2 * h as u64 + linear(h, 3 * h) + linear(h, h) + 2 * linear(h, m) + linear(m, h);
        let merged = h * self.spatial_merge_size * self.spatial_merge_size;
        let merger = h as u64 + linear(merged, merged) + linear(merged, self.out_hidden_size);
        matrix(patch, h) + block * self.depth as u64 + merger
    }

    /// Returns the vision tokens of an image of `height` x `width` pixels (before `input_scale`).
    pub fn num_tokens(&self, height: usize, width: usize) -> usize {
        let side = |pixels: usize| {
            pixels * self.input_scale[0] / self.input_scale[1] / (self.patch_size * self.spatial_merge_size)
        };
        side(height) * side(width)
    }
}

impl DitConfig {
    /// Returns the width of the residual stream.
    pub fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Returns the number of elements, the position table left out.
    pub fn num_elements(&self) -> u64 {
        let d = self.width();
        let patch = self.in_channels * self.patch_size * self.patch_size;
        let embed = linear(patch, d)
            + linear(256, d)
            + linear(d, d)
            + linear(self.pooled_projection_dim, d)
            + linear(d, d)
            + linear(self.joint_attention_dim, d);
        let feed_forward = linear(d, 4 * d) + linear(4 * d, d);
        let head = self.attention_head_dim as u64;
        let mut blocks = 0;
        for i in 0..self.num_layers {
            let is_last = i + 1 == self.num_layers;
            let is_dual = i < self.num_dual_attention_layers;
            blocks += linear(d, if is_dual { 9 * d } else { 6 * d }) + linear(d, if is_last { 2 * d } else { 6 * d });
            blocks += 7 * linear(d, d) + 4 * head + feed_forward;
            blocks += if is_last { 0 } else { linear(d, d) + feed_forward };
            blocks += if is_dual { 4 * linear(d, d) + 2 * head } else { 0 };
        }
        embed + blocks + linear(d, 2 * d) + linear(d, patch)
    }

    /// Returns the number of elements of the stored position table.
    pub fn num_position_elements(&self) -> u64 {
        (self.pos_embed_max_size * self.pos_embed_max_size * self.width()) as u64
    }
}

impl VaeConfig {
    /// Returns how many image pixels a latent pixel stands for, per side.
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Returns the number of elements of encoder and decoder.
    pub fn num_elements(&self) -> u64 {
        let conv = |i: usize, o: usize| (i * o * 9 + o) as u64;
        let norm = |c: usize| 2 * c as u64;
        let resnet =
            |i: usize, o: usize| norm(i) + conv(i, o) + norm(o) + conv(o, o) + if i == o { 0 } else { linear(i, o) };
        let widths = &self.block_out_channels;
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let middle = 2 * resnet(last, last) + norm(last) + 4 * linear(last, last);
        let mut encoder = conv(self.in_channels, first);
        let mut input = first;
        for (level, &width) in widths.iter().enumerate() {
            for _ in 0..self.layers_per_block {
                encoder += resnet(input, width);
                input = width;
            }
            encoder += if level + 1 < widths.len() { conv(width, width) } else { 0 };
        }
        encoder += middle + norm(last) + conv(last, 2 * self.latent_channels);
        let mut decoder = conv(self.latent_channels, last) + middle;
        input = last;
        for (level, &width) in widths.iter().rev().enumerate() {
            for _ in 0..=self.layers_per_block {
                decoder += resnet(input, width);
                input = width;
            }
            decoder += if level + 1 < widths.len() { conv(width, width) } else { 0 };
        }
        decoder += norm(first) + conv(first, self.in_channels);
        encoder + decoder
    }
}

impl BridgeConfig {
    /// Returns the number of elements for a VLM of `language` and a DiT of `dit`.
    ///
    /// # Errors
    /// When the layers cannot be resolved (see [`BridgeLayers::resolve`]).
    pub fn num_elements(&self, language: &LanguageConfig, dit: &DitConfig) -> Result<u64, String> {
        let stacked = self.layers.resolve(language.num_hidden_layers)?.len() * language.hidden_size;
        let (h, m) = (self.hidden_size, self.intermediate_size);
        let layer = 4 * linear(h, h) + linear(h, m) + linear(m, h) + 4 * h as u64;
        let projectors = linear(stacked, h) + linear(h, dit.pooled_projection_dim) + linear(h, dit.joint_attention_dim);
        Ok(layer * self.num_hidden_layers as u64 + projectors + matrix(self.num_queries, language.hidden_size))
    }
}

impl LoraConfig {
    /// Returns the number of elements of the adapters on `vlm`.
    pub fn num_elements(&self, vlm: &VlmConfig) -> u64 {
        let language = &vlm.language;
        let pairs = |shapes: &[(usize, usize)]| shapes.iter().map(|&(i, o)| (self.rank * (i + o)) as u64).sum::<u64>();
        let embedding = pairs(&[(language.vocab_size, language.hidden_size)]);
        let decoder = pairs(&language.projections()) * language.num_hidden_layers as u64;
        let vision = &vlm.vision;
        let (h, m) = (vision.hidden_size, vision.intermediate_size);
        let merged = h * vision.spatial_merge_size * vision.spatial_merge_size;
        match self.targets {
            LoraTargets::Language => decoder + embedding,
            LoraTargets::Auto => {
                let block = pairs(&[(h, 3 * h), (h, h), (h, m), (h, m), (m, h)]);
                let merger = pairs(&[(merged, merged), (merged, vision.out_hidden_size)]);
                decoder + 2 * embedding + block * vision.depth as u64 + merger
            }
        }
    }
}

impl ConditionerConfig {
    /// Returns the number of elements: embeddings, positions, encoder layers, final norm.
    pub fn num_elements(&self) -> u64 {
        let h = self.hidden_size;
        let layer = 4 * linear(h, h) + linear(h, 4 * h) + linear(4 * h, h) + 4 * h as u64;
        matrix(self.vocab_size + self.num_tokens, h) + layer * self.num_hidden_layers as u64 + 2 * h as u64
    }
}

impl ModelSpec {
    /// Returns the elements of each part.
    ///
    /// # Errors
    /// When the bridge's layers cannot be resolved.
    pub fn parameter_counts(&self) -> Result<ParameterCounts, String> {
        let BaseModelConfig { vlm, dit, vae, conditioner, .. } = &self.base;
        Ok(ParameterCounts {
            language: vlm.language.num_elements(),
            vision: vlm.vision.num_elements(),
            dit: dit.num_elements(),
            dit_position_table: dit.num_position_elements(),
            vae: vae.num_elements(),
            bridge: match &self.bridge {
                Some(bridge) => bridge.num_elements(&vlm.language, dit)?,
                None => 0,
            },
            lora: self.lora.as_ref().map_or(0, |lora| lora.num_elements(vlm)),
            conditioner: conditioner.as_ref().map_or(0, ConditionerConfig::num_elements),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes of the release: docs/spec/model.md sections 1, 2.1, 2.8, 4.1 and 5.
    pub(crate) fn paper() -> ModelSpec {
        ModelSpec {
            base: BaseModelConfig {
                vlm: VlmConfig {
                    language: LanguageConfig {
                        vocab_size: 151_936,
                        hidden_size: 2048,
                        intermediate_size: 11_008,
                        num_hidden_layers: 36,
                        num_attention_heads: 16,
                        num_key_value_heads: 2,
                        rms_norm_eps: 1e-6,
                        rope_theta: 1e6,
                        mrope_section: [16, 24, 24],
                    },
                    vision: VisionConfig {
                        depth: 32,
                        hidden_size: 1280,
                        intermediate_size: 3420,
                        num_heads: 16,
                        in_channels: 3,
                        patch_size: 14,
                        temporal_patch_size: 2,
                        spatial_merge_size: 2,
                        window_size: 112,
                        fullatt_block_indexes: vec![7, 15, 23, 31],
                        out_hidden_size: 2048,
                        input_scale: [28, 32],
                    },
                    tokens: SpecialTokens {
                        pad: 151_643,
                        vision_start: 151_652,
                        vision_end: 151_653,
                        image_pad: 151_655,
                        video_pad: 151_656,
                    },
                },
                dit: DitConfig {
                    sample_size: 128,
                    patch_size: 2,
                    in_channels: 16,
                    num_layers: 24,
                    num_attention_heads: 24,
                    attention_head_dim: 64,
                    joint_attention_dim: 4096,
                    pooled_projection_dim: 2048,
                    pos_embed_max_size: 384,
                    num_dual_attention_layers: 13,
                },
                vae: VaeConfig {
                    in_channels: 3,
                    latent_channels: 16,
                    block_out_channels: vec![128, 256, 512, 512],
                    layers_per_block: 2,
                    norm_num_groups: 32,
                    scaling_factor: 1.5305,
                    shift_factor: 0.0609,
                },
                scheduler_shift: 3.0,
                conditioner: None,
            },
            bridge: Some(BridgeConfig {
                layers: BridgeLayers::Rule,
                num_queries: 128,
                hidden_size: 2048,
                intermediate_size: 11_946,
                num_hidden_layers: 6,
                num_attention_heads: 32,
                layer_norm_eps: 1e-6,
                padding: Padding::Longest,
                max_length: 1024,
            }),
            lora: Some(LoraConfig { targets: LoraTargets::Auto, rank: 64, alpha: 128.0, dropout: 0.05 }),
        }
    }

    #[test]
    fn the_paper_sizes_give_the_released_element_counts() {
        let counts = paper().parameter_counts().unwrap();
        // docs/spec/model.md section 7.
        assert_eq!(counts.language, 3_085_938_688);
        assert_eq!(counts.vision, 668_684_288);
        assert_eq!(counts.dit, 2_243_171_520);
        assert_eq!(counts.dit + counts.dit_position_table, 2_469_663_936);
        assert_eq!(counts.vae, 83_819_683);
        assert_eq!(counts.bridge, 432_449_532);
        assert_eq!(counts.lora, 185_163_776);
    }

    #[test]
    fn without_scb_the_bridge_is_the_released_last_layer_variant() {
        let mut spec = paper();
        spec.bridge.as_mut().unwrap().layers = BridgeLayers::Last;
        assert_eq!(spec.parameter_counts().unwrap().bridge, 411_478_012);
    }

    #[test]
    fn the_rule_stacks_six_layers_from_the_last_but_one_down() {
        assert_eq!(BridgeLayers::Rule.resolve(36).unwrap(), [35, 29, 23, 17, 11, 5]);
        for depth in 32..=37 {
            assert_eq!(BridgeLayers::Rule.resolve(depth).unwrap().len(), 6);
        }
        assert!(BridgeLayers::Rule.resolve(31).unwrap_err().contains("listed"));
        assert!(BridgeLayers::Listed(vec![7]).resolve(7).is_err());
    }

    #[test]
    fn a_512_image_gives_256_vision_tokens() {
        assert_eq!(paper().base.vlm.vision.num_tokens(512, 512), 256);
        assert_eq!(paper().base.vlm.vision.num_tokens(448, 608), 266);
    }
}
