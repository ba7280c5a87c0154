//! An experiment: a pipeline with variants, or axes, or both. It becomes one graph in which shared nodes stand once.
//!
//! A node that is the same in all variants keeps its name; otherwise each result is called after the first variant that
//! has it: `sft@w/o SCB`. Two results are the same when their fingerprints are. Knows no store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use deepgen_contract::id::{Fingerprint, NodeName};

use super::assignment::Assignment;
use super::diagnostic::Diagnostic;
use super::fields::Fields;
use super::pipeline::Pipeline;
use super::project::Project;
use super::resolve::{Request, resolve};
use super::resolved::{MetricRef, Resolved, ResolvedNode, Sweep, Variant};
use super::tree::{self, Source, Spot, Tree, Value};
use crate::plan::Identity;

/// An experiment file after parsing.
#[derive(Debug)]
pub struct Experiment {
    name: String,
    pipeline: (String, Spot),
    profile: Option<(String, Spot)>,
    compare: Vec<(MetricRef, Spot)>,
    variants: Vec<VariantTable>,
}

/// A variant, or a point of the grid of axes.
#[derive(Debug, Clone)]
struct VariantTable {
    name: String,
    assignments: Vec<Assignment>,
}

impl Experiment {
    /// Parses an experiment file; nothing when it names no pipeline.
    pub fn parse(source: &Arc<Source>, problems: &mut Vec<Diagnostic>) -> Option<Self> {
        let (tree, errors) = tree::parse(source);
        problems.extend(errors);
        let known = ["name", "description", "pipeline", "profile", "compare", "variant", "axes"];
        let mut found = Vec::new();
        let mut fields = Fields::new("", &tree, &known, problems)?;
        fields.require("pipeline", &source.spot(0, 1.min(source.text.len())));
        fields.text("description");
        let name = fields.text("name").map(|(name, _)| name);
        let stem = || Path::new(&source.name).file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let (pipeline, profile) = (fields.text("pipeline"), fields.text("profile"));
        let mut compare = Vec::new();
        for item in fields.list("compare") {
            match item.text().ok_or_else(|| "`compare` lists texts".to_owned()).and_then(MetricRef::parse) {
                Ok(metric) => compare.push((metric, item.spot.clone())),
                Err(message) => found.push(Diagnostic::new(message).at(&item.spot, "here")),
            }
        }
        let (tables, axes) = (fields.list("variant"), fields.tree("axes"));
        let mut variants = parse_variants(tables, &mut found);
        if let Some(axes) = axes {
            variants = with_axes(variants, axes, &mut found);
        }
        if tables.is_empty() && axes.is_none() {
            let message = "this experiment has neither variants nor axes";
            found
                .push(Diagnostic::new(message).at(&source.spot(0, 1), "here").help("add [[variant]] tables or [axes]"));
        }
        problems.extend(found);
        Some(Self { name: name.or_else(stem).unwrap_or_default(), pipeline: pipeline?, profile, compare, variants })
    }

    /// Resolves the pipeline for each variant and unites the graphs.
    pub fn resolve(
        &self,
        project: &mut Project,
        file: &Path,
        request: &Request,
        problems: &mut Vec<Diagnostic>,
    ) -> Option<Resolved> {
        let (written, spot) = &self.pipeline;
        let pipeline_file: PathBuf = project.root.join(written);
        let source = match project.read(&pipeline_file) {
            Ok(source) => source,
            Err(problem) => {
                problems.push(problem.at(spot, "named here, relative to the project's root"));
                return None;
            }
        };
        let pipeline = Pipeline::parse(&source, problems);
        let mut resolved = Vec::new();
        for variant in &self.variants {
            let assignments = variant.assignments.iter().chain(&request.assignments).cloned().collect();
            let profile = request.profile.clone().or_else(|| self.profile.clone());
            let request = Request { profile, assignments, is_smoke: request.is_smoke };
            resolved.push(resolve(project, (&pipeline_file, &pipeline), &request, problems));
        }
        self.check_metrics(&resolved, problems);
        if !problems.is_empty() {
            return None;
        }
        let (nodes, variants) = unite(&self.variants, &resolved);
        let compare = self.compare.iter().map(|(metric, _)| metric.clone()).collect();
        let first = resolved.into_iter().next()?;
        Some(Resolved {
            name: self.name.clone(),
            experiment_file: Some(std::path::absolute(file).unwrap_or_else(|_| file.to_owned())),
            nodes,
            sweep: Some(Sweep { name: self.name.clone(), compare, variants }),
            ..first
        })
    }

    fn check_metrics(&self, resolved: &[Resolved], problems: &mut Vec<Diagnostic>) {
        for (metric, spot) in &self.compare {
            let has_node = |resolved: &Resolved| resolved.node(&metric.node).is_some();
            if !resolved.iter().any(has_node) {
                let names = resolved.iter().flat_map(|resolved| &resolved.nodes).map(|node| node.name.0.as_str());
                let names: std::collections::BTreeSet<&str> = names.collect();
                problems.push(
                    Diagnostic::new(format!("there is no node `{}` to compare", metric.node))
                        .at(spot, "unknown node")
                        .nearest(&metric.node.0, names),
                );
            }
        }
    }
}

