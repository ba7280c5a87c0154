//! Jobs as child processes of this machine: `deepgen-worker <job directory>`, or the program of a command, each in a
//! process group of its own.
//!
//! A worker outlives a killed orchestrator and harms nothing: it writes only into its attempt. Its events are read by
//! polling the file, the same way whether it is a child or was started by an earlier orchestrator.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use deepgen_contract::command::CommandSettings;
use deepgen_contract::id::NodeName;
use deepgen_contract::job::{FailureCause, JobSpec, STDERR_FILE, STDOUT_FILE};
use deepgen_contract::settings::Settings;
use tokio::process::Child;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;

use super::command::Programs;
use super::ending::{self, LastSeen};
use super::executor::{ExecError, Executor, Report, Seal, What};
use super::jobdir::{self, EventTail, JobDir};
use super::lane::{self, Lane, Lanes};
use super::memory;
use super::process::{self, ProcessId};
use crate::run::event::Failure;
use crate::run::scheduler::{Cancel, Ended};

/// Time between two looks at a job directory.
const POLL: Duration = Duration::from_millis(150);
/// Variable that names a job's folder to its process, and its process to whoever looks for it.
pub const JOB_VARIABLE: &str = "DEEPGEN_JOB";

/// Starts workers on this machine.
#[derive(Debug)]
pub struct LocalExecutor {
    worker: PathBuf,
    jobs: PathBuf,
    host: String,
    reports: UnboundedSender<Report>,
    running: BTreeMap<NodeName, Running>,
    lanes: Lanes,
    programs: Arc<Programs>,
    /// Who looks after commands that live on; there is none before the first.
    watcher: Option<JoinHandle<()>>,
}

/// A process, other than a command of this orchestrator, that may have to be told to stop.
#[derive(Debug)]
enum Running {
    /// A child. Until it was waited for nobody else has its number.
    Child { pid: u32, was_waited_for: Arc<AtomicBool> },
    /// One that an earlier orchestrator started.
    Other(ProcessId),
}

impl Running {
    /// Returns true for a child that was waited for.
    fn is_over(&self) -> bool {
        matches!(self, Self::Child { was_waited_for, .. } if was_waited_for.load(Ordering::Relaxed))
    }
}

impl LocalExecutor {
    /// Returns an executor that starts the program `worker` on directories under `jobs` and reports into `reports`.
    pub fn new(worker: PathBuf, jobs: PathBuf, host: String, reports: UnboundedSender<Report>) -> Self {
        let (running, lanes, programs) = (BTreeMap::new(), Lanes::default(), Arc::default());
        Self { worker, jobs, host, reports, running, lanes, programs, watcher: None }
    }

    fn spawn(&self, job: &JobSpec, folder: &Path) -> Result<Child, ExecError> {
        let at = |source| ExecError::JobDir { path: folder.to_owned(), source };
        let log = |name: &str| File::create(folder.join(name)).map_err(at);
        let mut command = self.worker(job, folder);
        command.env(JOB_VARIABLE, folder).stdin(Stdio::null());
        command.stdout(log(STDOUT_FILE)?).stderr(log(STDERR_FILE)?).process_group(0);
        let program = PathBuf::from(command.get_program());
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(false).spawn().map_err(|source| ExecError::Spawn { worker: program, source })
    }

    fn worker(&self, job: &JobSpec, folder: &Path) -> Command {
        let mut worker = Command::new(&self.worker);
        worker
            .arg(folder)
            .env("RAYON_NUM_THREADS", job.threads.to_string())
            // Tensors come and go by the megabyte: without these the allocator hands each back to the kernel, which
            // cost a third of a sampling step's time.
            .env("MALLOC_MMAP_THRESHOLD_", "1073741824")
            .env("MALLOC_TRIM_THRESHOLD_", "4294967296");
        worker
    }

