//! Matrix product, cut into tiles for `microkernel`.
//!
//! Columns are packed to panels that the first-level cache holds, rows to blocks for the second; each thread packs what it
//! needs. Knows no tensor.
//!
//! Within a block of the inner side an element is one chain of fused multiply-adds, and the blocks are added up in order. How
//! that side is cut depends on its length alone: a result is the same for any number of threads, length of a vector and size of
//! a cache.

use std::cell::RefCell;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::matrix::Matrix;
use super::microkernel::{MOST_COLUMNS, ROWS, Tile, VECTORS};
use super::simd::LINE;
use super::tiles::Vectors;
use super::transpose::SQUARE;
use super::{Begin, Shared};

/// Length of a block of the inner side at most: a panel of AVX2 is 24 KiB.
const INNER: usize = 384;
/// Rows of a block: 144 KiB.
const BLOCK_ROWS: usize = 16 * ROWS;
/// Columns of a block: its panels, 3 MiB, are packed once for all rows.
const BLOCK_COLUMNS: usize = 2048;
/// Columns that are packed together, before the first of them is used.
const PACKED_COLUMNS: usize = 2 * MOST_COLUMNS;
/// Columns up to which rows are read where they lie: they are not read often enough for packing to pay.
const FEW_COLUMNS: usize = 64;
/// Elements between neighbours of a row up to which it can be read where it lies: further apart, each is in a page of its own.
const NEAR: usize = 1024;
/// Multiplications below which a second thread does not pay.
const PARALLEL_PRODUCTS: usize = 1 << 20;

/// out = begin + a b for a [m, k] and b [k, n], whose columns are the outputs; `out` has rows `out_row` apart.
pub(super) fn matmul(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    (out, out_row): (&mut [f32], usize),
    begin: Begin,
    is_parallel: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * out_row + n <= out.len(), "a product outside its array");
    let shared = Shared::new(out);
    let band = |rows: Range<usize>, columns: Range<usize>| {
        let begin = match begin {
            Begin::With(begin) => Begin::With(&begin[columns.clone()]),
            begin => begin,
        };
        let size = [rows.len(), k, columns.len()];
        // SAFETY: these rows and columns lie inside, and no other thread has them.
        unsafe {
            let out = shared.from(rows.start * out_row + columns.start);
            product(size, a.below(rows.start), b.right_of(columns.start).into(), (out, out_row), begin);
        }
    };
    if !is_parallel || m * n * k < PARALLEL_PRODUCTS {
        return band(0..m, 0..n);
    }
    let [down, across] = cut([m, n], rayon::current_num_threads());
    let height = m.div_ceil(down).next_multiple_of(ROWS);
    let width = n.div_ceil(across).next_multiple_of(MOST_COLUMNS);
    let bands: Vec<_> =
        blocks(m, height).flat_map(|rows| blocks(n, width).map(move |columns| (rows.clone(), columns))).collect();
    bands.into_par_iter().for_each(|(rows, columns)| band(rows, columns));
}

/// Returns how many bands should lie below and beside each other: as many as there are threads, which pack least in all.
fn cut([m, n]: [usize; 2], threads: usize) -> [usize; 2] {
    let cuts = (1..=threads).filter(|down| threads.is_multiple_of(*down)).map(|down| [down, threads / down]);
    cuts.min_by_key(|[down, across]| m * across + n * down).unwrap_or([1, 1])
}

/// Cuts a side.
fn blocks(side: usize, most: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    (0..side).step_by(most).map(move |first| first..side.min(first + most))
}

thread_local! {
    static PACKED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The columns of a product.
#[derive(Clone, Copy)]
pub(super) enum Columns<'a> {
    /// Where they lie: each product packs them anew.
    Lying(Matrix<'a>),
    Packed(Packed<'a>),
}

/// Columns that are packed once for products with the rows of several matrices: panels [inner, width], one after the other.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a> {
    panels: &'a [f32],
    /// Inner side and columns.
    size: [usize; 2],
    width: usize,
}

impl<'a> From<Matrix<'a>> for Columns<'a> {
    fn from(matrix: Matrix<'a>) -> Self {
        Self::Lying(matrix)
    }
}

impl Columns<'_> {
    fn holds(&self, inner: usize, columns: usize) -> bool {
        match self {
            Self::Lying(matrix) => matrix.holds(inner, columns),
            Self::Packed(packed) => inner <= packed.size[0] && columns <= packed.size[1],
        }
    }
}

