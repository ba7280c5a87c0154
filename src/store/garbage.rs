//! What lies in an artifacts folder, what of it is needed, and what may go: `deepgen gc`.
//!
//! Finding is reading; deciding is a pure function of what was found and the policy. Removing is left to the command.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use deepgen_contract::artifact::{MANIFEST_FILE, Manifest};
use deepgen_contract::id::Fingerprint;
use deepgen_contract::job::{CHECKPOINTS_DIR, OUT_DIR};
use serde::{Deserialize, Serialize};

use super::external::hash_file;
use super::layout::Layout;
use crate::exec::jobdir::JobDir;
use crate::run::board::Start;

/// Something that takes space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Thing {
    /// What it is.
    pub what: What,
    /// Where it lies.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Result that it is or leads to, unless it is left-over.
    pub fingerprint: Option<Fingerprint>,
    /// Node it belongs to, as far as known.
    pub node: String,
}

/// Kinds of things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A sealed result.
    Result,
    /// A checkpoint whose content verifies, of a node without a result; the newest of its node.
    LastGoodCheckpoint,
    /// Any other checkpoint of a node without a result.
    OlderCheckpoint,
    /// Checkpoints of a node whose result is sealed.
    SealedCheckpoints,
    /// Output of an attempt that another one followed.
    StaleOutput,
    /// Job descriptions, events and logs of a node.
    Job,
    /// A job whose worker runs, or whose result is ready for sealing.
    LiveJob,
    /// A result that did not verify or was computed again, a damaged state, a removal that was cut short.
    LeftOver,
}

impl What {
    /// Returns its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Result => "result",
            Self::LastGoodCheckpoint | Self::OlderCheckpoint => "checkpoint",
            Self::SealedCheckpoints => "checkpoints of a sealed node",
            Self::StaleOutput => "unsealed output",
            Self::Job => "job logs",
            Self::LiveJob => "job",
            Self::LeftOver => "left-over",
        }
    }
}

/// What a run needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunNeeds {
    /// Its name.
    pub run: String,
    /// True when a person said that it is kept.
    pub is_pinned: bool,
    /// Results of its plan.
    pub fingerprints: BTreeSet<Fingerprint>,
}

/// What is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// So many of the newest runs, beside the pinned ones.
    pub num_runs: usize,
    /// Older runs are given up until everything takes no more bytes than this.
    pub budget: Option<u64>,
}

/// What is done about a thing, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// False when it goes.
    pub keep: bool,
    /// For a person.
    pub why: String,
}

/// Decides about each thing; `runs` stand oldest first. The newest run is never given up for the budget.
pub fn decide(things: &[Thing], runs: &[RunNeeds], policy: Policy) -> Vec<Decision> {
    let mut num_runs = policy.num_runs.max(1);
    loop {
        let first_kept = runs.len().saturating_sub(num_runs);
        let kept: Vec<&RunNeeds> = runs
            .iter()
            .enumerate()
            .filter(|(at, run)| run.is_pinned || *at >= first_kept)
            .map(|(_, run)| run)
            .collect();
        let decisions: Vec<Decision> = things.iter().map(|thing| decide_one(thing, &kept)).collect();
        let bytes: u64 = things.iter().zip(&decisions).filter(|(_, is)| is.keep).map(|(thing, _)| thing.bytes).sum();
        if num_runs == 1 || policy.budget.is_none_or(|budget| bytes <= budget) {
            return decisions;
        }
        num_runs = num_runs.min(runs.len()) - 1;
        num_runs = num_runs.max(1);
    }
}

fn decide_one(thing: &Thing, kept: &[&RunNeeds]) -> Decision {
    let keep = |why: String| Decision { keep: true, why };
    let remove = |why: &str| Decision { keep: false, why: why.to_owned() };
    let needs = |run: &&&RunNeeds| thing.fingerprint.is_some_and(|fingerprint| run.fingerprints.contains(&fingerprint));
    // The newest run says most.
    let reader = kept.iter().rev().find(needs);
    match (thing.what, reader) {
        (What::LiveJob, _) => keep("its worker runs, or its result waits to be sealed".into()),
        (What::LastGoodCheckpoint, _) => keep("the last good checkpoint of an unfinished node".into()),
        (What::OlderCheckpoint, _) => remove("a newer checkpoint of its node is good"),
        (What::SealedCheckpoints, _) => remove("its result is sealed"),
        (What::StaleOutput, _) => remove("a later attempt took over"),
        (What::LeftOver, _) => remove("nothing refers to it"),
        (What::Result | What::Job, Some(run)) => {
            let pinned = if run.is_pinned { "pinned run" } else { "run" };
            keep(format!("{pinned} {} needs it", run.run))
        }
        (What::Result | What::Job, None) => remove("no kept run needs it"),
    }
}

