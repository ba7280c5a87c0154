//! Where an almost right port goes wrong: for each trap of the specification, the reference's numbers, our code that gives
//! them, and the naive version, which does not. Put in our code's place it would fail the test.
//!
//! Fixtures: tests/fixtures/parity. Limits: those of its README.

use std::path::PathBuf;

use burn::tensor::TensorData;
use deepgen_contract::model::{
    BridgeLayers, DitConfig, LanguageConfig, Padding, SpecialTokens, VaeConfig, VisionConfig, VlmConfig,
};
use deepgen_model::bridge::Bridge;
use deepgen_model::dit::{Condition, Dit};
use deepgen_model::flow::{NUM_TRAIN_TIMESTEPS, TrainingTable, losses, ragged_loss, shift_sigma};
use deepgen_model::init::Init;
use deepgen_model::sampler::sigmas;
use deepgen_model::vae::Vae;
use deepgen_model::vlm::{Layout, Vlm};
use deepgen_model::weights::{WeightFile, load_into};
use deepgen_model::{Device, Tensor};
use serde_json::Value;

const FORWARD: f64 = 1e-4;
const SCHEDULE: f64 = 1e-5;

fn fixture(case: &str) -> PathBuf {
    PathBuf::from("../../tests/fixtures/parity").join(case)
}

fn json(case: &str, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(case).join(file)).unwrap()).unwrap()
}

fn file(case: &str, name: &str) -> WeightFile {
    WeightFile::open(&fixture(case).join(name)).unwrap()
}

fn number(value: &Value, key: &str) -> usize {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} is a number")) as usize
}

fn input<const D: usize>(case: &str, name: &str) -> Tensor<D> {
    Tensor::from_data(file(case, "inputs.safetensors").get(name).unwrap(), &Device::flex())
}

/// Returns `|ours - expected| / |expected|` for an expected result of a case.
fn distance(case: &str, name: &str, ours: &TensorData) -> f64 {
    let expected = file(case, "outputs.safetensors").get(name).unwrap();
    assert_eq!(ours.num_elements(), expected.num_elements(), "{name}");
    let (mut error, mut size) = (0f64, 0f64);
    for (a, b) in ours.iter::<f32>().zip(expected.iter::<f32>()) {
        error += f64::from(a - b).powi(2);
        size += f64::from(b).powi(2);
    }
    (error / size).sqrt()
}

fn vector(values: &[f32]) -> TensorData {
    TensorData::new(values.to_vec(), [values.len()])
}

/// Holds our version to `limit` and the naive one to being at least ten times further off.
fn assert_only_ours(trap: &str, ours: f64, naive: f64, limit: f64) {
    assert!(ours <= limit, "{trap}: we are off by {ours:.1e}, allowed {limit:.0e}");
    assert!(naive > 10.0 * limit, "{trap}: the naive version is off by {naive:.1e} only, so the case would not tell");
}

fn text_case() -> (Vlm, Vec<Vec<u32>>) {
    let case = "qwen25vl_text";
    let config = json(case, "config.json");
    let hub = &config["hub_style_config"];
    let vision = &hub["vision_config"];
    let list = |value: &Value| -> Vec<usize> { serde_json::from_value(value.clone()).unwrap() };
    let rows = |name: &str| -> Vec<Vec<f32>> {
        let data = file(case, "inputs.safetensors").get(name).unwrap();
        let width = data.shape().to_vec()[1];
        data.iter::<f32>().collect::<Vec<_>>().chunks(width).map(<[f32]>::to_vec).collect()
    };
    let (ids, mask) = (rows("input_ids"), rows("attention_mask"));
    let prompts = ids
        .iter()
        .zip(&mask)
        .map(|(ids, mask)| ids.iter().zip(mask).filter(|(_, real)| **real > 0.0).map(|(id, _)| *id as u32).collect());
    let config = VlmConfig {
        language: LanguageConfig {
            vocab_size: number(hub, "vocab_size"),
            hidden_size: number(hub, "hidden_size"),
            intermediate_size: number(hub, "intermediate_size"),
            num_hidden_layers: number(hub, "num_hidden_layers"),
            num_attention_heads: number(hub, "num_attention_heads"),
            num_key_value_heads: number(hub, "num_key_value_heads"),
            rms_norm_eps: hub["rms_norm_eps"].as_f64().unwrap(),
            rope_theta: hub["rope_theta"].as_f64().unwrap(),
            mrope_section: list(&hub["rope_scaling"]["mrope_section"]).try_into().unwrap(),
        },
        vision: VisionConfig {
            depth: number(vision, "depth"),
            hidden_size: number(vision, "hidden_size"),
            intermediate_size: number(vision, "intermediate_size"),
            num_heads: number(vision, "num_heads"),
            in_channels: number(vision, "in_chans"),
            patch_size: number(vision, "patch_size"),
            temporal_patch_size: number(vision, "temporal_patch_size"),
            spatial_merge_size: number(vision, "spatial_merge_size"),
            window_size: number(vision, "window_size"),
            fullatt_block_indexes: list(&vision["fullatt_block_indexes"]),
            out_hidden_size: number(vision, "out_hidden_size"),
            input_scale: [28, 32],
        },
        tokens: SpecialTokens { pad: 0, vision_start: 442, vision_end: 443, image_pad: 445, video_pad: 446 },
    };
    let vlm = Vlm::new(&Init::new(0, &Device::flex()), &config).load(&file(case, "model")).unwrap();
    (vlm, prompts.collect())
}

