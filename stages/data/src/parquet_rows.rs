//! Parquet files in the layout of Hugging Face image sets: a column of images, `{bytes, path}` or bytes alone, and a
//! column of texts; for edits also a column of references, one image or a list of them.
//!
//! Rows are read once, in order, and carry their bytes: a row lies compressed among its neighbours, so reading one by
//! its place would mean reading them all.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::TreeBuilder;
use parquet::record::{Field, Row};
use parquet::schema::types::{SchemaDescriptor, Type};

use crate::field_names::{FieldNames, kept};
use crate::sample::SetKind;
use crate::shard_files::ShardFiles;
use crate::source::{Cause, Fault, Location, Record, RecordSource, ScanError, Visit, below_root};

/// Rows decoded together; their images are in memory at once.
const BATCH_ROWS: usize = 8;
/// Endings of Parquet files.
pub const PARQUET_ENDINGS: [&str; 1] = [".parquet"];

/// Returns the names of a file's columns.
///
/// # Errors
/// When it cannot be read.
pub fn columns_of(path: &Path) -> Result<Vec<String>, ScanError> {
    let file = File::open(path).map_err(|source| ScanError::Io { path: path.to_owned(), source })?;
    let reader = catch_unwind(AssertUnwindSafe(|| SerializedFileReader::new(file)));
    let Ok(Ok(reader)) = reader else {
        return Err(ScanError::Format { path: path.to_owned(), reason: "it is no Parquet file, or a damaged one" });
    };
    let schema = reader.metadata().file_metadata().schema();
    Ok(schema.get_fields().iter().map(|field| field.name().to_owned()).collect())
}

/// Parquet files.
#[derive(Debug)]
pub struct ParquetRows {
    roots: [PathBuf; 1],
    names: Vec<String>,
    columns: FieldNames,
}

impl ParquetRows {
    /// Finds the files of `path`: a file, a folder of `*.parquet`, or a folder and a name with `*`.
    ///
    /// # Errors
    /// When there are none.
    pub fn find(path: &Path, columns: FieldNames) -> Result<Self, ScanError> {
        let ShardFiles { folder, names } = ShardFiles::find(path, &PARQUET_ENDINGS, "*.parquet")?;
        Ok(Self { roots: [folder], names, columns })
    }

    /// Reads a file; the error says where it is damaged.
    fn walk(&self, name: &str, file: File, visit: &mut Visit<'_>) -> Result<bool, String> {
        let reader = SerializedFileReader::new(file).map_err(|error| error.to_string())?;
        let schema = self.projection(reader.metadata().file_metadata().schema())?;
        let mut row_number = 0u64;
        for group in 0..reader.num_row_groups() {
            let at = |error: parquet::errors::ParquetError| format!("row group {group}: {error}");
            let rows = reader.get_row_group(group).map_err(at)?;
            let claimed = rows.metadata().num_rows();
            let mut seen = 0;
            for row in
                TreeBuilder::new().with_batch_size(BATCH_ROWS).as_iter(Arc::clone(&schema), &*rows).map_err(at)?
            {
                let row = row.map_err(|error| format!("from row {row_number} on: {error}"))?;
                let key = format!("{name}#{row_number}");
                row_number += 1;
                seen += 1;
                if !visit(self.record(row, name, &key).map_err(|fault| fault.of(key))) {
                    return Ok(false);
                }
            }
            if seen != claimed {
                return Err(format!("row group {group} holds {seen} rows where {claimed} are claimed"));
            }
        }
        Ok(true)
    }

    /// Returns the schema of the columns that are read; the others stay on disk.
    fn projection(&self, schema: &Type) -> Result<Arc<SchemaDescriptor>, String> {
        let FieldNames { text, image, reference, .. } = &self.columns;
        let mut fields = Vec::new();
        for wanted in [text, image, reference].into_iter().filter(|name| !name.is_empty()) {
            let known = || schema.get_fields().iter().map(|field| field.name()).collect::<Vec<_>>().join(", ");
            let found = schema.get_fields().iter().find(|field| field.name() == wanted);
            fields.push(Arc::clone(found.ok_or_else(|| format!("there is no column `{wanted}` among {}", known()))?));
        }
        let root = Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(|e| e.to_string())?;
        Ok(Arc::new(SchemaDescriptor::new(Arc::new(root))))
    }

