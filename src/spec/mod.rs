//! From files to values: stage files, pipeline files, experiments and `--set` become one [`Resolved`], or all of their
//! problems at once.

mod assignment;
mod command;
pub mod diagnostic;
mod expand;
mod fields;
mod load;
pub mod path;
mod pipeline;
mod policy;
mod project;
mod resolve;
mod resolved;
mod shape;
mod smoke;
mod stage_file;
mod sweep;
#[cfg(test)]
pub(crate) mod tests;
mod tree;
mod wiring;

pub use diagnostic::{Diagnostic, Label, Style, nearest, quoted_list, render};
pub use load::{FileKind, Overrides, check, load, load_sweep};
pub use policy::{Backoff, Remedies};
pub use resolved::{Executor, MetricRef, Origin, Resolved, ResolvedNode, Sweep, Variant};
pub use stage_file::PAPER_PROFILE;
