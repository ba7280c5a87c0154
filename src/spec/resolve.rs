//! From a pipeline file and its stage files to [`Resolved`]: layers merged, axes expanded, everything checked.
//!
//! Layers, lowest first: stage defaults; stage profile; the node's `set`; its axis values; `set` of its instances; the
//! pipeline profile's `set`, of the node and then of its instances; an experiment's assignments; `--smoke`; `--set`. A
//! profile that builds on another, by `extends` or as `tiny` and `small` build on `shapes`, comes right after it.
//!
//! Knows no disk but through [`Project`], and nothing of what was computed before.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::settings::Settings;
use deepgen_contract::stage::StageKind;

use super::assignment::{Assignment, HEADER};
use super::command;
use super::diagnostic::Diagnostic;
use super::expand::{Instance, Point, expand};
use super::fields::SlotTable;
use super::path;
use super::pipeline::{ExecutorTable, InstanceTable, NodeTable, Pipeline, RunTable};
use super::project::Project;
use super::resolved::{Executor, Origin, Resolved, ResolvedNode};
use super::shape::{self, Check, Shape};
use super::smoke;
use super::stage_file::{PAPER_PROFILE, extended};
use super::tree::{NOT_TOML, Source, Spot, Tree, Value};
use super::wiring::{INPUT_PREFIX, Made, split_selector, wire};
use crate::plan::training_sizes;

/// Profile used when neither the command line nor the file names one.
const DEFAULT_PROFILE: &str = "tiny";
/// Slots used when the file names none.
const DEFAULT_SLOTS: [(&str, f64); 2] = [("cpu", 2.0), ("gpu", 1.0)];

/// What the command line, or an experiment, asks of a pipeline.
#[derive(Debug, Default, Clone)]
pub struct Request {
    /// Profile and where it was named.
    pub profile: Option<(String, Spot)>,
    /// Changes, lowest first.
    pub assignments: Vec<Assignment>,
    /// Whether every stage takes two steps only.
    pub is_smoke: bool,
}

impl Request {
    /// Returns the profile of a command line's `--profile`.
    pub fn profile_argument(name: &str) -> (String, Spot) {
        let source = Source::argument(format!("--profile {name}"));
        let end = source.text.len();
        (name.to_owned(), source.spot(end - name.len(), end))
    }
}

/// Reads the stage files that `pipeline` uses and resolves it; problems are added to `problems`.
pub fn resolve(
    project: &mut Project,
    (file, pipeline): (&Path, &Pipeline),
    request: &Request,
    problems: &mut Vec<Diagnostic>,
) -> Resolved {
    for (stage, spot) in pipeline.nodes.iter().filter_map(|node| node.stage.as_ref()) {
        project.read_stage(stage, spot, problems);
    }
    let profile = choose_profile(project, pipeline, request, problems);
    let profiles = with_extended(pipeline, &profile, problems);
    let tables = tables_under(pipeline, &profiles, problems);
    let kind_of = |table: &NodeTable| Some(project.stage(&table.stage.as_ref()?.0)?.kind);
    let kinds: Vec<Option<StageKind>> = tables.iter().map(kind_of).collect();
    let made: Vec<Option<Made>> = tables.iter().map(|table| made(project, table)).collect();
    let wiring = wire(&tables, &made, problems);
    let instances = expand(&tables, &wiring, problems);
    let executor = executor(pipeline, &profiles);
    let seed = header_seed(pipeline, &request.assignments, problems);
    let mut builder = Builder { project, pipeline, profiles: &profiles, request, executor: &executor, seed, problems };
    builder.check_selectors(&tables, &instances);
    let mut nodes = Vec::new();
    for instance in &instances {
        let table = &tables[instance.table];
        let (Some((stage, _)), Some(kind)) = (&table.stage, kinds[instance.table]) else { continue };
        let is_whole = wiring.wires[instance.table].is_whole;
        let node = builder.node((table, instance), (stage, kind), is_whole);
        if let Some(mut node) = node {
            let inputs = instance.inputs.iter().map(|(port, at)| (port.clone(), instances[*at].name.clone()));
            node.inputs = inputs.collect();
            node.needs = instance.needs.iter().map(|at| instances[*at].name.clone()).collect();
            nodes.push(node);
        }
    }
    let resolved = Resolved {
        name: pipeline.name.clone(),
        seed,
        profile,
        root: project.root.clone(),
        pipeline_file: file.to_owned(),
        experiment_file: None,
        executor,
        nodes,
        sweep: None,
        keep_going: pipeline.keep_going.unwrap_or(true),
        env: BTreeMap::new(),
        left_out: BTreeMap::new(),
    };
    check_models(&resolved, &tables, problems);
    resolved
}

