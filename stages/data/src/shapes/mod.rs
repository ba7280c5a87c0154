//! The shapes world as a source of data: seeded scenes, the language about them, edits, questions, benchmarks, and all
//! of it on disk in the formats of docs/spec/data.md.
//!
//! `deepgen_contract::shapes` says what a scene is; here scenes are drawn by chance and put into words. Everything is
//! a function of settings, a seed and a place, so sample 7 is the same whether or not sample 6 was made.

mod benchmark;
mod caption;
mod draw;
mod edit;
mod parse;
mod phrase;
mod prompt;
mod question;
mod render;
mod write;

pub use benchmark::benchmark;
pub use caption::{Captioned, caption};
pub use draw::Draw;
pub use edit::{Edit, edit};
pub use parse::expectation_of;
pub use phrase::describe;
pub use prompt::{Prompt, ShapesError, Split, corpus, is_held_out};
pub use question::{Question, question};
pub use render::{png, render};
pub use write::{WrittenSource, write_source};
