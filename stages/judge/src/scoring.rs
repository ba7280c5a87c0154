//! Asks a judge everything that a benchmark wants to know of an image, and gathers verdict and raw answers.
//!
//! Knows the benchmark's calls and the two kinds of judge; not where images and items come from. A judge that fails
//! to answer leaves an image without a verdict; a judge that cannot be asked at all is an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use deepgen_contract::eval::JudgeSettings;
use deepgen_contract::shapes::Expectation;
use image::RgbImage;

use crate::benchmark::{AnswerFormat, Benchmark, Call, ScoringForm, Shown};
use crate::checklist::{self, CheckItem};
use crate::http::HttpJudge;
use crate::judge::{Answer, Judge, JudgeError, Question};
use crate::rating;
use crate::rule::RuleJudge;
use crate::verdict::Verdict;

/// An image and what its item says of it.
#[derive(Debug, Clone, Default)]
pub struct Subject {
    /// Generated image.
    pub image: Arc<RgbImage>,
    /// Source image of an edit.
    pub source: Option<Arc<RgbImage>>,
    /// Prompt or instruction.
    pub prompt: String,
    /// What the benchmark tells the judge of a right result; empty for nothing.
    pub explanation: String,
    /// Questions of a checklist.
    pub checks: Vec<CheckItem>,
    /// What a right image shows, for the rule judge.
    pub expectation: Option<Expectation>,
}

/// What a judge made of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// Verdict; nothing if answers are missing or unreadable.
    pub verdict: Option<Verdict>,
    /// Raw answers, in the order of the questions; nothing for one that was not answered.
    pub answers: Vec<Option<Answer>>,
}

/// Returns the judge of `settings`; nothing if scoring is left to others.
///
/// # Errors
/// When the world of the rule judge cannot be read.
pub fn judge(settings: &JudgeSettings) -> Result<Option<Box<dyn Judge>>, String> {
    Ok(match settings {
        JudgeSettings::Rule { world } => Some(Box::new(RuleJudge::new(world)?)),
        JudgeSettings::Http { .. } => HttpJudge::from_settings(settings).map(|judge| Box::new(judge) as Box<dyn Judge>),
        JudgeSettings::External => None,
    })
}

/// Returns what `judge` makes of each image, asking about `workers` images at once.
///
/// # Errors
/// The first error of the first image that has one.
pub fn score_all(
    benchmark: &Benchmark,
    judge: &dyn Judge,
    subjects: &[Subject],
    workers: usize,
) -> Result<Vec<Scored>, JudgeError> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((index, subject)) = {
            let index = next.fetch_add(1, Ordering::Relaxed);
            subjects.get(index).map(|subject| (index, subject))
        } {
            done.push((index, score(benchmark, judge, subject)));
        }
        done
    };
    let mut scored: Vec<(usize, Result<Scored, JudgeError>)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers.clamp(1, subjects.len().max(1))).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("scoring does not panic")).collect()
    });
    scored.sort_by_key(|(index, _)| *index);
    scored.into_iter().map(|(_, scored)| scored).collect()
}

/// Returns what `judge` makes of one image.
///
/// # Errors
/// When the judge cannot be asked; that a server gives no answer is no error.
pub fn score(benchmark: &Benchmark, judge: &dyn Judge, subject: &Subject) -> Result<Scored, JudgeError> {
    if judge.is_rule() {
        let expectation = subject.expectation.clone().ok_or(JudgeError::NoExpectation)?;
        let question = Question::by_rule(subject.image.clone(), subject.source.clone(), expectation);
        let answer = judge.ask(&question)?;
        let verdict = match &answer {
            Answer::Verdict(verdict) => Some(verdict.clone()),
            Answer::Text(_) => None,
        };
        return Ok(Scored { verdict, answers: vec![Some(answer)] });
    }
    match benchmark.form {
        ScoringForm::Detections => Err(JudgeError::NoQuestions { benchmark: benchmark.name.clone() }),
        ScoringForm::Checklist => score_checklist(benchmark, judge, subject),
        ScoringForm::Rating => score_rating(benchmark, judge, subject),
    }
}

