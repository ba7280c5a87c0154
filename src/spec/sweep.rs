//! An experiment: a pipeline with variants, or axes, or both. It becomes one graph in which shared nodes stand once.
//!
//! A node that is the same in all variants keeps its name; otherwise each result is called after the first variant that
//! has it: `sft@w/o SCB`. Two results are the same when their fingerprints are. Knows no store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use deepgen_contract::id::{Fingerprint, NodeName};
use litemap::LiteMap;

use super::assignment::Assignment;
use super::axes::{Axes, AxisTable, parse_exclude, parse_over, parse_zip};
use super::diagnostic::Diagnostic;
use super::fields::Fields;
use super::include::merged;
use super::location;
use super::project::Project;
use super::resolve::{Request, resolve};
use super::resolved::{MetricRef, Resolved, ResolvedNode, Sweep, Variant};
use super::tree::{Spot, Tree};
use crate::plan::Identity;

/// Keys of an experiment file; `include` is taken out before.
pub const EXPERIMENT_KEYS: [&str; 9] =
    ["name", "description", "pipeline", "profile", "compare", "variant", "axes", "zip", "exclude"];
/// Keys of a variant.
pub const VARIANT_KEYS: [&str; 4] = ["name", "description", "use", "set"];

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
#[derive(Debug, Clone, Default)]
struct VariantTable {
    name: String,
    /// Variants of the pipeline file that it takes on.
    uses: Vec<(String, Spot)>,
    assignments: Vec<Assignment>,
}

impl Experiment {
    /// Reads a whole experiment file; nothing when it names no pipeline.
    pub fn parse(tree: &Tree, problems: &mut Vec<Diagnostic>) -> Option<Self> {
        let source = &tree.spot.source;
        let start = source.spot(0, 1.min(source.text.len()));
        let mut found = Vec::new();
        let mut fields = Fields::new("", tree, &EXPERIMENT_KEYS, problems)?;
        fields.require("pipeline", &start);
        fields.text("description");
        let name = fields.text("name").map(|(name, _)| name);
        let stem = || Path::new(&*source.name).file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let (pipeline, profile) = (fields.text("pipeline"), fields.text("profile"));
        let mut compare = Vec::new();
        for item in fields.list("compare") {
            match item.text().ok_or_else(|| "`compare` lists texts".to_owned()).and_then(MetricRef::parse) {
                Ok(metric) => compare.push((metric, item.spot.clone())),
                Err(message) => {
                    let help = "write `node.metric`, such as \"scores[geneval].overall\"";
                    found.push(Diagnostic::new(message).at(&item.spot, "here").help(help));
                }
            }
        }
        let tables = fields.list("variant");
        let (axes, zip, exclude) = (fields.tree("axes"), fields.tree("zip"), fields.tree("exclude"));
        let mut variants = parse_variants(tables, &mut found);
        let grid = Axes {
            over: axes.map_or_else(Vec::new, |axes| parse_over("axes", axes, &mut found)),
            zip: zip.map_or_else(Vec::new, |zip| parse_zip("zip", zip, &mut found)),
            exclude: exclude.map_or_else(Vec::new, |exclude| parse_exclude("exclude", exclude, &mut found)),
        };
        grid.check(&[], &mut found);
        grid.check_values(&mut found);
        if !grid.over.is_empty() {
            variants = with_axes(variants, &grid, &mut found);
        }
        // An empty `[axes]`, or one whose lists are all wrong, which is reported, gives no variant either.
        if variants.is_empty() && tables.is_empty() && found.is_empty() {
            let problem = Diagnostic::new("this experiment has neither variants nor axes").at(&start, "here");
            found.push(problem.help("add [[variant]] tables or [axes]"));
        }
        problems.extend(found);
        Some(Self { name: name.or_else(stem).unwrap_or_default(), pipeline: pipeline?, profile, compare, variants })
    }

    /// Returns the pipeline file; its path is relative to the experiment file.
    pub fn pipeline_file(&self) -> PathBuf {
        let (written, spot) = &self.pipeline;
        location::normal(&spot.source.folder.join(written))
    }

