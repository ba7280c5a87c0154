//! From a source to a prepared data set: every record is read and decoded once; what cannot be used is set aside with
//! its reason, and the run goes on.
//!
//! Records are checked by several threads and written in the order of the source, so the result does not depend on
//! their number. Departure from the release, which replaces a bad record by a random one while it trains.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use deepgen_contract::data::{FilterSettings, PrepareSettings, SourceSettings};
use deepgen_contract::shapes::SourceFormat;
use thiserror::Error;

use crate::atomic::{self, AtomicFile};
use crate::dataset::{DATASET_FILE, DATASET_VERSION, DatasetFile, INDEX_FILE, OFFSETS_FILE, QUARANTINE_FILE};
use crate::json_list::{self, ListForm};
use crate::prompts;
use crate::sample::SetKind;
use crate::shapes::{ShapesError, write_source};
use crate::source::{Broken, Found, Location, Record, ScanError, Visit, decode_at, read_bytes};
use crate::tar_shards::Shards;

/// Folder inside the data set that holds what was generated for it.
const GENERATED_DIR: &str = "source";
/// Records checked together by all threads.
const CHUNK: usize = 512;
/// Reasons that the summary repeats.
const NUM_EXAMPLES: usize = 5;

/// Where and how a data set is prepared.
#[derive(Debug, Clone)]
pub struct PreparePlace<'a> {
    /// Seed of generated sources.
    pub seed: u64,
    /// Folder that relative paths in the settings start from.
    pub project_root: &'a Path,
    /// Folder that receives the data set.
    pub out_dir: &'a Path,
    /// Threads that check records.
    pub num_threads: usize,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct PreparedSummary {
    /// `dataset.json` as written.
    pub dataset: DatasetFile,
    /// The first records that were set aside; all are in `quarantine.jsonl`.
    pub examples: Vec<Broken>,
}

