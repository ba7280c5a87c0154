//! The journal of a run: `runs/<id>/journal.jsonl`, one line per event, each chained to the line before by its hash.
//!
//! It is the truth from which everything else about a run can be made again. Knows lines, order and damage; not what
//! the events mean. A last line that a crash cut short is dropped when the journal is opened for appending; damage
//! anywhere else is an error, because it cannot come from a crash.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::run::event::RunEvent;

/// Version of a line; raised when a field or an event changes its meaning.
pub const JOURNAL_VERSION: u32 = 1;
/// Name of the journal in a run's folder.
pub const JOURNAL_FILE: &str = "journal.jsonl";

/// Hexadecimal digits of a line's hash.
const HASH_LEN: usize = 32;
/// A line ends with this key, its hash and a closing brace.
const HASH_KEY: &str = ",\"hash\":\"";
/// Bytes read from the end to find the last line.
const TAIL_BYTES: u64 = 64 * 1024;

/// One line of a journal, without its hash.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JournalRecord {
    /// [`JOURNAL_VERSION`] of the writer.
    pub version: u32,
    /// Position, from 1, without gaps.
    pub seq: u64,
    /// Milliseconds since 1970.
    pub ts_ms: u64,
    /// Hash of the line before; empty in the first.
    pub prev: String,
    /// What happened.
    pub event: RunEvent,
}

/// A journal that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system said no.
    #[error("cannot read or write {path}")]
    Io {
        /// The journal.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A complete line is not what was written.
    #[error("line {line} of {path} is damaged: {what}")]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// A line of a newer program.
    #[error("{path} has version {version}; this program reads up to {JOURNAL_VERSION}")]
    Newer {
        /// The journal.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// An event has no JSON form.
    #[error("an event cannot be written as JSON")]
    Encode(#[source] serde_json::Error),
}

/// What reading a journal gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// The events in order.
    pub records: Vec<JournalRecord>,
    /// Bytes of complete lines.
    pub good_bytes: u64,
    /// True when bytes of an unfinished line follow.
    pub is_torn: bool,
    /// Hash of the last complete line.
    last_hash: String,
}

/// Reads a journal and checks its chain.
///
/// # Errors
/// When it cannot be read or a complete line is damaged.
pub fn read(path: &Path) -> Result<Reading, JournalError> {
    let text = std::fs::read(path).map_err(|source| JournalError::Io { path: path.to_owned(), source })?;
    let mut reading = Reading { records: Vec::new(), good_bytes: 0, is_torn: false, last_hash: String::new() };
    for (index, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let Some(body) = line.strip_suffix(b"\n") else {
            reading.is_torn = true;
            break;
        };
        let damaged = |what: String| JournalError::Damaged { path: path.to_owned(), line: index + 1, what };
        let (record, hash) = decode(body).map_err(&damaged)?;
        if record.version > JOURNAL_VERSION {
            return Err(JournalError::Newer { path: path.to_owned(), version: record.version });
        }
        if record.seq != index as u64 + 1 {
            return Err(damaged(format!("its number is {}", record.seq)));
        }
        if record.prev != reading.last_hash {
            return Err(damaged("it does not follow from the line before".into()));
        }
        reading.records.push(record);
        reading.good_bytes += line.len() as u64;
        reading.last_hash = hash;
    }
    Ok(reading)
}

/// Returns the first line of a journal, reading no more; nothing when it is not complete or damaged.
pub fn first(path: &Path) -> Option<JournalRecord> {
    let mut line = Vec::new();
    BufReader::new(File::open(path).ok()?).read_until(b'\n', &mut line).ok()?;
    Some(decode(line.strip_suffix(b"\n")?).ok()?.0)
}

/// Returns the last complete line, reading only the end of the file; nothing when no line is complete.
///
/// # Errors
/// When it cannot be read or that line is damaged.
pub fn last(path: &Path) -> Result<Option<JournalRecord>, JournalError> {
    let io = |source| JournalError::Io { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let start = length.saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(start)).map_err(io)?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).map_err(io)?;
    // The full reading finds a line that is longer than the tail, and names a damaged one.
    let carefully = || read(path).map(|mut all| all.records.pop());
    let Some(end) = tail.iter().rposition(|&byte| byte == b'\n') else {
        return if start == 0 { Ok(None) } else { carefully() };
    };
    let line = match tail[..end].iter().rposition(|&byte| byte == b'\n') {
        Some(before) => &tail[before + 1..end],
        None if start == 0 => &tail[..end],
        None => return carefully(),
    };
    decode(line).map_or_else(|_| carefully(), |(record, _)| Ok(Some(record)))
}

/// An open journal: appends lines and makes them durable.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    seq: u64,
    last_hash: String,
}

