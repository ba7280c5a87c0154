//! `deepgen reproduce RUN`: the exact command that makes a run again, the checkout it was made from, and what is
//! different here and now.
//!
//! Prints; changes nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use deepgen_contract::artifact::Environment;
use deepgen_contract::id::NodeName;
use serde::Serialize;

use super::diff::changes_text;
use super::status::{choose_run, result_word};
use super::{Overriding, artifacts_layout, load_or_report, results_of};
use crate::cli::{self, Exit};
use crate::compare::{self, Change, RunFacts};
use crate::environment;
use crate::plan::{Difference, Section, render};
use crate::progress::format::count;
use crate::report::quoted;
use crate::spec;
use crate::store::saved::SavedPlanned;
use crate::store::{ArtifactStore, FileHashes, layout};

/// Version of what `--json` prints.
const JSON_VERSION: u32 = 1;

/// Arguments of `deepgen reproduce`.
#[derive(Debug, clap::Args)]
pub struct ReproduceArgs {
    /// Name of a run [default: the newest]
    pub run: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// How to make a run again.
#[derive(Debug, Serialize)]
pub struct Recipe {
    version: u32,
    run: String,
    /// The command as it was given, the program by its name.
    command: String,
    /// Folder in which it was given; unknown for runs of older programs.
    directory: Option<PathBuf>,
    git_commit: Option<String>,
    /// Variables of the environment that the pipeline declares, as they were.
    env: BTreeMap<String, String>,
    /// Patch of the uncommitted changes, where there were any and it is still there.
    patch: Option<PathBuf>,
    git_dirty: bool,
    /// Machine, programs and checkout then and now.
    environment: Vec<Change>,
    /// Files of the project that are not as they were.
    files: Vec<Change>,
    /// Nodes whose identity is another now, with the reasons; nothing when the file cannot be loaded now.
    nodes: Option<BTreeMap<NodeName, Vec<Difference>>>,
    /// Nodes in all.
    num_nodes: usize,
    /// What the command changed in the pipeline.
    #[serde(skip)]
    overriding: Overriding,
}

/// Prints the recipe.
///
/// # Errors
/// When there is no such run or it cannot be read.
pub fn reproduce(args: &ReproduceArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let run = choose_run(&layout, args.run.as_deref())?;
    let store = ArtifactStore::open(layout);
    let facts = RunFacts::read(&store, &run)?;
    let recipe = recipe(&facts, &store);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&recipe)?);
        return Ok(Exit::Done);
    }
    println!("# run {run}: {}, profile {}, {}", facts.saved.pipeline, facts.saved.profile, result_word(&facts.view));
    print!("{}", text(&recipe));
    Ok(Exit::Done)
}

/// Returns how to make a run again, and what is different here and now.
pub fn recipe(facts: &RunFacts, store: &ArtifactStore) -> Recipe {
    let run_dir = store.layout().run(&facts.name);
    let then = facts.environment.clone().unwrap_or_default();
    let patch = then.git_diff_blake3.as_deref().map(|hash| run_dir.join(layout::changes_file(hash)));
    Recipe {
        version: JSON_VERSION,
        run: facts.name.clone(),
        command: command(facts),
        directory: facts.saved.directory.clone(),
        git_commit: then.git_commit.clone(),
        env: facts.saved.env.clone(),
        patch: patch.filter(|patch| patch.is_file()),
        git_dirty: then.git_dirty,
        environment: compare::environments(&then, &environment_now(facts, store)),
        files: changed_files(facts),
        nodes: changed_nodes(facts, store),
        num_nodes: facts.saved.plan.nodes.len(),
        overriding: overriding(facts),
    }
}

/// Returns what the command changed in the pipeline: as it was kept, or for older programs as the command line says.
fn overriding(facts: &RunFacts) -> Overriding {
    let kept = facts.saved.overrides.clone().map(Overriding::from);
    let profile = Some(facts.saved.profile.clone());
    let read = || cli::overriding_of(&facts.view.command);
    kept.or_else(read).unwrap_or_else(|| Overriding { profile, ..Overriding::default() })
}

/// Returns the command as it was given, or for one that named no file, such as `retry`, one that does.
fn command(facts: &RunFacts) -> String {
    let file = facts.saved.file.as_deref().filter(|_| cli::overriding_of(&facts.view.command).is_none());
    let Some(file) = file else { return crate::report::command(&facts.view.command) };
    let word = if facts.saved.sweep.is_some() { "sweep" } else { "run" };
    format!("deepgen {word} {}{}", quoted(&file.display().to_string()), options(&overriding(facts)))
}

/// Returns options as they follow the file on a command line.
fn options(overriding: &Overriding) -> String {
    let profile = overriding.profile.iter().map(|profile| format!(" --profile {}", quoted(profile)));
    let set = overriding.set.iter().map(|set| format!(" --set {}", quoted(set)));
    let variants = overriding.variant.iter().map(|variant| format!(" --variant {}", quoted(variant)));
    let smoke = overriding.smoke.then(|| " --smoke".to_owned());
    profile.chain(variants).chain(set).chain(smoke).collect()
}

