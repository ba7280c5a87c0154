//! Benchmarks as data: one embedded TOML file each, with scoring form, generation settings, aggregation formula,
//! official folder layout and published numbers (docs/spec/evaluation.md).
//!
//! Knows no image. The shapes world has an analogue of each, named by `shapes_suite`.

use deepgen_contract::shapes::ShapesSuite;
use serde::Deserialize;

/// A benchmark file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BenchmarkError {
    /// No benchmark has this name.
    #[error("there is no benchmark `{name}`; there are {}", BENCHMARKS.map(|(name, _)| name).join(", "))]
    Unknown {
        /// Name asked for.
        name: String,
    },
    /// The embedded file does not parse.
    #[error("benchmark file of `{name}`")]
    File {
        /// Benchmark.
        name: String,
        /// Cause, with line and column.
        source: toml::de::Error,
    },
    /// A path template names a field that the image does not have.
    #[error("path template `{template}` uses `{field}`, which an image does not have")]
    Field {
        /// Template.
        template: String,
        /// Field.
        field: String,
    },
}

const BENCHMARKS: [(&str, &str); 10] = [
    ("geneval", include_str!("../benchmarks/geneval.toml")),
    ("dpg", include_str!("../benchmarks/dpg.toml")),
    ("unigenbench", include_str!("../benchmarks/unigenbench.toml")),
    ("wise", include_str!("../benchmarks/wise.toml")),
    ("corebench", include_str!("../benchmarks/corebench.toml")),
    ("cvtg", include_str!("../benchmarks/cvtg.toml")),
    ("gedit", include_str!("../benchmarks/gedit.toml")),
    ("imgedit", include_str!("../benchmarks/imgedit.toml")),
    ("rise", include_str!("../benchmarks/rise.toml")),
    ("uniredit", include_str!("../benchmarks/uniredit.toml")),
];

/// How an image is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoringForm {
    /// What is in the image is detected and compared with what is expected.
    Detections,
    /// Yes-or-no questions.
    Checklist,
    /// Ratings on scales.
    Rating,
}

/// How the images' values become the headline number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Formula {
    /// Mean over the images of a tag; then the plain mean of the tags.
    MeanOfTags,
    /// Mean over the images of a tag; then the mean of the tags by the weights in the file (1 for others).
    WeightedTags,
    /// Mean over the images of an item; then the mean of the items.
    MeanOfItems,
    /// Mean over everything counted in all images, such as all words.
    Pooled,
    /// The listed parts, each pooled over all images; then their plain mean.
    MeanOfParts,
}

/// The headline number.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Aggregation {
    /// Formula.
    pub formula: Formula,
    /// Part of the verdict that is aggregated; of `mean_of_parts`, the one shown by tag.
    pub part: String,
    /// Parts of `mean_of_parts`; those that no image has are left out.
    #[serde(default)]
    pub parts: Vec<String>,
    /// Factor from 0..1 to the unit.
    #[serde(default = "one")]
    pub scale: f64,
    /// Added after the factor.
    #[serde(default)]
    pub offset: f64,
}

/// Settings of the release's generation script.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// Guidance weight.
    pub guidance: f64,
    /// Sampler steps.
    pub steps: usize,
    /// Image height in pixels.
    pub height: usize,
    /// Image width in pixels.
    pub width: usize,
    /// Images drawn for each prompt.
    pub images_drawn: usize,
    /// Images kept for each prompt.
    pub images_kept: usize,
    /// Prompts in a batch.
    pub batch: usize,
    /// Negative text, verbatim.
    pub negative: String,
}

/// A category.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tag {
    /// Official name.
    pub name: String,
    /// Items in the official set; 0 if not known.
    #[serde(default)]
    pub items: usize,
    /// Weight in `weighted_tags`.
    #[serde(default = "one")]
    pub weight: f64,
}

/// Where the official scorer looks for the files.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Path template of an image: fields `row`, `item`, `tag` and `copy`, with an optional width such as `{copy:04}`.
    pub image: String,
    /// Path templates of files that go with an image.
    #[serde(default)]
    pub companions: Vec<String>,
    /// Images per side when the copies of an item form one picture; 0 when each is a file.
    #[serde(default)]
    pub grid: usize,
}

/// An image shown to a judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shown {
    /// Source image of an edit.
    Source,
    /// Generated image.
    Result,
}

