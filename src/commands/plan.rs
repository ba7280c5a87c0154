//! `deepgen plan`: what a run would do and why, without doing it.

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use super::{Overriding, load_or_report, planned};
use crate::cli::Exit;
use crate::plan::{Missing, PlannedNode, TrainingSizes, Verdict, render, training_sizes};
use crate::spec::{PAPER_PROFILE, Resolved, Sweep};

/// Version of what `--json` prints.
const JSON_VERSION: u32 = 1;

/// Arguments of `deepgen plan`.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// Pipeline or experiment file, such as pipelines/full.toml
    pub file: PathBuf,
    #[command(flatten)]
    pub overriding: Overriding,
    /// Print parameter counts, iterations and batches too; the paper profile always does
    #[arg(long)]
    pub sizes: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// A plan as `--json` prints it.
#[derive(Debug, Serialize)]
struct PlanJson<'a> {
    version: u32,
    name: &'a str,
    profile: &'a str,
    seed: u64,
    nodes: Vec<NodeJson<'a>>,
    sweep: Option<&'a Sweep>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sizes: Vec<TrainingSizes>,
}

/// A node as `--json` prints it.
#[derive(Debug, Serialize)]
struct NodeJson<'a> {
    node: &'a str,
    stage: &'a str,
    kind: &'static str,
    fingerprint: String,
    inputs: &'a std::collections::BTreeMap<String, deepgen_contract::id::NodeName>,
    verdict: String,
    /// Why it runs, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "<[Missing]>::is_empty")]
    missing: &'a [Missing],
}

impl<'a> NodeJson<'a> {
    fn new(planned: &'a PlannedNode) -> Self {
        let PlannedNode { node, fingerprint, verdict, .. } = planned;
        let (reason, missing): (_, &[Missing]) = match verdict {
            Verdict::Cached => (None, &[]),
            Verdict::Run(reason) => (Some(reason.to_string()), &[]),
            Verdict::Blocked(missing) => (None, missing),
        };
        Self {
            node: &node.name.0,
            stage: &node.stage,
            kind: node.kind.name(),
            fingerprint: fingerprint.to_string(),
            inputs: &node.inputs,
            verdict: verdict.to_string(),
            reason,
            missing,
        }
    }
}

/// Prints the plan.
///
/// # Errors
/// When the working directory is gone.
pub fn plan(args: &PlanArgs) -> Result<Exit> {
    let Some(resolved) = load_or_report(&args.file, &args.overriding, false) else { return Ok(Exit::Wrong) };
    let plan = planned(&resolved, args.artifacts.as_deref())?;
    let has_sizes = args.sizes || resolved.profile == PAPER_PROFILE;
    let sizes = if has_sizes { training_sizes(&resolved) } else { Vec::new() };
    if args.json {
        let Resolved { name, profile, seed, sweep, .. } = &resolved;
        let json = PlanJson {
            version: JSON_VERSION,
            name,
            profile,
            seed: *seed,
            nodes: plan.nodes.iter().map(NodeJson::new).collect(),
            sweep: sweep.as_ref(),
            sizes: sizes.into_iter().filter_map(Result::ok).collect(),
        };
        println!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(Exit::Done);
    }
    print!("{}{}", render::plan(&resolved, &plan), render::sizes(&sizes));
    Ok(Exit::Done)
}
