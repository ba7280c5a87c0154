//! The libraries' own config files as our settings: Qwen2.5-VL in its flat and its nested layout, diffusers' DiT and
//! autoencoder.

use std::path::Path;

use deepgen_contract::model::{DitConfig, LanguageConfig, SpecialTokens, VaeConfig, VisionConfig, VlmConfig};
use deepgen_model::dit::Dit;
use deepgen_model::init::Init;
use deepgen_model::vae::Vae;
use deepgen_model::vlm::Vlm;
use deepgen_model::weights::load_into;

use super::case::{Case, Settings};
use super::error::{ParityError, ParityResult};

/// Numerator and denominator of the scale in front of the vision tower (docs/spec/model.md section 2.8).
const INPUT_SCALE: [usize; 2] = [28, 32];

/// Returns a vision-language model's settings and whether its language head is the embedding.
///
/// # Errors
/// When a setting is missing.
pub fn vlm(config: &Settings, pad: u32) -> ParityResult<(VlmConfig, bool)> {
    let text = config.at("text_config").unwrap_or_else(|| config.clone());
    let vision = config.at("vision_config").ok_or_else(|| missing("vision_config"))?;
    let channels = vision.get("in_channels").or_else(|_| vision.get("in_chans"))?;
    let is_tied = config.get("tie_word_embeddings").or_else(|_| text.get("tie_word_embeddings")).unwrap_or(true);
    let config = VlmConfig {
        language: LanguageConfig {
            vocab_size: text.get("vocab_size")?,
            hidden_size: text.get("hidden_size")?,
            intermediate_size: text.get("intermediate_size")?,
            num_hidden_layers: text.get("num_hidden_layers")?,
            num_attention_heads: text.get("num_attention_heads")?,
            num_key_value_heads: text.get("num_key_value_heads")?,
            rms_norm_eps: text.get("rms_norm_eps")?,
            rope_theta: text.get("rope_theta")?,
            mrope_section: text.get("rope_scaling/mrope_section")?,
        },
        vision: VisionConfig {
            depth: vision.get("depth")?,
            hidden_size: vision.get("hidden_size")?,
            intermediate_size: vision.get("intermediate_size")?,
            num_heads: vision.get("num_heads")?,
            in_channels: channels,
            patch_size: vision.get("patch_size")?,
            temporal_patch_size: vision.get("temporal_patch_size")?,
            spatial_merge_size: vision.get("spatial_merge_size")?,
            window_size: vision.get("window_size")?,
            fullatt_block_indexes: vision.get("fullatt_block_indexes")?,
            out_hidden_size: vision.get("out_hidden_size")?,
            input_scale: INPUT_SCALE,
        },
        tokens: SpecialTokens {
            pad,
            vision_start: config.get("vision_start_token_id")?,
            vision_end: config.get("vision_end_token_id")?,
            image_pad: config.get("image_token_id")?,
            video_pad: config.get("video_token_id")?,
        },
    };
    Ok((config, is_tied))
}

fn missing(key: &str) -> ParityError {
    ParityError::Unsupported(format!("the model's config has no `{key}`"))
}

/// Loads a vision-language model from a folder of the case as the library saved it.
///
/// # Errors
/// When the folder is not whole.
pub fn load_vlm(case: &Case, folder: &str, pad: u32) -> ParityResult<Vlm> {
    let (config, is_tied) = vlm(&case.settings(&format!("{folder}/config.json"))?, pad)?;
    let fresh = Vlm::new(&Init::new(0, &case.device), &config);
    let fresh = if is_tied { fresh } else { fresh.with_own_head() };
    Ok(fresh.load(&case.weights(folder)?)?)
}

/// Returns a DiT's settings and the blocks with a second attention.
///
/// # Errors
/// When a setting is missing, or says what this implementation does not do.
pub fn dit(config: &Settings) -> ParityResult<(DitConfig, Vec<usize>)> {
    let dual: Vec<usize> = config.get("dual_attention_layers")?;
    let norm: String = config.get("qk_norm")?;
    if norm != "rms_norm" {
        return Err(ParityError::Unsupported(format!("qk_norm `{norm}`: only `rms_norm` is implemented")));
    }
    let config = DitConfig {
        sample_size: config.get("sample_size")?,
        patch_size: config.get("patch_size")?,
        in_channels: config.get("in_channels")?,
        num_layers: config.get("num_layers")?,
        num_attention_heads: config.get("num_attention_heads")?,
        attention_head_dim: config.get("attention_head_dim")?,
        joint_attention_dim: config.get("joint_attention_dim")?,
        pooled_projection_dim: config.get("pooled_projection_dim")?,
        pos_embed_max_size: config.get("pos_embed_max_size")?,
        num_dual_attention_layers: dual.len(),
    };
    Ok((config, dual))
}

/// Loads the DiT in `model/`.
///
/// # Errors
/// When the folder is not whole.
pub fn load_dit(case: &Case) -> ParityResult<Dit> {
    let (config, dual) = dit(&case.settings("model/config.json")?)?;
    let fresh = Dit::with_dual_attention(&Init::new(0, &case.device), &config, &dual);
    Ok(load_into(fresh, &case.weights("model")?, "")?)
}

/// Returns an autoencoder's settings.
///
/// # Errors
/// When a setting is missing.
pub fn vae(config: &Settings) -> ParityResult<VaeConfig> {
    Ok(VaeConfig {
        in_channels: config.get("in_channels")?,
        latent_channels: config.get("latent_channels")?,
        block_out_channels: config.get("block_out_channels")?,
        layers_per_block: config.get("layers_per_block")?,
        norm_num_groups: config.get("norm_num_groups")?,
        scaling_factor: config.get("scaling_factor")?,
        shift_factor: config.get("shift_factor")?,
    })
}

/// Loads the autoencoder in a folder of the case.
///
/// # Errors
/// When the folder is not whole.
pub fn load_vae(case: &Case, folder: &str) -> ParityResult<Vae> {
    let config = vae(&case.settings(&Path::new(folder).join("config.json").to_string_lossy())?)?;
    Ok(load_into(Vae::new(&Init::new(0, &case.device), &config), &case.weights(folder)?, "")?)
}
