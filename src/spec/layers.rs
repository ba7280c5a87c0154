//! The settings of each instance, merged from their layers, before references are replaced and types are checked.
//!
//! Layers, lowest first: stage defaults; stage profile; the node's `set`; its axis values; `set` of its instances; the
//! pipeline profile's and then the variant's `set`, of the node and then of its instances; assignments (a variant's, an
//! experiment's, then `--set`). `--smoke` lowers what comes of it, except where `--set` has spoken. A profile that builds on another, by `extends` or as `tiny` and `small` build on
//! `shapes`, comes right after it.

use std::sync::Arc;

use deepgen_contract::stage::StageKind;

use super::diagnostic::Diagnostic;
use super::expand::{Instance, Point};
use super::path;
use super::pipeline::{InstanceTable, Layer, NodeTable};
use super::project::Project;
use super::resolve::Request;
use super::run_table::RunTable;
use super::scope::HEADER;
use super::shape::{self, Shape};
use super::tree::{Spot, Tree};
use super::when::Condition;
use super::wiring::{INPUT_PREFIX, split_selector};

/// Everything that lies on top of node tables.
pub struct Layers<'a> {
    /// Stage files.
    pub project: &'a Project,
    /// Settings of instances in the file.
    pub instances: &'a [InstanceTable],
    /// The chosen profiles and variants of the file, lowest first.
    pub chosen: &'a [Layer],
    /// What was asked for.
    pub request: &'a Request,
    /// Names of the chosen profile and those it builds on, lowest first.
    pub profiles: &'a [String],
}

/// An instance with merged layers.
pub struct Draft {
    /// Settings; nothing when the stage is not known.
    pub settings: Option<Tree>,
    /// How it runs.
    pub run: Arc<RunTable>,
    /// When it is there.
    pub when: Option<Box<Condition>>,
}

impl Layers<'_> {
    /// Merges the layers of an instance.
    pub fn draft(&self, table: &NodeTable, instance: &Instance, kind: Option<StageKind>) -> Draft {
        let stage = table.stage.as_ref().and_then(|(stage, _)| self.project.stage(stage));
        let mut run = table.run.clone();
        let mut when = table.when.clone();
        let mut settings = stage.map(|stage| stage.settings(self.profiles));
        let mut merge = |over: Option<&Tree>| {
            if let (Some(settings), Some(over)) = (&mut settings, over.filter(|over| over.table().is_some())) {
                settings.merge(over.clone());
            }
        };
        merge(table.set.as_ref());
        for point in instance.points.iter().filter(|point| point.is_own && !point.axis.key.starts_with(INPUT_PREFIX)) {
            merge(Some(&axis_setting(point)));
        }
        let selects = |selector: &str| {
            let (base, labels) = split_selector(selector);
            base == table.name && instance.has_labels(&labels)
        };
        let mut lay = |over: &InstanceTable| {
            merge(over.set.as_ref());
            Arc::make_mut(&mut run).merge(&over.run);
            when = over.when.clone().or_else(|| when.take());
        };
        self.instances.iter().filter(|over| selects(&over.selector)).for_each(&mut lay);
        for layer in self.chosen {
            let own = || layer.nodes.iter().filter(|over| selects(&over.selector));
            own().filter(|over| !over.selector.contains('[')).for_each(&mut lay);
            own().filter(|over| over.selector.contains('[')).for_each(&mut lay);
        }
        let assigned = self.chosen.iter().flat_map(|layer| &layer.assignments).chain(&self.request.assignments);
        assigned.filter(|change| selects(&change.selector)).for_each(|change| merge(Some(&change.set)));
        if let (Some(settings), Some(kind)) = (&mut settings, kind) {
            fill_inherited(settings, instance, shape::of(kind));
        }
        Draft { settings, run, when }
    }
}

/// Reports selectors that select nothing: in the file, in the chosen layers, in assignments.
pub fn check_selectors(
    layers: &Layers<'_>,
    tables: &[NodeTable],
    instances: &[Instance],
    problems: &mut Vec<Diagnostic>,
) {
    let chosen = layers.chosen.iter();
    let written = layers.instances.iter().chain(chosen.clone().flat_map(|layer| &layer.nodes));
    let written = written.map(|instance| (&instance.selector, &instance.spot));
    let of_variants = chosen.flat_map(|layer| &layer.assignments).map(|change| (&change.selector, &change.spot));
    for (selector, spot) in written.chain(of_variants) {
        // A node that does not exist was reported with the tables.
        check_selector(selector, spot, (tables, instances), problems);
    }
    for change in layers.request.assignments.iter().filter(|change| change.selector != HEADER) {
        if !check_selector(&change.selector, &change.spot, (tables, instances), problems) {
            let (base, _) = split_selector(&change.selector);
            let problem = Diagnostic::new(format!("there is no node `{base}`")).at(&change.spot, "unknown node");
            problems.push(problem.nearest(base, tables.iter().map(|table| table.name.as_str()).chain([HEADER])));
        }
    }
}

/// Returns false when there is no such node at all.
fn check_selector(
    selector: &str,
    spot: &Spot,
    (tables, instances): (&[NodeTable], &[Instance]),
    problems: &mut Vec<Diagnostic>,
) -> bool {
    let (base, labels) = split_selector(selector);
    let Some(table) = tables.iter().position(|table| table.name == base) else { return false };
    let of_table = || instances.iter().filter(|instance| instance.table == table);
    if !labels.is_empty() && !of_table().any(|instance| instance.has_labels(&labels)) {
        let names: Vec<&str> = of_table().map(|instance| instance.name.0.as_str()).collect();
        let problem = Diagnostic::new(format!("`{selector}` selects no instance of `{base}`"));
        let problem = problem.at(spot, "no such axis value");
        problems.push(match names.as_slice() {
            [only] if *only == base => problem.help(format!("`{base}` has no axes")),
            _ => problem.nearest(selector, names),
        });
    }
    true
}

fn axis_setting(point: &Point) -> Tree {
    let value = point.axis.values[point.value].clone();
    let spot = value.spot.clone();
    value.nested(&path::split(&point.axis.key), &spot)
}

/// Fills keys of inherited axes that the stage has and nothing has set.
fn fill_inherited(settings: &mut Tree, instance: &Instance, shape: &Shape) {
    for point in instance.points.iter().filter(|point| !point.is_own) {
        let keys = path::split(&point.axis.key);
        let has_key = keys.iter().try_fold(shape, |shape, key| match shape {
            Shape::Fields(fields) => fields.get(key).map(|field| &field.shape),
            _ => None,
        });
        let is_set = keys.iter().try_fold(&*settings, |tree, key| tree.get(key)).is_some();
        if !is_set && has_key.is_some() {
            settings.merge(axis_setting(point));
        }
    }
}
