//! Two runs, or two results, side by side: what differs in settings, inputs, code, environment and numbers.
//!
//! Compares what was saved at the time, as raw JSON, so runs of different programs can be compared. Reads runs, starts
//! nothing; how a difference looks is up to the command and the report.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use deepgen_contract::artifact::{Environment, Manifest};
use deepgen_contract::id::NodeName;
use serde::Serialize;

use crate::plan::{Difference, Part, Section, differences, value_leaves};
use crate::store::ArtifactStore;
use crate::store::layout::ENVIRONMENT_FILE;
use crate::store::runs::{RunView, SavedPlan};
use crate::store::saved::SavedPlanned;

/// A run as far as it can be compared.
#[derive(Debug, Clone, PartialEq)]
pub struct RunFacts {
    /// Name of the run.
    pub name: String,
    /// What happened.
    pub view: RunView,
    /// What it set out to do.
    pub saved: SavedPlan,
    /// Machine, programs and checkout, if they were written down.
    pub environment: Option<Environment>,
    /// Descriptions of its sealed results.
    pub manifests: BTreeMap<NodeName, Manifest>,
}

/// A value that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// What it is.
    pub what: String,
    /// In the first.
    pub left: Option<String>,
    /// In the second.
    pub right: Option<String>,
}

/// A number of a result that differs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MetricChange {
    /// Node of the result.
    pub node: NodeName,
    /// Name of the number, such as `score/overall`.
    pub metric: String,
    /// In the first.
    pub left: Option<f64>,
    /// In the second.
    pub right: Option<f64>,
}

/// A node whose results differ.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NodeDiff {
    /// The node.
    pub node: NodeName,
    /// What differs in its identity, inputs included.
    pub differences: Vec<Difference>,
    /// True when nothing but inputs differ, all of which are results of nodes that differ themselves.
    pub is_consequence: bool,
}

/// What differs between two runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunDiff {
    /// Pipeline, profile, seed, command.
    pub run: Vec<Change>,
    /// Machine, programs, checkout.
    pub environment: Vec<Change>,
    /// Nodes that have the same result in both.
    pub same: Vec<NodeName>,
    /// Nodes whose results differ, in the order of the first run.
    pub changed: Vec<NodeDiff>,
    /// Nodes of the first run alone.
    pub only_left: Vec<NodeName>,
    /// Nodes of the second run alone.
    pub only_right: Vec<NodeName>,
    /// Numbers that differ.
    pub metrics: Vec<MetricChange>,
}

impl RunFacts {
    /// Reads a run; results that are gone are left out.
    ///
    /// # Errors
    /// When its journal or its plan cannot be read.
    pub fn read(store: &ArtifactStore, name: &str) -> anyhow::Result<Self> {
        let run_dir = store.layout().run(name);
        let saved = SavedPlan::read(&run_dir)?;
        let sealed =
            |planned: &SavedPlanned| Some((planned.node.name.clone(), store.manifest(&planned.fingerprint).ok()?));
        let manifests: BTreeMap<NodeName, Manifest> = saved.plan.nodes.iter().filter_map(sealed).collect();
        let environment = read_environment(&run_dir).or_else(|| Some(manifests.values().next()?.environment.clone()));
        Ok(Self { name: name.to_owned(), view: RunView::read(&run_dir)?, saved, environment, manifests })
    }
}

/// Returns the environment that a run wrote down.
pub fn read_environment(run_dir: &Path) -> Option<Environment> {
    serde_json::from_slice(&fs::read(run_dir.join(ENVIRONMENT_FILE)).ok()?).ok()
}

/// Returns what differs between two runs. Pure.
pub fn runs(left: &RunFacts, right: &RunFacts) -> RunDiff {
    let (mut same, mut changed, mut only_left) = (Vec::new(), Vec::new(), Vec::new());
    let mut differing: BTreeSet<&NodeName> = BTreeSet::new();
    for planned in &left.saved.plan.nodes {
        let name = &planned.node.name;
        match right.saved.node(name) {
            None => only_left.push(name.clone()),
            Some(other) if other.fingerprint == planned.fingerprint => same.push(name.clone()),
            Some(other) => {
                let diff = node(planned, other, &|left, right| left == right && differing.contains(left));
                differing.insert(name);
                changed.push(diff);
            }
        }
    }
    let is_new = |planned: &&SavedPlanned| left.saved.node(&planned.node.name).is_none();
    let only_right = right.saved.plan.nodes.iter().filter(is_new).map(|planned| planned.node.name.clone()).collect();
    RunDiff {
        run: run_changes(left, right),
        environment: match (&left.environment, &right.environment) {
            (Some(left), Some(right)) => environments(left, right),
            _ => Vec::new(),
        },
        same,
        metrics: metrics_of(left, right, &changed),
        changed,
        only_left,
        only_right,
    }
}

/// Compares two planned nodes; `differ` says of the nodes wired to a port whether they stand for each other and are
/// known to differ, so that nothing new is said by it.
pub fn node(left: &SavedPlanned, right: &SavedPlanned, differ: &dyn Fn(&NodeName, &NodeName) -> bool) -> NodeDiff {
    let differences = identities(&left.parts(), &right.parts());
    let is_known = |difference: &Difference| {
        let wired = |planned: &SavedPlanned| planned.node.inputs.get(&difference.key).cloned();
        let is_input = difference.section == Section::Input;
        is_input && wired(left).zip(wired(right)).is_some_and(|(left, right)| differ(&left, &right))
    };
    let is_consequence = !differences.is_empty() && differences.iter().all(is_known);
    NodeDiff { node: left.node.name.clone(), differences, is_consequence }
}

