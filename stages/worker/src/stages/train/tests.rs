//! Whole trainings of stage 2 at small sizes, on the shipped base.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use deepgen_contract::data::{ContaminationPolicy, ContaminationSettings, MixSettings, Sampling, TaskCycle};
use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::job::{EVENTS_FILE, FrozenCache as CachePlace, JobInput, SamplesRecord};
use deepgen_contract::train::SampleSettings;
use deepgen_data::mix::mix;
use deepgen_data::prepare::{PreparePlace, prepare};
use deepgen_data::prompt::encode_image_to_image;
use deepgen_data::resize::Pixels;
use deepgen_model::Tensor;
use deepgen_model::random::{Rows, with_dropout};
use serde_json::{Value, json};

use super::*;
use crate::optimize::GradientSum;

/// The shipped base and a small mixture, of which stage 2 trains everything that it can.
struct Bench {
    folder: tempfile::TempDir,
    base: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let prepared = |kind: &str, format: &str, count: usize| {
            let source = json!({ "kind": "shapes", "shapes": { "kind": kind, "format": format, "count": count } });
            let filters = json!({ "min_side": 15, "min_aspect": 0.1, "max_aspect": 10.0 });
            let settings = json!({ "source": source, "nominal_size": 0, "filters": filters, "dedupe": false });
            let out = folder.path().join(kind);
            let place = PreparePlace { seed: 5, project_root: folder.path(), out_dir: &out, num_threads: 1 };
            prepare(&serde_json::from_value(settings).unwrap(), &place, &mut |_| true).unwrap();
            (kind.to_owned(), out)
        };
        let inputs = [prepared("captions", "tar", 40), prepared("edits", "edit_list", 24)];
        let settings = MixSettings {
            cycle: TaskCycle { edit: 1, generation: 2 },
            micro_batch: 5,
            sampling: Sampling::Permutation,
            members: BTreeMap::new(),
            contamination: ContaminationSettings { policy: ContaminationPolicy::Off, ngram: 8, benchmarks: [].into() },
        };
        mix(&settings, &inputs, &[], &folder.path().join("mix")).unwrap();
        let base = std::path::absolute("../base/shapes").unwrap();
        Self { folder, base }
    }

    /// Settings of a short stage 2 in which nothing is left out that a batch's neighbours could change: prompts padded to the
    /// longest, dropout in the adapters, both tasks.
    fn settings(&self) -> TrainSettings {
        let settings = json!({
            "model": {
                "bridge": {
                    "layers": { "listed": [6, 5, 4, 3, 2, 1] }, "num_queries": 6, "hidden_size": 64,
                    "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "layer_norm_eps": 1e-6,
                    "padding": "longest", "max_length": 64,
                },
                "lora": {
                    "kind": "adapters",
                    "config": { "targets": "language", "rank": 4, "alpha": 8.0, "dropout": 0.3 },
                },
            },
            "trainable": ["bridge.*", "dit.*", "vlm.*lora_*"],
            // An epsilon well above the gradients: else a gradient of nearly nothing, whose sign is rounding, moves a weight
            // as far as any other.
            "optimizer": {
                "lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-2, "weight_decay": 0.05, "clip_norm": 1.0,
                "schedule": { "kind": "warmup_cosine", "warmup_ratio": 0.1 },
            },
            "train": {
                "max_iters": 12, "accumulation": 3, "caption_dropout": 0.1, "sigma_dtype": "f32", "on_non_finite": "stop",
                "log_every": 1, "prefetch": 2,
            },
            "warm_start": { "iters": 0, "lr": 0.0, "literal": false },
            "validation": { "every": 6, "num_samples": 6, "sigmas": [0.5] },
            "checkpoint": { "every": 6, "keep": 1 },
            "image": { "size": 32, "unit": 32, "mode": "exact" },
        });
        serde_json::from_value(settings).unwrap()
    }

    fn context(&self, name: &str, division: u32) -> JobContext {
        let mut context = JobContext::for_test(&self.folder.path().join(name), &[]);
        let input = |kind, path: PathBuf| JobInput {
            kind,
            path,
            fingerprint: Fingerprint([0; 32]),
            node: NodeName("input".into()),
        };
        context.spec.inputs = BTreeMap::from([
            ("weights".to_owned(), input(ArtifactKind::Weights, self.base.clone())),
            ("data".to_owned(), input(ArtifactKind::Mixture, self.folder.path().join("mix"))),
        ]);
        context.spec.remedies.micro_batch_division = division;
        std::fs::create_dir_all(context.out()).unwrap();
        context
    }

    fn run(&self, name: &str, division: u32) -> (Vec<Value>, WeightFile) {
        let mut context = self.context(name, division);
        assert!(matches!(run(&self.settings(), &mut context).unwrap(), JobEnd::Done(_)));
        let measured = context.meter.summary();
        for name in ["throughput/images_per_second", "throughput/flops_per_step", "time/compute_seconds"] {
            assert!(measured[name] > 0.0, "{measured:?}");
        }
        let lines = context.emitter.metric_lines().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        (lines, WeightFile::open(&context.out().join(model_folder::TRAINED_FILE)).unwrap())
    }
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn a_divided_micro_batch_makes_the_update_of_the_whole_one_but_for_rounding() {
    let bench = Bench::new();
    let (whole_lines, whole) = bench.run("whole", 1);
    let mut notes = Vec::new();
    let start = StageTrainer::open(&bench.settings(), &mut bench.context("start", 1), &mut notes).unwrap();
    let start: BTreeMap<String, _> = model_folder::trained(start.learner.model()).into_iter().collect();
    for division in [2, 5, 64] {
        let (lines, divided) = bench.run(&format!("divided-{division}"), division);
        assert_eq!(lines.len(), whole_lines.len());
        // Every loss is that of the same samples, in the same order, with the same draws.
        for (line, expected) in lines.iter().zip(&whole_lines) {
            for (name, expected) in expected.as_object().unwrap() {
                let (found, expected) = (line[name].as_f64().unwrap(), expected.as_f64().unwrap());
                assert!((found - expected).abs() <= 1e-4 * expected.abs(), "{name}: {found} is not {expected}");
            }
        }
        let (mut apart, mut moved) = (0.0f64, 0.0f64);
        for name in whole.names() {
            let values = |file: &WeightFile| file.get(name).unwrap().iter::<f32>().collect::<Vec<f32>>();
            let (one, other) = (values(&whole), values(&divided));
            let before = start[name].iter::<f32>().collect::<Vec<f32>>();
            apart += norm(one.iter().zip(&other).map(|(a, b)| a - b)).powi(2);
            moved += norm(one.iter().zip(&before).map(|(a, b)| a - b)).powi(2);
        }
        let (apart, moved) = (apart.sqrt(), moved.sqrt());
        println!("{division} parts: weights moved by {moved:.3e}, apart by {apart:.3e}");
        assert!(moved > 0.0 && apart < 1e-4 * moved, "{division} parts: {apart:e} of {moved:e}");
        let events = std::fs::read_to_string(bench.folder.path().join(format!("divided-{division}/events.jsonl")));
        // A micro-batch of 5 cannot be divided by 64, and it is said.
        assert_eq!(events.unwrap().contains("64 parts were asked for"), division == 64);
    }
}

