//! A case's models as the libraries saved them: configuration files (read by `foreign::configs`) and weights.

use std::path::Path;

use deepgen_contract::model::{DitConfig, VaeConfig, VlmConfig};
use deepgen_model::dit::Dit;
use deepgen_model::init::Init;
use deepgen_model::vae::Vae;
use deepgen_model::vlm::Vlm;
use deepgen_model::weights::load_into;

use super::case::{Case, Settings};
use super::error::ParityResult;

/// Numerator and denominator of the scale in front of the vision tower (docs/spec/model.md section 2.8).
const INPUT_SCALE: [usize; 2] = [28, 32];

/// Returns a vision-language model's settings and whether its language head is the embedding.
///
/// # Errors
/// When a setting is missing.
pub fn vlm(config: &Settings, pad: u32) -> ParityResult<(VlmConfig, bool)> {
    let is_tied =
        ["tie_word_embeddings", "text_config/tie_word_embeddings"].iter().find_map(|key| config.get(key).ok());
    let mut vlm = config.as_config_file().vlm(Some(pad))?;
    vlm.vision.input_scale = INPUT_SCALE;
    Ok((vlm, is_tied.unwrap_or(true)))
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
    Ok(config.as_config_file().dit_and_dual_layers()?)
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
/// When a setting is missing, or says what this implementation does not do.
pub fn vae(config: &Settings) -> ParityResult<VaeConfig> {
    Ok(config.as_config_file().vae()?)
}

/// Loads the autoencoder in a folder of the case.
///
/// # Errors
/// When the folder is not whole.
pub fn load_vae(case: &Case, folder: &str) -> ParityResult<Vae> {
    let config = vae(&case.settings(&Path::new(folder).join("config.json").to_string_lossy())?)?;
    Ok(load_into(Vae::new(&Init::new(0, &case.device), &config), &case.weights(folder)?, "")?)
}
