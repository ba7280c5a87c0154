//! Random kills -9 of orchestrator, worker or both over a graph with axes and retries: the same command always goes on.
//!
//! After every kill: whatever was printed as done stays done, the journal still holds every line it had, no sealed
//! result is computed again, and nothing half written is in the store. `make soak` runs the long form.

mod harness;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use deepgen_contract::artifact::Manifest;
use harness::{Project, Ran};
use serde_json::{Value, json};

/// Longest time until a kill, milliseconds; a round takes a few seconds undisturbed.
const LONGEST_MS: u64 = 900;

/// Three mixtures, a training stage at two rates on each, and what follows from them.
const PIPELINE: &str = r#"
[pipeline]
name = "storm"
seed = 7
profile = "paper"

[executor.local]
slots = { cpu = 3, gpu = 3 }
device = "cpu"
threads = 1

[node.words]
stage = "prepare"
retries = 40
backoff = { first = 0.05, factor = 1, most = 0.05 }
set = { source = { kind = "prompts", path = "../data/words.txt" } }

[node.poems]
stage = "prepare"
retries = 40
backoff = { first = 0.05, factor = 1, most = 0.05 }
over = { nominal_size = [1, 2, 3] }
set = { source = { kind = "prompts", path = "../data/poems.txt" } }

[node.mix]
stage = "mix"
retries = 40
backoff = { first = 0.05, factor = 1, most = 0.05 }
inputs = { words = "words", poems = "poems" }

[node.base]
stage = "import"
retries = 40
backoff = { first = 0.05, factor = 1, most = 0.05 }
set = { path = "../data/base" }

[node.sft]
stage = "sft"
retries = 40
backoff = { first = 0.05, factor = 1, most = 0.05 }
over = { optimizer.lr = [1e-4, 2e-4] }
inputs = { weights = "base", data = "mix" }

[node.final]
stage = "handoff"
retries = 40
backoff = { first = 0.05, factor = 1, most = 0.05 }
inputs = { weights = "base", checkpoint = "sft" }
"#;
const NUM_NODES: usize = 1 + 3 + 3 + 1 + 6 + 6;

/// A small generator of random numbers, so that a storm can be told again by its seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % below
    }
}

/// What was seen so far of one project under fire.
struct Storm {
    project: Project,
    /// Whole lines of each journal at the last kill.
    journals: BTreeMap<PathBuf, Vec<u8>>,
    /// Starts of each fingerprint, by the side log, at the moment it was first seen sealed.
    starts_at_seal: BTreeMap<String, usize>,
    /// Nodes that a command has printed as done.
    printed_done: BTreeSet<String>,
}

impl Storm {
    fn new() -> Self {
        let project = Project::new();
        project.write("pipelines/small.toml", PIPELINE);
        project.script(json!({
            "*": { "steps": 3, "step_ms": 20, "checkpoint_every": 2 },
            "base": { "steps": 4, "step_ms": 10, "fail_at": 3, "fail_attempts": 1, "fail_as": "die" },
        }));
        Self { project, journals: BTreeMap::new(), starts_at_seal: BTreeMap::new(), printed_done: BTreeSet::new() }
    }

    /// Starts the command; what it prints goes into a file that outlives it.
    fn start(&self) -> Child {
        let out = File::create(self.project.path("events.jsonl")).unwrap();
        let err = File::create(self.project.path("stderr.log")).unwrap();
        let mut command = self.project.run_command(&["--json"]);
        command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().unwrap()
    }

    /// Lets the command run for a while and kills; returns its exit code when it ended by itself before.
    fn disturb(&mut self, dice: &mut Dice) -> Option<i32> {
        let mut child = self.start();
        let until = Instant::now() + Duration::from_millis(dice.roll(LONGEST_MS));
        let whom = dice.roll(3);
        let mut ended = None;
        while Instant::now() < until && ended.is_none() {
            std::thread::sleep(Duration::from_millis(3));
            ended = child.try_wait().unwrap();
        }
        self.look();
        if ended.is_none() {
            if whom != 1 {
                child.kill().unwrap();
            }
            if whom != 0 {
                let workers = self.workers();
                let chosen = if whom == 1 { dice.roll(workers.len().max(1) as u64) as usize } else { 0 };
                let victims = if whom == 1 { workers.get(chosen..=chosen) } else { Some(&workers[..]) };
                victims.unwrap_or_default().iter().for_each(|pid| kill(*pid));
            }
            if whom == 1 {
                // The orchestrator lives on: let it see the death before it is killed in turn or ends.
                std::thread::sleep(Duration::from_millis(dice.roll(300)));
                self.look();
                let _ = child.kill();
            }
        }
        let status = child.wait().unwrap();
        self.check();
        status.code()
    }

