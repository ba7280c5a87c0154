//! The gradient of a 3x3 convolution's weight, in vector registers and without unfolding.
//!
//! It is a product of two sides over all pixels, once for each of nine taps. One side is packed, so that the channels of a
//! pixel lie beside each other; of the other, which is padded, one pixel at a time is spread over a vector. A tile, all taps of
//! one channel times some vectors of the packed side, stays in registers over a block of pixels.
//!
//! Knows no tensor; `conv` decides when it runs. Each element is summed over the pixels in one order, whatever the number of
//! threads.

// Sums in registers are written as index loops over small constant ranges, which unroll completely.
#![allow(clippy::needless_range_loop)]

use std::borrow::Cow;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::direct::{Shape, TAPS};
use super::planes::pad;
use super::tiles::Vectors;
use super::transpose::{SQUARE, interleave};
use super::unwritten;

/// Vectors of a tile at most.
const MOST_VECTORS: usize = 3;
/// Pixels of a block, about: its packed side stays in the second-level cache while the channels of the other one pass.
const BLOCK_PIXELS: usize = 512;
/// Channels of the padded side that are one piece of work.
const PIECE_CHANNELS: usize = 8;

/// Returns the gradient [o, c, 3, 3] of the weight.
pub(super) fn weight_gradient(x: &[f32], grad: &[f32], shape: Shape) -> Vec<f32> {
    let Shape { batch, c, h, w, o, out_h, out_w, stride, padding } = shape;
    let vector = Vectors::detect().len;
    if x.is_empty() || grad.is_empty() {
        return vec![0.0; o * c * TAPS];
    }
    // A convolution that keeps the side can be read the other way round, with mirrored taps: if that leaves fewer lanes empty.
    let keeps_side = stride == 1 && padding == 1;
    if keeps_side && o * c.next_multiple_of(vector) < c * o.next_multiple_of(vector) {
        let product = Product::new([batch, o, c], [h, w], [h, w], (1, 1));
        let sums = product.sums(grad, x);
        return product.arrange(&sums, [o, c], true);
    }
    let product = Product::new([batch, c, o], [h, w], [out_h, out_w], (stride, padding));
    let sums = product.sums(x, grad);
    product.arrange(&sums, [o, c], false)
}

/// Vectors of the packed side that are read together.
#[derive(Clone, Copy)]
struct Column {
    first: usize,
    width: usize,
}

/// The product of padded planes [batch, channels, ..] and packed ones [batch, lanes, rows, columns].
struct Product {
    arch: Arch,
    /// Elements of a vector.
    vector: usize,
    batch: usize,
    channels: usize,
    lanes: usize,
    /// Sides of the planes before they are padded.
    sides: [usize; 2],
    rows: usize,
    columns: usize,
    stride: usize,
    padding: usize,
    /// Vectors of a tile; the last tile of a channel may have fewer.
    width: usize,
}

impl Product {
    fn new(
        [batch, channels, lanes]: [usize; 3],
        sides: [usize; 2],
        [rows, columns]: [usize; 2],
        (stride, padding): (usize, usize),
    ) -> Self {
        let Vectors { len: vector, registers, .. } = Vectors::detect();
        // 27 sums in 32 registers, 9 in 16.
        let most = if registers >= 32 { MOST_VECTORS } else { 1 };
        let num_vectors = lanes.div_ceil(vector);
        let width = num_vectors.div_ceil(num_vectors.div_ceil(most));
        let arch = Arch::new();
        Self { arch, vector, batch, channels, lanes, sides, rows, columns, stride, padding, width }
    }

    fn pitch(&self) -> usize {
        self.sides[1] + 2 * self.padding
    }

    /// Elements of a padded plane.
    fn plane(&self) -> usize {
        (self.sides[0] + 2 * self.padding) * self.pitch()
    }

    fn num_vectors(&self) -> usize {
        self.lanes.div_ceil(self.vector)
    }

    fn column(&self, vector: usize) -> Column {
        let first = vector / self.width * self.width;
        Column { first, width: self.width.min(self.num_vectors() - first) }
    }

    /// Returns the sums over all pixels: a column after the other, each [channels, taps, lanes of the column].
    fn sums(&self, spread: &[f32], packed: &[f32]) -> Vec<f32> {
        let padded = match self.padding {
            0 => Cow::Borrowed(spread),
            padding => Cow::Owned(pad(spread, self.sides, padding)),
        };
        let packed = self.pack(packed);
        let furthest = ((self.rows - 1) * self.pitch() + self.columns - 1) * self.stride + 2 * self.pitch() + 2;
        let pixels = self.batch * self.rows * self.columns;
        assert!(
            furthest < self.plane()
                && padded.len() >= self.batch * self.channels * self.plane()
                && packed.len() == pixels * self.num_vectors() * self.vector,
            "a tap outside of the padded input"
        );
        let mut sums = vec![0.0; self.channels * TAPS * self.num_vectors() * self.vector];
        let pieces: Vec<_> = sums
            .chunks_mut(self.channels * TAPS * self.width * self.vector)
            .enumerate()
            .flat_map(|(i, sums)| {
                let column = self.column(i * self.width);
                let pieces = sums.chunks_mut(PIECE_CHANNELS * TAPS * column.width * self.vector).enumerate();
                pieces.map(move |(i, sums)| (column, i * PIECE_CHANNELS, sums))
            })
            .collect();
        pieces.into_par_iter().for_each(|(column, channel, sums)| {
            let packed = &packed[pixels * column.first * self.vector..][..pixels * column.width * self.vector];
            let padded = &padded[channel * self.plane()..];
            match column.width {
                1 => self.piece::<1>(padded, packed, sums),
                2 => self.piece::<2>(padded, packed, sums),
                _ => self.piece::<MOST_VECTORS>(padded, packed, sums),
            }
        });
        sums
    }

