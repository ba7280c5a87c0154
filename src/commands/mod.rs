//! The commands: each file parses its own arguments and prints its own answer.
//!
//! Shared here: the overrides of a pipeline, loading with its problems shown, and where results lie.

use std::io::IsTerminal;
use std::path::Path;

use anyhow::{Context, Result};

use crate::plan::Plan;
use crate::spec::{self, Diagnostic, Overrides, Resolved, Style};
use crate::store::{ArtifactStore, FileHashes, Layout};

pub mod check;
pub mod explain;
pub mod logs;
pub mod plan;
pub mod report;
pub mod run;
pub mod state;
pub mod status;
pub mod table;

/// What a command line changes in a pipeline.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Overriding {
    /// Profile: tiny, small, paper, or another that the files know [default: the pipeline's]
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// Change a setting, such as sft.optimizer.lr=1e-4; may be repeated
    #[arg(long, value_name = "NODE.KEY=VALUE")]
    pub set: Vec<String>,
}

impl Overriding {
    fn overrides(&self) -> Overrides {
        Overrides { profile: self.profile.clone(), set: self.set.clone() }
    }
}

/// Loads a pipeline or an experiment; problems are shown on standard error, and then there is nothing.
pub fn load_or_report(path: &Path, overriding: &Overriding, is_sweep: bool) -> Option<Resolved> {
    let load = if is_sweep { spec::load_sweep } else { spec::load };
    match load(path, &overriding.overrides()) {
        Ok(resolved) => Some(resolved),
        Err(problems) => {
            show(&problems);
            None
        }
    }
}

/// Shows problems on standard error, drawn for what it is connected to.
pub fn show(problems: &[Diagnostic]) {
    let style = if std::io::stderr().is_terminal() { Style::Terminal } else { Style::Plain };
    eprint!("{}", spec::render(problems, style));
}

/// Plans what was loaded against the results in `folder`, or in `artifacts/` of its project.
///
/// # Errors
/// When the working directory is gone.
pub fn planned(resolved: &Resolved, folder: Option<&Path>) -> Result<Plan> {
    let layout = match folder {
        Some(_) => artifacts_layout(folder)?,
        None => Layout::new(resolved.root.join("artifacts")),
    };
    let hashes = FileHashes::open(resolved.root.clone(), layout.state().join("external.json"));
    let plan = Plan::build(resolved, &ArtifactStore::open(layout.clone()), &hashes);
    // Planning leaves no trace where nothing was run yet.
    if layout.state().is_dir()
        && let Err(error) = hashes.save()
    {
        tracing::warn!(%error, "hashes of external files will be computed again next time");
    }
    Ok(plan)
}

/// Returns where results lie: `folder`, or `artifacts/` in the project around the working directory.
///
/// # Errors
/// When the working directory is gone.
pub fn artifacts_layout(folder: Option<&Path>) -> Result<Layout> {
    let here = std::env::current_dir().context("the working directory is gone")?;
    let inside = || here.ancestors().find(|folder| folder.join("stages").is_dir()).unwrap_or(&here);
    let folder = folder.map_or_else(|| inside().join("artifacts"), |folder| here.join(folder));
    Ok(Layout::new(folder.canonicalize().unwrap_or(folder)))
}