/// How a chat judge's answer is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerFormat {
    /// One word.
    YesNo,
    /// A list of numbers: after `<score>` or `"score":`.
    ScoreList,
    /// Lines `criterion: n`.
    Lines,
    /// `Final Score: n`.
    FinalScore,
}

/// One call of a chat judge.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// What the answer rates, in order.
    pub criteria: Vec<String>,
    /// Weights of the criteria in the part `rating`; without them the calls are combined as GEdit's.
    #[serde(default)]
    pub weights: Vec<f64>,
    /// Worst number.
    #[serde(default)]
    pub low: i64,
    /// Best number.
    #[serde(default = "best")]
    pub high: i64,
    /// How the answer is read.
    pub reads: AnswerFormat,
    /// Images shown, in order.
    pub shows: Vec<Shown>,
    /// System line; empty for none.
    #[serde(default)]
    pub system: String,
    /// Text with `{prompt}`, `{question}` and `{explanation}`.
    pub question: String,
}

/// A published number.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// Whose.
    pub name: String,
    /// Part it belongs to; empty for the headline number.
    #[serde(default)]
    pub part: String,
    /// In the benchmark's unit.
    pub value: f64,
    /// Remark.
    #[serde(default)]
    pub note: String,
}

/// A benchmark.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Benchmark {
    /// Name in settings and files.
    pub name: String,
    /// Name for people.
    pub title: String,
    /// Unit of the headline number.
    pub unit: String,
    /// How images are looked at.
    pub form: ScoringForm,
    /// Suite of the shapes world that stands for it.
    pub shapes_suite: ShapesSuite,
    /// What a reader of its numbers should know.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Generation settings of the release.
    pub generation: Generation,
    /// Headline number.
    pub aggregation: Aggregation,
    /// Official layout.
    pub layout: Layout,
    /// Calls of a chat judge; none when images are detected.
    #[serde(default, rename = "call")]
    pub calls: Vec<Call>,
    /// Categories.
    #[serde(default, rename = "tag")]
    pub tags: Vec<Tag>,
    /// Published numbers.
    #[serde(default)]
    pub published: Vec<Published>,
}

fn one() -> f64 {
    1.0
}

fn best() -> i64 {
    1
}

impl Benchmark {
    /// Returns the names of all benchmarks, in the order of the paper's tables.
    pub fn names() -> [&'static str; 10] {
        BENCHMARKS.map(|(name, _)| name)
    }

    /// Returns a benchmark by name.
    ///
    /// # Errors
    /// When no benchmark has this name.
    pub fn load(name: &str) -> Result<Self, BenchmarkError> {
        let text = BENCHMARKS.iter().find(|(known, _)| *known == name).map(|(_, text)| *text);
        let text = text.ok_or_else(|| BenchmarkError::Unknown { name: name.to_owned() })?;
        toml::from_str(text).map_err(|source| BenchmarkError::File { name: name.to_owned(), source })
    }

    /// Returns where the official scorer looks for an image, and for the files that go with it.
    ///
    /// # Errors
    /// When a template names an unknown field.
    pub fn paths(&self, place: &Place<'_>) -> Result<Vec<String>, BenchmarkError> {
        [&self.layout.image].into_iter().chain(&self.layout.companions).map(|t| place.expand(t)).collect()
    }

    /// Returns the weight of a tag in `weighted_tags`.
    pub fn tag_weight(&self, tag: &str) -> f64 {
        self.tags.iter().find(|known| known.name == tag).map_or(1.0, |known| known.weight)
    }
}

/// What an official path depends on.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Index of the item in the official file.
    pub row: usize,
    /// Identity of the item.
    pub item: &'a str,
    /// Tag.
    pub tag: &'a str,
    /// Index of the image among the item's.
    pub copy: usize,
}