fn parse_variants(tables: &[Tree], problems: &mut Vec<Diagnostic>) -> Vec<VariantTable> {
    let mut variants: Vec<VariantTable> = Vec::new();
    for table in tables {
        let mut set = None;
        let mut name = None;
        if let Some(mut fields) = Fields::new("variant", table, &["name", "description", "set"], problems) {
            fields.require("name", &table.spot);
            fields.text("description");
            name = fields.text("name");
            set = fields.tree("set");
        }
        let Some((name, spot)) = name else { continue };
        if variants.iter().any(|variant| variant.name == name) {
            let problem = Diagnostic::new(format!("two variants are named `{name}`"));
            problems.push(problem.at(&spot, "again here"));
        }
        let assignments = set.map_or_else(Vec::new, |set| parse_set(set, problems));
        variants.push(VariantTable { name, assignments });
    }
    variants
}

/// Reads `set = { "node.key" = value }`, or with bare dotted keys.
fn parse_set(set: &Tree, problems: &mut Vec<Diagnostic>) -> Vec<Assignment> {
    let Some(_) = set.table() else {
        problems.push(Diagnostic::new("`variant.set` must be a table").at(&set.spot, "expected a table"));
        return Vec::new();
    };
    let mut assignments = Vec::new();
    for (key, spot, value) in super::fields::ordered(set.table().expect("seen above")) {
        match (super::path::first_dot(key), value.table()) {
            // `sft.optimizer.lr = 1` without quotes: the node is the outermost table.
            (None, Some(_)) => assignments.push(Assignment {
                selector: key.to_owned(),
                spot: spot.clone(),
                set: value.clone().undotted(),
            }),
            _ => match Assignment::new(key, spot, value.clone()) {
                Ok(assignment) => assignments.push(assignment),
                Err(problem) => problems.push(problem),
            },
        }
    }
    assignments
}

/// Multiplies the variants by a grid: `[axes]` with `"node.key" = [values]`.
fn with_axes(variants: Vec<VariantTable>, axes: &Tree, problems: &mut Vec<Diagnostic>) -> Vec<VariantTable> {
    let mut grid = variants;
    let mut lists = Vec::new();
    // Dotted keys spell tables; only lists are values here.
    axes.leaves("", &mut |key, tree| lists.push((key, tree.clone())));
    lists.sort_by_key(|(_, tree)| tree.spot.start);
    for (key, tree) in lists {
        let Value::List(values) = &tree.value else {
            problems.push(Diagnostic::new(format!("`axes.{key}` must be a list")).at(&tree.spot, "expected a list"));
            continue;
        };
        let short = super::path::split(&key).pop().unwrap_or_default();
        let mut next = Vec::new();
        let empty = VariantTable { name: String::new(), assignments: Vec::new() };
        let base = if grid.is_empty() { vec![empty] } else { grid };
        for variant in &base {
            for value in values {
                let label = value.text().map_or_else(|| value.json().to_string(), str::to_owned);
                let label = format!("{short}={label}");
                let mut variant = variant.clone();
                variant.name = if variant.name.is_empty() { label } else { format!("{}, {label}", variant.name) };
                match Assignment::new(&key, &value.spot, value.clone()) {
                    Ok(assignment) => variant.assignments.push(assignment),
                    Err(problem) => problems.push(problem),
                }
                next.push(variant);
            }
        }
        grid = next;
    }
    grid
}

/// Unites the variants' graphs by fingerprint; external content counts by its path, which is the same for all.
fn unite(tables: &[VariantTable], resolved: &[Resolved]) -> (Vec<ResolvedNode>, Vec<Variant>) {
    let prints: Vec<BTreeMap<&NodeName, Fingerprint>> = resolved.iter().map(fingerprints).collect();
    let mut nodes: Vec<ResolvedNode> = Vec::new();
    let mut by_result: BTreeMap<(&NodeName, Fingerprint), NodeName> = BTreeMap::new();
    let mut variants = Vec::new();
    for ((table, resolved), own) in tables.iter().zip(resolved).zip(&prints) {
        let mut stands_for: BTreeMap<NodeName, NodeName> = BTreeMap::new();
        for node in &resolved.nodes {
            let print = own[&node.name];
            let name = by_result.entry((&node.name, print)).or_insert_with(|| {
                let is_shared = prints.iter().all(|other| other.get(&node.name) == Some(&print));
                let suffix = if is_shared { String::new() } else { format!("@{}", table.name) };
                let name = NodeName(format!("{}{suffix}", node.name));
                let inputs =
                    node.inputs.iter().map(|(port, input)| (port.clone(), stands_for[input].clone())).collect();
                let needs = node.needs.iter().map(|need| stands_for[need].clone()).collect();
                nodes.push(ResolvedNode { name: name.clone(), inputs, needs, ..node.clone() });
                name
            });
            stands_for.insert(node.name.clone(), name.clone());
        }
        variants.push(Variant { name: table.name.clone(), nodes: stands_for });
    }
    (nodes, variants)
}

fn fingerprints(resolved: &Resolved) -> BTreeMap<&NodeName, Fingerprint> {
    let mut all: BTreeMap<&NodeName, Fingerprint> = BTreeMap::new();
    let content = BTreeMap::new();
    for node in &resolved.nodes {
        let inputs = node.inputs.iter().map(|(port, input)| (port.clone(), all[input])).collect();
        let identity = Identity {
            stage_kind: node.kind,
            code_version: node.kind.code_version(),
            settings: &node.settings,
            seed: node.seed,
            inputs: &inputs,
            content: &content,
        };
        all.insert(&node.name, identity.fingerprint());
    }
    all
}