#[test]
fn the_parts_of_a_batch_of_many_sizes_have_the_gradient_of_the_whole() {
    let bench = Bench::new();
    let mut notes = Vec::new();
    let trainer = StageTrainer::open(&bench.settings(), &mut bench.context("ragged", 1), &mut notes).unwrap();
    let (flow, loader) = (&trainer.batches.flow, &trainer.batches.loader);
    // A fresh bridge gives zero conditions, through which nothing before it would learn.
    let model = deepgen_model::weights::map_params(trainer.learner.model().clone(), |name, value| {
        let count = value.dims()[0];
        match name.starts_with("bridge.projector_") {
            true => deepgen_model::random::noise::<1>(3, name, [count], &value.device()).mul_scalar(0.05),
            false => value,
        }
    });
    let picture = |height: usize, width: usize, level: f32| Pixels {
        height,
        width,
        values: (0..3 * height * width).map(|i| ((i as f32 * 0.37 + level).sin()) * 0.9).collect(),
    };
    // The base knows positions of 32 pixels a side.
    let images = vec![picture(32, 32, 0.1), picture(32, 16, 0.5), picture(16, 32, 0.9)];
    let references =
        vec![vec![picture(32, 32, 1.1)], vec![picture(16, 16, 0.2), picture(32, 32, 0.7)], vec![picture(32, 16, 0.4)]];
    let texts = ["make it blue", "remove the red circle at the left", "add a square"].map(str::to_owned).to_vec();
    let ids = texts.iter().zip(&references).map(|(text, own)| {
        let tokens: Vec<usize> = own.iter().map(|image| loader.vision.num_tokens(image.height, image.width)).collect();
        encode_image_to_image(&loader.tokenizer, text, &tokens).unwrap()
    });
    let batch = Batch {
        task: Task::ImageToImage,
        keys: texts.clone(),
        ids: ids.collect(),
        texts,
        images,
        references,
        replaced: Vec::new(),
    };
    let gradients = |division: usize| {
        let mut sum = GradientSum::default();
        let mut value = 0.0;
        for rows in divide(3, division) {
            let share = rows.len() as f64 / 3.0;
            let part = Part::of(&batch, rows.clone());
            let of_batch = Rows { first: rows.start, count: rows.len(), total: 3 };
            let loss = with_dropout(8, of_batch, || flow.loss(&model, &part, "a", &Sigmas::Drawn)).unwrap();
            value += share * f64::from(loss.clone().into_scalar::<f32>());
            sum.add(&model, loss.backward(), share);
        }
        (value, sum)
    };
    let (whole_value, whole) = gradients(1);
    let values = |gradient: &Tensor<1>| gradient.clone().into_data().iter::<f32>().collect::<Vec<f32>>();
    let total = norm(whole.iter().flat_map(|(_, gradient)| values(gradient)));
    for division in [2, 3] {
        let (value, sum) = gradients(division);
        assert!((value - whole_value).abs() < 1e-5 * whole_value, "{value} is not {whole_value}");
        let mut num_reached = 0;
        for (name, expected) in whole.iter() {
            let (expected, found) = (values(expected), values(&sum.get(name).unwrap()));
            let apart = norm(found.iter().zip(&expected).map(|(a, b)| a - b));
            let size = norm(expected.into_iter());
            num_reached += usize::from(size > 1e-6);
            // Some gradients, as of a bias of keys, are zero but for rounding: what they are apart is small beside all others.
            assert!(
                apart <= 1e-3 * size + 1e-5 * total,
                "{division} parts, {name}: {apart:e} of {size:e}, all {total:e}"
            );
        }
        assert!(num_reached > whole.iter().count() / 2, "{num_reached} of {} learn", whole.iter().count());
    }
}

