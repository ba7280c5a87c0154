//! The orchestrator: reads pipelines, plans them, runs their nodes as worker processes, and reports.
//!
//! It decides what to run and knows no tensor; `stages/` is what runs, behind a process boundary
//! (docs/design.md section 0).

pub mod cli;
pub mod commands;
pub mod compare;
pub mod environment;
pub mod exec;
pub mod mlflow;
pub mod plan;
pub mod progress;
pub mod report;
pub mod run;
pub mod spec;
pub mod store;
