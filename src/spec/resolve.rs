//! From a pipeline file and its stage files to [`Resolved`]: layers merged, axes expanded, references replaced,
//! conditions decided, everything checked.
//!
//! Knows the order of these steps, no disk but through [`Project`], and nothing of what was computed before.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::id::NodeName;
use deepgen_contract::job::FrozenCache;
use deepgen_contract::stage::StageKind;

use super::assignment::Assignment;
use super::diagnostic::Diagnostic;
use super::expand::expand;
use super::fields::SlotTable;
use super::handed_on;
use super::layers::{Layers, check_selectors};
use super::load::Overrides;
use super::location;
use super::pipeline::{Header, Layer, NodeTable, Pipeline};
use super::presence::{Presence, decide};
use super::project::Project;
use super::reference::{References, substitute};
use super::resolved::{Executor, Resolved, ResolvedNode, snug};
use super::run_table::ExecutorTable;
use super::scope::{HEADER, Scope};
use super::smoke;
use super::stage_file::{PAPER_PROFILE, extended};
use super::tree::{Source, Spot, Tree, Value};
use super::typed::Typing;
use super::when::Facts;
use super::wiring::{Made, split_selector, wire};
use crate::plan::training_sizes;

/// Profile used when neither the command line nor the file names one.
const DEFAULT_PROFILE: &str = "tiny";
/// Slots used when the file names none.
const DEFAULT_SLOTS: [(&str, f64); 2] = [("cpu", 2.0), ("gpu", 1.0)];
/// Bytes of a GiB.
const BYTES_OF_GIB: f64 = (1u64 << 30) as f64;

/// What the command line, or an experiment, asks of a pipeline.
#[derive(Debug, Default, Clone)]
pub struct Request {
    /// Profile and where it was named.
    pub profile: Option<(String, Spot)>,
    /// Variants, lowest first, and where they were named.
    pub variants: Vec<(String, Spot)>,
    /// Changes, lowest first.
    pub assignments: Vec<Assignment>,
    /// Whether every stage takes two steps only.
    pub is_smoke: bool,
}

impl Request {
    /// Returns a name as an option of the command line gives it, such as `--profile tiny`.
    pub fn argument(option: &str, name: &str) -> (String, Spot) {
        let source = Source::argument(format!("--{option} {name}"));
        let end = source.text.len();
        (name.to_owned(), source.spot(end - name.len(), end))
    }
}

/// A pipeline file, resolved, with the names that it offers.
pub struct Outcome {
    /// The pipeline.
    pub resolved: Resolved,
    /// Profiles of the file and of its stages.
    pub profiles: Vec<String>,
    /// Variants of the file.
    pub variants: Vec<String>,
}

