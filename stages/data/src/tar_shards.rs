//! Uncompressed tar shards, read in place: an index of offsets takes the place of unpacking.
//!
//! Neighbouring files of one name up to the first dot are a sample, as in WebDataset: `000.jpg` with `000.json` (a
//! caption at a key) or `000.txt`. Nothing is ever extracted, so names in a shard are labels and no paths.

use std::fs::File;
use std::io::Seek;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::json_list::caption_in;
use crate::source::{Broken, Found, Location, Record, ScanError, Span, Visit};

/// Largest caption, in bytes.
const MAX_CAPTION: u64 = 16 << 20;
/// Size of a tar block; an archive ends with two blocks of zeros.
const BLOCK: u64 = 512;

/// Shards of a set and the folder they lie in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards {
    /// Folder, root 0 of the records.
    pub folder: PathBuf,
    /// Names of the shards, sorted.
    pub names: Vec<String>,
}

impl Shards {
    /// Finds the shards of `path`: a shard, a folder of `*.tar`, or a folder and a name with `*`.
    ///
    /// # Errors
    /// When there are none, or when they are compressed: reading in place needs plain tar files.
    pub fn find(path: &Path) -> Result<Self, ScanError> {
        let io = |source| ScanError::Io { path: path.to_owned(), source };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let (folder, pattern) = match name.contains('*') {
            true => (parent.to_owned(), name),
            false if std::fs::metadata(path).map_err(io)?.is_dir() => (path.to_owned(), "*.tar".to_owned()),
            false => (parent.to_owned(), name),
        };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if matches(&pattern, &name) && entry.path().is_file() {
                names.push(name);
            }
        }
        names.sort();
        if let Some(name) = names.iter().find(|name| name.ends_with("gz") || name.ends_with("zst")) {
            let reason = "compressed shards cannot be read in place; decompress them to .tar";
            return Err(ScanError::Format { path: folder.join(name), reason });
        }
        match names.is_empty() {
            true => Err(ScanError::Nothing { path: path.to_owned(), what: "tar shard" }),
            false => Ok(Self { folder, names }),
        }
    }

    /// Reads every sample of every shard.
    ///
    /// # Errors
    /// When a shard cannot be opened. A damaged shard is reported to `visit`, which gets the samples before the damage.
    pub fn scan(&self, caption_key: &str, visit: &mut Visit<'_>) -> Result<(), ScanError> {
        for name in &self.names {
            let path = self.folder.join(name);
            let io = |source| ScanError::Io { path: path.clone(), source };
            let file = File::open(&path).map_err(io)?;
            let size = file.metadata().map_err(io)?.len();
            let mut shard = Shard { name, file: &file, caption_key, group: None, go_on: true, visit };
            let damage = shard.walk(size).err();
            shard.flush();
            if let Some(reason) = damage
                && shard.go_on
            {
                shard.go_on = (shard.visit)(Err(Broken { key: name.clone(), reason }));
            }
            if !shard.go_on {
                break;
            }
        }
        Ok(())
    }
}

/// Files of one sample, in the order of the shard.
struct Group {
    stem: String,
    files: Vec<(String, Span)>,
    /// First thing that is wrong with it.
    broken: Option<String>,
}

/// One shard on its way through the reader.
struct Shard<'a, 'v> {
    name: &'a str,
    file: &'a File,
    caption_key: &'a str,
    group: Option<Group>,
    go_on: bool,
    visit: &'a mut Visit<'v>,
}

