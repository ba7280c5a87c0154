//! `deepgen run` and `deepgen sweep`: load, plan, open or continue a run, drive it, write the report, say how it ended.
//!
//! The same path for both: a sweep is only a bigger plan.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use deepgen_contract::job::FrozenCache;
use deepgen_contract::stage::StageKind;
use tokio::sync::mpsc;

use super::opening::{Opened, changed_results, entry, open_run, save_environment};
use super::plan::PlanArgs;
use super::selection::{Selected, Selection};
use super::settled::{Question, source_hashes};
use super::summary::summarise;
use super::{Overriding, detach, idle, load_or_report, results_of};
use crate::cli::{Exit, Wrong};
use crate::environment::{self, Captured};
use crate::exec::LocalExecutor;
use crate::plan::{Missing, Plan, PlannedNode, Verdict};
use crate::progress;
use crate::progress::format::{count, now_ms};
use crate::run::driver::Driver;
use crate::run::event::RunResult;
use crate::run::scheduler::{Rules, Scheduler};
use crate::spec::Resolved;
use crate::store::index::RunIndex;
use crate::store::lock::{Holder, Lock};
use crate::store::{ArtifactStore, FileHashes, Layout, Links};

/// Nodes up to which every run ends with a new report.
const MAX_REPORTED_NODES: usize = 2000;
/// Commands that run at a time, each on a thread of its own; more of them wait for one that ends.
const MOST_COMMANDS: usize = 4096;

/// Arguments of `deepgen run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Pipeline file, such as pipelines/full.toml
    pub pipeline: PathBuf,
    #[command(flatten)]
    pub overriding: Overriding,
    #[command(flatten)]
    pub how: How,
    #[command(flatten)]
    pub selection: Selection,
}

/// Arguments of `deepgen sweep`.
#[derive(Debug, clap::Args)]
pub struct SweepArgs {
    /// Experiment file, such as experiments/architecture.toml
    pub experiment: PathBuf,
    #[command(flatten)]
    pub overriding: Overriding,
    #[command(flatten)]
    pub how: How,
    #[command(flatten)]
    pub selection: Selection,
}

