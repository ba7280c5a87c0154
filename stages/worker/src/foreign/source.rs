//! Recognises weights in any layout and collects what they hold, under this project's names.
//!
//! | source | recognised by |
//! |---|---|
//! | weights folder of this project | `model.json` |
//! | PEFT adapter | `adapter_config.json` |
//! | released folders | sub-folders `vlm` (or `lmm`), `transformer`, `vae`, `connector` |
//! | one Hugging Face model | `config.json` |
//! | DeepGen's whole-model checkpoint | tensor names: a `.pt`, `.bin` or `.safetensors` file, or a folder of them |
//!
//! Knows no output.

use std::path::{Path, PathBuf};

use deepgen_contract::model::{
    BaseModelConfig, BridgeConfig, BridgeLayers, ConditionerConfig, DitConfig, LoraConfig, LoraTargets, ModelSpec,
    Padding, Preset, STACKED_LAYER_STEP, VaeConfig, VlmConfig,
};
use deepgen_data::tokenizer::Tokenizer;
use deepgen_model::parts;
use deepgen_model::vlm::{hub_name, is_adapter, is_head};
use deepgen_model::weights::WeightFile;

use super::configs::ConfigFile;
use crate::base_folder::TOKENIZER_FILE;
use crate::error::{JobError, JobResult, OrFail};

/// Shift of the schedule when no scheduler file is there (docs/spec/sft.md section 2).
const DEFAULT_SHIFT: f64 = 3.0;
/// Longest prompt of the release (docs/spec/model.md section 1).
const DEFAULT_MAX_LENGTH: usize = 1024;
/// Channels of a connector head in the release.
const CONNECTOR_HEAD_DIM: usize = 64;
/// Epsilon of the connector's norms in the release.
const CONNECTOR_EPS: f64 = 1e-6;
/// Beginnings of whole-model names.
const DIT_PREFIX: &str = "transformer.";

/// What a source holds: settings and tensors of each part, either of which may come from elsewhere.
#[derive(Debug, Default)]
pub struct Collected {
    /// Vision-language model, hub names.
    pub vlm: Option<WeightFile>,
    /// Its sizes.
    pub vlm_config: Option<VlmConfig>,
    /// Diffusion transformer.
    pub dit: Option<WeightFile>,
    /// Its sizes.
    pub dit_config: Option<DitConfig>,
    /// Autoencoder.
    pub vae: Option<WeightFile>,
    /// Its sizes.
    pub vae_config: Option<VaeConfig>,
    /// Bridge.
    pub bridge: Option<WeightFile>,
    /// Its settings, where they are written down.
    pub bridge_config: Option<BridgeConfig>,
    /// Heads and epsilon of its connector, where only they are written down.
    pub connector: Option<(usize, f64)>,
    /// Adapters, under the names they have in the model.
    pub lora: Option<WeightFile>,
    /// Their settings.
    pub lora_config: Option<LoraConfig>,
    /// The base's own text encoder.
    pub conditioner: Option<WeightFile>,
    /// Its sizes.
    pub conditioner_config: Option<ConditionerConfig>,
    /// Shift of the schedule.
    pub shift: Option<f64>,
    /// Tokenizer file.
    pub tokenizer: Option<PathBuf>,
    /// What a person should know.
    pub remarks: Vec<String>,
}

fn open(path: &Path) -> JobResult<WeightFile> {
    WeightFile::open(path).or_input(|| "the weights")
}

impl Collected {
    /// Opens `source` in whatever layout it has.
    ///
    /// # Errors
    /// When it is missing, damaged, or of no known layout.
    pub fn open(source: &Path) -> JobResult<Self> {
        let mut found = Self::default();
        if !source.exists() {
            return Err(JobError::input(format!("{} does not exist", source.display())));
        }
        found.find_tokenizer(source);
        if source.join(parts::SPEC_FILE).is_file() {
            found.add_own(source)?;
        } else if source.join("adapter_config.json").is_file() {
            found.add_adapter(source)?;
        } else if ["vlm", "lmm", "transformer", "vae", "connector"].iter().any(|name| source.join(name).is_dir()) {
            found.add_folders(source)?;
        } else if source.join("config.json").is_file() {
            found.add_model(source)?;
        } else {
            found.add_whole(open(source)?)?;
        }
        Ok(found)
    }

    fn find_tokenizer(&mut self, source: &Path) {
        let folders = [source.to_owned(), source.join("tokenizer"), source.join("vlm"), source.join("lmm")];
        self.tokenizer = folders.iter().map(|folder| folder.join(TOKENIZER_FILE)).find(|path| path.is_file());
    }

