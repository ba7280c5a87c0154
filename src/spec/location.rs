//! Paths in settings: written relative to the file that holds them, kept relative to the project's root.
//!
//! The kept form is the same wherever the project lies and whichever file wrote the path, so that fingerprints are too.
//! Pure: it looks at names, not at the disk.

use std::path::{Component, Path, PathBuf};

/// Returns `path`, written in a file of the folder `from`, as it reads from `root`; both folders are absolute.
///
/// An absolute path stays as it is unless it leads into the root; one that leads out of it begins with `..`.
pub fn from_root(root: &Path, from: &Path, path: &str) -> String {
    if path.is_empty() {
        return String::new();
    }
    let normal = normal(&from.join(path));
    let below = normal.strip_prefix(root).ok().filter(|below| !below.as_os_str().is_empty());
    match below {
        Some(below) => below.to_string_lossy().into_owned(),
        None if Path::new(path).is_absolute() => path.to_owned(),
        None => upwards(root, &normal).to_string_lossy().into_owned(),
    }
}

/// Takes `.` and `..` out of an absolute path by its names alone.
pub fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            // Above the root folder there is nothing: `pop` leaves it.
            Component::ParentDir => drop(normal.pop()),
            other => normal.push(other),
        }
    }
    normal
}

/// Returns the way from `root` to `target`, which does not lie below it.
fn upwards(root: &Path, target: &Path) -> PathBuf {
    let shared = root.components().zip(target.components()).take_while(|(ours, theirs)| ours == theirs).count();
    let up = root.components().skip(shared).map(|_| Component::ParentDir);
    let way: PathBuf = up.chain(target.components().skip(shared)).collect();
    if way.as_os_str().is_empty() { PathBuf::from(".") } else { way }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_reads_the_same_from_the_root_whichever_file_holds_it() {
        let see = |from: &str, path: &str| from_root(Path::new("/project"), Path::new(from), path);
        assert_eq!(see("/project/pipelines", "../data/a.txt"), "data/a.txt");
        assert_eq!(see("/project", "./data//a.txt"), "data/a.txt");
        assert_eq!(see("/project/stages", "base/shapes"), "stages/base/shapes");
        assert_eq!(see("/project/pipelines", "/project/data/../data/a"), "data/a");
        assert_eq!(see("/project/pipelines", "/data/a/../b"), "/data/a/../b");
        assert_eq!(see("/project/pipelines", "../../q/x"), "../q/x");
        assert_eq!(see("/project/pipelines", ".."), ".");
        assert_eq!(see("/project/pipelines", "/"), "/");
        assert_eq!(see("/project/pipelines", ""), "");
        assert_eq!(see("/project/pipelines", "../sets/shard-*.tar"), "sets/shard-*.tar");
    }
}