    fn record(&self, row: Row, name: &str, key: &str) -> Result<Record, Fault> {
        let (mut text, mut image, mut references) = (None, None, Vec::new());
        let columns = &self.columns;
        for (column, field) in row.into_columns() {
            if column == columns.text {
                text = match field {
                    Field::Str(text) => Some(text),
                    Field::Bytes(bytes) => {
                        let wrong = |_| Fault::new(Cause::Text, format!("`{column}` is not UTF-8"));
                        Some(String::from_utf8(bytes.data().to_vec()).map_err(wrong)?)
                    }
                    Field::Null => return Err(Fault::new(Cause::Text, format!("`{column}` is null"))),
                    other => return Err(format!("`{column}` is no text but {}", kind_of(&other)).into()),
                };
            } else if column == columns.image {
                image = self.image(&field, name, &column)?;
            } else if column == columns.reference {
                let all = match field {
                    Field::ListInternal(list) => list.elements().to_vec(),
                    field => vec![field],
                };
                for field in kept(&all, columns.max_references) {
                    references.extend(self.image(field, name, &column)?);
                }
                if references.is_empty() {
                    return Err(Fault::new(Cause::NoImage, format!("`{column}` holds no image")));
                }
            }
        }
        let image = image.ok_or_else(|| Fault::new(Cause::NoImage, format!("`{}` is null", columns.image)))?;
        Ok(Record { references, ..Record::new(key, text.unwrap_or_default(), image) })
    }

    /// Returns the image of a cell: its bytes, or else its path beside the file.
    fn image(&self, field: &Field, name: &str, column: &str) -> Result<Option<Location>, Fault> {
        let held = |bytes: &[u8]| Location::held(0, name, bytes);
        match field {
            Field::Null => Ok(None),
            Field::Bytes(bytes) => Ok(Some(held(bytes.data()))),
            Field::Group(row) => {
                let mut path = None;
                for (part, field) in row.get_column_iter() {
                    match (part.as_str(), field) {
                        ("bytes", Field::Bytes(bytes)) => return Ok(Some(held(bytes.data()))),
                        ("path", Field::Str(found)) => path = Some(found),
                        _ => {}
                    }
                }
                let Some(path) = path else { return Ok(None) };
                Ok(Some(Location::file(0, below_root(&self.roots[0], path)?)))
            }
            other => Err(format!("`{column}` is no image but {}", kind_of(other)).into()),
        }
    }
}

fn kind_of(field: &Field) -> &'static str {
    match field {
        Field::Null => "null",
        Field::Bool(_) => "a boolean",
        Field::Str(_) => "text",
        Field::Bytes(_) => "bytes",
        Field::Group(_) => "a group",
        Field::ListInternal(_) => "a list",
        Field::MapInternal(_) => "a map",
        _ => "a number",
    }
}

impl RecordSource for ParquetRows {
    fn kind(&self) -> SetKind {
        self.columns.kind()
    }

    fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    fn has_size_limits(&self) -> bool {
        self.kind() == SetKind::Generation
    }

