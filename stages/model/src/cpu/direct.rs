//! 3x3 convolution in vector registers and without unfolding: a tile of pixels of several output channels stays in registers
//! while the input, padded once, is read at nine offsets. A stride of 2 reads the input from planes of every second pixel.
//!
//! Some vectors of pixels are taken through all output channels, a block of input channels at a time, which stays in the
//! first-level cache meanwhile.
//!
//! Knows no tensor; `conv` decides when it runs. Each output is summed in one order, whatever the number of threads and the
//! length of a vector.

// Sums in registers are written as index loops over small constant ranges, which unroll completely.
#![allow(clippy::needless_range_loop)]

use std::array;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::simd::kernel;
use super::{for_chunks, unwritten};

/// Elements of the longest vector.
pub(super) const LONGEST: usize = 16;
/// Output channels of a tile.
const CHANNELS: usize = 6;
/// Vectors of pixels of a tile at most.
const MOST_VECTORS: usize = 4;
/// Input channels of a block, times the vectors of a tile: about 16 KiB of input.
const BLOCK_VECTORS: usize = 64;
pub(super) const TAPS: usize = 9;
/// Pieces of work that a small batch is cut into.
const MIN_PIECES: usize = 4;

/// What this processor's vectors are like.
#[derive(Clone, Copy)]
pub(super) struct Vectors {
    /// Elements of a vector; 1 where there are none.
    pub(super) len: usize,
    pub(super) registers: usize,
}

impl Vectors {
    /// Asks the processor.
    pub(super) fn detect() -> Self {
        struct Ask;
        impl WithSimd for Ask {
            type Output = Vectors;
            fn with_simd<S: Simd>(self, _: S) -> Vectors {
                Vectors { len: S::F32_LANES.min(LONGEST), registers: S::REGISTER_COUNT }
            }
        }
        Arch::new().dispatch(Ask)
    }

    /// Vectors of pixels of a tile: with [`CHANNELS`], 24 sums in 32 registers or 12 in 16.
    fn per_tile(self) -> usize {
        if self.registers >= 32 { MOST_VECTORS } else { MOST_VECTORS / 2 }
    }
}

/// Returns whether this processor has vectors.
pub(super) fn is_available() -> bool {
    Vectors::detect().len > 1
}

/// Sizes of a 3x3 convolution: input [batch, c, h, w], output [batch, o, out_h, out_w], stride 1 or 2, padding at most 2.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) batch: usize,
    pub(super) c: usize,
    pub(super) h: usize,
    pub(super) w: usize,
    pub(super) o: usize,
    pub(super) out_h: usize,
    pub(super) out_w: usize,
    pub(super) stride: usize,
    pub(super) padding: usize,
}

impl Shape {
    /// Strides from the first pixel of a window to its last, rounded down.
    fn reach(&self) -> usize {
        2 / self.stride
    }
}

/// Convolves x [batch, c, h, w] with weight [o, c, 3, 3] to [batch, o, out_h, out_w].
pub(super) fn forward(x: &[f32], shape: Shape, weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let Shape { batch, c, h, w, o, out_h, out_w, stride, padding } = shape;
    let weight = pack(weight, [o, c], &array::from_fn::<_, TAPS, _>(|tap| tap), |o, i| (o * c + i) * TAPS);
    if stride == 1 {
        let pitch = w + 2 * padding;
        let offsets = (0..TAPS).map(|tap| tap / 3 * pitch + tap % 3).collect();
        let plan = Plan::new([out_h, out_w], Source { plane: (h + 2 * padding) * pitch, pitch, origin: 0 }, offsets);
        return plan.convolve(&pad(x, [h, w], padding), batch, Layer { c, weight: &weight, bias });
    }
    let (part, pitch) = ((out_h + shape.reach()) * (out_w + shape.reach()), out_w + shape.reach());
    let offset = |tap: usize| {
        let [row, column] = [tap / 3, tap % 3];
        (row % stride * stride + column % stride) * part + row / stride * pitch + column / stride
    };
    let source = Source { plane: stride * stride * part, pitch, origin: 0 };
    let plan = Plan::new([out_h, out_w], source, (0..TAPS).map(offset).collect());
    // The bias comes last, as it does where the input is unfolded.
    let mut out = plan.convolve(&split(x, shape), batch, Layer { c, weight: &weight, bias: &vec![0.0; o] });
    for_chunks(&mut out, out_h * out_w, |i, out| out.iter_mut().for_each(|out| *out += bias[i % o]));
    out
}