/// Reads the stage files that a whole pipeline file uses and resolves it; problems are added to `problems`.
pub fn resolve(
    project: &mut Project,
    (file, mut tree): (&Path, Tree),
    request: &Request,
    problems: &mut Vec<Diagnostic>,
) -> Outcome {
    let header = Header::parse(&tree, problems);
    let seed = header_seed(&header, &request.assignments, problems);
    let chosen = request.profile.as_ref().or(header.profile.as_ref()).cloned();
    let profile = chosen.as_ref().map_or_else(|| DEFAULT_PROFILE.to_owned(), |(name, _)| name.clone());
    let scope = scope(project, &tree, (&header, seed, &profile), problems);
    // Outside settings a name of the scope counts at once; inside, it waits for the layers to be merged.
    if tree.has_marks()
        && let Some(table) = tree.table_mut()
    {
        let open = table.iter_mut().filter(|(key, _)| *key != "env" && *key != HEADER);
        open.for_each(|(_, entry)| substitute(&mut entry.tree, &scope, problems));
    }
    let mut pipeline = Pipeline::parse(&tree, header, problems);
    drop(tree);
    for (stage, spot) in pipeline.nodes.iter().filter_map(|node| node.stage.as_ref()) {
        project.read_stage(stage, spot, problems);
    }
    let known = known_profiles(project, &pipeline);
    if let Some((name, spot)) = chosen.filter(|(name, _)| !known.contains(name)) {
        let problem = Diagnostic::new(format!("unknown profile `{name}`")).at(&spot, "in no file of this pipeline");
        problems.push(problem.nearest(&name, known.iter().map(String::as_str)));
    }
    let profiles = chain(&pipeline.profiles, &profile, "profile", extended, problems);
    let variants = chosen_variants(&pipeline, request, problems);
    let of = |layers: &BTreeMap<String, Layer>, name: &String| layers.get(name).cloned();
    let chosen: Vec<Layer> = profiles
        .iter()
        .filter_map(|name| of(&pipeline.profiles, name))
        .chain(variants.iter().filter_map(|name| of(&pipeline.variants, name)))
        .collect();
    let mut tables = tables_under(std::mem::take(&mut pipeline.nodes), &pipeline, &chosen, problems);
    let kind_of = |table: &NodeTable| Some(project.stage(&table.stage.as_ref()?.0)?.kind);
    let kinds: Vec<Option<StageKind>> = tables.iter().map(kind_of).collect();
    let made: Vec<Option<Made>> = tables.iter().map(|table| made(project, table)).collect();
    let wiring = wire(&tables, &made, problems);
    let mut instances = expand(&tables, &wiring, problems);
    let is_whole: Vec<bool> = wiring.wires.into_iter().map(|wires| wires.is_whole).collect();
    let executor = executor(&pipeline, &chosen, &project.root);
    let layers = Layers { project, instances: &pipeline.instances, chosen: &chosen, request, profiles: &profiles };
    check_selectors(&layers, &tables, &instances, problems);
    let drafts: Vec<_> = instances.iter().map(|i| layers.draft(&tables[i.table], i, kinds[i.table])).collect();
    // Wires are in the instances and settings in the drafts: of thousands of nodes there is no second copy.
    for table in &mut tables {
        (table.set, table.inputs) = (None, Vec::new());
    }
    let (settings, rest): (Vec<Option<Tree>>, Vec<_>) =
        drafts.into_iter().map(|draft| (draft.settings, (draft.run, draft.when))).unzip();
    let mut references = References::new(&tables, &instances, &settings, &scope);
    // In a command `${NAME}` belongs to the shell.
    references.lenient = kinds.iter().map(|kind| *kind == Some(StageKind::Command)).collect();
    let mut replaced: Vec<Option<Tree>> = (0..instances.len()).map(|at| references.replaced(at)).collect();
    if request.is_smoke {
        let source = smoke::source();
        for (instance, settings) in instances.iter().zip(&mut replaced) {
            if let (Some(settings), Some(kind)) = (settings, kinds[instance.table]) {
                smoke::lower(settings, kind, &source);
            }
        }
    }
    let mut facts = Facts { profiles: &profiles, known_profiles: &known, references: &mut references };
    let conditions = rest.iter().map(|(_, when)| when.as_deref());
    let unmet: Vec<Option<String>> = conditions.enumerate().map(|(at, when)| facts.broken(at, when?)).collect();
    problems.append(&mut references.problems);
    let presence = decide(&mut instances, &kinds, unmet);
    // From here on most trees have one owner, and changing one copies nothing.
    drop(settings);
    let mut typing = Typing { executor: &executor, seed, root: &project.root, problems };
    let mut nodes: Vec<Arc<ResolvedNode>> = Vec::new();
    for (at, (instance, (settings, (run, _)))) in instances.iter().zip(replaced.into_iter().zip(&rest)).enumerate() {
        let table = &tables[instance.table];
        let (Some((stage, _)), Some(kind)) = (&table.stage, kinds[instance.table]) else { continue };
        let (Some(settings), Presence::Here { lost_members }) = (settings, &presence[at]) else { continue };
        let stage = (stage.as_str(), kind, is_whole[instance.table]);
        let node = typing.node((table, instance), stage, (settings, lost_members), run);
        if let Some(mut node) = node {
            let inputs = instance.inputs.iter().map(|(port, at)| (port.clone(), instances[*at].name.clone()));
            node.inputs = snug(inputs);
            node.needs = instance.needs.iter().map(|at| instances[*at].name.clone()).collect();
            nodes.push(Arc::new(node));
        }
    }
    let left_out = instances.iter().zip(&presence).filter_map(|(instance, presence)| match presence {
        Presence::LeftOut { reason } => Some((instance.name.clone(), reason.clone())),
        Presence::Here { .. } => None,
    });
    let left_out: BTreeMap<NodeName, String> = left_out.collect();
    let resolved = Resolved {
        name: pipeline.header.name.clone(),
        seed,
        profile,
        variants: request.variants.iter().map(|(name, _)| name.clone()).collect(),
        root: project.root.clone(),
        pipeline_file: file.to_owned(),
        experiment_file: None,
        executor,
        nodes,
        sweep: None,
        overrides: Overrides::default(),
        sources: BTreeMap::new(),
        keep_going: pipeline.header.keep_going.unwrap_or(true),
        env: scope.values(),
        left_out,
    };
    check_models(&resolved, &tables, problems);
    handed_on::check(&resolved, &tables, problems);
    Outcome { resolved, profiles: known, variants: pipeline.variants.keys().cloned().collect() }
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
        let problem = problem.help(format!("correct the sizes; `deepgen explain {node}` shows where each comes from"));
        problems.push(table.map_or(problem.clone(), |table| problem.at(&table.spot, "this node")));
    }
}

