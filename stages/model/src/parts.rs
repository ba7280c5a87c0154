//! The parts of a model on disk: one safetensors file a part, and `model.json` that says what they are.
//!
//! | file | part |
//! |---|---|
//! | `vlm.safetensors` | vision-language model without adapters |
//! | `lora.safetensors` | adapters, as a PEFT adapter file |
//! | `bridge.safetensors` | think tokens, projectors, connector |
//! | `transformer.safetensors` | DiT |
//! | `vae.safetensors` | autoencoder |
//! | `conditioner.safetensors` | the base's own text encoder |
//!
//! A folder may hold some of the parts. Knows no artifact store and no training state.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::TensorData;
use deepgen_contract::model::ModelSpec;

use crate::Device;
use crate::bridge::Bridge;
use crate::conditioner::Conditioner;
use crate::dit::Dit;
use crate::init::Init;
use crate::lora;
use crate::vae::Vae;
use crate::vlm::{Vlm, is_adapter};
use crate::weights::{Held, StoredType, WeightFile, WeightWriter, WeightsError, for_each_param, load_into_held, specs};

/// The file that says what the parts are.
pub const SPEC_FILE: &str = "model.json";
/// Vision-language model without adapters.
pub const VLM_FILE: &str = "vlm.safetensors";
/// Adapters.
pub const LORA_FILE: &str = "lora.safetensors";
/// Bridge.
pub const BRIDGE_FILE: &str = "bridge.safetensors";
/// Diffusion transformer.
pub const DIT_FILE: &str = "transformer.safetensors";
/// Autoencoder.
pub const VAE_FILE: &str = "vae.safetensors";
/// Text encoder of the base.
pub const CONDITIONER_FILE: &str = "conditioner.safetensors";

/// Why parts could not be read, written or put together.
#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    /// A file cannot be read or written.
    #[error("cannot access {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The description is not valid.
    #[error("{path} does not describe a model")]
    Spec {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The bridge cannot be built.
    #[error("the bridge does not fit the decoder: {0}")]
    Bridge(String),
    /// A part that is needed is not there.
    #[error("the model has no {0}")]
    Missing(&'static str),
    /// See [`WeightsError`].
    #[error("cannot use {path}")]
    Weights {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: WeightsError,
    },
}

/// A description with the parts that are at hand.
#[derive(Debug, Clone)]
pub struct Parts {
    /// What the parts are.
    pub spec: ModelSpec,
    /// Vision-language model, with adapters if the description says so.
    pub vlm: Option<Vlm>,
    /// Bridge.
    pub bridge: Option<Bridge>,
    /// Diffusion transformer.
    pub dit: Option<Dit>,
    /// Autoencoder.
    pub vae: Option<Vae>,
    /// The base's own text encoder.
    pub conditioner: Option<Conditioner>,
}

/// Returns names and f32 values of the parameters whose names fit, in the order of the module's fields.
pub fn tensors_where<M: Module>(module: &M, is_wanted: impl Fn(&str) -> bool) -> Vec<(String, TensorData)> {
    let mut tensors = Vec::new();
    for_each_param(module, |name, param| {
        if is_wanted(name) {
            let values: Vec<f32> = param.value().into_data().iter::<f32>().collect();
            tensors.push((name.to_string(), TensorData::new(values, param.shape())));
        }
    });
    tensors
}

impl Parts {
    /// Describes a model without any part yet.
    pub fn none(spec: ModelSpec) -> Self {
        Self { spec, vlm: None, bridge: None, dit: None, vae: None, conditioner: None }
    }

    /// Loads whatever parts `folder` holds onto `device`, as f32.
    ///
    /// # Errors
    /// When the description or a file does not fit.
    pub fn load(folder: &Path, device: &Device) -> Result<Self, PartsError> {
        Self::load_held(folder, device, Held::F32)
    }

    /// Like [`Parts::load`], held as `held` says; adapters are always held in f32.
    ///
    /// # Errors
    /// See [`Parts::load`].
    pub fn load_held(folder: &Path, device: &Device, held: Held) -> Result<Self, PartsError> {
        let path = folder.join(SPEC_FILE);
        let text = std::fs::read_to_string(&path).map_err(|source| PartsError::Io { path: path.clone(), source })?;
        let spec: ModelSpec = serde_json::from_str(&text).map_err(|source| PartsError::Spec { path, source })?;
        // Parameters are drawn lazily, so the seed of weights that a file replaces does not matter.
        let part = Loading { folder, held };
        let init = Init::new(0, device);
        let base = &spec.base;
        let vlm =
            match load_part(folder, VLM_FILE, || Vlm::new(&init, &base.vlm), |vlm, file| vlm.load_held(file, held))? {
                Some(vlm) => Some(load_adapters(vlm, &spec, folder)?),
                None => None,
            };
        let bridge = match &spec.bridge {
            Some(config) => {
                let fresh = Bridge::new(&init, config, &base.vlm.language, &base.dit).map_err(PartsError::Bridge)?;
                part.load(BRIDGE_FILE, || fresh)?
            }
            None => None,
        };
        let conditioner = match &base.conditioner {
            Some(config) => part.load(CONDITIONER_FILE, || Conditioner::new(&init, config))?,
            None => None,
        };
        Ok(Self {
            vlm,
            bridge,
            dit: part.load(DIT_FILE, || Dit::new(&init, &base.dit))?,
            vae: part.load(VAE_FILE, || Vae::new(&init, &base.vae))?,
            conditioner,
            spec,
        })
    }

    /// Writes the description and the parts at hand into `folder`, which is created.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, folder: &Path, dtype: StoredType) -> Result<(), PartsError> {
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| PartsError::Io { path, source }
        };
        std::fs::create_dir_all(folder).map_err(io(folder))?;
        if let Some(vlm) = &self.vlm {
            save_part(folder, VLM_FILE, vlm, dtype)?;
            if self.spec.lora.is_some() {
                let path = folder.join(LORA_FILE);
                lora::save(vlm, &path, dtype).map_err(|source| PartsError::Weights { path, source })?;
            }
        }
        if let Some(bridge) = &self.bridge {
            save_part(folder, BRIDGE_FILE, bridge, dtype)?;
        }
        if let Some(dit) = &self.dit {
            save_part(folder, DIT_FILE, dit, dtype)?;
        }
        if let Some(vae) = &self.vae {
            save_part(folder, VAE_FILE, vae, dtype)?;
        }
        if let Some(conditioner) = &self.conditioner {
            save_part(folder, CONDITIONER_FILE, conditioner, dtype)?;
        }
        // Last, so that a folder with a description is whole.
        let path = folder.join(SPEC_FILE);
        let text = serde_json::to_string_pretty(&self.spec)
            .map_err(|source| PartsError::Spec { path: path.clone(), source })?;
        let temporary = folder.join(format!("{SPEC_FILE}.tmp"));
        std::fs::write(&temporary, text + "\n").map_err(io(&temporary))?;
        std::fs::File::open(&temporary).and_then(|file| file.sync_all()).map_err(io(&temporary))?;
        std::fs::rename(&temporary, &path).map_err(io(&path))
    }
}

