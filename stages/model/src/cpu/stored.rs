//! Linear layer over a frozen weight that is held in bf16: widened block by block, in the forward and again in the
//! backward, so that no f32 copy of it outlives the operation.
//!
//! Widening is exact, and the product is the one of `linear`: results equal those of an f32 weight to the bit.

use burn::backend::flex::FlexTensor;
use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::linear::{backward, forward};
use super::{HostOp, array, dims, for_chunks};

/// Elements that a thread widens at a time.
const CHUNK: usize = 1 << 16;

const NO_GRADIENT: &str = "a weight held in bf16 gets no gradient: `set_trainable` holds those that train in f32";

/// x W^T of two inputs, x W^T + b of three; W is bf16 and gets no gradient.
#[derive(Clone, Debug)]
pub(crate) struct StoredLinear<const N: usize>;

/// Returns an f32 copy of a contiguous bf16 array.
fn widened(weight: &FlexTensor) -> FlexTensor {
    let stored = weight.as_slice::<bf16>().expect("inputs were made contiguous and the weight is bf16");
    let mut values = vec![0.0; stored.len()];
    for_chunks(&mut values, CHUNK, |i, out| stored[i * CHUNK..][..out.len()].convert_to_f32_slice(out));
    array(values, dims(weight))
}

impl HostOp<2> for StoredLinear<2> {
    type Saved = ();

    fn forward(&self, [x, weight]: &[FlexTensor; 2]) -> (FlexTensor, ()) {
        (forward(x, &widened(weight), None), ())
    }

    fn backward(
        &self,
        [x, weight]: &[FlexTensor; 2],
        (): &(),
        grad: &FlexTensor,
        needs: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        assert!(!needs[1], "{NO_GRADIENT}");
        let [d_x, _] = backward(x, &widened(weight), grad, [needs[0], false]);
        [d_x, None]
    }
}

impl HostOp<3> for StoredLinear<3> {
    type Saved = ();

    fn forward(&self, [x, weight, bias]: &[FlexTensor; 3]) -> (FlexTensor, ()) {
        (forward(x, &widened(weight), Some(bias)), ())
    }

    fn backward(
        &self,
        [x, weight, bias]: &[FlexTensor; 3],
        (): &(),
        grad: &FlexTensor,
        needs: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        assert!(!needs[1], "{NO_GRADIENT}");
        let [d_x, _] = backward(x, &widened(weight), grad, [needs[0], false]);
        [d_x, None, needs[2].then(|| super::linear::bias_gradient(grad, dims(bias)))]
    }
}
