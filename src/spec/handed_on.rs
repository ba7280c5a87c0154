//! Whether a training keeps what the next stage will ask of it: told before anything is computed, not at the hand-off.
//!
//! Sees resolved nodes with their edges. Names and shapes of the tensors themselves are compared by the `handoff` node,
//! which stands before every stage that reads them.

use deepgen_contract::settings::Settings;
use deepgen_contract::train::TrainedSource;

use super::diagnostic::Diagnostic;
use super::pipeline::NodeTable;
use super::resolved::Resolved;

/// Reports hand-offs of weights that the training does not keep.
pub fn check(resolved: &Resolved, tables: &[NodeTable], problems: &mut Vec<Diagnostic>) {
    for node in &resolved.nodes {
        let Settings::Handoff(handoff) = &node.settings else { continue };
        let training = node.inputs.get("checkpoint").and_then(|name| resolved.node(name));
        let Some(training) = training else { continue };
        let what = match handoff.from {
            TrainedSource::Last => continue,
            TrainedSource::Ema => "moving average",
            TrainedSource::Best => "best weights",
        };
        let help = match keeping(handoff.from, &training.settings) {
            (true, _) => continue,
            (false, Some(setting)) => {
                format!("set `{setting}` of `{}`, or `from = \"last\"` here", training.name.base())
            }
            (false, None) => "write `from = \"last\"`: this kind of stage keeps nothing else".to_owned(),
        };
        let message = format!("`{}` hands on the {what} of `{}`, which keeps none", node.name, training.name);
        let problem = Diagnostic::new(message).help(help);
        let table = tables.iter().find(|table| table.name == node.name.base());
        problems.push(match table {
            Some(table) => problem.at(&table.spot, "this node"),
            None => problem,
        });
    }
}

/// Returns whether a training keeps these weights, and the setting that makes it do so where there is one.
fn keeping(from: TrainedSource, training: &Settings) -> (bool, Option<&'static str>) {
    match (from, training) {
        (TrainedSource::Last, _) => (true, None),
        (TrainedSource::Ema, Settings::Train(train)) => (train.train.ema.is_some(), Some("train.ema")),
        (TrainedSource::Best, Settings::Train(train)) => (train.train.keep_best, Some("train.keep_best")),
        (TrainedSource::Best, Settings::Rl(rl)) => (rl.policy.keep_best, Some("policy.keep_best")),
        _ => (false, None),
    }
}
