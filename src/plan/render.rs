//! A plan as text, for people: the table of verdicts, what is missing, the sizes.
//!
//! Decides nothing and prints nothing: it returns text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use deepgen_contract::id::NodeName;
use deepgen_contract::model::ParameterCounts;

use super::cost::Costs;
use super::fingerprint::Difference;
use super::plan::{Missing, Plan, PlannedNode, Verdict};
use super::sizes::{TrainingSizes, Unbuildable};
use crate::commands::table::Table;
use crate::progress::format::{bytes, count, duration};
use crate::spec::Resolved;

/// Returns the heading, the table of nodes, the count of verdicts, the expected cost, every missing input, and of the
/// nodes in `changes` everything that differs from their newest results.
pub fn plan(resolved: &Resolved, plan: &Plan, costs: &Costs, changes: &BTreeMap<NodeName, Vec<Difference>>) -> String {
    let is_smoke = plan.nodes.iter().any(|planned| planned.is_smoke);
    let smoke = if is_smoke { ", a smoke test: two steps of every stage" } else { "" };
    let mut text = format!("{}, profile {}, seed {}{smoke}\n\n", resolved.name, resolved.profile, resolved.seed);
    let has_costs = !costs.nodes.is_empty();
    let mut heading = vec!["node", "stage", "verdict"];
    heading.extend(has_costs.then_some("time"));
    heading.push("reason");
    let mut table = Table::new(&heading);
    for planned in &plan.nodes {
        let reason = match &planned.verdict {
            Verdict::Cached => match &planned.stands_for {
                Some(own) => format!("{}, accepted in place of {}", planned.fingerprint.short(), own.short()),
                None => planned.fingerprint.short(),
            },
            Verdict::Run(reason) => reason.to_string(),
            Verdict::Blocked(missing) => blocked(missing),
        };
        let PlannedNode { node, verdict, .. } = planned;
        let mut cells = vec![node.name.to_string(), node.stage.clone(), verdict.to_string()];
        if has_costs {
            cells.push(match (costs.nodes.get(&node.name), verdict) {
                (_, Verdict::Cached) => String::new(),
                (Some(cost), _) => duration(cost.seconds),
                (None, _) => "unknown".to_owned(),
            });
        }
        cells.push(reason);
        table.row(cells);
    }
    let _ = write!(text, "{table}\n{}\n{}", counts(plan), cost_line(plan, costs));
    for (node, differences_of) in changes.iter().filter(|(_, all)| !all.is_empty()) {
        let _ = write!(text, "\n{node} differs from its newest result in\n{}", differences(differences_of, "  "));
    }
    text.push_str(&missing(plan));
    if let Some(sweep) = &resolved.sweep {
        let num_used: usize = sweep.variants.iter().map(|variant| variant.nodes.len()).sum();
        let _ = writeln!(
            text,
            "\n{} variants use {num_used} nodes; {} are left when shared ones stand once",
            sweep.variants.len(),
            plan.nodes.len()
        );
    }
    text
}

/// Returns what the nodes to run are expected to cost; empty when none is to run.
fn cost_line(plan: &Plan, costs: &Costs) -> String {
    let num = plan.nodes.iter().filter(|planned| planned.verdict != Verdict::Cached).count();
    if num == 0 {
        return String::new();
    }
    if costs.nodes.is_empty() {
        return "expected cost: unknown, no earlier run is like these nodes\n".to_owned();
    }
    let unknown = match costs.unknown.len() {
        0 => String::new(),
        num => format!("; of {} nothing is known", count(num, "node")),
    };
    let (time, gpu, disk) = (duration(costs.seconds), costs.gpu_hours, bytes(costs.bytes));
    format!("expected cost: {time} of work, {gpu:.2} GPU-hours, {disk} of disk{unknown}\n")
}

/// Returns differences, one a line.
pub fn differences(all: &[Difference], indent: &str) -> String {
    all.iter().map(|difference| format!("{indent}{difference}\n")).collect()
}

/// Names each missing path once, and the first few nodes that are waited for.
fn blocked(missing: &[Missing]) -> String {
    let mut paths: Vec<&str> = Vec::new();
    let mut nodes: Vec<&str> = Vec::new();
    for missing in missing {
        match missing {
            Missing::Path { path, .. } if !paths.contains(&path.as_str()) => paths.push(path),
            Missing::Path { .. } => {}
            Missing::Node { node } => nodes.push(&node.0),
        }
    }
    let mut parts: Vec<String> = paths.iter().map(|path| format!("{path} is missing")).collect();
    if !nodes.is_empty() {
        let more = nodes.len().saturating_sub(3);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        parts.push(format!("waits for {}{more}", nodes[..nodes.len().min(3)].join(", ")));
    }
    parts.join(", ")
}

