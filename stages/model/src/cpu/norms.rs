//! Layer norm, root-mean-square norm and group norm, with the affine or modulating part folded in.

use burn::backend::flex::FlexTensor;

use super::simd::{kernel, sigmoid, sum};
use super::{HostOp, add_up, array, dims, for_chunks, map_chunks, unwritten, values};

/// Pieces that rows are cut into when a gradient is summed over all of them; fixed, so that the order of the sum is.
const NUM_PIECES: usize = 8;

kernel! {
    /// out = normed(x) * (offset + scale) + shift, row by row; writes mean and inverse deviation of each row.
    pub(super) fn layer_rows(x: &[f32], scale: &[f32], shift: &[f32], offset: f32, eps: f32, out: &mut [f32]) {
        let d = scale.len();
        for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
            let mean = sum([x], |[x]| x) / d as f32;
            let variance = sum([x], |[x]| (x - mean) * (x - mean)) / d as f32;
            let inverse = 1.0 / (variance + eps).sqrt();
            for i in 0..d {
                out[i] = (x[i] - mean) * inverse * (offset + scale[i]) + shift[i];
            }
        }
    }
}

kernel! {
    /// Gradients of [`layer_rows`]; those of scale and shift are added to what is there.
    pub(super) fn layer_rows_backward(
        x: &[f32],
        scale: &[f32],
        offset: f32,
        eps: f32,
        grad: &[f32],
        d_x: &mut [f32],
        d_scale: &mut [f32],
        d_shift: &mut [f32],
    ) {
        let d = scale.len();
        let (scale, d_scale, d_shift) = (&scale[..d], &mut d_scale[..d], &mut d_shift[..d]);
        for ((x, grad), d_x) in x.chunks_exact(d).zip(grad.chunks_exact(d)).zip(d_x.chunks_exact_mut(d)) {
            let mean = sum([x], |[x]| x) / d as f32;
            let variance = sum([x], |[x]| (x - mean) * (x - mean)) / d as f32;
            let inverse = 1.0 / (variance + eps).sqrt();
            let mean_grad = sum([grad, scale], |[grad, scale]| grad * (offset + scale)) / d as f32;
            let mean_product = sum([grad, scale, x], |[grad, scale, x]| grad * (offset + scale) * (x - mean)) * inverse / d as f32;
            for i in 0..d {
                let normed = (x[i] - mean) * inverse;
                d_scale[i] += grad[i] * normed;
                d_shift[i] += grad[i];
                d_x[i] = inverse * (grad[i] * (offset + scale[i]) - mean_grad - normed * mean_product);
            }
        }
    }
}

/// Layer norm of x [.., d] with scale and shift: [d], or [b, d] for x [b, n, d].
#[derive(Clone, Debug)]
pub(crate) struct LayerNorm {
    pub(crate) eps: f32,
    /// Added to the scale: 1 for a modulation, 0 for a weight.
    pub(crate) offset: f32,
}

impl LayerNorm {
    /// Returns the rows of a piece, and whether each has a scale of its own.
    fn pieces(x: &FlexTensor, scale: &FlexTensor) -> (usize, bool) {
        let d = dims(x)[dims(x).len() - 1];
        let rows = values(x).len() / d;
        if dims(scale).len() == 2 {
            return (rows / dims(scale)[0], true);
        }
        (rows.div_ceil(NUM_PIECES).max(1), false)
    }
}

impl HostOp<3> for LayerNorm {
    type Saved = ();

    fn forward(&self, [x, scale, shift]: &[FlexTensor; 3]) -> (FlexTensor, ()) {
        let d = dims(x)[dims(x).len() - 1];
        let (rows, is_own) = Self::pieces(x, scale);
        let (input, scale, shift) = (values(x), values(scale), values(shift));
        let mut out = unwritten(input.len());
        for_chunks(&mut out, rows * d, |i, out| {
            let own = if is_own { i * d..(i + 1) * d } else { 0..d };
            let input = &input[i * rows * d..][..out.len()];
            layer_rows(input, &scale[own.clone()], &shift[own], self.offset, self.eps, out);
        });
        (array(out, dims(x)), ())
    }

