//! Who looks at generated images, what they conclude, and how conclusions become scores and rewards.
//!
//! `reading` finds what is in the pixels of a shapes-world image, `rule` compares it with what was asked for, `http`
//! asks a chat model instead, `cached` remembers; `benchmark` holds each benchmark's form, formula and published
//! numbers, `scoring` asks its questions, `table` aggregates; `reward` and `rewards` serve reinforcement learning. Knows no model and no data source.

pub mod benchmark;
pub mod bits;
pub mod cached;
pub mod checklist;
pub mod http;
pub mod judge;
pub mod rating;
pub mod reading;
pub mod reward;
pub mod rewards;
pub mod rule;
pub mod scoring;
pub mod table;
pub mod text;
pub mod verdict;