fn environment_now(facts: &RunFacts, store: &ArtifactStore) -> Environment {
    let root = facts.saved.root.clone().unwrap_or_default();
    let hashes = FileHashes::open(root.clone(), store.layout().state().join("external.json"));
    let beside = || std::env::current_exe().ok().map(|own| own.with_file_name("deepgen-worker"));
    let named = option_value(&facts.view.command, "--worker").map(PathBuf::from);
    let in_directory = |worker: PathBuf| facts.saved.directory.as_ref().map_or(worker.clone(), |dir| dir.join(&worker));
    let worker = named.map(in_directory).or_else(beside);
    environment::capture(&root, worker.as_deref(), &hashes).environment
}

/// Returns the value of an option among arguments, written as two words or with `=`.
fn option_value<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    let at = arguments.iter().position(|word| word == name || word.starts_with(&format!("{name}=")))?;
    match arguments[at].split_once('=') {
        Some((_, value)) => Some(value),
        None => arguments.get(at + 1).map(String::as_str),
    }
}

/// Returns the files of the project that the run was planned from and that are different now.
fn changed_files(facts: &RunFacts) -> Vec<Change> {
    let Some(root) = &facts.saved.root else { return Vec::new() };
    let hash = |text: &str| blake3::hash(text.as_bytes()).to_hex().to_string();
    let change = |(name, then): (&String, &String)| {
        let now = spec::source_now(root, name);
        (now.as_ref() != Some(then)).then(|| Change {
            what: name.clone(),
            left: Some(hash(then)),
            right: Some(now.map_or_else(|| "(missing)".to_owned(), |now| hash(&now))),
        })
    };
    facts.saved.sources.iter().filter_map(change).collect()
}

/// Plans what the run was planned from as it is now, and compares identities.
fn changed_nodes(facts: &RunFacts, store: &ArtifactStore) -> Option<BTreeMap<NodeName, Vec<Difference>>> {
    let file = facts.saved.file.as_deref().filter(|file| file.is_file())?;
    let resolved = load_or_report(file, &overriding(facts), false)?;
    let (plan, _) = results_of(&resolved, Some(store.layout().root())).ok()?;
    let now: BTreeMap<&NodeName, _> = plan.nodes.iter().map(|planned| (&planned.node.name, planned)).collect();
    let change = |then: &SavedPlanned| {
        let name = &then.node.name;
        let all = now.get(name).map_or_else(Vec::new, |planned| compare::identities(&then.parts(), &planned.parts()));
        let is_other = now.get(name).is_none_or(|planned| planned.fingerprint != then.fingerprint);
        is_other.then(|| (name.clone(), all))
    };
    Some(facts.saved.plan.nodes.iter().filter_map(change).collect())
}

impl Recipe {
    /// Returns the commands that make the run again, a line each.
    pub fn commands(&self) -> String {
        let mut text = String::new();
        if let Some(directory) = &self.directory {
            let _ = writeln!(text, "cd {}", quoted(&directory.display().to_string()));
        }
        match &self.git_commit {
            Some(commit) => drop(writeln!(text, "git checkout {commit}")),
            None => text.push_str("# the checkout is not known: no git commit was recorded\n"),
        }
        match &self.patch {
            Some(patch) => drop(writeln!(text, "git apply {}", quoted(&patch.display().to_string()))),
            None if self.git_dirty => text.push_str("# the checkout held uncommitted changes, which are not kept\n"),
            None => {}
        }
        for (name, value) in &self.env {
            let _ = writeln!(text, "export {name}={}", quoted(value));
        }
        let _ = writeln!(text, "{}", self.command);
        text
    }

    /// Returns the options that change what is computed, as they follow the file on a command line.
    pub fn options(&self) -> String {
        options(&self.overriding)
    }
}

fn text(recipe: &Recipe) -> String {
    let mut text = format!("{}\n# then and now\n", recipe.commands());
    text.push_str(changes_text("environment", &recipe.environment).trim_start_matches('\n'));
    text.push_str(changes_text("files of the project", &recipe.files).trim_start_matches('\n'));
    match &recipe.nodes {
        None => text.push_str("nodes: not known, the file cannot be loaded as it is now\n"),
        Some(nodes) if nodes.is_empty() => {
            let _ = writeln!(text, "nodes: all {} would give the same results", recipe.num_nodes);
        }
        Some(nodes) => {
            let _ = writeln!(text, "nodes: {} of {} are other ones now", nodes.len(), recipe.num_nodes);
            for (node, all) in nodes {
                let own: Vec<Difference> = all.iter().filter(|part| part.section != Section::Input).cloned().collect();
                match (own.is_empty(), all.is_empty()) {
                    (false, _) => drop(write!(text, "  {node}\n{}", render::differences(&own, "    "))),
                    (true, false) => drop(writeln!(text, "  {node}: {}", count(all.len(), "other input"))),
                    (true, true) => drop(writeln!(text, "  {node}: is not there any more")),
                }
            }
        }
    }
    text
}
