//! The chat templates around captions and instructions (docs/spec/model.md section 2.3), verbatim.
//!
//! There is no system turn, texts are not stripped, and an edit does not get the generation prefix.

use thiserror::Error;

use crate::tokenizer::{Tokenizer, TokenizerError};

/// Why a prompt has no ids.
#[derive(Debug, Error)]
pub enum PromptError {
    /// The tokenizer refused.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The text itself holds image placeholders, which would take the places of the references.
    #[error("the text holds {found} image placeholders beside the {expected} of its references")]
    Placeholders {
        /// Placeholders beside the expected ones.
        found: usize,
        /// Those of the references.
        expected: usize,
    },
}

/// Returns the prompt of a caption.
pub fn text_to_image(text: &str) -> String {
    format!("<|im_start|>user\nGenerate an image: {text}<|im_end|>\n<|im_start|>assistant\n")
}

/// Returns the prompt of an instruction; `reference_tokens` are the vision tokens of each reference.
pub fn image_to_image(text: &str, reference_tokens: &[usize]) -> String {
    let reference = |&n: &usize| format!("<|vision_start|>{}<|vision_end|>", "<|image_pad|>".repeat(n));
    let references: String = reference_tokens.iter().map(reference).collect();
    format!("<|im_start|>user\n{references}\n{text}<|im_end|>\n<|im_start|>assistant\n")
}

/// Returns the ids of a caption's prompt.
///
/// # Errors
/// When the caption holds image placeholders.
pub fn encode_text_to_image(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, PromptError> {
    encode(tokenizer, &text_to_image(text), 0)
}

/// Returns the ids of an instruction's prompt.
///
/// # Errors
/// When the instruction holds image placeholders.
pub fn encode_image_to_image(
    tokenizer: &Tokenizer,
    text: &str,
    reference_tokens: &[usize],
) -> Result<Vec<u32>, PromptError> {
    encode(tokenizer, &image_to_image(text, reference_tokens), reference_tokens.iter().sum())
}

fn encode(tokenizer: &Tokenizer, prompt: &str, expected: usize) -> Result<Vec<u32>, PromptError> {
    let ids = tokenizer.encode(prompt)?;
    let image_pad = tokenizer.id("<|image_pad|>")?;
    let found = ids.iter().filter(|&&id| id == image_pad).count();
    match found == expected {
        true => Ok(ids),
        false => Err(PromptError::Placeholders { found: found - expected, expected }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_those_of_the_release() {
        assert_eq!(text_to_image(""), "<|im_start|>user\nGenerate an image: <|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(
            image_to_image("make it blue", &[2, 1]),
            "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|><|vision_start|><|image_pad|>\
             <|vision_end|>\nmake it blue<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn ids_hold_a_placeholder_for_each_vision_token() {
        let tokenizer = Tokenizer::train(&["make it blue".into()], 300).unwrap();
        let special = tokenizer.special_tokens().unwrap();
        let ids = encode_image_to_image(&tokenizer, "make it blue", &[4, 1]).unwrap();
        assert_eq!(ids.iter().filter(|&&id| id == special.image_pad).count(), 5);
        assert_eq!(ids.iter().filter(|&&id| id == special.vision_start).count(), 2);
        assert_eq!(ids[0], tokenizer.id("<|im_start|>").unwrap());
        let smuggled = encode_text_to_image(&tokenizer, "a <|image_pad|> dog");
        assert!(matches!(smuggled, Err(PromptError::Placeholders { found: 1, expected: 0 })));
    }
}
