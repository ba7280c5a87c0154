//! Runs for the tests, written to disk as the orchestrator and its workers would: plan, journal, artifacts, jobs.
//!
//! Numbers and images are made up and the same every time; nothing here is a result.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use deepgen_contract::artifact::{Environment, MANIFEST_VERSION, Manifest};
use deepgen_contract::eval::{
    ANSWERS_FILE, EVAL_VERSION, Estimate, IMAGES_FILE, ImageRecord, PartScore, PublishedScore, SCORES_FILE, ScoreTable,
    TagScore,
};
use deepgen_contract::event::{WorkerEvent, WorkerEventKind};
use deepgen_contract::id::NodeName;
use deepgen_contract::job::{EVENTS_FILE, FailureCause, METRICS_FILE, STDERR_FILE};
use deepgen_contract::settings::Settings;
use deepgen_contract::stage::StageKind;
use serde_json::json;

use super::picture::{draw, is_right};
use crate::exec::jobdir::JobDir;
use crate::plan::{ExternalFiles, Plan, PlannedNode};
use crate::run::event::{Failure, NodeState, Origin, RunEvent, RunResult};
use crate::spec::{Overrides, Resolved, load, load_sweep};
use crate::store::journal::{JOURNAL_FILE, Journal};
use crate::store::layout::RESOLVED_FILE;
use crate::store::saved::write_plan;
use crate::store::{ArtifactStore, Layout, artifacts};

const START_MS: u64 = 1_795_556_112_000;
const PIPELINE: &str = include_str!("../../tests/fixtures/report/full.toml");
const EXPERIMENT: &str = include_str!("../../tests/fixtures/report/architecture.toml");
const REFERENCE: &str = include_str!("../../experiments/reference/deepgen.toml");

/// A run on disk; gone when it is dropped.
pub struct Fixture {
    _dir: tempfile::TempDir,
    pub store: ArtifactStore,
    pub run_dir: PathBuf,
}

/// A disk on which everything is there.
struct Everything;

impl ExternalFiles for Everything {
    fn content_hash(&self, path: &str) -> Option<String> {
        Some(path.to_owned())
    }
}

/// What becomes of the nodes of a fixture.
pub struct Story {
    /// Nodes whose results an earlier run had made.
    pub cached: &'static [&'static str],
    /// The node that fails, if one does.
    pub failing: Option<&'static str>,
    /// Message of the failure, and a remark of every training node.
    pub words: &'static str,
}

/// A run of the whole pipeline.
pub fn run(story: &Story) -> Fixture {
    build(story, false)
}

/// A run of an experiment over it.
pub fn sweep(story: &Story) -> Fixture {
    build(story, true)
}

fn build(story: &Story, is_sweep: bool) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for folder in ["pipelines", "experiments/reference"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    std::os::unix::fs::symlink(std::path::absolute("stages").unwrap(), root.join("stages")).unwrap();
    fs::write(root.join("pipelines/full.toml"), PIPELINE).unwrap();
    fs::write(root.join("experiments/architecture.toml"), EXPERIMENT).unwrap();
    fs::write(root.join("experiments/reference/deepgen.toml"), REFERENCE).unwrap();
    let overrides = Overrides::default();
    let resolved = match is_sweep {
        true => load_sweep(&root.join("experiments/architecture.toml"), &overrides),
        false => load(&root.join("pipelines/full.toml"), &overrides),
    };
    let resolved = resolved.unwrap_or_else(|problems| panic!("{problems:#?}"));
    let store = ArtifactStore::open(Layout::new(root.join("artifacts")));
    let plan = Plan::build(&resolved, &store, &Everything);
    let run_dir = write_run(&resolved, &plan, &store, story);
    Fixture { _dir: dir, store, run_dir }
}