impl Place<'_> {
    fn expand(&self, template: &str) -> Result<String, BenchmarkError> {
        let mut path = String::new();
        let mut rest = template;
        while let Some((before, tail)) = rest.split_once('{') {
            let (field, after) = tail.split_once('}').unwrap_or((tail, ""));
            let (name, width) = field.split_once(':').unwrap_or((field, "0"));
            let width = width.parse::<usize>().unwrap_or(0);
            path.push_str(before);
            path.push_str(&match name {
                "row" => format!("{:0width$}", self.row),
                "copy" => format!("{:0width$}", self.copy),
                "item" => self.item.to_owned(),
                "tag" => self.tag.to_owned(),
                _ => {
                    return Err(BenchmarkError::Field { template: template.to_owned(), field: name.to_owned() });
                }
            });
            rest = after;
        }
        path.push_str(rest);
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_parses_under_its_name_and_holds_both_published_columns() {
        for name in Benchmark::names() {
            let benchmark = Benchmark::load(name).unwrap_or_else(|error| panic!("{name}: {error:?}"));
            assert_eq!(benchmark.name, name);
            let headline: Vec<_> = benchmark.published.iter().filter(|p| p.part.is_empty()).collect();
            assert_eq!(headline.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["DeepGen SFT", "DeepGen RL"]);
            assert_eq!(benchmark.calls.is_empty(), benchmark.form == ScoringForm::Detections, "{name}");
            for call in &benchmark.calls {
                assert!(call.low < call.high, "{name}");
                assert!(call.weights.is_empty() || call.weights.len() == call.criteria.len(), "{name}");
            }
        }
    }

    #[test]
    fn sizes_and_weights_are_the_official_ones() {
        let total = |name: &str| Benchmark::load(name).unwrap().tags.iter().map(|t| t.items).sum::<usize>();
        assert_eq!(total("geneval"), 553);
        assert_eq!(total("wise"), 1000);
        assert_eq!(total("corebench"), 1080);
        assert_eq!(total("imgedit"), 737);
        assert_eq!(total("rise"), 360);
        let wise = Benchmark::load("wise").unwrap();
        assert!((wise.tags.iter().map(|t| t.weight).sum::<f64>() - 1.0).abs() < 1e-9);
        assert_eq!(Benchmark::load("dpg").unwrap().generation.guidance, 7.5);
        assert_eq!(Benchmark::load("gedit").unwrap().tags.len(), 11);
    }

    #[test]
    fn edits_carry_the_negative_text_and_prompts_do_not() {
        for name in Benchmark::names() {
            let generation = Benchmark::load(name).unwrap().generation;
            let is_edit = ["gedit", "imgedit", "rise", "uniredit"].contains(&name);
            assert_eq!(generation.negative.ends_with("unfinished, unedited areas."), is_edit, "{name}");
            assert_eq!(generation.batch, if is_edit { 4 } else { 16 }, "{name}");
        }
    }

    #[test]
    fn paths_are_the_official_ones() {
        let place = Place { row: 7, item: "42", tag: "color_alter", copy: 3 };
        let paths = |name: &str| Benchmark::load(name).unwrap().paths(&place).unwrap();
        assert_eq!(paths("geneval"), ["00007/samples/0003.png", "00007/metadata.jsonl"]);
        assert_eq!(paths("unigenbench"), ["42_3.png"]);
        assert_eq!(paths("gedit"), ["fullset/color_alter/en/42.png", "fullset/color_alter/en/42_SRCIMG.png"]);
        let error = place.expand("{name}.png").unwrap_err().to_string();
        assert!(error.contains("`name`"), "{error}");
    }

    #[test]
    fn an_unknown_name_is_told_the_known_ones() {
        let error = Benchmark::load("genevel").unwrap_err().to_string();
        assert!(error.contains("`genevel`") && error.contains("geneval, dpg"), "{error}");
    }

    /// The reference table that reports show, and the benchmark files, come from the same page.
    #[test]
    fn the_reference_table_agrees_with_the_benchmark_files() {
        let text = include_str!("../../../experiments/reference/deepgen.toml");
        let table: toml::Table = toml::from_str(text).unwrap();
        for (row, name) in table["row"].as_array().unwrap().iter().zip(["DeepGen SFT", "DeepGen RL"]) {
            for benchmark in Benchmark::names() {
                let benchmark = Benchmark::load(benchmark).unwrap();
                for published in benchmark.published.iter().filter(|published| published.name == name) {
                    let part = if published.part.is_empty() { "overall" } else { &published.part };
                    let key = format!("{}.{part}", benchmark.name);
                    assert_eq!(row["values"][&key].as_float(), Some(published.value), "{name} {key}");
                }
            }
        }
        for ablation in table["ablation"].as_array().unwrap() {
            let width = ablation["metrics"].as_array().unwrap().len();
            let rows = ablation["row"].as_array().unwrap();
            assert!(rows.len() == 4 && rows.iter().all(|row| row["values"].as_array().unwrap().len() == width));
        }
    }
}
