//! Single operations at the sizes of the mid-size models.

use burn::tensor::TensorData;
use deepgen_model::attention::attention;
use deepgen_model::random::noise;
use deepgen_model::{BoolTensor, Device, Tensor, fused};
use serde_json::{Value, json};

use super::Case;

/// Builds a case when its turn has come.
pub type Builder = (String, Box<dyn FnOnce(String) -> Case>);

const EPS: f64 = 1e-6;

/// A function of vectors, forward and with the gradient of its sum.
fn part<const N: usize, const D: usize>(
    name: &str,
    kind: &'static str,
    config: Value,
    sizes: [usize; N],
    f: impl Fn([Tensor<1>; N]) -> Tensor<D> + Send + Sync + Clone + 'static,
) -> Builder {
    let build = move |name: String| {
        let device = Device::flex();
        let mut index = 0;
        let plain = sizes.map(|size| {
            index += 1;
            noise::<1>(index, "input", [size], &device)
        });
        let leaves = move |plain: &[Tensor<1>; N]| plain.clone().map(|x| Tensor::from_inner(x).require_grad());
        let size = f(plain.clone()).shape().num_elements();
        let weight = noise::<1>(99, "weight", [size], &device);
        let mut tensors: Vec<(String, TensorData)> =
            plain.iter().enumerate().map(|(i, x)| (format!("input.{i}"), x.clone().into_data())).collect();
        tensors.push(("output_weight".into(), weight.clone().into_data()));
        let outputs = {
            let (f, plain) = (f.clone(), plain.clone());
            move || {
                let inputs = leaves(&plain);
                let y = f(inputs.clone()).reshape([size]);
                let mut out = vec![("output".to_owned(), y.clone().without_autodiff().into_data())];
                let gradients = (y * Tensor::from_inner(weight.clone())).sum().backward();
                for (i, x) in inputs.iter().enumerate() {
                    let gradient = x.grad(&gradients).expect("every input has a gradient");
                    out.push((format!("gradient.{i}"), gradient.into_data()));
                }
                out
            }
        };
        let forward = {
            let (f, plain) = (f.clone(), plain.clone());
            move || drop(f(plain.clone()))
        };
        let step = move || drop(f(leaves(&plain)).backward());
        Case {
            name,
            kind,
            config,
            tensors,
            forward: Some(Box::new(forward)),
            step: Box::new(step),
            outputs: Box::new(outputs),
        }
    };
    (name.into(), Box::new(build))
}

fn attention_part(name: &str, [b, h, kv, l, d]: [usize; 5], is_causal: bool) -> Builder {
    let config = json!({"b": b, "h": h, "kv": kv, "l": l, "d": d, "causal": is_causal});
    let mask = is_causal.then(|| BoolTensor::<2>::tril_mask([l, l], 0, &Device::flex()).bool_not());
    part(name, "attention", config, [b * l * h * d, b * l * kv * d, b * l * kv * d], move |[q, k, v]| {
        let heads = |x: Tensor<1>, n: usize| x.reshape([b, l, n, d]).swap_dims(1, 2);
        let mask = mask.clone().map(|mask| mask.reshape([1, 1, l, l]));
        attention(heads(q, h), heads(k, kv), heads(v, kv), mask).swap_dims(1, 2).reshape([b, l, h * d])
    })
}

fn linear_part(name: &str, [rows, inputs, outputs]: [usize; 3]) -> Builder {
    let config = json!({"rows": rows, "inputs": inputs, "outputs": outputs});
    part(name, "linear", config, [rows * inputs, inputs * outputs, outputs], move |[x, w, b]| {
        fused::linear(x.reshape([rows, inputs]), w.reshape([outputs, inputs]), Some(b))
    })
}

fn conv_part(name: &str, [b, inputs, outputs, side]: [usize; 4], kernel: usize, stride: usize) -> Builder {
    let config =
        json!({"b": b, "inputs": inputs, "outputs": outputs, "side": side, "kernel": kernel, "stride": stride});
    let sizes = [b * inputs * side * side, outputs * inputs * kernel * kernel, outputs];
    part(name, "convolution", config, sizes, move |[x, w, bias]| {
        let weight = w.reshape([outputs, inputs, kernel, kernel]);
        fused::conv2d(x.reshape([b, inputs, side, side]), weight, Some(bias), stride, kernel / 2)
    })
}

