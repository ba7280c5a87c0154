//! What a report tells, as data: read once, then rendered by pure functions.
//!
//! Knows no file and no markup.

use std::collections::{BTreeMap, BTreeSet};

use deepgen_contract::artifact::Manifest;
use deepgen_contract::eval::{Estimate, ScoreTable};
use deepgen_contract::id::NodeName;
use deepgen_contract::job::SamplesRecord;
use deepgen_contract::settings::Settings;

use crate::compare::RunDiff;
use crate::run::event::NodeState;
use crate::store::accepted::Acceptance;
use crate::store::runs::{RunView, SavedPlan};
use crate::store::saved::SavedPlanned;

/// Everything that the report of a run shows.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportData {
    /// The run, as its events tell.
    pub view: RunView,
    /// What it set out to do.
    pub saved: SavedPlan,
    /// `running`, `interrupted`, or how it ended.
    pub outcome: &'static str,
    /// Nodes, in the order of the plan.
    pub nodes: Vec<NodeReport>,
    /// Generated images, one grid for each set of prompts.
    pub grids: Vec<SampleGrid>,
    /// The run of the same pipeline before this one, and what differs from it.
    pub previous: Option<SinceLast>,
    /// Published ablation that belongs to the sweep, if one is known.
    pub published: Option<PublishedAblation>,
}

impl ReportData {
    /// Returns what is known of a node.
    pub fn node(&self, name: &NodeName) -> Option<&NodeReport> {
        self.nodes.iter().find(|node| node.name() == name)
    }

    /// Returns each node's depth: the number of steps on the longest way to it.
    pub fn depths(&self) -> BTreeMap<&NodeName, usize> {
        depths(self.nodes.iter().map(|node| &node.planned))
    }
}

/// The run before and what differs from it.
#[derive(Debug, Clone, PartialEq)]
pub struct SinceLast {
    /// Its name.
    pub run: String,
    /// Its start, milliseconds since 1970.
    pub started_ms: u64,
    /// What differs.
    pub diff: RunDiff,
}

/// Returns each node's depth; nodes stand after their inputs.
pub fn depths<'a>(nodes: impl Iterator<Item = &'a SavedPlanned>) -> BTreeMap<&'a NodeName, usize> {
    let mut depths = BTreeMap::new();
    for planned in nodes {
        let inputs = planned.node.inputs.values().filter_map(|input| depths.get(input));
        let depth = inputs.max().map_or(0, |depth: &usize| depth + 1);
        depths.insert(&planned.node.name, depth);
    }
    depths
}

/// One node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeReport {
    /// The node with its identity.
    pub planned: SavedPlanned,
    /// Its settings, if they are of this program's types.
    pub settings: Option<Settings>,
    /// Who said that this result stands for that of another identity, if somebody did.
    pub accepted: Option<Acceptance>,
    /// Where it stands.
    pub state: NodeState,
    /// Seconds that its attempts took in this run, or had taken when its result was made.
    pub seconds: Option<f64>,
    /// Attempts of this run that failed.
    pub failures: u32,
    /// Description of its sealed result, if there is one.
    pub manifest: Option<Manifest>,
    /// Numbers over steps, in order: from the result, or from the attempts so far.
    pub metrics: Vec<MetricRow>,
    /// What its workers warned of, each once.
    pub warnings: Vec<String>,
    /// Images that it drew while it trained.
    pub samples: Option<TrainingSamples>,
    /// Scores, if it is a `score` node.
    pub scores: Option<ScoreTable>,
    /// Folder of its newest attempt, relative to the artifacts folder.
    pub job_dir: Option<String>,
    /// End of what the newest attempt of a failed node printed.
    pub log_tail: String,
}

impl NodeReport {
    /// Returns its name.
    pub fn name(&self) -> &NodeName {
        &self.planned.node.name
    }