fn counts(plan: &Plan) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for planned in &plan.nodes {
        *counts.entry(planned.verdict.to_string()).or_default() += 1;
    }
    let num = |verdict: &str| counts.get(verdict).copied().unwrap_or(0);
    let mut text = format!("{} nodes: {} cached, {} to run", plan.nodes.len(), num("cached"), num("run"));
    if num("blocked") > 0 {
        let _ = write!(text, ", {} blocked", num("blocked"));
    }
    text
}

/// Returns what is missing outside and what to do about each; empty when nothing is.
pub fn missing(plan: &Plan) -> String {
    let mut text = String::new();
    let mut table = Table::new(&["  node", "path", "what to do"]);
    let mut num = 0;
    for planned in &plan.nodes {
        let Verdict::Blocked(missing) = &planned.verdict else { continue };
        for missing in missing {
            let Missing::Path { path, remedy, .. } = missing else { continue };
            table.row([format!("  {}", planned.node.name), path.clone(), remedy.clone()]);
            num += 1;
        }
    }
    if num > 0 {
        let _ = write!(text, "\nmissing inputs\n{table}");
    }
    text
}

/// Returns the model's parts and the sizes of each training node.
pub fn sizes(all: &[Result<TrainingSizes, Unbuildable>]) -> String {
    let mut text = String::new();
    let known: Vec<&TrainingSizes> = all.iter().filter_map(|sizes| sizes.as_ref().ok()).collect();
    if !known.is_empty() {
        let _ = write!(text, "\nparameters\n{}", parts_table(&known));
        let _ = write!(text, "\ntraining\n{}", training_table(&known));
        let _ =
            write!(text, "\noperations and memory, on one device, counted and not measured\n{}", work_table(&known));
    }
    for (node, problem) in all.iter().filter_map(|sizes| sizes.as_ref().err()) {
        let _ = writeln!(text, "\nno sizes for {node}: {problem}");
    }
    text
}

type Count = fn(&ParameterCounts) -> u64;

fn parts_table(known: &[&TrainingSizes]) -> Table {
    let mut heading = vec!["  part"];
    heading.extend(known.iter().map(|sizes| sizes.node.0.as_str()));
    let mut table = Table::new(&heading);
    let parts: [(&str, Count); 10] = [
        ("language", |parts| parts.language),
        ("vision", |parts| parts.vision),
        ("vlm", |parts| parts.language + parts.vision),
        ("bridge", |parts| parts.bridge),
        ("lora", |parts| parts.lora),
        ("dit", |parts| parts.dit),
        ("dit with position table", |parts| parts.dit + parts.dit_position_table),
        ("vae", |parts| parts.vae),
        ("conditioner", |parts| parts.conditioner),
        ("trainable", |_| 0),
    ];
    for (name, of) in parts {
        let elements = |sizes: &TrainingSizes| match name {
            "trainable" => sizes.trainable.values().sum(),
            _ => of(&sizes.parts),
        };
        if known.iter().any(|sizes| elements(sizes) > 0) {
            let cells = known.iter().map(|sizes| grouped(elements(sizes)));
            table.row([format!("  {name}")].into_iter().chain(cells));
        }
    }
    table
}

fn training_table(known: &[&TrainingSizes]) -> Table {
    let mut table =
        Table::new(&["  node", "trains", "iterations", "updates", "batch per device", "warm-up", "resolution"]);
    for sizes in known {
        let trains: Vec<&str> = sizes.trainable.keys().copied().collect();
        table.row([
            format!("  {}", sizes.node),
            trains.join(" + "),
            grouped(sizes.iterations),
            sizes.updates.map_or_else(|| "-".to_owned(), grouped),
            sizes.batch.map_or_else(|| "-".to_owned(), grouped),
            grouped(sizes.warmup),
            sizes.resolution.clone(),
        ]);
    }
    table
}

/// Operations of text-to-image samples, forwards and backwards; memory in f32 without sharding or recomputation.
fn work_table(known: &[&TrainingSizes]) -> Table {
    let heading =
        ["  node", "FLOPs a step", "FLOPs in all", "weights", "gradients", "moments", "activations", "memory"];
    let mut table = Table::new(&heading);
    for sizes in known {
        let flops = |flops: Option<f64>| flops.map_or_else(|| "-".to_owned(), |flops| format!("{flops:.2e}"));
        let mut cells = vec![format!("  {}", sizes.node), flops(sizes.flops_per_step), flops(sizes.flops_total)];
        cells.extend(match &sizes.memory {
            Some(memory) => {
                [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total()].map(bytes)
            }
            None => [const { String::new() }; 5],
        });
        table.row(cells);
    }
    table
}

/// Writes a number with commas between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn thousands_are_grouped() {
        assert_eq!([0, 999, 1000, 3_085_938_688].map(grouped), ["0", "999", "1,000", "3,085,938,688"]);
    }
}
