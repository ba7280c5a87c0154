//! Text to token ids: a Hugging Face `tokenizer.json`, loaded, or trained here in the form of Qwen2.5's.
//!
//! Byte-level BPE after NFC and Qwen's splitting of words; special tokens come after the base vocabulary. Training is
//! deterministic: the same texts in any order give the same file. Knows no template.

use std::path::{Path, PathBuf};

use deepgen_contract::model::SpecialTokens;
use thiserror::Error;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, TokenizerImpl};

use crate::atomic;

/// Special tokens of Qwen2.5, in the order of their ids.
pub const SPECIAL_TOKENS: [&str; 14] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
];
/// Number of bytes, each of which is a token of every byte-level vocabulary.
const NUM_BYTES: usize = 256;
/// Qwen2.5's splitting: contractions, words with a leading character, single digits, punctuation, spaces.
const WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Why there is no tokenizer, or no tokens.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// The file is missing or unreadable.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no tokenizer.
    #[error("{}: not a tokenizer: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A special token is missing.
    #[error("the tokenizer has no token `{0}`")]
    NoToken(String),
    /// The vocabulary has no room for bytes and special tokens.
    #[error("a vocabulary of {0} has no room for {NUM_BYTES} bytes and the special tokens")]
    TooSmall(usize),
    /// The library refused.
    #[error("the tokenizer failed: {0}")]
    Library(String),
}

