//! JSON lines, a record a line: a text and paths of images, at keys of one's choice. With `file_name` and `text` it is the
//! `metadata.jsonl` of a Hugging Face image folder; with source, target and instruction a set of edits such as NHR-Edit.

use std::path::PathBuf;

use serde_json::Value;

use crate::field_names::FieldNames;
use crate::json_list::{files_of, kind_of, located, text};
use crate::prompts::each_line;
use crate::sample::SetKind;
use crate::source::{Fault, Found, Location, Record, RecordSource, ScanError, Visit, below_root};

/// JSON lines with their folder of images.
#[derive(Debug)]
pub struct JsonLines {
    index: PathBuf,
    roots: [PathBuf; 1],
    names: FieldNames,
}

impl JsonLines {
    /// Returns the source; `index` is a file or a folder of `*.jsonl`, images lie below `images`.
    pub fn new(index: PathBuf, images: PathBuf, names: FieldNames) -> Self {
        Self { index, roots: [images], names }
    }

    fn record(&self, line: &str, key: &str) -> Result<Record, Fault> {
        let value: Value = serde_json::from_str(line).map_err(|error| Fault::from(error.to_string()))?;
        let Value::Object(fields) = &value else {
            return Err(format!("a record is an object, not {}", kind_of(&value)).into());
        };
        let locate = |path: &str| below_root(&self.roots[0], path).map(|path| Location::file(0, path));
        let names = &self.names;
        let references = match fields.get(&names.reference) {
            _ if names.reference.is_empty() => Vec::new(),
            Some(Value::String(path)) => vec![locate(path)?],
            Some(Value::Array(paths)) if !paths.is_empty() => {
                located(paths, names.max_references, &names.reference, locate)?
            }
            Some(other) => return Err(format!("`{}` is {}, not paths", names.reference, kind_of(other)).into()),
            None => return Err(format!("`{}` is missing", names.reference).into()),
        };
        let image = locate(text(fields, &names.image)?)?;
        let text = text(fields, &names.text)?.to_owned();
        Ok(Record { references, ..Record::new(key, text, image) })
    }
}

impl RecordSource for JsonLines {
    fn kind(&self) -> SetKind {
        self.names.kind()
    }

    fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    fn has_size_limits(&self) -> bool {
        self.kind() == SetKind::Generation
    }

    fn scan(&self, visit: &mut Visit<'_>) -> Result<(), ScanError> {
        for file in files_of(&self.index, "jsonl", "*.jsonl")? {
            let mut is_stopped = false;
            let mut parse = |line: &str, key: String| -> Option<Found> {
                Some(self.record(line, &key).map_err(|fault| fault.of(key)))
            };
            each_line(&file, &mut parse, &mut |found| {
                is_stopped = !visit(found);
                !is_stopped
            })?;
            if is_stopped {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str, reference: &str) -> Vec<Found> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("metadata.jsonl"), text).unwrap();
        let names = FieldNames { text: "t".into(), image: "i".into(), reference: reference.into(), max_references: 1 };
        let mut all = Vec::new();
        let source = JsonLines::new(dir.path().to_owned(), "/images".into(), names);
        source
            .scan(&mut |found| {
                all.push(found);
                true
            })
            .unwrap();
        all
    }

    #[test]
    fn lines_give_captions() {
        let all = found("{\"t\":\"a dog\",\"i\":\"a/1.jpg\"}\n\n{\"t\":\"x\",\"i\":\"../1.jpg\"}\n[1]\n{\"t\":", "");
        let first = all[0].as_ref().unwrap();
        assert_eq!((first.key.as_str(), first.text.as_str()), ("metadata.jsonl:1", "a dog"));
        assert_eq!(first.image, Some(Location::file(0, "a/1.jpg")));
        let keys: Vec<_> = all[1..].iter().map(|found| found.as_ref().unwrap_err().key.as_str()).collect();
        assert_eq!(keys, ["metadata.jsonl:3", "metadata.jsonl:4", "metadata.jsonl:5"]);
    }

    #[test]
    fn a_reference_is_a_path_or_a_list_of_them() {
        let text = "{\"t\":\"t\",\"i\":\"i\",\"r\":\"a\"}\n{\"t\":\"t\",\"i\":\"i\",\"r\":[\"a\",\"b\"]}\n{\"t\":\"t\",\"i\":\"i\"}\n";
        let all = found(text, "r");
        assert_eq!(all[0].as_ref().unwrap().references, [Location::file(0, "a")]);
        assert_eq!(all[1].as_ref().unwrap().references.len(), 1);
        assert!(all[2].as_ref().unwrap_err().reason.contains("`r` is missing"));
    }
}
