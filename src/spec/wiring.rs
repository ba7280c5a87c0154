//! The edges between nodes as written: do the names exist, do the ports fit, is there a cycle, what comes first?
//!
//! Works on node tables, before axes are expanded. A wire that is wrong is reported and left out, so that everything
//! else can still be checked.

use std::collections::BTreeMap;

use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::stage::{Port, Ports, StageKind};
use petgraph::algo::tarjan_scc;
use petgraph::graph::{DiGraph, NodeIndex};

use super::diagnostic::{Diagnostic, quoted_list};
use super::pipeline::NodeTable;
use super::tree::Spot;

/// Axes of this prefix wire a port instead of setting a key: `input.weights`.
pub const INPUT_PREFIX: &str = "input.";

/// One end of an edge: the instances of a node that a name selects.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    /// Index of the node's table.
    pub table: usize,
    /// Axis values that an instance must have.
    pub labels: Vec<String>,
}

/// A node's usable wires.
#[derive(Debug, Clone, Default)]
pub struct Wires {
    /// `port = "node"`, in order of writing.
    pub fixed: Vec<(String, Reference)>,
    /// The nodes of each value of an `input.PORT` axis, by the axis' place among the node's axes.
    pub by_axis: BTreeMap<usize, Vec<Option<Reference>>>,
    /// Nodes that must be done before, in order of writing.
    pub needs: Vec<Reference>,
    /// False when a wire of the node, or of an ancestor, was left out.
    pub is_whole: bool,
}

/// All edges.
#[derive(Debug)]
pub struct Wiring {
    /// Wires by table.
    pub wires: Vec<Wires>,
    /// Tables, each after those it reads.
    pub order: Vec<usize>,
}

/// Splits `images[geneval,handoff-2]` into the base name and its axis values.
pub fn split_selector(text: &str) -> (&str, Vec<String>) {
    match text.strip_suffix(']').and_then(|text| text.split_once('[')) {
        Some((base, labels)) => (base, labels.split(',').map(|label| label.trim().to_owned()).collect()),
        None => (text, Vec::new()),
    }
}

/// What is known of a node's stage before its settings are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Made {
    /// Kind of the stage.
    pub kind: StageKind,
    /// What it makes.
    pub output: ArtifactKind,
}

/// Checks every wire of `tables`, whose stages are `made`.
pub fn wire(tables: &[NodeTable], made: &[Option<Made>], problems: &mut Vec<Diagnostic>) -> Wiring {
    let index: BTreeMap<&str, usize> = tables.iter().enumerate().map(|(at, table)| (table.name.as_str(), at)).collect();
    let mut wires = Vec::with_capacity(tables.len());
    for (table, kind) in tables.iter().zip(made) {
        let mut wiring = Nodes { index: &index, made, problems }.wires_of(table, kind.map(|made| made.kind));
        wiring.is_whole &= kind.is_some();
        wires.push(wiring);
    }
    let order = order(tables, &mut wires, problems);
    for &at in &order {
        let is_whole = targets(&wires[at]).all(|target| wires[target].is_whole);
        wires[at].is_whole &= is_whole;
    }
    Wiring { wires, order }
}

fn targets(wires: &Wires) -> impl Iterator<Item = usize> + '_ {
    let by_axis = wires.by_axis.values().flatten().flatten();
    let fixed = wires.fixed.iter().map(|(_, reference)| reference);
    fixed.chain(by_axis).chain(&wires.needs).map(|reference| reference.table)
}

struct Nodes<'a> {
    index: &'a BTreeMap<&'a str, usize>,
    made: &'a [Option<Made>],
    problems: &'a mut Vec<Diagnostic>,
}

