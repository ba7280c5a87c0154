//! A worker that obeys the job-directory protocol and computes next to nothing: the test's stand-in for the real one.
//!
//! Its result is a chain of hashes over seed, settings and inputs, one per step, so a result that was resumed wrongly
//! differs. `fake-worker.json` in the project tells it how to misbehave, by node: see [`Script`].

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use deepgen_contract::artifact::{MANIFEST_FILE, Manifest};
use deepgen_contract::event::{WorkerEvent, WorkerEventKind};
use deepgen_contract::job::{
    CHECKPOINTS_DIR, EVENTS_FILE, FailureCause, JOB_FILE, JobSpec, METRICS_FILE, OUT_DIR, OUTCOME_FILE, Outcome,
};
use serde::{Deserialize, Serialize};

/// How a node's jobs behave; every field has a harmless default.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Script {
    /// Steps of the job.
    steps: u64,
    /// Pause per step, in milliseconds.
    step_ms: u64,
    /// Steps between checkpoints.
    checkpoint_every: u64,
    /// Step before which the job fails; 0 for never.
    fail_at: u64,
    /// Attempts that fail, counted from the first; 0 for all.
    fail_attempts: u32,
    /// `io`, `non_finite` and so on, `die` to leave without a word, or `exhaust` to ask for more memory than there is.
    fail_as: String,
    /// Fills the disk of the artifacts when the result is complete, and leaves this many pages free.
    fill_disk_but: Option<u64>,
}

impl Default for Script {
    fn default() -> Self {
        let fail_as = "io".into();
        Self { steps: 3, step_ms: 0, checkpoint_every: 2, fail_at: 0, fail_attempts: 0, fail_as, fill_disk_but: None }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Checkpoint {
    step: u64,
    state: String,
}

fn main() -> io::Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).expect("usage: fake-worker JOB_DIRECTORY"));
    let job: JobSpec = serde_json::from_slice(&fs::read(folder.join(JOB_FILE))?)?;
    let script = script(&job)?;
    let stop = listen_for_sigterm();
    let outcome = Worker { folder: &folder, job: &job, script: &script }.run(&stop)?;
    eprintln!("the fake worker ends with {outcome:?}");
    write_atomically(&folder.join(OUTCOME_FILE), &serde_json::to_vec(&outcome)?)
}

fn script(job: &JobSpec) -> io::Result<Script> {
    let Ok(text) = fs::read(job.project_root.join("fake-worker.json")) else { return Ok(Script::default()) };
    let mut scripts: BTreeMap<String, Script> = serde_json::from_slice(&text)?;
    Ok(scripts.remove(&job.node.0).or_else(|| scripts.remove("*")).unwrap_or_default())
}

fn listen_for_sigterm() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = stop.clone();
    let (ready_in, ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let kind = tokio::signal::unix::SignalKind::terminate();
            let mut signals = tokio::signal::unix::signal(kind).expect("a signal handler");
            ready_in.send(()).expect("the job waits");
            signals.recv().await;
            seen.store(true, Ordering::Relaxed);
        });
    });
    ready.recv().expect("the handler was installed");
    stop
}

struct Worker<'a> {
    folder: &'a Path,
    job: &'a JobSpec,
    script: &'a Script,
}