fn score_checklist(benchmark: &Benchmark, judge: &dyn Judge, subject: &Subject) -> Result<Scored, JudgeError> {
    let Some(call) = benchmark.calls.first() else {
        return Err(JudgeError::NoQuestions { benchmark: benchmark.name.clone() });
    };
    if call.reads == AnswerFormat::ScoreList {
        let list: Vec<&str> = subject.checks.iter().map(|check| check.text.as_str()).collect();
        let answer = ask(judge, call, subject, &list.join("\n"))?;
        let scores = text(&answer).and_then(|text| checklist::read_score_list(text, subject.checks.len()));
        // A score counts only if it is exactly 1.
        let held: Option<Vec<_>> = scores.map(|scores| scores.iter().map(|&score| Some(score == 1.0)).collect());
        let verdict = held.and_then(|held| checklist::conclude(&subject.checks, &held));
        return Ok(Scored { verdict, answers: vec![answer] });
    }
    let answers = subject.checks.iter().map(|check| ask(judge, call, subject, &check.text));
    let answers: Vec<Option<Answer>> = answers.collect::<Result<_, _>>()?;
    let held: Vec<Option<bool>> = answers.iter().map(|answer| checklist::read_yes_no(text(answer)?)).collect();
    Ok(Scored { verdict: checklist::conclude(&subject.checks, &held), answers })
}

fn score_rating(benchmark: &Benchmark, judge: &dyn Judge, subject: &Subject) -> Result<Scored, JudgeError> {
    let answers = benchmark.calls.iter().map(|call| ask(judge, call, subject, ""));
    let answers: Vec<Option<Answer>> = answers.collect::<Result<_, _>>()?;
    let read = |(call, answer): (&Call, &Option<Answer>)| rating::read(call, text(answer)?);
    let numbers: Option<Vec<Vec<f64>>> = benchmark.calls.iter().zip(&answers).map(read).collect();
    let verdict = numbers.and_then(|numbers| rating::conclude(benchmark, &numbers));
    Ok(Scored { verdict, answers })
}

fn text(answer: &Option<Answer>) -> Option<&str> {
    match answer {
        Some(Answer::Text(text)) => Some(text),
        _ => None,
    }
}

