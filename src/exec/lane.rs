//! A command on a thread of its own, from its folder to its end, and if that comes quickly to its sealed result.
//!
//! A DAG may hold thousands of commands that take a millisecond each. To start, await and seal them in different threads leaves
//! processors idle at each handing over, so one thread does it all and reports once. What only a command that lives on
//! needs is written by [`Lanes::look`]: its description and its lease; until then a later orchestrator finds the
//! process by its environment. How a result is sealed is told to it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use deepgen_contract::command::CommandSettings;
use deepgen_contract::id::NodeName;
use deepgen_contract::job::{FailureCause, JobSpec, OUT_DIR, Outcome, STDERR_FILE, STDOUT_FILE};
use rustix::process::{WaitId, WaitIdOptions};
use tokio::sync::mpsc::UnboundedSender;

use super::command::{self, Programs};
use super::ending::{self, LastSeen};
use super::executor::{ExecError, Report, Seal, What};
use super::jobdir::JobDir;
use super::local::JOB_VARIABLE;
use super::process::{self, ProcessId};
use crate::run::event::Failure;
use crate::run::scheduler::{Cancel, Ended};

/// All commands of this orchestrator that have not been waited for.
#[derive(Debug, Clone, Default)]
pub struct Lanes {
    running: Arc<Mutex<BTreeMap<NodeName, Running>>>,
}

/// A command that was launched.
#[derive(Debug)]
struct Running {
    job: Arc<JobSpec>,
    dir: JobDir,
    /// Its process and when it was started. Until it was waited for nobody else has its number, and it leaves the map before.
    process: Option<(u32, Instant)>,
    /// What it was told before it had a process.
    told: Option<Cancel>,
    pace: Pace,
    /// Bytes in its logs at the last look.
    logged: u64,
}

/// How long a command has lived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// For a moment: nobody else knows of it.
    Quick,
    /// So long that its description and its lease name it.
    WrittenDown,
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeName, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells a command to stop, or kills it; returns false when it is none that runs here.
    pub fn cancel(&self, node: &NodeName, how: Cancel) -> bool {
        let mut running = self.lock();
        let Some(running) = running.get_mut(node) else { return false };
        match running.process {
            Some((pid, _)) => process::signal_group(pid, how),
            None => running.told = Some(how),
        }
        true
    }

    /// Writes down the commands that have lived for `age`, and returns the attempts whose logs have grown since the last look.
    pub fn look(&self, age: Duration, host: &str) -> Vec<(NodeName, u32)> {
        let mut heard = Vec::new();
        // Under the lock: whoever has ended leaves the map before its number can become another's.
        for (node, running) in self.lock().iter_mut() {
            let Some((pid, _)) = running.process.filter(|(_, begun)| begun.elapsed() >= age) else { continue };
            let attempt = running.job.attempt;
            if running.pace == Pace::Quick {
                running.pace = Pace::WrittenDown;
                let written = running.dir.describe(&running.job);
                let written = written.and_then(|()| running.dir.give_lease(attempt, host, Some(ProcessId::of(pid))));
                if let Err(error) = written {
                    tracing::warn!(%node, %error, "cannot write down which process has the job");
                }
            }
            let logged = bytes_logged(&running.dir.attempt(attempt));
            if std::mem::replace(&mut running.logged, logged) < logged {
                heard.push((node.clone(), attempt));
            }
        }
        heard
    }
}

/// Returns the size of what an attempt has printed.
pub fn bytes_logged(folder: &Path) -> u64 {
    let bytes = |name: &str| fs::metadata(folder.join(name)).map_or(0, |log| log.len());
    bytes(STDOUT_FILE) + bytes(STDERR_FILE)
}

/// The way of one command.
pub struct Lane {
    lanes: Lanes,
    programs: Arc<Programs>,
    job: Arc<JobSpec>,
    dir: JobDir,
    host: String,
}

impl Lane {
    /// Returns the lane of a job for which nothing was done yet; from now on it can be cancelled.
    pub fn enter(lanes: &Lanes, programs: &Arc<Programs>, job: JobSpec, dir: JobDir, host: &str) -> Self {
        let job = Arc::new(job);
        let running = Running {
            job: Arc::clone(&job),
            dir: dir.clone(),
            process: None,
            told: None,
            pace: Pace::Quick,
            logged: 0,
        };
        lanes.lock().insert(job.node.clone(), running);
        Self { lanes: lanes.clone(), programs: Arc::clone(programs), job, dir, host: host.to_owned() }
    }

