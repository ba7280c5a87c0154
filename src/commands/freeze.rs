//! `deepgen freeze RUN`: one archive of all that a reader needs to follow a run and to make it again.
//!
//! It unpacks into a project of its own: pipeline, stages and experiment as they were, the run with plan, journal and
//! report, the manifests of its results, and with `--with-weights` the results themselves.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use deepgen_contract::artifact::MANIFEST_FILE;
use flate2::Compression;
use flate2::write::GzEncoder;

use super::artifacts_layout;
use super::reproduce::{Recipe, recipe};
use super::status::choose_run;
use crate::cli::{Exit, Wrong};
use crate::compare::RunFacts;
use crate::progress::format::{bytes, count, utc};
use crate::spec::BUILT_IN;
use crate::store::ArtifactStore;
use crate::store::journal::sync_parent;

/// External files of a project that go into the archive, in all; larger ones are named in its README.
const MAX_INPUT_BYTES: u64 = 32 << 20;

/// Arguments of `deepgen freeze`.
#[derive(Debug, clap::Args)]
pub struct FreezeArgs {
    /// Name of a run [default: the newest]
    pub run: Option<String>,
    /// The archive [default: RUN.tar.gz here]
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Put the results themselves into it: weights, images, scores
    #[arg(long)]
    pub with_weights: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// Writes the archive and prints its path.
///
/// # Errors
/// When there is no such run, it cannot be read, or the archive cannot be written.
pub fn freeze(args: &FreezeArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let run = choose_run(&layout, args.run.as_deref())?;
    let store = ArtifactStore::open(layout);
    let facts = RunFacts::read(&store, &run)?;
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("{run}.tar.gz")));
    let out = std::path::absolute(&out).unwrap_or(out);
    if !out.to_string_lossy().ends_with(".tar.gz") && !out.to_string_lossy().ends_with(".tgz") {
        return Err(Wrong(format!("{}: the archive is a .tar.gz file", out.display())).into());
    }
    let told =
        write(&facts, &store, &out, args.with_weights).with_context(|| format!("cannot write {}", out.display()))?;
    told.iter().for_each(|note| eprintln!("note: {note}"));
    println!("{}", out.display());
    Ok(Exit::Done)
}

/// Writes under another name first, so that a broken archive never has the right one.
fn write(facts: &RunFacts, store: &ArtifactStore, out: &Path, with_weights: bool) -> Result<Vec<String>> {
    let folder = out.parent().context("the archive needs a folder")?;
    fs::create_dir_all(folder)?;
    let file = tempfile::Builder::new().prefix(".freeze-").tempfile_in(folder)?;
    let mut archive = Archive {
        tar: tar::Builder::new(GzEncoder::new(io::BufWriter::new(file.as_file().try_clone()?), Compression::default())),
        top: PathBuf::from(&facts.name),
        // One time for everything: the same run gives the same archive.
        seconds: facts.view.started_ms / 1000,
    };
    let notes = fill(&mut archive, facts, store, with_weights)?;
    let mut inner = archive.tar.into_inner()?.finish()?;
    inner.flush()?;
    file.as_file().sync_all()?;
    file.persist(out)?;
    sync_parent(out)?;
    Ok(notes)
}

/// Adds everything and returns what a reader must know.
fn fill(archive: &mut Archive, facts: &RunFacts, store: &ArtifactStore, with_weights: bool) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    project(archive, facts, &mut notes)?;
    let run_dir = store.layout().run(&facts.name);
    for entry in fs::read_dir(&run_dir)? {
        let path = entry?.path();
        // Links to results point out of the archive; `nodes/` has nothing else.
        if path.is_file() {
            let name = path.file_name().context("an entry has a name")?;
            archive.file(&Path::new("artifacts/runs").join(&facts.name).join(name), &path)?;
        }
    }
    let accepted = store.layout().accepted();
    for planned in &facts.saved.plan.nodes {
        let folder = store.path(&planned.fingerprint);
        let name = planned.node.name.0.replace('/', "_");
        match facts.manifests.get(&planned.node.name) {
            None => notes.push(format!("{} has no sealed result", planned.node.name)),
            Some(_) if !with_weights => {
                archive.file(&Path::new("manifests").join(format!("{name}.json")), &folder.join(MANIFEST_FILE))?;
            }
            Some(manifest) => {
                let target = Path::new("artifacts/store").join(planned.fingerprint.to_string());
                for file in &manifest.files {
                    archive.file(&target.join(&file.path), &folder.join(&file.path))?;
                }
                archive.file(&target.join(MANIFEST_FILE), &folder.join(MANIFEST_FILE))?;
            }
        }
        if let Some(own) = &planned.stands_for {
            let record = accepted.join(format!("{own}.json"));
            archive.file_if_there(&Path::new("artifacts/accepted").join(format!("{own}.json")), &record)?;
        }
    }
    let readme = readme(facts, &recipe(facts, store), with_weights, &notes);
    archive.text("README.md", &readme)?;
    Ok(notes)
}

