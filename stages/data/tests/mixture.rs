//! Mixtures over prepared data sets: order, resume, ranks, shares, held-out samples, batches, and what is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use deepgen_contract::data::{
    ContaminationPolicy, ContaminationSettings, FilterSettings, ImageMode, ImageSettings, MemberSettings, MixSettings,
    PrepareSettings, Sampling, SourceSettings, TaskCycle,
};
use deepgen_contract::model::VisionConfig;
use deepgen_data::batch::{Batch, Loader};
use deepgen_data::contamination::BenchmarkPrompts;
use deepgen_data::mix::{MixError, mix};
use deepgen_data::mixture::Mixture;
use deepgen_data::prefetch::Prefetch;
use deepgen_data::prepare::{PreparePlace, prepare};
use deepgen_data::sample::{SetKind, Task};
use deepgen_data::stream::Shard;
use deepgen_data::tokenizer::Tokenizer;
use serde_json::json;
use tempfile::TempDir;

/// Data sets `(kind, format, count, nominal size)` of the shapes world below one folder, named after their kind.
fn sets(dir: &TempDir, kinds: &[(&str, &str, usize, u64)]) -> Vec<(String, PathBuf)> {
    let prepared = kinds.iter().map(|&(kind, format, count, nominal_size)| {
        let shapes = serde_json::from_value(json!({"kind": kind, "format": format, "count": count})).unwrap();
        let filters = FilterSettings { min_side: 0, min_aspect: 0.1, max_aspect: 10.0 };
        let source = SourceSettings::Shapes { shapes };
        let settings = PrepareSettings { source, nominal_size, filters, dedupe: false };
        let out = dir.path().join(kind);
        let place = PreparePlace { seed: 5, project_root: dir.path(), out_dir: &out, num_threads: 1 };
        prepare(&settings, &place, &mut |_| true).unwrap();
        (kind.to_owned(), out)
    });
    prepared.collect()
}

fn settings(edit: u64, generation: u64) -> MixSettings {
    MixSettings {
        cycle: TaskCycle { edit, generation },
        micro_batch: 4,
        sampling: Sampling::Permutation,
        members: [].into(),
        contamination: ContaminationSettings { policy: ContaminationPolicy::Warn, ngram: 8, benchmarks: [].into() },
    }
}

fn joint(dir: &TempDir) -> PathBuf {
    let inputs = sets(dir, &[("captions", "tar", 30, 300), ("text", "blip3o", 10, 700), ("edits", "edit_list", 9, 1)]);
    let out = dir.path().join("mix");
    mix(&settings(1, 3), &inputs, &[], &out).unwrap();
    out
}

fn vision() -> VisionConfig {
    VisionConfig {
        depth: 2,
        hidden_size: 64,
        intermediate_size: 128,
        num_heads: 4,
        in_channels: 3,
        patch_size: 4,
        temporal_patch_size: 2,
        spatial_merge_size: 2,
        window_size: 16,
        fullatt_block_indexes: vec![1],
        out_hidden_size: 64,
        input_scale: [1, 1],
    }
}

fn loader(mixture: &Path) -> Loader {
    let texts = ["a red circle and a blue square".to_owned()];
    Loader {
        mixture: Mixture::open(mixture).unwrap(),
        tokenizer: Tokenizer::train(&texts, 300).unwrap(),
        image: ImageSettings { size: 32, unit: 16, mode: ImageMode::Exact },
        vision: vision(),
        caption_dropout: 0.25,
    }
}

#[test]
fn batches_are_pure_and_follow_the_cycle_on_every_rank() {
    let dir = tempfile::tempdir().unwrap();
    let mixture = Mixture::open(&joint(&dir)).unwrap();
    let tasks = |rank| {
        let shard = Shard { seed: 3, rank, world: 2 };
        (0..8).map(|m| mixture.slot(shard, m).unwrap().task).collect::<Vec<_>>()
    };
    use Task::{ImageToImage as E, TextToImage as G};
    assert_eq!(tasks(0), [E, G, G, G, E, G, G, G]);
    assert_eq!(tasks(1), tasks(0));
    // Two ranks together see each of the 40 captioned samples once in a pass: five batches of four each.
    let mut seen = Vec::new();
    for rank in 0..2 {
        seen.extend(mixture.items(SetKind::Generation, Shard { seed: 3, rank, world: 2 }, 0, 20).unwrap());
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 40);
}

