//! Expands the axes of a pipeline: `over = { benchmark = ["geneval", "dpg"] }` turns one node table into two nodes.
//!
//! The rules:
//! - An axis is a settings key (or `input.PORT`) and its list of values. Several axes of a node multiply.
//! - Axes flow along edges: a node that reads `images` has one instance for each instance of `images`.
//! - A node that reads two nodes with the same axis (same key, same values) reads them at the same value. Different axes
//!   multiply.
//! - At the node that declares it, a value sets its key, or wires its port. Further along the edges it fills the same
//!   key only where the stage has that key and nothing else sets it.
//! - A name lists axis values in order: those of the inputs first, then the node's own as written:
//!   `images[geneval,handoff-2]`. In `inputs`, in `--set` and in `[node."..."]`, a name with some of the values selects
//!   all instances that have them.
//! - `needs` multiplies nothing: a node waits for all instances it names that agree with its own axis values.
//!
//! Knows nothing of stages: it sees tables, wires and values.

use std::collections::BTreeMap;
use std::sync::Arc;

use deepgen_contract::id::NodeName;

use super::diagnostic::Diagnostic;
use super::pipeline::{AxisTable, NodeTable};
use super::tree::{Tree, Value};
use super::wiring::{INPUT_PREFIX, Reference, Wires, Wiring};

/// A key and its values.
#[derive(Debug)]
pub struct Axis {
    /// Settings key, or `input.PORT`.
    pub key: String,
    /// Values in order.
    pub values: Vec<Tree>,
    /// How each value is called in names.
    pub labels: Vec<String>,
    /// Key and values as one text: equal for axes that are the same.
    identity: String,
}

/// One value of one axis.
#[derive(Debug, Clone)]
pub struct Point {
    /// The axis.
    pub axis: Arc<Axis>,
    /// Which of its values.
    pub value: usize,
    /// True at the node that declares the axis.
    pub is_own: bool,
}

impl Point {
    /// Returns how the value is called in names.
    pub fn label(&self) -> &str {
        &self.axis.labels[self.value]
    }
}

/// One node of the expanded pipeline.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Index of its table.
    pub table: usize,
    /// Name with axis values.
    pub name: NodeName,
    /// Its axis values.
    pub points: Vec<Point>,
    /// Instance wired to each port.
    pub inputs: BTreeMap<String, usize>,
    /// Instances that must be done before.
    pub needs: Vec<usize>,
}

impl Instance {
    /// Returns true when the instance has all of these axis values.
    pub fn has_labels(&self, labels: &[String]) -> bool {
        labels.iter().all(|label| self.points.iter().any(|point| point.label() == label))
    }
}

/// Returns all instances, each after those it reads.
pub fn expand(tables: &[NodeTable], wiring: &Wiring, problems: &mut Vec<Diagnostic>) -> Vec<Instance> {
    let mut all: Vec<Instance> = Vec::new();
    let mut by_table: Vec<Vec<usize>> = vec![Vec::new(); tables.len()];
    for &at in &wiring.order {
        let axes: Vec<Arc<Axis>> = tables[at].over.iter().map(|axis| Arc::new(read_axis(axis, problems))).collect();
        let drafts = Known { all: &all, by_table: &by_table }.drafts(&axes, &wiring.wires[at]);
        if drafts.is_empty() {
            let message = format!("no instance of the inputs of `{}` fits together", tables[at].name);
            let help = "the selected axis values exclude each other, or do not exist";
            problems.push(Diagnostic::new(message).at(&tables[at].spot, "has no instance").help(help));
        }
        for Draft { points, inputs } in drafts {
            let labels: Vec<&str> = points.iter().map(Point::label).collect();
            let base = &tables[at].name;
            let name = if labels.is_empty() { base.clone() } else { format!("{base}[{}]", labels.join(",")) };
            let needs = Known { all: &all, by_table: &by_table }.needed(&points, &wiring.wires[at].needs);
            by_table[at].push(all.len());
            all.push(Instance { table: at, name: NodeName(name), points, inputs, needs });
        }
    }
    all
}

fn read_axis(axis: &AxisTable, problems: &mut Vec<Diagnostic>) -> Axis {
    let labels: Vec<String> = axis.values.iter().enumerate().map(|(at, value)| label(at, value)).collect();
    for (at, label) in labels.iter().enumerate() {
        if let Some(first) = labels[..at].iter().position(|other| other == label) {
            problems.push(
                Diagnostic::new(format!("`over.{}` lists `{label}` twice", axis.key))
                    .at(&axis.values[at].spot, "again here")
                    .at(&axis.values[first].spot, "first here"),
            );
        }
    }
    let values: Vec<serde_json::Value> = axis.values.iter().map(Tree::json).collect();
    let identity = format!("{} {}", axis.key, serde_json::Value::from(values));
    Axis { key: axis.key.clone(), values: axis.values.clone(), labels, identity }
}