#[test]
fn images_are_drawn_on_the_way_and_change_nothing_that_is_trained() {
    let bench = Bench::new();
    let (plain_lines, _) = bench.run("plain", 1);
    let samples = SampleSettings {
        every: 4,
        prompts: ["a red circle", "two blue squares", "the word \"go\""].map(str::to_owned).to_vec(),
        seed: 3,
        steps: 2,
        guidance: 2.0,
    };
    let mut context = bench.context("drawn", 1);
    let settings = TrainSettings { samples: Some(samples.clone()), ..bench.settings() };
    assert!(matches!(run(&settings, &mut context).unwrap(), JobEnd::Done(_)));
    let lines: Vec<Value> =
        context.emitter.metric_lines().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines, plain_lines);
    let trained =
        |name: &str| std::fs::read(bench.folder.path().join(name).join("out").join("trained.safetensors")).unwrap();
    assert!(trained("drawn") == trained("plain"), "the weights differ");

    let folder = context.out().join("samples");
    let record: SamplesRecord = serde_json::from_slice(&std::fs::read(folder.join("samples.json")).unwrap()).unwrap();
    assert_eq!((record.prompts, record.columns, record.side), (samples.prompts, 3, 32));
    assert_eq!(record.steps, [4, 8, 12]);
    let grids: Vec<Vec<u8>> =
        record.steps.iter().map(|step| std::fs::read(folder.join(format!("step-{step:08}.png"))).unwrap()).collect();
    assert!(grids[0] != grids[2], "what is drawn changes with the weights");
    assert_eq!(image::load_from_memory(&grids[2]).unwrap().to_rgb8().dimensions(), (96, 32));
}

