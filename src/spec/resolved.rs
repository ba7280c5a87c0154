//! The resolved form of a pipeline or a sweep: every node with typed settings, and where each value came from.
//!
//! Data only. It does not know how files are read or merged, nor what will be run.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use deepgen_contract::id::NodeName;
use deepgen_contract::job::FrozenCache;
use deepgen_contract::settings::Settings;
use deepgen_contract::stage::StageKind;
use litemap::LiteMap;
use serde::{Deserialize, Serialize};

use super::load::Overrides;
use super::policy::{Backoff, Remedies};

/// A pipeline after merging, expansion and checking: nothing is left to guess.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resolved {
    /// Name of the pipeline, or of the experiment when this is a sweep.
    pub name: String,
    /// Seed of every node that sets none of its own.
    pub seed: u64,
    /// Profile that was chosen.
    pub profile: String,
    /// Variants of the pipeline file that were chosen, lowest first.
    #[serde(default)]
    pub variants: Vec<String>,
    /// Project folder: the nearest ancestor of the pipeline file with a `stages` folder, else the folder above
    /// `pipelines/`. Relative paths in settings start here.
    pub root: PathBuf,
    /// Pipeline file.
    pub pipeline_file: PathBuf,
    /// Experiment file, when this is a sweep.
    pub experiment_file: Option<PathBuf>,
    /// Where jobs run.
    pub executor: Executor,
    /// Nodes; each stands after its inputs.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "shared")]
    pub nodes: Vec<Arc<ResolvedNode>>,
    /// What stands for what in each variant, when this is a sweep.
    pub sweep: Option<Sweep>,
    /// What the command line changed.
    #[serde(default)]
    pub overrides: Overrides,
    /// Text of each file that was read, by its path in the project; kept with the run's plan.
    #[serde(skip)]
    pub sources: BTreeMap<String, String>,
    /// False when nothing new may start after the first node that failed: its descendants are blocked, and everything
    /// else is left as it is for the next run. True lets all that does not depend on the failure run.
    #[serde(default = "yes")]
    pub keep_going: bool,
    /// Values of the variables that `[env]` declares, as they were used: they are settings by way of `${env.NAME}`.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Nodes of the file that are not in this plan, each with the reason: a condition that does not hold.
    #[serde(default)]
    pub left_out: BTreeMap<NodeName, String>,
}

/// Shared nodes are written as what they are.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serializer};

    use super::ResolvedNode;

    pub fn serialize<S: Serializer>(nodes: &[Arc<ResolvedNode>], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(nodes.iter().map(Arc::as_ref))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Arc<ResolvedNode>>, D::Error> {
        Ok(Vec::<ResolvedNode>::deserialize(deserializer)?.into_iter().map(Arc::new).collect())
    }
}

fn yes() -> bool {
    true
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Resolved {
    /// Returns the node of a name.
    pub fn node(&self, name: &NodeName) -> Option<&ResolvedNode> {
        self.nodes.iter().find(|node| &node.name == name).map(Arc::as_ref)
    }
}

/// Where jobs run: `[executor.local]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Executor {
    /// Capacity by name, such as `gpu` and `cpu`; a node takes its share while it runs. `memory` is counted in GiB.
    pub slots: BTreeMap<String, f64>,
    /// Identities of the slots that have some, such as the GPUs 2 and 3 of a machine; as many as the capacity. A slot
    /// that is not here has the identities from 0 up to its capacity.
    #[serde(default, skip_serializing_if = "is_default")]
    pub slot_ids: BTreeMap<String, Vec<u32>>,
    /// `cpu`, `wgpu[:i]` or `cuda[:i]`.
    pub device: String,
    /// Worker binary, when it is not the one beside this program.
    pub worker: Option<PathBuf>,
    /// Threads of a job that computes.
    pub threads: usize,
    /// Operations a second that the device reaches at most, in tera: what `throughput/mfu` is a share of.
    #[serde(default, skip_serializing_if = "is_default")]
    pub peak_tflops: Option<f64>,
    /// Where jobs that train keep what frozen parts make of images; relative to the project's root. No result depends on it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub frozen_cache: Option<FrozenCache>,
}

/// One node, ready to be planned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolvedNode {
    /// Name with its axis values, and `@variant` where variants of a sweep differ.
    pub name: NodeName,
    /// Name of the stage file, without `.toml`.
    pub stage: String,
    /// Kind of that stage.
    pub kind: StageKind,
    /// Typed settings.
    pub settings: Settings,
    /// Where each leaf of the settings came from, by dotted key.
    pub origins: LiteMap<String, Origin>,
    /// Node wired to each port.
    pub inputs: LiteMap<String, NodeName>,
    /// Seed of the job.
    pub seed: u64,
    /// Device of the job.
    pub device: String,
    /// Threads of the job.
    pub threads: usize,
    /// Peak of the job's device, in TFLOP/s, where it is known.
    #[serde(default, skip_serializing_if = "is_default")]
    pub peak_tflops: Option<f64>,
    /// Share of the executor's slots that the job takes. A share of at most 1 of `gpu` lies on one GPU; a larger one
    /// takes whole GPUs, and the job's device names the first of them (`cuda:1`).
    pub slots: LiteMap<String, f64>,
    /// Identities that the job must have, where the file lists them (`gpu = [0, 1]`): all of each is taken, and its
    /// share in `slots` is their number. The node waits until exactly these are free.
    #[serde(default, skip_serializing_if = "is_default")]
    pub slot_ids: BTreeMap<String, Vec<u32>>,
    /// Nodes that must be done before this one starts though it reads nothing of them. As with inputs, it is blocked
    /// when one of them fails; unlike inputs they are no part of its fingerprint, and a cached node does not run again
    /// because one of them does.
    #[serde(default, skip_serializing_if = "is_default")]
    pub needs: Vec<NodeName>,
    /// Further attempts after one that failed for a cause that may pass, or for which a remedy is switched on.
    pub retries: u32,
    /// Pauses between attempts.
    #[serde(default, skip_serializing_if = "is_default")]
    pub backoff: Backoff,
    /// What is done about a failure before the next attempt.
    #[serde(default, skip_serializing_if = "is_default")]
    pub remedies: Remedies,
    /// Longest time of one attempt in seconds. An attempt that is over it is stopped gently (its worker writes a
    /// checkpoint), counts as failed and, while retries are left, is followed by one that goes on from there.
    #[serde(default, skip_serializing_if = "is_default")]
    pub timeout_s: Option<f64>,
    /// An attempt whose worker reports nothing (no step, no event, no checkpoint) for this many seconds is stalled:
    /// see [`Remedies::stalled`]. None never calls it so.
    #[serde(default, skip_serializing_if = "is_default")]
    pub stall_s: Option<f64>,
    /// Of the nodes that are ready and fit, those of the highest priority start first; equal ones in order of the plan.
    #[serde(default, skip_serializing_if = "is_default")]
    pub priority: i64,
}

