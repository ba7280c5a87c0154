//! A pipeline file as written: nodes with their wiring, profiles, and where jobs run.
//!
//! Knows one file. It does not know stage files, does not expand axes and follows no edge.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::diagnostic::Diagnostic;
use super::fields::{Fields, SlotTable, ordered};
use super::policy::{Backoff, REMEDIES, Remedies};
use super::tree::{self, Source, Spot, Tree, Value};

/// A pipeline file after parsing.
#[derive(Debug, Clone)]
pub struct Pipeline {
    /// Name of the pipeline.
    pub name: String,
    /// Seed of its nodes.
    pub seed: u64,
    /// Profile used unless the command line names another.
    pub profile: Option<(String, Spot)>,
    /// Whether what does not depend on a failed node goes on.
    pub keep_going: Option<bool>,
    /// Where jobs run.
    pub executor: ExecutorTable,
    /// Nodes in order of writing.
    pub nodes: Vec<NodeTable>,
    /// Settings of instances, in order of writing.
    pub instances: Vec<InstanceTable>,
    /// Profiles by name.
    pub profiles: BTreeMap<String, ProfileTable>,
}

/// `[executor.local]`, or a profile's change of it.
#[derive(Debug, Clone, Default)]
pub struct ExecutorTable {
    /// Capacities.
    pub slots: Option<Vec<SlotTable>>,
    /// Device.
    pub device: Option<String>,
    /// Threads.
    pub threads: Option<usize>,
    /// Worker binary.
    pub worker: Option<PathBuf>,
}

/// `[node.NAME]`.
#[derive(Debug, Clone)]
pub struct NodeTable {
    /// Name.
    pub name: String,
    /// Place of the name.
    pub spot: Spot,
    /// Stage.
    pub stage: Option<(String, Spot)>,
    /// Wiring.
    pub inputs: Vec<Wire>,
    /// Axes.
    pub over: Vec<AxisTable>,
    /// Nodes that must be done before it, in order of writing.
    pub needs: Vec<(String, Spot)>,
    /// Changes of settings.
    pub set: Option<Tree>,
    /// Changes of how it runs.
    pub run: RunTable,
}

/// `port = "node"`.
#[derive(Debug, Clone)]
pub struct Wire {
    /// Port.
    pub port: String,
    /// Place of the port's name.
    pub port_spot: Spot,
    /// Node, or instances of it.
    pub node: String,
    /// Place of the node's name.
    pub node_spot: Spot,
}

/// `key = [values]` in `over`.
#[derive(Debug, Clone)]
pub struct AxisTable {
    /// Settings key, or `input.PORT`.
    pub key: String,
    /// Place of the key.
    pub spot: Spot,
    /// Values.
    pub values: Vec<Tree>,
}

/// How a node runs, as opposed to what it computes.
#[derive(Debug, Clone, Default)]
pub struct RunTable {
    /// Seed of its own.
    pub seed: Option<u64>,
    /// Further attempts.
    pub retries: Option<u32>,
    /// Shares of slots.
    pub slots: Option<Vec<SlotTable>>,
    /// Pauses: first in seconds, factor, longest in seconds.
    pub backoff: [Option<f64>; 3],
    /// Remedies switched on or off, by name.
    pub remedies: BTreeMap<String, bool>,
    /// Longest time of an attempt in seconds; 0 for none.
    pub timeout_s: Option<f64>,
    /// Longest time without progress in seconds; 0 for none.
    pub stall_s: Option<f64>,
    /// Priority.
    pub priority: Option<i64>,
}

/// Keys of a node that say how it runs.
pub const RUN_KEYS: [&str; 8] = ["retries", "seed", "slots", "backoff", "remedies", "timeout", "stall", "priority"];

