//! Scaled dot-product attention, the one place where its kernel is chosen.
//!
//! Knows no projection, position or causality: the caller's mask says who may look at whom.
//! Shapes: b batch, h heads, l queries, s keys, d channels of a head.

use burn::tensor::activation::softmax;

use crate::fused;
use crate::nn::{to_dtype, to_f32};
use crate::{BoolTensor, Tensor};

/// Returns softmax(q k^T / sqrt(d)) v, the softmax in f32.
///
/// `mask` is true where a query may look at a key; it broadcasts over batch and heads. A query that may look at nothing
/// gets zeros. Keys and values may have fewer heads than queries, each then serving a group of consecutive query heads.
///
/// # Shapes
/// q [b, h, l, d], k and v [b, h or fewer, s, d], mask [b or 1, h or 1, l, s] -> [b, h, l, d]
pub fn attention(q_bhld: Tensor<4>, k_bhsd: Tensor<4>, v_bhsd: Tensor<4>, mask: Option<BoolTensor<4>>) -> Tensor<4> {
    fused::attention(q_bhld, k_bhsd, v_bhsd, mask)
}

/// Attention out of elementary operations: what every device can do, and the yardstick for the fused one.
pub(crate) fn composite(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<BoolTensor<4>>) -> Tensor<4> {
    let [b, h, l, d] = q.dims();
    let (k, v) = (repeat_heads(k, h), repeat_heads(v, h));
    let s = k.dims()[2];
    let dtype = q.dtype();
    let scores = to_f32(q.mul_scalar((d as f64).powf(-0.5)).matmul(k.transpose()));
    let weights = match mask {
        None => softmax(scores, 3),
        Some(mask) => {
            let is_hidden = mask.bool_not().expand([b, h, l, s]);
            // A finite floor keeps a row with nothing to see free of NaN; the second fill turns it into zeros.
            softmax(scores.mask_fill(is_hidden.clone(), -1e30), 3).mask_fill(is_hidden, 0.0)
        }
    };
    to_dtype(weights, dtype).matmul(v)
}

/// Repeats each head so that there are `num_heads`.
pub(crate) fn repeat_heads(x_bhsd: Tensor<4>, num_heads: usize) -> Tensor<4> {
    let [b, h, s, d] = x_bhsd.dims();
    if h == num_heads {
        return x_bhsd;
    }
    let group = num_heads / h;
    x_bhsd.reshape([b, h, 1, s, d]).expand([b, h, group, s, d]).reshape([b, num_heads, s, d])
}