/// How a run is carried out; none of it changes a result.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "How")]
pub struct How {
    /// Show what would run and why, like `deepgen plan`, and start nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Run at most this many workers at a time, whatever the slots allow
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub jobs: Option<u64>,
    /// Start nothing when what will run is expected to take more GPU-hours, or nobody knows how many
    #[arg(long, value_name = "X")]
    pub max_gpu_hours: Option<f64>,
    /// After a node failed, go on with all that does not depend on it, whatever the pipeline says
    #[arg(long, short, conflicts_with = "fail_fast")]
    pub keep_going: bool,
    /// After a node failed, start nothing new, whatever the pipeline says
    #[arg(long)]
    pub fail_fast: bool,
    /// Go on in the background, whatever becomes of this terminal: see `attach`, `status`, `logs` and `stop`
    #[arg(long, short, conflicts_with = "dry_run")]
    pub detach: bool,
    /// Log of a child that was started by `--detach`
    #[arg(long, value_name = "FILE", hide = true, conflicts_with = "detach")]
    pub detached: Option<PathBuf>,
    /// Tell only how the run ends
    #[arg(long, short, conflicts_with = "json")]
    pub quiet: bool,
    /// Print every event as a JSON line on standard output
    #[arg(long)]
    pub json: bool,
    /// Worker program [default: the deepgen-worker beside this program, or the executor's `worker`]
    #[arg(long, value_name = "FILE")]
    pub worker: Option<PathBuf>,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// Runs a pipeline.
///
/// # Errors
/// When the run cannot be carried out; a failed node is no error but [`Exit::Failed`].
pub fn run(args: &RunArgs) -> Result<Exit> {
    load_and_start(&args.pipeline, false, (&args.overriding, &args.how, &args.selection))
}

/// Runs all variants of an experiment as one plan.
///
/// # Errors
/// As for [`run`].
pub fn sweep(args: &SweepArgs) -> Result<Exit> {
    load_and_start(&args.experiment, true, (&args.overriding, &args.how, &args.selection))
}

fn load_and_start(
    file: &Path,
    is_sweep: bool,
    (overriding, how, selection): (&Overriding, &How, &Selection),
) -> Result<Exit> {
    let is_plain = !how.dry_run && !how.detach && how.detached.is_none();
    let question = Question::new(file, overriding, selection, is_sweep).filter(|_| is_plain);
    if let Some(question) = &question
        && let Some(exit) = answer_settled(question, how)?
    {
        return Ok(exit);
    }
    match load_or_report(file, overriding, is_sweep) {
        Some(resolved) => start_asked(resolved, how, selection, question.as_ref()),
        None => Ok(Exit::Wrong),
    }
}

/// Tells what an earlier run came to, when the very same question found every result sealed and nothing has changed.
fn answer_settled(question: &Question, how: &How) -> Result<Option<Exit>> {
    let begun_ms = now_ms();
    let folder = how.artifacts.clone().unwrap_or_else(|| question.root().join("artifacts"));
    // Where nothing ever ran nothing is settled, and no folder is made.
    let Ok(folder) = folder.canonicalize() else { return Ok(None) };
    let layout = Layout::new(folder);
    if !layout.state().is_dir() {
        return Ok(None);
    }
    let holder = Holder { pid: std::process::id(), host: environment::host(), since_ms: begun_ms };
    // Who holds the folder is said once the files are known to be sound.
    let Ok(_lock) = Lock::take(&layout.state().join("lock"), &holder) else { return Ok(None) };
    let store = ArtifactStore::open(layout.clone());
    let hashes = FileHashes::open(question.root().to_owned(), layout.state().join("external.json"));
    let summary = question.look_up(&store, &hashes).and_then(|settled| idle::of_settled(&settled, &layout));
    let Some(mut summary) = summary else { return Ok(None) };
    let mut progress = progress::choose(how.json, how.quiet);
    progress.begin(summary.num_cached);
    summary.seconds = now_ms().saturating_sub(begun_ms) as f64 / 1000.0;
    progress.summary(&summary);
    Ok(Some(Exit::Done))
}

/// Shows, detaches or executes, as asked for.
///
/// # Errors
/// As for [`run`].
pub fn start(resolved: Resolved, how: &How, selection: &Selection) -> Result<Exit> {
    start_asked(resolved, how, selection, None)
}

fn start_asked(resolved: Resolved, how: &How, selection: &Selection, question: Option<&Question>) -> Result<Exit> {
    // As with the plan in [`execute`].
    let mut resolved = ManuallyDrop::new(resolved);
    if how.keep_going || how.fail_fast {
        resolved.keep_going = how.keep_going;
    }
    if how.dry_run {
        let (plan, store) = results_of(&resolved, how.artifacts.as_deref())?;
        let Selected { plan, .. } = selection.apply(plan)?;
        let args = PlanArgs { json: how.json, max_gpu_hours: how.max_gpu_hours, ..PlanArgs::default() };
        super::plan::print(&resolved, &plan, &store, &args)?;
        return Ok(Exit::Done);
    }
    if how.detach {
        return detach::start(&artifacts_of(&resolved, how)?);
    }
    if how.detached.is_some() {
        detach::leave_terminal();
    }
    execute(&mut resolved, how, selection, question)
}

/// Runs what was loaded, the chosen part of it: plan, open or continue a run, drive it, report. Once all of it is done,
/// that is remembered as the answer to `question`.
///
/// # Errors
/// As for [`run`].
fn execute(resolved: &mut Resolved, how: &How, selection: &Selection, question: Option<&Question>) -> Result<Exit> {
    let begun_ms = now_ms();
    let layout = artifacts_of(resolved, how)?;
    let holder = Holder { pid: std::process::id(), host: environment::host(), since_ms: begun_ms };
    let _lock = Lock::take(&layout.state().join("lock"), &holder)?;

    let mut store = ArtifactStore::open(layout.clone());
    let hashes = FileHashes::open(resolved.root.clone(), layout.state().join("external.json"));
    // The process ends soon after: to take ten thousand nodes apart would only take time.
    let mut selected = ManuallyDrop::new(selection.apply(Plan::build(resolved, &store, &hashes))?);
    refuse_missing(&selected.plan)?;
    if let Some(most) = how.max_gpu_hours {
        super::plan::refuse_dear(&super::plan::costs(&selected.plan, &store), most)?;
    }
    let worker = find_worker(resolved, how, &selected.plan)?;
    let mut progress = progress::choose(how.json, how.quiet);
    progress.begin(selected.plan.nodes.len());
    // A detached child owes its parent the name of a run of its own.
    if how.detached.is_none()
        && let Some(mut summary) = idle::finished(resolved, &selected, &store)
    {
        hashes.remember();
        question
            .iter()
            .for_each(|question| question.remember(resolved, source_hashes(resolved), &mut selected, &store));
        store.save_memory();
        summary.seconds = now_ms().saturating_sub(begun_ms) as f64 / 1000.0;
        progress.summary(&summary);
        return Ok(Exit::Done);
    }
    let is_computing = selected.plan.nodes.iter().any(|node| node.verdict != Verdict::Cached);
    let root = resolved.root.clone();
    // One waits for git and reads the programs, the other waits for the disk.
    let (captured, opened) = std::thread::scope(|scope| {
        let capture = || environment::capture(&root, worker.as_deref(), &hashes);
        let captured = is_computing.then(|| scope.spawn(capture));
        let opened = open_run(resolved, &mut selected, &layout, &holder, progress.as_mut());
        (captured.map_or_else(Captured::default, |thread| thread.join().unwrap_or_default()), opened)
    });
    hashes.remember();
    let Opened { recorder, rows } = opened?;
    if let Some(log) = &how.detached {
        detach::tell_parent(log, recorder.run_dir())?;
    }
    if is_computing {
        let run_dir = recorder.run_dir();
        save_environment(&captured, run_dir).with_context(|| format!("cannot write into {}", run_dir.display()))?;
    }
    // The texts are in the run's folder by now; of ten thousand nodes they are megabytes.
    let sources = source_hashes(resolved);
    resolved.sources.clear();
    store.end_planning();
    let plan = &selected.plan;
    let (reports_in, reports) = mpsc::unbounded_channel();
    let entries = plan.nodes.iter().map(|node| entry(node, &layout, &holder.host, rows.get(&node.node.name)));
    let entries = entries.collect();
    drop(rows);
    let max_active = how.jobs.map_or(usize::MAX, |jobs| usize::try_from(jobs).unwrap_or(usize::MAX));
    let rules = Rules {
        capacity: resolved.executor.slots.clone(),
        slot_ids: resolved.executor.slot_ids.clone(),
        max_active,
        keep_going: resolved.keep_going,
    };
    let scheduler = Scheduler::new(entries, rules);
    let (is_written, written) = std::sync::mpsc::channel();
    let run_dir = recorder.run_dir().to_owned();
    let links = Arc::new(Links::of(plan, &run_dir));
    let executor = LocalExecutor::new(worker.unwrap_or_default(), layout.jobs(), holder.host.clone(), reports_in);
    let frozen_cache = resolved.executor.frozen_cache.clone();
    let frozen_cache = frozen_cache.map(|cache| FrozenCache { path: resolved.root.join(&cache.path), ..cache });
    let driver = Driver {
        plan,
        store: &store,
        root,
        layout: layout.clone(),
        scheduler,
        executor: Box::new(executor),
        reports,
        recorder,
        links: Arc::clone(&links),
        progress: progress.as_mut(),
        frozen_cache,
        environment: captured.environment,
        untold: VecDeque::new(),
        is_written,
        ignores_hangup: how.detached.is_some(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MOST_COMMANDS)
        .build()
        .context("cannot start a runtime")?;
    let has_report = plan.nodes.len() <= MAX_REPORTED_NODES;
    let report = || write_report(&run_dir, &layout);
    let (driven, report) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let cached = plan.nodes.iter().filter(|planned| planned.verdict == Verdict::Cached);
            cached.for_each(|planned| links.make(&planned.node.name, &planned.fingerprint));
        });
        // The disk takes a while over the last lines; the report need not wait for that.
        let report = scope.spawn(move || written.recv().ok().filter(|()| has_report).and_then(|()| report()));
        let driven = runtime.block_on(driver.drive());
        (driven, report.join().unwrap_or_default())
    });
    // A run that cannot go on does not wait for commands: they are found by the next.
    runtime.shutdown_background();
    let (result, _, recorder) = driven?;
    if result == RunResult::Done
        && let Some(question) = question
    {
        question.remember(resolved, sources, &mut selected, &store);
    }
    store.save_memory();
    changed_results(&selected, &store).iter().for_each(|line| progress.note(line));
    if !has_report {
        let num = count(selected.plan.nodes.len(), "node");
        progress.note(&format!("a report of {num} takes long: `deepgen report` makes it"));
    }
    let mut summary = summarise(&RunIndex::of(&selected.plan), recorder.view(), &store, recorder.run_dir());
    summary.seconds = now_ms().saturating_sub(begun_ms) as f64 / 1000.0;
    summary.report = report;
    progress.summary(&summary);
    Ok(if result == RunResult::Done { Exit::Done } else { Exit::Failed })
}

