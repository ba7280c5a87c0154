//! Processes of others: is this one still the one that was started, where does it run, how is it told to stop.
//!
//! A process id alone is reused by the system, so a start time goes with it. Knows processes, not jobs.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::local::JOB_VARIABLE;
use crate::run::scheduler::Cancel;

/// A process that cannot be mistaken for a later one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Number; also that of its process group.
    pub pid: u32,
    /// Start in clock ticks since boot, as `/proc` tells it; absent where there is no `/proc`.
    pub started: Option<u64>,
}

impl ProcessId {
    /// Returns the identity of a process that runs now.
    pub fn of(pid: u32) -> Self {
        Self { pid, started: stat(pid).map(|(_, started)| started) }
    }

    /// Returns true when the process still runs; a dead one that nobody waited for does not.
    pub fn is_alive(self) -> bool {
        if cfg!(target_os = "linux") {
            return match stat(self.pid) {
                Some((state, started)) => !matches!(state, 'Z' | 'X') && self.started.is_none_or(|own| own == started),
                None => false,
            };
        }
        rustix_pid(self.pid).is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
    }

    /// Tells the process group to stop, or kills it.
    pub fn signal(self, how: Cancel) {
        if self.is_alive() {
            signal_group(self.pid, how);
        }
    }
}

/// Tells the process group of `pid` to stop, or kills it; whoever calls knows that the number is still that process's.
pub fn signal_group(pid: u32, how: Cancel) {
    let signal = match how {
        Cancel::Gently => rustix::process::Signal::TERM,
        Cancel::AtOnce => rustix::process::Signal::KILL,
    };
    if let Some(group) = rustix_pid(pid)
        && let Err(error) = rustix::process::kill_process_group(group, signal)
    {
        tracing::debug!(pid, %error, "the worker had gone already");
    }
}

/// Returns a process number as the system calls take it; nothing for one that cannot be.
pub fn rustix_pid(pid: u32) -> Option<rustix::process::Pid> {
    rustix::process::Pid::from_raw(i32::try_from(pid).ok()?)
}

/// Returns state and start time of a process.
fn stat(pid: u32) -> Option<(char, u64)> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Reads a line of `/proc/<pid>/stat`; the program's name stands in parentheses and may hold any character.
fn parse_stat(text: &str) -> Option<(char, u64)> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    // The start time is field 22 of the line; the state is field 3.
    let started = fields.nth(18)?.parse().ok()?;
    Some((state, started))
}

/// Returns the process of a job's folder whose lease was not written in time: its environment names the folder.
pub fn find_by_job(folder: &Path) -> Option<ProcessId> {
    let entries = fs::read_dir("/proc").ok()?;
    let pids = entries.filter_map(Result::ok).filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let variable = [JOB_VARIABLE.as_bytes(), b"=", folder.as_os_str().as_encoded_bytes()].concat();
    let is_it = |pid: &u32| {
        let Ok(variables) = fs::read(format!("/proc/{pid}/environ")) else { return false };
        variables.split(|&byte| byte == 0).any(|found| found == variable)
    };
    let mut found: Vec<ProcessId> =
        pids.filter(is_it).map(ProcessId::of).filter(|process| process.is_alive()).collect();
    // Its own children carry the variable too; the job leads the process group, and it is the oldest.
    found.sort_by_key(|process| (process.started, process.pid));
    found.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse_the_parser() {
        let line = "7 (a) b) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 98765 1000 1 18446744073709551615";
        assert_eq!(parse_stat(line), Some(('S', 98765)));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_is_alive_and_a_later_one_of_its_number_is_not() {
        let own = ProcessId::of(std::process::id());
        assert!(own.is_alive());
        assert!(!ProcessId { started: own.started.map(|ticks| ticks + 1), ..own }.is_alive());
        assert!(!ProcessId { pid: u32::MAX - 1, started: None }.is_alive());
    }
}