/// Returns the gradient [batch, c, h, w] of the input.
///
/// Pixels a whole number of strides apart are reached by the same taps: their gradient is a convolution of the output's gradient
/// with these taps, mirrored.
pub(super) fn input_gradient(grad: &[f32], shape: Shape, weight: &[f32]) -> Vec<f32> {
    let Shape { batch, c, h, w, o, out_h, out_w, stride, padding } = shape;
    let reach = shape.reach();
    // Whole strides of the padding need no gradient.
    let skipped = padding / stride;
    let padded = pad(grad, [out_h, out_w], reach - skipped);
    let pitch = out_w + 2 * (reach - skipped);
    let mut d_x = Vec::new();
    for row in 0..stride {
        for column in 0..stride {
            let taps: Vec<usize> =
                (0..TAPS).rev().filter(|tap| tap / 3 % stride == row && tap % 3 % stride == column).collect();
            let weight = pack(weight, [c, o], &taps, |i, o| (o * c + i) * TAPS);
            let offset = |tap: &usize| (reach - tap / 3 / stride) * pitch + reach - tap % 3 / stride;
            let (y, x) = (Every::new(h, row, stride, padding), Every::new(w, column, stride, padding));
            let origin = (y.before - skipped) * pitch + x.before - skipped;
            let source = Source { plane: (out_h + 2 * (reach - skipped)) * pitch, pitch, origin };
            let plan = Plan::new([y.count, x.count], source, taps.iter().map(offset).collect());
            let part = plan.convolve(&padded, batch, Layer { c: o, weight: &weight, bias: &vec![0.0; c] });
            if stride == 1 {
                return part;
            }
            if d_x.is_empty() {
                d_x = unwritten(batch * c * h * w);
            }
            for_chunks(&mut d_x, h * w, |i, d_x| spread(&part[i * plan.pixels..][..plan.pixels], y, x, w, d_x));
        }
    }
    d_x
}

/// Every pixel of one axis that is `phase` behind a multiple of the stride, counted with the padding.
#[derive(Clone, Copy)]
pub(super) struct Every {
    /// Pixels of the kind that lie in the padding before the first.
    before: usize,
    /// The first one, counted without the padding.
    first: usize,
    count: usize,
    stride: usize,
}

impl Every {
    fn new(side: usize, phase: usize, stride: usize, padding: usize) -> Self {
        let before = padding.saturating_sub(phase).div_ceil(stride);
        let first = before * stride + phase - padding;
        Self { before, first, count: side.saturating_sub(first).div_ceil(stride), stride }
    }
}

kernel! {
    /// Writes the pixels of `part`, which are two apart, to their places in a plane whose rows have `w` pixels.
    pub(super) fn spread(part: &[f32], y: Every, x: Every, w: usize, plane: &mut [f32]) {
        for (row, part) in part.chunks_exact(x.count.max(1)).enumerate() {
            let row = (y.first + row * y.stride) * w;
            let (pairs, last) = plane[row + x.first..row + w].as_chunks_mut::<2>();
            for (pair, &value) in pairs.iter_mut().zip(part) {
                pair[0] = value;
            }
            last.iter_mut().zip(&part[pairs.len()..]).for_each(|(to, &value)| *to = value);
        }
    }
}

/// Surrounds planes of h x w by `padding` zeros; a vector behind the last plane may be read.
pub(super) fn pad(x: &[f32], [h, w]: [usize; 2], padding: usize) -> Vec<f32> {
    let pitch = w + 2 * padding;
    let plane = (h + 2 * padding) * pitch;
    let count = x.len() / (h * w);
    let mut out = unwritten(count * plane + LONGEST);
    let (planes, slack) = out.split_at_mut(count * plane);
    slack.fill(0.0);
    for_chunks(planes, plane, |i, out| {
        let x = &x[i * h * w..(i + 1) * h * w];
        out[..padding * pitch].fill(0.0);
        out[(h + padding) * pitch..].fill(0.0);
        for (x, out) in x.chunks_exact(w).zip(out[padding * pitch..].chunks_exact_mut(pitch)) {
            out[..padding].fill(0.0);
            out[padding..padding + w].copy_from_slice(x);
            out[padding + w..].fill(0.0);
        }
    });
    out
}

