//! Tar shards: neighbouring files of one name up to the first dot are a sample, as in WebDataset: `000.jpg` with
//! `000.json` (a caption at a key) or `000.txt`.
//!
//! Plain shards are read in place: an index of offsets takes the place of unpacking. Shards packed by gzip or zstd are
//! read as a stream, and their samples carry their bytes. Nothing is ever extracted: names in a shard are labels and no
//! paths, and those that would climb out of a folder are refused all the same.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::expand::{Expanding, Packing};
use crate::json_list::caption_in;
use crate::sample::SetKind;
use crate::shard_files::ShardFiles;
use crate::source::{Cause, Fault, Location, Record, RecordSource, ScanError, Span, Visit};

/// Largest caption, in bytes.
const MAX_CAPTION: u64 = 16 << 20;
/// Largest file that a sample of a compressed shard carries, in bytes.
const MAX_HELD: u64 = 128 << 20;
/// Longest name in a header of its own, in bytes.
const MAX_NAME: u64 = 64 << 10;
/// Largest set of pax attributes, in bytes.
const MAX_ATTRIBUTES: u64 = 1 << 20;
/// Most files of one sample.
const MAX_FILES: usize = 64;
/// Size of a tar block; an archive ends with two blocks of zeros.
const BLOCK: u64 = 512;
/// Endings of image files that are read.
const IMAGES: [&str; 4] = ["png", "jpg", "jpeg", "webp"];
/// Endings of image files that are not.
const OTHER_IMAGES: [&str; 6] = ["gif", "bmp", "tif", "tiff", "avif", "heic"];

/// Endings of tar shards.
pub const TAR_ENDINGS: [&str; 5] = [".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst"];

/// Tar shards.
#[derive(Debug)]
pub struct TarShards {
    roots: [PathBuf; 1],
    names: Vec<String>,
    caption_key: String,
}

impl TarShards {
    /// Finds the shards of `path`: a shard, a folder of them, or a folder and a name with `*`.
    ///
    /// # Errors
    /// When there are none.
    pub fn find(path: &Path, caption_key: &str) -> Result<Self, ScanError> {
        let ShardFiles { folder, names } = ShardFiles::find(path, &TAR_ENDINGS, "tar shard")?;
        Ok(Self { roots: [folder], names, caption_key: caption_key.to_owned() })
    }
}

impl RecordSource for TarShards {
    fn kind(&self) -> SetKind {
        SetKind::Generation
    }

    fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    fn has_size_limits(&self) -> bool {
        true
    }

    /// A damaged shard is told to `visit`, which gets the samples before the damage.
    fn scan(&self, visit: &mut Visit<'_>) -> Result<(), ScanError> {
        for name in &self.names {
            let path = self.roots[0].join(name);
            let io = |source| ScanError::Io { path: path.clone(), source };
            let file = File::open(&path).map_err(io)?;
            let size = file.metadata().map_err(io)?.len();
            let packing = Packing::of(name);
            let is_in_place = packing == Packing::None;
            let caption_key = &self.caption_key;
            let mut shard = Shard { name, file: &file, is_in_place, caption_key, group: None, go_on: true, visit };
            let outcome = match packing {
                Packing::None => shard.walk_in_place(size),
                packing => shard.walk_stream(packing, size),
            };
            shard.flush();
            if let Err(reason) = outcome
                && shard.go_on
            {
                shard.go_on = (shard.visit)(Err(Fault::new(Cause::Damaged, reason).of(name.clone())));
            }
            if !shard.go_on {
                break;
            }
        }
        Ok(())
    }
}

/// Where a file of a sample is.
enum Part {
    Span(Span),
    Held(Vec<u8>),
}

/// Files of one sample, in the order of the shard.
struct Group {
    stem: String,
    files: Vec<(String, Part)>,
    /// First thing that is wrong with it.
    fault: Option<Fault>,
}

/// One shard on its way through the reader.
struct Shard<'a, 'v> {
    name: &'a str,
    file: &'a File,
    is_in_place: bool,
    caption_key: &'a str,
    group: Option<Group>,
    go_on: bool,
    visit: &'a mut Visit<'v>,
}