/// A tokenizer.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`.
    ///
    /// # Errors
    /// When the file is missing or no tokenizer.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let bytes = std::fs::read(path).map_err(|source| TokenizerError::Io { path: path.to_owned(), source })?;
        let format =
            |error: tokenizers::Error| TokenizerError::Format { path: path.to_owned(), reason: error.to_string() };
        Ok(Self { inner: tokenizers::Tokenizer::from_bytes(bytes).map_err(format)? })
    }

    /// Learns a vocabulary of at most `vocab_size` tokens, special tokens included, from `texts`.
    ///
    /// # Errors
    /// When `vocab_size` has no room for the bytes and the special tokens.
    pub fn train(texts: &[String], vocab_size: usize) -> Result<Self, TokenizerError> {
        let library = |error: tokenizers::Error| TokenizerError::Library(error.to_string());
        let base_size = vocab_size.checked_sub(SPECIAL_TOKENS.len()).filter(|&size| size >= NUM_BYTES);
        let base_size = base_size.ok_or(TokenizerError::TooSmall(vocab_size))?;
        let pattern = SplitPattern::Regex(WORDS.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(library)?;
        let bytes = ByteLevel::new(false, false, false);
        let mut tokenizer = TokenizerImpl::<BPE, NFC, Sequence, ByteLevel, ByteLevel>::new(BPE::default());
        tokenizer
            .with_normalizer(Some(NFC))
            .map_err(library)?
            .with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])))
            .with_post_processor(Some(bytes))
            .with_decoder(Some(bytes));
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(base_size)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        tokenizer.train(&mut trainer, texts.iter()).map_err(library)?;
        // Added last, so that their ids follow the base vocabulary.
        let special = SPECIAL_TOKENS.map(|token| AddedToken::from(token, true).normalized(false));
        tokenizer.add_special_tokens(special).map_err(library)?;
        let text = tokenizer.to_string(false).map_err(library)?;
        let inner = tokenizers::Tokenizer::from_bytes(text).map_err(library)?;
        Ok(Self { inner })
    }

    /// Writes `tokenizer.json`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TokenizerError> {
        let text = self.to_json()?;
        atomic::write(path, text.as_bytes()).map_err(|source| TokenizerError::Io { path: path.to_owned(), source })
    }

    /// Returns the content of `tokenizer.json`.
    ///
    /// # Errors
    /// When the library cannot write it.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        self.inner.to_string(true).map_err(|error| TokenizerError::Library(error.to_string()))
    }

    /// Returns the ids of `text`; special tokens written in it become their ids, and none is added.
    ///
    /// # Errors
    /// When the library refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode(text, false).map_err(|error| TokenizerError::Library(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns the text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// When the library refuses the ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(ids, true).map_err(|error| TokenizerError::Library(error.to_string()))
    }

    /// Returns the text of `ids`, special tokens written out.
    ///
    /// # Errors
    /// When the library refuses the ids.
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(ids, false).map_err(|error| TokenizerError::Library(error.to_string()))
    }

    /// Returns the token of an id, bytes spelt as the vocabulary spells them.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Returns the id of a token.
    ///
    /// # Errors
    /// When there is no such token.
    pub fn id(&self, token: &str) -> Result<u32, TokenizerError> {
        self.inner.token_to_id(token).ok_or_else(|| TokenizerError::NoToken(token.to_owned()))
    }

    /// Returns the ids of the special tokens that the model knows.
    ///
    /// # Errors
    /// When one is missing.
    pub fn special_tokens(&self) -> Result<SpecialTokens, TokenizerError> {
        Ok(SpecialTokens {
            pad: self.id("<|endoftext|>")?,
            vision_start: self.id("<|vision_start|>")?,
            vision_end: self.id("<|vision_end|>")?,
            image_pad: self.id("<|image_pad|>")?,
            video_pad: self.id("<|video_pad|>")?,
        })
    }

    /// Returns the number of tokens, special tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus() -> Vec<String> {
        let mut texts = Vec::new();
        for colour in ["red", "green", "blue", "yellow"] {
            for shape in ["circle", "square", "triangle", "cross"] {
                texts.push(format!("a {colour} {shape}"));
                texts.push(format!("the word \"go\" above a {colour} {shape}"));
            }
        }
        texts
    }

    #[test]
    fn words_of_the_corpus_become_single_tokens() {
        let tokenizer = Tokenizer::train(&corpus(), 400).unwrap();
        assert_eq!(tokenizer.encode("a red circle").unwrap().len(), 3);
        assert!(tokenizer.vocab_size() <= 400);
        for text in ["a red circle", "UNSEEN \u{4e2d}\u{6587} 123!", "  two  spaces\n"] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
        }
        assert!(matches!(Tokenizer::train(&corpus(), 200), Err(TokenizerError::TooSmall(200))));
    }

    #[test]
    fn special_tokens_follow_the_base_vocabulary_in_order() {
        let tokenizer = Tokenizer::train(&corpus(), 300).unwrap();
        let ids: Vec<u32> = SPECIAL_TOKENS.iter().map(|token| tokenizer.id(token).unwrap()).collect();
        let first = (tokenizer.vocab_size() - SPECIAL_TOKENS.len()) as u32;
        assert_eq!(ids, (first..first + 14).collect::<Vec<_>>());
        let special = tokenizer.special_tokens().unwrap();
        assert_eq!(
            tokenizer.encode("<|vision_start|><|image_pad|>").unwrap(),
            [special.vision_start, special.image_pad]
        );
        assert_eq!(special.pad, first);
    }

    #[test]
    fn training_is_deterministic_and_survives_the_file() {
        let tokenizer = Tokenizer::train(&corpus(), 350).unwrap();
        let mut backwards = corpus();
        backwards.reverse();
        assert_eq!(Tokenizer::train(&backwards, 350).unwrap().to_json().unwrap(), tokenizer.to_json().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        tokenizer.save(&path).unwrap();
        let loaded = Tokenizer::load(&path).unwrap();
        assert_eq!(loaded.to_json().unwrap(), tokenizer.to_json().unwrap());
        let text = "the word \"go\" above a blue cross";
        assert_eq!(loaded.encode(text).unwrap(), tokenizer.encode(text).unwrap());
        std::fs::write(&path, "{}").unwrap();
        assert!(Tokenizer::load(&path).is_err());
    }
}
