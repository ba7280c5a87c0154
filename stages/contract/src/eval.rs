//! Settings and records of evaluation: what `generate` and `score` are told, the line that each generated image
//! leaves in its manifest, and the table of scores.
//!
//! Knows no judge and no model. Formulas and published numbers belong to the judge crate's benchmark files.

use serde::{Deserialize, Serialize};

use crate::id::Fingerprint;
use crate::precision::PrecisionSettings;
use crate::settings::ExternalPath;
use crate::shapes::{Expectation, ShapesSuite, ShapesWorld};

/// File name of the image manifest in an `images` artifact: one [`ImageRecord`] a line.
pub const IMAGES_FILE: &str = "images.jsonl";
/// File name of the score table in a `scores` artifact.
pub const SCORES_FILE: &str = "scores.json";
/// File name of the judge's raw answers in a `scores` artifact: one a line, in the order of the images.
pub const ANSWERS_FILE: &str = "answers.jsonl";
/// Version of [`ImageRecord`] and [`ScoreTable`]; raised when a field changes its meaning.
pub const EVAL_VERSION: u32 = 1;

/// Where a benchmark's prompts come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum BenchmarkItems {
    /// The embedded shapes world.
    Shapes {
        /// Suite of prompts or edits.
        suite: ShapesSuite,
        /// Seed of the items.
        seed: u64,
        /// Items to make.
        count: usize,
        /// World of the scenes.
        #[serde(default)]
        world: ShapesWorld,
    },
    /// GenEval's rows: one JSON object a line, with `tag`, `include` and `prompt`.
    GenevalJsonl {
        /// File.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        path: String,
    },
    /// One prompt a line; blank lines count in the numbering and give no item.
    PromptsTxt {
        /// File.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        path: String,
    },
    /// One prompt a file, `{id}.txt`, first line used (DPG-Bench).
    PromptsFolder {
        /// Folder.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        path: String,
    },
    /// One JSON object a line.
    PromptsJsonl {
        /// File.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        path: String,
        /// Key of the item's identity.
        id_key: String,
        /// Key of the prompt.
        prompt_key: String,
        /// Key of the tag; empty when items have none.
        tag_key: String,
    },
    /// Comma-separated values with a header row (UniGenBench).
    PromptsCsv {
        /// File.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        path: String,
        /// Column of the item's identity.
        id_column: String,
        /// Column of the prompt.
        prompt_column: String,
        /// Column of the tag; empty when items have none.
        tag_column: String,
    },
    /// A JSON array, or an object keyed by identity, of editing items; image paths are relative to `images`.
    EditsJson {
        /// File.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        path: String,
        /// Folder of the source images.
        #[cfg_attr(feature = "schema", schemars(extend("format" = "path")))]
        images: String,
        /// Key of the instruction.
        instruction_key: String,
        /// Key of the source image's path.
        image_key: String,
        /// Key of the tag.
        tag_key: String,
    },
}

impl BenchmarkItems {
    /// Returns the files and folders outside the artifact store that hold the items.
    pub fn external_paths(&self) -> Vec<ExternalPath> {
        let path = |key: &str, path: &str, what: &str| ExternalPath {
            key: key.to_owned(),
            path: path.to_owned(),
            remedy: format!("get {what} from the benchmark's repository (docs/spec/evaluation.md) or set `{key}`"),
        };
        match self {
            Self::Shapes { .. } => Vec::new(),
            Self::GenevalJsonl { path: file }
            | Self::PromptsTxt { path: file }
            | Self::PromptsFolder { path: file }
            | Self::PromptsJsonl { path: file, .. }
            | Self::PromptsCsv { path: file, .. } => vec![path("items.path", file, "the prompts")],
            Self::EditsJson { path: file, images, .. } => {
                vec![path("items.path", file, "the instructions"), path("items.images", images, "the source images")]
            }
        }
    }
}

/// Who turns prompts into the DiT's condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Conditioning {
    /// The VLM through the bridge: DeepGen.
    Bridge,
    /// The base's own text encoder, before any bridge: the shapes world's stand-in for SD3.5 itself.
    BaseEncoder,
}

