//! Settings of the sources made from the shapes world, and the items of its benchmarks.
//!
//! Knows which kinds of prompt exist and where each belongs, not how one is worded.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::expectation::Expectation;
use super::scene::{Scene, ShapesWorld};

/// A kind of prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum PromptKind {
    /// `a circle`
    Single,
    /// `a red circle`
    Colour,
    /// `a circle and a square`
    Two,
    /// `a red circle and a blue square`
    Attr,
    /// `three red squares`, `two circles`
    Count,
    /// `a red circle left of a blue square`
    Position,
    /// `a red circle at the top left`
    Where,
    /// Every object with its place, and the word: `a red circle at the top left and a blue square at the bottom left`
    Describe,
    /// `the word "go"`
    Text,
    /// `the word "go" at the top`
    TextWhere,
    /// `the word "go" above a red circle`
    TextObject,
    /// `a shape with three sides in the colour of the sky`
    ImplicitObject,
    /// `as many squares as a triangle has sides`
    ImplicitCount,
    /// `make the circle blue`, `change the red circle to blue`
    Recolour,
    /// `add a red circle at the top left`
    Add,
    /// `remove the square`
    Remove,
    /// `replace the circle with a square`
    Replace,
    /// `change the word to "hi"`
    ChangeWord,
    /// `make the object with four sides the colour of grass`
    ReasonRecolour,
    /// `remove the object with no corners`
    ReasonRemove,
    /// `what colour is the circle? red`
    AskColour,
    /// `how many squares? two`
    AskCount,
    /// `is there a triangle? yes`
    AskPresence,
    /// `what does the word say? go`
    AskWord,
}

impl PromptKind {
    /// Every kind, in order.
    pub const ALL: [Self; 24] = [
        Self::Single,
        Self::Colour,
        Self::Two,
        Self::Attr,
        Self::Count,
        Self::Position,
        Self::Where,
        Self::Describe,
        Self::Text,
        Self::TextWhere,
        Self::TextObject,
        Self::ImplicitObject,
        Self::ImplicitCount,
        Self::Recolour,
        Self::Add,
        Self::Remove,
        Self::Replace,
        Self::ChangeWord,
        Self::ReasonRecolour,
        Self::ReasonRemove,
        Self::AskColour,
        Self::AskCount,
        Self::AskPresence,
        Self::AskWord,
    ];

    /// Returns the tag or task type under which benchmarks report it: GenEval's and GEdit's own names where they
    /// have one.
    pub fn tag(self) -> &'static str {
        match self {
            Self::Single => "single_object",
            Self::Colour => "colors",
            Self::Two => "two_object",
            Self::Attr => "color_attr",
            Self::Count => "counting",
            Self::Position => "position",
            Self::Where => "where",
            Self::Describe => "describe",
            Self::Text => "text",
            Self::TextWhere => "text_where",
            Self::TextObject => "text_object",
            Self::ImplicitObject => "implicit_object",
            Self::ImplicitCount => "implicit_count",
            Self::Recolour => "color_alter",
            Self::Add => "subject-add",
            Self::Remove => "subject-remove",
            Self::Replace => "subject-replace",
            Self::ChangeWord => "text_change",
            Self::ReasonRecolour => "reason_recolour",
            Self::ReasonRemove => "reason_remove",
            Self::AskColour => "ask_colour",
            Self::AskCount => "ask_count",
            Self::AskPresence => "ask_presence",
            Self::AskWord => "ask_word",
        }
    }

    /// Returns whether it changes a source image.
    pub fn is_edit(self) -> bool {
        SourceKind::Edits.kinds().contains(&self) || SourceKind::UnireasonEdits.kinds().contains(&self)
    }

    /// Returns whether one in five of its prompts is kept out of every training source for the benchmarks.
    ///
    /// `single`, `colour`, `where`, `text` and `text_where` have too few distinct captions to spare any, and
    /// `describe` and the questions are in no benchmark.
    pub fn has_held_out(self) -> bool {
        matches!(
            self,
            Self::Two
                | Self::Attr
                | Self::Count
                | Self::Position
                | Self::TextObject
                | Self::ImplicitObject
                | Self::ImplicitCount
        ) || self.is_edit()
    }
}