impl Bench {
    /// Trains with a cache in `folder`; returns every byte that the training leaves and what it said.
    fn run_cached(&self, name: &str, settings: &TrainSettings, cache: Option<(&Path, u64)>) -> (Vec<Vec<u8>>, String) {
        let mut context = self.context(name, 1);
        context.spec.frozen_cache = cache.map(|(path, max_bytes)| CachePlace { path: path.to_owned(), max_bytes });
        assert!(matches!(run(settings, &mut context).unwrap(), JobEnd::Done(_)));
        let mut left: Vec<Vec<u8>> =
            context.emitter.metric_lines().iter().map(|line| line.as_bytes().to_vec()).collect();
        left.push(std::fs::read(context.out().join(model_folder::TRAINED_FILE)).unwrap());
        (left, std::fs::read_to_string(context.dir.join(EVENTS_FILE)).unwrap())
    }
}

/// Returns every file below a folder, in order.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    let mut files: Vec<_> =
        entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect();
    files.sort();
    files
}

#[test]
fn a_cache_of_what_frozen_parts_compute_changes_no_bit_cold_warm_damaged_or_full() {
    let bench = Bench::new();
    let folder = bench.folder.path().join("frozen");
    let settings = bench.settings();
    let (expected, said) = bench.run_cached("without", &settings, None);
    assert!(expected.len() > 12 && !said.contains("frozen cache"), "{said}");

    let with = |name: &str, max_bytes: u64| bench.run_cached(name, &settings, Some((&folder, max_bytes)));
    let (cold, said) = with("cold", 1 << 30);
    assert_eq!(cold, expected);
    // Batches hold samples that an earlier one held, and validation looks at the same ones every time.
    assert!(said.contains("answers were there") && !said.contains(" 0 were computed"), "{said}");
    let entries = files_below(&folder);
    assert!(entries.len() > 50, "{} entries", entries.len());

    let (warm, said) = with("warm", 1 << 30);
    assert_eq!(warm, expected);
    assert!(said.contains(" 0 were computed"), "{said}");

    // A flipped bit, half a file, another entry's content.
    for (number, path) in entries.iter().enumerate() {
        let mut bytes = std::fs::read(path).unwrap();
        match number % 3 {
            0 => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 4;
            }
            1 => bytes.truncate(bytes.len() / 2),
            _ => bytes = std::fs::read(&entries[(number + 3) % entries.len()]).unwrap(),
        }
        std::fs::write(path, bytes).unwrap();
    }
    let (damaged, said) = with("damaged", 1 << 30);
    assert_eq!(damaged, expected);
    assert!(said.contains("a damaged entry of `frozen_cache` is computed again"), "{said}");
    let (mended, said) = with("mended", 1 << 30);
    assert_eq!(mended, expected);
    assert!(said.contains(" 0 were computed"), "what was damaged is whole again: {said}");

    // A budget of a few entries holds them and no more.
    std::fs::remove_dir_all(&folder).unwrap();
    let (full, said) = with("full", 20_000);
    assert_eq!(full, expected);
    let num_bytes: u64 = files_below(&folder).iter().map(|path| std::fs::metadata(path).unwrap().len()).sum();
    assert!(said.contains("takes no more") && (1..=20_000).contains(&num_bytes), "{num_bytes} bytes: {said}");
}

#[test]
fn a_part_that_changes_is_not_cached() {
    let bench = Bench::new();
    let folder = bench.folder.path().join("frozen");
    let mut settings = bench.settings();
    settings.train.max_iters = 3;
    settings.model.lora = serde_json::from_value(json!({
        "kind": "adapters", "config": { "targets": "auto", "rank": 4, "alpha": 8.0, "dropout": 0.3 },
    }))
    .unwrap();
    let (expected, _) = bench.run_cached("without", &settings, None);
    for name in ["cold", "warm"] {
        let (left, said) = bench.run_cached(name, &settings, Some((&folder, 1 << 30)));
        assert_eq!(left, expected);
        assert!(said.contains("keeps no vision"), "{said}");
    }
    let kept: Vec<_> = std::fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(kept.len() == 1 && kept[0].to_string_lossy().starts_with("moments-"), "{kept:?}");
}
