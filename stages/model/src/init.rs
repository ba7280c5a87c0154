//! Deterministic initialisation: the value of a parameter depends on the seed and on its path, on nothing else.
//!
//! Knows no layer. Parameters are created lazily: weights that a file replaces are never drawn.

use std::fmt::Display;

use burn::module::{Param, ParamId};
use burn::tensor::TensorData;

use crate::random::Stream;
use crate::{Device, Tensor};

/// How a parameter is filled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fill {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// N(0, std^2).
    Normal(f64),
    /// Uniform in [-bound, bound).
    Uniform(f64),
}

impl Fill {
    /// Glorot and Bengio's uniform rule.
    pub fn xavier(inputs: usize, outputs: usize) -> Self {
        Self::Uniform((6.0 / (inputs + outputs) as f64).sqrt())
    }

    /// The frameworks' default for linear and convolution layers, weight and bias alike: U(+-1/sqrt(fan in)).
    pub fn fan_in(fan_in: usize) -> Self {
        Self::Uniform(1.0 / (fan_in as f64).sqrt())
    }

    fn values(self, stream: &mut Stream, count: usize) -> Vec<f32> {
        match self {
            Self::Zeros => vec![0.0; count],
            Self::Ones => vec![1.0; count],
            Self::Normal(std) => stream.normals(count, std),
            Self::Uniform(bound) => stream.uniforms(count, bound),
        }
    }
}

/// A place in the tree of parameters, from which modules are built.
#[derive(Debug, Clone)]
pub struct Init {
    seed: u64,
    path: String,
    device: Device,
}

impl Init {
    /// Starts at the root.
    pub fn new(seed: u64, device: &Device) -> Self {
        Self { seed, path: String::new(), device: device.clone() }
    }

    /// Returns the place `part` below this one; `part` is a piece of the reference's tensor name, dots allowed.
    pub fn at(&self, part: impl Display) -> Self {
        let path = if self.path.is_empty() { part.to_string() } else { format!("{}.{part}", self.path) };
        Self { path, ..self.clone() }
    }

    /// Returns the device that parameters are created on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Creates the trainable parameter `name` here.
    pub fn param<const D: usize>(&self, name: &str, shape: [usize; D], fill: Fill) -> Param<Tensor<D>> {
        let (seed, path) = (self.seed, self.at(name).path);
        self.lazily(shape, true, move || fill.values(&mut Stream::new(seed, &path), shape.iter().product()))
    }

    /// Creates a parameter that is stored with the weights but never trained, from computed values.
    pub fn buffer<const D: usize>(
        &self,
        shape: [usize; D],
        values: impl FnOnce() -> Vec<f32> + Send + Sync + 'static,
    ) -> Param<Tensor<D>> {
        self.lazily(shape, false, values)
    }

    fn lazily<const D: usize>(
        &self,
        shape: [usize; D],
        is_trained: bool,
        values: impl FnOnce() -> Vec<f32> + Send + Sync + 'static,
    ) -> Param<Tensor<D>> {
        Param::uninitialized(
            ParamId::new(),
            move |device, require_grad| {
                let tensor = Tensor::from_data(TensorData::new(values(), shape), device);
                if require_grad { tensor.require_grad() } else { tensor }
            },
            self.device.clone(),
            is_trained,
            shape.into(),
        )
    }
}