/// Adds pipeline, stages, experiment and small inputs, in their places.
fn project(archive: &mut Archive, facts: &RunFacts, notes: &mut Vec<String>) -> Result<()> {
    if facts.saved.sources.is_empty() {
        notes.push(
            "the run was made by a program that did not keep the pipeline's files; take them from the checkout".into(),
        );
    }
    for (name, text) in &facts.saved.sources {
        // A built-in stage file lies where it would be on disk.
        match inside(name.strip_prefix(BUILT_IN).unwrap_or(name)) {
            Some(path) => archive.text(path, text)?,
            None => notes.push(format!("{name} lies outside the project and is not included")),
        }
    }
    let Some(root) = &facts.saved.root else { return Ok(()) };
    let references = root.join("experiments/reference");
    if facts.saved.sweep.is_some() && references.is_dir() {
        archive.folder(Path::new("experiments/reference"), &references)?;
    }
    let mut room = MAX_INPUT_BYTES;
    let mut seen = std::collections::BTreeSet::new();
    for planned in &facts.saved.plan.nodes {
        for external in planned.node.typed().map_or_else(Vec::new, |settings| settings.external_paths()) {
            if !seen.insert(external.path.clone()) {
                continue;
            }
            let source = root.join(&external.path);
            let size = size(&source).unwrap_or(u64::MAX);
            match inside(&external.path) {
                Some(path) if size <= room => {
                    room -= size;
                    archive.any(Path::new(path), &source)?;
                }
                _ => notes.push(format!("{}, which {} reads, is not included", external.path, planned.node.name)),
            }
        }
    }
    Ok(())
}

/// Returns a path that stays inside the project.
fn inside(name: &str) -> Option<&str> {
    let is_plain = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    (!name.is_empty() && Path::new(name).components().all(is_plain)).then_some(name)
}

/// Returns the bytes of a file, or of all files in a folder.
fn size(path: &Path) -> io::Result<u64> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    fs::read_dir(path)?.map(|entry| size(&entry?.path())).sum()
}

struct Archive {
    tar: tar::Builder<GzEncoder<io::BufWriter<File>>>,
    top: PathBuf,
    seconds: u64,
}

impl Archive {
    fn header(&self, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_mtime(self.seconds);
        header
    }

    fn text(&mut self, path: impl AsRef<Path>, text: &str) -> io::Result<()> {
        let mut header = self.header(text.len() as u64);
        self.tar.append_data(&mut header, self.top.join(path), text.as_bytes())
    }

    fn file(&mut self, path: &Path, source: &Path) -> io::Result<()> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", source.display()));
        let file = File::open(source).map_err(named)?;
        // A journal may grow meanwhile: as much as it has now.
        let size = file.metadata().map_err(named)?.len();
        let mut header = self.header(size);
        self.tar.append_data(&mut header, self.top.join(path), io::Read::take(file, size)).map_err(named)
    }

    fn file_if_there(&mut self, path: &Path, source: &Path) -> io::Result<()> {
        if source.is_file() { self.file(path, source) } else { Ok(()) }
    }

    fn folder(&mut self, path: &Path, source: &Path) -> io::Result<()> {
        let mut entries: Vec<PathBuf> =
            fs::read_dir(source)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
        entries.sort();
        for entry in entries {
            self.any(&path.join(entry.file_name().unwrap_or_default()), &entry)?;
        }
        Ok(())
    }

    fn any(&mut self, path: &Path, source: &Path) -> io::Result<()> {
        if source.is_dir() { self.folder(path, source) } else { self.file(path, source) }
    }
}

fn readme(facts: &RunFacts, recipe: &Recipe, with_weights: bool, notes: &[String]) -> String {
    let saved = &facts.saved;
    let file = saved.root.as_deref().zip(saved.file.as_deref());
    let file = file.and_then(|(root, file)| file.strip_prefix(root).ok()).unwrap_or(Path::new("pipelines"));
    let command = if saved.sweep.is_some() { "sweep" } else { "run" };
    let options = recipe.options();
    let total: u64 = facts.manifests.values().flat_map(|made| &made.files).map(|file| file.bytes).sum();
    let results = if with_weights {
        "`artifacts/store` holds the results themselves, so `deepgen plan` finds them cached.".to_owned()
    } else {
        format!(
            "`manifests/` describes the results, {} in all, which are not included (`--with-weights` does).",
            bytes(total)
        )
    };
    let notes: String = match notes {
        [] => String::new(),
        notes => format!("\nNot included:\n\n{}", notes.iter().map(|note| format!("- {note}\n")).collect::<String>()),
    };
    format!(
        "# Run {name}\n\n\
         {pipeline}, profile {profile}, seed {seed}: {num}, started {started}.\n\n\
         - `artifacts/runs/{name}/report.html`: the report; open it in a browser.\n\
         - `artifacts/runs/{name}/plan.json`, `resolved.toml`: every node with its resolved settings and fingerprint.\n\
         - `artifacts/runs/{name}/journal.jsonl`: what happened.\n\
         - `artifacts/runs/{name}/environment.json`, `changes-*.diff`: machine, programs, and what the checkout held beyond its commit.\n\
         - `pipelines/`, `stages/`, `experiments/`: the files that the run was planned from, as they were.\n\
         - {results}\n\n\
         ## Run it again\n\n\
         Here, from this folder, with a `deepgen` of that commit:\n\n\
         ```\ndeepgen plan {file}{options}\ndeepgen {command} {file}{options}\n```\n\n\
         As it was given:\n\n```\n{original}```\n{notes}",
        name = facts.name,
        pipeline = saved.pipeline,
        profile = saved.profile,
        seed = saved.seed,
        num = count(saved.plan.nodes.len(), "node"),
        started = utc(facts.view.started_ms),
        file = file.display(),
        original = recipe.commands(),
    )
}
