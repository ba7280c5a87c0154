//! Opening a run: the newest one of the same plan that was cut short or stopped, or else a new one, and what earlier
//! processes left of its nodes.
//!
//! Knows the disk and the state; starts no worker and decides nothing about scheduling.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use deepgen_contract::artifact::{MANIFEST_FILE, Manifest};
use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::job::{CHECKPOINTS_DIR, JobRemedies};

use super::detach::DETACHED_FLAG;
use super::selection::Selected;
use crate::environment::Captured;
use crate::exec::jobdir::{self, JobDir};
use crate::plan::{Plan, PlannedNode, Reason, Verdict};
use crate::progress::Progress;
use crate::progress::format::{count, now_ms, stamp};
use crate::run::board::{Entry, Start};
use crate::run::event::{NodeState, Origin, RunEvent};
use crate::run::slots::Request;
use crate::spec::{Resolved, ResolvedNode};
use crate::store::index::RunIndex;
use crate::store::layout::{self, ENVIRONMENT_FILE, RESOLVED_FILE};
use crate::store::lock::Holder;
use crate::store::runs;
use crate::store::saved::write_plan;
use crate::store::state::{NodeRow, State};
use crate::store::{ArtifactStore, Layout, Recorder, external};

/// Names of results that were computed again begin with this in the store.
pub const REPLACED: &str = "replaced-";
const DAY_MS: u64 = 86_400_000;

/// A run that is open for events.
pub struct Opened {
    /// Where its events go.
    pub recorder: Recorder,
    /// What earlier processes of the run left of its nodes.
    pub rows: BTreeMap<NodeName, NodeRow>,
}

/// Opens the newest run of this very plan that was cut short or stopped, or else a new one, and clears the way for
/// nodes that shall be computed again.
///
/// # Errors
/// When the state or the run's folder cannot be read or written.
pub fn open_run(
    resolved: &Resolved,
    selected: &mut Selected,
    layout: &Layout,
    holder: &Holder,
    progress: &mut dyn Progress,
) -> Result<Opened> {
    let (state, repairs) = State::open(layout, now_ms())?;
    repairs.iter().for_each(|repair| progress.note(repair));
    let identity = plan_identity(resolved, selected);
    let rows = state.run_rows()?;
    let open =
        rows.iter().rev().find(|(_, row)| row.pipeline == resolved.name && row.plan == identity && !row.has_ended());
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
                command: command_line(std::env::args()),
                pid: holder.pid,
                host: holder.host.clone(),
            };
            (run, event, BTreeMap::new())
        }
    };
    let run_dir = layout.run(&run);
    if open.is_none() {
        fs::create_dir_all(&run_dir).with_context(|| format!("cannot create {}", run_dir.display()))?;
        save_plan(resolved, &selected.plan, &run_dir)
            .with_context(|| format!("cannot write into {}", run_dir.display()))?;
    }
    let is_new = open.is_none();
    let mut recorder = Recorder::open(layout, &run, state)?;
    let now = now_ms();
    recorder.record(std::slice::from_ref(&event), now)?;
    recorder.sync()?;
    progress.run_event(now, &event);
    set_unsure_aside(selected, &rows, layout, progress);
    clear_forced(selected, &rows, layout, is_new)?;
    Ok(Opened { recorder, rows })
}

/// Reads results that were sealed and whose sealing was not durable yet when the run was cut short: after a loss of
/// power their files may be there and empty. What does not verify is put aside and computed again.
fn set_unsure_aside(
    selected: &mut Selected,
    rows: &BTreeMap<NodeName, NodeRow>,
    layout: &Layout,
    progress: &mut dyn Progress,
) {
    let store = ArtifactStore::open(layout.clone());
    for planned in selected.plan.nodes.iter_mut().filter(|planned| planned.verdict == Verdict::Cached) {
        let name = &planned.node.name;
        let is_unsure = rows.get(name).is_some_and(|row| {
            row.fingerprint == planned.fingerprint
                && matches!(row.state, NodeState::Running { .. } | NodeState::Sealing { .. })
        });
        if is_unsure && let Err(error) = store.verify(&planned.fingerprint) {
            let aside = layout.store().join(format!("{REPLACED}{}-{}", planned.fingerprint.short(), now_ms()));
            match fs::rename(layout.artifact(&planned.fingerprint), aside) {
                Ok(()) => progress.note(&format!("{name}: its result was cut short and is computed again ({error})")),
                Err(error) => tracing::warn!(node = %name, %error, "a damaged result cannot be put aside"),
            }
            planned.verdict = Verdict::Run(Reason::Lost);
        }
    }
}

