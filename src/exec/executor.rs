//! What an executor is: it starts a job directory somewhere, follows it, and can stop it.
//!
//! Everything it learns goes into one channel as [`Report`]s. Knows no scheduling and seals nothing.

use std::io;
use std::path::PathBuf;

use deepgen_contract::event::WorkerEvent;
use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::job::JobSpec;

use crate::run::scheduler::{Cancel, Ended};

/// Something an executor learnt about an attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Node of the attempt.
    pub node: NodeName,
    /// Its number.
    pub attempt: u32,
    /// What was learnt.
    pub what: What,
}

/// What was learnt.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// The worker said something.
    Said(Vec<WorkerEvent>),
    /// The attempt ended; nothing follows.
    Ended(Ended),
}

/// A job that cannot be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The job directory cannot be written.
    #[error("cannot write the job directory {path}: {source}")]
    JobDir {
        /// The directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The worker cannot be started.
    #[error("cannot start the worker {worker}: {source}")]
    Spawn {
        /// The program.
        worker: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// Starts jobs and follows them.
pub trait Executor {
    /// Writes the job directory of `job`, gives an attempt after the first the lease, and starts a worker on it.
    ///
    /// # Errors
    /// When no worker was started.
    fn launch(&mut self, job: &JobSpec) -> Result<(), ExecError>;

    /// Follows a worker that an earlier orchestrator started.
    fn attach(&mut self, node: &NodeName, fingerprint: &Fingerprint, attempt: u32);

    /// Asks the worker of a node to stop, or kills it. A worker that ended meanwhile is no error.
    fn cancel(&mut self, node: &NodeName, how: Cancel);
}
