//! Peak memory and time of training steps of the mid-size DiT, with and without activation checkpointing.
//!
//! `peak_memory on|off` is one process, because the peak is the process's: `make bench-memory` runs both.

use std::time::Instant;

use deepgen_contract::model::DitConfig;
use deepgen_model::checkpointing::with_activation_checkpointing;
use deepgen_model::dit::{Condition, Dit};
use deepgen_model::flow::loss;
use deepgen_model::init::Init;
use deepgen_model::random::noise;
use deepgen_model::weights::{for_each_param, num_elements};
use deepgen_model::{Device, Tensor};

/// The worker's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Milliseconds for which freed memory is kept: a step asks for the same arrays again, and giving them back in between
/// would cost a quarter of its time.
const KEEP_FREED_MS: std::ffi::c_long = 10_000;

/// mimalloc's number of the option `purge_delay`, which the bindings do not name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

fn keep_freed_memory() {
    // SAFETY: sets a number that the allocator reads when it next frees.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, KEEP_FREED_MS) }
}

/// Image tokens are a quarter of this squared.
const SIDE: usize = 64;
const TEXT: usize = 64;
const BATCH: usize = 2;

/// Returns the process's peak memory in MiB, from /proc; 0 where there is none.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    keep_freed_memory();
    let mode = std::env::args().nth(1).unwrap_or_default();
    let is_on = match mode.as_str() {
        "on" => true,
        "off" => false,
        _ => return Err("usage: peak_memory on|off".into()),
    };
    let device = Device::flex().autodiff();
    let config = DitConfig {
        sample_size: SIDE,
        patch_size: 2,
        in_channels: 16,
        num_layers: 4,
        num_attention_heads: 12,
        attention_head_dim: 64,
        joint_attention_dim: 1024,
        pooled_projection_dim: 512,
        pos_embed_max_size: 32,
        num_dual_attention_layers: 2,
    };
    let dit = Dit::new(&Init::new(1, &device), &config);
    let latents = noise::<4>(1, "latents", [BATCH, 16, SIDE, SIDE], &device);
    let target = noise(1, "target", [BATCH, 16, SIDE, SIDE], &device);
    let condition = Condition {
        timestep_b: Tensor::full([BATCH], 500.0, &device),
        text_btc: noise(1, "text", [BATCH, TEXT, 1024], &device),
        pooled_bc: noise(1, "pooled", [BATCH, 512], &device),
    };
    // Draws the weights, which are lazy.
    let count = num_elements(&dit);
    for_each_param(&dit, |_, param| drop(param.value()));
    let weights = peak();
    let (mut times, mut value) = (Vec::new(), 0.0);
    for _ in 0..3 {
        let start = Instant::now();
        with_activation_checkpointing(is_on, || {
            let loss = loss(dit.forward(latents.clone(), &condition, &[]), target.clone());
            value = loss.clone().into_scalar::<f32>();
            drop(loss.backward());
        });
        times.push(start.elapsed().as_secs_f64());
    }
    let best = times.iter().copied().fold(f64::INFINITY, f64::min);
    println!(
        "activation checkpointing {mode}: {:.1} M parameters, {BATCH} x ({} + {TEXT}) tokens, loss {value:.6}; peak {} MiB, \
         of which {weights} before the first step; forward and backward {best:.2} s (best of 3)",
        count as f64 / 1e6,
        SIDE * SIDE / 4,
        peak(),
    );
    Ok(())
}
