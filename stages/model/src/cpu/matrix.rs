//! A matrix in memory, and how parts of it are packed for a product.
//!
//! Knows no tensor and no thread.

use std::ops::Range;

use super::simd::{LINE, prefetch};
use super::transpose::{SQUARE, interleave};

/// Runs ahead of the one that is copied for which the memory is asked: far apart, they lie where the processor does not expect them.
const AHEAD: usize = 8;

/// A matrix inside a slice: first element, row stride, column stride.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) values: &'a [f32],
    pub(super) row: usize,
    pub(super) column: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after the other.
    pub(super) fn rows(values: &'a [f32], columns: usize) -> Self {
        Self { values, row: columns, column: 1 }
    }

    /// The same matrix with rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }

    /// The same matrix from row `first` on.
    pub(super) fn below(self, first: usize) -> Self {
        Self { values: self.values.get(first * self.row..).unwrap_or_default(), ..self }
    }

    /// The same matrix from column `first` on.
    pub(super) fn right_of(self, first: usize) -> Self {
        self.transposed().below(first).transposed()
    }

    /// Returns whether a matrix of this size lies inside the slice.
    pub(super) fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.column < self.values.len()
    }

    /// Packs some columns of some rows to panels, one after the other: [rows, W columns]. Columns that the last one lacks are zero.
    ///
    /// W is a multiple of a square's side.
    pub(super) fn pack_columns(self, rows: Range<usize>, columns: Range<usize>, width: usize, out: &mut [f32]) {
        let (num_rows, count) = (rows.len(), columns.len());
        let from = self.below(rows.start).right_of(columns.start);
        if self.row == 1 && self.column != 1 {
            for column in (0..count.next_multiple_of(width)).step_by(SQUARE) {
                let (panel, lane) = (column / width, column % width);
                let used = SQUARE.min(count.saturating_sub(column));
                let out = &mut out[panel * width * num_rows + lane..];
                interleave(from.right_of(column).values, [used, self.column], num_rows, (out, width), SQUARE);
            }
            return;
        }
        // Row by row: a run of a row is read as a whole.
        let whole = if self.column == 1 { count / width * width } else { 0 };
        for row in 0..num_rows {
            let from = from.below(row);
            let (out, pitch) = (&mut out[row * width..], width * num_rows);
            match width {
                8 => copy_runs::<8>(&from.values[..whole], out, pitch),
                16 => copy_runs::<16>(&from.values[..whole], out, pitch),
                32 => copy_runs::<32>(&from.values[..whole], out, pitch),
                _ => unreachable!("a panel has {width} columns"),
            }
            for column in (whole..count).step_by(width) {
                let (used, out) = (width.min(count - column), &mut out[column / width * pitch..][..width]);
                let value = |lane: usize| if lane < used { from.values[(column + lane) * self.column] } else { 0.0 };
                out.iter_mut().enumerate().for_each(|(lane, out)| *out = value(lane));
            }
        }
    }

    /// Packs some rows of some columns to strips, one after the other: [columns, R rows]; rows that the last one lacks are
    /// anything. There is room for a square behind the last strip.
    pub(super) fn pack_rows<const R: usize>(self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let (count, num_columns) = (rows.len(), columns.len());
        let from = self.below(rows.start).right_of(columns.start);
        if self.column == 1 {
            for row in (0..count).step_by(R) {
                // What a square writes behind its strip is written again by the next one, or is the room.
                let (used, out) = (R.min(count - row), &mut out[row * num_columns..]);
                interleave(from.below(row).values, [used, self.row], num_columns, (out, R), SQUARE);
            }
            return;
        }
        // Column by column: a run of a column is read as a whole.
        for column in 0..num_columns {
            let from = from.right_of(column);
            let strips = out.chunks_exact_mut(num_columns * R);
            if self.row == 1 {
                let ahead = AHEAD * self.column;
                (0..count).step_by(LINE).for_each(|row| prefetch(from.values.as_ptr().wrapping_add(ahead + row)));
                let (whole, rest) = from.values[..count].as_chunks::<R>();
                for (i, strip) in strips.take(count.div_ceil(R)).enumerate() {
                    let to = &mut strip[column * R..][..R];
                    match whole.get(i) {
                        Some(whole) => to.copy_from_slice(whole),
                        None => to[..rest.len()].copy_from_slice(rest),
                    }
                }
            } else {
                for (row, strip) in (0..count).step_by(R).zip(strips) {
                    for (row, to) in (row..count).zip(&mut strip[column * R..][..R]) {
                        *to = from.values[row * self.row];
                    }
                }
            }
        }
    }
}

/// Copies runs of W elements to places `pitch` apart.
fn copy_runs<const W: usize>(from: &[f32], out: &mut [f32], pitch: usize) {
    for (i, run) in from.as_chunks::<W>().0.iter().enumerate() {
        out[i * pitch..][..W].copy_from_slice(run);
    }
}
