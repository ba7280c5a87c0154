//! Whole models, small (the shapes world's sizes) and mid-size: forward, and a training step with AdamW.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use burn::module::Module;
use burn::tensor::TensorData;
use deepgen_contract::model::{DitConfig, LanguageConfig, VaeConfig};
use deepgen_model::dit::{Condition, Dit};
use deepgen_model::flow::loss;
use deepgen_model::fused::{AdamWStep, Moments, adamw, cross_entropy};
use deepgen_model::init::Init;
use deepgen_model::language::LanguageModel;
use deepgen_model::random::noise;
use deepgen_model::rope::PositionIds;
use deepgen_model::vae::Vae;
use deepgen_model::weights::{for_each_param, map_params, visit};
use deepgen_model::{Device, Tensor};
use serde_json::json;

use super::Case;
use super::parts::Builder;

const LR: f64 = 1e-4;
const BETAS: [f64; 2] = [0.9, 0.95];
const ADAM_EPS: f64 = 1e-8;
const WEIGHT_DECAY: f64 = 0.05;

/// A model with the state of its optimiser.
struct Training<M> {
    model: Option<M>,
    moments: BTreeMap<String, Moments>,
    updates: u64,
}

impl<M: Module> Training<M> {
    /// One step as the worker makes it.
    fn step(&mut self, loss: impl FnOnce(&M) -> Tensor<1>) {
        let Some(model) = self.model.take() else { return };
        let mut tape = loss(&model).backward();
        let mut gradients = BTreeMap::new();
        for_each_param(&model, |name, param| {
            if let Some(gradient) = param.take_grad(&mut tape) {
                gradients.insert(name.to_owned(), (gradient, param.shape().len()));
            }
        });
        self.updates += 1;
        self.model = Some(map_params(model, |name, value| {
            let Some((gradient, rank)) = gradients.remove(name) else { return value };
            let decay = if rank >= 2 { 1.0 - LR * WEIGHT_DECAY } else { 1.0 };
            let step =
                AdamWStep { updates: self.updates, lr: LR, betas: BETAS, eps: ADAM_EPS, decay, gradient_scale: 1.0 };
            let (value, moments) = adamw(value, gradient, self.moments.remove(name), &step);
            self.moments.insert(name.to_owned(), moments);
            value
        }));
    }
}

/// Puts a model, its inputs and its two functions together; `run` returns the forward's result and the loss.
fn whole<M, I>(
    name: String,
    kind: &'static str,
    mut config: serde_json::Value,
    model: M,
    inputs: I,
    named_inputs: Vec<(&str, TensorData)>,
    run: impl Fn(&M, &I, &Device) -> (Tensor<1>, Tensor<1>) + Send + Sync + Clone + 'static,
) -> Case
where
    M: Module + Send + 'static,
    I: Clone + Send + Sync + 'static,
{
    config["optimizer"] = json!({"lr": LR, "betas": BETAS, "eps": ADAM_EPS, "weight_decay": WEIGHT_DECAY});
    let mut tensors: Vec<(String, TensorData)> =
        visit(&model).into_iter().map(|(name, data)| (format!("param.{name}"), data)).collect();
    tensors.extend(named_inputs.into_iter().map(|(name, data)| (format!("input.{name}"), data)));
    let frozen = model.valid();
    let training = Arc::new(Mutex::new(Training { model: Some(model), moments: BTreeMap::new(), updates: 0 }));
    let outputs = {
        let (training, inputs, run) = (training.clone(), inputs.clone(), run.clone());
        move || {
            let training = training.lock().expect("no step panics");
            let model = training.model.as_ref().expect("put back after each step");
            let (y, loss) = run(model, &inputs, &Device::flex().autodiff());
            let mut out = vec![
                ("output".to_owned(), y.without_autodiff().into_data()),
                ("loss".to_owned(), loss.clone().without_autodiff().into_data()),
            ];
            let gradients = loss.backward();
            for_each_param(model, |name, param| {
                if let Some(gradient) = param.grad(&gradients) {
                    out.push((format!("gradient.{name}"), gradient.into_data()));
                }
            });
            out
        }
    };
    let forward = {
        let (inputs, run) = (inputs.clone(), run.clone());
        move || drop(run(&frozen, &inputs, &Device::flex()))
    };
    let step = move || {
        let mut training = training.lock().expect("no step panics");
        training.step(|model| run(model, &inputs, &Device::flex().autodiff()).1);
    };
    Case {
        name,
        kind,
        config,
        tensors,
        forward: Some(Box::new(forward)),
        step: Box::new(step),
        outputs: Box::new(outputs),
    }
}

/// Puts a tensor on the device of the run, with or without a tape.
fn on<const D: usize>(x: &Tensor<D>, device: &Device) -> Tensor<D> {
    if device.is_autodiff() { Tensor::from_inner(x.clone()) } else { x.clone() }
}

fn dit(name: &str, config: DitConfig, [b, side, t]: [usize; 3]) -> Builder {
    let build = move |name: String| {
        let device = Device::flex();
        let model = Dit::new(&Init::new(1, &device.clone().autodiff()), &config);
        let image = [b, config.in_channels, side, side];
        let latents = noise(1, "latents", image, &device);
        let target = noise(1, "target", image, &device);
        let text = noise(1, "text", [b, t, config.joint_attention_dim], &device);
        let pooled = noise(1, "pooled", [b, config.pooled_projection_dim], &device);
        let timestep = Tensor::<1>::full([b], 500.0, &device);
        let named = vec![
            ("latents", latents.clone().into_data()),
            ("target", target.clone().into_data()),
            ("text", text.clone().into_data()),
            ("pooled", pooled.clone().into_data()),
            ("timestep", timestep.clone().into_data()),
        ];
        let json = serde_json::to_value(&config).expect("settings are JSON");
        let inputs = (latents, target, text, pooled, timestep);
        whole(name, "dit", json, model, inputs, named, |model: &Dit, inputs, device| {
            let (latents, target, text, pooled, timestep) = inputs;
            let condition = Condition {
                timestep_b: on(timestep, device),
                text_btc: on(text, device),
                pooled_bc: on(pooled, device),
            };
            let y = model.forward(on(latents, device), &condition, &[]);
            let count = y.shape().num_elements();
            (y.clone().reshape([count]), loss(y, on(target, device)))
        })
    };
    (name.into(), Box::new(build))
}

