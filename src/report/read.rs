//! Gathers what a report shows: journal and plan of the run, manifests and files of its artifacts, job directories.
//!
//! The journal and the plan must be there; everything else may be missing or of another program, and is then left out:
//! a report of a half-finished or tidied-up run is still a report. Writes nothing.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use deepgen_contract::artifact::Manifest;
use deepgen_contract::eval::SCORES_FILE;
use deepgen_contract::event::WorkerEventKind;
use deepgen_contract::job::{METRICS_FILE, STDERR_FILE};
use rayon::prelude::*;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::data::{MetricRow, NodeReport, PublishedAblation, ReportData, SinceLast, distinct};
use super::{ReportError, samples, training_samples};
use crate::compare::{self, RunFacts};
use crate::exec::jobdir::{EventTail, JobDir};
use crate::exec::process::ProcessId;
use crate::run::event::{NodeState, Origin, RunResult};
use crate::store::layout::RESOLVED_FILE;
use crate::store::runs::{self, RunView, SavedPlan};
use crate::store::saved::SavedPlanned;
use crate::store::{ArtifactStore, Layout, accepted, artifacts};

/// Bytes of a failed node's `stderr.log` that are shown.
const LOG_TAIL_BYTES: u64 = 4096;
/// Lines of it that are shown.
const LOG_TAIL_LINES: usize = 20;
/// Nodes up to which a run is compared with the one before: a report must not take long.
const MAX_COMPARED_NODES: usize = 1000;
/// Earlier runs that are looked at to find one of the same pipeline.
const MAX_EARLIER_RUNS: usize = 20;

/// Reads everything that the report of a run shows.
///
/// # Errors
/// When the journal or the plan of the run cannot be read.
pub fn read(run_dir: &Path, store: &ArtifactStore) -> Result<ReportData, ReportError> {
    let view = RunView::read(run_dir)?;
    let saved = SavedPlan::read(run_dir)?;
    let outcome = outcome(&view);
    let nodes: Vec<NodeReport> = {
        let layout = store.layout();
        let accepted = accepted::read_all(layout);
        let of = |planned: &SavedPlanned| planned.stands_for.and_then(|own| accepted.get(&own).cloned());
        let read = |planned| NodeReport { accepted: of(planned), ..read_node(planned, &view, layout) };
        saved.plan.nodes.par_iter().map(read).collect()
    };
    let grids = samples::grids(&nodes, store);
    let published = saved.sweep.as_ref().and_then(|sweep| published_ablation(run_dir, &sweep.name));
    let previous = previous(run_dir, store, &view, &saved, &nodes);
    Ok(ReportData { view, saved, outcome, nodes, grids, previous, published })
}

/// Returns the run of the same pipeline and profile before this one, compared with it.
fn previous(
    run_dir: &Path,
    store: &ArtifactStore,
    view: &RunView,
    saved: &SavedPlan,
    nodes: &[NodeReport],
) -> Option<SinceLast> {
    if nodes.len() > MAX_COMPARED_NODES {
        return None;
    }
    let is_alike = |name: &String| {
        let other = RunView::read(&store.layout().run(name)).ok()?;
        (other.pipeline == view.pipeline && other.profile == view.profile).then_some(other)
    };
    let earlier = runs::list(store.layout()).into_iter().filter(|name| *name < view.run);
    let (name, other) = earlier.rev().take(MAX_EARLIER_RUNS).find_map(|name| Some((name.clone(), is_alike(&name)?)))?;
    let before = RunFacts::read(store, &name).ok()?;
    let sealed = |node: &NodeReport| Some((node.name().clone(), node.manifest.clone()?));
    let own = RunFacts {
        name: view.run.clone(),
        view: view.clone(),
        saved: saved.clone(),
        // Of a run that computed nothing there is no environment to compare.
        environment: compare::read_environment(run_dir),
        manifests: nodes.iter().filter_map(sealed).collect(),
    };
    Some(SinceLast { run: name, started_ms: other.started_ms, diff: compare::runs(&before, &own) })
}

/// Returns the word for a run: one whose orchestrator has gone without ending it was interrupted.
fn outcome(view: &RunView) -> &'static str {
    let is_alive = || {
        view.owners.last().is_some_and(|(pid, host)| {
            *host != crate::environment::host() || ProcessId { pid: *pid, started: None }.is_alive()
        })
    };
    match view.result {
        Some(result) => RunResult::word(result),
        None if is_alive() => "running",
        None => "interrupted",
    }
}

fn read_node(planned: &SavedPlanned, view: &RunView, layout: &Layout) -> NodeReport {
    let name = &planned.node.name;
    let seen = view.nodes.get(name);
    let state = view.state(name).clone();
    let manifest = match artifacts::manifest(layout, &planned.fingerprint) {
        Ok(manifest) => Some(manifest),
        Err(error) => {
            if state.is_done() {
                tracing::warn!(node = %name, %error, "the report leaves out a result that does not verify");
            }
            None
        }
    };
    let job = JobDir::new(&layout.jobs(), &planned.fingerprint);
    let attempts = job.attempts();
    let (job_metrics, warnings) = worker_words(&job, &attempts);
    let folder = layout.artifact(&planned.fingerprint);
    let metrics = match &manifest {
        Some(_) => with_timings(read_metrics(&folder.join(METRICS_FILE)), job_metrics),
        None => job_metrics,
    };
    let newest = state.attempt().or(attempts.first().copied());
    let is_failure = matches!(state, NodeState::Failed { .. } | NodeState::Retrying { .. });
    let log_tail = newest.filter(|_| is_failure).and_then(|attempt| tail(&job.attempt(attempt).join(STDERR_FILE)).ok());
    let job_dir = newest.filter(|_| !attempts.is_empty()).map(|attempt| relative(&job.attempt(attempt), layout));
    NodeReport {
        settings: planned.node.typed(),
        accepted: None,
        planned: planned.clone(),
        seconds: seconds(&state, seen.map(|seen| (seen.started_ms, seen.since_ms)), manifest.as_ref()),
        failures: seen.map_or(0, |seen| seen.failures),
        samples: manifest.as_ref().and_then(|_| training_samples::read(&folder)),
        scores: manifest.as_ref().and_then(|_| read_json(&folder.join(SCORES_FILE))),
        state,
        manifest,
        metrics,
        warnings,
        job_dir,
        log_tail: log_tail.unwrap_or_default(),
    }
}

