//! JSON arrays of records that name loose image files, in the three forms of the release (docs/spec/data.md section 2).
//!
//! The array is read as a stream, so its length costs no memory. A record of a wrong form is reported and passed over;
//! a file that stops being JSON gives the records before that point.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::field_names::kept;
use crate::sample::SetKind;
use crate::source::{Cause, Fault, Found, Location, Record, RecordSource, ScanError, Visit, below_root};

/// Largest caption file, in bytes.
const MAX_CAPTION_FILE: u64 = 16 << 20;

/// Form of the records.
#[derive(Debug, Clone)]
pub enum ListForm {
    /// `image` and `annotation`; the caption is in that file at `caption_key`.
    Caption {
        /// Folder of the caption files.
        captions: PathBuf,
        /// Key of the caption.
        caption_key: String,
    },
    /// `txt` and `image_path`.
    Blip3o,
    /// `image`, `question` and `answer`: not of the release, for the base of the shapes world.
    Qa,
    /// `input_image`, `output_image` and `instruction`.
    Edit {
        /// References kept; 0 keeps all.
        max_references: usize,
    },
}

/// A JSON list with its folder of images.
#[derive(Debug)]
pub struct JsonList {
    index: PathBuf,
    roots: [PathBuf; 1],
    form: ListForm,
}

impl JsonList {
    /// Returns the source; `index` is a JSON file or a folder of them, images lie below `images`.
    pub fn new(index: PathBuf, images: PathBuf, form: ListForm) -> Self {
        Self { index, roots: [images], form }
    }
}

impl RecordSource for JsonList {
    fn kind(&self) -> SetKind {
        match self.form {
            ListForm::Caption { .. } | ListForm::Blip3o => SetKind::Generation,
            ListForm::Qa => SetKind::Questions,
            ListForm::Edit { .. } => SetKind::Edit,
        }
    }

    fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    fn has_size_limits(&self) -> bool {
        matches!(self.form, ListForm::Caption { .. })
    }

    fn scan(&self, visit: &mut Visit<'_>) -> Result<(), ScanError> {
        scan(&self.index, &self.roots[0], &self.form, visit)
    }
}

