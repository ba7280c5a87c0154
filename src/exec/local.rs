//! Jobs as child processes of this machine: `deepgen-worker <job directory>`, each in a process group of its own.
//!
//! A worker outlives a killed orchestrator and harms nothing: it writes only into its attempt. Its events are read by
//! polling the file, the same way whether it is a child or was started by an earlier orchestrator.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::job::{FailureCause, JobSpec, Outcome, STDERR_FILE, STDOUT_FILE};
use tokio::process::{Child, Command};
use tokio::sync::mpsc::UnboundedSender;

use super::executor::{ExecError, Executor, Report, What};
use super::jobdir::{self, EventTail, JobDir};
use super::process::ProcessId;
use crate::run::event::Failure;
use crate::run::scheduler::{Cancel, Ended};

/// Time between two looks at a job directory.
const POLL: Duration = Duration::from_millis(150);
/// Part of a dead worker's standard error that goes into the message.
const NUM_LAST_LINES: usize = 5;

/// Starts workers on this machine.
#[derive(Debug)]
pub struct LocalExecutor {
    worker: PathBuf,
    jobs: PathBuf,
    host: String,
    reports: UnboundedSender<Report>,
    running: BTreeMap<NodeName, ProcessId>,
}

impl LocalExecutor {
    /// Returns an executor that starts the program `worker` on directories under `jobs` and reports into `reports`.
    pub fn new(worker: PathBuf, jobs: PathBuf, host: String, reports: UnboundedSender<Report>) -> Self {
        Self { worker, jobs, host, reports, running: BTreeMap::new() }
    }

    fn spawn(&self, folder: &Path, threads: usize) -> Result<Child, ExecError> {
        let log = |name: &str| {
            File::create(folder.join(name)).map_err(|source| ExecError::JobDir { path: folder.to_owned(), source })
        };
        Command::new(&self.worker)
            .arg(folder)
            .env("RAYON_NUM_THREADS", threads.to_string())
            // Tensors come and go by the megabyte: without these the allocator hands each back to the kernel, which
            // cost a third of a sampling step's time.
            .env("MALLOC_MMAP_THRESHOLD_", "1073741824")
            .env("MALLOC_TRIM_THRESHOLD_", "4294967296")
            .stdin(Stdio::null())
            .stdout(log(STDOUT_FILE)?)
            .stderr(log(STDERR_FILE)?)
            .process_group(0)
            .kill_on_drop(false)
            .spawn()
            .map_err(|source| ExecError::Spawn { worker: self.worker.clone(), source })
    }

    fn follow(&mut self, node: &NodeName, attempt: u32, folder: PathBuf, watched: Watched) {
        let follower = Follower { node: node.clone(), attempt, folder, reports: self.reports.clone() };
        tokio::spawn(follower.run(watched));
    }
}

impl Executor for LocalExecutor {
    fn launch(&mut self, job: &JobSpec) -> Result<(), ExecError> {
        let dir = JobDir::new(&self.jobs, &job.fingerprint);
        let at = |source| ExecError::JobDir { path: dir.attempt(job.attempt), source };
        let folder = dir.create(job, &self.host).map_err(at)?;
        let child = self.spawn(&folder, job.threads)?;
        let process = ProcessId::of(child.id().unwrap_or_default());
        // Without this line a later orchestrator finds the worker by its command line.
        dir.give_lease(job.attempt, &self.host, Some(process)).map_err(at)?;
        self.running.insert(job.node.clone(), process);
        self.follow(&job.node, job.attempt, folder, Watched::Child(child));
        Ok(())
    }

    fn attach(&mut self, node: &NodeName, fingerprint: &Fingerprint, attempt: u32) {
        let dir = JobDir::new(&self.jobs, fingerprint);
        let process = dir.live_worker(attempt, &self.host);
        self.running.extend(process.map(|process| (node.clone(), process)));
        self.follow(node, attempt, dir.attempt(attempt), Watched::Other(process));
    }

    fn cancel(&mut self, node: &NodeName, how: Cancel) {
        if let Some(process) = self.running.get(node) {
            process.signal(how);
        }
    }
}

/// The process behind an attempt.
enum Watched {
    Child(Child),
    Other(Option<ProcessId>),
}

impl Watched {
    /// Waits for the end of the process, at most one poll long.
    async fn ended(&mut self) -> Option<String> {
        match self {
            Self::Child(child) => match tokio::time::timeout(POLL, child.wait()).await {
                Ok(Ok(status)) => Some(describe(status)),
                Ok(Err(error)) => Some(format!("it cannot be waited for: {error}")),
                Err(_) => None,
            },
            Self::Other(Some(process)) if process.is_alive() => {
                tokio::time::sleep(POLL).await;
                None
            }
            Self::Other(_) => Some("it ended while no orchestrator watched".into()),
        }
    }
}

/// Follows one attempt to its end.
struct Follower {
    node: NodeName,
    attempt: u32,
    folder: PathBuf,
    reports: UnboundedSender<Report>,
}

impl Follower {
    async fn run(self, mut watched: Watched) {
        let mut tail = EventTail::new(&self.folder);
        let end = loop {
            let end = watched.ended().await;
            let events = tail.read();
            if !events.is_empty() {
                self.send(What::Said(events));
            }
            if let Some(end) = end {
                break end;
            }
        };
        self.send(What::Ended(self.how_it_ended(&end)));
    }

    fn how_it_ended(&self, end: &str) -> Ended {
        match jobdir::outcome(&self.folder) {
            Ok(Some(Outcome::Done { .. })) => Ended::Done,
            Ok(Some(Outcome::Stopped { step })) => Ended::Stopped { step },
            Ok(Some(Outcome::Failed { cause, message })) => Ended::Failed(Failure { cause, message }),
            Ok(None) => Ended::Died { message: format!("the worker left no outcome: {end}{}", self.last_words()) },
            Err(error) => Ended::Failed(Failure {
                cause: FailureCause::Internal,
                message: format!("the worker's outcome cannot be read: {error}"),
            }),
        }
    }

    fn last_words(&self) -> String {
        let text = std::fs::read(self.folder.join(STDERR_FILE)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(NUM_LAST_LINES)..].iter().map(|line| format!("\n  | {line}")).collect()
    }

    fn send(&self, what: What) {
        // The receiver goes away only when the run ends, and then nobody listens.
        let _ = self.reports.send(Report { node: self.node.clone(), attempt: self.attempt, what });
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("it ended with exit code {code}"),
        (None, Some(signal)) => format!("it was killed by signal {signal}"),
        (None, None) => "it ended".into(),
    }
}
