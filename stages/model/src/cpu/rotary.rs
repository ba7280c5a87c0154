//! Rotation of the halves of every head against each other by the angle of its position.

use burn::backend::flex::FlexTensor;

use super::simd::kernel;
use super::{HostOp, dims, for_chunks, strided_array, unwritten, values};

kernel! {
    /// Rotates rows of heads [n, 2 f] by angles of cosines and sines [f]; `sign` -1 turns back.
    pub(super) fn rotate(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, out: &mut [f32]) {
        let f = cos.len();
        for (x, out) in x.chunks_exact(2 * f).zip(out.chunks_exact_mut(2 * f)) {
            let (first, second) = x.split_at(f);
            let (out_first, out_second) = out.split_at_mut(f);
            for i in 0..f {
                let s = sin[i] * sign;
                out_first[i] = first[i] * cos[i] - second[i] * s;
                out_second[i] = second[i] * cos[i] + first[i] * s;
            }
        }
    }
}

/// Rotation of x [b, h, l, 2 f] by tables [b or 1, 1, l, f]; output and gradient are stored as [b, l, h, 2 f].
#[derive(Clone, Debug)]
pub(crate) struct Rotary {
    pub(crate) cos: FlexTensor,
    pub(crate) sin: FlexTensor,
}

impl Rotary {
    fn turn(&self, x: &FlexTensor, sign: f32) -> FlexTensor {
        let [b, h, l, d] = [dims(x)[0], dims(x)[1], dims(x)[2], dims(x)[3]];
        // Mostly a no-op: projections give [b, l, h, d].
        let by_position = x.permute(&[0, 2, 1, 3]).to_contiguous();
        let input = values(&by_position);
        let (cos, sin) = (values(&self.cos), values(&self.sin));
        let is_shared = dims(&self.cos)[0] == 1;
        let mut out = unwritten(input.len());
        for_chunks(&mut out, h * d, |i, out| {
            let row = if is_shared { i % l } else { i };
            let own = row * d / 2..(row + 1) * d / 2;
            rotate(&input[i * h * d..(i + 1) * h * d], &cos[own.clone()], &sin[own], sign, out);
        });
        strided_array(out, &[b, h, l, d], &[l * h * d, d, h * d, 1])
    }
}

impl HostOp<1> for Rotary {
    type Saved = ();
    const TAKES_STRIDES: bool = true;

    fn forward(&self, [x]: &[FlexTensor; 1]) -> (FlexTensor, ()) {
        (self.turn(x, 1.0), ())
    }

    fn backward(&self, _: &[FlexTensor; 1], _: &(), grad: &FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(self.turn(grad, -1.0))]
    }
}
