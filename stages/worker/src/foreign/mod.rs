//! Weights in the layouts of others: recognised and collected ([`source`]), written ([`target`]), with the libraries'
//! configuration files ([`configs`]).
//!
//! Works on named tensors of mapped files: no model is built in memory, however large it is.

pub mod configs;
pub mod source;
pub mod target;

#[cfg(test)]
mod tests;