/// Takes old results and checkpoints of nodes that shall be computed again out of the way, unless this run did so
/// before it was cut short.
fn clear_forced(
    selected: &mut Selected,
    rows: &BTreeMap<NodeName, NodeRow>,
    layout: &Layout,
    is_new: bool,
) -> Result<()> {
    for planned in selected.plan.nodes.iter_mut().filter(|planned| selected.forced.contains(&planned.node.name)) {
        let artifact = layout.artifact(&planned.fingerprint);
        let is_begun = rows.get(&planned.node.name).is_some_and(|row| {
            let is_own = matches!(row.state, NodeState::Done { origin: Origin::Ran { .. } });
            row.fingerprint == planned.fingerprint && (is_own || row.state.is_active())
        });
        match (is_begun, artifact.exists()) {
            (true, true) => planned.verdict = Verdict::Cached,
            (false, is_sealed) if is_sealed || is_new => discard(layout, planned)
                .with_context(|| format!("cannot put aside the old result in {}", artifact.display()))?,
            _ => {}
        }
    }
    Ok(())
}

/// Removes the checkpoints of a node's attempts, then puts its result aside: in this order a crash between the two is
/// made good by doing both again.
fn discard(layout: &Layout, planned: &PlannedNode) -> io::Result<()> {
    let dir = JobDir::new(&layout.jobs(), &planned.fingerprint);
    for attempt in dir.attempts() {
        match fs::remove_dir_all(dir.attempt(attempt).join(CHECKPOINTS_DIR)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let name = format!("{}{}", replaced_prefix(&planned.fingerprint), now_ms());
    match fs::rename(layout.artifact(&planned.fingerprint), layout.store().join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn replaced_prefix(fingerprint: &Fingerprint) -> String {
    format!("{REPLACED}{}-", fingerprint.short())
}

/// Returns what a person should know of forced nodes whose new result differs from the old one.
pub fn changed_results(selected: &Selected, store: &ArtifactStore) -> Vec<String> {
    let mut lines = Vec::new();
    for planned in selected.plan.nodes.iter().filter(|planned| selected.forced.contains(&planned.node.name)) {
        let folder = store.layout().store();
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let prefix = replaced_prefix(&planned.fingerprint);
        let Some(newest) = names.filter(|name| name.starts_with(&prefix)).max() else { continue };
        let old = fs::read(folder.join(&newest).join(MANIFEST_FILE)).ok();
        let old = old.and_then(|text| serde_json::from_slice::<Manifest>(&text).ok());
        let (Some(old), Ok(new)) = (old, store.manifest(&planned.fingerprint)) else { continue };
        let differing = new.files.iter().filter(|file| !old.files.contains(file)).map(|file| file.path.as_str());
        let differing: Vec<&str> = differing.collect();
        if let Some(first) = differing.first() {
            let node = &planned.node.name;
            lines.push(format!(
                "{node}: {} of the new result differ from the old one ({first}); what was made from the old one stays, \
                 --force makes it again; the old one is in {}",
                count(differing.len(), "file"),
                folder.join(&newest).display()
            ));
        }
    }
    lines
}

/// Returns the command line as a person wrote it, without what a detached child was given besides.
pub fn command_line(arguments: impl Iterator<Item = String>) -> Vec<String> {
    let mut command = Vec::new();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        if argument == DETACHED_FLAG {
            arguments.next();
            command.push("--detach".to_owned());
        } else {
            command.push(argument);
        }
    }
    command
}

/// Writes down what the run was made from; nothing starts before, so the two long files are written side by side.
fn save_plan(resolved: &Resolved, plan: &Plan, run_dir: &Path) -> Result<()> {
    let resolved_file = run_dir.join(RESOLVED_FILE);
    std::thread::scope(|scope| {
        let beside =
            scope.spawn(|| external::write_atomically_with(&resolved_file, |file| write_resolved(resolved, file)));
        write_plan(resolved, plan, std::env::current_dir().ok(), run_dir)?;
        RunIndex::of(plan).write(run_dir)?;
        Ok(beside.join().map_err(|_| io::Error::other("the resolved pipeline could not be written"))??)
    })
}

/// Writes the resolved pipeline as TOML, a node after the other: of ten thousand there is never a second copy.
fn write_resolved(resolved: &Resolved, file: &mut dyn io::Write) -> io::Result<()> {
    #[derive(serde::Serialize)]
    struct One<'a> {
        nodes: [&'a ResolvedNode; 1],
    }
    let head = Resolved { nodes: Vec::new(), sources: BTreeMap::new(), ..resolved.clone() };
    file.write_all(toml::to_string(&head).map_err(io::Error::other)?.as_bytes())?;
    for node in &resolved.nodes {
        let text = toml::to_string(&One { nodes: [node] }).map_err(io::Error::other)?;
        write!(file, "\n{text}")?;
    }
    Ok(())
}

/// Writes down what computes: the environment, and once the uncommitted changes of the checkout.
pub fn save_environment(captured: &Captured, run_dir: &Path) -> Result<()> {
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

/// Returns what the same plan gives again: the names of its nodes with their fingerprints, and what is forced.
pub fn plan_identity(resolved: &Resolved, selected: &Selected) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(resolved.name.as_bytes());
    for planned in &selected.plan.nodes {
        hasher.update(b"\n");
        hasher.update(planned.node.name.0.as_bytes());
        hasher.update(&planned.fingerprint.0);
    }
    for node in &selected.forced {
        hasher.update(b"\nforce ");
        hasher.update(node.0.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// Returns a name that sorts after those of all runs: the newest run is the last one by name, also when two start within
/// a second or the clock was set back.
fn new_run_name(layout: &Layout, pipeline: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' };
    let pipeline: String = pipeline.chars().map(plain).collect();
    let mut ms = now_ms();
    // A folder with another kind of name, or of a clock that was far ahead, is not waited for.
    let bound = stamp(ms + DAY_MS);
    let newest = runs::list(layout).into_iter().rfind(|name| *name < bound).unwrap_or_default();
    loop {
        let name = format!("{}-{pipeline}", stamp(ms));
        if name > newest && !layout.run(&name).exists() {
            return name;
        }
        ms += 1000;
    }
}

/// Returns what the scheduler must know of a node: what earlier processes and this run's earlier processes left of it.
pub fn entry(planned: &PlannedNode, layout: &Layout, host: &str, row: Option<&NodeRow>) -> Entry {
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
        inputs: node.inputs.values().chain(&node.needs).cloned().collect(),
        request: Request { shares: node.slots.clone(), ids: node.slot_ids.clone() },
        priority: node.priority,
        retries: node.retries,
        backoff: node.backoff,
        remedies: node.remedies,
        timeout_ms: node.timeout_s.map(milliseconds),
        stall_ms: node.stall_s.map(milliseconds),
        failures: row.map_or(0, |row| row.failures),
        applied: applied(planned, layout, &start),
        start,
    }
}

fn milliseconds(seconds: f64) -> u64 {
    // A cast saturates: an endless time is a very long one.
    (seconds * 1000.0) as u64
}

/// Returns what the newest attempt did differently, so that another process of the run need not learn it again.
fn applied(planned: &PlannedNode, layout: &Layout, start: &Start) -> JobRemedies {
    let attempt = match *start {
        Start::Fresh { next_attempt } if next_attempt > 1 => next_attempt - 1,
        Start::Alive { attempt } => attempt,
        _ => return JobRemedies::default(),
    };
    let folder = JobDir::new(&layout.jobs(), &planned.fingerprint).attempt(attempt);
    jobdir::job(&folder).map_or_else(|_| JobRemedies::default(), |job| job.remedies)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_run_sorts_after_every_other_though_they_start_in_one_second() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        let mut names = Vec::new();
        for pipeline in ["top", "main", "top", "a/b", "main"] {
            let name = new_run_name(&layout, pipeline);
            fs::create_dir_all(layout.run(&name)).unwrap();
            fs::write(layout.run(&name).join(crate::store::journal::JOURNAL_FILE), "x").unwrap();
            names.push(name);
        }
        assert_eq!(runs::list(&layout), names);
    }
}