/// How images are drawn from the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SamplerSettings {
    /// Euler steps of the deterministic flow-matching sampler.
    pub steps: usize,
    /// Weight of classifier-free guidance, `v = v_neg + guidance (v_pos - v_neg)`; 1 turns it off.
    pub guidance: f64,
    /// Image height in pixels.
    pub height: usize,
    /// Image width in pixels.
    pub width: usize,
    /// Images drawn and kept for each prompt.
    pub images_per_prompt: usize,
    /// Text of the unconditional branch.
    pub negative: String,
}

impl Default for SamplerSettings {
    fn default() -> Self {
        Self { steps: 50, guidance: 4.0, height: 512, width: 512, images_per_prompt: 4, negative: String::new() }
    }
}

/// Settings of a `generate` stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct GenerateSettings {
    /// Benchmark, by the name of its file in the judge crate, such as `geneval`.
    pub benchmark: String,
    /// Prompts.
    pub items: BenchmarkItems,
    /// Who turns prompts into the DiT's condition.
    pub conditioning: Conditioning,
    /// Sampler.
    pub sampler: SamplerSettings,
    /// Seed of the initial noise. Every image has a stream of its own, made from seed, item and copy, so that an
    /// image does not depend on the batch it was drawn in.
    pub seed: u64,
    /// Images drawn at once; the result does not depend on it.
    pub batch: usize,
    /// Number types.
    #[serde(default)]
    pub precision: PrecisionSettings,
}

/// Who looks at the images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum JudgeSettings {
    /// Exact reader of the shapes world.
    Rule {
        /// World that the images are of.
        #[serde(default)]
        world: ShapesWorld,
    },
    /// OpenAI-compatible chat server.
    Http {
        /// Base address, such as `http://localhost:18087`.
        url: String,
        /// Served model name.
        model: String,
        /// Sampling temperature of the answer.
        temperature: f64,
        /// Longest answer in tokens.
        max_tokens: usize,
        /// Requests in flight at once.
        workers: usize,
        /// Attempts for each question before it counts as failed.
        attempts: u32,
    },
    /// Nobody here: images are exported in the official layout, for the benchmark's own scorer.
    External,
}

/// Settings of a `score` stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ScoreSettings {
    /// Benchmark, by the name of its file in the judge crate.
    pub benchmark: String,
    /// Judge.
    pub judge: JudgeSettings,
    /// Bootstrap resamples behind the intervals of means.
    pub resamples: usize,
}

/// One generated image: a line of [`IMAGES_FILE`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRecord {
    /// [`EVAL_VERSION`] of the writer.
    pub version: u32,
    /// Benchmark name.
    pub benchmark: String,
    /// Identity of the item inside the benchmark.
    pub item: String,
    /// Category that the benchmark averages over.
    pub tag: String,
    /// Index among the images of one item.
    pub copy: usize,
    /// Prompt or instruction that was used, after any rewriting.
    pub prompt: String,
    /// Seed of the image's noise.
    pub seed: u64,
    /// Guidance weight.
    pub guidance: f64,
    /// Sampler steps.
    pub steps: usize,
    /// Image height in pixels.
    pub height: usize,
    /// Image width in pixels.
    pub width: usize,
    /// Fingerprint of the weights.
    pub weights: Fingerprint,
    /// Image file, relative to the artifact's folder.
    pub file: String,
    /// Source image of an edit, relative to the artifact's folder.
    pub source: Option<String>,
    /// What a right image shows, where that is known.
    pub expectation: Option<Expectation>,
}

/// A number with its 95 % confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Scores of one category.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TagScore {
    /// Category.
    pub tag: String,
    /// The benchmark's score over this category, in the benchmark's unit.
    pub score: Estimate,
    /// Share of images that are right in everything, 0 to 1.
    pub strict: Estimate,
    /// Mean graded score, 0 to 1.
    pub graded: Estimate,
    /// Images.
    pub num_images: usize,
}

/// A named score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartScore {
    /// Name, such as `colours`.
    pub name: String,
    /// Mean over the images that the part applies to, 0 to 1.
    pub score: Estimate,
    /// Images that it applies to.
    pub num_images: usize,
}

/// A published number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishedScore {
    /// Whose number, such as `DeepGen SFT`.
    pub name: String,
    /// In the benchmark's unit.
    pub value: f64,
}

