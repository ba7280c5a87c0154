//! The innermost part of a matrix product: a tile, two vectors of columns of some rows, stays in registers over a block of the
//! inner side.
//!
//! Knows no cache and no thread. An element is one chain of fused multiply-adds, then added to what it
//! begins with.

// Sums in registers are written as index loops over small constant ranges, which unroll completely.
#![allow(clippy::needless_range_loop)]

use pulp::Simd;

use super::Begin;
use super::matrix::Matrix;
use super::planes::LONGEST;
use super::simd::prefetch;

/// Rows of a tile.
pub(super) const ROWS: usize = 6;
/// Vectors of a tile: with [`ROWS`], 12 sums in 16 registers.
pub(super) const VECTORS: usize = 2;
/// Columns of a tile at most.
pub(super) const MOST_COLUMNS: usize = VECTORS * LONGEST;

/// Some rows times the columns of two vectors, over a block of the inner side.
pub(super) struct Tile<'a> {
    /// The rows from the block's first element on.
    pub(super) rows: Matrix<'a>,
    /// Whether the rows are a strip [inner, [`ROWS`]].
    pub(super) is_packed: bool,
    /// Length of the block.
    pub(super) inner: usize,
    /// The columns [inner, pitch] from the first one on.
    pub(super) panel: &'a [f32],
    pub(super) pitch: usize,
    /// Columns that there are; what lies behind them in the panel is anything.
    pub(super) columns: usize,
    pub(super) out: *mut f32,
    pub(super) out_row: usize,
    pub(super) begin: Begin<'a>,
}

impl Tile<'_> {
    /// Computes the first `num_rows` rows, [`ROWS`] at most.
    ///
    /// # Safety
    /// So many rows of `columns` elements lie behind `out`, and no other thread touches them.
    #[inline(always)]
    pub(super) unsafe fn compute<S: Simd>(&self, simd: S, num_rows: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match num_rows {
                1 => self.compute_rows::<S, 1>(simd),
                2 => self.compute_rows::<S, 2>(simd),
                3 => self.compute_rows::<S, 3>(simd),
                4 => self.compute_rows::<S, 4>(simd),
                5 => self.compute_rows::<S, 5>(simd),
                _ => self.compute_rows::<S, ROWS>(simd),
            }
        }
    }

    /// # Safety
    /// As [`Tile::compute`].
    #[inline(always)]
    unsafe fn compute_rows<S: Simd, const R: usize>(&self, simd: S) {
        let width = VECTORS * S::F32_LANES;
        let reach = self.inner.saturating_sub(1) * self.pitch + width;
        assert!(self.rows.holds(R, self.inner) && (self.inner == 0 || reach <= self.panel.len()));
        for r in 0..R {
            let row = self.out.wrapping_add(r * self.out_row);
            prefetch(row);
            prefetch(row.wrapping_add(width - 1));
        }
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; R];
        // SAFETY: rows and panel were just checked; the rest is the caller's promise.
        unsafe {
            if self.is_packed {
                self.multiply::<S, R, true>(simd, &mut sums);
            } else {
                self.multiply::<S, R, false>(simd, &mut sums);
            }
            if self.columns == width {
                write(simd, self.begin, &sums, (self.out, self.out_row));
            } else {
                self.write_some(simd, &sums);
            }
        }
    }

    /// # Safety
    /// Rows and panel hold R rows, a tile's columns and `inner` of each.
    #[inline(always)]
    unsafe fn multiply<S: Simd, const R: usize, const IS_PACKED: bool>(
        &self,
        simd: S,
        sums: &mut [[S::f32s; VECTORS]; R],
    ) {
        /// Steps without a loop between them.
        const STEPS: usize = 4;
        let (row, column) = if IS_PACKED { (1, ROWS) } else { (self.rows.row, self.rows.column) };
        let (mut rows, mut panel) = (self.rows.values.as_ptr(), self.panel.as_ptr());
        // SAFETY: the caller's promise.
        unsafe {
            for _ in 0..self.inner / STEPS {
                for i in 0..STEPS {
                    add_products(simd, (rows.add(i * column), row), panel.add(i * self.pitch), sums);
                }
                (rows, panel) = (rows.add(STEPS * column), panel.add(STEPS * self.pitch));
            }
            for i in 0..self.inner % STEPS {
                add_products(simd, (rows.add(i * column), row), panel.add(i * self.pitch), sums);
            }
        }
    }

    /// Writes sums of which some columns do not exist.
    ///
    /// # Safety
    /// As [`Tile::compute`].
    #[inline(always)]
    unsafe fn write_some<S: Simd, const R: usize>(&self, simd: S, sums: &[[S::f32s; VECTORS]; R]) {
        let mut rows = [[0.0; MOST_COLUMNS]; R];
        let mut all = [0.0; MOST_COLUMNS];
        let begin = match self.begin {
            Begin::With(begin) => {
                all[..begin.len()].copy_from_slice(begin);
                Begin::With(&all)
            }
            begin => begin,
        };
        // SAFETY: the caller's promise; the copies have room for the longest vectors.
        unsafe {
            if let Begin::GoOn = begin {
                for r in 0..R {
                    rows[r].as_mut_ptr().copy_from_nonoverlapping(self.out.add(r * self.out_row), self.columns);
                }
            }
            write(simd, begin, sums, (rows.as_mut_ptr().cast(), MOST_COLUMNS));
            for r in 0..R {
                self.out.add(r * self.out_row).copy_from_nonoverlapping(rows[r].as_ptr(), self.columns);
            }
        }
    }
}

/// Adds the products of one element of R rows, `row` apart, with two vectors.
///
/// # Safety
/// The elements lie behind `rows`, the vectors behind `panel`.
#[inline(always)]
unsafe fn add_products<S: Simd, const R: usize>(
    simd: S,
    (rows, row): (*const f32, usize),
    panel: *const f32,
    sums: &mut [[S::f32s; VECTORS]; R],
) {
    let mut vectors = [simd.splat_f32s(0.0); VECTORS];
    for v in 0..VECTORS {
        // SAFETY: the caller's promise.
        vectors[v] = unsafe { panel.cast::<S::f32s>().add(v).read_unaligned() };
    }
    for r in 0..R {
        // SAFETY: as above.
        let factor = simd.splat_f32s(unsafe { *rows.add(r * row) });
        for v in 0..VECTORS {
            // Fused where the processor can.
            sums[r][v] = simd.mul_add_e_f32s(factor, vectors[v], sums[r][v]);
        }
    }
}

/// Writes the sums of R rows of whole vectors.
///
/// # Safety
/// The vectors lie behind `out`, and no other thread touches them.
#[inline(always)]
unsafe fn write<S: Simd, const R: usize>(
    simd: S,
    begin: Begin,
    sums: &[[S::f32s; VECTORS]; R],
    (out, out_row): (*mut f32, usize),
) {
    if let Begin::With(begin) = begin {
        assert!(begin.len() >= VECTORS * S::F32_LANES);
    }
    for r in 0..R {
        for v in 0..VECTORS {
            // SAFETY: the caller's promise, and the length that was just checked.
            unsafe {
                let to = out.add(r * out_row).cast::<S::f32s>().add(v);
                let sum = match begin {
                    Begin::Zero => sums[r][v],
                    Begin::With(begin) => {
                        simd.add_f32s(begin.as_ptr().cast::<S::f32s>().add(v).read_unaligned(), sums[r][v])
                    }
                    Begin::GoOn => simd.add_f32s(to.read_unaligned(), sums[r][v]),
                };
                to.write_unaligned(sum);
            }
        }
    }
}
