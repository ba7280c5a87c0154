//! Samples to what the model takes: token ids and pixel values, a list each, since sizes differ within a batch.
//!
//! Loading a batch is a function of the mixture, the shard and the batch's number. Padding is the model's.

use deepgen_contract::data::ImageSettings;
use deepgen_contract::model::VisionConfig;
use thiserror::Error;

use crate::keyed::StreamKey;
use crate::mixture::{Mixture, MixtureError};
use crate::prompt::{PromptError, encode_image_to_image, encode_text_to_image};
use crate::resize::{Pixels, ResizeError, fit};
use crate::sample::{Sample, Task};
use crate::source::ReadError;
use crate::stream::{ItemRef, Shard};
use crate::tokenizer::Tokenizer;

/// Other samples of the same set that are tried when one cannot be read.
const MAX_REPLACEMENTS: u64 = 8;

/// A batch of samples of one task.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Task of all samples.
    pub task: Task,
    /// File and record of each sample.
    pub keys: Vec<String>,
    /// Captions or instructions, after caption dropout.
    pub texts: Vec<String>,
    /// Ids of each text in its template.
    pub ids: Vec<Vec<u32>>,
    /// Images to be made.
    pub images: Vec<Pixels>,
    /// References of each sample; empty lists for [`Task::TextToImage`].
    pub references: Vec<Vec<Pixels>>,
    /// Samples that could not be read and were replaced, in words.
    pub replaced: Vec<String>,
}

/// Why there is no batch.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The mixture has no such batch.
    #[error(transparent)]
    Mixture(#[from] MixtureError),
    /// A sample and all its replacements failed.
    #[error("{num_tried} samples in a row cannot be used; the last: {last}")]
    Unreadable {
        /// Samples tried.
        num_tried: u64,
        /// Why the last failed.
        last: Box<SampleError>,
    },
}

/// Why a sample cannot be used.
#[derive(Debug, Error)]
pub enum SampleError {
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Its image cannot be brought to size.
    #[error("{key}: {source}")]
    Resize {
        /// The sample.
        key: String,
        /// Why.
        source: ResizeError,
    },
    /// Its text cannot be tokenised.
    #[error("{key}: {source}")]
    Prompt {
        /// The sample.
        key: String,
        /// Why.
        source: PromptError,
    },
}

/// Makes batches of a mixture.
#[derive(Debug)]
pub struct Loader {
    /// The samples.
    pub mixture: Mixture,
    /// Text to ids.
    pub tokenizer: Tokenizer,
    /// How images are brought to size.
    pub image: ImageSettings,
    /// Vision tower: how many tokens a reference takes.
    pub vision: VisionConfig,
    /// Chance that a caption is replaced by the empty text; instructions never are.
    pub caption_dropout: f64,
}

/// A sample as numbers.
struct Prepared {
    key: String,
    text: String,
    ids: Vec<u32>,
    image: Pixels,
    references: Vec<Pixels>,
}

impl Loader {
    /// Loads batch `micro_iteration` of this program: the same call gives the same batch.
    ///
    /// # Errors
    /// When the mixture holds prompts, or sample after sample cannot be read.
    pub fn load(&self, shard: Shard, micro_iteration: u64) -> Result<Batch, LoadError> {
        let slot = self.mixture.slot(shard, micro_iteration)?;
        // Each rank has draws of its own: the release gives all ranks the same ones, which looks unintended.
        let dropout = StreamKey::derive(shard.seed, "caption-dropout").child(shard.position(micro_iteration));
        self.collate(slot.task, &slot.items, Some(dropout))
    }

    /// Loads given samples, with their captions as they are: for validation.
    ///
    /// # Errors
    /// When sample after sample cannot be read.
    pub fn load_items(&self, task: Task, items: &[ItemRef]) -> Result<Batch, LoadError> {
        self.collate(task, items, None)
    }

    /// Loads given samples with caption dropout drawn at `place` of a stream of its own: for the auxiliary loss.
    ///
    /// # Errors
    /// When sample after sample cannot be read.
    pub fn load_items_with_dropout(
        &self,
        task: Task,
        items: &[ItemRef],
        seed: u64,
        place: u64,
    ) -> Result<Batch, LoadError> {
        self.collate(task, items, Some(StreamKey::derive(seed, "caption-dropout-items").child(place)))
    }

    fn collate(&self, task: Task, items: &[ItemRef], dropout: Option<StreamKey>) -> Result<Batch, LoadError> {
        let mut batch = Batch {
            task,
            keys: Vec::new(),
            texts: Vec::new(),
            ids: Vec::new(),
            images: Vec::new(),
            references: Vec::new(),
            replaced: Vec::new(),
        };
        for (i, &item) in items.iter().enumerate() {
            let drops =
                dropout.is_some_and(|key| task == Task::TextToImage && key.unit(i as u64) < self.caption_dropout);
            let prepared = self.prepared(item, drops, &mut batch.replaced)?;
            batch.keys.push(prepared.key);
            batch.texts.push(prepared.text);
            batch.ids.push(prepared.ids);
            batch.images.push(prepared.image);
            batch.references.push(prepared.references);
        }
        Ok(batch)
    }

    /// Returns a sample as numbers, or another of the same set when it cannot be used.
    fn prepared(&self, item: ItemRef, drops: bool, replaced: &mut Vec<String>) -> Result<Prepared, LoadError> {
        let size = self.mixture.trainable_size(item.member);
        // Depends on the sample alone, so a resumed run finds the same replacement.
        let key = StreamKey::derive(item.index, "replacement").child(item.member as u64);
        let mut place = item;
        for attempt in 0.. {
            let sample = self.mixture.sample(place).map_err(SampleError::from);
            match sample.and_then(|sample| self.numbers(sample, drops)) {
                Ok(prepared) => return Ok(prepared),
                Err(error) if attempt == MAX_REPLACEMENTS => {
                    return Err(LoadError::Unreadable { num_tried: attempt + 1, last: Box::new(error) });
                }
                Err(error) => replaced.push(error.to_string()),
            }
            place.index = key.below(attempt, size);
        }
        unreachable!("the last attempt returns")
    }

    fn numbers(&self, sample: Sample, drops: bool) -> Result<Prepared, SampleError> {
        let Sample { task, text, image, references, key } = sample;
        let sized = |image| fit(image, &self.image).map_err(|source| SampleError::Resize { key: key.clone(), source });
        let image = sized(&image)?;
        let references = references.iter().map(sized).collect::<Result<Vec<_>, _>>()?;
        let text = if drops { String::new() } else { text };
        let tokens = |pixels: &Pixels| self.vision.num_tokens(pixels.height, pixels.width);
        let ids = match task {
            Task::TextToImage => encode_text_to_image(&self.tokenizer, &text),
            Task::ImageToImage => {
                let tokens: Vec<usize> = references.iter().map(tokens).collect();
                encode_image_to_image(&self.tokenizer, &text, &tokens)
            }
        };
        let ids = ids.map_err(|source| SampleError::Prompt { key: key.clone(), source })?;
        Ok(Prepared { key, text, ids, image, references })
    }
}
