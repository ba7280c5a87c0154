//! DeepGen's model parts in Burn: layers, attention, MMDiT-X, autoencoder, text encoder, flow matching, sampling, weights.
//!
//! Knows no job, no file layout of a run and no settings beyond `deepgen-contract`. The device (CPU, wgpu, CUDA, with or
//! without autodiff) is a value that tensors carry; no function here is generic over a backend.

pub mod attention;
pub mod bridge;
pub mod checkpointing;
pub mod clip;
pub mod conditioner;
#[cfg(feature = "flex")]
mod cpu;
pub mod decode;
pub mod deepgen;
pub mod dit;
pub mod dit_block;
pub mod embed;
pub mod flow;
pub mod fused;
pub mod host;
pub mod init;
pub mod language;
pub mod layout;
pub mod lora;
pub mod nn;
pub mod parts;
pub mod probe;
pub mod random;
pub mod rope;
pub mod sampler;
pub mod trainable;
pub mod vae;
pub mod vision;
pub mod vlm;
pub mod weights;

pub use burn::tensor::Device;
#[cfg(feature = "flex")]
pub use cpu::in_thread_pool;

/// Float tensor of rank `D`.
pub type Tensor<const D: usize> = burn::tensor::Tensor<D>;
/// Integer tensor of rank `D`.
pub type IntTensor<const D: usize> = burn::tensor::Tensor<D, burn::tensor::Int>;
/// Boolean tensor of rank `D`.
pub type BoolTensor<const D: usize> = burn::tensor::Tensor<D, burn::tensor::Bool>;