impl Worker<'_> {
    fn run(&self, stop: &AtomicBool) -> io::Result<Outcome> {
        self.say(WorkerEventKind::Started { pid: std::process::id(), device: "fake".into() })?;
        println!("node {} attempt {}", self.job.node, self.job.attempt);
        self.log_start()?;
        let begun = now_ms();
        let (mut step, mut state) = self.resume()?;
        let total = self.script.steps;
        while step < total {
            if stop.load(Ordering::Relaxed) {
                self.checkpoint(step, &state)?;
                return Ok(Outcome::Stopped { step });
            }
            if self.fails_at(step + 1) {
                return self.fail(step + 1);
            }
            std::thread::sleep(Duration::from_millis(self.script.step_ms));
            step += 1;
            state = blake3::hash(format!("{state} {step}").as_bytes()).to_hex().to_string();
            self.say(WorkerEventKind::Progress { step, total, unit: "steps".into() })?;
            let values = BTreeMap::from([("train/loss".to_owned(), 1.0 / step as f64)]);
            self.say(WorkerEventKind::Metrics { step, values })?;
            if step.is_multiple_of(self.script.checkpoint_every) {
                self.checkpoint(step, &state)?;
            }
        }
        self.finish(&state, begun)
    }

    /// Tells the test, outside of all that the orchestrator keeps, that this fingerprint is being computed.
    fn log_start(&self) -> io::Result<()> {
        let path = self.job.project_root.join("side.log");
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        writeln!(file, "{} {} {}", self.job.fingerprint, self.job.attempt, self.job.node)
    }

    /// Fills the disk, then gives back `num_pages`.
    fn fill_disk(&self, num_pages: u64) -> io::Result<()> {
        let artifacts = self.folder.ancestors().nth(3).expect("artifacts/jobs/<fingerprint>/<attempt>");
        let mut file = File::create(artifacts.join("filler"))?;
        let page = [0; 4096];
        let mut num_written = 0;
        while file.write_all(&page).is_ok() {
            num_written += 1;
        }
        file.set_len(4096 * u64::saturating_sub(num_written, num_pages))
    }

    /// Returns the newest checkpoint among this attempt's predecessors, or the beginning.
    fn resume(&self) -> io::Result<(u64, String)> {
        for attempt in &self.job.earlier_attempts {
            let Ok(entries) = fs::read_dir(attempt.join(CHECKPOINTS_DIR)) else { continue };
            let names = entries.filter_map(Result::ok).filter_map(|entry| entry.file_name().into_string().ok());
            let mut steps: Vec<u64> = names.filter_map(|name| name.parse().ok()).collect();
            steps.sort_unstable_by(|a, b| b.cmp(a));
            for newest in steps {
                let path = attempt.join(CHECKPOINTS_DIR).join(newest.to_string());
                // A kill between the folder and its file leaves the folder.
                let Ok(text) = fs::read(path.join("state.json")) else { continue };
                let Checkpoint { step, state } = serde_json::from_slice(&text)?;
                self.say(WorkerEventKind::Resumed { step, checkpoint: path.display().to_string() })?;
                return Ok((step, state));
            }
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.job.seed.to_le_bytes());
        hasher.update(&serde_json::to_vec(&self.job.settings)?);
        for (port, input) in &self.job.inputs {
            let manifest: Manifest = serde_json::from_slice(&fs::read(input.path.join(MANIFEST_FILE))?)?;
            assert_eq!((manifest.fingerprint, manifest.kind), (input.fingerprint, input.kind), "input {port}");
            hasher.update(port.as_bytes());
            for file in &manifest.files {
                hasher.update(file.blake3.as_bytes());
            }
        }
        Ok((0, hasher.finalize().to_hex().to_string()))
    }

    fn fails_at(&self, step: u64) -> bool {
        let is_attempt = self.script.fail_attempts == 0 || self.job.attempt <= self.script.fail_attempts;
        self.script.fail_at == step && is_attempt
    }

    fn fail(&self, step: u64) -> io::Result<Outcome> {
        if self.script.fail_as == "die" {
            eprintln!("the fake worker dies at step {step}, as told");
            std::process::abort();
        }
        if self.script.fail_as == "exhaust" {
            let layout = std::alloc::Layout::from_size_align(1 << 60, 16).expect("a size that can be asked for");
            std::alloc::handle_alloc_error(layout);
        }
        let cause: FailureCause = serde_json::from_value(self.script.fail_as.clone().into())?;
        Ok(Outcome::Failed { cause, message: format!("told to fail at step {step}") })
    }

    fn checkpoint(&self, step: u64, state: &str) -> io::Result<()> {
        let path = format!("{CHECKPOINTS_DIR}/{step}");
        let checkpoint = serde_json::to_vec(&Checkpoint { step, state: state.to_owned() })?;
        write_atomically(&self.folder.join(&path).join("state.json"), &checkpoint)?;
        self.say(WorkerEventKind::Checkpoint { step, path, bytes: checkpoint.len() as u64 })
    }

    fn finish(&self, state: &str, begun: u64) -> io::Result<Outcome> {
        let out = self.folder.join(OUT_DIR);
        write_atomically(&out.join("parts/result.txt"), state.as_bytes())?;
        write_atomically(&out.join(METRICS_FILE), b"{\"step\":1,\"train/loss\":1.0}\n")?;
        if let Some(num_pages) = self.script.fill_disk_but {
            self.fill_disk(num_pages)?;
        }
        Ok(Outcome::Done {
            metrics: BTreeMap::from([("train/loss".to_owned(), 1.0 / self.script.steps as f64)]),
            notes: vec!["made by a fake worker".into()],
            throughput: BTreeMap::new(),
            seconds: (now_ms() - begun) as f64 / 1000.0,
        })
    }

    fn say(&self, event: WorkerEventKind) -> io::Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(self.folder.join(EVENTS_FILE))?;
        let mut line = serde_json::to_vec(&WorkerEvent { ts_ms: now_ms(), event })?;
        line.push(b'\n');
        file.write_all(&line)
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    fs::create_dir_all(path.parent().expect("a path in a folder"))?;
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(new, path)
}