/// Returns where the results of a project lie, after making that folder.
fn artifacts_of(resolved: &Resolved, how: &How) -> Result<Layout> {
    let folder = how.artifacts.clone().unwrap_or_else(|| resolved.root.join("artifacts"));
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(Layout::new(folder.canonicalize().with_context(|| format!("cannot find {}", folder.display()))?))
}

/// Writes the report of a run and returns its path; a report that cannot be written does not spoil the run.
fn write_report(run_dir: &Path, layout: &Layout) -> Option<PathBuf> {
    match crate::report::write(run_dir, &ArtifactStore::open(layout.clone())) {
        Ok(path) => Some(path),
        Err(error) => {
            tracing::warn!(%error, "the report could not be written; `deepgen report` tries again");
            None
        }
    }
}

/// Refuses to start anything while something outside is missing.
fn refuse_missing(plan: &Plan) -> Result<()> {
    let mut text = String::new();
    for planned in &plan.nodes {
        let Verdict::Blocked(missing) = &planned.verdict else { continue };
        for missing in missing {
            if let Missing::Path { key, path, remedy } = missing {
                text.push_str(&format!("\n  {}: `{key}` names {path}, which is missing: {remedy}", planned.node.name));
            }
        }
    }
    if text.is_empty() { Ok(()) } else { Err(Wrong(format!("inputs are missing; nothing was started{text}")).into()) }
}

/// Returns the worker program, or nothing when every result is there already.
fn find_worker(resolved: &Resolved, how: &How, plan: &Plan) -> Result<Option<PathBuf>> {
    let needs_worker = |node: &PlannedNode| node.verdict != Verdict::Cached && node.node.kind != StageKind::Command;
    if !plan.nodes.iter().any(needs_worker) {
        return Ok(None);
    }
    let beside = || std::env::current_exe().ok().map(|own| own.with_file_name("deepgen-worker"));
    let named = resolved.executor.worker.as_ref().map(|worker| resolved.root.join(worker));
    let worker = how.worker.clone().or(named).or_else(beside).context("cannot tell where this program lies")?;
    match worker.canonicalize() {
        Ok(worker) => Ok(Some(worker)),
        Err(error) => Err(Wrong(format!(
            "no worker at {} ({error}): build it with `cargo build --release -p deepgen-worker`, or name it with --worker",
            worker.display()
        ))
        .into()),
    }
}
