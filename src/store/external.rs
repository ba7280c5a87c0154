//! Hashes of files and folders outside the artifact store, remembered so that unchanged files are not read again.
//!
//! A file counts as unchanged when its size, modification time and inode are. Knows content, not which node reads it.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::plan::ExternalFiles;

const EXTERNAL_VERSION: u32 = 1;
/// Bytes of a long file that are read at once, for all processors to hash; a shorter file is hashed by one.
const HASHED_AT_ONCE: usize = 4 << 20;

/// Hashes of external content, with their memory in `artifacts/state/external.json`.
#[derive(Debug)]
pub struct FileHashes {
    root: PathBuf,
    memory: PathBuf,
    known: Mutex<Memory>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Memory {
    version: u32,
    files: BTreeMap<PathBuf, Remembered>,
    #[serde(skip)]
    is_changed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    #[serde(flatten)]
    stamp: Stamp,
    blake3: String,
}

/// What a file looks like from outside; with all of it equal, its content counts as unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    bytes: u64,
    modified_ns: u64,
    inode: u64,
}

impl Stamp {
    /// Returns the stamp of a file.
    pub fn of(metadata: &std::fs::Metadata) -> Self {
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let modified_ns = modified.map_or(0, |since| since.as_nanos() as u64);
        Self { bytes: metadata.len(), modified_ns, inode: inode(metadata) }
    }
}

impl FileHashes {
    /// Returns hashes of paths relative to `root`, with their memory at `memory`; a damaged memory is forgotten.
    pub fn open(root: PathBuf, memory: PathBuf) -> Self {
        let known = std::fs::read(&memory)
            .ok()
            .and_then(|text| serde_json::from_slice::<Memory>(&text).ok())
            .filter(|known| known.version == EXTERNAL_VERSION)
            .unwrap_or_default();
        Self { root, memory, known: Mutex::new(known) }
    }

    fn known(&self) -> MutexGuard<'_, Memory> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the hash of a file, reading it only when it seems to have changed.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn file_hash(&self, path: &Path) -> io::Result<String> {
        let stamp = Stamp::of(&std::fs::metadata(path)?);
        if let Some(known) = self.known().files.get(path).filter(|known| known.stamp == stamp) {
            return Ok(known.blake3.clone());
        }
        let blake3 = hash_file(path)?;
        let mut known = self.known();
        known.files.insert(path.to_owned(), Remembered { stamp, blake3: blake3.clone() });
        known.is_changed = true;
        Ok(blake3)
    }

    /// Writes what was learnt; a memory that cannot be written costs time and nothing else.
    pub fn remember(&self) {
        if let Err(error) = self.save() {
            tracing::warn!(%error, "hashes of external files will be computed again next time");
        }
    }

    /// Writes what was learnt; without this the next run reads the files again.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> io::Result<()> {
        let mut known = self.known();
        if !known.is_changed {
            return Ok(());
        }
        known.version = EXTERNAL_VERSION;
        write_memory(&self.memory, |file| Ok(serde_json::to_writer(file, &*known)?))?;
        known.is_changed = false;
        Ok(())
    }

    /// Hashes a file by content, a folder by the names and hashes of everything in it.
    fn hash_path(&self, path: &Path) -> io::Result<String> {
        if !std::fs::metadata(path)?.is_dir() {
            return self.file_hash(path);
        }
        let mut names: Vec<_> =
            std::fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>()?;
        names.sort();
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"folder");
        for name in names {
            let hash = self.hash_path(&path.join(&name))?;
            let name = name.to_string_lossy();
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(hash.as_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

impl ExternalFiles for FileHashes {
    fn content_hash(&self, path: &str) -> Option<String> {
        let path = self.root.join(path);
        match self.hash_path(&path) {
            Ok(hash) => Some(hash),
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "external path cannot be read");
                None
            }
        }
    }
}

/// Returns the blake3 of a file's content.
///
/// # Errors
/// When it cannot be read.
pub fn hash_file(path: &Path) -> io::Result<String> {
    let file = std::fs::File::open(path)?;
    let bytes = file.metadata()?.len();
    hash_opened(&file, bytes)
}