/// Scalars are called by what they are; lists and tables by their place, from 1.
fn label(at: usize, value: &Tree) -> String {
    match &value.value {
        Value::Text(text) => text.replace(['[', ']', ','], "_"),
        Value::Int(_) | Value::Float(_) | Value::Bool(_) => value.json().to_string(),
        _ => (at + 1).to_string(),
    }
}

/// An instance before it has a name.
#[derive(Debug, Clone, Default)]
struct Draft {
    points: Vec<Point>,
    inputs: BTreeMap<String, usize>,
}

/// The instances made so far.
struct Known<'a> {
    all: &'a [Instance],
    by_table: &'a [Vec<usize>],
}

impl Known<'_> {
    fn drafts(&self, axes: &[Arc<Axis>], wires: &Wires) -> Vec<Draft> {
        let mut drafts = vec![Draft::default()];
        for (port, reference) in &wires.fixed {
            drafts = drafts.iter().flat_map(|draft| self.wired(draft, port, reference)).collect();
        }
        for axis in axes {
            drafts = drafts.iter().flat_map(|draft| along(draft, axis)).collect();
        }
        for (at, references) in &wires.by_axis {
            let axis = &axes[*at];
            let port = axis.key.strip_prefix(INPUT_PREFIX).unwrap_or(&axis.key);
            drafts = drafts
                .iter()
                .flat_map(|draft| {
                    let point = draft.points.iter().find(|point| point.axis.identity == axis.identity);
                    match point.and_then(|point| references[point.value].as_ref()) {
                        Some(reference) => self.wired(draft, port, reference),
                        // A wire that was reported and left out.
                        None => vec![draft.clone()],
                    }
                })
                .collect();
        }
        drafts
    }

    /// Returns every instance that these references select and that agrees with the axis values of `points`.
    fn needed(&self, points: &[Point], references: &[Reference]) -> Vec<usize> {
        let mut needed: Vec<usize> = Vec::new();
        for reference in references {
            let agrees = |other: &Instance| {
                other.points.iter().all(|theirs| {
                    let same = points.iter().find(|ours| ours.axis.identity == theirs.axis.identity);
                    let is_chosen = reference.labels.iter().any(|label| label == theirs.label());
                    is_chosen || same.is_none_or(|ours| ours.value == theirs.value)
                })
            };
            let candidates = self.by_table[reference.table].iter().copied();
            let fits = |at: &usize| self.all[*at].has_labels(&reference.labels) && agrees(&self.all[*at]);
            needed.extend(candidates.filter(fits));
        }
        needed.sort_unstable();
        needed.dedup();
        needed
    }

    /// Returns `draft` with `port` wired to each fitting instance.
    fn wired(&self, draft: &Draft, port: &str, reference: &Reference) -> Vec<Draft> {
        let candidates = self.by_table[reference.table].iter().map(|at| (*at, &self.all[*at]));
        candidates
            .filter(|(_, instance)| instance.has_labels(&reference.labels))
            .filter_map(|(at, instance)| {
                let mut draft = draft.clone();
                for point in &instance.points {
                    match draft.points.iter().find(|known| known.axis.identity == point.axis.identity) {
                        Some(known) if known.value != point.value => return None,
                        Some(_) => {}
                        None => {
                            // A value that the wire names is fixed: it is no axis of the reader.
                            if !reference.labels.iter().any(|label| label == point.label()) {
                                draft.points.push(Point { is_own: false, ..point.clone() });
                            }
                        }
                    }
                }
                draft.inputs.insert(port.to_owned(), at);
                Some(draft)
            })
            .collect()
    }
}

/// Returns `draft` at each value of one of its own axes.
fn along(draft: &Draft, axis: &Arc<Axis>) -> Vec<Draft> {
    let mut draft = draft.clone();
    if let Some(point) = draft.points.iter_mut().find(|point| point.axis.identity == axis.identity) {
        point.is_own = true;
        return vec![draft];
    }
    (0..axis.values.len())
        .map(|value| {
            let mut draft = draft.clone();
            draft.points.push(Point { axis: axis.clone(), value, is_own: true });
            draft
        })
        .collect()
}
