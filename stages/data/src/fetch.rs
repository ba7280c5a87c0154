//! Fetches the files of an object store one after another, in parts, and reads each as a local file.
//!
//! Credentials and endpoints come from the environment, as the stores' own tools read them (`AWS_*`, `GOOGLE_*`). A part
//! that does not come whole is asked for again; what then is missing ends the source with the object's name, so that a
//! line that breaks never leaves records out. Knows no format.

use std::error::Error;
use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use futures_util::{StreamExt, stream};
use object_store::path::Path as StorePath;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, parse_url_opts};
use tokio::runtime::{Builder, Runtime};
use url::Url;

use crate::remote::OpenLocal;
use crate::sample::SetKind;
use crate::shard_files::matches;
use crate::source::{Cause, Fault, Found, Location, Record, RecordSource, ScanError, Visit, read_bytes};

/// Folder below the output folder that holds the file being read.
const FETCHED_DIR: &str = "fetched";
/// Bytes of one request: few enough to arrive within the client's time limit of 30 seconds on any usable line.
const PART_BYTES: u64 = 8 << 20;
/// Requests of a file that are under way at the same time; their parts are in memory.
const NUM_PARTS: usize = 4;
/// Times that a part is asked for, beside the client's own attempts at requests that fail.
const NUM_ATTEMPTS: usize = 3;
/// Most names that `{a..b}` stands for.
const MAX_NAMES: u64 = 1_000_000;

/// Opens the files below `address`, the last part of which may hold `*`, or `{000..127}` for all numbers of a range;
/// fetched files lie below `out_dir` while they are read.
///
/// # Errors
/// When the address makes no sense, the store cannot be listed, or there is nothing of that name.
pub fn open(address: &str, out_dir: &Path, local: OpenLocal) -> Result<Box<dyn RecordSource>, ScanError> {
    let failed = |reason: String| ScanError::Store { address: address.to_owned(), reason };
    // Patterns are no part of a path in a store and would come back percent-encoded.
    let last = address.rsplit('/').next().unwrap_or_default();
    let is_several = last.contains(['*', '{']);
    let folder = if is_several { address.strip_suffix(last).unwrap_or(address) } else { address };
    let url = Url::parse(folder).map_err(|error| failed(told(&error)))?;
    let (store, prefix) = parse_url_opts(&url, options(&url)).map_err(|error| failed(told(&error)))?;
    let runtime = Builder::new_current_thread().enable_all().build().map_err(|error| failed(told(&error)))?;
    let mut names = Vec::new();
    match is_several {
        false => names.push(prefix),
        true if last.contains('*') => {
            let listed = runtime.block_on(store.list_with_delimiter(Some(&prefix))).map_err(|error| {
                let hint = match url.scheme() {
                    "http" | "https" => "; web servers list files by WebDAV only: name them, as `{000..127}` does",
                    _ => "",
                };
                failed(format!("cannot list the folder: {}{hint}", told(&error)))
            })?;
            let paths = listed.objects.into_iter().map(|object| object.location);
            names.extend(paths.filter(|path| path.filename().is_some_and(|name| matches(last, name))));
            names.sort();
        }
        true => names.extend(expand(last).map_err(failed)?.into_iter().map(|name| prefix.clone().join(name))),
    }
    let first = names.first().ok_or_else(|| ScanError::Nothing { path: address.into(), what: "file" })?;
    let scratch = out_dir.join(FETCHED_DIR);
    // The kind of records is asked for before anything is fetched; a reader of one empty file knows it.
    let io = |source| ScanError::Io { path: scratch.clone(), source };
    fs::create_dir_all(&scratch).map_err(io)?;
    let probe = scratch.join(first.filename().unwrap_or("probe"));
    fs::write(&probe, []).map_err(io)?;
    let opened = local(&probe)?;
    let (kind, has_size_limits) = (opened.kind(), opened.has_size_limits());
    fs::remove_file(&probe).map_err(io)?;
    let address = address.to_owned();
    Ok(Box::new(Remote { address, store, names, scratch, runtime, local, kind, has_size_limits }))
}

