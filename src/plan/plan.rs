//! The plan: for each node its fingerprint and a verdict with the reason for it. A pure function of values.
//!
//! It reads no file and starts nothing; what is sealed and what external files hold is asked through two traits.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::settings::Settings;
use deepgen_contract::stage::StageKind;
use litemap::LiteMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fingerprint::{Difference, Identity, Part, Section, Sources, differences, parts, value_leaves};
use crate::spec::{Origin, Resolved, ResolvedNode, snug};

/// What has been computed before: answered by the artifact store, or by a table in a test.
pub trait Known {
    /// Returns true when the result of this fingerprint is sealed and verifies.
    fn is_sealed(&self, fingerprint: &Fingerprint) -> bool;
    /// Returns the sealed result that a person declared equal to that of this fingerprint, if it is still there.
    fn accepted(&self, _fingerprint: &Fingerprint) -> Option<Fingerprint> {
        None
    }
    /// Returns the newest sealed run of a node, or of the node it stands for in the plain pipeline.
    fn latest(&self, node: &NodeName) -> Option<NodeRecord>;
}

/// What a sealed result was made from.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeRecord {
    /// Its identity.
    pub fingerprint: Fingerprint,
    /// Kind of its stage.
    pub stage_kind: StageKind,
    /// Code version of that kind at the time.
    pub code_version: u32,
    /// Seed of the job.
    pub seed: u64,
    /// The table of its resolved settings as it was saved: settings of an older program need not parse any more.
    pub settings: Value,
    /// Fingerprints of its inputs by port.
    pub inputs: LiteMap<String, Fingerprint>,
    /// Hashes of the external content it was made from by settings key; empty when they were not recorded.
    pub content: LiteMap<String, String>,
}

impl NodeRecord {
    /// Returns every part of its identity.
    pub fn parts(&self) -> Vec<Part> {
        let of = Sources { seed: self.seed, inputs: &self.inputs, content: &self.content };
        parts(self.stage_kind.name(), self.code_version, value_leaves(&self.settings), &of)
    }
}

/// Files outside the artifact store: answered by the disk, or by a table in a test.
pub trait ExternalFiles {
    /// Returns a hash of the content at `path`, as written in the settings, or nothing when it is missing.
    fn content_hash(&self, path: &str) -> Option<String>;
}

/// What will be done, node by node.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Nodes; each stands after its inputs.
    pub nodes: Vec<PlannedNode>,
}

/// A node with its identity and what will be done about it.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedNode {
    /// The node.
    pub node: Arc<ResolvedNode>,
    /// Identity of its result. Of a blocked node it is provisional: missing content is left out of it.
    pub fingerprint: Fingerprint,
    /// The node's own identity, where a person accepted another's result in its place.
    pub stands_for: Option<Fingerprint>,
    /// Fingerprints of the inputs by port.
    pub inputs: LiteMap<String, Fingerprint>,
    /// Hashes of the external content that its settings name, by settings key.
    pub content: LiteMap<String, String>,
    /// True when `--smoke` cut it, or something that it is made from, to a few steps: its result is no real one.
    pub is_smoke: bool,
    /// What will be done.
    pub verdict: Verdict,
}

/// What will be done about a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "why", rename_all = "snake_case")]
pub enum Verdict {
    /// Its result is sealed.
    Cached,
    /// It will run.
    Run(Reason),
    /// It cannot run before something outside is put right.
    Blocked(Vec<Missing>),
}

/// Why a node will run: the first thing that differs from the newest sealed run of the same node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Reason {
    /// There is no sealed run of it.
    NeverRan,
    /// Its stage is of another kind.
    StageKind {
        /// Before.
        old: StageKind,
        /// Now.
        new: StageKind,
    },
    /// The code of its stage has changed.
    CodeVersion {
        /// Before.
        old: u32,
        /// Now.
        new: u32,
    },
    /// A setting has changed.
    Setting {
        /// Dotted key of the first that differs.
        key: String,
        /// Its value before, as JSON; absent when the key was not there.
        old: Option<String>,
        /// Its value now, as JSON; absent when the key is not there.
        new: Option<String>,
        /// Settings that differ beside it.
        num_more: usize,
    },
    /// Its seed has changed.
    Seed {
        /// Before.
        old: u64,
        /// Now.
        new: u64,
    },
    /// An input will be computed anew.
    InputWillChange {
        /// Port.
        port: String,
        /// Node wired to it.
        node: NodeName,
    },
    /// An input is another result than before.
    InputChanged {
        /// Port.
        port: String,
        /// Node wired to it; absent when the port is not wired any more.
        node: Option<NodeName>,
    },
    /// The content of external paths has changed.
    Content {
        /// Paths as written.
        paths: Vec<String>,
    },
    /// Its sealed result has gone or does not verify.
    Lost,
    /// A person wants it again.
    Forced,
}

