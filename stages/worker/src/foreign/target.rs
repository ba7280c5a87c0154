//! Writes collected weights: as a weights folder of this project, or in a foreign layout.
//!
//! Tensors go from the mapped source to the file one by one. Before anything is written, names and shapes are compared
//! with those of the model that the description promises.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::TensorData;
use deepgen_contract::model::{LoraConfig, ModelSpec};
use deepgen_contract::tool::WrittenType;
use deepgen_model::bridge::Bridge;
use deepgen_model::conditioner::Conditioner;
use deepgen_model::dit::Dit;
use deepgen_model::init::Init;
use deepgen_model::lora;
use deepgen_model::parts;
use deepgen_model::vae::Vae;
use deepgen_model::vlm::{Vlm, is_adapter};
use deepgen_model::weights::{
    MAX_SHARD_BYTES, Mismatch, StoredType, TensorSpec, WeightFile, WeightWriter, WeightsError, check, for_each_param,
};
use deepgen_model::{Device, Tensor};

use super::configs;
use super::source::Collected;
use crate::base_folder::TOKENIZER_FILE;
use crate::error::{JobError, JobResult, OrFail};
use crate::files;

/// Says how far the writing is: bytes done of all bytes.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// A part on its way out.
struct Part<'a> {
    file: &'a WeightFile,
    /// Adapters that are added into the weights they adapt.
    merged: Option<(&'a WeightFile, &'a LoraConfig)>,
}

/// Fails unless every part has exactly the tensors of the model that `spec` describes.
///
/// # Errors
/// Lists all missing, unexpected and wrongly shaped tensors of all parts.
pub fn verify(found: &Collected, spec: &ModelSpec) -> JobResult<()> {
    // Parameters of these models are never drawn.
    let init = Init::new(0, &Device::flex());
    let base = &spec.base;
    let mut all = Mismatch::default();
    let mut note = |part: &str, result: Result<(), WeightsError>| -> JobResult<()> {
        match result {
            Ok(()) => Ok(()),
            Err(WeightsError::Mismatch(mismatch)) => {
                let named = |name: String| format!("{part}: {name}");
                all.missing.extend(mismatch.missing.into_iter().map(named));
                all.unexpected.extend(mismatch.unexpected.into_iter().map(named));
                all.wrong_shape.extend(mismatch.wrong_shape.into_iter().map(|(name, a, b)| (named(name), a, b)));
                Ok(())
            }
            Err(error) => Err(JobError::input(error.to_string())),
        }
    };
    if let Some(file) = &found.vlm {
        note("vlm", check(&Vlm::new(&init, &base.vlm), file, ""))?;
    }
    if let Some(file) = &found.dit {
        note("transformer", check(&Dit::new(&init, &base.dit), file, ""))?;
    }
    if let Some(file) = &found.vae {
        note("vae", check(&Vae::new(&init, &base.vae), file, ""))?;
    }
    if let (Some(file), Some(config)) = (&found.bridge, &spec.bridge) {
        let bridge = Bridge::new(&init, config, &base.vlm.language, &base.dit).map_err(JobError::input)?;
        note("bridge", check(&bridge, file, ""))?;
    }
    if let (Some(file), Some(config)) = (&found.conditioner, &base.conditioner) {
        note("conditioner", check(&Conditioner::new(&init, config), file, ""))?;
    }
    if let (Some(file), Some(config)) = (&found.lora, &spec.lora) {
        note("adapters", check_adapters(&lora::attach(Vlm::new(&init, &base.vlm), config, 0), file))?;
    }
    if all.is_empty() { Ok(()) } else { Err(JobError::input(all.to_string())) }
}

fn check_adapters<M: Module>(vlm: &M, file: &WeightFile) -> Result<(), WeightsError> {
    let mut mismatch = Mismatch::default();
    let mut known = Vec::new();
    for_each_param(vlm, |name, param| {
        if !is_adapter(name) {
            return;
        }
        known.push(name.to_owned());
        match file.shape(name) {
            None => mismatch.missing.push(name.into()),
            Some(shape) if shape != param.shape() => {
                mismatch.wrong_shape.push((name.into(), param.shape(), shape.to_vec()));
            }
            Some(_) => {}
        }
    });
    mismatch.unexpected = file.names().filter(|name| !known.iter().any(|k| k == name)).map(Into::into).collect();
    if mismatch.is_empty() { Ok(()) } else { Err(WeightsError::Mismatch(mismatch)) }
}

