//! Safetensors files out, tensor by tensor: only one converted copy exists at a time, and large sets are split into
//! shards with an index, as the Python libraries do.
//!
//! A file is written under a temporary name, synced and renamed: a reader never sees half a file. Knows no module.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use half::bf16;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::json;

use super::WeightsError;

/// Largest shard, the Python libraries' default.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Number type of stored weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    /// 32 bits.
    F32,
    /// Upper half of an f32, rounded to nearest even.
    Bf16,
}

impl StoredType {
    fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
        }
    }
}

/// A tensor that is going to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Number type.
    pub dtype: StoredType,
}

impl TensorSpec {
    fn num_bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as u64
    }
}

/// One file of a set.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    specs: Vec<TensorSpec>,
}

/// Writes announced tensors in their order into one file or several.
#[derive(Debug)]
pub struct WeightWriter {
    index: PathBuf,
    metadata: BTreeMap<String, String>,
    /// Shards that were not begun, last one first.
    waiting: Vec<Shard>,
    /// The shard at work, and the tensors it still awaits, last one first.
    open: Option<(Shard, BufWriter<File>, Vec<TensorSpec>)>,
    /// Shard by tensor.
    weight_map: BTreeMap<String, String>,
    num_bytes: u64,
    is_single: bool,
}

impl WeightWriter {
    /// Starts `folder/stem.safetensors`, or `folder/stem-00001-of-0000N.safetensors` and so on with an index, when the
    /// tensors have more than `max_shard_bytes`.
    ///
    /// # Errors
    /// When two tensors have one name.
    pub fn new(
        folder: &Path,
        stem: &str,
        specs: Vec<TensorSpec>,
        metadata: &BTreeMap<String, String>,
        max_shard_bytes: u64,
    ) -> Result<Self, WeightsError> {
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        let mut groups: Vec<(u64, Vec<TensorSpec>)> = vec![(0, Vec::new())];
        let num_bytes = specs.iter().map(TensorSpec::num_bytes).sum();
        let mut names = std::collections::BTreeSet::new();
        for spec in specs {
            if !names.insert(spec.name.clone()) {
                let reason = format!("two tensors are to be written as {}", spec.name);
                return Err(WeightsError::Format { path: index, reason });
            }
            let size = spec.num_bytes();
            match groups.last_mut() {
                Some((used, group)) if *used + size <= max_shard_bytes || group.is_empty() => {
                    *used += size;
                    group.push(spec);
                }
                _ => groups.push((size, vec![spec])),
            }
        }
        let num = groups.len();
        let name = |i: usize| match num {
            1 => format!("{stem}.safetensors"),
            _ => format!("{stem}-{:05}-of-{num:05}.safetensors", i + 1),
        };
        let mut waiting: Vec<Shard> =
            groups.into_iter().enumerate().map(|(i, (_, specs))| Shard { path: folder.join(name(i)), specs }).collect();
        waiting.reverse();
        let metadata = metadata.clone();
        let weight_map = BTreeMap::new();
        Ok(Self { index, metadata, waiting, open: None, weight_map, num_bytes, is_single: num == 1 })
    }

    /// Writes the next tensor, converted to its announced type; `data` may be flat.
    ///
    /// # Errors
    /// When it is not the announced one, or the disk is full.
    pub fn push(&mut self, name: &str, data: &TensorData) -> Result<(), WeightsError> {
        self.begin()?;
        let Some((shard, file, awaited)) = &mut self.open else {
            return Err(WeightsError::NoTensor(name.into()));
        };
        let spec = awaited
            .pop()
            .filter(|spec| spec.name == name && spec.shape.iter().product::<usize>() == data.num_elements());
        let Some(spec) = spec else {
            let reason = format!("tensor {name} {:?} comes out of turn", data.shape().to_vec());
            return Err(WeightsError::Format { path: shard.path.clone(), reason });
        };
        write_values(file, data, spec.dtype).map_err(|source| WeightsError::Io { path: shard.path.clone(), source })
    }

    /// Opens the next shard when the one at work is complete.
    fn begin(&mut self) -> Result<(), WeightsError> {
        if self.open.as_ref().is_some_and(|(_, _, awaited)| !awaited.is_empty()) {
            return Ok(());
        }
        self.close()?;
        let Some(shard) = self.waiting.pop() else { return Ok(()) };
        let io = |source| WeightsError::Io { path: shard.path.clone(), source };
        let mut file = BufWriter::with_capacity(1 << 20, File::create(temporary(&shard.path)).map_err(io)?);
        file.write_all(&header(&shard, &self.metadata)?).map_err(io)?;
        let awaited = shard.specs.iter().rev().cloned().collect();
        self.open = Some((shard, file, awaited));
        Ok(())
    }

