//! `deepgen plan`: what a run would do, why, and what that is expected to cost, without doing it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use deepgen_contract::id::NodeName;
use litemap::LiteMap;
use serde::Serialize;

use super::selection::Selection;
use super::settled::{Question, source_hashes};
use super::{Overriding, artifacts_layout, load_or_report, results_of};
use crate::cli::{Exit, Wrong};
use crate::plan::{
    Cost, Costs, Difference, Missing, Plan, PlannedNode, Reason, TrainingSizes, Verdict, render, training_sizes,
};
use crate::progress::format::count;
use crate::spec::{PAPER_PROFILE, Resolved, Sweep};
use crate::store::{ArtifactStore, FileHashes, Layout, history};

/// Version of what `--json` prints: 2 added the reason's parts, differences and costs.
const JSON_VERSION: u32 = 2;

/// Arguments of `deepgen plan`.
#[derive(Debug, Default, clap::Args)]
pub struct PlanArgs {
    /// Pipeline or experiment file, such as pipelines/full.toml
    pub file: PathBuf,
    #[command(flatten)]
    pub overriding: Overriding,
    /// List everything that differs from the newest result of each node, not the first of it alone
    #[arg(long, short)]
    pub verbose: bool,
    /// Print parameters, FLOPs, memory, iterations and batches of training too; the paper profile always does
    #[arg(long)]
    pub sizes: bool,
    /// End with exit code 2 when what will run is expected to take more GPU-hours, or nobody knows how many
    #[arg(long, value_name = "X")]
    pub max_gpu_hours: Option<f64>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
    #[command(flatten)]
    pub selection: Selection,
}

/// A plan as `--json` prints it.
#[derive(Debug, Serialize)]
struct PlanJson<'a> {
    version: u32,
    name: &'a str,
    profile: &'a str,
    seed: u64,
    nodes: Vec<NodeJson<'a>>,
    /// Sums over the nodes that will run; those without a record are named, not counted.
    cost: TotalJson<'a>,
    sweep: Option<&'a Sweep>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sizes: Vec<TrainingSizes>,
}

#[derive(Debug, Serialize)]
struct TotalJson<'a> {
    seconds: f64,
    gpu_hours: f64,
    bytes: u64,
    unknown: &'a [NodeName],
}

/// A node as `--json` prints it.
#[derive(Debug, Serialize)]
struct NodeJson<'a> {
    node: &'a str,
    stage: &'a str,
    kind: &'static str,
    fingerprint: String,
    /// Its own identity, where a person accepted another's result in its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    stands_for: Option<String>,
    inputs: &'a LiteMap<String, NodeName>,
    verdict: String,
    /// Why it runs, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Why it runs, in parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<&'a Reason>,
    /// Everything that differs from its newest result.
    #[serde(skip_serializing_if = "Option::is_none")]
    differences: Option<&'a Vec<Difference>>,
    /// What it is expected to cost; nothing when no like node ran before.
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<&'a Cost>,
    #[serde(skip_serializing_if = "<[Missing]>::is_empty")]
    missing: &'a [Missing],
}

impl<'a> NodeJson<'a> {
    fn new(planned: &'a PlannedNode, costs: &'a Costs, changes: &'a BTreeMap<NodeName, Vec<Difference>>) -> Self {
        let PlannedNode { node, fingerprint, stands_for, verdict, .. } = planned;
        let (why, missing): (_, &[Missing]) = match verdict {
            Verdict::Cached => (None, &[]),
            Verdict::Run(reason) => (Some(reason), &[]),
            Verdict::Blocked(missing) => (None, missing),
        };
        Self {
            node: &node.name.0,
            stage: &node.stage,
            kind: node.kind.name(),
            fingerprint: fingerprint.to_string(),
            stands_for: stands_for.map(|own| own.to_string()),
            inputs: &node.inputs,
            verdict: verdict.to_string(),
            reason: why.map(Reason::to_string),
            why,
            differences: changes.get(&node.name),
            cost: costs.nodes.get(&node.name),
            missing,
        }
    }
}