    /// Workers of this project that run now.
    fn workers(&self) -> Vec<u32> {
        let root = self.project.path("artifacts/jobs").canonicalize().unwrap_or_default();
        let is_ours = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let last = line.strip_suffix(&[0]).unwrap_or(&line).rsplit(|&byte| byte == 0).next().unwrap_or_default();
            !root.as_os_str().is_empty() && last.starts_with(root.as_os_str().as_encoded_bytes())
        };
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter(is_ours).collect()
    }

    /// Remembers what can be seen from outside: nothing of it may be lost.
    fn look(&mut self) {
        let events = fs::read_to_string(self.project.path("events.jsonl")).unwrap_or_default();
        for line in events.lines() {
            let Ok(event) = serde_json::from_str::<Value>(line) else { continue };
            if event["event"]["state"]["state"] == "done" {
                self.printed_done.insert(event["event"]["fingerprint"].as_str().unwrap().to_owned());
            }
        }
        for run in folders(&self.project.path("artifacts/runs")) {
            let journal = run.join("journal.jsonl");
            let mut text = fs::read(&journal).unwrap_or_default();
            text.truncate(text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1));
            // A kill between making the folder and writing the first line leaves no journal.
            if !text.is_empty() {
                self.journals.insert(journal, text);
            }
        }
        // The store first: a start that is logged between the two looks is then counted, not missed.
        let sealed: Vec<String> = self.sealed().into_iter().map(|(fingerprint, _)| fingerprint).collect();
        let starts = self.starts();
        for fingerprint in sealed {
            let num = starts.get(&fingerprint).copied().unwrap_or(0);
            self.starts_at_seal.entry(fingerprint).or_insert(num);
        }
    }

    /// Compares what is there now with what was seen before.
    fn check(&self) {
        let sealed: BTreeMap<String, PathBuf> = self.sealed().into_iter().collect();
        for (fingerprint, folder) in &sealed {
            let manifest: Manifest = serde_json::from_slice(&fs::read(folder.join("manifest.json")).unwrap())
                .unwrap_or_else(|error| panic!("half an artifact in {}: {error}", folder.display()));
            assert_eq!(manifest.fingerprint.to_string(), *fingerprint);
            for file in &manifest.files {
                let content = fs::read(folder.join(&file.path)).expect("a sealed file");
                assert_eq!(blake3::hash(&content).to_hex().as_str(), file.blake3, "{}", file.path);
            }
        }
        for fingerprint in &self.printed_done {
            assert!(sealed.contains_key(fingerprint), "{fingerprint} was said to be done and is not sealed");
        }
        for (journal, before) in &self.journals {
            let now = fs::read(journal).unwrap();
            assert!(now.starts_with(before), "{} lost lines", journal.display());
        }
        let starts = self.starts();
        for (fingerprint, before) in &self.starts_at_seal {
            assert!(sealed.contains_key(fingerprint), "{fingerprint} was sealed and is gone");
            let now = starts.get(fingerprint).copied().unwrap_or(0);
            assert_eq!(now, *before, "{fingerprint} was computed again after it was sealed");
        }
    }

    /// Folders of the store by name; anything else there is a trace of damage.
    fn sealed(&self) -> Vec<(String, PathBuf)> {
        let name = |folder: &Path| folder.file_name().unwrap().to_str().unwrap().to_owned();
        let all: Vec<_> = folders(&self.project.path("artifacts/store")).into_iter().map(|f| (name(&f), f)).collect();
        for (name, _) in &all {
            assert!(name.len() == 64, "`{name}` in the store");
        }
        all
    }

    fn starts(&self) -> BTreeMap<String, usize> {
        let log = fs::read_to_string(self.project.path("side.log")).unwrap_or_default();
        let mut starts = BTreeMap::new();
        for line in log.lines() {
            *starts.entry(line.split(' ').next().unwrap().to_owned()).or_default() += 1;
        }
        starts
    }

    /// Runs the command to its end, which may take a second try where retries were used up by kills.
    fn converge(&mut self, expected: &BTreeMap<String, String>) {
        for _ in 0..5 {
            let code = self.start().wait().unwrap().code();
            self.look();
            self.check();
            if code == Some(0) {
                assert_eq!(&self.project.results(), expected);
                assert_eq!(expected.len(), NUM_NODES);
                self.project.deepgen(&["state", "verify"]).expect(0);
                let quiet: Ran = self.project.deepgen(&["run", "pipelines/small.toml", "--quiet"]);
                quiet.expect(0).prints(&format!("0 ran, {NUM_NODES} cached"));
                self.project.deepgen(&["state", "verify"]).expect(0);
                self.check();
                return;
            }
        }
        panic!("it does not converge:\n{}", fs::read_to_string(self.project.path("stderr.log")).unwrap());
    }
}

/// Rages until `num_kills` kills hit something that ran; a project that is done gives way to a new one.
fn rage(num_kills: usize, seed: u64) {
    let expected = {
        let calm = Storm::new();
        let status = calm.start().wait().unwrap();
        assert_eq!(status.code(), Some(0), "{}", fs::read_to_string(calm.project.path("stderr.log")).unwrap());
        calm.project.results()
    };
    let mut dice = Dice(seed);
    let mut num_done = 0;
    let mut num_rounds = 0;
    while num_done < num_kills {
        let mut storm = Storm::new();
        num_rounds += 1;
        let mut num_here = 0;
        while num_done < num_kills && num_here < 25 {
            match storm.disturb(&mut dice) {
                // A code means that it ended before the kill: done, or retries used up by kills of workers.
                Some(0) => break,
                Some(code) => assert_eq!(code, 1, "{}", fs::read_to_string(storm.project.path("stderr.log")).unwrap()),
                None => {
                    num_done += 1;
                    num_here += 1;
                }
            }
        }
        storm.converge(&expected);
    }
    eprintln!("{num_done} kills over {num_rounds} rounds of {NUM_NODES} nodes, seed {seed}: every round converged");
}

fn kill(pid: u32) {
    // It may have ended by itself.
    let _ = std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status();
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

#[test]
fn a_dozen_random_kills_lose_nothing() {
    rage(12, 20_260_724);
}

#[test]
#[ignore = "takes minutes: make soak"]
fn two_hundred_random_kills_lose_nothing() {
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    rage(number("DEEPGEN_SOAK_KILLS", 200) as usize, number("DEEPGEN_SOAK_SEED", 1));
}
