//! How an attempt ended: what was seen of its process, what the program left, its last words.
//!
//! Reads the attempt's folder; starts and waits for nothing.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;

use deepgen_contract::command::CommandSettings;
use deepgen_contract::job::{FailureCause, OUTCOME_FILE, Outcome, STDERR_FILE};

use super::command::{self, End};
use crate::run::event::Failure;
use crate::run::scheduler::Ended;

/// Part of a dead program's standard error that goes into the message.
const NUM_LAST_LINES: usize = 5;

/// What was seen of a process's end.
#[derive(Debug, Clone)]
pub struct LastSeen {
    /// Its exit code, if it ended by itself and somebody watched.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// The same in words.
    pub words: String,
}

impl LastSeen {
    /// Returns an end that nobody saw, or not all of.
    pub fn unknown(words: String) -> Self {
        Self { code: None, signal: None, words }
    }
}

impl From<ExitStatus> for LastSeen {
    fn from(status: ExitStatus) -> Self {
        let (code, signal) = (status.code(), status.signal());
        let words = match (code, signal) {
            (Some(code), _) => format!("it ended with exit code {code}"),
            (None, Some(signal)) => format!("it was killed by signal {signal}"),
            (None, None) => "it ended".into(),
        };
        Self { code, signal, words }
    }
}

/// Returns the outcome of a command, which writes none itself, after `seconds`.
///
/// # Errors
/// When it was killed: says by what.
pub fn of_command(settings: &CommandSettings, folder: &Path, seen: &LastSeen, seconds: f64) -> Result<Outcome, Ended> {
    if seen.signal.is_some() {
        return Err(Ended::Died { message: format!("{}{}", seen.words, last_words(folder)) });
    }
    let code = seen.code.or_else(|| command::written_code(folder));
    let has_failed = !code.is_some_and(|code| settings.is_success(code));
    let last_words = if has_failed { last_words(folder) } else { String::new() };
    Ok(command::conclude(settings, folder, End { code, last_words }, seconds))
}

/// Writes the outcome of a command for whoever comes later.
///
/// # Errors
/// When it cannot be written: how the attempt ended then.
pub fn write_outcome(outcome: &Outcome, folder: &Path) -> Result<(), Ended> {
    // One short write: cut short by a crash it does not parse, and the attempt counts as unfinished.
    let written = serde_json::to_vec(outcome).map_err(Into::into);
    written.and_then(|text| fs::write(folder.join(OUTCOME_FILE), text)).map_err(|error| {
        let message = format!("its outcome cannot be written into {}: {error}", folder.display());
        Ended::Failed(Failure { cause: FailureCause::Io, message })
    })
}

impl From<Outcome> for Ended {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done { .. } => Self::Done,
            Outcome::Stopped { step } => Self::Stopped { step },
            Outcome::Failed { cause, message } => Self::Failed(Failure { cause, message }),
        }
    }
}

/// Returns what an attempt wrote into its standard error.
pub fn stderr(folder: &Path) -> String {
    let text = fs::read(folder.join(STDERR_FILE)).unwrap_or_default();
    String::from_utf8_lossy(&text).into_owned()
}

/// Returns the last lines of an attempt's standard error, each on a line of its own.
pub fn last_words(folder: &Path) -> String {
    let text = stderr(folder);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(NUM_LAST_LINES)..].iter().map(|line| format!("\n  | {line}")).collect()
}
