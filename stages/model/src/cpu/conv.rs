//! Convolution, and nearest-neighbour doubling of the side.
//!
//! The common kind (3x3, stride 1 or 2) runs in `direct` and `conv_weight` where the processor has vectors, and in `winograd` where
//! that pays; others, and all of them elsewhere, by unfolding a band of output rows at a time.

use burn::backend::flex::FlexTensor;

use super::matrix::Matrix;
use super::product::matmul;
use super::simd::{kernel, sum};
use super::{
    Begin, HostOp, add_up, array, conv_weight, dims, direct, for_chunks, map_range, unwritten, values, winograd,
    with_scratch,
};

/// Elements of an unfolded band: small enough to stay in a core's cache.
const BAND_ELEMENTS: usize = 1 << 16;
/// Columns of an unfolded band at least, where there are as many: a product with fewer runs in half-filled registers.
const BAND_COLUMNS: usize = 64;
/// Pieces that the batch is cut into when the weight's gradient is summed; fixed, so that the order of the sum is.
const NUM_PIECES: usize = 8;

/// Convolution of x [b, c, h, w] with a weight [o, c, kernel, kernel] and a bias [o].
#[derive(Clone, Debug)]
pub(crate) struct Conv {
    pub(crate) stride: usize,
    pub(crate) padding: usize,
}

/// Sizes of one convolution.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    c: usize,
    h: usize,
    w: usize,
    o: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    out_h: usize,
    out_w: usize,
}

impl Sizes {
    fn of(conv: &Conv, x: &FlexTensor, weight: &FlexTensor) -> Self {
        let [c, h, w] = [dims(x)[1], dims(x)[2], dims(x)[3]];
        let [o, kernel] = [dims(weight)[0], dims(weight)[2]];
        let side = |side: usize| (side + 2 * conv.padding - kernel) / conv.stride + 1;
        let (stride, padding) = (conv.stride, conv.padding);
        Self { c, h, w, o, kernel, stride, padding, out_h: side(h), out_w: side(w) }
    }

    /// Rows of the unfolded matrix.
    fn taps(&self) -> usize {
        self.c * self.kernel * self.kernel
    }

    /// Elements of one input and of one output.
    fn input(&self) -> usize {
        self.c * self.h * self.w
    }

    fn output(&self) -> usize {
        self.o * self.out_h * self.out_w
    }

    /// Whether unfolding would only copy.
    fn is_pointwise(&self) -> bool {
        self.kernel == 1 && self.stride == 1 && self.padding == 0
    }

    /// The sizes for `direct`, `conv_weight` and, at stride 1, `winograd`, if they can take this convolution.
    fn direct(&self, batch: usize) -> Option<direct::Shape> {
        let &Self { c, h, w, o, kernel, stride, padding, out_h, out_w } = self;
        let can = kernel == 3 && stride <= 2 && padding <= 2 && batch * c * o > 0 && direct::is_available();
        can.then_some(direct::Shape { batch, c, h, w, o, out_h, out_w, stride, padding })
    }

    /// Calls `f` with the first row and the number of rows of each band of output rows.
    fn for_bands(&self, mut f: impl FnMut(usize, usize)) {
        let rows = (BAND_ELEMENTS / (self.taps() * self.out_w)).max(BAND_COLUMNS.div_ceil(self.out_w));
        let rows = rows.clamp(1, self.out_h);
        (0..self.out_h).step_by(rows).for_each(|first| f(first, rows.min(self.out_h - first)));
    }

    /// Returns the output columns for which tap column `kx` falls inside the input, and the input column of the first.
    fn columns(&self, kx: usize) -> (std::ops::Range<usize>, usize) {
        let first = self.padding.saturating_sub(kx).div_ceil(self.stride);
        let last = (self.w + self.padding).saturating_sub(kx + 1) / self.stride + 1;
        let last = if self.w + self.padding <= kx { 0 } else { last.min(self.out_w) };
        (first.min(last)..last, (first * self.stride + kx).saturating_sub(self.padding))
    }

    /// Calls `f` for each run of one tap row: place in the band, place in the input, length.
    #[inline(always)]
    fn for_runs(&self, first_row: usize, num_rows: usize, mut f: impl FnMut(usize, usize, usize)) {
        let width = num_rows * self.out_w;
        for tap in 0..self.taps() {
            let (c, ky, kx) = (tap / (self.kernel * self.kernel), tap / self.kernel % self.kernel, tap % self.kernel);
            let (columns, start) = self.columns(kx);
            for row in 0..num_rows {
                let y = (first_row + row) * self.stride + ky;
                if y < self.padding || y - self.padding >= self.h || columns.is_empty() {
                    continue;
                }
                let from = (c * self.h + y - self.padding) * self.w + start;
                f(tap * width + row * self.out_w + columns.start, from, columns.len());
            }
        }
    }

