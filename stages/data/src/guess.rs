//! Tells a source's format from its name and its first record, for people who look at data before they wire it.
//!
//! Pipelines never guess: their settings name the format.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use deepgen_contract::data::{InspectRequest, SourceSettings};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::json_list::files_of;
use crate::parquet_rows::{PARQUET_ENDINGS, columns_of};
use crate::remote::is_address;
use crate::shard_files::ShardFiles;
use crate::source::ScanError;
use crate::tar_shards::TAR_ENDINGS;

/// Part of a JSON list that is looked at for its first record, in bytes.
const PEEKED_BYTES: u64 = 1 << 20;
/// Keys and columns of texts, likeliest first.
const TEXTS: [&str; 7] = ["caption", "text", "prompt", "txt", "instruction", "edit_instruction", "description"];
/// Keys and columns of the image to be made.
const IMAGES: [&str; 8] =
    ["image", "file_name", "image_path", "output_image", "edited_image", "target_image", "jpg", "png"];
/// Keys and columns of the images an instruction is about.
const REFERENCES: [&str; 4] = ["input_image", "source_image", "original_image", "reference"];

/// Why a format cannot be told.
#[derive(Debug, Error)]
pub enum GuessError {
    /// A file or folder cannot be read.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The name says nothing.
    #[error(
        "{source_name}: cannot tell what this is; sources are .json, .jsonl, .txt, .parquet, .tar (.gz, .zst) files, \
         folders of them, and prepared data sets"
    )]
    Unknown {
        /// As given.
        source_name: String,
    },
    /// Lists of records are read from this machine only.
    #[error("{source_name}: at an address only .tar, .parquet and prompts (.txt, .jsonl) are read; copy the list here")]
    Address {
        /// As given.
        source_name: String,
    },
    /// A folder holds several files of prompts.
    #[error("{source_name}: the folder holds prompts in {files}; name the file that is meant")]
    Several {
        /// As given.
        source_name: String,
        /// Names of the files.
        files: String,
    },
    /// The records have none of the usual keys.
    #[error("{source_name}: none of the keys {known} holds {what}; name it with --{option}")]
    Key {
        /// As given.
        source_name: String,
        /// Keys there are.
        known: String,
        /// What was looked for.
        what: &'static str,
        /// The option.
        option: &'static str,
    },
}

/// Returns the settings that read the source of a request.
///
/// # Errors
/// When neither name nor first record tell what it is.
pub fn guess(request: &InspectRequest) -> Result<SourceSettings, GuessError> {
    let name = &request.source;
    let path = Path::new(name);
    let ending_of = |name: &str| {
        let has = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
        match () {
            () if has(&TAR_ENDINGS) => Some("tar"),
            () if has(&PARQUET_ENDINGS) => Some("parquet"),
            () if has(&[".jsonl"]) => Some("jsonl"),
            () if has(&[".json"]) => Some("json"),
            () if has(&[".txt"]) => Some("txt"),
            () => None,
        }
    };
    let unknown = || GuessError::Unknown { source_name: name.clone() };
    let (format, first) = if !is_address(name) && path.is_dir() {
        let mut names: Vec<String> = std::fs::read_dir(path)
            .map_err(|source| ScanError::Io { path: path.to_owned(), source })?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        let of = |wanted| names.iter().find(|name| ending_of(name) == Some(wanted));
        // A folder of shards may hold a list of them, too.
        let found = ["tar", "parquet", "jsonl", "json"].into_iter().find_map(|format| Some((format, of(format)?)));
        let (format, file) = found.ok_or_else(unknown)?;
        (format, path.join(file))
    } else {
        (ending_of(name).ok_or_else(unknown)?, path.to_owned())
    };
    let beside = || match path.is_dir() {
        true => name.clone(),
        false => path.parent().map_or_else(String::new, |folder| folder.to_string_lossy().into_owned()),
    };
    let images = request.images.clone().unwrap_or_else(beside);
    match format {
        "tar" => {
            let caption_key = request.text_key.clone().unwrap_or_else(|| "caption".into());
            Ok(SourceSettings::Tar { shards: name.clone(), caption_key })
        }
        "txt" => Ok(SourceSettings::Prompts { path: name.clone() }),
        "parquet" => {
            let known = match is_address(name) {
                true => Vec::new(),
                false => {
                    let ShardFiles { folder, names } = ShardFiles::find(path, &PARQUET_ENDINGS, "*.parquet")?;
                    columns_of(&folder.join(&names[0]))?
                }
            };
            let keys = Keys { request, known };
            Ok(SourceSettings::Parquet {
                files: name.clone(),
                text_column: keys.text()?,
                image_column: keys.image()?,
                reference_column: keys.reference(),
                max_references: 0,
            })
        }
        "jsonl" if is_address(name) => Ok(SourceSettings::Prompts { path: name.clone() }),
        "json" if is_address(name) => Err(GuessError::Address { source_name: name.clone() }),
        "jsonl" => {
            let fields = first_line(&first)?;
            let keys = Keys { request, known: fields.keys().cloned().collect() };
            if keys.image().is_err() {
                return prompts(name, path, &first);
            }
            Ok(SourceSettings::JsonLines {
                index: name.clone(),
                images,
                text_key: keys.text()?,
                image_key: keys.image()?,
                reference_key: keys.reference(),
                max_references: 0,
            })
        }
        _ => list(request, &first, images),
    }
}

