//! Low-rank adapters on the vision-language model: attach, merge, save and load under PEFT's names
//! (docs/spec/model.md sections 6, 9.4).
//!
//! Knows no training: which adapters learn is decided by `trainable`. Departure from the reference: a tied language head
//! gets no adapter of its own (the reference's never runs and merging it would change the embedding); one of its own does.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Param;
use deepgen_contract::model::{LoraConfig, LoraTargets};

use crate::init::{Fill, Init};
use crate::nn::{EmbeddingLora, Linear, LoraAdapter, to_f32};
use crate::parts::tensors_where;
use crate::vlm::{Vlm, hub_name, is_adapter, is_head};
use crate::weights::{self, Mismatch, StoredType, WeightFile, WeightsError, for_each_param, map_params};
use crate::{Device, Tensor};

/// What PEFT puts before every name in an adapter file.
const ADAPTER_FILE_PREFIX: &str = "base_model.model.";

/// Attaches fresh adapters: until they are trained, the model computes what it did before.
pub fn attach(mut vlm: Vlm, config: &LoraConfig, seed: u64) -> Vlm {
    let init = Init::new(seed, &vlm.device()).at("lora");
    let (rank, scale) = (config.rank, config.alpha / config.rank as f64);
    for (path, linear) in linears(&mut vlm, config.targets) {
        let init = init.at(path);
        let [outputs, inputs] = linear.shape();
        linear.lora = Some(LoraAdapter {
            a: init.param("lora_A", [rank, inputs], Fill::Normal(1.0 / rank as f64)),
            b: init.param("lora_B", [outputs, rank], Fill::Zeros),
            scale,
            dropout: config.dropout,
        });
    }
    let embedding = &mut vlm.model.embed_tokens;
    let [vocabulary, hidden] = embedding.weight.lazy_shape().dims();
    let init = init.at("model.embed_tokens");
    // The other way round than in a linear layer: A starts at zero, B is drawn.
    embedding.lora = Some(EmbeddingLora {
        embedding_a: init.param("lora_embedding_A", [rank, vocabulary], Fill::Zeros),
        embedding_b: init.param("lora_embedding_B", [hidden, rank], Fill::Normal(1.0)),
        scale,
    });
    vlm
}

/// Adds every adapter to its weight and removes it.
pub fn merge(mut vlm: Vlm) -> Vlm {
    for (_, linear) in linears(&mut vlm, LoraTargets::Auto) {
        if let Some(lora) = linear.lora.take() {
            let delta = off_tape(&lora.b).matmul(off_tape(&lora.a)).mul_scalar(lora.scale);
            linear.weight = add(linear.weight.clone(), delta);
        }
    }
    let embedding = &mut vlm.model.embed_tokens;
    if let Some(lora) = embedding.lora.take() {
        let delta = off_tape(&lora.embedding_b).matmul(off_tape(&lora.embedding_a)).transpose().mul_scalar(lora.scale);
        embedding.weight = add(embedding.weight.clone(), delta);
    }
    vlm
}

fn off_tape(param: &Param<Tensor<2>>) -> Tensor<2> {
    param.val().without_autodiff()
}

fn add(param: Param<Tensor<2>>, delta: Tensor<2>) -> Param<Tensor<2>> {
    param.map(|weight| {
        let (is_autodiff, require_grad) = (weight.is_autodiff(), weight.is_require_grad());
        // The sum is made in f32, whatever type the weight is held in.
        let merged = to_f32(weight.without_autodiff()) + delta;
        if is_autodiff { Tensor::from_inner(merged).set_require_grad(require_grad) } else { merged }
    })
}

/// Lists the linear layers of `targets` with their paths.
fn linears(vlm: &mut Vlm, targets: LoraTargets) -> Vec<(String, &mut Linear)> {
    let mut found = Vec::new();
    for (i, layer) in vlm.model.layers.iter_mut().enumerate() {
        let (attn, mlp) = (&mut layer.self_attn, &mut layer.mlp);
        for (name, linear) in [
            ("self_attn.q_proj", &mut attn.q_proj),
            ("self_attn.k_proj", &mut attn.k_proj),
            ("self_attn.v_proj", &mut attn.v_proj),
            ("self_attn.o_proj", &mut attn.o_proj),
            ("mlp.gate_proj", &mut mlp.gate_proj),
            ("mlp.up_proj", &mut mlp.up_proj),
            ("mlp.down_proj", &mut mlp.down_proj),
        ] {
            found.push((format!("model.layers.{i}.{name}"), linear));
        }
    }
    if targets == LoraTargets::Language {
        return found;
    }
    for (i, block) in vlm.visual.blocks.iter_mut().enumerate() {
        for (name, linear) in [
            ("attn.qkv", &mut block.attn.qkv),
            ("attn.proj", &mut block.attn.proj),
            ("mlp.gate_proj", &mut block.mlp.gate_proj),
            ("mlp.up_proj", &mut block.mlp.up_proj),
            ("mlp.down_proj", &mut block.mlp.down_proj),
        ] {
            found.push((format!("visual.blocks.{i}.{name}"), linear));
        }
    }
    let merger = &mut vlm.visual.merger.mlp;
    found.push(("visual.merger.mlp.0".into(), &mut merger.0));
    found.push(("visual.merger.mlp.2".into(), &mut merger.2));
    if let Some(head) = &mut vlm.lm_head {
        found.push(("lm_head".into(), head));
    }
    found
}

