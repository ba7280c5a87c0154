//! Sends to a server what it does not hold yet.
//!
//! What it holds is asked for first: parameters never change, and of each number only the points after the newest one are
//! sent. So an export that was cut short, or of a run that goes on, is gone on with by the same command.

use std::collections::BTreeMap;

use super::client::{Client, Held, MlflowError};
use super::record::{NODE_TAG, PARENT_TAG, Point, RUN_TAG, Record};

/// What an export did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exported {
    /// The experiment's id.
    pub experiment: String,
    /// MLflow's id of the run itself.
    pub parent: String,
    /// Runs that were made.
    pub num_created: usize,
    /// Runs that were there.
    pub num_continued: usize,
    /// Numbers that were sent.
    pub num_points: usize,
}

/// Exports the records of the run `run` into an experiment; the first record is the parent of the others.
///
/// # Errors
/// When nobody answers, or the server refuses.
pub fn export(client: &Client, experiment: &str, run: &str, records: &[Record]) -> Result<Exported, MlflowError> {
    let id = client.experiment(experiment)?;
    let mut held = client.runs_tagged(&id, (RUN_TAG, run), NODE_TAG)?;
    let mut told = Exported { experiment: id, ..Exported::default() };
    for record in records {
        let mut tags = record.tags.clone();
        if !record.node.is_empty() {
            tags.insert(PARENT_TAG.into(), told.parent.clone());
        }
        let held = match held.remove(&record.node) {
            Some(held) => {
                told.num_continued += 1;
                held
            }
            None => {
                told.num_created += 1;
                client.create(&told.experiment, record, &tags)?
            }
        };
        if record.node.is_empty() {
            told.parent.clone_from(&held.id);
        }
        let points = points_after(&record.points, &held);
        let (params, tags) = (missing(&record.params, &held.params), missing(&tags, &held.tags));
        client.log(&held.id, &params, &tags, (&points, record.start_ms))?;
        client.update(&held.id, record)?;
        told.num_points += points.len();
    }
    Ok(told)
}

/// Returns the entries that the server does not hold as they are.
fn missing(own: &BTreeMap<String, String>, held: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    own.iter().filter(|(key, value)| held.get(*key) != Some(*value)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Returns the points after the newest one of their name.
fn points_after(points: &[Point], held: &Held) -> Vec<Point> {
    points.iter().filter(|point| held.steps.get(&point.key).is_none_or(|&step| point.step > step)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_is_sent() {
        let point = |key: &str, step| Point { key: key.into(), value: 1.0, step };
        let points = [point("a", 1), point("a", 2), point("a", 3), point("b", 1)];
        let held = Held { steps: BTreeMap::from([("a".to_owned(), 2)]), ..Held::default() };
        assert_eq!(points_after(&points, &held), [point("a", 3), point("b", 1)]);
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        assert_eq!(missing(&map(&[("a", "1"), ("b", "2")]), &map(&[("a", "1"), ("b", "3")])), map(&[("b", "2")]));
    }
}
