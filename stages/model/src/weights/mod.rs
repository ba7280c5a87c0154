//! The one door for weights: parameters by name ([`params`]), files in ([`file`]) and out ([`write`]), and strict loading
//! ([`load`]).
//!
//! Knows no architecture and no optimiser. Loading reports every missing, unexpected or wrongly shaped tensor, all at once.

mod file;
mod load;
mod params;
mod pickle;
mod torch;
mod write;

use std::path::PathBuf;

pub use file::WeightFile;
pub use load::{Held, check, load_into, load_into_held};
pub use params::{
    AnyParam, cast, drain, for_each_param, is_buffer, map_params, num_elements, set_trainable, specs, visit,
};
pub use write::{MAX_SHARD_BYTES, StoredType, TensorSpec, WeightWriter, save};

/// What can go wrong with weights.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file cannot be read or written.
    #[error("cannot access {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file is no weights file, or its index is broken.
    #[error("{path} is not a valid weights file: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor that was asked for by name is not there.
    #[error("no tensor named {0}")]
    NoTensor(String),
    /// A file does not fit a module.
    #[error("{0}")]
    Mismatch(Mismatch),
}

/// The differences between a module and a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Names that the module needs and the file lacks.
    pub missing: Vec<String>,
    /// Names that the file has and the module does not know.
    pub unexpected: Vec<String>,
    /// Name, shape in the module, shape in the file.
    pub wrong_shape: Vec<(String, Vec<usize>, Vec<usize>)>,
}

/// Pairs of names up to which the nearest ones are looked for: beyond, the layout is another one altogether.
const MAX_COMPARED: usize = 10_000;
/// Least similarity, 0 to 1, at which one name may have been meant by another.
const MIN_SIMILARITY: f64 = 0.6;

impl Mismatch {
    /// Returns whether there is no difference.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.wrong_shape.is_empty()
    }

    /// Returns the missing name that an unexpected one is most like.
    fn meant_by(&self, name: &str) -> Option<&str> {
        if self.missing.len() * self.unexpected.len() > MAX_COMPARED {
            return None;
        }
        let likeness = self.missing.iter().map(|missing| (strsim::normalized_levenshtein(name, missing), missing));
        let (similarity, nearest) = likeness.max_by(|a, b| a.0.total_cmp(&b.0))?;
        (similarity >= MIN_SIMILARITY).then_some(nearest.as_str())
    }
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "weights do not fit the model")?;
        for name in &self.missing {
            write!(f, "\n  missing: {name}")?;
        }
        for name in &self.unexpected {
            write!(f, "\n  unexpected: {name}")?;
            if let Some(nearest) = self.meant_by(name) {
                write!(f, " (the model has {nearest})")?;
            }
        }
        for (name, ours, theirs) in &self.wrong_shape {
            write!(f, "\n  wrong shape: {name} is {theirs:?}, the model needs {ours:?}")?;
        }
        Ok(())
    }
}
