//! The layers everything is made of: linear (with an optional adapter), embedding, norms, convolution, activations.
//!
//! Knows no architecture. A layer computes in the type of its input, whatever type its parameters are held in. Field names and module paths give the reference's tensor names (see `weights`).
//! Shapes: b batch, l positions, c channels, h height, w width, r rank of an adapter.

use burn::module::{Module, Param};
use burn::tensor::{DType, FloatDType};

use crate::fused;
use crate::init::{Fill, Init};
use crate::random;
use crate::{IntTensor, Tensor};

/// Low-rank addition to a linear layer: `scale * B A x`.
#[derive(Module, Debug)]
pub struct LoraAdapter {
    /// `lora_A` [r, inputs].
    pub a: Param<Tensor<2>>,
    /// `lora_B` [outputs, r].
    pub b: Param<Tensor<2>>,
    /// alpha / r.
    pub scale: f64,
    /// Probability of dropping an input element in training (see [`random::with_dropout`]).
    pub dropout: f64,
}

impl LoraAdapter {
    /// Returns the adapter's output; the dense product B A is never formed.
    ///
    /// # Shapes
    /// [.., inputs] -> [.., outputs]
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let low = product(random::dropout(x, self.dropout), self.a.val(), None);
        product(low, self.b.val(), None).mul_scalar(self.scale)
    }
}

/// `y = x W^T + b`, plus the adapter's output where there is one.
#[derive(Module, Debug)]
pub struct Linear {
    /// [outputs, inputs], as the reference stores it.
    pub weight: Param<Tensor<2>>,
    /// [outputs].
    pub bias: Option<Param<Tensor<1>>>,
    /// Low-rank adapter.
    pub lora: Option<LoraAdapter>,
}

impl Linear {
    /// Creates a layer with the given fills; no bias when `bias` is `None`.
    pub fn new(init: &Init, inputs: usize, outputs: usize, weight: Fill, bias: Option<Fill>) -> Self {
        Self {
            weight: init.param("weight", [outputs, inputs], weight),
            bias: bias.map(|fill| init.param("bias", [outputs], fill)),
            lora: None,
        }
    }

    /// Creates a layer with bias by the frameworks' default rule.
    pub fn with_default_init(init: &Init, inputs: usize, outputs: usize) -> Self {
        Self::new(init, inputs, outputs, Fill::fan_in(inputs), Some(Fill::fan_in(inputs)))
    }

    /// Creates a layer with a Xavier-uniform weight and a zero bias.
    pub fn with_xavier_init(init: &Init, inputs: usize, outputs: usize) -> Self {
        Self::new(init, inputs, outputs, Fill::xavier(inputs, outputs), Some(Fill::Zeros))
    }

    /// # Shapes
    /// [.., inputs] -> [.., outputs]
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let bias = self.bias.as_ref().map(Param::val);
        match &self.lora {
            Some(lora) => product(x.clone(), self.weight.val(), bias) + lora.forward(x),
            None => product(x, self.weight.val(), bias),
        }
    }

    /// Returns the outputs and inputs.
    pub fn shape(&self) -> [usize; 2] {
        self.weight.lazy_shape().dims()
    }
}

/// Low-rank addition to an embedding: row `i` gets `scale * B A[:, i]`.
#[derive(Module, Debug)]
pub struct EmbeddingLora {
    /// `lora_embedding_A` [r, vocabulary].
    pub embedding_a: Param<Tensor<2>>,
    /// `lora_embedding_B` [hidden, r].
    pub embedding_b: Param<Tensor<2>>,
    /// alpha / r.
    pub scale: f64,
}

/// Table of vectors looked up by id.
#[derive(Module, Debug)]
pub struct Embedding {
    /// [vocabulary, hidden].
    pub weight: Param<Tensor<2>>,
    /// Low-rank adapter.
    pub lora: Option<EmbeddingLora>,
}

impl Embedding {
    /// Creates a table.
    pub fn new(init: &Init, vocabulary: usize, hidden: usize, fill: Fill) -> Self {
        Self { weight: init.param("weight", [vocabulary, hidden], fill), lora: None }
    }

    /// Returns the rows in `dtype`, whatever type the table is held in.
    ///
    /// # Shapes
    /// ids [b, l] -> [b, l, hidden]
    pub fn forward(&self, ids_bl: IntTensor<2>, dtype: DType) -> Tensor<3> {
        let [b, l] = ids_bl.dims();
        let ids = ids_bl.reshape([b * l]);
        let rows = to_dtype(self.weight.val().select(0, ids.clone()), dtype);
        let rows = match &self.lora {
            Some(lora) => {
                let low = to_dtype(lora.embedding_a.val().select(1, ids).transpose(), dtype);
                rows + product(low, lora.embedding_b.val(), None).mul_scalar(lora.scale)
            }
            None => rows,
        };
        let hidden = rows.dims()[1];
        rows.reshape([b, l, hidden])
    }
}

/// Root-mean-square norm over the last axis: statistics in f32, cast back, then times the weight.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// [c].
    pub weight: Param<Tensor<1>>,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// Creates a norm with weight one.
    pub fn new(init: &Init, channels: usize, eps: f64) -> Self {
        Self { weight: init.param("weight", [channels], Fill::Ones), eps }
    }

    /// # Shapes
    /// [.., c] -> [.., c]
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let weight = like(&x, self.weight.val());
        fused::rms_norm(x, weight, self.eps)
    }
}

