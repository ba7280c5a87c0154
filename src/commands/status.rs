//! `deepgen status`: where a run stands, read from its journal and job directories.
//!
//! Opens no state and takes no lock, so it works while a run goes on.

use std::io;
use std::path::PathBuf;

use anyhow::Result;
use deepgen_contract::id::{Fingerprint, NodeName};
use serde::Serialize;

use super::artifacts_layout;
use super::table::Table;
use crate::cli::{Exit, Wrong};
use crate::exec::jobdir::{EventTail, JobDir};
use crate::exec::process::ProcessId;
use crate::progress::format::{duration, now_ms};
use crate::progress::pace::Pace;
use crate::run::event::{NodeState, RunResult};
use crate::spec::nearest;
use crate::store::Layout;
use crate::store::glance::glance;
use crate::store::index::RunIndex;
use crate::store::runs::{self, NodeView, RunView};

/// Nodes up to which a run is shown whole.
const NUM_ROWS: usize = 60;

/// Arguments of `deepgen status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Name of a run [default: the newest]
    pub run: Option<String>,
    /// Show every node of a large run, not only those that run or need attention
    #[arg(long, short)]
    pub all: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// A node as `status` shows it.
#[derive(Debug, Serialize)]
struct NodeStatus {
    node: NodeName,
    stage: String,
    status: NodeState,
    fingerprint: Fingerprint,
    seconds: Option<f64>,
    pace: Option<Pace>,
}

/// A run as `status` shows it.
#[derive(Debug, Serialize)]
struct RunStatus {
    run: String,
    pipeline: String,
    profile: String,
    /// Command line that started it.
    command: Vec<String>,
    /// `running`, `interrupted`, or how it ended.
    result: &'static str,
    started_ms: u64,
    updated_ms: u64,
    nodes: Vec<NodeStatus>,
}

/// Prints where a run stands.
///
/// # Errors
/// When there is no such run or its journal cannot be read.
pub fn status(args: &StatusArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let run = choose_run(&layout, args.run.as_deref())?;
    let folder = layout.run(&run);
    let (view, index) = std::thread::scope(|scope| {
        let index = scope.spawn(|| RunIndex::read(&folder));
        (glance(&folder), index.join())
    });
    let (view, index) = (view?, index.map_err(|_| io::Error::other("the run's index could not be read"))?);
    let status = run_status(&layout, &run, &view, index);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(Exit::Done);
    }
    println!("run {}: {}, profile {}, {}", status.run, status.pipeline, status.profile, status.result);
    let is_large = !args.all && status.nodes.len() > NUM_ROWS;
    if is_large {
        println!("{}; --all shows every node", counts(&status.nodes));
    }
    let shown: Vec<&NodeStatus> = status.nodes.iter().filter(|node| !is_large || is_telling(&node.status)).collect();
    if shown.is_empty() {
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["node", "stage", "state", "time", ""]);
    for node in shown.iter().take(if is_large { NUM_ROWS } else { usize::MAX }) {
        let time = node.seconds.map_or(String::new(), duration);
        table.row([node.node.to_string(), node.stage.clone(), node.status.word().into(), time, detail(node)]);
    }
    print!("{table}");
    if is_large && shown.len() > NUM_ROWS {
        println!("... and {} more", shown.len() - NUM_ROWS);
    }
    Ok(Exit::Done)
}

/// Returns how many nodes are in each state, in the order in which a node goes through them.
fn counts(nodes: &[NodeStatus]) -> String {
    let words = ["running", "sealing", "retrying", "failed", "stopped", "ready", "waiting", "blocked"];
    let words = words.into_iter().chain(["done", "shared", "cached"]);
    let counted = words.filter_map(|word| {
        let num = nodes.iter().filter(|node| node.status.word() == word).count();
        (num > 0).then(|| format!("{num} {word}"))
    });
    format!("{} nodes: {}", nodes.len(), counted.collect::<Vec<_>>().join(", "))
}