/// Returns what is known of a node's stage; of a command, what its file and the node say that it makes.
fn made(project: &Project, table: &NodeTable) -> Option<Made> {
    let stage = project.stage(&table.stage.as_ref()?.0)?;
    let trees = table.set.iter().chain([&stage.defaults]);
    let word = trees.filter_map(|tree| tree.get("output_kind")?.text()).next();
    let word = word.filter(|_| stage.kind == StageKind::Command);
    let output = ArtifactKind::ALL.into_iter().find(|kind| Some(kind.name()) == word);
    Some(Made { kind: stage.kind, output: output.unwrap_or_else(|| stage.kind.output()) })
}

/// Reports models that cannot be built, such as a bridge over layers that the decoder does not have.
fn check_models(resolved: &Resolved, tables: &[NodeTable], problems: &mut Vec<Diagnostic>) {
    for (node, problem) in training_sizes(resolved).into_iter().filter_map(Result::err) {
        let table = tables.iter().find(|table| table.name == node.base());
        let problem = Diagnostic::new(format!("the model of `{node}` cannot be built: {problem}"));
        problems.push(table.map_or(problem.clone(), |table| problem.at(&table.spot, "this node")));
    }
}

fn choose_profile(project: &Project, pipeline: &Pipeline, request: &Request, problems: &mut Vec<Diagnostic>) -> String {
    let Some((name, spot)) = request.profile.as_ref().or(pipeline.profile.as_ref()) else {
        return DEFAULT_PROFILE.to_owned();
    };
    let mut known: BTreeSet<&str> = project.profiles().chain([PAPER_PROFILE]).collect();
    known.extend(pipeline.profiles.keys().map(String::as_str));
    if !known.contains(name.as_str()) {
        problems.push(
            Diagnostic::new(format!("unknown profile `{name}`"))
                .at(spot, "in no file of this pipeline")
                .nearest(name, known),
        );
    }
    name.clone()
}

/// Returns the profiles that `profile` builds on and itself, lowest first.
fn with_extended(pipeline: &Pipeline, profile: &str, problems: &mut Vec<Diagnostic>) -> Vec<String> {
    let mut chain = vec![profile.to_owned()];
    loop {
        let last = &chain[chain.len() - 1];
        let written = pipeline.profiles.get(last).and_then(|profile| profile.extends.as_ref());
        let Some(next) = written.map(|(name, _)| name.clone()).or_else(|| extended(last).map(str::to_owned)) else {
            break;
        };
        if chain.contains(&next) {
            let problem = Diagnostic::new(format!("the profile `{next}` builds on itself"));
            problems.push(written.map_or(problem.clone(), |(_, spot)| problem.at(spot, "by this")));
            break;
        }
        chain.push(next);
    }
    chain.reverse();
    chain
}

/// Returns the node tables with the axes that the profile changes; reports a profile's nodes that do not exist.
fn tables_under(pipeline: &Pipeline, profiles: &[String], problems: &mut Vec<Diagnostic>) -> Vec<NodeTable> {
    let mut tables = pipeline.nodes.clone();
    for profile in profiles.iter().filter_map(|profile| pipeline.profiles.get(profile)) {
        for table in &mut tables {
            for axis in profile.over.get(&table.name).into_iter().flatten() {
                match table.over.iter_mut().find(|known| known.key == axis.key) {
                    Some(known) => *known = axis.clone(),
                    None => table.over.push(axis.clone()),
                }
            }
        }
    }
    let names = || pipeline.nodes.iter().map(|node| node.name.as_str());
    let selected = pipeline.profiles.values().flat_map(|profile| &profile.nodes).chain(&pipeline.instances);
    for instance in selected {
        let (base, _) = split_selector(&instance.selector);
        if !names().any(|name| name == base) {
            problems.push(
                Diagnostic::new(format!("there is no node `{base}`"))
                    .at(&instance.spot, "unknown node")
                    .nearest(base, names()),
            );
        }
    }
    tables
}