/// Returns the options of a store: those variables of the environment that are meant for it.
fn options(url: &Url) -> Vec<(String, String)> {
    if matches!(url.scheme(), "http" | "https") {
        // Whoever writes `http://` wants it; a server without ranges sends a file at once, however long that takes.
        return vec![("allow_http".into(), "true".into()), ("timeout".into(), "1 day".into())];
    }
    let meant = ["aws_", "google_"];
    let all = std::env::vars_os().filter_map(|(key, value)| {
        let key = key.into_string().ok()?.to_ascii_lowercase();
        meant.iter().any(|prefix| key.starts_with(prefix)).then_some((key, value.into_string().ok()?))
    });
    all.collect()
}

/// Returns the names that `{000..127}` in a name stands for.
fn expand(name: &str) -> Result<Vec<String>, String> {
    let wrong = || format!("`{name}`: braces hold a range of numbers, such as {{000..127}}");
    let (before, rest) = name.split_once('{').ok_or_else(wrong)?;
    let (range, after) = rest.split_once('}').ok_or_else(wrong)?;
    let (first, last) = range.split_once("..").ok_or_else(wrong)?;
    let number = |text: &str| -> Result<u64, String> { text.parse().map_err(|_| wrong()) };
    let (from, to) = (number(first)?, number(last)?);
    if after.contains('{') || to < from || to - from >= MAX_NAMES {
        return Err(wrong());
    }
    let width = if first.starts_with('0') { first.len() } else { 0 };
    Ok((from..=to).map(|number| format!("{before}{number:0width$}{after}")).collect())
}

/// Returns an error with its causes: the stores' own messages leave them out.
fn told(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// Files of a store.
struct Remote {
    address: String,
    store: Box<dyn ObjectStore>,
    names: Vec<StorePath>,
    scratch: PathBuf,
    runtime: Runtime,
    local: OpenLocal,
    kind: SetKind,
    has_size_limits: bool,
}

impl Remote {
    fn fetch(&self, name: &StorePath, path: &Path) -> Result<(), String> {
        let mut file = fs::File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(|error| format!("{}: {error}", path.display()));
        self.runtime.block_on(async {
            let first = match self.part(name, 0..PART_BYTES, None).await {
                Ok(first) => first,
                Err(Missing::Object) => return Err("there is no such object".into()),
                Err(Missing::Bytes(reason)) => return Err(reason),
                Err(Missing::Ranges) => return self.whole(name, &mut write).await,
            };
            write(&first.bytes)?;
            // A weak tag never matches (RFC 9110, section 13.1.1); without one nobody tells when the object changes.
            let tag = first.tag.filter(|tag| !tag.starts_with("W/"));
            let starts = (first.bytes.len() as u64..first.size).step_by(PART_BYTES as usize);
            let part = |start: u64| self.part(name, start..(start + PART_BYTES).min(first.size), tag.clone());
            let mut parts = stream::iter(starts.map(part)).buffered(NUM_PARTS);
            while let Some(part) = parts.next().await {
                match part {
                    Ok(part) => write(&part.bytes)?,
                    Err(Missing::Bytes(reason)) => return Err(reason),
                    Err(_) => return Err("the object was removed while it was fetched".into()),
                }
            }
            Ok(())
        })
    }

    /// Asks for bytes of an object until they come whole; `tag` is the version that they must be of.
    async fn part(&self, name: &StorePath, range: Range<u64>, tag: Option<String>) -> Result<Part, Missing> {
        let mut reason = String::new();
        for _ in 0..NUM_ATTEMPTS {
            let options =
                GetOptions { range: Some(range.clone().into()), if_match: tag.clone(), ..GetOptions::default() };
            let result = match self.store.get_opts(name, options).await {
                Ok(result) => result,
                Err(object_store::Error::NotFound { .. }) => return Err(Missing::Object),
                // Ranges are not known, or the object is empty and has none: the first request finds that out.
                Err(_) if range.start == 0 => return Err(Missing::Ranges),
                Err(error) => return Err(Missing::Bytes(told(&error))),
            };
            let promised = result.range.end - result.range.start;
            let (size, tag) = (result.meta.size, result.meta.e_tag.clone());
            match result.bytes().await {
                Ok(bytes) if bytes.len() as u64 == promised => {
                    return Ok(Part { bytes: bytes.into(), size, tag });
                }
                Ok(bytes) => reason = format!("{} bytes came", bytes.len()),
                Err(error) => reason = told(&error),
            }
        }
        Err(Missing::Bytes(format!("bytes {}..{} were cut off {NUM_ATTEMPTS} times: {reason}", range.start, range.end)))
    }

    /// Fetches an object in one answer, as it comes.
    async fn whole(&self, name: &StorePath, write: &mut dyn FnMut(&[u8]) -> Result<(), String>) -> Result<(), String> {
        let object = self.store.get(name).await.map_err(|error| told(&error))?;
        let size = object.meta.size;
        let mut num_bytes = 0;
        let mut chunks = object.into_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk =
                chunk.map_err(|error| format!("cut off after {num_bytes} of {size} bytes: {}", told(&error)))?;
            num_bytes += chunk.len() as u64;
            write(&chunk)?;
        }
        match num_bytes == size {
            true => Ok(()),
            false => Err(format!("cut off after {num_bytes} of {size} bytes")),
        }
    }
}

