//! The comparison of a sweep: variants as rows, metrics as columns, each with its difference to the first variant.
//!
//! Knows variants and numbers of manifests; published numbers of the same ablation stand below, set apart.

use std::collections::BTreeMap;

use deepgen_contract::eval::Estimate;
use deepgen_contract::id::NodeName;

use super::data::{NodeReport, PublishedAblation, ReportData, overlap};
use super::markup::{Markup, Table, anchor, el};
use super::score_table::{interval, number_plain};
use crate::progress::format::{count, duration};
use crate::spec::{MetricRef, Sweep, Variant};

/// Returns the comparison; nothing when the run is no sweep.
pub fn section(data: &ReportData) -> Option<Markup> {
    let sweep = data.saved.sweep.as_ref()?;
    let mut part = Markup::join([el("p").text(sharing(data, sweep))]);
    let columns = std::iter::once(Markup::text("Variant"))
        .chain(sweep.compare.iter().map(Markup::text))
        .chain([Markup::text("Own nodes"), Markup::text("Own time")]);
    let mut table = Table::new("scores sweep", columns)
        .caption("Differences are to the first variant; those within the 95 % intervals of both are pale.");
    let uses = uses(sweep);
    for (index, variant) in sweep.variants.iter().enumerate() {
        let base = (index > 0).then(|| &sweep.variants[0]);
        let cells = sweep.compare.iter().map(|metric| cell(data, metric, variant, base));
        let own: Vec<&NodeName> = variant.nodes.values().filter(|node| uses[node] == 1).collect();
        let seconds: f64 = own.iter().filter_map(|node| data.node(node)?.seconds).sum();
        let tail = [Markup::text(format!("{} of {}", own.len(), variant.nodes.len())), Markup::text(duration(seconds))];
        table.row(Markup::text(&variant.name), cells.chain(tail));
    }
    part.push(table);
    if let Some(published) = &data.published {
        part.push(published_table(published));
    }
    Some(part)
}

/// Returns how many variants each node serves.
fn uses(sweep: &Sweep) -> BTreeMap<&NodeName, usize> {
    let mut uses = BTreeMap::new();
    for node in sweep.variants.iter().flat_map(|variant| variant.nodes.values()) {
        *uses.entry(node).or_insert(0) += 1;
    }
    uses
}

/// Says how many nodes ran once for several variants.
fn sharing(data: &ReportData, sweep: &Sweep) -> String {
    let uses = uses(sweep);
    let by_all = uses.values().filter(|num| **num == sweep.variants.len()).count();
    let by_some = uses.values().filter(|num| **num > 1).count() - by_all;
    let alone: usize = sweep.variants.iter().map(|variant| variant.nodes.len()).sum();
    let some = if by_some > 0 { format!(", {by_some} by some of them") } else { String::new() };
    format!(
        "{} make one graph of {}: {by_all} shared by all variants{some}. Run one by one, they would be {alone} nodes.",
        count(sweep.variants.len(), "variant"),
        count(data.nodes.len(), "node")
    )
}

fn cell(data: &ReportData, metric: &MetricRef, variant: &Variant, base: Option<&Variant>) -> Markup {
    let of = |variant: &Variant| {
        let node = data.node(variant.nodes.get(&metric.node)?)?;
        Some((node, metric.find(&node.last_metrics())?))
    };
    let Some((node, value)) = of(variant) else { return el("span").class("muted").text("none").into() };
    let link =
        el("a").class("value").attr("href", format!("#{}", anchor("node", &node.name().0))).text(number_plain(value));
    let own = estimate_of(node, &metric.metric);
    let mut cell = Markup::join([link]);
    if let Some((other, base)) = base.and_then(of) {
        let difference = value - base;
        let is_within = match (&own, &estimate_of(other, &metric.metric)) {
            (Some(own), Some(other)) => overlap(own, other),
            _ => false,
        };
        let class = match (is_within, difference) {
            (true, _) => "difference within",
            (false, difference) if difference < 0.0 => "difference lower",
            (false, _) => "difference higher",
        };
        let text = if node.name() == other.name() { "same node".to_owned() } else { signed(difference) };
        cell.push(el("span").class(class).text(text));
    }
    if let Some(own) = own {
        cell.push(el("span").class("interval").text(interval(&own)));
    }
    cell
}

/// Returns the interval of a metric, where the table of scores has one.
fn estimate_of(node: &NodeReport, metric: &str) -> Option<Estimate> {
    let scores = node.scores.as_ref()?;
    let (group, name) = metric.split_once('/').unwrap_or(("score", metric));
    match (group, name) {
        ("score", "overall") => Some(scores.overall),
        ("score", "strict") => Some(scores.strict),
        ("score", "graded") => Some(scores.graded),
        ("tag", name) => scores.tags.iter().find(|tag| tag.tag == name).map(|tag| tag.score),
        ("part", name) => scores.parts.iter().find(|part| part.name == name).map(|part| part.score),
        _ => None,
    }
}

fn signed(difference: f64) -> String {
    let sign = if difference < 0.0 { "\u{2212}" } else { "+" };
    format!("{sign}{}", number_plain(difference.abs()))
}

/// Returns a difference of published numbers with the decimals that they have.
fn signed_plain(difference: f64) -> String {
    let rounded = (difference.abs() * 1e4).round() / 1e4;
    let sign = if difference < 0.0 { "\u{2212}" } else { "+" };
    if rounded == 0.0 { "same".to_owned() } else { format!("{sign}{rounded}") }
}

fn published_table(published: &PublishedAblation) -> Markup {
    let columns = std::iter::once("Variant").chain(published.metrics.iter().map(String::as_str)).map(Markup::text);
    let mut table = Table::new("numbers", columns);
    for (index, (name, values)) in published.rows.iter().enumerate() {
        let cells = values.iter().enumerate().map(|(column, value)| {
            let base = published.rows[0].1.get(column).filter(|_| index > 0);
            let difference = base.map(|base| el("span").class("difference within").text(signed_plain(value - base)));
            Markup::join([el("span").class("value").text(value)].into_iter().chain(difference))
        });
        table.row(Markup::text(name), cells);
    }
    el("aside")
        .class("published wide")
        .attr("aria-label", "Published numbers of the same ablation")
        .add(el("h4").text(&published.title))
        .add(el("p").text("On the real benchmarks, with the full-size model. Not comparable in value with the table above: only the direction of each difference is."))
        .add(table)
        .into()
}
