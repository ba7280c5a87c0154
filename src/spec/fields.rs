//! Reads the known keys of a table and reports the others: the part that all our files have in common.
//!
//! Knows no file format; each format asks for its own keys.

use super::diagnostic::Diagnostic;
use super::policy::{parse_gib, parse_seconds};
use super::tree::{Spot, Table, Tree, Value};

/// One slot of a table of slots.
#[derive(Debug, Clone, PartialEq)]
pub struct SlotTable {
    /// Its name.
    pub name: String,
    /// Place of the name.
    pub spot: Spot,
    /// Share or capacity; of identities their number, of memory GiB.
    pub amount: f64,
    /// Identities, where they are listed.
    pub ids: Option<Vec<u32>>,
}

fn number_of(value: &Value) -> Option<f64> {
    match *value {
        Value::Int(number) => Some(number as f64),
        Value::Float(number) => Some(number).filter(|number| number.is_finite()),
        _ => None,
    }
}

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

    /// Returns a whole number, negative or not.
    pub fn int(&mut self, name: &str) -> Option<i64> {
        let tree = self.tree(name)?;
        match &tree.value {
            Value::Int(number) => return Some(*number),
            _ => self.expected(name, tree, "a whole number"),
        }
        None
    }

    /// Returns a number, with or without a fraction, that is at least `least`.
    pub fn number(&mut self, name: &str, least: f64) -> Option<f64> {
        let tree = self.tree(name)?;
        let number = number_of(&tree.value).filter(|number| *number >= least);
        if number.is_none() {
            self.expected(name, tree, &format!("a number of {least} or more"));
        }
        number
    }

    /// Returns `true` or `false`.
    pub fn truth(&mut self, name: &str) -> Option<bool> {
        let tree = self.tree(name)?;
        match &tree.value {
            Value::Bool(truth) => return Some(*truth),
            _ => self.expected(name, tree, "true or false"),
        }
        None
    }

    /// Returns a time in seconds: a number of seconds, or a text such as `2h30m`.
    pub fn seconds(&mut self, name: &str) -> Option<f64> {
        let tree = self.tree(name)?;
        let expectation = "a time such as \"2h30m\", or seconds";
        match &tree.value {
            Value::Text(text) => match parse_seconds(text) {
                Ok(seconds) => return Some(seconds),
                Err(message) => self.wrong(name, tree, message),
            },
            value => match number_of(value).filter(|seconds| *seconds >= 0.0) {
                Some(seconds) => return Some(seconds),
                None => self.expected(name, tree, expectation),
            },
        }
        None
    }

    /// Returns an amount of memory or of disk in GiB: a number of GiB, or a text such as `16GiB`.
    pub fn gib(&mut self, name: &str) -> Option<f64> {
        let tree = self.tree(name)?;
        match &tree.value {
            Value::Text(text) => match parse_gib(text) {
                Ok(gib) => return Some(gib),
                Err(message) => self.wrong(name, tree, message),
            },
            value => match number_of(value).filter(|gib| *gib >= 0.0) {
                Some(gib) => return Some(gib),
                None => self.expected(name, tree, "an amount such as \"16GiB\", or GiB"),
            },
        }
        None
    }

    /// Returns a list of texts with their places.
    pub fn texts(&mut self, name: &str) -> Vec<(String, Spot)> {
        let mut texts = Vec::new();
        for item in self.list(name) {
            match item.text() {
                Some(text) => texts.push((text.to_owned(), item.spot.clone())),
                None => self.expected(name, item, "a list of texts"),
            }
        }
        texts
    }

    /// Returns shares or capacities of slots: for each name a number of 0 or more, a list of identities, or, of memory,
    /// an amount such as `16GiB`.
    pub fn slots(&mut self, name: &str) -> Option<Vec<SlotTable>> {
        let mut slots = Vec::new();
        self.tree(name)?;
        for (slot, spot, tree) in self.entries(name) {
            let key = format!("{name}.{slot}");
            let mut found = SlotTable { name: slot.to_owned(), spot: spot.clone(), amount: 0.0, ids: None };
            match &tree.value {
                Value::List(items) => {
                    let id = |item: &Tree| match item.value {
                        Value::Int(id) => u32::try_from(id).ok(),
                        _ => None,
                    };
                    let ids: Option<Vec<u32>> = items.iter().map(id).collect();
                    let is_distinct = |ids: &Vec<u32>| (1..ids.len()).all(|at| !ids[..at].contains(&ids[at]));
                    let Some(ids) = ids.filter(|ids| !ids.is_empty() && is_distinct(ids)) else {
                        self.expected(&key, tree, "a list of different whole numbers, such as [0, 1]");
                        continue;
                    };
                    (found.amount, found.ids) = (ids.len() as f64, Some(ids));
                }
                Value::Text(text) if slot == "memory" => match parse_gib(text) {
                    Ok(gib) => found.amount = gib,
                    Err(message) => {
                        self.wrong(&key, tree, message);
                        continue;
                    }
                },
                value => match number_of(value).filter(|amount| *amount >= 0.0) {
                    Some(amount) => found.amount = amount,
                    None => {
                        let or = if slot == "memory" { "GiB, or a text such as \"16GiB\"" } else { "identities" };
                        self.expected(&key, tree, &format!("a number of 0 or more, or {or}"));
                        continue;
                    }
                },
            }
            slots.push(found);
        }
        Some(slots)
    }

    fn wrong(&mut self, name: &str, tree: &Tree, message: String) {
        let key = super::path::join(&self.key, name);
        let (message, help) = message.split_once(": ").unwrap_or((&message, "write it otherwise"));
        self.problems.push(Diagnostic::new(format!("`{key}`: {message}")).at(&tree.spot, "here").help(help));
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
            let problem = Diagnostic::new(format!("missing key `{name}`{of}")).at(at, "not here");
            self.problems.push(problem.help(format!("add {name} = \"...\"")));
        }
    }
}

/// Returns the entries in order of writing.
pub fn ordered(table: &Table) -> Vec<(&str, &Spot, &Tree)> {
    let mut entries: Vec<_> = table.iter().map(|(key, entry)| (key.as_str(), &entry.key, &entry.tree)).collect();
    entries.sort_by_key(|(_, key, _)| key.order());
    entries
}
