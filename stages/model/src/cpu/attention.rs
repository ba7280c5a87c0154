//! Scaled dot-product attention: products, softmax and mask in one operation, heads read where they lie.
//!
//! Queries go block by block, so that scores stay in the cache, and keys that no query of a block may see are left out.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::matrix::Matrix;
use super::microkernel::ROWS;
use super::product::{Columns, packed, product};
use super::simd::kernel;
use super::softmax::{softmax_row_backward, softmax_rows};
use super::{Begin, HostOp, dims, strided_array, unwritten};

/// Queries of a block: whole tiles. The smaller, the more keys are left out of a causal mask.
const QUERIES: usize = 11 * ROWS;

/// Which query may look at which key: [b or 1, h or 1, l, s], one byte each, zero = may not.
#[derive(Clone, Debug)]
pub(crate) struct Mask {
    keep: FlexTensor,
    strides: [usize; 3],
}

impl Mask {
    /// Takes a boolean array.
    pub(crate) fn new(keep: FlexTensor) -> Self {
        let keep = if keep.layout().strides()[3] == 1 || dims(&keep)[3] == 1 { keep } else { keep.to_contiguous() };
        let layout = keep.layout();
        let stride = |axis: usize| if dims(&keep)[axis] == 1 { 0 } else { layout.strides()[axis] as usize };
        let strides = [stride(0), stride(1), stride(2)];
        Self { keep, strides }
    }

    fn row(&self, b: usize, h: usize, l: usize, s: usize) -> &[u8] {
        let start = self.keep.layout().start_offset();
        let start = start + b * self.strides[0] + h * self.strides[1] + l * self.strides[2];
        &self.keep.storage::<u8>()[start..start + s]
    }
}

/// Softmax over the keys that the mask keeps; a query with none gets zeros.
fn masked_softmax(scores: &mut [f32], keep: &[u8], scale: f32) {
    let keep = &keep[..scores.len()];
    if let Some(kept) = kept_before_all_hidden(keep) {
        let (seen, hidden) = scores.split_at_mut(kept);
        softmax_rows(seen, kept, scale);
        return hidden.fill(0.0);
    }
    // Far enough below every real score for its weight to be lost, near enough to stay finite when scaled.
    hide(scores, keep, -1e30);
    softmax_rows(scores, scores.len(), scale);
    hide(scores, keep, 0.0);
}

/// Returns how many keys are kept, if all of them come before the hidden ones, as in a causal mask and one of padding.
fn kept_before_all_hidden(keep: &[u8]) -> Option<usize> {
    const ALL: [u8; 8] = [1; 8];
    let whole = ALL.len() * keep.as_chunks().0.iter().take_while(|&&word| word == ALL).count();
    let kept = whole + keep[whole..].iter().take_while(|&&keep| keep != 0).count();
    let is_any_behind = keep[kept..].iter().fold(0, |any, &keep| any | keep) != 0;
    (!is_any_behind).then_some(kept)
}

kernel! {
    /// Puts `value` where the mask keeps nothing.
    pub(super) fn hide(scores: &mut [f32], keep: &[u8], value: f32) {
        for (score, &keep) in scores.iter_mut().zip(keep) {
            *score = if keep != 0 { *score } else { value };
        }
    }
}

/// Attention of q [b, h, l, d] over k and v [b, h or fewer, s, d], each of whose heads serves a group of consecutive query
/// heads; output and gradients are stored as [b, l, h, d].
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    pub(crate) mask: Option<Mask>,
}

/// Sizes b, h, l, s, d, and the heads of k and v.
#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    h: usize,
    kv: usize,
    l: usize,
    s: usize,
    d: usize,
}

/// Wraps values stored as [b, n, h, d] as an array of shape [b, h, n, d].
fn wrap(values: Vec<f32>, [b, h, n, d]: [usize; 4]) -> FlexTensor {
    strided_array(values, &[b, h, n, d], &[n * h * d, d, h * d, 1])
}

/// Returns head `h` of sample `b` as a matrix of rows.
fn head(tensor: &FlexTensor, b: usize, h: usize) -> Matrix<'_> {
    let (layout, storage) = (tensor.layout(), tensor.storage::<f32>());
    let strides = layout.strides();
    let start = layout.start_offset() + b * strides[0] as usize + h * strides[1] as usize;
    Matrix { values: &storage[start..], row: strides[2] as usize, column: strides[3] as usize }
}

/// Where a thread packs what all blocks of a head have in common.
#[derive(Default)]
struct Room {
    across: Vec<f32>,
    down: Vec<f32>,
}

