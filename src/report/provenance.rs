//! Where everything came from: how to make it again, the machines, and for each node identity, settings, inputs, files.
//!
//! Knows manifests and plans; what can be long is folded away.

use std::collections::BTreeMap;

use deepgen_contract::artifact::{Environment, Manifest};
use rayon::prelude::*;

use super::dag::{look, metric_of_note};
use super::data::{NodeReport, ReportData};
use super::markup::{Markup, Table, anchor, details, el};
use super::trouble::quoted;
use crate::progress::format::{bytes, count, duration, number, utc};
use crate::spec::Origin;

/// Files of an artifact that are listed; a folder of images has more.
const MAX_FILES: usize = 40;

/// Returns the whole section.
pub fn section(data: &ReportData) -> Markup {
    let mut part = reproduce(data);
    part.push(el("h3").text("Machines and programs"));
    part.push(machines(data));
    part.push(el("h3").text("Nodes"));
    part.push(overview(data));
    let nodes: Vec<Markup> = data.nodes.par_iter().map(|node| node_details(data, node)).collect();
    part.push(el("div").class("nodes").add_all(nodes));
    part
}

/// Returns the commands that make the run again.
fn reproduce(data: &ReportData) -> Markup {
    let mut lines = Vec::new();
    let environments = environments(data);
    let mut commits: Vec<(&str, bool)> = environments
        .iter()
        .filter_map(|(environment, _)| Some((environment.git_commit.as_deref()?, environment.git_dirty)))
        .collect();
    commits.dedup();
    let note = match commits[..] {
        [] => Some("The checkout is not known: no git commit was recorded.".to_owned()),
        [(commit, is_dirty)] => {
            lines.push(format!("git checkout {commit}"));
            is_dirty
                .then(|| "The checkout held uncommitted changes, so the commit alone does not give it back.".to_owned())
        }
        _ => Some("Results were made from more than one checkout; the table below tells which.".to_owned()),
    };
    lines.push(command(&data.view.command));
    let note = note.map(|note| el("p").class("muted").text(note));
    Markup::join(
        [el("h3").text("Make it again"), el("pre").class("command").text(lines.join("\n"))].into_iter().chain(note),
    )
}

/// Returns a command line as a person types it: the program by its name alone.
pub fn command(arguments: &[String]) -> String {
    let mut words: Vec<String> = arguments.iter().map(|argument| quoted(argument)).collect();
    if let (Some(first), Some(program)) = (words.first_mut(), arguments.first()) {
        let name = std::path::Path::new(program).file_name().map(|name| name.to_string_lossy().into_owned());
        *first = quoted(&name.unwrap_or_else(|| program.clone()));
    }
    words.join(" ")
}

/// Returns the distinct environments, with the nodes made in each; device and threads belong to the node.
fn environments(data: &ReportData) -> Vec<(Environment, Vec<&NodeReport>)> {
    let mut all: Vec<(Environment, Vec<&NodeReport>)> = Vec::new();
    for node in &data.nodes {
        let Some(manifest) = &node.manifest else { continue };
        let common = Environment { device: String::new(), threads: 0, ..manifest.environment.clone() };
        match all.iter_mut().find(|(other, _)| *other == common) {
            Some((_, nodes)) => nodes.push(node),
            None => all.push((common, vec![node])),
        }
    }
    all
}

fn machines(data: &ReportData) -> Markup {
    let columns = ["Nodes", "Host", "System", "Processor", "deepgen", "Worker", "Commit"];
    let mut table = Table::new("facts", columns.map(Markup::text));
    for (environment, nodes) in environments(data) {
        let commit = match &environment.git_commit {
            Some(commit) if environment.git_dirty => format!("{} with changes", short(commit)),
            Some(commit) => short(commit),
            None => "unknown".to_owned(),
        };
        let cells = [
            Markup::text(&environment.host),
            Markup::text(&environment.os),
            Markup::text(format!("{}, {}", environment.cpu, count(environment.cores, "core"))),
            Markup::text(&environment.deepgen_version),
            el("code").attr("title", &environment.worker_blake3).text(short(&environment.worker_blake3)).into(),
            el("code").attr("title", environment.git_commit.as_deref().unwrap_or_default()).text(commit).into(),
        ];
        table.row(Markup::text(count(nodes.len(), "node")), cells);
    }
    table.into()
}

fn short(hash: &str) -> String {
    hash.chars().take(12).collect()
}