#[test]
fn shares_are_given_for_the_sizes_at_hand_and_those_of_the_paper() {
    let dir = tempfile::tempdir().unwrap();
    let mixture = Mixture::open(&joint(&dir)).unwrap();
    let file = mixture.description();
    let share = |name: &str| {
        let member = file.members.iter().find(|member| member.name == name).unwrap();
        (member.share, member.nominal_share.unwrap())
    };
    assert_eq!(share("edits"), (0.25, 0.25));
    assert_eq!(share("captions").0, 0.75 * 0.75);
    assert!((share("text").1 - 0.75 * 0.7).abs() < 1e-12);
    let expected = "\
set       kind        samples  weight   share   paper
captions  generation       30       1  56.2 %  22.5 %
edits     edit              9       1  25.0 %  25.0 %
text      generation       10       1  18.8 %  52.5 %
";
    assert_eq!(file.table(), expected);
}

#[test]
fn held_out_samples_are_never_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let mixture = Mixture::open(&joint(&dir)).unwrap().hold_out_per_task(5).unwrap();
    let held = mixture.held_out(SetKind::Generation);
    let members: Vec<_> = held.iter().map(|item| (item.member, item.index)).collect();
    assert_eq!(members, [(0, 27), (0, 28), (0, 29), (2, 8), (2, 9)]);
    assert_eq!(mixture.held_out(SetKind::Edit).len(), 5);
    let drawn = mixture.items(SetKind::Generation, Shard::single(8), 0, 200).unwrap();
    assert!(drawn.iter().all(|item| !held.contains(item)));
    assert!(Mixture::open(&dir.path().join("mix")).unwrap().hold_out_per_task(9).is_err());
}

#[test]
fn a_prefetched_run_from_the_middle_gives_the_batches_of_a_plain_one() {
    let dir = tempfile::tempdir().unwrap();
    let loader = Arc::new(loader(&joint(&dir)));
    let shard = Shard { seed: 7, rank: 1, world: 2 };
    let plain: Vec<Batch> = (0..24).map(|m| loader.load(shard, m).unwrap()).collect();
    for (first, num_threads) in [(0, 1), (0, 2), (0, 4), (11, 2)] {
        let loader = Arc::clone(&loader);
        let ahead = Prefetch::new(first..24, 3, num_threads, move |m| loader.load(shard, m).unwrap());
        assert!(ahead.eq(plain[first as usize..].iter().cloned()));
    }
    let captions: Vec<_> = plain.iter().filter(|b| b.task == Task::TextToImage).flat_map(|b| &b.texts).collect();
    let num_dropped = captions.iter().filter(|text| text.is_empty()).count();
    // 72 captions at one in four: mean 18, standard deviation 3.7.
    assert!((5..=31).contains(&num_dropped), "{num_dropped} of {}", captions.len());
    let edit = &plain[0];
    assert!(edit.texts.iter().all(|text| !text.is_empty()));
    let image_pad = loader.tokenizer.special_tokens().unwrap().image_pad;
    for (ids, references) in edit.ids.iter().zip(&edit.references) {
        assert_eq!(references.len(), 1);
        assert_eq!(ids.iter().filter(|&&id| id == image_pad).count(), 16);
    }
    assert_eq!((edit.images[0].height, edit.images[0].width, edit.images[0].values.len()), (32, 32, 3 * 32 * 32));
}