fn executor(pipeline: &Pipeline, profiles: &[String]) -> Executor {
    let mut merged: ExecutorTable = pipeline.executor.clone();
    for over in profiles.iter().filter_map(|profile| pipeline.profiles.get(profile)).map(|profile| &profile.executor) {
        merged = ExecutorTable {
            slots: over.slots.clone().or(merged.slots),
            device: over.device.clone().or(merged.device),
            threads: over.threads.or(merged.threads),
            worker: over.worker.clone().or(merged.worker),
        };
    }
    let default_slots = || DEFAULT_SLOTS.iter().map(|(name, amount)| ((*name).to_owned(), *amount)).collect();
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let slots = merged.slots.as_ref();
    Executor {
        slots: slots.map_or_else(default_slots, |slots| amounts(slots)),
        slot_ids: slots.map_or_else(BTreeMap::new, |slots| identities(slots)),
        device: merged.device.unwrap_or_else(|| "cpu".to_owned()),
        worker: merged.worker,
        threads: merged.threads.unwrap_or_else(cores),
    }
}

fn amounts(slots: &[SlotTable]) -> BTreeMap<String, f64> {
    slots.iter().map(|slot| (slot.name.clone(), slot.amount)).collect()
}

fn identities(slots: &[SlotTable]) -> BTreeMap<String, Vec<u32>> {
    slots.iter().filter_map(|slot| Some((slot.name.clone(), slot.ids.clone()?))).collect()
}

/// Returns the seed, which `pipeline.seed` among the assignments may change.
fn header_seed(pipeline: &Pipeline, assignments: &[Assignment], problems: &mut Vec<Diagnostic>) -> u64 {
    let mut seed = pipeline.seed;
    for assignment in assignments.iter().filter(|assignment| assignment.selector == HEADER) {
        match assignment.set.get("seed").map(|tree| &tree.value) {
            Some(Value::Int(number)) if *number >= 0 => seed = number.unsigned_abs(),
            _ => problems.push(
                Diagnostic::new("of `pipeline`, only `seed` can be set, to a whole number of 0 or more")
                    .at(&assignment.spot, "not this"),
            ),
        }
    }
    seed
}

struct Builder<'a> {
    project: &'a Project,
    pipeline: &'a Pipeline,
    /// Chosen profile and those it builds on, lowest first.
    profiles: &'a [String],
    request: &'a Request,
    executor: &'a Executor,
    seed: u64,
    problems: &'a mut Vec<Diagnostic>,
}

