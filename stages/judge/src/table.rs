//! From verdicts to a table of scores, with intervals: the benchmark's own formula, strict and graded shares, tags and
//! parts.
//!
//! Knows neither images nor judges. Every formula is a weighted mean of ratios of sums; a bootstrap redraws items,
//! since images of one item are no independent evidence, and within tags, since a benchmark fixes how many each has.

use std::collections::BTreeMap;

use deepgen_contract::eval::{EVAL_VERSION, Estimate, PartScore, PublishedScore, ScoreTable, TagScore};

use crate::benchmark::{Benchmark, Formula};
use crate::verdict::{GRADED, STRICT, Verdict};

/// Normal quantile of a two-sided 95 % interval.
const Z: f64 = 1.959_963_985;
const BOOTSTRAP_SEED: u64 = 42;

/// What came of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Identity of the item.
    pub item: String,
    /// Tag of the item.
    pub tag: String,
    /// Verdict; nothing if no usable answer was had.
    pub verdict: Option<Verdict>,
}

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// No image has a verdict.
    #[error("none of the {num_images} images of `{benchmark}` has a verdict")]
    NoVerdict {
        /// Benchmark.
        benchmark: String,
        /// Images.
        num_images: usize,
    },
    /// The part that the benchmark aggregates is in no verdict.
    #[error("benchmark `{benchmark}` aggregates the part `{part}`, which no verdict has")]
    NoPart {
        /// Benchmark.
        benchmark: String,
        /// Part.
        part: String,
    },
}

/// The images of one item.
struct Item<'a> {
    tag: usize,
    verdicts: Vec<&'a Verdict>,
}

/// What one item adds to a ratio of sums: index of the ratio, numerator, denominator.
type Share = (usize, f64, f64);

/// A statistic: for each item its shares, and the weight of each ratio in the final mean.
struct Statistic {
    shares: Vec<Vec<Share>>,
    weights: Vec<f64>,
}

/// Returns the table of a benchmark.
///
/// # Errors
/// When there is nothing to aggregate.
pub fn score_table(
    benchmark: &Benchmark,
    judge: &str,
    outcomes: &[Outcome],
    resamples: usize,
) -> Result<ScoreTable, TableError> {
    let tags = tags(benchmark, outcomes);
    let items = group(outcomes, &tags);
    let verdicts: Vec<&Verdict> = items.iter().flat_map(|item| item.verdicts.iter().copied()).collect();
    if verdicts.is_empty() {
        return Err(TableError::NoVerdict { benchmark: benchmark.name.clone(), num_images: outcomes.len() });
    }
    let no_part = || TableError::NoPart { benchmark: benchmark.name.clone(), part: benchmark.aggregation.part.clone() };
    let everything: Vec<&Item<'_>> = items.iter().collect();
    let headline = |items: &[&Item<'_>]| {
        let statistic = Statistic::headline(benchmark, &tags, items);
        estimate(&statistic, items, resamples).map(|e| to_unit(benchmark, e))
    };
    let graded = |items: &[&Item<'_>]| estimate(&Statistic::pooled(GRADED, items, false), items, resamples);
    let tag_scores = tags.iter().enumerate().filter_map(|(index, tag)| {
        let members: Vec<&Item<'_>> = items.iter().filter(|item| item.tag == index).collect();
        let strict = wilson(&members)?;
        let score = if benchmark.aggregation.part == STRICT { to_unit(benchmark, strict) } else { headline(&members)? };
        let num_images = members.iter().map(|item| item.verdicts.len()).sum();
        Some(TagScore { tag: tag.clone(), score, strict, graded: graded(&members)?, num_images })
    });
    Ok(ScoreTable {
        version: EVAL_VERSION,
        benchmark: benchmark.name.clone(),
        title: benchmark.title.clone(),
        unit: benchmark.unit.clone(),
        judge: judge.to_owned(),
        overall: headline(&everything).ok_or_else(no_part)?,
        strict: wilson(&everything).ok_or_else(no_part)?,
        graded: graded(&everything).ok_or_else(no_part)?,
        tags: tag_scores.collect(),
        parts: parts(&everything, resamples),
        num_items: items.len(),
        num_images: verdicts.len(),
        num_unscored: outcomes.len() - verdicts.len(),
        published: published(benchmark),
    })
}

/// Returns the tags that occur: the benchmark's in its order, then others in the order of the outcomes.
fn tags(benchmark: &Benchmark, outcomes: &[Outcome]) -> Vec<String> {
    let known = benchmark.tags.iter().map(|tag| &tag.name);
    let mut tags: Vec<String> = Vec::new();
    for tag in known.chain(outcomes.iter().map(|outcome| &outcome.tag)) {
        if !tags.contains(tag) && outcomes.iter().any(|outcome| outcome.tag == *tag) {
            tags.push(tag.clone());
        }
    }
    tags
}

fn group<'a>(outcomes: &'a [Outcome], tags: &[String]) -> Vec<Item<'a>> {
    let mut items: BTreeMap<(usize, &str), Item<'a>> = BTreeMap::new();
    for outcome in outcomes {
        let Some(tag) = tags.iter().position(|tag| *tag == outcome.tag) else { continue };
        let Some(verdict) = &outcome.verdict else { continue };
        let item = items.entry((tag, outcome.item.as_str())).or_insert_with(|| Item { tag, verdicts: Vec::new() });
        item.verdicts.push(verdict);
    }
    items.into_values().collect()
}

