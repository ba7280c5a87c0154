//! From files into modules: strict by name and shape, in the type that is asked for.
//!
//! Knows how values are held, not where they are stored.

use std::collections::BTreeSet;

use burn::module::{Module, Param};
use burn::tensor::DType;

use super::params::{Change, change, for_each_param};
use super::{Mismatch, WeightFile, WeightsError};
use crate::Tensor;

/// The type that loaded parameters are held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// f32, whatever the file has.
    F32,
    /// bf16 where the file has bf16, else f32. On the CPU such a parameter is a view of the mapped file.
    AsStored,
}

/// Compares names and shapes of a module with the tensors of `file` whose names start with `prefix` (dot included).
///
/// No parameter is created: a module of any size costs nothing here.
///
/// # Errors
/// Lists all missing, unexpected and wrongly shaped tensors.
pub fn check<M: Module>(module: &M, file: &WeightFile, prefix: &str) -> Result<(), WeightsError> {
    let mut mismatch = Mismatch::default();
    let mut known = BTreeSet::new();
    for_each_param(module, |name, param| {
        let full = format!("{prefix}{name}");
        match file.shape(&full) {
            None => mismatch.missing.push(full.clone()),
            Some(shape) if shape != param.shape() => {
                mismatch.wrong_shape.push((full.clone(), param.shape(), shape.to_vec()));
            }
            Some(_) => {}
        }
        known.insert(full);
    });
    let is_unexpected = |name: &&str| name.starts_with(prefix) && !known.contains(*name);
    mismatch.unexpected = file.names().filter(is_unexpected).map(str::to_string).collect();
    if mismatch.is_empty() { Ok(()) } else { Err(WeightsError::Mismatch(mismatch)) }
}

/// Loads the tensors of `file` whose names start with `prefix` (dot included) into `module`, as f32.
///
/// Which parameters collect gradients, and the device, stay as they were.
///
/// # Errors
/// Lists all missing, unexpected and wrongly shaped tensors; `module` is then given up.
pub fn load_into<M: Module>(module: M, file: &WeightFile, prefix: &str) -> Result<M, WeightsError> {
    load_into_held(module, file, prefix, Held::F32)
}

/// Like [`load_into`], held as `held` says.
///
/// # Errors
/// See [`load_into`].
pub fn load_into_held<M: Module>(module: M, file: &WeightFile, prefix: &str, held: Held) -> Result<M, WeightsError> {
    check(&module, file, prefix)?;
    struct Load<'a> {
        file: &'a WeightFile,
        prefix: &'a str,
        held: Held,
        failure: Option<WeightsError>,
    }
    impl Change for Load<'_> {
        fn apply<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let name = format!("{}{name}", self.prefix);
            let data = match self.held {
                Held::F32 => self.file.get(&name),
                Held::AsStored => self.file.stored(&name),
            };
            match data {
                Ok(data) => {
                    let dtype = if data.dtype() == DType::BF16 { DType::BF16 } else { DType::F32 };
                    let tensor = Tensor::from_data(data, (&param.lazy_device(), dtype));
                    let id = param.id;
                    param.transform_for_load(tensor, id)
                }
                Err(error) => {
                    self.failure.get_or_insert(error);
                    param
                }
            }
        }
    }
    let (module, load) = change(module, Load { file, prefix, held, failure: None });
    load.failure.map_or(Ok(module), Err)
}
