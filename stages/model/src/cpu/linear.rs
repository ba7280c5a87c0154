//! Linear layer: matrix product with the bias folded in, and its three gradients.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::simd::kernel;
use super::{HostOp, array, dims, values};

/// Rows of a band are a multiple of this, so that full vectors are filled.
const BAND_ROWS: usize = 16;
/// Multiplications below which a second thread does not pay.
const PARALLEL_PRODUCTS: usize = 1 << 20;

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

    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.column < self.values.len()
    }
}

/// out (+)= a b for a [m, k] and b [k, n]; `out` has rows `out_row` apart.
pub(super) fn matmul(
    [m, k, n]: [usize; 3],
    a: Matrix,
    b: Matrix,
    (out, out_row): (&mut [f32], usize),
    accumulates: bool,
    is_parallel: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.holds(m, k) && b.holds(k, n) && (m - 1) * out_row + n <= out.len(), "matrix outside its array");
    if !is_parallel || m * n * k < PARALLEL_PRODUCTS {
        return product([m, k, n], a, b, (out, out_row), accumulates);
    }
    // Bands of rows: an element is summed in the same order, however many bands there are.
    let rows = m.div_ceil(rayon::current_num_threads()).next_multiple_of(BAND_ROWS);
    out.par_chunks_mut(rows * out_row).enumerate().for_each(|(i, out)| {
        let first = i * rows;
        let a = Matrix { values: &a.values[first * a.row..], ..a };
        product([rows.min(m - first), k, n], a, b, (out, out_row), accumulates);
    });
}

/// [`matmul`] on one thread.
fn product([m, k, n]: [usize; 3], a: Matrix, b: Matrix, (out, out_row): (&mut [f32], usize), accumulates: bool) {
    // SAFETY: `matmul` checked that the matrices lie inside their slices, and bands of rows of them still do; `out` is
    // borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_row as isize,
            accumulates,
            a.values.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.values.as_ptr(),
            b.column as isize,
            b.row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

kernel! {
    /// out[j] += sum over rows of x[.., j].
    pub(super) fn sum_rows(x: &[f32], out: &mut [f32]) {
        for row in x.chunks_exact(out.len()) {
            for (out, &x) in out.iter_mut().zip(row) {
                *out += x;
            }
        }
    }
}

/// x W^T of two inputs, x W^T + b of three.
#[derive(Clone, Debug)]
pub(crate) struct Linear<const N: usize>;

pub(super) fn forward(x: &FlexTensor, weight: &FlexTensor, bias: Option<&FlexTensor>) -> FlexTensor {
    let [outputs, inputs] = [dims(weight)[0], dims(weight)[1]];
    let x_values = values(x);
    let rows = x_values.len() / inputs;
    let mut out = match bias {
        Some(bias) => values(bias).repeat(rows),
        None => vec![0.0; rows * outputs],
    };
    let (a, b) = (Matrix::rows(x_values, inputs), Matrix::rows(values(weight), inputs).transposed());
    matmul([rows, inputs, outputs], a, b, (&mut out, outputs), bias.is_some(), true);
    let mut shape = dims(x).to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    array(out, &shape)
}

/// Returns the gradients of x and W.
pub(super) fn backward(
    x: &FlexTensor,
    weight: &FlexTensor,
    grad: &FlexTensor,
    needs: [bool; 2],
) -> [Option<FlexTensor>; 2] {
    let [outputs, inputs] = [dims(weight)[0], dims(weight)[1]];
    let (x_values, grad) = (values(x), Matrix::rows(values(grad), outputs));
    let rows = x_values.len() / inputs;
    let d_x = needs[0].then(|| {
        let mut out = vec![0.0; x_values.len()];
        let weight = Matrix::rows(values(weight), inputs);
        matmul([rows, outputs, inputs], grad, weight, (&mut out, inputs), false, true);
        array(out, dims(x))
    });
    let d_weight = needs[1].then(|| {
        let mut out = vec![0.0; outputs * inputs];
        let x = Matrix::rows(x_values, inputs);
        matmul([outputs, rows, inputs], grad.transposed(), x, (&mut out, inputs), false, true);
        array(out, dims(weight))
    });
    [d_x, d_weight]
}

/// Returns the gradient of a bias of shape `shape`.
pub(super) fn bias_gradient(grad: &FlexTensor, shape: &[usize]) -> FlexTensor {
    let mut out = vec![0.0; shape.iter().product()];
    sum_rows(values(grad), &mut out);
    array(out, shape)
}

impl HostOp<2> for Linear<2> {
    type Saved = ();

    fn forward(&self, [x, weight]: &[FlexTensor; 2]) -> (FlexTensor, ()) {
        (forward(x, weight, None), ())
    }

    fn backward(
        &self,
        [x, weight]: &[FlexTensor; 2],
        _: &(),
        grad: &FlexTensor,
        needs: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        backward(x, weight, grad, needs)
    }
}

impl HostOp<3> for Linear<3> {
    type Saved = ();

    fn forward(&self, [x, weight, bias]: &[FlexTensor; 3]) -> (FlexTensor, ()) {
        (forward(x, weight, Some(bias)), ())
    }

    fn backward(
        &self,
        [x, weight, bias]: &[FlexTensor; 3],
        _: &(),
        grad: &FlexTensor,
        needs: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [d_x, d_weight] = backward(x, weight, grad, [needs[0], needs[1]]);
        [d_x, d_weight, needs[2].then(|| bias_gradient(grad, dims(bias)))]
    }
}