fn write_run(resolved: &Resolved, plan: &Plan, store: &ArtifactStore, story: &Story) -> PathBuf {
    let run = format!("20261124-213512-{}", resolved.name);
    let run_dir = store.layout().run(&run);
    fs::create_dir_all(&run_dir).unwrap();
    write_plan(resolved, plan, None, &run_dir).unwrap();
    fs::write(run_dir.join(RESOLVED_FILE), toml::to_string(resolved).unwrap()).unwrap();
    let mut journal = Journal::open(&run_dir.join(JOURNAL_FILE)).unwrap();
    let file = if resolved.sweep.is_some() { "sweep experiments/architecture.toml" } else { "run pipelines/full.toml" };
    let command = format!("/usr/local/bin/deepgen {file} --set sft.train.max_iters=240");
    let started = RunEvent::RunStarted {
        run,
        pipeline: resolved.name.clone(),
        profile: resolved.profile.clone(),
        seed: resolved.seed,
        plan: "0".repeat(32),
        command: command.split(' ').map(str::to_owned).collect(),
        pid: 1,
        host: "elsewhere".into(),
    };
    let mut clock = START_MS;
    journal.append(&[started], clock).unwrap();
    let mut lost: BTreeMap<NodeName, NodeName> = BTreeMap::new();
    for planned in &plan.nodes {
        let name = &planned.node.name;
        let mut enter = |state: NodeState, clock: u64| {
            let event = RunEvent::Node { node: name.clone(), fingerprint: planned.fingerprint, state };
            journal.append(&[event], clock).unwrap();
        };
        if let Some(by) = planned.node.inputs.values().find_map(|input| lost.get(input)).cloned() {
            enter(NodeState::Blocked { by: by.clone() }, clock);
            lost.insert(name.clone(), by);
            continue;
        }
        if story.cached.contains(&name.0.as_str()) {
            seal(plan, planned, store, story, START_MS - 1_000_000);
            enter(NodeState::Done { origin: Origin::Cached }, clock);
            continue;
        }
        enter(NodeState::Running { attempt: 1 }, clock);
        write_job(planned, store, story);
        clock += (1000.0 * seconds(planned.node.kind)) as u64;
        if story.failing == Some(name.0.as_str()) {
            let failure = Failure { cause: FailureCause::NonFinite, message: story.words.into() };
            enter(NodeState::Failed { attempt: 1, failure }, clock);
            lost.insert(name.clone(), name.clone());
            continue;
        }
        seal(plan, planned, store, story, clock);
        enter(NodeState::Done { origin: Origin::Ran { attempt: 1 } }, clock);
    }
    let result = if lost.is_empty() { RunResult::Done } else { RunResult::Failed };
    journal.append(&[RunEvent::RunFinished { result }], clock).unwrap();
    run_dir
}

fn seconds(kind: StageKind) -> f64 {
    match kind {
        StageKind::Train => 96.4,
        StageKind::Rl => 141.0,
        StageKind::Generate => 11.2,
        StageKind::Prepare => 1.7,
        _ => 0.42,
    }
}

/// How far the node's weights are trained: 0 for the base.
fn skill(plan: &Plan, planned: &PlannedNode) -> f64 {
    let own = match planned.node.kind {
        StageKind::Train => 1.0,
        StageKind::Rl => 0.6,
        _ => 0.0,
    };
    let inputs =
        planned.node.inputs.iter().filter(|(port, _)| matches!(port.as_str(), "weights" | "checkpoint" | "images"));
    let best = inputs.filter_map(|(_, input)| Some(skill(plan, plan.node(input)?))).fold(0.0, f64::max);
    // A variant is a little worse, so that differences are seen.
    let variant = if own > 0.0 && planned.node.name.0.contains("w/o") { 0.1 } else { 0.0 };
    best + own - variant
}

fn write_job(planned: &PlannedNode, store: &ArtifactStore, story: &Story) {
    let folder = JobDir::new(&store.layout().jobs(), &planned.fingerprint).attempt(1);
    fs::create_dir_all(&folder).unwrap();
    let is_training = matches!(planned.node.kind, StageKind::Train | StageKind::Rl);
    let warning = WorkerEventKind::Warning {
        message: "the contamination check met 3 captions of geneval and left them out".into(),
    };
    let mut events: Vec<WorkerEventKind> = vec![WorkerEventKind::Started { pid: 7, device: "cpu".into() }];
    events.extend((planned.node.kind == StageKind::Mix).then_some(warning));
    if is_training {
        let values =
            |step: u64| BTreeMap::from([("train/loss_text2image".to_owned(), 0.9 / (1.0 + step as f64 / 30.0))]);
        events.extend((1..=9).map(|i| WorkerEventKind::Metrics { step: 10 * i, values: values(10 * i) }));
    }
    let lines =
        events.into_iter().map(|event| serde_json::to_string(&WorkerEvent { ts_ms: START_MS, event }).unwrap() + "\n");
    fs::write(folder.join(EVENTS_FILE), lines.collect::<String>()).unwrap();
    if story.failing == Some(planned.node.name.0.as_str()) {
        fs::write(folder.join(STDERR_FILE), format!("iteration 90\n{}\n", story.words)).unwrap();
    }
}

