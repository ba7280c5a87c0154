//! The libraries' `config.json` files, read into our settings and written from them.
//!
//! Qwen2.5-VL in the hub's flat form and the newer nested one, diffusers' SD3 transformer, autoencoder and scheduler, PEFT's
//! `adapter_config.json`. Settings that these models do not vary are checked, not ignored. Knows no tensor.

use std::path::Path;

use deepgen_contract::model::{
    DitConfig, LanguageConfig, LoraConfig, LoraTargets, SpecialTokens, VaeConfig, VisionConfig, VlmConfig,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{JobError, JobResult, OrFail};

/// Padding id of Qwen's tokenizer, which its `config.json` does not tell: `<|endoftext|>`.
const QWEN_PAD: u32 = 151_643;

/// Key of this project in `vision_config`: the scale in front of the vision tower, which the libraries do not know. It is
/// written where the scale is not the release's.
const INPUT_SCALE: &str = "input_scale";

/// The release's scale, DeepGen's own rule and not Qwen's: reference images shrink so that a patch is cut from 16 pixels
/// (docs/spec/model.md section 2.8).
fn released_scale(patch_size: usize) -> [usize; 2] {
    [2 * patch_size, 32]
}

/// A configuration file and where it lies.
pub struct ConfigFile {
    path: String,
    value: Value,
}

impl ConfigFile {
    /// Reads a file.
    ///
    /// # Errors
    /// When it is missing or not JSON.
    pub fn open(path: &Path) -> JobResult<Self> {
        let text = std::fs::read_to_string(path).or_input(|| path.display())?;
        let value = serde_json::from_str(&text).or_input(|| path.display())?;
        Ok(Self { path: path.display().to_string(), value })
    }

    /// Takes settings that were read already; `path` names them in messages.
    pub fn of(path: String, value: Value) -> Self {
        Self { path, value }
    }

    /// Returns a text of the file, such as its `model_type`.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.value.get(key)?.as_str()
    }

    /// Returns the part of the file under `key`, or the whole file when there is no such part.
    fn part(&self, key: &str) -> Self {
        let value = self.value.get(key).unwrap_or(&self.value).clone();
        Self { path: format!("{}, {key}", self.path), value }
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> JobResult<T> {
        let value = self.value.get(key).filter(|value| !value.is_null());
        let value = value.ok_or_else(|| JobError::input(format!("{}: there is no key `{key}`", self.path)))?;
        serde_json::from_value(value.clone()).or_input(|| format!("{}: `{key}`", self.path))
    }

    fn get_or<T: DeserializeOwned>(&self, key: &str, default: T) -> JobResult<T> {
        if self.value.get(key).is_none_or(Value::is_null) { Ok(default) } else { self.get(key) }
    }

    /// Fails when a setting that our model does not vary has another value than the one it has here.
    fn require(&self, key: &str, expected: Value) -> JobResult<()> {
        match self.value.get(key) {
            Some(found) if !found.is_null() && *found != expected => {
                Err(JobError::input(format!("{}: `{key}` is {found}; only {expected} is supported", self.path)))
            }
            _ => Ok(()),
        }
    }

    /// Reads Qwen2.5-VL's sizes. `pad` is the tokenizer's padding id, where that is known.
    ///
    /// # Errors
    /// Names the key that is missing or not supported.
    pub fn vlm(&self, pad: Option<u32>) -> JobResult<VlmConfig> {
        let text = self.part("text_config");
        text.require("hidden_act", json!("silu"))?;
        text.require("use_sliding_window", json!(false))?;
        let rope: Value = text.get_or("rope_scaling", json!(null))?;
        // The newest libraries put the base of the frequencies beside the sections.
        let rope = if rope.is_null() { text.get("rope_parameters")? } else { rope };
        let rope = Self { path: format!("{}, rope_scaling", text.path), value: rope };
        let rope_theta = rope.get_or("rope_theta", 0.0)?;
        let language = LanguageConfig {
            vocab_size: text.get("vocab_size")?,
            hidden_size: text.get("hidden_size")?,
            intermediate_size: text.get("intermediate_size")?,
            num_hidden_layers: text.get("num_hidden_layers")?,
            num_attention_heads: text.get("num_attention_heads")?,
            num_key_value_heads: text.get("num_key_value_heads")?,
            rms_norm_eps: text.get("rms_norm_eps")?,
            rope_theta: if rope_theta > 0.0 { rope_theta } else { text.get("rope_theta")? },
            mrope_section: rope.get("mrope_section")?,
        };
        let vision = self.part("vision_config");
        vision.require("hidden_act", json!("silu"))?;
        let channels: usize = vision.get_or("in_channels", 3)?;
        let patch_size: usize = vision.get("patch_size")?;
        let vision = VisionConfig {
            depth: vision.get("depth")?,
            hidden_size: vision.get("hidden_size")?,
            intermediate_size: vision.get("intermediate_size")?,
            num_heads: vision.get("num_heads")?,
            in_channels: vision.get_or("in_chans", channels)?,
            patch_size,
            temporal_patch_size: vision.get_or("temporal_patch_size", 2)?,
            spatial_merge_size: vision.get_or("spatial_merge_size", 2)?,
            window_size: vision.get("window_size")?,
            fullatt_block_indexes: vision.get("fullatt_block_indexes")?,
            out_hidden_size: vision.get("out_hidden_size")?,
            input_scale: vision.get_or(INPUT_SCALE, released_scale(patch_size))?,
        };
        let id = |key: &str, nested: u32| self.get_or(key, nested);
        let image_pad: u32 = self.get("image_token_id")?;
        let tokens = SpecialTokens {
            pad: pad.unwrap_or(QWEN_PAD),
            vision_start: id("vision_start_token_id", image_pad.saturating_sub(3))?,
            vision_end: id("vision_end_token_id", image_pad.saturating_sub(2))?,
            image_pad,
            video_pad: self.get("video_token_id")?,
        };
        Ok(VlmConfig { language, vision, tokens })
    }

    /// Reads an SD3 transformer's sizes; its blocks with a second attention must be the first few.
    ///
    /// # Errors
    /// Names the key that is missing or not supported.
    pub fn dit(&self) -> JobResult<DitConfig> {
        let (config, dual) = self.dit_and_dual_layers()?;
        if dual.iter().enumerate().any(|(i, &layer)| layer != i) {
            let reason = format!("{}: `dual_attention_layers` is {dual:?}, not the first few", self.path);
            return Err(JobError::input(reason));
        }
        Ok(config)
    }

    /// Reads an SD3 transformer's sizes, and which blocks have a second attention.
    ///
    /// # Errors
    /// Names the key that is missing or not supported.
    pub fn dit_and_dual_layers(&self) -> JobResult<(DitConfig, Vec<usize>)> {
        self.require("_class_name", json!("SD3Transformer2DModel"))?;
        self.require("qk_norm", json!("rms_norm"))?;
        let dual: Vec<usize> = self.get_or("dual_attention_layers", Vec::new())?;
        let config = DitConfig {
            sample_size: self.get("sample_size")?,
            patch_size: self.get("patch_size")?,
            in_channels: self.get("in_channels")?,
            num_layers: self.get("num_layers")?,
            num_attention_heads: self.get("num_attention_heads")?,
            attention_head_dim: self.get("attention_head_dim")?,
            joint_attention_dim: self.get("joint_attention_dim")?,
            pooled_projection_dim: self.get("pooled_projection_dim")?,
            pos_embed_max_size: self.get("pos_embed_max_size")?,
            num_dual_attention_layers: dual.len(),
        };
        self.require("out_channels", json!(config.in_channels))?;
        self.require("caption_projection_dim", json!(config.width()))?;
        Ok((config, dual))
    }

    /// Reads an autoencoder's sizes.
    ///
    /// # Errors
    /// Names the key that is missing or not supported.
    pub fn vae(&self) -> JobResult<VaeConfig> {
        self.require("_class_name", json!("AutoencoderKL"))?;
        self.require("act_fn", json!("silu"))?;
        self.require("use_quant_conv", json!(false))?;
        self.require("use_post_quant_conv", json!(false))?;
        Ok(VaeConfig {
            in_channels: self.get("in_channels")?,
            latent_channels: self.get("latent_channels")?,
            block_out_channels: self.get("block_out_channels")?,
            layers_per_block: self.get("layers_per_block")?,
            norm_num_groups: self.get("norm_num_groups")?,
            scaling_factor: self.get("scaling_factor")?,
            shift_factor: self.get_or("shift_factor", 0.0)?,
        })
    }

    /// Reads the shift of a flow-matching scheduler.
    ///
    /// # Errors
    /// When there is none, or it depends on the image's size.
    pub fn shift(&self) -> JobResult<f64> {
        self.require("use_dynamic_shifting", json!(false))?;
        self.get("shift")
    }

    /// Reads the connector's heads and epsilon, the two settings that its tensors do not tell.
    ///
    /// # Errors
    /// When a key has a wrong type.
    pub fn connector(&self, (heads, eps): (usize, f64)) -> JobResult<(usize, f64)> {
        Ok((self.get_or("num_attention_heads", heads)?, self.get_or("layer_norm_eps", eps)?))
    }

    /// Reads PEFT's adapter settings; `targets` is what the adapter file holds.
    ///
    /// # Errors
    /// When the adapter is of another kind than plain LoRA.
    pub fn lora(&self, targets: LoraTargets) -> JobResult<LoraConfig> {
        self.require("peft_type", json!("LORA"))?;
        self.require("bias", json!("none"))?;
        for key in ["use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"] {
            self.require(key, json!(false))?;
        }
        for key in ["rank_pattern", "alpha_pattern"] {
            self.require(key, json!({}))?;
        }
        Ok(LoraConfig {
            targets,
            rank: self.get("r")?,
            alpha: self.get("lora_alpha")?,
            dropout: self.get_or("lora_dropout", 0.0)?,
        })
    }
}

/// Returns the hub's flat `config.json` of a vision-language model.
pub fn vlm_json(config: &VlmConfig, dtype: &str) -> Value {
    let (language, vision, tokens) = (&config.language, &config.vision, &config.tokens);
    let mut value = json!({
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": dtype,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": language.intermediate_size,
        "max_position_embeddings": 128_000,
        "num_attention_heads": language.num_attention_heads,
        "num_hidden_layers": language.num_hidden_layers,
        "num_key_value_heads": language.num_key_value_heads,
        "rms_norm_eps": language.rms_norm_eps,
        "rope_theta": language.rope_theta,
        "rope_scaling": { "type": "mrope", "mrope_section": language.mrope_section },
        "tie_word_embeddings": true,
        "use_sliding_window": false,
        "vocab_size": language.vocab_size,
        "image_token_id": tokens.image_pad,
        "video_token_id": tokens.video_pad,
        "vision_start_token_id": tokens.vision_start,
        "vision_end_token_id": tokens.vision_end,
        "vision_config": {
            "depth": vision.depth,
            "hidden_act": "silu",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "in_chans": vision.in_channels,
            "out_hidden_size": vision.out_hidden_size,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "spatial_patch_size": vision.patch_size,
            "window_size": vision.window_size,
            "fullatt_block_indexes": vision.fullatt_block_indexes,
            "tokens_per_second": 2,
            "temporal_patch_size": vision.temporal_patch_size
        }
    });
    if vision.input_scale != released_scale(vision.patch_size) {
        value["vision_config"][INPUT_SCALE] = json!(vision.input_scale);
    }
    value
}

/// Returns diffusers' `config.json` of an SD3 transformer.
pub fn dit_json(config: &DitConfig) -> Value {
    json!({
        "_class_name": "SD3Transformer2DModel",
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "joint_attention_dim": config.joint_attention_dim,
        "caption_projection_dim": config.width(),
        "pooled_projection_dim": config.pooled_projection_dim,
        "pos_embed_max_size": config.pos_embed_max_size,
        "dual_attention_layers": (0..config.num_dual_attention_layers).collect::<Vec<_>>(),
        "qk_norm": "rms_norm"
    })
}

/// Returns diffusers' `config.json` of an autoencoder.
pub fn vae_json(config: &VaeConfig) -> Value {
    let levels = config.block_out_channels.len();
    json!({
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.block_out_channels,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_add_attention": true,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "use_quant_conv": false,
        "use_post_quant_conv": false,
        "force_upcast": true
    })
}

/// Returns diffusers' `scheduler_config.json`.
pub fn scheduler_json(shift: f64) -> Value {
    json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": shift,
        "use_dynamic_shifting": false
    })
}

/// Returns PEFT's `adapter_config.json`.
pub fn lora_json(config: &LoraConfig) -> Value {
    // A regular expression, because a list of suffixes would also hit the vision tower's layers of the same names.
    let language = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|embed_tokens";
    let targets = match config.targets {
        LoraTargets::Language => format!(r".*language_model\..*({language})|.*language_model\.embed_tokens"),
        LoraTargets::Auto => {
            let vision =
                r"attn\.qkv|attn\.proj|mlp\.gate_proj|mlp\.up_proj|mlp\.down_proj|merger\.mlp\.0|merger\.mlp\.2";
            format!(r".*language_model\..*({language})|.*language_model\.embed_tokens|.*visual\..*({vision})")
        }
    };
    json!({
        "peft_type": "LORA",
        "base_model_name_or_path": "",
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": "gaussian",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "task_type": null,
        "use_dora": false,
        "use_rslora": false
    })
}
