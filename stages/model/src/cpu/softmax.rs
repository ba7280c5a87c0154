//! Softmax over the last axis.

use burn::backend::flex::FlexTensor;

use super::simd::{LANES, add_up, exp, kernel, max, sum};
use super::{HostOp, array, dims, for_chunks, unwritten, values};

/// Elements of a chunk of work, about.
const CHUNK: usize = 1 << 13;

/// Rows that take each step together: where rows are short, one would wait for its own last result.
const ROWS: usize = 8;

kernel! {
    /// Softmax of scale * scores in rows of n, in place.
    pub(super) fn softmax_rows(scores: &mut [f32], n: usize, scale: f32) {
        for rows in scores.chunks_mut((n * ROWS).max(1)) {
            let mut tops = [0.0; ROWS];
            for (row, top) in rows.chunks_exact(n).zip(&mut tops) {
                *top = max(row) * scale;
            }
            let mut sums = [[0.0f32; LANES]; ROWS];
            for ((row, top), sums) in rows.chunks_exact_mut(n).zip(tops).zip(&mut sums) {
                // As many lanes as stay in registers beside the constants of `exp`.
                let mut lanes = [0.0f32; LANES];
                let (chunks, rest) = row.as_chunks_mut::<LANES>();
                for chunk in chunks {
                    for (score, lane) in chunk.iter_mut().zip(&mut lanes) {
                        *score = exp(score.mul_add(scale, -top));
                        *lane += *score;
                    }
                }
                rest.iter_mut().for_each(|score| *score = exp(score.mul_add(scale, -top)));
                *sums = lanes;
            }
            let mut inverses = [0.0f32; ROWS];
            for ((row, lanes), inverse) in rows.chunks_exact(n).zip(sums).zip(&mut inverses) {
                let (_, rest) = row.as_chunks::<LANES>();
                *inverse = 1.0 / rest.iter().fold(add_up(lanes), |total, &score| total + score);
            }
            for (row, inverse) in rows.chunks_exact_mut(n).zip(inverses) {
                row.iter_mut().for_each(|score| *score *= inverse);
            }
        }
    }
}

kernel! {
    /// Gradient of the scores from the gradient of the weights, in place.
    pub(super) fn softmax_row_backward(weights: &[f32], grad: &mut [f32], scale: f32) {
        let mean = sum([weights, grad], |[weight, grad]| weight * grad);
        for (grad, &weight) in grad.iter_mut().zip(weights) {
            *grad = weight * (*grad - mean) * scale;
        }
    }
}

kernel! {
    /// Like [`softmax_row_backward`] with scale 1, into another array.
    pub(super) fn row_backward(weights: &[f32], grad: &[f32], out: &mut [f32]) {
        let n = weights.len();
        let (grad, out) = (&grad[..n], &mut out[..n]);
        let mean = sum([weights, grad], |[weight, grad]| weight * grad);
        for i in 0..n {
            out[i] = weights[i] * (grad[i] - mean);
        }
    }
}

/// Softmax of x [.., n] over the last axis.
#[derive(Clone, Debug)]
pub(crate) struct Softmax;

/// Returns the length of a row, and of a chunk of whole rows.
fn chunk(x: &FlexTensor) -> (usize, usize) {
    let n = dims(x).last().copied().unwrap_or(1).max(1);
    (n, CHUNK.div_ceil(n) * n)
}

impl HostOp<1> for Softmax {
    /// The output.
    type Saved = FlexTensor;

    fn forward(&self, [x]: &[FlexTensor; 1]) -> (FlexTensor, FlexTensor) {
        let input = values(x);
        let (n, chunk) = chunk(x);
        let mut out = unwritten(input.len());
        for_chunks(&mut out, chunk, |i, out| {
            for (rows, input) in out.chunks_mut(ROWS * n).zip(input[i * chunk..].chunks(ROWS * n)) {
                rows.copy_from_slice(&input[..rows.len()]);
                softmax_rows(rows, n, 1.0);
            }
        });
        let out = array(out, dims(x));
        (out.clone(), out)
    }

    fn backward(
        &self,
        _: &[FlexTensor; 1],
        y: &FlexTensor,
        grad: &FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let (weights, grad) = (values(y), values(grad));
        let (n, chunk) = chunk(y);
        let mut out = unwritten(weights.len());
        for_chunks(&mut out, chunk, |i, out| {
            let range = i * chunk..i * chunk + out.len();
            let rows = weights[range.clone()].chunks_exact(n).zip(grad[range].chunks_exact(n));
            rows.zip(out.chunks_exact_mut(n)).for_each(|((weights, grad), out)| row_backward(weights, grad, out));
        });
        [Some(array(out, dims(y)))]
    }
}
