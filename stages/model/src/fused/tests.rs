//! Each fused operation against its form out of elementary ones, values and gradients, and against finite differences.

use super::*;
use crate::Device;
use crate::random::noise;

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
    // Without a tape some operations take another way.
    let plain = fused(&inputs.each_ref().map(|input| input.clone().without_autodiff()));
    close("value without a tape", flat(plain), flat(expected.clone()));
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
    for (rows, n) in [(3, 37), (300, 37), (9, 1), (9, 5), (9, 63), (9, 64), (5, 130)] {
        let shape = [(vec![2, rows, n], true)];
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

/// Masks with every key hidden, a row of kept keys and then hidden ones, and kept and hidden ones in any order, longer and
/// shorter than what is looked at together.
#[test]
fn attention_agrees_under_masks_of_any_order() {
    for (l, s) in [(5, 7), (70, 8), (70, 41)] {
        let shapes = [(vec![2, l, 3, 8], true), (vec![2, s, 3, 8], true), (vec![2, s, 3, 8], true)];
        let device = Device::flex();
        let number = |axis: usize, side: usize| {
            let mut shape = [1; 4];
            shape[axis] = side;
            IntTensor::<1>::arange(0..side as i64, &device).reshape(shape).expand([2, 1, l, s])
        };
        let (sample, row, column) = (number(0, 2), number(2, l), number(3, s));
        let kept_before_hidden = column.clone().lower(row.clone().remainder_scalar(s as i64 + 1));
        let any_order = (row * 5 + column * 3 + sample).remainder_scalar(4).not_equal_elem(0);
        for mask in [kept_before_hidden.clone(), kept_before_hidden.bool_not(), any_order] {
            let swap = |x: &Tensor<4>| x.clone().swap_dims(1, 2);
            assert_same(
                "attention",
                shapes.clone(),
                |[q, k, v]| attention(swap(q), swap(k), swap(v), Some(mask.clone())),
                |[q, k, v]| crate::attention::composite(swap(q), swap(k), swap(v), Some(mask.clone())),
            );
        }
    }
}

#[test]
fn attention_with_shared_heads_and_a_causal_mask_agrees_over_several_blocks() {
    let shapes = [(vec![2, 150, 6, 8], true), (vec![2, 150, 2, 8], true), (vec![2, 150, 2, 8], true)];
    let mask = BoolTensor::<2>::tril_mask([150, 150], 0, &Device::flex()).bool_not().reshape([1, 1, 150, 150]);
    let swap = |x: &Tensor<4>| x.clone().swap_dims(1, 2);
    let repeat = |x: &Tensor<4>| crate::attention::repeat_heads(swap(x), 6);
    assert_same(
        "grouped attention",
        shapes,
        |[q, k, v]| attention(swap(q), swap(k), swap(v), Some(mask.clone())),
        |[q, k, v]| crate::attention::composite(swap(q), repeat(k), repeat(v), Some(mask.clone())),
    );
}

#[test]
fn rotation_gated_silu_and_cross_entropy_agree_with_their_composite_forms() {
    for b in [1, 2] {
        let angles = noise::<4>(1, "angles", [b, 1, 5, 4], &Device::flex());
        let (cos, sin) = (angles.clone().cos(), angles.sin());
        let swap = |x: &Tensor<4>| x.clone().swap_dims(1, 2);
        assert_same(
            "rotate",
            [(vec![2, 5, 3, 8], true)],
            |[x]| rotate(swap(x), cos.clone(), sin.clone()),
            |[x]| composite_rotate(swap(x), cos.clone(), sin.clone()),
        );
    }
    for n in [3, 300] {
        assert_same(
            "gated silu",
            [(vec![2, n, 37], true), (vec![2, n, 37], true)],
            |[g, y]| gated_silu(cube(g), cube(y)),
            |[g, y]| activation::silu(cube(g)) * cube(y),
        );
        let targets: Vec<usize> = (0..n).map(|i| i * 7 % 101).collect();
        assert_same(
            "cross entropy",
            [(vec![n, 101], true)],
            |[x]| cross_entropy(matrix(x), targets.clone()),
            |[x]| composite_cross_entropy(matrix(x), targets.clone()),
        );
    }
}

#[test]
fn few_rows_agree_with_many() {
    for rows in [1, 2, 8] {
        assert_same(
            "few rows",
            [(vec![rows, 130], true), (vec![300, 130], true), (vec![300], true)],
            |[x, w, b]| linear(matrix(x), matrix(w), Some(vector(b))),
            |[x, w, b]| composite_linear(matrix(x), matrix(w), Some(vector(b))),
        );
    }
}

#[test]
fn convolution_and_upsampling_agree_with_burns() {
    for (c, kernel, stride, padding, side) in [
        (3, 3, 1, 1, 6),
        (3, 3, 2, 0, 9),
        (3, 3, 2, 1, 8),
        (3, 1, 1, 0, 5),
        (3, 3, 1, 1, 40),
        (3, 3, 1, 1, 31),
        (3, 3, 1, 1, 1),
        // Enough channels and pixels for transformed tiles.
        (50, 3, 1, 1, 16),
        (50, 3, 1, 0, 19),
    ] {
        let weight = vec![c + 1, c, kernel, kernel];
        assert_same(
            "conv",
            [(vec![2, c, side, side + 1], true), (weight, true), (vec![c + 1], true)],
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

#[test]
fn softmax_agrees_with_burns() {
    for (rows, n) in [(3, 37), (300, 37), (9, 1), (9, 5), (9, 16), (9, 63), (9, 64), (5, 130)] {
        let shape = [(vec![2, rows, n], true)];
        let burns = |[x]: &[Tensor<4>; 1]| activation::softmax(cube(x), 2);
        assert_same("softmax", shape, |[x]| softmax(cube(x)), burns);
    }
}

#[test]
fn adamw_agrees_with_its_composite_form_and_updates_in_place() {
    let device = Device::flex();
    for n in [5, 40_000] {
        let draw = |name: &str| noise::<1>(1, name, [n], &device);
        let (mut fused, mut composite) = ((draw("value"), None), (draw("value"), None));
        for updates in 1..=3 {
            let gradient = draw(&format!("gradient {updates}"));
            let step = AdamWStep { updates, lr: 1e-2, betas: [0.9, 0.95], eps: 1e-8, decay: 0.99, gradient_scale: 0.5 };
            let (value, moments) = adamw(fused.0, gradient.clone(), fused.1, &step);
            fused = (value, Some(moments));
            let zeros = || Moments { first: gradient.zeros_like(), second: gradient.zeros_like() };
            let moments = composite.1.unwrap_or_else(zeros);
            let (value, moments) = composite_adamw(composite.0, gradient, moments, &step);
            composite = (value, Some(moments));
        }
        let error = (fused.0 - composite.0).abs().max().into_scalar::<f32>();
        assert!(error < 1e-5, "{error:.1e}");
    }
    // Whoever keeps the old value keeps it.
    let kept = noise::<1>(1, "kept", [7], &device);
    let step = AdamWStep { updates: 1, lr: 1e-2, betas: [0.9, 0.95], eps: 1e-8, decay: 1.0, gradient_scale: 1.0 };
    let (new, _) = adamw(kept.clone(), kept.clone(), None, &step);
    assert_eq!(kept.into_data(), noise::<1>(1, "kept", [7], &device).into_data());
    assert!((new - noise::<1>(1, "kept", [7], &device)).abs().max().into_scalar::<f32>() > 1e-3);
}

#[test]
fn squares_are_summed() {
    let x = noise::<1>(1, "x", [40_001], &Device::flex());
    let expected: f64 = x.clone().into_data().iter::<f32>().map(|v| f64::from(v).powi(2)).sum();
    assert!((sum_of_squares(x) / expected - 1.0).abs() < 1e-6);
}

/// Compares the gradient of a weighted sum of `f`'s outputs with its change between two points, along one direction.
fn assert_slope<const N: usize>(name: &str, shapes: [Vec<usize>; N], f: impl Fn(&[Tensor<4>; N]) -> Tensor<1>) {
    const STEP: f64 = 1e-2;
    let device = Device::flex();
    let mut index = 0;
    let mut draw = |what: &str| {
        shapes.clone().map(|shape| {
            index += 1;
            let shape: [usize; 4] = std::array::from_fn(|i| shape.get(i).copied().unwrap_or(1));
            noise::<4>(index, &format!("{name} {what}"), shape, &device)
        })
    };
    let (at, along) = (draw("point"), draw("direction"));
    let count = f(&at).dims()[0];
    let weights = noise::<1>(99, name, [count], &device);
    let weighted = |inputs: &[Tensor<4>; N]| -> f64 {
        let terms = f(inputs).into_data();
        let weights = weights.clone().into_data();
        terms.iter::<f32>().zip(weights.iter::<f32>()).map(|(a, b)| f64::from(a) * f64::from(b)).sum()
    };
    let moved = |by: f64| -> f64 {
        let inputs: [Tensor<4>; N] = std::array::from_fn(|i| at[i].clone() + along[i].clone().mul_scalar(by));
        weighted(&inputs)
    };
    // Central differences at two widths, extrapolated: the error is of the fourth order.
    let slope = |width: f64| (moved(width) - moved(-width)) / (2.0 * width);
    let expected = (4.0 * slope(STEP / 2.0) - slope(STEP)) / 3.0;
    let leaves: [Tensor<4>; N] = std::array::from_fn(|i| Tensor::from_inner(at[i].clone()).require_grad());
    let gradients = (f(&leaves) * Tensor::from_inner(weights.clone())).sum().backward();
    let (mut slope, mut size) = (0.0, 0.0);
    for (leaf, along) in leaves.iter().zip(&along) {
        let product = leaf.grad(&gradients).unwrap() * along.clone();
        slope += product.clone().into_data().iter::<f32>().map(f64::from).sum::<f64>();
        size += product.into_data().iter::<f32>().map(|v| f64::from(v).powi(2)).sum::<f64>();
    }
    let error = (slope - expected).abs();
    assert!(error <= 2e-3 * (expected.abs() + size.sqrt()), "{name}: slope {slope}, difference {expected}");
}

#[test]
fn gradients_agree_with_finite_differences() {
    let swap = |x: &Tensor<4>| x.clone().swap_dims(1, 2);
    assert_slope("linear", [vec![2, 5, 7], vec![6, 7], vec![6]], |[x, w, b]| {
        vector(&linear(cube(x), matrix(w), Some(vector(b))).unsqueeze::<4>())
    });
    assert_slope("few rows", [vec![2, 7], vec![6, 7], vec![6]], |[x, w, b]| {
        vector(&linear(matrix(x), matrix(w), Some(vector(b))).unsqueeze::<4>())
    });
    assert_slope("attention", [vec![2, 5, 4, 8], vec![2, 7, 2, 8], vec![2, 7, 2, 8]], |[q, k, v]| {
        vector(&attention(swap(q), swap(k), swap(v), None))
    });
    assert_slope("convolution", [vec![2, 3, 5, 6], vec![7, 3, 3, 3], vec![7]], |[x, w, b]| {
        vector(&conv2d(x.clone(), w.clone(), Some(vector(b)), 1, 1))
    });
    assert_slope("wide convolution", [vec![2, 48, 16, 17], vec![48, 48, 3, 3], vec![48]], |[x, w, b]| {
        vector(&conv2d(x.clone(), w.clone(), Some(vector(b)), 1, 1))
    });
    assert_slope("strided convolution", [vec![2, 3, 6, 6], vec![4, 3, 3, 3], vec![4]], |[x, w, b]| {
        vector(&conv2d(x.clone(), w.clone(), Some(vector(b)), 2, 1))
    });
    assert_slope("rms", [vec![2, 3, 20], vec![20]], |[x, w]| {
        vector(&rms_norm(cube(x), vector(w), 1e-6).unsqueeze::<4>())
    });
    assert_slope("layer", [vec![2, 3, 20], vec![20], vec![20]], |[x, w, b]| {
        vector(&layer_norm(cube(x), vector(w), vector(b), 1e-6).unsqueeze::<4>())
    });
    assert_slope("adaptive", [vec![2, 3, 20], vec![2, 20], vec![2, 20]], |[x, s, t]| {
        vector(&adaptive_norm(cube(x), matrix(s), matrix(t), 1e-6).unsqueeze::<4>())
    });
    assert_slope("gated residual", [vec![2, 3, 20], vec![2, 20], vec![2, 3, 20]], |[x, g, y]| {
        vector(&gated_residual(cube(x), matrix(g), cube(y)).unsqueeze::<4>())
    });
    assert_slope("group", [vec![2, 8, 5, 5], vec![8], vec![8]], |[x, w, b]| {
        vector(&group_norm(x.clone(), vector(w), vector(b), 4, 1e-6, true))
    });
    assert_slope("silu", [vec![3, 37]], |[x]| vector(&silu(x.clone())));
    assert_slope("gelu", [vec![3, 37]], |[x]| vector(&gelu_tanh(x.clone())));
    assert_slope("gated silu", [vec![3, 37], vec![3, 37]], |[g, y]| vector(&gated_silu(g.clone(), y.clone())));
    assert_slope("softmax", [vec![3, 37]], |[x]| vector(&softmax(matrix(x)).unsqueeze::<4>()));
    assert_slope("cross entropy", [vec![3, 37]], |[x]| cross_entropy(matrix(x), vec![1, 36, 4]));
    assert_slope("upsample", [vec![2, 3, 5, 4]], |[x]| vector(&upsample_nearest(x.clone())));
    let angles = noise::<4>(1, "angles", [1, 1, 5, 4], &Device::flex());
    assert_slope("rotation", [vec![2, 5, 3, 8]], move |[x]| {
        vector(&rotate(swap(x), angles.clone().cos(), angles.clone().sin()))
    });
}
