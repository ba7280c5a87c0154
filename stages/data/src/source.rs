//! What a source is: records to be had in order, once; and a data set: samples to be had by their place.
//!
//! A record says where its images lie, as a path below one of a few roots, or as a span of bytes of such a file; or it
//! carries them, where a file cannot be read in place. Knows neither the formats that records come from nor the order
//! in which they are read.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::decode::{DecodeError, decode};
use crate::sample::{Sample, SetKind};

/// Largest image file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 512 << 20;

/// A source on disk, whatever its format: the one door through which records come in.
pub trait RecordSource: Sync {
    /// Returns what its records are.
    fn kind(&self) -> SetKind;

    /// Returns the folders that locations refer to.
    fn roots(&self) -> &[PathBuf];

    /// Returns true when the release puts size limits on images of this format.
    fn has_size_limits(&self) -> bool {
        false
    }

    /// Hands every record to `visit`, in order; what is no record is handed over with what is wrong with it.
    ///
    /// # Errors
    /// When the source cannot be read at all.
    fn scan(&self, visit: &mut Visit<'_>) -> Result<(), ScanError>;
}

/// Samples to be had by their place.
pub trait DataSource {
    /// Returns the number of samples.
    fn len(&self) -> u64;

    /// Returns sample `index`, decoded.
    ///
    /// # Errors
    /// Names the file and the record that could not be read.
    fn get(&self, index: u64) -> Result<Sample, ReadError>;

    /// Returns true when there is no sample.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Why a sample could not be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// There is no such record.
    #[error("{place} has no record {index}; it has {len}")]
    NoSuchRecord {
        /// The data set.
        place: String,
        /// Asked for.
        index: u64,
        /// Records there are.
        len: u64,
    },
    /// A file could not be read.
    #[error("{}: record {key}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The record.
        key: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file is longer than any image is.
    #[error("{}: record {key}: {bytes} bytes are more than an image may have ({MAX_FILE_BYTES})", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The record.
        key: String,
        /// Its size.
        bytes: u64,
    },
    /// A file is no image.
    #[error("{}: record {key}: {source}", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// The record.
        key: String,
        /// Why.
        source: DecodeError,
    },
    /// The index of a data set is damaged.
    #[error("{}: entry {index} of the index is damaged: {reason}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// The entry.
        index: u64,
        /// What is wrong.
        reason: String,
    },
    /// The set holds prompts where samples with images were asked for, or the other way round.
    #[error("{place} holds {found}, not {wanted}")]
    Kind {
        /// The data set.
        place: String,
        /// What it holds.
        found: &'static str,
        /// What was asked for.
        wanted: &'static str,
    },
}

/// Where the bytes of an image lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Location {
    /// Number of the root folder.
    pub root: usize,
    /// Path below that root, `/` between parts, without `..`.
    pub path: String,
    /// Part of the file, if it is not all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub span: Option<Span>,
    /// The bytes themselves, from a reader of files that cannot be read in place; never stored with the location.
    #[serde(skip)]
    pub held: Option<Arc<[u8]>>,
}

impl Location {
    /// Returns the location of a whole file.
    pub fn file(root: usize, path: impl Into<String>) -> Self {
        Self { root, path: path.into(), span: None, held: None }
    }

    /// Returns the location of a part of a file.
    pub fn part(root: usize, path: impl Into<String>, span: Span) -> Self {
        Self { root, path: path.into(), span: Some(span), held: None }
    }

    /// Returns bytes that came from the file `path`.
    pub fn held(root: usize, path: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self { root, path: path.into(), span: None, held: Some(bytes.into()) }
    }
}

/// Bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

/// A sample as a source describes it; its images are not read yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// File and place in it, for messages.
    pub key: String,
    /// Caption, instruction, prompt or question.
    pub text: String,
    /// Answer to a question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// The image to be made or asked about; absent for prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Location>,
    /// Images the instruction is about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub references: Vec<Location>,
}

impl Record {
    /// Returns an image with its text.
    pub fn new(key: &str, text: String, image: Location) -> Self {
        Self { key: key.to_owned(), text, answer: None, image: Some(image), references: Vec::new() }
    }