    /// Syncs and renames the shard at work.
    fn close(&mut self) -> Result<(), WeightsError> {
        if let Some(spec) = self.open.as_ref().and_then(|(_, _, awaited)| awaited.last()) {
            return Err(WeightsError::NoTensor(spec.name.clone()));
        }
        let Some((shard, file, _)) = self.open.take() else { return Ok(()) };
        let part = temporary(&shard.path);
        let complete = |file: BufWriter<File>| {
            file.into_inner()?.sync_all()?;
            std::fs::rename(&part, &shard.path)
        };
        if let Err(source) = complete(file) {
            // It is of no use, and the next attempt writes it anew.
            let _ = std::fs::remove_file(&part);
            return Err(WeightsError::Io { path: shard.path, source });
        }
        let name = shard.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.weight_map.extend(shard.specs.into_iter().map(|spec| (spec.name, name.clone())));
        Ok(())
    }

    /// Completes the set: the last shard, and the index if there are several.
    ///
    /// # Errors
    /// When an announced tensor was not written, or the disk is full.
    pub fn finish(mut self) -> Result<(), WeightsError> {
        // A set without tensors still is a file.
        if self.open.is_none() {
            self.begin()?;
        }
        self.close()?;
        if let Some(spec) = self.waiting.last().and_then(|shard| shard.specs.first()) {
            return Err(WeightsError::NoTensor(spec.name.clone()));
        }
        if self.is_single {
            return Ok(());
        }
        let io = |source| WeightsError::Io { path: self.index.clone(), source };
        let index = json!({ "metadata": { "total_size": self.num_bytes }, "weight_map": self.weight_map });
        let text = serde_json::to_string_pretty(&index).map_err(|error| io(error.into()))?;
        let part = temporary(&self.index);
        std::fs::write(&part, text + "\n").map_err(io)?;
        File::open(&part).and_then(|file| file.sync_all()).map_err(io)?;
        std::fs::rename(&part, &self.index).map_err(io)
    }
}

impl Drop for WeightWriter {
    fn drop(&mut self) {
        if let Some((shard, ..)) = &self.open {
            // It was never going to be complete; the next attempt writes it anew.
            let _ = std::fs::remove_file(temporary(&shard.path));
        }
    }
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    PathBuf::from(name)
}

/// Returns the length of the header and the header, padded so that tensors start at a multiple of eight.
fn header(shard: &Shard, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, WeightsError> {
    let format = |reason: String| WeightsError::Format { path: shard.path.clone(), reason };
    let mut start = 0;
    let tensors = shard.specs.iter().map(|spec| {
        let end = start + spec.num_bytes() as usize;
        let info = TensorInfo { dtype: spec.dtype.dtype(), shape: spec.shape.clone(), data_offsets: (start, end) };
        start = end;
        (spec.name.clone(), info)
    });
    let metadata: Option<HashMap<String, String>> =
        (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect());
    let header = Metadata::new(metadata, tensors.collect()).map_err(|error| format(error.to_string()))?;
    let mut text = serde_json::to_vec(&header).map_err(|error| format(error.to_string()))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}

fn write_values(file: &mut impl Write, data: &TensorData, dtype: StoredType) -> std::io::Result<()> {
    let is_as_wanted = match dtype {
        StoredType::F32 => data.dtype() == DType::F32,
        StoredType::Bf16 => data.dtype() == DType::BF16,
    };
    if is_as_wanted && cfg!(target_endian = "little") {
        return file.write_all(data.bytes());
    }
    for value in data.iter::<f32>() {
        match dtype {
            StoredType::F32 => file.write_all(&value.to_le_bytes())?,
            StoredType::Bf16 => file.write_all(&bf16::from_f32(value).to_le_bytes())?,
        }
    }
    Ok(())
}

/// Writes tensors into one safetensors file.
///
/// # Errors
/// When two tensors have one name, or the file cannot be written.
pub fn save(
    path: &Path,
    tensors: &[(String, TensorData)],
    dtype: StoredType,
    metadata: &BTreeMap<String, String>,
) -> Result<(), WeightsError> {
    let spec =
        |(name, data): &(String, TensorData)| TensorSpec { name: name.clone(), shape: data.shape().to_vec(), dtype };
    let folder = path.parent().unwrap_or(Path::new(""));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let mut writer = WeightWriter::new(folder, &stem, tensors.iter().map(spec).collect(), metadata, u64::MAX)?;
    for (name, data) in tensors {
        writer.push(name, data)?;
    }
    writer.finish()
}
