//! `deepgen explain`: one node's settings with the origin of every value, what its fingerprint is made of, its ports,
//! why it would run, what differs from its newest result, and what it is expected to cost.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use deepgen_contract::stage::Ports;
use litemap::LiteMap;
use serde::Serialize;

use super::table::Table;
use super::{Overriding, choose_nodes, load_or_report, results_of};
use crate::cli::Exit;
use crate::plan::{Cost, Difference, Missing, Part, Plan, PlannedNode, Verdict, render, setting_leaves};
use crate::progress::format::{bytes, duration, utc};
use crate::spec::Origin;
use crate::store::accepted::{self, Acceptance};

/// Version of what `--json` prints.
const JSON_VERSION: u32 = 1;

/// Arguments of `deepgen explain`.
#[derive(Debug, clap::Args)]
pub struct ExplainArgs {
    /// Node, such as sft or images[geneval]
    pub node: String,
    /// Pipeline or experiment file
    #[arg(default_value = "pipelines/full.toml")]
    pub file: PathBuf,
    #[command(flatten)]
    pub overriding: Overriding,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// What is known of a node beyond its plan.
#[derive(Debug, Clone, Default)]
pub struct Story {
    /// What differs from its newest result, when it has one and will run or uses an accepted one.
    pub differences: Vec<Difference>,
    /// The acceptance that its result is used by.
    pub accepted: Option<Acceptance>,
    /// What it is expected to cost.
    pub cost: Option<Cost>,
}

/// A node as `--json` prints it.
#[derive(Debug, Serialize)]
struct NodeJson<'a> {
    version: u32,
    node: &'a str,
    stage: &'a str,
    verdict: &'a Verdict,
    fingerprint: String,
    stands_for: Option<String>,
    /// Everything that the fingerprint is made of.
    parts: Vec<Part>,
    settings: Vec<SettingJson>,
    differences: &'a [Difference],
    accepted: &'a Option<Acceptance>,
    cost: &'a Option<Cost>,
}

#[derive(Debug, Serialize)]
struct SettingJson {
    key: String,
    /// As JSON.
    value: String,
    origin: String,
}

/// Explains a node, or each instance of it when the name has axes and none is given.
///
/// # Errors
/// When there is no such node.
pub fn explain(args: &ExplainArgs) -> Result<Exit> {
    let Some(resolved) = load_or_report(&args.file, &args.overriding, false) else { return Ok(Exit::Wrong) };
    let (plan, store) = results_of(&resolved, args.artifacts.as_deref())?;
    if let Some((name, reason)) = resolved.left_out.iter().find(|(name, _)| name.0 == args.node) {
        println!("{name} is not in this plan: {reason}");
        return Ok(Exit::Done);
    }
    let chosen = choose_nodes(&plan, &args.node)?;
    let costs = super::plan::costs(&plan, &store);
    let accepted = accepted::read_all(store.layout());
    let story = |planned: &PlannedNode| {
        let is_new = matches!(planned.verdict, Verdict::Run(_)) || planned.stands_for.is_some();
        Story {
            differences: is_new.then(|| Plan::differences(planned, &store)).flatten().unwrap_or_default(),
            accepted: planned.stands_for.and_then(|own| accepted.get(&own).cloned()),
            cost: costs.nodes.get(&planned.node.name).cloned(),
        }
    };
    let stories: Vec<Story> = chosen.iter().map(|planned| story(planned)).collect();
    let told = chosen.into_iter().zip(&stories);
    if args.json {
        let nodes: Vec<NodeJson<'_>> = told.map(|(planned, story)| NodeJson::new(planned, story)).collect();
        println!("{}", serde_json::to_string_pretty(&nodes)?);
        return Ok(Exit::Done);
    }
    let texts: Vec<String> = told.map(|(planned, story)| node_text(&plan, planned, story)).collect();
    print!("{}", texts.join("\n"));
    Ok(Exit::Done)
}

impl<'a> NodeJson<'a> {
    fn new(planned: &'a PlannedNode, story: &'a Story) -> Self {
        let node = &planned.node;
        let setting = |(key, value): (String, String)| {
            let origin = origin(&node.origins, &key);
            SettingJson { key, value, origin }
        };
        Self {
            version: JSON_VERSION,
            node: &node.name.0,
            stage: &node.stage,
            verdict: &planned.verdict,
            fingerprint: planned.fingerprint.to_string(),
            stands_for: planned.stands_for.map(|own| own.to_string()),
            parts: planned.parts(),
            settings: setting_leaves(&node.settings).into_iter().map(setting).collect(),
            differences: &story.differences,
            accepted: &story.accepted,
            cost: &story.cost,
        }
    }
}

