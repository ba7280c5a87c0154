//! Which combinations of axis values there are: all of them (a product), fewer by `zip` (axes that advance together) and
//! by `exclude` (combinations that are left out).
//!
//! Knows keys and values; serves the axes of nodes and those of experiments.

use super::diagnostic::Diagnostic;
use super::fields::ordered;
use super::path;
use super::tree::{Spot, Table, Tree, Value};

/// `key = [values]`.
#[derive(Debug, Clone)]
pub struct AxisTable {
    /// Settings key, or `input.PORT`; of an experiment `node.key`.
    pub key: String,
    /// Place of the key.
    pub spot: Spot,
    /// Values.
    pub values: Vec<Tree>,
}

/// A combination that is left out: for some axes the values that must meet.
#[derive(Debug, Clone)]
pub struct Exclusion {
    /// Axis, its place, and the values.
    pub entries: Vec<(String, Spot, Vec<Tree>)>,
}

/// The axes of a node or an experiment.
#[derive(Debug, Clone, Default)]
pub struct Axes {
    /// Axes in order of writing.
    pub over: Vec<AxisTable>,
    /// Groups of axes that advance together, each with its place.
    pub zip: Vec<(Vec<String>, Spot)>,
    /// Combinations that are left out.
    pub exclude: Vec<Exclusion>,
}

/// Reads axes: a key may be dotted with or without quotes, and its value is a list.
pub fn parse_over(key: &str, over: &Tree, problems: &mut Vec<Diagnostic>) -> Vec<AxisTable> {
    let mut axes = Vec::new();
    let Some(table) = over.table() else {
        let message = format!("`{key}` is {}, but must be a table of lists", over.value.kind());
        problems.push(Diagnostic::new(message).at(&over.spot, "expected a table"));
        return axes;
    };
    collect(key, "", table, &mut axes, problems);
    axes
}

fn collect(key: &str, prefix: &str, table: &Table, axes: &mut Vec<AxisTable>, problems: &mut Vec<Diagnostic>) {
    for (name, spot, tree) in ordered(table) {
        let axis = path::join(prefix, name);
        match &tree.value {
            Value::List(values) if !values.is_empty() => {
                axes.push(AxisTable { key: axis, spot: spot.clone(), values: values.to_vec() });
            }
            Value::Table(inner) => collect(key, &axis, inner, axes, problems),
            other => {
                let message = format!("`{key}.{axis}` is {}, but must be a list with at least one value", other.kind());
                problems.push(Diagnostic::new(message).at(&tree.spot, "expected a list"));
            }
        }
    }
}

/// Reads `zip = [["a", "b"]]`.
pub fn parse_zip(key: &str, tree: &Tree, problems: &mut Vec<Diagnostic>) -> Vec<(Vec<String>, Spot)> {
    let group = |item: &Tree| match &item.value {
        Value::List(names) => names.iter().map(|name| name.text().map(str::to_owned)).collect::<Option<Vec<_>>>(),
        _ => None,
    };
    let groups: Option<Vec<_>> = match &tree.value {
        Value::List(items) => items.iter().map(|item| Some((group(item)?, item.spot.clone()))).collect(),
        _ => None,
    };
    groups.unwrap_or_else(|| {
        let message = format!("`{key}` must be a list of lists of axes");
        let problem = Diagnostic::new(message).at(&tree.spot, "expected such as [[\"a\", \"b\"]]");
        problems.push(problem.help("each inner list names axes of equal length that advance together"));
        Vec::new()
    })
}

/// Reads `exclude = [{ key = value }]`; a list of values leaves out each of them.
pub fn parse_exclude(key: &str, tree: &Tree, problems: &mut Vec<Diagnostic>) -> Vec<Exclusion> {
    let mut all = Vec::new();
    let Value::List(items) = &tree.value else {
        let message = format!("`{key}` is {}, but must be a list of tables", tree.value.kind());
        problems.push(Diagnostic::new(message).at(&tree.spot, "expected a list"));
        return all;
    };
    for item in items.iter() {
        let Some(table) = item.table() else {
            let message = format!("`{key}` lists {}, but must list tables of axes and values", item.value.kind());
            problems.push(Diagnostic::new(message).at(&item.spot, "expected a table"));
            continue;
        };
        let mut entries = Vec::new();
        collect_exclusion("", table, &mut entries);
        if entries.is_empty() {
            let problem = Diagnostic::new(format!("`{key}` lists a table without an axis")).at(&item.spot, "empty");
            problems.push(problem.help("it would leave out everything: name an axis and a value"));
            continue;
        }
        all.push(Exclusion { entries });
    }
    all
}

