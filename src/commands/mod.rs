//! The commands: each file parses its own arguments and prints its own answer.
//!
//! Shared here: the overrides of a pipeline, loading with its problems shown, and where results lie.

use std::io::IsTerminal;
use std::path::Path;

use anyhow::{Context, Result};

use crate::plan::{Plan, PlannedNode};
use crate::spec::{self, Diagnostic, Overrides, Resolved, Style};
use crate::store::{ArtifactStore, FileHashes, Layout};

pub mod accept;
pub mod attach;
pub mod check;
pub mod completions;
pub mod data;
pub mod detach;
pub mod diff;
pub mod doctor;
pub mod explain;
pub mod export_mlflow;
pub mod freeze;
pub mod gc;
pub mod generate;
pub mod graph;
pub mod idle;
pub mod init;
pub mod logs;
pub mod opening;
pub mod plan;
pub mod report;
pub mod reproduce;
pub mod retry;
pub mod run;
pub mod runs;
pub mod schema;
pub mod selection;
pub mod settled;
pub mod state;
pub mod status;
pub mod stop;
pub mod summary;
pub mod table;
pub mod tool;
pub mod weights;

/// What a command line changes in a pipeline.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Overriding {
    /// Profile: tiny, small, paper, or another that the files know [default: the pipeline's]
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// Variant of the pipeline file; may be repeated, the later on top
    #[arg(long, value_name = "NAME")]
    pub variant: Vec<String>,
    /// Change a setting, such as sft.optimizer.lr=1e-4; may be repeated
    #[arg(long, value_name = "NODE.KEY=VALUE")]
    pub set: Vec<String>,
    /// Two steps of every stage and few items: the whole graph in a minute or so, with results of its own
    #[arg(long)]
    pub smoke: bool,
}

impl From<Overrides> for Overriding {
    fn from(overrides: Overrides) -> Self {
        let Overrides { profile, variants, set, smoke, env: _ } = overrides;
        Self { profile, variant: variants, set, smoke }
    }
}

impl Overriding {
    fn overrides(&self) -> Overrides {
        let (profile, variants, set) = (self.profile.clone(), self.variant.clone(), self.set.clone());
        Overrides { profile, variants, set, smoke: self.smoke, ..Overrides::default() }
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

/// Plans what was loaded against the results in `folder`, or in `artifacts/` of its project; returns the store too.
///
/// # Errors
/// When the working directory is gone.
pub fn results_of(resolved: &Resolved, folder: Option<&Path>) -> Result<(Plan, ArtifactStore)> {
    let layout = match folder {
        Some(_) => artifacts_layout(folder)?,
        None => Layout::new(resolved.root.join("artifacts")),
    };
    let hashes = FileHashes::open(resolved.root.clone(), layout.state().join("external.json"));
    let store = ArtifactStore::open(layout.clone());
    let plan = Plan::build(resolved, &store, &hashes);
    // Planning leaves no trace where nothing was run yet.
    if layout.state().is_dir() {
        hashes.remember();
        store.save_memory();
    }
    Ok((plan, store))
}

/// Returns the nodes that a name means: one, each instance of a node, or what matches its `*` and `?`.
///
/// # Errors
/// When there is none, with the nearest name.
pub fn choose_nodes<'a>(plan: &'a Plan, name: &str) -> Result<Vec<&'a PlannedNode>> {
    let names: Vec<&str> = plan.nodes.iter().map(|planned| planned.node.name.0.as_str()).collect();
    Ok(selection::matching(name, &names)?.into_iter().map(|at| &plan.nodes[at]).collect())
}

/// Returns where results lie: `folder`, or `artifacts/` in the project around the working directory.
///
/// # Errors
/// When the working directory is gone.
pub fn artifacts_layout(folder: Option<&Path>) -> Result<Layout> {
    let here = std::env::current_dir().context("the working directory is gone")?;
    // A project without stage files of its own is known by its pipelines or by what they left.
    let is_root = |folder: &Path| ["stages", "pipelines", "artifacts"].iter().any(|name| folder.join(name).is_dir());
    let inside = || here.ancestors().find(|folder| is_root(folder)).unwrap_or(&here);
    let folder = folder.map_or_else(|| inside().join("artifacts"), |folder| here.join(folder));
    Ok(Layout::new(folder.canonicalize().unwrap_or(folder)))
}
