//! One orchestrator at a time per artifacts folder: a locked file that says who holds it.
//!
//! The kernel drops the lock when its holder dies, so nothing has to be cleaned up. Workers do not inherit it. On
//! network file systems such locks are not reliable: keep `artifacts/state` on a local disk there.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Tries before a lock counts as held, and the pause between them.
const NUM_TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(10);

/// Who holds the lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// Host name.
    pub host: String,
    /// When it took the lock, milliseconds since 1970.
    pub since_ms: u64,
}

/// A lock that could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{}", held(.path, .holder))]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Its holder, if the file says so.
        holder: Option<Holder>,
    },
    /// The file system said no.
    #[error("cannot lock {path}")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

fn held(path: &Path, holder: &Option<Holder>) -> String {
    let folder = path.parent().and_then(Path::parent).unwrap_or(path).display();
    match holder {
        Some(Holder { pid, host, since_ms }) => format!(
            "{folder} is in use by process {pid} on {host}, since {}: wait for it, stop it, or choose another folder with --artifacts",
            crate::progress::format::utc(*since_ms)
        ),
        None => format!("{folder} is in use by another process"),
    }
}

/// The lock; released when dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock at `path`, creating the file and its folder.
    ///
    /// # Errors
    /// Names the holder when there is one.
    pub fn take(path: &Path, holder: &Holder) -> Result<Self, LockError> {
        let io = |source| LockError::Io { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        let mut num_tries = 0;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                // Someone who asks for the holder has the lock for a moment.
                Err(TryLockError::WouldBlock) if num_tries < NUM_TRIES => {
                    num_tries += 1;
                    std::thread::sleep(PAUSE);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(LockError::Held { path: path.to_owned(), holder: read_holder(&mut file) });
                }
                Err(TryLockError::Error(source)) => return Err(io(source)),
            }
        }
        let text = serde_json::to_string(holder).map_err(|error| io(error.into()))?;
        file.set_len(0).map_err(io)?;
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        file.write_all(text.as_bytes()).map_err(io)?;
        file.sync_data().map_err(io)?;
        Ok(Self { _file: file })
    }

    /// Returns who holds the lock at `path` now; what a dead process left there does not count.
    ///
    /// # Errors
    /// When the file cannot be read, or is held by someone who has not said who.
    pub fn holder(path: &Path) -> Result<Option<Holder>, LockError> {
        let io = |source| LockError::Io { path: path.to_owned(), source };
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(None),
            Err(TryLockError::WouldBlock) => match read_holder(&mut file) {
                Some(holder) => Ok(Some(holder)),
                None => Err(LockError::Held { path: path.to_owned(), holder: None }),
            },
            Err(TryLockError::Error(source)) => Err(io(source)),
        }
    }
}

/// Reads who holds the lock; one that is just being taken does not say yet.
fn read_holder(file: &mut File) -> Option<Holder> {
    for _ in 0..NUM_TRIES {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).ok()?;
        file.read_to_string(&mut text).ok()?;
        if let Ok(holder) = serde_json::from_str(&text) {
            return Some(holder);
        }
        std::thread::sleep(PAUSE);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_taker_learns_who_holds_it_and_gets_it_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("artifacts/state/lock");
        let holder = |pid| Holder { pid, host: "node7".into(), since_ms: 0 };
        let lock = Lock::take(&path, &holder(11)).unwrap();
        let message = Lock::take(&path, &holder(12)).unwrap_err().to_string();
        assert!(message.contains("process 11 on node7"), "{message}");
        assert_eq!(Lock::holder(&path).unwrap(), Some(holder(11)));
        drop(lock);
        assert_eq!(Lock::holder(&path).unwrap(), None);
        Lock::take(&path, &holder(12)).unwrap();
    }
}
