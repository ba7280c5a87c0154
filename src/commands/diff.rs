//! `deepgen diff A B`: what differs between two runs, two nodes or two sealed results.
//!
//! Opens no state and takes no lock, so it works while a run goes on.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use deepgen_contract::artifact::{Environment, Manifest};
use deepgen_contract::id::NodeName;
use serde::Serialize;

use super::artifacts_layout;
use super::status::choose_run;
use super::table::Table;
use crate::cli::{Exit, Wrong};
use crate::compare::{self, Change, MetricChange, RunDiff, RunFacts};
use crate::plan::{Difference, Part, Section, render};
use crate::progress::format::{count, number};
use crate::spec::nearest;
use crate::store::ArtifactStore;

/// Version of what `--json` prints.
const JSON_VERSION: u32 = 1;
/// Numbers of a node that are shown without `-v`.
const MAX_METRICS: usize = 4;

/// Arguments of `deepgen diff`.
#[derive(Debug, clap::Args)]
pub struct DiffArgs {
    /// A run, a node of a run as RUN:NODE, or the beginning of a result's fingerprint
    pub left: String,
    /// What it is compared with
    pub right: String,
    /// Show every number, and what differs in nodes that differ only because of their inputs
    #[arg(long, short)]
    pub verbose: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// One side of a comparison.
enum Side {
    Run(Box<RunFacts>),
    Result(Box<ResultFacts>),
}

/// A node of a run, or a sealed result.
struct ResultFacts {
    title: String,
    node: NodeName,
    parts: Vec<Part>,
    manifest: Option<Manifest>,
}

#[derive(Debug, Serialize)]
struct RunJson<'a> {
    version: u32,
    left: &'a str,
    right: &'a str,
    diff: &'a RunDiff,
}

/// What differs between two results, as `--json` prints it.
#[derive(Debug, Serialize)]
struct ResultJson {
    version: u32,
    left: String,
    right: String,
    differences: Vec<Difference>,
    environment: Vec<Change>,
    metrics: Vec<MetricChange>,
}

/// Prints what differs.
///
/// # Errors
/// When a side does not exist or cannot be read, or the two are of different kinds.
pub fn diff(args: &DiffArgs) -> Result<Exit> {
    let store = ArtifactStore::open(artifacts_layout(args.artifacts.as_deref())?);
    match (side(&store, &args.left)?, side(&store, &args.right)?) {
        (Side::Run(left), Side::Run(right)) => {
            let diff = compare::runs(&left, &right);
            if args.json {
                let json = RunJson { version: JSON_VERSION, left: &left.name, right: &right.name, diff: &diff };
                println!("{}", serde_json::to_string_pretty(&json)?);
            } else {
                print!("{}", run_text(&left, &right, &diff, args.verbose));
            }
        }
        (Side::Result(left), Side::Result(right)) => {
            let json = results(*left, *right);
            if args.json {
                println!("{}", serde_json::to_string_pretty(&json)?);
            } else {
                print!("{}", result_text(&json));
            }
        }
        _ => return Err(Wrong("a run is compared with a run, and a node or result with another one".into()).into()),
    }
    Ok(Exit::Done)
}

fn side(store: &ArtifactStore, text: &str) -> Result<Side> {
    let layout = store.layout();
    if let Some((run, node)) = text.split_once(':') {
        let facts = RunFacts::read(store, &choose_run(layout, Some(run))?)?;
        let name = NodeName(node.to_owned());
        let Some(planned) = facts.saved.node(&name) else {
            let names: Vec<&str> = facts.saved.plan.nodes.iter().map(|planned| planned.node.name.0.as_str()).collect();
            let hint = nearest(node, &names).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            return Err(Wrong(format!("run {run} has no node `{node}`{hint}")).into());
        };
        return Ok(Side::Result(Box::new(ResultFacts {
            title: text.to_owned(),
            parts: planned.parts(),
            manifest: facts.manifests.get(&name).cloned(),
            node: name,
        })));
    }
    let is_hash = text.len() >= 6 && text.chars().all(|c| c.is_ascii_hexdigit());
    if is_hash && !layout.run(text).exists() {
        let all = store.fingerprints();
        let found: Vec<_> = all.into_iter().filter(|fingerprint| fingerprint.to_string().starts_with(text)).collect();
        let manifest = match found[..] {
            [fingerprint] => store.manifest(&fingerprint)?,
            [] => return Err(Wrong(format!("no sealed result begins with {text}")).into()),
            _ => {
                return Err(Wrong(format!("{} sealed results begin with {text}: give more digits", found.len())).into());
            }
        };
        return Ok(Side::Result(Box::new(ResultFacts {
            title: format!("{} {}", manifest.node, manifest.fingerprint.short()),
            node: manifest.node.clone(),
            parts: compare::parts_of(&manifest),
            manifest: Some(manifest),
        })));
    }
    Ok(Side::Run(Box::new(RunFacts::read(store, &choose_run(layout, Some(text))?)?)))
}

