//! Activations, and the gated residual of the DiT's blocks.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::simd::{exp, kernel, sigmoid};
use super::{HostOp, array, dims, for_chunks, unwritten, values};

/// Elements of a chunk of work.
const CHUNK: usize = 1 << 13;
/// sqrt(2 / pi), of the tanh approximation of GELU.
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// Cubic coefficient of the same.
const CUBIC: f32 = 0.044_715;

/// An activation function.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Activation {
    /// x sigmoid(x).
    Silu,
    /// Tanh approximation of GELU, which equals x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
    GeluTanh,
}

kernel! {
    pub(super) fn silu_forward(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * sigmoid(x);
        }
    }
}

kernel! {
    pub(super) fn silu_backward(x: &[f32], grad: &[f32], out: &mut [f32]) {
        for ((out, &x), &grad) in out.iter_mut().zip(x).zip(grad) {
            let s = sigmoid(x);
            *out = grad * s * (1.0 + x * (1.0 - s));
        }
    }
}

kernel! {
    pub(super) fn gelu_forward(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            let u = SQRT_2_OVER_PI * (x + CUBIC * x * x * x);
            *y = x / (1.0 + exp(-2.0 * u));
        }
    }
}

kernel! {
    pub(super) fn gelu_backward(x: &[f32], grad: &[f32], out: &mut [f32]) {
        for ((out, &x), &grad) in out.iter_mut().zip(x).zip(grad) {
            let s = sigmoid(2.0 * SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
            let slope = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
            *out = grad * s * (1.0 + x * (1.0 - s) * slope);
        }
    }
}

impl HostOp<1> for Activation {
    type Saved = ();

    fn forward(&self, [x]: &[FlexTensor; 1]) -> (FlexTensor, ()) {
        let input = values(x);
        let mut out = unwritten(input.len());
        for_chunks(&mut out, CHUNK, |i, out| {
            let input = &input[i * CHUNK..][..out.len()];
            match self {
                Self::Silu => silu_forward(input, out),
                Self::GeluTanh => gelu_forward(input, out),
            }
        });
        (array(out, dims(x)), ())
    }

    fn backward(&self, [x]: &[FlexTensor; 1], _: &(), grad: &FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let (input, grad) = (values(x), values(grad));
        let mut out = unwritten(input.len());
        for_chunks(&mut out, CHUNK, |i, out| {
            let range = i * CHUNK..i * CHUNK + out.len();
            match self {
                Self::Silu => silu_backward(&input[range.clone()], &grad[range], out),
                Self::GeluTanh => gelu_backward(&input[range.clone()], &grad[range], out),
            }
        });
        [Some(array(out, dims(x)))]
    }
}

kernel! {
    pub(super) fn gated_silu_forward(gate: &[f32], y: &[f32], out: &mut [f32]) {
        for ((out, &gate), &y) in out.iter_mut().zip(gate).zip(y) {
            *out = gate * sigmoid(gate) * y;
        }
    }
}

kernel! {
    pub(super) fn gated_silu_backward(gate: &[f32], y: &[f32], grad: &[f32], d_gate: &mut [f32], d_y: &mut [f32]) {
        let n = gate.len();
        let (y, grad, d_gate, d_y) = (&y[..n], &grad[..n], &mut d_gate[..n], &mut d_y[..n]);
        for i in 0..n {
            let s = sigmoid(gate[i]);
            d_y[i] = grad[i] * gate[i] * s;
            d_gate[i] = grad[i] * y[i] * s * (1.0 + gate[i] * (1.0 - s));
        }
    }
}

/// silu(gate) * y.
#[derive(Clone, Debug)]
pub(crate) struct GatedSilu;

impl HostOp<2> for GatedSilu {
    type Saved = ();

    fn forward(&self, [gate, y]: &[FlexTensor; 2]) -> (FlexTensor, ()) {
        let (gates, y) = (values(gate), values(y));
        let mut out = unwritten(gates.len());
        for_chunks(&mut out, CHUNK, |i, out| {
            let range = i * CHUNK..i * CHUNK + out.len();
            gated_silu_forward(&gates[range.clone()], &y[range], out);
        });
        (array(out, dims(gate)), ())
    }

    fn backward(
        &self,
        [gate, y]: &[FlexTensor; 2],
        _: &(),
        grad: &FlexTensor,
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let (gates, y_values, grad) = (values(gate), values(y), values(grad));
        let (mut d_gate, mut d_y) = (unwritten(gates.len()), unwritten(gates.len()));
        let pairs = d_gate.par_chunks_mut(CHUNK).zip(d_y.par_chunks_mut(CHUNK)).enumerate();
        pairs.for_each(|(i, (d_gate, d_y))| {
            let range = i * CHUNK..i * CHUNK + d_gate.len();
            gated_silu_backward(&gates[range.clone()], &y_values[range.clone()], &grad[range], d_gate, d_y);
        });
        [Some(array(d_gate, dims(gate))), Some(array(d_y, dims(y)))]
    }
}

/// x + gate * y, the gate [b, d] being shared by the rows of a sample of x and y [b, n, d].
#[derive(Clone, Debug)]
pub(crate) struct GatedResidual;

kernel! {
    pub(super) fn gated_forward(x: &[f32], gate: &[f32], y: &[f32], out: &mut [f32]) {
        let d = gate.len();
        for ((x, y), out) in x.chunks_exact(d).zip(y.chunks_exact(d)).zip(out.chunks_exact_mut(d)) {
            for i in 0..d {
                out[i] = x[i] + gate[i] * y[i];
            }
        }
    }
}

kernel! {
    pub(super) fn scale_rows(gate: &[f32], grad: &[f32], out: &mut [f32]) {
        let d = gate.len();
        for (grad, out) in grad.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
            for i in 0..d {
                out[i] = gate[i] * grad[i];
            }
        }
    }
}

