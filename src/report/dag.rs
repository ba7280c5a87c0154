//! The graph of a run as inline SVG: a box for each node with its state, its time and its number of note.
//!
//! Knows the look; where boxes stand is decided by [`super::layout`].

use std::collections::BTreeMap;

use deepgen_contract::id::NodeName;
use deepgen_contract::stage::StageKind;

use super::chart::px;
use super::data::{NodeReport, ReportData};
use super::layout::{Layout, Route, layout};
use super::markup::{Element, Markup, anchor, el};
use crate::progress::format::{duration, number};
use crate::run::event::{NodeState, Origin};

const BOX_WIDTH: f64 = 130.0;
const LINE_HEIGHT: f64 = 15.0;
/// Height of a box beside its lines.
const BOX_PADDING: f64 = 12.0;
const COLUMN_GAP: f64 = 26.0;
const ROW_GAP: f64 = 12.0;
const EDGE_MARGIN: f64 = 6.0;
/// Characters that fit into a line of a box, beside the sign of its state.
const NAME_CHARS: usize = 14;
/// Characters that fit into the other lines.
pub const FACT_CHARS: usize = 19;

/// How a state looks: class, sign and word. The sign says the same as the colour.
pub fn look(state: &NodeState) -> (&'static str, &'static str, &'static str) {
    match state {
        NodeState::Done { origin: Origin::Ran { .. } } => ("ran", "\u{2713}", "ran"),
        NodeState::Done { origin: Origin::Cached } => ("cached", "\u{21ba}", "cached"),
        NodeState::Done { origin: Origin::Shared { .. } } => ("cached", "\u{21ba}", "shared"),
        NodeState::Failed { .. } => ("failed", "\u{2715}", "failed"),
        NodeState::Blocked { .. } => ("blocked", "\u{2298}", "blocked"),
        NodeState::Stopped { .. } => ("blocked", "\u{25a0}", "stopped"),
        NodeState::Retrying { .. } => ("failed", "\u{21bb}", "retrying"),
        NodeState::Running { .. } | NodeState::Sealing { .. } => ("active", "\u{25b6}", "running"),
        NodeState::Waiting | NodeState::Ready => ("waiting", "\u{00b7}", "waiting"),
    }
}

/// Returns the graph with its legend.
pub fn section(data: &ReportData) -> Markup {
    let mut counts: BTreeMap<(&str, &str, &str), usize> = BTreeMap::new();
    for node in &data.nodes {
        *counts.entry(look(&node.state)).or_default() += 1;
    }
    let legend = counts.iter().map(|((class, sign, word), num)| {
        let sign = el("span").class(format!("state {class}")).attr("aria-hidden", "true").text(sign);
        el("li").add(sign).text(format!(" {num} {word}"))
    });
    let figure = el("figure").class("dag").attr("tabindex", 0).add(svg(data));
    Markup::join([el("ul").class("legend").add_all(legend).into(), Markup::from(figure)])
}

fn svg(data: &ReportData) -> Markup {
    let index: BTreeMap<&NodeName, usize> = data.nodes.iter().enumerate().map(|(i, node)| (node.name(), i)).collect();
    let vertex = |node: &NodeReport| {
        let (class, sign, word) = look(&node.state);
        let name = &node.name().0;
        let time = node.seconds.map_or(String::new(), |seconds| format!(", {}", duration(seconds)));
        let number = metric_of_note(node).map_or(String::new(), |(name, value)| format!(", {name} {value}"));
        Vertex {
            lines: lines(node),
            class,
            sign,
            title: format!("{name}: {word}{time}{number}; stage {}", node.planned.node.stage),
            href: Some(format!("#{}", anchor("node", name))),
            sources: node.planned.node.inputs.values().filter_map(|input| index.get(input).copied()).collect(),
            is_done: node.state.is_done(),
        }
    };
    drawing(&data.nodes.iter().map(vertex).collect::<Vec<_>>()).into()
}

