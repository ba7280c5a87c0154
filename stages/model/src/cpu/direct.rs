//! 3x3 convolution without unfolding: the input, surrounded with zeros, is read at nine offsets. A stride of 2 reads it from planes of
//! every second pixel.
//!
//! The zeros are put around a band of output rows at a time, which stays in the second-level cache while `tiles` computes it.
//!
//! Knows no tensor; `conv` decides when it runs. Each output is summed in one order, whatever the number of threads and the
//! length of a vector.

use std::array;

use rayon::prelude::*;

use super::planes::{Every, LONGEST, pad_rows, split_rows, spread};
use super::simd::prefetch_all;
use super::tiles::{Band, CHANNELS, Layer, Run, Taps, Vector, Vectors, pack};
use super::{Shared, for_chunks, unwritten, with_scratch};

pub(super) const TAPS: usize = 9;
/// Elements of a band: 256 KiB.
const BAND_ELEMENTS: usize = 1 << 16;
/// Pieces of work that a convolution is cut into at least, by output channels if there are too few bands.
const MIN_PIECES: usize = 4;

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
    let weight = pack(weight, [o, c], [c * TAPS, TAPS], &array::from_fn::<_, TAPS, _>(|tap| tap));
    let place = |tap: usize| {
        let [row, column] = [tap / 3, tap % 3];
        Place { part: row % stride * stride + column % stride, row: row / stride, column: column / stride }
    };
    let places = (0..TAPS).map(place).collect();
    let plane = |sample: usize, channel: usize| &x[(sample * c + channel) * h * w..][..h * w];
    if stride == 1 {
        let plan = Plan::new([out_h, out_w], Source { parts: 1, pitch: w + 2 * padding, column: 0 }, c, places);
        let layer = Layer { c, weight: &weight, bias, is_bias_last: false };
        return plan.convolve(batch, layer, |[sample, channel], row, out| {
            pad_rows(plane(sample, channel), w, padding, row, out);
        });
    }
    let pitch = out_w + shape.reach();
    let plan = Plan::new([out_h, out_w], Source { parts: 4, pitch, column: 0 }, c, places);
    // The bias comes last, as it does where the input is unfolded.
    let layer = Layer { c, weight: &weight, bias, is_bias_last: true };
    plan.convolve(batch, layer, |[sample, channel], row, out| {
        if channel + 1 < c {
            // The next plane's rows lie too far behind these for the processor to read them ahead by itself.
            let next = plane(sample, channel + 1);
            let start = next.len().min((stride * row).saturating_sub(padding) * w);
            prefetch_all(&next[start..next.len().min(start + out.len())]);
        }
        split_rows(plane(sample, channel), w, padding, row, pitch, out);
    })
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
    let around = reach - skipped;
    let bias = vec![0.0; c];
    let plane = |sample: usize, channel: usize| &grad[(sample * o + channel) * out_h * out_w..][..out_h * out_w];
    let mut d_x = Vec::new();
    for row in 0..stride {
        for column in 0..stride {
            let taps: Vec<usize> =
                (0..TAPS).rev().filter(|tap| tap / 3 % stride == row && tap % 3 % stride == column).collect();
            let weight = pack(weight, [c, o], [TAPS, c * TAPS], &taps);
            let place =
                |tap: &usize| Place { part: 0, row: reach - tap / 3 / stride, column: reach - tap % 3 / stride };
            let (y, x) = (Every::new(h, row, stride, padding), Every::new(w, column, stride, padding));
            let source = Source { parts: 1, pitch: out_w + 2 * around, column: x.before - skipped };
            let plan = Plan::new([y.count, x.count], source, o, taps.iter().map(place).collect());
            let layer = Layer { c: o, weight: &weight, bias: &bias, is_bias_last: false };
            let part = plan.convolve(batch, layer, |[sample, channel], row, out| {
                pad_rows(plane(sample, channel), out_w, around, row + y.before - skipped, out);
            });
            if stride == 1 {
                return part;
            }
            if d_x.is_empty() {
                d_x = unwritten(batch * c * h * w);
            }
            for_chunks(&mut d_x, h * w, |i, d_x| spread(&part[i * plan.pixels()..][..plan.pixels()], y, x, w, d_x));
        }
    }
    d_x
}

/// How the rows that are read lie in memory.
#[derive(Clone, Copy)]
struct Source {
    /// Planes of a channel.
    parts: usize,
    /// Elements of a row.
    pitch: usize,
    /// Column that the first output pixel's taps count from.
    column: usize,
}

/// Where a tap of an output pixel lies: the plane, and how far down and to the right.
struct Place {
    part: usize,
    row: usize,
    column: usize,
}

/// How a convolution is cut into bands of output rows, bands into vectors of pixels, and where their taps lie in the planes that are
/// made for a band.
///
/// Rows of whole vectors are cut row by row; others are taken as one long row, whose padding is computed and dropped.
struct Plan {
    kind: Vectors,
    /// Output rows and columns.
    sides: [usize; 2],
    source: Source,
    /// Output rows of a band; the last one may have fewer.
    rows: usize,
    /// Elements of a channel of a band.
    filled: usize,
    taps: Taps,
}