fn ask(judge: &dyn Judge, call: &Call, subject: &Subject, check: &str) -> Result<Option<Answer>, JudgeError> {
    let shown = call.shows.iter().filter_map(|shown| match shown {
        Shown::Source => subject.source.clone(),
        Shown::Result => Some(subject.image.clone()),
    });
    let text = call.question.trim();
    let fill = |text: &str| match text {
        "prompt" => Some(subject.prompt.as_str()),
        "explanation" => Some(subject.explanation.as_str()),
        "question" => Some(check),
        _ => None,
    };
    let question =
        Question { system: call.system.clone(), text: fill_in(text, fill), images: shown.collect(), expectation: None };
    match judge.ask(&question) {
        Ok(answer) => Ok(Some(answer)),
        Err(JudgeError::NoAnswer { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces `{field}` for the fields that `value` knows; other braces, as in a JSON example, stay.
fn fill_in<'a>(template: &str, value: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut text = String::new();
    let mut rest = template;
    while let Some(open) = rest.find('{') {
        text.push_str(&rest[..open]);
        let inside = &rest[open + 1..];
        match inside.find('}').and_then(|close| Some((close, value(&inside[..close])?))) {
            Some((close, value)) => {
                text.push_str(value);
                rest = &inside[close + 1..];
            }
            None => {
                text.push('{');
                rest = inside;
            }
        }
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use deepgen_contract::shapes::{Clause, Shape, ShapesWorld};

    use super::*;

    /// A chat judge that answers by what it was asked.
    struct Chat(fn(&Question) -> Option<&'static str>);

    impl Judge for Chat {
        fn identity(&self) -> String {
            "chat".into()
        }

        fn ask(&self, question: &Question) -> Result<Answer, JudgeError> {
            let answer = (self.0)(question).map(|text| Answer::Text(text.into()));
            answer.ok_or(JudgeError::NoAnswer { url: "u".into(), attempts: 1, last: "busy".into() })
        }
    }

    fn subject() -> Subject {
        let image = |side| Arc::new(RgbImage::new(side, side));
        let check = |text: &str, depends_on: &[usize]| CheckItem {
            text: text.into(),
            dimension: "Style".into(),
            depends_on: depends_on.to_vec(),
        };
        Subject {
            image: image(32),
            source: Some(image(16)),
            prompt: "make it {question}".into(),
            explanation: "a cat".into(),
            checks: vec![check("is there a cat?", &[]), check("is it red?", &[0])],
            expectation: Some(Expectation { include: vec![Clause::one(Shape::Circle)], ..Expectation::default() }),
        }
    }

    fn scored(name: &str, answer: fn(&Question) -> Option<&'static str>) -> Scored {
        score(&Benchmark::load(name).unwrap(), &Chat(answer), &subject()).unwrap()
    }

    #[test]
    fn a_checklist_is_asked_question_by_question_or_at_once() {
        let core = scored("corebench", |question| {
            assert_eq!(question.images.len(), 1);
            assert!(question.text.contains("Prompt: \"make it {question}\""), "{}", question.text);
            Some(if question.text.contains("a cat?") { "Yes" } else { "no." })
        });
        assert_eq!(core.verdict.unwrap().part("questions"), Some((0.5, 2.0)));
        assert_eq!(core.answers.len(), 2);
        let all = scored("unigenbench", |question| {
            assert!(question.text.contains("is there a cat?\nis it red?"));
            Some("<score>[1, 1]</score>")
        });
        assert_eq!(all.verdict.unwrap().part("Style"), Some((1.0, 2.0)));
        let unread = scored("unigenbench", |_| Some("<score>[1]</score>"));
        assert_eq!((unread.verdict, unread.answers.len()), (None, 1));
    }

    #[test]
    fn a_rating_asks_every_call_with_its_images() {
        let gedit = scored("gedit", |question| match question.images.len() {
            2 => {
                assert_eq!((question.images[0].width(), question.images[1].width()), (16, 32));
                assert!(question.text.contains(r#"{"score": [success, preservation]"#), "{}", question.text);
                Some(r#"{"score": [4, 9]}"#)
            }
            _ => Some(r#"{"score": [9, 10]}"#),
        });
        let (overall, _) = gedit.verdict.unwrap().part("overall").unwrap();
        assert!((overall - 0.6).abs() < 1e-9, "{overall}");
    }

    #[test]
    fn a_silent_judge_leaves_the_image_without_a_verdict() {
        let wise = scored("wise", |question| {
            assert!(question.text.contains("EXPLANATION: a cat"), "{}", question.text);
            None
        });
        assert_eq!(wise, Scored { verdict: None, answers: vec![None] });
        let error = score(&Benchmark::load("geneval").unwrap(), &Chat(|_| None), &subject()).unwrap_err();
        assert!(error.to_string().contains("`geneval`"), "{error}");
    }

    #[test]
    fn the_rule_judge_serves_every_form_and_order_is_kept() {
        let judge = judge(&JudgeSettings::Rule { world: ShapesWorld::default() }).unwrap().unwrap();
        let black = RgbImage::from_pixel(32, 32, image::Rgb([16, 16, 20]));
        let circle = RgbImage::from_fn(32, 32, |x, y| {
            let is_on = x < 12 && y < 12 && Shape::Circle.covers(x as usize, y as usize, 12);
            if is_on { image::Rgb([230, 40, 40]) } else { image::Rgb([16, 16, 20]) }
        });
        let one = |image: &RgbImage| Subject { image: Arc::new(image.clone()), source: None, ..subject() };
        let subjects: Vec<Subject> = (0..7).map(|i| one(if i % 3 == 0 { &circle } else { &black })).collect();
        for name in Benchmark::names() {
            let benchmark = Benchmark::load(name).unwrap();
            let scored = score_all(&benchmark, &judge, &subjects, 3).unwrap();
            let strict: Vec<bool> = scored.iter().map(|scored| scored.verdict.as_ref().unwrap().strict).collect();
            assert_eq!(strict, [true, false, false, true, false, false, true], "{name}");
        }
        assert!(super::judge(&JudgeSettings::External).unwrap().is_none());
    }
}
