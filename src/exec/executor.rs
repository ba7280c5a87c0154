//! What an executor is: it starts a job directory somewhere, follows it, and can stop it.
//!
//! Everything it learns goes into one channel as [`Report`]s. Knows no scheduling, and of sealing only when it may happen.

use std::io;
use std::path::PathBuf;

use deepgen_contract::artifact::Manifest;
use deepgen_contract::event::WorkerEvent;
use deepgen_contract::id::NodeName;
use deepgen_contract::job::{JobSpec, Outcome};

use crate::run::scheduler::{Cancel, Ended};

/// Seals what an attempt with this outcome left; blocks, and says why when it cannot.
pub type Seal = Box<dyn FnOnce(Outcome) -> Result<Manifest, String> + Send>;

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
    /// The attempt ended well, and its result was sealed or cannot be; nothing follows.
    Sealed(Box<Result<Manifest, String>>),
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
    /// Writes the job directory of `job`, gives an attempt after the first the lease, and starts a process on it. Who sees
    /// it end well may call `seal` there and then, and reports [`What::Sealed`]; otherwise whoever hears the report seals.
    ///
    /// # Errors
    /// When nothing was started and nothing will be reported.
    fn launch(&mut self, job: JobSpec, seal: Seal) -> Result<(), ExecError>;

    /// Follows the process of a job that an earlier orchestrator started.
    fn attach(&mut self, job: JobSpec);

    /// Asks the worker of a node to stop, or kills it. A worker that ended meanwhile is no error.
    fn cancel(&mut self, node: &NodeName, how: Cancel);
}