    fn follow(&mut self, job: JobSpec, folder: PathBuf, watched: Watched) {
        let reports = self.reports.clone();
        let is_command = matches!(job.settings, Settings::Command(_));
        // Of a command nothing follows from it.
        let killed_before = if is_command { None } else { memory::num_killed() };
        let begun = Instant::now();
        tokio::spawn(Follower { job, folder, reports, begun, killed_before }.run(watched));
    }

    /// Gives a command a thread of its own.
    fn run_command(&mut self, job: JobSpec, settings: CommandSettings, seal: Seal) {
        let dir = JobDir::new(&self.jobs, &job.fingerprint);
        let lane = Lane::enter(&self.lanes, &self.programs, job, dir, &self.host);
        let reports = self.reports.clone();
        tokio::task::spawn_blocking(move || lane.run(&settings, seal, &reports));
        if self.watcher.is_none() {
            self.watcher = Some(tokio::spawn(watch(self.lanes.clone(), self.host.clone(), self.reports.clone())));
        }
    }
}

/// Looks after commands that live on, for as long as anybody listens.
async fn watch(lanes: Lanes, host: String, reports: UnboundedSender<Report>) {
    loop {
        tokio::time::sleep(POLL).await;
        for (node, attempt) in lanes.look(POLL, &host) {
            // A command is heard by what it writes into its logs.
            if reports.send(Report { node, attempt, what: What::Said(Vec::new()) }).is_err() {
                return;
            }
        }
    }
}

impl Executor for LocalExecutor {
    fn launch(&mut self, job: JobSpec, seal: Seal) -> Result<(), ExecError> {
        if let Settings::Command(settings) = &job.settings {
            let settings = settings.clone();
            self.run_command(job, settings, seal);
            return Ok(());
        }
        let dir = JobDir::new(&self.jobs, &job.fingerprint);
        let at = |source| ExecError::JobDir { path: dir.attempt(job.attempt), source };
        let folder = dir.make(job.attempt, &self.host).map_err(at)?;
        dir.describe(&job).map_err(at)?;
        let child = self.spawn(&job, &folder)?;
        let pid = child.id().unwrap_or_default();
        let was_waited_for = Arc::new(AtomicBool::new(false));
        let running = Running::Child { pid, was_waited_for: Arc::clone(&was_waited_for) };
        self.running.retain(|_, running| !running.is_over());
        self.running.insert(job.node.clone(), running);
        let lease = Some(Unwritten { dir, host: self.host.clone(), pid });
        let watched = Watched::Child { child: Box::new(child), lease, was_waited_for };
        self.follow(job, folder, watched);
        Ok(())
    }

    fn attach(&mut self, job: JobSpec) {
        let dir = JobDir::new(&self.jobs, &job.fingerprint);
        let process = dir.live_worker(job.attempt, &self.host);
        self.running.extend(process.map(|process| (job.node.clone(), Running::Other(process))));
        let folder = dir.attempt(job.attempt);
        self.follow(job, folder, Watched::Other(process));
    }

    fn cancel(&mut self, node: &NodeName, how: Cancel) {
        if self.lanes.cancel(node, how) {
            return;
        }
        match self.running.get(node) {
            Some(Running::Child { pid, was_waited_for }) if !was_waited_for.load(Ordering::Relaxed) => {
                process::signal_group(*pid, how);
            }
            Some(Running::Other(process)) => process.signal(how),
            _ => {}
        }
    }
}

/// The process behind an attempt.
enum Watched {
    /// A child, with the lease that names it until that is written.
    Child {
        child: Box<Child>,
        lease: Option<Unwritten>,
        was_waited_for: Arc<AtomicBool>,
    },
    Other(Option<ProcessId>),
}

/// The lease of a process that has just begun: it is written when it lives on, and until then a later orchestrator finds the
/// process by its environment.
struct Unwritten {
    dir: JobDir,
    host: String,
    pid: u32,
}

impl Unwritten {
    /// Writes it; the process has not been waited for.
    fn write(self, attempt: u32) {
        if let Err(error) = self.dir.give_lease(attempt, &self.host, Some(ProcessId::of(self.pid))) {
            tracing::warn!(%error, "cannot write down which process has the job");
        }
    }
}