fn collect_exclusion(prefix: &str, table: &Table, entries: &mut Vec<(String, Spot, Vec<Tree>)>) {
    for (name, spot, tree) in ordered(table) {
        let axis = path::join(prefix, name);
        match &tree.value {
            Value::Table(inner) => collect_exclusion(&axis, inner, entries),
            Value::List(values) => entries.push((axis, spot.clone(), values.to_vec())),
            _ => entries.push((axis, spot.clone(), vec![tree.clone()])),
        }
    }
}

impl Axes {
    /// Returns the axes grouped: each group advances together, in the order of its first axis.
    pub fn groups(&self) -> Vec<Vec<usize>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for at in 0..self.over.len() {
            if groups.iter().any(|group| group.contains(&at)) {
                continue;
            }
            let zipped = self.zip.iter().find(|(names, _)| names.contains(&self.over[at].key));
            let place = |name: &String| self.over.iter().position(|axis| axis.key == *name);
            let mut group: Vec<usize> =
                zipped.map_or_else(Vec::new, |(names, _)| names.iter().filter_map(place).collect());
            group.retain(|other| self.over[*other].values.len() == self.over[at].values.len());
            if !group.contains(&at) {
                group = vec![at];
            }
            group.dedup();
            groups.push(group);
        }
        groups
    }

    /// Reports groups that name no axis or axes of different lengths. `inherited` are axes that come from elsewhere.
    pub fn check(&self, inherited: &[&str], problems: &mut Vec<Diagnostic>) {
        let own: Vec<&str> = self.over.iter().map(|axis| axis.key.as_str()).collect();
        let mut seen: Vec<&str> = Vec::new();
        for (names, spot) in &self.zip {
            let mut lengths = Vec::new();
            for name in names {
                match self.over.iter().find(|axis| axis.key == *name) {
                    Some(axis) => lengths.push(format!("`{name}` has {}", axis.values.len())),
                    None => {
                        let problem =
                            Diagnostic::new(format!("`zip` names no axis: `{name}`")).at(spot, "in this group");
                        problems.push(problem.nearest(name, own.iter().copied()));
                    }
                }
                if seen.contains(&name.as_str()) {
                    let problem = Diagnostic::new(format!("`zip` names `{name}` twice")).at(spot, "again here");
                    problems.push(problem.help("an axis advances in one group"));
                }
                seen.push(name);
            }
            let num = |name: &String| self.over.iter().find(|axis| axis.key == *name).map(|axis| axis.values.len());
            let all: Vec<usize> = names.iter().filter_map(num).collect();
            if all.windows(2).any(|pair| pair[0] != pair[1]) {
                let message = format!("axes that advance together differ in length: {}", lengths.join(", "));
                let problem = Diagnostic::new(message).at(spot, "in this group");
                problems.push(problem.help("give them equally many values, or take one out of the group"));
            }
        }
        for (name, spot, _) in self.exclude.iter().flat_map(|exclusion| &exclusion.entries) {
            if !own.contains(&name.as_str()) && !inherited.contains(&name.as_str()) {
                let problem = Diagnostic::new(format!("`exclude` names no axis: `{name}`")).at(spot, "no such axis");
                problems.push(problem.nearest(name, own.iter().chain(inherited).copied()));
            }
        }
    }

    /// Returns true when a combination is left out; `value` answers what an axis is in it.
    pub fn excludes<'v>(&self, value: impl Fn(&str) -> Option<&'v Tree>) -> bool {
        let meets = |(name, _, values): &(String, Spot, Vec<Tree>)| {
            value(name).is_some_and(|value| values.iter().any(|other| other.json() == value.json()))
        };
        self.exclude.iter().any(|exclusion| exclusion.entries.iter().all(meets))
    }

    /// Reports values of `exclude` that no axis has.
    pub fn check_values(&self, problems: &mut Vec<Diagnostic>) {
        for (name, _, values) in self.exclude.iter().flat_map(|exclusion| &exclusion.entries) {
            let Some(axis) = self.over.iter().find(|axis| axis.key == *name) else { continue };
            for value in values.iter().filter(|value| !axis.values.iter().any(|known| known.json() == value.json())) {
                let shown = value.json().to_string();
                let valid: Vec<String> = axis.values.iter().map(|known| known.json().to_string()).collect();
                let problem = Diagnostic::new(format!("the axis `{name}` has no value {shown}"));
                let problem = problem.at(&value.spot, "leaves out nothing");
                problems.push(problem.nearest(&shown, valid.iter().map(String::as_str)));
            }
        }
    }
}
