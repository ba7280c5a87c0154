//! Linear layer: matrix product with the bias folded in, and its three gradients.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::matrix::Matrix;
use super::product::matmul;
use super::simd::{kernel, sum};
use super::{Begin, HostOp, PARALLEL_ELEMENTS, array, dims, map_range, unwritten, values};

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

/// Rows up to which a product reads the weight once, row by row, instead of packing it for reuse.
const FEW_ROWS: usize = 8;

kernel! {
    /// out [outputs, rows] = weight [outputs, inputs] times x [rows, inputs] transposed.
    pub(super) fn dot_rows(x: &[f32], weight: &[f32], inputs: usize, out: &mut [f32]) {
        let rows = x.len() / inputs;
        for (weight, out) in weight.chunks_exact(inputs).zip(out.chunks_exact_mut(rows)) {
            for (x, out) in x.chunks_exact(inputs).zip(out) {
                *out = sum([x, weight], |[x, weight]| x * weight);
            }
        }
    }
}

kernel! {
    /// out [rows, width] += factors [rows, m] times the columns of `weight` [m, n] from `first` on; `weight` is read once.
    pub(super) fn add_columns(factors: &[f32], weight: &[f32], n: usize, first: usize, out: &mut [f32]) {
        let m = weight.len() / n;
        let width = out.len() / (factors.len() / m);
        for (i, weight) in weight.chunks_exact(n).enumerate() {
            for (factors, out) in factors.chunks_exact(m).zip(out.chunks_exact_mut(width)) {
                for (out, &weight) in out.iter_mut().zip(&weight[first..]) {
                    *out = weight.mul_add(factors[i], *out);
                }
            }
        }
    }
}

/// x W^T + b for few rows.
fn forward_few(x: &[f32], weight: &[f32], bias: Option<&[f32]>, [rows, inputs, outputs]: [usize; 3]) -> Vec<f32> {
    // Transposed [outputs, rows]: a chunk of outputs is one thread's work.
    let mut turned = unwritten(outputs * rows);
    let chunk = outputs.div_ceil(16).max(1);
    let one = |i: usize, out: &mut [f32]| dot_rows(x, &weight[i * chunk * inputs..], inputs, out);
    if weight.len() < PARALLEL_ELEMENTS {
        turned.chunks_mut(chunk * rows).enumerate().for_each(|(i, out)| one(i, out));
    } else {
        turned.par_chunks_mut(chunk * rows).enumerate().for_each(|(i, out)| one(i, out));
    }
    let mut out = unwritten(rows * outputs);
    for (r, out) in out.chunks_exact_mut(outputs).enumerate() {
        for (o, out) in out.iter_mut().enumerate() {
            *out = turned[o * rows + r] + bias.map_or(0.0, |bias| bias[o]);
        }
    }
    out
}

/// The gradient of x for few rows.
fn input_gradient_few(grad: &[f32], weight: &[f32], [rows, inputs, outputs]: [usize; 3]) -> Vec<f32> {
    // Each thread reads its own columns of the weight; as few cuts as threads, so that it reads long runs.
    let width = inputs.div_ceil(rayon::current_num_threads()).next_multiple_of(64);
    let parts = map_range(inputs.div_ceil(width), outputs * inputs, |i| {
        let first = i * width;
        let mut part = vec![0.0; rows * width.min(inputs - first)];
        add_columns(grad, weight, inputs, first, &mut part);
        part
    });
    let mut out = unwritten(rows * inputs);
    for (r, out) in out.chunks_exact_mut(inputs).enumerate() {
        for (out, part) in out.chunks_mut(width).zip(&parts) {
            out.copy_from_slice(&part[r * out.len()..][..out.len()]);
        }
    }
    out
}

pub(super) fn forward(x: &FlexTensor, weight: &FlexTensor, bias: Option<&FlexTensor>) -> FlexTensor {
    let [outputs, inputs] = [dims(weight)[0], dims(weight)[1]];
    let x_values = values(x);
    let rows = x_values.len() / inputs;
    let mut shape = dims(x).to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    if rows > 0 && rows <= FEW_ROWS && inputs > 0 {
        let out = forward_few(x_values, values(weight), bias.map(values), [rows, inputs, outputs]);
        return array(out, &shape);
    }
    let mut out = unwritten(rows * outputs);
    let (a, b) = (Matrix::rows(x_values, inputs), Matrix::rows(values(weight), inputs).transposed());
    matmul(
        [rows, inputs, outputs],
        a,
        b,
        (&mut out, outputs),
        bias.map_or(Begin::Zero, |bias| Begin::With(values(bias))),
        true,
    );
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
        if rows > 0 && rows <= FEW_ROWS && outputs > 0 {
            return array(input_gradient_few(grad.values, values(weight), [rows, inputs, outputs]), dims(x));
        }
        let mut out = unwritten(x_values.len());
        let weight = Matrix::rows(values(weight), inputs);
        matmul([rows, outputs, inputs], grad, weight, (&mut out, inputs), Begin::Zero, true);
        array(out, dims(x))
    });
    let d_weight = needs[1].then(|| {
        let mut out = unwritten(outputs * inputs);
        let x = Matrix::rows(x_values, inputs);
        matmul([outputs, rows, inputs], grad.transposed(), x, (&mut out, inputs), Begin::Zero, true);
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