/// Finds everything that takes space; `host` tells which workers can be seen.
pub fn find(layout: &Layout, host: &str) -> Vec<Thing> {
    let mut things = Vec::new();
    let left_over = |path: PathBuf| Thing {
        what: What::LeftOver,
        bytes: size(&path),
        path,
        fingerprint: None,
        node: String::new(),
    };
    let mut sealed: BTreeMap<Fingerprint, String> = BTreeMap::new();
    for path in entries(&layout.store()) {
        match name(&path).and_then(|name| Fingerprint::parse(name).ok()) {
            Some(fingerprint) => {
                let node = node_of(&path);
                sealed.insert(fingerprint, node.clone());
                let bytes = size(&path);
                things.push(Thing { what: What::Result, path, bytes, fingerprint: Some(fingerprint), node });
            }
            None => things.push(left_over(path)),
        }
    }
    let is_damaged = |path: &PathBuf| name(path).is_some_and(|name| name.contains(".damaged-"));
    things.extend(entries(&layout.state()).into_iter().filter(is_damaged).map(left_over));
    for folder in entries(&layout.jobs()) {
        if let Some(fingerprint) = name(&folder).and_then(|name| Fingerprint::parse(name).ok()) {
            let node = sealed.get(&fingerprint).cloned();
            find_in_job(layout, host, fingerprint, node, &mut things);
        }
    }
    things
}

/// Takes a job apart into checkpoints, unsealed outputs, and the rest.
fn find_in_job(
    layout: &Layout,
    host: &str,
    fingerprint: Fingerprint,
    sealed_node: Option<String>,
    things: &mut Vec<Thing>,
) {
    let dir = JobDir::new(&layout.jobs(), &fingerprint);
    let folder = layout.jobs().join(fingerprint.to_string());
    let node = sealed_node.clone().unwrap_or_else(|| node_of_job(&dir));
    let thing =
        |what, path: PathBuf, bytes| Thing { what, path, bytes, fingerprint: Some(fingerprint), node: node.clone() };
    if sealed_node.is_none() && !matches!(dir.start(host), Start::Fresh { .. }) {
        let bytes = size(&folder);
        return things.push(thing(What::LiveJob, folder, bytes));
    }
    let before = things.len();
    let attempts = dir.attempts();
    let mut has_good = false;
    for (at, attempt) in attempts.iter().enumerate() {
        let attempt = dir.attempt(*attempt);
        let checkpoints = attempt.join(CHECKPOINTS_DIR);
        if sealed_node.is_some() {
            if checkpoints.is_dir() {
                let bytes = size(&checkpoints);
                things.push(thing(What::SealedCheckpoints, checkpoints, bytes));
            }
        } else {
            let mut found = entries(&checkpoints);
            found.sort_by_key(|path| std::cmp::Reverse(step_of(path)));
            for path in found {
                let is_last_good = !has_good && is_good(&path);
                has_good |= is_last_good;
                // What is newer than the last good one and does not verify is of no use either.
                let what = if is_last_good { What::LastGoodCheckpoint } else { What::OlderCheckpoint };
                let bytes = size(&path);
                things.push(thing(what, path, bytes));
            }
        }
        let out = attempt.join(OUT_DIR);
        if at > 0 && out.is_dir() {
            let bytes = size(&out);
            things.push(thing(What::StaleOutput, out, bytes));
        }
    }
    let own: u64 = things[before..].iter().map(|thing| thing.bytes).sum();
    // Without a good checkpoint the others are all there is; a person may still make something of them.
    if !has_good {
        things[before..].iter_mut().for_each(|thing| {
            if thing.what == What::OlderCheckpoint {
                thing.what = What::LastGoodCheckpoint;
            }
        });
    }
    let keeps_some = things[before..].iter().any(|thing| thing.what == What::LastGoodCheckpoint);
    let what = if keeps_some { What::LastGoodCheckpoint } else { What::Job };
    let bytes = size(&folder).saturating_sub(own);
    things.push(thing(what, folder, bytes));
}

/// What a checkpoint says of itself, as far as it concerns its being whole.
#[derive(Deserialize)]
struct Whole {
    tensors_blake3: Option<String>,
}

/// Returns true when a checkpoint has its name by rename and its tensors have the recorded hash.
fn is_good(path: &Path) -> bool {
    if name(path).is_none_or(|name| name.ends_with(".partial")) {
        return false;
    }
    let state = fs::read(path.join("state.json")).ok();
    match state.and_then(|text| serde_json::from_slice::<Whole>(&text).ok()) {
        Some(Whole { tensors_blake3: Some(hash) }) => {
            hash_file(&path.join("tensors.safetensors")).is_ok_and(|found| found == hash)
        }
        Some(Whole { tensors_blake3: None }) => true,
        None => false,
    }
}

/// Returns the step in a checkpoint's name, such as `step-120`.
fn step_of(path: &Path) -> u64 {
    let digits = name(path).unwrap_or_default().chars().filter(char::is_ascii_digit);
    digits.collect::<String>().parse().unwrap_or(0)
}

fn node_of(artifact: &Path) -> String {
    let manifest = fs::read(artifact.join(MANIFEST_FILE)).ok();
    let manifest = manifest.and_then(|text| serde_json::from_slice::<Manifest>(&text).ok());
    manifest.map_or(String::new(), |manifest| manifest.node.0)
}

