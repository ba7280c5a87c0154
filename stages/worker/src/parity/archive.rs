//! Reference tensors of one safetensors file, integers kept exact. Weights go through `deepgen_model::weights` instead.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use safetensors::{Dtype, SafeTensors};

use super::error::{ParityError, ParityResult};

/// Values of a reference tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Floats.
    Float(Vec<f32>),
    /// Integers and masks.
    Int(Vec<i64>),
}

/// A reference tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Values,
}

impl Array {
    /// Returns the values as floats.
    pub fn floats(&self) -> Vec<f32> {
        match &self.values {
            Values::Float(values) => values.clone(),
            Values::Int(values) => values.iter().map(|&value| value as f32).collect(),
        }
    }
}

/// The tensors of a file.
#[derive(Debug, Clone)]
pub struct Archive {
    path: PathBuf,
    arrays: BTreeMap<String, Array>,
}

impl Archive {
    /// Reads a file.
    ///
    /// # Errors
    /// When it is missing, no safetensors file, or holds a type that no case has.
    pub fn open(path: &Path) -> ParityResult<Self> {
        let bytes = std::fs::read(path).map_err(|source| ParityError::Io { path: path.into(), source })?;
        let format = |reason: String| ParityError::Format { path: path.into(), reason };
        let file = SafeTensors::deserialize(&bytes).map_err(|error| format(error.to_string()))?;
        let mut arrays = BTreeMap::new();
        for (name, view) in file.tensors() {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => Values::Float(words(data, f32::from_le_bytes)),
                Dtype::F64 => Values::Float(words(data, |b| f64::from_le_bytes(b) as f32)),
                Dtype::I64 => Values::Int(words(data, i64::from_le_bytes)),
                Dtype::I32 => Values::Int(words(data, |b| i64::from(i32::from_le_bytes(b)))),
                Dtype::U8 | Dtype::BOOL => Values::Int(words(data, |[b]: [u8; 1]| i64::from(b))),
                other => return Err(format(format!("tensor {name} has the unsupported type {other:?}"))),
            };
            arrays.insert(name, Array { shape: view.shape().to_vec(), values });
        }
        Ok(Self { path: path.into(), arrays })
    }

    /// Returns the names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.arrays.keys().map(String::as_str)
    }

    /// Returns whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.arrays.contains_key(name)
    }

    /// Returns a tensor.
    ///
    /// # Errors
    /// When it is not there.
    pub fn get(&self, name: &str) -> ParityResult<&Array> {
        self.arrays.get(name).ok_or_else(|| ParityError::NoTensor { path: self.path.clone(), name: name.into() })
    }

    /// Returns a tensor as floats in its shape.
    ///
    /// # Errors
    /// As [`Archive::get`].
    pub fn data(&self, name: &str) -> ParityResult<TensorData> {
        let array = self.get(name)?;
        Ok(TensorData::new(array.floats(), array.shape.clone()))
    }

    /// Returns a tensor's floats.
    ///
    /// # Errors
    /// As [`Archive::get`].
    pub fn floats(&self, name: &str) -> ParityResult<Vec<f32>> {
        Ok(self.get(name)?.floats())
    }

    /// Returns integers, the last axis as a row.
    ///
    /// # Errors
    /// When there is no such tensor or it holds floats.
    pub fn rows(&self, name: &str) -> ParityResult<Vec<Vec<i64>>> {
        let array = self.get(name)?;
        let Values::Int(values) = &array.values else {
            return Err(ParityError::Format { path: self.path.clone(), reason: format!("{name} holds no integers") });
        };
        let width = array.shape.last().copied().unwrap_or(1).max(1);
        Ok(values.chunks(width).map(<[i64]>::to_vec).collect())
    }

    /// Returns the 2-norm of all tensors together.
    pub fn norm(&self) -> f64 {
        let squares = self.arrays.values().flat_map(Array::floats).map(|value| f64::from(value).powi(2));
        squares.sum::<f64>().sqrt()
    }

    /// Returns how many tensors `prefix0`, `prefix1`, ... there are, other name parts after the number allowed.
    pub fn count(&self, prefix: &str) -> usize {
        (0..)
            .take_while(|i| {
                let exact = format!("{prefix}{i}");
                let longer = format!("{exact}.");
                self.arrays.keys().any(|name| *name == exact || name.starts_with(&longer))
            })
            .count()
    }
}

fn words<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| f(*chunk)).collect()
}
