//! A journal read on as it grows, for those who watch a run from outside.
//!
//! Checks each line by its own hash; the chain between lines is the business of [`super::journal`].

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::journal::{JOURNAL_FILE, JournalError, JournalRecord, decode};

/// Reads the journal of a run from its first line on.
#[derive(Debug)]
pub struct JournalTail {
    path: PathBuf,
    offset: u64,
    num_lines: usize,
}

impl JournalTail {
    /// Returns a reader that starts at the first line.
    pub fn new(run_dir: &Path) -> Self {
        Self { path: run_dir.join(JOURNAL_FILE), offset: 0, num_lines: 0 }
    }

    /// Returns the records since the last call; an unfinished line waits for its end.
    ///
    /// # Errors
    /// When the journal cannot be read or a line is damaged.
    pub fn read(&mut self) -> Result<Vec<JournalRecord>, JournalError> {
        let mut bytes = self.read_new().map_err(|source| JournalError::Io { path: self.path.clone(), source })?;
        // An unfinished line is read again: a run that goes on after a crash drops it and writes another.
        bytes.truncate(bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1));
        self.offset += bytes.len() as u64;
        let mut records = Vec::new();
        for line in bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            self.num_lines += 1;
            let damaged = |what| JournalError::Damaged { path: self.path.clone(), line: self.num_lines, what };
            records.push(decode(line).map_err(damaged)?.0);
        }
        Ok(records)
    }

    fn read_new(&self) -> io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::event::RunEvent;
    use crate::store::journal::Journal;

    #[test]
    fn a_tail_gives_each_line_once_and_survives_a_dropped_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL_FILE);
        let resumed = |pid| RunEvent::RunResumed { pid, host: "here".into() };
        Journal::open(&path).unwrap().append(&[resumed(1), resumed(2)], 5).unwrap();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 4]).unwrap();
        let mut tail = JournalTail::new(dir.path());
        assert_eq!(tail.read().unwrap().len(), 1);
        Journal::open(&path).unwrap().append(&[resumed(3)], 6).unwrap();
        let read = tail.read().unwrap();
        assert_eq!(read.iter().map(|record| record.event.clone()).collect::<Vec<_>>(), [resumed(3)]);
        assert!(tail.read().unwrap().is_empty());
    }
}