/// Returns all nodes as a table: the same as the graph, for those who do not see it.
fn overview(data: &ReportData) -> Markup {
    let columns = ["Node", "State", "Time", "Of note", "Stage", "Reads", "Fingerprint"];
    let mut table = Table::new("facts", columns.map(Markup::text));
    for node in &data.nodes {
        let (class, sign, word) = look(&node.state);
        let state = el("span").class(format!("state {class}")).attr("aria-hidden", "true").text(sign);
        let inputs: Vec<&str> = node.planned.node.inputs.values().map(|input| input.0.as_str()).collect();
        let cells = [
            Markup::join([state.into(), Markup::text(format!(" {word}"))]),
            Markup::text(node.seconds.map_or(String::new(), duration)),
            Markup::text(metric_of_note(node).map_or(String::new(), |(name, value)| format!("{name} {value}"))),
            Markup::text(&node.planned.node.stage),
            Markup::text(inputs.join(", ")),
            el("code").text(node.planned.fingerprint.short()).into(),
        ];
        table.row(el("a").attr("href", format!("#{}", anchor("node", &node.name().0))).text(node.name()), cells);
    }
    table.into()
}

fn node_details(data: &ReportData, node: &NodeReport) -> Markup {
    let planned = &node.planned.node;
    let (class, sign, word) = look(&node.state);
    let summary = Markup::join([
        el("span").class(format!("state {class}")).attr("aria-hidden", "true").text(sign).into(),
        Markup::text(" "),
        el("b").text(&planned.name).into(),
        el("span").class("muted").text(format!(" {word}, stage {}", planned.stage)).into(),
    ]);
    let mut body = identity(data, node);
    let changed = changed_settings(node);
    body.push(el("h4").text("Settings that are not the stage's defaults"));
    body.push(if changed.is_empty() {
        el("p").class("muted").text("None.").into()
    } else {
        settings_table(node, &changed)
    });
    let all = planned.leaves();
    body.push(details(format_markup(&count(all.len(), "setting"), "in all"), settings_table(node, &all)));
    let metrics = node.last_metrics();
    if !metrics.is_empty() {
        body.push(details(format_markup(&count(metrics.len(), "final number"), ""), metrics_table(&metrics)));
    }
    if let Some(manifest) = &node.manifest {
        let total: u64 = manifest.files.iter().map(|file| file.bytes).sum();
        let summary = format_markup(&count(manifest.files.len(), "file"), &bytes(total));
        body.push(details(summary, files_table(manifest)));
    }
    details(summary, body).attr("id", anchor("node", &planned.name.0)).class("card node-details").into()
}