/// Reads every record of `index`, a JSON file or a folder of them; images lie below `images`, root 0 of the records.
///
/// # Errors
/// When the index is missing or the folder holds no `*.json`.
pub fn scan(index: &Path, images: &Path, form: &ListForm, visit: &mut Visit<'_>) -> Result<(), ScanError> {
    for file in files_of(index, "json", "*.json")? {
        let reader = File::open(&file).map_err(|source| ScanError::Io { path: file.clone(), source })?;
        let name = file.file_name().map_or_else(|| file.display().to_string(), |name| name.to_string_lossy().into());
        let mut go_on = true;
        let mut num_seen = 0;
        let mut each = |value: Value| {
            let key = format!("{name}#{num_seen}");
            num_seen += 1;
            go_on = visit(parse(&value, images, form, &key));
            go_on
        };
        let mut json = serde_json::Deserializer::from_reader(BufReader::with_capacity(1 << 20, reader));
        let outcome = Elements(&mut each).deserialize(&mut json).and_then(|()| json.end());
        if !go_on {
            return Ok(());
        }
        if let Err(error) = outcome {
            let reason = format!("not a JSON array of records from here on: {error}");
            if !visit(Err(Fault::new(Cause::Damaged, reason).of(format!("{name}#{num_seen}")))) {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Returns the file itself, or the files with `extension` directly inside the folder, sorted by name.
pub(crate) fn files_of(index: &Path, extension: &str, what: &'static str) -> Result<Vec<PathBuf>, ScanError> {
    let io = |source| ScanError::Io { path: index.to_owned(), source };
    if std::fs::metadata(index).map_err(io)?.is_file() {
        return Ok(vec![index.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(index).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|found| found == extension) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    match files.is_empty() {
        true => Err(ScanError::Nothing { path: index.to_owned(), what }),
        false => Ok(files),
    }
}

fn parse(value: &Value, images: &Path, form: &ListForm, key: &str) -> Found {
    let record = || -> Result<Record, Fault> {
        let fields = value.as_object().ok_or_else(|| format!("a record is an object, not {}", kind_of(value)))?;
        let locate = |path: &str| below_root(images, path).map(|path| Location::file(0, path));
        match form {
            ListForm::Caption { captions, caption_key } => {
                let image = locate(text(fields, "image")?)?;
                let annotation = below_root(captions, text(fields, "annotation")?)?;
                let caption = caption_at(&captions.join(annotation), caption_key)?;
                Ok(Record::new(key, caption, image))
            }
            ListForm::Blip3o => {
                let image = locate(text(fields, "image_path")?)?;
                Ok(Record::new(key, text(fields, "txt")?.to_owned(), image))
            }
            ListForm::Qa => {
                let image = locate(text(fields, "image")?)?;
                let answer = Some(text(fields, "answer")?.to_owned());
                Ok(Record { answer, ..Record::new(key, text(fields, "question")?.to_owned(), image) })
            }
            ListForm::Edit { max_references } => {
                let image = locate(text(fields, "output_image")?)?;
                let inputs = match fields.get("input_image") {
                    Some(Value::Array(inputs)) if !inputs.is_empty() => inputs,
                    Some(other) => {
                        return Err(format!("`input_image` is {}, not a list of paths", kind_of(other)).into());
                    }
                    None => return Err("`input_image` is missing".to_owned().into()),
                };
                let references = located(inputs, *max_references, "input_image", locate)?;
                Ok(Record { references, ..Record::new(key, text(fields, "instruction")?.to_owned(), image) })
            }
        }
    };
    record().map_err(|fault| fault.of(key))
}

/// Returns where the paths of a list point; `max_references` 0 keeps all.
pub(crate) fn located(
    paths: &[Value],
    max_references: usize,
    key: &str,
    locate: impl Fn(&str) -> Result<Location, Fault>,
) -> Result<Vec<Location>, Fault> {
    let each = kept(paths, max_references)
        .iter()
        .map(|path| locate(path.as_str().ok_or_else(|| Fault::from(format!("`{key}` holds {}", kind_of(path))))?));
    each.collect()
}

/// Returns the string at `key`.
pub(crate) fn text<'a>(fields: &'a Map<String, Value>, key: &str) -> Result<&'a str, Fault> {
    match fields.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{key}` is {}, not text", kind_of(other)).into()),
        None => Err(format!("`{key}` is missing").into()),
    }
}

pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(list) if list.is_empty() => "an empty list",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn caption_at(path: &Path, caption_key: &str) -> Result<String, Fault> {
    let at = |reason: String| format!("caption file {}: {reason}", path.display());
    let io = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => Fault::new(Cause::Missing, at(error.to_string())),
        _ => Fault::new(Cause::Unreadable, at(error.to_string())),
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io)?;
    file.take(MAX_CAPTION_FILE).read_to_end(&mut bytes).map_err(io)?;
    caption_in(&bytes, caption_key).map_err(|reason| Fault::new(Cause::Text, at(reason)))
}

/// Returns the caption at `caption_key` of a JSON object.
pub(crate) fn caption_in(bytes: &[u8], caption_key: &str) -> Result<String, String> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let fields = value.as_object().ok_or_else(|| format!("it holds {}, not an object", kind_of(&value)))?;
    text(fields, caption_key).map(str::to_owned).map_err(|fault| fault.reason)
}

/// Hands each element of a JSON array to a function, until it returns false.
struct Elements<'a>(&'a mut dyn FnMut(Value) -> bool);

impl<'de> DeserializeSeed<'de> for Elements<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        while let Some(element) = elements.next_element()? {
            if !(self.0)(element) {
                // The rest may be gigabytes; whoever stopped the reader does not look at its error.
                return Err(A::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(index: &Path, form: &ListForm) -> Vec<Found> {
        let mut all = Vec::new();
        scan(index, Path::new("/images"), form, &mut |found| {
            all.push(found);
            true
        })
        .unwrap();
        all
    }

    #[test]
    fn files_of_a_folder_are_read_in_order_of_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b", "a", "c"] {
            let text = format!(r#"[{{"txt":"{name}","image_path":"{name}.png","type":"T2I_SFT","image":""}}]"#);
            std::fs::write(dir.path().join(format!("{name}.json")), text).unwrap();
        }
        std::fs::write(dir.path().join("readme.txt"), "no index").unwrap();
        let texts: Vec<_> = found(dir.path(), &ListForm::Blip3o).into_iter().map(|f| f.unwrap().text).collect();
        assert_eq!(texts, ["a", "b", "c"]);
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(
            scan(empty.path(), Path::new("/"), &ListForm::Blip3o, &mut |_| true),
            Err(ScanError::Nothing { .. })
        ));
    }

    #[test]
    fn the_caption_is_taken_from_its_own_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("1.json"), r#"{"caption":null,"short":"a dog"}"#).unwrap();
        std::fs::write(dir.path().join("index.json"), r#"[{"image":"1.jpg","annotation":"1.json"}]"#).unwrap();
        let form = |key: &str| ListForm::Caption { captions: dir.path().into(), caption_key: key.into() };
        let index = dir.path().join("index.json");
        assert_eq!(found(&index, &form("short"))[0].as_ref().unwrap().text, "a dog");
        let null = found(&index, &form("caption"));
        let reason = &null[0].as_ref().unwrap_err().reason;
        assert!(reason.contains("`caption` is null"), "{reason}");
    }

    #[test]
    fn an_edit_keeps_as_many_references_as_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("index.json");
        let text = r#"[{"input_image":["a.png","b.png"],"output_image":"c.png","instruction":"mix"},
                       {"input_image":"a.png","output_image":"c.png","instruction":"mix"},
                       {"input_image":[],"output_image":"c.png","instruction":"mix"}]"#;
        std::fs::write(&index, text).unwrap();
        let one = found(&index, &ListForm::Edit { max_references: 1 });
        assert_eq!(one[0].as_ref().unwrap().references.len(), 1);
        assert!(one[1].is_err() && one[2].is_err());
        assert_eq!(found(&index, &ListForm::Edit { max_references: 0 })[0].as_ref().unwrap().references.len(), 2);
    }

    #[test]
    fn a_file_cut_short_gives_the_records_before_the_cut() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("index.json");
        std::fs::write(&index, r#"[{"txt":"a","image_path":"a.png"},{"txt":"b","image_p"#).unwrap();
        let all = found(&index, &ListForm::Blip3o);
        assert_eq!(all.len(), 2);
        assert!(all[0].is_ok());
        assert_eq!(all[1].as_ref().unwrap_err().key, "index.json#1");
    }
}
