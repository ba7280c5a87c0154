//! The real worker behind the real orchestrator: a short pipeline, undisturbed and killed, must leave the same bits.
//!
//! Ignored by default because it needs release builds of both programs: `make test-e2e` builds them, says where they are
//! through `DEEPGEN_E2E_BIN`, and runs this file. `make test` and `.ci/run` include it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use deepgen_contract::artifact::Manifest;
use deepgen_contract::event::{WorkerEvent, WorkerEventKind};
use rustix::process::{Pid, Signal, kill_process};

const PIPELINE: &str = "tests/fixtures/e2e/pipeline.toml";
/// Longest wait for something to happen; the whole pipeline takes well under a minute.
const PATIENCE: Duration = Duration::from_secs(240);

/// The programs and an artifacts folder of its own.
struct Bench {
    artifacts: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { artifacts: tempfile::tempdir().expect("a temporary folder") }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let bin = std::env::var("DEEPGEN_E2E_BIN").expect("run this through `make test-e2e`");
        let mut command = Command::new(Path::new(&bin).join("deepgen"));
        command.args(arguments).arg("--artifacts").arg(self.artifacts.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, extra: &[&str]) -> Output {
        let arguments = [&["run", PIPELINE], extra].concat();
        self.command(&arguments).output().expect("deepgen starts")
    }

    fn start(&self) -> Child {
        let log = fs::File::create(self.artifacts.path().join("start.log")).expect("a log file");
        self.command(&["run", PIPELINE]).stdout(Stdio::null()).stderr(log).spawn().expect("deepgen starts")
    }

    /// Returns what every sealed artifact holds: files and their hashes, by node.
    fn sealed(&self) -> BTreeMap<String, Vec<(String, String)>> {
        let store = self.artifacts.path().join("store");
        let manifests = fs::read_dir(store).into_iter().flatten().flatten().filter_map(|entry| {
            let text = fs::read_to_string(entry.path().join("manifest.json")).ok()?;
            serde_json::from_str::<Manifest>(&text).ok()
        });
        manifests
            .map(|manifest| {
                let files = manifest.files.into_iter().map(|file| (file.path, file.blake3)).collect();
                (manifest.node.0, files)
            })
            .collect()
    }