    /// Returns the bytes of images that it carries.
    pub fn held_bytes(&self) -> usize {
        self.image.iter().chain(&self.references).filter_map(|location| location.held.as_ref()).map(|b| b.len()).sum()
    }
}

/// A record that cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Broken {
    /// File and place in it.
    pub key: String,
    /// Sort of trouble, to count by.
    #[serde(default)]
    pub cause: Cause,
    /// What is wrong with it.
    pub reason: String,
}

/// Sorts of trouble with a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A key is missing or holds something else than it should.
    #[default]
    Record,
    /// A path climbs out of its folder or names no file.
    Path,
    /// A file is not there.
    Missing,
    /// A file is there and cannot be read.
    Unreadable,
    /// Its text is missing, empty or no text.
    Text,
    /// It has no image.
    NoImage,
    /// The bytes are no image, or half of one.
    Undecodable,
    /// The file or the image is larger than any real one.
    TooLarge,
    /// A side is below the limit.
    TooSmall,
    /// The ratio of its sides is beyond the limits.
    AspectRatio,
    /// Text and images equal those of an earlier record.
    Duplicate,
    /// Part of a shard or list is damaged; records may be missing.
    Damaged,
}

impl Cause {
    /// Returns its name in files, tables and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Path => "path",
            Self::Missing => "missing",
            Self::Unreadable => "unreadable",
            Self::Text => "text",
            Self::NoImage => "no_image",
            Self::Undecodable => "undecodable",
            Self::TooLarge => "too_large",
            Self::TooSmall => "too_small",
            Self::AspectRatio => "aspect_ratio",
            Self::Duplicate => "duplicate",
            Self::Damaged => "damaged",
        }
    }
}

/// What is wrong with a record whose name is known elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Sort of trouble.
    pub cause: Cause,
    /// In words.
    pub reason: String,
}

impl Fault {
    /// Returns a fault of the sort `cause`.
    pub fn new(cause: Cause, reason: impl Into<String>) -> Self {
        Self { cause, reason: reason.into() }
    }

    /// Returns the record `key` with this fault.
    pub fn of(self, key: impl Into<String>) -> Broken {
        Broken { key: key.into(), cause: self.cause, reason: self.reason }
    }
}

impl From<String> for Fault {
    fn from(reason: String) -> Self {
        Self::new(Cause::Record, reason)
    }
}

impl From<&ReadError> for Fault {
    fn from(error: &ReadError) -> Self {
        let cause = match error {
            ReadError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Cause::Missing,
            ReadError::TooLong { .. }
            | ReadError::Decode { source: DecodeError::TooLarge { .. } | DecodeError::Bomb { .. }, .. } => {
                Cause::TooLarge
            }
            ReadError::Decode { .. } => Cause::Undecodable,
            _ => Cause::Unreadable,
        };
        Self::new(cause, error.to_string())
    }
}

/// What a reader finds at the next place of a source.
pub type Found = Result<Record, Broken>;

/// Receives what a reader finds, in order; returns false to stop the reader.
pub type Visit<'a> = dyn FnMut(Found) -> bool + 'a;

/// Why a source cannot be read at all.
#[derive(Debug, Error)]
pub enum ScanError {
    /// A file or folder could not be opened or listed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A folder or pattern holds no file of the format.
    #[error("{}: no {what} here", path.display())]
    Nothing {
        /// The folder or pattern.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// An object store does not answer.
    #[error("{address}: {reason}")]
    Store {
        /// The address.
        address: String,
        /// Why.
        reason: String,
    },
    /// The format is not read.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What to do about it.
        reason: &'static str,
    },
}