impl Room {
    /// Packs the columns of two matrices [d, s] and [s, d].
    fn pack(&mut self, across: Matrix, down: Matrix, [s, d]: [usize; 2]) -> [Columns<'_>; 2] {
        [packed(across, [d, s], &mut self.across), packed(down, [s, d], &mut self.down)]
    }
}

/// Array stored as [b, n, h, d] whose heads are written by different threads.
#[derive(Clone, Copy)]
struct Heads {
    start: *mut f32,
    n: usize,
    h: usize,
    d: usize,
}

// SAFETY: each thread writes the elements of its own heads only (see `Heads::head`).
unsafe impl Send for Heads {}
// SAFETY: as above.
unsafe impl Sync for Heads {}

impl Heads {
    fn of(values: &mut [f32], n: usize, h: usize, d: usize) -> Self {
        Self { start: values.as_mut_ptr(), n, h, d }
    }

    /// Returns the first element of row `row` of a head; rows are `h * d` apart.
    fn head(&self, b: usize, h: usize, row: usize) -> *mut f32 {
        self.start.wrapping_add(((b * self.n + row) * self.h + h) * self.d)
    }

    fn pitch(&self) -> usize {
        self.h * self.d
    }
}

impl Attention {
    fn sizes(q: &FlexTensor, k: &FlexTensor) -> Sizes {
        let [b, h, l, d] = [dims(q)[0], dims(q)[1], dims(q)[2], dims(q)[3]];
        Sizes { b, h, kv: dims(k)[1], l, s: dims(k)[2], d }
    }

    /// Returns how many keys the queries of a block may see: all keys behind the last visible one are hidden.
    fn num_visible(&self, sizes: &Sizes, b: usize, h: usize, first: usize, rows: usize) -> usize {
        let Some(mask) = &self.mask else { return sizes.s };
        // In a causal mask the last query sees most, so the others need but one look at what lies behind.
        (first..first + rows).rev().fold(0, |num, row| {
            let behind = &mask.row(b, h, row, sizes.s)[num..];
            let sees_none = behind.iter().fold(0, |any, &keep| any | keep) == 0;
            if sees_none { num } else { num + behind.iter().rposition(|&keep| keep != 0).map_or(0, |last| last + 1) }
        })
    }

    /// Computes a block of weights [rows, s] and its output.
    #[allow(clippy::too_many_arguments)]
    fn block(
        &self,
        sizes: &Sizes,
        q: Matrix,
        [keys, values]: [Columns; 2],
        [b, h]: [usize; 2],
        (first, rows): (usize, usize),
        weights: &mut [f32],
        out: Heads,
    ) {
        let Sizes { l, s, d, .. } = *sizes;
        assert!(first + rows <= l && q.holds(l, d) && weights.len() >= rows * s);
        let visible = self.num_visible(sizes, b, h, first, rows);
        // SAFETY: the matrices lie inside their slices, and rows of this head belong to this thread.
        unsafe { product([rows, d, visible], q.below(first), keys, (weights.as_mut_ptr(), s), Begin::Zero) };
        let scale = (d as f32).powf(-0.5);
        match &self.mask {
            None => softmax_rows(&mut weights[..rows * s], s, scale),
            Some(mask) => {
                for (row, weights) in weights.chunks_exact_mut(s).take(rows).enumerate() {
                    let (seen, hidden) = weights.split_at_mut(visible);
                    masked_softmax(seen, mask.row(b, h, first + row, s), scale);
                    hidden.fill(0.0);
                }
            }
        }
        let weights = Matrix::rows(weights, s);
        // SAFETY: as above.
        unsafe { product([rows, visible, d], weights, values, (out.head(b, h, first), out.pitch()), Begin::Zero) };
    }
}

/// Calls `f` with the first query and the number of queries of each block.
fn for_blocks(l: usize, mut f: impl FnMut(usize, usize)) {
    (0..l).step_by(QUERIES).for_each(|first| f(first, QUERIES.min(l - first)));
}

impl HostOp<3> for Attention {
    /// The weights [b, h, l, s].
    type Saved = std::sync::Arc<Vec<f32>>;
    const TAKES_STRIDES: bool = true;

