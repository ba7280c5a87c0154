//! `deepgen graph FILE`: the graph of a pipeline or an experiment as Mermaid, DOT or SVG, coloured by verdict.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::{Overriding, load_or_report, results_of};
use crate::cli::Exit;
use crate::plan::graph;
use crate::report;
use crate::store::external::write_atomically;

/// Arguments of `deepgen graph`.
#[derive(Debug, clap::Args)]
pub struct GraphArgs {
    /// Pipeline or experiment file, such as pipelines/full.toml
    pub file: PathBuf,
    #[command(flatten)]
    pub overriding: Overriding,
    /// Form of the graph [default: by the name of --out, else mermaid]
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Write into this file instead of printing
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// Form of a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For Markdown pages
    Mermaid,
    /// For Graphviz
    Dot,
    /// An image
    Svg,
}

impl GraphArgs {
    fn format(&self) -> Format {
        let end = self.out.as_deref().and_then(|out| out.extension()).and_then(|end| end.to_str());
        self.format.unwrap_or(match end {
            Some("svg") => Format::Svg,
            Some("dot" | "gv") => Format::Dot,
            _ => Format::Mermaid,
        })
    }
}

/// Prints or writes the graph.
///
/// # Errors
/// When the file cannot be written.
pub fn graph(args: &GraphArgs) -> Result<Exit> {
    let Some(resolved) = load_or_report(&args.file, &args.overriding, false) else { return Ok(Exit::Wrong) };
    let (plan, _) = results_of(&resolved, args.artifacts.as_deref())?;
    let text = match args.format() {
        Format::Mermaid => graph::mermaid(&plan),
        Format::Dot => graph::dot(&plan),
        Format::Svg => report::plan_svg(&plan),
    };
    match &args.out {
        Some(out) => {
            let out = std::path::absolute(out).unwrap_or_else(|_| out.clone());
            write_atomically(&out, text.as_bytes()).with_context(|| format!("cannot write {}", out.display()))?;
            println!("{}", out.display());
        }
        None => print!("{text}"),
    }
    Ok(Exit::Done)
}