impl Nodes<'_> {
    fn wires_of(&mut self, table: &NodeTable, kind: Option<StageKind>) -> Wires {
        let mut wires = Wires { is_whole: true, ..Wires::default() };
        let mut wired: Vec<&str> = Vec::new();
        for wire in &table.inputs {
            wired.push(&wire.port);
            let port = self.port(kind, &wire.port, &wire.port_spot);
            match self.reference((&wire.node, &wire.node_spot), kind, port) {
                Some(reference) => wires.fixed.push((wire.port.clone(), reference)),
                None => wires.is_whole = false,
            }
        }
        for (at, axis) in table.axes.over.iter().enumerate() {
            let Some(name) = axis.key.strip_prefix(INPUT_PREFIX) else { continue };
            if wired.contains(&name) {
                let message = format!("the port `{name}` of `{}` is wired twice", table.name);
                let problem = Diagnostic::new(message).at(&axis.spot, "by this axis");
                self.problems.push(problem.help("take it out of `inputs` or out of `over`"));
            }
            wired.push(name);
            let port = self.port(kind, name, &axis.spot);
            let mut references = Vec::new();
            for value in &axis.values {
                let Some(node) = value.text() else {
                    let message =
                        format!("`over.{}` lists {}, but must list names of nodes", axis.key, value.value.kind());
                    let problem = Diagnostic::new(message).at(&value.spot, "expected a text");
                    self.problems.push(problem.help("write the name of a node in quotes"));
                    references.push(None);
                    continue;
                };
                references.push(self.reference((node, &value.spot), kind, port));
            }
            wires.is_whole &= references.iter().all(Option::is_some);
            wires.by_axis.insert(at, references);
        }
        self.missing_ports(table, kind, &wired);
        wires.needs = table.needs.iter().filter_map(|(node, spot)| self.reference((node, spot), kind, None)).collect();
        wires
    }

    /// Returns the port of a name; reports a name that the kind does not have.
    fn port(&mut self, kind: Option<StageKind>, name: &str, spot: &Spot) -> Option<Port> {
        match kind?.ports() {
            Ports::Free => None,
            Ports::Members(accepts) => Some(Port { name: "", accepts, required: false }),
            Ports::Named(ports) => {
                let found = ports.iter().find(|port| port.name == name).copied();
                if found.is_none() {
                    let kind = kind.map_or("", StageKind::name);
                    let problem =
                        Diagnostic::new(format!("a `{kind}` stage has no port `{name}`")).at(spot, "no such port");
                    self.problems.push(match ports.is_empty() {
                        true => problem.help("it has no inputs"),
                        false => problem.nearest(name, ports.iter().map(|port| port.name)),
                    });
                }
                found
            }
        }
    }

    fn reference(&mut self, node: (&str, &Spot), kind: Option<StageKind>, port: Option<Port>) -> Option<Reference> {
        let (name, spot) = node;
        let (base, labels) = split_selector(name);
        let Some(&table) = self.index.get(base) else {
            self.problems.push(
                Diagnostic::new(format!("there is no node `{base}`"))
                    .at(spot, "unknown node")
                    .nearest(base, self.index.keys().copied()),
            );
            return None;
        };
        let made = self.made[table].map(|made| made.output);
        if let (Some(port), Some(made), Some(kind)) = (port, made, kind)
            && made != port.accepts
        {
            self.wrong_kind((base, spot), made, port, kind);
        }
        Some(Reference { table, labels })
    }

    fn wrong_kind(&mut self, (base, spot): (&str, &Spot), made: ArtifactKind, port: Port, kind: StageKind) {
        let taker = match port.name {
            "" => format!("a `{kind}` stage"),
            port => format!("the port `{port}` of a `{kind}` stage"),
        };
        let message = format!("`{base}` makes {made}, but {taker} takes {}", port.accepts);
        let problem = Diagnostic::new(message).at(spot, format!("{made}, not {}", port.accepts));
        let fits = |at: &usize| self.made[*at].map(|made| made.output) == Some(port.accepts);
        let fitting: Vec<&str> = self.index.iter().filter(|(_, at)| fits(at)).map(|(name, _)| *name).collect();
        self.problems.push(match fitting.is_empty() {
            true => problem.help(format!("no node of this pipeline makes {}: add one", port.accepts)),
            false => problem.help(format!("nodes that make {}: {}", port.accepts, quoted_list(&fitting))),
        });
    }

    fn missing_ports(&mut self, table: &NodeTable, kind: Option<StageKind>, wired: &[&str]) {
        let Some(kind) = kind else { return };
        let lacks = |port: &&Port| port.required && !wired.contains(&port.name);
        match kind.ports() {
            Ports::Named(ports) => {
                for port in ports.iter().filter(lacks) {
                    let message = format!("`{}` has nothing at its port `{}`", table.name, port.name);
                    let help = format!("add inputs.{} = \"NODE\", a node that makes {}", port.name, port.accepts);
                    self.problems.push(Diagnostic::new(message).at(&table.spot, "incomplete").help(help));
                }
            }
            Ports::Members(accepts) if wired.is_empty() => {
                let message = format!("`{}` has no inputs", table.name);
                let help =
                    format!("a `{kind}` stage takes one or more nodes that make {accepts}, under names of your choice");
                self.problems.push(Diagnostic::new(message).at(&table.spot, "incomplete").help(help));
            }
            Ports::Members(_) | Ports::Free => {}
        }
    }
}

