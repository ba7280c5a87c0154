//! What a judge is: it is shown images and a question, and it answers.
//!
//! Knows neither how a judge decides nor how answers become scores. A chat model answers with text; the rule judge
//! answers with a verdict at once. Both kinds of answer are kept as they came, because judges change over time.

use std::sync::Arc;

use deepgen_contract::shapes::Expectation;
use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::verdict::Verdict;

/// One question about one image, or about a source image and its edit.
#[derive(Debug, Clone)]
pub struct Question {
    /// System line of a chat judge; empty for none.
    pub system: String,
    /// Text of the question, which a chat judge gets after the images.
    pub text: String,
    /// Images in the order in which they are shown: of an edit, the source first.
    pub images: Vec<Arc<RgbImage>>,
    /// What a right image shows: the rule judge's question.
    pub expectation: Option<Expectation>,
}

impl Question {
    /// Returns a question by rule: does `image`, made from `source` if it is an edit, show what is expected?
    pub fn by_rule(image: Arc<RgbImage>, source: Option<Arc<RgbImage>>, expectation: Expectation) -> Self {
        let images = source.into_iter().chain([image]).collect();
        Self { system: String::new(), text: String::new(), images, expectation: Some(expectation) }
    }
}

/// What a judge said, unprocessed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "value", rename_all = "snake_case")]
pub enum Answer {
    /// Text of a chat model.
    Text(String),
    /// Finished verdict.
    Verdict(Verdict),
}

/// Why a judge has no answer.
#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    /// The rule judge was asked without an expectation.
    #[error("the rule judge needs to be told what a right image shows: the item has no expectation")]
    NoExpectation,
    /// No image, or more than the judge looks at.
    #[error("the judge looks at {expected}, and {found} came with the question")]
    NumImages {
        /// Images the judge looks at.
        expected: &'static str,
        /// Images that came.
        found: usize,
    },
    /// The benchmark has no questions.
    #[error("benchmark `{benchmark}` is scored by detection: it has no questions for a chat judge")]
    NoQuestions {
        /// Benchmark.
        benchmark: String,
    },
    /// The server gave no usable answer.
    #[error("judge at {url} gave no answer in {attempts} attempts: {last}")]
    NoAnswer {
        /// Address asked.
        url: String,
        /// Attempts made.
        attempts: u32,
        /// What went wrong in the last one.
        last: String,
    },
    /// An image could not be encoded for the judge.
    #[error("image could not be encoded for the judge")]
    Encode(#[from] image::ImageError),
    /// The answer cache could not be read or written.
    #[error("answer cache {path}")]
    Cache {
        /// File or folder.
        path: String,
        /// Cause.
        source: std::io::Error,
    },
}

/// Somebody who answers questions about images.
pub trait Judge: Send + Sync {
    /// Returns what makes this judge's answers its own: kind, model, settings, version. Part of every cache key.
    fn identity(&self) -> String;

    /// Answers one question.
    ///
    /// # Errors
    /// When the question does not suit the judge, or when no answer could be had.
    fn ask(&self, question: &Question) -> Result<Answer, JudgeError>;

    /// Returns whether it is asked [`Question::by_rule`], and answers with a verdict.
    fn is_rule(&self) -> bool {
        false
    }
}

impl<J: Judge + ?Sized> Judge for Box<J> {
    fn identity(&self) -> String {
        (**self).identity()
    }

    fn ask(&self, question: &Question) -> Result<Answer, JudgeError> {
        (**self).ask(question)
    }

    fn is_rule(&self) -> bool {
        (**self).is_rule()
    }
}
