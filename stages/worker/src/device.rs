//! From a device's name in the job to a Burn device.
//!
//! The one place that knows which back ends this binary was built with. Nothing below it asks what the device is.

use deepgen_model::Device;

use crate::error::{JobError, JobResult};

/// Opens `cpu`, `wgpu[:i]` or `cuda[:i]`, without autodiff.
///
/// # Errors
/// When the name is none of these, the binary lacks the back end, or the driver cannot be found.
pub fn open(name: &str) -> JobResult<Device> {
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => {
            let index = index.parse::<usize>().map_err(|_| {
                JobError::input(format!("device `{name}`: `{index}` is not a device number, such as in `cuda:0`"))
            })?;
            (kind, index)
        }
        None => (name, 0),
    };
    match kind {
        "cpu" => Ok(Device::flex()),
        "wgpu" => open_wgpu(index),
        "cuda" => open_cuda(index),
        _ => Err(JobError::input(format!("device `{name}` is not one of `cpu`, `wgpu[:i]`, `cuda[:i]`"))),
    }
}

/// Returns a device that records for the backward, with less memory and more time if asked.
///
/// On the CPU the model's blocks are run again as a whole; other devices have Burn's recomputation of single operations.
pub fn for_training(device: &Device, activation_checkpointing: bool) -> Device {
    let device = device.clone();
    let is_cpu = device == Device::flex();
    if activation_checkpointing && !is_cpu { device.autodiff().gradient_checkpointing() } else { device.autodiff() }
}

#[cfg(feature = "wgpu")]
fn open_wgpu(index: usize) -> JobResult<Device> {
    use burn::tensor::DeviceKind;
    let kind = if index == 0 { DeviceKind::DefaultDevice } else { DeviceKind::DiscreteGpu(index - 1) };
    Ok(Device::wgpu(kind))
}

#[cfg(not(feature = "wgpu"))]
fn open_wgpu(_: usize) -> JobResult<Device> {
    Err(JobError::input("this deepgen-worker was built without wgpu: build it with `--features wgpu,fusion,autotune`"))
}

#[cfg(feature = "cuda")]
fn open_cuda(index: usize) -> JobResult<Device> {
    // Burn loads the driver on a thread of its own and would panic there.
    let names = ["libcuda.so.1", "libcuda.so"];
    let folders = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/cuda/compat"];
    let listed = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let found = folders
        .into_iter()
        .chain(listed.split(':').filter(|folder| !folder.is_empty()))
        .any(|folder| names.iter().any(|name| std::path::Path::new(folder).join(name).exists()));
    if !found {
        return Err(JobError::input("no CUDA driver (libcuda.so.1) was found: set the node's device to `cpu`"));
    }
    Ok(Device::cuda(index))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize) -> JobResult<Device> {
    Err(JobError::input("this deepgen-worker was built without CUDA: build it with `--features cuda,fusion,autotune`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_device_says_what_is_possible() {
        assert!(open("gpu").unwrap_err().message.contains("cuda"));
        assert!(open("cuda:x").unwrap_err().message.contains("cuda:0"));
        assert!(open("cpu").is_ok());
    }
}
