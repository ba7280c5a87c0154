//! Jobs as child processes of this machine: `deepgen-worker <job directory>`, or the program of a command, each in a
//! process group of its own.
//!
//! A worker outlives a killed orchestrator and harms nothing: it writes only into its attempt. Its events are read by
//! polling the file, the same way whether it is a child or was started by an earlier orchestrator.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use deepgen_contract::command::CommandSettings;
use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::job::{FailureCause, JobSpec, OUT_DIR, Outcome, STDERR_FILE, STDOUT_FILE};
use deepgen_contract::settings::Settings;
use tokio::process::Child;
use tokio::sync::mpsc::UnboundedSender;

use super::command::{self, End};
use super::executor::{ExecError, Executor, Report, What};
use super::jobdir::{self, EventTail, JobDir};
use super::memory;
use super::process::{self, ProcessId};
use crate::run::event::Failure;
use crate::run::scheduler::{Cancel, Ended};

/// Time between two looks at a job directory.
const POLL: Duration = Duration::from_millis(150);
/// Variable that names a job's folder to its process, and its process to whoever looks for it.
pub const JOB_VARIABLE: &str = "DEEPGEN_JOB";
/// Part of a dead worker's standard error that goes into the message.
const NUM_LAST_LINES: usize = 5;

/// Starts workers on this machine.
#[derive(Debug)]
pub struct LocalExecutor {
    worker: PathBuf,
    jobs: PathBuf,
    host: String,
    reports: UnboundedSender<Report>,
    running: BTreeMap<NodeName, Running>,
}

/// A process that may have to be told to stop.
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
        Self { worker, jobs, host, reports, running: BTreeMap::new() }
    }

    fn spawn(&self, job: &JobSpec, folder: &Path) -> Result<Child, ExecError> {
        let at = |source| ExecError::JobDir { path: folder.to_owned(), source };
        let log = |name: &str| File::create(folder.join(name)).map_err(at);
        let mut command = match &job.settings {
            Settings::Command(settings) => {
                fs::create_dir(folder.join(OUT_DIR)).map_err(at)?;
                command::process(settings, job, folder)
            }
            _ => self.worker(job, folder),
        };
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

    fn follow(&mut self, node: &NodeName, attempt: u32, job: Followed, watched: Watched) {
        let Followed { folder, command } = job;
        let reports = self.reports.clone();
        // Of a command nothing follows from it.
        let killed_before = if command.is_none() { memory::num_killed() } else { None };
        let begun = Instant::now();
        let follower = Follower { node: node.clone(), attempt, folder, command, reports, begun, killed_before };
        tokio::spawn(follower.run(watched));
    }
}

impl Executor for LocalExecutor {
    fn launch(&mut self, job: &JobSpec) -> Result<(), ExecError> {
        let dir = JobDir::new(&self.jobs, &job.fingerprint);
        let at = |source| ExecError::JobDir { path: dir.attempt(job.attempt), source };
        let folder = dir.create(job, &self.host).map_err(at)?;
        let child = self.spawn(job, &folder)?;
        let pid = child.id().unwrap_or_default();
        let was_waited_for = Arc::new(AtomicBool::new(false));
        let running = Running::Child { pid, was_waited_for: Arc::clone(&was_waited_for) };
        self.running.retain(|_, running| !running.is_over());
        self.running.insert(job.node.clone(), running);
        let command = match &job.settings {
            Settings::Command(settings) => Some(settings.clone()),
            _ => None,
        };
        let lease = Some(Unwritten { dir, host: self.host.clone(), pid });
        let watched = Watched::Child { child: Box::new(child), lease, was_waited_for };
        self.follow(&job.node, job.attempt, Followed { folder, command }, watched);
        Ok(())
    }

    fn attach(&mut self, node: &NodeName, fingerprint: &Fingerprint, attempt: u32) {
        let dir = JobDir::new(&self.jobs, fingerprint);
        let process = dir.live_worker(attempt, &self.host);
        self.running.extend(process.map(|process| (node.clone(), Running::Other(process))));
        let folder = dir.attempt(attempt);
        let command = match jobdir::job(&folder).map(|job| job.settings) {
            Ok(Settings::Command(settings)) => Some(settings),
            _ => None,
        };
        self.follow(node, attempt, Followed { folder, command }, Watched::Other(process));
    }

