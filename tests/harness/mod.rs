//! A project in a temporary folder, the real `deepgen` and the fake worker: what CLI and crash tests are told with.
//!
//! Every test begins with a copy of `tests/fixtures/project` and of the project's own stage files:
//! words, poems -> mix; mix, base -> sft -> final.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for something that takes a moment.
const PATIENCE: Duration = Duration::from_secs(30);

/// A temporary copy of the fixture project.
pub struct Project {
    dir: tempfile::TempDir,
}

/// What a finished command left.
pub struct Ran {
    /// Exit code; -1 after a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Project {
    /// Copies the fixture and the stage files.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        copy(Path::new("tests/fixtures/project"), dir.path());
        fs::create_dir(dir.path().join("stages")).expect("a folder");
        for entry in fs::read_dir("stages").expect("the project has stages") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                let target = dir.path().join("stages").join(path.file_name().expect("a name"));
                fs::copy(path, target).expect("a copy");
            }
        }
        Self { dir }
    }

    /// Returns a path in the project.
    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// Writes a file of the project.
    pub fn write(&self, path: &str, content: &str) {
        fs::write(self.path(path), content).expect("the file is written");
    }

    /// Replaces text in a file of the project, which must hold it.
    pub fn edit(&self, path: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.path(path)).expect("the file is there");
        assert!(text.contains(from), "{path} holds no `{from}`");
        self.write(path, &text.replace(from, to));
    }

    /// Tells the fake worker how the jobs of nodes behave.
    pub fn script(&self, script: Value) {
        self.write("fake-worker.json", &script.to_string());
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_deepgen"));
        command.args(arguments).current_dir(self.dir.path()).env_remove("RUST_LOG").env("NO_COLOR", "1");
        if matches!(arguments[0], "run" | "sweep" | "retry") {
            command.arg("--worker").arg(fake_worker());
        }
        command
    }

    /// Runs `deepgen` with arguments to its end.
    pub fn deepgen(&self, arguments: &[&str]) -> Ran {
        self.command(arguments).output().expect("deepgen starts").into()
    }

    /// Runs the pipeline to its end.
    pub fn run(&self) -> Ran {
        self.deepgen(&["run", "pipelines/small.toml"])
    }

    /// Returns the command that runs the pipeline, not started.
    pub fn run_command(&self, arguments: &[&str]) -> Command {
        self.command(&[&["run", "pipelines/small.toml"], arguments].concat())
    }

    /// Starts running the pipeline and returns at once.
    pub fn start(&self) -> Running<'_> {
        self.start_with(&[])
    }

    /// Starts running the pipeline with further arguments and returns at once.
    pub fn start_with(&self, arguments: &[&str]) -> Running<'_> {
        let mut command = self.command(&[&["run", "pipelines/small.toml"], arguments].concat());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("deepgen starts");
        Running { project: self, child }
    }

    /// Returns the state words of the newest run's nodes, from `status --json`.
    pub fn states(&self) -> BTreeMap<String, String> {
        let status = self.status();
        let node = |node: &Value| (text(&node["node"]), text(&node["status"]["state"]));
        status["nodes"].as_array().expect("nodes").iter().map(node).collect()
    }

    /// Returns `status --json`.
    pub fn status(&self) -> Value {
        let ran = self.deepgen(&["status", "--json"]);
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}{}", ran.stdout, ran.stderr))
    }

    /// Returns the manifests of all sealed artifacts by node.
    pub fn manifests(&self) -> BTreeMap<String, Value> {
        let Ok(store) = fs::read_dir(self.path("artifacts/store")) else { return BTreeMap::new() };
        let manifest = |folder: PathBuf| {
            let text = fs::read_to_string(folder.join("manifest.json")).expect("a sealed folder has a manifest");
            let manifest: Value = serde_json::from_str(&text).expect("a manifest is JSON");
            (text_of(&manifest, "node"), manifest)
        };
        store.map(|entry| manifest(entry.expect("an entry").path())).collect()
    }

    /// Returns the manifests of all sealed artifacts, several of a node too.
    pub fn manifests_all(&self) -> Vec<PathBuf> {
        let store = fs::read_dir(self.path("artifacts/store")).expect("a store");
        store.map(|entry| entry.expect("an entry").path()).collect()
    }

    /// Returns the result of each node: what must be the same however the run was disturbed.
    pub fn results(&self) -> BTreeMap<String, String> {
        let result = |manifest: &Value| {
            let path = format!("artifacts/store/{}/parts/result.txt", text_of(manifest, "fingerprint"));
            fs::read_to_string(self.path(&path)).expect("an artifact has its result")
        };
        self.manifests().iter().map(|(node, manifest)| (node.clone(), result(manifest))).collect()
    }

    /// Returns how many attempts each node has had, by the job directories and the plan of the newest run.
    pub fn attempts(&self) -> BTreeMap<String, usize> {
        let status = self.status();
        let count = |node: &Value| {
            let folder = self.path("artifacts/jobs").join(text(&node["fingerprint"]));
            let entries = fs::read_dir(folder)
                .map_or(0, |entries| entries.filter_map(Result::ok).filter(|entry| entry.path().is_dir()).count());
            (text(&node["node"]), entries)
        };
        status["nodes"].as_array().expect("nodes").iter().map(count).collect()
    }

    /// Returns the directory of a node's attempt in the newest run.
    pub fn job(&self, node: &str, attempt: u32) -> PathBuf {
        let status = self.status();
        let nodes = status["nodes"].as_array().expect("nodes");
        let node = nodes.iter().find(|found| found["node"] == node).expect("the node is in the run");
        self.path("artifacts/jobs").join(text(&node["fingerprint"])).join(attempt.to_string())
    }

    /// Waits until a checkpoint of a node's attempt is there.
    pub fn wait_for_checkpoint(&self, node: &str, attempt: u32, step: u64) {
        wait_for(&format!("checkpoint {step} of {node}"), || {
            self.has_run() && self.job(node, attempt).join(format!("checkpoints/{step}/state.json")).exists()
        });
    }

    /// Waits until a node of the newest run is in a state.
    pub fn wait_for_state(&self, node: &str, state: &str) {
        wait_for(&format!("{node} {state}"), || self.has_run() && self.states()[node] == state);
    }

    fn has_run(&self) -> bool {
        self.deepgen(&["status"]).code == 0
    }

    /// Returns the process that holds the artifacts folder.
    pub fn orchestrator(&self) -> u32 {
        let holder = fs::read_to_string(self.path("artifacts/state/lock")).expect("a lock");
        let holder: Value = serde_json::from_str(&holder).expect("JSON");
        u32::try_from(holder["pid"].as_u64().expect("a process")).expect("a process id")
    }

    /// Waits until the lease of a node's attempt names its process.
    pub fn wait_for_worker(&self, node: &str, attempt: u32) {
        let lease = self.job(node, attempt).with_file_name("lease.json");
        wait_for(&format!("the process of {node}"), || {
            let lease: Option<Value> = fs::read(&lease).ok().and_then(|text| serde_json::from_slice(&text).ok());
            lease.is_some_and(|lease| lease["attempt"] == attempt && !lease["worker"].is_null())
        });
    }

    /// Returns the process of the worker that has a node's attempt, when its lease says so.
    pub fn worker(&self, node: &str, attempt: u32) -> u32 {
        self.wait_for_worker(node, attempt);
        let lease = self.job(node, attempt).with_file_name("lease.json");
        let lease: Value = serde_json::from_str(&fs::read_to_string(lease).expect("a lease")).expect("JSON");
        assert_eq!(lease["attempt"], attempt, "the lease is another attempt's");
        u32::try_from(lease["worker"]["pid"].as_u64().expect("a worker")).expect("a process id")
    }
}

