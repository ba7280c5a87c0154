//! From a source to a prepared data set: every record is read and decoded once; what cannot be used is set aside with
//! its reason, and the run goes on.
//!
//! Records are checked by several threads and written in the order of the source, so the result does not depend on
//! their number. Images that records carry are packed beside the index, to be read by their place. Departure from the release, which replaces a bad record by a random one while it trains.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use deepgen_contract::data::PrepareSettings;
use thiserror::Error;

use crate::atomic::{self, AtomicFile};
use crate::check::{Check, Checked};
use crate::dataset::{
    DATASET_FILE, DATASET_VERSION, DatasetFile, INDEX_FILE, OFFSETS_FILE, PACK_FILE, QUARANTINE_FILE,
};
use crate::source::{Broken, Cause, Fault, Found, Location, Record, ScanError, Span};
use crate::sources::{self, OpenError, SourcePlace};

/// Records checked together by all threads.
const CHUNK: usize = 512;
/// Bytes of images that the records of a chunk may carry before it is checked early.
const CHUNK_BYTES: usize = 64 << 20;
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
    /// The source cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The source cannot be read at all.
    #[error("the source cannot be read: {0}")]
    Scan(#[from] ScanError),
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
    let from = SourcePlace { seed: place.seed, project_root: place.project_root, out_dir: place.out_dir };
    let reader = sources::open(&settings.source, from)?;
    let reader = reader.as_ref();
    let check = Check::new(reader, &settings.filters);
    let mut output = Output::create(place.out_dir, reader.roots().len(), settings.dedupe)?;
    let mut chunk = Vec::with_capacity(CHUNK);
    let mut chunk_bytes = 0;
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
        chunk_bytes += found.as_ref().map_or(0, Record::held_bytes);
        chunk.push(found);
        if chunk.len() == CHUNK || chunk_bytes >= CHUNK_BYTES {
            chunk_bytes = 0;
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
    let mut roots: Vec<_> = reader.roots().iter().map(|root| stored_root(root, place.out_dir)).collect();
    if output.pack.is_some() {
        roots.push(String::new());
    }
    let dataset = DatasetFile {
        version: DATASET_VERSION,
        kind: reader.kind(),
        format: settings.source.name().to_owned(),
        roots,
        num_samples: output.num_samples(),
        num_quarantined: output.num_quarantined,
        num_duplicates: output.num_duplicates,
        nominal_size: settings.nominal_size,
        causes: output.causes.iter().map(|(cause, count)| (cause.name().to_owned(), *count)).collect(),
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

/// The files of a data set, on their way.
struct Output {
    dir: PathBuf,
    index: AtomicFile,
    quarantine: AtomicFile,
    offsets: AtomicFile,
    /// Images that records carried, and the bytes so far; there from the first one on.
    pack: Option<(AtomicFile, u64)>,
    /// Number of the root that the pack lies in.
    pack_root: usize,
    /// Bytes of the index so far.
    end: u64,
    num_written: u64,
    num_quarantined: u64,
    num_duplicates: u64,
    causes: BTreeMap<Cause, u64>,
    /// Hashes seen, when equal records are left out.
    seen: Option<HashSet<[u8; 16]>>,
    examples: Vec<Broken>,
}

impl Output {
    fn create(dir: &Path, pack_root: usize, dedupe: bool) -> Result<Self, PrepareError> {
        let create = |name: &str| {
            let path = dir.join(name);
            AtomicFile::create(&path).map_err(|source| PrepareError::Io { path, source })
        };
        Ok(Self {
            dir: dir.to_owned(),
            index: create(INDEX_FILE)?,
            quarantine: create(QUARANTINE_FILE)?,
            offsets: create(OFFSETS_FILE)?,
            pack: None,
            pack_root,
            end: 0,
            num_written: 0,
            num_quarantined: 0,
            num_duplicates: 0,
            causes: BTreeMap::new(),
            seen: dedupe.then(HashSet::new),
            examples: Vec::new(),
        })
    }

    fn num_samples(&self) -> u64 {
        self.num_written
    }

    fn add(&mut self, checked: Checked) -> Result<(), PrepareError> {
        let broken = match checked {
            Ok(good) if self.seen.as_mut().is_none_or(|seen| seen.insert(good.hash)) => {
                return self.add_record(good.record);
            }
            Ok(good) => {
                self.num_duplicates += 1;
                let reason = "its text and images equal those of an earlier record";
                Fault::new(Cause::Duplicate, reason).of(good.record.key)
            }
            Err(broken) => {
                self.num_quarantined += 1;
                broken
            }
        };
        *self.causes.entry(broken.cause).or_default() += 1;
        let mut line = serde_json::to_vec(&broken)?;
        line.push(b'\n');
        if self.examples.len() < NUM_EXAMPLES {
            self.examples.push(broken);
        }
        self.quarantine.write_all(&line).map_err(|source| self.io(QUARANTINE_FILE, source))
    }

    fn add_record(&mut self, mut record: Record) -> Result<(), PrepareError> {
        for location in record.image.iter_mut().chain(&mut record.references) {
            self.pack(location).map_err(|source| PrepareError::Io { path: self.dir.join(PACK_FILE), source })?;
        }
        let mut line = serde_json::to_vec(&record)?;
        line.push(b'\n');
        let start = self.end.to_le_bytes();
        self.end += line.len() as u64;
        self.num_written += 1;
        let written = self.index.write_all(&line).and_then(|()| self.offsets.write_all(&start));
        written.map_err(|source| self.io(INDEX_FILE, source))
    }

    /// Writes the bytes that a location carries into the pack, and makes it point there.
    fn pack(&mut self, location: &mut Location) -> std::io::Result<()> {
        let Some(bytes) = &location.held else { return Ok(()) };
        if self.pack.is_none() {
            self.pack = Some((AtomicFile::create(&self.dir.join(PACK_FILE))?, 0));
        }
        let Some((file, end)) = &mut self.pack else { return Ok(()) };
        file.write_all(bytes)?;
        let span = Span { offset: *end, length: bytes.len() as u64 };
        *end += span.length;
        *location = Location::part(self.pack_root, PACK_FILE, span);
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<Broken>, PrepareError> {
        let dir = self.dir.clone();
        let io = |source| PrepareError::Io { path: dir.clone(), source };
        if let Some((pack, _)) = self.pack {
            pack.finish().map_err(io)?;
        }
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