/// A box of the drawing.
#[derive(Debug, Clone)]
pub struct Vertex {
    /// Its lines: a name and facts.
    pub lines: Vec<String>,
    /// Class that gives it its colours.
    pub class: &'static str,
    /// Sign that says the same as the colour.
    pub sign: &'static str,
    /// Everything in words.
    pub title: String,
    /// Where it leads to.
    pub href: Option<String>,
    /// Places of the boxes that it reads from, all before its own.
    pub sources: Vec<usize>,
    /// Whether its result is there: other edges are dashed.
    pub is_done: bool,
}

/// Draws a graph.
pub fn drawing(vertices: &[Vertex]) -> Element {
    let mut edges = Vec::new();
    for (target, vertex) in vertices.iter().enumerate() {
        for (at, source) in vertex.sources.iter().enumerate() {
            if !vertex.sources[..at].contains(source) {
                edges.push((*source, target));
            }
        }
    }
    let heights: Vec<f64> = vertices.iter().map(|v| LINE_HEIGHT * v.lines.len() as f64 + BOX_PADDING).collect();
    let layout = layout(&heights, &edges, ROW_GAP);
    let width = layout.num_columns as f64 * (BOX_WIDTH + COLUMN_GAP) - COLUMN_GAP + 2.0 * EDGE_MARGIN;
    let height = layout.height + 2.0 * EDGE_MARGIN;
    let routes = layout.edges.iter().map(|route| edge(&layout, route, !vertices[route.source].is_done));
    let boxes = vertices.iter().enumerate().map(|(i, vertex)| {
        let (x, y) = (x_of(layout.columns[i]), layout.ys[i] + EDGE_MARGIN - heights[i] / 2.0);
        node_box(vertex, x, y, heights[i])
    });
    el("svg")
        .attr("viewBox", format!("0 0 {} {}", px(width), px(height)))
        .attr("role", "img")
        // Smaller than this, names cannot be read; the figure scrolls instead.
        .attr("style", format!("min-width:{}px;max-width:{}px", px(width * 0.7), px(width * 1.1)))
        .add(el("title").text(format!("Graph of {} nodes", vertices.len())))
        .add(el("desc").text("Each box is a node; lines lead from a node to those that read its result. The table under Provenance holds the same."))
        .add(el("g").class("edges").add_all(routes))
        .add_all(boxes)
}

fn x_of(column: usize) -> f64 {
    column as f64 * (BOX_WIDTH + COLUMN_GAP) + EDGE_MARGIN
}

fn edge(layout: &Layout, route: &Route, is_dead: bool) -> Element {
    let mut at = (x_of(layout.columns[route.source]) + BOX_WIDTH, layout.ys[route.source] + EDGE_MARGIN);
    let mut data = format!("M{} {}", px(at.0), px(at.1));
    let mut bend = |x: f64, y: f64| {
        let middle = px((at.0 + x) / 2.0);
        data.push_str(&format!("C{middle} {} {middle} {} {} {}", px(at.1), px(y), px(x), px(y)));
        at = (x, y);
    };
    for (column, y) in &route.through {
        bend(x_of(*column), y + EDGE_MARGIN);
        bend(x_of(*column) + BOX_WIDTH, y + EDGE_MARGIN);
    }
    bend(x_of(layout.columns[route.target]), layout.ys[route.target] + EDGE_MARGIN);
    el("path").class(if is_dead { "edge dead" } else { "edge" }).attr("d", data)
}

/// Returns the lines that name a node: its name, and what sets it apart from nodes of the same name.
pub fn name_lines(name: &str) -> Vec<String> {
    let (plain, variant) = name.split_once('@').unwrap_or((name, ""));
    let (base, axes) = plain.split_once('[').unwrap_or((plain, ""));
    let mut lines = vec![shortened(base, NAME_CHARS)];
    for apart in [axes.trim_end_matches(']'), variant] {
        if !apart.is_empty() {
            lines.push(shortened(apart, FACT_CHARS));
        }
    }
    lines
}

