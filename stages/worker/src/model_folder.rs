//! Weights artifacts in and out: parts, tokenizer, and the checkpoint of trained parameters laid over them.
//!
//! Knows the folder, not what trains.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::TensorData;
use deepgen_contract::model::ModelSpec;
use deepgen_contract::precision::PrecisionSettings;
use deepgen_data::tokenizer::Tokenizer;
use deepgen_model::bridge::Bridge;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::init::Init;
use deepgen_model::parts::Parts;
use deepgen_model::weights::{self, StoredType, WeightFile};
use deepgen_model::{Device, Tensor, lora};

use crate::base_folder::TOKENIZER_FILE;
use crate::checkpoint::NamedTensors;
use crate::error::{JobError, JobResult, OrFail};
use crate::learner::Learner;
use crate::{files, precision};

/// Trained parameters of a checkpoint artifact, by their names in the whole model.
pub const TRAINED_FILE: &str = "trained.safetensors";
/// Moving average of the trained parameters within a checkpoint artifact.
pub const EMA_FILE: &str = "ema.safetensors";
/// Weights at the best look at held-out data.
pub const BEST_FILE: &str = "best.safetensors";
/// Description of the model that they belong to.
pub const SPEC_FILE: &str = "model.json";

/// Loads the parts in `folder`, held as `precision` says.
///
/// # Errors
/// When a file is missing or does not fit `model.json`.
pub fn load_parts(folder: &Path, precision: &PrecisionSettings, device: &Device) -> JobResult<Parts> {
    Parts::load_held(folder, device, precision::held(precision))
        .map_err(|error| JobError::input(format!("{}: {}", folder.display(), chain(&error))))
}

/// Loads the tokenizer in `folder`.
///
/// # Errors
/// When it is missing or damaged.
pub fn load_tokenizer(folder: &Path) -> JobResult<Tokenizer> {
    Tokenizer::load(&folder.join(TOKENIZER_FILE)).or_input(|| "the tokenizer")
}

/// Gives `parts` the bridge and the adapters of `spec` where they have none; parts that are there must agree.
///
/// # Errors
/// When the bridge of the weights has other sizes, or does not fit the decoder.
pub fn extend(mut parts: Parts, spec: &ModelSpec, seed: u64, device: &Device) -> JobResult<Parts> {
    if let Some(wanted) = &spec.bridge {
        match &parts.spec.bridge {
            None => {
                let init = Init::new(seed, device).at("bridge");
                let base = &parts.spec.base;
                let fresh = Bridge::new(&init, wanted, &base.vlm.language, &base.dit).map_err(JobError::input)?;
                parts.bridge = Some(fresh);
                parts.spec.bridge = Some(wanted.clone());
            }
            Some(found) if found != wanted => {
                return Err(JobError::input(format!(
                    "`model.bridge` differs from the bridge in the weights: {}",
                    differences(wanted, found)
                )));
            }
            Some(_) => {}
        }
    }
    if let (Some(config), None) = (&spec.lora, &parts.spec.lora) {
        let vlm = parts.vlm.take().ok_or_else(|| JobError::input("the weights hold no vision-language model"))?;
        parts.vlm = Some(lora::attach(vlm, config, seed));
        parts.spec.lora = Some(config.clone());
    }
    Ok(parts)
}

/// Names the settings in which two values of one type differ.
fn differences<T: serde::Serialize>(wanted: &T, found: &T) -> String {
    let object = |value: &T| match serde_json::to_value(value) {
        Ok(serde_json::Value::Object(object)) => object,
        _ => serde_json::Map::new(),
    };
    let (wanted, found) = (object(wanted), object(found));
    let differing = wanted.iter().filter(|(key, value)| found.get(*key) != Some(*value));
    let each = differing.map(|(key, value)| {
        format!("{key} is {} there and {value} here", found.get(key).unwrap_or(&serde_json::Value::Null))
    });
    each.collect::<Vec<_>>().join("; ")
}

/// Lays the tensors of `file` whose names start with `prefix` over the parameters of `model`.
///
/// # Errors
/// When a tensor has no parameter or another number of elements.
pub fn lay_over<M: Module>(model: M, file: &WeightFile, prefix: &str) -> JobResult<M> {
    let mut shapes = BTreeMap::new();
    weights::for_each_param(&model, |name, param| {
        shapes.insert(name.to_owned(), param.shape());
    });
    let mut values = BTreeMap::new();
    for stored in file.names().filter(|name| name.starts_with(prefix)) {
        let name = &stored[prefix.len()..];
        let data = file.get(stored).or_io(|| "read the checkpoint")?;
        match shapes.get(name) {
            None => return Err(JobError::input(format!("the checkpoint's {name} is no parameter of the model"))),
            Some(shape) if shape.iter().product::<usize>() != data.num_elements() => {
                return Err(JobError::input(format!("the checkpoint's {name} does not have the shape {shape:?}")));
            }
            Some(_) => values.insert(name.to_owned(), data),
        };
    }
    Ok(weights::map_params(model, |name, value| match values.remove(name) {
        Some(data) => {
            let count = data.num_elements();
            Tensor::from_data(TensorData::new(data.iter::<f32>().collect(), [count]), &value.device())
        }
        None => value,
    }))
}

/// Returns names and values of the parameters that train.
pub fn trained<M: Module>(model: &M) -> Vec<(String, TensorData)> {
    let mut tensors = Vec::new();
    weights::for_each_param(model, |name, param| {
        if param.is_trainable() {
            let values: Vec<f32> = param.value().into_data().iter::<f32>().collect();
            tensors.push((name.to_owned(), TensorData::new(values, param.shape())));
        }
    });
    tensors
}

/// Writes a checkpoint artifact: the parameters that trained, their moving average and their best if they are kept, and what
/// model they belong to. Returns what is to be said of them.
///
/// # Errors
/// When a file cannot be written.
pub fn write_checkpoint(learner: &Learner<DeepGen>, out: &Path) -> JobResult<Vec<String>> {
    let save = |file: &str, tensors: &NamedTensors| {
        weights::save(&out.join(file), tensors, StoredType::F32, &BTreeMap::new()).or_io(|| format!("write {file}"))
    };
    save(TRAINED_FILE, &trained(learner.model()))?;
    if let Some(ema) = learner.ema() {
        save(EMA_FILE, &ema.averages())?;
    }
    let mut notes = Vec::new();
    if let Some(best) = learner.best() {
        save(BEST_FILE, &best.weights)?;
        notes.push(format!("{BEST_FILE} holds the weights after step {}", best.step));
    }
    files::write_json(&out.join(SPEC_FILE), learner.model().spec()).or_io(|| "write the model's description")?;
    Ok(notes)
}

/// Returns an error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
