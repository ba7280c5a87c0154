//! PyTorch checkpoints as `torch.save` has written them since version 1.6: a zip archive of a pickle and one
//! uncompressed entry for each storage.
//!
//! What `pickle` makes of the first is a tree of dictionaries; the tensors in it are views of the mapped file. Knows no module.

use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::tensor::Dtype;

use super::pickle::{Dict, MAX_DEPTH, Value, element_size, little, unpickle};

/// Bytes of all tensors' paths together: a dictionary that is reached in many ways is told as often.
const MAX_PATH_BYTES: usize = 64 << 20;

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TorchTensor {
    /// Bytes of its storage within the file, from its first element on.
    pub bytes: Range<usize>,
    /// Number type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Elements between neighbours, by axis.
    pub stride: Vec<usize>,
}

impl TorchTensor {
    /// Returns whether elements lie in the order of their indices.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.stride).rev().all(|(&len, &stride)| {
            let fits = len == 1 || stride == expected;
            expected *= len;
            fits
        })
    }

    /// Returns the bytes of its elements, all told; nothing for an absurd shape.
    fn num_bytes(&self) -> Option<usize> {
        // Without the zeros: no product of some of the sizes may be beyond a number either.
        let sizes = self.shape.iter().filter(|&&len| len > 0);
        let largest = sizes.copied().try_fold(element_size(self.dtype), usize::checked_mul)?;
        Some(if self.shape.contains(&0) { 0 } else { largest })
    }

    /// Returns the elements in the order of their indices; `storage` are the bytes that `self.bytes` names.
    pub fn gather(&self, storage: &[u8]) -> Vec<u8> {
        let size = element_size(self.dtype);
        let count: usize = self.shape.iter().product();
        let mut out = Vec::with_capacity(count * size);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..count {
            let at: usize = index.iter().zip(&self.stride).map(|(i, stride)| i * stride).sum();
            out.extend_from_slice(&storage[at * size..][..size]);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                if index[axis] < self.shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        out
    }
}

/// Returns the tensors of a checkpoint by their dotted paths through its dictionaries.
///
/// # Errors
/// Says what is damaged or not supported.
pub fn read(file: &[u8]) -> Result<BTreeMap<String, TorchTensor>, String> {
    let entries = zip_entries(file)?;
    let (root, pickle) = entries
        .iter()
        .find_map(|(name, range)| Some((name.strip_suffix("data.pkl")?, range.clone())))
        .ok_or("the archive holds no data.pkl: it was not written by torch.save")?;
    if entries.get(&format!("{root}byteorder")).is_some_and(|range| &file[range.clone()] == b"big") {
        return Err("it was written on a big-endian machine".into());
    }
    let storage = |key: &str| entries.get(&format!("{root}data/{key}")).cloned();
    let (value, dicts) = unpickle(&file[pickle])?;
    let mut collector = Collector { dicts: &dicts, storage: &storage, tensors: BTreeMap::new(), num_path_bytes: 0 };
    collector.collect(&value, "", 0)?;
    // Elements may be repeated by a stride of zero; what is read as a copy must fit into memory all the same.
    let is_absurd = |tensor: &TorchTensor| tensor.num_bytes().is_none_or(|bytes| bytes > file.len());
    match collector.tensors.iter().find(|(_, tensor)| is_absurd(tensor)) {
        Some((path, tensor)) => {
            Err(format!("tensor {path} claims the shape {:?}, more than the file holds", tensor.shape))
        }
        None if collector.tensors.is_empty() => Err("it holds no tensors".into()),
        None => Ok(collector.tensors),
    }
}

/// Gathers the tensors of nested dictionaries.
struct Collector<'a> {
    dicts: &'a [Dict],
    /// Returns where the storage of a key lies.
    storage: &'a dyn Fn(&str) -> Option<Range<usize>>,
    tensors: BTreeMap<String, TorchTensor>,
    num_path_bytes: usize,
}

