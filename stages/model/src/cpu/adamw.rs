//! AdamW over flat vectors: moments and value updated in place, in one pass.

use burn::backend::Flex;
use rayon::prelude::*;

use super::simd::{kernel, sum};
use super::{PARALLEL_ELEMENTS, host, map_range, values};
use crate::Tensor;
use crate::fused::AdamWStep;

/// Elements of a chunk of work; fixed, so that sums over chunks have a fixed order.
const CHUNK: usize = 1 << 14;

kernel! {
    /// One update of a chunk.
    pub(super) fn update(
        value: &mut [f32],
        first: &mut [f32],
        second: &mut [f32],
        gradient: &[f32],
        step: &Coefficients,
    ) {
        let n = value.len();
        let (first, second, gradient) = (&mut first[..n], &mut second[..n], &gradient[..n]);
        let Coefficients { scale, beta1, keep1, beta2, keep2, root2, eps, decay, rate } = *step;
        for i in 0..n {
            let g = gradient[i] * scale;
            let m = beta1 * first[i] + keep1 * g;
            let v = beta2 * second[i] + keep2 * (g * g);
            first[i] = m;
            second[i] = v;
            value[i] = value[i] * decay - rate * m / (v.sqrt() * root2 + eps);
        }
    }
}

kernel! {
    /// Sum of squares of a chunk.
    pub(super) fn square_sum(x: &[f32]) -> f32 {
        sum([x], |[x]| x * x)
    }
}

/// An update's numbers in the kernel's precision.
#[derive(Clone, Copy)]
pub(super) struct Coefficients {
    scale: f32,
    beta1: f32,
    keep1: f32,
    beta2: f32,
    keep2: f32,
    root2: f32,
    eps: f32,
    decay: f32,
    rate: f32,
}

impl From<&AdamWStep> for Coefficients {
    fn from(step: &AdamWStep) -> Self {
        let [beta1, beta2] = step.betas;
        Self {
            scale: step.gradient_scale as f32,
            beta1: beta1 as f32,
            keep1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            keep2: (1.0 - beta2) as f32,
            root2: (1.0 / step.correction(1).sqrt()) as f32,
            eps: step.eps as f32,
            decay: step.decay as f32,
            rate: (step.lr / step.correction(0)) as f32,
        }
    }
}

/// Returns the new value and moments; vectors that nobody else holds are updated where they lie.
pub(crate) fn adamw(tensors: [Tensor<1>; 3], gradient: Tensor<1>, step: &AdamWStep) -> [Tensor<1>; 3] {
    let gradient = host(gradient);
    let gradient = values(&gradient);
    let step = Coefficients::from(step);
    // A slice of a larger array would be copied whole by `storage_mut`; `dense` alone does not rule that out.
    let mut tensors = tensors.map(|tensor| {
        let tensor = host(tensor);
        if tensor.storage::<f32>().len() == gradient.len() {
            tensor
        } else {
            super::array(values(&tensor).to_vec(), &[gradient.len()])
        }
    });
    let [value, first, second] = tensors.each_mut().map(|tensor| tensor.storage_mut::<f32>());
    if gradient.len() < PARALLEL_ELEMENTS {
        update(value, first, second, gradient, &step);
    } else {
        value
            .par_chunks_mut(CHUNK)
            .zip(first.par_chunks_mut(CHUNK))
            .zip(second.par_chunks_mut(CHUNK))
            .zip(gradient.par_chunks(CHUNK))
            .for_each(|(((value, first), second), gradient)| update(value, first, second, gradient, &step));
    }
    tensors.map(Tensor::from_primitive::<Flex>)
}

/// Returns the sum of squares: lanes of f32 within a chunk, f64 over chunks.
pub(crate) fn sum_of_squares(x: Tensor<1>) -> f64 {
    let x = host(x);
    let x = values(&x);
    let parts =
        map_range(x.len().div_ceil(CHUNK), x.len(), |i| square_sum(&x[i * CHUNK..((i + 1) * CHUNK).min(x.len())]));
    parts.into_iter().map(f64::from).sum()
}
