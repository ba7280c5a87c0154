//! Why results differ: this run and the one before it, and the variants of a sweep. Causes are told, consequences counted.
//!
//! Knows what [`crate::compare`] found, and the look.

use std::collections::BTreeSet;

use deepgen_contract::id::NodeName;

use super::data::{ReportData, SinceLast};
use super::markup::{Markup, Table, anchor, el};
use crate::compare::{self, Change, NodeDiff};
use crate::plan::{Difference, Section};
use crate::progress::format::{count, number, utc};

/// Settings of a node that are listed; a stage of another kind differs in all of them.
const MAX_DIFFERENCES: usize = 8;
/// Numbers that are listed.
const MAX_METRICS: usize = 12;

/// Returns the section; nothing where there is nothing to compare with, or nothing differs.
pub fn section(data: &ReportData) -> Option<Markup> {
    let mut part = Markup::default();
    if let Some(variants) = variants(data) {
        part.push(el("h3").text("Between the variants"));
        part.push(variants);
    }
    if let Some(since) = data.previous.as_ref().and_then(|previous| since_last(data, previous)) {
        part.push(since);
    }
    (!part.is_empty()).then_some(part)
}

fn since_last(data: &ReportData, previous: &SinceLast) -> Option<Markup> {
    let diff = &previous.diff;
    let is_same = diff.changed.is_empty() && diff.only_left.is_empty() && diff.only_right.is_empty();
    if is_same && diff.environment.is_empty() {
        return None;
    }
    let mut part = Markup::join([el("h3").text("Since the run before")]);
    let follows = diff.changed.iter().filter(|node| node.is_consequence).count();
    let mut text =
        format!("Run {} of {} had {} of these results", previous.run, utc(previous.started_ms), diff.same.len());
    if follows > 0 {
        text.push_str(&format!("; by their inputs alone, {} differ", count(follows, "node")));
    }
    for (nodes, what) in [(&diff.only_left, "no longer there"), (&diff.only_right, "new")] {
        if !nodes.is_empty() {
            text.push_str(&format!("; {} {what}", count(nodes.len(), "node")));
        }
    }
    part.push(el("p").text(format!("{text}.")));
    let mut table = Table::new("settings", ["Of", "What", "Before", "Now"].map(Markup::text));
    let mut num_rows = 0;
    for change in diff.run.iter().filter(|change| change.what != "command") {
        table.row(Markup::text("run"), change_cells(change));
        num_rows += 1;
    }
    for change in &diff.environment {
        table.row(Markup::text("environment"), change_cells(change));
        num_rows += 1;
    }
    for node in diff.changed.iter().filter(|node| !node.is_consequence) {
        num_rows += cause_rows(&mut table, data, node, None);
    }
    if num_rows > 0 {
        part.push(table);
    }
    part.push(metrics(data, previous));
    Some(part)
}

/// Returns the numbers of scores that differ, then others, as far as they are few.
fn metrics(data: &ReportData, previous: &SinceLast) -> Markup {
    let mut all: Vec<_> =
        previous.diff.metrics.iter().filter(|change| change.left.is_some() && change.right.is_some()).collect();
    all.retain(|change| change.metric.starts_with("score/"));
    if all.is_empty() {
        return Markup::default();
    }
    let more = all.len().saturating_sub(MAX_METRICS);
    let mut table = Table::new("settings", ["Node", "Number", "Before", "Now", "Difference"].map(Markup::text));
    for change in all.into_iter().take(MAX_METRICS) {
        let (left, right) = (change.left.unwrap_or_default(), change.right.unwrap_or_default());
        let sign = if right > left { "+" } else { "" };
        let class = if right > left { "difference higher" } else { "difference lower" };
        let cells = [
            el("code").text(&change.metric).into(),
            Markup::text(number(left)),
            Markup::text(number(right)),
            el("span").class(class).text(format!("{sign}{}", number(right - left))).into(),
        ];
        table.row(link(data, &change.node), cells);
    }
    let note = (more > 0).then(|| el("p").class("muted").text(format!("and {more} more: deepgen diff shows them")));
    Markup::join([Markup::from(table)].into_iter().chain(note.map(Markup::from)))
}

