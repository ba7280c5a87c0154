//! Named sizes: the released models, as settings.
//!
//! docs/spec/model.md sections 1, 2.1, 2.8, 4.1, 5 and 6. A pipeline writes the same numbers into `stages/import.toml`;
//! a test holds the two equal.

use serde::{Deserialize, Serialize};

use super::{
    BaseModelConfig, BridgeConfig, BridgeLayers, DitConfig, LanguageConfig, LoraConfig, LoraTargets, ModelSpec,
    Padding, SpecialTokens, VaeConfig, VisionConfig, VlmConfig,
};

/// A released model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Preset {
    /// The vision-language model alone: Qwen2.5-VL-3B-Instruct.
    #[serde(rename = "qwen2.5-vl-3b")]
    Qwen25Vl3b,
    /// Diffusion transformer and autoencoder alone: SD3.5-Medium.
    #[serde(rename = "sd3.5-medium")]
    Sd35Medium,
    /// Both with the Stacked Channel Bridge and the adapters of stage 2: DeepGen 1.0.
    #[serde(rename = "deepgen-5b")]
    Deepgen5b,
}

impl Preset {
    /// Every preset.
    pub const ALL: [Self; 3] = [Self::Qwen25Vl3b, Self::Sd35Medium, Self::Deepgen5b];

    /// Returns the name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen25Vl3b => "qwen2.5-vl-3b",
            Self::Sd35Medium => "sd3.5-medium",
            Self::Deepgen5b => "deepgen-5b",
        }
    }

    /// Returns the preset of a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|preset| preset.name() == name)
    }

    /// Returns whether the preset has a vision-language model.
    pub fn has_vlm(self) -> bool {
        self != Self::Sd35Medium
    }

    /// Returns whether the preset has a diffusion transformer and an autoencoder.
    pub fn has_dit(self) -> bool {
        self != Self::Qwen25Vl3b
    }

    /// Returns the settings. A description always names all base parts; [`Preset::has_vlm`] and [`Preset::has_dit`] say
    /// which ones the preset is about, and only the whole model has a bridge and adapters.
    pub fn spec(self) -> ModelSpec {
        let is_whole = self == Self::Deepgen5b;
        ModelSpec {
            base: BaseModelConfig { vlm: vlm(), dit: dit(), vae: vae(), scheduler_shift: 3.0, conditioner: None },
            bridge: is_whole.then(bridge),
            lora: is_whole.then_some(LoraConfig { targets: LoraTargets::Auto, rank: 64, alpha: 128.0, dropout: 0.05 }),
        }
    }
}

fn vlm() -> VlmConfig {
    VlmConfig {
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
    }
}

fn dit() -> DitConfig {
    DitConfig {
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
    }
}

fn vae() -> VaeConfig {
    VaeConfig {
        in_channels: 3,
        latent_channels: 16,
        block_out_channels: vec![128, 256, 512, 512],
        layers_per_block: 2,
        norm_num_groups: 32,
        scaling_factor: 1.5305,
        shift_factor: 0.0609,
    }
}

fn bridge() -> BridgeConfig {
    BridgeConfig {
        layers: BridgeLayers::Rule,
        num_queries: 128,
        hidden_size: 2048,
        intermediate_size: 11_946,
        num_hidden_layers: 6,
        num_attention_heads: 32,
        layer_norm_eps: 1e-6,
        padding: Padding::Longest,
        max_length: 1024,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_agree_with_serde_and_parse_back() {
        for preset in Preset::ALL {
            assert_eq!(Preset::parse(preset.name()), Some(preset));
            assert_eq!(serde_json::to_value(preset).unwrap(), preset.name());
        }
        assert_eq!(Preset::parse("deepgen"), None);
    }

    #[test]
    fn each_preset_has_its_published_number_of_elements() {
        // docs/spec/model.md section 7.
        let counts = |preset: Preset| preset.spec().parameter_counts().unwrap();
        let vlm = counts(Preset::Qwen25Vl3b);
        assert_eq!(vlm.language + vlm.vision, 3_754_622_976);
        assert_eq!((vlm.bridge, vlm.lora), (0, 0));
        let dit = counts(Preset::Sd35Medium);
        assert_eq!((dit.dit, dit.vae), (2_243_171_520, 83_819_683));
        let whole = counts(Preset::Deepgen5b);
        assert_eq!((whole.bridge, whole.lora), (432_449_532, 185_163_776));
    }

    #[test]
    fn the_ablations_are_settings_and_have_the_sizes_that_follow() {
        let count = |change: &dyn Fn(&mut ModelSpec)| {
            let mut spec = Preset::Deepgen5b.spec();
            change(&mut spec);
            spec.parameter_counts().unwrap()
        };
        let full = count(&|_| {});
        // w/o SCB: the last hidden state alone (docs/spec/model.md sections 2.7 and 7).
        let last = count(&|spec| spec.bridge.as_mut().unwrap().layers = BridgeLayers::Last);
        assert_eq!(last.bridge, 411_478_012);
        // w/o think tokens: no queries.
        let no_queries = count(&|spec| spec.bridge.as_mut().unwrap().num_queries = 0);
        assert_eq!(full.bridge - no_queries.bridge, 128 * 2048);
        // w/o activated VLM: no adapters.
        assert_eq!(count(&|spec| spec.lora = None).lora, 0);
        assert_eq!(full.language, last.language);
    }
}
