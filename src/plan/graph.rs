//! A plan's graph as text for other programs: Mermaid and Graphviz DOT, coloured by verdict.
//!
//! Knows the plan; the drawing as SVG is the report's.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use deepgen_contract::id::NodeName;

use super::plan::{Plan, PlannedNode, Verdict};

/// Fill and line of a verdict.
fn colours(verdict: &Verdict) -> (&'static str, &'static str, &'static str) {
    match verdict {
        Verdict::Cached => ("cached", "#ebf0f6", "#4d6a8a"),
        Verdict::Run(_) => ("run", "#e7f3ec", "#1f7a4d"),
        Verdict::Blocked(_) => ("blocked", "#faf0dd", "#8a5a00"),
    }
}

/// Returns each edge once, by the places of its ends in the plan, with its ports.
fn edges(plan: &Plan) -> BTreeMap<(usize, usize), Vec<&str>> {
    let index: BTreeMap<&NodeName, usize> = plan.nodes.iter().enumerate().map(|(at, p)| (&p.node.name, at)).collect();
    let mut edges: BTreeMap<(usize, usize), Vec<&str>> = BTreeMap::new();
    for (target, planned) in plan.nodes.iter().enumerate() {
        for (port, input) in &planned.node.inputs {
            if let Some(source) = index.get(input) {
                edges.entry((*source, target)).or_default().push(port);
            }
        }
    }
    edges
}

/// Returns the name, and the stage where it says something that the name does not.
fn label(planned: &PlannedNode) -> (&str, Option<&str>) {
    let node = &planned.node;
    (&node.name.0, (node.name.base() != node.stage).then_some(node.stage.as_str()))
}

/// Returns the graph in Mermaid.
pub fn mermaid(plan: &Plan) -> String {
    // Mermaid reads entity codes between `#` and `;`, so `#` comes first.
    let escape =
        |text: &str| text.replace('#', "#35;").replace('"', "#quot;").replace('<', "#lt;").replace('>', "#gt;");
    let mut text = String::from("flowchart LR\n");
    for (at, planned) in plan.nodes.iter().enumerate() {
        let (name, stage) = label(planned);
        let stage = stage.map_or(String::new(), |stage| format!("<br/><small>{}</small>", escape(stage)));
        let (class, ..) = colours(&planned.verdict);
        let _ = writeln!(text, "  n{at}[\"{}{stage}\"]:::{class}", escape(name));
    }
    for ((source, target), _) in edges(plan) {
        let _ = writeln!(text, "  n{source} --> n{target}");
    }
    let mut classes: Vec<_> = plan.nodes.iter().map(|planned| colours(&planned.verdict)).collect();
    classes.sort_unstable();
    classes.dedup();
    for (class, fill, line) in classes {
        let _ = writeln!(text, "  classDef {class} fill:{fill},stroke:{line},color:#1d2228");
    }
    text
}

/// Returns the graph in DOT.
pub fn dot(plan: &Plan) -> String {
    let escape = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    let mut text = String::from(
        "digraph pipeline {\n  rankdir=LR;\n  node [shape=box, style=\"rounded,filled\", fontname=\"Helvetica\", fontsize=11];\n  edge [color=\"#888888\"];\n",
    );
    for (at, planned) in plan.nodes.iter().enumerate() {
        let (name, stage) = label(planned);
        let stage = stage.map_or(String::new(), |stage| format!("\\n{}", escape(stage)));
        let (word, fill, line) = colours(&planned.verdict);
        let _ = writeln!(
            text,
            "  n{at} [label=\"{}{stage}\", fillcolor=\"{fill}\", color=\"{line}\", tooltip=\"{word}\"];",
            escape(name)
        );
    }
    for ((source, target), ports) in edges(plan) {
        let _ = writeln!(text, "  n{source} -> n{target} [tooltip=\"{}\"];", escape(&ports.join(", ")));
    }
    text.push_str("}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::{plan_of_full, with_name};

    #[test]
    fn both_forms_hold_every_node_and_edge_once() {
        let plan = plan_of_full();
        let num_edges = edges(&plan).len();
        let (mermaid, dot) = (mermaid(&plan), dot(&plan));
        assert_eq!(mermaid.matches(" --> ").count(), num_edges);
        assert_eq!(dot.matches(" -> ").count(), num_edges);
        assert_eq!(mermaid.matches(":::run").count(), plan.nodes.len());
        insta::assert_snapshot!(mermaid);
        insta::assert_snapshot!(dot);
    }

    #[test]
    fn names_cannot_leave_their_quotes() {
        let plan = with_name(plan_of_full(), "a\"]; b <#>\\");
        assert!(mermaid(&plan).contains("n0[\"a#quot;]; b #lt;#35;#gt;\\"));
        assert!(dot(&plan).contains("label=\"a\\\"]; b <#>\\\\"));
    }
}