/// Returns what sets each variant apart from the first one.
fn variants(data: &ReportData) -> Option<Markup> {
    let sweep = data.saved.sweep.as_ref()?;
    let (first, others) = sweep.variants.split_first()?;
    let mut table = Table::new("settings", ["Variant", "Node", "What", "First variant", "This one"].map(Markup::text));
    let mut num_rows = 0;
    for variant in others {
        // Nodes of the pipeline whose results differ, and what they are called in either variant.
        let mut differing: BTreeSet<&NodeName> = BTreeSet::new();
        for planned in &data.saved.plan.nodes {
            let Some((plain, _)) = first.nodes.iter().find(|(_, own)| **own == planned.node.name) else { continue };
            let Some(other) = variant.nodes.get(plain).and_then(|own| data.saved.node(own)) else { continue };
            if other.fingerprint == planned.fingerprint {
                continue;
            }
            let diff = compare::node(planned, other, &|left, right| {
                differing.contains(left)
                    && first.nodes.iter().any(|(plain, own)| own == left && variant.nodes.get(plain) == Some(right))
            });
            differing.insert(&planned.node.name);
            if !diff.is_consequence {
                num_rows +=
                    cause_rows(&mut table, data, &NodeDiff { node: plain.clone(), ..diff }, Some(&variant.name));
            }
        }
    }
    (num_rows > 0).then(|| table.into())
}

/// Adds a row for each difference that is a cause; returns how many.
fn cause_rows(table: &mut Table, data: &ReportData, node: &NodeDiff, variant: Option<&str>) -> usize {
    let causes: Vec<&Difference> = node.differences.iter().filter(|part| part.section != Section::Input).collect();
    // Inputs that were wired otherwise are causes where there is nothing else.
    let causes = if causes.is_empty() { node.differences.iter().collect() } else { causes };
    for difference in causes.iter().take(MAX_DIFFERENCES) {
        let is_hash = matches!(difference.section, Section::Input | Section::Content);
        let side = |value: &Option<String>| -> Markup {
            match value {
                Some(value) if is_hash => el("code").text(value.get(..12).unwrap_or(value)).into(),
                Some(value) => el("code").text(value).into(),
                None => el("span").class("muted").text("absent").into(),
            }
        };
        let what = match (difference.section, difference.key.as_str()) {
            (Section::Setting, key) => key.to_owned(),
            (section, "") => section.name().to_owned(),
            (section, key) => format!("{} {key}", section.name()),
        };
        let rest = [el("code").text(what).into(), side(&difference.old), side(&difference.new)];
        match variant {
            Some(variant) => table.row(Markup::text(variant), [Markup::text(&node.node)].into_iter().chain(rest)),
            None => table.row(link(data, &node.node), rest),
        }
    }
    let num_more = causes.len().saturating_sub(MAX_DIFFERENCES);
    if num_more > 0 {
        let more = Markup::text(format!("and {num_more} more"));
        match variant {
            Some(variant) => table.row(Markup::text(variant), [Markup::text(&node.node), more]),
            None => table.row(link(data, &node.node), [more]),
        }
    }
    causes.len()
}

fn change_cells(change: &Change) -> [Markup; 3] {
    let side = |value: &Option<String>| -> Markup {
        match value.as_deref() {
            None | Some("" | "null") => el("span").class("muted").text("none").into(),
            Some(hash) if hash.len() >= 40 && hash.chars().all(|c| c.is_ascii_hexdigit()) => {
                el("code").attr("title", hash).text(&hash[..12]).into()
            }
            Some(value) => Markup::text(value),
        }
    };
    [el("code").text(&change.what).into(), side(&change.left), side(&change.right)]
}

/// Links to a node's details, if it is in this run.
fn link(data: &ReportData, node: &NodeName) -> Markup {
    match data.node(node) {
        Some(_) => el("a").attr("href", format!("#{}", anchor("node", &node.0))).text(node).into(),
        None => Markup::text(node),
    }
}