/// Returns true when a large run's table shows a node in this state.
fn is_telling(state: &NodeState) -> bool {
    let is_telling = matches!(state, NodeState::Failed { .. } | NodeState::Retrying { .. } | NodeState::Stopped { .. });
    is_telling || state.is_active()
}

/// Returns the named run, or the newest.
///
/// # Errors
/// When there is none, with the nearest name.
pub fn choose_run(layout: &Layout, name: Option<&str>) -> Result<String> {
    let all = runs::list(layout);
    let Some(name) = name else {
        return all.last().cloned().ok_or_else(|| Wrong(format!("no run in {}", layout.runs().display())).into());
    };
    if all.iter().any(|run| run == name) {
        return Ok(name.to_owned());
    }
    let names: Vec<&str> = all.iter().map(String::as_str).collect();
    let hint = nearest(name, &names).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
    Err(Wrong(format!("no run `{name}` in {}{hint}", layout.runs().display())).into())
}

/// Returns true while the process that works on a run is there.
pub fn is_owner_alive(view: &RunView) -> bool {
    view.owners.last().is_some_and(|(pid, host)| {
        // Another host's processes cannot be seen; believe its journal.
        *host != crate::environment::host() || ProcessId { pid: *pid, started: None }.is_alive()
    })
}

/// Returns the word for a run: one whose orchestrator has gone without ending it was interrupted.
pub fn result_word(view: &RunView) -> &'static str {
    if let Some(result) = view.result {
        return RunResult::word(result);
    }
    if is_owner_alive(view) { "running" } else { "interrupted" }
}

fn run_status(layout: &Layout, run: &str, view: &RunView, index: io::Result<RunIndex>) -> RunStatus {
    let is_running = result_word(view) == "running";
    let node_status = |node: NodeName, stage: String, fingerprint: Fingerprint| {
        let seen = view.nodes.get(&node);
        let pace = seen.filter(|seen| seen.state.is_active()).map(|seen| pace(layout, seen));
        NodeStatus {
            node,
            stage,
            status: seen.map_or(NodeState::Waiting, |seen| seen.state.clone()),
            fingerprint,
            seconds: seen.and_then(|seen| seconds(seen, is_running)),
            pace,
        }
    };
    // The index gives order, stages, and the nodes that nothing has happened to yet.
    let nodes = match index {
        Ok(index) => index.nodes.into_iter().map(|(node, stage, print)| node_status(node, stage, print)).collect(),
        Err(error) => {
            tracing::warn!(%error, "only nodes with events are shown");
            let nodes = view.nodes.iter();
            nodes.map(|(node, seen)| node_status(node.clone(), String::new(), seen.fingerprint)).collect()
        }
    };
    RunStatus {
        run: run.to_owned(),
        pipeline: view.pipeline.clone(),
        profile: view.profile.clone(),
        command: view.command.clone(),
        result: result_word(view),
        started_ms: view.started_ms,
        updated_ms: view.updated_ms,
        nodes,
    }
}

fn pace(layout: &Layout, seen: &NodeView) -> Pace {
    let mut pace = Pace::default();
    if let Some(attempt) = seen.state.attempt() {
        let folder = JobDir::new(&layout.jobs(), &seen.fingerprint).attempt(attempt);
        EventTail::new(&folder).read().iter().for_each(|event| pace.take(event));
    }
    pace
}

fn seconds(seen: &NodeView, is_running: bool) -> Option<f64> {
    let end = if seen.state.is_active() && is_running { now_ms() } else { seen.since_ms };
    Some(end.saturating_sub(seen.started_ms?) as f64 / 1000.0)
}

fn detail(node: &NodeStatus) -> String {
    match &node.status {
        NodeState::Failed { failure, .. } => failure.message.lines().next().unwrap_or_default().to_owned(),
        NodeState::Retrying { attempt, failure, .. } => format!("attempt {attempt} failed: {failure}"),
        NodeState::Blocked { by } => format!("by {by}"),
        NodeState::Stopped { step: Some(step), .. } => format!("at step {step}"),
        _ => node.pace.as_ref().map_or(String::new(), Pace::line),
    }
}
