//! A batch of prompts laid out for the decoder (docs/spec/model.md section 2.4): padded on the left, queries appended, over-long
//! ones cut at their beginning.
//!
//! Knows token ids and the grids of images, no weights and no tensors.

use deepgen_contract::model::{Padding, SpecialTokens};

use crate::rope::{Grid, PositionIds, RopeError};

/// Token id that stands for a query when positions are computed.
const QUERY_ID: u32 = 0;

/// Why a batch of prompts could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VlmError {
    /// The batch holds no prompt.
    #[error("the batch holds no prompt")]
    EmptyBatch,
    /// Prompts and image lists do not pair up.
    #[error("{num_prompts} prompts came with {num_lists} lists of images")]
    ImageLists {
        /// Prompts.
        num_prompts: usize,
        /// Lists.
        num_lists: usize,
    },
    /// A prompt is longer than the fixed length it is to be padded to.
    #[error("a prompt of {num_tokens} tokens does not fit padding = {{ fixed = {fixed} }}")]
    TooLong {
        /// Tokens of the prompt.
        num_tokens: usize,
        /// The setting.
        fixed: usize,
    },
    /// See [`RopeError`].
    #[error(transparent)]
    Positions(#[from] RopeError),
}

/// Sizes of a batch by which its prompts are laid out: a part of it must be laid out as it would be in the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Frame {
    /// Tokens of the longest prompt.
    pub longest_prompt: usize,
    /// Images of the prompt with the most.
    pub num_images: usize,
    /// Tokens of the largest image.
    pub longest_image: usize,
}

impl Frame {
    /// Returns the sizes of a batch.
    pub fn of(prompts: &[Vec<u32>], grids: &[Vec<Grid>]) -> Self {
        Self {
            longest_prompt: prompts.iter().map(Vec::len).max().unwrap_or(0),
            num_images: grids.iter().map(Vec::len).max().unwrap_or(0),
            longest_image: grids.iter().flatten().map(|grid| grid.num_tokens()).max().unwrap_or(0),
        }
    }

    /// Returns the larger of each.
    pub fn with(self, other: Self) -> Self {
        Self {
            longest_prompt: self.longest_prompt.max(other.longest_prompt),
            num_images: self.num_images.max(other.num_images),
            longest_image: self.longest_image.max(other.longest_image),
        }
    }
}

/// A batch laid out for the decoder: padded ids, which of them are real, and positions, queries included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Padded prompt ids, without queries and not cut.
    pub ids: Vec<Vec<u32>>,
    /// False on padding; with queries, cut.
    pub is_real: Vec<Vec<bool>>,
    /// Positions; with queries, cut.
    pub positions: PositionIds,
    /// Positions cut off the beginning.
    pub num_cut: usize,
}

impl Layout {
    /// Pads prompts on the left, appends `num_queries` queries, and cuts to `max_length` (section 2.4).
    ///
    /// # Errors
    /// When there is no prompt, a prompt does not fit a fixed padding, or images and image tokens differ.
    pub fn new(
        prompts: &[Vec<u32>],
        grids: &[Vec<Grid>],
        tokens: &SpecialTokens,
        cut: (Padding, usize, Option<usize>),
    ) -> Result<Self, VlmError> {
        Self::within(Frame::default(), prompts, grids, tokens, cut)
    }

    /// Lays prompts out as [`Layout::new`] would in a batch that also has the sizes of `frame`.
    ///
    /// # Errors
    /// See [`Layout::new`].
    pub fn within(
        frame: Frame,
        prompts: &[Vec<u32>],
        grids: &[Vec<Grid>],
        tokens: &SpecialTokens,
        (padding, num_queries, max_length): (Padding, usize, Option<usize>),
    ) -> Result<Self, VlmError> {
        if prompts.is_empty() {
            return Err(VlmError::EmptyBatch);
        }
        let Frame { longest_prompt: longest, num_images, longest_image } = Frame::of(prompts, grids).with(frame);
        if grids.len() != prompts.len() {
            return Err(VlmError::ImageLists { num_prompts: prompts.len(), num_lists: grids.len() });
        }
        let len = match padding {
            Padding::Longest => longest,
            Padding::Fixed(fixed) if longest > fixed => return Err(VlmError::TooLong { num_tokens: longest, fixed }),
            Padding::Fixed(fixed) => fixed,
        };
        let mut ids = Vec::with_capacity(prompts.len());
        let mut is_real = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let num_padding = len - prompt.len();
            ids.push(std::iter::repeat_n(tokens.pad, num_padding).chain(prompt.iter().copied()).collect::<Vec<u32>>());
            is_real.push((0..len + num_queries).map(|i| i >= num_padding).collect::<Vec<bool>>());
        }
        let with_queries: Vec<Vec<u32>> = ids
            .iter()
            .map(|row| row.iter().copied().chain(std::iter::repeat_n(QUERY_ID, num_queries)).collect())
            .collect();
        let mut positions = PositionIds::new(&with_queries, &is_real, grids, tokens)?;

