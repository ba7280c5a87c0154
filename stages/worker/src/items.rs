//! The items of a benchmark: from the shapes world, or from the benchmark's own files.
//!
//! Knows the files' layouts (docs/spec/evaluation.md), neither the model nor the judge.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use deepgen_contract::eval::BenchmarkItems;
use deepgen_contract::shapes::Expectation;
use deepgen_data::decode::decode;
use deepgen_data::shapes::{benchmark, render};
use image::RgbImage;
use serde_json::Value;

use crate::error::{JobError, JobResult, OrFail};

/// A prompt of a benchmark.
#[derive(Debug, Clone)]
pub struct Item {
    /// Identity inside the benchmark.
    pub id: String,
    /// Category that the benchmark averages over.
    pub tag: String,
    /// Prompt or instruction.
    pub prompt: String,
    /// What a right image shows, where that is known.
    pub expectation: Option<Expectation>,
    /// Source image of an edit.
    pub source: Option<Arc<RgbImage>>,
}

impl Item {
    fn prompt(id: impl Into<String>, tag: impl Into<String>, prompt: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            tag: tag.into(),
            prompt: prompt.into().trim().to_owned(),
            expectation: None,
            source: None,
        }
    }
}

/// Reads or makes the items; `resolve` turns a path of the settings into one that can be opened.
///
/// # Errors
/// Names the file and the line or key that is wrong.
pub fn load(settings: &BenchmarkItems, resolve: impl Fn(&str) -> PathBuf) -> JobResult<Vec<Item>> {
    match settings {
        BenchmarkItems::Shapes { suite, seed, count, world } => {
            let items =
                benchmark(*suite, world, *seed, *count).or_input(|| format!("the benchmark {}", suite.name()))?;
            items
                .into_iter()
                .map(|item| {
                    let source = item.source.as_ref().map(|scene| Arc::new(render(scene, world)));
                    let expectation = Some(item.expectation);
                    Ok(Item { id: item.id, tag: item.tag, prompt: item.prompt, expectation, source })
                })
                .collect()
        }
        BenchmarkItems::GenevalJsonl { path } => {
            let path = resolve(path);
            let rows = json_lines(&path)?;
            let items = rows.iter().enumerate().map(|(row, value)| {
                let at = || format!("{}:{}", path.display(), row + 1);
                Ok(Item::prompt(format!("{row:05}"), text(value, "tag", at)?, text(value, "prompt", at)?))
            });
            items.collect()
        }
        BenchmarkItems::PromptsTxt { path } => {
            let lines = read(&resolve(path))?;
            let numbered = lines.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            Ok(numbered.map(|(row, line)| Item::prompt(row.to_string(), "all", line)).collect())
        }
        BenchmarkItems::PromptsFolder { path } => prompts_folder(&resolve(path)),
        BenchmarkItems::PromptsJsonl { path, id_key, prompt_key, tag_key } => {
            let path = resolve(path);
            let rows = json_lines(&path)?;
            let items = rows.iter().enumerate().map(|(row, value)| {
                let at = || format!("{}:{}", path.display(), row + 1);
                let tag = if tag_key.is_empty() { "all".to_owned() } else { text(value, tag_key, at)? };
                Ok(Item::prompt(text(value, id_key, at)?, tag, text(value, prompt_key, at)?))
            });
            items.collect()
        }
        BenchmarkItems::PromptsCsv { path, id_column, prompt_column, tag_column } => {
            prompts_csv(&resolve(path), [id_column, prompt_column, tag_column])
        }
        BenchmarkItems::EditsJson { path, images, instruction_key, image_key, tag_key } => {
            edits_json(&resolve(path), &resolve(images), [instruction_key, image_key, tag_key])
        }
    }
}

fn read(path: &Path) -> JobResult<String> {
    std::fs::read_to_string(path).or_io(|| path.display())
}

fn json_lines(path: &Path) -> JobResult<Vec<Value>> {
    let content = read(path)?;
    let lines = content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(row, line)| serde_json::from_str(line).or_input(|| format!("{}:{}", path.display(), row + 1))).collect()
}

/// Returns the text or number under `key`.
fn text(value: &Value, key: &str, at: impl Fn() -> String) -> JobResult<String> {
    match value.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(other) => Err(JobError::input(format!("{}: `{key}` is {other}, not a text", at()))),
        None => Err(JobError::input(format!("{}: there is no key `{key}`", at()))),
    }
}

fn prompts_folder(path: &Path) -> JobResult<Vec<Item>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(path)
        .or_io(|| path.display())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| file.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    files.sort();
    files
        .iter()
        .map(|file| {
            let id = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            Ok(Item::prompt(id, "all", read(file)?.lines().next().unwrap_or_default()))
        })
        .collect()
}

fn prompts_csv(path: &Path, [id, prompt, tag]: [&String; 3]) -> JobResult<Vec<Item>> {
    let mut reader = csv::Reader::from_path(path).or_io(|| path.display())?;
    let headers = reader.headers().or_input(|| path.display())?.clone();
    let column = |name: &String| {
        let position = headers.iter().position(|header| header == name);
        position.ok_or_else(|| {
            let known = headers.iter().collect::<Vec<_>>().join(", ");
            JobError::input(format!("{}: there is no column `{name}` among {known}", path.display()))
        })
    };
    let (id, prompt) = (column(id)?, column(prompt)?);
    let tag = if tag.is_empty() { None } else { Some(column(tag)?) };
    let mut items = Vec::new();
    for record in reader.records() {
        let record = record.or_input(|| path.display())?;
        let cell = |column: usize| record.get(column).unwrap_or_default();
        items.push(Item::prompt(cell(id), tag.map_or("all", cell), cell(prompt)));
    }
    Ok(items)
}

fn edits_json(path: &Path, images: &Path, [instruction, image, tag]: [&String; 3]) -> JobResult<Vec<Item>> {
    let value: Value = serde_json::from_str(&read(path)?).or_input(|| path.display())?;
    let rows: Vec<(String, Value)> = match value {
        Value::Array(rows) => rows.into_iter().enumerate().map(|(i, row)| (i.to_string(), row)).collect(),
        Value::Object(rows) => rows.into_iter().collect(),
        _ => return Err(JobError::input(format!("{} holds neither an array nor an object", path.display()))),
    };
    rows.into_iter()
        .map(|(id, row)| {
            let at = || format!("{}, item {id}", path.display());
            let file = images.join(text(&row, image, at)?);
            let bytes = std::fs::read(&file).or_io(|| file.display())?;
            let source = decode(&bytes).or_input(|| file.display())?;
            let item = Item::prompt(id.clone(), text(&row, tag, at)?, text(&row, instruction, at)?);
            Ok(Item { source: Some(Arc::new(source)), ..item })
        })
        .collect()
}