impl Shard<'_, '_> {
    /// Collects the entries into groups; the error says where the shard is damaged.
    fn walk(&mut self, size: u64) -> Result<(), String> {
        let mut reader = self.file;
        reader.rewind().map_err(|error| error.to_string())?;
        let mut archive = tar::Archive::new(reader);
        let mut end = 0;
        for entry in archive.entries_with_seek().map_err(|error| error.to_string())? {
            let entry = entry.map_err(|error| format!("the shard is damaged after byte {end}: {error}"))?;
            let kind = entry.header().entry_type();
            let span = Span { offset: entry.raw_file_position(), length: entry.size() };
            end = span.offset.saturating_add(span.length);
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            if kind.is_dir() || kind.is_pax_global_extensions() {
                continue;
            }
            let cut = end > size;
            let trouble = match (cut, kind.is_file() || kind.is_contiguous()) {
                (true, _) => Some(format!("`{name}` is cut short by the end of the shard")),
                (false, false) => Some(format!("`{name}` is a link or a special file")),
                (false, true) => None,
            };
            self.add(&name, span, trouble);
            if !self.go_on {
                return Ok(());
            }
            if cut {
                return Err(format!("the shard is cut short at byte {size}: `{name}` needs {end}"));
            }
        }
        let mut last = [1; BLOCK as usize];
        let has_end = size >= BLOCK && self.file.read_exact_at(&mut last, size - BLOCK).is_ok() && last == [0; 512];
        match has_end {
            true => Ok(()),
            false => Err(format!("the shard has no end mark after byte {end}; samples may be missing")),
        }
    }

    fn add(&mut self, name: &str, span: Span, trouble: Option<String>) {
        let (folder, base) = name.rsplit_once('/').map_or(("", name), |(folder, base)| (folder, base));
        let (stem, extension) = base.split_once('.').unwrap_or((base, ""));
        let stem = if folder.is_empty() { stem.to_owned() } else { format!("{folder}/{stem}") };
        if self.group.as_ref().is_some_and(|group| group.stem != stem) {
            self.flush();
        }
        let group = self.group.get_or_insert_with(|| Group { stem, files: Vec::new(), broken: None });
        let extension = extension.to_ascii_lowercase();
        let repeated = group.files.iter().any(|(other, _)| *other == extension);
        let trouble = trouble.or_else(|| repeated.then(|| format!("`.{extension}` occurs twice in one sample")));
        group.broken = group.broken.take().or(trouble);
        group.files.push((extension, span));
    }

    fn flush(&mut self) {
        if let Some(group) = self.group.take()
            && self.go_on
        {
            let found = self.sample(group);
            self.go_on = (self.visit)(found);
        }
    }

    fn sample(&self, group: Group) -> Found {
        let key = format!("{}/{}", self.name, group.stem);
        let parts = || -> Result<(String, Span), String> {
            if let Some(reason) = &group.broken {
                return Err(reason.clone());
            }
            let span = |wanted: &[&str]| {
                group.files.iter().find(|(extension, _)| wanted.contains(&extension.as_str())).map(|(_, span)| *span)
            };
            let image = match (span(&["png", "jpg", "jpeg"]), span(&["webp", "gif", "bmp", "tif", "tiff", "avif"])) {
                (Some(image), _) => image,
                (None, Some(_)) => return Err("the image is neither PNG nor JPEG".into()),
                (None, None) => return Err("there is no image (.png, .jpg, .jpeg)".into()),
            };
            let text = match (span(&["json"]), span(&["txt"])) {
                (Some(json), _) => {
                    caption_in(&self.read(json)?, self.caption_key).map_err(|e| format!(".json: {e}"))?
                }
                (None, Some(txt)) => {
                    let text = String::from_utf8(self.read(txt)?).map_err(|error| format!(".txt: {error}"))?;
                    text.trim().to_owned()
                }
                (None, None) => return Err("there is no caption (.json, .txt)".into()),
            };
            Ok((text, image))
        };
        match parts() {
            Err(reason) => Err(Broken { key, reason }),
            Ok((text, image)) => {
                let image = Some(Location { root: 0, path: self.name.to_owned(), span: Some(image) });
                Ok(Record { key, text, answer: None, image, references: Vec::new() })
            }
        }
    }

    fn read(&self, span: Span) -> Result<Vec<u8>, String> {
        if span.length > MAX_CAPTION {
            return Err(format!("a caption of {} bytes", span.length));
        }
        let mut bytes = vec![0; span.length as usize];
        self.file.read_exact_at(&mut bytes, span.offset).map_err(|error| error.to_string())?;
        Ok(bytes)
    }
}