fn vae(name: &str, config: VaeConfig, [b, side]: [usize; 2]) -> Builder {
    let build = move |name: String| {
        let device = Device::flex();
        let model = Vae::new(&Init::new(1, &device.clone().autodiff()), &config);
        let pixels = noise::<4>(1, "pixels", [b, config.in_channels, side, side], &device);
        let latent = side >> (config.block_out_channels.len() - 1);
        let eps = noise::<4>(1, "eps", [b, config.latent_channels, latent, latent], &device);
        let named = vec![("pixels", pixels.clone().into_data()), ("noise", eps.clone().into_data())];
        let json = serde_json::to_value(&config).expect("settings are JSON");
        whole(name, "vae", json, model, (pixels, eps), named, |model: &Vae, (pixels, eps), device| {
            let posterior = model.encode(on(pixels, device));
            let decoded = model.decode(posterior.sample(on(eps, device)));
            let count = decoded.shape().num_elements();
            let objective = loss(decoded.clone(), on(pixels, device)) + posterior.kl().mean();
            (decoded.reshape([count]), objective)
        })
    };
    (name.into(), Box::new(build))
}

fn decoder(name: &str, config: LanguageConfig, [b, l]: [usize; 2]) -> Builder {
    let build = move |name: String| {
        let device = Device::flex();
        let model = LanguageModel::new(&Init::new(1, &device.clone().autodiff()), &config);
        let embeds = noise::<3>(1, "embeds", [b, l, config.hidden_size], &device);
        let ids: Vec<usize> = (0..b * l).map(|i| i * 7919 % config.vocab_size).collect();
        let as_floats: Vec<f32> = ids.iter().map(|&id| id as f32).collect();
        let named = vec![("embeds", embeds.clone().into_data()), ("targets", TensorData::new(as_floats, [b, l]))];
        let mut json = serde_json::to_value(&config).expect("settings are JSON");
        json["rope_theta"] = config.rope_theta.into();
        let last = config.num_hidden_layers;
        whole(
            name,
            "decoder",
            json,
            model,
            (embeds, ids),
            named,
            move |model: &LanguageModel, (embeds, ids), device| {
                let row: Vec<i64> = (0..l as i64).collect();
                let positions = PositionIds { axis: std::array::from_fn(|_| vec![row.clone(); b]) };
                let states = model.hidden_states(on(embeds, device), &positions, &vec![vec![true; l]; b], &[last]);
                let logits = model.logits(states[0].clone());
                let vocabulary = logits.dims()[2];
                let logits = logits.reshape([b * l, vocabulary]);
                let loss = cross_entropy(logits.clone(), ids.clone());
                (logits.reshape([b * l * vocabulary]), loss)
            },
        )
    };
    (name.into(), Box::new(build))
}

/// Every model.
pub fn all() -> Vec<Builder> {
    let small_dit = DitConfig {
        sample_size: 8,
        patch_size: 2,
        in_channels: 16,
        num_layers: 4,
        num_attention_heads: 4,
        attention_head_dim: 32,
        joint_attention_dim: 128,
        pooled_projection_dim: 128,
        pos_embed_max_size: 16,
        num_dual_attention_layers: 2,
    };
    let mid_dit = DitConfig {
        sample_size: 32,
        num_attention_heads: 12,
        attention_head_dim: 64,
        joint_attention_dim: 1024,
        pooled_projection_dim: 512,
        pos_embed_max_size: 32,
        ..small_dit.clone()
    };
    let vae_config = |widths: [usize; 3], layers_per_block, norm_num_groups| VaeConfig {
        in_channels: 3,
        latent_channels: 16,
        block_out_channels: widths.to_vec(),
        layers_per_block,
        norm_num_groups,
        scaling_factor: 1.0,
        shift_factor: 0.0,
    };
    let small_decoder = LanguageConfig {
        vocab_size: 512,
        hidden_size: 128,
        intermediate_size: 320,
        num_hidden_layers: 7,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        mrope_section: [4, 6, 6],
    };
    let mid_decoder = LanguageConfig {
        vocab_size: 8192,
        hidden_size: 768,
        intermediate_size: 3072,
        num_hidden_layers: 6,
        num_attention_heads: 12,
        num_key_value_heads: 2,
        mrope_section: [8, 12, 12],
        ..small_decoder.clone()
    };
    vec![
        dit("small DiT, 2.5 M, 24 x (16 + 16) tokens", small_dit, [24, 8, 16]),
        vae("small autoencoder, 0.7 M, 16 x 32x32", vae_config([16, 32, 64], 1, 8), [16, 32]),
        decoder("small decoder, 1.3 M, 16 x 48 tokens", small_decoder, [16, 48]),
        dit("mid-size DiT, 4 layers of 768, 2 x (256 + 64) tokens", mid_dit, [2, 32, 64]),
        vae("mid-size autoencoder, 64-128-256, 2 x 64x64", vae_config([64, 128, 256], 2, 32), [2, 64]),
        decoder("mid-size decoder, 6 layers of 768, 2 x 256 tokens", mid_decoder, [2, 256]),
    ]
}