/// Pads planes and splits each into four parts, of the pixels that are two apart; a vector behind the last part may be read.
fn split(x: &[f32], shape: Shape) -> Vec<f32> {
    let Shape { batch, c, h, w, out_h, out_w, .. } = shape;
    let plane = 4 * (out_h + 1) * (out_w + 1);
    let mut out = unwritten(batch * c * plane + LONGEST);
    let (planes, slack) = out.split_at_mut(batch * c * plane);
    slack.fill(0.0);
    for_chunks(planes, plane, |i, out| split_plane(&x[i * h * w..(i + 1) * h * w], shape, out));
    out
}

kernel! {
    /// Splits one plane.
    pub(super) fn split_plane(x: &[f32], shape: Shape, out: &mut [f32]) {
        let Shape { h, w, out_h, out_w, stride, padding, .. } = shape;
        let (rows, pitch) = (out_h + 1, out_w + 1);
        out.fill(0.0);
        for (phase, out) in out.chunks_exact_mut(rows * pitch).enumerate() {
            let (y, column) = (Every::new(h, phase / 2, stride, padding), Every::new(w, phase % 2, stride, padding));
            for row in 0..y.count.min(rows - y.before) {
                let from = &x[(y.first + row * stride) * w..][..w];
                let to = &mut out[(y.before + row) * pitch..][column.before..pitch];
                let (pairs, last) = from[column.first.min(w)..].as_chunks::<2>();
                for (to, pair) in to.iter_mut().zip(pairs) {
                    *to = pair[0];
                }
                to.iter_mut().skip(pairs.len()).zip(last).for_each(|(to, from)| *to = *from);
            }
        }
    }
}

/// Orders weights as tiles read them: per tile of outputs [inputs * taps, outputs of a tile]. `place` gives where the taps of an
/// output and an input lie.
fn pack(
    weight: &[f32],
    [outputs, inputs]: [usize; 2],
    taps: &[usize],
    place: impl Fn(usize, usize) -> usize,
) -> Vec<f32> {
    let mut packed = vec![0.0; outputs.div_ceil(CHANNELS) * inputs * taps.len() * CHANNELS];
    for (tile, packed) in packed.chunks_exact_mut(inputs * taps.len() * CHANNELS).enumerate() {
        for output in tile * CHANNELS..outputs.min((tile + 1) * CHANNELS) {
            for (input, packed) in packed.chunks_exact_mut(taps.len() * CHANNELS).enumerate() {
                let weight = &weight[place(output, input)..][..TAPS];
                for (packed, &tap) in packed.as_chunks_mut::<CHANNELS>().0.iter_mut().zip(taps) {
                    packed[output % CHANNELS] = weight[tap];
                }
            }
        }
    }
    packed
}

/// How the planes that are read lie in memory.
#[derive(Clone, Copy)]
struct Source {
    /// Elements of a channel.
    plane: usize,
    /// Elements of a row.
    pitch: usize,
    /// Where the first output pixel's offsets count from.
    origin: usize,
}

/// Weights as [`pack`] orders them, for `c` input channels, and as many biases as there are outputs.
#[derive(Clone, Copy)]
struct Layer<'a> {
    c: usize,
    weight: &'a [f32],
    bias: &'a [f32],
}

/// A run of pixels of one vector: first lane, place in the output plane, length.
#[derive(Clone, Copy)]
struct Run {
    lane: usize,
    to: usize,
    len: usize,
}