/// Returns an order in which each table follows those it reads; cycles are reported and cut open.
fn order(tables: &[NodeTable], wires: &mut [Wires], problems: &mut Vec<Diagnostic>) -> Vec<usize> {
    let mut graph = DiGraph::<usize, ()>::new();
    let nodes: Vec<NodeIndex> = (0..tables.len()).map(|at| graph.add_node(at)).collect();
    for (at, wires) in wires.iter().enumerate() {
        for target in targets(wires) {
            graph.add_edge(nodes[target], nodes[at], ());
        }
    }
    for component in tarjan_scc(&graph) {
        let members: Vec<usize> = component.iter().map(|node| graph[*node]).collect();
        let reads_itself = |at: &&usize| targets(&wires[**at]).any(|target| target == **at);
        let mut cycles: Vec<Diagnostic> =
            members.iter().filter(reads_itself).map(|at| cycle(tables, wires, &[*at])).collect();
        if members.len() > 1 {
            cycles.push(cycle(tables, wires, &members));
        }
        if cycles.is_empty() {
            continue;
        }
        problems.extend(cycles);
        for &at in &members {
            let wires = &mut wires[at];
            wires.is_whole = false;
            wires.fixed.retain(|(_, reference)| !members.contains(&reference.table));
            wires.needs.retain(|reference| !members.contains(&reference.table));
            for reference in wires.by_axis.values_mut().flatten() {
                if reference.as_ref().is_some_and(|reference| members.contains(&reference.table)) {
                    *reference = None;
                }
            }
        }
    }
    by_dependency(wires)
}

/// Returns the tables, each after those it reads, in order of writing as far as that leaves a choice.
fn by_dependency(wires: &[Wires]) -> Vec<usize> {
    let mut num_unmet: Vec<usize> = wires.iter().map(|wires| targets(wires).count()).collect();
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); wires.len()];
    for (at, wires) in wires.iter().enumerate() {
        targets(wires).for_each(|target| readers[target].push(at));
    }
    let mut ready: std::collections::BTreeSet<usize> = (0..wires.len()).filter(|at| num_unmet[*at] == 0).collect();
    let mut order = Vec::with_capacity(wires.len());
    while let Some(at) = ready.pop_first() {
        order.push(at);
        for &reader in &readers[at] {
            num_unmet[reader] -= 1;
            if num_unmet[reader] == 0 {
                ready.insert(reader);
            }
        }
    }
    order
}

/// Describes one round trip through a strongly connected set of tables.
fn cycle(tables: &[NodeTable], wires: &[Wires], members: &[usize]) -> Diagnostic {
    // Walk along inputs inside the set until a table comes up again: that closes a cycle.
    let mut path = vec![members.iter().copied().min().unwrap_or_default()];
    let first = loop {
        let last = path[path.len() - 1];
        let next = targets(&wires[last]).find(|target| *target != last && members.contains(target)).unwrap_or(last);
        if let Some(at) = path.iter().position(|seen| *seen == next) {
            break at;
        }
        path.push(next);
    };
    let mut round: Vec<usize> = path[first..].to_vec();
    round.reverse();
    // Begin with the table that is written first, so that the message does not depend on the walk.
    let start = round.iter().enumerate().min_by_key(|(_, at)| **at).map_or(0, |(position, _)| position);
    round.rotate_left(start);
    let names: Vec<&str> = round.iter().chain(round.first()).map(|at| tables[*at].name.as_str()).collect();
    let mut problem = Diagnostic::new(format!("the nodes form a cycle: {}", names.join(" -> ")));
    for (position, &at) in round.iter().enumerate() {
        let source = round[(position + round.len() - 1) % round.len()];
        let wire = tables[at].inputs.iter().find(|wire| split_selector(&wire.node).0 == tables[source].name);
        let need = tables[at].needs.iter().find(|(need, _)| split_selector(need).0 == tables[source].name);
        let (verb, spot) = match (wire, need) {
            (None, Some((_, spot))) => ("needs", spot),
            (wire, _) => ("reads", wire.map_or(&tables[at].spot, |wire| &wire.node_spot)),
        };
        problem = problem.at(spot, format!("`{}` {verb} `{}`", tables[at].name, tables[source].name));
    }
    problem.help("a node can only read or need what was made before it")
}