/// Returns `path` as a path below `root`, with `/` between parts.
///
/// # Errors
/// When the path is empty, climbs out of the root, or is absolute and not below it. Links are followed when the file
/// is read: whoever laid out the folder made them.
pub fn below_root(root: &Path, path: &str) -> Result<String, Fault> {
    let wrong = |reason| Fault::new(Cause::Path, reason);
    let given = Path::new(path);
    let relative = match given.is_absolute() {
        true => given.strip_prefix(root).map_err(|_| wrong(format!("`{path}` lies outside of {}", root.display())))?,
        false => given,
    };
    let mut parts = Vec::new();
    for component in relative.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_string_lossy()),
            Component::CurDir => {}
            _ => return Err(wrong(format!("`{path}` climbs out of {}", root.display()))),
        }
    }
    match parts.is_empty() || path.contains('\0') {
        true => Err(wrong(format!("`{path}` names no file"))),
        false => Ok(parts.join("/")),
    }
}

/// Reads the bytes that `location` points to.
pub(crate) fn read_bytes<'a>(roots: &[PathBuf], location: &'a Location, key: &str) -> Result<Cow<'a, [u8]>, ReadError> {
    if let Some(bytes) = &location.held {
        return Ok(Cow::Borrowed(bytes));
    }
    let missing_root = || ReadError::Index {
        path: PathBuf::from(&location.path),
        index: location.root as u64,
        reason: format!("record {key} names root {} of {}", location.root, roots.len()),
    };
    let path = roots.get(location.root).ok_or_else(missing_root)?.join(&location.path);
    let io = |source| ReadError::Io { path: path.clone(), key: key.to_owned(), source };
    let file = File::open(&path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    let bytes = location.span.map_or(size, |span| span.length);
    if bytes > MAX_FILE_BYTES {
        return Err(ReadError::TooLong { path, key: key.to_owned(), bytes });
    }
    let mut buffer = Vec::new();
    match location.span {
        None => {
            // A bound again: the file may grow, or be a device that has no size.
            (&file).take(MAX_FILE_BYTES).read_to_end(&mut buffer).map_err(io)?;
        }
        Some(span) => {
            if span.offset.checked_add(span.length).is_none_or(|end| end > size) {
                return Err(io(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the file is cut short")));
            }
            buffer.resize(bytes as usize, 0);
            file.read_exact_at(&mut buffer, span.offset).map_err(io)?;
        }
    }
    Ok(Cow::Owned(buffer))
}

/// Decodes the image bytes of a record's file.
pub(crate) fn decode_at(
    roots: &[PathBuf],
    location: &Location,
    key: &str,
    bytes: &[u8],
) -> Result<image::RgbImage, ReadError> {
    decode(bytes).map_err(|source| {
        let path = roots.get(location.root).map_or_else(PathBuf::new, |root| root.join(&location.path));
        ReadError::Decode { path, key: key.to_owned(), source }
    })
}

/// Reads and decodes the image that `location` points to.
pub(crate) fn read_image(roots: &[PathBuf], location: &Location, key: &str) -> Result<image::RgbImage, ReadError> {
    decode_at(roots, location, key, &read_bytes(roots, location, key)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_their_root() {
        let root = Path::new("/data/images");
        assert_eq!(below_root(root, "a/./b.png").unwrap(), "a/b.png");
        assert_eq!(below_root(root, "/data/images/a.png").unwrap(), "a.png");
        assert_eq!(below_root(Path::new("/"), "/etc/x.png").unwrap(), "etc/x.png");
        for bad in ["../a.png", "a/../../b.png", "/etc/passwd", "/data/images/../x", "", ".", "/data/images", "a\0b"] {
            assert!(below_root(root, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_span_beyond_the_end_of_its_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), b"0123456789").unwrap();
        let roots = [dir.path().to_owned()];
        let at = |offset, length| Location::part(0, "a", Span { offset, length });
        assert_eq!(&*read_bytes(&roots, &at(2, 3), "k").unwrap(), b"234");
        assert!(read_bytes(&roots, &at(8, 3), "k").is_err());
        assert!(read_bytes(&roots, &at(u64::MAX, 3), "k").is_err());
        assert!(read_bytes(&roots, &Location::file(1, "a"), "k").is_err());
        assert_eq!(read_bytes(&roots, &Location::file(0, "a"), "k").unwrap().len(), 10);
        assert_eq!(&*read_bytes(&[], &Location::held(0, "a", *b"xy"), "k").unwrap(), b"xy");
    }
}
