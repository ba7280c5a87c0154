//! `deepgen import-weights` and `deepgen export`: weights of others in, weights for others out.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use deepgen_contract::model::Preset;
use deepgen_contract::tool::{ExportLayout, ExportRequest, ImportRequest, ToolRequest, WrittenType};

use super::tool::{self, Where, absolute};
use crate::cli::{Exit, Wrong};

/// Number type of written weights.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Dtype {
    /// bf16 where the source has bf16, else f32
    Stored,
    /// bf16
    Bf16,
    /// f32
    F32,
}

impl From<Dtype> for WrittenType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Stored => Self::Stored,
            Dtype::Bf16 => Self::Bf16,
            Dtype::F32 => Self::F32,
        }
    }
}

/// Arguments of `deepgen import-weights`.
#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// Folder or file: released folders, a Hugging Face or diffusers model, a PEFT adapter, a whole-model checkpoint
    pub source: PathBuf,
    /// Weights that the source builds on, in any layout, when it holds only some parts
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// Sizes that the source does not tell: qwen2.5-vl-3b, sd3.5-medium, deepgen-5b
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Number type of the written weights
    #[arg(long, value_enum, default_value = "stored")]
    pub dtype: Dtype,
    #[command(flatten)]
    pub place: Where,
}

/// Arguments of `deepgen export`.
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// Weights folder
    #[arg(long, value_name = "DIR")]
    pub weights: PathBuf,
    /// Layout to write
    #[arg(long, value_enum)]
    pub layout: Layout,
    /// Folder to write; it must be empty or absent
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Number type of the written weights
    #[arg(long, value_enum, default_value = "stored")]
    pub dtype: Dtype,
    #[command(flatten)]
    pub place: Where,
}

/// Layout of exported weights.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Layout {
    /// The released folders: vlm, transformer, vae, connector, scheduler, tokenizer; adapters are merged
    Diffusers,
    /// The adapters alone, as PEFT saves them
    Peft,
    /// The names of DeepGen's model.pt, in one safetensors file
    Deepgen,
}

/// Reads foreign weights.
///
/// # Errors
/// When the sizes have an unknown name, or the worker says so.
pub fn import(args: &ImportArgs) -> Result<Exit> {
    let preset = args.model.as_deref().map(preset).transpose()?;
    let request = ImportRequest {
        source: absolute(&args.source)?,
        base: args.base.as_deref().map(absolute).transpose()?,
        preset,
        out: absolute(&args.out)?,
        dtype: args.dtype.into(),
    };
    tool::run(ToolRequest::Import(request), "cpu", &args.place)
}

fn preset(name: &str) -> Result<Preset> {
    Preset::parse(name).ok_or_else(|| {
        let known = Preset::ALL.map(Preset::name).join(", ");
        Wrong(format!("no sizes are named {name}; there are {known}")).into()
    })
}

/// Writes weights for others.
///
/// # Errors
/// When the worker says so.
pub fn export(args: &ExportArgs) -> Result<Exit> {
    let layout = match args.layout {
        Layout::Diffusers => ExportLayout::Diffusers,
        Layout::Peft => ExportLayout::Peft,
        Layout::Deepgen => ExportLayout::Deepgen,
    };
    let request = ExportRequest {
        weights: absolute(&args.weights)?,
        layout,
        out: absolute(&args.out)?,
        dtype: args.dtype.into(),
    };
    tool::run(ToolRequest::Export(request), "cpu", &args.place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_of_sizes_is_answered_with_the_known_ones() {
        assert_eq!(preset("deepgen-5b").unwrap(), Preset::Deepgen5b);
        let error = preset("deepgen").unwrap_err();
        assert!(error.is::<Wrong>() && error.to_string().contains("sd3.5-medium"), "{error}");
    }
}