/// Packs a matrix [inner, columns] into `place`, which grows as needed. A product may take the first part of either side.
pub(super) fn packed<'a>(matrix: Matrix, size: [usize; 2], place: &'a mut Vec<f32>) -> Columns<'a> {
    packed_for(Vectors::detect().len, matrix, size, place)
}

/// [`packed`] for vectors of some length.
fn packed_for<'a>(
    vector: usize,
    matrix: Matrix,
    size @ [inner, columns]: [usize; 2],
    place: &'a mut Vec<f32>,
) -> Columns<'a> {
    assert!(matrix.holds(inner, columns), "matrix outside its array");
    let width = panel_width(vector);
    let (panels, _) = room(place, inner * columns.next_multiple_of(width) + SQUARE, 0);
    matrix.pack_columns(0..inner, 0..columns, width, panels);
    Columns::Packed(Packed { panels, size, width })
}

/// Returns the columns of a panel for vectors of some length: whole squares, also where vectors are shorter than their side.
fn panel_width(vector: usize) -> usize {
    (VECTORS * vector).next_multiple_of(SQUARE)
}

/// [`matmul`] on one thread.
///
/// # Safety
/// `out` has m rows of n elements, which no other thread touches.
pub(super) unsafe fn product(size: [usize; 3], a: Matrix, b: Columns, out: (*mut f32, usize), begin: Begin) {
    let [m, k, n] = size;
    if m == 0 || n == 0 {
        return;
    }
    let is_complete = !matches!(begin, Begin::With(begin) if begin.len() != n);
    assert!(a.holds(m, k) && b.holds(k, n) && is_complete, "matrix outside its array");
    let mut packed = PACKED.take();
    Arch::new().dispatch(Work { product: Product { size, a, b, out, begin }, packed: &mut packed });
    PACKED.set(packed);
}

/// out = begin + a b on one thread. `out` is the first element and the distance of rows.
#[derive(Clone, Copy)]
struct Product<'a> {
    size: [usize; 3],
    a: Matrix<'a>,
    b: Columns<'a>,
    out: (*mut f32, usize),
    begin: Begin<'a>,
}

/// A product, and room for what is packed, which grows as needed.
struct Work<'a> {
    product: Product<'a>,
    packed: &'a mut Vec<f32>,
}

impl WithSimd for Work<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { product: product @ Product { size: [m, k, n], a, b, .. }, packed } = self;
        let width = panel_width(S::F32_LANES);
        let depth = k.div_ceil(k.div_ceil(INNER).max(1)).max(1);
        let most_rows = BLOCK_ROWS.min(m.next_multiple_of(ROWS));
        let most_columns = BLOCK_COLUMNS.min(n.next_multiple_of(width));
        let num_packed = match b {
            Columns::Lying(_) => depth * most_columns + SQUARE,
            Columns::Packed(_) => 0,
        };
        let (panels, strips) = room(packed, num_packed, depth * most_rows + SQUARE);
        let packs_rows = n > FEW_COLUMNS || a.column > NEAR;
        for columns in blocks(n, most_columns) {
            // Without an inner side there is still something to begin with.
            for inner in blocks(k.max(1), depth) {
                let inner = inner.start..inner.end.min(k);
                for rows in blocks(m, most_rows) {
                    if packs_rows {
                        a.pack_rows::<ROWS>(rows.clone(), inner.clone(), strips);
                    }
                    for panel in blocks(columns.len(), width) {
                        let place = panel.start * inner.len();
                        let panel = columns.start + panel.start..columns.start + panel.end;
                        let values = match b {
                            Columns::Lying(b) => {
                                if rows.start == 0 && (panel.start - columns.start).is_multiple_of(PACKED_COLUMNS) {
                                    let together = panel.start..columns.end.min(panel.start + PACKED_COLUMNS);
                                    b.pack_columns(inner.clone(), together, width, &mut panels[place..]);
                                }
                                &panels[place..]
                            }
                            Columns::Packed(b) => {
                                assert_eq!(b.width, width, "packed for other vectors");
                                &b.panels[panel.start * b.size[0] + inner.start * width..]
                            }
                        };
                        let values = &values[..inner.len() * width];
                        let panel = Panel { inner: inner.clone(), columns: panel, values, pitch: width };
                        product.multiply(simd, rows.clone(), packs_rows.then_some(&*strips), panel);
                    }
                }
            }
        }
    }
}

