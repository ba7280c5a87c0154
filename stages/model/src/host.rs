//! From a device to memory of the host that stays as it is.
//!
//! What `into_data` returns on a GPU is a view of a staging buffer. In cubecl 0.11.3 nothing holds on to that buffer, and
//! the next read fills it again: twenty tensors that are read one after the other and then looked at all show the last
//! one. So whatever outlives the next read is read with [`copy_out`].

use burn::tensor::TensorData;

use crate::{Device, Tensor};

/// Returns a tensor's value in memory of its own. On the CPU, off the tape, `into_data` gives just that.
pub fn copy_out<const D: usize>(x: Tensor<D>) -> TensorData {
    let is_on_cpu = x.device() == Device::flex();
    let data = x.into_data();
    match is_on_cpu {
        true => data,
        false => TensorData::from_bytes_vec(data.as_bytes().to_vec(), data.shape().clone(), data.dtype()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_shape_and_the_values_on_and_off_the_tape() {
        for device in [Device::flex(), Device::flex().autodiff()] {
            let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], &device);
            let data = copy_out(x.swap_dims(0, 1));
            assert_eq!(data, TensorData::from([[1.0f32, 4.0], [2.0, 5.0], [3.0, 6.0]]));
        }
    }
}