/// Why a data set could not be prepared.
#[derive(Debug, Error)]
pub enum PrepareError {
    /// The source cannot be read at all.
    #[error("the source cannot be read: {0}")]
    Scan(#[from] ScanError),
    /// The source could not be generated.
    #[error("the source cannot be generated: {0}")]
    Shapes(#[from] ShapesError),
    /// The result cannot be written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The result has no JSON form.
    #[error("the index cannot be written: {0}")]
    Json(#[from] serde_json::Error),
    /// Not one record is good.
    #[error("none of {num_seen} records can be used; the first: {first}")]
    NothingLeft {
        /// Records there are.
        num_seen: u64,
        /// What is wrong with the first.
        first: String,
    },
    /// The caller asked to stop.
    #[error("stopped after {num_seen} records")]
    Stopped {
        /// Records seen.
        num_seen: u64,
    },
}

/// Reads, checks and indexes a source; `progress` gets the number of records seen and returns false to stop.
///
/// # Errors
/// When the source cannot be read at all, holds no good record, or the result cannot be written.
pub fn prepare(
    settings: &PrepareSettings,
    place: &PreparePlace<'_>,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<PreparedSummary, PrepareError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| PrepareError::Io { path, source }
    };
    std::fs::create_dir_all(place.out_dir).map_err(io(place.out_dir))?;
    let reader = Reader::open(&settings.source, place)?;
    let check =
        Check { roots: &reader.roots, kind: reader.kind, filters: reader.filtered.then_some(&settings.filters) };
    let mut output = Output::create(place.out_dir, settings.dedupe)?;
    let mut chunk = Vec::with_capacity(CHUNK);
    let mut outcome = Ok(());
    let mut num_seen = 0;
    let mut write_chunk = |chunk: &mut Vec<Found>| {
        num_seen += chunk.len() as u64;
        let checked = check.all(std::mem::take(chunk), place.num_threads);
        checked.into_iter().try_for_each(|checked| output.add(checked))?;
        match progress(num_seen) {
            true => Ok(()),
            false => Err(PrepareError::Stopped { num_seen }),
        }
    };
    reader.scan(&mut |found| {
        chunk.push(found);
        if chunk.len() == CHUNK {
            outcome = write_chunk(&mut chunk);
        }
        outcome.is_ok()
    })?;
    outcome?;
    write_chunk(&mut chunk)?;
    if output.num_samples() == 0 {
        let first = output
            .examples
            .first()
            .map_or_else(|| "the source is empty".to_owned(), |broken| format!("{}: {}", broken.key, broken.reason));
        return Err(PrepareError::NothingLeft { num_seen, first });
    }
    let dataset = DatasetFile {
        version: DATASET_VERSION,
        kind: reader.kind,
        format: settings.source.name().to_owned(),
        roots: reader.roots.iter().map(|root| stored_root(root, place.out_dir)).collect(),
        num_samples: output.num_samples(),
        num_quarantined: output.num_quarantined,
        num_duplicates: output.num_duplicates,
        nominal_size: settings.nominal_size,
    };
    let examples = output.finish()?;
    let path = place.out_dir.join(DATASET_FILE);
    atomic::write(&path, &serde_json::to_vec_pretty(&dataset)?).map_err(io(&path))?;
    Ok(PreparedSummary { dataset, examples })
}

/// Returns a root as it is stored: relative to the data set when inside it, so that the set can be moved.
fn stored_root(root: &Path, out_dir: &Path) -> String {
    let out_dir = std::path::absolute(out_dir).unwrap_or_else(|_| out_dir.to_owned());
    root.strip_prefix(&out_dir).unwrap_or(root).to_string_lossy().into_owned()
}

/// A source with its paths resolved.
struct Reader {
    kind: SetKind,
    roots: Vec<PathBuf>,
    filtered: bool,
    form: Form,
}

enum Form {
    List { index: PathBuf, form: ListForm },
    Tar { shards: Shards, caption_key: String },
    Prompts { path: PathBuf },
}

impl Reader {
    fn open(source: &SourceSettings, place: &PreparePlace<'_>) -> Result<Self, PrepareError> {
        // Absolute: the data set is read by programs started elsewhere.
        let at = |path: &str| {
            let path = place.project_root.join(path);
            std::path::absolute(&path).map_err(|source| PrepareError::Io { path, source })
        };
        let list = |kind, index: &str, images: &str, form| {
            let filtered = matches!(form, ListForm::Caption { .. });
            Ok(Self { kind, roots: vec![at(images)?], filtered, form: Form::List { index: at(index)?, form } })
        };
        match source {
            SourceSettings::Shapes { shapes } => {
                let dir = place.out_dir.join(GENERATED_DIR);
                let dir = std::path::absolute(&dir).map_err(|source| PrepareError::Io { path: dir, source })?;
                let written = write_source(shapes, place.seed, &dir)?;
                let text = |path: &Path| path.to_string_lossy().into_owned();
                let (index, images) = (text(&written.index), text(&written.image_root));
                let caption_key = "caption".to_owned();
                let generated = match written.format {
                    SourceFormat::Tar => SourceSettings::Tar { shards: index, caption_key },
                    SourceFormat::CaptionList => {
                        let captions = text(&written.annotation_root);
                        SourceSettings::CaptionList { index, images, captions, caption_key }
                    }
                    SourceFormat::Blip3o => SourceSettings::Blip3o { index, images },
                    SourceFormat::EditList => SourceSettings::EditList { index, images, max_references: 1 },
                    SourceFormat::QaList => SourceSettings::QaList { index, images },
                    SourceFormat::Prompts => SourceSettings::Prompts { path: index },
                };
                Self::open(&generated, place)
            }
            SourceSettings::CaptionList { index, images, captions, caption_key } => {
                let form = ListForm::Caption { captions: at(captions)?, caption_key: caption_key.clone() };
                list(SetKind::Generation, index, images, form)
            }
            SourceSettings::Blip3o { index, images } => list(SetKind::Generation, index, images, ListForm::Blip3o),
            SourceSettings::EditList { index, images, max_references } => {
                list(SetKind::Edit, index, images, ListForm::Edit { max_references: *max_references })
            }
            SourceSettings::QaList { index, images } => list(SetKind::Questions, index, images, ListForm::Qa),
            SourceSettings::Tar { shards, caption_key } => {
                let shards = Shards::find(&at(shards)?)?;
                let roots = vec![shards.folder.clone()];
                let form = Form::Tar { shards, caption_key: caption_key.clone() };
                Ok(Self { kind: SetKind::Generation, roots, filtered: true, form })
            }
            SourceSettings::Prompts { path } => {
                let form = Form::Prompts { path: at(path)? };
                Ok(Self { kind: SetKind::Prompts, roots: Vec::new(), filtered: false, form })
            }
        }
    }

    fn scan(&self, visit: &mut Visit<'_>) -> Result<(), ScanError> {
        match &self.form {
            Form::List { index, form } => json_list::scan(index, &self.roots[0], form, visit),
            Form::Tar { shards, caption_key } => shards.scan(caption_key, visit),
            Form::Prompts { path } => prompts::scan(path, visit),
        }
    }
}

/// A good record with a hash of its text and images.
type Checked = Result<(Record, [u8; 16]), Broken>;

/// What makes a record good.
struct Check<'a> {
    roots: &'a [PathBuf],
    kind: SetKind,
    filters: Option<&'a FilterSettings>,
}

impl Check<'_> {
    /// Checks a chunk, keeping its order.
    fn all(&self, chunk: Vec<Found>, num_threads: usize) -> Vec<Checked> {
        let size = chunk.len().div_ceil(num_threads.max(1)).max(1);
        let mut chunk = chunk.into_iter();
        let mut parts = Vec::new();
        loop {
            let part: Vec<_> = chunk.by_ref().take(size).collect();
            if part.is_empty() {
                break;
            }
            parts.push(part);
        }
        let check = |part: Vec<Found>| part.into_iter().map(|found| self.one(found)).collect::<Vec<_>>();
        std::thread::scope(|scope| {
            let threads: Vec<_> = parts.into_iter().map(|part| scope.spawn(move || check(part))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Vec<Checked>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().flat_map(join).collect()
        })
    }

    fn one(&self, found: Found) -> Checked {
        let record = found?;
        match self.hash(&record) {
            Ok(hash) => Ok((record, hash)),
            Err(reason) => Err(Broken { key: record.key, reason }),
        }
    }

    /// Returns the hash of a good record, or what is wrong with it.
    fn hash(&self, record: &Record) -> Result<[u8; 16], String> {
        if record.text.trim().is_empty() {
            return Err("its text is empty".into());
        }
        let mut hasher = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            // Lengths keep `ab`, `c` apart from `a`, `bc`.
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(record.text.as_bytes());
        part(record.answer.as_deref().unwrap_or_default().as_bytes());
        let mut image = |location: &Location| {
            let bytes = read_bytes(self.roots, location, &record.key).map_err(|error| error.to_string())?;
            part(&bytes);
            decode_at(self.roots, location, &record.key, &bytes).map_err(|error| error.to_string())
        };
        match (&record.image, self.kind) {
            (None, SetKind::Prompts) => {}
            (None, _) => return Err("it has no image".into()),
            (Some(location), _) => {
                let (width, height) = image(location)?.dimensions();
                if let Some(filters) = self.filters {
                    within(width, height, filters)?;
                }
            }
        }
        for location in &record.references {
            image(location)?;
        }
        let mut hash = [0; 16];
        hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Ok(hash)
    }
}

/// Applies the size limits of the release; all of them are strict.
fn within(width: u32, height: u32, filters: &FilterSettings) -> Result<(), String> {
    if width.min(height) <= filters.min_side {
        return Err(format!("{width}x{height}: both sides must exceed {} pixels", filters.min_side));
    }
    let aspect = f64::from(width) / f64::from(height);
    match aspect > filters.min_aspect && aspect < filters.max_aspect {
        true => Ok(()),
        false => {
            let (low, high) = (filters.min_aspect, filters.max_aspect);
            Err(format!("{width}x{height}: width over height must lie between {low} and {high}"))
        }
    }
}

/// The files of a data set, on their way.
struct Output {
    dir: PathBuf,
    index: AtomicFile,
    quarantine: AtomicFile,
    offsets: AtomicFile,
    /// Bytes of the index so far.
    end: u64,
    num_written: u64,
    num_quarantined: u64,
    num_duplicates: u64,
    /// Hashes seen, when equal records are left out.
    seen: Option<HashSet<[u8; 16]>>,
    examples: Vec<Broken>,
}

impl Output {
    fn create(dir: &Path, dedupe: bool) -> Result<Self, PrepareError> {
        let create = |name: &str| {
            let path = dir.join(name);
            AtomicFile::create(&path).map_err(|source| PrepareError::Io { path, source })
        };
        Ok(Self {
            dir: dir.to_owned(),
            index: create(INDEX_FILE)?,
            quarantine: create(QUARANTINE_FILE)?,
            offsets: create(OFFSETS_FILE)?,
            end: 0,
            num_written: 0,
            num_quarantined: 0,
            num_duplicates: 0,
            seen: dedupe.then(HashSet::new),
            examples: Vec::new(),
        })
    }