impl RunTable {
    /// Lays `over` on top.
    pub fn merge(&mut self, over: &Self) {
        self.seed = over.seed.or(self.seed);
        self.retries = over.retries.or(self.retries);
        self.slots = over.slots.clone().or_else(|| self.slots.take());
        for (below, above) in self.backoff.iter_mut().zip(over.backoff) {
            *below = above.or(*below);
        }
        self.remedies.extend(over.remedies.clone());
        self.timeout_s = over.timeout_s.or(self.timeout_s);
        self.stall_s = over.stall_s.or(self.stall_s);
        self.priority = over.priority.or(self.priority);
    }

    /// Returns the pauses between attempts.
    pub fn backoff(&self) -> Backoff {
        let [first_s, factor, most_s] = self.backoff;
        let default = Backoff::default();
        Backoff {
            first_s: first_s.unwrap_or(default.first_s),
            factor: factor.unwrap_or(default.factor),
            most_s: most_s.unwrap_or(default.most_s),
        }
    }

    /// Returns what is done about failures.
    pub fn remedies(&self) -> Remedies {
        let mut remedies = Remedies::default();
        for (name, is_on) in &self.remedies {
            if let Some(switch) = remedies.switch(name) {
                *switch = *is_on;
            }
        }
        remedies
    }
}

/// `[node."NAME[VALUE]"]`: changes for some instances of a node.
#[derive(Debug, Clone)]
pub struct InstanceTable {
    /// Selector, such as `images[geneval]`.
    pub selector: String,
    /// Its place.
    pub spot: Spot,
    /// Changes of settings.
    pub set: Option<Tree>,
    /// Changes of how it runs.
    pub run: RunTable,
}

/// `[profile.NAME]`.
#[derive(Debug, Clone, Default)]
pub struct ProfileTable {
    /// Profile that this one builds on.
    pub extends: Option<(String, Spot)>,
    /// Changes of where jobs run.
    pub executor: ExecutorTable,
    /// Changes of nodes and of instances, in order of writing.
    pub nodes: Vec<InstanceTable>,
    /// Changes of axes by node.
    pub over: BTreeMap<String, Vec<AxisTable>>,
}

impl Pipeline {
    /// Parses a pipeline file as far as it can be understood.
    pub fn parse(source: &Arc<Source>, problems: &mut Vec<Diagnostic>) -> Self {
        let (tree, errors) = tree::parse(source);
        problems.extend(errors);
        let start = Spot { start: 0, end: 1.min(source.text.len()), ..tree.spot.clone() };
        let mut pipeline = Self {
            name: String::new(),
            seed: 0,
            profile: None,
            keep_going: None,
            executor: ExecutorTable::default(),
            nodes: Vec::new(),
            instances: Vec::new(),
            profiles: BTreeMap::new(),
        };
        let known = ["pipeline", "executor", "node", "profile"];
        let Some(mut root) = Fields::new("", &tree, &known, problems) else { return pipeline };
        root.require("pipeline", &start);
        let (nodes, profiles) = (root.entries("node"), root.entries("profile"));
        let (header, executor) = (root.tree("pipeline"), root.tree("executor"));
        if let Some(tree) = header {
            pipeline.header(tree, problems);
        }
        if let Some(tree) = executor {
            pipeline.executor = parse_executor("executor", tree, problems);
        }
        for (name, spot, tree) in nodes {
            let key = format!("node.{name}");
            if name.contains('[') {
                pipeline.instances.push(parse_instance(&key, name, spot, tree, problems));
            } else {
                pipeline.nodes.push(parse_node(&key, name, spot, tree, problems));
            }
        }
        for (name, _, tree) in profiles {
            let marked = tree.clone().in_profile(&Arc::from(name));
            pipeline.profiles.insert(name.to_owned(), parse_profile(name, &marked, problems));
        }
        pipeline
    }

    fn header(&mut self, tree: &Tree, problems: &mut Vec<Diagnostic>) {
        let known = ["name", "seed", "profile", "description", "keep_going"];
        let Some(mut fields) = Fields::new("pipeline", tree, &known, problems) else { return };
        fields.require("name", &tree.spot);
        self.name = fields.text("name").map_or_else(String::new, |(name, _)| name);
        self.seed = fields.whole("seed").unwrap_or(0);
        self.profile = fields.text("profile");
        self.keep_going = fields.truth("keep_going");
        fields.text("description");
    }
}