    /// Returns the final numbers of its result, or the newest ones of its attempts.
    pub fn last_metrics(&self) -> BTreeMap<String, f64> {
        match &self.manifest {
            Some(manifest) => manifest.metrics.clone(),
            None => {
                self.metrics.iter().flat_map(|row| &row.values).map(|(name, value)| (name.clone(), *value)).collect()
            }
        }
    }
}

/// Images that a node drew while it trained.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingSamples {
    /// What they show.
    pub record: SamplesRecord,
    /// Step and image with all prompts, of the steps that are shown.
    pub pictures: Vec<(u64, Picture)>,
}

/// Numbers at a step.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricRow {
    /// The step.
    pub step: u64,
    /// Values by `group/name`.
    pub values: BTreeMap<String, f64>,
}

/// Images of the same prompts, drawn by several checkpoints.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleGrid {
    /// Benchmark that the prompts are of.
    pub benchmark: String,
    /// `generate` nodes, in the order of their depth.
    pub columns: Vec<SampleColumn>,
    /// Chosen prompts.
    pub rows: Vec<SampleRow>,
    /// Prompts in all.
    pub num_items: usize,
}

/// A checkpoint in a grid.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleColumn {
    /// Node that drew the images.
    pub node: NodeName,
    /// What it drew with.
    pub label: String,
}

/// A prompt in a grid.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleRow {
    /// Category.
    pub tag: String,
    /// Prompt or instruction.
    pub prompt: String,
    /// Source image of an edit.
    pub source: Option<Picture>,
    /// The image of each column; nothing where it is missing.
    pub cells: Vec<Option<SampleCell>>,
}

/// An image in a grid.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleCell {
    /// The image.
    pub picture: Picture,
    /// What the judge said, if it was asked.
    pub mark: Option<Mark>,
}

/// What a judge said of an image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mark {
    /// Right in everything.
    pub strict: bool,
    /// Share that is right, 0 to 1.
    pub graded: Option<f64>,
}

/// An image file.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    /// Media type.
    pub mime: &'static str,
    /// Content.
    pub bytes: Vec<u8>,
    /// Width and height in pixels, where the record says them.
    pub size: Option<(usize, usize)>,
}

/// Numbers of a published ablation: `[[ablation]]` of a file in `experiments/reference`.
#[derive(Debug, Clone, PartialEq)]
pub struct PublishedAblation {
    /// Whose numbers.
    pub title: String,
    /// `benchmark.number` of each column.
    pub metrics: Vec<String>,
    /// Values of each variant, in the order of the columns.
    pub rows: Vec<(String, Vec<f64>)>,
}

/// Returns what a node of images or scores was drawn with: the name of its weights.
pub fn checkpoint_label(nodes: &[NodeReport], images: &NodeReport) -> String {
    use deepgen_contract::eval::Conditioning;
    let node = &images.planned.node;
    let weights = node.inputs.get("weights").map_or_else(|| node.name.0.clone(), |weights| weights.0.clone());
    let twins = nodes.iter().filter(|other| {
        let drawn = |settings: &Option<Settings>| match settings {
            Some(Settings::Generate(generate)) => {
                Some((generate.benchmark.clone(), generate.items.clone(), generate.conditioning))
            }
            _ => None,
        };
        let wired = &other.planned.node.inputs;
        drawn(&other.settings) == drawn(&images.settings) && wired.get("weights") == node.inputs.get("weights")
    });
    match &images.settings {
        Some(Settings::Generate(generate)) if generate.conditioning == Conditioning::BaseEncoder => {
            format!("{weights} (own encoder)")
        }
        _ if twins.count() > 1 => node.name.0.clone(),
        _ => weights,
    }
}

/// Returns true when two intervals have a point in common, so that the numbers may be equal.
pub fn overlap(a: &Estimate, b: &Estimate) -> bool {
    a.low <= b.high && b.low <= a.high
}

/// Returns the distinct texts in the order of their first occurrence.
pub fn distinct(texts: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    texts.into_iter().filter(|text| seen.insert(text.clone())).collect()
}
