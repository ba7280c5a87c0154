//! The page: head, navigation, summary and the sections in the order in which a reader asks.
//!
//! A pure function of [`ReportData`]: the same data give the same text. Style and script are constants of the program;
//! nothing is loaded from anywhere.

use super::data::{NodeReport, ReportData};
use super::markup::{Element, Markup, el};
use super::{curves, dag, differences, provenance, sample_grid, score_table, sweep_table, trouble};
use crate::progress::format::{count, duration, utc};
use crate::run::event::{NodeState, Origin};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// Refuses everything from outside: what the page shows is in the page.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'";

/// Returns the report as one HTML document.
pub fn render(data: &ReportData) -> String {
    let sections = sections(data);
    let title = format!("{} \u{00b7} {}", data.saved.pipeline, data.view.run);
    let head = el("head")
        .add(el("meta").attr("charset", "utf-8"))
        .add(el("meta").attr("name", "viewport").attr("content", "width=device-width, initial-scale=1"))
        .add(el("meta").attr("name", "color-scheme").attr("content", "light dark"))
        .add(el("meta").attr("http-equiv", "Content-Security-Policy").attr("content", POLICY))
        .add(el("title").text(title))
        .add(el("style").add(Markup::raw(STYLE)));
    let navigation = navigation(data, &sections);
    let main = el("main").attr("id", "top").add(header(data)).add_all(sections.into_iter().map(section));
    let body = el("body").add(navigation).add(main).add(footer(data)).add(el("script").add(Markup::raw(SCRIPT)));
    format!("<!doctype html>\n{}", Markup::from(el("html").attr("lang", "en").add(head).add(body)))
}

/// A section of the page.
struct Section {
    id: &'static str,
    title: &'static str,
    /// What it shows, for a reader who sees it for the first time.
    lead: &'static str,
    body: Markup,
}

fn sections(data: &ReportData) -> Vec<Section> {
    let has_failed = data.nodes.iter().any(|node| matches!(node.state, NodeState::Failed { .. }));
    let all = [
        ("trouble", if has_failed { "Failures and notes" } else { "Notes" }, "", trouble::section(data)),
        ("comparison", "Comparison", "", sweep_table::section(data)),
        (
            "differences",
            "Why results differ",
            "Causes first; what differs only because its inputs do is counted.",
            differences::section(data),
        ),
        (
            "graph",
            "Graph",
            "What was run, left to right. Choose a node for its settings, inputs and files.",
            Some(dag::section(data)),
        ),
        (
            "scores",
            "Scores",
            "Every benchmark over the checkpoints of the pipeline, in their order. Graded scores move long before strict ones do.",
            score_table::section(data),
        ),
        (
            "samples",
            "Samples",
            "The same prompts for every checkpoint, chosen by their place in the list and by nothing else.",
            sample_grid::section(data),
        ),
        (
            "curves",
            "Curves",
            "Training losses are smoothed, with the logged values faint behind; everything else is as logged.",
            curves::section(data),
        ),
        ("provenance", "Provenance", "", Some(provenance::section(data))),
    ];
    let present = |(id, title, lead, body): (&'static str, &'static str, &'static str, Option<Markup>)| {
        Some(Section { id, title, lead, body: body? })
    };
    all.into_iter().filter_map(present).collect()
}

fn section(section: Section) -> Element {
    let heading = format!("{}-title", section.id);
    let mut part = el("section").attr("id", section.id).attr("aria-labelledby", &heading);
    part = part.add(el("h2").attr("id", heading).text(section.title));
    if !section.lead.is_empty() {
        part = part.add(el("p").class("lead").text(section.lead));
    }
    part.add(section.body)
}

fn navigation(data: &ReportData, sections: &[Section]) -> Element {
    let link = |section: &Section| el("li").add(el("a").attr("href", format!("#{}", section.id)).text(section.title));
    let home = el("a").class("home").attr("href", "#top").text(&data.saved.pipeline);
    el("nav").attr("aria-label", "Sections").add(home).add(el("ul").add_all(sections.iter().map(link)))
}

fn header(data: &ReportData) -> Element {
    let (class, sign) = match data.outcome {
        "done" => ("ran", "\u{2713}"),
        "failed" => ("failed", "\u{2715}"),
        "running" => ("active", "\u{25b6}"),
        _ => ("blocked", "\u{25a0}"),
    };
    let outcome = el("span")
        .class(format!("outcome {class}"))
        .add(el("span").attr("aria-hidden", "true").text(sign))
        .text(format!(" {}", data.outcome));
    let kind = if data.saved.sweep.is_some() { "Experiment" } else { "Pipeline" };
    let is_smoke = data.saved.plan.nodes.iter().any(|planned| planned.is_smoke);
    let kind = if is_smoke { format!("{kind}, smoke test: two steps of every stage") } else { kind.to_owned() };
    el("header")
        .add(el("p").class("kicker").text(kind))
        .add(el("h1").text(&data.saved.pipeline).text(" ").add(outcome))
        .add(el("p").class("when").text(when(data)))
        .add(el("dl").class("tiles").add_all(tiles(data)))
}

fn when(data: &ReportData) -> String {
    let resumed = match data.view.owners.len() {
        0 | 1 => String::new(),
        num => format!(", continued {}", count(num - 1, "time")),
    };
    format!("Run {} \u{00b7} started {}{resumed}", data.view.run, utc(data.view.started_ms))
}

fn tiles(data: &ReportData) -> Vec<Element> {
    let total = data.view.updated_ms.saturating_sub(data.view.started_ms) as f64 / 1000.0;
    let num = |is: &dyn Fn(&NodeReport) -> bool| data.nodes.iter().filter(|node| is(node)).count();
    let ran = num(&|node| matches!(node.state, NodeState::Done { origin: Origin::Ran { .. } }));
    let done = num(&|node| node.state.is_done());
    let failed = num(&|node| matches!(node.state, NodeState::Failed { .. }));
    let left = data.nodes.len() - done - failed;
    let saved: f64 = data
        .nodes
        .iter()
        .filter(|node| matches!(node.state, NodeState::Done { origin: Origin::Cached | Origin::Shared { .. } }))
        .filter_map(|node| node.seconds)
        .sum();
    let mut nodes = vec![format!("{ran} ran"), format!("{} cached", done - ran)];
    nodes.extend((failed > 0).then(|| format!("{failed} failed")));
    nodes.extend((left > 0).then(|| format!("{left} left")));
    let cached =
        if saved > 0.0 { format!("{} more from the cache", duration(saved)) } else { "nothing was cached".to_owned() };
    vec![
        tile("Profile", &data.saved.profile, "sizes and values of every stage"),
        tile("Seed", &data.saved.seed.to_string(), "of the pipeline"),
        tile("Time", &duration(total), &cached),
        tile("Nodes", &data.nodes.len().to_string(), &nodes.join(", ")),
    ]
}

fn tile(name: &str, value: &str, note: &str) -> Element {
    el("div").add(el("dt").text(name)).add(el("dd").add(el("b").text(value)).add(el("span").text(note)))
}

fn footer(data: &ReportData) -> Element {
    let text = format!("deepgen {} \u{00b7} as of {}", env!("CARGO_PKG_VERSION"), utc(data.view.updated_ms));
    el("footer").add(el("p").text(text))
}
