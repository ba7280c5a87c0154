//! How a job ends early: a cause the orchestrator can act on, and a message for a person.
//!
//! Knows no stage. Every library error becomes one of these where it is first met, with the thing it was met on.

use std::fmt::Display;

use deepgen_contract::job::FailureCause;

/// A job that cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct JobError {
    /// Which remedy may help.
    pub cause: FailureCause,
    /// What happened, where, and what to do.
    pub message: String,
}

impl JobError {
    /// Settings or inputs that no retry can mend.
    pub fn input(message: impl Into<String>) -> Self {
        Self { cause: FailureCause::Input, message: message.into() }
    }

    /// A broken invariant.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { cause: FailureCause::Internal, message: message.into() }
    }

    /// A value that is NaN or infinite.
    pub fn non_finite(message: impl Into<String>) -> Self {
        Self { cause: FailureCause::NonFinite, message: message.into() }
    }
}

/// Result of everything a job does.
pub type JobResult<T> = Result<T, JobError>;

/// Turns library errors into [`JobError`]s that say what was being done.
pub trait OrFail<T> {
    /// Blames the settings or the inputs.
    fn or_input<D: Display>(self, doing: impl FnOnce() -> D) -> JobResult<T>;
    /// Blames reading or writing.
    fn or_io<D: Display>(self, doing: impl FnOnce() -> D) -> JobResult<T>;
}

impl<T, E: Display> OrFail<T> for Result<T, E> {
    fn or_input<D: Display>(self, doing: impl FnOnce() -> D) -> JobResult<T> {
        self.map_err(|error| JobError { cause: FailureCause::Input, message: format!("{}: {error}", doing()) })
    }

    fn or_io<D: Display>(self, doing: impl FnOnce() -> D) -> JobResult<T> {
        self.map_err(|error| JobError { cause: FailureCause::Io, message: format!("{}: {error}", doing()) })
    }
}