/// Returns the lines of a node's box: its name, time and number.
fn lines(node: &NodeReport) -> Vec<String> {
    let mut lines = name_lines(&node.name().0);
    let (_, _, word) = look(&node.state);
    let time = node.seconds.map_or_else(|| word.to_owned(), brief);
    // Of other nodes the number is a count, which is of less note than their time.
    let is_learning =
        matches!(node.planned.node.stage_kind(), Some(StageKind::Score | StageKind::Rl)) || !node.metrics.is_empty();
    lines.push(match metric_of_note(node).filter(|_| is_learning) {
        None => time,
        Some((name, value)) => {
            let whole = format!("{time} \u{00b7} {name} {value}");
            if whole.chars().count() <= FACT_CHARS { whole } else { format!("{time} \u{00b7} {value}") }
        }
    });
    lines
}

/// Returns a duration in few characters.
fn brief(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0 => "<1s".to_owned(),
        1..=99 => format!("{whole}s"),
        100..=5999 => format!("{}m{:02}s", whole / 60, whole % 60),
        _ => format!("{}h{:02}m", whole / 3600, whole / 60 % 60),
    }
}

fn node_box(vertex: &Vertex, x: f64, y: f64, height: f64) -> Element {
    let text = |(at, text): (usize, &String)| {
        let y = y + BOX_PADDING / 2.0 + LINE_HEIGHT * (at as f64 + 0.75);
        let class = if at == 0 { "name" } else { "facts" };
        el("text").class(class).attr("x", px(x + 11.0)).attr("y", px(y)).text(text)
    };
    let rect = |class: &'static str, width: f64, radius: f64| {
        let rect = el("rect").class(class).attr("x", px(x)).attr("y", px(y));
        rect.attr("width", width).attr("height", px(height)).attr("rx", radius)
    };
    let (sign_x, sign_y) = (x + BOX_WIDTH - 7.0, y + BOX_PADDING / 2.0 + LINE_HEIGHT * 0.75);
    let sign = el("text").class("sign").attr("x", px(sign_x)).attr("y", px(sign_y));
    let mut group = el(if vertex.href.is_some() { "a" } else { "g" }).class(format!("node {}", vertex.class));
    if let Some(href) = &vertex.href {
        group = group.attr("href", href);
    }
    group
        .add(el("title").text(&vertex.title))
        .add(rect("box", BOX_WIDTH, 7.0))
        .add(rect("bar", 4.0, 2.0))
        .add_all(vertex.lines.iter().enumerate().map(text))
        .add(sign.attr("text-anchor", "end").text(vertex.sign))
}

/// Returns the one number that says most about a node, with a short name.
pub fn metric_of_note(node: &NodeReport) -> Option<(String, String)> {
    let metrics = node.last_metrics();
    let wishes: &[&str] = match node.planned.node.stage_kind() {
        Some(StageKind::Score) => &["score/overall"],
        Some(StageKind::Rl) => &["evaluation/", "reward/total", "reward/mean", "reward/", "train/loss"],
        _ => &["validation/loss", "validation/", "train/loss", "data/", ""],
    };
    let starting = |wish: &&str| metrics.iter().find(|(name, _)| name.starts_with(wish));
    let (name, value) = wishes.iter().find_map(starting)?;
    let short = name.split_once('/').map_or(name.as_str(), |(_, short)| short);
    let value = if value.fract() == 0.0 && value.abs() < 1e9 { format!("{value}") } else { three_digits(*value) };
    Some((short.split('_').next().unwrap_or(short).to_owned(), value))
}

fn three_digits(value: f64) -> String {
    if (0.01..100.0).contains(&value.abs()) { format!("{value:.3}") } else { number(value) }
}

/// Returns text of at most `max` characters; what is left out is in the middle, since names differ at both ends.
pub fn shortened(text: &str, max: usize) -> String {
    let chars: Vec<char> = text.chars().collect();
    if chars.len() <= max {
        return text.to_owned();
    }
    let (head, tail) = (max / 2, max - max / 2 - 1);
    chars[..head].iter().chain(&['\u{2026}']).chain(&chars[chars.len() - tail..]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_brief() {
        assert_eq!([0.42, 11.2, 141.0, 7384.0].map(brief), ["<1s", "11s", "2m21s", "2h03m"]);
    }

    #[test]
    fn long_names_lose_their_middle() {
        assert_eq!(shortened("geneval[handoff-1]", 22), "geneval[handoff-1]");
        assert_eq!(shortened("prepare-unireason-text-to-image", 11), "prepa\u{2026}image");
    }
}
