//! `deepgen data inspect SOURCE`: what a source of data holds, before a pipeline is wired to it.
//!
//! The worker looks; this parses the command line and passes the question on.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Subcommand;
use deepgen_contract::data::InspectRequest;

use crate::cli::{Exit, Wrong};

/// Arguments of `deepgen data`.
#[derive(Debug, clap::Args)]
pub struct DataArgs {
    /// What to do with the data
    #[command(subcommand)]
    pub what: What,
}

/// What to do with data.
#[derive(Debug, Subcommand)]
pub enum What {
    /// Count records, sizes, caption lengths and broken records of a source, and show samples
    Inspect(InspectArgs),
}

/// Arguments of `deepgen data inspect`.
#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// A .json, .jsonl, .txt, .parquet or .tar file, a folder or pattern of them, an address, or a prepared data set
    pub source: String,
    /// Folder that paths of images are relative to [default: that of the source]
    #[arg(long, value_name = "DIR")]
    pub images: Option<String>,
    /// Folder of caption files [default: that of the images]
    #[arg(long, value_name = "DIR")]
    pub captions: Option<String>,
    /// Key or column of the text [default: the first usual one, such as caption or text]
    #[arg(long, value_name = "KEY")]
    pub text_key: Option<String>,
    /// Key or column of the image [default: the first usual one, such as image or file_name]
    #[arg(long, value_name = "KEY")]
    pub image_key: Option<String>,
    /// Key or column of the images that an edit is about [default: the first usual one, such as input_image]
    #[arg(long, value_name = "KEY")]
    pub reference_key: Option<String>,
    /// Records to look at; 0 for all
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub limit: u64,
    /// Records to show
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub samples: usize,
    /// Write a contact sheet of the shown records, a PNG
    #[arg(long, value_name = "FILE")]
    pub sheet: Option<String>,
    /// Both sides of an image must exceed this, in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 80)]
    pub min_side: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Worker program [default: the deepgen-worker beside this program]
    #[arg(long, value_name = "FILE")]
    pub worker: Option<PathBuf>,
}

/// Does something with data.
///
/// # Errors
/// When there is no worker.
pub fn data(args: &DataArgs) -> Result<Exit> {
    let What::Inspect(args) = &args.what;
    let request = InspectRequest {
        source: args.source.clone(),
        images: args.images.clone(),
        captions: args.captions.clone(),
        text_key: args.text_key.clone(),
        image_key: args.image_key.clone(),
        reference_key: args.reference_key.clone(),
        limit: args.limit,
        num_samples: args.samples,
        sheet: args.sheet.clone(),
        min_side: args.min_side,
        json: args.json,
    };
    let beside = || std::env::current_exe().ok().map(|own| own.with_file_name("deepgen-worker"));
    let worker = args.worker.clone().or_else(beside).context("cannot tell where this program lies")?;
    let status = Command::new(&worker).args(["data", "inspect", &serde_json::to_string(&request)?]).status();
    let status = status.map_err(|error| {
        Wrong(format!(
            "no worker at {} ({error}): build it with `cargo build --release -p deepgen-worker`, or name it with --worker",
            worker.display()
        ))
    })?;
    Ok(if status.success() { Exit::Done } else { Exit::Wrong })
}