    fn forward_one(&self, x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
        let (taps, pixels) = (self.taps(), self.out_h * self.out_w);
        for (out, &bias) in out.chunks_exact_mut(pixels).zip(bias) {
            out.fill(bias);
        }
        let weight = Matrix::rows(weight, taps);
        if self.is_pointwise() {
            return matmul([self.o, taps, pixels], weight, Matrix::rows(x, pixels), (out, pixels), Begin::GoOn, false);
        }
        self.for_bands(|first, rows| {
            let width = rows * self.out_w;
            with_scratch(taps * width, |band| {
                unfold(self, x, first, rows, band);
                let out = &mut out[first * self.out_w..];
                matmul([self.o, taps, width], weight, Matrix::rows(band, width), (out, pixels), Begin::GoOn, false);
            });
        });
    }

    fn input_grad_one(&self, weight: &[f32], grad: &[f32], d_x: &mut [f32]) {
        let (taps, pixels) = (self.taps(), self.out_h * self.out_w);
        let weight = Matrix::rows(weight, taps).transposed();
        if self.is_pointwise() {
            return matmul(
                [taps, self.o, pixels],
                weight,
                Matrix::rows(grad, pixels),
                (d_x, pixels),
                Begin::Zero,
                false,
            );
        }
        self.for_bands(|first, rows| {
            let width = rows * self.out_w;
            with_scratch(taps * width, |band| {
                let grad = Matrix { values: &grad[first * self.out_w..], row: pixels, column: 1 };
                matmul([taps, self.o, width], weight, grad, (band, width), Begin::Zero, false);
                fold(self, band, first, rows, d_x);
            });
        });
    }

    fn weight_grad_one(&self, x: &[f32], grad: &[f32], d_weight: &mut [f32]) {
        let (taps, pixels) = (self.taps(), self.out_h * self.out_w);
        if self.is_pointwise() {
            let x = Matrix::rows(x, pixels).transposed();
            return matmul([self.o, pixels, taps], Matrix::rows(grad, pixels), x, (d_weight, taps), Begin::GoOn, false);
        }
        self.for_bands(|first, rows| {
            let width = rows * self.out_w;
            with_scratch(taps * width, |band| {
                unfold(self, x, first, rows, band);
                let grad = Matrix { values: &grad[first * self.out_w..], row: pixels, column: 1 };
                let band = Matrix::rows(band, width).transposed();
                matmul([self.o, width, taps], grad, band, (d_weight, taps), Begin::GoOn, false);
            });
        });
    }
}

/// Elements moved at once: a run is too short for a call of the library's copy to pay.
const BLOCK: usize = 8;

kernel! {
    /// Unfolds a band of output rows of one input: [taps, rows * out_w].
    pub(super) fn unfold(sizes: &Sizes, x: &[f32], first_row: usize, num_rows: usize, band: &mut [f32]) {
        if sizes.padding > 0 {
            band.fill(0.0);
        }
        sizes.for_runs(first_row, num_rows, |to, from, len| {
            if sizes.stride == 1 {
                let (blocks, rest) = band[to..to + len].as_chunks_mut::<BLOCK>();
                let (from_blocks, from_rest) = x[from..from + len].as_chunks::<BLOCK>();
                for (out, block) in blocks.iter_mut().zip(from_blocks) {
                    *out = *block;
                }
                for (out, &value) in rest.iter_mut().zip(from_rest) {
                    *out = value;
                }
            } else {
                for (i, out) in band[to..to + len].iter_mut().enumerate() {
                    *out = x[from + i * sizes.stride];
                }
            }
        });
    }
}

kernel! {
    /// Adds a band back to the input it was unfolded from.
    pub(super) fn fold(sizes: &Sizes, band: &[f32], first_row: usize, num_rows: usize, x: &mut [f32]) {
        sizes.for_runs(first_row, num_rows, |from, to, len| {
            if sizes.stride == 1 {
                for (out, &value) in x[to..to + len].iter_mut().zip(&band[from..from + len]) {
                    *out += value;
                }
            } else {
                for (i, &value) in band[from..from + len].iter().enumerate() {
                    x[to + i * sizes.stride] += value;
                }
            }
        });
    }
}

kernel! {
    /// out[o] += sum over the pixels of channel o.
    pub(super) fn sum_channels(grad: &[f32], out: &mut [f32]) {
        let pixels = grad.len() / out.len();
        for (grad, out) in grad.chunks_exact(pixels).zip(out.iter_mut()) {
            *out += sum([grad], |[grad]| grad);
        }
    }
}

impl HostOp<3> for Conv {
    type Saved = ();

