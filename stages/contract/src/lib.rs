//! What a stage is, as data: the one crate that the orchestrator and the worker both know.
//!
//! It holds names, settings, artifact and job layouts, and events. It performs no I/O, knows no tensor and decides
//! nothing: `src/` plans with these types, `stages/worker` obeys them.

pub mod artifact;
pub mod base;
pub mod command;
pub mod data;
pub mod eval;
pub mod event;
pub mod flops;
pub mod id;
pub mod job;
pub mod memory;
pub mod model;
pub mod precision;
pub mod rl;
pub mod settings;
pub mod shapes;
pub mod stage;
pub mod tool;
pub mod train;
