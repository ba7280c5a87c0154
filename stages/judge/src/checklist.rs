//! Yes-or-no questions about an image: reading the answers, and the verdict they make.
//!
//! Knows no judge. Dependencies follow DPG-Bench: a question counts only if the questions it builds on hold
//! (docs/spec/evaluation.md section 3); unread answers are left out, as in T2I-CoReBench (section 6).

use crate::verdict::Verdict;

/// A question about one image.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckItem {
    /// Question, or test point with its description.
    pub text: String,
    /// Dimension that it tests, such as `Attribute`; empty for none.
    pub dimension: String,
    /// Indices of earlier questions that it builds on.
    pub depends_on: Vec<usize>,
}

/// Returns whether a one-word answer says yes; nothing if it says neither.
pub fn read_yes_no(answer: &str) -> Option<bool> {
    let answer = answer.to_lowercase();
    let mut words = answer.split(|c: char| !c.is_alphanumeric() && c != '_');
    if words.clone().any(|word| word == "yes") {
        return Some(true);
    }
    words.any(|word| word == "no").then_some(false)
}

/// Returns the numbers of the list after `<score>` or `"score":`, if there are `len` of them.
pub fn read_score_list(answer: &str, len: usize) -> Option<Vec<f64>> {
    let at = answer.find("<score>").or_else(|| answer.find("\"score\""))?;
    let list = answer[at..].split_once('[')?.1.split_once(']')?.0;
    let scores: Option<Vec<f64>> = list.split(',').map(|score| score.trim().parse().ok()).collect();
    scores.filter(|scores| scores.len() == len)
}

/// Returns the verdict on an image: the part `questions`, and one part for each dimension. Nothing if no answer was
/// read.
pub fn conclude(items: &[CheckItem], answers: &[Option<bool>]) -> Option<Verdict> {
    let mut held: Vec<Option<bool>> = answers.to_vec();
    held.resize(items.len(), None);
    for (i, item) in items.iter().enumerate() {
        let is_founded = item.depends_on.iter().all(|&parent| held.get(parent).copied().flatten() != Some(false));
        if !is_founded {
            held[i] = Some(false);
        }
    }
    let read = || items.iter().zip(&held).filter_map(|(item, held)| held.map(|held| (item, held)));
    let mean = |dimension: Option<&str>| {
        let of = read().filter(|(item, _)| dimension.is_none_or(|dimension| item.dimension == dimension));
        let (right, total) =
            of.fold((0.0, 0.0), |(right, total), (_, held)| (right + f64::from(u8::from(held)), total + 1.0));
        (right / total, total)
    };
    let (share, total) = mean(None);
    if total == 0.0 {
        return None;
    }
    let mut verdict = Verdict { strict: read().all(|(_, held)| held), graded: share as f32, parts: Vec::new() };
    verdict.push("questions", share, total);
    for (item, _) in read() {
        if !item.dimension.is_empty() && verdict.part(&item.dimension).is_none() {
            let (value, weight) = mean(Some(&item.dimension));
            verdict.push(&item.dimension, value, weight);
        }
    }
    Some(verdict)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(dimension: &str, depends_on: &[usize]) -> CheckItem {
        CheckItem { text: "?".into(), dimension: dimension.into(), depends_on: depends_on.to_vec() }
    }

    #[test]
    fn answers_are_read_by_whole_words() {
        for (answer, expected) in [
            ("yes", Some(true)),
            ("Yes.", Some(true)),
            ("No, it is not", Some(false)),
            ("nothing to see", None),
            ("", None),
            ("yesterday", None),
        ] {
            assert_eq!(read_yes_no(answer), expected, "{answer}");
        }
    }

    #[test]
    fn score_lists_must_have_the_right_length() {
        assert_eq!(read_score_list("<analysis>[a]</analysis><score>[1, 0]</score>", 2), Some(vec![1.0, 0.0]));
        assert_eq!(read_score_list(r#"{"score": [7, 8.5], "reasoning": "x"}"#, 2), Some(vec![7.0, 8.5]));
        assert_eq!(read_score_list("<score>[1]</score>", 2), None);
        assert_eq!(read_score_list("<score>[one, 0]</score>", 2), None);
        assert_eq!(read_score_list("no list", 1), None);
    }

    #[test]
    fn zeros_propagate_to_dependent_questions() {
        let items = [item("entity", &[]), item("attribute", &[0]), item("relation", &[1]), item("entity", &[])];
        let verdict = conclude(&items, &[Some(false), Some(true), Some(true), Some(true)]).unwrap();
        assert_eq!(verdict.part("questions"), Some((0.25, 4.0)));
        assert_eq!(verdict.part("entity"), Some((0.5, 2.0)));
        assert_eq!(verdict.part("relation"), Some((0.0, 1.0)));
        assert!(!verdict.strict);
    }

    #[test]
    fn unread_answers_are_left_out() {
        let items = [item("", &[]), item("", &[]), item("", &[])];
        let verdict = conclude(&items, &[Some(true), None, Some(true)]).unwrap();
        assert_eq!(verdict.part("questions"), Some((1.0, 2.0)));
        assert!(verdict.strict);
        assert_eq!(conclude(&items, &[None, None, None]), None);
    }
}
