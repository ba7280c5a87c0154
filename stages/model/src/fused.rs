//! Hot operations, one function each: fused on the CPU (module `cpu`), composed of Burn's own elsewhere.
//!
//! Knows no module. Both forms compute the same; `tests` compares them, values and gradients.
//! Shapes: b batch, n positions, d width, c channels, h and w sides.

use burn::tensor::TensorData;
use burn::tensor::activation;
use burn::tensor::module::conv2d as burn_conv2d;
use burn::tensor::ops::ConvOptions;

#[cfg(feature = "flex")]
use crate::cpu;
use crate::nn::{last_axis, to_dtype, to_f32};
use crate::{BoolTensor, IntTensor, Tensor};

/// Returns whether all the given tensors can go to the CPU's fused operations.
macro_rules! on_cpu {
    ($($tensor:expr),+) => {{
        #[cfg(feature = "flex")]
        let answer = $(cpu::takes(&$tensor))&&+;
        #[cfg(not(feature = "flex"))]
        let answer = false;
        answer
    }};
}

/// Runs a fused operation; only reached where `on_cpu` said yes.
macro_rules! run_on_cpu {
    ($op:expr, $($input:expr),+) => {{
        #[cfg(feature = "flex")]
        return cpu::apply($op, [$($input.into()),+]);
        #[cfg(not(feature = "flex"))]
        unreachable!("there is no CPU back end in this build")
    }};
}

/// x W^T + b.
///
/// # Shapes
/// x [.., inputs], weight [outputs, inputs], bias [outputs] -> [.., outputs]
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    if on_cpu!(x, weight) {
        match bias {
            Some(bias) => run_on_cpu!(cpu::Linear::<3>, x, weight, bias),
            None => run_on_cpu!(cpu::Linear::<2>, x, weight),
        }
    }
    composite_linear(x, weight, bias)
}

fn composite_linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let [outputs, inputs] = weight.dims();
    let mut shape = x.dims();
    let rows = shape.iter().product::<usize>() / inputs;
    shape[D - 1] = outputs;
    let y = x.reshape([rows, inputs]).matmul(weight.transpose());
    match bias {
        Some(bias) => y + bias.reshape([1, outputs]),
        None => y,
    }
    .reshape(shape)
}

/// [`linear`] over a frozen weight that is held in another type than `x`; it gets no gradient.
pub fn stored_linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if cpu::takes(&x) && cpu::holds(&weight) {
        return match bias {
            Some(bias) => cpu::apply(cpu::StoredLinear::<3>, [x.into(), weight.into(), bias.into()]),
            None => cpu::apply(cpu::StoredLinear::<2>, [x.into(), weight.into()]),
        };
    }
    let weight = to_dtype(weight, x.dtype());
    linear(x, weight, bias)
}

/// Root-mean-square norm over the last axis in f32, cast back, times the weight.
///
/// # Shapes
/// x [.., d], weight [d] -> [.., d]
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    if on_cpu!(x, weight) {
        run_on_cpu!(cpu::RmsNorm { eps: eps as f32 }, x, weight)
    }
    composite_rms_norm(x, weight, eps)
}

fn composite_rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let dtype = x.dtype();
    let x = to_f32(x);
    let inverse = x.clone().square().mean_dim(D - 1).add_scalar(eps).sqrt().recip();
    let width = weight.dims()[0];
    to_dtype(x * inverse, dtype) * weight.reshape(last_axis::<D>(width))
}

/// Layer norm over the last axis in f32, cast back, times a weight, plus a bias.
///
/// # Shapes
/// x [.., d], weight and bias [d] -> [.., d]
pub fn layer_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<D> {
    if on_cpu!(x, weight, bias) {
        run_on_cpu!(cpu::LayerNorm { eps: eps as f32, offset: 0.0 }, x, weight, bias)
    }
    composite_layer_norm(x, weight, bias, eps)
}

fn composite_layer_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<D> {
    let shape = last_axis::<D>(weight.dims()[0]);
    normalize(x, eps) * weight.reshape(shape) + bias.reshape(shape)
}

/// Subtracts the mean of the last axis and divides by the deviation, in f32.
pub fn normalize<const D: usize>(x: Tensor<D>, eps: f64) -> Tensor<D> {
    let dtype = x.dtype();
    let x = to_f32(x);
    let x = x.clone() - x.mean_dim(D - 1);
    let inverse = x.clone().square().mean_dim(D - 1).add_scalar(eps).sqrt().recip();
    to_dtype(x * inverse, dtype)
}

/// Layer norm without affine part, times (1 + scale), plus shift.
///
/// # Shapes
/// x [b, n, d], scale and shift [b, d] -> [b, n, d]
pub fn adaptive_norm(x: Tensor<3>, scale: Tensor<2>, shift: Tensor<2>, eps: f64) -> Tensor<3> {
    if on_cpu!(x, scale, shift) {
        run_on_cpu!(cpu::LayerNorm { eps: eps as f32, offset: 1.0 }, x, scale, shift)
    }
    composite_adaptive_norm(x, scale, shift, eps)
}

