//! The arithmetic that follows from the sizes: element and tensor counts, widths, sequence lengths.
//!
//! Nothing here allocates a tensor; the model crate's tests hold the modules to these numbers.

use serde::{Deserialize, Serialize};

use super::{
    BaseModelConfig, BridgeConfig, ConditionerConfig, DitConfig, LanguageConfig, LoraConfig, LoraTargets, ModelSpec,
    VaeConfig, VisionConfig, VlmConfig,
};

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
    use crate::model::{BridgeLayers, Preset};

    #[test]
    fn the_paper_sizes_give_the_released_element_counts() {
        let counts = Preset::Deepgen5b.spec().parameter_counts().unwrap();
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
        let mut spec = Preset::Deepgen5b.spec();
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
        assert_eq!(Preset::Deepgen5b.spec().base.vlm.vision.num_tokens(512, 512), 256);
        assert_eq!(Preset::Deepgen5b.spec().base.vlm.vision.num_tokens(448, 608), 266);
    }
}