/// Returns the map of entries whose number is known, without room for more: ten thousand nodes have several each, and a map
/// that grows has room for four.
pub fn snug<K: Ord, V>(entries: impl IntoIterator<Item = (K, V), IntoIter: ExactSizeIterator>) -> LiteMap<K, V> {
    let entries = entries.into_iter();
    let mut map = LiteMap::with_capacity(entries.len());
    map.extend(entries);
    map
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Origin {
    /// In a file of the project.
    File {
        /// Path relative to the project's root.
        #[serde(with = "shared_text")]
        file: Arc<str>,
        /// Line, from 1.
        line: usize,
        /// Profile whose table holds it.
        profile: Option<String>,
    },
    /// `--set` on the command line.
    CommandLine,
    /// `--smoke` on the command line.
    Smoke,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, line, profile: None } => write!(f, "{file}:{line}"),
            Self::File { file, line, profile: Some(profile) } => write!(f, "{file}:{line} (profile {profile})"),
            Self::CommandLine => f.write_str("command line"),
            Self::Smoke => f.write_str("--smoke"),
        }
    }
}

/// The variants of a sweep over one graph that holds shared nodes once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// Name of the experiment: its file's name without `.toml`.
    pub name: String,
    /// Columns of the comparison table.
    pub compare: Vec<MetricRef>,
    /// Rows of the comparison table.
    pub variants: Vec<Variant>,
}

/// One variant of a sweep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Its name.
    pub name: String,
    /// Node of the united graph that stands for each node of the pipeline.
    pub nodes: BTreeMap<NodeName, NodeName>,
}

/// A number of a node's manifest, such as `scores[geneval].overall`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricRef {
    /// Node of the pipeline, before variants are told apart.
    pub node: NodeName,
    /// Name of the metric in the manifest: `overall` finds `score/overall` when no metric has that exact name.
    pub metric: String,
}

impl MetricRef {
    /// Parses `node.metric`; the node's axis values may hold dots.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn parse(text: &str) -> Result<Self, String> {
        let dot =
            super::path::first_dot(text).ok_or_else(|| format!("`{text}` names no metric: write `node.metric`"))?;
        let (node, metric) = (&text[..dot], &text[dot + 1..]);
        if node.is_empty() || metric.is_empty() {
            return Err(format!("`{text}` is not of the form `node.metric`"));
        }
        Ok(Self { node: NodeName(node.to_owned()), metric: metric.to_owned() })
    }

    /// Returns the value among a manifest's metrics: the exact name, else the score of that name (a part of a benchmark may
    /// be called `overall` too), else the only one that ends in `/name`.
    pub fn find(&self, metrics: &BTreeMap<String, f64>) -> Option<f64> {
        let of = |name: &str| metrics.get(name).copied();
        let suffix = format!("/{}", self.metric);
        let only = || {
            let mut all = metrics.iter().filter(|(name, _)| name.ends_with(&suffix)).map(|(_, value)| *value);
            all.next().filter(|_| all.next().is_none())
        };
        of(&self.metric).or_else(|| of(&format!("score{suffix}"))).or_else(only)
    }
}

impl fmt::Display for MetricRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.node, self.metric)
    }
}

/// Saves a shared text like any other, which serde does only with a feature that every crate would be built with.
mod shared_text {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(text: &Arc<str>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<str>, D::Error> {
        String::deserialize(from).map(Arc::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_found_by_its_exact_name_as_the_score_or_by_an_end_that_no_other_has() {
        let metrics = |names: &[&str]| -> BTreeMap<String, f64> {
            names.iter().zip(1..).map(|(name, at)| ((*name).to_owned(), f64::from(at))).collect()
        };
        let find = |metric: &str, names: &[&str]| {
            MetricRef { node: NodeName("n".into()), metric: metric.into() }.find(&metrics(names))
        };
        assert_eq!(find("overall", &["part/overall", "score/overall"]), Some(2.0));
        assert_eq!(find("part/overall", &["part/overall", "score/overall"]), Some(1.0));
        assert_eq!(find("loss", &["train/loss", "train/lr"]), Some(1.0));
        assert_eq!(find("loss", &["train/loss", "validation/loss"]), None);
        assert_eq!(find("loss", &["loss", "score/loss"]), Some(1.0));
    }
}