fn composite_adaptive_norm(x: Tensor<3>, scale: Tensor<2>, shift: Tensor<2>, eps: f64) -> Tensor<3> {
    let [b, d] = scale.dims();
    normalize(x, eps) * (scale.reshape([b, 1, d]) + 1.0) + shift.reshape([b, 1, d])
}

/// x + gate * y.
///
/// # Shapes
/// x and y [b, n, d], gate [b, d] -> [b, n, d]
pub fn gated_residual(x: Tensor<3>, gate: Tensor<2>, y: Tensor<3>) -> Tensor<3> {
    if on_cpu!(x, gate, y) {
        run_on_cpu!(cpu::GatedResidual, x, gate, y)
    }
    let [b, d] = gate.dims();
    x + gate.reshape([b, 1, d]) * y
}

/// Group norm in f32 with weight and bias, then SiLU if asked.
///
/// # Shapes
/// x [b, c, h, w], weight and bias [c] -> [b, c, h, w]
pub fn group_norm(
    x: Tensor<4>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    groups: usize,
    eps: f64,
    then_silu: bool,
) -> Tensor<4> {
    if on_cpu!(x, weight, bias) {
        run_on_cpu!(cpu::GroupNorm { groups, eps: eps as f32, then_silu }, x, weight, bias)
    }
    composite_group_norm(x, weight, bias, groups, eps, then_silu)
}

fn composite_group_norm(
    x: Tensor<4>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    groups: usize,
    eps: f64,
    then_silu: bool,
) -> Tensor<4> {
    let [b, c, h, w] = x.dims();
    let normed = normalize(x.reshape([b, groups, c / groups * h * w]), eps).reshape([b, c, h, w]);
    let y = normed * weight.reshape([1, c, 1, 1]) + bias.reshape([1, c, 1, 1]);
    if then_silu { activation::silu(y) } else { y }
}

/// x sigmoid(x).
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if on_cpu!(x) {
        run_on_cpu!(cpu::Activation::Silu, x)
    }
    activation::silu(x)
}

/// The tanh approximation of GELU.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if on_cpu!(x) {
        run_on_cpu!(cpu::Activation::GeluTanh, x)
    }
    composite_gelu_tanh(x)
}

fn composite_gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let cubic = x.clone().square().mul_scalar(0.044715).add_scalar(1.0);
    let u = (x.clone() * cubic).mul_scalar((2.0 / std::f64::consts::PI).sqrt());
    (u.tanh() + 1.0) * x.mul_scalar(0.5)
}

/// Attention with an optional mask (true = may look), as documented at [`crate::attention::attention`].
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<BoolTensor<4>>) -> Tensor<4> {
    if on_cpu!(q, k, v) {
        #[cfg(feature = "flex")]
        let mask = mask.map(host_mask);
        run_on_cpu!(cpu::Attention { mask }, q, k, v)
    }
    crate::attention::composite(q, k, v, mask)
}

/// Rotates the two halves of every head against each other by tables of cosines and sines.
///
/// # Shapes
/// x [b, h, l, 2 f], tables [b or 1, 1, l, f] -> [b, h, l, 2 f]
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    if on_cpu!(x, cos, sin) {
        #[cfg(feature = "flex")]
        let (cos, sin) = (cpu::host(cos), cpu::host(sin));
        run_on_cpu!(cpu::Rotary { cos, sin }, x)
    }
    composite_rotate(x, cos, sin)
}

fn composite_rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    let f = x.dims()[3] / 2;
    let (first, second) = (x.clone().narrow(3, 0, f), x.narrow(3, f, f));
    let rotated_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    Tensor::cat(vec![rotated_first, second * cos + first * sin], 3)
}

/// silu(gate) * y.
pub fn gated_silu<const D: usize>(gate: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
    if on_cpu!(gate, y) {
        run_on_cpu!(cpu::GatedSilu, gate, y)
    }
    activation::silu(gate) * y
}

/// Mean negative log-probability of one target per row, the softmax in f32.
///
/// # Shapes
/// logits [n, v], n targets below v -> [1]
///
/// # Panics
/// When a target is not below v.
pub fn cross_entropy(logits: Tensor<2>, targets: Vec<usize>) -> Tensor<1> {
    let v = logits.dims()[1];
    assert!(targets.iter().all(|&target| target < v), "a target is not below {v}");
    if on_cpu!(logits) {
        run_on_cpu!(cpu::CrossEntropy { targets: std::sync::Arc::new(targets) }, logits)
    }
    composite_cross_entropy(logits, targets)
}