/// Returns the blake3 of the content of a file that was just opened and has about so many bytes. Not for use on a thread of
/// `rayon` that another one waits for.
///
/// # Errors
/// When it cannot be read.
pub fn hash_opened(mut file: impl Read, bytes: u64) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    if bytes < HASHED_AT_ONCE as u64 {
        // blake3 reads 64 KiB at a time into its own buffer.
        hasher.update_reader(file)?;
    } else {
        // Read and not mapped: a file that is cut short meanwhile would end the program.
        let mut buffer = vec![0; HASHED_AT_ONCE];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(num) => drop(hasher.update_rayon(&buffer[..num])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Writes a file so that a reader sees the old content or the new, and never half of it.
///
/// # Errors
/// When the file system says no.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    write_atomically_with(path, |file| file.write_all(content))
}

/// Writes a file as [`write_atomically`] does, with content that is made while it is written.
///
/// # Errors
/// When the file system says no, or `write` does.
pub fn write_atomically_with(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let file = write_beside(path, write)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    super::journal::sync_parent(path)
}

/// Writes what can be learnt again, and is checked when it is read: as [`write_atomically_with`] does, but nobody waits for
/// the disk, and after a loss of power the file may be empty.
///
/// # Errors
/// When the file system says no, or `write` does.
pub fn write_memory(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    write_beside(path, write)?.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Writes a temporary file into the folder of `path`, which is made if it is missing.
fn write_beside(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<tempfile::NamedTempFile> {
    let folder = path.parent().ok_or_else(|| io::Error::other("the path has no folder"))?;
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new().prefix(".new-").permissions(readable()).tempfile_in(folder)?;
    let mut buffered = io::BufWriter::new(file.as_file_mut());
    write(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    Ok(file)
}

/// Temporary files are private by default; what we keep may be read by a group.
fn readable() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    std::fs::Permissions::from_mode(0o644)
}

fn inode(metadata: &std::fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_and_short_files_have_the_hash_of_their_content() {
        let content: Vec<u8> = (0..2 * HASHED_AT_ONCE + 12_345).map(|at| ((at * at) >> 7) as u8).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for len in [0, 1, HASHED_AT_ONCE - 1, HASHED_AT_ONCE, content.len()] {
            std::fs::write(&path, &content[..len]).unwrap();
            assert_eq!(hash_file(&path).unwrap(), blake3::hash(&content[..len]).to_hex().to_string(), "{len} bytes");
        }
        // One that grows or shrinks while it is read is hashed as far as it goes.
        let hash = hash_opened(&content[..5], HASHED_AT_ONCE as u64).unwrap();
        assert_eq!(hash, blake3::hash(&content[..5]).to_hex().to_string());
    }

    #[test]
    fn content_decides_and_unchanged_files_are_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let memory = dir.path().join("state/external.json");
        std::fs::create_dir(dir.path().join("set")).unwrap();
        std::fs::write(dir.path().join("set/a.txt"), "one").unwrap();
        let hashes = FileHashes::open(dir.path().to_owned(), memory.clone());
        let before = hashes.content_hash("set").unwrap();
        assert_eq!(hashes.content_hash("missing"), None);
        hashes.save().unwrap();

        let again = FileHashes::open(dir.path().to_owned(), memory.clone());
        assert_eq!(again.content_hash("set").unwrap(), before);
        assert!(!again.known().is_changed, "nothing was read again");
        // As a loss of power may leave it.
        std::fs::write(&memory, "").unwrap();
        let emptied = FileHashes::open(dir.path().to_owned(), memory);
        assert_eq!(emptied.content_hash("set").unwrap(), before);
        assert!(emptied.known().is_changed, "all was read again");
        std::fs::write(dir.path().join("set/a.txt"), "other").unwrap();
        assert_ne!(again.content_hash("set").unwrap(), before);
        std::fs::rename(dir.path().join("set/a.txt"), dir.path().join("set/b.txt")).unwrap();
        std::fs::write(dir.path().join("set/b.txt"), "one").unwrap();
        assert_ne!(again.content_hash("set").unwrap(), before, "a name is content of its folder");
    }
}