/// Result of a `score` stage: [`SCORES_FILE`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreTable {
    /// [`EVAL_VERSION`] of the writer.
    pub version: u32,
    /// Benchmark name.
    pub benchmark: String,
    /// Benchmark title, for people.
    pub title: String,
    /// Unit of `overall` and of the tags' scores, such as `0..1`.
    pub unit: String,
    /// Who judged.
    pub judge: String,
    /// The benchmark's headline number, by its own formula.
    pub overall: Estimate,
    /// Share of images that are right in everything, 0 to 1.
    pub strict: Estimate,
    /// Mean graded score, 0 to 1: moves long before `strict` does.
    pub graded: Estimate,
    /// Scores by category, in the benchmark's order.
    pub tags: Vec<TagScore>,
    /// Graded components.
    pub parts: Vec<PartScore>,
    /// Items.
    pub num_items: usize,
    /// Images scored.
    pub num_images: usize,
    /// Images without a usable answer; they are not in any mean.
    pub num_unscored: usize,
    /// Published numbers of the real benchmark, in the same unit.
    pub published: Vec<PublishedScore>,
}

impl ScoreTable {
    /// Returns the numbers that a manifest carries, named `score/...`.
    pub fn metrics(&self) -> Vec<(String, f64)> {
        let mut metrics = vec![
            ("score/overall".to_owned(), self.overall.value),
            ("score/strict".to_owned(), self.strict.value),
            ("score/graded".to_owned(), self.graded.value),
        ];
        metrics.extend(self.tags.iter().map(|tag| (format!("tag/{}", tag.tag), tag.score.value)));
        metrics.extend(self.parts.iter().map(|part| (format!("part/{}", part.name), part.score.value)));
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_read_back_and_unknown_keys_are_errors() {
        let rule = JudgeSettings::Rule { world: ShapesWorld::default() };
        let settings = ScoreSettings { benchmark: "geneval".into(), judge: rule, resamples: 200 };
        let text = r#"{"benchmark":"geneval","judge":{"kind":"rule"},"resamples":200}"#;
        assert_eq!(serde_json::from_str::<ScoreSettings>(text).unwrap(), settings);
        let whole = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<ScoreSettings>(&whole).unwrap(), settings);
        let wrong = text.replace("resamples", "resample");
        assert!(serde_json::from_str::<ScoreSettings>(&wrong).is_err());
        let items = r#"{"kind":"shapes","suite":"geneval","seed":1,"count":4,"extra":0}"#;
        assert!(serde_json::from_str::<BenchmarkItems>(items).unwrap_err().to_string().contains("extra"));
    }

    #[test]
    fn items_name_the_files_they_are_read_from() {
        let items: BenchmarkItems = serde_json::from_str(
            r#"{"kind":"edits_json","path":"a.json","images":"b","instruction_key":"i","image_key":"f","tag_key":"t"}"#,
        )
        .unwrap();
        let paths = items.external_paths();
        assert_eq!(
            paths.iter().map(|p| (&*p.key, &*p.path)).collect::<Vec<_>>(),
            [("items.path", "a.json"), ("items.images", "b")]
        );
        let items: BenchmarkItems =
            serde_json::from_str(r#"{"kind":"shapes","suite":"geneval","seed":1,"count":4}"#).unwrap();
        assert!(items.external_paths().is_empty());
    }

    #[test]
    fn a_table_names_its_metrics() {
        let one = Estimate { value: 0.5, low: 0.4, high: 0.6 };
        let table = ScoreTable {
            version: EVAL_VERSION,
            benchmark: "geneval".into(),
            title: "GenEval".into(),
            unit: "0..1".into(),
            judge: "rule".into(),
            overall: one,
            strict: one,
            graded: Estimate { value: 0.75, ..one },
            tags: vec![TagScore { tag: "colors".into(), score: one, strict: one, graded: one, num_images: 8 }],
            parts: vec![PartScore { name: "colours".into(), score: one, num_images: 8 }],
            num_items: 2,
            num_images: 8,
            num_unscored: 0,
            published: vec![PublishedScore { name: "DeepGen SFT".into(), value: 0.87 }],
        };
        let names: Vec<_> = table.metrics().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["score/overall", "score/strict", "score/graded", "tag/colors", "part/colours"]);
        assert_eq!(table.metrics()[2].1, 0.75);
        let text = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<ScoreTable>(&text).unwrap(), table);
    }
}