    fn num_samples(&self) -> u64 {
        self.num_written
    }

    fn add(&mut self, checked: Checked) -> Result<(), PrepareError> {
        let broken = match checked {
            Ok((record, hash)) if self.seen.as_mut().is_none_or(|seen| seen.insert(hash)) => {
                let mut line = serde_json::to_vec(&record)?;
                line.push(b'\n');
                let start = self.end.to_le_bytes();
                self.end += line.len() as u64;
                self.num_written += 1;
                let written = self.index.write_all(&line).and_then(|()| self.offsets.write_all(&start));
                return written.map_err(|source| self.io(INDEX_FILE, source));
            }
            Ok((record, _)) => {
                self.num_duplicates += 1;
                Broken { key: record.key, reason: "its text and images equal those of an earlier record".into() }
            }
            Err(broken) => {
                self.num_quarantined += 1;
                broken
            }
        };
        let mut line = serde_json::to_vec(&broken)?;
        line.push(b'\n');
        if self.examples.len() < NUM_EXAMPLES {
            self.examples.push(broken);
        }
        self.quarantine.write_all(&line).map_err(|source| self.io(QUARANTINE_FILE, source))
    }

    fn finish(mut self) -> Result<Vec<Broken>, PrepareError> {
        let dir = self.dir.clone();
        let io = |source| PrepareError::Io { path: dir.clone(), source };
        self.offsets.write_all(&self.end.to_le_bytes()).map_err(io)?;
        self.offsets.finish().map_err(io)?;
        self.index.finish().map_err(io)?;
        self.quarantine.finish().map_err(io)?;
        Ok(self.examples)
    }

    fn io(&self, name: &str, source: std::io::Error) -> PrepareError {
        PrepareError::Io { path: self.dir.join(name), source }
    }
}
