//! The rewards: text rendering, alignment with the prompt, pairwise preference, size as JPEG.
//!
//! `ocr` is the release's reward with another reader. `objects` stands for `clip_sim`, and `pairwise` for
//! `unifiedreward_think`: with a chat judge it is that reward; with the rule comparator it is its form in the
//! shapes world (docs/spec/rewards.md sections 3 to 5).

use std::ops::Range;
use std::sync::Arc;

use deepgen_contract::shapes::Expectation;
use image::RgbImage;

use crate::http::jpeg;
use crate::judge::{Answer, Judge, JudgeError, Question};
use crate::reading::{Reader, TextReader};
use crate::reward::{Reward, RewardError, RewardPrompt, check_paired, win_rates};
use crate::rule::conclude;
use crate::text::TextScoring;

/// Answer key: what a right image for the prompt of a key shows.
pub type AnswerKey = Arc<dyn Fn(&str) -> Option<Expectation> + Send + Sync>;

const JPEG_QUALITY: u8 = 95;
/// Two images are a draw when their standing differs by less than this.
const DRAW_MARGIN: f32 = 0.01;
/// Weight of the fit of the masks against the graded score of the prompt: it tells images apart that obey alike.
const QUALITY_WEIGHT: f32 = 0.2;

/// Returns how well an image shows what `expectation` asks, from 0 to 1 and continuous in the pixels: mostly which of the
/// things asked for are there, and for the rest how cleanly they are drawn.
fn standing(expectation: &Expectation, reader: &Reader, image: &RgbImage) -> f32 {
    let found = reader.read(image);
    let verdict = conclude(expectation, &found, None);
    (1.0 - QUALITY_WEIGHT) * verdict.graded + QUALITY_WEIGHT * found.quality()
}

/// How much of the quoted text an image renders.
#[derive(Debug)]
pub struct OcrReward<R> {
    reader: R,
    scoring: TextScoring,
}

impl<R: TextReader> OcrReward<R> {
    /// Returns the reward over `reader`, with the release's knobs.
    pub fn new(reader: R) -> Self {
        Self { reader, scoring: TextScoring::default() }
    }
}

impl<R: TextReader> Reward for OcrReward<R> {
    fn name(&self) -> &'static str {
        "ocr"
    }

    fn score(&self, prompts: &[RewardPrompt], images: &[RgbImage]) -> Result<Vec<f32>, RewardError> {
        check_paired(prompts, images)?;
        let pairs = prompts.iter().zip(images);
        Ok(pairs.map(|(prompt, image)| self.scoring.reward(&prompt.text, &self.reader.lines(image))).collect())
    }
}

/// How well an image agrees with its prompt. Like the similarity of two CLIP embeddings it is continuous: images of a
/// group are never all alike under it.
pub struct ObjectsReward {
    reader: Reader,
    answers: AnswerKey,
}

impl ObjectsReward {
    /// Returns the reward with the given answer key.
    pub fn new(reader: Reader, answers: AnswerKey) -> Self {
        Self { reader, answers }
    }
}

impl Reward for ObjectsReward {
    fn name(&self) -> &'static str {
        "objects"
    }

    fn score(&self, prompts: &[RewardPrompt], images: &[RgbImage]) -> Result<Vec<f32>, RewardError> {
        check_paired(prompts, images)?;
        let score = |(prompt, image): (&RewardPrompt, &RgbImage)| {
            let expectation = expectation(&self.answers, self.name(), prompt)?;
            Ok(standing(&expectation, &self.reader, image))
        };
        prompts.iter().zip(images).map(score).collect()
    }
}

/// Says which of two images is better for a prompt.
pub trait Comparator: Send + Sync {
    /// Returns whether the first of each pair `i < j` of `images` is better; nothing where neither is.
    ///
    /// # Errors
    /// When the images cannot be looked at.
    fn compare(&self, prompt: &RewardPrompt, images: &[RgbImage]) -> Result<Vec<Option<bool>>, RewardError>;
}

/// Share of the comparisons within its group that an image wins.
#[derive(Debug)]
pub struct PairwiseReward<C> {
    comparator: C,
}

impl<C: Comparator> PairwiseReward<C> {
    /// Returns the reward by `comparator`.
    pub fn new(comparator: C) -> Self {
        Self { comparator }
    }
}

