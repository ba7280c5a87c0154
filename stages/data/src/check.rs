//! What makes a record good: its text is there, and its images are read, decoded and within the limits.
//!
//! Records of a chunk are checked by several threads and come back in their order.

use std::path::PathBuf;

use deepgen_contract::data::FilterSettings;

use crate::sample::SetKind;
use crate::source::{Broken, Cause, Fault, Found, Location, Record, RecordSource, decode_at, read_bytes};

/// A good record.
#[derive(Debug, Clone, PartialEq)]
pub struct Good {
    /// The record.
    pub record: Record,
    /// Hash of its text and images.
    pub hash: [u8; 16],
    /// Width and height of its image, in pixels; nothing for prompts.
    pub size: Option<(u32, u32)>,
    /// Bytes of all its images.
    pub num_bytes: u64,
}

/// A record after its check.
pub type Checked = Result<Good, Broken>;

/// What makes a record of a source good.
#[derive(Debug)]
pub struct Check<'a> {
    roots: &'a [PathBuf],
    kind: SetKind,
    filters: Option<&'a FilterSettings>,
}

impl<'a> Check<'a> {
    /// Returns the check of the records of `source`; `filters` hold where the release has size limits.
    pub fn new(source: &'a dyn RecordSource, filters: &'a FilterSettings) -> Self {
        Self { roots: source.roots(), kind: source.kind(), filters: source.has_size_limits().then_some(filters) }
    }

    /// Checks a chunk, keeping its order.
    pub fn all(&self, chunk: Vec<Found>, num_threads: usize) -> Vec<Checked> {
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
        match self.look(&record) {
            Ok((hash, size, num_bytes)) => Ok(Good { record, hash, size, num_bytes }),
            Err(fault) => Err(fault.of(record.key)),
        }
    }

    /// Returns hash, size and bytes of a good record, or what is wrong with it.
    #[expect(clippy::type_complexity, reason = "three parts of a `Good`, named where it is made")]
    fn look(&self, record: &Record) -> Result<([u8; 16], Option<(u32, u32)>, u64), Fault> {
        if record.text.trim().is_empty() {
            return Err(Fault::new(Cause::Text, "its text is empty"));
        }
        let mut hasher = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            // Lengths keep `ab`, `c` apart from `a`, `bc`.
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(record.text.as_bytes());
        part(record.answer.as_deref().unwrap_or_default().as_bytes());
        let mut num_bytes = 0;
        let mut image = |location: &Location| -> Result<(u32, u32), Fault> {
            let bytes = read_bytes(self.roots, location, &record.key).map_err(|error| Fault::from(&error))?;
            part(&bytes);
            num_bytes += bytes.len() as u64;
            let image = decode_at(self.roots, location, &record.key, &bytes).map_err(|error| Fault::from(&error))?;
            Ok(image.dimensions())
        };
        let mut size = None;
        match (&record.image, self.kind) {
            (None, SetKind::Prompts) => {}
            (None, _) => return Err(Fault::new(Cause::NoImage, "it has no image")),
            (Some(location), _) => {
                let (width, height) = image(location)?;
                if let Some(filters) = self.filters {
                    within(width, height, filters)?;
                }
                size = Some((width, height));
            }
        }
        for location in &record.references {
            image(location)?;
        }
        let mut hash = [0; 16];
        hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Ok((hash, size, num_bytes))
    }
}

/// Applies the size limits of the release; all of them are strict.
fn within(width: u32, height: u32, filters: &FilterSettings) -> Result<(), Fault> {
    if width.min(height) <= filters.min_side {
        let reason = format!("{width}x{height}: both sides must exceed {} pixels", filters.min_side);
        return Err(Fault::new(Cause::TooSmall, reason));
    }
    let aspect = f64::from(width) / f64::from(height);
    match aspect > filters.min_aspect && aspect < filters.max_aspect {
        true => Ok(()),
        false => {
            let (low, high) = (filters.min_aspect, filters.max_aspect);
            let reason = format!("{width}x{height}: width over height must lie between {low} and {high}");
            Err(Fault::new(Cause::AspectRatio, reason))
        }
    }
}
