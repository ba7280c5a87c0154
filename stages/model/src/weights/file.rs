//! Named tensors on disk, mapped into memory: safetensors files, folders of shards with an index, PyTorch checkpoints.
//!
//! Nothing is read before it is asked for. A bf16 or f32 tensor of a safetensors file is handed out as a view of the map,
//! so that weights that are only read cost no memory of their own. Knows no module.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use burn::tensor::{AllocationProperty, Bytes, DType, TensorData};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use serde::Deserialize;

use super::WeightsError;
use super::torch::{self, TorchTensor};

/// Keys under which trainers nest a state dict.
const NESTING: [&str; 3] = ["state_dict.", "model_state_dict.", "module."];
/// End of the name of a shard index.
const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// Where the bytes of a tensor are.
#[derive(Debug, Clone)]
enum Place {
    /// In a mapped file.
    Mapped(bytes::Bytes),
    /// In a mapped file, in another order.
    Strided(bytes::Bytes, TorchTensor),
}

/// A stored tensor.
#[derive(Debug, Clone)]
struct Entry {
    file: PathBuf,
    place: Place,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// Named tensors of a file, or of a folder of files.
#[derive(Debug, Clone, Default)]
pub struct WeightFile {
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl WeightFile {
    /// Opens a `.safetensors` file, a PyTorch checkpoint (`.pt`, `.pth`, `.bin`), or a folder: the shards that its index
    /// names, or every `.safetensors` file.
    ///
    /// # Errors
    /// When a file cannot be read or is malformed, two files hold the same name, or an index and its shards disagree.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let mut file = Self::default();
        if !path.is_dir() {
            file.add(path)?;
            return Ok(file);
        }
        match find_index(path)? {
            Some(index) => file.add_indexed(path, &index)?,
            None => {
                for path in weight_files(path)? {
                    file.add(&path)?;
                }
            }
        }
        Ok(file)
    }

    fn add(&mut self, path: &Path) -> Result<(), WeightsError> {
        let is_torch = path.extension().is_some_and(|ending| ["pt", "pth", "bin"].iter().any(|e| ending == *e));
        if is_torch { self.add_torch(path) } else { self.add_safetensors(path) }
    }

    fn add_indexed(&mut self, folder: &Path, index: &Path) -> Result<(), WeightsError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let format = |reason: String| WeightsError::Format { path: index.into(), reason };
        let text = std::fs::read(index).map_err(|source| WeightsError::Io { path: index.into(), source })?;
        let Index { weight_map } = serde_json::from_slice(&text).map_err(|error| format(error.to_string()))?;
        for shard in weight_map.values().collect::<BTreeSet<_>>() {
            if Path::new(shard).components().count() != 1 {
                return Err(format(format!("the shard {shard:?} is not a file beside the index")));
            }
            self.add(&folder.join(shard))?;
        }
        let promised = |name: &str, entry: &Entry| {
            weight_map.get(name).is_some_and(|shard| entry.file.file_name().is_some_and(|own| own == shard.as_str()))
        };
        let missing: Vec<&str> =
            weight_map.keys().map(String::as_str).filter(|name| !self.entries.contains_key(*name)).collect();
        let strays: Vec<&str> =
            self.entries.iter().filter(|(name, entry)| !promised(name, entry)).map(|(name, _)| name.as_str()).collect();
        if missing.is_empty() && strays.is_empty() {
            return Ok(());
        }
        Err(format(format!(
            "index and shards disagree: not in its shard: {}; not in the index: {}",
            missing.join(", "),
            strays.join(", ")
        )))
    }

    fn add_safetensors(&mut self, path: &Path) -> Result<(), WeightsError> {
        let format = |reason: String| WeightsError::Format { path: path.into(), reason };
        let map = map(path)?;
        let (header_len, header): (usize, Metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| format(error.to_string()))?;
        // The length of the header comes first, in eight bytes.
        let start = 8 + header_len;
        let tensors = header.tensors();
        let end = tensors.values().map(|info| info.data_offsets.1).max().unwrap_or(0);
        if start + end != map.len() {
            return Err(format(format!("it should have {} bytes and has {}: it was cut off", start + end, map.len())));
        }
        for (name, info) in tensors {
            let (from, to) = info.data_offsets;
            let place = Place::Mapped(map.slice(start + from..start + to));
            let entry = Entry { file: path.into(), place, dtype: info.dtype, shape: info.shape.clone() };
            self.insert(name, entry)?;
        }
        self.metadata.extend(header.metadata().clone().into_iter().flatten());
        Ok(())
    }

    fn add_torch(&mut self, path: &Path) -> Result<(), WeightsError> {
        let map = map(path)?;
        let tensors = torch::read(&map).map_err(|reason| WeightsError::Format { path: path.into(), reason })?;
        let nesting = NESTING.into_iter().find(|key| tensors.keys().all(|name| name.starts_with(key)));
        for (name, tensor) in tensors {
            let name = name.strip_prefix(nesting.unwrap_or_default()).unwrap_or(&name).to_owned();
            let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
            let bytes = map.slice(tensor.bytes.clone());
            let place = if tensor.is_contiguous() { Place::Mapped(bytes) } else { Place::Strided(bytes, tensor) };
            self.insert(name, Entry { file: path.into(), place, dtype, shape })?;
        }
        Ok(())
    }

    fn insert(&mut self, name: String, entry: Entry) -> Result<(), WeightsError> {
        let path = entry.file.clone();
        match self.entries.insert(name.clone(), entry) {
            None => Ok(()),
            Some(other) => {
                let reason = format!("tensor {name} is also in {}", other.file.display());
                Err(WeightsError::Format { path, reason })
            }
        }
    }

