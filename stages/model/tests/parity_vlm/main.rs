//! The vision-language side and the whole model against tensors from the reference code.
//!
//! Fixtures: tests/fixtures/parity (each case has a README). Measure: |a - b| / |b| over a whole tensor. Limits: 1e-4 for
//! one model's forward pass, 3e-4 for intermediates of the whole model, 1e-3 for gradients.

mod whole;

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::{Gradients, TensorData};
use deepgen_contract::model::{
    BridgeConfig, BridgeLayers, DitConfig, LanguageConfig, LoraConfig, LoraTargets, Padding, SpecialTokens,
    VisionConfig, VlmConfig,
};
use deepgen_model::bridge::Bridge;
use deepgen_model::init::Init;
use deepgen_model::lora;
use deepgen_model::rope::Grid;
use deepgen_model::vision::windows;
use deepgen_model::vlm::{Layout, PromptBatch, Vlm, hub_name};
use deepgen_model::weights::{StoredType, WeightFile, for_each_param, load_into};
use deepgen_model::{Device, Tensor};
use serde_json::Value;

const FORWARD: f64 = 1e-4;
const GRADIENT: f64 = 1e-3;
/// A gradient below this is rounding noise.
const ROUNDING: f64 = 1e-6;

struct Case {
    folder: PathBuf,
    config: Value,
    device: Device,
}

impl Case {
    fn open(name: &str) -> Self {
        let folder = PathBuf::from("../../tests/fixtures/parity").join(name);
        let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        Self { folder, config, device: Device::flex().autodiff() }
    }

    fn file(&self, name: &str) -> WeightFile {
        WeightFile::open(&self.folder.join(name)).unwrap()
    }

    fn input<const D: usize>(&self, name: &str) -> Tensor<D> {
        Tensor::from_data(self.file("inputs.safetensors").get(name).unwrap(), &self.device)
    }

    fn output(&self, name: &str) -> TensorData {
        self.file("outputs.safetensors").get(name).unwrap()
    }

    fn check<const D: usize>(&self, name: &str, ours: Tensor<D>, limit: f64) {
        close(name, ours, &self.output(name), limit);
    }

    /// Integer rows of a file's tensor, the last axis as a row.
    fn rows(&self, file: &str, name: &str) -> Vec<Vec<i64>> {
        let data = self.file(file).get(name).unwrap();
        let width = *data.shape().to_vec().last().unwrap();
        let values: Vec<i64> = data.iter::<f32>().map(|v| v as i64).collect();
        values.chunks(width).map(<[i64]>::to_vec).collect()
    }

    /// The prompts of left-padded `ids`, and the padding token.
    fn prompts(&self, file: &str, mask_file: &str, mask: &str) -> (Vec<Vec<u32>>, Option<u32>) {
        let (ids, mask) = (self.rows(file, "input_ids"), self.rows(mask_file, mask));
        let mut pad = None;
        let prompts = ids.iter().zip(mask).map(|(ids, mask)| {
            let (real, padding): (Vec<_>, Vec<_>) = ids.iter().zip(mask).partition(|(_, m)| *m != 0);
            pad = pad.or(padding.first().map(|&(&id, _)| id as u32));
            real.into_iter().map(|(&id, _)| id as u32).collect()
        });
        (prompts.collect(), pad)
    }

    fn vlm(&self, config: &VlmConfig, weights: &str) -> Vlm {
        Vlm::new(&Init::new(0, &self.device), config).load(&self.file(weights)).unwrap()
    }
}

fn close<const D: usize>(name: &str, ours: Tensor<D>, theirs: &TensorData, limit: f64) {
    assert_eq!(ours.dims().to_vec(), theirs.shape().to_vec(), "shape of {name}");
    close_values(name, &ours.into_data(), theirs, limit);
}

fn close_values(name: &str, ours: &TensorData, theirs: &TensorData, limit: f64) {
    let (mut error, mut size) = (0f64, 0f64);
    for (a, b) in ours.iter::<f32>().zip(theirs.iter::<f32>()) {
        error += f64::from(a - b).powi(2);
        size += f64::from(b).powi(2);
    }
    let relative = (error / size.max(1e-30)).sqrt();
    println!("{name}: {relative:.2e}");
    assert!(relative <= limit, "{name} differs by {relative:.2e}, allowed {limit:.0e}");
}

