//! 3x3 convolution of stride 1 by Winograd's minimal filtering, F(2x2, 3x3) of Lavin and Gray (arXiv:1509.09308): a tile of 4x4
//! inputs and the weight, both transformed, are multiplied at 16 points, and the products transformed to a tile of 2x2
//! outputs. That is 16 multiplications for what takes the direct form 36.
//!
//! A group of tiles is transformed, multiplied and transformed back by one thread while it stays in the second-level cache. The
//! lanes of a vector are tiles beside each other.
//!
//! Knows no tensor; `conv` decides when it runs. Each output is summed in one order, whatever the number of threads and the
//! length of a vector.

// Sums in registers are written as index loops over small constant ranges, which unroll completely.
#![allow(clippy::needless_range_loop)]

use std::array;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::direct::{Shape, TAPS};
use super::matrix::Matrix;
use super::microkernel::{ROWS, Tile, VECTORS};
use super::planes::LONGEST;
use super::tiles::Vectors;
use super::{Begin, Shared, for_chunks, unwritten, with_scratch};

/// Pixels from a tile to the next.
const STEP: usize = 2;
/// Points at which a tile is multiplied.
const POINTS: usize = 16;
/// Elements of a group's transformed inputs and products: 512 KiB.
const GROUP_ELEMENTS: usize = 1 << 17;
/// Pieces of work that a convolution is cut into at least, where it has as many rows of tiles.
const MIN_PIECES: usize = 4;

/// Channels of input and of output below which the transforms take what the products save: 32 gain a tenth, 16 nothing.
const MIN_CHANNELS: usize = 48;
/// Pixels of an output below which the weight's transform weighs too much, and columns below which rows of tiles fill half a vector.
const MIN_PIXELS: usize = 512;
const MIN_COLUMNS: usize = 16;

/// Returns whether this form takes less time than `direct`: 0.5 to 0.9 of it.
pub(super) fn pays(shape: &Shape) -> bool {
    let &Shape { batch, c, o, out_h, out_w, stride, .. } = shape;
    stride == 1 && c.min(o) >= MIN_CHANNELS && out_w >= MIN_COLUMNS && batch * out_h * out_w >= MIN_PIXELS
}

/// Convolves x [batch, c, h, w] with weight [o, c, 3, 3] to [batch, o, out_h, out_w].
pub(super) fn forward(x: &[f32], shape: Shape, weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let Shape { c, o, .. } = shape;
    convolve(x, shape, &pack(weight, [o, c], [c * TAPS, TAPS], false), bias)
}

/// Returns the gradient [batch, c, h, w] of the input: the convolution of the output's gradient with the mirrored weight.
pub(super) fn input_gradient(grad: &[f32], shape: Shape, weight: &[f32]) -> Vec<f32> {
    let Shape { batch, c, h, w, o, out_h, out_w, stride, padding } = shape;
    let shape = Shape { batch, c: o, h: out_h, w: out_w, o: c, out_h: h, out_w: w, stride, padding: 2 - padding };
    convolve(grad, shape, &pack(weight, [c, o], [TAPS, c * TAPS], true), &vec![0.0; c])
}

/// Transforms weights and orders them as products read them: per [`ROWS`] outputs [points, inputs, outputs], each point with
/// room behind it. `strides` are those of an output and of an input.
fn pack(weight: &[f32], [outputs, inputs]: [usize; 2], strides: [usize; 2], is_mirrored: bool) -> Vec<f32> {
    let mut packed = unwritten(outputs.div_ceil(ROWS) * POINTS * point_weights(inputs));
    for_chunks(&mut packed, POINTS * point_weights(inputs), |i, packed| {
        // Outputs that the last ones lack are not computed: any weight will do.
        let starts = array::from_fn(|r| (i * ROWS + r).min(outputs - 1) * strides[0]);
        Arch::new().dispatch(Pack { weight, starts, stride: strides[1], inputs, is_mirrored, packed });
    });
    packed
}

/// Elements of one point of [`ROWS`] outputs' weights, and what a vector of the last ones writes behind.
fn point_weights(inputs: usize) -> usize {
    inputs * ROWS + LONGEST
}

/// Transforms the weights of some outputs, which begin at `starts`.
struct Pack<'a> {
    weight: &'a [f32],
    starts: [usize; ROWS],
    stride: usize,
    inputs: usize,
    is_mirrored: bool,
    packed: &'a mut [f32],
}