fn seal(plan: &Plan, planned: &PlannedNode, store: &ArtifactStore, story: &Story, sealed_ms: u64) {
    let out = store.layout().root().join("out");
    fs::create_dir_all(&out).unwrap();
    let skill = skill(plan, planned);
    let mut notes = Vec::new();
    let metrics = match &planned.node.settings {
        Settings::Train(_) => {
            notes.push(format!("the bridge was warm-started, which the paper does not do; {}", story.words));
            write_metrics(&out, 240, |step| train_metrics(step, skill))
        }
        Settings::Rl(_) => write_metrics(&out, 16, rl_metrics),
        Settings::Generate(generate) => write_images(&out, planned, &generate.benchmark, skill, story.words),
        Settings::Score(score) => write_scores(&out, &score.benchmark, skill),
        _ => {
            fs::write(out.join("index.json"), "{}").unwrap();
            BTreeMap::from([("data/samples".to_owned(), 4000.0)])
        }
    };
    let node = &planned.node;
    let run_seconds = seconds(node.kind);
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        kind: node.settings.output(),
        fingerprint: planned.fingerprint,
        node: node.name.clone(),
        stage: node.stage.clone(),
        stage_kind: node.kind,
        code_version: node.kind.code_version(),
        settings: serde_json::to_value(&node.settings).unwrap(),
        seed: node.seed,
        inputs: planned.inputs.clone().into_iter().collect(),
        content: planned.content.clone().into_iter().collect(),
        is_smoke: planned.is_smoke,
        files: Vec::new(),
        metrics,
        throughput: BTreeMap::new(),
        notes,
        started_ms: sealed_ms - (1000.0 * run_seconds) as u64,
        sealed_ms,
        run_seconds,
        attempts: 1,
        environment: Environment {
            host: "elsewhere".into(),
            os: "Linux 6.1 Debian".into(),
            cpu: "Example CPU 2.4 GHz".into(),
            cores: 2,
            device: "cpu".into(),
            threads: 2,
            deepgen_version: "0.1.0".into(),
            worker_blake3: "ab".repeat(32),
            git_commit: Some("cd".repeat(20)),
            git_dirty: true,
            ..Environment::default()
        },
    };
    artifacts::seal(store.layout(), &out, manifest).unwrap();
}

/// Writes metric lines and returns the last value of each name.
fn write_metrics(out: &Path, num: u64, at: impl Fn(u64) -> BTreeMap<String, f64>) -> BTreeMap<String, f64> {
    let mut last = BTreeMap::new();
    let mut text = String::new();
    for step in 1..=num {
        let values = at(step);
        let mut line = json!({ "step": step });
        values.iter().for_each(|(name, value)| line[name] = json!(value));
        text.push_str(&format!("{line}\n"));
        last.extend(values);
    }
    fs::write(out.join(METRICS_FILE), text).unwrap();
    last
}

fn wobble(step: u64, salt: u64) -> f64 {
    let mut mixed = (step + 1000 * salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed >> 40) as f64 / (1u64 << 24) as f64 - 0.5
}

fn train_metrics(step: u64, skill: f64) -> BTreeMap<String, f64> {
    let t = step as f64;
    let floor = 0.28 / (0.6 + skill);
    let loss = |slow: f64, salt| floor + 0.5 * (-t / slow).exp() + 0.09 * wobble(step, salt);
    let mut values = BTreeMap::from([
        ("train/loss_text2image".to_owned(), loss(45.0, 1)),
        ("train/loss_image2image".to_owned(), 0.8 * loss(80.0, 2)),
        ("train/lr".to_owned(), 5e-4 * (t / 20.0).min(1.0) * (0.5 + 0.5 * (t / 80.0).cos())),
        ("train/grad_norm".to_owned(), 1.4 + wobble(step, 3)),
    ]);
    if step.is_multiple_of(20) {
        values.insert("validation/loss_text2image".into(), floor + 0.45 * (-t / 55.0).exp());
        values.insert("validation/loss_image2image".into(), 0.8 * floor + 0.4 * (-t / 90.0).exp());
    }
    values
}

fn rl_metrics(step: u64) -> BTreeMap<String, f64> {
    let t = step as f64;
    BTreeMap::from([
        ("reward/objects".to_owned(), 0.55 + 0.012 * t + 0.05 * wobble(step, 4)),
        ("reward/words".to_owned(), 0.41 + 0.009 * t + 0.06 * wobble(step, 5)),
        ("reward/pairwise".to_owned(), 0.5 + 0.05 * wobble(step, 6)),
        ("rl/kl".to_owned(), 1e-4 * t),
        ("rl/clip_fraction".to_owned(), 0.2 + 0.1 * wobble(step, 7)),
        ("train/loss_sft".to_owned(), 0.16 + 0.01 * wobble(step, 8)),
    ])
}