/// The one word of a job's description that is wanted here.
#[derive(Deserialize)]
struct OfNode {
    node: String,
}

fn node_of_job(dir: &JobDir) -> String {
    let newest = dir.attempts().first().map(|attempt| dir.attempt(*attempt).join(deepgen_contract::job::JOB_FILE));
    let text = newest.and_then(|path| fs::read(path).ok());
    text.and_then(|text| serde_json::from_slice::<OfNode>(&text).ok()).map_or(String::new(), |job| job.node)
}

fn name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// Returns the bytes of everything below a path; links are not followed.
pub fn size(path: &Path) -> u64 {
    let Ok(metadata) = path.symlink_metadata() else { return 0 };
    if metadata.is_dir() { entries(path).iter().map(|path| size(path)).sum() } else { metadata.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(byte: u8) -> Fingerprint {
        Fingerprint([byte; 32])
    }

    fn thing(what: What, byte: u8, bytes: u64) -> Thing {
        Thing { what, path: PathBuf::new(), bytes, fingerprint: Some(print(byte)), node: String::new() }
    }

    fn run(name: &str, needs: &[u8], is_pinned: bool) -> RunNeeds {
        RunNeeds { run: name.into(), is_pinned, fingerprints: needs.iter().map(|byte| print(*byte)).collect() }
    }

    /// Tells which of the results 1 to 4 are kept.
    fn kept(runs: &[RunNeeds], policy: Policy) -> Vec<u8> {
        let things: Vec<Thing> = (1..=4).map(|byte| thing(What::Result, byte, 10)).collect();
        let decisions = decide(&things, runs, policy);
        (1..=4).filter(|byte| decisions[usize::from(*byte) - 1].keep).collect()
    }

    #[test]
    fn results_of_the_newest_and_of_pinned_runs_are_kept() {
        let runs = [run("a", &[1], true), run("b", &[2, 3], false), run("c", &[3, 4], false)];
        assert_eq!(kept(&runs, Policy { num_runs: 9, budget: None }), [1, 2, 3, 4]);
        assert_eq!(kept(&runs, Policy { num_runs: 1, budget: None }), [1, 3, 4]);
        assert_eq!(kept(&[], Policy { num_runs: 1, budget: None }), Vec::<u8>::new());
    }

    #[test]
    fn a_budget_gives_up_old_runs_and_never_the_newest_or_a_pinned_one() {
        let runs = [run("a", &[1], false), run("b", &[2, 3], false), run("c", &[3, 4], false)];
        assert_eq!(kept(&runs, Policy { num_runs: 9, budget: Some(40) }), [1, 2, 3, 4]);
        assert_eq!(kept(&runs, Policy { num_runs: 9, budget: Some(30) }), [2, 3, 4]);
        assert_eq!(kept(&runs, Policy { num_runs: 9, budget: Some(5) }), [3, 4]);
        let runs = [run("a", &[1], true), run("b", &[2, 3], false), run("c", &[3, 4], false)];
        assert_eq!(kept(&runs, Policy { num_runs: 9, budget: Some(5) }), [1, 3, 4]);
    }

    #[test]
    fn the_last_good_checkpoint_stays_whatever_the_runs_and_the_budget() {
        let things =
            [thing(What::LastGoodCheckpoint, 1, 99), thing(What::OlderCheckpoint, 1, 9), thing(What::Job, 2, 1)];
        let decisions = decide(&things, &[], Policy { num_runs: 1, budget: Some(0) });
        assert_eq!(decisions.iter().map(|is| is.keep).collect::<Vec<_>>(), [true, false, false]);
    }

    #[test]
    fn a_newer_checkpoint_that_does_not_verify_does_not_count_as_the_last_good_one() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        let attempt = |attempt: u32| JobDir::new(&layout.jobs(), &print(1)).attempt(attempt).join(CHECKPOINTS_DIR);
        let checkpoint = |folder: PathBuf, tensors: &str, hash_of: &str| {
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("tensors.safetensors"), tensors).unwrap();
            let hash = blake3::hash(hash_of.as_bytes()).to_hex().to_string();
            fs::write(folder.join("state.json"), format!("{{\"step\":1,\"tensors_blake3\":\"{hash}\"}}")).unwrap();
        };
        checkpoint(attempt(1).join("step-9"), "good", "good");
        checkpoint(attempt(1).join("step-10"), "good", "good");
        checkpoint(attempt(2).join("step-20"), "torn", "whole");
        let things = find(&layout, "here");
        let of = |what| -> Vec<String> {
            let own = things.iter().filter(|thing| thing.what == what && thing.path.ends_with("step-10"));
            own.map(|thing| name(&thing.path).unwrap().to_owned()).collect()
        };
        assert_eq!(of(What::LastGoodCheckpoint), ["step-10"]);
        assert_eq!(things.iter().filter(|thing| thing.what == What::OlderCheckpoint).count(), 2);
    }
}
