//! Text generation: the likeliest token after each prompt, again and again, with the keys and values of what was read.
//!
//! Knows no tokenizer and no stop word. Legend: b batch, l positions.

use burn::tensor::TensorData;
use deepgen_contract::model::Padding;

use crate::language::KvCache;
use crate::rope::{PADDING_POSITION, PositionIds};
use crate::vlm::{PromptBatch, Reading, Vlm, VlmError};
use crate::{IntTensor, Tensor};

/// What was generated after each prompt.
#[derive(Debug, Clone)]
pub struct Continuation {
    /// Token ids of each row.
    pub ids: Vec<Vec<u32>>,
    /// Logits that each token was chosen by, `[b, vocab]` a step.
    pub logits: Vec<Tensor<2>>,
}

/// How the positions of generated tokens follow those of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextPosition {
    /// After the prompt's largest position, as if the whole text had been read at once.
    AfterPrompt,
    /// Less the row's padding once more: what transformers 4.56 does for left-padded rows.
    LessPadding,
}

impl Vlm {
    /// Generates `num_tokens` tokens after each prompt, always the likeliest one.
    ///
    /// # Errors
    /// When the prompts and their images do not fit together.
    pub fn generate_greedily(
        &self,
        batch: &PromptBatch,
        num_tokens: usize,
        next_position: NextPosition,
    ) -> Result<Continuation, VlmError> {
        let reading = Reading {
            queries: None,
            padding: Padding::Longest,
            max_length: None,
            entries: &[],
            is_vision_trained: false,
        };
        let (embeds, layout) = self.embed(batch, &reading)?;
        let mut cache = KvCache::default();
        let mut states = self.model.read_on(embeds, &layout.positions, &layout.is_real, &mut cache);
        let mut next: Vec<i64> = (0..layout.ids.len())
            .map(|row| {
                let is_real = &layout.is_real[row];
                let real = |axis: &Vec<Vec<i64>>| {
                    axis[row].iter().zip(is_real).filter(|(_, real)| **real).map(|(position, _)| *position).max()
                };
                let largest = layout.positions.axis.iter().filter_map(real).max().unwrap_or(PADDING_POSITION);
                let padding = is_real.iter().filter(|real| !**real).count() as i64;
                largest + 1 - if next_position == NextPosition::LessPadding { padding } else { 0 }
            })
            .collect();
        let mut continuation = Continuation { ids: vec![Vec::new(); next.len()], logits: Vec::new() };
        for step in 0..num_tokens {
            let [b, l, _] = states.dims();
            let logits: Tensor<2> = self.logits(states.clone().narrow(1, l - 1, 1)).squeeze_dim(1);
            let ids: Vec<i64> = logits.clone().argmax(1).into_data().iter::<i64>().collect();
            for (row, &id) in continuation.ids.iter_mut().zip(&ids) {
                row.push(id as u32);
            }
            continuation.logits.push(logits);
            if step + 1 == num_tokens {
                break;
            }
            let embeds = self
                .model
                .embed_tokens
                .forward(IntTensor::from_data(TensorData::new(ids, [b, 1]), &self.device()), self.dtype());
            let axis: Vec<Vec<i64>> = next.iter().map(|&position| vec![position]).collect();
            let positions = PositionIds { axis: [axis.clone(), axis.clone(), axis] };
            states = self.model.read_on(embeds, &positions, &vec![vec![true]; b], &mut cache);
            next.iter_mut().for_each(|position| *position += 1);
        }
        Ok(continuation)
    }
}
