//! What a reader must know before believing the rest: failures with their message and logs, warnings, remarks.
//!
//! Knows the look; remarks come from workers and are shown as they are.

use super::data::{NodeReport, ReportData};
use super::markup::{Element, Markup, anchor, details, el};
use crate::progress::format::count;
use crate::run::event::{Failure, NodeState};

/// Returns failures, warnings and notes; nothing when there are none.
pub fn section(data: &ReportData) -> Option<Markup> {
    let mut part = Markup::default();
    for node in &data.nodes {
        if let NodeState::Failed { failure, .. } | NodeState::Retrying { failure, .. } = &node.state {
            part.push(failed(data, node, failure));
        }
    }
    if let Some(blocked) = blocked(data) {
        part.push(blocked);
    }
    part.push(remarks(data, "warning", "Warnings", |node| node.warnings.clone()));
    part.push(remarks(data, "note", "Remarks", |node| {
        node.manifest.as_ref().map_or_else(Vec::new, |manifest| manifest.notes.clone())
    }));
    (!part.is_empty()).then_some(part)
}

fn failed(data: &ReportData, node: &NodeReport, failure: &Failure) -> Markup {
    let name = &node.name().0;
    let attempts =
        if node.failures > 1 { format!(" after {}", count(node.failures as usize, "attempt")) } else { String::new() };
    let mut card = el("div").class("card failure").add(el("h3").add(link(node)).text(format!(" failed{attempts}")));
    card = card.add(el("p").class("message").text(&failure.message));
    if let Some(folder) = &node.job_dir {
        let place = el("p")
            .text("Logs: ")
            .add(el("code").text(format!("{folder}/stderr.log")))
            .text(" in the artifacts folder, or ");
        let command = format!("deepgen logs {} --run {}", quoted(name), quoted(&data.view.run));
        card = card.add(place.add(el("code").text(command)));
    }
    if !node.log_tail.trim().is_empty() {
        card = card.add(details("End of the log", el("pre").text(&node.log_tail)));
    }
    card.into()
}

/// Says which nodes did not run because of others.
fn blocked(data: &ReportData) -> Option<Element> {
    let is_blocked = |node: &&NodeReport| matches!(node.state, NodeState::Blocked { .. });
    let blocked: Vec<&NodeReport> = data.nodes.iter().filter(is_blocked).collect();
    if blocked.is_empty() {
        return None;
    }
    let links = blocked
        .iter()
        .enumerate()
        .map(|(i, node)| Markup::join([if i > 0 { Markup::text(", ") } else { Markup::default() }, link(node).into()]));
    let verb = if blocked.len() == 1 { "waits" } else { "wait" };
    Some(el("p").text(format!("{} {verb} for that: ", count(blocked.len(), "node"))).add_all(links))
}

/// Returns remarks of one kind; the same remark of several nodes stands once.
fn remarks(
    data: &ReportData,
    class: &'static str,
    title: &'static str,
    of: impl Fn(&NodeReport) -> Vec<String>,
) -> Markup {
    let mut all: Vec<(String, Vec<&NodeReport>)> = Vec::new();
    for node in &data.nodes {
        for text in of(node) {
            match all.iter_mut().find(|(other, _)| *other == text) {
                Some((_, nodes)) => nodes.push(node),
                None => all.push((text, vec![node])),
            }
        }
    }
    if all.is_empty() {
        return Markup::default();
    }
    let item = |(text, nodes): &(String, Vec<&NodeReport>)| {
        let links = nodes.iter().map(|node| Markup::join([link(node).into(), Markup::text(" ")]));
        el("li").add(el("span").class("who").add_all(links)).add(el("span").text(text))
    };
    let list = el("ul").class("remarks").add_all(all.iter().map(item));
    el("div").class(format!("card {class}")).add(el("h3").text(title)).add(list).into()
}

fn link(node: &NodeReport) -> Element {
    el("a").attr("href", format!("#{}", anchor("node", &node.name().0))).text(node.name())
}

/// Returns an argument as a shell reads it back.
pub fn quoted(argument: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !argument.is_empty() && argument.chars().all(is_plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_quoted_when_a_shell_would_change_them() {
        assert_eq!(quoted("sft.optimizer.lr=1e-4"), "sft.optimizer.lr=1e-4");
        assert_eq!(quoted("images[geneval]"), "'images[geneval]'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
