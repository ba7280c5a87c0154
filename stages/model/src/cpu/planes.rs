//! Planes of pixels as 3x3 convolutions read and write them: surrounded with zeros, split by a stride of 2, and put together again.
//!
//! Knows no weights and no threads but those of [`pad`].

use super::simd::kernel;
use super::{for_chunks, unwritten};

/// Elements of the longest vector.
pub(super) const LONGEST: usize = 16;

/// Every pixel of one axis that is `phase` behind a multiple of the stride, counted with the padding.
#[derive(Clone, Copy)]
pub(super) struct Every {
    /// Pixels of the kind that lie in the padding before the first.
    pub(super) before: usize,
    /// The first one, counted without the padding.
    pub(super) first: usize,
    pub(super) count: usize,
    stride: usize,
}

impl Every {
    pub(super) fn new(side: usize, phase: usize, stride: usize, padding: usize) -> Self {
        let before = padding.saturating_sub(phase).div_ceil(stride);
        let first = before * stride + phase - padding;
        Self { before, first, count: side.saturating_sub(first).div_ceil(stride), stride }
    }

    /// Clears what a row has around the pixels and returns their place.
    #[inline(always)]
    fn frame(self, row: &mut [f32]) -> &mut [f32] {
        let (before, behind) = (self.before, (self.before + self.count).min(row.len()));
        // One by one: a call that clears costs more than the one or two that there are.
        (0..before).chain(behind..row.len()).for_each(|i| row[i] = 0.0);
        &mut row[before..behind]
    }
}

/// Surrounds planes of h x w by `padding` zeros; a vector behind the last plane may be read.
pub(super) fn pad(x: &[f32], [h, w]: [usize; 2], padding: usize) -> Vec<f32> {
    let plane = (h + 2 * padding) * (w + 2 * padding);
    let count = x.len() / (h * w);
    let mut out = unwritten(count * plane + LONGEST);
    let (planes, slack) = out.split_at_mut(count * plane);
    slack.fill(0.0);
    for_chunks(planes, plane, |i, out| pad_rows(&x[i * h * w..][..h * w], w, padding, 0, out));
    out
}

/// Writes rows of one plane that is surrounded by `padding` zeros, from the padded row `first` on, until `out` is full.
pub(super) fn pad_rows(x: &[f32], w: usize, padding: usize, first: usize, out: &mut [f32]) {
    for (row, out) in (first..).zip(out.chunks_exact_mut(w + 2 * padding)) {
        let from = row.checked_sub(padding).and_then(|row| x.get(row * w..(row + 1) * w));
        let Some(from) = from else {
            out.fill(0.0);
            continue;
        };
        out[..padding].fill(0.0);
        out[padding..padding + w].copy_from_slice(from);
        out[padding + w..].fill(0.0);
    }
}

kernel! {
    /// Splits some rows of one padded plane whose rows have `w` pixels into four parts of pixels that are two apart: `out` is
    /// [4, rows, pitch], and holds every second padded row from 2 `first` and from 2 `first` + 1 on.
    pub(super) fn split_rows(x: &[f32], w: usize, padding: usize, first: usize, pitch: usize, out: &mut [f32]) {
        // The part that begins with the row's first pixel, and the other one.
        let column = |phase: usize| Every::new(w, phase, 2, padding);
        let [even, odd] = [column(padding % 2), column(1 - padding % 2)];
        let half = out.len() / 2;
        for (phase, out) in out.chunks_exact_mut(half).enumerate() {
            let (left, right) = out.split_at_mut(half / 2);
            let (to_even, to_odd) = if padding.is_multiple_of(2) { (left, right) } else { (right, left) };
            let rows = to_even.chunks_exact_mut(pitch).zip(to_odd.chunks_exact_mut(pitch));
            for (row, (to_even, to_odd)) in (first..).zip(rows) {
                let from = (2 * row + phase).checked_sub(padding).and_then(|row| x.get(row * w..(row + 1) * w));
                let Some(from) = from else {
                    to_even.fill(0.0);
                    to_odd.fill(0.0);
                    continue;
                };
                let (to_even, to_odd) = (even.frame(to_even), odd.frame(to_odd));
                let (pairs, last) = from.as_chunks::<2>();
                for ((to_even, to_odd), pair) in to_even.iter_mut().zip(to_odd.iter_mut()).zip(pairs) {
                    (*to_even, *to_odd) = (pair[0], pair[1]);
                }
                // One of them may be longer.
                let both = to_even.len().min(to_odd.len()).min(pairs.len());
                for i in both..to_even.len() {
                    to_even[i] = if i < pairs.len() { pairs[i][0] } else { last[0] };
                }
                for i in both..to_odd.len() {
                    to_odd[i] = pairs[i][1];
                }
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows cut anywhere are the rows of the whole plane.
    #[test]
    fn rows_are_padded_and_split_wherever_they_are_cut() {
        let [h, w] = [5, 7];
        let x: Vec<f32> = (1..=h * w).map(|i| i as f32).collect();
        for padding in 0..3 {
            let pixel = |row: usize, column: usize| {
                let at = |i: usize, side: usize| i.checked_sub(padding).filter(|i| *i < side);
                at(row, h).zip(at(column, w)).map_or(0.0, |(row, column)| x[row * w + column])
            };
            let pitch = w + 2 * padding;
            for first in 0..h + 2 * padding {
                let mut out = vec![f32::NAN; 3 * pitch];
                pad_rows(&x, w, padding, first, &mut out);
                let expected = (0..out.len()).map(|i| pixel(first + i / pitch, i % pitch));
                assert!(out.iter().copied().eq(expected));
            }
            let pitch = pitch / 2;
            for first in 0..3 {
                let mut out = vec![f32::NAN; 4 * 2 * pitch];
                split_rows(&x, w, padding, first, pitch, &mut out);
                for (i, &value) in out.iter().enumerate() {
                    let (phase, row, column) = (i / (2 * pitch), i / pitch % 2, i % pitch);
                    let [row, column] = [2 * (first + row) + phase / 2, 2 * column + phase % 2];
                    assert_eq!(value, pixel(row, column), "padding {padding}, row {row}, column {column}");
                }
            }
        }
    }
}