    /// Waits until an attempt of `node` has written its `count`th checkpoint; returns the worker's process id.
    fn wait_for_checkpoint(&self, node: &str, count: usize) -> u32 {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            for (spec_node, events) in self.attempts() {
                let checkpoints =
                    events.iter().filter(|event| matches!(event.event, WorkerEventKind::Checkpoint { .. })).count();
                let pid = events.iter().find_map(|event| match event.event {
                    WorkerEventKind::Started { pid, .. } => Some(pid),
                    _ => None,
                });
                if let (true, Some(pid)) = (spec_node == node && checkpoints >= count, pid) {
                    return pid;
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{node} wrote no checkpoint within {PATIENCE:?}");
    }

    /// Returns node and events of every attempt so far.
    fn attempts(&self) -> Vec<(String, Vec<WorkerEvent>)> {
        let list = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        let attempts = list(self.artifacts.path().join("jobs")).flat_map(list);
        attempts
            .filter_map(|attempt| {
                let job: serde_json::Value =
                    serde_json::from_str(&fs::read_to_string(attempt.join("job.json")).ok()?).ok()?;
                let events = fs::read_to_string(attempt.join("events.jsonl")).unwrap_or_default();
                let events = events.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
                Some((job["node"].as_str()?.to_owned(), events))
            })
            .collect()
    }

    fn resumed(&self, node: &str) -> usize {
        let of_node = self.attempts().into_iter().filter(|(name, _)| name == node);
        of_node
            .filter(|(_, events)| events.iter().any(|event| matches!(event.event, WorkerEventKind::Resumed { .. })))
            .count()
    }
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid as i32).expect("a process id is positive");
    // The process may have ended by itself in the meantime; the test then shows less, and still must hold.
    let _ = kill_process(pid, Signal::KILL);
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
#[ignore = "needs release builds of deepgen and deepgen-worker: make test-e2e"]
fn a_pipeline_killed_in_sft_and_in_rl_leaves_the_bits_of_an_undisturbed_one() {
    let undisturbed = Bench::new();
    let output = undisturbed.run(&[]);
    assert!(output.status.success(), "{}", text(&output));
    let expected = undisturbed.sealed();
    assert_eq!(expected.len(), 16, "{:?}", expected.keys());

    let started = Instant::now();
    let again = undisturbed.run(&[]);
    assert!(again.status.success() && text(&again).contains("16 cached"), "{}", text(&again));
    assert!(started.elapsed() < Duration::from_secs(1), "a cached run took {:?}", started.elapsed());

    let killed = Bench::new();
    // A worker dies in stage 2; the orchestrator goes on with a second attempt by itself.
    let mut orchestrator = killed.start();
    kill(killed.wait_for_checkpoint("sft", 2));
    // Orchestrator and worker die in stage 3.
    let worker = killed.wait_for_checkpoint("rl", 1);
    kill(orchestrator.id());
    kill(worker);
    orchestrator.wait().expect("the orchestrator can be waited for");
    let sealed_before = killed.sealed();
    assert!(sealed_before.contains_key("handoff-2") && !sealed_before.contains_key("rl"), "{:?}", sealed_before.keys());
    let output = killed.run(&[]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(killed.resumed("sft"), 1, "the second attempt of sft began anew");
    assert_eq!(killed.resumed("rl"), 1, "the second attempt of rl began anew");
    let attempts_of_sft = killed.attempts().into_iter().filter(|(node, _)| node == "sft").count();
    assert_eq!(attempts_of_sft, 2, "a sealed node was repeated");

    let found = killed.sealed();
    for (node, files) in &expected {
        assert_eq!(found.get(node).map(|files| without_paths(files)), Some(without_paths(files)), "{node} differs");
    }
}

/// A mixture names the folders of its data sets, which lie elsewhere in another artifacts folder.
fn without_paths(files: &[(String, String)]) -> Vec<&(String, String)> {
    files.iter().filter(|(path, _)| path != "mixture.json").collect()
}

/// How an attempt is disturbed.
#[derive(Debug, Clone, Copy)]
enum Disturbance {
    Kill,
    Terminate,
    /// No file may grow beyond a few kilobytes, so the next checkpoint cannot be written.
    FullDisk,
}

/// Runs a job directory by hand, as a person with a shell would.
struct ByHand {
    folder: tempfile::TempDir,
    job: serde_json::Value,
}

impl ByHand {
    /// Takes the job of `node` from a run, with settings of its own.
    fn new(run: &Bench, node: &str, settings: &[(&str, serde_json::Value)]) -> Self {
        let attempt = |(path, job): (PathBuf, serde_json::Value)| (job["node"] == node).then_some((path, job));
        let jobs = fs::read_dir(run.artifacts.path().join("jobs")).expect("a jobs folder").flatten();
        let jobs = jobs.filter_map(|entry| {
            let path = entry.path().join("1");
            Some((path.clone(), serde_json::from_str(&fs::read_to_string(path.join("job.json")).ok()?).ok()?))
        });
        let (_, mut job) = jobs.filter_map(attempt).next().expect("the node ran");
        for (pointer, value) in settings {
            *job.pointer_mut(&format!("/settings/settings/{pointer}")).expect("a setting of the job") = value.clone();
        }
        Self { folder: tempfile::tempdir().expect("a temporary folder"), job }
    }

    fn attempt(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts an attempt that may go on from `earlier` ones.
    fn start(&self, name: &str, threads: usize, earlier: &[&str], is_disk_full: bool) -> Child {
        let dir = self.attempt(name);
        fs::create_dir_all(&dir).expect("a job directory");
        let mut job = self.job.clone();
        job["threads"] = threads.into();
        job["earlier_attempts"] = earlier.iter().map(|name| self.attempt(name).display().to_string()).collect();
        fs::write(dir.join("job.json"), job.to_string()).expect("the job is written");
        let bin = std::env::var("DEEPGEN_E2E_BIN").expect("run this through `make test-e2e`");
        // Blocks of 512 bytes; the signal ignored, a write beyond them fails as on a full disk.
        let limit = if is_disk_full { "trap '' XFSZ; ulimit -f 128;" } else { "" };
        let script = format!("{limit} exec \"$0\" \"$1\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).arg(Path::new(&bin).join("deepgen-worker")).arg(&dir);
        command.env("RAYON_NUM_THREADS", "1").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("the worker starts")
    }

    fn finish(&self, name: &str, threads: usize, earlier: &[&str]) {
        let status = self.start(name, threads, earlier, false).wait().expect("the worker ends");
        let outcome = fs::read_to_string(self.attempt(name).join("outcome.json")).unwrap_or_default();
        assert!(status.success() && outcome.contains("done"), "{name}: {outcome}");
    }

    fn wait_for_checkpoints(&self, name: &str, count: usize) {
        let started = Instant::now();
        let path = self.attempt(name).join("events.jsonl");
        while fs::read_to_string(&path).unwrap_or_default().matches("\"checkpoint\",\"step\"").count() < count {
            assert!(started.elapsed() < PATIENCE, "no checkpoint in {}", path.display());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Returns what an attempt leaves: every file of its result, and the newest state with the optimiser's.
    fn left_by(&self, name: &str) -> BTreeMap<String, blake3::Hash> {
        let mut hashes = BTreeMap::new();
        let mut hash = |label: String, path: &Path| {
            hashes.insert(label, blake3::hash(&fs::read(path).expect("a readable file")));
        };
        let out = self.attempt(name).join("out");
        let mut folders = vec![out.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("a result").flatten().map(|entry| entry.path()) {
                match entry.is_dir() {
                    true => folders.push(entry),
                    false => hash(entry.strip_prefix(&out).expect("a file of it").display().to_string(), &entry),
                }
            }
        }
        let checkpoints = fs::read_dir(self.attempt(name).join("checkpoints")).expect("checkpoints").flatten();
        let newest = checkpoints.map(|entry| entry.path()).max().expect("a checkpoint");
        for file in ["tensors.safetensors", "state.json"] {
            hash(format!("newest/{file}"), &newest.join(file));
        }
        hashes
    }
}

#[test]
#[ignore = "needs release builds of deepgen and deepgen-worker: make test-e2e"]
fn a_disturbed_stage_leaves_the_weights_the_optimiser_and_the_metrics_of_an_undisturbed_one() {
    let run = Bench::new();
    let output = run.run(&[]);
    assert!(output.status.success(), "{}", text(&output));
    // Long enough to be caught in the middle, short enough for every combination.
    let settings = [
        ("train/max_iters", 48.into()),
        ("train/log_every", 7.into()),
        ("checkpoint/every", 6.into()),
        ("checkpoint/keep", 3.into()),
        ("validation/every", 0.into()),
        ("samples/every", 10.into()),
    ];
    for stage in ["pretrain", "sft"] {
        let hand = ByHand::new(&run, stage, &settings);
        hand.finish("undisturbed", 1, &[]);
        let expected = hand.left_by("undisturbed");
        assert!(expected.contains_key("metrics.jsonl") && expected.len() >= 4, "{:?}", expected.keys());
        let num_grids = expected.keys().filter(|name| name.starts_with("samples/step-")).count();
        assert!(num_grids >= 4, "images of several steps are part of the result: {:?}", expected.keys());
        for threads in [1, 2] {
            for disturbance in [Disturbance::Kill, Disturbance::Terminate, Disturbance::FullDisk] {
                let case = format!("{stage}-{threads}-{disturbance:?}");
                let (first, second, last) = (format!("{case}-1"), format!("{case}-2"), format!("{case}-3"));
                let mut worker = hand.start(&first, threads, &[], false);
                hand.wait_for_checkpoints(&first, 2);
                let pid = Pid::from_raw(worker.id() as i32).expect("a process id is positive");
                let signal = if matches!(disturbance, Disturbance::Terminate) { Signal::TERM } else { Signal::KILL };
                kill_process(pid, signal).expect("the worker is there to be disturbed");
                worker.wait().expect("the worker ends");
                let outcome = fs::read_to_string(hand.attempt(&first).join("outcome.json")).unwrap_or_default();
                assert_eq!(outcome.contains("stopped"), matches!(disturbance, Disturbance::Terminate), "{outcome}");
                let mut earlier = vec![first.as_str()];
                if matches!(disturbance, Disturbance::FullDisk) {
                    hand.start(&second, threads, &earlier, true).wait().expect("the worker ends");
                    let outcome = fs::read_to_string(hand.attempt(&second).join("outcome.json")).unwrap_or_default();
                    assert!(outcome.contains("failed") && outcome.contains("\"io\""), "{case}: {outcome}");
                    earlier.push(&second);
                }
                hand.finish(&last, threads, &earlier);
                let found = hand.left_by(&last);
                let differing: Vec<_> =
                    expected.iter().filter(|(name, hash)| found.get(*name) != Some(*hash)).collect();
                assert!(differing.is_empty(), "{case}: {differing:?}");
            }
        }
    }
}

#[test]
#[ignore = "needs release builds of deepgen and deepgen-worker: make test-e2e"]
fn a_loss_that_is_not_finite_ends_the_node_and_keeps_its_checkpoint() {
    let bench = Bench::new();
    let output = bench.run(&["--set", "sft.optimizer.lr=1e18", "--set", "sft.checkpoint.every=3"]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("sft") && said.contains("the last checkpoint stays"), "{said}");
    let sealed = bench.sealed();
    assert!(sealed.contains_key("handoff-1") && !sealed.contains_key("sft") && !sealed.contains_key("rl"));
    let attempts: Vec<_> = bench.attempts().into_iter().filter(|(node, _)| node == "sft").collect();
    // Each retry of a node that fails so begins one checkpoint further back.
    assert_eq!(attempts.len(), 3, "the first and the two retries that the node has");
    let is_checkpoint = |event: &WorkerEvent| matches!(event.event, WorkerEventKind::Checkpoint { .. });
    let written = attempts.iter().filter(|(_, events)| events.iter().any(is_checkpoint)).count();
    assert!(written >= 1, "no checkpoint was written before the loss exploded: {attempts:?}");
    let resumed = attempts.iter().filter(|(_, events)| {
        events.iter().any(|event| matches!(event.event, WorkerEventKind::Resumed { step: 3, .. }))
    });
    assert_eq!(
        resumed.count(),
        1,
        "one retry goes on from the only checkpoint, the other from the start: {attempts:?}"
    );
}

#[test]
#[ignore = "needs release builds; run `make test-e2e`"]
fn every_pipeline_of_the_project_runs_through_as_a_smoke_test() {
    for pipeline in ["pipelines/full.toml", "pipelines/base.toml"] {
        let bench = Bench::new();
        let output = bench.command(&["run", pipeline, "--smoke"]).output().expect("deepgen starts");
        assert!(output.status.success(), "{pipeline}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