impl Statistic {
    /// Returns the benchmark's headline number over `items`.
    fn headline(benchmark: &Benchmark, tags: &[String], items: &[&Item<'_>]) -> Self {
        let aggregation = &benchmark.aggregation;
        let part = aggregation.part.as_str();
        match aggregation.formula {
            Formula::MeanOfTags | Formula::WeightedTags => {
                let shares = items.iter().map(|item| {
                    let (sum, count) = sums(item, part, false);
                    vec![(item.tag, sum, count)]
                });
                let is_weighted = aggregation.formula == Formula::WeightedTags;
                let weight = |tag: &String| if is_weighted { benchmark.tag_weight(tag) } else { 1.0 };
                Self { shares: shares.collect(), weights: tags.iter().map(weight).collect() }
            }
            Formula::MeanOfItems => {
                let shares = items.iter().map(|item| {
                    let (sum, count) = sums(item, part, false);
                    if count > 0.0 { vec![(0, sum / count, 1.0)] } else { Vec::new() }
                });
                Self { shares: shares.collect(), weights: vec![1.0] }
            }
            Formula::Pooled => Self::pooled(part, items, true),
            Formula::MeanOfParts => {
                let shares = items.iter().map(|item| {
                    let share = |(index, part): (usize, &String)| {
                        let (sum, count) = sums(item, part, true);
                        (index, sum, count)
                    };
                    aggregation.parts.iter().enumerate().map(share).collect()
                });
                Self { shares: shares.collect(), weights: vec![1.0; aggregation.parts.len()] }
            }
        }
    }

    /// Returns the mean of a part over all images, or with `by_weight` over all that it counted.
    fn pooled(part: &str, items: &[&Item<'_>], by_weight: bool) -> Self {
        let shares = items.iter().map(|item| {
            let (sum, count) = sums(item, part, by_weight);
            vec![(0, sum, count)]
        });
        Self { shares: shares.collect(), weights: vec![1.0] }
    }

    /// Returns the value over the items whose indices `drawn` gives; nothing if no ratio has a denominator.
    fn value(&self, drawn: impl Iterator<Item = usize>) -> Option<f64> {
        let mut ratios = vec![(0.0, 0.0); self.weights.len()];
        for &(index, sum, count) in drawn.flat_map(|item| &self.shares[item]) {
            ratios[index].0 += sum;
            ratios[index].1 += count;
        }
        let present = || ratios.iter().zip(&self.weights).filter(|((_, count), _)| *count > 0.0);
        let weights: f64 = present().map(|(_, weight)| weight).sum();
        let total: f64 = present().map(|((sum, count), weight)| weight * sum / count).sum();
        (weights > 0.0).then(|| total / weights)
    }
}

/// Returns the sum of a part over an item's images, and how much it is a sum of.
fn sums(item: &Item<'_>, part: &str, by_weight: bool) -> (f64, f64) {
    item.verdicts.iter().filter_map(|verdict| verdict.part(part)).fold((0.0, 0.0), |(sum, count), (value, weight)| {
        let weight = if by_weight { weight } else { 1.0 };
        (sum + value * weight, count + weight)
    })
}

/// Returns a statistic with the percentile interval of a bootstrap over items within tags.
fn estimate(statistic: &Statistic, items: &[&Item<'_>], resamples: usize) -> Option<Estimate> {
    let value = statistic.value(0..items.len())?;
    // `group` sorts by tag, so the items of a tag are neighbours.
    let mut strata = Vec::new();
    for (index, item) in items.iter().enumerate() {
        match strata.last_mut() {
            Some((tag, _, count)) if *tag == item.tag => *count += 1,
            _ => strata.push((item.tag, index, 1usize)),
        }
    }
    let mut random = SplitMix(BOOTSTRAP_SEED);
    let mut values: Vec<f64> = Vec::with_capacity(resamples);
    let mut drawn = Vec::with_capacity(items.len());
    for _ in 0..resamples {
        drawn.clear();
        for &(_, start, count) in &strata {
            drawn.extend((0..count).map(|_| start + random.below(count)));
        }
        values.extend(statistic.value(drawn.iter().copied()));
    }
    values.sort_by(f64::total_cmp);
    let quantile = |q: f64| match values.len() {
        0 => value,
        count => values[((count - 1) as f64 * q).round() as usize],
    };
    Some(Estimate { value, low: quantile(0.025), high: quantile(0.975) })
}

/// Returns the share of images that are right in everything, with Wilson's interval.
fn wilson(items: &[&Item<'_>]) -> Option<Estimate> {
    let verdicts = || items.iter().flat_map(|item| &item.verdicts);
    let n = verdicts().count() as f64;
    if n == 0.0 {
        return None;
    }
    let value = verdicts().filter(|verdict| verdict.strict).count() as f64 / n;
    let scale = 1.0 + Z * Z / n;
    let centre = (value + Z * Z / (2.0 * n)) / scale;
    let half = Z / scale * (value * (1.0 - value) / n + Z * Z / (4.0 * n * n)).sqrt();
    Some(Estimate { value, low: (centre - half).max(0.0), high: (centre + half).min(1.0) })
}

fn to_unit(benchmark: &Benchmark, estimate: Estimate) -> Estimate {
    let unit = |value: f64| benchmark.aggregation.scale * value + benchmark.aggregation.offset;
    Estimate { value: unit(estimate.value), low: unit(estimate.low), high: unit(estimate.high) }
}

/// Returns every part that a verdict has, in the order of their first occurrence.
fn parts(items: &[&Item<'_>], resamples: usize) -> Vec<PartScore> {
    let mut names: Vec<&str> = Vec::new();
    for part in items.iter().flat_map(|item| &item.verdicts).flat_map(|verdict| &verdict.parts) {
        if !names.contains(&part.name.as_str()) {
            names.push(&part.name);
        }
    }
    let score = |name: &str| {
        let score = estimate(&Statistic::pooled(name, items, true), items, resamples)?;
        let having = items.iter().flat_map(|item| &item.verdicts).filter(|verdict| verdict.part(name).is_some());
        Some(PartScore { name: name.to_owned(), score, num_images: having.count() })
    };
    names.into_iter().filter_map(score).collect()
}

fn published(benchmark: &Benchmark) -> Vec<PublishedScore> {
    let score = |published: &crate::benchmark::Published| PublishedScore {
        name: [published.name.as_str(), published.part.as_str()].join(" ").trim_end().to_owned(),
        value: published.value,
    };
    benchmark.published.iter().map(score).collect()
}

/// SplitMix64: the bootstrap needs a stream that is the same everywhere, and no more.
struct SplitMix(u64);

impl SplitMix {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((u128::from(z) * bound as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::Part;

    fn outcome(item: &str, tag: &str, strict: bool, parts: &[(&str, f64, f64)]) -> Outcome {
        let part = |&(name, value, weight): &(&str, f64, f64)| Part { name: name.into(), value, weight };
        let graded = if strict { 1.0 } else { 0.5 };
        let verdict = Verdict { strict, graded, parts: parts.iter().map(part).collect() };
        Outcome { item: item.into(), tag: tag.into(), verdict: Some(verdict) }
    }

    fn table(name: &str, outcomes: &[Outcome]) -> ScoreTable {
        score_table(&Benchmark::load(name).unwrap(), "test", outcomes, 200).unwrap()
    }

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    }

    #[test]
    fn geneval_is_the_plain_mean_of_its_tags() {
        let mut outcomes = vec![outcome("p1", "position", false, &[]), outcome("s1", "single_object", true, &[])];
        outcomes.push(outcome("s1", "single_object", true, &[]));
        outcomes.push(outcome("s2", "single_object", false, &[]));
        outcomes.push(outcome("s2", "single_object", true, &[]));
        let table = table("geneval", &outcomes);
        near(table.overall.value, (0.75 + 0.0) / 2.0);
        near(table.strict.value, 3.0 / 5.0);
        near(table.graded.value, 4.0 / 5.0);
        assert_eq!(table.tags.iter().map(|t| t.tag.as_str()).collect::<Vec<_>>(), ["single_object", "position"]);
        near(table.tags[0].score.value, 0.75);
        assert_eq!((table.num_items, table.num_images, table.num_unscored), (3, 5, 0));
        assert_eq!(table.published[1], PublishedScore { name: "DeepGen RL".into(), value: 0.87 });
    }

    #[test]
    fn cvtg_pools_words_over_images() {
        let outcomes = [
            outcome("1", "CVTG/2", false, &[("words", 0.5, 2.0), ("characters", 0.75, 2.0)]),
            outcome("2", "CVTG/5", true, &[("words", 1.0, 4.0), ("characters", 1.0, 4.0)]),
        ];
        let table = table("cvtg", &outcomes);
        near(table.overall.value, 5.0 / 6.0);
        near(table.parts.iter().find(|p| p.name == "characters").unwrap().score.value, 5.5 / 6.0);
        assert!(table.published.iter().any(|p| p.name == "DeepGen SFT characters" && p.value == 0.8426));
    }

    #[test]
    fn wise_weighs_its_categories_and_gedit_its_types_alike() {
        let rating = |tag: &str, value| outcome(tag, tag, false, &[("rating", value, 1.0), ("overall", value, 1.0)]);
        let wise = table("wise", &[rating("culture", 1.0), rating("time", 0.5), rating("space", 0.0)]);
        near(wise.overall.value, (0.4 + 0.167 * 0.5) / (0.4 + 0.167 + 0.133));
        let gedit =
            table("gedit", &[rating("color_alter", 0.2), rating("text_change", 0.6), rating("text_change", 1.0)]);
        near(gedit.overall.value, 10.0 * (0.2 + 0.8) / 2.0);
    }

    #[test]
    fn unigenbench_is_the_mean_of_its_dimensions_and_dpg_of_its_prompts() {
        let outcomes = [
            outcome("1", "Art", false, &[("questions", 0.5, 2.0), ("Style", 1.0, 1.0), ("Action", 0.0, 1.0)]),
            outcome("2", "Art", true, &[("questions", 1.0, 3.0), ("Style", 1.0, 3.0)]),
            outcome("2", "Art", false, &[("questions", 0.0, 3.0), ("Style", 0.0, 3.0)]),
        ];
        near(table("unigenbench", &outcomes).overall.value, 100.0 * (4.0 / 7.0 + 0.0) / 2.0);
        near(table("dpg", &outcomes).overall.value, 50.0);
    }

    #[test]
    fn intervals_hold_the_value_and_shrink_with_more_items() {
        let outcomes = |n: usize| -> Vec<Outcome> {
            let one = |i: usize| {
                let tag = if i.is_multiple_of(2) { "counting" } else { "colors" };
                outcome(&i.to_string(), tag, i % 4 < 2, &[])
            };
            (0..n).map(one).collect()
        };
        let (few, many) = (table("geneval", &outcomes(20)), table("geneval", &outcomes(400)));
        for table in [&few, &many] {
            assert!(table.overall.low < table.overall.value && table.overall.value < table.overall.high, "{table:?}");
            near(table.overall.value, 0.5);
        }
        assert!(many.overall.high - many.overall.low < (few.overall.high - few.overall.low) / 3.0);
        assert_eq!(few, table("geneval", &outcomes(20)), "the bootstrap has a fixed seed");
    }

    /// 8 of 10 gives 0.4902 to 0.9433: Wilson (1927), as statistics packages compute it.
    #[test]
    fn proportions_have_wilson_intervals() {
        let outcomes: Vec<Outcome> = (0..10).map(|i| outcome(&i.to_string(), "colors", i < 8, &[])).collect();
        let strict = table("geneval", &outcomes).strict;
        assert!((strict.low - 0.4902).abs() < 1e-4 && (strict.high - 0.9433).abs() < 1e-4, "{strict:?}");
    }

    #[test]
    fn images_without_a_verdict_are_counted_and_left_out() {
        let silent = Outcome { item: "2".into(), tag: "colors".into(), verdict: None };
        let table = table("geneval", &[outcome("1", "colors", true, &[]), silent.clone()]);
        near(table.overall.value, 1.0);
        assert_eq!((table.num_images, table.num_unscored), (1, 1));
        let geneval = Benchmark::load("geneval").unwrap();
        let error = score_table(&geneval, "test", &[silent], 10).unwrap_err().to_string();
        assert!(error.contains("none of the 1 images"), "{error}");
        let rise = Benchmark::load("gedit").unwrap();
        let error = score_table(&rise, "test", &[outcome("1", "a", true, &[])], 10).unwrap_err().to_string();
        assert!(error.contains("`overall`"), "{error}");
    }
}