fn norm(data: &TensorData) -> f64 {
    data.iter::<f32>().map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

fn number(value: &Value, key: &str) -> usize {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} is a number")) as usize
}

fn vlm_config(hub: &Value, pad: u32) -> VlmConfig {
    let vision = &hub["vision_config"];
    let section: Vec<usize> = serde_json::from_value(hub["rope_scaling"]["mrope_section"].clone()).unwrap();
    VlmConfig {
        language: LanguageConfig {
            vocab_size: number(hub, "vocab_size"),
            hidden_size: number(hub, "hidden_size"),
            intermediate_size: number(hub, "intermediate_size"),
            num_hidden_layers: number(hub, "num_hidden_layers"),
            num_attention_heads: number(hub, "num_attention_heads"),
            num_key_value_heads: number(hub, "num_key_value_heads"),
            rms_norm_eps: hub["rms_norm_eps"].as_f64().unwrap(),
            rope_theta: hub["rope_theta"].as_f64().unwrap(),
            mrope_section: section.try_into().unwrap(),
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
            fullatt_block_indexes: serde_json::from_value(vision["fullatt_block_indexes"].clone()).unwrap(),
            out_hidden_size: number(vision, "out_hidden_size"),
            input_scale: [28, 32],
        },
        tokens: SpecialTokens {
            pad,
            vision_start: number(hub, "vision_start_token_id") as u32,
            vision_end: number(hub, "vision_end_token_id") as u32,
            image_pad: number(hub, "image_token_id") as u32,
            video_pad: number(hub, "video_token_id") as u32,
        },
    }
}

fn dit_config(config: &Value) -> DitConfig {
    DitConfig {
        sample_size: number(config, "sample_size"),
        patch_size: number(config, "patch_size"),
        in_channels: number(config, "in_channels"),
        num_layers: number(config, "num_layers"),
        num_attention_heads: number(config, "num_attention_heads"),
        attention_head_dim: number(config, "attention_head_dim"),
        joint_attention_dim: number(config, "joint_attention_dim"),
        pooled_projection_dim: number(config, "pooled_projection_dim"),
        pos_embed_max_size: number(config, "pos_embed_max_size"),
        num_dual_attention_layers: config["dual_attention_layers"].as_array().unwrap().len(),
    }
}

/// Splits the fixture's `(1, rows, columns)` patch grids into merged-token grids with their patch rows.
fn patch_rows(pixels: &Tensor<2>, grids: &[Vec<i64>], merge: usize) -> Vec<(Grid, Tensor<3>)> {
    let mut start = 0;
    let cut = |grid: &Vec<i64>| {
        let (rows, columns) = (grid[1] as usize, grid[2] as usize);
        let patches = pixels.clone().narrow(0, start, rows * columns).unsqueeze::<3>();
        start += rows * columns;
        (Grid { rows: rows / merge, columns: columns / merge }, patches)
    };
    grids.iter().map(cut).collect()
}

/// Distributes images over prompts by the number of image tokens that each prompt holds.
fn grids_of_prompts(prompts: &[Vec<u32>], grids: &[Grid], image_pad: u32) -> Vec<Vec<Grid>> {
    let mut left = grids.iter().copied();
    let own = |prompt: &Vec<u32>| {
        let mut num_tokens = prompt.iter().filter(|&&id| id == image_pad).count();
        let mut own = Vec::new();
        while num_tokens > 0 {
            let grid = left.next().unwrap();
            num_tokens -= grid.num_tokens();
            own.push(grid);
        }
        own
    };
    prompts.iter().map(own).collect()
}

fn check_positions(layout: &Layout, expected: &[Vec<i64>]) {
    let ours: Vec<Vec<i64>> = layout.positions.axis.iter().flatten().cloned().collect();
    assert_eq!(ours, expected);
}

