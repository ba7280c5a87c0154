//! Captions to rows of token ids of one length, for the base's own text encoder.
//!
//! Knows no template: the base reads captions as they are. Padding is on the right, as CLIP's.

use burn::tensor::TensorData;
use deepgen_data::tokenizer::Tokenizer;
use deepgen_model::{Device, IntTensor};

use crate::error::{JobResult, OrFail};

/// Returns ids `[texts, length]`: cut at `length`, padded with `<|endoftext|>`.
///
/// # Errors
/// When a text cannot be encoded.
pub fn pad_right(tokenizer: &Tokenizer, texts: &[String], length: usize, device: &Device) -> JobResult<IntTensor<2>> {
    let mut rows = Vec::with_capacity(texts.len() * length);
    for text in texts {
        let mut ids = tokenizer.encode(text).or_input(|| format!("encode {text:?}"))?;
        ids.resize(length, tokenizer.special_tokens().or_input(|| "the tokenizer")?.pad);
        rows.extend(ids.into_iter().map(i64::from));
    }
    Ok(IntTensor::from_data(TensorData::new(rows, [texts.len(), length]), device))
}
