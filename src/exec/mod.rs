//! How jobs are started and followed: job directories ([`jobdir`]), the trait of an executor and its one
//! implementation so far, local child processes ([`local`]).

pub mod command;
pub mod executor;
pub mod jobdir;
pub mod local;
mod memory;
pub mod process;

pub use executor::{ExecError, Executor, Report, What};
pub use local::LocalExecutor;
