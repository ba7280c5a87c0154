//! Work that a person asks for outside of any pipeline: weights in, weights out, images from prompts.
//!
//! `deepgen-worker tool DIR` reads `tool.json` in DIR, says how far it is in `events.jsonl` and how it ended in
//! `outcome.json`, as a job does; what it makes goes where the request says.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::Preset;
use crate::train::FloatKind;

/// Version of [`ToolSpec`].
pub const TOOL_VERSION: u32 = 1;
/// The request, written before the worker starts.
pub const TOOL_FILE: &str = "tool.json";
/// Keyword of the text in a PNG file that says how the image was made: a [`GenerationRecord`] as JSON.
pub const PNG_KEYWORD: &str = "deepgen";
/// Version of [`GenerationRecord`].
pub const GENERATION_VERSION: u32 = 1;

/// `tool.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolSpec {
    /// [`TOOL_VERSION`] of the writer.
    pub version: u32,
    /// `cpu`, `wgpu[:i]` or `cuda[:i]`.
    pub device: String,
    /// What to do.
    pub request: ToolRequest,
}

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToolRequest {
    /// Foreign weights into a weights folder.
    Import(ImportRequest),
    /// A weights folder into a foreign layout.
    Export(ExportRequest),
    /// Prompts into images.
    Generate(GenerateRequest),
}

/// Number type of written weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WrittenType {
    /// bf16 where the source has bf16, else f32.
    Stored,
    /// bf16.
    Bf16,
    /// f32.
    F32,
}

/// Reads weights in any known layout, which is recognised, and writes a weights folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// Folder or file, absolute.
    pub source: PathBuf,
    /// Weights that the source builds on, where it holds only some parts: a folder in any layout, absolute.
    pub base: Option<PathBuf>,
    /// Sizes that the source's own files do not tell.
    pub preset: Option<Preset>,
    /// Folder to write, absolute; it must not hold a model yet.
    pub out: PathBuf,
    /// Number type.
    pub dtype: WrittenType,
}

/// Layout of exported weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportLayout {
    /// The released folders: `vlm/`, `transformer/`, `vae/`, `connector/`, `scheduler/`, with their `config.json`.
    Diffusers,
    /// The adapters alone: `adapter_config.json` and `adapter_model.safetensors`.
    Peft,
    /// The names of DeepGen's own `model.pt`: bridge, `transformer.` and adapters in one safetensors file.
    Deepgen,
}

/// Writes a weights folder in a foreign layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// Weights folder, absolute.
    pub weights: PathBuf,
    /// Layout.
    pub layout: ExportLayout,
    /// Folder to write, absolute.
    pub out: PathBuf,
    /// Number type.
    pub dtype: WrittenType,
}

/// A prompt with the images it refers to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptRequest {
    /// Prompt, or instruction when there are images.
    pub text: String,
    /// Reference images, absolute, in the order in which the model sees them.
    pub images: Vec<PathBuf>,
}

/// Draws images. What is absent is taken from `from`, or else from the model: the recipe's values for the release, the
/// base's own size for a small model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateRequest {
    /// Weights folder, absolute.
    pub weights: Option<PathBuf>,
    /// An image whose making is to be repeated.
    pub from: Option<PathBuf>,
    /// Prompts; none when `from` is given.
    pub prompts: Vec<PromptRequest>,
    /// Images for each prompt.
    pub count: usize,
    /// Euler steps.
    pub steps: Option<usize>,
    /// Guidance weight.
    pub cfg: Option<f64>,
    /// Height and width in pixels.
    pub size: Option<[usize; 2]>,
    /// Seed of the noise.
    pub seed: u64,
    /// Text of the unconditional branch.
    pub negative: String,
    /// Images drawn at once.
    pub batch: usize,
    /// Folder of the images, absolute; a file when it ends in `.png` and there is one image.
    pub out: PathBuf,
    /// Also write all images side by side.
    pub grid: bool,
}

/// A file that an image was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HashedPath {
    /// Where it was.
    pub path: PathBuf,
    /// blake3 of its content; of names and contents for a folder.
    pub blake3: String,
}

/// One image of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchRow {
    /// Prompt.
    pub prompt: String,
    /// Reference images.
    pub images: Vec<HashedPath>,
    /// Name of its noise stream; with the seed it gives the noise.
    pub noise: String,
}

/// How an image was made: enough to make it again, pixel for pixel, with the same weights on the same kind of device.
///
/// The whole batch is part of it, because prompts of a batch are padded to the longest, and padding reaches the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationRecord {
    /// [`GENERATION_VERSION`] of the writer.
    pub version: u32,
    /// Version of this project.
    pub deepgen_version: String,
    /// Weights.
    pub weights: HashedPath,
    /// Device.
    pub device: String,
    /// Number type that the model computed in.
    pub compute: FloatKind,
    /// The batch that the image was drawn in.
    pub batch: Vec<BatchRow>,
    /// Which one of it the image is.
    pub row: usize,
    /// Euler steps.
    pub steps: usize,
    /// Guidance weight.
    pub cfg: f64,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// Seed of the noise.
    pub seed: u64,
    /// Text of the unconditional branch.
    pub negative: String,
}
