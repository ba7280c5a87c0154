//! Reads the known keys of a table and reports the others: the part that all our files have in common.
//!
//! Knows no file format; each format asks for its own keys.

use super::diagnostic::Diagnostic;
use super::tree::{Spot, Table, Tree, Value};

/// A table being read.
pub struct Fields<'a, 'p> {
    table: &'a Table,
    /// Dotted key of the table, for messages; empty at the root.
    key: String,
    problems: &'p mut Vec<Diagnostic>,
}

impl<'a, 'p> Fields<'a, 'p> {
    /// Starts on `tree`, which must be a table with no keys but the `known` ones.
    pub fn new(key: &str, tree: &'a Tree, known: &[&str], problems: &'p mut Vec<Diagnostic>) -> Option<Self> {
        let Some(table) = tree.table() else {
            let message = format!("`{key}` is {}, but must be a table", tree.value.kind());
            problems.push(Diagnostic::new(message).at(&tree.spot, "expected a table"));
            return None;
        };
        for (name, entry) in table.iter().filter(|(name, _)| !known.contains(&name.as_str())) {
            let of = if key.is_empty() { String::new() } else { format!(" in `{key}`") };
            problems.push(
                Diagnostic::new(format!("unknown key `{name}`{of}"))
                    .at(&entry.key, "not a key of this table")
                    .nearest(name, known.iter().copied()),
            );
        }
        Some(Self { table, key: key.to_owned(), problems })
    }

    /// Returns the value of a key.
    pub fn tree(&self, name: &str) -> Option<&'a Tree> {
        self.table.get(name).map(|entry| &entry.tree)
    }

    fn expected(&mut self, name: &str, tree: &Tree, expectation: &str) {
        let key = super::path::join(&self.key, name);
        let message = format!("`{key}` is {}, but must be {expectation}", tree.value.kind());
        self.problems.push(Diagnostic::new(message).at(&tree.spot, format!("expected {expectation}")));
    }

    /// Returns a text and its place.
    pub fn text(&mut self, name: &str) -> Option<(String, Spot)> {
        let tree = self.tree(name)?;
        match &tree.value {
            Value::Text(text) => return Some((text.clone(), tree.spot.clone())),
            _ => self.expected(name, tree, "a text"),
        }
        None
    }

    /// Returns a whole number that is not negative.
    pub fn whole(&mut self, name: &str) -> Option<u64> {
        let tree = self.tree(name)?;
        match &tree.value {
            Value::Int(number) if *number >= 0 => return u64::try_from(*number).ok(),
            _ => self.expected(name, tree, "a whole number of 0 or more"),
        }
        None
    }

    /// Returns a table with a number of 0 or more for each name.
    pub fn amounts(&mut self, name: &str) -> Option<std::collections::BTreeMap<String, (f64, Spot)>> {
        let tree = self.tree(name)?;
        let Some(table) = tree.table() else {
            self.expected(name, tree, "a table of numbers");
            return None;
        };
        let mut amounts = std::collections::BTreeMap::new();
        for (key, entry) in table {
            let amount = match entry.tree.value {
                Value::Int(number) => number as f64,
                Value::Float(number) => number,
                _ => f64::NAN,
            };
            if amount >= 0.0 && amount.is_finite() {
                amounts.insert(key.clone(), (amount, entry.key.clone()));
            } else {
                self.expected(&format!("{name}.{key}"), &entry.tree, "a number of 0 or more");
            }
        }
        Some(amounts)
    }

    /// Returns a table's entries in order of writing.
    pub fn entries(&mut self, name: &str) -> Vec<(&'a str, &'a Spot, &'a Tree)> {
        let Some(tree) = self.tree(name) else { return Vec::new() };
        match tree.table() {
            Some(table) => ordered(table),
            None => {
                self.expected(name, tree, "a table");
                Vec::new()
            }
        }
    }

    /// Returns a list's items.
    pub fn list(&mut self, name: &str) -> &'a [Tree] {
        let Some(tree) = self.tree(name) else { return &[] };
        match &tree.value {
            Value::List(items) => items,
            _ => {
                self.expected(name, tree, "a list");
                &[]
            }
        }
    }

    /// Reports a key that must be there.
    pub fn require(&mut self, name: &str, at: &Spot) {
        if !self.table.contains_key(name) {
            let of = if self.key.is_empty() { String::new() } else { format!(" in `{}`", self.key) };
            self.problems.push(Diagnostic::new(format!("missing key `{name}`{of}")).at(at, "not here"));
        }
    }
}

/// Returns the entries in order of writing.
pub fn ordered(table: &Table) -> Vec<(&str, &Spot, &Tree)> {
    let mut entries: Vec<_> = table.iter().map(|(key, entry)| (key.as_str(), &entry.key, &entry.tree)).collect();
    entries.sort_by_key(|(_, key, _)| key.start);
    entries
}