impl WithSimd for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        /// Inputs whose weights are brought into the order of vectors before the first of them is read.
        const BLOCK: usize = 16;
        let Self { weight, starts, stride, inputs, is_mirrored, packed } = self;
        assert!(packed.len() == POINTS * point_weights(inputs) && S::F32_LANES <= LONGEST);
        let zero = simd.splat_f32s(0.0);
        let mut block = [0.0; BLOCK * TAPS * ROWS + LONGEST];
        for first in (0..inputs).step_by(BLOCK) {
            let count = BLOCK.min(inputs - first);
            for (i, block) in block.chunks_exact_mut(TAPS * ROWS).take(count).enumerate() {
                let weights = starts.map(|start| weight[start + (first + i) * stride..].first_chunk::<TAPS>());
                let weights = weights.map(|weights| weights.expect("nine taps of each output and input"));
                for (tap, block) in block.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
                    *block = weights.map(|weights| weights[tap]);
                }
            }
            let parts = (0..count).flat_map(|i| (0..ROWS).step_by(S::F32_LANES).map(move |part| (i, part)));
            for (i, part) in parts {
                let mut columns = [[zero; 4]; 3];
                for column in 0..3 {
                    let mut taps = [zero; 3];
                    for row in 0..3 {
                        let tap = if is_mirrored { TAPS - 1 - 3 * row - column } else { 3 * row + column };
                        // SAFETY: a vector lies behind each weight of the block.
                        taps[row] = unsafe {
                            let weights = block.as_ptr().add((i * TAPS + tap) * ROWS + part);
                            weights.cast::<S::f32s>().read_unaligned()
                        };
                    }
                    columns[column] = transform_taps(simd, taps);
                }
                for row in 0..4 {
                    let points = transform_taps(simd, [columns[0][row], columns[1][row], columns[2][row]]);
                    for column in 0..4 {
                        let to = (4 * row + column) * point_weights(inputs) + (first + i) * ROWS + part;
                        // SAFETY: what a vector writes behind its outputs is written again by the next input, or is the room.
                        unsafe { packed.as_mut_ptr().add(to).cast::<S::f32s>().write_unaligned(points[column]) };
                    }
                }
            }
        }
    }
}

/// Returns the transform of one row or column of a weight: g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2.
#[inline(always)]
fn transform_taps<S: Simd>(simd: S, g: [S::f32s; 3]) -> [S::f32s; 4] {
    let (ends, half) = (simd.add_f32s(g[0], g[2]), simd.splat_f32s(0.5));
    let [plus, minus] = [simd.add_f32s(ends, g[1]), simd.sub_f32s(ends, g[1])];
    [g[0], simd.mul_f32s(plus, half), simd.mul_f32s(minus, half), g[2]]
}

/// How the tiles of an output are cut into groups, rectangles of tiles.
struct Plan {
    /// Rows and columns of tiles.
    tiles: [usize; 2],
    /// Rows and columns of a group; the last ones may have fewer.
    group: [usize; 2],
}

impl Plan {
    fn new(shape: &Shape, vector: usize) -> Self {
        let tiles @ [rows, columns] = [shape.out_h.div_ceil(STEP), shape.out_w.div_ceil(STEP)];
        let most = GROUP_ELEMENTS / (POINTS * (shape.c + shape.o));
        let most = most.max(VECTORS * vector);
        let width = match columns.div_ceil(most) {
            1 => columns,
            pieces => columns.div_ceil(pieces).next_multiple_of(vector),
        };
        let highest = (most / width).clamp(1, rows.div_ceil(MIN_PIECES.div_ceil(shape.batch)));
        // Lanes that are computed in all, with those that are left empty.
        let lanes = |height: usize| (height * width).next_multiple_of(VECTORS * vector);
        let cost = |height: &usize| rows / height * lanes(*height) + lanes(rows % height);
        let height = (1..=highest).rev().min_by_key(cost).unwrap_or(1);
        Self { tiles, group: [height, width] }
    }

    /// Returns how many groups are below and beside each other.
    fn groups(&self) -> [usize; 2] {
        array::from_fn(|axis| self.tiles[axis].div_ceil(self.group[axis]))
    }
}

/// Convolves x [batch, c, h, w] with weights as [`pack`] orders them.
fn convolve(x: &[f32], shape: Shape, weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let arch = Arch::new();
    convolve_in(Vectors::detect().len, |work| arch.dispatch(work), x, shape, weight, bias)
}