#[test]
fn padded_queries_attend_to_nothing_rather_than_to_everything() {
    let (vlm, prompts) = text_case();
    let none = vec![Vec::new(); prompts.len()];
    let layout = Layout::new(&prompts, &none, &vlm.config().tokens, (Padding::Longest, 0, None)).unwrap();
    let embeds = vlm.assemble(&layout, Vec::new(), None);
    let entry = vlm.config().language.num_hidden_layers - 1;
    let state = |is_real: &[Vec<bool>]| {
        vlm.model.hidden_states(embeds.clone(), &layout.positions, is_real, &[entry]).remove(0).into_data()
    };
    let name = format!("hidden_states.{entry}");
    let ours = distance("qwen25vl_text", &name, &state(&layout.is_real));
    // The naive version lets padding take part like text: its own positions and, through them, every state differ.
    let all_real: Vec<Vec<bool>> = layout.is_real.iter().map(|row| vec![true; row.len()]).collect();
    let naive = distance("qwen25vl_text", &name, &state(&all_real));
    assert_only_ours("padding", ours, naive, FORWARD);
}

#[test]
fn the_bridge_stacks_layers_from_the_deepest_down() {
    let case = "connector";
    let config = json(case, "config.json");
    let selected: Vec<usize> = BridgeLayers::Rule.resolve(36).unwrap();
    assert_eq!(selected, [35, 29, 23, 17, 11, 5]);
    for case in ["deepgen_t2i_loss", "deepgen_i2i_loss"] {
        let expected: Vec<usize> =
            serde_json::from_value(json(case, "config.json")["selected_hidden_layers"].clone()).unwrap();
        assert_eq!(selected, expected);
    }
    let connector = &config["config"];
    let bridge = deepgen_contract::model::BridgeConfig {
        layers: BridgeLayers::Listed((0..6).rev().collect()),
        num_queries: 0,
        hidden_size: number(connector, "hidden_size"),
        intermediate_size: number(connector, "intermediate_size"),
        num_hidden_layers: number(connector, "num_hidden_layers"),
        num_attention_heads: number(connector, "num_attention_heads"),
        layer_norm_eps: config["layer_norm_eps"].as_f64().unwrap(),
        padding: Padding::Longest,
        max_length: 1024,
    };
    let language = LanguageConfig {
        hidden_size: number(&config, "llm_hidden"),
        num_hidden_layers: 6,
        ..text_case().0.config().language.clone()
    };
    let dit = DitConfig {
        joint_attention_dim: number(&config, "joint_dim"),
        pooled_projection_dim: number(&config, "pooled_dim"),
        ..dit_config("sd3_transformer_dynamic")
    };
    let bridge = Bridge::new(&Init::new(0, &Device::flex()), &bridge, &language, &dit).unwrap();
    let bridge = load_into(bridge, &file(case, "weights.safetensors"), "").unwrap();
    // `hidden.0` is the deepest state; the order that comes to mind first is from the shallowest up.
    let stack = |order: &[usize]| {
        Tensor::cat(order.iter().map(|i| input::<3>(case, &format!("hidden.{i}"))).collect::<Vec<_>>(), 2)
    };
    let off = |order: &[usize]| distance(case, "sequence", &bridge.forward(stack(order)).sequence.into_data());
    assert_only_ours("order of layers", off(&[0, 1, 2, 3, 4, 5]), off(&[5, 4, 3, 2, 1, 0]), FORWARD);
}

#[test]
fn the_sampling_schedule_is_shifted_twice_at_its_lower_end() {
    let case = "flow_match_sampler";
    let shift = json(case, "config.json")["shift"].as_f64().unwrap();
    for steps in [4, 28, 50] {
        let count = NUM_TRAIN_TIMESTEPS as f64;
        let naive: Vec<f32> = (0..steps)
            .map(|j| 1.0 + (1.0 / count - 1.0) * j as f64 / (steps - 1) as f64)
            .map(|level| shift_sigma(level, shift) as f32)
            .chain([0.0])
            .collect();
        let name = format!("static.{steps}.sigmas");
        let off = |levels: &[f32]| distance(case, &name, &vector(levels));
        assert_only_ours("shift", off(&sigmas(steps, shift)), off(&naive), SCHEDULE);
    }
}

