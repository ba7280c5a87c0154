//! `when = { profile = "shapes" }`: the condition under which a node is there.
//!
//! Each key names something, each value says what it must be: one value, or a list of which one must fit. All entries
//! must hold; `not` turns a condition round, `any` is a list of conditions of which one must hold; `true` and `false`
//! stand for themselves. Knows how conditions are written and when they hold, not what follows.

use super::diagnostic::Diagnostic;
use super::fields::ordered;
use super::path;
use super::reference::References;
use super::scope::PROFILE;
use super::tree::{Spot, Tree, Value};

/// A condition.
#[derive(Debug, Clone)]
pub enum Condition {
    /// Holds or does not.
    Is(bool),
    /// All of them must hold.
    All(Vec<Condition>),
    /// One of them must hold.
    Any(Vec<Condition>),
    /// Must not hold.
    Not(Box<Condition>),
    /// Something must be one of some values.
    Fits {
        /// Its name.
        keys: Vec<String>,
        /// Place of the name.
        spot: Spot,
        /// The values.
        values: Vec<Tree>,
    },
}

/// Reads a condition; problems leave out the entry they are in.
pub fn parse(key: &str, tree: &Tree, problems: &mut Vec<Diagnostic>) -> Condition {
    match &tree.value {
        Value::Bool(holds) => Condition::Is(*holds),
        Value::Table(_) => {
            let mut all = Vec::new();
            entries(key, &[], tree, &mut all, problems);
            Condition::All(all)
        }
        other => {
            let message = format!("`{key}` is {}, but must be a condition", other.kind());
            let problem = Diagnostic::new(message).at(&tree.spot, "expected a table");
            problems.push(problem.help(r#"write when = { profile = "tiny" }, or true, or false"#));
            Condition::Is(true)
        }
    }
}

fn entries(key: &str, above: &[String], tree: &Tree, all: &mut Vec<Condition>, problems: &mut Vec<Diagnostic>) {
    for (name, spot, inner) in tree.table().map(ordered).unwrap_or_default() {
        let keys: Vec<String> = above.iter().cloned().chain(path::split(name)).collect();
        let words: Vec<&str> = keys.iter().map(String::as_str).collect();
        match (words.as_slice(), &inner.value) {
            (["not"], _) => all.push(Condition::Not(Box::new(parse(&format!("{key}.not"), inner, problems)))),
            (["any"], Value::List(items)) => {
                let one = |item: &Tree| parse(&format!("{key}.any"), item, problems);
                all.push(Condition::Any(items.iter().map(one).collect()));
            }
            (["any"], other) => {
                let message = format!("`{key}.any` is {}, but must be a list of conditions", other.kind());
                problems.push(Diagnostic::new(message).at(&inner.spot, "expected a list"));
            }
            (_, Value::Table(_)) => entries(key, &keys, inner, all, problems),
            (_, value) => {
                if keys.iter().any(String::is_empty) || (keys.len() < 2 && words != [PROFILE]) {
                    let message = format!("`{}` in `{key}` names nothing", keys.join("."));
                    let help = "write `profile`, `env.NAME`, `pipeline.seed`, or `node.key` for a node's setting";
                    problems.push(Diagnostic::new(message).at(spot, "here").help(help));
                    continue;
                }
                let values = match value {
                    Value::List(items) => items.to_vec(),
                    _ => vec![inner.clone()],
                };
                all.push(Condition::Fits { keys, spot: spot.clone(), values });
            }
        }
    }
}

/// What a condition is held against.
pub struct Facts<'a, 'r> {
    /// The chosen profile and those it builds on.
    pub profiles: &'a [String],
    /// Every profile that there is.
    pub known_profiles: &'a [String],
    /// Settings, variables, the header.
    pub references: &'a mut References<'r>,
}

impl Facts<'_, '_> {
    /// Returns nothing when the condition holds for the instance `at`, and why when it does not.
    pub fn broken(&mut self, at: usize, condition: &Condition) -> Option<String> {
        match condition {
            Condition::Is(true) => None,
            Condition::Is(false) => Some("its `when` is false".to_owned()),
            Condition::All(all) => all.iter().map(|one| self.broken(at, one)).fold(None, |first, next| first.or(next)),
            Condition::Any(all) => {
                let reasons: Vec<Option<String>> = all.iter().map(|one| self.broken(at, one)).collect();
                let reasons: Option<Vec<String>> = reasons.into_iter().collect();
                Some(reasons?.join(", and "))
            }
            Condition::Not(inner) => match self.broken(at, inner) {
                Some(_) => None,
                None => Some(format!("its `when` excludes {}", describe(inner))),
            },
            Condition::Fits { keys, spot, values } => self.misfit(at, keys, spot, values),
        }
    }

    fn misfit(&mut self, at: usize, keys: &[String], spot: &Spot, values: &[Tree]) -> Option<String> {
        if keys == [PROFILE] {
            return self.other_profile(values);
        }
        // Of a name that means nothing the problem is reported, and the node stays to be checked.
        let found = self.references.value(at, keys, spot)?;
        let mut fits = false;
        for value in values {
            let value = self.references.text(at, value)?;
            fits |= equal(&found, &value);
        }
        let shown = |tree: &Tree| tree.text().map_or_else(|| tree.json().to_string(), |text| format!("`{text}`"));
        let wanted: Vec<String> = values.iter().map(shown).collect();
        (!fits).then(|| format!("`{}` is {}, not {}", keys.join("."), shown(&found), wanted.join(" or ")))
    }

    fn other_profile(&mut self, values: &[Tree]) -> Option<String> {
        let mut names = Vec::new();
        for value in values {
            match value.text() {
                Some(name) if self.known_profiles.iter().any(|known| known == name) => names.push(name),
                found => {
                    let found = found.unwrap_or_default();
                    let problem = Diagnostic::new(format!("unknown profile `{found}`")).at(&value.spot, "in no file");
                    let valid = self.known_profiles.iter().map(String::as_str);
                    self.references.problems.push(problem.nearest(found, valid));
                    return None;
                }
            }
        }
        let fits = names.iter().any(|name| self.profiles.iter().any(|profile| profile == name));
        let own = self.profiles.last().map_or("", String::as_str);
        (!fits).then(|| format!("the profile is `{own}`, not `{}`", names.join("` or `")))
    }
}

fn describe(condition: &Condition) -> String {
    match condition {
        Condition::Fits { keys, values, .. } => {
            let values: Vec<String> = values.iter().map(|value| value.json().to_string()).collect();
            format!("{} = {}", keys.join("."), values.join(" or "))
        }
        Condition::All(all) => all.iter().map(describe).collect::<Vec<_>>().join(" with "),
        _ => "what holds here".to_owned(),
    }
}

/// Values are equal as JSON; numbers by what they are, with or without a fraction.
fn equal(left: &Tree, right: &Tree) -> bool {
    let number = |tree: &Tree| match tree.value {
        Value::Int(number) => Some(number as f64),
        Value::Float(number) => Some(number),
        _ => None,
    };
    match (number(left), number(right)) {
        (Some(left), Some(right)) => left == right,
        _ => left.json() == right.json(),
    }
}
