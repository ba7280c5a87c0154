//! What MLflow is told of a run: parameters, tags and numbers, in the words and within the limits of its REST API.
//!
//! Knows no server. Settings become parameters, metric lines become points with their step, final numbers points at the
//! last step; results stay where they are and are named by tags.

use std::collections::{BTreeMap, BTreeSet};

use crate::plan::value_leaves;
use crate::report::{NodeReport, ReportData};
use crate::run::event::{NodeState, RunResult};
use crate::store::ArtifactStore;

/// Tag that tells which run of ours a run of MLflow stands for.
pub const RUN_TAG: &str = "deepgen.run";
/// Tag that tells which node; empty for the run itself.
pub const NODE_TAG: &str = "deepgen.node";
/// Tag by which MLflow draws a run below another one.
pub const PARENT_TAG: &str = "mlflow.parentRunId";
/// Longest key of MLflow, in bytes (`MAX_ENTITY_KEY_LENGTH`).
const MAX_KEY: usize = 250;
/// Longest value of a parameter, in bytes (`MAX_PARAM_VAL_LENGTH`).
const MAX_PARAM: usize = 6000;
/// Longest value of a tag, in bytes: what every storage behind MLflow takes.
const MAX_TAG: usize = 5000;

/// Where a run stands, in MLflow's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Work goes on.
    Running,
    /// All is done.
    Finished,
    /// It ended without a result.
    Failed,
    /// It was stopped.
    Killed,
}

impl Status {
    /// Returns MLflow's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "RUNNING",
            Self::Finished => "FINISHED",
            Self::Failed => "FAILED",
            Self::Killed => "KILLED",
        }
    }
}

/// A number at a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Its name.
    pub key: String,
    /// Its value.
    pub value: f64,
    /// Its step.
    pub step: u64,
}

/// What becomes one run of MLflow.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Node that it stands for; empty for the run itself, which is the parent of all others.
    pub node: String,
    /// Name that people see.
    pub name: String,
    /// Where it stands.
    pub status: Status,
    /// Start, milliseconds since 1970; also the time of every point, since metric lines hold none.
    pub start_ms: u64,
    /// End, milliseconds since 1970, if it ended.
    pub end_ms: Option<u64>,
    /// Settings.
    pub params: BTreeMap<String, String>,
    /// What it is and where its result lies.
    pub tags: BTreeMap<String, String>,
    /// Numbers, in the order of their steps.
    pub points: Vec<Point>,
}

/// Returns what MLflow is told of a run: first the run itself, then its nodes in the order of the plan. Nodes that nobody
/// worked on are left out.
pub fn records(data: &ReportData, store: &ArtifactStore) -> Vec<Record> {
    let nodes = data.nodes.iter().filter_map(|node| of_node(data, node, store));
    std::iter::once(of_run(data, store)).chain(nodes).collect()
}

fn of_run(data: &ReportData, store: &ArtifactStore) -> Record {
    let view = &data.view;
    let status = match (view.result, data.outcome) {
        (Some(RunResult::Done), _) => Status::Finished,
        (Some(RunResult::Failed), _) => Status::Failed,
        (None, "running") => Status::Running,
        (Some(RunResult::Stopped) | None, _) => Status::Killed,
    };
    let scores = data.nodes.iter().filter(|node| node.scores.is_some()).flat_map(|node| {
        let numbers = node.last_metrics().into_iter();
        numbers.map(|(name, value)| Point { key: format!("{}/{name}", node.name()), value, step: 0 })
    });
    let tags = [
        ("deepgen.pipeline", view.pipeline.clone()),
        ("deepgen.profile", view.profile.clone()),
        ("deepgen.seed", view.seed.to_string()),
        ("deepgen.command", view.command.join(" ")),
        ("deepgen.folder", store.layout().run(&view.run).display().to_string()),
    ];
    Record {
        node: String::new(),
        name: view.run.clone(),
        status,
        start_ms: view.started_ms,
        end_ms: (status != Status::Running).then_some(view.updated_ms),
        params: BTreeMap::new(),
        tags: with_identity(data, "", tags),
        points: with_valid_keys(scores.collect()),
    }
}