    /// Padding id of the tokenizer at hand.
    fn pad(&self) -> Option<u32> {
        let tokenizer = Tokenizer::load(self.tokenizer.as_deref()?).ok()?;
        Some(tokenizer.special_tokens().ok()?.pad)
    }

    fn add_own(&mut self, folder: &Path) -> JobResult<()> {
        let path = folder.join(parts::SPEC_FILE);
        let text = std::fs::read_to_string(&path).or_io(|| path.display())?;
        let spec: ModelSpec = serde_json::from_str(&text).or_input(|| path.display())?;
        let part = |name: &str| -> JobResult<Option<WeightFile>> {
            let path = folder.join(name);
            if path.is_file() { open(&path).map(Some) } else { Ok(None) }
        };
        self.vlm = part(parts::VLM_FILE)?;
        self.dit = part(parts::DIT_FILE)?;
        self.vae = part(parts::VAE_FILE)?;
        self.bridge = part(parts::BRIDGE_FILE)?;
        self.conditioner = part(parts::CONDITIONER_FILE)?;
        self.lora = part(parts::LORA_FILE)?.map(|file| file.rename(adapter_name));
        let BaseModelConfig { vlm, dit, vae, scheduler_shift, conditioner } = spec.base;
        (self.vlm_config, self.dit_config, self.vae_config) = (Some(vlm), Some(dit), Some(vae));
        (self.shift, self.conditioner_config) = (Some(scheduler_shift), conditioner);
        (self.bridge_config, self.lora_config) = (spec.bridge, spec.lora);
        Ok(())
    }

    fn add_adapter(&mut self, folder: &Path) -> JobResult<()> {
        self.set_lora(open(folder)?);
        let targets = self.lora_targets();
        self.lora_config = Some(ConfigFile::open(&folder.join("adapter_config.json"))?.lora(targets)?);
        Ok(())
    }

    fn add_folders(&mut self, folder: &Path) -> JobResult<()> {
        for name in ["vlm", "lmm", "transformer", "vae"] {
            if folder.join(name).is_dir() {
                self.add_model(&folder.join(name))?;
            }
        }
        let scheduler = folder.join("scheduler").join("scheduler_config.json");
        if scheduler.is_file() {
            self.shift = Some(ConfigFile::open(&scheduler)?.shift()?);
        }
        let connector = folder.join("connector");
        if connector.is_dir() {
            let config = connector.join("config.json");
            if config.is_file() {
                let text = std::fs::read_to_string(&config).or_io(|| config.display())?;
                self.bridge_config = serde_json::from_str(&text).ok();
                self.connector =
                    Some(ConfigFile::open(&config)?.connector((0, CONNECTOR_EPS))?).filter(|(heads, _)| *heads > 0);
            }
            self.bridge = Some(open(&connector)?);
        }
        if folder.join("lora").is_dir() {
            self.add_adapter(&folder.join("lora"))?;
        }
        Ok(())
    }

    /// Adds one model as the libraries save it.
    fn add_model(&mut self, folder: &Path) -> JobResult<()> {
        let config = ConfigFile::open(&folder.join("config.json"))?;
        match (config.text("model_type"), config.text("_class_name")) {
            (Some("qwen2_5_vl"), _) => {
                self.vlm_config = Some(config.vlm(self.pad())?);
                self.set_vlm(open(folder)?)?;
            }
            (_, Some("SD3Transformer2DModel")) => {
                self.dit_config = Some(config.dit()?);
                self.dit = Some(open(folder)?);
            }
            (_, Some("AutoencoderKL")) => {
                self.vae_config = Some(config.vae()?);
                self.vae = Some(open(folder)?);
            }
            (model, class) => {
                return Err(JobError::input(format!(
                    "{} holds a {}, which is none of qwen2_5_vl, SD3Transformer2DModel, AutoencoderKL",
                    folder.display(),
                    model.or(class).unwrap_or("model of unknown kind")
                )));
            }
        }
        Ok(())
    }

    fn set_vlm(&mut self, file: WeightFile) -> JobResult<()> {
        if let Some(remark) = untied_head(&file)? {
            self.remarks.push(remark);
        }
        self.vlm = Some(file.rename(|name| Some(hub_name(name)).filter(|name| !is_adapter(name) && !is_head(name))));
        Ok(())
    }

