//! Scores of each benchmark, checkpoint by checkpoint, with intervals; the paper's numbers stand beside them.
//!
//! Knows tables of scores, not how they were made.

use deepgen_contract::eval::{Estimate, PublishedScore, ScoreTable};
use deepgen_contract::settings::Settings;

use super::chart::px;
use super::data::{NodeReport, ReportData, checkpoint_label};
use super::markup::{Element, Markup, Table, anchor, details, el};
use crate::progress::format::number;

/// Scores of one benchmark.
struct Group<'a> {
    benchmark: &'a str,
    rows: Vec<(String, &'a NodeReport, &'a ScoreTable)>,
}

/// Returns the tables of all benchmarks; nothing when nothing was scored.
pub fn section(data: &ReportData) -> Option<Markup> {
    let groups = groups(data);
    (!groups.is_empty()).then(|| Markup::join(groups.iter().map(benchmark)))
}

fn groups(data: &ReportData) -> Vec<Group<'_>> {
    let depths = data.depths();
    let mut groups: Vec<(_, Group<'_>)> = Vec::new();
    for node in &data.nodes {
        let Some(scores) = &node.scores else { continue };
        let images = node.planned.node.inputs.get("images").and_then(|images| data.node(images));
        let items = images.and_then(|images| match &images.settings {
            Some(Settings::Generate(generate)) => Some(&generate.items),
            _ => None,
        });
        let label = images.map_or_else(|| node.name().0.clone(), |images| checkpoint_label(&data.nodes, images));
        let row = (label, node, scores);
        // Scores of other prompts are another table, even under the same benchmark.
        match groups.iter_mut().find(|(other, group)| *other == items && group.benchmark == scores.benchmark) {
            Some((_, group)) => group.rows.push(row),
            None => groups.push((items, Group { benchmark: &scores.benchmark, rows: vec![row] })),
        }
    }
    let mut groups: Vec<Group<'_>> = groups.into_iter().map(|(_, group)| group).collect();
    groups.iter_mut().for_each(|group| group.rows.sort_by_key(|(_, node, _)| depths[node.name()]));
    groups
}

fn benchmark(group: &Group<'_>) -> Markup {
    let first = group.rows[0].2;
    let scale = Scale::of(&first.unit, group.rows.iter().map(|(_, _, scores)| scores.overall.high));
    let tags: Vec<&str> = first.tags.iter().map(|tag| tag.tag.as_str()).collect();
    let mut columns = vec![Markup::text("Checkpoint")];
    columns.push(headed("Overall", &format!("the benchmark's own formula, {}", first.unit)));
    columns.push(headed("Strict", "right in everything"));
    columns.push(headed("Graded", "share of what was asked"));
    let mut table = Table::new("scores", columns);
    let mut by_tag = Table::new("numbers", std::iter::once("Checkpoint").chain(tags.iter().copied()).map(tag_head));
    let mut by_part = Table::new(
        "numbers",
        std::iter::once("Checkpoint").chain(first.parts.iter().map(|part| part.name.as_str())).map(tag_head),
    );
    for (label, node, scores) in &group.rows {
        let link = || el("a").attr("href", format!("#{}", anchor("node", &node.name().0))).text(label);
        let unit = Scale::UNIT;
        table.row(
            link(),
            [estimate(&scores.overall, scale), estimate(&scores.strict, unit), estimate(&scores.graded, unit)],
        );
        let tag_cell = |tag: &&str| match scores.tags.iter().find(|score| score.tag == **tag) {
            Some(score) => small_estimate(&score.score, scale, score.num_images),
            None => Markup::default(),
        };
        by_tag.row(link(), tags.iter().map(tag_cell));
        let part_cell = |part: &deepgen_contract::eval::PartScore| {
            let own = scores.parts.iter().find(|other| other.name == part.name);
            own.map_or_else(Markup::default, |own| small_estimate(&own.score, unit, own.num_images))
        };
        by_part.row(link(), first.parts.iter().map(part_cell));
    }
    let mut part = el("div").class("benchmark");
    part = part.add(el("h3").text(&first.title).add(el("span").class("muted").text(format!(" {}", group.benchmark))));
    part = part.add(el("p").class("muted").text(basis(group)));
    let ours = el("div").class("ours").add(table);
    part = part.add(el("div").class("beside").add(ours).add_all(published(first)));
    if !tags.is_empty() {
        part = part.add(el("h4").text("By tag")).add(by_tag);
    }
    if !first.parts.is_empty() {
        part = part.add(details("Graded components", by_part));
    }
    part.into()
}

