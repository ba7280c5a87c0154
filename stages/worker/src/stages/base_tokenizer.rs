//! `base_tokenizer`: trains a byte-level BPE with the Qwen special tokens on the texts of a mixture.

use std::collections::BTreeMap;

use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::base::BaseTokenizerSettings;
use deepgen_data::mixture::Mixture;
use deepgen_data::prompt;
use deepgen_data::tokenizer::Tokenizer;

use crate::base_folder::TOKENIZER_FILE;
use crate::error::{JobError, JobResult, OrFail};
use crate::job::{JobContext, JobEnd, JobReport};

/// Trains and writes `tokenizer.json`.
///
/// # Errors
/// When the texts yield fewer tokens than asked for: every size that follows depends on the number.
pub fn run(settings: &BaseTokenizerSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let mixture = Mixture::open(&context.input_path("data", ArtifactKind::Mixture)?).or_input(|| "the mixture")?;
    let mut texts = Vec::new();
    for member in 0..mixture.description().members.len() {
        for text in mixture.dataset(member).texts() {
            let text = text.or_io(|| "read a text")?;
            // In their template, as the model will read them.
            texts.push(prompt::text_to_image(&text));
            texts.push(text);
        }
    }
    let tokenizer = Tokenizer::train(&texts, settings.vocab_size).or_input(|| "train the tokenizer")?;
    if tokenizer.vocab_size() != settings.vocab_size {
        return Err(JobError::input(format!(
            "the texts yield {} tokens, not {}: set `vocab_size` to that number",
            tokenizer.vocab_size(),
            settings.vocab_size
        )));
    }
    tokenizer.save(&context.out().join(TOKENIZER_FILE)).or_io(|| "write the tokenizer")?;
    let lengths: Vec<usize> = texts
        .iter()
        .map(|text| tokenizer.encode(text).map(|ids| ids.len()))
        .collect::<Result<_, _>>()
        .or_input(|| "encode a text")?;
    let mean = lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64;
    let longest = lengths.into_iter().max().unwrap_or(0) as f64;
    let metrics = BTreeMap::from([
        ("tokenizer/vocab_size".to_owned(), settings.vocab_size as f64),
        ("tokenizer/mean_length".to_owned(), mean),
        ("tokenizer/longest".to_owned(), longest),
    ]);
    Ok(JobEnd::Done(JobReport { metrics, notes: Vec::new() }))
}
