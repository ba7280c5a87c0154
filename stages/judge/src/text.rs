//! Arithmetic on words: edit distance, folding of characters that readers confuse, and the text reward's formula.
//!
//! Knows no image. docs/spec/rewards.md section 5.2 (`new`) is the reference; two of its quirks are kept on purpose:
//! folding acts on lower-case letters only, and extra text costs nothing.

/// Knobs of the text reward; the defaults are the release's.
#[derive(Debug, Clone, PartialEq)]
pub struct TextScoring {
    /// Compare capitals and small letters as different.
    pub is_case_sensitive: bool,
    /// Drop everything outside `[A-Za-z0-9]`, non-Latin letters included.
    pub ignores_punctuation: bool,
    /// Longest run of adjacent tokens that is tried as one word.
    pub ngram_max: usize,
    /// Try each comparison a second time with confusable characters folded.
    pub folds_confusions: bool,
}

impl Default for TextScoring {
    fn default() -> Self {
        Self { is_case_sensitive: true, ignores_punctuation: true, ngram_max: 3, folds_confusions: true }
    }
}

/// Returns the Levenshtein distance with unit costs, counted in characters.
pub fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Returns `1 - distance / longer length`; two empty words are equal.
pub fn similarity(a: &str, b: &str) -> f64 {
    let longest = a.chars().count().max(b.chars().count());
    if longest == 0 {
        return 1.0;
    }
    1.0 - edit_distance(a, b) as f64 / longest as f64
}

/// Returns the non-empty texts between ASCII double quotes, left to right: the matches of `"([^"]+)"`.
pub fn quoted(prompt: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = prompt;
    while let Some(open) = rest.find('"') {
        let inside = &rest[open + 1..];
        match inside.find('"') {
            // `""` does not match: the scan goes on from the second quote, which may open the next text.
            Some(0) => rest = inside,
            Some(close) => {
                found.push(&inside[..close]);
                rest = &inside[close + 1..];
            }
            None => break,
        }
    }
    found
}

impl TextScoring {
    /// Returns the reward of an image of which a reader is more or less sure: pieces below `min_confidence` do not count.
    pub fn reward_of_pieces(&self, prompt: &str, pieces: &[(String, f64)], min_confidence: f64) -> f32 {
        let sure = pieces.iter().filter(|(text, confidence)| *confidence >= min_confidence && !text.is_empty());
        self.reward(prompt, &sure.map(|(text, _)| text.clone()).collect::<Vec<_>>())
    }

    /// Returns the form in which texts are compared.
    pub fn normalise(&self, text: &str) -> String {
        let kept = text.chars().filter(|c| !c.is_whitespace());
        let kept = kept.filter(|c| !self.ignores_punctuation || c.is_ascii_alphanumeric());
        if self.is_case_sensitive { kept.collect() } else { kept.flat_map(char::to_lowercase).collect() }
    }

    /// Returns the texts that a target is compared with: tokens, runs of adjacent tokens, and all tokens joined.
    fn candidates(&self, lines: &[String]) -> Vec<String> {
        let tokens: Vec<String> = lines.iter().map(|line| self.normalise(line)).filter(|t| !t.is_empty()).collect();
        let runs = (2..=self.ngram_max).flat_map(|n| tokens.windows(n).map(|run| run.concat()));
        let mut candidates: Vec<String> = tokens.iter().cloned().chain(runs).chain([tokens.concat()]).collect();
        let mut seen = std::collections::BTreeSet::new();
        candidates.retain(|c| !c.is_empty() && seen.insert(c.clone()));
        candidates
    }

    /// Returns the reward of an image whose text was read as `lines`, in reading order: 0 to 1, 0 without a target.
    pub fn reward(&self, prompt: &str, lines: &[String]) -> f32 {
        let candidates = self.candidates(lines);
        let (mut kept, mut total) = (0.0, 0.0);
        for target in quoted(prompt) {
            let target = self.normalise(target);
            let length = target.chars().count();
            let distances = candidates.iter().map(|candidate| {
                let plain = edit_distance(candidate, &target);
                if self.folds_confusions { plain.min(edit_distance(&fold(candidate), &fold(&target))) } else { plain }
            });
            let distance = distances.min().unwrap_or(length).min(length);
            kept += (length - distance) as f64;
            total += length as f64;
        }
        if total == 0.0 { 0.0 } else { (kept / total) as f32 }
    }
}

