//! A pipeline file as written: nodes with their wiring, profiles and variants, and where jobs run.
//!
//! Knows one file, with what it includes. It does not know stage files, does not expand axes and follows no edge.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::assignment::Assignment;
use super::axes::{Axes, parse_exclude, parse_over, parse_zip};
use super::diagnostic::Diagnostic;
use super::fields::Fields;
use super::run_table::{ExecutorTable, RUN_KEYS, RunTable, parse_executor, parse_run};
use super::scope::{ENV, HEADER, PROFILE};
use super::tree::{Spot, Tree};
use super::when::{self, Condition};

/// Keys at the top of a pipeline file; `include` is taken out before.
pub const TOP_KEYS: [&str; 6] = ["pipeline", "env", "executor", "node", "profile", "variant"];
/// Keys of `[pipeline]`.
pub const HEADER_KEYS: [&str; 5] = ["name", "description", "seed", "profile", "keep_going"];
/// Keys of a node beside those that say how it runs.
pub const NODE_KEYS: [&str; 8] = ["stage", "inputs", "needs", "when", "set", "over", "zip", "exclude"];
/// Keys of a node in a profile or a variant, beside those that say how it runs.
pub const CHANGE_KEYS: [&str; 3] = ["set", "over", "when"];
/// Keys of some instances of a node, beside those that say how they run.
pub const INSTANCE_KEYS: [&str; 2] = ["set", "when"];
/// Keys of a profile.
pub const PROFILE_KEYS: [&str; 4] = ["description", "extends", "node", "executor"];
/// Keys of a variant.
pub const VARIANT_KEYS: [&str; 4] = ["description", "extends", "node", "set"];

/// `[pipeline]`.
#[derive(Debug, Clone, Default)]
pub struct Header {
    /// Name of the pipeline.
    pub name: String,
    /// Seed of its nodes.
    pub seed: u64,
    /// Profile used unless the command line names another.
    pub profile: Option<(String, Spot)>,
    /// Whether what does not depend on a failed node goes on.
    pub keep_going: Option<bool>,
}

/// A pipeline file after parsing.
#[derive(Debug, Clone)]
pub struct Pipeline {
    /// `[pipeline]`.
    pub header: Header,
    /// Where jobs run.
    pub executor: ExecutorTable,
    /// Nodes in order of writing.
    pub nodes: Vec<NodeTable>,
    /// Settings of instances, in order of writing.
    pub instances: Vec<InstanceTable>,
    /// Profiles by name.
    pub profiles: BTreeMap<String, Layer>,
    /// Variants by name.
    pub variants: BTreeMap<String, Layer>,
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
    pub axes: Axes,
    /// Nodes that must be done before it, in order of writing.
    pub needs: Vec<(String, Spot)>,
    /// When it is there.
    pub when: Option<Box<Condition>>,
    /// Changes of settings.
    pub set: Option<Tree>,
    /// Changes of how it runs.
    pub run: Arc<RunTable>,
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

/// `[node."NAME[VALUE]"]`, or a node in a profile or a variant: changes for some instances of a node.
#[derive(Debug, Clone)]
pub struct InstanceTable {
    /// Selector, such as `images[geneval]`.
    pub selector: String,
    /// Its place.
    pub spot: Spot,
    /// When they are there.
    pub when: Option<Box<Condition>>,
    /// Changes of settings.
    pub set: Option<Tree>,
    /// Changes of how they run.
    pub run: RunTable,
}

/// `[profile.NAME]` or `[variant.NAME]`: changes that are chosen by a name.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    /// The one that this one builds on.
    pub extends: Option<(String, Spot)>,
    /// Changes of where jobs run.
    pub executor: ExecutorTable,
    /// Changes of nodes and of instances, in order of writing.
    pub nodes: Vec<InstanceTable>,
    /// Changes of axes by node.
    pub over: BTreeMap<String, Axes>,
    /// Changes of settings, after those of the nodes.
    pub assignments: Vec<Assignment>,
}

