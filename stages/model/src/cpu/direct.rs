//! 3x3 convolution of stride 1 that keeps the side, on AVX-512 registers and without unfolding: a tile of pixels of several
//! output channels stays in registers while the input, padded once, is read at nine offsets.
//!
//! Knows no tensor; `conv` decides when it runs. Each output is summed in one order, whatever the number of threads.

// Sums in registers are written as index loops over small constant ranges, which unroll completely.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps};

use rayon::prelude::*;

use super::{for_chunks, unwritten};

/// Elements of a vector.
pub(super) const VECTOR: usize = 16;
/// Output channels of a tile.
const CHANNELS: usize = 6;
/// Vectors of pixels of a tile: with [`CHANNELS`], 24 sums in the 32 registers.
const VECTORS: usize = 4;
pub(super) const TAPS: usize = 9;
/// Pieces of work that a small batch is cut into.
const MIN_PIECES: usize = 4;

/// Returns whether this processor can run it.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
}

/// A run of pixels of one vector: first lane, place in the output plane, length.
#[derive(Clone, Copy)]
struct Run {
    lane: usize,
    to: usize,
    len: usize,
}

/// Where vectors of pixels lie in a padded plane, and where their pixels go.
///
/// Rows of whole vectors are cut row by row; others are taken as one long row, whose padding is computed and dropped.
struct Plan {
    h: usize,
    w: usize,
    /// First element of each vector in the padded plane, with its runs.
    vectors: Vec<(usize, Vec<Run>)>,
}

impl Plan {
    fn new(h: usize, w: usize) -> Self {
        let pitch = w + 2;
        let vectors = if w.is_multiple_of(VECTOR) {
            let starts = (0..h).flat_map(|row| (0..w).step_by(VECTOR).map(move |column| (row, column)));
            starts
                .map(|(row, column)| (row * pitch + column, vec![Run { lane: 0, to: row * w + column, len: VECTOR }]))
                .collect()
        } else {
            let count = ((h - 1) * pitch + w).div_ceil(VECTOR);
            let runs = |start: usize| {
                let rows = (start / pitch..h).take_while(|row| row * pitch < start + VECTOR);
                let run = |row: usize| {
                    let (first, last) = ((row * pitch).max(start), (row * pitch + w).min(start + VECTOR));
                    let (lane, column) = (first - start, first - row * pitch);
                    (first < last).then(|| Run { lane, to: row * w + column, len: last - first })
                };
                rows.filter_map(run).collect()
            };
            (0..count).map(|i| (i * VECTOR, runs(i * VECTOR))).collect()
        };
        Self { h, w, vectors }
    }

    fn pitch(&self) -> usize {
        self.w + 2
    }

    /// Elements of a padded plane.
    fn plane(&self) -> usize {
        (self.h + 2) * self.pitch()
    }
}

/// Surrounds planes of h x w by `padding` zeros; a vector behind the last plane may be read.
pub(super) fn pad(x: &[f32], [h, w]: [usize; 2], padding: usize) -> Vec<f32> {
    let pitch = w + 2 * padding;
    let plane = (h + 2 * padding) * pitch;
    let count = x.len() / (h * w);
    let mut out = unwritten(count * plane + VECTOR);
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

/// Weights in the order in which tiles read them: per tile of outputs [inputs * 9, outputs of a tile].
fn pack(outputs: usize, inputs: usize, weight: impl Fn(usize, usize, usize) -> f32) -> Vec<f32> {
    let mut packed = vec![0.0; outputs.div_ceil(CHANNELS) * inputs * TAPS * CHANNELS];
    for (tile, packed) in packed.chunks_exact_mut(inputs * TAPS * CHANNELS).enumerate() {
        for (i, packed) in packed.chunks_exact_mut(CHANNELS).enumerate() {
            for (r, packed) in packed.iter_mut().enumerate().take(outputs - tile * CHANNELS) {
                *packed = weight(tile * CHANNELS + r, i / TAPS, i % TAPS);
            }
        }
    }
    packed
}

/// Convolves x [b, c, h, w] with weight [o, c, 3, 3] to [b, o, h, w].
pub(super) fn forward(x: &[f32], [c, h, w, o]: [usize; 4], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let packed = pack(o, c, |o, i, tap| weight[(o * c + i) * TAPS + tap]);
    convolve(x, [c, h, w, o], &packed, bias)
}

/// Returns the gradient [b, c, h, w] of the input: the convolution of the output's with the mirrored weight.
pub(super) fn input_gradient(grad: &[f32], [c, h, w, o]: [usize; 4], weight: &[f32]) -> Vec<f32> {
    let packed = pack(c, o, |i, o, tap| weight[(o * c + i) * TAPS + (TAPS - 1 - tap)]);
    convolve(grad, [o, h, w, c], &packed, &vec![0.0; c])
}

fn convolve(x: &[f32], [c, h, w, o]: [usize; 4], packed: &[f32], bias: &[f32]) -> Vec<f32> {
    let plan = Plan::new(h, w);
    let padded = pad(x, [h, w], 1);
    let batch = x.len() / (c * h * w);
    let mut out = unwritten(batch * o * h * w);
    let tiles = o.div_ceil(CHANNELS).div_ceil(MIN_PIECES.div_ceil(batch.max(1)));
    let pieces: Vec<_> = out
        .chunks_mut(o * h * w)
        .enumerate()
        .flat_map(|(b, out)| {
            out.chunks_mut(tiles * CHANNELS * h * w).enumerate().map(move |(i, out)| (b, i * tiles, out))
        })
        .collect();
    pieces.into_par_iter().for_each(|(b, first_tile, out)| {
        let x = &padded[b * c * plan.plane()..(b + 1) * c * plan.plane() + VECTOR];
        let tiles = out.chunks_mut(CHANNELS * h * w).count();
        for vectors in plan.vectors.chunks(VECTORS) {
            for tile in 0..tiles {
                let start = (first_tile + tile) * CHANNELS;
                let bias = &bias[start..(start + CHANNELS).min(o)];
                let packed = &packed[start * c * TAPS..][..CHANNELS * c * TAPS];
                let out = &mut out[tile * CHANNELS * h * w..];
                let call = Call { plan: &plan, x, c, packed, bias, vectors };
                match bias.len() {
                    1 => call.with_channels::<1>(out),
                    2 => call.with_channels::<2>(out),
                    3 => call.with_channels::<3>(out),
                    4 => call.with_channels::<4>(out),
                    5 => call.with_channels::<5>(out),
                    _ => call.with_channels::<6>(out),
                }
            }
        }
    });
    out
}

/// One tile: some vectors of some output channels.
struct Call<'a> {
    plan: &'a Plan,
    x: &'a [f32],
    c: usize,
    packed: &'a [f32],
    bias: &'a [f32],
    vectors: &'a [(usize, Vec<Run>)],
}