/// Relative frequency of each kind of prompt; a kind that is not named is never drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct KindWeights(pub BTreeMap<PromptKind, f64>);

impl Default for KindWeights {
    /// Every kind equally often.
    fn default() -> Self {
        Self(PromptKind::ALL.into_iter().map(|kind| (kind, 1.0)).collect())
    }
}

impl KindWeights {
    /// Returns the positive weights among `kinds`, in their order.
    pub fn among(&self, kinds: &[PromptKind]) -> Vec<(PromptKind, f64)> {
        let weight = |kind: &PromptKind| self.0.get(kind).copied().filter(|&weight| weight > 0.0);
        kinds.iter().filter_map(|kind| Some((*kind, weight(kind)?))).collect()
    }
}

/// What a source teaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// Scenes with captions of objects.
    Captions,
    /// Scenes with captions of words.
    Text,
    /// Source and target scenes with an instruction.
    Edits,
    /// Scenes with captions that must be thought through.
    UnireasonT2i,
    /// Edits whose instruction must be thought through.
    UnireasonEdits,
    /// Scenes with a question and its answer.
    Qa,
    /// Prompts about objects, without images.
    RlGeneral,
    /// Prompts that put words in double quotes, without images.
    RlText,
}

impl SourceKind {
    /// Returns the kinds of prompt that belong to it.
    pub fn kinds(self) -> &'static [PromptKind] {
        use PromptKind::*;
        match self {
            Self::Captions => &[Single, Colour, Two, Attr, Count, Position, Where, Describe],
            Self::Text | Self::RlText => &[Text, TextWhere, TextObject],
            Self::Edits => &[Recolour, Add, Remove, Replace, ChangeWord],
            Self::UnireasonT2i => &[ImplicitObject, ImplicitCount],
            Self::UnireasonEdits => &[ReasonRecolour, ReasonRemove],
            Self::Qa => &[AskColour, AskCount, AskPresence, AskWord],
            Self::RlGeneral => &[Single, Colour, Two, Attr, Count, Position, Where],
        }
    }

    /// Returns the formats it can be written in.
    pub fn formats(self) -> &'static [SourceFormat] {
        match self {
            Self::Captions | Self::Text => &[SourceFormat::Tar, SourceFormat::CaptionList, SourceFormat::Blip3o],
            // As prompts they are the reasoning prompts of stage 3.
            Self::UnireasonT2i => {
                &[SourceFormat::Tar, SourceFormat::CaptionList, SourceFormat::Blip3o, SourceFormat::Prompts]
            }
            Self::Edits | Self::UnireasonEdits => &[SourceFormat::EditList],
            Self::Qa => &[SourceFormat::QaList],
            Self::RlGeneral | Self::RlText => &[SourceFormat::Prompts],
        }
    }
}

/// How a source lies on disk (docs/spec/data.md section 2, and webdataset shards).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum SourceFormat {
    /// Webdataset shards `00000.tar` of `{key}.png` and `{key}.json` with `caption`.
    Tar,
    /// `data.json` of `{image, annotation}`; each annotation is a JSON file with `caption`.
    CaptionList,
    /// `data.json` of `{type, txt, image, image_path}`.
    Blip3o,
    /// `data.json` of `{input_image: [..], output_image, instruction}`.
    EditList,
    /// `data.json` of `{image, question, answer}`.
    QaList,
    /// `prompts.txt`, `prompts.jsonl` and, apart from them, `answers.jsonl`.
    Prompts,
}

/// A source to make from the shapes world.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ShapesSource {
    /// What it teaches.
    pub kind: SourceKind,
    /// How it lies on disk.
    pub format: SourceFormat,
    /// Samples to make; prompt sets hold distinct prompts and stop early when there are no more.
    pub count: usize,
    /// World that the scenes are from.
    #[serde(default)]
    pub world: ShapesWorld,
    /// How often each kind of prompt is drawn; kinds that do not belong to the source are ignored.
    #[serde(default)]
    pub weights: KindWeights,
}

