//! Writing whole files: under a temporary name, synced, then renamed, so that a reader never sees half a file.
//!
//! Knows no format but JSON's text.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

/// Writes `text` to `path`.
///
/// # Errors
/// When the folder is missing or the disk is full; `path` is then as it was.
pub fn write_text(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_extension("partial");
    let mut file = File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_folder_of(path)
}

/// Writes `value` to `path` as indented JSON.
///
/// # Errors
/// As [`write_text`], and when the value has no JSON form.
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
    write_text(path, &(text + "\n"))
}

/// Makes the folder entry of `path` durable.
///
/// # Errors
/// When the folder cannot be opened.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// Returns the blake3 of a file, hexadecimal. On one processor: a job runs in a pool of its own threads, and where that has one it
/// may be waiting for whoever hashes.
///
/// # Errors
/// When it cannot be read.
pub fn hash_file(path: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Returns the blake3 over the names and contents of every file below `folder`, in order of name.
///
/// # Errors
/// When a file cannot be read.
pub fn hash_folder(folder: &Path) -> io::Result<String> {
    let mut names = Vec::new();
    list(folder, "", &mut names)?;
    names.sort();
    let mut hasher = blake3::Hasher::new();
    for name in names {
        let hash = hash_file(&folder.join(&name))?;
        hasher.update(format!("{name}\0{hash}\n").as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn list(folder: &Path, prefix: &str, names: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            list(&entry.path(), &format!("{name}/"), names)?;
        } else {
            names.push(name);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_hash_sees_names_and_contents() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("a")).unwrap();
        write_text(&folder.path().join("a/x"), "1").unwrap();
        write_text(&folder.path().join("y"), "2").unwrap();
        let before = hash_folder(folder.path()).unwrap();
        assert_eq!(before, hash_folder(folder.path()).unwrap());
        fs::rename(folder.path().join("y"), folder.path().join("z")).unwrap();
        assert_ne!(before, hash_folder(folder.path()).unwrap());
    }
}
