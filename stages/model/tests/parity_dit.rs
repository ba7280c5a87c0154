//! DiT, autoencoder and sampler against tensors recorded from the reference implementation (tests/fixtures/parity).
//!
//! The fixtures' README gives the formulas; `|a - b| / |b|` in the 2-norm is compared, 1e-4 forward and 1e-3 gradients.

use std::path::PathBuf;

use burn::tensor::{Gradients, TensorData};
use deepgen_contract::model::{DitConfig, VaeConfig};
use deepgen_model::dit::{Condition, Dit};
use deepgen_model::flow::{TrainingTable, loss, losses};
use deepgen_model::init::Init;
use deepgen_model::sampler::{Guided, euler, sigmas};
use deepgen_model::vae::Vae;
use deepgen_model::weights::{WeightFile, for_each_param, load_into};
use deepgen_model::{Device, Tensor};

const FORWARD: f64 = 1e-4;
const GRADIENT: f64 = 1e-3;

fn fixture(case: &str) -> PathBuf {
    PathBuf::from("../../tests/fixtures/parity").join(case)
}

fn open(case: &str, file: &str) -> WeightFile {
    WeightFile::open(&fixture(case).join(file)).unwrap()
}

fn tensor<const D: usize>(file: &WeightFile, name: &str, device: &Device) -> Tensor<D> {
    Tensor::from_data(file.get(name).unwrap(), device)
}

fn assert_close(name: &str, actual: TensorData, expected: &TensorData, limit: f64) {
    let (actual, expected): (Vec<f32>, Vec<f32>) = (actual.iter().collect(), expected.iter().collect());
    assert_eq!(actual.len(), expected.len(), "{name}");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut actual.iter().zip(&expected).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let scale = norm(&mut expected.iter().map(|&b| f64::from(b)));
    assert!(difference <= limit * scale, "{name}: relative difference {:.2e}", difference / scale);
}

fn assert_matches<const D: usize>(file: &WeightFile, name: &str, actual: Tensor<D>) {
    assert_close(name, actual.into_data(), &file.get(name).unwrap(), FORWARD);
}

/// Checks every recorded gradient that belongs to a parameter, and returns how many there were.
fn assert_gradients<M: burn::module::Module>(module: &M, gradients: &Gradients, expected: &WeightFile) -> usize {
    let mut checked = 0;
    for_each_param(module, |name, param| {
        if let Ok(data) = expected.get(name) {
            let actual = param.grad(gradients).unwrap_or_else(|| panic!("{name} has no gradient"));
            assert_close(name, actual.into_data(), &data, GRADIENT);
            checked += 1;
        }
    });
    checked
}

fn dit_config(num_layers: usize) -> DitConfig {
    DitConfig {
        sample_size: 16,
        patch_size: 2,
        in_channels: 16,
        num_layers,
        num_attention_heads: 2,
        attention_head_dim: 16,
        joint_attention_dim: 48,
        pooled_projection_dim: 40,
        pos_embed_max_size: 12,
        num_dual_attention_layers: 2,
    }
}

fn load_dit(case: &str, num_layers: usize, device: &Device) -> Dit {
    let module = Dit::new(&Init::new(0, device), &dit_config(num_layers));
    load_into(module, &open(case, "model"), "").unwrap()
}

fn condition(inputs: &WeightFile, prefix: &str, timestep: &str, device: &Device) -> Condition {
    Condition {
        timestep_b: tensor(inputs, timestep, device),
        text_btc: tensor(inputs, &format!("{prefix}encoder_hidden_states"), device),
        pooled_bc: tensor(inputs, &format!("{prefix}pooled_projections"), device),
    }
}

