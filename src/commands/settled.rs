//! Plans that were found settled, every result sealed, remembered with all that they were decided from.
//!
//! The same question about the same files is then looked up and not decided again, which for ten thousand nodes is the
//! difference between reading and thinking. What was decided from is compared by content: the texts of the files, the
//! names of the stage files, declared variables, external content, what people accepted, this program, and last that
//! every result still verifies. Whatever differs, or is missing, means that the plan is made in the ordinary way.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use deepgen_contract::id::Fingerprint;
use serde::{Deserialize, Serialize};

use super::Overriding;
use super::opening::plan_identity;
use super::selection::{Selected, Selection};
use crate::plan::{Costs, ExternalFiles, Known, PlannedNode, Verdict, render};
use crate::spec::{self, BUILT_IN, PAPER_PROFILE, Resolved};
use crate::store::external::{Stamp, write_memory};
use crate::store::{ArtifactStore, FileHashes, Layout};

const SETTLED_VERSION: u32 = 1;
/// Folder of the remembered plans in the state folder.
const SETTLED_DIR: &str = "settled";
/// Remembered plans that are kept, the newest.
const MAX_KEPT: usize = 16;

/// blake3 of each file that was read, by its name in the project.
pub type Hashes = BTreeMap<String, String>;

/// Returns the hashes of the files that a pipeline was read from; what is built in counts as part of the program.
pub fn source_hashes(resolved: &Resolved) -> Hashes {
    let files = resolved.sources.iter().filter(|(name, _)| !name.starts_with(BUILT_IN));
    files.map(|(name, text)| (name.clone(), blake3::hash(text.as_bytes()).to_hex().to_string())).collect()
}

/// What was asked for: the same words get the same answer as long as nothing has changed.
#[derive(Debug, Clone)]
pub struct Question {
    root: PathBuf,
    key: String,
}

/// A settled plan and what it was decided from.
#[derive(Debug, Serialize, Deserialize)]
pub struct Settled {
    version: u32,
    /// Name of the pipeline or experiment.
    pub name: String,
    /// Identity of the plan, as runs record it.
    pub identity: String,
    /// The plan for people; nothing for the paper's profile, whose plan also shows sizes.
    pub text: Option<String>,
    /// Number of nodes.
    pub num_nodes: usize,
    /// Seconds that the results took when they were made.
    pub saved_seconds: f64,
    program: Stamp,
    sources: Hashes,
    stage_files: Vec<String>,
    variables: BTreeMap<String, Option<String>>,
    external: BTreeMap<String, String>,
    accepted: BTreeMap<String, Stamp>,
    results: BTreeSet<Fingerprint>,
}

impl Question {
    /// Returns the question about a file; nothing when it lies in no readable folder.
    pub fn new(file: &Path, overriding: &Overriding, selection: &Selection, is_sweep: bool) -> Option<Self> {
        let root = spec::root_around(file)?;
        let file = std::path::absolute(file).ok()?;
        let words = format!("{}\0{overriding:?}\0{selection:?}\0{is_sweep}", file.display());
        Some(Self { root, key: blake3::hash(words.as_bytes()).to_hex()[..32].to_owned() })
    }

    /// Returns the project's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, layout: &Layout) -> PathBuf {
        layout.state().join(SETTLED_DIR).join(format!("{}.json", self.key))
    }

    /// Returns the remembered answer, if everything that it was decided from is as it was.
    pub fn look_up(&self, store: &ArtifactStore, hashes: &FileHashes) -> Option<Settled> {
        let text = fs::read(self.path(store.layout())).ok()?;
        let settled: Settled = serde_json::from_slice(&text).ok()?;
        let variables = || settled.variables.iter().all(|(name, value)| std::env::var(name).ok() == *value);
        let external = || settled.external.iter().all(|(path, hash)| hashes.content_hash(path).as_ref() == Some(hash));
        let is_same = settled.version == SETTLED_VERSION
            && program().is_some_and(|program| program == settled.program)
            && settled.sources.iter().all(|(name, hash)| source_hash(&self.root, name).as_ref() == Some(hash))
            && spec::stage_files(&self.root) == settled.stage_files
            && variables()
            && accepted(store.layout()) == settled.accepted
            && external()
            && settled.results.iter().all(|fingerprint| store.is_sealed(fingerprint));
        is_same.then_some(settled)
    }

    /// Remembers a plan made from the files of `sources`, all of whose results are sealed by now, which its nodes then say. One
    /// that cannot be written is decided again next time.
    pub fn remember(&self, resolved: &Resolved, sources: Hashes, selected: &mut Selected, store: &ArtifactStore) {
        if !selected.forced.is_empty() {
            return;
        }
        selected.plan.nodes.iter_mut().for_each(|planned| planned.verdict = Verdict::Cached);
        let Some(settled) = self.settled(resolved, sources, selected, store) else { return };
        let path = self.path(store.layout());
        let write = || {
            if let Some(folder) = path.parent() {
                forget_oldest(folder)?;
            }
            write_memory(&path, |file| Ok(serde_json::to_writer(file, &settled)?))
        };
        if let Err(error) = write() {
            tracing::debug!(%error, "the settled plan is not remembered");
        }
    }

    fn settled(
        &self,
        resolved: &Resolved,
        sources: Hashes,
        selected: &Selected,
        store: &ArtifactStore,
    ) -> Option<Settled> {
        let plan = &selected.plan;
        let mut external: BTreeMap<String, String> = BTreeMap::new();
        for planned in &plan.nodes {
            for path in planned.node.settings.external_paths() {
                external.insert(path.path, planned.content.get(&path.key)?.clone());
            }
        }
        let seconds = |planned: &PlannedNode| store.result(&planned.fingerprint).map_or(0.0, |made| made.run_seconds);
        let is_paper = resolved.profile == PAPER_PROFILE;
        let text = (!is_paper).then(|| render::plan(resolved, plan, &Costs::default(), &BTreeMap::new()));
        Some(Settled {
            version: SETTLED_VERSION,
            name: resolved.name.clone(),
            identity: plan_identity(resolved, selected),
            text,
            num_nodes: plan.nodes.len(),
            saved_seconds: plan.nodes.iter().map(seconds).sum(),
            program: program()?,
            sources,
            stage_files: spec::stage_files(&self.root),
            variables: resolved.env.keys().map(|name| (name.clone(), std::env::var(name).ok())).collect(),
            external,
            accepted: accepted(store.layout()),
            results: plan.nodes.iter().map(|planned| planned.fingerprint).collect(),
        })
    }
}

/// Returns the stamp of this program: what is built into it counts too.
fn program() -> Option<Stamp> {
    Some(Stamp::of(&fs::metadata(std::env::current_exe().ok()?).ok()?))
}

fn source_hash(root: &Path, name: &str) -> Option<String> {
    Some(blake3::hash(&fs::read(root.join(name)).ok()?).to_hex().to_string())
}

fn accepted(layout: &Layout) -> BTreeMap<String, Stamp> {
    let entries = fs::read_dir(layout.accepted()).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, Stamp::of(&entry.metadata().ok()?))))
        .collect()
}

/// Makes room for one more.
fn forget_oldest(folder: &Path) -> io::Result<()> {
    let mut kept: Vec<_> = match fs::read_dir(folder) {
        Ok(entries) => {
            entries.flatten().filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path()))).collect()
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    kept.sort();
    let num_over = (kept.len() + 1).saturating_sub(MAX_KEPT);
    kept.into_iter().take(num_over).try_for_each(|(_, path)| fs::remove_file(path))
}