fn results(left: ResultFacts, right: ResultFacts) -> ResultJson {
    let environment = |side: &ResultFacts| side.manifest.as_ref().map(|made| made.environment.clone());
    let metrics =
        |side: &ResultFacts| side.manifest.as_ref().map_or_else(Default::default, |made| made.metrics.clone());
    let environments = match (environment(&left), environment(&right)) {
        (Some(left), Some(right)) => {
            let mut all = compare::environments(&left, &right);
            all.extend(job_changes(&left, &right));
            all
        }
        _ => Vec::new(),
    };
    ResultJson {
        version: JSON_VERSION,
        differences: compare::identities(&left.parts, &right.parts),
        environment: environments,
        metrics: compare::metrics(&left.node, &metrics(&left), &metrics(&right)),
        left: left.title,
        right: right.title,
    }
}

/// Device and threads, which belong to a job.
fn job_changes(left: &Environment, right: &Environment) -> Vec<Change> {
    let threads = |environment: &Environment| environment.threads.to_string();
    let pairs = [("device", left.device.clone(), right.device.clone()), ("threads", threads(left), threads(right))];
    let differing = pairs.into_iter().filter(|(_, left, right)| left != right);
    differing.map(|(what, left, right)| Change { what: what.into(), left: Some(left), right: Some(right) }).collect()
}

fn run_text(left: &RunFacts, right: &RunFacts, diff: &RunDiff, is_verbose: bool) -> String {
    let mut text = format!("{} -> {}\n", left.name, right.name);
    text.push_str(&changes_text("run", &diff.run));
    let num = [diff.same.len(), diff.changed.len(), diff.only_left.len(), diff.only_right.len()];
    let [same, changed, only_left, only_right] = num;
    let _ = writeln!(
        text,
        "\nnodes: {same} the same, {changed} differ, {only_left} only in the first, {only_right} only in the second"
    );
    for node in diff.changed.iter().filter(|node| is_verbose || !node.is_consequence) {
        let is_other_kind = node.differences.iter().any(|difference| difference.section == Section::StageKind);
        // Settings of two kinds of stages have nothing to do with each other.
        let shown = if is_other_kind && !is_verbose { &node.differences[..1] } else { &node.differences[..] };
        let _ = write!(text, "  {}\n{}", node.node, render::differences(shown, "    "));
    }
    let names = |nodes: Vec<&NodeName>| nodes.iter().map(|node| node.0.as_str()).collect::<Vec<_>>().join(", ");
    let follows: Vec<&NodeName> =
        diff.changed.iter().filter(|node| node.is_consequence).map(|node| &node.node).collect();
    if !follows.is_empty() {
        let _ = writeln!(text, "  {} by their inputs alone: {}", count(follows.len(), "node"), names(follows));
    }
    for (what, nodes) in [("only in the first", &diff.only_left), ("only in the second", &diff.only_right)] {
        if !nodes.is_empty() {
            let _ = writeln!(text, "  {what}: {}", names(nodes.iter().collect()));
        }
    }
    text.push_str(&changes_text("environment", &diff.environment));
    text.push_str(&metrics_text(&diff.metrics, if is_verbose { usize::MAX } else { MAX_METRICS }));
    text
}

fn result_text(diff: &ResultJson) -> String {
    let mut text = format!("{} -> {}\n", diff.left, diff.right);
    match diff.differences[..] {
        [] => text.push_str("\nidentity: the same\n"),
        _ => drop(write!(text, "\nidentity\n{}", render::differences(&diff.differences, "  "))),
    }
    text.push_str(&changes_text("environment", &diff.environment));
    text.push_str(&metrics_text(&diff.metrics, usize::MAX));
    text
}

/// Returns changes under a heading; long values, such as hashes, are cut.
pub fn changes_text(heading: &str, changes: &[Change]) -> String {
    if changes.is_empty() {
        return format!("\n{heading}: the same\n");
    }
    let side = |value: &Option<String>| match value.as_deref() {
        None | Some("") | Some("null") => "(none)".to_owned(),
        Some(hash) if hash.len() >= 40 && hash.chars().all(|c| c.is_ascii_hexdigit()) => hash[..12].to_owned(),
        Some(value) => value.to_owned(),
    };
    let line = |change: &Change| format!("  {}: {} -> {}\n", change.what, side(&change.left), side(&change.right));
    format!("\n{heading}\n{}", changes.iter().map(line).collect::<String>())
}

/// Returns a table of numbers, those of scores first, at most `max` of a node.
fn metrics_text(all: &[MetricChange], max: usize) -> String {
    if all.is_empty() {
        return String::new();
    }
    let mut sorted: Vec<&MetricChange> = all.iter().collect();
    sorted.sort_by_key(|change| !change.metric.starts_with("score/"));
    let mut table = Table::new(&["  node", "metric", "first", "second", "difference"]);
    let mut shown: std::collections::BTreeMap<&NodeName, usize> = std::collections::BTreeMap::new();
    let mut num_left_out = 0;
    for change in sorted {
        let num = shown.entry(&change.node).or_default();
        *num += 1;
        if *num > max {
            num_left_out += 1;
            continue;
        }
        let side = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
        let difference = change.left.zip(change.right).map_or_else(String::new, |(left, right)| {
            let sign = if right > left { "+" } else { "" };
            format!("{sign}{}", number(right - left))
        });
        table.row([
            format!("  {}", change.node),
            change.metric.clone(),
            side(change.left),
            side(change.right),
            difference,
        ]);
    }
    let more = if num_left_out > 0 { format!("  and {num_left_out} more (-v shows them)\n") } else { String::new() };
    format!("\nnumbers\n{table}{more}")
}
