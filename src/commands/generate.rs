//! `deepgen generate`: images from prompts, and the same image again from its file.

use std::path::PathBuf;

use anyhow::{Context, Result};
use deepgen_contract::tool::{GenerateRequest, PromptRequest, ToolRequest};

use super::tool::{self, Where, absolute};
use crate::cli::{Exit, Wrong};

/// Arguments of `deepgen generate`.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// Weights folder
    #[arg(long, value_name = "DIR", required_unless_present = "from")]
    pub weights: Option<PathBuf>,
    /// Prompt, or instruction when there are --image; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// File with a prompt on each line
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Reference image of every prompt; may be repeated, in the order in which the model sees them
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// Repeat the making of this image, which an earlier `generate` wrote: the same pixels
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "prompt", "prompts", "image", "steps", "cfg", "size", "seed", "negative", "count", "batch", "device",
    ])]
    pub from: Option<PathBuf>,
    /// Euler steps [default: 50, or 10 for a small model]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: Option<u32>,
    /// Guidance weight; 1 turns guidance off [default: 4, or 3 for a small model]
    #[arg(long, value_name = "X")]
    pub cfg: Option<f64>,
    /// Size in pixels, such as 512 or 512x768 (height x width) [default: 512, or the model's own if smaller]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<[usize; 2]>,
    /// Seed of the noise
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
    /// What the image is guided away from
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub negative: String,
    /// Images for each prompt
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub count: u32,
    /// Folder of the images, or a .png file for a single one
    #[arg(long, value_name = "PATH", default_value = "generated")]
    pub out: PathBuf,
    /// Also write all images side by side into one file
    #[arg(long)]
    pub grid: bool,
    /// Images drawn at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// cpu, wgpu[:i] or cuda[:i]
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    pub device: String,
    #[command(flatten)]
    pub place: Where,
}

/// Parses `512` or `512x768`.
fn parse_size(text: &str) -> Result<[usize; 2], String> {
    let side = |text: &str| text.trim().parse::<usize>().map_err(|_| format!("`{text}` is no number of pixels"));
    match text.split_once('x') {
        Some((height, width)) => Ok([side(height)?, side(width)?]),
        None => side(text).map(|side| [side, side]),
    }
}

/// Draws images.
///
/// # Errors
/// When there is no prompt, a file cannot be read, or the worker says so.
pub fn generate(args: &GenerateArgs) -> Result<Exit> {
    let images = args.image.iter().map(|path| absolute(path)).collect::<Result<Vec<_>>>()?;
    let mut texts = args.prompt.clone();
    if let Some(path) = &args.prompts {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        texts.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
    }
    if texts.is_empty() && args.from.is_none() {
        return Err(Wrong("there is no prompt: give one with --prompt, or a file of them with --prompts".into()).into());
    }
    let request = GenerateRequest {
        weights: args.weights.as_deref().map(absolute).transpose()?,
        from: args.from.as_deref().map(absolute).transpose()?,
        prompts: texts.into_iter().map(|text| PromptRequest { text, images: images.clone() }).collect(),
        count: args.count as usize,
        steps: args.steps.map(|steps| steps as usize),
        cfg: args.cfg,
        size: args.size,
        seed: args.seed,
        negative: args.negative.clone(),
        batch: args.batch as usize,
        out: absolute(&args.out)?,
        grid: args.grid,
    };
    tool::run(ToolRequest::Generate(request), &args.device, &args.place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_a_side_or_height_by_width() {
        assert_eq!(parse_size("512"), Ok([512, 512]));
        assert_eq!(parse_size("512x768"), Ok([512, 768]));
        assert!(parse_size("big").unwrap_err().contains("pixels"));
    }
}
