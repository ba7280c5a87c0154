//! Weight files: shards and their index, views of mapped bf16, PyTorch checkpoints, damage that is found.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{DType, TensorData};
use deepgen_model::init::{Fill, Init};
use deepgen_model::nn::Linear;
use deepgen_model::weights::{
    Held, StoredType, WeightFile, WeightWriter, WeightsError, check, drain, for_each_param, load_into, load_into_held,
    save, set_trainable, specs, visit,
};
use deepgen_model::{Device, Tensor};

fn linears(seed: u64, device: &Device) -> Vec<Linear> {
    let init = Init::new(seed, device);
    (0..3).map(|i| Linear::new(&init.at(i), 6, 4, Fill::Normal(1.0), Some(Fill::Normal(1.0)))).collect()
}

fn write_shards(folder: &Path, module: &Vec<Linear>, dtype: StoredType, max_bytes: u64) {
    let mut writer = WeightWriter::new(folder, "model", specs(module, dtype), &BTreeMap::new(), max_bytes).unwrap();
    for (name, data) in visit(module) {
        writer.push(&name, &data).unwrap();
    }
    writer.finish().unwrap();
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_large_set_is_split_and_read_back_through_its_index() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let from = linears(1, &device);
    // A weight has 96 bytes and a bias 16: two tensors a shard, but never less than one.
    write_shards(folder.path(), &from, StoredType::F32, 112);
    assert_eq!(
        names(folder.path()),
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json"
        ]
    );
    // A leftover of another set is no part of this one.
    save(&folder.path().join("zz.safetensors"), &visit(&from), StoredType::F32, &BTreeMap::new()).unwrap();
    let file = WeightFile::open(folder.path()).unwrap();
    let to = load_into(linears(2, &device), &file, "").unwrap();
    assert_eq!(visit(&from), visit(&to));

    std::fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    let error = WeightFile::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("model-00002-of-00003.safetensors"), "{error}");
    save(
        &folder.path().join("model-00002-of-00003.safetensors"),
        &visit(&from)[..1],
        StoredType::F32,
        &BTreeMap::new(),
    )
    .unwrap();
    assert!(WeightFile::open(folder.path()).is_err(), "a shard with the wrong tensors");
}

#[test]
fn a_cut_off_file_and_a_tensor_out_of_turn_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let from = linears(1, &device);
    write_shards(folder.path(), &from, StoredType::F32, u64::MAX);
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 4]).unwrap();
    let error = WeightFile::open(&path).unwrap_err();
    assert!(matches!(error, WeightsError::Format { .. }), "{error}");

    let mut writer =
        WeightWriter::new(folder.path(), "other", specs(&from, StoredType::F32), &BTreeMap::new(), u64::MAX).unwrap();
    let tensors = visit(&from);
    assert!(writer.push(&tensors[1].0, &tensors[1].1).is_err());
    drop(writer);
    let mut writer =
        WeightWriter::new(folder.path(), "other", specs(&from, StoredType::F32), &BTreeMap::new(), u64::MAX).unwrap();
    writer.push(&tensors[0].0, &tensors[0].1).unwrap();
    assert!(writer.finish().is_err(), "five tensors are missing");
    assert_eq!(names(folder.path()), ["model.safetensors"], "nothing half-written is left");
}

#[test]
fn bf16_is_held_as_stored_and_a_trained_parameter_becomes_f32() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex().autodiff();
    write_shards(folder.path(), &linears(1, &Device::flex()), StoredType::Bf16, u64::MAX);
    let file = WeightFile::open(folder.path()).unwrap();
    let wide = load_into(linears(2, &device), &file, "").unwrap();
    let held = load_into_held(linears(2, &device), &file, "", Held::AsStored).unwrap();
    assert_eq!(visit(&wide), visit(&held), "bf16 widens without loss");
    let held = set_trainable(held, |name| name.starts_with("1."));
    for_each_param(&held, |name, param| {
        let expected = if name.starts_with("1.") { DType::F32 } else { DType::BF16 };
        assert_eq!(param.value().dtype(), expected, "{name}");
    });

    // The same function, with the same gradient, whatever a frozen weight is held in.
    let run = |module: &[Linear]| {
        let x = Tensor::<2>::ones([5, 6], &device);
        let y = module.iter().map(|linear| linear.forward(x.clone())).reduce(|a, b| a * b).unwrap();
        assert_eq!(y.dtype(), DType::F32);
        let gradients = y.clone().sum().backward();
        (y.into_data(), module[1].weight.val().grad(&gradients).unwrap().into_data())
    };
    let wide = set_trainable(wide, |name| name.starts_with("1."));
    assert_eq!(run(&held), run(&wide));
}

#[test]
fn a_pytorch_checkpoint_gives_its_tensors() {
    let path = PathBuf::from("../../tests/fixtures/weights/torch_state.pt");
    let file = WeightFile::open(&path).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["part.bias", "part.weight", "step"]);
    assert_eq!(file.get("part.weight").unwrap(), TensorData::from([[0.0f32, 2.0, 4.0], [1.0, 3.0, 5.0]]));
    assert_eq!(file.stored("part.bias").unwrap().dtype(), DType::BF16);
    assert_eq!(file.get("part.bias").unwrap(), TensorData::from([0.5f32, -1.0]));
    assert_eq!(file.get("step").unwrap().iter::<f32>().next(), Some(7.0));

    let copy = tempfile::tempdir().unwrap();
    let cut = copy.path().join("cut.pt");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(WeightFile::open(&cut).unwrap_err(), WeightsError::Format { .. }));
}

#[test]
fn a_misspelt_name_is_shown_beside_the_one_that_was_meant() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("linear.safetensors");
    let mut tensors = visit(&linears(1, &Device::flex()));
    tensors[0].0 = "0.wieght".into();
    save(&path, &tensors, StoredType::F32, &BTreeMap::new()).unwrap();
    let file = WeightFile::open(&path).unwrap();
    let error = check(&linears(1, &Device::flex()), &file, "").unwrap_err().to_string();
    assert!(error.contains("missing: 0.weight"), "{error}");
    assert!(error.contains("unexpected: 0.wieght (the model has 0.weight)"), "{error}");
}

#[test]
fn a_module_is_taken_apart_without_being_whole_in_memory() {
    let device = Device::flex();
    let expected = visit(&linears(3, &device));
    let mut seen = Vec::new();
    let fresh = linears(3, &device);
    let is_drawn = |weight: &Param<Tensor<2>>| weight.is_initialized();
    assert!(!is_drawn(&fresh[0].weight));
    drain(fresh, |name, data| {
        seen.push((name.to_string(), data));
        Ok::<(), WeightsError>(())
    })
    .unwrap();
    assert_eq!(seen, expected);
}
