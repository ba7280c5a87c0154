//! Why a case could not be compared. A number that differs is no error: it is a line that says FAIL.

use std::path::PathBuf;

use deepgen_model::parts::PartsError;
use deepgen_model::vlm::VlmError;
use deepgen_model::weights::WeightsError;

use crate::error::JobError;

/// Why a case could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum ParityError {
    /// A file is missing or unreadable.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No such kind of case.
    #[error("the kind `{kind}` is not known; known are {known}")]
    UnknownKind {
        /// What the case calls itself.
        kind: String,
        /// What there is.
        known: String,
    },
    /// The folder holds no case, or none of the asked name.
    #[error("{0}")]
    NoCase(String),
    /// A tensor is missing.
    #[error("{} has no tensor `{name}`", path.display())]
    NoTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// Expected tensors that no comparison covers: the runner does not know this case well enough.
    #[error("expected but not compared: {}", .0.join(", "))]
    NotCompared(Vec<String>),
    /// A setting is missing or of another type.
    #[error("{}: the setting `{key}` is missing or no {wanted}", path.display())]
    Setting {
        /// The file.
        path: PathBuf,
        /// Its path.
        key: String,
        /// The type.
        wanted: &'static str,
    },
    /// The case asks for something that this implementation does not have.
    #[error("{0}")]
    Unsupported(String),
    /// Weights do not fit.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Parts do not fit.
    #[error(transparent)]
    Parts(#[from] PartsError),
    /// Prompts do not fit.
    #[error(transparent)]
    Vlm(#[from] VlmError),
    /// The worker's own code refused.
    #[error(transparent)]
    Job(#[from] JobError),
    /// A computation panicked.
    #[error("the computation panicked: {0}")]
    Panic(String),
}

/// Result of everything a comparison does.
pub type ParityResult<T> = Result<T, ParityError>;