#[test]
fn latents_are_sampled_and_not_the_posteriors_mean() {
    let case = "sd3_vae";
    let config = json(case, "model/config.json");
    let config = VaeConfig {
        in_channels: number(&config, "in_channels"),
        latent_channels: number(&config, "latent_channels"),
        block_out_channels: serde_json::from_value(config["block_out_channels"].clone()).unwrap(),
        layers_per_block: number(&config, "layers_per_block"),
        norm_num_groups: number(&config, "norm_num_groups"),
        scaling_factor: config["scaling_factor"].as_f64().unwrap(),
        shift_factor: config["shift_factor"].as_f64().unwrap(),
    };
    let vae = load_into(Vae::new(&Init::new(0, &Device::flex()), &config), &file(case, "model"), "").unwrap();
    let pixels: Tensor<4> = input(case, "0.pixel_values");
    let ours = vae.to_latents(pixels.clone(), input(case, "0.noise")).into_data();
    let naive = vae.normalize(vae.encode(pixels).mean).into_data();
    let off = |latents: &TensorData| distance(case, "0.latents", latents);
    assert_only_ours("latents", off(&ours), off(&naive), FORWARD);
}

#[test]
fn noise_levels_are_drawn_from_the_shifted_table_and_not_evenly() {
    let case = "deepgen_t2i_loss";
    let draws: Vec<f32> = input::<1>(case, "u").into_data().iter::<f32>().collect();
    let shift = json("deepgen_model", "config.json")["scheduler"]["shift"].as_f64().unwrap();
    let count = NUM_TRAIN_TIMESTEPS as f32;
    let table = TrainingTable::new(shift);
    let ours: Vec<f32> = draws.iter().map(|&u| table.sigma(f64::from(u)) * count).collect();
    let off = |timesteps: &[f32]| distance(case, "timesteps", &vector(timesteps));
    // The direction is the other trap: the table's first entry is pure noise.
    let reversed: Vec<f32> = draws.iter().map(|&u| table.sigma(1.0 - f64::from(u)) * count).collect();
    let even: Vec<f32> = draws.iter().map(|&u| u * count).collect();
    let smooth: Vec<f32> = draws.iter().map(|&u| shift_sigma(1.0 - f64::from(u), shift) as f32 * count).collect();
    for naive in [reversed, even] {
        assert_only_ours("table", off(&ours), off(&naive), SCHEDULE);
    }
    // Without the table's steps the levels are nearly right, which is why the limit is tight.
    assert!(off(&smooth) > SCHEDULE, "{:.1e}", off(&smooth));
}

fn dit_config(case: &str) -> DitConfig {
    let config = json(case, "model/config.json");
    DitConfig {
        sample_size: number(&config, "sample_size"),
        patch_size: number(&config, "patch_size"),
        in_channels: number(&config, "in_channels"),
        num_layers: number(&config, "num_layers"),
        num_attention_heads: number(&config, "num_attention_heads"),
        attention_head_dim: number(&config, "attention_head_dim"),
        joint_attention_dim: number(&config, "joint_attention_dim"),
        pooled_projection_dim: number(&config, "pooled_projection_dim"),
        pos_embed_max_size: number(&config, "pos_embed_max_size"),
        num_dual_attention_layers: config["dual_attention_layers"].as_array().unwrap().len(),
    }
}

#[test]
fn every_image_counts_the_same_in_the_loss_whatever_its_size() {
    let case = "sd3_transformer_dynamic";
    let dit = Dit::new(&Init::new(0, &Device::flex()), &dit_config(case));
    let dit = load_into(dit, &file(case, "model"), "").unwrap();
    let condition = Condition {
        timestep_b: input(case, "timestep"),
        text_btc: input(case, "encoder_hidden_states"),
        pooled_bc: input(case, "pooled_projections"),
    };
    let latents: Vec<Tensor<3>> = (0..3).map(|i| input(case, &format!("hidden_states.{i}"))).collect();
    let reference = |i: usize, j: usize| input::<3>(case, &format!("cond_hidden_states.{i}.{j}"));
    let references = [vec![reference(0, 0)], vec![reference(1, 0), reference(1, 1)], vec![]];
    let velocities = dit.forward_ragged(&latents, &condition, &references);
    let pairs: Vec<(Tensor<4>, Tensor<4>)> = velocities
        .iter()
        .enumerate()
        .map(|(i, velocity)| {
            let target: Tensor<3> = input(case, &format!("target.{i}"));
            (velocity.clone().unsqueeze::<4>(), target.unsqueeze::<4>())
        })
        .collect();
    let sizes: Vec<f64> = latents.iter().map(|latent| latent.shape().num_elements() as f64).collect();
    let ours = ragged_loss(pairs.clone());
    // The naive version averages over all numbers of the batch, so that large images count more.
    let each = pairs.into_iter().map(|(velocity, target)| losses(velocity, target));
    let weighted = each.zip(&sizes).map(|(loss, size)| loss.mul_scalar(*size));
    let naive = Tensor::cat(weighted.collect::<Vec<_>>(), 0).sum().div_scalar(sizes.iter().sum::<f64>());
    let off = |loss: Tensor<1>| distance(case, "loss", &loss.into_data());
    assert_only_ours("loss", off(ours), off(naive), FORWARD);
}