fn scope(
    project: &Project,
    tree: &Tree,
    (header, seed, profile): (&Header, u64, &str),
    problems: &mut Vec<Diagnostic>,
) -> Scope {
    let spot = tree.get(HEADER).map_or(&tree.spot, |header| &header.spot);
    let value = |value: Value| Tree { value, ..Tree::empty(spot.clone()) };
    let seed = i64::try_from(seed).map_or(Value::Float(f64::INFINITY), Value::Int);
    let names = BTreeMap::from([
        ("name", value(Value::Text(header.name.clone()))),
        ("profile", value(Value::Text(profile.to_owned()))),
        ("seed", value(seed)),
    ]);
    Scope::new(names, tree.get("env"), &|name| project.variable(name), problems)
}

/// Returns every profile that a file of the pipeline knows.
fn known_profiles(project: &Project, pipeline: &Pipeline) -> Vec<String> {
    let always = [PAPER_PROFILE, "shapes", "small", DEFAULT_PROFILE];
    let all = project.profiles().chain(always).chain(pipeline.profiles.keys().map(String::as_str));
    all.collect::<BTreeSet<&str>>().into_iter().map(str::to_owned).collect()
}

fn chosen_variants(pipeline: &Pipeline, request: &Request, problems: &mut Vec<Diagnostic>) -> Vec<String> {
    let mut all = Vec::new();
    for (name, spot) in &request.variants {
        if !pipeline.variants.contains_key(name) {
            let problem = Diagnostic::new(format!("the pipeline has no variant `{name}`")).at(spot, "no such variant");
            let valid: Vec<&str> = pipeline.variants.keys().map(String::as_str).collect();
            problems.push(match valid.is_empty() {
                true => problem.help(format!("add a table [variant.\"{name}\"] to the pipeline file")),
                false => problem.nearest(name, valid),
            });
            continue;
        }
        all.extend(chain(&pipeline.variants, name, "variant", |_| None, problems));
    }
    all
}

/// Returns the layers that `name` builds on and itself, lowest first.
fn chain(
    layers: &BTreeMap<String, Layer>,
    name: &str,
    what: &str,
    otherwise: fn(&str) -> Option<&'static str>,
    problems: &mut Vec<Diagnostic>,
) -> Vec<String> {
    let mut chain = vec![name.to_owned()];
    loop {
        let last = &chain[chain.len() - 1];
        let written = layers.get(last).and_then(|layer| layer.extends.as_ref());
        let Some(next) = written.map(|(name, _)| name.clone()).or_else(|| otherwise(last).map(str::to_owned)) else {
            break;
        };
        if chain.contains(&next) {
            let problem =
                Diagnostic::new(format!("the {what} `{next}` builds on itself")).help("take out an `extends`");
            problems.push(written.map_or(problem.clone(), |(_, spot)| problem.at(spot, "by this")));
            break;
        }
        if let Some((_, spot)) = written.filter(|_| what == "variant" && !layers.contains_key(&next)) {
            let problem = Diagnostic::new(format!("there is no {what} `{next}`")).at(spot, "unknown");
            problems.push(problem.nearest(&next, layers.keys().map(String::as_str)));
            break;
        }
        chain.push(next);
    }
    chain.reverse();
    chain
}

