//! From files to values: stage files, pipeline files, experiments and `--set` become one [`Resolved`], or all of their
//! problems at once.

mod assignment;
mod axes;
#[cfg(test)]
mod bad_tests;
mod command;
pub mod diagnostic;
mod embedded;
mod expand;
#[cfg(test)]
mod feature_tests;
mod fields;
mod handed_on;
mod include;
mod layers;
mod load;
mod location;
pub mod path;
mod pieces;
mod pipeline;
mod policy;
mod presence;
mod project;
mod reference;
mod resolve;
mod resolved;
mod run_table;
pub mod schema;
mod scope;
mod shape;
mod smoke;
mod stage_file;
mod sweep;
#[cfg(test)]
pub(crate) mod tests;
mod tree;
mod typed;
mod when;
mod wiring;

pub use diagnostic::{Diagnostic, Label, Style, nearest, quoted_list, render};
pub use embedded::source_now;
pub use load::{FileKind, Names, Overrides, check, load, load_sweep, names};
pub use policy::{Backoff, Remedies};
pub use project::{BUILT_IN, root_around, stage_files};
pub use resolved::{Executor, MetricRef, Origin, Resolved, ResolvedNode, Sweep, Variant, snug};
pub use stage_file::PAPER_PROFILE;