impl Run {
    /// Copies the run from its vector to the output plane.
    fn copy(&self, sums: &[f32], out: &mut [f32]) {
        let (sums, out) = (&sums[self.lane..][..self.len], &mut out[self.to..][..self.len]);
        // Whole vectors by length: a call of the library's copy costs more than what it does.
        if let (Ok(sums), Ok(out)) = (<&[f32; 8]>::try_from(sums), <&mut [f32; 8]>::try_from(&mut *out)) {
            *out = *sums;
        } else if let (Ok(sums), Ok(out)) = (<&[f32; 16]>::try_from(sums), <&mut [f32; 16]>::try_from(&mut *out)) {
            *out = *sums;
        } else {
            out.copy_from_slice(sums);
        }
    }
}

/// Where vectors of pixels and their taps lie in a plane, and where the pixels go.
///
/// Rows of whole vectors are cut row by row; others are taken as one long row, whose padding is computed and dropped.
struct Plan {
    arch: Arch,
    /// Elements of a vector.
    len: usize,
    vectors_per_tile: usize,
    /// Elements of a channel that is read.
    plane: usize,
    /// Elements of a channel that is written.
    pixels: usize,
    /// Where each tap lies, counted from a pixel's own place.
    offsets: Vec<usize>,
    /// First element of each vector in the plane, with its runs.
    vectors: Vec<(usize, Vec<Run>)>,
}

impl Plan {
    fn new([h, w]: [usize; 2], source: Source, offsets: Vec<usize>) -> Self {
        let Source { plane, pitch, origin } = source;
        let kind = Vectors::detect();
        let len = kind.len;
        let vectors = if h == 0 || w == 0 {
            Vec::new()
        } else if w.is_multiple_of(len) {
            let starts = (0..h).flat_map(|row| (0..w).step_by(len).map(move |column| (row, column)));
            starts
                .map(|(row, column)| (origin + row * pitch + column, vec![Run { lane: 0, to: row * w + column, len }]))
                .collect()
        } else {
            let count = ((h - 1) * pitch + w).div_ceil(len);
            let runs = |start: usize| {
                let rows = (start / pitch..h).take_while(|row| row * pitch < start + len);
                let run = |row: usize| {
                    let (first, last) = ((row * pitch).max(start), (row * pitch + w).min(start + len));
                    let (lane, column) = (first - start, first - row * pitch);
                    (first < last).then(|| Run { lane, to: row * w + column, len: last - first })
                };
                rows.filter_map(run).collect()
            };
            (0..count).map(|i| (origin + i * len, runs(i * len))).collect()
        };
        Self { arch: Arch::new(), len, vectors_per_tile: kind.per_tile(), plane, pixels: h * w, offsets, vectors }
    }

    /// Convolves planes [batch, c, plane] to [batch, o, pixels].
    fn convolve(&self, planes: &[f32], batch: usize, layer: Layer) -> Vec<f32> {
        let (c, o) = (layer.c, layer.bias.len());
        let mut out = unwritten(batch * o * self.pixels);
        if out.is_empty() {
            return out;
        }
        let tiles = o.div_ceil(CHANNELS).div_ceil(MIN_PIECES.div_ceil(batch));
        let pieces: Vec<_> = out
            .chunks_mut(o * self.pixels)
            .enumerate()
            .flat_map(|(b, out)| {
                let pieces = out.chunks_mut(tiles * CHANNELS * self.pixels).enumerate();
                pieces.map(move |(i, out)| (b, i * tiles * CHANNELS, out))
            })
            .collect();
        pieces.into_par_iter().for_each_init(Vec::new, |sums, (b, first, out)| {
            let channels = first..first + out.len() / self.pixels;
            let x = &planes[b * c * self.plane..(b + 1) * c * self.plane + LONGEST];
            for vectors in self.vectors.chunks(self.vectors_per_tile) {
                self.sum(x, layer, channels.clone(), vectors, sums);
                let per_channel = vectors.len() * self.len;
                for (sums, out) in sums.chunks_exact(per_channel).zip(out.chunks_exact_mut(self.pixels)) {
                    for (sums, (_, runs)) in sums.chunks_exact(self.len).zip(vectors) {
                        runs.iter().for_each(|run| run.copy(sums, out));
                    }
                }
            }
        });
        out
    }