impl<C: Comparator> Reward for PairwiseReward<C> {
    fn name(&self) -> &'static str {
        "pairwise"
    }

    fn score(&self, prompts: &[RewardPrompt], images: &[RgbImage]) -> Result<Vec<f32>, RewardError> {
        check_paired(prompts, images)?;
        let mut scores = Vec::with_capacity(images.len());
        for group in groups(prompts) {
            let images = &images[group.clone()];
            if images.len() < 2 {
                scores.extend(win_rates(images.len(), |_, _| None));
                continue;
            }
            let mut outcomes = self.comparator.compare(&prompts[group.start], images)?.into_iter();
            scores.extend(win_rates(images.len(), |_, _| outcomes.next().flatten()));
        }
        Ok(scores)
    }
}

/// Returns the runs of images of one group.
fn groups(prompts: &[RewardPrompt]) -> Vec<Range<usize>> {
    let mut start = 0;
    let runs = prompts.chunk_by(|a, b| a.group == b.group).map(|run| {
        start += run.len();
        start - run.len()..start
    });
    runs.collect()
}

/// Returns the pairs `i < j` in the order in which they are compared.
fn pairs(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).flat_map(move |i| (i + 1..count).map(move |j| (i, j)))
}

/// Compares by rule: the graded score, and the fit of the masks.
pub struct RuleComparator {
    reader: Reader,
    answers: AnswerKey,
}

impl RuleComparator {
    /// Returns the comparator with the given answer key.
    pub fn new(reader: Reader, answers: AnswerKey) -> Self {
        Self { reader, answers }
    }
}

impl Comparator for RuleComparator {
    fn compare(&self, prompt: &RewardPrompt, images: &[RgbImage]) -> Result<Vec<Option<bool>>, RewardError> {
        let expectation = expectation(&self.answers, "pairwise", prompt)?;
        let standings: Vec<f32> = images.iter().map(|image| standing(&expectation, &self.reader, image)).collect();
        let better = |(i, j): (usize, usize)| {
            let lead = standings[i] - standings[j];
            (lead.abs() >= DRAW_MARGIN).then_some(lead > 0.0)
        };
        Ok(pairs(images.len()).map(better).collect())
    }
}

/// Compares by asking a chat judge about each pair once, the first image first. A question without an answer is a
/// draw, as in the release.
pub struct ChatComparator<J> {
    judge: J,
}

impl<J: Judge> ChatComparator<J> {
    /// Returns the comparator that asks `judge`.
    pub fn new(judge: J) -> Self {
        Self { judge }
    }
}

impl<J: Judge> Comparator for ChatComparator<J> {
    fn compare(&self, prompt: &RewardPrompt, images: &[RgbImage]) -> Result<Vec<Option<bool>>, RewardError> {
        let images: Vec<Arc<RgbImage>> = images.iter().cloned().map(Arc::new).collect();
        let ask = |(i, j): (usize, usize)| {
            let question = Question {
                system: String::new(),
                text: preference_question(&prompt.text),
                images: vec![images[i].clone(), images[j].clone()],
                expectation: None,
            };
            match self.judge.ask(&question) {
                Ok(Answer::Text(text)) => Ok(read_preference(&text)),
                Ok(Answer::Verdict(_)) | Err(JudgeError::NoAnswer { .. }) => Ok(None),
                Err(source) => Err(RewardError::Judge { reward: "pairwise", source }),
            }
        };
        pairs(images.len()).map(ask).collect()
    }
}

/// Returns the release's question about two images.
fn preference_question(prompt: &str) -> String {
    format!("Compare these two images based on the prompt: {prompt}. Which image is better?")
}

/// Returns whether the first image was called better; nothing if the answer says neither.
fn read_preference(text: &str) -> Option<bool> {
    let answer = text.split_once("<answer>")?.1.split_once("</answer>")?.0;
    if answer.contains("Image 1 is better") {
        return Some(true);
    }
    answer.contains("Image 2 is better").then_some(false)
}

/// Minus the size as JPEG of quality 95, in units of 500 000 bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct JpegCompressibility;

impl Reward for JpegCompressibility {
    fn name(&self) -> &'static str {
        "jpeg_compressibility"
    }

    fn score(&self, prompts: &[RewardPrompt], images: &[RgbImage]) -> Result<Vec<f32>, RewardError> {
        check_paired(prompts, images)?;
        let size = |image: &RgbImage| {
            let bytes = jpeg(image, JPEG_QUALITY).map_err(JudgeError::Encode);
            let bytes = bytes.map_err(|source| RewardError::Judge { reward: self.name(), source })?;
            Ok(-(bytes.len() as f32 / 1000.0) / 500.0)
        };
        images.iter().map(size).collect()
    }
}

fn expectation(answers: &AnswerKey, reward: &'static str, prompt: &RewardPrompt) -> Result<Expectation, RewardError> {
    answers(&prompt.key).ok_or_else(|| RewardError::NoExpectation { reward, key: prompt.key.clone() })
}

