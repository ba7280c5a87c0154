//! The part of a 3x3 convolution that computes: a tile, vectors of pixels of several output channels, stays in registers over the
//! taps of a block of input channels.
//!
//! The tiles of a group are taken through all output channels, a block of input channels at a time: its pixels and the weights of
//! one tile stay in the first-level cache meanwhile, and weights that the second level does not hold are read once a group. Knows
//! neither rows nor padding: `direct` says where vectors and taps lie.

// Sums in registers are written as index loops over small constant ranges, which unroll completely.
#![allow(clippy::needless_range_loop)]

use std::array;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::direct::TAPS;
use super::planes::LONGEST;
use super::{Begin, for_chunks, unwritten};

/// Output channels of a tile.
pub(super) const CHANNELS: usize = 6;
/// Vectors of pixels of a tile at most.
const MOST_VECTORS: usize = 4;
/// Input channels of a block: with [`GROUP_PIXELS`], about 13 KiB of input and 3.5 KiB of a tile's weights.
const BLOCK_CHANNELS: usize = 16;
/// Pixels of a group of tiles: one tile of the longest vectors, several of others.
const GROUP_PIXELS: usize = MOST_VECTORS * LONGEST;

/// What this processor's vectors are like.
#[derive(Clone, Copy)]
pub(super) struct Vectors {
    arch: Arch,
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
                Vectors { arch: Arch::new(), len: S::F32_LANES.min(LONGEST), registers: S::REGISTER_COUNT }
            }
        }
        Arch::new().dispatch(Ask)
    }

    /// Vectors of pixels of a tile: with [`CHANNELS`], 24 sums in 32 registers or 12 in 16.
    pub(super) fn per_tile(self) -> usize {
        if self.registers >= 32 { MOST_VECTORS } else { MOST_VECTORS / 2 }
    }

    /// Vectors of pixels of a group of tiles.
    pub(super) fn per_group(self) -> usize {
        self.per_tile() * (GROUP_PIXELS / (self.per_tile() * self.len)).max(1)
    }
}

/// Orders weights as tiles read them: per tile of outputs [inputs, taps, outputs of a tile]. `strides` are those of an output and
/// of an input; the taps lie one after the other.
pub(super) fn pack(weight: &[f32], [outputs, inputs]: [usize; 2], strides: [usize; 2], taps: &[usize]) -> Vec<f32> {
    let per_tile = inputs * taps.len() * CHANNELS;
    let mut packed = unwritten(outputs.div_ceil(CHANNELS) * per_tile);
    for_chunks(&mut packed, per_tile, |tile, packed| {
        let first = tile * CHANNELS;
        for (input, packed) in packed.chunks_exact_mut(taps.len() * CHANNELS).enumerate() {
            // Outputs that a last tile lacks are not computed: any weight will do.
            let of_output = |r: usize| (first + r).min(outputs - 1) * strides[0] + input * strides[1];
            let weights: [&[f32]; CHANNELS] = array::from_fn(|r| &weight[of_output(r)..][..TAPS]);
            for (packed, &tap) in packed.as_chunks_mut::<CHANNELS>().0.iter_mut().zip(taps) {
                *packed = weights.map(|weights| weights[tap]);
            }
        }
    });
    packed
}

/// Where the taps of a pixel lie in the planes of a band.
pub(super) struct Taps {
    /// Elements from a channel to the next.
    pub(super) plane: usize,
    /// Where each tap lies, counted from the pixel's own place.
    pub(super) offsets: Vec<usize>,
}

/// Weights as [`pack`] orders them, for `c` input channels, and as many biases as there are outputs.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a> {
    pub(super) c: usize,
    pub(super) weight: &'a [f32],
    pub(super) bias: &'a [f32],
    /// Whether a sum ends with the bias instead of beginning with it.
    pub(super) is_bias_last: bool,
}

/// A run of pixels of one vector: first lane, place behind the band's first output pixel, length.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) lane: usize,
    pub(super) to: usize,
    pub(super) len: usize,
}