fn of_node(data: &ReportData, node: &NodeReport, store: &ArtifactStore) -> Option<Record> {
    let seen = data.view.nodes.get(node.name());
    let status = match &node.state {
        // Its orchestrator has gone.
        NodeState::Running { .. } | NodeState::Sealing { .. } | NodeState::Retrying { .. }
            if data.outcome == "interrupted" =>
        {
            Status::Killed
        }
        NodeState::Running { .. } | NodeState::Sealing { .. } | NodeState::Retrying { .. } => Status::Running,
        NodeState::Done { .. } => Status::Finished,
        NodeState::Failed { .. } => Status::Failed,
        NodeState::Stopped { .. } => Status::Killed,
        NodeState::Waiting | NodeState::Ready | NodeState::Blocked { .. } => return None,
    };
    let since = seen.map_or(data.view.started_ms, |seen| seen.since_ms);
    let manifest = node.manifest.as_ref();
    let planned = &node.planned;
    let mut tags = vec![
        ("deepgen.stage", planned.node.stage.clone()),
        ("deepgen.kind", planned.node.kind.clone()),
        ("deepgen.code_version", planned.node.code_version.to_string()),
        ("deepgen.fingerprint", planned.fingerprint.to_string()),
        ("deepgen.seed", planned.node.seed.to_string()),
        ("deepgen.device", planned.node.device.clone()),
    ];
    if let Some(manifest) = manifest {
        tags.push(("deepgen.result", store.path(&planned.fingerprint).display().to_string()));
        tags.push(("deepgen.host", manifest.environment.host.clone()));
        tags.push(("mlflow.source.git.commit", manifest.environment.git_commit.clone().unwrap_or_default()));
    }
    if planned.is_smoke {
        tags.push(("deepgen.smoke", "true".into()));
    }
    if let NodeState::Failed { failure, .. } = &node.state {
        tags.push(("deepgen.failure", failure.message.clone()));
    }
    Some(Record {
        node: node.name().to_string(),
        name: node.name().to_string(),
        status,
        start_ms: manifest.map_or_else(|| seen.and_then(|seen| seen.started_ms).unwrap_or(since), |m| m.started_ms),
        end_ms: (status != Status::Running).then(|| manifest.map_or(since, |manifest| manifest.sealed_ms)),
        params: params(planned.node.settings.get("settings").unwrap_or(&planned.node.settings)),
        tags: with_identity(data, &node.name().0, tags),
        points: with_valid_keys(points(node)),
    })
}

fn with_identity<'a>(
    data: &ReportData,
    node: &str,
    tags: impl IntoIterator<Item = (&'a str, String)>,
) -> BTreeMap<String, String> {
    let identity = [
        (RUN_TAG, data.view.run.clone()),
        (NODE_TAG, node.to_owned()),
        ("mlflow.source.name", "deepgen".to_owned()),
        ("mlflow.source.type", "JOB".to_owned()),
    ];
    let all = identity.into_iter().chain(tags);
    all.filter(|(key, value)| *key == NODE_TAG || !value.is_empty())
        .map(|(key, value)| (key.to_owned(), cut(&value, MAX_TAG)))
        .collect()
}

/// Returns metric lines as points, and final numbers that no line holds as points at the last step.
fn points(node: &NodeReport) -> Vec<Point> {
    let rows = &node.metrics;
    let mut points: Vec<Point> = rows
        .iter()
        .flat_map(|row| row.values.iter().map(|(key, &value)| Point { key: key.clone(), value, step: row.step }))
        .collect();
    if let Some(manifest) = &node.manifest {
        let told: BTreeSet<&String> = rows.iter().flat_map(|row| row.values.keys()).collect();
        let step = rows.last().map_or(0, |row| row.step);
        let rest = manifest.metrics.iter().filter(|(key, _)| !told.contains(key));
        points.extend(rest.map(|(key, &value)| Point { key: key.clone(), value, step }));
    }
    points
}