    /// Runs the command to its end and reports that. What a quick one left is sealed first; another holds its slots no longer
    /// than it runs.
    pub fn run(self, settings: &CommandSettings, seal: Seal, reports: &UnboundedSender<Report>) {
        let what = match self.outcome(settings) {
            Ok((outcome @ Outcome::Done { .. }, Pace::Quick)) => What::Sealed(Box::new(seal(outcome))),
            Ok((outcome, _)) => What::Ended(outcome.into()),
            Err(ended) => What::Ended(ended),
        };
        // The receiver goes away only when the run ends, and then nobody listens.
        let _ = reports.send(Report { node: self.job.node.clone(), attempt: self.job.attempt, what });
    }

    /// Returns the command's outcome, or how it ended without one.
    fn outcome(&self, settings: &CommandSettings) -> Result<(Outcome, Pace), Ended> {
        let folder = self.dir.attempt(self.job.attempt);
        let begun = Instant::now();
        let child = self.start(settings, &folder).map_err(|error| {
            self.leave();
            failed(error.to_string())
        })?;
        let (seen, pace) = self.wait(child);
        let outcome = ending::of_command(settings, &folder, &seen, begun.elapsed().as_secs_f64())?;
        // A quick command's result says it all and is there in a moment; the rest is kept for whoever comes later.
        let is_failure = !matches!(outcome, Outcome::Done { .. });
        if is_failure && pace == Pace::Quick {
            self.dir.describe(&self.job).map_err(|error| failed(format!("its job cannot be written down: {error}")))?;
        }
        if is_failure || pace == Pace::WrittenDown {
            ending::write_outcome(&outcome, &folder)?;
        }
        Ok((outcome, pace))
    }

    fn start(&self, settings: &CommandSettings, folder: &Path) -> Result<Child, ExecError> {
        let at = |source| ExecError::JobDir { path: folder.to_owned(), source };
        let log = |name: &str| File::create(folder.join(name)).map_err(at);
        self.dir.make(self.job.attempt, &self.host).map_err(at)?;
        fs::create_dir(folder.join(OUT_DIR)).map_err(at)?;
        let mut command = command::process(settings, &self.job, folder, &self.programs);
        command.env(JOB_VARIABLE, folder).stdin(Stdio::null());
        command.stdout(log(STDOUT_FILE)?).stderr(log(STDERR_FILE)?).process_group(0);
        let spawned = command.spawn();
        let program = || command.get_program().into();
        let child = spawned.map_err(|source| ExecError::Spawn { worker: program(), source })?;
        if let Some(running) = self.lanes.lock().get_mut(&self.job.node) {
            running.process = Some((child.id(), Instant::now()));
            if let Some(how) = running.told.take() {
                process::signal_group(child.id(), how);
            }
        }
        Ok(child)
    }

    /// Waits for the end of the process.
    fn wait(&self, mut child: Child) -> (LastSeen, Pace) {
        let pid = process::rustix_pid(child.id());
        // It keeps its number until the second wait: nobody signals another's process meanwhile.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while let Some(pid) = pid
            && rustix::process::waitid(WaitId::Pid(pid), options).is_err_and(|error| error == rustix::io::Errno::INTR)
        {
        }
        let pace = self.leave();
        let seen = match child.wait() {
            Ok(status) => status.into(),
            Err(error) => LastSeen::unknown(format!("it cannot be waited for: {error}")),
        };
        (seen, pace)
    }

    /// Takes the command out of the map.
    fn leave(&self) -> Pace {
        self.lanes.lock().remove(&self.job.node).map_or(Pace::Quick, |running| running.pace)
    }
}