impl Header {
    /// Reads `[pipeline]` of a whole file.
    pub fn parse(tree: &Tree, problems: &mut Vec<Diagnostic>) -> Self {
        let mut header = Self::default();
        let source = &tree.spot.source;
        let Some(found) = tree.get(HEADER) else {
            let start = source.spot(0, 1.min(source.text.len()));
            let problem = Diagnostic::new("missing key `pipeline`").at(&start, "not in this file");
            problems.push(problem.help("a pipeline file begins with [pipeline] and its name"));
            return header;
        };
        let Some(mut fields) = Fields::new(HEADER, found, &HEADER_KEYS, problems) else { return header };
        fields.require("name", &found.spot);
        header.name = fields.text("name").map_or_else(String::new, |(name, _)| name);
        header.seed = fields.whole("seed").unwrap_or(0);
        header.profile = fields.text("profile");
        header.keep_going = fields.truth("keep_going");
        fields.text("description");
        header
    }
}

impl Pipeline {
    /// Reads a whole file, as far as it can be understood.
    pub fn parse(tree: &Tree, header: Header, problems: &mut Vec<Diagnostic>) -> Self {
        let mut pipeline = Self {
            header,
            executor: ExecutorTable::default(),
            nodes: Vec::new(),
            instances: Vec::new(),
            profiles: BTreeMap::new(),
            variants: BTreeMap::new(),
        };
        let Some(mut root) = Fields::new("", tree, &TOP_KEYS, problems) else { return pipeline };
        let (nodes, profiles, variants) = (root.entries("node"), root.entries("profile"), root.entries("variant"));
        if let Some(tree) = root.tree("executor") {
            pipeline.executor = parse_executor("executor", tree, problems);
        }
        pipeline.nodes.reserve_exact(nodes.len());
        for (name, spot, tree) in nodes {
            let key = format!("node.{name}");
            if name.contains('[') {
                let instance = parse_instance(&key, (name, spot), tree, &INSTANCE_KEYS, problems);
                pipeline.instances.push(instance);
            } else {
                pipeline.nodes.push(parse_node(&key, name, spot, tree, problems));
            }
        }
        for (name, _, tree) in profiles {
            let marked = tree.clone().in_profile(&Arc::new(name.to_owned()));
            let layer = parse_layer(&format!("profile.{name}"), &marked, &PROFILE_KEYS, problems);
            pipeline.profiles.insert(name.to_owned(), layer);
        }
        for (name, _, tree) in variants {
            let layer = parse_layer(&format!("variant.{name}"), tree, &VARIANT_KEYS, problems);
            pipeline.variants.insert(name.to_owned(), layer);
        }
        pipeline
    }
}

fn parse_node(key: &str, name: &str, spot: &Spot, tree: &Tree, problems: &mut Vec<Diagnostic>) -> NodeTable {
    let mut node = NodeTable {
        name: name.to_owned(),
        spot: spot.clone(),
        stage: None,
        inputs: Vec::new(),
        axes: Axes::default(),
        needs: Vec::new(),
        when: None,
        set: None,
        run: Arc::default(),
    };
    check_name(name, spot, problems);
    let known = [&NODE_KEYS[..], &RUN_KEYS].concat();
    let mut wrong = Vec::new();
    if let Some(mut fields) = Fields::new(key, tree, &known, problems) {
        fields.require("stage", spot);
        node.stage = fields.text("stage");
        node.run = Arc::new(parse_run(key, &mut fields, &mut wrong));
        node.needs = fields.texts("needs");
        for (port, port_spot, value) in fields.entries("inputs") {
            match value.text() {
                Some(text) => node.inputs.push(Wire {
                    port: port.to_owned(),
                    port_spot: port_spot.clone(),
                    node: text.to_owned(),
                    node_spot: value.spot.clone(),
                }),
                None => {
                    let message = format!("`{key}.inputs.{port}` is {}, but must be a node", value.value.kind());
                    let problem = Diagnostic::new(message).at(&value.spot, "expected a text");
                    wrong.push(problem.help(format!("write {port} = \"NODE\"")));
                }
            }
        }
        node.set = fields.tree("set").map(|set| set.clone().undotted());
        node.when = fields.tree("when").map(|tree| when::parse(&format!("{key}.when"), tree, &mut wrong).into());
        if let Some(over) = fields.tree("over") {
            node.axes.over = parse_over(&format!("{key}.over"), over, &mut wrong);
        }
        if let Some(zip) = fields.tree("zip") {
            node.axes.zip = parse_zip(&format!("{key}.zip"), zip, &mut wrong);
        }
        if let Some(exclude) = fields.tree("exclude") {
            node.axes.exclude = parse_exclude(&format!("{key}.exclude"), exclude, &mut wrong);
            node.axes.check_values(&mut wrong);
        }
    }
    check_set(key, node.set.as_ref(), &mut wrong);
    problems.extend(wrong);
    node
}