        let total = len + num_queries;
        let kept = max_length.map_or(total, |max| total.min(max + num_images * longest_image + num_queries));
        positions.keep_last(kept);
        for row in &mut is_real {
            row.drain(..total - kept);
        }
        Ok(Self { ids, is_real, positions, num_cut: total - kept })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: SpecialTokens = SpecialTokens { pad: 3, vision_start: 7, vision_end: 8, image_pad: 9, video_pad: 10 };

    #[test]
    fn prompts_are_padded_on_the_left_and_queries_follow() {
        let prompts = vec![vec![5, 6], vec![5, 6, 5, 6]];
        let layout = Layout::new(&prompts, &[vec![], vec![]], &TOKENS, (Padding::Longest, 2, None)).unwrap();
        assert_eq!(layout.ids, [[3, 3, 5, 6], [5, 6, 5, 6]]);
        assert_eq!(layout.is_real[0], [false, false, true, true, true, true]);
        assert_eq!(layout.positions.axis[0], [[1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]);
    }

    #[test]
    fn a_fixed_padding_does_not_depend_on_the_neighbours_and_refuses_longer_prompts() {
        let fixed = (Padding::Fixed(3), 0, None);
        let layout = Layout::new(&[vec![5]], &[vec![]], &TOKENS, fixed).unwrap();
        assert_eq!(layout.ids, [[3, 3, 5]]);
        let error = Layout::new(&[vec![5; 4]], &[vec![]], &TOKENS, fixed).unwrap_err();
        assert_eq!(error, VlmError::TooLong { num_tokens: 4, fixed: 3 });
    }

    #[test]
    fn an_over_long_prompt_loses_its_beginning_but_no_image_and_no_query() {
        let prompt = vec![1, 2, 7, 9, 9, 8, 4];
        let grids = [vec![Grid { rows: 1, columns: 2 }]];
        let layout = Layout::new(&[prompt], &grids, &TOKENS, (Padding::Longest, 1, Some(3))).unwrap();
        assert_eq!(layout.num_cut, 2);
        assert_eq!(layout.is_real[0].len(), 3 + 2 + 1);
        assert_eq!(layout.positions.axis[2], [[2, 3, 4, 5, 6, 7]]);
    }

    #[test]
    fn a_part_of_a_batch_is_laid_out_as_in_the_whole() {
        let prompts = [vec![5], vec![5, 6, 6], vec![1, 2, 7, 9, 9, 8, 4]];
        let grids = [vec![], vec![], vec![Grid { rows: 1, columns: 2 }]];
        for cut in [(Padding::Longest, 2, Some(4)), (Padding::Longest, 0, None), (Padding::Fixed(9), 1, Some(8))] {
            let whole = Layout::new(&prompts, &grids, &TOKENS, cut).unwrap();
            let frame = Frame::of(&prompts, &grids);
            for row in 0..3 {
                let rows = row..row + 1;
                let part = Layout::within(frame, &prompts[rows.clone()], &grids[rows], &TOKENS, cut).unwrap();
                assert_eq!((&part.ids[0], part.num_cut), (&whole.ids[row], whole.num_cut), "{cut:?}");
                assert_eq!(part.is_real[0], whole.is_real[row]);
                for axis in 0..3 {
                    assert_eq!(part.positions.axis[axis][0], whole.positions.axis[axis][row]);
                }
            }
        }
    }
}
