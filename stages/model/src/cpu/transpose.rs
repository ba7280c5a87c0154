//! Rows and columns exchanged, in squares of eight by eight.
//!
//! Knows no tensor and no thread.

use std::ops::Range;

/// Side of a square.
pub(super) const SQUARE: usize = 8;

/// Writes `count` elements of some rows, which are `stride` apart, as rows of `lanes` elements, [`SQUARE`] or fewer, which are
/// `pitch` apart and in order; what stands for a row that there is not is zero.
///
/// With a smaller pitch, a row is written over the end of the one before.
pub(super) fn interleave(
    from: &[f32],
    [rows, stride]: [usize; 2],
    count: usize,
    (out, pitch): (&mut [f32], usize),
    lanes: usize,
) {
    if count == 0 {
        return;
    }
    assert!(rows <= lanes && (rows == 0 || (rows - 1) * stride + count <= from.len()), "rows outside their array");
    assert!(lanes <= SQUARE && (count - 1) * pitch + lanes <= out.len(), "no room for the rows");
    #[cfg(target_arch = "x86_64")]
    if lanes == SQUARE && is_x86_feature_detected!("avx2") {
        // SAFETY: the feature and the lengths were just checked.
        return unsafe { avx2::interleave(from, [rows, stride], count, out, pitch) };
    }
    interleave_plainly(from, [rows, stride], 0..count, (out, pitch), lanes);
}

/// Writes some of the elements one by one.
fn interleave_plainly(
    from: &[f32],
    [rows, stride]: [usize; 2],
    elements: Range<usize>,
    (out, pitch): (&mut [f32], usize),
    lanes: usize,
) {
    for i in elements {
        for (row, out) in out[i * pitch..][..lanes].iter_mut().enumerate() {
            *out = if row < rows { from[row * stride + i] } else { 0.0 };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };

    use super::{SQUARE, interleave_plainly};

    /// # Safety
    /// Each of the rows has `count` elements in `from`, and `out` room for as many rows of a square.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn interleave(
        from: &[f32],
        [rows, stride]: [usize; 2],
        count: usize,
        out: &mut [f32],
        pitch: usize,
    ) {
        let whole = count / SQUARE * SQUARE;
        for first in (0..whole).step_by(SQUARE) {
            let mut square = [_mm256_setzero_ps(); SQUARE];
            for (row, vector) in square.iter_mut().enumerate().take(rows) {
                // SAFETY: the caller's promise.
                *vector = unsafe { _mm256_loadu_ps(from.as_ptr().add(row * stride + first)) };
            }
            for (i, vector) in transposed(square).into_iter().enumerate() {
                // SAFETY: as above.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr().add((first + i) * pitch), vector) };
            }
        }
        interleave_plainly(from, [rows, stride], whole..count, (out, pitch), SQUARE);
    }

    /// Exchanges rows and columns.
    #[target_feature(enable = "avx2")]
    fn transposed(rows: [__m256; SQUARE]) -> [__m256; SQUARE] {
        let zero = _mm256_setzero_ps();
        let (mut pairs, mut fours, mut out) = ([zero; SQUARE], [zero; SQUARE], [zero; SQUARE]);
        for i in 0..SQUARE / 2 {
            pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        // Row 4 i + j: in each half of the vector, column j of the half's four, of four source rows.
        const FIRST: i32 = 0x44;
        const LAST: i32 = 0xee;
        for i in 0..2 {
            for half in 0..2 {
                let (upper, lower) = (pairs[4 * i + half], pairs[4 * i + 2 + half]);
                fours[4 * i + 2 * half] = _mm256_shuffle_ps::<FIRST>(upper, lower);
                fours[4 * i + 2 * half + 1] = _mm256_shuffle_ps::<LAST>(upper, lower);
            }
        }
        const LOWER_HALVES: i32 = 0x20;
        const UPPER_HALVES: i32 = 0x31;
        for j in 0..4 {
            out[j] = _mm256_permute2f128_ps::<LOWER_HALVES>(fours[j], fours[4 + j]);
            out[4 + j] = _mm256_permute2f128_ps::<UPPER_HALVES>(fours[j], fours[4 + j]);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns() {
        let stride = 21;
        let from: Vec<f32> = (1..=SQUARE * stride).map(|i| i as f32).collect();
        for (rows, lanes, count, pitch) in
            [(8, 8, 21, 8), (6, 8, 16, 6), (3, 8, 5, 11), (1, 8, 9, 8), (0, 8, 2, 8), (3, 4, 9, 5)]
        {
            let mut out = vec![f32::NAN; (count - 1) * pitch + lanes];
            interleave(&from, [rows, stride], count, (&mut out, pitch), lanes);
            for i in 0..count {
                for lane in 0..pitch.min(lanes) {
                    let expected = if lane < rows { from[lane * stride + i] } else { 0.0 };
                    assert_eq!(out[i * pitch + lane], expected, "element {i} of row {lane} of {rows}");
                }
            }
        }
    }
}