/// Layer norm over the last axis, statistics in f32.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// [c]; absent in the affine-free form.
    pub weight: Option<Param<Tensor<1>>>,
    /// [c].
    pub bias: Option<Param<Tensor<1>>>,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm {
    /// Creates a norm with weight one and bias zero.
    pub fn new(init: &Init, channels: usize, eps: f64) -> Self {
        let weight = Some(init.param("weight", [channels], Fill::Ones));
        Self { weight, bias: Some(init.param("bias", [channels], Fill::Zeros)), eps }
    }

    /// # Shapes
    /// [.., c] -> [.., c]
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        if let (Some(weight), Some(bias)) = (&self.weight, &self.bias) {
            let (weight, bias) = (like(&x, weight.val()), like(&x, bias.val()));
            return fused::layer_norm(x, weight, bias, self.eps);
        }
        let x = fused::normalize(x, self.eps);
        let shape = last_axis::<D>(x.dims()[D - 1]);
        let x = self.weight.iter().fold(x, |x, weight| x.clone() * like(&x, weight.val()).reshape(shape));
        self.bias.iter().fold(x, |x, bias| x.clone() + like(&x, bias.val()).reshape(shape))
    }
}

/// Two-dimensional convolution with square stride and zero padding.
#[derive(Module, Debug)]
pub struct Conv2d {
    /// [outputs, inputs, kernel, kernel].
    pub weight: Param<Tensor<4>>,
    /// [outputs].
    pub bias: Option<Param<Tensor<1>>>,
    /// Step of the window.
    pub stride: usize,
    /// Zeros added on each side.
    pub padding: usize,
}

impl Conv2d {
    /// Creates a convolution with bias by the frameworks' default rule, padded to keep the side at stride 1.
    pub fn new(init: &Init, inputs: usize, outputs: usize, kernel: usize) -> Self {
        let fill = Fill::fan_in(inputs * kernel * kernel);
        Self {
            weight: init.param("weight", [outputs, inputs, kernel, kernel], fill),
            bias: Some(init.param("bias", [outputs], fill)),
            stride: 1,
            padding: kernel / 2,
        }
    }

    /// Sets stride and padding.
    pub fn with_stride(self, stride: usize, padding: usize) -> Self {
        Self { stride, padding, ..self }
    }

    /// # Shapes
    /// [b, inputs, h, w] -> [b, outputs, h', w']
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let bias = self.bias.as_ref().map(|bias| like(&x_bchw, bias.val()));
        let weight = like(&x_bchw, self.weight.val());
        fused::conv2d(x_bchw, weight, bias, self.stride, self.padding)
    }
}

/// Group norm over channel groups, statistics in f32.
#[derive(Module, Debug)]
pub struct GroupNorm {
    /// [c].
    pub weight: Param<Tensor<1>>,
    /// [c].
    pub bias: Param<Tensor<1>>,
    /// Groups that the channels are split into.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
}

impl GroupNorm {
    /// Creates a norm with weight one and bias zero.
    pub fn new(init: &Init, channels: usize, groups: usize, eps: f64) -> Self {
        let weight = init.param("weight", [channels], Fill::Ones);
        Self { weight, bias: init.param("bias", [channels], Fill::Zeros), groups, eps }
    }

    /// # Shapes
    /// [b, c, h, w] -> [b, c, h, w]
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        self.normalised(x_bchw, false)
    }

    /// Norm followed by SiLU, in one pass where the device allows it.
    ///
    /// # Shapes
    /// [b, c, h, w] -> [b, c, h, w]
    pub fn forward_silu(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        self.normalised(x_bchw, true)
    }

    fn normalised(&self, x_bchw: Tensor<4>, then_silu: bool) -> Tensor<4> {
        let (weight, bias) = (like(&x_bchw, self.weight.val()), like(&x_bchw, self.bias.val()));
        fused::group_norm(x_bchw, weight, bias, self.groups, self.eps, then_silu)
    }
}

/// x W^T + b in the type of `x`, whatever types W and b are held in.
///
/// A gradient reaches a held f32 value through the cast; a frozen bf16 one is widened where it is used and not kept.
pub fn product<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let bias = bias.map(|bias| like(&x, bias));
    if weight.dtype() != x.dtype() && !weight.is_require_grad() {
        return fused::stored_linear(x, weight, bias);
    }
    let weight = like(&x, weight);
    fused::linear(x, weight, bias)
}

/// Returns `held` in the type of `x`: what is computed with it is computed in that type.
pub fn like<const D: usize, const E: usize>(x: &Tensor<D>, held: Tensor<E>) -> Tensor<E> {
    to_dtype(held, x.dtype())
}

/// Returns the shape that broadcasts a vector over all axes but the last.
pub fn last_axis<const D: usize>(channels: usize) -> [usize; D] {
    let mut shape = [1; D];
    shape[D - 1] = channels;
    shape
}

/// x * sigmoid(x).
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    fused::silu(x)
}

/// The tanh approximation of GELU.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    fused::gelu_tanh(x)
}

/// GELU with the error function (the vision merger's).
pub fn gelu_erf<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    burn::tensor::activation::gelu(x)
}

/// Casts to f32, or returns `x` when it is f32 already.
pub fn to_f32<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.dtype() == DType::F32 { x } else { x.cast(FloatDType::F32) }
}

/// Casts to `dtype`, or returns `x` when it has that type already.
pub fn to_dtype<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype { x } else { x.cast(FloatDType::from(dtype)) }
}
