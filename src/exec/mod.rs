//! How jobs are started and followed: job directories ([`jobdir`]), the trait of an executor and its one
//! implementation so far, local child processes ([`local`]); commands are run by [`lane`].

pub mod command;
mod ending;
pub mod executor;
pub mod jobdir;
mod lane;
pub mod local;
mod memory;
pub mod process;

pub use executor::{ExecError, Executor, Report, Seal, What};
pub use local::LocalExecutor;