impl Builder<'_> {
    /// Reports selectors that select nothing: in the file, in the chosen profile, in assignments.
    fn check_selectors(&mut self, tables: &[NodeTable], instances: &[Instance]) {
        let profiles = self.profiles.iter().filter_map(|profile| self.pipeline.profiles.get(profile));
        let written = self.pipeline.instances.iter().chain(profiles.flat_map(|profile| &profile.nodes));
        let written = written.map(|instance| (&instance.selector, &instance.spot));
        let assigned = self.request.assignments.iter().map(|assignment| (&assignment.selector, &assignment.spot));
        for (selector, spot) in written.chain(assigned.filter(|(selector, _)| *selector != HEADER)) {
            let (base, labels) = split_selector(selector);
            let Some(table) = tables.iter().position(|table| table.name == base) else {
                // Those of the file were reported with the tables.
                if spot.source.is_command_line || self.request.assignments.iter().any(|a| &a.spot == spot) {
                    self.problems.push(
                        Diagnostic::new(format!("there is no node `{base}`"))
                            .at(spot, "unknown node")
                            .nearest(base, tables.iter().map(|table| table.name.as_str())),
                    );
                }
                continue;
            };
            let mut of_table = instances.iter().filter(|instance| instance.table == table);
            if !of_table.clone().any(|instance| instance.has_labels(&labels)) {
                let names: Vec<&str> = of_table.by_ref().map(|instance| instance.name.0.as_str()).collect();
                self.problems.push(
                    Diagnostic::new(format!("`{selector}` selects no instance of `{base}`"))
                        .at(spot, "no such axis value")
                        .nearest(selector, names),
                );
            }
        }
    }

    fn node(
        &mut self,
        (table, instance): (&NodeTable, &Instance),
        (stage, kind): (&str, StageKind),
        is_whole: bool,
    ) -> Option<ResolvedNode> {
        let mut settings = self.project.stage(stage)?.settings(self.profiles);
        let mut run = table.run.clone();
        let selects = |selector: &str| {
            let (base, labels) = split_selector(selector);
            base == table.name && instance.has_labels(&labels)
        };
        settings.merge_all(table.set.as_ref());
        for point in instance.points.iter().filter(|point| point.is_own && !point.axis.key.starts_with(INPUT_PREFIX)) {
            settings.merge(axis_setting(point));
        }
        let mut layer = |tables: &mut dyn Iterator<Item = &InstanceTable>| {
            for over in tables.filter(|over| selects(&over.selector)) {
                settings.merge_all(over.set.as_ref());
                run.merge(&over.run);
            }
        };
        layer(&mut self.pipeline.instances.iter());
        for profile in self.profiles.iter().filter_map(|profile| self.pipeline.profiles.get(profile)) {
            layer(&mut profile.nodes.iter().filter(|over| !over.selector.contains('[')));
            layer(&mut profile.nodes.iter().filter(|over| over.selector.contains('[')));
        }
        let assignments = self.request.assignments.iter().filter(|assignment| selects(&assignment.selector));
        let (command_line, written): (Vec<_>, Vec<_>) =
            assignments.partition(|assignment| assignment.spot.source.is_command_line);
        for assignment in written {
            settings.merge(assignment.set.clone());
        }
        if self.request.is_smoke {
            smoke::lower(&mut settings, kind, &Source::file(smoke::SOURCE, smoke::SOURCE));
        }
        for assignment in command_line {
            settings.merge(assignment.set.clone());
        }
        fill_inherited(&mut settings, instance, shape::of(kind));
        let typed = self.typed(&settings, table, kind, is_whole)?;
        if let Settings::Command(command) = &typed {
            command::check(command, &settings, table, &instance.inputs, self.problems);
        }
        self.check_members(&settings, instance, kind);
        let (slots, slot_ids) = self.slots(table, typed.uses_device(), &run);
        let limit = |seconds: Option<f64>| seconds.filter(|seconds| *seconds > 0.0);
        let mut origins: BTreeMap<String, Origin> = BTreeMap::new();
        settings.leaves("", &mut |key, tree| {
            origins.insert(key, tree.spot.origin());
        });
        Some(ResolvedNode {
            name: instance.name.clone(),
            stage: stage.to_owned(),
            kind,
            device: if typed.uses_device() { self.executor.device.clone() } else { "cpu".to_owned() },
            threads: if typed.uses_device() { self.executor.threads } else { 1 },
            settings: typed,
            origins,
            inputs: BTreeMap::new(),
            seed: run.seed.unwrap_or(self.seed),
            slots,
            slot_ids,
            needs: Vec::new(),
            retries: run.retries.unwrap_or(0),
            backoff: run.backoff(),
            remedies: run.remedies(),
            timeout_s: limit(run.timeout_s),
            stall_s: limit(run.stall_s),
            priority: run.priority.unwrap_or(0),
        })
    }

    /// Checks the merged settings and gives them their type.
    fn typed(&mut self, settings: &Tree, table: &NodeTable, kind: StageKind, is_whole: bool) -> Option<Settings> {
        let mut found = Vec::new();
        let owner = table.stage.as_ref().map(|(_, spot)| spot);
        Check { problems: &mut found, is_complete: is_whole, owner }.value("", settings, shape::of(kind));
        let is_sound = found.is_empty();
        self.problems.append(&mut found);
        if !is_sound {
            return None;
        }
        match Settings::from_value(kind, settings.json()) {
            Ok(typed) => Some(typed),
            Err(_) if !is_whole => None,
            Err(error) => {
                let message = format!("the settings of `{}` do not fit a `{kind}` stage: {error}", table.name);
                self.problems.push(Diagnostic::new(message).at(&table.spot, "this node"));
                None
            }
        }
    }

    /// A mixture's `members` must be among its inputs.
    fn check_members(&mut self, settings: &Tree, instance: &Instance, kind: StageKind) {
        if kind != StageKind::Mix {
            return;
        }
        for (name, entry) in settings.get("members").and_then(Tree::table).into_iter().flatten() {
            if !instance.inputs.contains_key(name) {
                self.problems.push(
                    Diagnostic::new(format!("`members.{name}` is no input of `{}`", instance.name))
                        .at(&entry.key, "no such input")
                        .nearest(name, instance.inputs.keys().map(String::as_str)),
                );
            }
        }
    }

    /// Returns a node's shares and the identities it asks for; reports what the executor never has.
    fn slots(&mut self, table: &NodeTable, uses_device: bool, run: &RunTable) -> Shares {
        let Executor { slots: capacity, slot_ids, .. } = self.executor;
        let Some(slots) = &run.slots else {
            let name = if uses_device && capacity.contains_key("gpu") { "gpu" } else { "cpu" };
            let share = capacity.get(name).map(|most| (name.to_owned(), most.min(1.0)));
            return (share.into_iter().collect(), BTreeMap::new());
        };
        for SlotTable { name, spot, amount, ids } in slots {
            let there = |id: &u32| match slot_ids.get(name) {
                Some(ids) => ids.contains(id),
                None => capacity.get(name).is_some_and(|most| f64::from(*id) < *most),
            };
            let absent = ids.iter().flatten().find(|id| !there(id));
            let problem = match (capacity.get(name), absent) {
                (None, _) => Diagnostic::new(format!("there are no `{name}` slots"))
                    .at(spot, "unknown slot")
                    .nearest(name, capacity.keys().map(String::as_str)),
                (Some(_), Some(id)) => Diagnostic::new(format!("`{}` asks for `{name}` {id}", table.name))
                    .at(spot, "not among the executor's")
                    .help(format!("the executor has {}", listed(name, capacity, slot_ids))),
                (Some(most), None) if amount > most => {
                    let message = format!("`{}` takes {amount} `{name}` slots, but there are {most}", table.name);
                    Diagnostic::new(message)
                        .at(spot, "never to be had")
                        .help(format!("ask for less, or raise `executor.local.slots.{name}`"))
                }
                (Some(_), None) => continue,
            };
            self.problems.push(problem);
        }
        (amounts(slots), identities(slots))
    }
}

