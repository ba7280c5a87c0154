//! Mean negative log-probability of a target per row of logits, without keeping the probabilities.

use std::sync::Arc;

use burn::backend::flex::FlexTensor;

use super::simd::{exp, kernel, max, sum};
use super::{HostOp, array, dims, map_range, unwritten, values};

kernel! {
    /// ln of the sum of e^x.
    pub(super) fn log_sum_exp(x: &[f32]) -> f32 {
        let top = max(x);
        top + sum([x], |[x]| exp(x - top)).ln()
    }
}

kernel! {
    /// out = scale * softmax(x), given the logarithm of its sum.
    pub(super) fn scaled_softmax(x: &[f32], log_sum: f32, scale: f32, out: &mut [f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = exp(x - log_sum) * scale;
        }
    }
}

/// Mean cross-entropy [1] of logits [n, v] with one target per row.
#[derive(Clone, Debug)]
pub(crate) struct CrossEntropy {
    pub(crate) targets: Arc<Vec<usize>>,
}

impl HostOp<1> for CrossEntropy {
    /// Logarithm of the sum of each row.
    type Saved = Arc<Vec<f32>>;

    fn forward(&self, [x]: &[FlexTensor; 1]) -> (FlexTensor, Self::Saved) {
        let (input, v) = (values(x), dims(x)[1]);
        let n = self.targets.len();
        let log_sums = map_range(n, input.len(), |i| log_sum_exp(&input[i * v..(i + 1) * v]));
        let losses = log_sums.iter().zip(self.targets.iter()).enumerate();
        let total: f64 = losses.map(|(i, (log_sum, &target))| f64::from(log_sum - input[i * v + target])).sum();
        (array(vec![(total / n as f64) as f32], &[1]), Arc::new(log_sums))
    }

    fn backward(
        &self,
        [x]: &[FlexTensor; 1],
        log_sums: &Self::Saved,
        grad: &FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let (input, v) = (values(x), dims(x)[1]);
        let scale = values(grad)[0] / self.targets.len() as f32;
        let mut out = unwritten(input.len());
        super::for_chunks(&mut out, v, |i, out| {
            scaled_softmax(&input[i * v..(i + 1) * v], log_sums[i], scale, out);
            out[self.targets[i]] -= scale;
        });
        [Some(array(out, dims(x)))]
    }
}