/// Prints the plan.
///
/// # Errors
/// When the working directory is gone, or the plan is dearer than allowed.
pub fn plan(args: &PlanArgs) -> Result<Exit> {
    let is_plain = !args.verbose && !args.sizes && !args.json && args.max_gpu_hours.is_none();
    let question = Question::new(&args.file, &args.overriding, &args.selection, false).filter(|_| is_plain);
    if let Some(text) = question.as_ref().and_then(|question| settled(question, args)) {
        print!("{text}");
        return Ok(Exit::Done);
    }
    let Some(resolved) = load_or_report(&args.file, &args.overriding, false) else { return Ok(Exit::Wrong) };
    let (plan, store) = results_of(&resolved, args.artifacts.as_deref())?;
    let mut selected = args.selection.apply(plan)?;
    print(&resolved, &selected.plan, &store, args)?;
    if selected.plan.is_cached() && store.layout().state().is_dir() {
        question
            .iter()
            .for_each(|question| question.remember(&resolved, source_hashes(&resolved), &mut selected, &store));
    }
    Ok(Exit::Done)
}

/// Returns the text of a plan that was asked for before in the same words and has not changed.
fn settled(question: &Question, args: &PlanArgs) -> Option<String> {
    let layout = match &args.artifacts {
        Some(folder) => artifacts_layout(Some(folder)).ok()?,
        None => Layout::new(question.root().join("artifacts")),
    };
    let hashes = FileHashes::open(question.root().to_owned(), layout.state().join("external.json"));
    question.look_up(&ArtifactStore::open(layout), &hashes)?.text
}

/// Prints a plan, or the chosen part of one.
///
/// # Errors
/// When it is dearer than allowed.
pub fn print(resolved: &Resolved, plan: &Plan, store: &ArtifactStore, args: &PlanArgs) -> Result<()> {
    let costs = costs(plan, store);
    let has_sizes = args.sizes || resolved.profile == PAPER_PROFILE;
    let sizes = if has_sizes { training_sizes(resolved) } else { Vec::new() };
    let changes = if args.verbose || args.json { changes(plan, store) } else { BTreeMap::new() };
    if args.json {
        let Resolved { name, profile, seed, sweep, .. } = resolved;
        let Costs { seconds, gpu_hours, bytes, unknown, .. } = &costs;
        let json = PlanJson {
            version: JSON_VERSION,
            name,
            profile,
            seed: *seed,
            nodes: plan.nodes.iter().map(|planned| NodeJson::new(planned, &costs, &changes)).collect(),
            cost: TotalJson { seconds: *seconds, gpu_hours: *gpu_hours, bytes: *bytes, unknown },
            sweep: sweep.as_ref(),
            sizes: sizes.into_iter().filter_map(Result::ok).collect(),
        };
        println!("{}", serde_json::to_string_pretty(&json)?);
    } else {
        print!("{}{}", render::plan(resolved, plan, &costs, &changes), render::sizes(&sizes));
    }
    if let Some(most) = args.max_gpu_hours {
        refuse_dear(&costs, most)?;
    }
    Ok(())
}

/// Returns what the nodes that will run are expected to cost.
pub fn costs(plan: &Plan, store: &ArtifactStore) -> Costs {
    let past = if plan.is_cached() { Vec::new() } else { history::read(store) };
    Costs::of(plan, &past)
}

/// Returns everything that differs from the newest result, of each node that has one and will run or is accepted.
fn changes(plan: &Plan, store: &ArtifactStore) -> BTreeMap<NodeName, Vec<Difference>> {
    let will_run = |planned: &&PlannedNode| matches!(planned.verdict, Verdict::Run(_)) || planned.stands_for.is_some();
    let changes = |planned: &PlannedNode| Some((planned.node.name.clone(), Plan::differences(planned, store)?));
    plan.nodes.iter().filter(will_run).filter_map(changes).collect()
}

/// Refuses what is expected to take more than `most` GPU-hours, or takes nobody knows how many.
///
/// # Errors
/// Says how many are expected, and of which nodes nothing is known.
pub fn refuse_dear(costs: &Costs, most: f64) -> Result<()> {
    let unknown = &costs.unknown_on_gpu;
    if costs.gpu_hours > most {
        let more =
            if unknown.is_empty() { String::new() } else { format!(", {} not counted", count(unknown.len(), "node")) };
        let text = format!("{:.2} GPU-hours are expected{more}, more than the {most} allowed", costs.gpu_hours);
        return Err(Wrong(format!("{text}; nothing was started")).into());
    }
    if unknown.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = unknown.iter().take(3).map(|node| node.0.as_str()).collect();
    let more = if unknown.len() > 3 { ", ..." } else { "" };
    Err(Wrong(format!(
        "no earlier run tells how many GPU-hours {} take ({}{more}), so {most} cannot be promised; nothing was started. \
         A short run of the same stages, as --smoke makes, tells",
        count(unknown.len(), "node"),
        names.join(", ")
    ))
    .into())
}