impl Journal {
    /// Opens the journal at `path` for appending, creating it when it is missing and dropping a torn last line.
    ///
    /// # Errors
    /// When it cannot be opened or is damaged.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let io = |source| JournalError::Io { path: path.to_owned(), source };
        let exists = path.exists();
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(io)?;
        if !exists {
            sync_parent(path).map_err(io)?;
        }
        let reading = read(path)?;
        if reading.is_torn {
            tracing::warn!(path = %path.display(), "dropped an unfinished last line");
            file.set_len(reading.good_bytes).map_err(io)?;
            file.sync_all().map_err(io)?;
        }
        Ok(Self { path: path.to_owned(), file, seq: reading.records.len() as u64, last_hash: reading.last_hash })
    }

    /// Returns the number of the last line.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Returns another handle of the file, for the one who syncs it.
    ///
    /// # Errors
    /// When the process has too many files open.
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Appends events in order and returns when all of them are written; they are durable after a sync of
    /// [`Journal::file`].
    ///
    /// # Errors
    /// When writing fails; the journal must then be opened again.
    pub fn append(&mut self, events: &[RunEvent], ts_ms: u64) -> Result<Vec<JournalRecord>, JournalError> {
        let mut text = Vec::new();
        let mut records = Vec::with_capacity(events.len());
        for event in events {
            let seq = self.seq + 1;
            let prev = std::mem::take(&mut self.last_hash);
            let record = JournalRecord { version: JOURNAL_VERSION, seq, ts_ms, prev, event: event.clone() };
            self.last_hash = encode(&record, &mut text).map_err(JournalError::Encode)?;
            self.seq = seq;
            records.push(record);
        }
        let io = |source| JournalError::Io { path: self.path.clone(), source };
        self.file.write_all(&text).map_err(io)?;
        Ok(records)
    }
}

/// Makes the entry of `path` in its folder durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Adds the line of a record to `text` and returns its hash.
fn encode(record: &JournalRecord, text: &mut Vec<u8>) -> Result<String, serde_json::Error> {
    let start = text.len();
    serde_json::to_writer(&mut *text, record)?;
    let hash = hash_of(&text[start..]);
    // The hash takes the place of the closing brace.
    text.pop();
    for part in [HASH_KEY, &hash, "\"}\n"] {
        text.extend_from_slice(part.as_bytes());
    }
    Ok(hash)
}

/// Reads a line and its hash. The hash is over the text as written, so that no number has to be printed again.
pub(super) fn decode(line: &[u8]) -> Result<(JournalRecord, String), String> {
    let line = std::str::from_utf8(line).map_err(|_| "it is not UTF-8".to_owned())?;
    let no_hash = || "it has no hash".to_owned();
    let open = line.strip_suffix("\"}").ok_or_else(no_hash)?;
    let at = open.len().checked_sub(HASH_LEN).filter(|at| open.is_char_boundary(*at)).ok_or_else(no_hash)?;
    let (open, hash) = open.split_at(at);
    let body = format!("{}}}", open.strip_suffix(HASH_KEY).ok_or_else(no_hash)?);
    if hash_of(body.as_bytes()) != hash {
        return Err("its hash does not match".into());
    }
    let record = serde_json::from_str(&body).map_err(|error| error.to_string())?;
    Ok((record, hash.to_owned()))
}

fn hash_of(body: &[u8]) -> String {
    blake3::hash(body).to_hex()[..HASH_LEN].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::event::RunResult;

    fn resumed(pid: u32) -> RunEvent {
        RunEvent::RunResumed { pid, host: "here".into() }
    }

    fn journal() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL_FILE);
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&[resumed(1), resumed(2)], 10).unwrap();
        journal.append(&[RunEvent::RunFinished { result: RunResult::Done }], 20).unwrap();
        (dir, path)
    }

    #[test]
    fn a_journal_reads_back_what_was_appended() {
        let (_dir, path) = journal();
        let reading = read(&path).unwrap();
        assert_eq!(reading.records.iter().map(|record| record.seq).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(reading.records[1].event, resumed(2));
        assert_eq!(reading.records[2].ts_ms, 20);
        assert!(!reading.is_torn);
        assert_eq!(last(&path).unwrap().as_ref(), reading.records.last());
        assert_eq!(first(&path).as_ref(), reading.records.first());
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_the_chain_goes_on() {
        let (_dir, path) = journal();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        assert_eq!(last(&path).unwrap().unwrap().event, resumed(2));
        assert!(read(&path).unwrap().is_torn);
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.seq(), 2);
        journal.append(&[resumed(9)], 30).unwrap();
        let reading = read(&path).unwrap();
        assert_eq!(reading.records.last().unwrap().event, resumed(9));
        assert!(!reading.is_torn);
    }

    #[test]
    fn a_changed_or_missing_line_is_named() {
        let (_dir, path) = journal();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"pid\":2", "\"pid\":3")).unwrap();
        assert!(matches!(read(&path), Err(JournalError::Damaged { line: 2, .. })));
        let without_first: String = text.lines().skip(1).map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, without_first).unwrap();
        assert!(matches!(read(&path), Err(JournalError::Damaged { line: 1, .. })));
    }

    #[test]
    fn a_journal_of_version_1_can_be_read() {
        let line = include_str!("../../tests/fixtures/journal/version-1.jsonl");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL_FILE);
        std::fs::write(&path, line).unwrap();
        let reading = read(&path).unwrap();
        assert_eq!(reading.records.len(), 2);
        assert!(matches!(&reading.records[0].event, RunEvent::RunStarted { run, .. } if run == "example"));
    }
}
