//! The released RL prompts hold a benchmark's test set (docs/spec/data.md section 8): a mixture of them is caught.

use std::path::{Path, PathBuf};

use deepgen_contract::data::{
    ContaminationPolicy, ContaminationSettings, FilterSettings, MemberSettings, MixSettings, PrepareSettings, Sampling,
    SourceSettings, TaskCycle,
};
use deepgen_data::contamination::BenchmarkPrompts;
use deepgen_data::mix::{MixError, MixtureFile, mix};
use deepgen_data::prepare::{PreparePlace, prepare};

fn fixture(name: &str) -> PathBuf {
    std::path::absolute("tests/fixtures/prompts").unwrap().join(name)
}

fn lines(name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(fixture(name)).unwrap();
    text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect()
}

/// Mixes the released training prompts in the way of the release.
fn released(dir: &Path, policy: ContaminationPolicy, benchmarks: &[BenchmarkPrompts]) -> Result<MixtureFile, MixError> {
    let files = [
        ("general", "unigenbench_train_data_general"),
        ("text", "unigenbench_train_data_ocr"),
        ("reason", "corebench"),
    ];
    let inputs = files.map(|(name, file)| {
        let out = dir.join(name);
        let path = fixture(&format!("{file}.txt")).to_string_lossy().into_owned();
        let filters = FilterSettings { min_side: 80, min_aspect: 0.1, max_aspect: 10.0 };
        let source = SourceSettings::Prompts { path };
        let settings = PrepareSettings { source, nominal_size: 0, filters, dedupe: false };
        let place = PreparePlace { seed: 0, project_root: dir, out_dir: &out, num_threads: 1 };
        prepare(&settings, &place, &mut |_| true).unwrap();
        (name.to_owned(), out)
    });
    let member = MemberSettings { weight: 3.0, ..MemberSettings::default() };
    let settings = MixSettings {
        cycle: TaskCycle { edit: 0, generation: 0 },
        micro_batch: 4,
        sampling: Sampling::SampleProportional,
        members: [("text".to_owned(), member)].into(),
        contamination: ContaminationSettings { policy, ngram: 8, benchmarks: [].into() },
    };
    mix(&settings, &inputs, benchmarks, &dir.join("mix"))
}

fn benchmarks() -> Vec<BenchmarkPrompts> {
    // As the benchmark's own repository has them: equal up to white space.
    let corebench = lines("corebench.txt").iter().map(|line| line.replace(". ", ".\n")).collect();
    let named = |name: &str, prompts| BenchmarkPrompts { name: name.into(), prompts };
    vec![named("T2I-CoReBench", corebench), named("GenEval", lines("geneval_prompt.txt"))]
}

#[test]
fn the_test_set_among_the_released_training_prompts_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let file = released(dir.path(), ContaminationPolicy::Warn, &benchmarks()).unwrap();
    let caught = file.overlaps.iter().find(|overlap| overlap.num_equal > 0).unwrap();
    assert_eq!((caught.member.as_str(), caught.benchmark.as_str()), ("reason", "T2I-CoReBench"));
    assert_eq!((caught.num_equal, caught.num_texts, caught.num_prompts_hit, caught.num_prompts), (20, 20, 20, 20));
    // No other set holds a prompt of a benchmark word for word.
    assert_eq!(file.overlaps.iter().filter(|overlap| overlap.num_equal > 0).count(), 1);
    let share: f64 = file.members.iter().map(|member| member.share).sum();
    assert!((share - 1.0).abs() < 1e-12);
    assert_eq!(file.members[2].share, 120.0 / 180.0);
}

#[test]
fn the_test_set_among_the_released_training_prompts_ends_a_strict_mix() {
    let dir = tempfile::tempdir().unwrap();
    let error = released(dir.path(), ContaminationPolicy::Fail, &benchmarks()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("`reason`") && text.contains("T2I-CoReBench") && text.contains("20 texts equal"), "{text}");
    assert!(!dir.path().join("mix/mixture.json").exists());
    assert!(released(dir.path(), ContaminationPolicy::Off, &benchmarks()).unwrap().overlaps.is_empty());
}
