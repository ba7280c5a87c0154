//! Times one training step (forward and backward) of the shapes world's DiT and autoencoder on the CPU.
//!
//! `cargo run --release -p deepgen-model --example step_time [repeats] [part of a name]` prints milliseconds: best and
//! median. With RAYON_NUM_THREADS=1 the numbers are those of one core.

use std::time::Instant;

use burn::module::Module;
use deepgen_contract::model::{DitConfig, VaeConfig};
use deepgen_model::dit::{Condition, Dit};
use deepgen_model::flow::loss;
use deepgen_model::init::Init;
use deepgen_model::random::noise;
use deepgen_model::vae::Vae;
use deepgen_model::{Device, Tensor};

fn time(name: &str, repeats: usize, mut step: impl FnMut()) {
    if std::env::args().nth(2).is_some_and(|part| !name.contains(&part)) {
        return;
    }
    step();
    let mut times: Vec<f64> = (0..repeats)
        .map(|_| {
            let start = Instant::now();
            step();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{name}: best {:.1} ms, median {:.1} ms", times[0], times[times.len() / 2]);
}

fn main() {
    deepgen_model::in_thread_pool(run);
}

fn run() {
    let repeats = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(20);
    let device = Device::flex().autodiff();
    let config = DitConfig {
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
    let dit = Dit::new(&Init::new(1, &device), &config);
    let condition = Condition {
        timestep_b: Tensor::full([24], 500.0, &device),
        text_btc: noise(1, "text", [24, 16, 128], &device),
        pooled_bc: noise(1, "pooled", [24, 128], &device),
    };
    let latents = noise(1, "latents", [24, 16, 8, 8], &device);
    let target = noise(1, "target", [24, 16, 8, 8], &device);
    let frozen = dit.valid();
    let plain = Condition {
        timestep_b: condition.timestep_b.clone().without_autodiff(),
        text_btc: condition.text_btc.clone().without_autodiff(),
        pooled_bc: condition.pooled_bc.clone().without_autodiff(),
    };
    time("dit forward, no tape", repeats, || {
        let _ = frozen.forward(latents.clone().without_autodiff(), &plain, &[]).into_data();
    });
    time("dit forward + backward", repeats, || {
        let _ = loss(dit.forward(latents.clone(), &condition, &[]), target.clone()).backward();
    });

    let config = VaeConfig {
        in_channels: 3,
        latent_channels: 16,
        block_out_channels: vec![16, 32, 64],
        layers_per_block: 1,
        norm_num_groups: 8,
        scaling_factor: 1.0,
        shift_factor: 0.0,
    };
    let vae = Vae::new(&Init::new(1, &device), &config);
    let pixels = noise(1, "pixels", [16, 3, 32, 32], &device);
    let eps = noise(1, "eps", [16, 16, 8, 8], &device);
    time("vae forward + backward", repeats, || {
        let posterior = vae.encode(pixels.clone());
        let decoded = vae.decode(posterior.sample(eps.clone()));
        let _ = (loss(decoded, pixels.clone()) + posterior.kl().mean()).backward();
    });
}