impl Watched {
    /// Waits for the end of the process, at most one poll long.
    async fn ended(&mut self, attempt: u32) -> Option<LastSeen> {
        match self {
            Self::Child { child, lease, was_waited_for } => match tokio::time::timeout(POLL, child.wait()).await {
                Ok(Ok(status)) => {
                    was_waited_for.store(true, Ordering::Relaxed);
                    Some(status.into())
                }
                Ok(Err(error)) => Some(LastSeen::unknown(format!("it cannot be waited for: {error}"))),
                Err(_) => {
                    if let Some(lease) = lease.take() {
                        lease.write(attempt);
                    }
                    None
                }
            },
            Self::Other(Some(process)) if process.is_alive() => {
                tokio::time::sleep(POLL).await;
                None
            }
            Self::Other(_) => Some(LastSeen::unknown("it ended while no orchestrator watched".into())),
        }
    }
}

/// Follows one attempt to its end.
struct Follower {
    job: JobSpec,
    folder: PathBuf,
    begun: Instant,
    /// Processes that the kernel had killed for want of memory before.
    killed_before: Option<u64>,
    reports: UnboundedSender<Report>,
}

impl Follower {
    async fn run(self, mut watched: Watched) {
        let mut tail = EventTail::new(&self.folder);
        let mut logged = 0;
        let end = loop {
            let end = watched.ended(self.job.attempt).await;
            let events = if self.is_command() { Vec::new() } else { tail.read() };
            // A command is heard by what it writes into its logs.
            if !events.is_empty() || (end.is_none() && self.is_command() && self.has_logged(&mut logged)) {
                self.send(What::Said(events));
            }
            if let Some(end) = end {
                break end;
            }
        };
        let ended = match &self.job.settings {
            Settings::Command(settings) => self.how_the_command_ended(settings, &end),
            _ => self.how_it_ended(&end),
        };
        self.send(What::Ended(ended));
    }

    fn is_command(&self) -> bool {
        matches!(self.job.settings, Settings::Command(_))
    }

    /// Returns true when the logs have grown since the last look.
    fn has_logged(&self, logged: &mut u64) -> bool {
        let now = lane::bytes_logged(&self.folder);
        std::mem::replace(logged, now) < now
    }

    /// Writes the outcome that a command cannot write.
    fn how_the_command_ended(&self, settings: &CommandSettings, end: &LastSeen) -> Ended {
        let outcome = ending::of_command(settings, &self.folder, end, self.begun.elapsed().as_secs_f64());
        let written = outcome.and_then(|outcome| ending::write_outcome(&outcome, &self.folder).map(|()| outcome));
        written.map_or_else(|ended| ended, Into::into)
    }

    fn how_it_ended(&self, end: &LastSeen) -> Ended {
        match jobdir::outcome(&self.folder) {
            Ok(Some(outcome)) => outcome.into(),
            Ok(None) => {
                let (words, last_words) = (&end.words, ending::last_words(&self.folder));
                // A backtrace may follow the words that tell.
                let stderr = ending::stderr(&self.folder);
                match memory::ran_out(end.signal, &stderr, self.killed_before, memory::num_killed()) {
                    true => Ended::Failed(Failure {
                        cause: FailureCause::OutOfMemory,
                        message: format!("the worker ran out of memory: {words}{last_words}"),
                    }),
                    false => Ended::Died { message: format!("the worker left no outcome: {words}{last_words}") },
                }
            }
            Err(error) => Ended::Failed(Failure {
                cause: FailureCause::Internal,
                message: format!("the worker's outcome cannot be read: {error}"),
            }),
        }
    }

    fn send(&self, what: What) {
        // The receiver goes away only when the run ends, and then nobody listens.
        let _ = self.reports.send(Report { node: self.job.node.clone(), attempt: self.job.attempt, what });
    }
}