/// Returns the settings of prompts: a file, or a folder with one file of them.
fn prompts(name: &str, path: &Path, first: &Path) -> Result<SourceSettings, GuessError> {
    if !path.is_dir() {
        return Ok(SourceSettings::Prompts { path: name.to_owned() });
    }
    let files = files_of(path, "jsonl", "*.jsonl")?;
    if files.len() > 1 {
        let names = files.iter().filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned()));
        let files = names.collect::<Vec<_>>().join(", ");
        return Err(GuessError::Several { source_name: name.to_owned(), files });
    }
    Ok(SourceSettings::Prompts { path: first.to_string_lossy().into_owned() })
}

/// Returns the settings of a JSON list, whose form its first record tells.
fn list(request: &InspectRequest, file: &Path, images: String) -> Result<SourceSettings, GuessError> {
    let fields = first_element(file)?;
    let index = request.source.clone();
    let has = |key: &str| fields.contains_key(key);
    if has("input_image") && has("output_image") {
        return Ok(SourceSettings::EditList { index, images, max_references: 0 });
    }
    if has("question") && has("answer") {
        return Ok(SourceSettings::QaList { index, images });
    }
    if has("annotation") {
        let captions = request.captions.clone().unwrap_or_else(|| images.clone());
        let caption_key = request.text_key.clone().unwrap_or_else(|| "caption".into());
        return Ok(SourceSettings::CaptionList { index, images, captions, caption_key });
    }
    if has("txt") && has("image_path") {
        return Ok(SourceSettings::Blip3o { index, images });
    }
    let known = fields.keys().cloned().collect::<Vec<_>>().join(", ");
    let what = "records of a form that is read (docs/spec/data.md section 2)";
    Err(GuessError::Key { source_name: index, known, what, option: "text-key, or write JSON lines" })
}

/// Keys of a record, and what the request says of them.
struct Keys<'a> {
    request: &'a InspectRequest,
    known: Vec<String>,
}

impl Keys<'_> {
    fn text(&self) -> Result<String, GuessError> {
        self.find(&self.request.text_key, &TEXTS, "a text", "text-key")
    }

    fn image(&self) -> Result<String, GuessError> {
        self.find(&self.request.image_key, &IMAGES, "an image", "image-key")
    }

    fn reference(&self) -> String {
        self.find(&self.request.reference_key, &REFERENCES, "a reference", "reference-key").unwrap_or_default()
    }

    fn find(
        &self,
        given: &Option<String>,
        usual: &[&str],
        what: &'static str,
        option: &'static str,
    ) -> Result<String, GuessError> {
        let usual = || usual.iter().find(|key| self.known.iter().any(|known| known == *key)).map(|&key| key.to_owned());
        given.clone().or_else(usual).ok_or_else(|| GuessError::Key {
            source_name: self.request.source.clone(),
            known: self.known.join(", "),
            what,
            option,
        })
    }
}