/// Bytes of an object.
struct Part {
    bytes: Vec<u8>,
    /// Size of the object.
    size: u64,
    /// Version of the object.
    tag: Option<String>,
}

/// Why there are no bytes.
enum Missing {
    /// There is no such object.
    Object,
    /// The store sends no ranges of it.
    Ranges,
    /// They were refused, or did not come whole.
    Bytes(String),
}

impl RecordSource for Remote {
    fn kind(&self) -> SetKind {
        self.kind
    }

    fn roots(&self) -> &[PathBuf] {
        &[]
    }

    fn has_size_limits(&self) -> bool {
        self.has_size_limits
    }

    fn scan(&self, visit: &mut Visit<'_>) -> Result<(), ScanError> {
        let outcome = self.scan_each(visit);
        // Not there any more, or not empty: then someone else's files stay.
        let _ = fs::remove_dir(&self.scratch);
        outcome
    }
}

impl Remote {
    fn scan_each(&self, visit: &mut Visit<'_>) -> Result<(), ScanError> {
        let mut go_on = true;
        for name in &self.names {
            let path = self.scratch.join(name.filename().unwrap_or("object"));
            if let Err(reason) = self.fetch(name, &path) {
                let _ = fs::remove_file(&path);
                return Err(ScanError::Store { address: format!("{} ({name})", self.address), reason });
            }
            let reader = (self.local)(&path)?;
            reader.scan(&mut |found| {
                go_on = visit(found.and_then(|record| carried(record, reader.roots())));
                go_on
            })?;
            fs::remove_file(&path).map_err(|source| ScanError::Io { path: path.clone(), source })?;
            if !go_on {
                break;
            }
        }
        Ok(())
    }
}

/// Gives a record the bytes that its fetched file holds.
fn carried(mut record: Record, roots: &[PathBuf]) -> Found {
    let key = record.key.clone();
    for location in record.image.iter_mut().chain(&mut record.references) {
        if location.held.is_none() {
            if location.span.is_none() {
                let reason = format!("`{}` is a file of its own, which is not fetched", location.path);
                return Err(Fault::new(Cause::Missing, reason).of(key));
            }
            let bytes = read_bytes(roots, location, &key).map_err(|error| Fault::from(&error).of(&*key))?;
            *location = Location::held(0, location.path.clone(), bytes.into_owned());
        }
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_stand_for_a_range_of_numbers() {
        assert_eq!(expand("a-{008..010}.tar").unwrap(), ["a-008.tar", "a-009.tar", "a-010.tar"]);
        assert_eq!(expand("{9..10}").unwrap(), ["9", "10"]);
        for wrong in ["a-{1}.tar", "{a..b}", "{2..1}", "{1..2", "{1..2}{1..2}", "{0..18446744073709551615}"] {
            assert!(expand(wrong).unwrap_err().contains("range of numbers"), "{wrong}");
        }
    }

    #[test]
    fn an_error_is_told_with_its_causes() {
        let inner = std::io::Error::other(std::io::Error::other("the line broke"));
        assert_eq!(told(&inner), "the line broke");
        let parsed = "x".parse::<u8>().unwrap_err();
        assert_eq!(told(&parsed), "invalid digit found in string");
    }
}
