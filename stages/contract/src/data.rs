//! Settings of the data stages: where samples come from, how they are mixed, how images are brought to size
//! (docs/spec/data.md sections 2, 3, 6 and 8).
//!
//! Knows what can be asked for; reads nothing. Defaults live in `stages/prepare.toml` and `stages/mix.toml`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::eval::BenchmarkItems;
use crate::settings::ExternalPath;
use crate::shapes::ShapesSource;

/// Settings of a `prepare` stage: one source, read, validated and indexed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PrepareSettings {
    /// Where the samples come from.
    pub source: SourceSettings,
    /// Samples of the set in the paper, for its share of the mixture; 0 when the paper does not say.
    pub nominal_size: u64,
    /// Size limits of images; they apply to `shapes`, `caption_list` and `tar`, as in the release.
    pub filters: FilterSettings,
    /// Leaves out a record whose text and images equal those of an earlier one.
    pub dedupe: bool,
}

/// A source of samples, by format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SourceSettings {
    /// Generated here, written in the real formats, and read back by the same readers as real data.
    Shapes {
        /// What is generated.
        shapes: ShapesSource,
    },
    /// JSON list of `image` and `annotation` paths; the caption is in a JSON file per image.
    CaptionList {
        /// JSON file, or a folder whose `*.json` are read in order of name.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        index: String,
        /// Folder that `image` is relative to; `/` takes absolute paths as they are.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        images: String,
        /// Folder that `annotation` is relative to.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        captions: String,
        /// Key of the caption in that file.
        caption_key: String,
    },
    /// JSON list of `txt` and `image_path`.
    Blip3o {
        /// JSON file, or a folder whose `*.json` are read in order of name.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        index: String,
        /// Folder that `image_path` is relative to; `/` takes absolute paths as they are.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        images: String,
    },
    /// JSON list of `input_image` (an array), `output_image` and `instruction`.
    EditList {
        /// JSON file, or a folder whose `*.json` are read in order of name.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        index: String,
        /// Folder that the images are relative to; `/` takes absolute paths as they are.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        images: String,
        /// Reference images kept of a record: 1 in the release; 0 keeps all.
        max_references: usize,
    },
    /// JSON lines, a record a line, with keys of one's choice; a Hugging Face image folder's `metadata.jsonl` has
    /// `file_name` and, as a rule, `text`.
    JsonLines {
        /// File, or a folder whose `*.jsonl` are read in order of name.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        index: String,
        /// Folder that the images are relative to; `/` takes absolute paths as they are.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        images: String,
        /// Key of the caption or instruction.
        text_key: String,
        /// Key of the image to be made.
        image_key: String,
        /// Key of the image, or list of images, that an instruction is about; empty for captions.
        #[serde(default)]
        reference_key: String,
        /// Reference images kept of a record; 0 keeps all.
        #[serde(default)]
        max_references: usize,
    },
    /// Parquet files with a column of images, `{bytes, path}` or bytes alone, as Hugging Face image sets have.
    Parquet {
        /// File, a folder of `*.parquet`, a folder and a name with `*`, or an address such as `s3://sets/a/*.parquet`.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        files: String,
        /// Column of the caption or instruction.
        text_column: String,
        /// Column of the image to be made.
        image_column: String,
        /// Column of the image, or list of images, that an instruction is about; empty for captions.
        #[serde(default)]
        reference_column: String,
        /// Reference images kept of a record; 0 keeps all.
        #[serde(default)]
        max_references: usize,
    },
    /// Tar shards, plain or compressed (`.tar.gz`, `.tar.zst`): files of one base name are a sample, an image and its
    /// caption in `.json` or `.txt`. Plain shards of this machine are read in place; all others are copied.
    Tar {
        /// A shard, a folder of shards, a folder and a name with `*`, such as `sets/a/shard-*.tar`, or an address such
        /// as `s3://sets/a/*.tar`.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        shards: String,
        /// Key of the caption in the sample's `.json`.
        caption_key: String,
    },
    /// JSON list of `image`, `question` and `answer`, for the base's vision-language model.
    QaList {
        /// JSON file, or a folder whose `*.json` are read in order of name.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        index: String,
        /// Folder that `image` is relative to; `/` takes absolute paths as they are.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        images: String,
    },
    /// Prompts without images, for RL.
    Prompts {
        /// `.txt` with a prompt a line, or `.jsonl` with `prompt` or else `caption`.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        path: String,
    },
}