#[cfg(test)]
mod tests {
    use deepgen_contract::shapes::{Background, Clause, Colour, Object, Scene, Shape, ShapesWorld, Word};
    use image::Rgb;

    use super::*;

    fn paint(shape: Shape, colour: Colour, word: &str) -> RgbImage {
        let scene = Scene {
            objects: vec![Object { shape, colour, row: 1, col: 0 }],
            word: Some(Word { text: word.into(), row: 0 }),
            background: Background::Black,
        };
        RgbImage::from_raw(32, 32, ShapesWorld::default().paint(&scene)).unwrap()
    }

    fn reader() -> Reader {
        Reader::new(&ShapesWorld::default()).unwrap()
    }

    fn prompt(key: &str, group: usize) -> RewardPrompt {
        RewardPrompt { key: key.into(), text: r#"the word "go" above a red circle"#.into(), group }
    }

    fn red_circle() -> AnswerKey {
        Arc::new(|key| {
            let clause = Clause { colour: Some(Colour::Red), ..Clause::one(Shape::Circle) };
            (key == "a").then(|| Expectation { include: vec![clause], ..Expectation::default() })
        })
    }

    #[test]
    fn text_is_read_from_the_pixels() {
        let images = [paint(Shape::Circle, Colour::Red, "go"), paint(Shape::Circle, Colour::Red, "no")];
        let scores = OcrReward::new(reader()).score(&[prompt("a", 0), prompt("a", 0)], &images).unwrap();
        assert_eq!(scores, [1.0, 0.5]);
    }

    #[test]
    fn better_images_get_more_and_win() {
        let images = [
            paint(Shape::Circle, Colour::Red, "go"),
            paint(Shape::Square, Colour::Blue, "go"),
            paint(Shape::Circle, Colour::Green, "go"),
            paint(Shape::Circle, Colour::Red, "go"),
        ];
        let prompts = [prompt("a", 0), prompt("a", 0), prompt("a", 0), prompt("a", 1)];
        let objects = ObjectsReward::new(reader(), red_circle()).score(&prompts, &images).unwrap();
        assert!(objects[0] > 0.95, "{objects:?}");
        assert!(objects[0] > objects[2] && objects[2] > objects[1], "{objects:?}");
        let comparator = RuleComparator::new(reader(), red_circle());
        let wins = PairwiseReward::new(comparator).score(&prompts, &images).unwrap();
        assert_eq!(wins, [1.0, 0.0, 0.5, 0.5]);
    }

    #[test]
    fn a_missing_answer_key_and_an_unpaired_batch_are_errors() {
        let images = [paint(Shape::Circle, Colour::Red, "go")];
        let reward = ObjectsReward::new(reader(), red_circle());
        let error = reward.score(&[prompt("b", 0)], &images).unwrap_err().to_string();
        assert!(error.contains("`objects`") && error.contains("`b`"), "{error}");
        assert!(reward.score(&[], &images).is_err());
    }

    struct Says(&'static str);

    impl Judge for Says {
        fn identity(&self) -> String {
            "says".into()
        }

        fn ask(&self, question: &Question) -> Result<Answer, JudgeError> {
            assert!(question.text.ends_with("above a red circle. Which image is better?"), "{}", question.text);
            Ok(Answer::Text(self.0.into()))
        }
    }

    #[test]
    fn a_chat_judge_is_read_between_the_answer_tags() {
        let image = || paint(Shape::Circle, Colour::Red, "go");
        let score = |answer| {
            let reward = PairwiseReward::new(ChatComparator::new(Says(answer)));
            reward.score(&[prompt("a", 0), prompt("a", 0)], &[image(), image()]).unwrap()
        };
        assert_eq!(score("Image 2 is better <answer>\nImage 1 is better\n</answer>"), [1.0, 0.0]);
        assert_eq!(score("<answer>Image 2 is better</answer>"), [0.0, 1.0]);
        assert_eq!(score("Image 1 is better"), [0.5, 0.5]);
    }

    #[test]
    fn flat_images_compress_best() {
        let flat = RgbImage::from_pixel(32, 32, Rgb([9; 3]));
        let busy = RgbImage::from_fn(32, 32, |x, y| Rgb([(x * 97 + y * 57) as u8, (x * y * 31) as u8, (x * 11) as u8]));
        let scores = JpegCompressibility.score(&[prompt("a", 0), prompt("a", 0)], &[flat, busy]).unwrap();
        assert!(scores[0] > scores[1] && scores[0] < 0.0, "{scores:?}");
    }
}
