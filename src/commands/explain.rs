//! `deepgen explain`: one node's settings with the origin of every value, what its fingerprint is made of, its ports,
//! and why it would run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use deepgen_contract::id::NodeName;
use deepgen_contract::stage::Ports;

use super::table::Table;
use super::{Overriding, load_or_report, planned};
use crate::cli::{Exit, Wrong};
use crate::plan::{Missing, Plan, PlannedNode, Verdict, setting_leaves};
use crate::spec::{Origin, nearest};

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
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// Explains a node, or each instance of it when the name has axes and none is given.
///
/// # Errors
/// When there is no such node.
pub fn explain(args: &ExplainArgs) -> Result<Exit> {
    let Some(resolved) = load_or_report(&args.file, &args.overriding, false) else { return Ok(Exit::Wrong) };
    let plan = planned(&resolved, args.artifacts.as_deref())?;
    let exact = plan.node(&NodeName(args.node.clone()));
    let of_base = || plan.nodes.iter().filter(|planned| planned.node.name.base() == args.node).collect();
    let chosen: Vec<&PlannedNode> = exact.map_or_else(of_base, |planned| vec![planned]);
    if chosen.is_empty() {
        let names: Vec<&str> = plan.nodes.iter().map(|planned| planned.node.name.0.as_str()).collect();
        let hint = nearest(&args.node, &names).map_or(String::new(), |name| format!(": did you mean `{name}`?"));
        return Err(Wrong(format!("there is no node `{}`{hint}", args.node)).into());
    }
    let texts: Vec<String> = chosen.into_iter().map(|planned| node_text(&plan, planned)).collect();
    print!("{}", texts.join("\n"));
    Ok(Exit::Done)
}

/// Returns all about one node.
pub fn node_text(plan: &Plan, planned: &PlannedNode) -> String {
    let PlannedNode { node, fingerprint, inputs, verdict, .. } = planned;
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
    let _ = writeln!(text, "\nfingerprint {fingerprint}, from:");
    let _ = writeln!(text, "  stage kind {}, code version {}, seed {}", node.kind, node.kind.code_version(), node.seed);
    let mut ports = Table::new(&["  port", "accepts", "node", "verdict", "fingerprint"]);
    for (port, input) in &node.inputs {
        let accepts = match node.kind.ports() {
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
    let _ = write!(text, "makes {}; takes {}", node.kind.output(), amounts(&node.slots));
    let _ = writeln!(text, "; device {}, threads {}, retries {}\n", node.device, node.threads, node.retries);
    let mut settings = Table::new(&["  setting", "value", "from"]);
    for (key, value) in setting_leaves(&node.settings) {
        settings.row([format!("  {key}"), value, origin(&node.origins, &key)]);
    }
    let _ = write!(text, "{settings}");
    text
}

fn amounts(slots: &BTreeMap<String, f64>) -> String {
    let amounts: Vec<String> = slots.iter().map(|(name, amount)| format!("{amount} {name}")).collect();
    if amounts.is_empty() { "no slot".to_owned() } else { amounts.join(", ") }
}

/// Returns where a leaf was written; an item of a list was written where the list was.
fn origin(origins: &BTreeMap<String, Origin>, key: &str) -> String {
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
