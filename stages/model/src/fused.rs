//! Hot operations, one function each: fused on the CPU (module `cpu`), composed of Burn's own elsewhere.
//!
//! Knows no module. Both forms compute the same; `tests` compares them, values and gradients.
//! Shapes: b batch, n positions, d width, c channels, h and w sides.

use burn::tensor::activation;
use burn::tensor::module::conv2d as burn_conv2d;
use burn::tensor::ops::ConvOptions;

#[cfg(feature = "flex")]
use crate::cpu;
use crate::nn::{last_axis, to_dtype, to_f32};
use crate::{BoolTensor, Tensor};

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

/// Brings a mask [b or 1, h or 1, l, s] to the host.
#[cfg(feature = "flex")]
fn host_mask(mask: BoolTensor<4>) -> cpu::Mask {
    let [b, h, l, s] = mask.dims();
    let keep = mask.into_data().iter::<bool>().collect();
    let or_zero = |size: usize, stride: usize| if size == 1 { 0 } else { stride };
    cpu::Mask { keep: std::sync::Arc::new(keep), strides: [or_zero(b, h * l * s), or_zero(h, l * s), s] }
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

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::random::noise;
    use crate::{Device, IntTensor};

    /// Compares values and the gradients of every input of two forms of one function.
    fn assert_same<const N: usize, const D: usize>(
        name: &str,
        inputs: [(Vec<usize>, bool); N],
        fused: impl Fn(&[Tensor<4>; N]) -> Tensor<D>,
        composite: impl Fn(&[Tensor<4>; N]) -> Tensor<D>,
    ) {
        let device = Device::flex().autodiff();
        let mut index = 0;
        let inputs = inputs.map(|(shape, needs_grad)| {
            index += 1;
            let shape: [usize; 4] = std::array::from_fn(|i| shape.get(i).copied().unwrap_or(1));
            let tensor = noise(index, name, shape, &device);
            if needs_grad { tensor.require_grad() } else { tensor }
        });
        let (y, expected) = (fused(&inputs), composite(&inputs));
        let close = |what: &str, a: Tensor<1>, b: Tensor<1>| {
            let error = (a - b.clone()).abs().max().into_scalar::<f32>();
            let scale = b.abs().max().into_scalar::<f32>();
            assert!(error <= 2e-5 * scale.max(1.0), "{name}, {what}: {error:.1e} of {scale:.1e}");
        };
        close("value", flat(y.clone()), flat(expected.clone()));
        // A random weighting of the outputs: a plain sum would hide errors that cancel.
        let weights = noise(99, name, [y.shape().num_elements()], &device);
        let gradient = |y: Tensor<D>| (flat_on_tape(y) * weights.clone()).sum().backward();
        let (ours, theirs) = (gradient(y), gradient(expected));
        for (i, input) in inputs.iter().enumerate() {
            let pair = (input.grad(&ours), input.grad(&theirs));
            assert_eq!(pair.0.is_some(), pair.1.is_some(), "{name}, input {i}");
            if let (Some(a), Some(b)) = pair {
                close(&format!("gradient {i}"), flat(a), flat(b));
            }
        }
    }

    fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
        flat_on_tape(x.without_autodiff())
    }

    fn flat_on_tape<const D: usize>(x: Tensor<D>) -> Tensor<1> {
        let count = x.shape().num_elements();
        x.reshape([count])
    }

    fn vector(x: &Tensor<4>) -> Tensor<1> {
        flat_on_tape(x.clone())
    }

    fn matrix(x: &Tensor<4>) -> Tensor<2> {
        let [a, b, _, _] = x.dims();
        x.clone().reshape([a, b])
    }

    fn cube(x: &Tensor<4>) -> Tensor<3> {
        let [a, b, c, _] = x.dims();
        x.clone().reshape([a, b, c])
    }

    #[test]
    fn linear_agrees_with_its_composite_form() {
        for rows in [3, 40] {
            let shapes = [(vec![2, rows, 33], true), (vec![70, 33], true), (vec![70], true)];
            assert_same(
                "linear",
                shapes,
                |[x, w, b]| linear(cube(x), matrix(w), Some(vector(b))),
                |[x, w, b]| composite_linear(cube(x), matrix(w), Some(vector(b))),
            );
        }
        // A frozen weight gets no gradient, and strided inputs are read right.
        assert_same(
            "frozen linear",
            [(vec![5, 4, 6], true), (vec![7, 5], false)],
            |[x, w]| linear(cube(x).swap_dims(0, 2), matrix(w), None),
            |[x, w]| composite_linear(cube(x).swap_dims(0, 2), matrix(w), None),
        );
    }

    #[test]
    fn norms_agree_with_their_composite_forms() {
        for (b, n, d) in [(2, 3, 20), (6, 16, 256)] {
            assert_same(
                "rms",
                [(vec![b, n, d], true), (vec![d], true)],
                |[x, w]| rms_norm(cube(x), vector(w), 1e-6),
                |[x, w]| composite_rms_norm(cube(x), vector(w), 1e-6),
            );
            assert_same(
                "layer",
                [(vec![b, n, d], true), (vec![d], true), (vec![d], true)],
                |[x, w, c]| layer_norm(cube(x), vector(w), vector(c), 1e-6),
                |[x, w, c]| composite_layer_norm(cube(x), vector(w), vector(c), 1e-6),
            );
            assert_same(
                "adaptive",
                [(vec![b, n, d], true), (vec![b, d], true), (vec![b, d], true)],
                |[x, s, t]| adaptive_norm(cube(x), matrix(s), matrix(t), 1e-6),
                |[x, s, t]| composite_adaptive_norm(cube(x), matrix(s), matrix(t), 1e-6),
            );
        }
        for (side, then_silu) in [(5, false), (5, true), (32, true)] {
            assert_same(
                "group",
                [(vec![3, 8, side, side], true), (vec![8], true), (vec![8], true)],
                |[x, w, c]| group_norm(x.clone(), vector(w), vector(c), 4, 1e-6, then_silu),
                |[x, w, c]| composite_group_norm(x.clone(), vector(w), vector(c), 4, 1e-6, then_silu),
            );
        }
    }

    #[test]
    fn pointwise_operations_agree_with_their_composite_forms() {
        for n in [3, 300] {
            let shape = [(vec![2, n, 37], true)];
            assert_same("silu", shape.clone(), |[x]| silu(x.clone()), |[x]| activation::silu(x.clone()));
            assert_same("gelu", shape, |[x]| gelu_tanh(x.clone()), |[x]| composite_gelu_tanh(x.clone()));
            assert_same(
                "gated",
                [(vec![2, n, 37], true), (vec![2, 37], true), (vec![2, n, 37], true)],
                |[x, g, y]| gated_residual(cube(x), matrix(g), cube(y)),
                |[x, g, y]| cube(x) + matrix(g).reshape([2, 1, 37]) * cube(y),
            );
        }
    }

    #[test]
    fn attention_agrees_with_its_composite_form_with_and_without_mask() {
        let shapes = [(vec![3, 5, 2, 8], true), (vec![3, 7, 2, 8], true), (vec![3, 7, 2, 8], true)];
        // Query 0 sees nothing, query i sees keys below i + 2.
        let device = Device::flex();
        let rows = IntTensor::<1>::arange(0..5, &device).reshape([1, 1, 5, 1]).expand([1, 1, 5, 7]);
        let columns = IntTensor::<1>::arange(0..7, &device).reshape([1, 1, 1, 7]).expand([1, 1, 5, 7]);
        let mask = columns.lower(rows.clone() + 2).bool_and(rows.greater_elem(0));
        for mask in [None, Some(mask)] {
            let swap = |x: &Tensor<4>| x.clone().swap_dims(1, 2);
            assert_same(
                "attention",
                shapes.clone(),
                |[q, k, v]| attention(swap(q), swap(k), swap(v), mask.clone()),
                |[q, k, v]| crate::attention::composite(swap(q), swap(k), swap(v), mask.clone()),
            );
        }
    }

    #[test]
    fn convolution_and_upsampling_agree_with_burns() {
        for (kernel, stride, padding, side) in [(3, 1, 1, 6), (3, 2, 0, 9), (3, 2, 1, 8), (1, 1, 0, 5), (3, 1, 1, 40)] {
            let weight = vec![4, 3, kernel, kernel];
            assert_same(
                "conv",
                [(vec![2, 3, side, side + 1], true), (weight, true), (vec![4], true)],
                |[x, w, b]| conv2d(x.clone(), w.clone(), Some(vector(b)), stride, padding),
                |[x, w, b]| {
                    let options = ConvOptions::new([stride; 2], [padding; 2], [1; 2], 1);
                    burn_conv2d(x.clone(), w.clone(), Some(vector(b)), options)
                },
            );
        }
        let shape = [(vec![2, 3, 5, 4], true)];
        assert_same("upsample", shape, |[x]| upsample_nearest(x.clone()), |[x]| composite_upsample(x.clone()));
    }
}