/// Something that must be put right before a node can run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Missing {
    /// A file or folder outside the store.
    Path {
        /// Settings key that names it.
        key: String,
        /// The path as written.
        path: String,
        /// What to do about it.
        remedy: String,
    },
    /// An ancestor that is blocked itself.
    Node {
        /// The node whose own files are missing.
        node: NodeName,
    },
}

impl Plan {
    /// Decides what will be done about each node. Pure: equal values give equal plans.
    pub fn build(resolved: &Resolved, known: &dyn Known, files: &dyn ExternalFiles) -> Self {
        let mut plan = Self { nodes: Vec::with_capacity(resolved.nodes.len()) };
        let mut by_name: BTreeMap<&NodeName, usize> = BTreeMap::new();
        for node in &resolved.nodes {
            // Inputs stand before their readers, so they are there.
            let inputs: BTreeMap<&str, &PlannedNode> = node
                .inputs
                .iter()
                .filter_map(|(port, input)| Some((port.as_str(), &plan.nodes[*by_name.get(input)?])))
                .collect();
            let needs = node.needs.iter().filter_map(|need| Some(&plan.nodes[*by_name.get(need)?])).collect();
            let planned = plan_node(node, (&inputs, needs), known, files);
            by_name.insert(&node.name, plan.nodes.len());
            plan.nodes.push(planned);
        }
        plan
    }

    /// Returns the planned node of a name.
    pub fn node(&self, name: &NodeName) -> Option<&PlannedNode> {
        self.nodes.iter().find(|planned| &planned.node.name == name)
    }

    /// Returns everything in which a node's identity differs from its newest sealed result; nothing when it has none.
    pub fn differences(planned: &PlannedNode, known: &dyn Known) -> Option<Vec<Difference>> {
        let record = known.latest(&planned.node.name)?;
        Some(since(&record, &planned.parts()))
    }

    /// Returns true when nothing is left to do.
    pub fn is_cached(&self) -> bool {
        self.nodes.iter().all(|planned| planned.verdict == Verdict::Cached)
    }
}

impl PlannedNode {
    /// Returns every part of its own identity.
    pub fn parts(&self) -> Vec<Part> {
        let identity = Identity {
            stage_kind: self.node.kind,
            code_version: self.node.kind.code_version(),
            settings: &self.node.settings,
            seed: self.node.seed,
            inputs: &self.inputs,
            content: &self.content,
        };
        identity.parts()
    }
}

/// Returns the content hash of each external path by settings key, and what is missing.
pub fn external_content(settings: &Settings, files: &dyn ExternalFiles) -> (LiteMap<String, String>, Vec<Missing>) {
    let (mut content, mut missing) = (LiteMap::new(), Vec::new());
    for external in settings.external_paths() {
        match files.content_hash(&external.path) {
            Some(hash) => drop(content.insert(external.key, hash)),
            None => missing.push(Missing::Path { key: external.key, path: external.path, remedy: external.remedy }),
        }
    }
    (content, missing)
}

fn plan_node(
    node: &Arc<ResolvedNode>,
    (inputs, needs): (&BTreeMap<&str, &PlannedNode>, Vec<&PlannedNode>),
    known: &dyn Known,
    files: &dyn ExternalFiles,
) -> PlannedNode {
    let (content, mut missing) = external_content(&node.settings, files);
    let fingerprints = snug(inputs.iter().map(|(port, input)| ((*port).to_owned(), input.fingerprint)));
    let identity = Identity {
        stage_kind: node.kind,
        code_version: node.kind.code_version(),
        settings: &node.settings,
        seed: node.seed,
        inputs: &fingerprints,
        content: &content,
    };
    let own = identity.fingerprint();
    let accepted = known.accepted(&own);
    let fingerprint = accepted.unwrap_or(own);
    let stands_for = accepted.map(|_| own);
    let is_smoke = node.origins.values().any(|origin| *origin == Origin::Smoke) || inputs.values().any(|p| p.is_smoke);
    missing.extend(blocked_ancestors(inputs.values().copied()));
    // What a node needs is no part of its result: a sealed one asks for nothing.
    let is_sealed = missing.is_empty() && known.is_sealed(&fingerprint);
    if !is_sealed {
        let waits = blocked_ancestors(needs.into_iter()).into_iter().filter(|waits| !missing.contains(waits));
        missing.extend(waits.collect::<Vec<_>>());
    }
    let verdict = if !missing.is_empty() {
        Verdict::Blocked(missing)
    } else if is_sealed {
        Verdict::Cached
    } else {
        Verdict::Run(reason(node, &identity, fingerprint, inputs, known))
    };
    PlannedNode { node: node.clone(), fingerprint, stands_for, inputs: fingerprints, content, is_smoke, verdict }
}

