//! A prepared data set: an index of good records, opened without being read into memory.
//!
//! `index.jsonl` holds a record a line, `index.offsets` where each line starts; `dataset.json` says what it is and was
//! written last. A sample costs two small reads and its images, whatever the size of the set.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::sample::{QuestionSample, Sample, SetKind};
use crate::source::{DataSource, Fault, ReadError, Record, RecordSource, ScanError, Visit, read_image};

/// Version of [`DatasetFile`] and of the index beside it.
pub const DATASET_VERSION: u32 = 1;
/// Description of a data set; written last.
pub const DATASET_FILE: &str = "dataset.json";
/// Good records, a [`Record`] a line.
pub const INDEX_FILE: &str = "index.jsonl";
/// Start of each line of the index and its end, 8 bytes each, little endian.
pub const OFFSETS_FILE: &str = "index.offsets";
/// Records left out, with a reason each.
pub const QUARANTINE_FILE: &str = "quarantine.jsonl";
/// Images that records carried, end to end; only there when some did.
pub const PACK_FILE: &str = "images.pack";
/// Longest index line, in bytes.
const MAX_LINE: u64 = 64 << 20;

/// `dataset.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetFile {
    /// [`DATASET_VERSION`] of the writer.
    pub version: u32,
    /// What the set holds.
    pub kind: SetKind,
    /// Format it was read from, such as `tar`.
    pub format: String,
    /// Folders that locations refer to: relative to this file's folder when inside it, absolute otherwise.
    pub roots: Vec<String>,
    /// Good records.
    pub num_samples: u64,
    /// Records left out because they are broken or outside of the size limits.
    pub num_quarantined: u64,
    /// Records left out because they equal an earlier one.
    pub num_duplicates: u64,
    /// Samples of the set in the paper; 0 when unknown.
    pub nominal_size: u64,
    /// Records left out by sort of trouble, duplicates included.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub causes: BTreeMap<String, u64>,
}

/// Why a data set cannot be opened.
#[derive(Debug, Error)]
pub enum DatasetError {
    /// A file is missing or unreadable.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The description is damaged.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Written by another version.
    #[error("{}: version {found} is not read here ({DATASET_VERSION} is); prepare the set again", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The index does not fit its description.
    #[error("{}: {reason}; prepare the set again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}

/// A prepared data set on disk.
#[derive(Debug)]
pub struct PreparedDataset {
    dir: PathBuf,
    file: DatasetFile,
    roots: Vec<PathBuf>,
    index: File,
    offsets: File,
}

impl PreparedDataset {
    /// Opens the data set in `dir`.
    ///
    /// # Errors
    /// When a file is missing, damaged, or from another version.
    pub fn open(dir: &Path) -> Result<Self, DatasetError> {
        let path = dir.join(DATASET_FILE);
        let bytes = std::fs::read(&path).map_err(|source| DatasetError::Io { path: path.clone(), source })?;
        let file: DatasetFile =
            serde_json::from_slice(&bytes).map_err(|source| DatasetError::Json { path: path.clone(), source })?;
        if file.version != DATASET_VERSION {
            return Err(DatasetError::Version { path, found: file.version });
        }
        let open = |name: &str| {
            let path = dir.join(name);
            let file = File::open(&path).map_err(|source| DatasetError::Io { path: path.clone(), source })?;
            let bytes = file.metadata().map_err(|source| DatasetError::Io { path, source })?.len();
            Ok((file, bytes))
        };
        let (index, index_bytes) = open(INDEX_FILE)?;
        let (offsets, offsets_bytes) = open(OFFSETS_FILE)?;
        let damaged = |name: &str, reason: String| DatasetError::Damaged { path: dir.join(name), reason };
        if file.num_samples.checked_add(1).and_then(|n| n.checked_mul(8)) != Some(offsets_bytes) {
            return Err(damaged(OFFSETS_FILE, format!("{offsets_bytes} bytes for {} records", file.num_samples)));
        }
        let mut end = [0; 8];
        offsets
            .read_exact_at(&mut end, file.num_samples * 8)
            .map_err(|source| DatasetError::Io { path: dir.join(OFFSETS_FILE), source })?;
        if u64::from_le_bytes(end) != index_bytes {
            let reason = format!("{index_bytes} bytes where {} are expected", u64::from_le_bytes(end));
            return Err(damaged(INDEX_FILE, reason));
        }
        let roots = file.roots.iter().map(|root| dir.join(root)).collect();
        Ok(Self { dir: dir.to_owned(), file, roots, index, offsets })
    }

