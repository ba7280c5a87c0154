//! `deepgen run` and `deepgen sweep`: load, plan, open or continue a run, drive it, write the report, say how it ended.
//!
//! The same path for both: a sweep is only a bigger plan.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use deepgen_contract::id::NodeName;
use tokio::sync::mpsc;

use super::{Overriding, load_or_report};
use crate::cli::{Exit, Wrong};
use crate::environment::{self, Captured};
use crate::exec::LocalExecutor;
use crate::exec::jobdir::JobDir;
use crate::plan::{Missing, Plan, PlannedNode, Verdict};
use crate::progress::format::{now_ms, stamp};
use crate::progress::{self, Progress, Summary};
use crate::run::board::{Entry, Start};
use crate::run::driver::{Driver, link_node};
use crate::run::event::{NodeState, Origin, RunEvent, RunResult};
use crate::run::scheduler::Scheduler;
use crate::spec::Resolved;
use crate::store::layout::{ENVIRONMENT_FILE, NODES_DIR, RESOLVED_FILE};
use crate::store::lock::{Holder, Lock};
use crate::store::runs::SavedPlan;
use crate::store::state::{NodeRow, State};
use crate::store::{ArtifactStore, FileHashes, Layout, Recorder, external, layout};

/// Arguments of `deepgen run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Pipeline file, such as pipelines/full.toml
    pub pipeline: PathBuf,
    #[command(flatten)]
    pub overriding: Overriding,
    #[command(flatten)]
    pub how: How,
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
}

/// How a run is carried out; none of it changes a result.
#[derive(Debug, clap::Args)]
pub struct How {
    /// Run at most this many workers at a time, whatever the slots allow
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub jobs: Option<u64>,
    /// Start nothing when what will run is expected to take more GPU-hours, or nobody knows how many
    #[arg(long, value_name = "X")]
    pub max_gpu_hours: Option<f64>,
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
    match load_or_report(&args.pipeline, &args.overriding, false) {
        Some(resolved) => execute(&resolved, &args.how),
        None => Ok(Exit::Wrong),
    }
}

/// Runs all variants of an experiment as one plan.
///
/// # Errors
/// As for [`run`].
pub fn sweep(args: &SweepArgs) -> Result<Exit> {
    match load_or_report(&args.experiment, &args.overriding, true) {
        Some(resolved) => execute(&resolved, &args.how),
        None => Ok(Exit::Wrong),
    }
}

fn execute(resolved: &Resolved, how: &How) -> Result<Exit> {
    let begun_ms = now_ms();
    let folder = how.artifacts.clone().unwrap_or_else(|| resolved.root.join("artifacts"));
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let layout = Layout::new(folder.canonicalize().with_context(|| format!("cannot find {}", folder.display()))?);
    let holder = Holder { pid: std::process::id(), host: environment::host(), since_ms: begun_ms };
    let _lock = Lock::take(&layout.state().join("lock"), &holder)?;

    let store = ArtifactStore::open(layout.clone());
    let hashes = FileHashes::open(resolved.root.clone(), layout.state().join("external.json"));
    let plan = Plan::build(resolved, &store, &hashes);
    refuse_missing(&plan)?;
    if let Some(most) = how.max_gpu_hours {
        super::plan::refuse_dear(&super::plan::costs(&plan, &store), most)?;
    }
    let worker = find_worker(resolved, how, &plan)?;
    let is_computing = worker.is_some();
    let captured = match is_computing {
        true => environment::capture(&resolved.root, worker.as_deref(), &hashes),
        false => Captured::default(),
    };
    if let Err(error) = hashes.save() {
        tracing::warn!(%error, "hashes of external files will be computed again next time");
    }

    let mut progress = progress::choose(how.json, how.quiet);
    let (recorder, rows) = open_run(resolved, &plan, &layout, &holder, progress.as_mut())?;
    if is_computing {
        let run_dir = recorder.run_dir();
        save_environment(&captured, run_dir).with_context(|| format!("cannot write into {}", run_dir.display()))?;
    }
    let (reports_in, reports) = mpsc::unbounded_channel();
    let entries = plan.nodes.iter().map(|node| entry(node, &layout, &holder.host, rows.get(&node.node.name)));
    let max_active = how.jobs.map_or(usize::MAX, |jobs| usize::try_from(jobs).unwrap_or(usize::MAX));
    let scheduler = Scheduler::new(entries.collect(), resolved.executor.slots.clone(), max_active);
    let executor = LocalExecutor::new(worker.unwrap_or_default(), layout.jobs(), holder.host.clone(), reports_in);
    let driver = Driver {
        plan: &plan,
        root: resolved.root.clone(),
        layout: layout.clone(),
        scheduler,
        executor: Box::new(executor),
        reports,
        recorder,
        progress: progress.as_mut(),
        environment: captured.environment,
    };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    let (result, scheduler, recorder) = runtime.block_on(driver.drive())?;
    let report = write_report(recorder.run_dir(), &store);
    let mut summary = summarise(&plan, &scheduler, &store, &recorder, result);
    summary.seconds = now_ms().saturating_sub(begun_ms) as f64 / 1000.0;
    summary.report = report;
    progress.summary(&summary);
    Ok(if result == RunResult::Done { Exit::Done } else { Exit::Failed })
}