impl SourceSettings {
    /// Returns the files and folders outside the artifact store that the source reads.
    pub fn external_paths(&self) -> Vec<ExternalPath> {
        let path = |key: &str, path: &str| ExternalPath {
            key: format!("source.{key}"),
            path: path.to_owned(),
            remedy: format!("get the data set (docs/spec/data.md section 5 says where) or set `source.{key}`"),
        };
        // A pattern stands for its folder.
        let folder = |shards: &str| match shards.rsplit_once('/') {
            Some(("", name)) if name.contains('*') => "/".to_owned(),
            Some((folder, name)) if name.contains('*') => folder.to_owned(),
            None if shards.contains('*') => ".".to_owned(),
            _ => shards.to_owned(),
        };
        // What lies in an object store is not looked at before the run.
        let files = |key: &str, files: &str| match files.contains("://") {
            true => Vec::new(),
            false => vec![path(key, &folder(files))],
        };
        match self {
            Self::Shapes { .. } => Vec::new(),
            Self::CaptionList { index, images, captions, .. } => {
                vec![path("index", index), path("images", images), path("captions", captions)]
            }
            Self::Blip3o { index, images }
            | Self::EditList { index, images, .. }
            | Self::QaList { index, images }
            | Self::JsonLines { index, images, .. } => vec![path("index", index), path("images", images)],
            Self::Parquet { files: all, .. } => files("files", all),
            Self::Tar { shards, .. } => files("shards", shards),
            Self::Prompts { path: prompts } => files("path", prompts),
        }
    }

    /// Returns the value of `kind` that names the format.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Shapes { .. } => "shapes",
            Self::CaptionList { .. } => "caption_list",
            Self::Blip3o { .. } => "blip3o",
            Self::EditList { .. } => "edit_list",
            Self::JsonLines { .. } => "json_lines",
            Self::Parquet { .. } => "parquet",
            Self::Tar { .. } => "tar",
            Self::QaList { .. } => "qa_list",
            Self::Prompts { .. } => "prompts",
        }
    }
}

/// Size limits of images (docs/spec/data.md section 3); all of them are strict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct FilterSettings {
    /// Both sides must exceed this, in pixels: 80 in the release.
    pub min_side: u32,
    /// Width over height must exceed this: 0.1 in the release.
    pub min_aspect: f64,
    /// Width over height must be below this: 10 in the release.
    pub max_aspect: f64,
}

/// Settings of a `mix` stage: how prepared data sets become one stream of batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MixSettings {
    /// Order of batches; ignored by a mixture of prompts.
    pub cycle: TaskCycle,
    /// Samples of a batch: 4 in the release.
    pub micro_batch: usize,
    /// How a stream chooses its next sample.
    pub sampling: Sampling,
    /// Settings of inputs by their names; an input that is not listed has weight 1 and no rewards.
    pub members: BTreeMap<String, MemberSettings>,
    /// Overlap of the texts with the benchmarks' prompts.
    pub contamination: ContaminationSettings,
}

/// Batches of each task, repeated for ever: first `edit`, then `generation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TaskCycle {
    /// Editing batches.
    pub edit: u64,
    /// Generation batches: 3 in stage 1, 2 in stage 2.
    pub generation: u64,
}

/// How a stream chooses its next sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// A fresh permutation of all samples each pass: stages 1 and 2. Weights must be 1.
    Permutation,
    /// With replacement; each sample has its member's weight, so a share is size times weight.
    SampleProportional,
    /// With replacement; a member's share is its weight, whatever its size.
    WeightOnly,
}

/// One input of a mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MemberSettings {
    /// Weight in sampling; must be positive.
    pub weight: f64,
    /// Weights of rewards by name, for prompts.
    #[serde(default)]
    pub rewards: BTreeMap<String, f64>,
}