/// Returns the nodes whose own files are missing, among some nodes and what blocks them.
fn blocked_ancestors<'a>(before: impl Iterator<Item = &'a PlannedNode>) -> Vec<Missing> {
    let mut nodes = BTreeSet::new();
    for input in before {
        let Verdict::Blocked(missing) = &input.verdict else { continue };
        for missing in missing {
            nodes.insert(match missing {
                Missing::Path { .. } => input.node.name.clone(),
                Missing::Node { node } => node.clone(),
            });
        }
    }
    nodes.into_iter().map(|node| Missing::Node { node }).collect()
}

/// Returns the first thing that differs from the newest sealed run of the node.
fn reason(
    node: &ResolvedNode,
    identity: &Identity<'_>,
    fingerprint: Fingerprint,
    inputs: &BTreeMap<&str, &PlannedNode>,
    known: &dyn Known,
) -> Reason {
    let Some(record) = known.latest(&node.name) else { return Reason::NeverRan };
    if record.fingerprint == fingerprint {
        return Reason::Lost;
    }
    let all = since(&record, &identity.parts());
    let external = || node.settings.external_paths().into_iter();
    let Some(first) = all.first() else {
        // A record without content hashes: when nothing else differs, content does.
        let paths: Vec<String> = external().map(|external| external.path).collect();
        return if paths.is_empty() { Reason::Lost } else { Reason::Content { paths } };
    };
    let Difference { section, key, old, new } = first.clone();
    match section {
        Section::StageKind => Reason::StageKind { old: record.stage_kind, new: node.kind },
        Section::CodeVersion => Reason::CodeVersion { old: record.code_version, new: identity.code_version },
        Section::Seed => Reason::Seed { old: record.seed, new: node.seed },
        Section::Setting => {
            let num_more = all.iter().filter(|other| other.section == Section::Setting).count() - 1;
            Reason::Setting { key, old, new, num_more }
        }
        Section::Input => input_reason(&all, inputs),
        Section::Content => {
            let is_changed = |key: &str| all.iter().any(|part| part.section == Section::Content && part.key == key);
            Reason::Content { paths: external().filter(|path| is_changed(&path.key)).map(|path| path.path).collect() }
        }
    }
}

/// Returns what differs from a sealed result. Content counts only when the record says what it was.
fn since(record: &NodeRecord, now: &[Part]) -> Vec<Difference> {
    let mut all = differences(&record.parts(), now);
    if record.content.is_empty() {
        all.retain(|part| part.section != Section::Content);
    }
    all
}

/// Of several inputs that differ, one that will run says more than one that was exchanged.
fn input_reason(all: &[Difference], inputs: &BTreeMap<&str, &PlannedNode>) -> Reason {
    let ports =
        || all.iter().filter(|difference| difference.section == Section::Input).map(|difference| &difference.key);
    let running = ports().find_map(|port| {
        let input = inputs.get(port.as_str())?;
        matches!(input.verdict, Verdict::Run(_)).then(|| (port.clone(), input.node.name.clone()))
    });
    match running {
        Some((port, node)) => Reason::InputWillChange { port, node },
        None => {
            let port = ports().next().cloned().unwrap_or_default();
            let node = inputs.get(port.as_str()).map(|input| input.node.name.clone());
            Reason::InputChanged { port, node }
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeverRan => f.write_str("never ran"),
            Self::StageKind { old, new } => write!(f, "stage kind: {old} -> {new}"),
            Self::CodeVersion { old, new } => write!(f, "code version: {old} -> {new}"),
            Self::Setting { key, old, new, num_more } => {
                let or_absent = |value: &Option<String>| value.clone().unwrap_or_else(|| "(absent)".to_owned());
                write!(f, "{key}: {} -> {}", or_absent(old), or_absent(new))?;
                match num_more {
                    0 => Ok(()),
                    1 => f.write_str(" and 1 more setting"),
                    more => write!(f, " and {more} more settings"),
                }
            }
            Self::Seed { old, new } => write!(f, "seed: {old} -> {new}"),
            Self::InputWillChange { port, node } => write!(f, "input {port} ({node}) will change"),
            Self::InputChanged { port, node: Some(node) } => write!(f, "input {port} ({node}) is another result"),
            Self::InputChanged { port, node: None } => write!(f, "input {port} is no longer wired"),
            Self::Content { paths } => write!(f, "content changed: {}", paths.join(", ")),
            Self::Lost => f.write_str("its result is gone from the store"),
            Self::Forced => f.write_str("--force"),
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path { path, .. } => write!(f, "{path} is missing"),
            Self::Node { node } => write!(f, "waits for {node}"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cached => "cached",
            Self::Run(_) => "run",
            Self::Blocked(_) => "blocked",
        })
    }
}
