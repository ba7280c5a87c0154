//! Prompt files of reinforcement learning: a prompt a line, as text or as JSON (docs/spec/rl.md section 11).
//!
//! Lines are stripped, blank ones skipped. Departure from the release: Parquet is refused with what to do instead.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use crate::json_list::text;
use crate::source::{Broken, Found, Record, ScanError, Visit};

/// Longest line, in bytes.
const MAX_LINE: u64 = 1 << 20;

/// Reads every prompt of a `.txt` or `.jsonl` file.
///
/// # Errors
/// When the file is missing, fails while it is read, or has another format.
pub fn scan(path: &Path, visit: &mut Visit<'_>) -> Result<(), ScanError> {
    let io = |source| ScanError::Io { path: path.to_owned(), source };
    let is_json = match path.extension().and_then(|extension| extension.to_str()) {
        Some("txt") => false,
        Some("jsonl") => true,
        _ => {
            let reason = "prompts are read from .txt (a prompt a line) or .jsonl (`prompt` or `caption`); convert it";
            return Err(ScanError::Format { path: path.to_owned(), reason });
        }
    };
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
                Some(Err(Broken { key, reason: format!("the line is longer than {MAX_LINE} bytes") }))
            }
            false => prompt(&line, is_json, key),
        };
        if let Some(found) = found
            && !visit(found)
        {
            break;
        }
    }
    Ok(())
}

/// Returns what a line holds; nothing for a blank one.
fn prompt(line: &[u8], is_json: bool, key: String) -> Option<Found> {
    let broken = |reason: String| Some(Err(Broken { key: key.clone(), reason }));
    // Files edited elsewhere may begin with a byte order mark.
    let line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
    let stripped = match std::str::from_utf8(line) {
        Ok(line) => line.trim(),
        Err(error) => return broken(format!("not UTF-8: {error}")),
    };
    if stripped.is_empty() {
        return None;
    }
    let found = match is_json {
        false => Ok(stripped.to_owned()),
        true => match serde_json::from_str(stripped) {
            Ok(Value::Object(fields)) => {
                let field = if fields.contains_key("prompt") { "prompt" } else { "caption" };
                text(&fields, field).map(|text| text.trim().to_owned())
            }
            Ok(_) => Err("the line is no JSON object".into()),
            Err(error) => Err(error.to_string()),
        },
    };
    match found {
        Ok(text) => Some(Ok(Record { key, text, answer: None, image: None, references: Vec::new() })),
        Err(reason) => broken(reason),
    }
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
