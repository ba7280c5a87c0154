//! Looks through a source as it is: how many records, how large, how long their texts, what is broken, and some samples.
//!
//! Uses the readers and checks of `prepare`, so what is counted as broken here is what `prepare` sets aside.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use deepgen_contract::data::{FilterSettings, ImageMode, ImageSettings, InspectRequest};
use image::{RgbImage, imageops};
use serde::Serialize;
use thiserror::Error;

use crate::check::{Check, Good};
use crate::dataset::{DATASET_FILE, DatasetError, PreparedDataset};
use crate::guess::{GuessError, guess};
use crate::keyed::StreamKey;
use crate::resize::{resize, target_size};
use crate::source::{Broken, Found, Record, RecordSource, ScanError, read_image};
use crate::sources::{self, OpenError, SourcePlace};

/// Records checked together.
const CHUNK: usize = 256;
/// Bytes of images that a chunk may carry.
const CHUNK_BYTES: usize = 64 << 20;
/// Broken records shown for each sort of trouble.
const NUM_EXAMPLES: usize = 3;
/// Sizes listed.
const NUM_SIZES: usize = 8;
/// Side of a picture on the contact sheet, in pixels, and pictures in a row.
const CELL: u32 = 160;
const COLUMNS: u32 = 6;
/// Longest caption shown, in characters.
const SHOWN_CHARS: usize = 90;
/// Upper ends of the ranges that aspect ratios are counted in.
const ASPECTS: [f64; 8] = [0.5, 0.67, 0.8, 1.0, 1.01, 1.5, 2.0, f64::INFINITY];

/// How a source is looked through.
#[derive(Debug, Clone)]
pub struct Looking<'a> {
    /// Size limits.
    pub filters: &'a FilterSettings,
    /// Records looked at; 0 for all.
    pub limit: u64,
    /// Samples shown.
    pub num_samples: usize,
    /// Threads that check records.
    pub num_threads: usize,
}

/// Smallest, largest and middle of some numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// Smallest.
    pub min: u64,
    /// 5 % are not larger.
    pub p05: u64,
    /// Half are not larger.
    pub median: u64,
    /// 95 % are not larger.
    pub p95: u64,
    /// Largest.
    pub max: u64,
}

impl Spread {
    fn of(mut numbers: Vec<u64>) -> Option<Self> {
        numbers.sort_unstable();
        let at = |share: f64| numbers[((numbers.len() - 1) as f64 * share).round() as usize];
        (!numbers.is_empty()).then(|| Self {
            min: at(0.0),
            p05: at(0.05),
            median: at(0.5),
            p95: at(0.95),
            max: at(1.0),
        })
    }
}

/// A name with its number of records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Count {
    /// What is counted.
    pub name: String,
    /// Records.
    pub count: u64,
}

/// Broken records of one sort.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Trouble {
    /// Records.
    pub count: u64,
    /// The first ones.
    pub examples: Vec<Broken>,
}

/// A record that is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// File and place in it.
    pub key: String,
    /// Its text.
    pub text: String,
    /// Width and height; nothing for prompts.
    pub size: Option<(u32, u32)>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// Edits, generation, prompts or questions.
    pub kind: &'static str,
    /// Format, such as `tar`.
    pub format: String,
    /// Records looked at.
    pub num_seen: u64,
    /// True when that is all of them.
    pub is_complete: bool,
    /// Good records.
    pub num_good: u64,
    /// Good records that equal an earlier one; they count as good.
    pub num_duplicates: u64,
    /// Bytes of the good records' images.
    pub num_bytes: u64,
    /// Widths, in pixels.
    pub width: Option<Spread>,
    /// Heights, in pixels.
    pub height: Option<Spread>,
    /// Width over height, in ranges.
    pub aspects: Vec<Count>,
    /// Commonest sizes after `fix_pixels` to 512 (docs/spec/data.md section 3).
    pub targets: Vec<Count>,
    /// Lengths of texts, in characters.
    pub characters: Option<Spread>,
    /// Lengths of texts, in words.
    pub words: Option<Spread>,
    /// Broken records by sort of trouble.
    pub broken: BTreeMap<&'static str, Trouble>,
    /// Some records, drawn evenly.
    pub samples: Vec<Shown>,
}

/// Numbers on their way into an [`Inspection`].
#[derive(Default)]
struct Tally {
    num_seen: u64,
    num_good: u64,
    num_bytes: u64,
    hashes: BTreeSet<[u8; 16]>,
    num_duplicates: u64,
    widths: Vec<u64>,
    heights: Vec<u64>,
    aspects: [u64; ASPECTS.len()],
    targets: BTreeMap<(u32, u32), u64>,
    characters: Vec<u64>,
    words: Vec<u64>,
    broken: BTreeMap<&'static str, Trouble>,
    samples: Vec<(Shown, Option<RgbImage>)>,
}