/// A batch that is counted while it lives.
struct Counted(Batch, Arc<AtomicI64>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

#[test]
fn no_more_batches_are_in_memory_than_the_depth_and_the_one_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let loader = Arc::new(loader(&joint(&dir)));
    for (depth, num_threads) in [(1, 1), (2, 4), (5, 2)] {
        let (alive, most) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
        let (count, peak, loader) = (Arc::clone(&alive), Arc::clone(&most), Arc::clone(&loader));
        let ahead = Prefetch::new(0..40, depth, num_threads, move |m| {
            peak.fetch_max(count.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            Counted(loader.load(Shard::single(7), m).unwrap(), Arc::clone(&count))
        });
        let mut num_samples = 0;
        for batch in ahead {
            num_samples += batch.0.images.len();
            std::thread::yield_now();
        }
        assert_eq!(num_samples, 160);
        assert!(most.load(Ordering::SeqCst) <= depth as i64 + 1, "{most:?} at depth {depth}");
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }
}

#[test]
fn images_of_several_sizes_make_one_batch() {
    let dir = tempfile::tempdir().unwrap();
    let mut lines = String::new();
    for (i, (width, height)) in [(64, 64), (100, 50), (50, 100), (65, 64)].into_iter().enumerate() {
        image::RgbImage::new(width, height).save(dir.path().join(format!("{i}.png"))).unwrap();
        lines += &format!("{{\"file_name\":\"{i}.png\",\"text\":\"picture {i}\"}}\n");
    }
    std::fs::write(dir.path().join("metadata.jsonl"), lines).unwrap();
    let source = SourceSettings::JsonLines {
        index: "metadata.jsonl".into(),
        images: ".".into(),
        text_key: "text".into(),
        image_key: "file_name".into(),
        reference_key: String::new(),
        max_references: 0,
    };
    let filters = FilterSettings { min_side: 0, min_aspect: 0.1, max_aspect: 10.0 };
    let out = dir.path().join("set");
    let place = PreparePlace { seed: 5, project_root: dir.path(), out_dir: &out, num_threads: 1 };
    prepare(&PrepareSettings { source, nominal_size: 0, filters, dedupe: false }, &place, &mut |_| true).unwrap();
    let mixed = dir.path().join("mix");
    mix(&settings(0, 1), &[("set".into(), out)], &[], &mixed).unwrap();
    let mut loader = loader(&mixed);
    loader.image = ImageSettings { size: 64, unit: 16, mode: ImageMode::FixPixels };
    let batch = loader.load(Shard::single(1), 0).unwrap();
    let sizes: BTreeMap<String, (usize, usize)> = batch
        .keys
        .iter()
        .zip(&batch.images)
        .map(|(key, image)| {
            assert_eq!(image.values.len(), 3 * image.width * image.height);
            (key.clone(), (image.width, image.height))
        })
        .collect();
    // 100x50 by 64 / sqrt(5000) is 90.5x45.3, rounded up to whole units.
    let expected = [(64, 64), (96, 48), (48, 96), (80, 64)];
    assert_eq!(sizes.into_values().collect::<Vec<_>>(), expected);
}

#[test]
fn what_was_drawn_is_counted_by_arithmetic() {
    let dir = tempfile::tempdir().unwrap();
    let mixture = Mixture::open(&joint(&dir)).unwrap();
    let drawn = mixture.num_drawn(3, 2, 10);
    let mut counted = vec![0; 3];
    for rank in 0..2 {
        for m in 0..10 {
            mixture
                .slot(Shard { seed: 3, rank, world: 2 }, m)
                .unwrap()
                .items
                .iter()
                .for_each(|i| counted[i.member] += 1);
        }
    }
    assert_eq!((drawn.clone(), drawn.iter().sum::<u64>()), (counted, 80));
    // Ten batches of E, G, G, G, ...: three of edits.
    assert_eq!(drawn[1], 24);
    assert!(mixture.realised_table(&drawn).contains("edits     edit           24  25.0 %    30.0 %"));
}

#[test]
fn a_sample_that_breaks_after_preparation_is_replaced_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = sets(&dir, &[("text", "blip3o", 10, 0)]);
    let out = dir.path().join("mix");
    mix(&settings(0, 1), &inputs, &[], &out).unwrap();
    let loader = loader(&out);
    let images = dir.path().join("text/source/images");
    let mut files: Vec<_> = std::fs::read_dir(images).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    std::fs::write(&files[0], "broken").unwrap();
    let batches: Vec<_> = (0..5).map(|m| loader.load(Shard::single(1), m).unwrap()).collect();
    let replaced: Vec<_> = batches.iter().flat_map(|batch| &batch.replaced).collect();
    // Two passes over ten samples meet the broken one twice; a replacement may meet it again.
    assert!((2..=4).contains(&replaced.len()), "{replaced:?}");
    assert!(replaced.iter().all(|reason| reason.contains("data.json#0")));
    assert!(batches.iter().all(|batch| batch.images.len() == 4));
    assert_eq!(batches, (0..5).map(|m| loader.load(Shard::single(1), m).unwrap()).collect::<Vec<_>>());
}