/// A `deepgen run` that goes on.
pub struct Running<'a> {
    project: &'a Project,
    child: Child,
}

impl Running<'_> {
    /// Kills the orchestrator without warning.
    pub fn kill(mut self) {
        self.child.kill().expect("it still runs");
        self.child.wait().expect("it is ours");
    }

    /// Asks the orchestrator to stop and returns what it left.
    pub fn terminate(self) -> Ran {
        signal(self.child.id(), "TERM");
        self.finish()
    }

    /// Waits for its end.
    pub fn finish(self) -> Ran {
        self.child.wait_with_output().expect("it is ours").into()
    }

    /// Kills a node's worker without warning.
    pub fn kill_worker(&self, node: &str, attempt: u32) {
        signal(self.project.worker(node, attempt), "KILL");
    }
}

/// Sends a signal to one process.
pub fn signal(pid: u32, signal: &str) {
    let status = Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status();
    assert!(status.expect("kill is a program").success(), "process {pid} has gone");
}

/// Waits until something is so.
pub fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Ran {
    /// Asserts the exit code and returns itself.
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Asserts that standard error holds a text.
    pub fn says(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "no `{text}` in standard error:\n{}", self.stderr);
        self
    }

    /// Asserts that standard output holds a text.
    pub fn prints(self, text: &str) -> Self {
        assert!(self.stdout.contains(text), "no `{text}` in standard output:\n{}\n{}", self.stdout, self.stderr);
        self
    }
}

/// Returns the fake worker, an example of the package, which `cargo test` builds unless only one target is named.
fn fake_worker() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let path = Path::new(env!("CARGO_BIN_EXE_deepgen")).with_file_name("examples/fake-worker");
        if !path.exists() {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let mut build = Command::new(cargo);
            build.args(["build", "--package", "deepgen", "--example", "fake-worker"]);
            assert!(build.status().expect("cargo runs").success());
        }
        path
    })
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, target).expect("a copy");
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

fn text_of(value: &Value, key: &str) -> String {
    text(&value[key])
}