    /// Resolves the pipeline for each variant and unites the graphs.
    pub fn resolve(
        &self,
        project: &mut Project,
        file: &Path,
        request: &Request,
        problems: &mut Vec<Diagnostic>,
    ) -> Option<Resolved> {
        let pipeline_file = self.pipeline_file();
        let source = match project.read_named(&self.pipeline.0, &self.pipeline.1) {
            Ok(source) => source,
            Err(problem) => {
                problems.push(problem);
                return None;
            }
        };
        let tree = merged(project, &source, problems);
        let mut resolved = Vec::new();
        for variant in &self.variants {
            let assignments = variant.assignments.iter().chain(&request.assignments).cloned().collect();
            let profile = request.profile.clone().or_else(|| self.profile.clone());
            let variants = variant.uses.iter().chain(&request.variants).cloned().collect();
            let request = Request { profile, variants, assignments, is_smoke: request.is_smoke };
            resolved.push(resolve(project, (&pipeline_file, tree.clone()), &request, problems).resolved);
        }
        self.check_metrics(&resolved, problems);
        if !problems.is_empty() {
            return None;
        }
        let (nodes, variants) = unite(&self.variants, &resolved);
        let compare = self.compare.iter().map(|(metric, _)| metric.clone()).collect();
        let mut left_out = BTreeMap::new();
        resolved.iter().rev().for_each(|resolved| left_out.extend(resolved.left_out.clone()));
        left_out.retain(|name, _| !variants.iter().any(|variant| variant.nodes.contains_key(name)));
        let first = resolved.into_iter().next()?;
        Some(Resolved {
            name: self.name.clone(),
            experiment_file: Some(std::path::absolute(file).unwrap_or_else(|_| file.to_owned())),
            nodes,
            sweep: Some(Sweep { name: self.name.clone(), compare, variants }),
            variants: request.variants.iter().map(|(name, _)| name.clone()).collect(),
            left_out,
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
        let (mut set, mut name, mut uses) = (None, None, Vec::new());
        if let Some(mut fields) = Fields::new("variant", table, &VARIANT_KEYS, problems) {
            fields.require("name", &table.spot);
            fields.text("description");
            name = fields.text("name");
            set = fields.tree("set");
            uses = match fields.tree("use") {
                Some(one) if one.text().is_some() => fields.text("use").into_iter().collect(),
                _ => fields.texts("use"),
            };
        }
        let Some((name, spot)) = name else { continue };
        if variants.iter().any(|variant| variant.name == name) {
            let problem = Diagnostic::new(format!("two variants are named `{name}`")).at(&spot, "again here");
            problems.push(problem.help("give each variant a name of its own"));
        }
        let assignments = set.map_or_else(Vec::new, |set| Assignment::parse_table("variant.set", set, problems));
        variants.push(VariantTable { name, uses, assignments });
    }
    variants
}

/// Multiplies the variants by a grid: `[axes]` with `"node.key" = [values]`, thinned by `zip` and `exclude`.
fn with_axes(variants: Vec<VariantTable>, axes: &Axes, problems: &mut Vec<Diagnostic>) -> Vec<VariantTable> {
    let base = if variants.is_empty() { vec![VariantTable::default()] } else { variants };
    // Of each variant so far, which value of each axis it has.
    let mut grid: Vec<(VariantTable, BTreeMap<usize, usize>)> =
        base.into_iter().map(|variant| (variant, BTreeMap::new())).collect();
    for group in axes.groups() {
        let num = axes.over[group[0]].values.len();
        let at_value = |(variant, chosen): &(VariantTable, BTreeMap<usize, usize>), value: usize| {
            let (mut variant, mut chosen) = (variant.clone(), chosen.clone());
            for (place, &axis) in group.iter().enumerate() {
                chosen.insert(axis, value);
                let wrong = assign(&mut variant, &axes.over[axis], value, place == 0).err();
                problems.extend(wrong);
            }
            (variant, chosen)
        };
        let mut at_value = at_value;
        let mut next = Vec::with_capacity(grid.len() * num);
        for point in &grid {
            next.extend((0..num).map(|value| at_value(point, value)));
        }
        grid = next;
    }
    let place = |key: &str| axes.over.iter().position(|axis| axis.key == key);
    grid.retain(|(_, chosen)| {
        !axes.excludes(|key| {
            let axis = place(key)?;
            axes.over[axis].values.get(*chosen.get(&axis)?)
        })
    });
    if grid.is_empty()
        && let Some(axis) = axes.over.first()
    {
        let problem = Diagnostic::new("`exclude` leaves no combination of the axes").at(&axis.spot, "of these");
        problems.push(problem.help("leave out fewer combinations"));
    }
    grid.into_iter().map(|(variant, _)| variant).collect()
}

/// Sets one axis to one of its values; the first of a group gives the variant its name.
fn assign(variant: &mut VariantTable, axis: &AxisTable, value: usize, is_named: bool) -> Result<(), Diagnostic> {
    let value = &axis.values[value];
    if is_named {
        let short = super::path::split(&axis.key).pop().unwrap_or_default();
        let label = value.text().map_or_else(|| value.json().to_string(), str::to_owned);
        let label = format!("{short}={label}");
        variant.name = if variant.name.is_empty() { label } else { format!("{}, {label}", variant.name) };
    }
    variant.assignments.push(Assignment::new(&axis.key, &value.spot, value.clone())?);
    Ok(())
}

/// Unites the variants' graphs by fingerprint; external content counts by its path, which is the same for all.
fn unite(tables: &[VariantTable], resolved: &[Resolved]) -> (Vec<Arc<ResolvedNode>>, Vec<Variant>) {
    let prints: Vec<BTreeMap<&NodeName, Fingerprint>> = resolved.iter().map(fingerprints).collect();
    let mut nodes: Vec<Arc<ResolvedNode>> = Vec::new();
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
                nodes.push(Arc::new(ResolvedNode { name: name.clone(), inputs, needs, ..ResolvedNode::clone(node) }));
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
    let content = LiteMap::new();
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