/// Returns true when `name` fits `pattern`, in which `*` stands for any characters.
fn matches(pattern: &str, name: &str) -> bool {
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

    fn write(path: &Path, files: &[(&str, &[u8])]) {
        let mut builder = tar::Builder::new(File::create(path).unwrap());
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, *bytes).unwrap();
        }
        builder.finish().unwrap();
    }

    fn found(path: &Path) -> Vec<Found> {
        let mut all = Vec::new();
        Shards::find(path)
            .unwrap()
            .scan("caption", &mut |found| {
                all.push(found);
                true
            })
            .unwrap();
        all
    }

    #[test]
    fn neighbouring_files_of_one_name_are_a_sample() {
        let dir = tempfile::tempdir().unwrap();
        let caption = br#"{"caption":"a red circle"}"#;
        let files: [(&str, &[u8]); 6] = [
            ("a/000.JPG", b"one"),
            ("a/000.json", caption),
            ("a/001.png", b"two!"),
            ("a/001.txt", b" a dog\n"),
            ("a/002.txt", b"alone"),
            ("a/003.png", b"no text"),
        ];
        write(&dir.path().join("s-1.tar"), &files);
        let all = found(dir.path());
        let first = all[0].as_ref().unwrap();
        assert_eq!((first.key.as_str(), first.text.as_str()), ("s-1.tar/a/000", "a red circle"));
        assert_eq!(first.image.as_ref().unwrap().span.unwrap().length, 3);
        let second = all[1].as_ref().unwrap();
        assert_eq!(second.text, "a dog");
        let span = second.image.as_ref().unwrap().span.unwrap();
        let shard = std::fs::read(dir.path().join("s-1.tar")).unwrap();
        assert_eq!(&shard[span.offset as usize..][..span.length as usize], b"two!");
        assert!(all[2].as_ref().unwrap_err().reason.contains("no image"));
        assert!(all[3].as_ref().unwrap_err().reason.contains("no caption"));
        assert_eq!(all.len(), 4);
    }

    #[test]
    fn a_shard_cut_short_gives_the_samples_before_the_cut() {
        let dir = tempfile::tempdir().unwrap();
        let image = vec![7u8; 2000];
        let files: [(&str, &[u8]); 4] = [("0.txt", b"zero"), ("0.png", &image), ("1.txt", b"one"), ("1.png", &image)];
        let path = dir.path().join("s.tar");
        write(&path, &files);
        let whole = std::fs::read(&path).unwrap();
        // Blocks: four headers, two texts of one block, two images of four, and the end mark.
        for cut in [whole.len() - 1024 - 1000, 512 * 7 + 700, 512 * 9 + 100, 512 * 7] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let all = found(&path);
            assert_eq!(all[0].as_ref().unwrap().text, "zero", "cut at {cut}");
            assert!(all[1..].iter().all(Result::is_err), "cut at {cut}: {all:?}");
            assert!(all.last().unwrap().as_ref().unwrap_err().key == "s.tar", "cut at {cut}: {all:?}");
        }
    }

    #[test]
    fn shards_are_found_by_folder_name_or_pattern() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a-2.tar", "a-1.tar", "b.tar", "notes.txt"] {
            write(&dir.path().join(name), &[]);
        }
        let names = |path: &str| Shards::find(&dir.path().join(path)).unwrap().names;
        assert_eq!(names(""), ["a-1.tar", "a-2.tar", "b.tar"]);
        assert_eq!(names("a-*.tar"), ["a-1.tar", "a-2.tar"]);
        assert_eq!(names("b.tar"), ["b.tar"]);
        assert!(Shards::find(&dir.path().join("c*.tar")).is_err());
        std::fs::write(dir.path().join("z.tar.gz"), "x").unwrap();
        assert!(matches!(Shards::find(&dir.path().join("z*")), Err(ScanError::Format { .. })));
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        assert!(matches("a*b*c", "a-x-b-y-c") && matches("*", "") && matches("a*", "a"));
        assert!(!matches("a*b", "a-b-c") && !matches("ab", "abc") && !matches("a*a", "a"));
    }
}