fn check_name(name: &str, spot: &Spot, problems: &mut Vec<Diagnostic>) {
    if let Some(c) = name.chars().find(|c| matches!(c, ']' | '.' | ',' | '@' | '=' | '$' | '{' | '}') || c.is_control())
    {
        let (name, c) = (name.escape_debug(), c.escape_debug());
        let message = format!("the node name `{name}` holds `{c}`, which has a meaning of its own");
        let problem = Diagnostic::new(message).at(spot, "rename it");
        problems.push(problem.help("letters, digits, `-` and `_` are safe"));
    }
    if [ENV, HEADER, PROFILE, "not", "any", ""].contains(&name) {
        let problem = Diagnostic::new(format!("no node can be named `{name}`")).at(spot, "rename it");
        problems.push(problem.help("the name has a meaning of its own in conditions and references"));
    }
}

fn check_set(key: &str, set: Option<&Tree>, problems: &mut Vec<Diagnostic>) {
    if let Some(set) = set.filter(|set| set.table().is_none()) {
        let message = format!("`{key}.set` is {}, but must be a table of settings", set.value.kind());
        problems.push(Diagnostic::new(message).at(&set.spot, "expected a table"));
    }
}

fn parse_instance(
    key: &str,
    (name, spot): (&str, &Spot),
    tree: &Tree,
    keys: &[&str],
    problems: &mut Vec<Diagnostic>,
) -> InstanceTable {
    let mut instance = InstanceTable {
        selector: name.to_owned(),
        spot: spot.clone(),
        when: None,
        set: None,
        run: RunTable::default(),
    };
    let known = [keys, &RUN_KEYS].concat();
    let mut wrong = Vec::new();
    if let Some(mut fields) = Fields::new(key, tree, &known, problems) {
        instance.run = parse_run(key, &mut fields, &mut wrong);
        instance.set = fields.tree("set").map(|set| set.clone().undotted());
        instance.when = fields.tree("when").map(|tree| when::parse(&format!("{key}.when"), tree, &mut wrong).into());
    }
    check_set(key, instance.set.as_ref(), &mut wrong);
    problems.extend(wrong);
    instance
}

fn parse_layer(key: &str, tree: &Tree, keys: &[&str], problems: &mut Vec<Diagnostic>) -> Layer {
    let mut layer = Layer::default();
    let Some(mut fields) = Fields::new(key, tree, keys, problems) else { return layer };
    fields.text("description");
    layer.extends = fields.text("extends");
    let (nodes, executor, set) = (fields.entries("node"), fields.tree("executor"), fields.tree("set"));
    if let Some(executor) = executor {
        layer.executor = parse_executor(&format!("{key}.executor"), executor, problems);
    }
    if let Some(set) = set {
        layer.assignments = Assignment::parse_table(&format!("{key}.set"), set, problems);
    }
    for (node, spot, tree) in nodes {
        let key = format!("{key}.node.{node}");
        let is_instance = node.contains('[');
        if let (Some(over), false) = (tree.get("over"), is_instance) {
            let over = parse_over(&format!("{key}.over"), over, problems);
            layer.over.insert(node.to_owned(), Axes { over, ..Axes::default() });
        }
        let keys: &[&str] = if is_instance { &INSTANCE_KEYS } else { &CHANGE_KEYS };
        layer.nodes.push(parse_instance(&key, (node, spot), tree, keys, problems));
    }
    layer
}
