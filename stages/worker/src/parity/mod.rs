//! `deepgen-worker parity`: the numbers of the reference implementations against ours, tensor by tensor.
//!
//! A case is a folder of inputs, weights and expected tensors (tests/fixtures/parity/README.md). `kind` says what it
//! compares, one file per part runs it through the code that jobs run, `compare` measures, `command` prints. Sizes come from
//! the case's config files only.

mod archive;
mod autoencoder;
mod case;
mod clip;
mod command;
mod compare;
mod connector;
mod curve;
mod diffusion;
mod error;
mod hub;
mod kind;
mod language;
mod optimizer;
mod policy;
mod preprocess;
mod readings;
mod whole;

pub use command::{USAGE, run};
