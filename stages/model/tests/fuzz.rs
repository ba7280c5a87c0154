//! Damaged weight files, made by mutation: no panic, no endless loop, bounded memory (`make fuzz`).
//!
//! Every tensor that a file still gives is read, in both ways in which weights are read.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::TensorData;
use deepgen_model::weights::{StoredType, WeightFile, WeightsError, save};

#[path = "../../data/tests/fuzzing/mod.rs"]
mod fuzzing;

use fuzzing::{Target, fuzz};

/// Bytes that headers of safetensors and their indices give a meaning to.
const HEADER: [&[u8]; 12] = [
    b"\"data_offsets\":[0,18446744073709551615]",
    b"\"data_offsets\":[4,0]",
    b"\"data_offsets\":[0,4]",
    b"\"shape\":[18446744073709551615,2]",
    b"\"shape\":[0,9223372036854775807]",
    b"\"shape\":[]",
    b"\"dtype\":\"F64\"",
    b"\"dtype\":\"BOOL\"",
    b"\"dtype\":\"F8_E4M3\"",
    b"\"__metadata__\":{\"a\":\"b\"}",
    b"\"weight_map\":{\"a\":\"../b.safetensors\"}",
    b"\x08\x00\x00\x00\x00\x00\x00\x00",
];
/// Bytes that zip archives and pickles give a meaning to.
const PICKLE: [&[u8]; 9] = [
    b"PK\x05\x06",
    b"PK\x06\x07",
    b"PK\x01\x02",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"((((((((((((((((",
    b")\x85\x85\x85\x85\x85\x85\x85\x85",
    b"}q\x00h\x00X\x01\x00\x00\x00ah\x00s",
    b"ccollections\nOrderedDict\n)R",
    b"J\xff\xff\xff\x7f",
];

/// Reads all that a file, or a folder of files, gives; returns why it gives nothing.
fn read(path: &Path) -> Result<(), WeightsError> {
    let file = WeightFile::open(path)?;
    for name in file.names() {
        // An unsupported type is an error of that tensor alone.
        let (stored, wide) = (file.stored(name), file.get(name));
        if let (Ok(stored), Ok(wide)) = (stored, wide) {
            assert_eq!(stored.shape().to_vec(), wide.shape().to_vec(), "{name}");
            assert_eq!(Some(&*stored.shape().to_vec()), file.shape(name), "{name}");
        }
    }
    Ok(())
}

fn tensors() -> Vec<(String, TensorData)> {
    let numbers = |count: usize| (0..count).map(|i| i as f32).collect::<Vec<_>>();
    vec![
        ("a.weight".to_owned(), TensorData::new(numbers(12), [3, 4])),
        ("a.bias".to_owned(), TensorData::new(numbers(3), [3])),
        ("b".to_owned(), TensorData::new(numbers(1), [1])),
    ]
}

fn safetensors(tensors: &[(String, TensorData)], dtype: StoredType) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    save(&path, tensors, dtype, &metadata).unwrap();
    std::fs::read(path).unwrap()
}

/// A case may be copied, widened from bytes to f32, and described.
const MEMORY: usize = 8 << 20;

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz"]
fn safetensors_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let seeds = [StoredType::F32, StoredType::Bf16].map(|dtype| safetensors(&tensors(), dtype));
    fuzz(&Target { name: "safetensors", seeds: &seeds, tokens: &HEADER, memory: MEMORY }, &|bytes| {
        // Written anew: a mapped file must not change, and the last case is mapped no more.
        std::fs::write(&path, bytes).unwrap();
        let _ = read(&path);
    });
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz"]
fn safetensors_indices() {
    let dir = tempfile::tempdir().unwrap();
    let all = tensors();
    for (name, part) in [("a-1.safetensors", &all[..2]), ("a-2.safetensors", &all[2..])] {
        std::fs::write(dir.path().join(name), safetensors(part, StoredType::F32)).unwrap();
    }
    let map = r#"{"metadata":{"total_size":64},"weight_map":{"a.weight":"a-1.safetensors","a.bias":"a-1.safetensors","b":"a-2.safetensors"}}"#;
    let missing = map.replace("a-2", "a-3");
    let seeds = [map.as_bytes().to_vec(), missing.into_bytes()];
    let index = dir.path().join("a.safetensors.index.json");
    std::fs::write(&index, map).unwrap();
    read(dir.path()).unwrap();
    fuzz(&Target { name: "index", seeds: &seeds, tokens: &HEADER, memory: MEMORY }, &|bytes| {
        std::fs::write(&index, bytes).unwrap();
        let _ = read(dir.path());
    });
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz"]
fn pytorch_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pt");
    let seeds = [std::fs::read("../../tests/fixtures/weights/torch_state.pt").unwrap()];
    // Paths of tensors may take as much as the reader allows them, beside a copy of each.
    fuzz(&Target { name: "pytorch", seeds: &seeds, tokens: &PICKLE, memory: 256 << 20 }, &|bytes| {
        std::fs::write(&path, bytes).unwrap();
        let _ = read(&path);
    });
}