    fn backward(
        &self,
        [x, scale, shift]: &[FlexTensor; 3],
        _: &(),
        grad: &FlexTensor,
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let d = dims(x)[dims(x).len() - 1];
        let (rows, is_own) = Self::pieces(x, scale);
        let (input, scale_values, grad) = (values(x), values(scale), values(grad));
        let mut d_x = unwritten(input.len());
        let pieces = map_chunks(&mut d_x, rows * d, |i, d_x| {
            let range = i * rows * d..i * rows * d + d_x.len();
            let own = if is_own { i * d..(i + 1) * d } else { 0..d };
            let (mut d_scale, mut d_shift) = (vec![0.0; d], vec![0.0; d]);
            layer_rows_backward(
                &input[range.clone()],
                &scale_values[own],
                self.offset,
                self.eps,
                &grad[range],
                d_x,
                &mut d_scale,
                &mut d_shift,
            );
            (d_scale, d_shift)
        });
        let (d_scale, d_shift): (Vec<_>, Vec<_>) = pieces.into_iter().unzip();
        let gather = |parts: Vec<Vec<f32>>| if is_own { parts.concat() } else { add_up(parts, d) };
        [
            Some(array(d_x, dims(x))),
            Some(array(gather(d_scale), dims(scale))),
            Some(array(gather(d_shift), dims(shift))),
        ]
    }
}

kernel! {
    pub(super) fn rms_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let d = weight.len();
        for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
            let inverse = 1.0 / (sum([x], |[x]| x * x) / d as f32 + eps).sqrt();
            for i in 0..d {
                out[i] = x[i] * inverse * weight[i];
            }
        }
    }
}

kernel! {
    pub(super) fn rms_rows_backward(
        x: &[f32],
        weight: &[f32],
        eps: f32,
        grad: &[f32],
        d_x: &mut [f32],
        d_weight: &mut [f32],
    ) {
        let d = weight.len();
        let d_weight = &mut d_weight[..d];
        for ((x, grad), d_x) in x.chunks_exact(d).zip(grad.chunks_exact(d)).zip(d_x.chunks_exact_mut(d)) {
            let inverse = 1.0 / (sum([x], |[x]| x * x) / d as f32 + eps).sqrt();
            let mean_product = sum([grad, weight, x], |[grad, weight, x]| grad * weight * x) * inverse * inverse / d as f32;
            for i in 0..d {
                d_weight[i] += grad[i] * x[i] * inverse;
                d_x[i] = inverse * (grad[i] * weight[i] - x[i] * mean_product);
            }
        }
    }
}

/// Root-mean-square norm of x [.., d] times a weight [d].
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    pub(crate) eps: f32,
}

impl RmsNorm {
    fn piece(x: &FlexTensor, d: usize) -> usize {
        (values(x).len() / d).div_ceil(NUM_PIECES).max(1) * d
    }
}

impl HostOp<2> for RmsNorm {
    type Saved = ();

    fn forward(&self, [x, weight]: &[FlexTensor; 2]) -> (FlexTensor, ()) {
        let (input, weight) = (values(x), values(weight));
        let piece = Self::piece(x, weight.len());
        let mut out = unwritten(input.len());
        for_chunks(&mut out, piece, |i, out| rms_rows(&input[i * piece..][..out.len()], weight, self.eps, out));
        (array(out, dims(x)), ())
    }

    fn backward(
        &self,
        [x, weight]: &[FlexTensor; 2],
        _: &(),
        grad: &FlexTensor,
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let (input, weight_values, grad) = (values(x), values(weight), values(grad));
        let d = weight_values.len();
        let piece = Self::piece(x, d);
        let mut d_x = unwritten(input.len());
        let d_weight = map_chunks(&mut d_x, piece, |i, d_x| {
            let range = i * piece..i * piece + d_x.len();
            let mut d_weight = vec![0.0; d];
            rms_rows_backward(&input[range.clone()], weight_values, self.eps, &grad[range], d_x, &mut d_weight);
            d_weight
        });
        [Some(array(d_x, dims(x))), Some(array(add_up(d_weight, d), dims(weight)))]
    }
}

kernel! {
    /// One group: `weight.len()` channels of equal length.
    pub(super) fn group(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, then_silu: bool, out: &mut [f32]) {
        let (count, pixels) = (x.len(), x.len() / weight.len());
        let mean = sum([x], |[x]| x) / count as f32;
        let inverse = 1.0 / (sum([x], |[x]| (x - mean) * (x - mean)) / count as f32 + eps).sqrt();
        for (c, (x, out)) in x.chunks_exact(pixels).zip(out.chunks_exact_mut(pixels)).enumerate() {
            let (w, b) = (weight[c] * inverse, bias[c] - mean * weight[c] * inverse);
            if then_silu {
                for (out, &x) in out.iter_mut().zip(x) {
                    let z = x * w + b;
                    *out = z * sigmoid(z);
                }
            } else {
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = x * w + b;
                }
            }
        }
    }
}