/// The same in vectors of a length, by what runs the work of a group in them.
fn convolve_in(
    vector: usize,
    run: impl Fn(Work) + Sync,
    x: &[f32],
    shape: Shape,
    weight: &[f32],
    bias: &[f32],
) -> Vec<f32> {
    let Shape { batch, c, h, w, o, out_h, out_w, padding, .. } = shape;
    assert_eq!([x.len(), bias.len()], [batch * c * h * w, o]);
    let mut out = unwritten(batch * o * out_h * out_w);
    if out.is_empty() {
        return out;
    }
    let plan = Plan::new(&shape, vector);
    let [down, across] = plan.groups();
    let shared = Shared::new(&mut out);
    (0..batch * down * across).into_par_iter().for_each(|i| {
        let (sample, first) = (i / (down * across), [i / across % down * plan.group[0], i % across * plan.group[1]]);
        let tiles = array::from_fn(|axis| plan.group[axis].min(plan.tiles[axis] - first[axis]));
        let group = Group {
            vector,
            x: &x[sample * c * h * w..][..c * h * w],
            sides: [h, w],
            padding,
            c,
            weight,
            bias,
            first,
            tiles,
            // SAFETY: the sample's outputs, of which this group writes its tiles'.
            out: unsafe { shared.from(sample * o * out_h * out_w) },
            out_sides: [out_h, out_w],
        };
        with_scratch(group.scratch_len(), |scratch| run(Work { group: &group, scratch }));
    });
    out
}

/// Some tiles of one sample.
struct Group<'a> {
    /// Elements of a vector.
    vector: usize,
    /// Planes [c, sides] of the input.
    x: &'a [f32],
    sides: [usize; 2],
    padding: usize,
    c: usize,
    weight: &'a [f32],
    bias: &'a [f32],
    /// Row and column of the first tile.
    first: [usize; 2],
    /// Rows and columns of tiles.
    tiles: [usize; 2],
    /// Planes [o, out_sides] of the output, of which nobody else writes the tiles' pixels.
    out: *mut f32,
    out_sides: [usize; 2],
}

impl Group<'_> {
    /// Tiles, filled up to whole tiles of a product.
    fn lanes(&self) -> usize {
        (self.tiles[0] * self.tiles[1]).next_multiple_of(VECTORS * self.vector)
    }

    /// Elements of a line: every second pixel of a row of tiles, and what vectors read behind.
    fn pitch(&self) -> usize {
        self.tiles[1].next_multiple_of(self.vector) + self.vector
    }

    /// Elements of the lines that one channel's tiles are made from, and of those that they are made to.
    fn lines_len(&self) -> usize {
        (self.tiles[0] * STEP + 2) * STEP * self.pitch()
    }

    /// Elements of one point of so many channels, and a vector that the last row of tiles may write behind.
    fn point_len(&self, channels: usize) -> usize {
        channels * self.lanes() + LONGEST
    }

    fn scratch_len(&self) -> usize {
        self.lines_len() + POINTS * (self.point_len(self.c) + self.point_len(self.bias.len()))
    }

    /// Splits the rows that the tiles read of one channel into lines of their even and their odd pixels: [rows, 2, pitch].
    #[inline(always)]
    fn split(&self, channel: usize, lines: &mut [f32]) {
        let ([h, w], padding) = (self.sides, self.padding);
        let plane = &self.x[channel * h * w..][..h * w];
        let [top, left] = self.first.map(|tile| tile * STEP);
        // Pairs that are needed, and those of them that lie before the first one inside.
        let (count, before) = (self.tiles[1] + 1, padding.saturating_sub(left).div_ceil(STEP));
        let start = left + before * STEP - padding;
        for (y, lines) in (top..).zip(lines.chunks_exact_mut(STEP * self.pitch())) {
            let Some(row) = y.checked_sub(padding).and_then(|y| plane.get(y * w..(y + 1) * w)) else {
                lines.fill(0.0);
                continue;
            };
            let (even, odd) = lines.split_at_mut(self.pitch());
            let pairs = row.get(start..).unwrap_or_default().as_chunks::<STEP>().0;
            let pairs = &pairs[..pairs.len().min(count - before)];
            for ((even, odd), pair) in even[before..].iter_mut().zip(&mut odd[before..]).zip(pairs) {
                (*even, *odd) = (pair[0], pair[1]);
            }
            let pixel = |x: usize| (left + x).checked_sub(padding).and_then(|x| row.get(x)).copied().unwrap_or(0.0);
            for i in (0..before).chain(before + pairs.len()..even.len()) {
                (even[i], odd[i]) = (pixel(STEP * i), pixel(STEP * i + 1));
            }
        }
    }
}

