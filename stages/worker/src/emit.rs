//! Writes a job's events, a JSON line each, and remembers its metric lines for the result.
//!
//! Knows the line format, not what the numbers mean. Metric lines hold nothing that depends on the clock, so that a
//! resumed job leaves the same file as an undisturbed one.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use deepgen_contract::event::{WorkerEvent, WorkerEventKind};
use deepgen_contract::job::EVENTS_FILE;

use image::{ImageFormat, RgbImage};

use crate::error::{JobResult, OrFail};
use crate::tensorboard::{EventFile, TENSORBOARD_DIR};

/// Shortest time between two progress events, in milliseconds.
const PROGRESS_INTERVAL_MS: u128 = 200;

/// Numbers named `group/name`.
pub type Metrics = BTreeMap<String, f64>;

/// The event file of an attempt.
pub struct Emitter {
    file: File,
    metric_lines: Vec<String>,
    last_progress: Option<Instant>,
    /// Opened with the first number.
    board: Option<EventFile>,
    board_dir: PathBuf,
    /// Newest step of a progress report.
    last_step: u64,
}

impl Emitter {
    /// Opens the event file in the job directory.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(job_dir: &Path) -> JobResult<Self> {
        let path = job_dir.join(EVENTS_FILE);
        let file = OpenOptions::new().create(true).append(true).open(&path).or_io(|| format!("open {path:?}"))?;
        let board_dir = job_dir.join(TENSORBOARD_DIR);
        Ok(Self { file, metric_lines: Vec::new(), last_progress: None, board: None, board_dir, last_step: 0 })
    }

    /// Appends an event. A full disk must not end the job here: the next checkpoint will say so with more to go on.
    pub fn emit(&mut self, event: WorkerEventKind) {
        let ts_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_millis() as u64);
        let written = serde_json::to_string(&WorkerEvent { ts_ms, event })
            .map_err(std::io::Error::other)
            .and_then(|line| self.file.write_all(format!("{line}\n").as_bytes()));
        if let Err(error) = written {
            tracing::warn!("an event was lost: {error}");
        }
    }

    /// Reports a position, at most a few times a second; the last step is always reported.
    pub fn progress(&mut self, step: u64, total: u64, unit: &str) {
        self.last_step = step;
        let is_due = self.last_progress.is_none_or(|at| at.elapsed().as_millis() >= PROGRESS_INTERVAL_MS);
        if is_due || step == total {
            self.last_progress = Some(Instant::now());
            self.emit(WorkerEventKind::Progress { step, total, unit: unit.into() });
        }
    }

    /// Reports numbers at a step and keeps them for the result's metric file.
    pub fn metrics(&mut self, step: u64, values: Metrics) {
        let mut line = serde_json::Map::new();
        line.insert("step".into(), step.into());
        line.extend(values.iter().map(|(name, value)| (name.clone(), (*value).into())));
        self.metric_lines.push(serde_json::Value::from(line).to_string());
        self.show(|board| board.scalars(step, values.iter().map(|(name, value)| (name.as_str(), *value))));
        self.emit(WorkerEventKind::Metrics { step, values });
    }

    /// Reports numbers that depend on the clock: shown, but no part of the result.
    pub fn timing(&mut self, step: u64, values: Metrics) {
        self.show(|board| board.scalars(step, values.iter().map(|(name, value)| (name.as_str(), *value))));
        self.emit(WorkerEventKind::Metrics { step, values });
    }

    /// Says something a person should know.
    pub fn warn(&mut self, message: impl Into<String>) {
        let message = message.into();
        tracing::warn!("{message}");
        let step = self.last_step;
        self.show(|board| board.text(step, "warnings", &message));
        self.emit(WorkerEventKind::Warning { message });
    }

    /// Shows an image beside the curves.
    pub fn image(&mut self, step: u64, tag: &str, image: &RgbImage) {
        let mut png = std::io::Cursor::new(Vec::new());
        match image.write_to(&mut png, ImageFormat::Png) {
            Ok(()) => self.show(|board| board.image(step, tag, image.dimensions(), png.get_ref())),
            Err(error) => tracing::warn!("no image for TensorBoard: {error}"),
        }
    }

    /// Says something for the log.
    pub fn note(&mut self, message: impl Into<String>) {
        let message = message.into();
        tracing::info!("{message}");
        self.emit(WorkerEventKind::Note { message });
    }

    /// Returns every metric line so far.
    pub fn metric_lines(&self) -> &[String] {
        &self.metric_lines
    }

    /// Replaces the metric lines by those of a checkpoint; the curves of this attempt begin with them.
    pub fn restore_metric_lines(&mut self, lines: Vec<String>) {
        for line in &lines {
            let Ok(serde_json::Value::Object(line)) = serde_json::from_str(line) else { continue };
            let step = line.get("step").and_then(serde_json::Value::as_u64).unwrap_or(0);
            let values: Vec<_> =
                line.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?))).collect();
            self.show(|board| board.scalars(step, values.into_iter().filter(|(name, _)| *name != "step")));
        }
        self.metric_lines = lines;
    }

    /// Writes to the event file for TensorBoard. It is for looking at: failing to write it must not end the job.
    fn show(&mut self, write: impl FnOnce(&mut EventFile) -> std::io::Result<()>) {
        if self.board.is_none() {
            match EventFile::create(&self.board_dir) {
                Ok(board) => self.board = Some(board),
                Err(error) => return tracing::warn!("no curves for TensorBoard: {error}"),
            }
        }
        if let Some(board) = &mut self.board
            && let Err(error) = write(board)
        {
            tracing::warn!("a curve for TensorBoard lost a point: {error}");
        }
    }
}