    /// Returns the names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Returns the shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Returns whether a tensor is stored in bf16.
    pub fn is_bf16(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.dtype == Dtype::BF16)
    }

    /// Returns the free-form metadata of the files.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Gives the tensors other names; `None` leaves one out. Of two tensors that get the same name the last one, by its
    /// old name, stays.
    pub fn rename(mut self, f: impl Fn(&str) -> Option<String>) -> Self {
        let entries = std::mem::take(&mut self.entries);
        self.entries = entries.into_iter().filter_map(|(name, entry)| f(&name).map(|name| (name, entry))).collect();
        self
    }

    /// Returns the tensors of `self` and `other`; where both have a name, `other`'s counts.
    pub fn overlaid_by(mut self, other: Self) -> Self {
        self.entries.extend(other.entries);
        self.metadata.extend(other.metadata);
        self
    }

    /// Reads a tensor as f32, whatever float or integer type it is stored in.
    ///
    /// # Errors
    /// When there is no such tensor, or its type is not supported.
    pub fn get(&self, name: &str) -> Result<TensorData, WeightsError> {
        let data = self.stored(name)?;
        if data.dtype() == DType::F32 {
            return Ok(data);
        }
        Ok(TensorData::new(convert(data.bytes(), |b| bf16::from_le_bytes(b).to_f32()), data.shape().to_vec()))
    }

    /// Reads a tensor as bf16 if it is stored so, else as f32.
    ///
    /// # Errors
    /// See [`WeightFile::get`].
    pub fn stored(&self, name: &str) -> Result<TensorData, WeightsError> {
        let entry = self.entries.get(name).ok_or_else(|| WeightsError::NoTensor(name.into()))?;
        let format = |reason: String| WeightsError::Format { path: entry.file.clone(), reason };
        let bytes = match &entry.place {
            Place::Mapped(bytes) => bytes.clone(),
            Place::Strided(bytes, tensor) => tensor.gather(bytes).into(),
        };
        let shape = entry.shape.clone();
        let f32s = |values: Vec<f32>| Ok(TensorData::new(values, shape.clone()));
        match entry.dtype {
            Dtype::BF16 if is_aligned(&bytes, size_of::<bf16>()) => Ok(view(bytes, shape, DType::BF16)),
            Dtype::BF16 => Ok(TensorData::new(
                bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b)).collect::<Vec<_>>(),
                shape,
            )),
            Dtype::F32 if is_aligned(&bytes, size_of::<f32>()) => Ok(view(bytes, shape, DType::F32)),
            Dtype::F32 => f32s(convert(&bytes, f32::from_le_bytes)),
            Dtype::F64 => f32s(convert(&bytes, |b| f64::from_le_bytes(b) as f32)),
            Dtype::F16 => f32s(convert(&bytes, |b| f16::from_le_bytes(b).to_f32())),
            Dtype::I64 => f32s(convert(&bytes, |b| i64::from_le_bytes(b) as f32)),
            Dtype::I32 => f32s(convert(&bytes, |b| i32::from_le_bytes(b) as f32)),
            Dtype::U8 | Dtype::BOOL => f32s(convert(&bytes, |[b]: [u8; 1]| f32::from(b))),
            other => Err(format(format!("tensor {name} has the unsupported type {other:?}"))),
        }
    }
}

/// Maps a file into memory.
fn map(path: &Path) -> Result<bytes::Bytes, WeightsError> {
    let io = |source| WeightsError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: weights files are written under another name and renamed (see `WeightWriter`), so a mapped file does not
    // change.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(bytes::Bytes::from_owner(map))
}

/// Returns a tensor over bytes that stay where they are.
fn view(bytes: bytes::Bytes, shape: Vec<usize>, dtype: DType) -> TensorData {
    TensorData::from_bytes(Bytes::from_shared(bytes, AllocationProperty::File), shape, dtype)
}

fn is_aligned(bytes: &[u8], size: usize) -> bool {
    // A stored number is little-endian; elsewhere it has to be turned round.
    cfg!(target_endian = "little") && bytes.as_ptr().align_offset(size) == 0
}

fn convert<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| f(*chunk)).collect()
}

fn names_in(folder: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let io = |source| WeightsError::Io { path: folder.into(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        paths.push(entry.map_err(io)?.path());
    }
    paths.sort();
    Ok(paths)
}

fn find_index(folder: &Path) -> Result<Option<PathBuf>, WeightsError> {
    let is_index = |path: &PathBuf| path.to_string_lossy().ends_with(INDEX_SUFFIX);
    let found: Vec<PathBuf> = names_in(folder)?.into_iter().filter(is_index).collect();
    match found.as_slice() {
        [] => Ok(None),
        [index] => Ok(Some(index.clone())),
        _ => Err(WeightsError::Format { path: folder.into(), reason: "the folder holds several shard indices".into() }),
    }
}

fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let all = names_in(folder)?;
    let ending = |wanted: &str| -> Vec<PathBuf> {
        all.iter().filter(|path| path.extension().is_some_and(|ending| ending == wanted)).cloned().collect()
    };
    let found = [ending("safetensors"), ending("pt"), ending("bin")].into_iter().find(|found| !found.is_empty());
    found.ok_or_else(|| WeightsError::Format {
        path: folder.into(),
        reason: "the folder holds no .safetensors, .pt or .bin file".into(),
    })
}