/// Prompts of a made-up benchmark: tag, prompt, and for an edit the prompt of its source.
fn items(benchmark: &str) -> Vec<(&'static str, String, Option<String>)> {
    let colours = ["red", "green", "blue", "yellow"];
    let shapes = ["circle", "square", "triangle", "cross"];
    let mut items = Vec::new();
    for i in 0..24 {
        let (colour, shape, other) = (colours[i % 4], shapes[i / 4 % 4], colours[(i + 1) % 4]);
        let one = format!("a {colour} {shape}");
        items.push(match (benchmark, i % 3) {
            ("gedit", 0) => ("color_alter", format!("make the {shape} {other}"), Some(one)),
            ("gedit", _) => ("subject-replace", format!("replace the {shape} with a cross"), Some(one)),
            (_, 0) => ("colors", one, None),
            (_, 1) => ("two_object", format!("a {colour} {shape} and a {other} square"), None),
            _ => ("position", format!("a {colour} {shape} above a {other} cross"), None),
        });
    }
    items.sort_by_key(|(tag, ..)| *tag);
    items
}

fn write_images(out: &Path, planned: &PlannedNode, benchmark: &str, skill: f64, words: &str) -> BTreeMap<String, f64> {
    fs::create_dir_all(out.join("images")).unwrap();
    let mut lines = String::new();
    for (index, (tag, prompt, source)) in items(benchmark).into_iter().enumerate() {
        let file = format!("images/{index:05}.png");
        draw(&prompt, skill, index).save(out.join(&file)).unwrap();
        let source = source.map(|source| {
            let file = format!("images/{index:05}-source.png");
            draw(&source, 9.0, index).save(out.join(&file)).unwrap();
            file
        });
        // The first prompt tells whether text is escaped.
        let prompt = if index == 0 { format!("{prompt} {words}") } else { prompt };
        let record = ImageRecord {
            version: EVAL_VERSION,
            benchmark: benchmark.into(),
            item: format!("{index:05}"),
            tag: tag.into(),
            copy: 0,
            prompt,
            seed: 42,
            guidance: 3.0,
            steps: 10,
            height: 32,
            width: 32,
            weights: planned.inputs[&"weights".to_owned()],
            file,
            source,
            expectation: None,
        };
        lines.push_str(&(serde_json::to_string(&record).unwrap() + "\n"));
    }
    fs::write(out.join(IMAGES_FILE), lines).unwrap();
    BTreeMap::from([("generate/images".to_owned(), 24.0)])
}

fn write_scores(out: &Path, benchmark: &str, skill: f64) -> BTreeMap<String, f64> {
    let items = items(benchmark);
    let mut lines = String::new();
    for index in 0..items.len() {
        let strict = is_right(skill, index);
        let graded = if strict { 1.0 } else { 0.25 * (index % 3) as f64 };
        lines.push_str(&format!(
            "{}\n",
            json!([{ "kind": "verdict", "value": { "strict": strict, "graded": graded, "parts": [] } }])
        ));
    }
    fs::write(out.join(ANSWERS_FILE), lines).unwrap();
    let (factor, unit) = if benchmark == "gedit" { (10.0, "0..10") } else { (1.0, "0..1") };
    let estimate = |value: f64, half: f64, factor: f64| Estimate {
        value: factor * value.clamp(0.0, 1.0),
        low: factor * (value - half).clamp(0.0, 1.0),
        high: factor * (value + half).clamp(0.0, 1.0),
    };
    let level = 0.08 + 0.3 * skill;
    let tags: Vec<&str> = {
        let mut tags: Vec<&str> = items.iter().map(|item| item.0).collect();
        tags.dedup();
        tags
    };
    let tag = |(i, tag): (usize, &&str)| TagScore {
        tag: (*tag).into(),
        score: estimate(level + 0.06 * i as f64 - 0.05, 0.12, factor),
        strict: estimate(level, 0.12, 1.0),
        graded: estimate(level + 0.2, 0.1, 1.0),
        num_images: 8,
    };
    let table = ScoreTable {
        version: EVAL_VERSION,
        benchmark: benchmark.into(),
        title: if benchmark == "gedit" { "GEdit-Bench-EN".into() } else { "GenEval".into() },
        unit: unit.into(),
        judge: "the rule judge of the shapes world".into(),
        overall: estimate(level, 0.06, factor),
        strict: estimate(level - 0.02, 0.06, 1.0),
        graded: estimate(level + 0.15, 0.04, 1.0),
        tags: tags.iter().enumerate().map(tag).collect(),
        parts: vec![PartScore { name: "colours".into(), score: estimate(level + 0.2, 0.05, 1.0), num_images: 20 }],
        num_items: items.len(),
        num_images: items.len(),
        num_unscored: 0,
        published: vec![
            PublishedScore { name: "DeepGen SFT".into(), value: if factor > 1.0 { 7.12 } else { 0.86 } },
            PublishedScore { name: "DeepGen RL".into(), value: if factor > 1.0 { 7.17 } else { 0.87 } },
        ],
    };
    fs::write(out.join(SCORES_FILE), serde_json::to_vec(&table).unwrap()).unwrap();
    table.metrics().into_iter().collect()
}