impl Default for MemberSettings {
    fn default() -> Self {
        Self { weight: 1.0, rewards: BTreeMap::new() }
    }
}

/// Check of a mixture's texts against the benchmarks' prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ContaminationSettings {
    /// What an overlap leads to.
    pub policy: ContaminationPolicy,
    /// Words in a row that count as an overlap, beside equal texts; 0 looks for equal texts only.
    pub ngram: usize,
    /// Benchmarks by name, as `generate` reads them, beside the embedded ones. Prompts only: an instruction without its
    /// image is no test item.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub benchmarks: BTreeMap<String, BenchmarkItems>,
}

impl MixSettings {
    /// Returns the files and folders outside the artifact store that the check reads.
    pub fn external_paths(&self) -> Vec<ExternalPath> {
        let all = self.contamination.benchmarks.iter().flat_map(|(name, items)| {
            items.external_paths().into_iter().map(move |external| {
                let key = external.key.replacen("items", &format!("contamination.benchmarks.{name}"), 1);
                ExternalPath { remedy: external.remedy.replace(&external.key, &key), key, path: external.path }
            })
        });
        all.collect()
    }
}

/// What an overlap with a benchmark leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ContaminationPolicy {
    /// Reported with the mixture.
    Warn,
    /// Ends the node.
    Fail,
    /// Not looked for.
    Off,
}

/// How images are brought to size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ImageSettings {
    /// Side of a square of the aimed area, in pixels: 512 in the release.
    pub size: u32,
    /// Sides are multiples of this, in pixels: 32 in the release.
    pub unit: u32,
    /// The rule.
    pub mode: ImageMode,
}

/// Rule that gives an image its new sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ImageMode {
    /// Keeps the aspect ratio and about `size` squared pixels; both sides are rounded up to `unit`.
    FixPixels,
    /// `size` times `size`, whatever the aspect ratio.
    Exact,
}

/// What `deepgen data inspect` asks the worker to look through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InspectRequest {
    /// A file, a folder, a pattern or an address; its format is told from names and from the first record.
    pub source: String,
    /// Folder that paths of images are relative to [default: the folder of the source].
    pub images: Option<String>,
    /// Folder of caption files [default: that of the images].
    pub captions: Option<String>,
    /// Key or column of the text.
    pub text_key: Option<String>,
    /// Key or column of the image.
    pub image_key: Option<String>,
    /// Key or column of the references of an edit.
    pub reference_key: Option<String>,
    /// Records looked at; 0 for all.
    pub limit: u64,
    /// Samples shown.
    pub num_samples: usize,
    /// File that receives the contact sheet, a PNG; nothing for none.
    pub sheet: Option<String>,
    /// Both sides must exceed this, in pixels.
    pub min_side: u32,
    /// Answers with JSON instead of a table.
    pub json: bool,
}

impl Default for InspectRequest {
    fn default() -> Self {
        Self {
            source: String::new(),
            images: None,
            captions: None,
            text_key: None,
            image_key: None,
            reference_key: None,
            limit: 10_000,
            num_samples: 12,
            sheet: None,
            min_side: 80,
            json: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_of_shards_stands_for_its_folder() {
        let folder = |shards: &str| {
            let source = SourceSettings::Tar { shards: shards.into(), caption_key: "caption".into() };
            source.external_paths()[0].path.clone()
        };
        assert_eq!(folder("sets/a/shard-*.tar"), "sets/a");
        assert_eq!(folder("sets/a"), "sets/a");
        assert_eq!(folder("*.tar"), ".");
        assert_eq!(folder("/*.tar"), "/");
    }

    #[test]
    fn a_source_names_its_unknown_key() {
        let text = r#"{"kind":"blip3o","index":"a.json","images":"a","captions":"b"}"#;
        let error = serde_json::from_str::<SourceSettings>(text).expect_err("captions is no key of blip3o").to_string();
        assert!(error.contains("captions"), "{error}");
    }
}