fn params(settings: &serde_json::Value) -> BTreeMap<String, String> {
    let leaves = value_leaves(settings);
    let keys = valid_keys(leaves.iter().map(|(key, _)| key.as_str()));
    let value =
        |value: &str| cut(value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value), MAX_PARAM);
    leaves.iter().filter_map(|(key, text)| Some((keys.get(key.as_str())?.clone(), value(text)))).collect()
}

fn with_valid_keys(points: Vec<Point>) -> Vec<Point> {
    let keys: BTreeMap<String, String> = {
        let known: BTreeSet<&str> = points.iter().map(|point| point.key.as_str()).collect();
        valid_keys(known.into_iter()).into_iter().map(|(key, valid)| (key.to_owned(), valid)).collect()
    };
    points.into_iter().map(|point| Point { key: keys[&point.key].clone(), ..point }).collect()
}

/// Returns for each key one that MLflow takes: letters, digits, `_ - . /` and spaces, a path without empty parts. Two
/// keys never become one.
fn valid_keys<'a>(keys: impl Iterator<Item = &'a str>) -> BTreeMap<&'a str, String> {
    let mut taken = BTreeSet::new();
    let mut valid = BTreeMap::new();
    for key in keys {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "_-. /".contains(c) { c } else { '_' };
        let parts: Vec<String> = key
            .split('/')
            .map(|part| part.chars().map(plain).collect::<String>().trim_matches([' ', '.']).to_owned())
            .filter(|part| !part.is_empty())
            .collect();
        let name = if parts.is_empty() { "_".to_owned() } else { parts.join("/") };
        let mut candidate = cut(&name, MAX_KEY);
        let mut number = 2;
        while !taken.insert(candidate.clone()) {
            let end = format!("_{number}");
            candidate = format!("{}{end}", cut(&name, MAX_KEY - end.len()));
            number += 1;
        }
        valid.insert(key, candidate);
    }
    valid
}

/// Cuts a text to `max` bytes, at a character; what is cut ends in dots.
fn cut(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let end = (0..=max - 3).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    format!("{}...", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn keys_become_such_as_mlflow_takes_and_stay_apart() {
        let keys = ["scores[geneval,a]/score/x", "scores[geneval;a]/score/x", "a//b", "/a", "..", "data/share/w/o SCB"];
        let valid = valid_keys(keys.into_iter());
        let of = |key: &str| valid[key].as_str();
        assert_eq!(of("scores[geneval,a]/score/x"), "scores_geneval_a_/score/x");
        assert_eq!(of("scores[geneval;a]/score/x"), "scores_geneval_a_/score/x_2");
        assert_eq!((of("a//b"), of("/a"), of("..")), ("a/b", "a", "_"));
        assert_eq!(of("data/share/w/o SCB"), "data/share/w/o SCB");
        let long = "k".repeat(300);
        let longer = "k".repeat(301);
        let valid = valid_keys([long.as_str(), longer.as_str()].into_iter());
        assert!(valid.values().all(|key| key.len() <= MAX_KEY) && valid[&*long] != valid[&*longer]);
    }

    #[test]
    fn settings_become_parameters_and_long_ones_are_cut() {
        let text = "\u{e9}".repeat(4000);
        let settings = json!({"optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]}, "name": "a", "note": text});
        let params = params(&settings);
        assert_eq!((params["optimizer.lr"].as_str(), params["optimizer.betas"].as_str()), ("0.0001", "[0.9,0.95]"));
        assert_eq!(params["name"], "a");
        assert!(params["note"].len() <= MAX_PARAM && params["note"].ends_with("\u{e9}..."));
    }
}
