//! Whether a training keeps what the next stage will ask of it: told before anything is computed, not at the hand-off.
//!
//! Sees resolved nodes with their edges. Names and shapes of the tensors themselves are compared by the `handoff` node,
//! which stands before every stage that reads them.

use deepgen_contract::settings::Settings;
use deepgen_contract::train::TrainedSource;

use super::diagnostic::Diagnostic;
use super::pipeline::NodeTable;
use super::resolved::Resolved;

/// Reports hand-offs of a moving average that the training does not keep.
pub fn check(resolved: &Resolved, tables: &[NodeTable], problems: &mut Vec<Diagnostic>) {
    for node in &resolved.nodes {
        let Settings::Handoff(handoff) = &node.settings else { continue };
        let training = node.inputs.get("checkpoint").and_then(|name| resolved.node(name));
        let Some(training) = training.filter(|_| handoff.from == TrainedSource::Ema) else { continue };
        let keeps_average = matches!(&training.settings, Settings::Train(train) if train.train.ema.is_some());
        if keeps_average {
            continue;
        }
        let message = format!("`{}` hands on the moving average of `{}`, which keeps none", node.name, training.name);
        let problem = match &training.settings {
            Settings::Train(_) => Diagnostic::new(message)
                .help(format!("set `train.ema` of `{}`, or `from = \"last\"` here", training.name.base())),
            _ => Diagnostic::new(message).help("write `from = \"last\"`: this kind of stage keeps no average"),
        };
        let table = tables.iter().find(|table| table.name == node.name.base());
        problems.push(match table {
            Some(table) => problem.at(&table.spot, "this node"),
            None => problem,
        });
    }
}