fn parse_executor(key: &str, tree: &Tree, problems: &mut Vec<Diagnostic>) -> ExecutorTable {
    let Some(fields) = Fields::new(key, tree, &["local"], problems) else { return ExecutorTable::default() };
    let Some(local) = fields.tree("local") else { return ExecutorTable::default() };
    let key = format!("{key}.local");
    let known = ["slots", "device", "threads", "worker"];
    let Some(mut fields) = Fields::new(&key, local, &known, problems) else { return ExecutorTable::default() };
    let slots = fields.slots("slots");
    let device = fields.text("device");
    let threads = fields.whole("threads").and_then(|threads| usize::try_from(threads).ok()).filter(|t| *t > 0);
    let worker = fields.text("worker").map(|(worker, _)| worker.into());
    let device = device.and_then(|(device, spot)| match is_device(&device) {
        true => Some(device),
        false => {
            problems.push(
                Diagnostic::new(format!("unknown device `{device}`"))
                    .at(&spot, "no such device")
                    .help("a device is `cpu`, `wgpu`, `wgpu:1`, `cuda` or `cuda:1`"),
            );
            None
        }
    });
    ExecutorTable { slots, device, threads, worker }
}

fn is_device(device: &str) -> bool {
    match device.split_once(':') {
        Some((kind, index)) => matches!(kind, "wgpu" | "cuda") && index.parse::<u32>().is_ok(),
        None => matches!(device, "cpu" | "wgpu" | "cuda"),
    }
}

fn parse_node(key: &str, name: &str, spot: &Spot, tree: &Tree, problems: &mut Vec<Diagnostic>) -> NodeTable {
    let mut node = NodeTable {
        name: name.to_owned(),
        spot: spot.clone(),
        stage: None,
        inputs: Vec::new(),
        over: Vec::new(),
        needs: Vec::new(),
        set: None,
        run: RunTable::default(),
    };
    if let Some(c) = name.chars().find(|c| matches!(c, ']' | '.' | ',' | '@' | '=')) {
        let message = format!("the node name `{name}` holds `{c}`, which has a meaning of its own");
        problems.push(Diagnostic::new(message).at(spot, "rename it"));
    }
    let known = [&["stage", "inputs", "needs", "set", "over"][..], &RUN_KEYS].concat();
    let mut wrong = Vec::new();
    if let Some(mut fields) = Fields::new(key, tree, &known, problems) {
        fields.require("stage", spot);
        node.stage = fields.text("stage");
        node.run = parse_run(key, &mut fields, &mut wrong);
        node.needs = fields.texts("needs");
        for (port, port_spot, value) in fields.entries("inputs") {
            match value.text() {
                Some(text) => node.inputs.push(Wire {
                    port: port.to_owned(),
                    port_spot: port_spot.clone(),
                    node: text.to_owned(),
                    node_spot: value.spot.clone(),
                }),
                None => wrong.push(
                    Diagnostic::new(format!("`{key}.inputs.{port}` must be the name of a node"))
                        .at(&value.spot, "expected a text"),
                ),
            }
        }
        node.set = fields.tree("set").map(|set| set.clone().undotted());
        node.over = fields.tree("over").map_or_else(Vec::new, |over| parse_over(key, over, &mut wrong));
    }
    check_set(key, node.set.as_ref(), &mut wrong);
    problems.extend(wrong);
    node
}

