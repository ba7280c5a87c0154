//! What every kind of prompt has in common, and which prompts are kept for the benchmarks.
//!
//! A hash of the prompt decides, so the split needs no list and no seed and is the same in every source.

use std::path::PathBuf;

use deepgen_contract::shapes::{Expectation, PromptKind, ShapesWorld, SourceKind};
use thiserror::Error;

use super::caption::caption;
use super::draw::Draw;
use super::edit::edit;
use super::question::question;

/// One prompt in this many is held out, among kinds that can spare some.
const HELD_OUT_ONE_IN: u64 = 5;
/// Starts the text that is hashed. The number was chosen to hold out, of the 12 `two` captions and the 60 `count`
/// captions of the default world, about a fifth with every shape among them.
const HASH_SALT: &str = "shapes held out 29: ";
/// Draws after which a kind is taken to have no prompt on the side asked for.
pub(super) const MAX_ATTEMPTS: usize = 4000;

/// Why something of the shapes world could not be made.
#[derive(Debug, Error)]
pub enum ShapesError {
    /// Settings that contradict each other.
    #[error("shapes settings: {0}")]
    Settings(String),
    /// The world is so small that the hash left no prompt on this side.
    #[error("the world has no {kind:?} prompt for {split:?}")]
    NoPrompt {
        /// Kind of prompt.
        kind: PromptKind,
        /// Side of the split.
        split: Split,
    },
    /// The kind is of another sort of sample.
    #[error("{kind:?} is no kind of {wanted}")]
    WrongKind {
        /// Kind of prompt.
        kind: PromptKind,
        /// Sort of sample asked for.
        wanted: &'static str,
    },
    /// A file could not be written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An image could not be encoded.
    #[error("png encoder: {0}")]
    Png(#[from] image::ImageError),
    /// A record could not be written as JSON.
    #[error("json: {0}")]
    Json(#[from] serde_json::Error),
}

/// Who may see a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Training sources and RL prompt sets.
    Train,
    /// Benchmarks.
    HeldOut,
}

impl Split {
    /// Returns whether a prompt of `kind` with this hash key is on this side; kinds without held-out prompts are on
    /// both.
    pub(super) fn admits(self, kind: PromptKind, key: &str) -> bool {
        !kind.has_held_out() || is_held_out(kind, key) == (self == Self::HeldOut)
    }
}

/// Text for the model and what its image must show.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Kind of prompt.
    pub kind: PromptKind,
    /// Caption or instruction.
    pub text: String,
    /// Answer key.
    pub expectation: Expectation,
}

/// Returns whether training never sees this prompt.
///
/// The key is the caption itself, or [`Edit::key`](super::Edit::key) for an edit: there are few instructions, so
/// instruction and source scene are held out together.
pub fn is_held_out(kind: PromptKind, key: &str) -> bool {
    let mut word = [0; 8];
    word.copy_from_slice(&blake3::hash(format!("{HASH_SALT}{key}").as_bytes()).as_bytes()[..8]);
    kind.has_held_out() && u64::from_le_bytes(word).is_multiple_of(HELD_OUT_ONE_IN)
}

/// Returns `count` texts of every kind, questions with their answers: what a vocabulary is learned from.
///
/// # Errors
/// When the world is not valid.
pub fn corpus(world: &ShapesWorld, seed: u64, count: usize) -> Result<Vec<String>, ShapesError> {
    world.validate().map_err(ShapesError::Settings)?;
    let text = |index: usize| -> Result<String, ShapesError> {
        let kind = PromptKind::ALL[index % PromptKind::ALL.len()];
        let mut draw = Draw::new(seed, "shapes/corpus", index as u64);
        if kind.is_edit() {
            return Ok(edit(world, kind, Split::Train, &mut draw)?.prompt.text);
        }
        if SourceKind::Qa.kinds().contains(&kind) {
            let asked = question(world, kind, &mut draw)?;
            return Ok(format!("{} {}", asked.question, asked.answer));
        }
        Ok(caption(world, kind, Split::Train, &mut draw)?.prompt.text)
    };
    (0..count).map(text).collect()
}