impl Shard<'_, '_> {
    fn walk_in_place(&mut self, size: u64) -> Result<(), String> {
        let mut reader = self.file;
        reader.rewind().map_err(|error| error.to_string())?;
        let mut archive = tar::Archive::new(reader);
        let entries = archive.entries_with_seek().map_err(|error| error.to_string())?;
        let end = self.walk(entries, size)?;
        let mut last = [1; BLOCK as usize];
        let has_end = size >= BLOCK && self.file.read_exact_at(&mut last, size - BLOCK).is_ok() && last == [0; 512];
        if self.go_on && !has_end {
            return Err(format!("the shard has no end mark after byte {end}; samples may be missing"));
        }
        Ok(())
    }

    fn walk_stream(&mut self, packing: Packing, size: u64) -> Result<(), String> {
        let expanding = Expanding::new(packing, BufReader::new(self.file), size).map_err(|error| error.to_string())?;
        let mut archive = tar::Archive::new(expanding);
        let entries = archive.entries().map_err(|error| error.to_string())?;
        let end = self.walk(entries, u64::MAX)?;
        if !self.go_on {
            return Ok(());
        }
        let mut rest = archive.into_inner();
        std::io::copy(&mut rest, &mut std::io::sink()).map_err(|error| error.to_string())?;
        match rest.trailing_zeros() >= BLOCK {
            true => Ok(()),
            false => Err(format!("the shard has no end mark after byte {end}; samples may be missing")),
        }
    }

    /// Collects the entries into groups and returns where the last one ends; the error says where the shard is damaged.
    fn walk<R: Read>(&mut self, entries: tar::Entries<'_, R>, size: u64) -> Result<u64, String> {
        let mut end = 0;
        let mut long_name: Option<Vec<u8>> = None;
        let mut is_sparse = false;
        // Raw: the crate would read names of any claimed length into memory.
        for entry in entries.raw(true) {
            let mut entry = entry.map_err(|error| format!("the shard is damaged after byte {end}: {error}"))?;
            let kind = entry.header().entry_type();
            let span = Span { offset: entry.raw_file_position(), length: entry.size() };
            end = span.offset.saturating_add(span.length);
            if kind.is_gnu_longname() {
                let mut name = read_at_most(&mut entry, MAX_NAME, "a name")?;
                name.truncate(name.iter().position(|&byte| byte == 0).unwrap_or(name.len()));
                long_name = Some(name);
                continue;
            }
            if kind.is_pax_local_extensions() {
                let attributes = read_at_most(&mut entry, MAX_ATTRIBUTES, "pax attributes")?;
                for attribute in tar::PaxExtensions::new(&attributes) {
                    let attribute = attribute.map_err(|error| format!("damaged pax attributes: {error}"))?;
                    match attribute.key_bytes() {
                        b"path" => long_name = Some(attribute.value_bytes().to_vec()),
                        // Only files beyond 8 GiB need it, and readers that disagree on it see other files.
                        b"size" => return Err("an entry has its size in a pax attribute; it is not read".into()),
                        key => is_sparse |= key.starts_with(b"GNU.sparse"),
                    }
                }
                continue;
            }
            if kind.is_dir() || kind.is_pax_global_extensions() || kind.is_gnu_longlink() {
                continue;
            }
            let name = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
            let name = String::from_utf8_lossy(&name).into_owned();
            let is_special = !(kind.is_file() || kind.is_contiguous()) || std::mem::take(&mut is_sparse);
            let fault = if end > size {
                Some(Fault::new(Cause::Damaged, format!("`{name}` is cut short by the end of the shard")))
            } else if is_special {
                Some(Fault::from(format!("`{name}` is a link or a special file")))
            } else if name.starts_with('/') || name.split('/').any(|part| part == "..") {
                Some(Fault::new(Cause::Path, format!("`{name}` climbs out of its folder")))
            } else {
                None
            };
            self.add(&name, span, &mut entry, fault)?;
            if !self.go_on {
                break;
            }
            if end > size {
                return Err(format!("the shard is cut short at byte {size}: `{name}` needs {end}"));
            }
        }
        Ok(end)
    }