/// Columns of a block of the inner side: [inner, pitch].
struct Panel<'a> {
    inner: Range<usize>,
    columns: Range<usize>,
    values: &'a [f32],
    pitch: usize,
}

impl Product<'_> {
    /// Adds a panel's part to some rows. `strips` are these rows as [`Matrix::pack_rows`] makes them, if they are packed.
    #[inline(always)]
    fn multiply<S: Simd>(&self, simd: S, rows: Range<usize>, strips: Option<&[f32]>, panel: Panel) {
        let (out, out_row) = self.out;
        let inner = panel.inner.len();
        for strip in blocks(rows.len(), ROWS) {
            let row = rows.start + strip.start;
            let strip_rows = match strips {
                Some(strips) => Matrix { values: &strips[strip.start * inner..], row: 1, column: ROWS },
                None => self.a.below(row).right_of(panel.inner.start),
            };
            for part in blocks(panel.columns.len(), VECTORS * S::F32_LANES) {
                let first = panel.columns.start + part.start;
                let tile = Tile {
                    rows: strip_rows,
                    is_packed: strips.is_some(),
                    inner,
                    panel: panel.values.get(part.start..).unwrap_or_default(),
                    pitch: panel.pitch,
                    columns: part.len(),
                    // SAFETY: inside, as the caller of `product` promised.
                    out: unsafe { out.add(row * out_row + first) },
                    out_row,
                    begin: match self.begin {
                        _ if panel.inner.start > 0 => Begin::GoOn,
                        Begin::With(begin) => Begin::With(&begin[first..first + part.len()]),
                        begin => begin,
                    },
                };
                // SAFETY: so many rows and columns lie behind this place.
                unsafe { tile.compute(simd, strip.len()) };
            }
        }
    }
}

/// Returns two arrays that begin with a cache line, of so many elements at least.
fn room(packed: &mut Vec<f32>, first: usize, second: usize) -> (&mut [f32], &mut [f32]) {
    let first = first.next_multiple_of(LINE);
    if packed.len() < first + second + LINE {
        packed.resize(first + second + LINE, 0.0);
    }
    let start = packed.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    packed[start..].split_at_mut(first)
}

#[cfg(test)]
mod tests {
    use pulp::{Scalar, Scalar128b, Scalar256b, Scalar512b};

    use super::*;
    use crate::random::Stream;

    /// The sizes [m, k, n] of products: parts of a tile, several blocks of each side, and sides of one and none.
    const SIZES: [[usize; 3]; 8] = [
        [75, 530, 210],
        [13, 900, 70],
        [5, 7, 3],
        [1, 40, 65],
        [98, 1, 40],
        [3, 0, 37],
        [110, 33, 2100],
        [20, 390, 64],
    ];

    fn draw(name: &str, count: usize) -> Vec<f32> {
        Stream::new(1, name).normals(count, 1.0)
    }