type Shares = (BTreeMap<String, f64>, BTreeMap<String, Vec<u32>>);

/// Returns the identities of a slot in words.
fn listed(name: &str, capacity: &BTreeMap<String, f64>, ids: &BTreeMap<String, Vec<u32>>) -> String {
    match ids.get(name) {
        Some(ids) => format!("`{name}` {ids:?}"),
        None => format!("{} of `{name}`, counted from 0", capacity.get(name).copied().unwrap_or(0.0)),
    }
}

impl Tree {
    fn merge_all(&mut self, over: Option<&Tree>) {
        if let Some(over) = over.filter(|over| over.table().is_some()) {
            self.merge(over.clone());
        }
    }
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
        let has_key = |shape: &Shape| {
            keys.iter().try_fold(shape.clone(), |shape, key| match shape {
                Shape::Fields(mut fields) => fields.remove(key).map(|field| field.shape),
                _ => None,
            })
        };
        let is_set = keys.iter().try_fold(&*settings, |tree, key| tree.get(key)).is_some();
        if !is_set && has_key(shape).is_some() {
            settings.merge(axis_setting(point));
        }
    }
}

/// Leaves out repetitions, since one wrong line of a stage file shows in every node that uses it, and consequences.
pub fn distinct(problems: Vec<Diagnostic>) -> Vec<Diagnostic> {
    let mut seen = BTreeSet::new();
    let key = |problem: &Diagnostic| {
        let place = problem.labels.first().map(|label| (Arc::as_ptr(&label.spot.source) as usize, label.spot.start));
        (problem.message.clone(), place)
    };
    // What follows from a line that could not be read is no problem of its own.
    let line = |problem: &Diagnostic| {
        problem.labels.first().map(|label| (Arc::as_ptr(&label.spot.source) as usize, label.spot.line()))
    };
    let is_syntax = |problem: &Diagnostic| problem.message.starts_with(NOT_TOML);
    let unread: BTreeSet<_> = problems.iter().filter(|problem| is_syntax(problem)).filter_map(line).collect();
    let mut distinct: Vec<Diagnostic> = problems
        .into_iter()
        .filter(|problem| is_syntax(problem) || line(problem).is_none_or(|line| !unread.contains(&line)))
        .filter(|problem| seen.insert(key(problem)))
        .collect();
    // From top to bottom of each file; the files in the order in which they were first complained about.
    let mut files: Vec<usize> = Vec::new();
    distinct.sort_by_cached_key(|problem| {
        problem.labels.first().map(|label| {
            let file = Arc::as_ptr(&label.spot.source) as usize;
            let at = files.iter().position(|known| *known == file).unwrap_or(files.len());
            if at == files.len() {
                files.push(file);
            }
            (at, label.spot.start)
        })
    });
    distinct
}
