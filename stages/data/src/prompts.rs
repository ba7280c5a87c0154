//! Prompt files of reinforcement learning: a prompt a line, as text or as JSON (docs/spec/rl.md section 11).
//!
//! Lines are stripped, blank ones skipped. Departure from the release: Parquet is refused with what to do instead.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::json_list::text;
use crate::sample::SetKind;
use crate::source::{Cause, Fault, Found, Record, RecordSource, ScanError, Visit};

/// Longest line, in bytes.
pub(crate) const MAX_LINE: u64 = 1 << 20;

/// A prompt file.
#[derive(Debug)]
pub struct PromptFile(pub PathBuf);

impl RecordSource for PromptFile {
    fn kind(&self) -> SetKind {
        SetKind::Prompts
    }

    fn roots(&self) -> &[PathBuf] {
        &[]
    }

    fn scan(&self, visit: &mut Visit<'_>) -> Result<(), ScanError> {
        scan(&self.0, visit)
    }
}

/// Reads every prompt of a `.txt` or `.jsonl` file.
///
/// # Errors
/// When the file is missing, fails while it is read, or has another format.
pub fn scan(path: &Path, visit: &mut Visit<'_>) -> Result<(), ScanError> {
    let is_json = match path.extension().and_then(|extension| extension.to_str()) {
        Some("txt") => false,
        Some("jsonl") => true,
        _ => {
            let reason = "prompts are read from .txt (a prompt a line) or .jsonl (`prompt` or `caption`); convert it";
            return Err(ScanError::Format { path: path.to_owned(), reason });
        }
    };
    each_line(path, &mut |line, key| prompt(line, is_json, key), visit)
}

/// Hands what `parse` makes of each line of a file to `visit`; a line without end is told as such and passed over.
pub(crate) fn each_line(
    path: &Path,
    parse: &mut dyn FnMut(&str, String) -> Option<Found>,
    visit: &mut Visit<'_>,
) -> Result<(), ScanError> {
    let io = |source| ScanError::Io { path: path.to_owned(), source };
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut reader = BufReader::new(File::open(path).map_err(io)?);
    let mut line = Vec::new();
    for number in 1u64.. {
        line.clear();
        if (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).map_err(io)? == 0 {
            break;
        }
        let key = format!("{name}:{number}");
        let found = match line.len() as u64 == MAX_LINE && !line.ends_with(b"\n") {
            true => {
                reader.skip_until(b'\n').map_err(io)?;
                let reason = format!("the line is longer than {MAX_LINE} bytes");
                Some(Err(Fault::new(Cause::TooLarge, reason).of(key)))
            }
            false => match stripped(&line) {
                Ok("") => None,
                Ok(line) => parse(line, key),
                Err(fault) => Some(Err(fault.of(key))),
            },
        };
        if let Some(found) = found
            && !visit(found)
        {
            break;
        }
    }
    Ok(())
}

/// Returns a line without the white space around it. Files edited elsewhere may begin with a byte order mark.
fn stripped(line: &[u8]) -> Result<&str, Fault> {
    let line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
    let text = std::str::from_utf8(line).map_err(|error| Fault::new(Cause::Text, format!("not UTF-8: {error}")))?;
    Ok(text.trim())
}

/// Returns what a line holds.
fn prompt(line: &str, is_json: bool, key: String) -> Option<Found> {
    let found = match is_json {
        false => Ok(line.to_owned()),
        true => match serde_json::from_str(line) {
            Ok(Value::Object(fields)) => {
                let field = if fields.contains_key("prompt") { "prompt" } else { "caption" };
                text(&fields, field).map(|text| text.trim().to_owned())
            }
            Ok(_) => Err(Fault::from("the line is no JSON object".to_owned())),
            Err(error) => Err(Fault::from(error.to_string())),
        },
    };
    Some(match found {
        Ok(text) => Ok(Record { key, text, answer: None, image: None, references: Vec::new() }),
        Err(fault) => Err(fault.of(key)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, content: &[u8]) -> Vec<Result<String, String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let mut all = Vec::new();
        scan(&path, &mut |found| {
            all.push(found.map(|record| record.text).map_err(|broken| broken.key));
            true
        })
        .unwrap();
        all
    }

    #[test]
    fn blank_lines_are_skipped_and_others_stripped() {
        let all = read("a.txt", "\u{feff} a red circle \n\n\t\na sign that reads \"go\"\r\n".as_bytes());
        assert_eq!(all, [Ok("a red circle".into()), Ok("a sign that reads \"go\"".into())]);
    }

    #[test]
    fn json_lines_give_prompt_or_else_caption() {
        let all = read("a.jsonl", b"{\"prompt\":\"p\",\"caption\":\"c\"}\n{\"caption\":\"c\"}\n{\"x\":1}\nno\n\xff\n");
        assert_eq!(all[..2], [Ok("p".into()), Ok("c".into())]);
        assert_eq!(all[2..], [Err("a.jsonl:3".into()), Err("a.jsonl:4".into()), Err("a.jsonl:5".into())]);
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        assert!(matches!(scan(Path::new("a.parquet"), &mut |_| true), Err(ScanError::Format { .. })));
    }
}