/// Returns the reward of the released service's default scorer, which looks at one text only: that between the prompt's
/// first two double quotes, spaces dropped and capitals made small (docs/spec/rewards.md section 5.3).
///
/// Nothing comes back for a prompt without a quoted text: the service fails there, and takes the whole batch with it.
pub fn single_segment_reward(prompt: &str, pieces: &[(String, f64)]) -> Option<f32> {
    let target = prompt.split('"').nth(1)?;
    let plain = |text: &str| text.replace(' ', "").to_lowercase();
    let (target, found) = (plain(target), pieces.iter().filter(|(_, confidence)| *confidence > 0.0));
    let found = plain(&found.map(|(text, _)| text.as_str()).collect::<String>());
    let length = target.chars().count();
    if length == 0 {
        return None;
    }
    let distance = if found.contains(&target) { 0 } else { edit_distance(&found, &target).min(length) };
    Some(1.0 - distance as f32 / length as f32)
}

fn fold(text: &str) -> String {
    let folded = text.chars().map(|c| match c {
        '0' => 'o',
        '1' | 'i' | 'j' => 'l',
        '5' => 's',
        'v' => 'w',
        other => other,
    });
    folded.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reward(prompt: &str, lines: &[&str]) -> f32 {
        let lines: Vec<String> = lines.iter().map(|&line| line.to_owned()).collect();
        TextScoring::default().reward(prompt, &lines)
    }

    /// docs/spec/rewards.md section 8.
    #[test]
    fn the_documented_vectors_hold() {
        let mixed = reward(r#"A sign "OPEN 24h" and "Cafe""#, &["OPEN", "24h", "Cate"]);
        assert!((mixed - 0.909_091).abs() < 1e-6, "{mixed}");
        assert_eq!(reward(r#"the word "VISIT""#, &["WISIT"]), 0.8);
        assert_eq!(reward(r#"the word "visit""#, &["wisit"]), 1.0);
        assert_eq!(reward("\"\u{4f60}\u{597d}\"", &["ni hao"]), 0.0);
    }

    #[test]
    fn prompts_without_targets_and_images_without_text_give_zero() {
        assert_eq!(reward("a red circle", &["go"]), 0.0);
        assert_eq!(reward("'go'", &["go"]), 0.0);
        assert_eq!(reward(r#"the word "go""#, &[]), 0.0);
        assert_eq!(reward(r#"the word "go""#, &["xyz"]), 0.0);
    }

    #[test]
    fn extra_text_costs_nothing_and_one_token_may_serve_two_targets() {
        assert_eq!(reward(r#""go" and "go""#, &["zz", "go"]), 1.0);
        assert_eq!(reward(r#""abcd""#, &["a", "b", "c", "d"]), 1.0);
        assert_eq!(reward(r#""abcd""#, &["x", "a", "b", "c", "d"]), 0.75);
    }

    #[test]
    fn the_single_segment_scorer_accepts_a_substring_and_needs_quotes() {
        let pieces = [("XX".to_owned(), 0.2), ("lost".to_owned(), 0.0)];
        assert_eq!(single_segment_reward(r#"Text "x""#, &pieces), Some(1.0));
        assert_eq!(single_segment_reward(r#"Text "lost""#, &pieces), Some(0.0));
        assert_eq!(single_segment_reward("no text", &pieces), None);
    }

    #[test]
    fn unsure_pieces_do_not_count() {
        let pieces = [("go".to_owned(), 0.4)];
        let scoring = TextScoring::default();
        assert_eq!(scoring.reward_of_pieces(r#""go""#, &pieces, 0.4), 1.0);
        assert_eq!(scoring.reward_of_pieces(r#""go""#, &pieces, 0.5), 0.0);
    }

    #[test]
    fn quotes_pair_up_from_the_left() {
        assert_eq!(quoted(r#"a "b c" d "e" f ""#), ["b c", "e"]);
        assert_eq!(quoted(r#"""a""#), ["a"]);
        assert!(quoted("none").is_empty());
    }

    #[test]
    fn distances_count_unit_edits() {
        for (a, b, expected) in [("", "", 0), ("kitten", "sitting", 3), ("go", "", 2), ("ab", "ba", 2), ("ok", "ok", 0)]
        {
            assert_eq!(edit_distance(a, b), expected, "{a} {b}");
            assert_eq!(edit_distance(b, a), expected, "{b} {a}");
        }
        assert_eq!(similarity("go", "no"), 0.5);
        assert_eq!(similarity("", ""), 1.0);
    }
}