/// Compares gradients by name; `rename` gives our name of a fixture's gradient, or `None` for one checked elsewhere.
fn check_gradients<M: burn::module::Module>(
    module: &M,
    gradients: &Gradients,
    expected: &WeightFile,
    rename: impl Fn(&str) -> Option<String>,
) {
    let wanted: BTreeMap<String, String> =
        expected.names().filter_map(|name| Some((rename(name)?, name.to_string()))).collect();
    let mut num_checked = 0;
    for_each_param(module, |name, param| {
        if let Some(theirs) = wanted.get(name) {
            let ours = param.grad(gradients).unwrap_or_else(|| panic!("no gradient for {name}"));
            let theirs = expected.get(theirs).unwrap();
            num_checked += 1;
            if norm(&theirs) < ROUNDING {
                // Zero in exact arithmetic: softmax does not see a bias that all keys share.
                assert!(norm(&ours.into_data()) < ROUNDING, "grad {name}");
                return;
            }
            close_values(&format!("grad {name}"), &ours.into_data(), &theirs, GRADIENT);
        }
    });
    assert_eq!(num_checked, wanted.len());
}

#[test]
fn the_decoder_gives_the_references_states_and_logits() {
    let case = Case::open("qwen25vl_text");
    let (prompts, pad) = case.prompts("inputs.safetensors", "inputs.safetensors", "attention_mask");
    let config = vlm_config(&case.config["hub_style_config"], pad.unwrap());
    let vlm = case.vlm(&config, "model/model.safetensors");
    let none = vec![Vec::new(); prompts.len()];
    let layout = Layout::new(&prompts, &none, &config.tokens, (Padding::Longest, 0, None)).unwrap();
    check_positions(&layout, &case.rows("outputs.safetensors", "position_ids"));
    let num_layers = config.language.num_hidden_layers;
    let entries: Vec<usize> = (0..=num_layers).rev().collect();
    let embeds = vlm.assemble(&layout, Vec::new(), None);
    let states = vlm.model.hidden_states(embeds, &layout.positions, &layout.is_real, &entries);
    for (entry, state) in entries.iter().zip(&states) {
        case.check(&format!("hidden_states.{entry}"), state.clone(), FORWARD);
    }
    case.check("logits", vlm.model.logits(states[0].clone()), FORWARD);

    let pick = |batch: &PromptBatch| -> Vec<i64> {
        vlm.next_token_logits(batch).unwrap().argmax(1).into_data().iter::<i64>().collect()
    };
    let expected = case.rows("outputs.safetensors", "generated_ids");
    let first: Vec<i64> = expected.iter().map(|row| row[0]).collect();
    assert_eq!(pick(&PromptBatch::text(prompts.clone())), first);
    // Only the row without padding goes on: the library's cached steps subtract a row's padding from its positions twice.
    let row = prompts.iter().position(|prompt| prompt.len() == layout.ids[0].len()).unwrap();
    let mut batch = PromptBatch::text(vec![prompts[row].clone()]);
    for (step, &id) in expected[row].iter().enumerate() {
        assert_eq!(pick(&batch), [id], "step {step}");
        batch.ids[0].push(id as u32);
    }
}

#[test]
fn the_vision_tower_gives_the_references_tokens_and_gradients() {
    let case = Case::open("qwen25vl_vision");
    let config = vlm_config(&case.config["hub_style_config"], 0);
    let vlm = case.vlm(&config, "model/model.safetensors");
    let images = patch_rows(&case.input("pixel_values"), &case.rows("inputs.safetensors", "grid_thw"), 2);

    let mut order = Vec::new();
    let mut start = 0;
    for (grid, _) in &images {
        order.extend(windows(*grid, 4).into_iter().flatten().map(|cell| (start + cell) as i64));
        start += grid.num_tokens();
    }
    assert_eq!(vec![order], case.rows("outputs.safetensors", "window_index"));

    let mut tokens = Vec::new();
    for (i, (grid, patches)) in images.into_iter().enumerate() {
        let own: Tensor<2> = vlm.visual.forward(patches, grid).squeeze_dim(0);
        case.check(&format!("image_embeds.{i}"), own.clone(), FORWARD);
        tokens.push(own);
    }
    let loss = (Tensor::cat(tokens, 0) - case.input("target")).square().mean();
    close_values("loss", &loss.to_data(), &case.output("loss"), FORWARD);
    check_gradients(&vlm, &loss.backward(), &case.file("grads.safetensors"), |name| Some(hub_name(name)));
}