impl Call<'_> {
    fn with_channels<const R: usize>(&self, out: &mut [f32]) {
        match self.vectors.len() {
            1 => self.run::<R, 1>(out),
            2 => self.run::<R, 2>(out),
            3 => self.run::<R, 3>(out),
            _ => self.run::<R, 4>(out),
        }
    }

    fn run<const R: usize, const V: usize>(&self, out: &mut [f32]) {
        let plane = self.plan.h * self.plan.w;
        let last = self.plan.plane() * (self.c - 1) + 2 * self.plan.pitch() + 2 + VECTOR;
        let in_bounds = self.vectors.iter().all(|(start, _)| start + last <= self.x.len());
        assert!(in_bounds && self.packed.len() >= self.c * TAPS * CHANNELS && self.bias.len() >= R, "tile outside");
        let mut sums = [[[0.0; VECTOR]; V]; R];
        // SAFETY: AVX-512 was detected before this module was entered; the furthest element that is read was just checked.
        unsafe { tile::<R, V>(self, &mut sums) };
        for (sums, out) in sums.iter().zip(out.chunks_mut(plane)) {
            for (sums, (_, runs)) in sums.iter().zip(self.vectors) {
                for run in runs {
                    out[run.to..run.to + run.len].copy_from_slice(&sums[run.lane..run.lane + run.len]);
                }
            }
        }
    }
}

/// # Safety
/// The processor has AVX-512, and all vectors of all channels and taps lie inside `call.x`.
#[target_feature(enable = "avx512f")]
unsafe fn tile<const R: usize, const V: usize>(call: &Call, out: &mut [[[f32; VECTOR]; V]; R]) {
    let (plane, pitch) = (call.plan.plane(), call.plan.pitch());
    let mut starts = [0; V];
    for (to, (start, _)) in starts.iter_mut().zip(call.vectors) {
        *to = *start;
    }
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    for r in 0..R {
        sums[r] = [_mm512_set1_ps(call.bias[r]); V];
    }
    let mut weight = call.packed.as_ptr();
    for channel in 0..call.c {
        // SAFETY: the caller's promise.
        unsafe {
            let x = call.x.as_ptr().add(channel * plane);
            for row in 0..3 {
                for column in 0..3 {
                    let x = x.add(row * pitch + column);
                    let mut pixels = [_mm512_setzero_ps(); V];
                    for v in 0..V {
                        pixels[v] = _mm512_loadu_ps(x.add(starts[v]));
                    }
                    for r in 0..R {
                        let factor = _mm512_set1_ps(*weight.add(r));
                        for v in 0..V {
                            sums[r][v] = _mm512_fmadd_ps(factor, pixels[v], sums[r][v]);
                        }
                    }
                    weight = weight.add(CHANNELS);
                }
            }
        }
    }
    for r in 0..R {
        for v in 0..V {
            // SAFETY: the array holds one vector.
            unsafe { _mm512_storeu_ps(out[r][v].as_mut_ptr(), sums[r][v]) };
        }
    }
}