fn failed(message: String) -> Ended {
    Ended::Failed(Failure { cause: FailureCause::Io, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use deepgen_contract::id::Fingerprint;
    use deepgen_contract::job::{EVENTS_FILE, JOB_FILE, JOB_VERSION, OUTCOME_FILE};
    use deepgen_contract::settings::Settings;
    use tokio::sync::mpsc::unbounded_channel;

    const HOST: &str = "here";

    struct Fixture {
        jobs: tempfile::TempDir,
        lanes: Lanes,
        settings: CommandSettings,
    }

    impl Fixture {
        fn new(shell: &str) -> Self {
            let settings = CommandSettings { shell: shell.into(), ..Default::default() };
            Self { jobs: tempfile::tempdir().unwrap(), lanes: Lanes::default(), settings }
        }

        fn lane(&self) -> Lane {
            let job = JobSpec {
                version: JOB_VERSION,
                node: NodeName("it".into()),
                stage: "command".into(),
                fingerprint: Fingerprint([3; 32]),
                attempt: 1,
                seed: 7,
                device: "cpu".into(),
                threads: 1,
                project_root: "/project".into(),
                settings: Settings::Command(self.settings.clone()),
                inputs: BTreeMap::new(),
                earlier_attempts: Vec::new(),
                slot_ids: BTreeMap::new(),
                peak_tflops: None,
                frozen_cache: None,
                remedies: Default::default(),
            };
            let dir = JobDir::new(self.jobs.path(), &job.fingerprint);
            Lane::enter(&self.lanes, &Arc::default(), job, dir, HOST)
        }

        /// Runs a lane; its seal says no, in words that name the outcome.
        fn run(&self, lane: Lane) -> What {
            let (reports, mut heard) = unbounded_channel();
            lane.run(&self.settings, Box::new(|outcome| Err(format!("{outcome:?}"))), &reports);
            assert!(self.lanes.lock().is_empty());
            heard.try_recv().unwrap().what
        }

        fn has(&self, name: &str) -> bool {
            self.jobs.path().join(Fingerprint([3; 32]).to_string()).join("1").join(name).exists()
        }
    }

    #[test]
    fn a_quick_command_is_sealed_where_it_ends_and_leaves_only_its_logs() {
        let it = Fixture::new("echo done >{out}/x; echo said");
        let What::Sealed(sealed) = it.run(it.lane()) else { panic!("it is sealed") };
        assert!(sealed.unwrap_err().starts_with("Done"));
        assert!(it.has(STDOUT_FILE) && it.has("out/x"));
        assert!(![JOB_FILE, OUTCOME_FILE, EVENTS_FILE, "../lease.json"].iter().any(|name| it.has(name)));
    }

    #[test]
    fn what_failed_is_kept_and_said() {
        let it = Fixture::new("echo why >&2; exit 3");
        let What::Ended(Ended::Failed(failure)) = it.run(it.lane()) else { panic!("it failed") };
        assert!(failure.message.contains("exit code 3") && failure.message.contains("| why"), "{}", failure.message);
        assert!(it.has(JOB_FILE) && it.has(OUTCOME_FILE));
        // The folder is not new: nothing is started in it.
        let What::Ended(Ended::Failed(failure)) = it.run(it.lane()) else { panic!("it failed") };
        assert!(failure.message.contains("cannot write the job directory"), "{}", failure.message);
    }

    #[test]
    fn a_command_can_be_stopped_before_it_has_a_process() {
        let it = Fixture::new("sleep 60");
        let lane = it.lane();
        assert!(it.lanes.cancel(&NodeName("it".into()), Cancel::AtOnce));
        let What::Ended(Ended::Died { message }) = it.run(lane) else { panic!("it was killed") };
        assert!(message.contains("signal 9"), "{message}");
        assert!(!it.lanes.cancel(&NodeName("it".into()), Cancel::AtOnce), "it does not run any more");
    }

    #[test]
    fn a_command_that_lives_on_is_written_down_heard_and_left_to_be_sealed() {
        let it = Fixture::new("echo begun; while [ ! -e {job}/go ]; do sleep 0.01; done");
        let (lane, folder) = (it.lane(), it.jobs.path().join(Fingerprint([3; 32]).to_string()));
        let node = NodeName("it".into());
        std::thread::scope(|scope| {
            let run = scope.spawn(|| it.run(lane));
            let mut heard = Vec::new();
            while heard.is_empty() {
                heard = it.lanes.look(Duration::ZERO, HOST);
            }
            assert_eq!(heard, [(node, 1)]);
            assert!(it.has(JOB_FILE) && !it.has(OUTCOME_FILE));
            assert!(JobDir::new(it.jobs.path(), &Fingerprint([3; 32])).live_worker(1, HOST).is_some());
            assert_eq!(it.lanes.look(Duration::from_secs(60), HOST), [], "it is not that old");
            fs::write(folder.join("1/go"), "").unwrap();
            assert_eq!(run.join().unwrap(), What::Ended(Ended::Done));
        });
        assert!(it.has(OUTCOME_FILE));
    }
}