#[test]
fn the_uniform_dit_gives_the_reference_velocity_and_gradients() {
    let case = "sd3_transformer";
    let device = Device::flex().autodiff();
    let dit = load_dit(case, 4, &device);
    let (inputs, outputs, grads) =
        (open(case, "inputs.safetensors"), open(case, "outputs.safetensors"), open(case, "grads.safetensors"));
    for size in 0..2 {
        for row in 0..2 {
            let condition = condition(&inputs, &format!("{size}."), &format!("{size}.timestep.{row}"), &device);
            let latents = tensor(&inputs, &format!("{size}.hidden_states"), &device);
            let velocity = dit.forward(latents, &condition, &[]);
            assert_matches(&outputs, &format!("{size}.sample.{row}"), velocity);
        }
    }
    let mut condition = condition(&inputs, "1.", "1.timestep.1", &device);
    condition.text_btc = condition.text_btc.require_grad();
    let latents = tensor::<4>(&inputs, "1.hidden_states", &device).require_grad();
    let velocity = dit.forward(latents.clone(), &condition, &[]);
    let gradients = loss(velocity, tensor(&inputs, "1.target", &device)).backward();
    let input = |name: &str, grad: TensorData| assert_close(name, grad, &grads.get(name).unwrap(), GRADIENT);
    input("input.hidden_states", latents.grad(&gradients).unwrap().into_data());
    input("input.encoder_hidden_states", condition.text_btc.grad(&gradients).unwrap().into_data());
    assert_eq!(assert_gradients(&dit, &gradients, &grads), 8);
}

#[test]
fn the_ragged_dit_gives_the_reference_velocities_and_gradients() {
    let case = "sd3_transformer_dynamic";
    let device = Device::flex().autodiff();
    let dit = load_dit(case, 3, &device);
    let (inputs, outputs) = (open(case, "inputs.safetensors"), open(case, "outputs.safetensors"));
    let condition = condition(&inputs, "", "timestep", &device);
    let at = |name: String| tensor::<3>(&inputs, &name, &device);
    let latents: Vec<_> = (0..3).map(|i| at(format!("hidden_states.{i}"))).collect();
    let references = [
        vec![at("cond_hidden_states.0.0".into())],
        vec![at("cond_hidden_states.1.0".into()), at("cond_hidden_states.1.1".into())],
        vec![],
    ];
    let velocities = dit.forward_ragged(&latents, &condition, &references);
    let mut total = Tensor::<1>::zeros([1], &device);
    for (i, velocity) in velocities.iter().enumerate() {
        assert_matches(&outputs, &format!("sample.{i}"), velocity.clone());
        let target = at(format!("target.{i}")).unsqueeze::<4>();
        total = total + losses(velocity.clone().unsqueeze::<4>(), target).div_scalar(3.0);
    }
    assert_matches(&outputs, "loss", total.clone());
    let gradients = total.backward();
    assert_eq!(assert_gradients(&dit, &gradients, &open(case, "grads.safetensors")), 5);

    // A sample alone takes the path without padding and mask, and must not notice the difference.
    let only = |i: usize| Condition {
        timestep_b: condition.timestep_b.clone().narrow(0, i, 1),
        text_btc: condition.text_btc.clone().narrow(0, i, 1),
        pooled_bc: condition.pooled_bc.clone().narrow(0, i, 1),
    };
    for i in 0..3 {
        let alone = dit.forward_ragged(&latents[i..i + 1], &only(i), &references[i..i + 1]);
        assert_matches(&outputs, &format!("sample.{i}"), alone[0].clone());
    }
}

#[test]
fn the_position_formula_gives_the_stored_table() {
    let device = Device::flex();
    let fresh = Dit::new(&Init::new(0, &device), &dit_config(3));
    let stored = open("sd3_transformer_dynamic", "model");
    assert_matches(&stored, "pos_embed.pos_embed", fresh.pos_embed.pos_embed.val());
}