/// Writes a weights folder of this project into `out`, which is created; the description comes last.
///
/// # Errors
/// When the disk is full, or a source cannot be read to its end.
pub fn write_own(
    found: &Collected,
    spec: &ModelSpec,
    out: &Path,
    dtype: WrittenType,
    progress: Progress<'_>,
) -> JobResult<()> {
    std::fs::create_dir_all(out).or_io(|| format!("create {}", out.display()))?;
    let mut writing = Writing { dtype, done: 0, total: total_bytes(found, dtype), progress };
    let single = |name: &str| (name.trim_end_matches(".safetensors").to_owned(), u64::MAX);
    for (file, name) in [
        (&found.vlm, parts::VLM_FILE),
        (&found.dit, parts::DIT_FILE),
        (&found.vae, parts::VAE_FILE),
        (&found.bridge, parts::BRIDGE_FILE),
        (&found.conditioner, parts::CONDITIONER_FILE),
    ] {
        if let Some(file) = file {
            writing.part(&Part { file, merged: None }, out, single(name), str::to_owned)?;
        }
    }
    if let Some(file) = &found.lora {
        writing.part(&Part { file, merged: None }, out, single(parts::LORA_FILE), lora::adapter_file_name)?;
    }
    copy_tokenizer(found, out)?;
    files::write_json(&out.join(parts::SPEC_FILE), spec).or_io(|| "write the model's description")
}

/// Writes the released folders into `out`: `vlm`, `transformer`, `vae`, `connector`, `scheduler`, `tokenizer`.
///
/// Adapters are added into the weights they adapt, as in the release.
///
/// # Errors
/// See [`write_own`].
pub fn write_folders(
    found: &Collected,
    spec: &ModelSpec,
    out: &Path,
    dtype: WrittenType,
    progress: Progress<'_>,
) -> JobResult<()> {
    let mut writing = Writing { dtype, done: 0, total: total_bytes(found, dtype), progress };
    let folder = |name: &str| {
        let folder = out.join(name);
        std::fs::create_dir_all(&folder).or_io(|| format!("create {}", folder.display())).map(|()| folder)
    };
    let json = |folder: &Path, name: &str, value: &serde_json::Value| {
        files::write_json(&folder.join(name), value).or_io(|| format!("write {name}"))
    };
    let diffusers = || ("diffusion_pytorch_model".to_owned(), MAX_SHARD_BYTES);
    if let Some(file) = &found.vlm {
        let folder = folder("vlm")?;
        let merged = found.lora.as_ref().zip(spec.lora.as_ref());
        writing.part(&Part { file, merged }, &folder, ("model".into(), MAX_SHARD_BYTES), str::to_owned)?;
        let torch_dtype =
            if written_type(file, "model.norm.weight", dtype) == StoredType::Bf16 { "bfloat16" } else { "float32" };
        json(&folder, "config.json", &configs::vlm_json(&spec.base.vlm, torch_dtype))?;
    }
    if let Some(file) = &found.dit {
        let folder = folder("transformer")?;
        writing.part(&Part { file, merged: None }, &folder, diffusers(), str::to_owned)?;
        json(&folder, "config.json", &configs::dit_json(&spec.base.dit))?;
    }
    if let Some(file) = &found.vae {
        let folder = folder("vae")?;
        writing.part(&Part { file, merged: None }, &folder, diffusers(), str::to_owned)?;
        json(&folder, "config.json", &configs::vae_json(&spec.base.vae))?;
    }
    if let (Some(file), Some(config)) = (&found.bridge, &spec.bridge) {
        let folder = folder("connector")?;
        writing.part(&Part { file, merged: None }, &folder, ("model".into(), MAX_SHARD_BYTES), str::to_owned)?;
        files::write_json(&folder.join("config.json"), config).or_io(|| "write the connector's settings")?;
    }
    json(&folder("scheduler")?, "scheduler_config.json", &configs::scheduler_json(spec.base.scheduler_shift))?;
    if found.tokenizer.is_some() {
        copy_tokenizer(found, &folder("tokenizer")?)?;
    }
    Ok(())
}

/// Writes the adapters into `out` as PEFT saves them.
///
/// # Errors
/// When there are none; else see [`write_own`].
pub fn write_adapter(
    found: &Collected,
    spec: &ModelSpec,
    out: &Path,
    dtype: WrittenType,
    progress: Progress<'_>,
) -> JobResult<()> {
    let (Some(file), Some(config)) = (&found.lora, &spec.lora) else {
        return Err(JobError::input("these weights hold no adapters: they were merged, or there never were any"));
    };
    std::fs::create_dir_all(out).or_io(|| format!("create {}", out.display()))?;
    let mut writing = Writing { dtype, done: 0, total: part_bytes(file, dtype), progress };
    let stem = ("adapter_model".to_owned(), u64::MAX);
    writing.part(&Part { file, merged: None }, out, stem, lora::adapter_file_name)?;
    files::write_json(&out.join("adapter_config.json"), &configs::lora_json(config))
        .or_io(|| "write adapter_config.json")
}

