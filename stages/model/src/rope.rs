//! Rotary positions: the three-axis text rotary of Qwen2.5-VL with its position ids, and the two-axis rotary of its
//! vision tower (docs/spec/model.md sections 2.2, 2.5, 2.8).
//!
//! Position ids are plain host code. Knows no weights and no padding policy: a mask says which tokens are real.
//! Legend of shape letters: b batch, h heads, l positions, d channels of a head, f = d / 2 rotated pairs.

use burn::tensor::TensorData;
use deepgen_contract::model::{LanguageConfig, SpecialTokens};

use crate::nn::to_dtype;
use crate::{Device, Tensor, fused};

/// Position of a padded token on every axis; it has no effect.
pub const PADDING_POSITION: i64 = 1;

/// Base of the vision tower's rotary frequencies.
pub const VISION_THETA: f64 = 10_000.0;

/// Why position ids could not be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RopeError {
    /// The image tokens of a prompt and its images do not fit together.
    #[error("a prompt holds {num_tokens} image tokens, but its {num_images} images give {num_expected}")]
    ImageTokens {
        /// Image tokens found.
        num_tokens: usize,
        /// Images given.
        num_images: usize,
        /// Image tokens that those images need.
        num_expected: usize,
    },
}

/// Rows and columns of merged vision tokens of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
}

impl Grid {
    /// Returns the number of vision tokens.
    pub fn num_tokens(self) -> usize {
        self.rows * self.columns
    }
}

/// Position ids of a batch: `axis[k][row][position]` for the temporal, height and width axes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PositionIds {
    /// One table per axis, each batch x positions.
    pub axis: [Vec<Vec<i64>>; 3],
}

impl PositionIds {
    /// Computes the ids of a batch; `is_real[row][position]` is false on padding, `grids[row]` lists a row's images.
    ///
    /// # Errors
    /// When a row's image tokens are not exactly those of its images.
    pub fn new(
        ids: &[Vec<u32>],
        is_real: &[Vec<bool>],
        grids: &[Vec<Grid>],
        tokens: &SpecialTokens,
    ) -> Result<Self, RopeError> {
        let mut axis = [const { Vec::new() }; 3];
        for ((ids, is_real), grids) in ids.iter().zip(is_real).zip(grids) {
            let row = row_positions(ids, is_real, grids, tokens)?;
            for (table, positions) in axis.iter_mut().zip(row) {
                table.push(positions);
            }
        }
        Ok(Self { axis })
    }

    /// Keeps the last `len` positions of every row, numbers unchanged.
    pub fn keep_last(&mut self, len: usize) {
        for row in self.axis.iter_mut().flatten() {
            row.drain(..row.len().saturating_sub(len));
        }
    }
}

/// The positions of one row on each axis: text counts up alike on all three, an image of a grid spreads rows and
/// columns over the height and width axes, and text goes on after the largest position so far.
fn row_positions(
    ids: &[u32],
    is_real: &[bool],
    grids: &[Grid],
    tokens: &SpecialTokens,
) -> Result<[Vec<i64>; 3], RopeError> {
    let num_tokens = ids.iter().zip(is_real).filter(|&(&id, &real)| real && id == tokens.image_pad).count();
    let num_expected = grids.iter().map(|g| g.num_tokens()).sum();
    if num_tokens != num_expected {
        return Err(RopeError::ImageTokens { num_tokens, num_images: grids.len(), num_expected });
    }
    let mut axis = [const { Vec::new() }; 3];
    let mut next = 0;
    let mut images = grids.iter();
    let mut cells = Vec::new().into_iter();
    for (&id, &real) in ids.iter().zip(is_real) {
        let position = if !real {
            [PADDING_POSITION; 3]
        } else if id == tokens.image_pad {
            match cells.next() {
                Some(cell) => cell,
                None => {
                    // The counts agree, so a grid is left whenever a cell is needed; empty grids are passed over.
                    let Some(grid) = images.by_ref().find(|g| g.num_tokens() > 0) else { continue };
                    let start = next;
                    let (rows, columns) = (grid.rows as i64, grid.columns as i64);
                    next = start + rows.max(columns);
                    let all: Vec<[i64; 3]> =
                        (0..rows).flat_map(|r| (0..columns).map(move |c| [start, start + r, start + c])).collect();
                    cells = all.into_iter();
                    cells.next().unwrap_or([start; 3])
                }
            }
        } else {
            next += 1;
            [next - 1; 3]
        };
        for (positions, value) in axis.iter_mut().zip(position) {
            positions.push(value);
        }
    }
    Ok(axis)
}

/// Cosines and sines of the rotated pairs, ready to be broadcast over heads.
#[derive(Debug, Clone)]
pub struct Rotary {
    cos_bhlf: Tensor<4>,
    sin_bhlf: Tensor<4>,
}

