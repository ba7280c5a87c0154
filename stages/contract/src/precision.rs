//! Number types of computation and of parameters that do not train.
//!
//! Knows no device. What always is f32, whatever is set here: norm statistics, softmax, rotary angles, timestep sinusoid,
//! loss, sampler steps, parameters that train, and the optimiser's state (docs/spec/model.md section 8).

use serde::{Deserialize, Serialize};

/// Number types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PrecisionSettings {
    /// Type that activations are computed in.
    pub compute: ComputeType,
    /// Type that parameters which do not train are held in.
    pub frozen: HeldType,
}

/// Type of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ComputeType {
    /// f32 on the CPU, bf16 on a GPU that has it: the release's policy.
    #[default]
    Auto,
    /// f32.
    F32,
    /// bf16.
    Bf16,
}

/// Type of parameters that do not train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum HeldType {
    /// As stored: bf16 stays bf16, half the memory, and on the CPU a view of the file. Widening it to f32 where it is used
    /// is exact, so on the CPU results are those of `f32` to the bit.
    #[default]
    Stored,
    /// Widened to f32 when loaded.
    F32,
}