impl Run {
    /// Copies the run from its vector.
    fn copy(&self, sums: &[f32], out: &mut [f32]) {
        let sums = &sums[self.lane..][..self.len];
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

/// A vector of pixels: where its first lane lies in a plane, and which of its lanes go where.
pub(super) struct Vector {
    pub(super) start: usize,
    pub(super) runs: Vec<Run>,
}

/// A band of output rows of some output channels, beginning with a tile's first.
pub(super) struct Band<'a> {
    pub(super) kind: Vectors,
    pub(super) taps: &'a Taps,
    pub(super) layer: Layer<'a>,
    /// The planes [c, plane] that the band reads, and a vector behind them.
    pub(super) planes: &'a [f32],
    /// The band's first pixel in the first of all output channels. Behind it lie its pixels, those of a channel `pixels` behind
    /// those of the channel before; nobody else writes those of `outputs`.
    pub(super) out: *mut f32,
    pub(super) pixels: usize,
    pub(super) outputs: Range<usize>,
    /// Whether a row is cut into whole vectors, each of one run.
    pub(super) has_whole_vectors: bool,
}

impl Band<'_> {
    /// Computes a group's vectors of all output channels; `sums` has room for [tiles, outputs, vectors of a tile, elements of a
    /// vector].
    pub(super) fn sum(&self, vectors: &[Vector], sums: &mut [f32]) {
        let &Self { kind, taps, layer: Layer { c, weight, bias, is_bias_last }, planes, out, pixels, .. } = self;
        let furthest_tap = taps.offsets.iter().max().map_or(0, |offset| offset + LONGEST);
        let furthest = taps.plane * (c - 1) + furthest_tap;
        assert!(vectors.iter().all(|vector| vector.start + furthest <= planes.len()), "a tap outside of the input");
        let is_whole = self.has_whole_vectors;
        let weights = taps.offsets.len() * CHANNELS;
        let per_tile = self.outputs.len() * kind.per_tile() * kind.len;
        for channel in (0..c).step_by(BLOCK_CHANNELS) {
            let num = BLOCK_CHANNELS.min(c - channel);
            let (is_first, is_last) = (channel == 0, channel + num == c);
            for first in self.outputs.clone().step_by(CHANNELS) {
                let num_outputs = CHANNELS.min(self.outputs.end - first);
                let bias = &bias[first..first + num_outputs];
                for (vectors, sums) in vectors.chunks(kind.per_tile()).zip(sums.chunks_exact_mut(per_tile)) {
                    let per_channel = vectors.len() * kind.len;
                    let call = Call {
                        kind,
                        taps,
                        pixels,
                        x: &planes[channel * taps.plane..],
                        weight: &weight[(first / CHANNELS * c + channel) * weights..][..num * weights],
                        vectors,
                        begin: match is_first {
                            true if is_bias_last => Begin::Zero,
                            true => Begin::With(bias),
                            false => Begin::GoOn,
                        },
                        end: if is_last && is_bias_last { bias } else { &[] },
                        // SAFETY: these are pixels of the band.
                        out: (is_last && is_whole).then(|| unsafe { out.add(first * pixels) }),
                    };
                    let sums = &mut sums[(first - self.outputs.start) * per_channel..][..num_outputs * per_channel];
                    match num_outputs {
                        1 => call.with_channels::<1>(sums),
                        2 => call.with_channels::<2>(sums),
                        3 => call.with_channels::<3>(sums),
                        4 => call.with_channels::<4>(sums),
                        5 => call.with_channels::<5>(sums),
                        _ => call.with_channels::<CHANNELS>(sums),
                    }
                }
            }
        }
        if is_whole {
            return;
        }
        for (vectors, sums) in vectors.chunks(kind.per_tile()).zip(sums.chunks_exact(per_tile)) {
            for (output, sums) in self.outputs.clone().zip(sums.chunks_exact(vectors.len() * kind.len)) {
                for (sums, vector) in sums.chunks_exact(kind.len).zip(vectors) {
                    for run in &vector.runs {
                        // SAFETY: these are pixels of the band.
                        let out = unsafe { std::slice::from_raw_parts_mut(out.add(output * pixels + run.to), run.len) };
                        run.copy(sums, out);
                    }
                }
            }
        }
    }
}

