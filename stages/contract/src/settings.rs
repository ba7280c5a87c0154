//! The resolved settings of a node, one type per stage kind, and the files outside the project that they name.
//!
//! Parsing and merging of TOML is the orchestrator's; this file only knows the typed result.

use serde::{Deserialize, Serialize};

use crate::artifact::ArtifactKind;
use crate::base::{
    AssembleSettings, BaseDitSettings, BaseTokenizerSettings, BaseVaeSettings, BaseVlmSettings, ImportSettings,
};
use crate::command::CommandSettings;
use crate::data::{MixSettings, PrepareSettings};
use crate::eval::{GenerateSettings, ScoreSettings};
use crate::rl::RlSettings;
use crate::stage::StageKind;
use crate::train::{HandoffSettings, TrainSettings};

/// Settings of a node, tagged by the kind of its stage. The large ones are boxed: a plan may hold ten thousand commands,
/// and each node takes as much room as the largest variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "stage_kind", content = "settings", rename_all = "snake_case")]
pub enum Settings {
    /// See [`ImportSettings`].
    Import(Box<ImportSettings>),
    /// See [`PrepareSettings`].
    Prepare(Box<PrepareSettings>),
    /// See [`MixSettings`].
    Mix(MixSettings),
    /// See [`TrainSettings`].
    Train(Box<TrainSettings>),
    /// See [`RlSettings`].
    Rl(Box<RlSettings>),
    /// See [`HandoffSettings`].
    Handoff(HandoffSettings),
    /// See [`GenerateSettings`].
    Generate(Box<GenerateSettings>),
    /// See [`ScoreSettings`].
    Score(ScoreSettings),
    /// See [`BaseTokenizerSettings`].
    BaseTokenizer(BaseTokenizerSettings),
    /// See [`BaseVaeSettings`].
    BaseVae(Box<BaseVaeSettings>),
    /// See [`BaseVlmSettings`].
    BaseVlm(Box<BaseVlmSettings>),
    /// See [`BaseDitSettings`].
    BaseDit(Box<BaseDitSettings>),
    /// See [`AssembleSettings`].
    Assemble(AssembleSettings),
    /// See [`CommandSettings`].
    Command(CommandSettings),
}

impl Settings {
    /// Returns the settings of `kind` held in `value`, a table of the stage's keys.
    ///
    /// # Errors
    /// Names the first key that is missing, unknown or of a wrong type.
    pub fn from_value(kind: StageKind, value: serde_json::Value) -> Result<Self, serde_json::Error> {
        let mut tagged = serde_json::Map::new();
        tagged.insert("stage_kind".into(), kind.name().into());
        tagged.insert("settings".into(), value);
        serde_json::from_value(tagged.into())
    }

    /// Returns the table of the stage's keys: the inverse of [`Settings::from_value`].
    ///
    /// # Errors
    /// When a number has no JSON form, such as NaN.
    pub fn to_value(&self) -> Result<serde_json::Value, serde_json::Error> {
        Ok(serde_json::to_value(self)?["settings"].take())
    }

    /// Returns the kind of stage that these settings belong to.
    pub fn stage_kind(&self) -> StageKind {
        match self {
            Self::Import(_) => StageKind::Import,
            Self::Prepare(_) => StageKind::Prepare,
            Self::Mix(_) => StageKind::Mix,
            Self::Train(_) => StageKind::Train,
            Self::Rl(_) => StageKind::Rl,
            Self::Handoff(_) => StageKind::Handoff,
            Self::Generate(_) => StageKind::Generate,
            Self::Score(_) => StageKind::Score,
            Self::BaseTokenizer(_) => StageKind::BaseTokenizer,
            Self::BaseVae(_) => StageKind::BaseVae,
            Self::BaseVlm(_) => StageKind::BaseVlm,
            Self::BaseDit(_) => StageKind::BaseDit,
            Self::Assemble(_) => StageKind::Assemble,
            Self::Command(_) => StageKind::Command,
        }
    }

    /// Returns what the node makes.
    pub fn output(&self) -> ArtifactKind {
        match self {
            Self::Command(command) => command.output_kind,
            other => other.stage_kind().output(),
        }
    }

    /// Returns true when the node computes on the run's device.
    pub fn uses_device(&self) -> bool {
        match self {
            Self::Command(command) => command.uses_device(),
            other => other.stage_kind().uses_device(),
        }
    }

    /// Returns the files and folders outside the artifact store that the node reads, as written in the settings.
    pub fn external_paths(&self) -> Vec<ExternalPath> {
        match self {
            Self::Import(import) => vec![ExternalPath {
                key: "path".into(),
                path: import.path.clone(),
                remedy: format!("get it from {} or set `path`", import.origin),
            }],
            Self::Prepare(prepare) => prepare.source.external_paths(),
            Self::Mix(mix) => mix.external_paths(),
            Self::Generate(generate) => generate.items.external_paths(),
            Self::Rl(rl) => rl.external_paths(),
            Self::Command(command) => command.external_paths(),
            _ => Vec::new(),
        }
    }
}

/// A file or folder that a node reads from outside the artifact store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalPath {
    /// Settings key that names it.
    pub key: String,
    /// The path as written, relative to the project's root unless absolute.
    pub path: String,
    /// What to do when it is missing.
    pub remedy: String,
}

/// Returns the JSON Schema of the settings of `kind`: checks keys, and serves editors.
#[cfg(feature = "schema")]
pub fn schema(kind: StageKind) -> schemars::Schema {
    match kind {
        StageKind::Import => schemars::schema_for!(ImportSettings),
        StageKind::Prepare => schemars::schema_for!(PrepareSettings),
        StageKind::Mix => schemars::schema_for!(MixSettings),
        StageKind::Train => schemars::schema_for!(TrainSettings),
        StageKind::Rl => schemars::schema_for!(RlSettings),
        StageKind::Handoff => schemars::schema_for!(HandoffSettings),
        StageKind::Generate => schemars::schema_for!(GenerateSettings),
        StageKind::Score => schemars::schema_for!(ScoreSettings),
        StageKind::BaseTokenizer => schemars::schema_for!(BaseTokenizerSettings),
        StageKind::BaseVae => schemars::schema_for!(BaseVaeSettings),
        StageKind::BaseVlm => schemars::schema_for!(BaseVlmSettings),
        StageKind::BaseDit => schemars::schema_for!(BaseDitSettings),
        StageKind::Assemble => schemars::schema_for!(AssembleSettings),
        StageKind::Command => schemars::schema_for!(CommandSettings),
    }
}