/// Compares two identities. Content counts only when both say what it was.
pub fn identities(left: &[Part], right: &[Part]) -> Vec<Difference> {
    let mut all = differences(left, right);
    let knows = |parts: &[Part]| parts.iter().any(|part| part.section == Section::Content);
    if !knows(left) || !knows(right) {
        all.retain(|difference| difference.section != Section::Content);
    }
    all
}

fn run_changes(left: &RunFacts, right: &RunFacts) -> Vec<Change> {
    let facts = |run: &RunFacts| {
        [
            ("pipeline", run.saved.pipeline.clone()),
            ("profile", run.saved.profile.clone()),
            ("seed", run.saved.seed.to_string()),
            ("command", run.view.command.get(1..).unwrap_or_default().join(" ")),
        ]
    };
    let pairs = facts(left).into_iter().zip(facts(right));
    let change = |((what, left), (_, right)): ((&str, String), (&str, String))| {
        (left != right).then(|| Change { what: what.to_owned(), left: Some(left), right: Some(right) })
    };
    pairs.filter_map(change).collect()
}

/// Returns the fields in which two environments differ; device and threads belong to a job and are left out.
pub fn environments(left: &Environment, right: &Environment) -> Vec<Change> {
    let leaves = |environment: &Environment| -> BTreeMap<String, String> {
        let common = Environment { device: String::new(), threads: 0, ..environment.clone() };
        let value = serde_json::to_value(&common).unwrap_or_default();
        let plain = |text: String| serde_json::from_str::<String>(&text).unwrap_or(text);
        value_leaves(&value).into_iter().map(|(key, text)| (key, plain(text))).collect()
    };
    let (left, right) = (leaves(left), leaves(right));
    let keys: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    keys.into_iter()
        .filter(|key| left.get(*key) != right.get(*key))
        .map(|key| Change { what: key.clone(), left: left.get(key).cloned(), right: right.get(key).cloned() })
        .collect()
}

fn metrics_of(left: &RunFacts, right: &RunFacts, changed: &[NodeDiff]) -> Vec<MetricChange> {
    let none = BTreeMap::new();
    let of =
        |run: &RunFacts, node: &NodeName| run.manifests.get(node).map_or(none.clone(), |made| made.metrics.clone());
    changed.iter().flat_map(|diff| metrics(&diff.node, &of(left, &diff.node), &of(right, &diff.node))).collect()
}

/// Returns the numbers of a node that differ.
pub fn metrics(node: &NodeName, left: &BTreeMap<String, f64>, right: &BTreeMap<String, f64>) -> Vec<MetricChange> {
    let names: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    let change = |name: &String| MetricChange {
        node: node.clone(),
        metric: name.clone(),
        left: left.get(name).copied(),
        right: right.get(name).copied(),
    };
    names.into_iter().map(change).filter(|change| change.left != change.right).collect()
}

/// Returns the parts of a sealed result's identity.
pub fn parts_of(manifest: &Manifest) -> Vec<Part> {
    let (inputs, content) =
        (manifest.inputs.clone().into_iter().collect(), manifest.content.clone().into_iter().collect());
    let of = crate::plan::Sources { seed: manifest.seed, inputs: &inputs, content: &content };
    let leaves = manifest.settings.get("settings").map_or_else(Vec::new, value_leaves);
    crate::plan::parts(manifest.stage_kind.name(), manifest.code_version, leaves, &of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;
    use crate::plan::nothing::Nothing;
    use crate::spec::tests::full;

    fn facts(set: &[&str], host: &str) -> RunFacts {
        let resolved = full(None, set);
        let plan = Plan::build(&resolved, &Nothing, &Nothing);
        RunFacts {
            name: "run".into(),
            view: RunView::default(),
            saved: SavedPlan::of(&resolved, &plan, None),
            environment: Some(Environment { host: host.into(), ..Environment::default() }),
            manifests: BTreeMap::new(),
        }
    }

    #[test]
    fn a_cause_is_told_from_its_consequences() {
        let (left, right) = (facts(&[], "a"), facts(&["sft.optimizer.lr=1e-4", "images.batch=3"], "b"));
        let diff = runs(&left, &right);
        let own: Vec<String> =
            diff.changed.iter().filter(|node| !node.is_consequence).map(|n| n.node.0.clone()).collect();
        assert_eq!(own[0], "sft");
        assert!(own[1..].iter().all(|node| node.starts_with("images")) && own.len() == 5, "{own:?}");
        assert_eq!(diff.changed[0].differences[0].to_string(), "optimizer.lr: 0.0004 -> 0.0001");
        let handoff = diff.changed.iter().find(|node| node.node.0 == "handoff-2").unwrap();
        assert!(handoff.is_consequence);
        assert!(diff.same.contains(&NodeName("pretrain".into())));
        assert_eq!(diff.environment, [Change { what: "host".into(), left: Some("a".into()), right: Some("b".into()) }]);
        assert_eq!(runs(&left, &left).changed, []);
    }

    #[test]
    fn nodes_of_one_run_alone_and_numbers_are_told() {
        let (left, mut right) = (facts(&[], "a"), facts(&["sft.optimizer.lr=1e-4"], "a"));
        let gone = right.saved.plan.nodes.pop().unwrap().node.name;
        let diff = runs(&left, &right);
        assert_eq!((diff.only_left, diff.only_right), (vec![gone], vec![]));
        let node = NodeName("sft".into());
        let of = |value: f64| BTreeMap::from([("train/loss".to_owned(), value), ("train/lr".to_owned(), 1.0)]);
        let found = metrics(&node, &of(0.5), &of(0.4));
        assert_eq!((found.len(), found[0].left, found[0].right), (1, Some(0.5), Some(0.4)));
    }
}
