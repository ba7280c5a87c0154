//! Overlap of training texts with benchmark prompts: equal after normalisation, or sharing a run of words.
//!
//! Compares lists of texts; knows neither where they come from nor what is done about an overlap.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::{Deserialize, Serialize};

/// Pairs of texts kept as examples of an overlap.
const NUM_EXAMPLES: usize = 5;
/// Longest example, in characters.
const EXAMPLE_CHARS: usize = 200;

/// Prompts of one benchmark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchmarkPrompts {
    /// Name of the benchmark.
    pub name: String,
    /// Its prompts.
    pub prompts: Vec<String>,
}

/// Overlap of one training set with one benchmark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overlap {
    /// The training set.
    pub member: String,
    /// The benchmark.
    pub benchmark: String,
    /// Texts of the set.
    pub num_texts: u64,
    /// Texts equal to a prompt.
    pub num_equal: u64,
    /// Texts that share a run of words with a prompt and equal none.
    pub num_sharing: u64,
    /// Prompts of the benchmark that some text equals or shares a run with.
    pub num_prompts_hit: u64,
    /// Prompts of the benchmark.
    pub num_prompts: u64,
    /// Some of the pairs.
    pub examples: Vec<OverlapExample>,
}

/// A text and the prompt it overlaps with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OverlapExample {
    /// The training text, shortened.
    pub text: String,
    /// The benchmark's prompt, shortened.
    pub prompt: String,
}

/// Finds overlaps with the prompts of one benchmark.
pub struct Detector<'a> {
    benchmark: &'a BenchmarkPrompts,
    ngram: usize,
    equal: HashMap<String, usize>,
    runs: HashMap<u64, usize>,
}

impl<'a> Detector<'a> {
    /// Indexes the benchmark; `ngram` is the number of words of a run, 0 for equality only.
    pub fn new(benchmark: &'a BenchmarkPrompts, ngram: usize) -> Self {
        let mut equal = HashMap::new();
        let mut runs = HashMap::new();
        for (i, prompt) in benchmark.prompts.iter().enumerate() {
            let words = words(prompt);
            for run in hashed_runs(&words, ngram) {
                runs.entry(run).or_insert(i);
            }
            equal.entry(words.join(" ")).or_insert(i);
        }
        Self { benchmark, ngram, equal, runs }
    }

    /// Compares the texts of the set `member`.
    pub fn check(&self, member: &str, texts: impl Iterator<Item = impl AsRef<str>>) -> Overlap {
        let mut comparison = self.begin(member);
        texts.for_each(|text| comparison.add(text.as_ref()));
        comparison.finish()
    }

    /// Begins to compare the texts of the set `member`, one after another.
    pub fn begin(&self, member: &str) -> Comparison<'_> {
        let overlap = Overlap {
            member: member.to_owned(),
            benchmark: self.benchmark.name.clone(),
            num_texts: 0,
            num_equal: 0,
            num_sharing: 0,
            num_prompts_hit: 0,
            num_prompts: self.benchmark.prompts.len() as u64,
            examples: Vec::new(),
        };
        Comparison { detector: self, overlap, hit: BTreeSet::new() }
    }
}

/// A comparison on its way: holds no text but examples, so a set may be of any size.
pub struct Comparison<'a> {
    detector: &'a Detector<'a>,
    overlap: Overlap,
    /// Prompts that some text overlaps with.
    hit: BTreeSet<usize>,
}

impl Comparison<'_> {
    /// Compares the next text.
    pub fn add(&mut self, text: &str) {
        let Detector { benchmark, ngram, equal, runs } = self.detector;
        let overlap = &mut self.overlap;
        overlap.num_texts += 1;
        let words = words(text);
        let equal = equal.get(&words.join(" ")).copied();
        let shared: BTreeSet<usize> = hashed_runs(&words, *ngram).filter_map(|run| runs.get(&run).copied()).collect();
        let Some(prompt) = equal.or(shared.first().copied()) else { return };
        match equal {
            Some(_) => overlap.num_equal += 1,
            None => overlap.num_sharing += 1,
        }
        self.hit.extend(equal);
        self.hit.extend(&shared);
        if overlap.examples.len() < NUM_EXAMPLES {
            let prompt = shortened(&benchmark.prompts[prompt]);
            overlap.examples.push(OverlapExample { text: shortened(text), prompt });
        }
    }

    /// Returns what was found.
    pub fn finish(self) -> Overlap {
        Overlap { num_prompts_hit: self.hit.len() as u64, ..self.overlap }
    }
}

impl Overlap {
    /// Returns true when nothing overlaps.
    pub fn is_clean(&self) -> bool {
        self.num_equal + self.num_sharing == 0
    }
}

/// Lower-case words without punctuation; a character of a script without spaces is a word.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for c in text.chars().flat_map(char::to_lowercase) {
        let alone = matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}');
        if alone || !c.is_alphanumeric() {
            words.push(String::new());
        }
        if c.is_alphanumeric()
            && let Some(word) = words.last_mut()
        {
            word.push(c);
        }
        if alone {
            words.push(String::new());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

fn hashed_runs(words: &[String], ngram: usize) -> impl Iterator<Item = u64> {
    let windows = if ngram == 0 { [].windows(1) } else { words.windows(ngram) };
    windows.map(|run: &[String]| {
        let mut hasher = DefaultHasher::new();
        run.hash(&mut hasher);
        hasher.finish()
    })
}

fn shortened(text: &str) -> String {
    text.chars().take(EXAMPLE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_and_punctuation_do_not_hide_an_equal_prompt() {
        let benchmark =
            BenchmarkPrompts { name: "b".into(), prompts: vec!["A red circle, please.".into(), "a dog".into()] };
        let overlap = Detector::new(&benchmark, 0).check("m", ["a RED circle please", "a red circle", "A dog!"].iter());
        assert_eq!((overlap.num_texts, overlap.num_equal, overlap.num_sharing), (3, 2, 0));
        assert_eq!((overlap.num_prompts_hit, overlap.num_prompts), (2, 2));
        assert_eq!(overlap.examples[0].prompt, "A red circle, please.");
    }

    #[test]
    fn a_shared_run_of_words_is_an_overlap() {
        let benchmark = BenchmarkPrompts { name: "b".into(), prompts: vec!["one two three four five".into()] };
        let texts = ["zero two three four six", "one two x four five", "three"];
        let detector = Detector::new(&benchmark, 3);
        let overlap = detector.check("m", texts.iter());
        assert_eq!((overlap.num_equal, overlap.num_sharing, overlap.num_prompts_hit), (0, 1, 1));
        assert!(Detector::new(&benchmark, 6).check("m", texts.iter()).is_clean());
    }

    #[test]
    fn scripts_without_spaces_are_compared_by_character() {
        let benchmark = BenchmarkPrompts { name: "b".into(), prompts: vec!["\u{7ea2}\u{8272}\u{5706}\u{5f62}".into()] };
        let text = "\u{4e00}\u{4e2a}\u{7ea2}\u{8272}\u{5706}\u{5f62}";
        assert_eq!(Detector::new(&benchmark, 4).check("m", [text].iter()).num_sharing, 1);
    }
}