/// AdamW over vectors of one model's size.
fn adamw_part(name: &str) -> Builder {
    let build = |name: String| {
        let of_a_layer = [vec![768, 768], vec![768], vec![3072, 768], vec![3072]];
        let shapes: Vec<Vec<usize>> = (0..3).flat_map(|_| of_a_layer.clone()).collect();
        let config = json!({"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.05});
        let mut tensors = Vec::new();
        let draw = |i: usize, what: &str| {
            let size = shapes[i].iter().product();
            noise::<1>(i as u64, what, [size], &Device::flex())
        };
        let count = shapes.len();
        for (i, shape) in shapes.iter().enumerate() {
            for what in ["value", "gradient"] {
                let data = draw(i, what).into_data();
                tensors.push((
                    format!("{what}.{i}"),
                    TensorData::new(data.iter::<f32>().collect::<Vec<_>>(), shape.clone()),
                ));
            }
        }
        let mut values: Vec<Tensor<1>> = (0..count).map(|i| draw(i, "value")).collect();
        let gradients: Vec<Tensor<1>> = (0..count).map(|i| draw(i, "gradient")).collect();
        let mut moments: Vec<Option<fused::Moments>> = vec![None; count];
        let mut updates = 0;
        let update = move || {
            updates += 1;
            for i in 0..count {
                let decay = if shapes[i].len() >= 2 { 1.0 - 1e-3 * 0.05 } else { 1.0 };
                let step =
                    fused::AdamWStep { updates, lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8, decay, gradient_scale: 1.0 };
                let value = std::mem::replace(&mut values[i], Tensor::zeros([1], &Device::flex()));
                let (value, new) = fused::adamw(value, gradients[i].clone(), moments[i].take(), &step);
                (values[i], moments[i]) = (value, Some(new));
            }
            values.clone()
        };
        let update = std::sync::Arc::new(std::sync::Mutex::new(update));
        let again = update.clone();
        let outputs = move || {
            let mut update = again.lock().expect("no update panics");
            update();
            update();
            let named = |(i, value): (usize, Tensor<1>)| (format!("value.{i}"), value.into_data());
            update().into_iter().enumerate().map(named).collect()
        };
        let step = move || drop((update.lock().expect("no update panics"))());
        Case { name, kind: "adamw", config, tensors, forward: None, step: Box::new(step), outputs: Box::new(outputs) }
    };
    (name.into(), Box::new(build))
}

/// Every part.
pub fn all() -> Vec<Builder> {
    let (b, n, d) = (2, 320, 768);
    let rows = b * n;
    let adaptive = move |[x, scale, shift]: [Tensor<1>; 3]| {
        fused::adaptive_norm(x.reshape([b, n, d]), scale.reshape([b, d]), shift.reshape([b, d]), EPS)
    };
    let group =
        move |[x, w, bias]: [Tensor<1>; 3]| fused::group_norm(x.reshape([2, 128, 64, 64]), w, bias, 32, EPS, true);
    vec![
        attention_part("part: attention, 12 heads of 64, 320 tokens", [2, 12, 12, 320, 64], false),
        attention_part("part: attention, causal, 12 heads on 2, 256 tokens", [2, 12, 2, 256, 64], true),
        attention_part("part: attention, small, 4 heads of 32, 32 tokens", [24, 4, 4, 32, 32], false),
        linear_part("part: linear 768 to 3072, 640 rows", [rows, 768, 3072]),
        linear_part("part: linear 3072 to 768, 640 rows", [rows, 3072, 768]),
        linear_part("part: linear, small, 128 to 512, 384 rows", [384, 128, 512]),
        linear_part("part: linear, modulation, 768 to 4608, 2 rows", [2, 768, 4608]),
        conv_part("part: convolution 3x3, 128 to 128, 32x32", [2, 128, 128, 32], 3, 1),
        conv_part("part: convolution 3x3, 64 to 64, 64x64", [2, 64, 64, 64], 3, 1),
        conv_part("part: convolution 3x3, stride 2, 64 to 64, 64x64", [2, 64, 64, 64], 3, 2),
        conv_part("part: convolution 1x1, 64 to 128, 64x64", [2, 64, 128, 64], 1, 1),
        conv_part("part: convolution, small, 3x3, 16 to 16, 32x32", [16, 16, 16, 32], 3, 1),
        part(
            "part: norm with modulation",
            "adaptive norm",
            json!({"b": b, "n": n, "d": d}),
            [rows * d, b * d, b * d],
            adaptive,
        ),
        part(
            "part: root-mean-square norm",
            "rms norm",
            json!({"rows": rows * 12, "d": 64}),
            [rows * d, 64],
            move |[x, w]| fused::rms_norm(x.reshape([rows * 12, 64]), w, EPS),
        ),
        part(
            "part: group norm and SiLU",
            "group norm, silu",
            json!({"b": 2, "channels": 128, "side": 64, "groups": 32}),
            [2 * 128 * 64 * 64, 128, 128],
            group,
        ),
        part("part: activation, GELU", "gelu", json!({}), [rows * 4 * d], |[x]| fused::gelu_tanh(x)),
        part("part: activation, SiLU", "silu", json!({}), [rows * 4 * d], |[x]| fused::silu(x)),
        part("part: softmax", "softmax", json!({"rows": rows * 12, "d": n}), [rows * 12 * n], move |[x]| {
            fused::softmax(x.reshape([rows * 12, n]))
        }),
        adamw_part("part: AdamW, 8.9 M parameters"),
    ]
}