    /// The matrix [rows, columns] of `values`, stored row by row, column by column, and with a gap between all elements.
    fn layouts(values: &[f32], [rows, columns]: [usize; 2]) -> [(Vec<f32>, [usize; 2]); 3] {
        let transposed = (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column]));
        let spread = values.iter().flat_map(|&value| [value, f32::NAN]).collect();
        [(values.to_vec(), [columns, 1]), (transposed.collect(), [1, rows]), (spread, [2 * columns, 2])]
    }

    fn matrix((values, [row, column]): &(Vec<f32>, [usize; 2])) -> Matrix<'_> {
        Matrix { values, row: *row, column: *column }
    }

    /// Whatever the layouts, the threads and the length of a vector.
    #[test]
    fn products_are_right_and_the_same_to_the_bit() {
        for size @ [m, k, n] in SIZES {
            let (a, b, columns) = (draw("a", m * k), draw("b", k * n), draw("columns", n));
            let out_row = n + 3;
            for begin in [Begin::Zero, Begin::GoOn, Begin::With(&columns)] {
                let with = |run: &dyn Fn(&mut [f32])| {
                    let mut out = vec![0.5; m * out_row];
                    run(&mut out);
                    out
                };
                let first = with(&|out| {
                    matmul(size, Matrix::rows(&a, k), Matrix::rows(&b, n), (out, out_row), begin, false);
                });
                for row in 0..m {
                    for column in 0..out_row {
                        let ours = f64::from(first[row * out_row + column]);
                        if column >= n {
                            assert_eq!(ours, 0.5, "a column behind the product was written");
                            continue;
                        }
                        let start = match begin {
                            Begin::Zero => 0.0,
                            Begin::GoOn => 0.5,
                            Begin::With(_) => f64::from(columns[column]),
                        };
                        let product = |i: usize| f64::from(a[row * k + i]) * f64::from(b[i * n + column]);
                        let sum = start + (0..k).map(product).sum::<f64>();
                        // Roundings of up to 900 terms whose sums are of the order of 30.
                        assert!((ours - sum).abs() <= 1e-4, "{size:?} at {row}, {column}: {ours} is not {sum}");
                    }
                }
                for a in &layouts(&a, [m, k]) {
                    for b in &layouts(&b, [k, n]) {
                        let (a, b) = (matrix(a), matrix(b));
                        for threads in [1, 3, 4] {
                            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                            let out = with(&|out| pool.install(|| matmul(size, a, b, (out, out_row), begin, true)));
                            assert!(out == first, "{size:?} on {threads} threads");
                        }
                        let packed_alike = with(&|out| {
                            let mut place = Vec::new();
                            let b = packed(b, [k, n], &mut place);
                            // SAFETY: as many rows and columns as `with` makes.
                            unsafe { product(size, a, b, (out.as_mut_ptr(), out_row), begin) };
                        });
                        assert!(packed_alike == first, "{size:?} packed before");
                        let start = |out: &mut [f32], run: &dyn Fn(Work)| {
                            let product = Product { size, a, b: b.into(), out: (out.as_mut_ptr(), out_row), begin };
                            run(Work { product, packed: &mut Vec::new() });
                        };
                        // Without vectors products are rounded before they are added.
                        let plain = with(&|out| start(out, &|work| work.with_simd(Scalar)));
                        assert!(plain.iter().zip(&first).all(|(a, b)| (a - b).abs() <= 1e-4));
                        if Vectors::detect().len > 1 {
                            assert!(with(&|out| start(out, &|work| work.with_simd(Scalar128b))) == first);
                            assert!(with(&|out| start(out, &|work| work.with_simd(Scalar256b))) == first);
                            assert!(with(&|out| start(out, &|work| work.with_simd(Scalar512b))) == first);
                        }
                    }
                }
            }
        }
    }

    /// In vectors of any length, as if the rest were not there.
    #[test]
    fn parts_of_packed_columns_are_multiplied_alone() {
        let (inner, columns, m) = (530, 70, 20);
        let (a, b) = (draw("a", m * inner), draw("b", inner * columns));
        let (a, b) = (Matrix::rows(&a, inner), Matrix::rows(&b, columns));
        for [k, n] in [[530, 70], [530, 33], [401, 70], [7, 9], [1, 1]] {
            let multiply = |b: Columns, run: &dyn Fn(Work)| {
                let mut out = vec![0.5; m * columns];
                let product = Product { size: [m, k, n], a, b, out: (out.as_mut_ptr(), columns), begin: Begin::GoOn };
                run(Work { product, packed: &mut Vec::new() });
                out
            };
            let mut place = Vec::new();
            let mut assert_same = |vector: usize, run: &dyn Fn(Work)| {
                let expected = multiply(b.into(), run);
                assert!(multiply(packed_for(vector, b, [inner, columns], &mut place), run) == expected, "[{k}, {n}]");
            };
            assert_same(1, &|work| work.with_simd(Scalar));
            assert_same(4, &|work| work.with_simd(Scalar128b));
            assert_same(8, &|work| work.with_simd(Scalar256b));
            assert_same(16, &|work| work.with_simd(Scalar512b));
        }
    }

    #[test]
    fn bands_are_as_many_as_threads_and_cut_the_longer_side() {
        assert_eq!(cut([640, 3072], 2), [1, 2]);
        assert_eq!(cut([3072, 640], 2), [2, 1]);
        assert_eq!(cut([1000, 1000], 16), [4, 4]);
        assert_eq!(cut([10, 10], 1), [1, 1]);
    }
}