/// Says what the numbers stand on.
fn basis(group: &Group<'_>) -> String {
    let first = group.rows[0].2;
    let unscored: usize = group.rows.iter().map(|(_, _, scores)| scores.num_unscored).sum();
    let left_out =
        if unscored > 0 { format!("; {unscored} images without a usable answer are left out") } else { String::new() };
    format!(
        "{} items, {} images a checkpoint, judged by {}; intervals are 95 %{left_out}.",
        first.num_items, first.num_images, first.judge
    )
}

fn headed(title: &str, what: &str) -> Markup {
    Markup::join([Markup::text(title), el("span").class("sub").text(what).into()])
}

fn tag_head(tag: &str) -> Markup {
    Markup::text(tag.replace('_', " "))
}

/// The paper's numbers, set apart from ours.
fn published(table: &ScoreTable) -> Option<Element> {
    if table.published.is_empty() {
        return None;
    }
    let pair = |score: &PublishedScore| Markup::join([el("dt").text(&score.name), el("dd").text(score.value)]);
    let note = format!(
        "Measured on the real {}, with the full-size model at 512 pixels. Not comparable in value with the table: only the direction is.",
        table.title
    );
    Some(
        el("aside")
            .class("published")
            .attr("aria-label", format!("Published numbers of {}", table.title))
            .add(el("h4").text("Published"))
            .add(el("dl").add_all(table.published.iter().map(pair)))
            .add(el("p").text(note)),
    )
}

/// Ends of the scale on which whiskers are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    /// 0 to 1.
    pub const UNIT: Self = Self { low: 0.0, high: 1.0 };

    /// Returns the scale of a unit written `low..high`; of any other, one that holds all values.
    pub fn of(unit: &str, highs: impl Iterator<Item = f64>) -> Self {
        let ends =
            unit.split_once("..").and_then(|(low, high)| Some((low.trim().parse().ok()?, high.trim().parse().ok()?)));
        match ends {
            Some((low, high)) if high > low => Self { low, high },
            _ => Self { low: 0.0, high: highs.fold(1e-9, f64::max) },
        }
    }

    fn percent(self, value: f64) -> f64 {
        100.0 * ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// Returns a number with its interval as text and as a whisker.
pub fn estimate(estimate: &Estimate, scale: Scale) -> Markup {
    Markup::join([
        el("span").class("value").text(number_plain(estimate.value)),
        el("span").class("interval").text(interval(estimate)),
        whisker(estimate, scale),
    ])
}

fn small_estimate(estimate: &Estimate, scale: Scale, num_images: usize) -> Markup {
    let value = el("span").class("value").text(number_plain(estimate.value));
    let value = value.attr("title", format!("{}, {num_images} images", interval(estimate)));
    Markup::join([value, whisker(estimate, scale)])
}

/// Draws where a number and its interval lie on the scale.
fn whisker(estimate: &Estimate, scale: Scale) -> Element {
    let at = |value: f64| px(scale.percent(value));
    let line = |class: &'static str, x1: f64, x2: f64| {
        el("line").class(class).attr("x1", at(x1)).attr("x2", at(x2)).attr("y1", 6).attr("y2", 6)
    };
    let dot = el("circle").attr("cx", at(estimate.value)).attr("cy", 6).attr("r", 3);
    el("span").class("whisker").attr("aria-hidden", "true").add(
        el("svg")
            .attr("viewBox", "0 0 100 12")
            .attr("focusable", "false")
            .add(line("rail", scale.low, scale.high))
            .add(line("reach", estimate.low, estimate.high))
            .add(dot),
    )
}

/// Returns an interval as text.
pub fn interval(estimate: &Estimate) -> String {
    format!("{} to {}", number_plain(estimate.low), number_plain(estimate.high))
}

/// Returns a score with the digits that tables of scores have.
pub fn number_plain(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => number(value),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_that_of_the_unit() {
        assert_eq!(Scale::of("0..10", [3.0].into_iter()), Scale { low: 0.0, high: 10.0 });
        assert_eq!(Scale::of("points", [3.0, 40.0].into_iter()), Scale { low: 0.0, high: 40.0 });
        assert_eq!(Scale::UNIT.percent(1.5), 100.0);
    }
}
