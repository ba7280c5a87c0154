//! Data: sources and their readers, prepared data sets, mixtures as arithmetic, batches, tokenizer, the shapes world.
//!
//! The way of a sample: `json_list`, `tar_shards` or `prompts` find records; `prepare` checks and indexes them;
//! `dataset` opens the result; `mix` writes and `mixture` opens a mixture over such sets, whose order is `stream`'s;
//! `batch` loads it as numbers. Knows no tensor and no network.

mod atomic;
pub mod batch;
pub mod contamination;
pub mod dataset;
pub mod decode;
pub mod json_list;
pub mod keyed;
pub mod mix;
pub mod mixture;
pub mod prefetch;
pub mod prepare;
pub mod processor;
pub mod prompt;
pub mod prompts;
pub mod resample;
pub mod resize;
pub mod sample;
pub mod shapes;
pub mod source;
pub mod stream;
pub mod tar_shards;
pub mod tokenizer;