    fn cancel(&mut self, node: &NodeName, how: Cancel) {
        match self.running.get(node) {
            Some(Running::Child { pid, was_waited_for }) if !was_waited_for.load(Ordering::Relaxed) => {
                process::signal_group(*pid, how);
            }
            Some(Running::Other(process)) => process.signal(how),
            _ => {}
        }
    }
}

/// What is followed.
struct Followed {
    folder: PathBuf,
    /// The command, which writes no outcome by itself.
    command: Option<CommandSettings>,
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

/// The lease of a process that has just begun. Most commands end before anybody could ask for it: it is written for those that
/// live on, and until then a later orchestrator finds the process by its environment.
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
                    Some(LastSeen { code: status.code(), words: describe(status), signal: status.signal() })
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

/// What was seen of a process's end.
struct LastSeen {
    code: Option<i32>,
    words: String,
    /// The signal that killed it.
    signal: Option<i32>,
}

impl LastSeen {
    fn unknown(words: String) -> Self {
        Self { code: None, words, signal: None }
    }
}

/// Follows one attempt to its end.
struct Follower {
    node: NodeName,
    attempt: u32,
    folder: PathBuf,
    command: Option<CommandSettings>,
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
            let end = watched.ended(self.attempt).await;
            let events = if self.command.is_none() { tail.read() } else { Vec::new() };
            // A command is heard by what it writes into its logs.
            if !events.is_empty() || (end.is_none() && self.command.is_some() && self.has_logged(&mut logged)) {
                self.send(What::Said(events));
            }
            if let Some(end) = end {
                break end;
            }
        };
        let ended = match &self.command {
            Some(settings) => self.how_the_command_ended(settings, &end),
            None => self.how_it_ended(&end),
        };
        self.send(What::Ended(ended));
    }

    /// Returns true when the logs have grown since the last look.
    fn has_logged(&self, logged: &mut u64) -> bool {
        let bytes = |name: &str| fs::metadata(self.folder.join(name)).map_or(0, |log| log.len());
        let before = std::mem::replace(logged, bytes(STDOUT_FILE) + bytes(STDERR_FILE));
        *logged > before
    }

    /// Writes the outcome that a command cannot write.
    fn how_the_command_ended(&self, settings: &CommandSettings, end: &LastSeen) -> Ended {
        let code = end.code.or_else(|| command::written_code(&self.folder));
        if end.signal.is_some() {
            return Ended::Died { message: format!("{}{}", end.words, self.last_words()) };
        }
        let has_failed = !code.is_some_and(|code| settings.is_success(code));
        let last_words = if has_failed { self.last_words() } else { String::new() };
        let end = End { code, last_words };
        match command::conclude(settings, &self.folder, end, self.begun.elapsed().as_secs_f64()) {
            Ok(Outcome::Done { .. }) => Ended::Done,
            Ok(Outcome::Stopped { step }) => Ended::Stopped { step },
            Ok(Outcome::Failed { cause, message }) => Ended::Failed(Failure { cause, message }),
            Err(error) => Ended::Failed(Failure {
                cause: FailureCause::Io,
                message: format!("its outcome cannot be written into {}: {error}", self.folder.display()),
            }),
        }
    }

    fn how_it_ended(&self, end: &LastSeen) -> Ended {
        match jobdir::outcome(&self.folder) {
            Ok(Some(Outcome::Done { .. })) => Ended::Done,
            Ok(Some(Outcome::Stopped { step })) => Ended::Stopped { step },
            Ok(Some(Outcome::Failed { cause, message })) => Ended::Failed(Failure { cause, message }),
            Ok(None) => {
                let (words, last_words) = (&end.words, self.last_words());
                // A backtrace may follow the words that tell.
                match memory::ran_out(end.signal, &self.stderr(), self.killed_before, memory::num_killed()) {
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

    fn stderr(&self) -> String {
        let text = std::fs::read(self.folder.join(STDERR_FILE)).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    fn last_words(&self) -> String {
        let text = self.stderr();
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
