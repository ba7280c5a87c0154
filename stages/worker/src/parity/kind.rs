//! The kinds of cases, and how a folder says of which kind it is.

use serde_json::Value;

use super::error::{ParityError, ParityResult};

/// What a case compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Optimiser, clipping, accumulation, learning rates.
    AdamwSchedule,
    /// CLIP's towers and image processor.
    ClipTextImage,
    /// Projectors and connector.
    Connector,
    /// Sampling with references, prompt to pixels.
    DeepgenI2iGenerate,
    /// Loss of editing.
    DeepgenI2iLoss,
    /// Weights that other cases share.
    DeepgenModel,
    /// Sampling, prompt to pixels.
    DeepgenT2iGenerate,
    /// Loss of text to image.
    DeepgenT2iLoss,
    /// Noise levels and guided runs.
    FlowMatchSampler,
    /// Transitions, advantages, policy losses, rewards.
    GrpoSde,
    /// Adapters.
    Lora,
    /// Images, text and queries through the decoder.
    Qwen25vlFull,
    /// Image processor and tokenizer.
    Qwen25vlPreprocess,
    /// Decoder and generation.
    Qwen25vlText,
    /// Vision tower.
    Qwen25vlVision,
    /// DiT on uniform batches.
    Sd3Transformer,
    /// DiT on ragged batches with references.
    Sd3TransformerDynamic,
    /// Autoencoder.
    Sd3Vae,
    /// Training steps of a DiT.
    TrainCurve,
}

impl Kind {
    /// Every kind with its name.
    pub const ALL: [(Self, &'static str); 19] = [
        (Self::AdamwSchedule, "adamw_schedule"),
        (Self::ClipTextImage, "clip_text_image"),
        (Self::Connector, "connector"),
        (Self::DeepgenI2iGenerate, "deepgen_i2i_generate"),
        (Self::DeepgenI2iLoss, "deepgen_i2i_loss"),
        (Self::DeepgenModel, "deepgen_model"),
        (Self::DeepgenT2iGenerate, "deepgen_t2i_generate"),
        (Self::DeepgenT2iLoss, "deepgen_t2i_loss"),
        (Self::FlowMatchSampler, "flow_match_sampler"),
        (Self::GrpoSde, "grpo_sde"),
        (Self::Lora, "lora"),
        (Self::Qwen25vlFull, "qwen25vl_full"),
        (Self::Qwen25vlPreprocess, "qwen25vl_preprocess"),
        (Self::Qwen25vlText, "qwen25vl_text"),
        (Self::Qwen25vlVision, "qwen25vl_vision"),
        (Self::Sd3Transformer, "sd3_transformer"),
        (Self::Sd3TransformerDynamic, "sd3_transformer_dynamic"),
        (Self::Sd3Vae, "sd3_vae"),
        (Self::TrainCurve, "train_curve"),
    ];

    /// Returns the kind of a case: `case` of its config.json, else its folder's name without what follows the kind.
    ///
    /// # Errors
    /// When neither names a kind.
    pub fn of(config: &Value, folder: &str) -> ParityResult<Self> {
        let name = config["case"].as_str().unwrap_or(folder);
        // The longest one, for some names begin with others.
        let found = Self::ALL.iter().filter(|(_, known)| is_variant(name, known)).max_by_key(|(_, known)| known.len());
        found.map(|(kind, _)| *kind).ok_or_else(|| ParityError::UnknownKind {
            kind: name.into(),
            known: Self::ALL.map(|(_, known)| known).join(", "),
        })
    }
}

/// Returns whether `name` is `kind`, or `kind` and the number or name of a variant.
fn is_variant(name: &str, kind: &str) -> bool {
    name.strip_prefix(kind).is_some_and(|rest| rest.is_empty() || rest.starts_with(|c: char| !c.is_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_config_names_the_kind_and_else_the_folder_does() {
        let of = |config: Value, folder: &str| Kind::of(&config, folder).ok();
        assert_eq!(of(json!({"case": "lora"}), "anything"), Some(Kind::Lora));
        assert_eq!(of(json!({}), "sd3_transformer"), Some(Kind::Sd3Transformer));
        assert_eq!(of(json!({}), "sd3_transformer_dynamic"), Some(Kind::Sd3TransformerDynamic));
        for folder in ["sd3_transformer_dynamic_2", "sd3_transformer_dynamic-b", "sd3_transformer_dynamic7"] {
            assert_eq!(of(json!({}), folder), Some(Kind::Sd3TransformerDynamic), "{folder}");
        }
        assert_eq!(of(json!({"case": "loras"}), "lora"), None);
        assert_eq!(of(json!({}), "sd3"), None);
    }
}