kernel! {
    /// Gradients of [`group`]; `d_x` first holds the gradient of the normed and scaled value.
    pub(super) fn group_backward(
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        eps: f32,
        then_silu: bool,
        grad: &[f32],
        d_x: &mut [f32],
        d_weight: &mut [f32],
        d_bias: &mut [f32],
    ) {
        let (count, pixels) = (x.len(), x.len() / weight.len());
        let mean = sum([x], |[x]| x) / count as f32;
        let inverse = 1.0 / (sum([x], |[x]| (x - mean) * (x - mean)) / count as f32 + eps).sqrt();
        let (mut mean_grad, mut mean_product) = (0.0, 0.0);
        let channels = x.chunks_exact(pixels).zip(grad.chunks_exact(pixels)).zip(d_x.chunks_exact_mut(pixels));
        for (c, ((x, grad), d_x)) in channels.enumerate() {
            if then_silu {
                let (w, b) = (weight[c] * inverse, bias[c] - mean * weight[c] * inverse);
                for ((d_x, &x), &grad) in d_x.iter_mut().zip(x).zip(grad) {
                    let z = x * w + b;
                    let s = sigmoid(z);
                    *d_x = grad * s * (1.0 + z * (1.0 - s));
                }
            } else {
                d_x.copy_from_slice(grad);
            }
            d_bias[c] = sum([&*d_x], |[d_x]| d_x);
            d_weight[c] = sum([&*d_x, x], |[d_x, x]| d_x * (x - mean)) * inverse;
            mean_grad += d_bias[c] * weight[c] / count as f32;
            mean_product += d_weight[c] * weight[c] / count as f32;
        }
        for (c, (x, d_x)) in x.chunks_exact(pixels).zip(d_x.chunks_exact_mut(pixels)).enumerate() {
            for (d_x, &x) in d_x.iter_mut().zip(x) {
                *d_x = inverse * (*d_x * weight[c] - mean_grad - (x - mean) * inverse * mean_product);
            }
        }
    }
}

/// Group norm of x [b, c, h, w] with weight and bias [c], optionally followed by SiLU.
#[derive(Clone, Debug)]
pub(crate) struct GroupNorm {
    pub(crate) groups: usize,
    pub(crate) eps: f32,
    pub(crate) then_silu: bool,
}

impl HostOp<3> for GroupNorm {
    type Saved = ();

    fn forward(&self, [x, weight, bias]: &[FlexTensor; 3]) -> (FlexTensor, ()) {
        let (input, weight, bias) = (values(x), values(weight), values(bias));
        let (channels, size) = (weight.len() / self.groups, input.len() / (dims(x)[0] * self.groups));
        let mut out = unwritten(input.len());
        for_chunks(&mut out, size, |i, out| {
            let own = i % self.groups * channels..(i % self.groups + 1) * channels;
            let input = &input[i * size..(i + 1) * size];
            group(input, &weight[own.clone()], &bias[own], self.eps, self.then_silu, out);
        });
        (array(out, dims(x)), ())
    }

    fn backward(
        &self,
        [x, weight, bias]: &[FlexTensor; 3],
        _: &(),
        grad: &FlexTensor,
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let (input, grad) = (values(x), values(grad));
        let (weight_values, bias_values) = (values(weight), values(bias));
        let c = weight_values.len();
        let (channels, sample) = (c / self.groups, input.len() / dims(x)[0]);
        let size = sample / self.groups;
        let mut d_x = unwritten(input.len());
        let samples = map_chunks(&mut d_x, sample, |b, d_x| {
            let (mut d_weight, mut d_bias) = (vec![0.0; c], vec![0.0; c]);
            for g in 0..self.groups {
                let (own, part) = (g * channels..(g + 1) * channels, g * size..(g + 1) * size);
                let range = b * sample + g * size..b * sample + (g + 1) * size;
                group_backward(
                    &input[range.clone()],
                    &weight_values[own.clone()],
                    &bias_values[own.clone()],
                    self.eps,
                    self.then_silu,
                    &grad[range],
                    &mut d_x[part],
                    &mut d_weight[own.clone()],
                    &mut d_bias[own],
                );
            }
            (d_weight, d_bias)
        });
        let (d_weight, d_bias): (Vec<_>, Vec<_>) = samples.into_iter().unzip();
        [
            Some(array(d_x, dims(x))),
            Some(array(add_up(d_weight, c), dims(weight))),
            Some(array(add_up(d_bias, c), dims(bias))),
        ]
    }
}