/// A folder whose parts are held in a certain way.
struct Loading<'a> {
    folder: &'a Path,
    held: Held,
}

impl Loading<'_> {
    fn load<M: Module>(&self, name: &str, fresh: impl FnOnce() -> M) -> Result<Option<M>, PartsError> {
        load_part(self.folder, name, fresh, |module, file| load_into_held(module, file, "", self.held))
    }
}

fn load_part<M>(
    folder: &Path,
    name: &str,
    fresh: impl FnOnce() -> M,
    load: impl FnOnce(M, &WeightFile) -> Result<M, WeightsError>,
) -> Result<Option<M>, PartsError> {
    let path = folder.join(name);
    if !path.exists() {
        return Ok(None);
    }
    let loaded = WeightFile::open(&path).and_then(|file| load(fresh(), &file));
    loaded.map(Some).map_err(|source| PartsError::Weights { path, source })
}

/// Attaches and loads the adapters that the description promises.
fn load_adapters(vlm: Vlm, spec: &ModelSpec, folder: &Path) -> Result<Vlm, PartsError> {
    match &spec.lora {
        None => Ok(vlm),
        Some(config) => load_part(folder, LORA_FILE, || lora::attach(vlm, config, 0), lora::load)?
            .ok_or(PartsError::Missing("adapters")),
    }
}

/// Writes a module without its adapters, one tensor after the other.
fn save_part<M: Module>(folder: &Path, name: &str, module: &M, dtype: StoredType) -> Result<(), PartsError> {
    let path = folder.join(name);
    let written = || {
        let specs = specs(module, dtype).into_iter().filter(|spec| !is_adapter(&spec.name)).collect();
        let stem = name.trim_end_matches(".safetensors");
        let mut writer = WeightWriter::new(folder, stem, specs, &BTreeMap::new(), u64::MAX)?;
        let mut result = Ok(());
        for_each_param(module, |name, param| {
            if result.is_ok() && !is_adapter(name) {
                result = writer.push(name, &param.value().into_data());
            }
        });
        result.and_then(|()| writer.finish())
    };
    written().map_err(|source| PartsError::Weights { path, source })
}
