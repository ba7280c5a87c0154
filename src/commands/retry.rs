//! `deepgen retry`: another try at what a run left undone, exactly as it was planned then.
//!
//! The plan comes from the run's folder, so files that were edited since change nothing; `deepgen run` takes those.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use deepgen_contract::id::NodeName;

use super::run::{How, start};
use super::selection::{Selection, matching};
use super::{artifacts_layout, status::choose_run};
use crate::cli::{Exit, Wrong};
use crate::run::event::NodeState;
use crate::spec::Resolved;
use crate::store::index::RunIndex;
use crate::store::layout::RESOLVED_FILE;
use crate::store::runs::{self, RunView, SavedPlan};

/// Arguments of `deepgen retry`.
#[derive(Debug, clap::Args)]
pub struct RetryArgs {
    /// A run [default: the newest], then nodes that shall be tried again with what they block [default: all]
    #[arg(value_names = ["RUN|NODE", "NODE"], num_args = 0..)]
    pub what: Vec<String>,
    #[command(flatten)]
    pub how: How,
}

/// Tries again what failed, was stopped or never ran.
///
/// # Errors
/// When there is no such run or node, or its plan cannot be read.
pub fn retry(args: &RetryArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.how.artifacts.as_deref())?;
    let is_run = |name: &&String| runs::list(&layout).contains(name);
    let named = args.what.first().filter(is_run);
    let nodes = &args.what[usize::from(named.is_some())..];
    let run = choose_run(&layout, named.map(String::as_str))?;
    let run_dir = layout.run(&run);
    let view = RunView::read(&run_dir)?;
    let resolved = read_resolved(&run_dir)?;
    let index = RunIndex::read(&run_dir)?;
    if index.nodes.iter().all(|(node, ..)| view.state(node).is_done()) {
        println!("every node of run {run} is done");
        return Ok(Exit::Done);
    }
    // A run may have been a part of its pipeline.
    let only = match nodes.is_empty() {
        true => index.nodes.iter().map(|(node, ..)| node.0.clone()).collect(),
        false => chosen(nodes, &resolved, &view)?,
    };
    let selection = Selection { only, ..Selection::default() };
    let how = How { artifacts: Some(layout.root().to_owned()), ..args.how.clone() };
    start(resolved, &how, &selection)
}

/// Returns the named nodes and what waits for nothing else than them.
fn chosen(patterns: &[String], resolved: &Resolved, view: &RunView) -> Result<Vec<String>> {
    let names: Vec<&str> = resolved.nodes.iter().map(|node| node.name.0.as_str()).collect();
    let mut chosen: BTreeSet<&str> = BTreeSet::new();
    for pattern in patterns {
        for at in matching(pattern, &names)? {
            let state = view.state(&resolved.nodes[at].name);
            match state {
                NodeState::Done { .. } => {
                    let what = format!("`{}` is {} in run {}", names[at], state.word(), view.run);
                    return Err(Wrong(format!("{what}; `deepgen run --force` computes it again")).into());
                }
                _ => drop(chosen.insert(names[at])),
            }
        }
    }
    // Inputs stand before their readers, so one pass reaches all that follow.
    for node in &resolved.nodes {
        let before: Vec<&NodeName> = node.inputs.values().chain(&node.needs).collect();
        let is_ready = |node: &&NodeName| view.state(node).is_done() || chosen.contains(node.0.as_str());
        let follows = before.iter().any(|node| chosen.contains(node.0.as_str()));
        if follows && before.iter().all(is_ready) && !view.state(&node.name).is_done() {
            chosen.insert(&node.name.0);
        }
    }
    Ok(chosen.into_iter().map(str::to_owned).collect())
}

fn read_resolved(run_dir: &Path) -> Result<Resolved> {
    let path = run_dir.join(RESOLVED_FILE);
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let resolved: Resolved = toml::from_str(&text)
        .with_context(|| format!("{} is of another program; use `deepgen run`", path.display()))?;
    // The files that it was planned from are kept with the plan.
    let sources = SavedPlan::read(run_dir).map(|saved| saved.sources).unwrap_or_default();
    Ok(Resolved { sources, ..resolved })
}