/// Returns the node tables with the axes that the chosen layers change; reports nodes of layers that do not exist.
fn tables_under(
    mut tables: Vec<NodeTable>,
    pipeline: &Pipeline,
    chosen: &[Layer],
    problems: &mut Vec<Diagnostic>,
) -> Vec<NodeTable> {
    for layer in chosen {
        for table in &mut tables {
            for axis in layer.over.get(&table.name).into_iter().flat_map(|axes| &axes.over) {
                match table.axes.over.iter_mut().find(|known| known.key == axis.key) {
                    Some(known) => *known = axis.clone(),
                    None => table.axes.over.push(axis.clone()),
                }
            }
        }
    }
    let names: BTreeSet<&str> = tables.iter().map(|node| node.name.as_str()).collect();
    let layers = || pipeline.profiles.values().chain(pipeline.variants.values());
    let written = layers().flat_map(|layer| &layer.nodes).chain(&pipeline.instances);
    let written = written.map(|instance| (&instance.selector, &instance.spot));
    let assigned = layers().flat_map(|layer| &layer.assignments).map(|change| (&change.selector, &change.spot));
    for (selector, spot) in written.chain(assigned) {
        let (base, _) = split_selector(selector);
        if !names.contains(base) {
            let problem = Diagnostic::new(format!("there is no node `{base}`")).at(spot, "unknown node");
            problems.push(problem.nearest(base, names.iter().copied()));
        }
    }
    tables
}

fn executor(pipeline: &Pipeline, chosen: &[Layer], root: &Path) -> Executor {
    let mut merged: ExecutorTable = pipeline.executor.clone();
    for over in chosen.iter().map(|layer| &layer.executor) {
        merged = ExecutorTable {
            slots: over.slots.clone().or(merged.slots),
            device: over.device.clone().or(merged.device),
            threads: over.threads.or(merged.threads),
            peak_tflops: over.peak_tflops.or(merged.peak_tflops),
            frozen_cache: over.frozen_cache.clone().or(merged.frozen_cache),
            worker: over.worker.clone().or(merged.worker),
        };
    }
    let default_slots = || DEFAULT_SLOTS.iter().map(|(name, amount)| ((*name).to_owned(), *amount)).collect();
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let slots = merged.slots.as_ref();
    let from_root = |path: &str, spot: &Spot| PathBuf::from(location::from_root(root, &spot.source.folder, path));
    let worker = |(path, spot): (PathBuf, Spot)| from_root(&path.to_string_lossy(), &spot);
    let frozen_cache = |((path, spot), gib): ((String, Spot), f64)| FrozenCache {
        path: from_root(&path, &spot),
        max_bytes: (gib * BYTES_OF_GIB) as u64,
    };
    Executor {
        slots: slots.map_or_else(default_slots, |slots| amounts(slots)),
        slot_ids: slots.map_or_else(BTreeMap::new, |slots| identities(slots)),
        device: merged.device.unwrap_or_else(|| "cpu".to_owned()),
        worker: merged.worker.map(worker),
        threads: merged.threads.unwrap_or_else(cores),
        peak_tflops: merged.peak_tflops,
        frozen_cache: merged.frozen_cache.map(frozen_cache),
    }
}

/// Returns the amounts of slots by name.
pub fn amounts(slots: &[SlotTable]) -> BTreeMap<String, f64> {
    slots.iter().map(|slot| (slot.name.clone(), slot.amount)).collect()
}

/// Returns the identities of the slots that list some.
pub fn identities(slots: &[SlotTable]) -> BTreeMap<String, Vec<u32>> {
    slots.iter().filter_map(|slot| Some((slot.name.clone(), slot.ids.clone()?))).collect()
}

/// Returns the seed, which `pipeline.seed` among the assignments may change.
fn header_seed(header: &Header, assignments: &[Assignment], problems: &mut Vec<Diagnostic>) -> u64 {
    let mut seed = header.seed;
    for assignment in assignments.iter().filter(|assignment| assignment.selector == HEADER) {
        match assignment.set.get("seed").map(|tree| &tree.value) {
            Some(Value::Int(number)) if *number >= 0 => seed = number.unsigned_abs(),
            _ => problems.push(
                Diagnostic::new("of `pipeline`, only `seed` can be set, to a whole number of 0 or more")
                    .at(&assignment.spot, "not this")
                    .help("write pipeline.seed = 7"),
            ),
        }
    }
    seed
}