    fn add(&mut self, name: &str, span: Span, bytes: &mut dyn Read, fault: Option<Fault>) -> Result<(), String> {
        let (folder, base) = name.rsplit_once('/').map_or(("", name), |(folder, base)| (folder, base));
        let (stem, extension) = base.split_once('.').unwrap_or((base, ""));
        let stem = if folder.is_empty() { stem.to_owned() } else { format!("{folder}/{stem}") };
        if self.group.as_ref().is_some_and(|group| group.stem != stem) {
            self.flush();
        }
        let group = self.group.get_or_insert_with(|| Group { stem, files: Vec::new(), fault: None });
        let extension = extension.to_ascii_lowercase();
        let is_repeated = group.files.iter().any(|(other, _)| *other == extension);
        let is_wanted = IMAGES.contains(&&*extension) || extension == "json" || extension == "txt";
        let holds = !self.is_in_place && is_wanted && group.fault.is_none();
        let fault = fault.or_else(|| {
            if is_repeated {
                Some(format!("`.{extension}` occurs twice in one sample").into())
            } else if holds && span.length > MAX_HELD {
                let reason = format!("`{name}` has {} bytes, more than {MAX_HELD}", span.length);
                Some(Fault::new(Cause::TooLarge, reason))
            } else if group.files.len() >= MAX_FILES {
                Some(format!("more than {MAX_FILES} files make one sample").into())
            } else {
                None
            }
        });
        if fault.is_some() {
            group.fault = group.fault.take().or(fault);
            return Ok(());
        }
        let part = match holds {
            false => Part::Span(span),
            true => {
                let mut held = Vec::new();
                bytes.take(span.length).read_to_end(&mut held).map_err(|error| format!("in `{name}`: {error}"))?;
                if (held.len() as u64) < span.length {
                    let reason = format!("`{name}` is cut short by the end of the shard");
                    group.fault = Some(Fault::new(Cause::Damaged, reason.clone()));
                    return Err(reason);
                }
                Part::Held(held)
            }
        };
        group.files.push((extension, part));
        Ok(())
    }

    fn flush(&mut self) {
        if let Some(group) = self.group.take()
            && self.go_on
        {
            let key = format!("{}/{}", self.name, group.stem);
            let found = self.sample(group, &key).map_err(|fault| fault.of(key));
            self.go_on = (self.visit)(found);
        }
    }

    fn sample(&self, group: Group, key: &str) -> Result<Record, Fault> {
        if let Some(fault) = group.fault {
            return Err(fault);
        }
        let (mut image, mut json, mut txt) = (None, None, None);
        let mut is_other = false;
        for (extension, part) in group.files {
            match &*extension {
                "json" => json = Some(part),
                "txt" => txt = Some(part),
                extension if IMAGES.contains(&extension) => image = image.or(Some(part)),
                extension => is_other |= OTHER_IMAGES.contains(&extension),
            }
        }
        let none = |reason: &str| Fault::new(Cause::NoImage, reason);
        let image = image.ok_or_else(|| match is_other {
            true => none("the image is neither PNG, JPEG nor WebP"),
            false => none("there is no image (.png, .jpg, .jpeg, .webp)"),
        })?;
        let wrong = |reason| Fault::new(Cause::Text, reason);
        let text = match (json, txt) {
            (Some(json), _) => {
                caption_in(&self.read(json)?, self.caption_key).map_err(|e| wrong(format!(".json: {e}")))?
            }
            (None, Some(txt)) => {
                let text = String::from_utf8(self.read(txt)?).map_err(|error| wrong(format!(".txt: {error}")))?;
                text.trim().to_owned()
            }
            (None, None) => return Err(wrong("there is no caption (.json, .txt)".into())),
        };
        let image = match image {
            Part::Span(span) => Location::part(0, self.name, span),
            Part::Held(bytes) => Location::held(0, self.name, bytes),
        };
        Ok(Record::new(key, text, image))
    }

