//! What a source gives: a text with images, or a prompt alone.
//!
//! Knows neither files nor tensors.

use image::RgbImage;
use serde::{Deserialize, Serialize};

/// What the model is asked to do with a sample; every batch has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// A caption and its image.
    TextToImage,
    /// An instruction, reference images, and the image that follows from them.
    ImageToImage,
}

/// What a prepared data set holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SetKind {
    /// Samples of [`Task::ImageToImage`].
    Edit,
    /// Samples of [`Task::TextToImage`].
    Generation,
    /// Prompts without images.
    Prompts,
    /// Questions about images, with their answers.
    Questions,
}

impl SetKind {
    /// Returns the task of its samples; prompts and questions have none.
    pub fn task(self) -> Option<Task> {
        match self {
            Self::Edit => Some(Task::ImageToImage),
            Self::Generation => Some(Task::TextToImage),
            Self::Prompts | Self::Questions => None,
        }
    }

    /// Returns the name used in files, tables and streams.
    pub fn name(self) -> &'static str {
        match self {
            Self::Edit => "edit",
            Self::Generation => "generation",
            Self::Prompts => "prompts",
            Self::Questions => "questions",
        }
    }
}

/// A text with its image.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// What the model is asked to do.
    pub task: Task,
    /// Caption or instruction.
    pub text: String,
    /// The image to be made.
    pub image: RgbImage,
    /// Images the instruction is about; none for [`Task::TextToImage`].
    pub references: Vec<RgbImage>,
    /// File and record it came from.
    pub key: String,
}

/// A question about an image, with its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct QuestionSample {
    /// The question.
    pub question: String,
    /// Its answer.
    pub answer: String,
    /// The image it is about.
    pub image: RgbImage,
    /// File and record it came from.
    pub key: String,
}

/// A prompt of a reinforcement-learning set.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptSample {
    /// The prompt.
    pub text: String,
    /// File and record it came from.
    pub key: String,
    /// Place of its set among the mixture's members, which hold its reward weights.
    pub member: usize,
}
