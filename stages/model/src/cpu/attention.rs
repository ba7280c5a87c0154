//! Scaled dot-product attention: products, softmax and mask in one operation, heads read where they lie.

use std::sync::Arc;

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::linear::{Matrix, matmul};
use super::simd::{exp, kernel, max, sum};
use super::{HostOp, dims, strided_array};

/// Which query may look at which key; strides are zero along axes that broadcast.
#[derive(Clone, Debug)]
pub(crate) struct Mask {
    /// Non-zero = may look.
    pub(crate) keep: Arc<Vec<bool>>,
    /// Strides over batch, head and query; keys are adjacent.
    pub(crate) strides: [usize; 3],
}

impl Mask {
    fn row(&self, b: usize, h: usize, l: usize, s: usize) -> &[bool] {
        let start = b * self.strides[0] + h * self.strides[1] + l * self.strides[2];
        &self.keep[start..start + s]
    }
}

kernel! {
    /// Softmax of scale * scores, in place.
    pub(super) fn softmax_row(scores: &mut [f32], scale: f32) {
        let top = max(scores) * scale;
        for score in scores.iter_mut() {
            *score = exp(*score * scale - top);
        }
        let inverse = 1.0 / sum(scores.len(), |i| scores[i]);
        for score in scores.iter_mut() {
            *score *= inverse;
        }
    }
}

kernel! {
    /// Gradient of the scores from the gradient of the weights, in place.
    pub(super) fn softmax_row_backward(weights: &[f32], grad: &mut [f32], scale: f32) {
        let mean = sum(weights.len(), |i| weights[i] * grad[i]);
        for (grad, &weight) in grad.iter_mut().zip(weights) {
            *grad = weight * (*grad - mean) * scale;
        }
    }
}

/// Softmax over the keys that the mask keeps; a query with none gets zeros.
fn masked_softmax(scores: &mut [f32], keep: Option<&[bool]>, scale: f32) {
    let Some(keep) = keep else {
        return softmax_row(scores, scale);
    };
    if !keep.contains(&true) {
        return scores.fill(0.0);
    }
    for (score, &keep) in scores.iter_mut().zip(keep) {
        // Far enough below every real score for its weight to be lost, near enough to stay finite when scaled.
        *score = if keep { *score } else { -1e30 };
    }
    softmax_row(scores, scale);
    for (score, &keep) in scores.iter_mut().zip(keep) {
        *score = if keep { *score } else { 0.0 };
    }
}

/// Attention of q [b, h, l, d] over k and v [b, h, s, d]; output and gradients are stored as [b, l, h, d].
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    pub(crate) mask: Option<Mask>,
}

/// Sizes b, h, l, s, d.
#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    h: usize,
    l: usize,
    s: usize,
    d: usize,
}

impl Sizes {
    fn of(q: &FlexTensor, k: &FlexTensor) -> Self {
        let [b, h, l, d] = [dims(q)[0], dims(q)[1], dims(q)[2], dims(q)[3]];
        Self { b, h, l, s: dims(k)[2], d }
    }

    fn scale(&self) -> f32 {
        (self.d as f32).powf(-0.5)
    }

    /// Wraps values stored as [b, n, h, d] as an array of shape [b, h, n, d].
    fn wrap(&self, values: Vec<f32>, n: usize) -> FlexTensor {
        let (h, d) = (self.h, self.d);
        strided_array(values, &[self.b, h, n, d], &[n * h * d, d, h * d, 1])
    }
}

/// Returns head `h` of sample `b` as a matrix of rows.
fn head(tensor: &FlexTensor, b: usize, h: usize) -> Matrix<'_> {
    let (layout, storage) = (tensor.layout(), tensor.storage::<f32>());
    let strides = layout.strides();
    let start = layout.start_offset() + b * strides[0] as usize + h * strides[1] as usize;
    Matrix { values: &storage[start..], row: strides[2] as usize, column: strides[3] as usize }
}

impl HostOp<3> for Attention {
    /// The weights [b, h, l, s].
    type Saved = Arc<Vec<f32>>;
    const TAKES_STRIDES: bool = true;

    fn forward(&self, [q, k, v]: &[FlexTensor; 3]) -> (FlexTensor, Self::Saved) {
        let sizes = Sizes::of(q, k);
        let Sizes { b, h, l, s, d } = sizes;
        let (mut weights, mut out) = (vec![0.0; b * h * l * s], vec![0.0; b * l * h * d]);
        let samples =
            weights.par_chunks_mut((h * l * s).max(1)).zip(out.par_chunks_mut((l * h * d).max(1))).enumerate();
        samples.for_each(|(b, (weights, out))| {
            for (head_index, weights) in weights.chunks_exact_mut(l * s).enumerate() {
                let [q, k, v] = [q, k, v].map(|tensor| head(tensor, b, head_index));
                matmul([l, d, s], q, k.transposed(), (weights, s), false, false);
                for (row, weights) in weights.chunks_exact_mut(s).enumerate() {
                    let keep = self.mask.as_ref().map(|mask| mask.row(b, head_index, row, s));
                    masked_softmax(weights, keep, sizes.scale());
                }
                let out = &mut out[head_index * d..];
                matmul([l, s, d], Matrix::rows(weights, s), v, (out, h * d), false, false);
            }
        });
        (sizes.wrap(out, l), Arc::new(weights))
    }

    fn backward(
        &self,
        [q, k, v]: &[FlexTensor; 3],
        saved: &Self::Saved,
        grad: &FlexTensor,
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let sizes = Sizes::of(q, k);
        let Sizes { b, h, l, s, d } = sizes;
        let [mut d_q, mut d_k, mut d_v] = [l, s, s].map(|n| vec![0.0; b * n * h * d]);
        let (own, other) = ((l * h * d).max(1), (s * h * d).max(1));
        let samples = d_q.par_chunks_mut(own).zip(d_k.par_chunks_mut(other)).zip(d_v.par_chunks_mut(other)).enumerate();
        samples.for_each(|(b, ((d_q, d_k), d_v))| {
            let mut d_scores = vec![0.0; l * s];
            for head_index in 0..h {
                let [q, k, v, grad] = [q, k, v, grad].map(|tensor| head(tensor, b, head_index));
                let weights = &saved[(b * h + head_index) * l * s..][..l * s];
                let weight_rows = Matrix::rows(weights, s);
                let at = head_index * d;
                matmul([s, l, d], weight_rows.transposed(), grad, (&mut d_v[at..], h * d), false, false);
                matmul([l, d, s], grad, v.transposed(), (&mut d_scores, s), false, false);
                for (weights, d_scores) in weights.chunks_exact(s).zip(d_scores.chunks_exact_mut(s)) {
                    softmax_row_backward(weights, d_scores, sizes.scale());
                }
                let score_rows = Matrix::rows(&d_scores, s);
                matmul([l, s, d], score_rows, k, (&mut d_q[at..], h * d), false, false);
                matmul([s, l, d], score_rows.transposed(), q, (&mut d_k[at..], h * d), false, false);
            }
        });
        [Some(sizes.wrap(d_q, l)), Some(sizes.wrap(d_k, s)), Some(sizes.wrap(d_v, s))]
    }
}