    /// Some channels times one column. `padded` begins with the first of the channels.
    fn piece<const V: usize>(&self, padded: &[f32], packed: &[f32], sums: &mut [f32]) {
        let num_rows = self.batch * self.rows;
        let block = BLOCK_PIXELS.div_ceil(self.columns);
        for first in (0..num_rows).step_by(block) {
            let rows = first..num_rows.min(first + block);
            for (channel, sums) in sums.chunks_exact_mut(TAPS * V * self.vector).enumerate() {
                let padded = &padded[channel * self.plane()..];
                self.arch.dispatch(Tile::<V> { product: self, padded, packed, rows: rows.clone(), sums });
            }
        }
    }

    /// Packs planes [batch, lanes, rows * columns] to one column after the other, each [batch * pixels, lanes of the column].
    fn pack(&self, planes: &[f32]) -> Vec<f32> {
        let plane = self.rows * self.columns;
        assert_eq!(planes.len(), self.batch * self.lanes * plane);
        let mut out = unwritten(self.batch * plane * self.num_vectors() * self.vector);
        let pieces: Vec<_> = out
            .chunks_mut(self.batch * plane * self.width * self.vector)
            .enumerate()
            .flat_map(|(i, out)| {
                let column = self.column(i * self.width);
                let samples = out.chunks_exact_mut(plane * column.width * self.vector).enumerate();
                samples.map(move |(sample, out)| (column, sample, out))
            })
            .collect();
        pieces.into_par_iter().for_each(|(column, sample, out)| {
            let first = column.first * self.vector;
            let planes = &planes[(sample * self.lanes + first) * plane..(sample + 1) * self.lanes * plane];
            let side = SQUARE.min(self.vector);
            for lane in (0..column.width * self.vector).step_by(side) {
                let planes = planes.get(lane * plane..).unwrap_or_default();
                let used = side.min(planes.len() / plane);
                interleave(planes, [used, plane], plane, (&mut out[lane..], column.width * self.vector), side);
            }
        });
        out
    }

    /// Returns [o, c, taps] from sums whose channels are inputs and whose lanes are outputs, or, `turned`, the other way round with
    /// mirrored taps.
    fn arrange(&self, sums: &[f32], [o, c]: [usize; 2], turned: bool) -> Vec<f32> {
        let mut out = unwritten(o * c * TAPS);
        // As many output channels as a vector has lanes: they lie beside each other in the sums.
        out.par_chunks_mut(self.vector * c * TAPS).enumerate().for_each(|(i, out)| {
            for input in 0..c {
                for (output, out) in out.chunks_exact_mut(c * TAPS).enumerate() {
                    let output = i * self.vector + output;
                    let (channel, lane) = if turned { (output, input) } else { (input, output) };
                    let column = self.column(lane / self.vector);
                    let row = column.width * self.vector;
                    let first = column.first * self.vector;
                    let sums = &sums[first * self.channels * TAPS + channel * TAPS * row + lane - first..];
                    for (tap, out) in out[input * TAPS..][..TAPS].iter_mut().enumerate() {
                        *out = sums[row * if turned { TAPS - 1 - tap } else { tap }];
                    }
                }
            }
        });
        out
    }
}

/// Adds the products of some rows of pixels, counted over all samples, to a tile [taps, V vectors].
///
/// All pixels and taps of these rows lie inside `padded`, which begins with the tile's channel in the first sample, and inside `packed`.
struct Tile<'a, const V: usize> {
    product: &'a Product,
    padded: &'a [f32],
    packed: &'a [f32],
    rows: Range<usize>,
    sums: &'a mut [f32],
}

impl<const V: usize> WithSimd for Tile<'_, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { product, padded, packed, rows, sums: tile } = self;
        let (pitch, stride) = (product.pitch(), product.stride);
        assert_eq!([tile.len(), product.vector], [TAPS * V * S::F32_LANES, S::F32_LANES]);
        let mut sums = [[simd.splat_f32s(0.0); V]; TAPS];
        for tap in 0..TAPS {
            for v in 0..V {
                // SAFETY: the length was just checked.
                sums[tap][v] = unsafe { tile.as_ptr().cast::<S::f32s>().add(tap * V + v).read_unaligned() };
            }
        }
        let (mut sample, mut row) = (rows.start / product.rows, rows.start % product.rows);
        for line in rows {
            // SAFETY: `Product::sums` checked the furthest elements.
            unsafe {
                let start = sample * product.channels * product.plane() + row * stride * pitch;
                let mut x = padded.as_ptr().add(start);
                let mut y = packed.as_ptr().cast::<S::f32s>().add(line * product.columns * V);
                for _ in 0..product.columns {
                    let mut vectors = [simd.splat_f32s(0.0); V];
                    for v in 0..V {
                        vectors[v] = y.add(v).read_unaligned();
                    }
                    for tap in 0..TAPS {
                        let factor = simd.splat_f32s(*x.add(tap / 3 * pitch + tap % 3));
                        for v in 0..V {
                            sums[tap][v] = simd.mul_add_f32s(factor, vectors[v], sums[tap][v]);
                        }
                    }
                    (x, y) = (x.add(stride), y.add(V));
                }
            }
            row += 1;
            if row == product.rows {
                (sample, row) = (sample + 1, 0);
            }
        }
        for tap in 0..TAPS {
            for v in 0..V {
                // SAFETY: the length was checked at the beginning.
                unsafe { tile.as_mut_ptr().cast::<S::f32s>().add(tap * V + v).write_unaligned(sums[tap][v]) };
            }
        }
    }
}
