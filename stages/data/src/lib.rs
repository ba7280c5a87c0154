//! Data: sources and their readers, prepared data sets, mixtures as arithmetic, batches, tokenizer, the shapes world.
//!
//! The way of a sample: `sources` opens what `json_list`, `json_lines`, `tar_shards`, `parquet_rows` or `prompts` read,
//! here or in a store (`remote`, `fetch`); `check` tries each record; `prepare` indexes the good ones, `inspect` counts them;
//! `dataset` opens the result; `mix` writes and `mixture` opens a mixture over such sets, whose order is `stream`'s;
//! `batch` loads it as numbers. Knows no tensor and no network.

mod atomic;
pub mod batch;
pub mod check;
pub mod contamination;
pub mod dataset;
pub mod decode;
pub mod expand;
#[cfg(feature = "cloud")]
mod fetch;
pub mod field_names;
pub mod guess;
pub mod inspect;
pub mod json_lines;
pub mod json_list;
pub mod keyed;
pub mod mix;
pub mod mixture;
pub mod parquet_rows;
pub mod prefetch;
pub mod prepare;
pub mod processor;
pub mod prompt;
pub mod prompts;
pub mod remote;
pub mod resample;
pub mod resize;
pub mod sample;
pub mod shapes;
pub mod shard_files;
pub mod source;
pub mod sources;
pub mod stream;
pub mod tar_shards;
pub mod tokenizer;