/// Returns in words what the machine made of a node's last attempt.
fn throughput(numbers: &BTreeMap<String, f64>) -> String {
    let get = |name: &str| numbers.get(name).copied();
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let of_step = |part: &str| Some(percent(get(part)? / get("time/step_seconds")?.max(1e-12)));
    let all = [
        get("throughput/images_per_second").map(|rate| format!("{} images a second", number(rate))),
        get("time/step_seconds").map(|seconds| format!("{} s a step", number(seconds))),
        of_step("time/data_wait_seconds").map(|share| format!("{share} of it waiting for data")),
        of_step("time/checkpoint_seconds").map(|share| format!("{share} for checkpoints")),
        get("throughput/tflops").map(|rate| format!("{} TFLOP/s", number(rate))),
        get("throughput/mfu").map(|share| format!("{} of the device's peak (MFU)", percent(share))),
        get("throughput/gpu_utilisation").map(|share| format!("GPU busy {}", percent(share))),
        get("memory/process_peak_gib").map(|gib| format!("{} GiB of memory at most", number(gib))),
        get("memory/gpu_peak_gib").map(|gib| format!("{} GiB on the GPU", number(gib))),
    ];
    all.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn format_markup(first: &str, second: &str) -> Markup {
    Markup::text(if second.is_empty() { first.to_owned() } else { format!("{first}, {second}") })
}

/// Returns what a node's result is identified by, and how it came about.
fn identity(data: &ReportData, node: &NodeReport) -> Markup {
    let planned = &node.planned.node;
    let mut facts: Vec<(&str, Markup)> = vec![
        ("Fingerprint", el("code").text(node.planned.fingerprint).into()),
        ("Seed", Markup::text(planned.seed)),
        ("Code version", Markup::text(format!("{} {}", planned.kind, planned.code_version))),
    ];
    let inputs = planned.inputs.iter().map(|(port, input)| {
        let link = el("a").attr("href", format!("#{}", anchor("node", &input.0))).text(input);
        let fingerprint = node.planned.inputs.get(port).map_or(String::new(), |fingerprint| fingerprint.short());
        el("li").text(format!("{port}: ")).add(link).text(" ").add(el("code").text(fingerprint))
    });
    if !planned.inputs.is_empty() {
        facts.push(("Inputs", el("ul").class("plain").add_all(inputs).into()));
    }
    if let Some(accepted) = &node.accepted {
        let note = if accepted.note.is_empty() { String::new() } else { format!(": {}", accepted.note) };
        let by = format!(", by {} on {}{note}", accepted.by.user, utc(accepted.by.at_ms));
        let own = el("code").text(accepted.to.short());
        facts.push(("Accepted", Markup::join([Markup::text("in place of "), own.into(), Markup::text(by)])));
    }
    if let Some(manifest) = &node.manifest {
        let environment = &manifest.environment;
        facts.push(("Made by", Markup::text(made_by(data, manifest))));
        facts.push((
            "Time",
            Markup::text(format!(
                "{} in {}",
                duration(manifest.run_seconds),
                count(manifest.attempts as usize, "attempt")
            )),
        ));
        if !manifest.throughput.is_empty() {
            facts.push(("Throughput", Markup::text(throughput(&manifest.throughput))));
        }
        facts.push(("Sealed", Markup::text(utc(manifest.sealed_ms))));
        facts.push((
            "Device",
            Markup::text(format!("{}, {}", environment.device, count(environment.threads, "thread"))),
        ));
        facts.push(("Worker", el("code").text(&environment.worker_blake3).into()));
    }
    if let Some(folder) = &node.job_dir {
        facts.push(("Logs", el("code").text(folder).into()));
    }
    let facts = facts.into_iter().map(|(name, value)| Markup::join([el("dt").text(name), el("dd").add(value)]));
    el("dl").class("facts").add_all(facts).into()
}

fn made_by(data: &ReportData, manifest: &Manifest) -> String {
    let is_own = manifest.started_ms >= data.view.started_ms;
    if is_own { format!("this run, as {}", manifest.node) } else { format!("an earlier run, as {}", manifest.node) }
}

/// Returns the settings that were written anywhere but in the stage file outside its profiles.
fn changed_settings(node: &NodeReport) -> Vec<(String, String)> {
    let stage_file = format!("stages/{}.toml", node.planned.node.stage);
    let is_changed = |key: &str| match node.planned.node.origin(key) {
        Some(Origin::File { file, profile: None, .. }) => **file != *stage_file,
        Some(_) => true,
        None => false,
    };
    node.planned.node.leaves().into_iter().filter(|(key, _)| is_changed(key)).collect()
}

fn settings_table(node: &NodeReport, leaves: &[(String, String)]) -> Markup {
    let mut table = Table::new("settings", ["Setting", "Value", "Written in"].map(Markup::text));
    for (key, value) in leaves {
        let from = node.planned.node.origin(key).map_or_else(|| "default of the type".to_owned(), Origin::to_string);
        table.row(el("code").text(key), [el("code").text(value), el("span").class("muted").text(from)]);
    }
    table.into()
}

fn metrics_table(metrics: &BTreeMap<String, f64>) -> Markup {
    let mut table = Table::new("settings", ["Metric", "Value"].map(Markup::text));
    for (name, value) in metrics {
        table.row(el("code").text(name), [Markup::text(number(*value))]);
    }
    table.into()
}

fn files_table(manifest: &Manifest) -> Markup {
    let mut table = Table::new("settings", ["File", "Size", "blake3"].map(Markup::text));
    for file in manifest.files.iter().take(MAX_FILES) {
        table.row(
            el("code").text(&file.path),
            [Markup::text(bytes(file.bytes)), el("code").class("hash").text(&file.blake3).into()],
        );
    }
    let num_more = manifest.files.len().saturating_sub(MAX_FILES);
    let more =
        (num_more > 0).then(|| el("p").class("muted").text(format!("and {num_more} more, in the artifact's manifest")));
    Markup::join([Markup::from(table)].into_iter().chain(more.map(Markup::from)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_names_the_program_without_its_folder() {
        let words = ["/opt/bin/deepgen", "run", "a b.toml", "--set", "x=1"].map(str::to_owned);
        assert_eq!(command(&words), "deepgen run 'a b.toml' --set x=1");
    }
}