    fn forward(&self, [x, weight, bias]: &[FlexTensor; 3]) -> (FlexTensor, ()) {
        let sizes = Sizes::of(self, x, weight);
        let (input, weight, bias) = (values(x), values(weight), values(bias));
        if let Some(shape) = sizes.direct(dims(x)[0]) {
            let convolve = if winograd::pays(&shape) { winograd::forward } else { direct::forward };
            let out = convolve(input, shape, weight, bias);
            return (array(out, &[dims(x)[0], sizes.o, sizes.out_h, sizes.out_w]), ());
        }
        let mut out = unwritten(dims(x)[0] * sizes.output());
        for_chunks(&mut out, sizes.output(), |b, out| {
            sizes.forward_one(&input[b * sizes.input()..(b + 1) * sizes.input()], weight, bias, out);
        });
        (array(out, &[dims(x)[0], sizes.o, sizes.out_h, sizes.out_w]), ())
    }

    fn backward(
        &self,
        [x, weight, bias]: &[FlexTensor; 3],
        _: &(),
        grad: &FlexTensor,
        needs: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let sizes = Sizes::of(self, x, weight);
        let (input, weight_values, grad) = (values(x), values(weight), values(grad));
        let batch = dims(x)[0];
        if let Some(shape) = sizes.direct(batch) {
            let input_gradient = if winograd::pays(&shape) { winograd::input_gradient } else { direct::input_gradient };
            return [
                needs[0].then(|| array(input_gradient(grad, shape, weight_values), dims(x))),
                needs[1].then(|| array(conv_weight::weight_gradient(input, grad, shape), dims(weight))),
                needs[2].then(|| array(bias_grad(grad, &sizes), dims(bias))),
            ];
        }
        let one = |b: usize| {
            (&input[b * sizes.input()..(b + 1) * sizes.input()], &grad[b * sizes.output()..(b + 1) * sizes.output()])
        };
        let d_x = needs[0].then(|| {
            let mut d_x = vec![0.0; input.len()];
            for_chunks(&mut d_x, sizes.input(), |b, d_x| sizes.input_grad_one(weight_values, one(b).1, d_x));
            array(d_x, dims(x))
        });
        let per_piece = batch.div_ceil(NUM_PIECES).max(1);
        let (mut d_weights, mut d_biases) = (Vec::new(), Vec::new());
        if needs[1] || needs[2] {
            let pieces = map_range(batch.div_ceil(per_piece), input.len() * sizes.o, |piece| {
                let (mut d_weight, mut d_bias) = (vec![0.0; weight_values.len()], vec![0.0; sizes.o]);
                for b in piece * per_piece..((piece + 1) * per_piece).min(batch) {
                    let (x, grad) = one(b);
                    sizes.weight_grad_one(x, grad, &mut d_weight);
                    sum_channels(grad, &mut d_bias);
                }
                (d_weight, d_bias)
            });
            (d_weights, d_biases) = pieces.into_iter().unzip();
        }
        let d_weight = needs[1].then(|| array(add_up(d_weights, weight_values.len()), dims(weight)));
        [d_x, d_weight, needs[2].then(|| array(add_up(d_biases, sizes.o), dims(bias)))]
    }
}

/// Sums a gradient [b, o, h, w] over all axes but the channels'.
fn bias_grad(grad: &[f32], sizes: &Sizes) -> Vec<f32> {
    let pixels = sizes.out_h * sizes.out_w;
    let total = |o: usize| {
        let samples = grad.chunks_exact(sizes.output());
        samples.fold(0.0, |total, grad| {
            let mut sum = [total];
            sum_channels(&grad[o * pixels..(o + 1) * pixels], &mut sum);
            sum[0]
        })
    };
    map_range(sizes.o, grad.len(), total)
}

/// Doubles the side of x [b, c, h, w] by repeating each pixel.
#[derive(Clone, Debug)]
pub(crate) struct Upsample;

impl HostOp<1> for Upsample {
    type Saved = ();

    fn forward(&self, [x]: &[FlexTensor; 1]) -> (FlexTensor, ()) {
        let [b, c, h, w] = [dims(x)[0], dims(x)[1], dims(x)[2], dims(x)[3]];
        let input = values(x);
        let mut out = unwritten(4 * input.len());
        for_chunks(&mut out, 4 * h * w, |i, out| {
            let input = &input[i * h * w..(i + 1) * h * w];
            for (row, out) in input.chunks_exact(w).zip(out.chunks_exact_mut(4 * w)) {
                let (first, second) = out.split_at_mut(2 * w);
                for (pair, &value) in first.as_chunks_mut::<2>().0.iter_mut().zip(row) {
                    *pair = [value; 2];
                }
                second.copy_from_slice(first);
            }
        });
        (array(out, &[b, c, 2 * h, 2 * w]), ())
    }

