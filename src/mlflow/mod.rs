//! A run of ours as runs of an MLflow server: one for the run, and below it one for each node that was worked on.
//!
//! [`record`] says what MLflow is told, a pure function of what a report tells; [`client`] speaks its REST API; [`export`]
//! sends what the server does not hold yet, so that exporting again goes on where the last time ended.

pub mod client;
pub mod export;
pub mod record;
