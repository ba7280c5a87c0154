//! Weights in and out of files, and parameters by name: strict loading, round trips, flags that survive.

use std::collections::{BTreeMap, HashMap};

use burn::tensor::TensorData;
use deepgen_contract::model::{DitConfig, VaeConfig};
use deepgen_model::dit::Dit;
use deepgen_model::init::Init;
use deepgen_model::nn::{LayerNorm, Linear};
use deepgen_model::vae::Vae;
use deepgen_model::weights::{
    Mismatch, StoredType, WeightFile, WeightsError, for_each_param, is_buffer, load_into, map_params, num_elements,
    save, set_trainable, visit,
};
use deepgen_model::{Device, Tensor};

fn dit_config() -> DitConfig {
    DitConfig {
        sample_size: 8,
        patch_size: 2,
        in_channels: 4,
        num_layers: 3,
        num_attention_heads: 2,
        attention_head_dim: 8,
        joint_attention_dim: 12,
        pooled_projection_dim: 10,
        pos_embed_max_size: 8,
        num_dual_attention_layers: 1,
    }
}

fn dit(seed: u64, device: &Device) -> Dit {
    Dit::new(&Init::new(seed, device), &dit_config())
}

fn snapshot(module: &Dit) -> HashMap<String, TensorData> {
    visit(module).into_iter().collect()
}

fn metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_string(), "pt".to_string())])
}

#[test]
fn element_counts_agree_with_the_contract() {
    let device = Device::flex();
    assert_eq!(num_elements(&dit(1, &device)), dit_config().num_elements());
    let config = VaeConfig {
        in_channels: 3,
        latent_channels: 16,
        block_out_channels: vec![8, 16, 16],
        layers_per_block: 2,
        norm_num_groups: 4,
        scaling_factor: 1.0,
        shift_factor: 0.0,
    };
    assert_eq!(num_elements(&Vae::new(&Init::new(1, &device), &config)), config.num_elements());
}

#[test]
fn initial_values_depend_on_the_seed_and_the_name_alone() {
    let device = Device::flex();
    let (a, b, c) = (snapshot(&dit(1, &device)), snapshot(&dit(1, &device)), snapshot(&dit(2, &device)));
    assert_eq!(a, b);
    let name = "transformer_blocks.0.attn.to_q.weight";
    assert_ne!(a[name], c[name]);
    assert_ne!(a[name], a["transformer_blocks.0.attn.to_k.weight"]);
    // One block fewer in front of it changes nothing.
    let smaller = Dit::new(&Init::new(1, &device), &DitConfig { num_layers: 2, ..dit_config() });
    assert_eq!(a[name], snapshot(&smaller)[name]);
}

#[test]
fn a_file_gives_back_what_was_saved() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let (from, path) = (dit(1, &device), folder.path().join("dit.safetensors"));
    save(&path, &visit(&from), StoredType::F32, &metadata()).unwrap();
    let file = WeightFile::open(folder.path()).unwrap();
    assert_eq!(file.metadata(), &metadata());
    let to = load_into(dit(2, &device), &file, "").unwrap();
    assert_eq!(snapshot(&from), snapshot(&to));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");

    save(&path, &visit(&from), StoredType::Bf16, &BTreeMap::new()).unwrap();
    let rounded = load_into(dit(2, &device), &WeightFile::open(&path).unwrap(), "").unwrap();
    for (name, data) in snapshot(&rounded) {
        for (rounded, exact) in data.iter::<f32>().zip(snapshot(&from)[&name].iter::<f32>()) {
            assert_eq!(rounded, half::bf16::from_f32(exact).to_f32(), "{name}");
        }
    }
}

#[test]
fn every_difference_is_reported_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("norm.safetensors");
    let tensor = |len: usize| TensorData::new(vec![0.5f32; len], [len]);
    let stored =
        [("part.weight".to_string(), tensor(3)), ("part.extra".into(), tensor(1)), ("other".into(), tensor(1))];
    save(&path, &stored, StoredType::F32, &BTreeMap::new()).unwrap();
    let norm = LayerNorm::new(&Init::new(1, &Device::flex()), 2, 1e-6);
    let error = load_into(norm, &WeightFile::open(&path).unwrap(), "part.").unwrap_err();
    let WeightsError::Mismatch(mismatch) = error else { panic!("{error}") };
    let expected = Mismatch {
        missing: vec!["part.bias".into()],
        unexpected: vec!["part.extra".into()],
        wrong_shape: vec![("part.weight".into(), vec![2], vec![3])],
    };
    assert_eq!(mismatch, expected);
}

#[test]
fn new_values_keep_the_flags_and_frozen_parameters_get_no_gradient() {
    let device = Device::flex().autodiff();
    let init = Init::new(1, &device);
    let module = vec![Linear::with_xavier_init(&init.at(0), 3, 3), Linear::with_xavier_init(&init.at(1), 3, 2)];
    let module = set_trainable(module, |name| name == "1.weight");
    let module = map_params(module, |name, value| if name == "0.bias" { value + 1.0 } else { value });
    let x = Tensor::<2>::ones([4, 3], &device);
    let gradients = module.iter().fold(x, |x, linear| linear.forward(x)).sum().backward();
    let mut seen = Vec::new();
    for_each_param(&module, |name, param| {
        assert_eq!(param.is_trainable(), name == "1.weight", "{name}");
        assert_eq!(param.grad(&gradients).is_some(), name == "1.weight", "{name}");
        if name == "0.bias" {
            assert_eq!(param.value().into_data(), TensorData::from([1.0f32; 3]));
        }
        seen.push(name.to_string());
    });
    assert_eq!(seen, ["0.weight", "0.bias", "1.weight", "1.bias"]);
}

#[test]
fn the_position_table_is_never_trained() {
    let dit = set_trainable(dit(1, &Device::flex().autodiff()), |_| true);
    for_each_param(&dit, |name, param| assert_eq!(param.is_trainable(), !is_buffer(name), "{name}"));
    assert!(snapshot(&dit).keys().any(|name| is_buffer(name)));
}