impl Collector<'_> {
    fn collect(&mut self, value: &Value, path: &str, depth: usize) -> Result<(), String> {
        match value {
            Value::Dict(dict) => {
                let dicts = self.dicts;
                for (key, value) in &dicts[*dict] {
                    let Value::Text(key) = key else { continue };
                    let path = if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
                    self.num_path_bytes += path.len() + 1;
                    if depth == MAX_DEPTH || self.num_path_bytes > MAX_PATH_BYTES {
                        return Err("its dictionaries hold each other too often".into());
                    }
                    self.collect(value, &path, depth + 1)?;
                }
                Ok(())
            }
            Value::Tensor(view) => {
                let range = (self.storage)(&view.key)
                    .ok_or_else(|| format!("tensor {path}: its storage {} is missing", view.key))?;
                let bytes = view.place(&range).ok_or_else(|| format!("tensor {path} reaches beyond its storage"))?;
                let (shape, stride) = (view.shape.clone(), view.stride.clone());
                self.tensors.insert(path.into(), TorchTensor { bytes, dtype: view.dtype, shape, stride });
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Returns where the content of each entry of a zip archive lies. Archives beyond 4 GB are the normal case here.
fn zip_entries(file: &[u8]) -> Result<BTreeMap<String, Range<usize>>, String> {
    const END: &[u8] = b"PK\x05\x06";
    const END_64_LOCATOR: &[u8] = b"PK\x06\x07";
    const UNKNOWN: u64 = 0xFFFF_FFFF;
    let from = file.len().saturating_sub(22 + (1 << 16));
    let end = file[from..].windows(4).rposition(|window| window == END).map(|at| at + from);
    let end = end.ok_or("it is no zip archive, or it was cut off; checkpoints from before PyTorch 1.6 are not read")?;
    let (mut count, mut at) = (little::<2>(file, end + 10)?, little::<4>(file, end + 16)?);
    if end >= 20 && &file[end - 20..end - 16] == END_64_LOCATOR {
        let end_64 = (little::<8>(file, end - 12)? as usize).min(file.len());
        (count, at) = (little::<8>(file, end_64 + 32)?, little::<8>(file, end_64 + 48)?);
    }
    let mut at = at as usize;
    let mut entries = BTreeMap::new();
    for _ in 0..count {
        // From here on `at` lies inside the file, and no sum of it with sizes of 16 bits is too large for a number.
        if file.get(at..).is_none_or(|rest| !rest.starts_with(b"PK\x01\x02")) {
            return Err("the directory of the archive is damaged".into());
        }
        let method = little::<2>(file, at + 10)?;
        let (mut size, mut start) = (little::<4>(file, at + 24)?, little::<4>(file, at + 42)?);
        let [name, extra, comment] =
            [little::<2>(file, at + 28)?, little::<2>(file, at + 30)?, little::<2>(file, at + 32)?].map(|n| n as usize);
        let text = file.get(at + 46..at + 46 + name).ok_or("the file ends too early")?;
        let text = String::from_utf8_lossy(text).into_owned();
        // Extra fields: identity, length, content. Field 1 holds what did not fit into 32 bits, in this order.
        let (mut field, extra_end) = (at + 46 + name, at + 46 + name + extra);
        while field + 4 <= extra_end {
            let (id, len) = (little::<2>(file, field)?, little::<2>(file, field + 2)? as usize);
            if id == 1 {
                let mut place = field + 4;
                if size == UNKNOWN {
                    size = little::<8>(file, place)?;
                    place += 8;
                }
                if little::<4>(file, at + 20)? == UNKNOWN {
                    place += 8;
                }
                if start == UNKNOWN {
                    start = little::<8>(file, place)?;
                }
            }
            field += 4 + len;
        }
        if method != 0 {
            return Err(format!("the entry {text} is compressed, which torch.save never does"));
        }
        let beyond = || format!("the entry {text} reaches beyond the end of the file");
        let start = usize::try_from(start).ok().filter(|&start| start < file.len()).ok_or_else(beyond)?;
        let data = start + 30 + little::<2>(file, start + 26)? as usize + little::<2>(file, start + 28)? as usize;
        let end = usize::try_from(size).ok().and_then(|size| data.checked_add(size));
        let end = end.filter(|&end| end <= file.len()).ok_or_else(beyond)?;
        entries.insert(text, data..end);
        at += 46 + name + extra + comment;
    }
    Ok(entries)
}
