//! Job directories on disk: `jobs/<fingerprint>/<attempt>/` and the lease beside the attempts.
//!
//! The lease names the one attempt whose output may be sealed and the worker that has it. Knows files, not processes
//! beyond their identity, and decides what earlier processes left of a node.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use deepgen_contract::event::WorkerEvent;
use deepgen_contract::id::Fingerprint;
use deepgen_contract::job::{EVENTS_FILE, JOB_FILE, JobSpec, OUT_DIR, OUTCOME_FILE, Outcome};
use serde::{Deserialize, Serialize};

use super::command;
use super::process::{self, ProcessId};
use crate::run::board::Start;

/// Name of the lease in a fingerprint's folder.
pub const LEASE_FILE: &str = "lease.json";
const NEW_LEASE_FILE: &str = "lease.json.new";
const LEASE_VERSION: u32 = 1;

/// Who may produce the result of a fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Version of this format.
    pub version: u32,
    /// The attempt that has it.
    pub attempt: u32,
    /// Host of its worker.
    pub host: String,
    /// Its worker; absent from just before the start until it has lived for a moment.
    pub worker: Option<ProcessId>,
}

/// All attempts at one fingerprint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDir {
    folder: PathBuf,
}

impl JobDir {
    /// Returns the folder of a fingerprint among all jobs; it need not exist.
    pub fn new(jobs: &Path, fingerprint: &Fingerprint) -> Self {
        Self { folder: jobs.join(fingerprint.to_string()) }
    }

    /// Returns the directory of an attempt.
    pub fn attempt(&self, attempt: u32) -> PathBuf {
        self.folder.join(attempt.to_string())
    }

    /// Returns the numbers of all attempts, newest first.
    pub fn attempts(&self) -> Vec<u32> {
        let Ok(entries) = fs::read_dir(&self.folder) else { return Vec::new() };
        let names = entries.filter_map(Result::ok).filter_map(|entry| entry.file_name().into_string().ok());
        let mut attempts: Vec<u32> = names.filter_map(|name| name.parse().ok()).collect();
        attempts.sort_unstable_by(|a, b| b.cmp(a));
        attempts
    }

    /// Returns the lease, if one was given.
    pub fn lease(&self) -> Option<Lease> {
        let text = fs::read(self.folder.join(LEASE_FILE)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Gives the lease to an attempt; whoever had it can seal no more.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn give_lease(&self, attempt: u32, host: &str, worker: Option<ProcessId>) -> io::Result<()> {
        let lease = Lease { version: LEASE_VERSION, attempt, host: host.to_owned(), worker };
        // Not synced: no worker outlives the machine, so after a loss of power nothing depends on it.
        let new = self.folder.join(NEW_LEASE_FILE);
        fs::write(&new, serde_json::to_vec(&lease)?)?;
        fs::rename(new, self.folder.join(LEASE_FILE))
    }

    /// Returns true when `attempt` may be sealed. A first attempt has the lease until another is given it.
    pub fn has_lease(&self, attempt: u32) -> bool {
        self.lease().map_or(attempt == 1, |lease| lease.attempt == attempt)
    }

    /// Creates the directory of an attempt and, after the first, gives it the lease.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn make(&self, attempt: u32, host: &str) -> io::Result<PathBuf> {
        let folder = self.attempt(attempt);
        // Mostly only the job's own folder is missing; asked for the deepest one, the system would say no first.
        match fs::create_dir(&self.folder).and_then(|()| fs::create_dir(&folder)) {
            Ok(()) => {}
            Err(_) => fs::create_dir_all(&folder)?,
        }
        if attempt > 1 {
            self.give_lease(attempt, host, None)?;
        }
        Ok(folder)
    }

    /// Writes the description of a job into the directory of its attempt.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn describe(&self, job: &JobSpec) -> io::Result<()> {
        fs::write(self.attempt(job.attempt).join(JOB_FILE), serde_json::to_vec(job)?)
    }

    /// Returns the worker of an attempt, if it still runs on this host.
    pub fn live_worker(&self, attempt: u32, host: &str) -> Option<ProcessId> {
        let worker = match self.lease() {
            Some(lease) if lease.attempt == attempt && lease.host == host => lease.worker,
            None if attempt == 1 => None,
            _ => return None,
        };
        match worker {
            Some(worker) => worker.is_alive().then_some(worker),
            // The orchestrator died between the start of the worker and writing that down.
            None => process::find_by_job(&self.attempt(attempt)),
        }
    }

    /// Decides what earlier processes left of the node.
    pub fn start(&self, host: &str) -> Start {
        let Some(newest) = self.attempts().first().copied() else { return Start::Fresh { next_attempt: 1 } };
        // The order matters: a worker may end between the two looks, but it never comes back.
        if self.live_worker(newest, host).is_some() {
            return Start::Alive { attempt: newest };
        }
        let folder = self.attempt(newest);
        // Without its output it was sealed already; what became of the result is no matter of the attempt.
        if self.has_lease(newest) && folder.join(OUT_DIR).is_dir() {
            match outcome(&folder) {
                Ok(Some(Outcome::Done { .. })) => return Start::Finished { attempt: newest },
                // A shell line ended while nobody watched; whoever follows it draws the conclusion.
                Ok(None) if command::written_code(&folder).is_some() => return Start::Alive { attempt: newest },
                _ => {}
            }
        }
        Start::Fresh { next_attempt: newest + 1 }
    }
}