/// Returns what attempts took: those of this run by its journal, those of earlier runs by the manifest.
fn seconds(state: &NodeState, times: Option<(Option<u64>, u64)>, manifest: Option<&Manifest>) -> Option<f64> {
    let ran_here = || {
        let (started, since) = times?;
        Some(since.saturating_sub(started?) as f64 / 1000.0)
    };
    match state {
        NodeState::Done { origin: Origin::Ran { .. } } => ran_here().or(manifest.map(|manifest| manifest.run_seconds)),
        NodeState::Done { .. } => manifest.map(|manifest| manifest.run_seconds),
        NodeState::Failed { .. } | NodeState::Stopped { .. } => ran_here(),
        _ => None,
    }
}

/// Returns metrics and warnings of all attempts, oldest first; a step that was repeated counts once.
fn worker_words(job: &JobDir, attempts: &[u32]) -> (Vec<MetricRow>, Vec<String>) {
    let mut rows = std::collections::BTreeMap::new();
    let mut warnings = Vec::new();
    for attempt in attempts.iter().rev() {
        for event in EventTail::new(&job.attempt(*attempt)).read() {
            match event.event {
                WorkerEventKind::Metrics { step, values } => {
                    rows.entry(step).or_insert_with(std::collections::BTreeMap::new).extend(values)
                }
                WorkerEventKind::Warning { message } => warnings.push(message),
                _ => {}
            }
        }
    }
    (rows.into_iter().map(|(step, values)| MetricRow { step, values }).collect(), distinct(warnings))
}

/// Groups of metrics that depend on the clock and the machine: a result does not hold them, its job does as long as it lies there.
const TIMING_GROUPS: [&str; 3] = ["time", "throughput", "memory"];

/// Adds the numbers that depend on the clock to those of the result.
fn with_timings(mut rows: Vec<MetricRow>, of_job: Vec<MetricRow>) -> Vec<MetricRow> {
    let is_timing = |name: &str| name.split_once('/').is_some_and(|(group, _)| TIMING_GROUPS.contains(&group));
    for MetricRow { step, mut values } in of_job {
        values.retain(|name, _| is_timing(name));
        match rows.binary_search_by_key(&step, |row| row.step) {
            Ok(place) => rows[place].values.extend(values),
            Err(_) if values.is_empty() => {}
            Err(place) => rows.insert(place, MetricRow { step, values }),
        }
    }
    rows
}

/// Reads `metrics.jsonl`; lines that are no metrics are left out, and lines of one step are joined.
fn read_metrics(path: &Path) -> Vec<MetricRow> {
    let Ok(text) = fs::read_to_string(path) else { return Vec::new() };
    let mut rows: Vec<MetricRow> = Vec::new();
    for line in text.lines() {
        let Ok(serde_json::Value::Object(line)) = serde_json::from_str(line) else { continue };
        let Some(step) = line.get("step").and_then(serde_json::Value::as_u64) else { continue };
        let numbers = line.iter().filter(|(name, _)| *name != "step");
        let values = numbers.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)));
        match rows.last_mut().filter(|last| last.step == step) {
            Some(last) => last.values.extend(values),
            None => rows.push(MetricRow { step, values: values.collect() }),
        }
    }
    rows.sort_by_key(|row| row.step);
    rows
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    match serde_json::from_slice(&fs::read(path).ok()?) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the report leaves out a file of another program");
            None
        }
    }
}

/// Returns the last lines of a file.
fn tail(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(LOG_TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n"))
}

fn relative(path: &Path, layout: &Layout) -> String {
    path.strip_prefix(layout.root()).unwrap_or(path).display().to_string()
}

/// `experiments/reference/*.toml`, as far as the report reads it.
#[derive(Debug, Deserialize)]
struct Reference {
    title: String,
    #[serde(default)]
    ablation: Vec<Ablation>,
}

#[derive(Debug, Deserialize)]
struct Ablation {
    name: String,
    metrics: Vec<String>,
    row: Vec<AblationRow>,
}

#[derive(Debug, Deserialize)]
struct AblationRow {
    name: String,
    values: Vec<f64>,
}

/// Returns the published ablation of an experiment's name, from the project that the run was planned in.
fn published_ablation(run_dir: &Path, experiment: &str) -> Option<PublishedAblation> {
    #[derive(Deserialize)]
    struct Project {
        root: std::path::PathBuf,
    }
    let project: Project = toml::from_str(&fs::read_to_string(run_dir.join(RESOLVED_FILE)).ok()?).ok()?;
    let mut files: Vec<_> =
        fs::read_dir(project.root.join("experiments/reference")).ok()?.filter_map(Result::ok).collect();
    files.sort_by_key(fs::DirEntry::file_name);
    files.iter().find_map(|file| {
        let reference: Reference = toml::from_str(&fs::read_to_string(file.path()).ok()?).ok()?;
        let ablation = reference.ablation.into_iter().find(|ablation| ablation.name == experiment)?;
        let rows = ablation.row.into_iter().map(|row| (row.name, row.values)).collect();
        Some(PublishedAblation { title: reference.title, metrics: ablation.metrics, rows })
    })
}