    fn set_lora(&mut self, file: WeightFile) {
        if file.names().any(|name| name.contains("lm_head.lora_")) {
            self.remarks.push("the adapter of the language head is left out: DeepGen never runs the head".into());
        }
        self.lora = Some(file.rename(adapter_name));
    }

    fn lora_targets(&self) -> LoraTargets {
        let has_vision = self.lora.iter().flat_map(WeightFile::names).any(|name| name.starts_with("visual."));
        if has_vision { LoraTargets::Auto } else { LoraTargets::Language }
    }

    /// Adds a whole-model checkpoint by its tensor names (docs/spec/model.md section 9.4).
    fn add_whole(&mut self, file: WeightFile) -> JobResult<()> {
        let file = file.rename(|name| Some(name.strip_prefix("module.").unwrap_or(name).to_owned()));
        let is_bridge =
            |name: &str| name == "meta_queries" || name.starts_with("connector.") || name.starts_with("projector_");
        let is_vlm = |name: &str| ["lmm.", "model.", "visual.", "base_model."].iter().any(|p| name.starts_with(p));
        let select = |is_wanted: &dyn Fn(&str) -> bool| {
            file.names().any(is_wanted).then(|| file.clone().rename(|name| is_wanted(name).then(|| name.to_owned())))
        };
        let unknown: Vec<&str> =
            file.names().filter(|name| !is_bridge(name) && !is_vlm(name) && !name.starts_with(DIT_PREFIX)).collect();
        // The stored position of an exporter's counter and the like carry no weights.
        if unknown.len() == file.names().count() {
            return Err(JobError::input(format!(
                "these weights are of no known layout; their first names are {}",
                unknown.into_iter().take(3).collect::<Vec<_>>().join(", ")
            )));
        }
        if !unknown.is_empty() {
            return Err(JobError::input(format!("the checkpoint holds unknown tensors: {}", unknown.join(", "))));
        }
        self.bridge = select(&is_bridge);
        self.dit = select(&|name| name.starts_with(DIT_PREFIX))
            .map(|file| file.rename(|name| name.strip_prefix(DIT_PREFIX).map(str::to_owned)));
        if let Some(adapters) = select(&|name| is_vlm(name) && is_adapter(name)) {
            self.set_lora(adapters);
        }
        if let Some(vlm) = select(&|name| is_vlm(name) && !is_adapter(name) && !name.contains("lm_head")) {
            self.set_vlm(vlm)?;
        }
        Ok(())
    }

    /// Returns what `self` and `other` hold; where both hold something, `other` counts.
    pub fn overlaid_by(self, other: Self) -> Self {
        Self {
            vlm: other.vlm.or(self.vlm),
            vlm_config: other.vlm_config.or(self.vlm_config),
            dit: other.dit.or(self.dit),
            dit_config: other.dit_config.or(self.dit_config),
            vae: other.vae.or(self.vae),
            vae_config: other.vae_config.or(self.vae_config),
            bridge: other.bridge.or(self.bridge),
            bridge_config: other.bridge_config.or(self.bridge_config),
            connector: other.connector.or(self.connector),
            lora: other.lora.or(self.lora),
            lora_config: other.lora_config.or(self.lora_config),
            conditioner: other.conditioner.or(self.conditioner),
            conditioner_config: other.conditioner_config.or(self.conditioner_config),
            shift: other.shift.or(self.shift),
            tokenizer: other.tokenizer.or(self.tokenizer),
            remarks: [self.remarks, other.remarks].concat(),
        }
    }

    /// Returns the description of everything that was collected. Sizes that no file tells are those of `preset`.
    ///
    /// # Errors
    /// Names the part whose sizes are not known.
    pub fn spec(&self, preset: Option<Preset>) -> JobResult<ModelSpec> {
        let preset = preset.map(Preset::spec);
        let preset = preset.as_ref();
        let unknown = |part: &str| {
            JobError::input(format!(
                "nothing tells the sizes of the {part}: name a folder that has it with --base, or its sizes with --model"
            ))
        };
        let base = BaseModelConfig {
            vlm: self
                .vlm_config
                .clone()
                .or_else(|| preset.map(|spec| spec.base.vlm.clone()))
                .ok_or_else(|| unknown("vision-language model"))?,
            dit: self
                .dit_config
                .clone()
                .or_else(|| preset.map(|spec| spec.base.dit.clone()))
                .ok_or_else(|| unknown("diffusion transformer"))?,
            vae: self
                .vae_config
                .clone()
                .or_else(|| preset.map(|spec| spec.base.vae.clone()))
                .ok_or_else(|| unknown("autoencoder"))?,
            scheduler_shift: self.shift.unwrap_or(DEFAULT_SHIFT),
            conditioner: self.conditioner.as_ref().and(self.conditioner_config.clone()),
        };
        let bridge = match &self.bridge {
            None => None,
            Some(file) => Some(self.bridge_config(file, &base, preset.and_then(|spec| spec.bridge.as_ref()))?),
        };
        let lora = match &self.lora {
            None => None,
            Some(file) => Some(self.lora_config(file)?),
        };
        Ok(ModelSpec { base, bridge, lora })
    }