impl Rotary {
    fn from_angles(angles: &[f32], [batch, len, pairs]: [usize; 3], device: &Device) -> Self {
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&a| f(a)).collect();
            Tensor::<4>::from_data(TensorData::new(values, [batch, 1, len, pairs]), device)
        };
        Self { cos_bhlf: table(f32::cos), sin_bhlf: table(f32::sin) }
    }

    /// Builds the text rotary: pair `i` of a head turns with the axis that its section belongs to.
    pub fn text(positions: &PositionIds, config: &LanguageConfig, device: &Device) -> Self {
        let freqs = frequencies(config.head_dim(), config.rope_theta);
        let axis_of_pair: Vec<usize> =
            config.mrope_section.iter().enumerate().flat_map(|(axis, &n)| std::iter::repeat_n(axis, n)).collect();
        let (batch, len) = (positions.axis[0].len(), positions.axis[0].first().map_or(0, Vec::len));
        let mut angles = Vec::with_capacity(batch * len * freqs.len());
        for row in 0..batch {
            for position in 0..len {
                let pairs = freqs.iter().zip(&axis_of_pair);
                angles.extend(pairs.map(|(f, &axis)| positions.axis[axis][row][position] as f32 * f));
            }
        }
        Self::from_angles(&angles, [batch, len, freqs.len()], device)
    }

    /// Builds the vision rotary for patches at `(row, column)`: the first half of the pairs turns with the row.
    pub fn vision(patches: &[(usize, usize)], head_dim: usize, device: &Device) -> Self {
        let freqs = frequencies(head_dim / 2, VISION_THETA);
        let mut angles = Vec::with_capacity(patches.len() * 2 * freqs.len());
        for &(row, column) in patches {
            angles.extend(freqs.iter().map(|f| row as f32 * f));
            angles.extend(freqs.iter().map(|f| column as f32 * f));
        }
        Self::from_angles(&angles, [1, patches.len(), 2 * freqs.len()], device)
    }

    /// Rotates the two halves of every head against each other.
    ///
    /// # Shapes
    /// - `x_bhld`: `[batch or 1, heads, positions, head_dim]`, returned with the same shape.
    pub fn apply(&self, x_bhld: Tensor<4>) -> Tensor<4> {
        let dtype = x_bhld.dtype();
        // The reference casts the f32 tables to the activation dtype, then rotates.
        let (cos, sin) = (to_dtype(self.cos_bhlf.clone(), dtype), to_dtype(self.sin_bhlf.clone(), dtype));
        fused::rotate(x_bhld, cos, sin)
    }
}

/// `theta^(-2i/dim)` for the `dim / 2` pairs.
fn frequencies(dim: usize, theta: f64) -> Vec<f32> {
    (0..dim / 2).map(|i| theta.powf(-((2 * i) as f64) / dim as f64) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: SpecialTokens = SpecialTokens { pad: 0, vision_start: 7, vision_end: 8, image_pad: 9, video_pad: 10 };

    fn positions(ids: &[u32], num_padding: usize, grids: &[Grid]) -> [Vec<i64>; 3] {
        let is_real: Vec<bool> = (0..ids.len()).map(|i| i >= num_padding).collect();
        row_positions(ids, &is_real, grids, &TOKENS).unwrap()
    }

    #[test]
    fn text_counts_from_the_first_real_token() {
        for axis in positions(&[0, 0, 5, 6, 5], 2, &[]) {
            assert_eq!(axis, [1, 1, 0, 1, 2]);
        }
    }

    #[test]
    fn an_image_spreads_over_height_and_width_and_text_goes_on_after_its_longer_side() {
        let [t, h, w] = positions(&[0, 4, 7, 9, 9, 9, 9, 9, 9, 8, 4], 1, &[Grid { rows: 2, columns: 3 }]);
        assert_eq!(t, [1, 0, 1, 2, 2, 2, 2, 2, 2, 5, 6]);
        assert_eq!(h, [1, 0, 1, 2, 2, 2, 3, 3, 3, 5, 6]);
        assert_eq!(w, [1, 0, 1, 2, 3, 4, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn a_16_by_16_image_after_four_tokens_ends_before_position_20() {
        let ids: Vec<u32> = [1, 2, 3, 7].into_iter().chain([9; 256]).chain([8, 3]).collect();
        let [t, _, _] = positions(&ids, 0, &[Grid { rows: 16, columns: 16 }]);
        assert_eq!(t[260..], [20, 21]);
    }

    #[test]
    fn two_images_follow_one_another() {
        let grid = Grid { rows: 1, columns: 2 };
        let [t, h, w] = positions(&[7, 9, 9, 8, 7, 9, 9, 8], 0, &[grid, grid]);
        assert_eq!(t, [0, 1, 1, 3, 4, 5, 5, 7]);
        assert_eq!(h, [0, 1, 1, 3, 4, 5, 5, 7]);
        assert_eq!(w, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn image_tokens_without_their_image_are_refused() {
        let error = row_positions(&[9, 9], &[true, true], &[], &TOKENS).unwrap_err();
        assert_eq!(error, RopeError::ImageTokens { num_tokens: 2, num_images: 0, num_expected: 0 });
    }

    #[test]
    fn cutting_keeps_the_numbers() {
        let ids = vec![vec![5, 6, 5]];
        let mut positions = PositionIds::new(&ids, &[vec![true; 3]], &[vec![]], &TOKENS).unwrap();
        positions.keep_last(2);
        assert_eq!(positions.axis[2], [[1, 2]]);
    }

    #[test]
    fn a_rotation_keeps_length_and_turns_with_the_position_difference() {
        let device = Device::flex();
        let x = Tensor::<4>::from_data(TensorData::new(vec![1f32, 2., 3., 4., 1., 2., 3., 4.], [1, 1, 2, 4]), &device);
        let turned = Rotary::vision(&[(0, 0), (1, 0)], 4, &device).apply(x);
        let values = turned.into_data().try_to_vec::<f32>().unwrap();
        assert_eq!(values[..4], [1., 2., 3., 4.]);
        // head_dim 4 has one row pair (channels 0 and 2, frequency 1) and one column pair (1 and 3), not turned here.
        let (c, s) = (1f32.cos(), 1f32.sin());
        for (value, expected) in values[4..].iter().zip([c - 3. * s, 2., 3. * c + s, 4.]) {
            assert!((value - expected).abs() < 1e-6, "{value} is not {expected}");
        }
    }
}
