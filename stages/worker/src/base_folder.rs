//! Files of the parts of a base on their way to `assemble`.
//!
//! Knows names only; `deepgen_model::parts` knows the finished folder.

/// The tokenizer, in the Hugging Face format; stays beside the weights from then on.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Autoencoder.
pub const VAE_FILE: &str = "vae.safetensors";
/// Its sizes, with the measured shift and scale.
pub const VAE_CONFIG_FILE: &str = "vae.json";
/// Vision-language model.
pub const VLM_FILE: &str = "vlm.safetensors";
/// Its sizes.
pub const VLM_CONFIG_FILE: &str = "vlm.json";
/// Diffusion transformer.
pub const DIT_FILE: &str = "transformer.safetensors";
/// Its sizes, its text encoder's, and the schedule's shift.
pub const DIT_CONFIG_FILE: &str = "dit.json";
/// The base's own text encoder.
pub const CONDITIONER_FILE: &str = "conditioner.safetensors";