    /// Computes `sums` [outputs, vectors, elements of a vector] for some outputs of a layer, beginning with a tile's first.
    fn sum(
        &self,
        x: &[f32],
        Layer { c, weight, bias }: Layer,
        outputs: Range<usize>,
        vectors: &[(usize, Vec<Run>)],
        sums: &mut Vec<f32>,
    ) {
        let furthest_tap = self.offsets.iter().max().map_or(0, |offset| offset + LONGEST);
        let last = self.plane * (c - 1) + furthest_tap;
        assert!(vectors.iter().all(|(start, _)| start + last <= x.len()), "a tap outside of the input");
        let per_channel = vectors.len() * self.len;
        sums.clear();
        bias[outputs.clone()].iter().for_each(|&bias| sums.extend(std::iter::repeat_n(bias, per_channel)));
        let weights = self.offsets.len() * CHANNELS;
        let block = BLOCK_VECTORS / self.vectors_per_tile;
        for channel in (0..c).step_by(block) {
            let num = block.min(c - channel);
            for (i, sums) in sums.chunks_mut(CHANNELS * per_channel).enumerate() {
                let weight = &weight[((outputs.start / CHANNELS + i) * c + channel) * weights..][..num * weights];
                let call = Call { plan: self, x: &x[channel * self.plane..], weight, vectors };
                match sums.len() / per_channel {
                    1 => call.with_channels::<1>(sums),
                    2 => call.with_channels::<2>(sums),
                    3 => call.with_channels::<3>(sums),
                    4 => call.with_channels::<4>(sums),
                    5 => call.with_channels::<5>(sums),
                    _ => call.with_channels::<6>(sums),
                }
            }
        }
    }
}

/// One tile and some input channels, those of `weight`: adds to some vectors of some output channels.
///
/// `x` begins with the first of the input channels; all taps lie inside.
#[derive(Clone, Copy)]
struct Call<'a> {
    plan: &'a Plan,
    x: &'a [f32],
    weight: &'a [f32],
    vectors: &'a [(usize, Vec<Run>)],
}

impl Call<'_> {
    fn with_channels<const R: usize>(self, sums: &mut [f32]) {
        let arch = self.plan.arch;
        match self.vectors.len() {
            1 => arch.dispatch(Tile::<R, 1> { call: self, sums }),
            2 => arch.dispatch(Tile::<R, 2> { call: self, sums }),
            3 => arch.dispatch(Tile::<R, 3> { call: self, sums }),
            _ => arch.dispatch(Tile::<R, MOST_VECTORS> { call: self, sums }),
        }
    }
}

/// The sums of one tile, [R outputs, V vectors].
struct Tile<'a, const R: usize, const V: usize> {
    call: Call<'a>,
    sums: &'a mut [f32],
}

impl<const R: usize, const V: usize> WithSimd for Tile<'_, R, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { call, sums: out } = self;
        assert_eq!([out.len(), call.vectors.len()], [R * V * S::F32_LANES, V]);
        let out = out.as_mut_ptr().cast::<S::f32s>();
        let mut starts = [0; V];
        for (to, (start, _)) in starts.iter_mut().zip(call.vectors) {
            *to = *start;
        }
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        for r in 0..R {
            for v in 0..V {
                // SAFETY: the length was just checked.
                sums[r][v] = unsafe { out.add(r * V + v).read_unaligned() };
            }
        }
        let weights = call.weight.chunks_exact(call.plan.offsets.len() * CHANNELS);
        for (channel, weights) in weights.enumerate() {
            let x = call.x[channel * call.plan.plane..].as_ptr();
            for (&offset, weights) in call.plan.offsets.iter().zip(weights.as_chunks::<CHANNELS>().0) {
                let mut pixels = [simd.splat_f32s(0.0); V];
                for v in 0..V {
                    // SAFETY: `Plan::sum` checked the furthest tap of the furthest channel.
                    pixels[v] = unsafe { x.add(offset + starts[v]).cast::<S::f32s>().read_unaligned() };
                }
                for r in 0..R {
                    let factor = simd.splat_f32s(weights[r]);
                    for v in 0..V {
                        sums[r][v] = simd.mul_add_f32s(factor, pixels[v], sums[r][v]);
                    }
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                // SAFETY: the length was checked at the beginning.
                unsafe { out.add(r * V + v).write_unaligned(sums[r][v]) };
            }
        }
    }
}