#[test]
fn the_autoencoder_gives_the_reference_latents_images_and_gradients() {
    let case = "sd3_vae";
    let device = Device::flex().autodiff();
    let config = VaeConfig {
        in_channels: 3,
        latent_channels: 16,
        block_out_channels: vec![16, 32, 32, 32],
        layers_per_block: 1,
        norm_num_groups: 8,
        scaling_factor: 1.5305,
        shift_factor: 0.0609,
    };
    let vae = load_into(Vae::new(&Init::new(0, &device), &config), &open(case, "model"), "").unwrap();
    let (inputs, outputs) = (open(case, "inputs.safetensors"), open(case, "outputs.safetensors"));
    for size in 0..2 {
        let at = |name: &str| tensor::<4>(&inputs, &format!("{size}.{name}"), &device);
        let posterior = vae.encode(at("pixel_values"));
        assert_matches(&outputs, &format!("{size}.mean"), posterior.mean.clone());
        assert_matches(&outputs, &format!("{size}.logvar"), posterior.logvar.clone());
        let latents = vae.to_latents(at("pixel_values"), at("noise"));
        assert_matches(&outputs, &format!("{size}.latents"), latents.clone());
        assert_matches(&outputs, &format!("{size}.decoded"), vae.from_latents(latents));
        assert_matches(&outputs, &format!("{size}.decoded_mode"), vae.from_latents(vae.normalize(posterior.mean)));
    }
    let pixels = tensor::<4>(&inputs, "0.pixel_values", &device).require_grad();
    let posterior = vae.encode(pixels.clone());
    assert_matches(&outputs, "0.kl", posterior.kl());
    let decoded = vae.decode(posterior.sample(tensor(&inputs, "0.noise", &device)));
    let total = (decoded - pixels.clone()).square().mean() + posterior.kl().mean().mul_scalar(1e-4);
    assert_matches(&outputs, "0.loss", total.clone());
    let gradients = total.backward();
    let grads = open(case, "grads.safetensors");
    assert_eq!(assert_gradients(&vae, &gradients, &grads), 7);
    let name = "input.pixel_values";
    assert_close(name, pixels.grad(&gradients).unwrap().into_data(), &grads.get(name).unwrap(), GRADIENT);
}

#[test]
fn guided_sampling_follows_the_reference_step_by_step() {
    let case = "flow_match_sampler";
    let device = Device::flex();
    let (inputs, outputs) = (open(case, "inputs.safetensors"), open(case, "outputs.safetensors"));
    let vector = |values: &[f32]| TensorData::new(values.to_vec(), [values.len()]);
    let train = TrainingTable::new(3.0);
    assert_close("train", vector(train.sigmas()), &outputs.get("static.train.sigmas").unwrap(), 1e-6);
    for steps in [4, 28, 50] {
        let expected = outputs.get(&format!("static.{steps}.sigmas")).unwrap();
        assert_close("sigmas", vector(&sigmas(steps, 3.0)), &expected, 1e-6);
    }
    // The weights name the number of layers: blocks are numbered from 0.
    let file = open(case, "model");
    let num_layers = (0..).find(|i| file.shape(&format!("transformer_blocks.{i}.attn.to_q.weight")).is_none()).unwrap();
    let dual = |i: &usize| file.shape(&format!("transformer_blocks.{i}.attn2.to_q.weight")).is_none();
    let config = DitConfig { num_dual_attention_layers: (0..).find(dual).unwrap(), ..dit_config(num_layers) };
    let dit = load_into(Dit::new(&Init::new(0, &device), &config), &file, "").unwrap();
    let field = |latents: Tensor<4>, timestep: f64| {
        let condition = Condition {
            timestep_b: Tensor::full([4], timestep, &device),
            text_btc: tensor(&inputs, "encoder_hidden_states", &device),
            pooled_bc: tensor(&inputs, "pooled_projections", &device),
        };
        dit.forward(latents, &condition, &[])
    };
    let guided = Guided { field, scale: 4.0 };
    let start = tensor::<4>(&inputs, "init_noise", &device);
    for (steps, after) in [(4, vec![0, 1, 2, 3]), (20, vec![0, 10])] {
        let levels = sigmas(steps, 3.0);
        for step in after {
            let latents = euler(&guided, start.clone(), &levels[..step + 2]);
            assert_matches(&outputs, &format!("denoise.{steps}.latents_after.{step}"), latents);
        }
        assert_matches(&outputs, &format!("denoise.{steps}.final"), euler(&guided, start.clone(), &levels));
    }
}