    fn backward(&self, [x]: &[FlexTensor; 1], _: &(), grad: &FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let [h, w] = [dims(x)[2], dims(x)[3]];
        let grad = values(grad);
        let mut out = unwritten(values(x).len());
        for_chunks(&mut out, h * w, |i, out| {
            let grad = &grad[4 * i * h * w..4 * (i + 1) * h * w];
            for (out, grad) in out.chunks_exact_mut(w).zip(grad.chunks_exact(4 * w)) {
                let (first, second) = grad.split_at(2 * w);
                let pairs = first.as_chunks::<2>().0.iter().zip(second.as_chunks::<2>().0);
                for (out, (a, b)) in out.iter_mut().zip(pairs) {
                    *out = (a[0] + a[1]) + (b[0] + b[1]);
                }
            }
        });
        [Some(array(out, dims(x)))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    /// All forms of a convolution, and of its gradients, on one processor.
    #[test]
    fn the_other_forms_agree_with_unfolding() {
        if !direct::is_available() {
            return;
        }
        let sizes = [
            [2, 3, 16, 8, 8],
            [1, 5, 7, 5, 16],
            [3, 4, 3, 9, 33],
            [2, 6, 13, 1, 1],
            [1, 2, 6, 3, 64],
            [2, 9, 70, 4, 7],
            // More than one band, the last one shorter, in rows of whole vectors and not.
            [1, 130, 7, 29, 32],
            [1, 130, 5, 31, 27],
            // Groups of tiles below and beside each other, the last ones smaller.
            [2, 60, 49, 22, 37],
            [1, 130, 9, 5, 90],
        ];
        for [b, c, o, h, w] in sizes {
            for (stride, padding) in [(1, 1), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)] {
                if h + 2 * padding < 3 || w + 2 * padding < 3 {
                    continue;
                }
                let side = |side: usize| (side + 2 * padding - 3) / stride + 1;
                let sizes = Sizes { c, h, w, o, kernel: 3, stride, padding, out_h: side(h), out_w: side(w) };
                compare(b, sizes);
            }
        }
    }

    fn compare(b: usize, sizes: Sizes) {
        let draw = |name: &str, count: usize| Stream::new(1, name).normals(count, 1.0);
        let (x, weight) = (draw("x", b * sizes.input()), draw("weight", sizes.o * sizes.taps()));
        let (bias, grad) = (draw("bias", sizes.o), draw("grad", b * sizes.output()));
        let (mut y, mut d_x) = (vec![0.0; grad.len()], vec![0.0; x.len()]);
        let mut d_weight = vec![0.0; weight.len()];
        for i in 0..b {
            let (x, grad) = (&x[i * sizes.input()..][..sizes.input()], &grad[i * sizes.output()..][..sizes.output()]);
            sizes.forward_one(x, &weight, &bias, &mut y[i * sizes.output()..][..sizes.output()]);
            sizes.input_grad_one(&weight, grad, &mut d_x[i * sizes.input()..][..sizes.input()]);
            sizes.weight_grad_one(x, grad, &mut d_weight);
        }
        let shape = sizes.direct(b).unwrap();
        let mut pairs = vec![
            ("value", direct::forward(&x, shape, &weight, &bias), &y),
            ("input", direct::input_gradient(&grad, shape, &weight), &d_x),
            ("weight", conv_weight::weight_gradient(&x, &grad, shape), &d_weight),
        ];
        if sizes.stride == 1 {
            pairs.push(("value in tiles", winograd::forward(&x, shape, &weight, &bias), &y));
            pairs.push(("input in tiles", winograd::input_gradient(&grad, shape, &weight), &d_x));
        }
        for (what, ours, expected) in pairs {
            let scale = expected.iter().fold(1f32, |top, value| top.max(value.abs()));
            assert_eq!(ours.len(), expected.len());
            for (a, b) in ours.iter().zip(expected) {
                let Sizes { c, h, w, o, stride, padding, .. } = sizes;
                let at = format!("{what} of {c}x{h}x{w} to {o}, stride {stride}, padding {padding}");
                assert!((a - b).abs() <= 2e-5 * scale, "{at}: {a} is not {b}");
            }
        }
    }

    /// The order of a sum must not depend on who adds it up.
    #[test]
    fn gradients_of_weights_are_the_same_for_any_number_of_threads() {
        let sizes = Sizes { c: 20, h: 33, w: 33, o: 40, kernel: 3, stride: 1, padding: 1, out_h: 33, out_w: 33 };
        let Some(shape) = sizes.direct(2) else { return };
        let draw = |name: &str, count: usize| Stream::new(1, name).normals(count, 1.0);
        let (x, grad) = (draw("x", 2 * sizes.input()), draw("grad", 2 * sizes.output()));
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| conv_weight::weight_gradient(&x, &grad, shape))
        };
        assert!(with(1) == with(3));
    }
}
