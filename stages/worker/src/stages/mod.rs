//! One file per stage kind: what `job` dispatches to. Each takes its settings and the job's context and returns an end.

pub mod assemble;
pub mod base_dit;
pub mod base_tokenizer;
pub mod base_vae;
pub mod base_vlm;
pub mod generate;
pub mod handoff;
pub mod import;
pub mod mix;
pub mod mrgrpo;
pub mod prepare;
pub mod score;
pub mod train;