impl ShapesSource {
    /// Checks the settings against each other.
    ///
    /// # Errors
    /// Names the first setting that is wrong.
    pub fn validate(&self) -> Result<(), String> {
        self.world.validate()?;
        if self.count == 0 {
            return Err("`count` must be at least 1".to_owned());
        }
        let formats = self.kind.formats();
        if !formats.contains(&self.format) {
            return Err(format!(
                "a source of kind {:?} is written as one of {formats:?}, not {:?}",
                self.kind, self.format
            ));
        }
        if let Some((kind, weight)) = self.weights.0.iter().find(|(_, weight)| !weight.is_finite() || **weight < 0.0) {
            return Err(format!("the weight of {kind:?} must be a number of at least 0, not {weight}"));
        }
        if self.weights.among(self.kind.kinds()).is_empty() {
            return Err(format!("one of the weights of {:?} must be above 0", self.kind.kinds()));
        }
        Ok(())
    }
}

/// A benchmark of the shapes world, named after the one whose place it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ShapesSuite {
    /// Objects, counts, colours, positions.
    Geneval,
    /// Words.
    Cvtg,
    /// Edits.
    Gedit,
    /// Captions that must be thought through.
    Unireason,
    /// Edits whose instruction must be thought through.
    UnireasonEdit,
}

impl ShapesSuite {
    /// Every suite, in order.
    pub const ALL: [Self; 5] = [Self::Geneval, Self::Cvtg, Self::Gedit, Self::Unireason, Self::UnireasonEdit];

    /// Returns the name used in settings and item ids.
    pub fn name(self) -> &'static str {
        match self {
            Self::Geneval => "geneval",
            Self::Cvtg => "cvtg",
            Self::Gedit => "gedit",
            Self::Unireason => "unireason",
            Self::UnireasonEdit => "unireason_edit",
        }
    }

    /// Returns the kinds of prompt that it asks, each as often as the others.
    pub fn kinds(self) -> &'static [PromptKind] {
        use PromptKind::*;
        match self {
            Self::Geneval => &[Single, Two, Count, Colour, Position, Attr],
            Self::Cvtg => SourceKind::Text.kinds(),
            Self::Gedit => SourceKind::Edits.kinds(),
            Self::Unireason => SourceKind::UnireasonT2i.kinds(),
            Self::UnireasonEdit => SourceKind::UnireasonEdits.kinds(),
        }
    }
}

/// One prompt of a benchmark with its answer key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BenchmarkItem {
    /// Unique within the suite, such as `geneval-00012`.
    pub id: String,
    /// What the score is grouped by: [`PromptKind::tag`].
    pub tag: String,
    /// What the model is told.
    pub prompt: String,
    /// What its image must show.
    pub expectation: Expectation,
    /// Scene of the image to edit; none for a generation prompt.
    pub source: Option<Scene>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> ShapesSource {
        serde_json::from_str(r#"{"kind": "captions", "format": "tar", "count": 10}"#).unwrap()
    }

    #[test]
    fn defaults_are_the_default_world_and_every_kind() {
        let source = source();
        source.validate().unwrap();
        assert_eq!(source.world, ShapesWorld::default());
        assert_eq!(source.weights.among(source.kind.kinds()).len(), 8);
        let text = serde_json::to_string(&source).unwrap();
        assert_eq!(serde_json::from_str::<ShapesSource>(&text).unwrap(), source);
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused() {
        let changes: [fn(&mut ShapesSource); 5] = [
            |source| source.count = 0,
            |source| source.format = SourceFormat::EditList,
            |source| source.weights.0 = [(PromptKind::AskWord, 1.0)].into(),
            |source| source.weights.0 = [(PromptKind::Single, f64::NAN)].into(),
            |source| source.world.cells = 5,
        ];
        for change in changes {
            let mut source = source();
            change(&mut source);
            assert!(source.validate().is_err(), "{source:?}");
        }
    }

    #[test]
    fn the_list_of_kinds_is_complete_and_tags_are_distinct() {
        for (i, kind) in PromptKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, i);
            assert!(PromptKind::ALL[..i].iter().all(|other| other.tag() != kind.tag()));
        }
    }
}