    /// Reads the bridge's settings off its tensors; what they do not tell comes from its file or the preset.
    fn bridge_config(
        &self,
        file: &WeightFile,
        base: &BaseModelConfig,
        preset: Option<&BridgeConfig>,
    ) -> JobResult<BridgeConfig> {
        let shape = |name: &str| {
            let shape = file.shape(name).filter(|shape| shape.len() == 2);
            shape.ok_or_else(|| JobError::input(format!("the bridge has no matrix {name}")))
        };
        let projector = shape("projector_1.weight")?;
        let (hidden_size, num_stacked) = (projector[0], projector[1] / base.vlm.language.hidden_size);
        let written = self.bridge_config.as_ref().or(preset);
        let num_layers = base.vlm.language.num_hidden_layers;
        let layers = match written.map(|config| &config.layers) {
            Some(layers) if layers.resolve(num_layers).is_ok_and(|all| all.len() == num_stacked) => layers.clone(),
            _ if num_stacked == 1 => BridgeLayers::Last,
            _ if BridgeLayers::Rule.resolve(num_layers).is_ok_and(|all| all.len() == num_stacked) => BridgeLayers::Rule,
            _ => {
                let rule: Vec<usize> = (1..num_layers).rev().step_by(STACKED_LAYER_STEP).take(num_stacked).collect();
                BridgeLayers::Listed(rule)
            }
        };
        let layer_names = |i: usize| format!("connector.layers.{i}.mlp.fc1.weight");
        let num_hidden_layers = (0..).take_while(|&i| file.shape(&layer_names(i)).is_some()).count();
        let guessed = (hidden_size / CONNECTOR_HEAD_DIM).max(1);
        let (num_attention_heads, layer_norm_eps) = match (self.connector, written) {
            (Some(connector), _) => connector,
            (None, Some(config)) => (config.num_attention_heads, config.layer_norm_eps),
            (None, None) => (guessed, CONNECTOR_EPS),
        };
        Ok(BridgeConfig {
            layers,
            num_queries: file.shape("meta_queries").map_or(0, |shape| shape[0]),
            hidden_size,
            intermediate_size: shape(&layer_names(0))?[0],
            num_hidden_layers,
            num_attention_heads,
            layer_norm_eps,
            padding: written.map_or(Padding::Longest, |config| config.padding),
            max_length: written.map_or(DEFAULT_MAX_LENGTH, |config| config.max_length),
        })
    }

    /// Returns the adapters' settings; a checkpoint does not tell the scale, which is 2 in the release.
    fn lora_config(&self, file: &WeightFile) -> JobResult<LoraConfig> {
        if let Some(config) = &self.lora_config {
            return Ok(config.clone());
        }
        let first = file.names().find(|name| name.ends_with("lora_A.default.weight"));
        let rank = first.and_then(|name| file.shape(name)).map(|shape| shape[0]);
        let rank = rank.ok_or_else(|| JobError::input("the checkpoint's adapters have no lora_A"))?;
        Ok(LoraConfig { targets: self.lora_targets(), rank, alpha: 2.0 * rank as f64, dropout: 0.0 })
    }
}

/// Returns the name of an adapter tensor in the model, `None` for anything else.
fn adapter_name(name: &str) -> Option<String> {
    Some(hub_name(name)).filter(|name| is_adapter(name) && !is_head(name))
}

/// Says so when the language head is not the embedding.
fn untied_head(file: &WeightFile) -> JobResult<Option<String>> {
    let Some(head) = file.names().find(|name| name.ends_with("lm_head.weight")) else { return Ok(None) };
    let embedding = file.names().find(|name| name.ends_with("embed_tokens.weight"));
    let is_tied = match embedding {
        Some(embedding) => {
            let read = |name: &str| file.stored(name).or_input(|| "the language head");
            read(head)?.bytes() == read(embedding)?.bytes()
        }
        None => false,
    };
    Ok((!is_tied).then(|| {
        "lm_head.weight is not the token embedding and is left out: DeepGen never runs the language head".into()
    }))
}