/// Writes bridge, DiT and adapters into `out/model.safetensors` under the names of DeepGen's `model.pt`.
///
/// # Errors
/// When there is nothing to write; else see [`write_own`].
pub fn write_whole(found: &Collected, out: &Path, dtype: WrittenType, progress: Progress<'_>) -> JobResult<()> {
    let mut all: Option<WeightFile> = None;
    let mut add = |file: &Option<WeightFile>, name: &dyn Fn(&str) -> String| {
        if let Some(file) = file {
            let renamed = file.clone().rename(|old| Some(name(old)));
            all = Some(match all.take() {
                Some(before) => before.overlaid_by(renamed),
                None => renamed,
            });
        }
    };
    add(&found.bridge, &str::to_owned);
    add(&found.dit, &|name| format!("transformer.{name}"));
    add(&found.lora, &whole_name);
    let file = all.ok_or_else(|| JobError::input("these weights hold neither bridge nor transformer nor adapters"))?;
    std::fs::create_dir_all(out).or_io(|| format!("create {}", out.display()))?;
    let mut writing = Writing { dtype, done: 0, total: part_bytes(&file, dtype), progress };
    writing.part(&Part { file: &file, merged: None }, out, ("model".into(), u64::MAX), str::to_owned)
}

/// Returns the whole-model name of a tensor in hub spelling.
fn whole_name(name: &str) -> String {
    match name.strip_prefix("model.") {
        Some(rest) => format!("lmm.model.language_model.{rest}"),
        None => format!("lmm.model.{name}"),
    }
}

fn copy_tokenizer(found: &Collected, out: &Path) -> JobResult<()> {
    let Some(tokenizer) = &found.tokenizer else { return Ok(()) };
    let to = out.join(TOKENIZER_FILE);
    std::fs::copy(tokenizer, &to).or_io(|| format!("copy {} to {}", tokenizer.display(), to.display()))?;
    Ok(())
}

fn written_type(file: &WeightFile, name: &str, dtype: WrittenType) -> StoredType {
    match dtype {
        WrittenType::Bf16 => StoredType::Bf16,
        WrittenType::F32 => StoredType::F32,
        WrittenType::Stored if file.is_bf16(name) => StoredType::Bf16,
        WrittenType::Stored => StoredType::F32,
    }
}

fn part_bytes(file: &WeightFile, dtype: WrittenType) -> u64 {
    let bytes = |name: &str| {
        let size = if written_type(file, name, dtype) == StoredType::Bf16 { 2 } else { 4 };
        file.shape(name).map_or(0, |shape| shape.iter().product::<usize>() as u64 * size)
    };
    file.names().map(bytes).sum()
}

fn total_bytes(found: &Collected, dtype: WrittenType) -> u64 {
    let all = [&found.vlm, &found.dit, &found.vae, &found.bridge, &found.conditioner, &found.lora];
    all.into_iter().flatten().map(|file| part_bytes(file, dtype)).sum()
}

/// The state of a writing.
struct Writing<'a> {
    dtype: WrittenType,
    done: u64,
    total: u64,
    progress: Progress<'a>,
}

impl Writing<'_> {
    /// Writes the tensors of a part, in order of name, into `folder`.
    fn part(
        &mut self,
        part: &Part<'_>,
        folder: &Path,
        (stem, max_shard_bytes): (String, u64),
        name: impl Fn(&str) -> String,
    ) -> JobResult<()> {
        let names: Vec<&str> = part.file.names().collect();
        let spec = |old: &&str| TensorSpec {
            name: name(old),
            shape: part.file.shape(old).unwrap_or_default().to_vec(),
            dtype: written_type(part.file, old, self.dtype),
        };
        let specs: Vec<TensorSpec> = names.iter().map(spec).collect();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let failed = || format!("write {stem} into {}", folder.display());
        let mut writer = WeightWriter::new(folder, &stem, specs, &metadata, max_shard_bytes).or_io(failed)?;
        for old in names {
            let data = part.read(old)?;
            let size = if written_type(part.file, old, self.dtype) == StoredType::Bf16 { 2 } else { 4 };
            self.done += data.num_elements() as u64 * size;
            writer.push(&name(old), &data).or_io(failed)?;
            (self.progress)(self.done, self.total);
        }
        writer.finish().or_io(failed)
    }
}

impl Part<'_> {
    fn read(&self, name: &str) -> JobResult<TensorData> {
        let stored = self.file.stored(name).or_io(|| "read the weights")?;
        let Some((adapters, config)) = self.merged else { return Ok(stored) };
        let scale = config.alpha / config.rank as f64;
        let device = Device::flex();
        match lora::delta(adapters, name, scale, &device).or_io(|| "read the adapters")? {
            None => Ok(stored),
            Some(delta) => {
                let weight: Tensor<2> = Tensor::from_data(self.file.get(name).or_io(|| "read the weights")?, &device);
                Ok((weight + delta).into_data())
            }
        }
    }
}