fn composite_cross_entropy(logits: Tensor<2>, targets: Vec<usize>) -> Tensor<1> {
    let n = targets.len();
    let targets: Vec<i64> = targets.into_iter().map(|target| target as i64).collect();
    let targets = IntTensor::<2>::from_data(TensorData::new(targets, [n, 1]), &logits.device());
    activation::log_softmax(to_f32(logits), 1).gather(1, targets).mean().neg()
}

/// Brings a mask [b or 1, h or 1, l, s] to the host.
#[cfg(feature = "flex")]
fn host_mask(mask: BoolTensor<4>) -> cpu::Mask {
    cpu::Mask::new(
        mask.without_autodiff().try_into_primitive::<burn::backend::Flex>().expect("a mask of the queries' device"),
    )
}

/// Convolution with square stride and zero padding.
///
/// # Shapes
/// x [b, c, h, w], weight [o, c, k, k], bias [o] -> [b, o, h', w']
pub fn conv2d(x: Tensor<4>, weight: Tensor<4>, bias: Option<Tensor<1>>, stride: usize, padding: usize) -> Tensor<4> {
    if let Some(bias) = &bias
        && on_cpu!(x, weight)
    {
        run_on_cpu!(cpu::Conv { stride, padding }, x, weight, bias.clone())
    }
    burn_conv2d(x, weight, bias, ConvOptions::new([stride; 2], [padding; 2], [1; 2], 1))
}

/// Doubles the side by repeating each pixel.
///
/// # Shapes
/// [b, c, h, w] -> [b, c, 2 h, 2 w]
pub fn upsample_nearest(x: Tensor<4>) -> Tensor<4> {
    if on_cpu!(x) {
        run_on_cpu!(cpu::Upsample, x)
    }
    composite_upsample(x)
}

fn composite_upsample(x: Tensor<4>) -> Tensor<4> {
    let [b, c, h, w] = x.dims();
    x.reshape([b, c, h, 1, w, 1]).expand([b, c, h, 2, w, 2]).reshape([b, c, 2 * h, 2 * w])
}

/// Softmax over the last axis.
pub fn softmax<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if on_cpu!(x) {
        run_on_cpu!(cpu::Softmax, x)
    }
    activation::softmax(x, D - 1)
}

/// Numbers of one AdamW update.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Updates made, this one included.
    pub updates: u64,
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// What the value is multiplied with: 1 - lr * weight decay, or 1.
    pub decay: f64,
    /// What the gradient is multiplied with: below 1 where it is clipped.
    pub gradient_scale: f64,
}

impl AdamWStep {
    /// Returns 1 - beta^updates of the first or the second moment.
    pub fn correction(&self, moment: usize) -> f64 {
        1.0 - self.betas[moment].powf(self.updates as f64)
    }
}

/// Running means of a parameter's gradient and of its square, as vectors.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Of the gradient.
    pub first: Tensor<1>,
    /// Of its square.
    pub second: Tensor<1>,
}

/// Updates a value, off the tape, by AdamW; without moments it starts from zero ones.
///
/// On the CPU, vectors that nobody else holds are updated where they lie.
///
/// # Shapes
/// all [n]
pub fn adamw(
    value: Tensor<1>,
    gradient: Tensor<1>,
    moments: Option<Moments>,
    step: &AdamWStep,
) -> (Tensor<1>, Moments) {
    let Moments { first, second } =
        moments.unwrap_or_else(|| Moments { first: gradient.zeros_like(), second: gradient.zeros_like() });
    #[cfg(feature = "flex")]
    if on_cpu!(value, gradient, first, second) {
        let [value, first, second] = cpu::adamw([value, first, second], gradient, step);
        return (value, Moments { first, second });
    }
    composite_adamw(value, gradient, Moments { first, second }, step)
}

fn composite_adamw(value: Tensor<1>, gradient: Tensor<1>, moments: Moments, step: &AdamWStep) -> (Tensor<1>, Moments) {
    let [beta1, beta2] = step.betas;
    let gradient = if step.gradient_scale == 1.0 { gradient } else { gradient.mul_scalar(step.gradient_scale) };
    let moments = Moments {
        first: moments.first.mul_scalar(beta1) + gradient.clone().mul_scalar(1.0 - beta1),
        second: moments.second.mul_scalar(beta2) + gradient.square().mul_scalar(1.0 - beta2),
    };
    let root = (moments.second.clone() / step.correction(1)).sqrt().add_scalar(step.eps);
    let change = moments.first.clone().mul_scalar(step.lr / step.correction(0)) / root;
    let value = if step.decay == 1.0 { value } else { value.mul_scalar(step.decay) };
    (value - change, moments)
}

/// Returns the sum of squares of a vector off the tape.
pub fn sum_of_squares(x: Tensor<1>) -> f64 {
    #[cfg(feature = "flex")]
    if on_cpu!(x) {
        return cpu::sum_of_squares(x);
    }
    f64::from(to_f32(x).square().sum().into_scalar::<f32>())
}

#[cfg(all(test, feature = "flex"))]
mod tests;
