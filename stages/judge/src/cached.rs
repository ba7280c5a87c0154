//! A judge that remembers: answers are kept on disk, one file each.
//!
//! Knows nothing about how the inner judge decides. The key is a hash of the question, the pixels and the judge's
//! identity, so a changed prompt, image or model asks again; failures are not kept.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::judge::{Answer, Judge, JudgeError, Question};

const VERSION: u32 = 1;

/// A judge behind a cache.
#[derive(Debug)]
pub struct CachedJudge<J> {
    inner: J,
    folder: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    version: u32,
    judge: String,
    question: String,
    answer: Answer,
}

impl<J: Judge> CachedJudge<J> {
    /// Returns `inner` behind a cache in `folder`, which is made when the first answer is stored.
    pub fn new(inner: J, folder: impl Into<PathBuf>) -> Self {
        Self { inner, folder: folder.into() }
    }

    fn path(&self, question: &Question) -> PathBuf {
        let key = key(&self.inner.identity(), question).to_hex();
        self.folder.join(&key[..2]).join(format!("{key}.json"))
    }
}

/// Returns the hash that an answer is filed under. Each field is preceded by its length, so no two questions can be
/// spelled alike.
pub fn key(identity: &str, question: &Question) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(&VERSION.to_le_bytes());
    field(identity.as_bytes());
    field(question.system.as_bytes());
    field(question.text.as_bytes());
    // The expectation has no byte form of its own; its JSON is deterministic, because its types hold no map.
    field(serde_json::to_string(&question.expectation).unwrap_or_default().as_bytes());
    for image in &question.images {
        field(&image.width().to_le_bytes());
        field(&image.height().to_le_bytes());
        field(image.as_raw());
    }
    hasher.finalize()
}

impl<J: Judge> Judge for CachedJudge<J> {
    fn identity(&self) -> String {
        self.inner.identity()
    }

    fn ask(&self, question: &Question) -> Result<Answer, JudgeError> {
        let path = self.path(question);
        if let Some(answer) = read(&path)? {
            return Ok(answer);
        }
        let answer = self.inner.ask(question)?;
        let entry = Entry {
            version: VERSION,
            judge: self.inner.identity(),
            question: question.text.clone(),
            answer: answer.clone(),
        };
        write(&path, &entry).map_err(|source| JudgeError::Cache { path: path.display().to_string(), source })?;
        Ok(answer)
    }

    fn is_rule(&self) -> bool {
        self.inner.is_rule()
    }
}

/// Reads an entry; one that does not parse counts as absent, and is written anew.
fn read(path: &Path) -> Result<Option<Answer>, JudgeError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice::<Entry>(&bytes).ok().map(|entry| entry.answer)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(JudgeError::Cache { path: path.display().to_string(), source }),
    }
}

fn write(path: &Path, entry: &Entry) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut file, entry)?;
    file.flush()?;
    file.as_file().sync_data()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use image::{Rgb, RgbImage};

    use super::*;

    struct Counting {
        name: &'static str,
        calls: Arc<AtomicUsize>,
        fails: bool,
    }

    impl Judge for Counting {
        fn identity(&self) -> String {
            self.name.to_owned()
        }

        fn ask(&self, question: &Question) -> Result<Answer, JudgeError> {
            self.calls.fetch_add(1, Ordering::Relaxed);
            if self.fails {
                return Err(JudgeError::NoExpectation);
            }
            Ok(Answer::Text(format!("{} about {}", self.name, question.text)))
        }
    }

    fn question(text: &str, level: u8) -> Question {
        let image = Arc::new(RgbImage::from_pixel(2, 2, Rgb([level; 3])));
        Question { system: String::new(), text: text.to_owned(), images: vec![image], expectation: None }
    }

    #[test]
    fn the_same_question_is_asked_once_and_another_one_again() {
        let folder = tempfile::tempdir().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let judge = |name| CachedJudge::new(Counting { name, calls: calls.clone(), fails: false }, folder.path());
        let first = judge("a").ask(&question("q", 1)).unwrap();
        // A new judge over the same folder: the answer comes from disk.
        assert_eq!(judge("a").ask(&question("q", 1)).unwrap(), first);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        judge("a").ask(&question("r", 1)).unwrap();
        judge("a").ask(&question("q", 2)).unwrap();
        assert_eq!(judge("b").ask(&question("q", 1)).unwrap(), Answer::Text("b about q".into()));
        assert_eq!(calls.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn a_damaged_entry_is_asked_again_and_a_failure_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let failing = CachedJudge::new(Counting { name: "a", calls: calls.clone(), fails: true }, folder.path());
        assert!(failing.ask(&question("q", 1)).is_err());
        let judge = CachedJudge::new(Counting { name: "a", calls: calls.clone(), fails: false }, folder.path());
        let answer = judge.ask(&question("q", 1)).unwrap();
        std::fs::write(judge.path(&question("q", 1)), b"{\"version\":").unwrap();
        assert_eq!(judge.ask(&question("q", 1)).unwrap(), answer);
        assert_eq!(judge.ask(&question("q", 1)).unwrap(), answer);
        assert_eq!(calls.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn the_key_separates_what_the_spelling_joins() {
        let mut a = question("ab", 1);
        let mut b = question("b", 1);
        a.system = String::new();
        b.system = "a".into();
        assert_ne!(key("j", &a), key("j", &b));
    }
}