    /// Returns what `dataset.json` says.
    pub fn description(&self) -> &DatasetFile {
        &self.file
    }

    /// Returns its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns what the set holds.
    pub fn kind(&self) -> SetKind {
        self.file.kind
    }

    /// Returns record `index`, without its images.
    ///
    /// # Errors
    /// When there is no such record, or the index is damaged.
    pub fn record(&self, index: u64) -> Result<Record, ReadError> {
        if index >= self.file.num_samples {
            let place = self.dir.display().to_string();
            return Err(ReadError::NoSuchRecord { place, index, len: self.file.num_samples });
        }
        let damaged = |reason: String| ReadError::Index { path: self.dir.join(INDEX_FILE), index, reason };
        let mut ends = [0; 16];
        self.offsets.read_exact_at(&mut ends, index * 8).map_err(|error| damaged(error.to_string()))?;
        let mut word = [0; 8];
        word.copy_from_slice(&ends[..8]);
        let start = u64::from_le_bytes(word);
        word.copy_from_slice(&ends[8..]);
        let length = u64::from_le_bytes(word).checked_sub(start).filter(|&length| length <= MAX_LINE);
        let length = length.ok_or_else(|| damaged("its offsets make no sense".into()))?;
        let mut line = vec![0; length as usize];
        self.index.read_exact_at(&mut line, start).map_err(|error| damaged(error.to_string()))?;
        serde_json::from_slice(&line).map_err(|error| damaged(error.to_string()))
    }

    /// Returns question `index` with its image.
    ///
    /// # Errors
    /// When the set holds no questions, or names the file and record that cannot be read.
    pub fn question(&self, index: u64) -> Result<QuestionSample, ReadError> {
        let Record { key, text, answer, image, .. } = self.record(index)?;
        let (Some(answer), Some(location)) = (answer, image) else { return Err(self.holds_no("questions")) };
        let image = read_image(&self.roots, &location, &key)?;
        Ok(QuestionSample { question: text, answer, image, key })
    }

    /// Returns the texts in order: captions, instructions, prompts or questions.
    pub fn texts(&self) -> impl Iterator<Item = Result<String, ReadError>> + '_ {
        (0..self.file.num_samples).map(|index| Ok(self.record(index)?.text))
    }

    fn holds_no(&self, wanted: &'static str) -> ReadError {
        ReadError::Kind { place: self.dir.display().to_string(), found: self.kind().name(), wanted }
    }
}

impl RecordSource for PreparedDataset {
    fn kind(&self) -> SetKind {
        self.file.kind
    }

    fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    fn scan(&self, visit: &mut Visit<'_>) -> Result<(), ScanError> {
        for index in 0..self.file.num_samples {
            let found = self.record(index).map_err(|error| Fault::from(&error).of(format!("{INDEX_FILE}#{index}")));
            if !visit(found) {
                break;
            }
        }
        Ok(())
    }
}

impl DataSource for PreparedDataset {
    fn len(&self) -> u64 {
        self.file.num_samples
    }

    fn get(&self, index: u64) -> Result<Sample, ReadError> {
        let task = self.kind().task().ok_or_else(|| self.holds_no("samples with images"))?;
        let Record { key, text, image, references, .. } = self.record(index)?;
        let location = image.ok_or_else(|| self.holds_no("samples with images"))?;
        let image = read_image(&self.roots, &location, &key)?;
        let references = references.iter().map(|at| read_image(&self.roots, at, &key)).collect::<Result<_, _>>()?;
        Ok(Sample { task, text, image, references, key })
    }
}
