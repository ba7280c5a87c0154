//! From values to verdicts: fingerprints, what is cached, what will run and why. Pure.

mod cost;
mod fingerprint;
pub mod graph;
#[cfg(test)]
pub(crate) mod nothing;
#[expect(clippy::module_inception, reason = "the plan is the noun of this module")]
mod plan;
pub mod render;
mod sizes;
#[cfg(test)]
pub(crate) mod tests;

pub use cost::{Cost, Costs, PastJob, PastResult, Work, past_jobs};
pub use fingerprint::{
    Difference, FINGERPRINT_VERSION, Identity, Part, Section, Sources, differences, parts, setting_leaves, value_leaves,
};
pub use plan::{ExternalFiles, Known, Missing, NodeRecord, Plan, PlannedNode, Reason, Verdict, external_content};
pub use sizes::{TrainingSizes, Unbuildable, training_sizes};