#[test]
fn images_queries_and_text_meet_in_the_decoder() {
    let case = Case::open("qwen25vl_full");
    let (prompts, pad) = case.prompts("inputs.safetensors", "inputs.safetensors", "attention_mask");
    let config = vlm_config(&case.config["hub_style_config"], pad.unwrap());
    let vlm = case.vlm(&config, "model/model.safetensors");
    let images = patch_rows(&case.input("pixel_values"), &case.rows("inputs.safetensors", "image_grid_thw"), 2);
    let (grids, patches): (Vec<Grid>, Vec<Tensor<3>>) = images.into_iter().unzip();
    let num_queries = number(&case.config, "num_queries");
    let by_prompt = grids_of_prompts(&prompts, &grids, config.tokens.image_pad);
    let layout = Layout::new(&prompts, &by_prompt, &config.tokens, (Padding::Longest, num_queries, None)).unwrap();
    check_positions(&layout, &case.rows("outputs.safetensors", "position_ids"));

    let vision: Vec<Tensor<2>> =
        grids.iter().zip(patches).map(|(&g, p)| vlm.visual.forward(p, g).squeeze_dim(0)).collect();
    case.check("image_embeds", Tensor::cat(vision.clone(), 0), FORWARD);
    let queries: Tensor<2> = case.input("queries").require_grad();
    let embeds = vlm.assemble(&layout, vision, Some(queries.clone()));
    case.check("inputs_embeds", embeds.clone(), FORWARD);
    let num_layers = config.language.num_hidden_layers;
    let entries: Vec<usize> = (0..=num_layers).collect();
    let states = vlm.model.hidden_states(embeds, &layout.positions, &layout.is_real, &entries);
    for (entry, state) in entries.iter().zip(&states) {
        case.check(&format!("hidden_states.{entry}"), state.clone(), FORWARD);
    }
    let loss = (states[num_layers - 1].clone() - case.input("target")).square().mean();
    close_values("loss", &loss.to_data(), &case.output("loss"), FORWARD);
    let gradients = loss.backward();
    let expected = case.file("grads.safetensors");
    close("grad queries", queries.grad(&gradients).unwrap(), &expected.get("queries").unwrap(), GRADIENT);
    check_gradients(&vlm, &gradients, &expected, |name| (name != "queries").then(|| name.to_string()));
}

#[test]
fn the_connector_gives_the_references_conditions_and_gradients() {
    let case = Case::open("connector");
    let (bridge_config, language) = connector_config(&case.config);
    let dit = DitConfig {
        joint_attention_dim: number(&case.config, "joint_dim"),
        pooled_projection_dim: number(&case.config, "pooled_dim"),
        ..dit_config(&Case::open("deepgen_model").config["transformer_config"])
    };
    let bridge = Bridge::new(&Init::new(0, &case.device), &bridge_config, &language, &dit).unwrap();
    let bridge = load_into(bridge, &case.file("weights.safetensors"), "").unwrap();
    let hidden: Vec<Tensor<3>> = (0..6).map(|i| case.input(&format!("hidden.{i}"))).collect();
    let stacked = Tensor::cat(hidden, 2).require_grad();
    let condition = bridge.forward(stacked.clone());
    case.check("pooled", condition.pooled.clone(), FORWARD);
    case.check("sequence", condition.sequence.clone(), FORWARD);
    let error = |a: Tensor<1>| a.square().mean();
    let flat = |name: &str, len: usize| -> Tensor<1> {
        let data = case.file("inputs.safetensors").get(name).unwrap();
        Tensor::from_data(TensorData::new(data.iter::<f32>().collect::<Vec<_>>(), [len]), &case.device)
    };
    let (pooled_len, sequence_len) =
        (condition.pooled.shape().num_elements(), condition.sequence.shape().num_elements());
    let loss = error(condition.pooled.reshape([pooled_len]) - flat("target_pooled", pooled_len))
        + error(condition.sequence.reshape([sequence_len]) - flat("target_sequence", sequence_len));
    close_values("loss", &loss.to_data(), &case.output("loss"), FORWARD);
    let gradients = loss.backward();
    let expected = case.file("grads.safetensors");
    close("grad input", stacked.grad(&gradients).unwrap(), &expected.get("merged_hidden").unwrap(), GRADIENT);
    check_gradients(&bridge, &gradients, &expected, |name| (name != "merged_hidden").then(|| name.to_string()));
}

