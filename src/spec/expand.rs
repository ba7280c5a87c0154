//! Expands the axes of a pipeline: `over = { benchmark = ["geneval", "dpg"] }` turns one node table into two nodes.
//!
//! The rules:
//! - An axis is a settings key (or `input.PORT`) and its list of values. Several axes of a node multiply, unless `zip`
//!   lets them advance together; the first of such a group names its instances. `exclude` leaves combinations out.
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

use std::sync::Arc;

use deepgen_contract::id::NodeName;
use litemap::LiteMap;

use super::axes::{Axes, AxisTable};
use super::diagnostic::Diagnostic;
use super::pipeline::NodeTable;
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
    /// Identity of the axis that it advances with and that names the instance in its place.
    leader: Option<Arc<Axis>>,
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
    pub inputs: LiteMap<String, usize>,
    /// Instances that must be done before.
    pub needs: Vec<usize>,
}

impl Instance {
    /// Returns true when no axis of `other` has another value here, except those that `labels` choose.
    pub fn agrees_with(&self, other: &Self, labels: &[String]) -> bool {
        other.points.iter().all(|theirs| {
            let same = self.points.iter().find(|ours| ours.axis.identity == theirs.axis.identity);
            let is_chosen = labels.iter().any(|label| label == theirs.label());
            is_chosen || same.is_none_or(|ours| ours.value == theirs.value)
        })
    }

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
        let known = Known { all: &all, by_table: &by_table };
        let axes: Vec<Arc<Axis>> =
            tables[at].axes.over.iter().map(|axis| Arc::new(read_axis(axis, problems))).collect();
        let mut drafts = known.drafts(&axes, &tables[at].axes, &wiring.wires[at]);
        if drafts.is_empty() {
            let message = format!("no instance of the inputs of `{}` fits together", tables[at].name);
            let help = "the selected axis values exclude each other, or do not exist";
            problems.push(Diagnostic::new(message).at(&tables[at].spot, "has no instance").help(help));
        }
        check_axes(&tables[at], &drafts, problems);
        let had_some = !drafts.is_empty();
        drafts.retain(|draft| !tables[at].axes.excludes(|key| draft.value(key)));
        if drafts.is_empty() && had_some {
            let message = format!("`exclude` leaves no instance of `{}`", tables[at].name);
            let problem = Diagnostic::new(message).at(&tables[at].spot, "has no instance");
            problems.push(problem.help("leave out fewer combinations, or use `when` to leave the node out"));
        }
        for Draft { points, inputs } in drafts {
            let labels: Vec<&str> = points.iter().filter(|point| point.leader.is_none()).map(Point::label).collect();
            let base = &tables[at].name;
            let name = if labels.is_empty() { base.clone() } else { format!("{base}[{}]", labels.join(",")) };
            let mut instance = Instance { table: at, name: NodeName(name), points, inputs, needs: Vec::new() };
            instance.needs = Known { all: &all, by_table: &by_table }.needed(&instance, &wiring.wires[at].needs);
            by_table[at].push(all.len());
            all.push(instance);
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
                    .at(&axis.values[first].spot, "first here")
                    .help("take one of them out"),
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
    inputs: LiteMap<String, usize>,
}

impl Draft {
    /// Returns the value of an axis.
    fn value(&self, key: &str) -> Option<&Tree> {
        self.points.iter().find(|point| point.axis.key == key).map(|point| &point.axis.values[point.value])
    }
}

/// Reports what `zip` and `exclude` name and no axis is.
fn check_axes(table: &NodeTable, drafts: &[Draft], problems: &mut Vec<Diagnostic>) {
    let mut inherited: Vec<&str> =
        drafts.iter().flat_map(|draft| &draft.points).map(|point| point.axis.key.as_str()).collect();
    inherited.sort_unstable();
    inherited.dedup();
    table.axes.check(&inherited, problems);
}

/// The instances made so far.
struct Known<'a> {
    all: &'a [Instance],
    by_table: &'a [Vec<usize>],
}

impl Known<'_> {
    fn drafts(&self, axes: &[Arc<Axis>], table: &Axes, wires: &Wires) -> Vec<Draft> {
        let mut drafts = vec![Draft::default()];
        for (port, reference) in &wires.fixed {
            drafts = drafts.iter().flat_map(|draft| self.wired(draft, port, reference)).collect();
        }
        for group in table.groups() {
            let group: Vec<&Arc<Axis>> = group.into_iter().map(|at| &axes[at]).collect();
            drafts = drafts.iter().flat_map(|draft| along(draft, &group)).collect();
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

    /// Returns every instance that these references select and that agrees with the axis values of `reader`.
    fn needed(&self, reader: &Instance, references: &[Reference]) -> Vec<usize> {
        let mut needed: Vec<usize> = Vec::new();
        for reference in references {
            let candidates = self.by_table[reference.table].iter().copied();
            needed.extend(candidates.filter(|at| {
                let other = &self.all[*at];
                other.has_labels(&reference.labels) && reader.agrees_with(other, &reference.labels)
            }));
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
                            // A value that the wire names is fixed: it is no axis of the reader, nor is what
                            // advances with it.
                            let leader =
                                point.leader.as_ref().map_or(point.label(), |leader| &leader.labels[point.value]);
                            if !reference.labels.iter().any(|label| label == leader || label == point.label()) {
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

/// Returns `draft` at each value of a group of its own axes, which advance together.
fn along(draft: &Draft, group: &[&Arc<Axis>]) -> Vec<Draft> {
    let Some(leader) = group.first() else { return vec![draft.clone()] };
    (0..leader.values.len()).filter_map(|value| at_value(draft, group, value)).collect()
}

/// Returns `draft` at one value of a group; nothing when an input fixes another one.
fn at_value(draft: &Draft, group: &[&Arc<Axis>], value: usize) -> Option<Draft> {
    let mut draft = draft.clone();
    for (place, axis) in group.iter().enumerate() {
        if let Some(point) = draft.points.iter_mut().find(|point| point.axis.identity == axis.identity) {
            if point.value != value {
                return None;
            }
            point.is_own = true;
            continue;
        }
        let leader = (place > 0).then(|| group[0].clone());
        draft.points.push(Point { axis: (*axis).clone(), value, is_own: true, leader });
    }
    Some(draft)
}