    fn forward(&self, [q, k, v]: &[FlexTensor; 3]) -> (FlexTensor, Self::Saved) {
        let sizes = Self::sizes(q, k);
        let Sizes { b, h, kv, l, s, d } = sizes;
        let (mut weights, mut out) = (unwritten(b * h * l * s), unwritten(b * l * h * d));
        let heads = Heads::of(&mut out, l, h, d);
        let weights_of_heads = weights.par_chunks_mut((l * s).max(1)).enumerate();
        weights_of_heads.for_each_init(Default::default, |room: &mut Room, (i, weights)| {
            let (b, h_index) = (i / h, i % h);
            let queries = head(q, b, h_index);
            let own = room.pack(head(k, b, h_index * kv / h).transposed(), head(v, b, h_index * kv / h), [s, d]);
            for_blocks(l, |first, rows| {
                let weights = &mut weights[first * s..(first + rows) * s];
                self.block(&sizes, queries, own, [b, h_index], (first, rows), weights, heads);
            });
        });
        (wrap(out, [b, h, l, d]), std::sync::Arc::new(weights))
    }

    fn infer(&self, [q, k, v]: &[FlexTensor; 3]) -> FlexTensor {
        let sizes = Self::sizes(q, k);
        let Sizes { b, h, kv, l, s, d } = sizes;
        let mut out = unwritten(b * l * h * d);
        let heads = Heads::of(&mut out, l, h, d);
        (0..b * h).into_par_iter().for_each_init(
            || (unwritten(QUERIES.min(l) * s), Room::default()),
            |(weights, room), i| {
                let (b, h_index) = (i / h, i % h);
                let queries = head(q, b, h_index);
                let own = room.pack(head(k, b, h_index * kv / h).transposed(), head(v, b, h_index * kv / h), [s, d]);
                for_blocks(l, |first, rows| {
                    self.block(&sizes, queries, own, [b, h_index], (first, rows), weights, heads);
                });
            },
        );
        wrap(out, [b, h, l, d])
    }

    fn backward(
        &self,
        [q, k, v]: &[FlexTensor; 3],
        saved: &Self::Saved,
        grad: &FlexTensor,
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let sizes = Self::sizes(q, k);
        let Sizes { b, h, kv, l, s, d } = sizes;
        let mut d_q = unwritten(b * l * h * d);
        let [mut d_k, mut d_v] = [(); 2].map(|()| vec![0.0; b * s * kv * d]);
        let q_heads = Heads::of(&mut d_q, l, h, d);
        let [k_heads, v_heads] = [&mut d_k, &mut d_v].map(|values| Heads::of(values, s, kv, d));
        // One piece of work is a head of k and v with the query heads it serves, which add to its gradient in turn.
        (0..b * kv).into_par_iter().for_each_init(
            || (unwritten(QUERIES.min(l) * s), Room::default()),
            |(d_scores, room), i| {
                let (b, kv_index) = (i / kv, i % kv);
                let [by_value, by_key_element] =
                    room.pack(head(v, b, kv_index).transposed(), head(k, b, kv_index), [s, d]);
                for h_index in kv_index * h / kv..(kv_index + 1) * h / kv {
                    let (q, grad) = (head(q, b, h_index), head(grad, b, h_index));
                    assert!(q.holds(l, d) && grad.holds(l, d));
                    for_blocks(l, |first, rows| {
                        let visible = self.num_visible(&sizes, b, h_index, first, rows);
                        let weights = &saved[((b * h + h_index) * l + first) * s..][..rows * s];
                        let by_key = Matrix::rows(weights, s).transposed();
                        let (q, grad) = (q.below(first), grad.below(first));
                        let (to_k, to_v) = (k_heads.head(b, kv_index, 0), v_heads.head(b, kv_index, 0));
                        let to_q = q_heads.head(b, h_index, first);
                        // SAFETY: the matrices lie inside their slices, and these heads belong to this thread.
                        unsafe {
                            product([visible, rows, d], by_key, grad.into(), (to_v, v_heads.pitch()), Begin::GoOn);
                            product([rows, d, visible], grad, by_value, (d_scores.as_mut_ptr(), s), Begin::Zero);
                        }
                        let scale = (d as f32).powf(-0.5);
                        for (weights, d_scores) in weights.chunks_exact(s).zip(d_scores.chunks_exact_mut(s)) {
                            softmax_row_backward(&weights[..visible], &mut d_scores[..visible], scale);
                        }
                        let rows_of_scores = Matrix::rows(d_scores, s);
                        // SAFETY: as above.
                        unsafe {
                            product(
                                [rows, visible, d],
                                rows_of_scores,
                                by_key_element,
                                (to_q, q_heads.pitch()),
                                Begin::Zero,
                            );
                            let by_key = rows_of_scores.transposed();
                            product([visible, rows, d], by_key, q.into(), (to_k, k_heads.pitch()), Begin::GoOn);
                        }
                    });
                }
            },
        );
        [Some(wrap(d_q, [b, h, l, d])), Some(wrap(d_k, [b, kv, s, d])), Some(wrap(d_v, [b, kv, s, d]))]
    }
}