/// One tile and some input channels, those of `weight`: adds to some vectors of some output channels.
///
/// `x` begins with the first of the input channels; all taps lie inside.
struct Call<'a> {
    kind: Vectors,
    taps: &'a Taps,
    /// Elements of a channel of the output.
    pixels: usize,
    x: &'a [f32],
    weight: &'a [f32],
    vectors: &'a [Vector],
    begin: Begin<'a>,
    /// What is added in the end: nothing, or a number for each output channel.
    end: &'a [f32],
    /// Where the sums are written instead of back, in vectors: the band's first pixel of the tile's first channel.
    out: Option<*mut f32>,
}

impl Call<'_> {
    fn with_channels<const R: usize>(&self, sums: &mut [f32]) {
        let arch = self.kind.arch;
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
    call: &'a Call<'a>,
    sums: &'a mut [f32],
}

impl<const R: usize, const V: usize> WithSimd for Tile<'_, R, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { call, sums: kept } = self;
        assert_eq!([kept.len(), call.vectors.len()], [R * V * S::F32_LANES, V]);
        let kept = kept.as_mut_ptr().cast::<S::f32s>();
        let starts: [usize; V] = array::from_fn(|v| call.vectors[v].start);
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        match call.begin {
            Begin::Zero => {}
            Begin::With(begin) => {
                for r in 0..R {
                    sums[r] = [simd.splat_f32s(begin[r]); V];
                }
            }
            Begin::GoOn => {
                for r in 0..R {
                    for v in 0..V {
                        // SAFETY: the length was just checked.
                        sums[r][v] = unsafe { kept.add(r * V + v).read_unaligned() };
                    }
                }
            }
        }
        let offsets = call.taps.offsets.as_slice();
        let weights = call.weight.chunks_exact(offsets.len() * CHANNELS);
        for (channel, weights) in weights.enumerate() {
            let x = call.x[channel * call.taps.plane..].as_ptr();
            let weights = weights.as_chunks::<CHANNELS>().0;
            // All taps of a window without a loop: its few instructions would cost a tenth of the time.
            if let (Ok(offsets), Ok(weights)) = (<&[usize; TAPS]>::try_from(offsets), <&[_; TAPS]>::try_from(weights)) {
                for tap in 0..TAPS {
                    // SAFETY: `Band::sum` checked the furthest tap of the furthest channel.
                    unsafe { add_tap(simd, x.add(offsets[tap]), &starts, &weights[tap], &mut sums) };
                }
            } else {
                for (&offset, weights) in offsets.iter().zip(weights) {
                    // SAFETY: as above.
                    unsafe { add_tap(simd, x.add(offset), &starts, weights, &mut sums) };
                }
            }
        }
        if !call.end.is_empty() {
            for r in 0..R {
                for v in 0..V {
                    sums[r][v] = simd.add_f32s(sums[r][v], simd.splat_f32s(call.end[r]));
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                let to = match call.out {
                    // SAFETY: the whole vector is one run, of pixels of the band.
                    Some(out) => unsafe { out.add(r * call.pixels + call.vectors[v].runs[0].to).cast() },
                    // SAFETY: the length was checked at the beginning.
                    None => unsafe { kept.add(r * V + v) },
                };
                // SAFETY: as above.
                unsafe { to.write_unaligned(sums[r][v]) };
            }
        }
    }
}

/// Adds one tap of one input channel.
///
/// # Safety
/// A vector lies behind `x` at each of `starts`.
#[inline(always)]
unsafe fn add_tap<S: Simd, const R: usize, const V: usize>(
    simd: S,
    x: *const f32,
    starts: &[usize; V],
    weights: &[f32; CHANNELS],
    sums: &mut [[S::f32s; V]; R],
) {
    let mut pixels = [simd.splat_f32s(0.0); V];
    for v in 0..V {
        // SAFETY: the caller's promise.
        pixels[v] = unsafe { x.add(starts[v]).cast::<S::f32s>().read_unaligned() };
    }
    for r in 0..R {
        let factor = simd.splat_f32s(weights[r]);
        for v in 0..V {
            sums[r][v] = simd.mul_add_f32s(factor, pixels[v], sums[r][v]);
        }
    }
}
