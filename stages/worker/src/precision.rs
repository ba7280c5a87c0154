//! From the precision settings to number types on a device.
//!
//! The named f32 islands (norm statistics, softmax, rotary angles, timestep sinusoid, loss, sampler steps) are the model's
//! own and no setting.

use burn::tensor::{DType, FloatDType};
use deepgen_contract::precision::{ComputeType, HeldType, PrecisionSettings};
use deepgen_contract::train::FloatKind;
use deepgen_model::Device;
use deepgen_model::weights::Held;

/// Returns how parameters that do not train are held.
pub fn held(settings: &PrecisionSettings) -> Held {
    match settings.frozen {
        HeldType::Stored => Held::AsStored,
        HeldType::F32 => Held::F32,
    }
}

/// Returns the type that the model computes in on `device`.
pub fn compute_type(settings: &PrecisionSettings, device: &Device) -> FloatDType {
    match settings.compute {
        ComputeType::F32 => FloatDType::F32,
        ComputeType::Bf16 => FloatDType::BF16,
        ComputeType::Auto if is_cpu(device) || !device.supports_dtype(DType::BF16) => FloatDType::F32,
        ComputeType::Auto => FloatDType::BF16,
    }
}

/// Returns the name of a computing type in records.
pub fn kind(dtype: FloatDType) -> FloatKind {
    if dtype == FloatDType::BF16 { FloatKind::Bf16 } else { FloatKind::F32 }
}

fn is_cpu(device: &Device) -> bool {
    device.clone().without_autodiff() == Device::flex()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_in_f32_unless_told_otherwise() {
        let settings = |compute| PrecisionSettings { compute, ..PrecisionSettings::default() };
        for device in [Device::flex(), Device::flex().autodiff()] {
            assert_eq!(compute_type(&settings(ComputeType::Auto), &device), FloatDType::F32);
            assert_eq!(compute_type(&settings(ComputeType::Bf16), &device), FloatDType::BF16);
        }
        assert_eq!(held(&PrecisionSettings::default()), Held::AsStored);
    }
}