fn connector_config(config: &Value) -> (BridgeConfig, LanguageConfig) {
    let connector = &config["config"];
    let bridge = BridgeConfig {
        layers: BridgeLayers::Listed((0..number(config, "layers")).rev().collect()),
        num_queries: 0,
        hidden_size: number(connector, "hidden_size"),
        intermediate_size: number(connector, "intermediate_size"),
        num_hidden_layers: number(connector, "num_hidden_layers"),
        num_attention_heads: number(connector, "num_attention_heads"),
        layer_norm_eps: config["layer_norm_eps"].as_f64().unwrap(),
        padding: Padding::Longest,
        max_length: 1024,
    };
    let text = vlm_config(&Case::open("qwen25vl_text").config["hub_style_config"], 0).language;
    let hidden_size = number(config, "llm_hidden");
    (bridge, LanguageConfig { hidden_size, num_hidden_layers: 7, ..text })
}

#[test]
fn adapters_load_from_peft_and_merge_as_peft_merges() {
    let case = Case::open("lora");
    let (prompts, pad) = case.prompts("inputs.safetensors", "inputs.safetensors", "attention_mask");
    let config = vlm_config(&case.config["hub_style_config"], pad.unwrap());
    let settings = LoraConfig {
        targets: LoraTargets::Auto,
        rank: number(&case.config, "rank"),
        alpha: case.config["alpha"].as_f64().unwrap(),
        dropout: 0.0,
    };
    let vlm = case.vlm(&config, "base_model/model.safetensors");
    let images = patch_rows(&case.input("pixel_values"), &case.rows("inputs.safetensors", "image_grid_thw"), 2);
    let grids: Vec<Grid> = images.iter().map(|(grid, _)| *grid).collect();
    let by_prompt = grids_of_prompts(&prompts, &grids, config.tokens.image_pad);
    let layout = Layout::new(&prompts, &by_prompt, &config.tokens, (Padding::Longest, 0, None)).unwrap();
    let entries: Vec<usize> = (0..=config.language.num_hidden_layers).collect();
    let run = |vlm: &Vlm| {
        let vision: Vec<Tensor<2>> =
            images.iter().map(|(g, p)| vlm.visual.forward(p.clone(), *g).squeeze_dim(0)).collect();
        let embeds = vlm.assemble(&layout, vision.clone(), None);
        (vision, vlm.model.hidden_states(embeds, &layout.positions, &layout.is_real, &entries))
    };

    case.check("base_image_embeds", Tensor::cat(run(&vlm).0, 0), FORWARD);
    let fresh = lora::attach(vlm, &settings, 1);
    case.check("base_image_embeds", Tensor::cat(run(&fresh).0, 0), FORWARD);
    let adapted = lora::load(fresh, &case.file("adapter/adapter_model.safetensors")).unwrap();
    let (vision, states) = run(&adapted);
    case.check("image_embeds", Tensor::cat(vision, 0), FORWARD);
    for (entry, state) in entries.iter().zip(states) {
        case.check(&format!("hidden_states.{entry}"), state, FORWARD);
    }

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    lora::save(&adapted, &path, StoredType::F32).unwrap();
    let (ours, theirs) = (WeightFile::open(&path).unwrap(), case.file("adapter/adapter_model.safetensors"));
    for name in ours.names() {
        assert_eq!(ours.get(name).unwrap(), theirs.get(name).unwrap(), "{name}");
    }

    let merged = lora::merge(adapted);
    let expected =
        case.file("merged.safetensors").rename(|name| Some(hub_name(name)).filter(|name| name != "lm_head.weight"));
    let mut num_checked = 0;
    for_each_param(&merged, |name, param| {
        if expected.shape(name).is_some() {
            close_values(name, &param.value().into_data(), &expected.get(name).unwrap(), 1e-6);
            num_checked += 1;
        }
    });
    assert_eq!(num_checked, expected.names().count());
    case.check("hidden_states.2", run(&merged).1[2].clone(), FORWARD);
}