/// Reads the description of an attempt's job.
///
/// # Errors
/// When it is missing or of another program.
pub fn job(attempt: &Path) -> io::Result<JobSpec> {
    Ok(serde_json::from_slice(&fs::read(attempt.join(JOB_FILE))?)?)
}

/// Reads how an attempt ended, if it did.
///
/// # Errors
/// When the file is there and cannot be understood.
pub fn outcome(attempt: &Path) -> io::Result<Option<Outcome>> {
    match fs::read(attempt.join(OUTCOME_FILE)) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads `events.jsonl` of an attempt as it grows.
#[derive(Debug)]
pub struct EventTail {
    path: PathBuf,
    offset: u64,
    partial: Vec<u8>,
}

impl EventTail {
    /// Returns a reader that starts at the first event.
    pub fn new(attempt: &Path) -> Self {
        Self { path: attempt.join(EVENTS_FILE), offset: 0, partial: Vec::new() }
    }

    /// Returns the events since the last call. A line of an unknown kind is left out: a newer worker may say more.
    pub fn read(&mut self) -> Vec<WorkerEvent> {
        let mut bytes = std::mem::take(&mut self.partial);
        if let Err(error) = self.read_new(&mut bytes)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot read events");
        }
        let end = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        self.partial = bytes.split_off(end);
        let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }

    fn read_new(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        let mut file = fs::File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        self.offset += file.read_to_end(bytes)? as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use deepgen_contract::event::WorkerEventKind;
    use std::io::Write;

    fn job_dir() -> (tempfile::TempDir, JobDir) {
        let dir = tempfile::tempdir().unwrap();
        let job = JobDir::new(dir.path(), &Fingerprint([1; 32]));
        (dir, job)
    }

    fn attempt(job: &JobDir, attempt: u32, outcome: Option<&str>) {
        let folder = job.attempt(attempt);
        fs::create_dir_all(folder.join(OUT_DIR)).unwrap();
        if let Some(text) = outcome {
            fs::write(folder.join(OUTCOME_FILE), text).unwrap();
        }
    }

    const DONE: &str = r#"{"kind":"done","metrics":{},"notes":[],"seconds":1.0}"#;

    #[test]
    fn what_was_left_decides_how_a_node_starts() {
        let (_dir, job) = job_dir();
        assert_eq!(job.start("here"), Start::Fresh { next_attempt: 1 });
        attempt(&job, 1, None);
        job.give_lease(1, "here", Some(ProcessId { pid: u32::MAX - 1, started: Some(1) })).unwrap();
        assert_eq!(job.start("here"), Start::Fresh { next_attempt: 2 });
        attempt(&job, 10, Some(DONE));
        assert_eq!(job.start("here"), Start::Fresh { next_attempt: 11 }, "the lease is another's");
        job.give_lease(10, "here", None).unwrap();
        assert_eq!(job.start("here"), Start::Finished { attempt: 10 });
        job.give_lease(10, "here", Some(ProcessId::of(std::process::id()))).unwrap();
        assert_eq!(job.start("here"), Start::Alive { attempt: 10 });
        assert_eq!(job.attempts(), [10, 1]);
    }

    #[test]
    fn a_shell_line_that_ended_unwatched_is_concluded_once() {
        let (_dir, job) = job_dir();
        attempt(&job, 1, None);
        let folder = job.attempt(1);
        fs::write(folder.join(command::EXIT_FILE), "0\n").unwrap();
        assert_eq!(job.start("here"), Start::Alive { attempt: 1 });
        fs::remove_dir(folder.join(OUT_DIR)).unwrap();
        assert_eq!(job.start("here"), Start::Fresh { next_attempt: 2 }, "its output was sealed");
    }

    #[test]
    fn a_failed_or_stopped_attempt_is_followed_by_the_next() {
        let (_dir, job) = job_dir();
        attempt(&job, 1, Some(r#"{"kind":"stopped","step":5}"#));
        job.give_lease(1, "here", None).unwrap();
        assert_eq!(job.start("here"), Start::Fresh { next_attempt: 2 });
    }

    #[test]
    fn a_tail_gives_each_line_once_and_waits_for_the_end_of_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let mut tail = EventTail::new(dir.path());
        assert_eq!(tail.read(), []);
        let mut file = fs::File::create(dir.path().join(EVENTS_FILE)).unwrap();
        let line = r#"{"ts_ms":1,"event":{"kind":"note","message":"hello"}}"#;
        write!(file, "{line}\n{{\"ts_ms\":2,\"event\":{{\"kind\":\"dance\"}}}}\n{}", &line[..20]).unwrap();
        let read = tail.read();
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].event, WorkerEventKind::Note { message: "hello".into() });
        assert_eq!(tail.read(), []);
        writeln!(file, "{}", &line[20..]).unwrap();
        assert_eq!(tail.read(), read);
    }
}