/// The work of one group, in vectors.
struct Work<'a> {
    group: &'a Group<'a>,
    scratch: &'a mut [f32],
}

impl WithSimd for Work<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { group, scratch } = self;
        assert_eq!([group.vector, scratch.len()], [S::F32_LANES, group.scratch_len()]);
        let (lines, scratch) = scratch.split_at_mut(group.lines_len());
        let (inputs, products) = scratch.split_at_mut(POINTS * group.point_len(group.c));
        transform_inputs(simd, group, lines, inputs);
        multiply(simd, group, inputs, products);
        transform_products(simd, group, products, lines);
    }
}

/// Transforms tiles to `inputs`, [points, c, lanes].
#[inline(always)]
fn transform_inputs<S: Simd>(simd: S, group: &Group, lines: &mut [f32], inputs: &mut [f32]) {
    /// Two rows, or columns, of a tile, and whether they are added instead of subtracted: the rows of the transform.
    const ROWS: [(usize, usize, bool); 4] = [(0, 2, false), (1, 2, true), (2, 1, false), (1, 3, false)];
    let ([rows, columns], pitch, lanes) = (group.tiles, group.pitch(), group.lanes());
    let point_len = group.point_len(group.c);
    assert!(inputs.len() == POINTS * point_len && lines.len() == (rows + 1) * STEP * STEP * pitch);
    let unused = rows * columns..lanes;
    for channel in 0..group.c {
        group.split(channel, lines);
        if !unused.is_empty() {
            for point in inputs.chunks_exact_mut(point_len) {
                point[channel * lanes..][unused.clone()].fill(0.0);
            }
        }
        for row in 0..rows {
            for column in (0..columns).step_by(S::F32_LANES) {
                // SAFETY: a row of tiles reads four rows of lines, each up to a pixel behind its last vector; what a vector
                // writes behind the row's tiles is written again by the next row's or channel's, or is the room behind them.
                unsafe {
                    let line = lines.as_ptr().add(row * STEP * STEP * pitch + column);
                    let out = inputs.as_mut_ptr().add(channel * lanes + row * columns + column);
                    for i in 0..4 {
                        let (a, b, is_sum) = ROWS[i];
                        let mut pixels = [simd.splat_f32s(0.0); 4];
                        for j in 0..4 {
                            let place = j % STEP * pitch + j / STEP;
                            let [a, b] = [a, b].map(|row| line.add(row * STEP * pitch + place).cast::<S::f32s>());
                            pixels[j] = combine(simd, a.read_unaligned(), b.read_unaligned(), is_sum);
                        }
                        for j in 0..4 {
                            let (a, b, is_sum) = ROWS[j];
                            let point = out.add((4 * i + j) * point_len).cast::<S::f32s>();
                            point.write_unaligned(combine(simd, pixels[a], pixels[b], is_sum));
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn combine<S: Simd>(simd: S, a: S::f32s, b: S::f32s, is_sum: bool) -> S::f32s {
    if is_sum { simd.add_f32s(a, b) } else { simd.sub_f32s(a, b) }
}

/// Multiplies `inputs` [points, c, lanes] with the weights to `products` [points, o, lanes].
#[inline(always)]
fn multiply<S: Simd>(simd: S, group: &Group, inputs: &[f32], products: &mut [f32]) {
    let (c, o, lanes) = (group.c, group.bias.len(), group.lanes());
    let (inputs_len, products_len) = (group.point_len(c), group.point_len(o));
    assert!(inputs.len() == POINTS * inputs_len && products.len() == POINTS * products_len);
    for point in 0..POINTS {
        for lane in (0..lanes).step_by(VECTORS * S::F32_LANES) {
            for first in (0..o).step_by(ROWS) {
                let weights = &group.weight[(first / ROWS * POINTS + point) * point_weights(c)..];
                let tile = Tile {
                    rows: Matrix { values: weights, row: 1, column: ROWS },
                    is_packed: true,
                    inner: c,
                    panel: &inputs[point * inputs_len + lane..],
                    pitch: lanes,
                    columns: VECTORS * S::F32_LANES,
                    // SAFETY: the length was just checked.
                    out: unsafe { products.as_mut_ptr().add(point * products_len + first * lanes + lane) },
                    out_row: lanes,
                    begin: Begin::Zero,
                };
                // SAFETY: the lanes are whole tiles, and these outputs exist.
                unsafe { tile.compute(simd, ROWS.min(o - first)) };
            }
        }
    }
}

/// Transforms `products` [points, o, lanes] to pixels, by way of `lines` of even and odd ones.
#[inline(always)]
fn transform_products<S: Simd>(simd: S, group: &Group, products: &[f32], lines: &mut [f32]) {
    let ([rows, columns], [out_h, out_w], pitch, lanes) = (group.tiles, group.out_sides, group.pitch(), group.lanes());
    let point_len = group.point_len(group.bias.len());
    assert!(products.len() == POINTS * point_len && lines.len() >= STEP * STEP * pitch);
    let left = group.first[1] * STEP;
    let width = (columns * STEP).min(out_w - left);
    for (output, &bias) in group.bias.iter().enumerate() {
        let bias = simd.splat_f32s(bias);
        for row in 0..rows {
            for column in (0..columns).step_by(S::F32_LANES) {
                // SAFETY: behind the lanes of each point there is room for a vector, and four lines were made for these tiles.
                unsafe {
                    let from = products.as_ptr().add(output * lanes + row * columns + column);
                    let mut halves = [[simd.splat_f32s(0.0); 4]; STEP];
                    for j in 0..4 {
                        let mut column = [simd.splat_f32s(0.0); 4];
                        for i in 0..4 {
                            column[i] = from.add((4 * i + j) * point_len).cast::<S::f32s>().read_unaligned();
                        }
                        [halves[0][j], halves[1][j]] = transform_sums(simd, column);
                    }
                    for i in 0..STEP {
                        let pixels = transform_sums(simd, halves[i]);
                        for j in 0..STEP {
                            let line = lines.as_mut_ptr().add((i * STEP + j) * pitch + column);
                            line.cast::<S::f32s>().write_unaligned(simd.add_f32s(pixels[j], bias));
                        }
                    }
                }
            }
            let top = (group.first[0] + row) * STEP;
            for (y, lines) in (top..out_h).zip(lines.chunks_exact(STEP * pitch).take(STEP)) {
                let (even, odd) = lines.split_at(pitch);
                // SAFETY: pixels of this group's tiles.
                let out = unsafe {
                    std::slice::from_raw_parts_mut(group.out.add((output * out_h + y) * out_w + left), width)
                };
                let (pairs, last) = out.as_chunks_mut::<STEP>();
                for (pair, (&even, &odd)) in pairs.iter_mut().zip(even.iter().zip(odd)) {
                    *pair = [even, odd];
                }
                last.iter_mut().for_each(|last| *last = even[width / STEP]);
            }
        }
    }
}

/// Returns the transform of one row or column of products: m0 + m1 + m2, m1 - m2 - m3.
#[inline(always)]
fn transform_sums<S: Simd>(simd: S, m: [S::f32s; 4]) -> [S::f32s; STEP] {
    let sum = simd.add_f32s(simd.add_f32s(m[0], m[1]), m[2]);
    [sum, simd.sub_f32s(simd.sub_f32s(m[1], m[2]), m[3])]
}

#[cfg(test)]
mod tests {
    use pulp::{Scalar256b, Scalar512b};

    use super::*;
    use crate::random::Stream;

    #[test]
    fn outputs_are_the_same_for_any_length_of_a_vector() {
        if Vectors::detect().len == 1 {
            return;
        }
        for [batch, c, o, h, w] in [[2, 5, 8, 9, 23], [1, 60, 49, 22, 37], [1, 3, 7, 4, 300]] {
            let shape = Shape { batch, c, h, w, o, out_h: h, out_w: w, stride: 1, padding: 1 };
            let draw = |name: &str, count: usize| Stream::new(1, name).normals(count, 1.0);
            let (x, bias) = (draw("x", batch * c * h * w), draw("bias", o));
            let weight = pack(&draw("weight", o * c * TAPS), [o, c], [c * TAPS, TAPS], false);
            let ours = convolve(&x, shape, &weight, &bias);
            assert!(convolve_in(8, |work| work.with_simd(Scalar256b), &x, shape, &weight, &bias) == ours);
            assert!(convolve_in(16, |work| work.with_simd(Scalar512b), &x, shape, &weight, &bias) == ours);
        }
    }
}
