//! Opens a source from its settings: the one place that knows all formats.

use std::path::{Path, PathBuf};

use deepgen_contract::data::SourceSettings;
use deepgen_contract::shapes::SourceFormat;
use thiserror::Error;

use crate::field_names::FieldNames;
use crate::json_lines::JsonLines;
use crate::json_list::{JsonList, ListForm};
use crate::parquet_rows::ParquetRows;
use crate::prompts::PromptFile;
use crate::remote;
use crate::shapes::{ShapesError, write_source};
use crate::source::{RecordSource, ScanError};
use crate::tar_shards::TarShards;

/// Folder inside the output folder that holds what was generated for it.
const GENERATED_DIR: &str = "source";

/// Where a source is opened.
#[derive(Debug, Clone, Copy)]
pub struct SourcePlace<'a> {
    /// Seed of generated sources.
    pub seed: u64,
    /// Folder that relative paths in the settings start from.
    pub project_root: &'a Path,
    /// Folder that receives generated files, and for a while those fetched from elsewhere.
    pub out_dir: &'a Path,
}

/// Why a source cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// It cannot be read at all.
    #[error("the source cannot be read: {0}")]
    Scan(#[from] ScanError),
    /// It could not be generated.
    #[error("the source cannot be generated: {0}")]
    Shapes(#[from] ShapesError),
}

/// Opens a source.
///
/// # Errors
/// When it cannot be read or generated.
pub fn open(source: &SourceSettings, place: SourcePlace<'_>) -> Result<Box<dyn RecordSource>, OpenError> {
    // Absolute: the data set is read by programs started elsewhere.
    let at = |path: &str| {
        let path = place.project_root.join(path);
        std::path::absolute(&path).map_err(|source| OpenError::Scan(ScanError::Io { path, source }))
    };
    let list = |index: &str, images: &str, form| -> Result<Box<dyn RecordSource>, OpenError> {
        Ok(Box::new(JsonList::new(at(index)?, at(images)?, form)))
    };
    match source {
        SourceSettings::Shapes { shapes } => {
            let dir = place.out_dir.join(GENERATED_DIR);
            let dir = std::path::absolute(&dir).map_err(|source| ScanError::Io { path: dir, source })?;
            let written = write_source(shapes, place.seed, &dir)?;
            let text = |path: &Path| path.to_string_lossy().into_owned();
            let (index, images) = (text(&written.index), text(&written.image_root));
            let caption_key = "caption".to_owned();
            let generated = match written.format {
                SourceFormat::Tar => SourceSettings::Tar { shards: index, caption_key },
                SourceFormat::CaptionList => {
                    let captions = text(&written.annotation_root);
                    SourceSettings::CaptionList { index, images, captions, caption_key }
                }
                SourceFormat::Blip3o => SourceSettings::Blip3o { index, images },
                SourceFormat::EditList => SourceSettings::EditList { index, images, max_references: 1 },
                SourceFormat::QaList => SourceSettings::QaList { index, images },
                SourceFormat::Prompts => SourceSettings::Prompts { path: index },
            };
            open(&generated, place)
        }
        SourceSettings::CaptionList { index, images, captions, caption_key } => {
            let form = ListForm::Caption { captions: at(captions)?, caption_key: caption_key.clone() };
            list(index, images, form)
        }
        SourceSettings::Blip3o { index, images } => list(index, images, ListForm::Blip3o),
        SourceSettings::EditList { index, images, max_references } => {
            list(index, images, ListForm::Edit { max_references: *max_references })
        }
        SourceSettings::QaList { index, images } => list(index, images, ListForm::Qa),
        SourceSettings::JsonLines { index, images, text_key, image_key, reference_key, max_references } => {
            let names = names(text_key, image_key, reference_key, *max_references);
            Ok(Box::new(JsonLines::new(at(index)?, at(images)?, names)))
        }
        SourceSettings::Tar { shards, caption_key } => {
            let caption_key = caption_key.clone();
            let local = move |path: &Path| -> Result<Box<dyn RecordSource>, ScanError> {
                Ok(Box::new(TarShards::find(path, &caption_key)?))
            };
            fetched_or_local(shards, &at, place, Box::new(local))
        }
        SourceSettings::Parquet { files, text_column, image_column, reference_column, max_references } => {
            let names = names(text_column, image_column, reference_column, *max_references);
            let local = move |path: &Path| -> Result<Box<dyn RecordSource>, ScanError> {
                Ok(Box::new(ParquetRows::find(path, names.clone())?))
            };
            fetched_or_local(files, &at, place, Box::new(local))
        }
        SourceSettings::Prompts { path } => {
            let local =
                |path: &Path| -> Result<Box<dyn RecordSource>, ScanError> { Ok(Box::new(PromptFile(path.to_owned()))) };
            fetched_or_local(path, &at, place, Box::new(local))
        }
    }
}

fn names(text: &str, image: &str, reference: &str, max_references: usize) -> FieldNames {
    FieldNames { text: text.into(), image: image.into(), reference: reference.into(), max_references }
}

/// Opens files of this machine, or those below an address of an object store.
fn fetched_or_local(
    path: &str,
    at: &dyn Fn(&str) -> Result<PathBuf, OpenError>,
    place: SourcePlace<'_>,
    local: remote::OpenLocal,
) -> Result<Box<dyn RecordSource>, OpenError> {
    match remote::is_address(path) {
        true => Ok(remote::open(path, place.out_dir, local)?),
        false => Ok(local(&at(path)?)?),
    }
}
