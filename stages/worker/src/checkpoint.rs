//! Training state on disk: written whole or not at all, verified by hash, the newest good one found after any crash.
//!
//! Knows tensors by name and a few numbers, not what trains. A checkpoint is a folder `step-<n>` with `tensors.safetensors`
//! (f32), in `files/` what the result holds so far beside weights, and `state.json`, which holds the hashes of both. All is synced inside `step-<n>.partial`; the folder gets its
//! name by rename, so that a name without `.partial` is a whole checkpoint. Writing happens on a thread of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use burn::tensor::TensorData;
use deepgen_contract::event::WorkerEventKind;
use deepgen_contract::job::CHECKPOINTS_DIR;
use deepgen_contract::train::CheckpointSettings;
use deepgen_model::weights::{self, StoredType, WeightFile};
use serde::{Deserialize, Serialize};

use crate::error::{JobError, JobResult, OrFail};
use crate::files;
use crate::job::{JobContext, KeptFiles};

const VERSION: u32 = 1;
const TENSORS_FILE: &str = "tensors.safetensors";
const STATE_FILE: &str = "state.json";
/// Files of the result that were made so far.
const FILES_DIR: &str = "files";

/// Tensors by name.
pub type NamedTensors = Vec<(String, TensorData)>;

/// What a checkpoint holds beside tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    version: u32,
    /// Steps done.
    pub step: u64,
    /// blake3 of the tensor file.
    tensors_blake3: String,
    /// Metric lines so far.
    pub metric_lines: Vec<String>,
    /// Sums and counts of the metrics since the last line; sums as the bits of an f64, which JSON would round.
    pub window: BTreeMap<String, (u64, u64)>,
    /// Steps that were left out after a roll-back.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub left_out: BTreeSet<u64>,
    /// blake3 of each file of the result that was made so far, by its name in the result.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    files_blake3: BTreeMap<String, String>,
}

/// What a checkpoint is made of: a copy, so that training goes on while it is written.
pub struct Snapshot {
    /// Steps done.
    pub step: u64,
    /// Everything a later step depends on.
    pub tensors: NamedTensors,
    /// Metric lines so far.
    pub metric_lines: Vec<String>,
    /// Sums and counts of the metrics since the last line.
    pub window: BTreeMap<String, (u64, u64)>,
    /// Steps that were left out after a roll-back.
    pub left_out: BTreeSet<u64>,
    /// Files of the result that were made so far.
    pub files: KeptFiles,
}

/// A checkpoint that was found and verified.
pub struct Found {
    /// Where it lies.
    pub path: PathBuf,
    /// Its numbers.
    pub state: State,
}

impl Found {
    /// Opens its tensors.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn tensors(&self) -> JobResult<WeightFile> {
        let path = self.path.join(TENSORS_FILE);
        WeightFile::open(&path).or_io(|| format!("open {}", path.display()))
    }

    /// Reads the files of the result that it holds.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn files(&self) -> JobResult<KeptFiles> {
        let read = |name: &String| {
            let path = self.path.join(FILES_DIR).join(name);
            let bytes = fs::read(&path).or_io(|| format!("read {}", path.display()))?;
            Ok((name.clone(), Arc::new(bytes)))
        };
        self.state.files_blake3.keys().map(read).collect()
    }
}

/// Writes checkpoints of one job, one at a time, beside the training.
pub struct Writer {
    folder: PathBuf,
    settings: CheckpointSettings,
    running: Option<(u64, JoinHandle<JobResult<u64>>)>,
}

impl Writer {
    /// Returns the writer of a job's checkpoints.
    pub fn new(context: &JobContext, settings: &CheckpointSettings) -> Self {
        Self { folder: context.checkpoints(), settings: settings.clone(), running: None }
    }

