//! The curves of a run, node by node: losses, validation, rewards, and the images drawn on the way.
//!
//! Knows which nodes have curves; what belongs on one chart is decided by [`super::series`].

use deepgen_contract::stage::StageKind;

use super::chart::figure;
use super::data::{NodeReport, ReportData};
use super::markup::{Markup, anchor, details, el};
use super::series::{Chart, charts};
use super::training_samples;

/// Returns the curves of all nodes that have some; nothing when none has.
pub fn section(data: &ReportData) -> Option<Markup> {
    let parts: Vec<Markup> = data.nodes.iter().filter_map(node_curves).collect();
    (!parts.is_empty()).then(|| Markup::join(parts))
}

fn node_curves(node: &NodeReport) -> Option<Markup> {
    let charts = charts(&node.metrics);
    if charts.is_empty() && node.samples.is_none() {
        return None;
    }
    let planned = &node.planned.node;
    let step_name = if planned.stage_kind() == Some(StageKind::Rl) { "RL iteration" } else { "iteration" };
    let draw = |chart: &Chart| figure(chart, &planned.name.0, step_name);
    let (main, other): (Vec<&Chart>, Vec<&Chart>) = charts.iter().partition(|chart| chart.is_main);
    let heading = el("h3")
        .add(el("a").attr("href", format!("#{}", anchor("node", &planned.name.0))).text(&planned.name))
        .text(" ")
        .add(el("span").class("muted").text(planned.stage_kind().map_or("", kind_words)));
    let mut part = el("div").class("stage").add(heading);
    part = part.add(el("div").class("charts").add_all(main.into_iter().map(draw)));
    if !other.is_empty() {
        let titles: Vec<&str> = other.iter().map(|chart| chart.title.as_str()).collect();
        let summary = Markup::text(format!("More curves: {}", titles.join(", ")));
        part = part.add(details(summary, el("div").class("charts").add_all(other.into_iter().map(draw))));
    }
    let drawn = node.samples.as_ref().map(|samples| training_samples::figures(samples, step_name));
    Some(part.add_all(drawn).into())
}

fn kind_words(kind: StageKind) -> &'static str {
    match kind {
        StageKind::Train => "flow-matching training",
        StageKind::Rl => "reinforcement learning, MR-GRPO",
        StageKind::BaseVae => "autoencoder",
        StageKind::BaseVlm => "vision-language model",
        StageKind::BaseDit => "diffusion transformer",
        _ => "",
    }
}