/// Writes the report of a run and returns its path; a report that cannot be written does not spoil the run.
fn write_report(run_dir: &Path, store: &ArtifactStore) -> Option<PathBuf> {
    match crate::report::write(run_dir, store) {
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
    if plan.nodes.iter().all(|node| node.verdict == Verdict::Cached) {
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

/// Opens the newest run of this very plan that was cut short or stopped, or else a new one.
fn open_run(
    resolved: &Resolved,
    plan: &Plan,
    layout: &Layout,
    holder: &Holder,
    progress: &mut dyn Progress,
) -> Result<(Recorder, BTreeMap<NodeName, NodeRow>)> {
    let (state, repairs) = State::open(layout, now_ms())?;
    repairs.iter().for_each(|repair| progress.note(repair));
    let identity = plan_identity(resolved, plan);
    let is_open = |result: Option<RunResult>| matches!(result, None | Some(RunResult::Stopped));
    let rows = state.run_rows()?;
    let open =
        rows.iter().rev().find(|(_, row)| row.pipeline == resolved.name && row.plan == identity && is_open(row.result));
    let (run, event, rows) = match open {
        Some((run, _)) => {
            let event = RunEvent::RunResumed { pid: holder.pid, host: holder.host.clone() };
            (run.clone(), event, state.node_rows(run)?)
        }
        None => {
            let run = new_run_name(layout, &resolved.name);
            let event = RunEvent::RunStarted {
                run: run.clone(),
                pipeline: resolved.name.clone(),
                profile: resolved.profile.clone(),
                seed: resolved.seed,
                plan: identity,
                command: std::env::args().collect(),
                pid: holder.pid,
                host: holder.host.clone(),
            };
            (run, event, BTreeMap::new())
        }
    };
    let run_dir = layout.run(&run);
    if open.is_none() {
        std::fs::create_dir_all(&run_dir).with_context(|| format!("cannot create {}", run_dir.display()))?;
        save_plan(resolved, plan, &run_dir).with_context(|| format!("cannot write into {}", run_dir.display()))?;
    }
    let nodes = run_dir.join(NODES_DIR);
    for planned in plan.nodes.iter().filter(|planned| planned.verdict == Verdict::Cached) {
        link_node(&nodes, &planned.node.name, &planned.fingerprint.to_string());
    }
    let mut recorder = Recorder::open(layout, &run, state)?;
    let now = now_ms();
    recorder.record(std::slice::from_ref(&event), now)?;
    progress.run_event(now, &event);
    Ok((recorder, rows))
}

fn save_plan(resolved: &Resolved, plan: &Plan, run_dir: &Path) -> Result<()> {
    SavedPlan::of(resolved, plan, std::env::current_dir().ok()).write(run_dir)?;
    let text = toml::to_string(resolved)?;
    external::write_atomically(&run_dir.join(RESOLVED_FILE), text.as_bytes())?;
    Ok(())
}

/// Writes down what computes: the environment, and once the uncommitted changes of the checkout.
fn save_environment(captured: &Captured, run_dir: &Path) -> Result<()> {
    let text = serde_json::to_vec_pretty(&captured.environment)?;
    external::write_atomically(&run_dir.join(ENVIRONMENT_FILE), &text)?;
    if let (Some(changes), Some(hash)) = (&captured.changes, &captured.environment.git_diff_blake3) {
        let path = run_dir.join(layout::changes_file(hash));
        if !path.exists() {
            external::write_atomically(&path, changes)?;
        }
    }
    Ok(())
}

/// Returns what the same plan gives again: the names of its nodes with their fingerprints.
fn plan_identity(resolved: &Resolved, plan: &Plan) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(resolved.name.as_bytes());
    for planned in &plan.nodes {
        hasher.update(b"\n");
        hasher.update(planned.node.name.0.as_bytes());
        hasher.update(&planned.fingerprint.0);
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// Returns a name that sorts by time and is not taken.
fn new_run_name(layout: &Layout, pipeline: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' };
    let name = format!("{}-{}", stamp(now_ms()), pipeline.chars().map(plain).collect::<String>());
    let numbered = (2..).map(|num| format!("{name}-{num}"));
    std::iter::once(name.clone())
        .chain(numbered)
        .find(|name| !layout.run(name).exists())
        .expect("one of infinitely many names is free")
}

/// Returns what the scheduler must know of a node: what earlier processes and this run's earlier processes left of it.
fn entry(planned: &PlannedNode, layout: &Layout, host: &str, row: Option<&NodeRow>) -> Entry {
    let node = &planned.node;
    let row = row.filter(|row| row.fingerprint == planned.fingerprint);
    let start = match planned.verdict {
        // A result that an earlier process of this run made, or had ready for sealing, is the run's own.
        Verdict::Cached => Start::Sealed(match row.map(|row| &row.state) {
            Some(NodeState::Done { origin }) => origin.clone(),
            Some(NodeState::Running { attempt } | NodeState::Sealing { attempt }) => Origin::Ran { attempt: *attempt },
            _ => Origin::Cached,
        }),
        _ => JobDir::new(&layout.jobs(), &planned.fingerprint).start(host),
    };
    Entry {
        name: node.name.clone(),
        fingerprint: planned.fingerprint,
        inputs: node.inputs.values().cloned().collect(),
        slots: node.slots.clone(),
        retries: node.retries,
        failures: row.map_or(0, |row| row.failures),
        start,
    }
}

fn summarise(
    plan: &Plan,
    scheduler: &Scheduler,
    store: &ArtifactStore,
    recorder: &Recorder,
    result: RunResult,
) -> Summary {
    let mut summary = Summary {
        run: recorder.view().run.clone(),
        result,
        num_ran: 0,
        num_cached: 0,
        num_failed: 0,
        num_left: 0,
        seconds: 0.0,
        saved_seconds: 0.0,
        failures: Vec::new(),
        run_dir: recorder.run_dir().to_owned(),
        report: None,
    };
    for planned in &plan.nodes {
        match scheduler.board().get(&planned.node.name).map(|cell| cell.state()) {
            Some(NodeState::Done { origin: Origin::Ran { .. } }) => summary.num_ran += 1,
            Some(NodeState::Done { .. }) => {
                summary.num_cached += 1;
                summary.saved_seconds += store.manifest(&planned.fingerprint).map_or(0.0, |made| made.run_seconds);
            }
            Some(NodeState::Failed { failure, .. }) => {
                summary.num_failed += 1;
                summary.failures.push((planned.node.name.clone(), failure.message.clone()));
            }
            _ => summary.num_left += 1,
        }
    }
    summary
}