/// Returns all about one node.
pub fn node_text(plan: &Plan, planned: &PlannedNode, story: &Story) -> String {
    let PlannedNode { node, fingerprint, stands_for, inputs, content, verdict, .. } = planned;
    let mut text = format!("{}: stage {} (kind {}), {verdict}", node.name, node.stage, node.kind);
    match verdict {
        Verdict::Cached => {}
        Verdict::Run(reason) => drop(write!(text, ": {reason}")),
        Verdict::Blocked(missing) => {
            for missing in missing {
                let _ = write!(text, "\n  {missing}");
                if let Missing::Path { remedy, .. } = missing {
                    let _ = write!(text, ": {remedy}");
                }
            }
        }
    }
    text.push('\n');
    if let Some(Acceptance { by, note, .. }) = &story.accepted {
        let note = if note.is_empty() { String::new() } else { format!(": {note}") };
        let _ = writeln!(text, "accepted by {} on {}{note}", by.user, utc(by.at_ms));
    }
    if !story.differences.is_empty() {
        let _ = write!(text, "differs from its newest result in\n{}", render::differences(&story.differences, "  "));
    }
    if let Some(Cost { seconds, gpu_hours, bytes: size, like, like_sealed_ms, factor }) = &story.cost {
        let _ = writeln!(
            text,
            "expected to take {}, {gpu_hours:.2} GPU-hours, {} of disk: like {like} of {}, {factor:.3} times the work",
            duration(*seconds),
            bytes(*size),
            utc(*like_sealed_ms)
        );
    }
    if let Some(own) = stands_for {
        let _ = writeln!(text, "uses {fingerprint} in place of its own");
        let _ = writeln!(text, "fingerprint {own}, from:");
    } else {
        let _ = writeln!(text, "fingerprint {fingerprint}, from:");
    }
    let _ = writeln!(text, "  stage kind {}, code version {}, seed {}", node.kind, node.kind.code_version(), node.seed);
    let mut ports = Table::new(&["  port", "accepts", "node", "verdict", "fingerprint"]);
    for (port, input) in &node.inputs {
        let accepts = match node.kind.ports() {
            Ports::Free => None,
            Ports::Members(kind) => Some(kind),
            Ports::Named(all) => all.iter().find(|known| known.name == port).map(|known| known.accepts),
        };
        ports.row([
            format!("  {port}"),
            accepts.map_or(String::new(), |kind| kind.to_string()),
            input.to_string(),
            plan.node(input).map_or(String::new(), |planned| planned.verdict.to_string()),
            inputs.get(port).map_or(String::new(), |fingerprint| fingerprint.short()),
        ]);
    }
    if !node.inputs.is_empty() {
        let _ = write!(text, "{ports}");
    }
    for (key, hash) in content {
        let _ = writeln!(text, "  content of {key}: {}", hash.get(..12).unwrap_or(hash));
    }
    let _ = write!(text, "makes {}; takes {}", node.settings.output(), amounts(&node.slots));
    let _ = writeln!(text, "; device {}, threads {}, retries {}\n", node.device, node.threads, node.retries);
    let mut settings = Table::new(&["  setting", "value", "from"]);
    for (key, value) in setting_leaves(&node.settings) {
        settings.row([format!("  {key}"), value, origin(&node.origins, &key)]);
    }
    let _ = write!(text, "{settings}");
    text
}

fn amounts(slots: &LiteMap<String, f64>) -> String {
    let amounts: Vec<String> = slots.iter().map(|(name, amount)| format!("{amount} {name}")).collect();
    if amounts.is_empty() { "no slot".to_owned() } else { amounts.join(", ") }
}

/// Returns where a leaf was written; an item of a list was written where the list was.
fn origin(origins: &LiteMap<String, Origin>, key: &str) -> String {
    let mut key = key;
    loop {
        if let Some(origin) = origins.get(key) {
            return origin.to_string();
        }
        match key.rfind(['.', '[']) {
            Some(end) => key = &key[..end],
            None => return "default of the type".to_owned(),
        }
    }
}