    /// Begins to write a checkpoint, after the one before it is whole. Older ones are removed when it is.
    ///
    /// # Errors
    /// When the one before it could not be written.
    pub fn begin(&mut self, snapshot: Snapshot, context: &mut JobContext) -> JobResult<()> {
        self.finish(context)?;
        let (folder, settings, step) = (self.folder.clone(), self.settings.clone(), snapshot.step);
        let write = move || {
            let path = write(&folder, snapshot)?;
            let bytes = fs::metadata(path.join(TENSORS_FILE)).map_or(0, |data| data.len());
            retain(&folder, &settings)?;
            Ok(bytes)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
        self.running = Some((step, thread.or_io(|| "start a thread that writes a checkpoint")?));
        Ok(())
    }

    /// Reports the checkpoint being written if it is whole by now.
    ///
    /// # Errors
    /// When the disk is full or cannot be written; earlier checkpoints are then untouched.
    pub fn poll(&mut self, context: &mut JobContext) -> JobResult<()> {
        match &self.running {
            Some((_, thread)) if thread.is_finished() => self.finish(context),
            _ => Ok(()),
        }
    }

    /// Waits until the checkpoint being written is whole.
    ///
    /// # Errors
    /// As [`Writer::poll`].
    pub fn finish(&mut self, context: &mut JobContext) -> JobResult<()> {
        let Some((step, thread)) = self.running.take() else { return Ok(()) };
        let bytes =
            thread.join().map_err(|_| JobError::internal("writing a checkpoint panicked; see stderr.log"))??;
        let path = format!("{CHECKPOINTS_DIR}/{}", folder_name(step));
        context.emitter.emit(WorkerEventKind::Checkpoint { step, path, bytes });
        Ok(())
    }
}

impl Drop for Writer {
    /// A thread must not go on writing where the next attempt, or a roll-back, reads.
    fn drop(&mut self) {
        if let Some((_, thread)) = self.running.take() {
            // What went wrong there is no longer of use: the job ends for another reason.
            let _ = thread.join();
        }
    }
}

/// Removes the oldest checkpoints beyond the number and the bytes to keep, but never the newest.
fn retain(folder: &Path, settings: &CheckpointSettings) -> JobResult<()> {
    let mut bytes = 0;
    for (rank, (_, path)) in candidates(folder).into_iter().enumerate() {
        bytes += fs::metadata(path.join(TENSORS_FILE)).map_or(0, |data| data.len());
        let is_over = rank >= settings.keep || settings.max_bytes.is_some_and(|max| bytes > max);
        if rank > 0 && is_over {
            fs::remove_dir_all(&path).or_io(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Writes the folder of a checkpoint and returns it.
fn write(folder: &Path, snapshot: Snapshot) -> JobResult<PathBuf> {
    let Snapshot { step, tensors, metric_lines, window, left_out, files } = snapshot;
    let name = folder_name(step);
    let (partial, path) = (folder.join(format!("{name}.partial")), folder.join(&name));
    let doing = || format!("write checkpoint {}", path.display());
    for stale in [&partial, &path] {
        if stale.exists() {
            fs::remove_dir_all(stale).or_io(doing)?;
        }
    }
    fs::create_dir_all(&partial).or_io(doing)?;
    let file = partial.join(TENSORS_FILE);
    weights::save(&file, &tensors, StoredType::F32, &BTreeMap::new()).or_io(doing)?;
    let tensors_blake3 = files::hash_file(&file).or_io(doing)?;
    let files_blake3 = write_files(&partial.join(FILES_DIR), &files).or_io(doing)?;
    let state = State { version: VERSION, step, tensors_blake3, metric_lines, window, left_out, files_blake3 };
    files::write_json(&partial.join(STATE_FILE), &state).or_io(doing)?;
    fs::rename(&partial, &path).or_io(doing)?;
    files::sync_folder_of(&path).or_io(doing)?;
    Ok(path)
}

/// Writes and syncs files and returns their hashes.
fn write_files(folder: &Path, kept: &KeptFiles) -> std::io::Result<BTreeMap<String, String>> {
    let mut hashes = BTreeMap::new();
    for (name, bytes) in kept {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap_or(folder))?;
        let mut file = fs::File::create(&path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        files::sync_folder_of(&path)?;
        hashes.insert(name.clone(), blake3::hash(bytes).to_hex().to_string());
    }
    Ok(hashes)
}

/// Returns the newest checkpoint of this or an earlier attempt that verifies, but for the `passed_over` newest of them, and
/// says which ones did not verify.
pub fn find_newest(context: &mut JobContext, passed_over: u32) -> Option<Found> {
    let mut passed_over = passed_over;
    let attempts = std::iter::once(context.dir.clone()).chain(context.spec.earlier_attempts.clone());
    let mut all: Vec<_> = attempts.flat_map(|attempt| candidates(&attempt.join(CHECKPOINTS_DIR))).collect();
    // Stable: of two checkpoints of one step the later attempt's comes first.
    all.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    for (_, path) in all {
        match verify(&path) {
            Ok(_) if passed_over > 0 => passed_over -= 1,
            Ok(state) => return Some(Found { path, state }),
            Err(reason) => context.emitter.warn(format!("checkpoint {} is set aside: {reason}", path.display())),
        }
    }
    None
}

/// Returns steps and folders of finished checkpoints, newest first.
fn candidates(folder: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            Some((step, entry.path()))
        })
        .collect();
    found.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    found
}

fn verify(path: &Path) -> Result<State, String> {
    let text = fs::read_to_string(path.join(STATE_FILE)).map_err(|error| format!("{STATE_FILE}: {error}"))?;
    let state: State = serde_json::from_str(&text).map_err(|error| format!("{STATE_FILE}: {error}"))?;
    if state.version != VERSION {
        return Err(format!("its format version is {}, not {VERSION}", state.version));
    }
    let hash = files::hash_file(&path.join(TENSORS_FILE)).map_err(|error| format!("{TENSORS_FILE}: {error}"))?;
    if hash != state.tensors_blake3 {
        return Err(format!("{TENSORS_FILE} does not have the recorded hash"));
    }
    for (name, expected) in &state.files_blake3 {
        let hash = files::hash_file(&path.join(FILES_DIR).join(name)).map_err(|error| format!("{name}: {error}"))?;
        if hash != *expected {
            return Err(format!("{name} does not have the recorded hash"));
        }
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(folder: &Path, step: u64, value: f32) -> PathBuf {
        let tensors = vec![("a".to_owned(), TensorData::new(vec![value; 4], [4]))];
        let window = BTreeMap::from([("train/loss".to_owned(), (0.1f64.to_bits(), 3))]);
        let metric_lines = vec!["{\"step\":1}".to_owned()];
        let files = KeptFiles::from([("samples/a.png".to_owned(), Arc::new(vec![1, 2, 3]))]);
        write(folder, Snapshot { step, tensors, metric_lines, window, left_out: BTreeSet::from([3]), files }).unwrap()
    }

    #[test]
    fn a_checkpoint_reads_back_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = checkpoint(folder.path(), 12, 0.5);
        let state = verify(&path).unwrap();
        assert_eq!((state.step, state.metric_lines.len(), state.left_out.len()), (12, 1, 1));
        assert_eq!(f64::from_bits(state.window["train/loss"].0), 0.1);
        let found = Found { path, state };
        assert_eq!(*found.files().unwrap()["samples/a.png"], [1, 2, 3]);
        let values: Vec<f32> = found.tensors().unwrap().get("a").unwrap().iter::<f32>().collect();
        assert_eq!(values, [0.5; 4]);
    }

    #[test]
    fn damaged_and_unfinished_checkpoints_do_not_verify_and_the_one_before_does() {
        let folder = tempfile::tempdir().unwrap();
        checkpoint(folder.path(), 10, 1.0);
        let truncated = checkpoint(folder.path(), 20, 2.0);
        let flipped = checkpoint(folder.path(), 30, 3.0);
        let without_state = checkpoint(folder.path(), 40, 4.0);
        fs::create_dir(folder.path().join("step-00000050.partial")).unwrap();
        let file = truncated.join(TENSORS_FILE);
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        let file = flipped.join(TENSORS_FILE);
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        fs::remove_file(without_state.join(STATE_FILE)).unwrap();
        let without_file = checkpoint(folder.path(), 45, 5.0);
        fs::remove_file(without_file.join(FILES_DIR).join("samples/a.png")).unwrap();
        let steps: Vec<u64> = candidates(folder.path()).into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [45, 40, 30, 20, 10]);
        let good = candidates(folder.path()).into_iter().find_map(|(_, path)| verify(&path).ok());
        assert_eq!(good.unwrap().step, 10);
    }

    #[test]
    fn the_newest_stay_within_number_and_bytes() {
        let steps = |folder: &Path| candidates(folder).into_iter().map(|(step, _)| step).collect::<Vec<_>>();
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (1..=4).map(|step| checkpoint(folder.path(), step, 1.0)).collect();
        let bytes = fs::metadata(paths[3].join(TENSORS_FILE)).unwrap().len();
        retain(folder.path(), &CheckpointSettings { every: 1, keep: 3, max_bytes: None }).unwrap();
        assert_eq!(steps(folder.path()), [4, 3, 2]);
        retain(folder.path(), &CheckpointSettings { every: 1, keep: 3, max_bytes: Some(2 * bytes) }).unwrap();
        assert_eq!(steps(folder.path()), [4, 3]);
        retain(folder.path(), &CheckpointSettings { every: 1, keep: 0, max_bytes: Some(1) }).unwrap();
        assert_eq!(steps(folder.path()), [4]);
    }
}
