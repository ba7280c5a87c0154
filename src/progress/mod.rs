//! What a person sees while a run goes on: one trait, and an implementation each for pipes, terminals, programs and
//! `--quiet`.

pub mod format;
pub mod json;
pub mod live;
pub mod pace;
pub mod plain;
#[expect(clippy::module_inception, reason = "the trait is the noun of this module")]
mod progress;

pub use progress::{Progress, Summary, choose};
