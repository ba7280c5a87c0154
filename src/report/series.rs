//! From metric lines to charts: which numbers belong together, which are smoothed, which are of first interest.
//!
//! Knows names of metrics, as `group/name`; no markup.

use std::collections::BTreeMap;

use super::data::MetricRow;

/// Lines of one chart; more would not be told apart.
const MAX_LINES: usize = 6;
/// Smoothing averages over about this share of a line.
const SMOOTHING_SHARE: f64 = 0.05;
/// Lines with fewer points are not smoothed.
const MIN_SMOOTHED: usize = 24;
/// Values of one chart that span more than this factor are drawn on a logarithmic axis.
const LOG_FACTOR: f64 = 30.0;

/// A chart to be drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// Its lines.
    pub lines: Vec<Line>,
    /// Logarithmic vertical axis.
    pub is_log: bool,
    /// Shown at once; the others are folded away.
    pub is_main: bool,
}

/// A line of a chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Name of the metric without its group.
    pub name: String,
    /// Step and value as they were logged.
    pub points: Vec<(f64, f64)>,
    /// The same after smoothing; empty when the line is shown as it is.
    pub smooth: Vec<(f64, f64)>,
}

impl Line {
    /// Returns the points that carry the line.
    pub fn shown(&self) -> &[(f64, f64)] {
        if self.smooth.is_empty() { &self.points } else { &self.smooth }
    }
}

/// Returns the charts of a node: losses and rewards first, then what explains them.
pub fn charts(rows: &[MetricRow]) -> Vec<Chart> {
    let mut lines: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for row in rows {
        for (name, value) in row.values.iter().filter(|(_, value)| value.is_finite()) {
            lines.entry(name).or_default().push((row.step as f64, *value));
        }
    }
    // A single point is no curve; the table of final numbers has it.
    lines.retain(|_, points| points.len() > 1);
    let mut families: BTreeMap<(usize, String), Vec<Line>> = BTreeMap::new();
    for (name, points) in lines {
        let (group, short) = name.split_once('/').unwrap_or(("", name));
        let smooth = if group == "train" && points.len() >= MIN_SMOOTHED { smoothed(&points) } else { Vec::new() };
        families.entry(family(group, short)).or_default().push(Line { name: short.to_owned(), points, smooth });
    }
    let mut charts = Vec::new();
    for ((rank, title), lines) in families {
        let num_parts = lines.len().div_ceil(MAX_LINES);
        for (part, lines) in lines.chunks(MAX_LINES).enumerate() {
            let suffix = if num_parts > 1 { format!(" ({} of {num_parts})", part + 1) } else { String::new() };
            let title = format!("{title}{suffix}");
            charts.push(Chart { title, is_log: is_log(lines), lines: lines.to_vec(), is_main: rank < OTHER });
        }
    }
    charts
}

/// Rank of the charts that are folded away.
const OTHER: usize = 4;

/// Returns the rank and the title of the chart that a metric belongs to: quantities of one unit share a chart.
fn family(group: &str, name: &str) -> (usize, String) {
    let first = name.split('_').next().unwrap_or(name);
    let is_loss = first == "loss" || name.ends_with("loss");
    match group {
        "train" if is_loss => (0, "Training loss".into()),
        "validation" if is_loss => (1, "Validation loss, held-out samples and fixed noise".into()),
        "validation" => (2, format!("Validation: {first}")),
        "reward" if name.ends_with("_std") => (OTHER, "Reward: spread".into()),
        "reward" => (2, "Reward".into()),
        "evaluation" | "eval" => (2, "Reward on held-out prompts".into()),
        "rl" if first != "lr" => (3, format!("RL: {}", name.replace('_', " "))),
        "" => (OTHER, name.replace('_', " ")),
        _ => (OTHER, format!("{}: {}", capital(group), name.replace('_', " "))),
    }
}

fn capital(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

/// Returns an exponential average that starts without bias.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let window = (points.len() as f64 * SMOOTHING_SHARE).max(4.0);
    let keep = 1.0 - 1.0 / window;
    let (mut sum, mut weight) = (0.0, 0.0);
    let average = |&(step, value): &(f64, f64)| {
        sum = keep * sum + value;
        weight = keep * weight + 1.0;
        (step, sum / weight)
    };
    points.iter().map(average).collect()
}

fn is_log(lines: &[Line]) -> bool {
    let values = || lines.iter().flat_map(Line::shown).map(|(_, value)| *value);
    let (low, high) = values().fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), v| (low.min(v), high.max(v)));
    low > 0.0 && high / low > LOG_FACTOR
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(names: &[&str], num: u64) -> Vec<MetricRow> {
        let row = |step: u64| MetricRow {
            step,
            values: names.iter().map(|name| ((*name).to_owned(), 1.0 + (step % 2) as f64)).collect(),
        };
        (1..=num).map(row).collect()
    }

    #[test]
    fn quantities_of_one_unit_share_a_chart_and_losses_come_first() {
        let names = ["train/lr", "rl/kl", "train/loss_t2i", "train/loss_edit", "validation/loss_t2i", "reward/words"];
        let charts = charts(&rows(&names, 3));
        let titles: Vec<(&str, usize, bool)> =
            charts.iter().map(|chart| (chart.title.as_str(), chart.lines.len(), chart.is_main)).collect();
        assert_eq!(
            titles,
            [
                ("Training loss", 2, true),
                ("Validation loss, held-out samples and fixed noise", 1, true),
                ("Reward", 1, true),
                ("RL: kl", 1, true),
                ("Train: lr", 1, false)
            ]
        );
    }

    #[test]
    fn only_long_training_lines_are_smoothed_towards_their_mean() {
        let charts = charts(&rows(&["train/loss", "validation/loss"], 100));
        let (first, last) = (charts[0].lines[0].smooth[0].1, charts[0].lines[0].smooth[99].1);
        assert_eq!(first, charts[0].lines[0].points[0].1);
        assert!((last - 1.5).abs() < 0.15, "{last}");
        assert!(charts[1].lines[0].smooth.is_empty());
    }

    #[test]
    fn single_points_and_numbers_that_are_none_give_no_chart() {
        let mut all = rows(&["train/loss"], 1);
        all.extend([2, 3].map(|step| MetricRow { step, values: [("rl/kl".to_owned(), f64::NAN)].into() }));
        assert_eq!(charts(&all), []);
    }
}