/// Why a source cannot be looked through.
#[derive(Debug, Error)]
pub enum InspectError {
    /// Its format cannot be told.
    #[error(transparent)]
    Guess(#[from] GuessError),
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is a prepared data set that cannot be opened.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// It cannot be read at all.
    #[error("the source cannot be read: {0}")]
    Scan(#[from] ScanError),
}

/// Answers a request; fetched files lie below `scratch` for a while. Also returns the contact sheet.
///
/// # Errors
/// When the source cannot be told, opened or read.
pub fn answer(
    request: &InspectRequest,
    scratch: &Path,
    num_threads: usize,
) -> Result<(Inspection, Option<RgbImage>), InspectError> {
    let filters = FilterSettings { min_side: request.min_side, min_aspect: 0.1, max_aspect: 10.0 };
    let InspectRequest { limit, num_samples, .. } = *request;
    let looking = Looking { filters: &filters, limit, num_samples, num_threads };
    let folder = Path::new(&request.source);
    if folder.join(DATASET_FILE).is_file() {
        let dataset = PreparedDataset::open(folder)?;
        let format = format!("prepared from {}", dataset.description().format);
        return Ok(inspect(&dataset, &format, &looking)?);
    }
    let settings = guess(request)?;
    let place = SourcePlace { seed: 0, project_root: Path::new("."), out_dir: scratch };
    let source = sources::open(&settings, place)?;
    Ok(inspect(source.as_ref(), settings.name(), &looking)?)
}

/// Looks through `source`; also returns the contact sheet, when there are images.
///
/// # Errors
/// When the source cannot be read at all.
pub fn inspect(
    source: &dyn RecordSource,
    format: &str,
    looking: &Looking<'_>,
) -> Result<(Inspection, Option<RgbImage>), ScanError> {
    let check = Check::new(source, looking.filters);
    let mut tally = Tally::default();
    let mut chunk: Vec<Found> = Vec::new();
    let mut chunk_bytes = 0;
    let mut is_complete = true;
    let flush = |chunk: &mut Vec<Found>, tally: &mut Tally| {
        for checked in check.all(std::mem::take(chunk), looking.num_threads) {
            tally.num_seen += 1;
            match checked {
                Ok(good) => tally.add(good, source, looking.num_samples),
                Err(broken) => tally.add_broken(broken),
            }
        }
    };
    let mut num_taken = 0;
    source.scan(&mut |found| {
        if looking.limit > 0 && num_taken == looking.limit {
            is_complete = false;
            return false;
        }
        num_taken += 1;
        chunk_bytes += found.as_ref().map_or(0, Record::held_bytes);
        chunk.push(found);
        if chunk.len() == CHUNK || chunk_bytes >= CHUNK_BYTES {
            chunk_bytes = 0;
            flush(&mut chunk, &mut tally);
        }
        true
    })?;
    flush(&mut chunk, &mut tally);
    Ok(tally.finish(source, format, is_complete))
}

impl Tally {
    fn add(&mut self, good: Good, source: &dyn RecordSource, num_samples: usize) {
        let Good { record, hash, size, num_bytes } = good;
        if let Some((width, height)) = size {
            self.widths.push(width.into());
            self.heights.push(height.into());
            let aspect = f64::from(width) / f64::from(height);
            self.aspects[ASPECTS.iter().position(|&end| aspect < end).unwrap_or(ASPECTS.len() - 1)] += 1;
            let paper = ImageSettings { size: 512, unit: 32, mode: ImageMode::FixPixels };
            *self.targets.entry(target_size(width, height, &paper)).or_default() += 1;
        }
        self.num_bytes += num_bytes;
        self.num_duplicates += u64::from(!self.hashes.insert(hash));
        self.characters.push(record.text.chars().count() as u64);
        self.words.push(record.text.split_whitespace().count() as u64);
        self.num_good += 1;
        // Reservoir sampling: every record has the same chance, however many there are.
        let place = StreamKey::derive(0, "inspect").below(self.num_good, self.num_good) as usize;
        if self.samples.len() < num_samples {
            self.samples.push(shown(record, size, source));
        } else if place < num_samples {
            self.samples[place] = shown(record, size, source);
        }
    }

    fn add_broken(&mut self, broken: Broken) {
        let trouble = self.broken.entry(broken.cause.name()).or_default();
        trouble.count += 1;
        if trouble.examples.len() < NUM_EXAMPLES {
            trouble.examples.push(broken);
        }
    }

    fn finish(self, source: &dyn RecordSource, format: &str, is_complete: bool) -> (Inspection, Option<RgbImage>) {
        let mut low = 0.0;
        let ranges = ASPECTS.iter().zip(self.aspects).map(|(&end, count)| {
            let name = if end.is_finite() { format!("{low:.2}-{end:.2}") } else { format!("{low:.2}+") };
            low = end;
            Count { name, count }
        });
        let aspects = if self.widths.is_empty() { Vec::new() } else { ranges.collect() };
        let mut targets: Vec<Count> =
            self.targets.iter().map(|((w, h), &count)| Count { name: format!("{w}x{h}"), count }).collect();
        targets.sort_by_key(|target| std::cmp::Reverse(target.count));
        targets.truncate(NUM_SIZES);
        let (samples, pictures): (Vec<_>, Vec<_>) = self.samples.into_iter().unzip();
        let inspection = Inspection {
            kind: source.kind().name(),
            format: format.to_owned(),
            num_seen: self.num_seen,
            is_complete,
            num_good: self.num_good,
            num_duplicates: self.num_duplicates,
            num_bytes: self.num_bytes,
            width: Spread::of(self.widths),
            height: Spread::of(self.heights),
            aspects,
            targets,
            characters: Spread::of(self.characters),
            words: Spread::of(self.words),
            broken: self.broken,
            samples,
        };
        (inspection, sheet(&pictures))
    }
}

fn shown(record: Record, size: Option<(u32, u32)>, source: &dyn RecordSource) -> (Shown, Option<RgbImage>) {
    let image = record.image.as_ref().and_then(|at| read_image(source.roots(), at, &record.key).ok());
    let small = image.and_then(|image| {
        let scale = f64::from(CELL) / f64::from(image.width().max(image.height()));
        let side = |pixels: u32| ((f64::from(pixels) * scale).round() as u32).clamp(1, CELL);
        resize(&image, side(image.width()), side(image.height())).ok()
    });
    (Shown { key: record.key, text: record.text, size }, small)
}

/// Lays pictures out in rows, in the order of the samples.
fn sheet(pictures: &[Option<RgbImage>]) -> Option<RgbImage> {
    if pictures.iter().all(Option::is_none) {
        return None;
    }
    let rows = (pictures.len() as u32).div_ceil(COLUMNS);
    let pitch = CELL + 4;
    let width = COLUMNS.min(pictures.len() as u32) * pitch;
    let mut sheet = RgbImage::from_pixel(width, rows * pitch, image::Rgb([40; 3]));
    for (i, picture) in pictures.iter().enumerate() {
        let Some(picture) = picture else { continue };
        let (column, row) = (i as u32 % COLUMNS, i as u32 / COLUMNS);
        let x = column * pitch + 2 + (CELL - picture.width()) / 2;
        let y = row * pitch + 2 + (CELL - picture.height()) / 2;
        imageops::replace(&mut sheet, picture, x.into(), y.into());
    }
    Some(sheet)
}

impl Inspection {
    /// Returns what was found as a table for a person; `sheet` is where the contact sheet lies.
    pub fn table(&self, sheet: Option<&Path>) -> String {
        let mut table = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(table, "{name:<12}{value}");
        };
        let share = |count: u64, of: u64| format!("{:.1} %", 100.0 * count as f64 / of.max(1) as f64);
        let num_broken = self.num_seen - self.num_good;
        line("format", format!("{}, {}", self.format, self.kind));
        let part = if self.is_complete { "" } else { " (the first ones; --limit 0 looks at all)" };
        line("records", format!("{}{part}", self.num_seen));
        line("good", format!("{} ({})", self.num_good, share(self.num_good, self.num_seen)));
        line("broken", format!("{num_broken} ({})", share(num_broken, self.num_seen)));
        line("duplicates", self.num_duplicates.to_string());
        if self.num_bytes > 0 {
            line("images", format!("{:.1} MB", self.num_bytes as f64 / 1e6));
        }
        let spreads =
            [("width", self.width), ("height", self.height), ("characters", self.characters), ("words", self.words)];
        for (name, Spread { min, p05, median, p95, max }) in spreads.into_iter().filter_map(|(n, s)| Some((n, s?))) {
            line(name, format!("min {min}   5% {p05}   median {median}   95% {p95}   max {max}"));
        }
        let counts = |counts: &[Count]| {
            let parts = counts.iter().filter(|c| c.count > 0);
            parts.map(|c| format!("{} {}", c.name, share(c.count, self.num_good))).collect::<Vec<_>>().join("   ")
        };
        if !self.aspects.is_empty() {
            line("aspect", counts(&self.aspects));
            line("at 512", counts(&self.targets));
        }
        for (cause, Trouble { count, examples }) in &self.broken {
            line("", format!("{cause}: {count}"));
            for Broken { key, reason, .. } in examples {
                line("", format!("  {key}: {reason}"));
            }
        }
        for (i, Shown { key, text, size }) in self.samples.iter().enumerate() {
            let size = size.map_or_else(String::new, |(width, height)| format!("{width}x{height}  "));
            let text: String = text.replace('\n', " ").chars().take(SHOWN_CHARS).collect();
            line(if i == 0 { "samples" } else { "" }, format!("{:>2}  {key}  {size}{text}", i + 1));
        }
        if let Some(sheet) = sheet {
            line("sheet", sheet.display().to_string());
        }
        table
    }
}