#[test]
fn prompts_are_drawn_by_weight_and_carry_their_rewards() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = sets(&dir, &[("rl_general", "prompts", 40, 0), ("rl_text", "prompts", 20, 0)]);
    let mut settings = settings(0, 0);
    settings.sampling = Sampling::SampleProportional;
    let member = |weight, name: &str| MemberSettings { weight, rewards: [(name.to_owned(), 1.0)].into() };
    settings.members.insert("rl_general".into(), member(1.0, "rule"));
    settings.members.insert("rl_text".into(), member(3.0, "ocr"));
    let out = dir.path().join("mix");
    let file = mix(&settings, &inputs, &[], &out).unwrap();
    let sizes: Vec<f64> = file.members.iter().map(|member| member.num_samples as f64).collect();
    let expected = 3.0 * sizes[1] / (sizes[0] + 3.0 * sizes[1]);
    assert!((file.members[1].share - expected).abs() < 1e-12);
    let mixture = Mixture::open(&out).unwrap().hold_out_per_member(2).unwrap();
    let items = mixture.items(SetKind::Prompts, Shard::single(2), 0, 4000).unwrap();
    let prompts: Vec<_> = items[..20].iter().map(|&item| mixture.prompt(item).unwrap()).collect();
    for prompt in &prompts {
        let rewards = &mixture.description().members[prompt.member].rewards;
        assert_eq!(rewards.contains_key("ocr"), prompt.text.contains('"'));
    }
    let drawn = items.iter().filter(|item| item.member == 1).count() as f64 / 4000.0;
    let left = 3.0 * (sizes[1] - 2.0) / (sizes[0] - 2.0 + 3.0 * (sizes[1] - 2.0));
    assert!((drawn - left).abs() < 0.04, "{drawn} against {left}");
    assert!(mixture.slot(Shard::single(2), 0).is_err());
}

#[test]
fn a_mixture_that_makes_no_sense_is_refused_with_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = sets(&dir, &[("captions", "tar", 4, 0), ("rl_text", "prompts", 4, 0)]);
    let out = dir.path().join("mix");
    let refused = |change: &dyn Fn(&mut MixSettings), inputs: &[(String, PathBuf)]| {
        let mut settings = settings(0, 1);
        change(&mut settings);
        mix(&settings, inputs, &[], &out).expect_err("it makes no sense").to_string()
    };
    let captions = &inputs[..1];
    assert!(refused(&|_| {}, &inputs).contains("mix them apart"));
    assert!(refused(&|_| {}, &[]).contains("at least one"));
    assert!(refused(&|s| s.cycle.edit = 1, captions).contains("cycle.edit"));
    assert!(refused(&|s| s.cycle.generation = 0, captions).contains("cycle.generation"));
    assert!(refused(&|s| s.micro_batch = 0, captions).contains("micro_batch"));
    let member = |weight| MemberSettings { weight, ..MemberSettings::default() };
    assert!(
        refused(&|s| _ = s.members.insert("caption".into(), member(1.0)), captions).contains("the inputs are captions")
    );
    assert!(refused(&|s| _ = s.members.insert("captions".into(), member(2.0)), captions).contains("permutation"));
    assert!(refused(&|s| _ = s.members.insert("captions".into(), member(0.0)), captions).contains("positive"));
}

#[test]
fn an_overlap_with_a_benchmark_is_reported_or_ends_the_mix() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = sets(&dir, &[("rl_general", "prompts", 20, 0)]);
    let out = dir.path().join("mix");
    let text = std::fs::read_to_string(inputs[0].1.join("source/prompts.txt")).unwrap();
    let first = text.lines().next().unwrap();
    let benchmark = BenchmarkPrompts { name: "geneval".into(), prompts: vec![first.to_uppercase(), "other".into()] };
    let mut settings = settings(0, 1);
    let file = mix(&settings, &inputs, std::slice::from_ref(&benchmark), &out).unwrap();
    assert_eq!((file.overlaps[0].num_equal, file.overlaps[0].num_prompts_hit), (1, 1));
    settings.contamination.policy = ContaminationPolicy::Fail;
    let error = mix(&settings, &inputs, &[benchmark], &out);
    assert!(matches!(error, Err(MixError::Contaminated { .. })));
}