/// Returns what the adapters in `file` (names as in the model) add to the weight `name`, or `None` when it has none.
///
/// # Errors
/// When one of the two matrices is missing.
pub fn delta(file: &WeightFile, name: &str, scale: f64, device: &Device) -> Result<Option<Tensor<2>>, WeightsError> {
    let Some(layer) = name.strip_suffix(".weight") else { return Ok(None) };
    let matrix = |name: &str| -> Result<Tensor<2>, WeightsError> { Ok(Tensor::from_data(file.get(name)?, device)) };
    for (a, b, is_embedding) in [
        ("lora_A.default.weight", "lora_B.default.weight", false),
        ("lora_embedding_A.default", "lora_embedding_B.default", true),
    ] {
        let (a, b) = (format!("{layer}.{a}"), format!("{layer}.{b}"));
        if file.shape(&a).is_none() && file.shape(&b).is_none() {
            continue;
        }
        let product = matrix(&b)?.matmul(matrix(&a)?).mul_scalar(scale);
        return Ok(Some(if is_embedding { product.transpose() } else { product }));
    }
    Ok(None)
}

/// Returns PEFT's name in an adapter file for the adapter parameter `name` (hub spelling).
pub fn adapter_file_name(name: &str) -> String {
    let name = name.replace(".default", "");
    let module = match name.strip_prefix("model.") {
        Some(rest) => format!("model.language_model.{rest}"),
        None if is_head(&name) => name,
        None => format!("model.{name}"),
    };
    format!("{ADAPTER_FILE_PREFIX}{module}")
}

/// Writes the adapters of `vlm` as a PEFT adapter file.
///
/// # Errors
/// When the file cannot be written.
pub fn save(vlm: &Vlm, path: &Path, dtype: StoredType) -> Result<(), WeightsError> {
    let mut tensors = tensors_where(vlm, is_adapter);
    for (name, _) in &mut tensors {
        *name = adapter_file_name(name);
    }
    weights::save(path, &tensors, dtype, &BTreeMap::new())
}

/// Loads adapters in any spelling of [`hub_name`] into those attached to `vlm`; other tensors are passed over.
///
/// # Errors
/// When an attached adapter is missing, or the file holds one that is not attached or has another rank.
pub fn load(vlm: Vlm, file: &WeightFile) -> Result<Vlm, WeightsError> {
    let has_head = vlm.lm_head.is_some();
    let file = file
        .clone()
        .rename(|name| Some(hub_name(name)).filter(|name| is_adapter(name) && (has_head || !is_head(name))));
    let mut mismatch = Mismatch::default();
    let mut attached = Vec::new();
    for_each_param(&vlm, |name, param| {
        if !is_adapter(name) {
            return;
        }
        attached.push(name.to_string());
        match file.shape(name) {
            None => mismatch.missing.push(name.into()),
            Some(shape) if shape != param.shape() => {
                mismatch.wrong_shape.push((name.into(), param.shape(), shape.to_vec()));
            }
            Some(_) => {}
        }
    });
    mismatch.unexpected = file.names().filter(|name| !attached.iter().any(|a| a == name)).map(Into::into).collect();
    if mismatch != Mismatch::default() {
        return Err(WeightsError::Mismatch(mismatch));
    }
    let mut failure = None;
    let vlm = map_params(vlm, |name, value| {
        if !is_adapter(name) {
            return value;
        }
        match file.get(name) {
            Ok(data) => {
                let count = data.num_elements();
                Tensor::<2>::from_data(data, &value.device()).reshape([count])
            }
            Err(error) => {
                failure.get_or_insert(error);
                value
            }
        }
    });
    failure.map_or(Ok(vlm), Err)
}