    /// A damaged file is told to `visit`, which gets the rows before the damage.
    fn scan(&self, visit: &mut Visit<'_>) -> Result<(), ScanError> {
        for name in &self.names {
            let path = self.roots[0].join(name);
            let file = File::open(&path).map_err(|source| ScanError::Io { path: path.clone(), source })?;
            let mut stopped_by_visitor = None;
            let mut guarded = |found| {
                // A panic of the visitor is a bug here and passes through; one of the reader is damage to the file.
                match catch_unwind(AssertUnwindSafe(|| visit(found))) {
                    Ok(go_on) => go_on,
                    Err(panic) => {
                        stopped_by_visitor = Some(panic);
                        false
                    }
                }
            };
            let outcome = catch_unwind(AssertUnwindSafe(|| self.walk(name, file, &mut guarded)));
            if let Some(panic) = stopped_by_visitor {
                std::panic::resume_unwind(panic);
            }
            let reason = match outcome {
                Ok(Ok(true)) => continue,
                Ok(Ok(false)) => break,
                Ok(Err(reason)) => reason,
                Err(_) => "the reader gave up on it".to_owned(),
            };
            if !visit(Err(Fault::new(Cause::Damaged, reason).of(name.clone()))) {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use crate::source::Found;

    const SCHEMA: &str = "message m { optional group image { optional binary bytes; optional binary path (UTF8); } \
                          optional binary text (UTF8); optional int64 id; }";

    /// Writes rows of bytes, path and text; each `None` is a null.
    fn write(path: &Path, compression: Compression, rows: &[[Option<&[u8]>; 3]]) {
        let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
        let properties = WriterProperties::builder().set_compression(compression).build();
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::new(properties)).unwrap();
        for rows in rows.chunks(2) {
            let mut group = writer.next_row_group().unwrap();
            for column in 0..3 {
                let mut writer = group.next_column().unwrap().unwrap();
                let present: i16 = if column < 2 { 2 } else { 1 };
                let levels: Vec<i16> =
                    rows.iter().map(|row| if row[column].is_some() { present } else { present - 1 }).collect();
                let values: Vec<ByteArray> =
                    rows.iter().filter_map(|row| row[column]).map(|b| b.to_vec().into()).collect();
                writer.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
                writer.close().unwrap();
            }
            let mut writer = group.next_column().unwrap().unwrap();
            let levels = vec![0; rows.len()];
            writer.typed::<parquet::data_type::Int64Type>().write_batch(&[], Some(&levels), None).unwrap();
            writer.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    fn found(path: &Path) -> Vec<Found> {
        let columns =
            FieldNames { text: "text".into(), image: "image".into(), reference: String::new(), max_references: 0 };
        let mut all = Vec::new();
        ParquetRows::find(path, columns)
            .unwrap()
            .scan(&mut |found| {
                all.push(found);
                true
            })
            .unwrap();
        all
    }

    #[test]
    fn rows_carry_their_images() {
        let dir = tempfile::tempdir().unwrap();
        let codecs = [Compression::SNAPPY, Compression::UNCOMPRESSED, Compression::ZSTD(Default::default())];
        for (i, codec) in codecs.into_iter().enumerate() {
            let path = dir.path().join(format!("{i}.parquet"));
            let rows: [[Option<&[u8]>; 3]; 5] = [
                [Some(b"png"), Some(b"a.png"), Some(b"a dog")],
                [None, Some(b"b.png"), Some(b"beside")],
                [None, None, Some(b"no image")],
                [Some(b"png"), None, None],
                [None, Some(b"../b.png"), Some(b"outside")],
            ];
            write(&path, codec, &rows);
            let all = found(&path);
            let first = all[0].as_ref().unwrap();
            assert_eq!((first.key.as_str(), first.text.as_str()), (&*format!("{i}.parquet#0"), "a dog"));
            assert_eq!(first.image.as_ref().unwrap().held.as_deref(), Some(b"png".as_slice()));
            assert_eq!(all[1].as_ref().unwrap().image, Some(Location::file(0, "b.png")));
            let causes: Vec<_> = all[2..].iter().map(|found| found.as_ref().unwrap_err().cause).collect();
            assert_eq!(causes, [Cause::NoImage, Cause::Text, Cause::Path]);
        }
    }

    #[test]
    fn a_damaged_file_is_named_and_a_missing_column_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        write(&path, Compression::SNAPPY, &[[Some(b"png"), None, Some(b"a dog")]]);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        write(&dir.path().join("b.parquet"), Compression::SNAPPY, &[[Some(b"png"), None, Some(b"a cat")]]);
        let all = found(dir.path());
        assert_eq!((all[0].as_ref().unwrap_err().key.as_str(), all.len()), ("a.parquet", 2));
        assert_eq!(all[1].as_ref().unwrap().text, "a cat");
        let columns =
            FieldNames { text: "caption".into(), image: "image".into(), reference: String::new(), max_references: 0 };
        let mut reasons = Vec::new();
        ParquetRows::find(&dir.path().join("b.parquet"), columns)
            .unwrap()
            .scan(&mut |found| {
                reasons.push(found.unwrap_err().reason);
                true
            })
            .unwrap();
        assert!(reasons[0].contains("no column `caption` among image, text, id"), "{reasons:?}");
    }
}
