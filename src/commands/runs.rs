//! `deepgen runs`: all runs of an artifacts folder, and which of them `gc` must keep.

use std::fs;
use std::io;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

use super::artifacts_layout;
use super::status::{choose_run, result_word};
use super::table::Table;
use crate::cli::Exit;
use crate::progress::format::{duration, now_ms, utc};
use crate::run::event::NodeState;
use crate::store::Layout;
use crate::store::glance::glance;
use crate::store::index::RunIndex;
use crate::store::runs;

/// An empty file in a run's folder that says that `gc` keeps all it needs.
const PIN_FILE: &str = "pinned";
/// Runs that are shown unless all are asked for.
const NUM_SHOWN: usize = 20;

/// Arguments of `deepgen runs`.
#[derive(Debug, clap::Args)]
pub struct RunsArgs {
    /// Show all runs, not only the newest 20
    #[arg(long, short)]
    pub all: bool,
    /// Keep all that this run needs, whatever `gc` is told
    #[arg(long, value_name = "RUN")]
    pub pin: Option<String>,
    /// Leave this run to the rules of `gc` again
    #[arg(long, value_name = "RUN")]
    pub unpin: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// A run as `runs` shows it.
#[derive(Debug, Serialize)]
struct RunRow {
    run: String,
    pipeline: String,
    profile: String,
    /// `running`, `interrupted`, or how it ended.
    state: &'static str,
    num_nodes: usize,
    num_done: usize,
    num_failed: usize,
    started_ms: u64,
    /// Seconds from its start to its newest event, or to now while it goes on.
    seconds: f64,
    is_pinned: bool,
    command: Vec<String>,
}

/// Pins, unpins, and prints runs.
///
/// # Errors
/// When there is no such run.
pub fn runs(args: &RunsArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    for (name, is_pinned) in [(&args.pin, true), (&args.unpin, false)] {
        if let Some(name) = name {
            let run = choose_run(&layout, Some(name))?;
            pin(&layout, &run, is_pinned).with_context(|| format!("cannot change run {run}"))?;
        }
    }
    let all = runs::list(&layout);
    let num_hidden = if args.all || args.json { 0 } else { all.len().saturating_sub(NUM_SHOWN) };
    let rows: Vec<RunRow> = all.into_iter().skip(num_hidden).filter_map(|run| row(&layout, run)).collect();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(Exit::Done);
    }
    let now = now_ms();
    let mut table = Table::new(&["run", "pipeline", "profile", "state", "nodes done", "took", "started", ""]);
    for row in &rows {
        let failed = if row.num_failed > 0 { format!(", {} failed", row.num_failed) } else { String::new() };
        table.row([
            row.run.clone(),
            row.pipeline.clone(),
            row.profile.clone(),
            row.state.into(),
            format!("{} of {}{failed}", row.num_done, row.num_nodes),
            duration(row.seconds),
            age(row.started_ms, now),
            if row.is_pinned { "pinned".into() } else { String::new() },
        ]);
    }
    print!("{table}");
    if num_hidden > 0 {
        println!("{num_hidden} older ones: --all shows them");
    }
    Ok(Exit::Done)
}

/// Returns what the table says of a run, or nothing for one that cannot be read.
fn row(layout: &Layout, run: String) -> Option<RunRow> {
    let run_dir = layout.run(&run);
    let view = match glance(&run_dir) {
        Ok(view) => view,
        Err(error) => {
            tracing::warn!(%error, "a run is not shown");
            return None;
        }
    };
    let state = result_word(&view);
    let end = if state == "running" { now_ms() } else { view.updated_ms };
    let num = |is: fn(&NodeState) -> bool| view.nodes.values().filter(|node| is(&node.state)).count();
    Some(RunRow {
        pipeline: view.pipeline.clone(),
        profile: view.profile.clone(),
        state,
        num_nodes: RunIndex::read(&run_dir).map_or(view.nodes.len(), |index| index.nodes.len()),
        num_done: num(NodeState::is_done),
        num_failed: num(|state| matches!(state, NodeState::Failed { .. })),
        started_ms: view.started_ms,
        seconds: end.saturating_sub(view.started_ms) as f64 / 1000.0,
        is_pinned: is_pinned(layout, &run),
        command: view.command,
        run,
    })
}

/// Returns true when `gc` must keep all that a run needs.
pub fn is_pinned(layout: &Layout, run: &str) -> bool {
    layout.run(run).join(PIN_FILE).exists()
}

fn pin(layout: &Layout, run: &str, is_pinned: bool) -> io::Result<()> {
    let path = layout.run(run).join(PIN_FILE);
    if is_pinned {
        return fs::write(path, "");
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns how long ago something was, or its date when that says more.
fn age(ms: u64, now_ms: u64) -> String {
    let seconds = now_ms.saturating_sub(ms) / 1000;
    match seconds {
        0..60 => "just now".into(),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..172_800 => format!("{} h ago", seconds / 3600),
        172_800..2_592_000 => format!("{} days ago", seconds / 86_400),
        _ => utc(ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_told_in_the_unit_that_matters() {
        let ago = |seconds: u64| age(1_795_556_112_000 - seconds * 1000, 1_795_556_112_000);
        let told = [5, 61, 7_300, 200_000].map(ago);
        assert_eq!(told, ["just now", "1 min ago", "2 h ago", "2 days ago"]);
        assert_eq!(ago(3_000_000), "2026-10-21 04:15:12 UTC");
    }
}