    fn read(&self, part: Part) -> Result<Vec<u8>, Fault> {
        let length = match &part {
            Part::Span(span) => span.length,
            Part::Held(bytes) => bytes.len() as u64,
        };
        if length > MAX_CAPTION {
            return Err(Fault::new(Cause::TooLarge, format!("a caption of {length} bytes")));
        }
        match part {
            Part::Held(bytes) => Ok(bytes),
            Part::Span(span) => {
                let mut bytes = vec![0; span.length as usize];
                let read = self.file.read_exact_at(&mut bytes, span.offset);
                read.map_err(|error| Fault::new(Cause::Unreadable, error.to_string()))?;
                Ok(bytes)
            }
        }
    }
}

fn read_at_most(entry: &mut dyn Read, limit: u64, what: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    entry.take(limit + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    match bytes.len() as u64 > limit {
        true => Err(format!("{what} of more than {limit} bytes")),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Found;

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
        TarShards::find(path, "caption")
            .unwrap()
            .scan(&mut |found| {
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
    fn compressed_shards_give_the_same_samples_and_carry_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let image: Vec<u8> = (0..40_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let files: [(&str, &[u8]); 5] = [
            ("0.txt", b"zero"),
            ("0.png", &image),
            ("1.png", b"two"),
            ("1.json", br#"{"caption":"b"}"#),
            ("1.cls", b"7"),
        ];
        let path = dir.path().join("s.tar");
        write(&path, &files);
        let plain = std::fs::read(&path).unwrap();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, &plain).unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = zstd::encode_all(&plain[..], 1).unwrap();
        for (name, bytes) in [("s.tar.gz", &gzip), ("s.tar.zst", &zstd)] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let all = found(&path);
            let texts: Vec<_> = all.iter().map(|found| found.as_ref().unwrap().text.as_str()).collect();
            assert_eq!(texts, ["zero", "b"]);
            let held = all[0].as_ref().unwrap().image.as_ref().unwrap().held.clone().unwrap();
            assert_eq!(*held, *image);
            std::fs::write(&path, &bytes[..bytes.len() - 30]).unwrap();
            let cut = found(&path);
            let last = cut.last().unwrap().as_ref().unwrap_err();
            assert_eq!((last.key.as_str(), last.cause), (name, Cause::Damaged), "{cut:?}");
        }
    }

    #[test]
    fn a_shard_that_expands_without_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let zeros = vec![0u8; 90 << 20];
        let path = dir.path().join("s.tar");
        write(&path, &[("0.txt", b"zero"), ("0.png", b"x"), ("1.bin", &zeros), ("2.png", b"x"), ("2.txt", b"two")]);
        let bomb = zstd::encode_all(&std::fs::read(&path).unwrap()[..], 1).unwrap();
        std::fs::write(dir.path().join("s.tar.zst"), bomb).unwrap();
        let all = found(&dir.path().join("s.tar.zst"));
        assert_eq!(all[0].as_ref().unwrap().text, "zero");
        let last = all.last().unwrap().as_ref().unwrap_err();
        assert!(last.reason.contains("bomb"), "{all:?}");
    }

    #[test]
    fn names_that_climb_out_and_absurd_headers_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.tar");
        let mut builder = tar::Builder::new(File::create(&path).unwrap());
        for name in [b"../../x.png".as_slice(), b"/etc/y.png", b"z.png", b"z.txt"] {
            let mut header = tar::Header::new_gnu();
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name);
            header.set_size(1);
            header.set_cksum();
            builder.append(&header, &b"a"[..]).unwrap();
        }
        let long = format!("{}/w.png", "d".repeat(300));
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        builder.append_data(&mut header, &long, &b"a"[..]).unwrap();
        // A name that claims four gigabytes.
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(4 << 30);
        header.set_cksum();
        builder.append(&header, &vec![b'n'; 200_000][..]).unwrap();
        builder.finish().unwrap();
        let all = found(&path);
        for found in &all[..2] {
            assert_eq!(found.as_ref().unwrap_err().cause, Cause::Path);
        }
        assert_eq!(all[2].as_ref().unwrap().key, "s.tar/z");
        assert!(all[3].as_ref().unwrap_err().key.ends_with("dd/w"));
        assert!(all[4].as_ref().unwrap_err().reason.contains("a name of more than"), "{all:?}");
    }
}