kernel! {
    pub(super) fn sum_products(y: &[f32], grad: &[f32], out: &mut [f32]) {
        let d = out.len();
        for (grad, y) in grad.chunks_exact(d).zip(y.chunks_exact(d)) {
            for i in 0..d {
                out[i] += y[i] * grad[i];
            }
        }
    }
}

impl HostOp<3> for GatedResidual {
    type Saved = ();

    fn forward(&self, [x, gate, y]: &[FlexTensor; 3]) -> (FlexTensor, ()) {
        let d = dims(gate)[1];
        let (x_values, gate, y) = (values(x), values(gate), values(y));
        let sample = dims(x)[1] * d;
        let mut out = unwritten(x_values.len());
        for_chunks(&mut out, sample, |b, out| {
            let range = b * sample..(b + 1) * sample;
            gated_forward(&x_values[range.clone()], &gate[b * d..(b + 1) * d], &y[range], out);
        });
        (array(out, dims(x)), ())
    }

    fn backward(
        &self,
        [x, gate, y]: &[FlexTensor; 3],
        _: &(),
        grad: &FlexTensor,
        needs: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [b, d] = [dims(gate)[0], dims(gate)[1]];
        let sample = dims(x)[1] * d;
        let (gate_values, y_values, grad_values) = (values(gate), values(y), values(grad));
        let d_gate = needs[1].then(|| {
            let mut out = vec![0.0; b * d];
            for (i, out) in out.chunks_exact_mut(d).enumerate() {
                let range = i * sample..(i + 1) * sample;
                sum_products(&y_values[range.clone()], &grad_values[range], out);
            }
            array(out, &[b, d])
        });
        let d_y = needs[2].then(|| {
            let mut out = unwritten(y_values.len());
            for_chunks(&mut out, sample, |i, out| {
                scale_rows(&gate_values[i * d..(i + 1) * d], &grad_values[i * sample..(i + 1) * sample], out);
            });
            array(out, dims(y))
        });
        [needs[0].then(|| grad.clone()), d_gate, d_y]
    }
}