fn first_line(path: &Path) -> Result<Map<String, Value>, ScanError> {
    let io = |source| ScanError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let line =
        BufReader::new(file.take(PEEKED_BYTES)).lines().map_while(Result::ok).find(|line| !line.trim().is_empty());
    let value = line.and_then(|line| serde_json::from_str(&line).ok());
    value.ok_or_else(|| ScanError::Format { path: path.to_owned(), reason: "its first line is no JSON object" })
}

fn first_element(path: &Path) -> Result<Map<String, Value>, ScanError> {
    let io = |source| ScanError::Io { path: path.to_owned(), source };
    let mut text = Vec::new();
    File::open(path).map_err(io)?.take(PEEKED_BYTES).read_to_end(&mut text).map_err(io)?;
    let start = text.iter().position(|&byte| byte == b'{').unwrap_or(text.len());
    // The rest of the list follows, perhaps cut off: only the first value counts.
    let first = serde_json::Deserializer::from_slice(&text[start..]).into_iter::<Map<String, Value>>().next();
    let format = || ScanError::Format { path: path.to_owned(), reason: "it holds no JSON array of objects" };
    first.and_then(Result::ok).ok_or_else(format)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guessed(dir: &Path, name: &str, content: &str) -> Result<SourceSettings, GuessError> {
        std::fs::write(dir.join(name), content).unwrap();
        let source = dir.join(name).to_string_lossy().into_owned();
        guess(&InspectRequest { source, ..InspectRequest::default() })
    }

    #[test]
    fn the_first_record_tells_the_form() {
        let dir = tempfile::tempdir().unwrap();
        let kind = |name: &str, content: &str| guessed(dir.path(), name, content).unwrap().name();
        assert_eq!(kind("a.json", r#"[{"txt":"a","image_path":"a.png"}, {"#), "blip3o");
        assert_eq!(kind("b.json", r#"[{"image":"a","annotation":"b"}]"#), "caption_list");
        assert_eq!(kind("c.json", r#"[{"input_image":["a"],"output_image":"b","instruction":"c"}]"#), "edit_list");
        assert_eq!(kind("d.jsonl", "\n{\"file_name\":\"a.png\",\"text\":\"b\"}\n"), "json_lines");
        assert_eq!(kind("e.jsonl", "{\"prompt\":\"b\"}\n"), "prompts");
        assert_eq!(kind("f.txt", "a\n"), "prompts");
        assert_eq!(kind("g.tar.zst", ""), "tar");
    }

    #[test]
    fn what_cannot_be_told_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let wrong = |name: &str, content: &str| guessed(dir.path(), name, content).unwrap_err().to_string();
        assert!(wrong("a.csv", "x").contains("cannot tell"));
        assert!(wrong("b.json", r#"[{"x":1}]"#).contains("none of the keys x"));
        assert!(wrong("c.jsonl", "{\"image\":\"a\",\"y\":1}").contains("--text-key"));
        assert!(wrong("d.jsonl", "no").contains("no JSON object"));
        let told = |source: &str| {
            let request = InspectRequest { source: source.into(), ..InspectRequest::default() };
            guess(&request).map_err(|error| error.to_string())
        };
        assert!(told("http://host/a.json").unwrap_err().contains("copy the list here"));
        assert_eq!(
            told("http://host/a.jsonl").unwrap(),
            SourceSettings::Prompts { path: "http://host/a.jsonl".into() }
        );
    }

    #[test]
    fn a_folder_of_prompts_is_its_one_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.jsonl"), r#"{"prompt":"b"}"#).unwrap();
        let request = InspectRequest { source: dir.path().to_string_lossy().into(), ..InspectRequest::default() };
        let path = dir.path().join("a.jsonl").to_string_lossy().into_owned();
        assert_eq!(guess(&request).unwrap(), SourceSettings::Prompts { path });
        std::fs::write(dir.path().join("b.jsonl"), r#"{"prompt":"b"}"#).unwrap();
        let error = guess(&request).unwrap_err().to_string();
        assert!(error.contains("a.jsonl, b.jsonl"), "{error}");
    }
}
