//! Training state on disk: written whole or not at all, verified by hash, the newest good one found after any crash.
//!
//! Knows tensors by name and a few numbers, not what trains. A checkpoint is a folder `step-<n>` with `tensors.safetensors`
//! (f32) and `state.json`, which holds the hash of the former. Both are synced inside `step-<n>.partial`; the folder gets its
//! name by rename, so that a name without `.partial` is a whole checkpoint.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use deepgen_contract::event::WorkerEventKind;
use deepgen_contract::job::CHECKPOINTS_DIR;
use deepgen_model::weights::{self, StoredType, WeightFile};
use serde::{Deserialize, Serialize};

use crate::error::{JobResult, OrFail};
use crate::files;
use crate::job::JobContext;

const VERSION: u32 = 1;
const TENSORS_FILE: &str = "tensors.safetensors";
const STATE_FILE: &str = "state.json";

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
}

/// Writes a checkpoint of `step` and removes all but the newest `keep`.
///
/// # Errors
/// When the disk is full or cannot be written; earlier checkpoints are then untouched.
pub fn save(
    context: &mut JobContext,
    step: u64,
    tensors: &NamedTensors,
    window: BTreeMap<String, (u64, u64)>,
    keep: usize,
) -> JobResult<()> {
    let folder = context.checkpoints();
    let lines = context.emitter.metric_lines().to_vec();
    let path = write(&folder, step, tensors, lines, window)?;
    let bytes = fs::metadata(path.join(TENSORS_FILE)).map_or(0, |data| data.len());
    let name = folder_name(step);
    context.emitter.emit(WorkerEventKind::Checkpoint { step, path: format!("{CHECKPOINTS_DIR}/{name}"), bytes });
    for (_, old) in candidates(&folder).into_iter().skip(keep.max(1)) {
        fs::remove_dir_all(&old).or_io(|| format!("remove {}", old.display()))?;
    }
    Ok(())
}

fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Writes the folder of a checkpoint and returns it.
fn write(
    folder: &Path,
    step: u64,
    tensors: &NamedTensors,
    metric_lines: Vec<String>,
    window: BTreeMap<String, (u64, u64)>,
) -> JobResult<PathBuf> {
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
    weights::save(&file, tensors, StoredType::F32, &BTreeMap::new()).or_io(doing)?;
    let tensors_blake3 = files::hash_file(&file).or_io(doing)?;
    let state = State { version: VERSION, step, tensors_blake3, metric_lines, window };
    files::write_json(&partial.join(STATE_FILE), &state).or_io(doing)?;
    fs::rename(&partial, &path).or_io(doing)?;
    files::sync_folder_of(&path).or_io(doing)?;
    Ok(path)
}

/// Returns the newest checkpoint of this or an earlier attempt that verifies, and says which ones did not.
pub fn find_newest(context: &mut JobContext) -> Option<Found> {
    let attempts = std::iter::once(context.dir.clone()).chain(context.spec.earlier_attempts.clone());
    let mut all: Vec<_> = attempts.flat_map(|attempt| candidates(&attempt.join(CHECKPOINTS_DIR))).collect();
    // Stable: of two checkpoints of one step the later attempt's comes first.
    all.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    for (_, path) in all {
        match verify(&path) {
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
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(folder: &Path, step: u64, value: f32) -> PathBuf {
        let tensors = vec![("a".to_owned(), TensorData::new(vec![value; 4], [4]))];
        let window = BTreeMap::from([("train/loss".to_owned(), (0.1f64.to_bits(), 3))]);
        write(folder, step, &tensors, vec!["{\"step\":1}".to_owned()], window).unwrap()
    }

    #[test]
    fn a_checkpoint_reads_back_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = checkpoint(folder.path(), 12, 0.5);
        let state = verify(&path).unwrap();
        assert_eq!((state.step, state.metric_lines.len()), (12, 1));
        assert_eq!(f64::from_bits(state.window["train/loss"].0), 0.1);
        let values: Vec<f32> = Found { path, state }.tensors().unwrap().get("a").unwrap().iter::<f32>().collect();
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
        let steps: Vec<u64> = candidates(folder.path()).into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [40, 30, 20, 10]);
        let good = candidates(folder.path()).into_iter().find_map(|(_, path)| verify(&path).ok());
        assert_eq!(good.unwrap().step, 10);
    }
}
