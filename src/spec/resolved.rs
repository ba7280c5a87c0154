//! The resolved form of a pipeline or a sweep: every node with typed settings, and where each value came from.
//!
//! Data only. It does not know how files are read or merged, nor what will be run.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use deepgen_contract::id::NodeName;
use deepgen_contract::settings::Settings;
use deepgen_contract::stage::StageKind;
use serde::{Deserialize, Serialize};

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
    /// Project folder: the nearest ancestor of the pipeline file with a `stages` folder. Relative paths start here.
    pub root: PathBuf,
    /// Pipeline file.
    pub pipeline_file: PathBuf,
    /// Experiment file, when this is a sweep.
    pub experiment_file: Option<PathBuf>,
    /// Where jobs run.
    pub executor: Executor,
    /// Nodes; each stands after its inputs.
    pub nodes: Vec<ResolvedNode>,
    /// What stands for what in each variant, when this is a sweep.
    pub sweep: Option<Sweep>,
}

impl Resolved {
    /// Returns the node of a name.
    pub fn node(&self, name: &NodeName) -> Option<&ResolvedNode> {
        self.nodes.iter().find(|node| &node.name == name)
    }
}

/// Where jobs run: `[executor.local]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Executor {
    /// Capacity by name, such as `gpu` and `cpu`; a node takes its share while it runs.
    pub slots: BTreeMap<String, f64>,
    /// `cpu`, `wgpu[:i]` or `cuda[:i]`.
    pub device: String,
    /// Worker binary, when it is not the one beside this program.
    pub worker: Option<PathBuf>,
    /// Threads of a job that computes.
    pub threads: usize,
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
    pub origins: BTreeMap<String, Origin>,
    /// Node wired to each port.
    pub inputs: BTreeMap<String, NodeName>,
    /// Seed of the job.
    pub seed: u64,
    /// Device of the job.
    pub device: String,
    /// Threads of the job.
    pub threads: usize,
    /// Share of the executor's slots that the job takes.
    pub slots: BTreeMap<String, f64>,
    /// Further attempts after one that failed for a cause that may pass.
    pub retries: u32,
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Origin {
    /// In a file of the project.
    File {
        /// Path relative to the project's root.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Profile whose table holds it.
        profile: Option<String>,
    },
    /// `--set` on the command line.
    CommandLine,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, line, profile: None } => write!(f, "{file}:{line}"),
            Self::File { file, line, profile: Some(profile) } => write!(f, "{file}:{line} (profile {profile})"),
            Self::CommandLine => f.write_str("command line"),
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

    /// Returns the value among a manifest's metrics: the exact name, else the only one that ends in `/name`.
    pub fn find(&self, metrics: &BTreeMap<String, f64>) -> Option<f64> {
        let exact = metrics.get(&self.metric).copied();
        let suffix = format!("/{}", self.metric);
        exact.or_else(|| metrics.iter().find(|(name, _)| name.ends_with(&suffix)).map(|(_, value)| *value))
    }
}

impl fmt::Display for MetricRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.node, self.metric)
    }
}