impl Plan {
    fn new(sides: [usize; 2], source: Source, c: usize, places: Vec<Place>) -> Self {
        let [h, w] = sides;
        let kind = Vectors::detect();
        let reach = places.iter().map(|place| place.row).max().unwrap_or(0);
        let most = (BAND_ELEMENTS / (c * source.parts * source.pitch)).saturating_sub(reach).clamp(1, h.max(1));
        let rows = h.div_ceil(h.div_ceil(most).max(1));
        // Whole tiles, where rows are whole vectors.
        let per_row = w / kind.len;
        let step = if w.is_multiple_of(kind.len) { kind.per_tile() >> per_row.trailing_zeros().min(2) } else { 1 };
        let rows = rows.next_multiple_of(step.max(1)).min(h);
        let part = (rows + reach) * source.pitch;
        let offset = |place: &Place| place.part * part + place.row * source.pitch + place.column;
        let filled = source.parts * part;
        // An odd multiple of two cache lines: the channels of a block then lie in different sets of the first-level cache, where
        // planes of about a power of two would push each other out.
        let taps = Taps { plane: filled.next_multiple_of(32) | 32, offsets: places.iter().map(offset).collect() };
        Self { kind, sides, source, rows, filled, taps }
    }

    /// Elements of a channel of the output.
    fn pixels(&self) -> usize {
        self.sides[0] * self.sides[1]
    }

    fn has_whole_vectors(&self) -> bool {
        self.sides[1].is_multiple_of(self.kind.len)
    }

    /// Returns the vectors of a band of so many rows.
    fn vectors(&self, rows: usize) -> Vec<Vector> {
        let (w, len, Source { pitch, column, .. }) = (self.sides[1], self.kind.len, self.source);
        if self.has_whole_vectors() {
            let places = (0..rows).flat_map(|row| (0..w).step_by(len).map(move |column| (row, column)));
            return places
                .map(|(row, x)| Vector {
                    start: row * pitch + column + x,
                    runs: vec![Run { lane: 0, to: row * w + x, len }],
                })
                .collect();
        }
        let count = ((rows - 1) * pitch + w).div_ceil(len);
        let runs = |start: usize| {
            let rows = (start / pitch..rows).take_while(|row| row * pitch < start + len);
            let run = |row: usize| {
                let (first, last) = ((row * pitch).max(start), (row * pitch + w).min(start + len));
                let (lane, column) = (first - start, first - row * pitch);
                (first < last).then(|| Run { lane, to: row * w + column, len: last - first })
            };
            rows.filter_map(run).collect()
        };
        (0..count).map(|i| Vector { start: column + i * len, runs: runs(i * len) }).collect()
    }

    /// Convolves to [batch, o, pixels]. `fill` writes the planes of a sample's channel, from the padded row that an output row
    /// begins to read at.
    fn convolve(&self, batch: usize, layer: Layer, fill: impl Fn([usize; 2], usize, &mut [f32]) + Sync) -> Vec<f32> {
        let ([h, w], Layer { c, bias, .. }) = (self.sides, layer);
        let (o, tiles) = (bias.len(), bias.len().div_ceil(CHANNELS));
        let mut out = unwritten(batch * o * h * w);
        if out.is_empty() {
            return out;
        }
        let bands = h.div_ceil(self.rows);
        let per_piece = tiles.div_ceil(MIN_PIECES.div_ceil(batch * bands).min(tiles)) * CHANNELS;
        let pieces = o.div_ceil(per_piece);
        let (full, last) = (self.vectors(self.rows), self.vectors(h - (bands - 1) * self.rows));
        let shared = Shared::new(&mut out);
        let planes_len = c * self.taps.plane + LONGEST;
        (0..batch * bands * pieces).into_par_iter().for_each(|i| {
            let (sample, band, piece) = (i / pieces / bands, i / pieces % bands, i % pieces);
            let outputs = piece * per_piece..o.min((piece + 1) * per_piece);
            let row = band * self.rows;
            let sums_len = outputs.len() * self.kind.per_group() * self.kind.len;
            with_scratch(planes_len + sums_len, |scratch| {
                let (planes, sums) = scratch.split_at_mut(planes_len);
                for (channel, planes) in planes.chunks_exact_mut(self.taps.plane).take(c).enumerate() {
                    fill([sample, channel], row, &mut planes[..self.filled]);
                }
                let band = Band {
                    kind: self.kind,
                    taps: &self.taps,
                    layer,
                    planes,
                    // SAFETY: the sample's channels, of which this piece writes `outputs`, and of these the band's rows.
                    out: unsafe { shared.from(sample * o * h * w + row * w) },
                    pixels: h * w,
                    outputs,
                    has_whole_vectors: self.has_whole_vectors(),
                };
                let vectors = if row + self.rows <= h { &full } else { &last };
                vectors.chunks(self.kind.per_group()).for_each(|vectors| band.sum(vectors, sums));
            });
        });
        out
    }
}
