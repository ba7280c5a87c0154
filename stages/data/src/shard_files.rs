//! Finds the files of a set that is split into several: one file, a folder of them, or a folder and a pattern.
//!
//! Knows names, not what is in the files.

use std::path::{Path, PathBuf};

use crate::source::ScanError;

/// Files of a set and the folder they lie in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardFiles {
    /// Folder, root 0 of the records.
    pub folder: PathBuf,
    /// Names of the files, sorted.
    pub names: Vec<String>,
}

impl ShardFiles {
    /// Finds the files of `path`: a file, a folder whose files have one of `endings`, or a folder and a name with `*`.
    ///
    /// # Errors
    /// When there are none.
    pub fn find(path: &Path, endings: &[&str], what: &'static str) -> Result<Self, ScanError> {
        let io = |source| ScanError::Io { path: path.to_owned(), source };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let (folder, pattern) = match name.contains('*') {
            true => (parent.to_owned(), Some(name)),
            false if std::fs::metadata(path).map_err(io)?.is_dir() => (path.to_owned(), None),
            false => return Ok(Self { folder: parent.to_owned(), names: vec![name] }),
        };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let fits = match &pattern {
                Some(pattern) => matches(pattern, &name),
                None => endings.iter().any(|ending| name.ends_with(ending)),
            };
            if fits && entry.path().is_file() {
                names.push(name);
            }
        }
        names.sort();
        match names.is_empty() {
            true => Err(ScanError::Nothing { path: path.to_owned(), what }),
            false => Ok(Self { folder, names }),
        }
    }
}

/// Returns true when `name` fits `pattern`, in which `*` stands for any characters.
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_found_by_folder_name_or_pattern() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a-2.tar", "a-1.tar", "b.tar", "notes.txt"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::fs::write(dir.path().join("z.tar.gz"), "x").unwrap();
        let find = |path: &str| ShardFiles::find(&dir.path().join(path), &[".tar", ".tar.gz"], "tar shard");
        let names = |path: &str| find(path).unwrap().names;
        assert_eq!(names(""), ["a-1.tar", "a-2.tar", "b.tar", "z.tar.gz"]);
        assert_eq!(names("a-*.tar"), ["a-1.tar", "a-2.tar"]);
        assert_eq!(names("b.tar"), ["b.tar"]);
        assert!(find("c*.tar").is_err());
        assert!(find("c.tar").is_err());
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        assert!(matches("a*b*c", "a-x-b-y-c") && matches("*", "") && matches("a*", "a"));
        assert!(!matches("a*b", "a-b-c") && !matches("ab", "abc") && !matches("a*a", "a"));
    }
}