fn parse_run(key: &str, fields: &mut Fields<'_, '_>, problems: &mut Vec<Diagnostic>) -> RunTable {
    let mut run = RunTable {
        seed: fields.whole("seed"),
        retries: fields.whole("retries").map(|retries| u32::try_from(retries).unwrap_or(u32::MAX)),
        slots: fields.slots("slots"),
        timeout_s: fields.seconds("timeout"),
        stall_s: fields.seconds("stall"),
        priority: fields.int("priority"),
        ..RunTable::default()
    };
    let inner = |name: &str| format!("{key}.{name}");
    if let Some(tree) = fields.tree("backoff")
        && let Some(mut fields) = Fields::new(&inner("backoff"), tree, &["first", "factor", "most"], problems)
    {
        run.backoff = [fields.seconds("first"), fields.number("factor", 1.0), fields.seconds("most")];
    }
    if let Some(tree) = fields.tree("remedies")
        && let Some(mut fields) = Fields::new(&inner("remedies"), tree, &REMEDIES, problems)
    {
        let switch = |name: &str| Some((name.to_owned(), fields.truth(name)?));
        run.remedies = REMEDIES.into_iter().filter_map(switch).collect();
    }
    run
}

fn check_set(key: &str, set: Option<&Tree>, problems: &mut Vec<Diagnostic>) {
    if let Some(set) = set.filter(|set| set.table().is_none()) {
        let message = format!("`{key}.set` must be a table of settings");
        problems.push(Diagnostic::new(message).at(&set.spot, "expected a table"));
    }
}

/// Reads axes: a key may be dotted with or without quotes, and its value is a list.
fn parse_over(key: &str, over: &Tree, problems: &mut Vec<Diagnostic>) -> Vec<AxisTable> {
    let mut axes = Vec::new();
    let Some(table) = over.table() else {
        problems
            .push(Diagnostic::new(format!("`{key}.over` must be a table of lists")).at(&over.spot, "expected a table"));
        return axes;
    };
    collect_axes(key, "", table, &mut axes, problems);
    axes
}

fn collect_axes(
    key: &str,
    prefix: &str,
    table: &tree::Table,
    axes: &mut Vec<AxisTable>,
    problems: &mut Vec<Diagnostic>,
) {
    for (name, spot, tree) in ordered(table) {
        let axis = super::path::join(prefix, name);
        match &tree.value {
            Value::List(values) if !values.is_empty() => {
                axes.push(AxisTable { key: axis, spot: spot.clone(), values: values.clone() });
            }
            Value::Table(inner) => collect_axes(key, &axis, inner, axes, problems),
            _ => {
                let message = format!("`{key}.over.{axis}` must be a list with at least one value");
                problems.push(Diagnostic::new(message).at(&tree.spot, "expected a list"));
            }
        }
    }
}

fn parse_instance(key: &str, name: &str, spot: &Spot, tree: &Tree, problems: &mut Vec<Diagnostic>) -> InstanceTable {
    let mut instance =
        InstanceTable { selector: name.to_owned(), spot: spot.clone(), set: None, run: RunTable::default() };
    let known = [&["set"][..], &RUN_KEYS].concat();
    let mut wrong = Vec::new();
    if let Some(mut fields) = Fields::new(key, tree, &known, problems) {
        instance.run = parse_run(key, &mut fields, &mut wrong);
        instance.set = fields.tree("set").map(|set| set.clone().undotted());
    }
    problems.extend(wrong);
    check_set(key, instance.set.as_ref(), problems);
    instance
}

fn parse_profile(name: &str, tree: &Tree, problems: &mut Vec<Diagnostic>) -> ProfileTable {
    let mut profile = ProfileTable::default();
    let key = format!("profile.{name}");
    let Some(mut fields) = Fields::new(&key, tree, &["extends", "node", "executor"], problems) else { return profile };
    profile.extends = fields.text("extends");
    let nodes = fields.entries("node");
    if let Some(executor) = fields.tree("executor") {
        profile.executor = parse_executor(&format!("{key}.executor"), executor, problems);
    }
    for (node, spot, tree) in nodes {
        let key = format!("{key}.node.{node}");
        // `over` is taken out first: an instance has none.
        let mut rest = tree.clone();
        if let (Value::Table(table), false) = (&mut rest.value, node.contains('['))
            && let Some(over) = table.remove("over")
        {
            profile.over.insert(node.to_owned(), parse_over(&key, &over.tree, problems));
        }
        profile.nodes.push(parse_instance(&key, node, spot, &rest, problems));
    }
    profile
}
