//! `node.key = value`: changes of settings from `--set` and from the variants and axes of an experiment.
//!
//! Knows how an assignment is written, not what it changes.

use super::diagnostic::Diagnostic;
use super::fields::ordered;
use super::path;
use super::tree::{DEEPEST_KEY, Source, Spot, Tree, parse_value};

/// One change.
#[derive(Debug, Clone)]
pub struct Assignment {
    /// Node, or instances of it, such as `images[geneval]`.
    pub selector: String,
    /// Where the node was named.
    pub spot: Spot,
    /// The change as a tree from the root of the settings.
    pub set: Tree,
}

impl Assignment {
    /// Returns the assignment of `value` to the dotted `key` written at `spot`.
    pub fn new(key: &str, spot: &Spot, value: Tree) -> Result<Self, Diagnostic> {
        let parts = path::split(key);
        match parts.as_slice() {
            [_, keys @ ..] if keys.len() > DEEPEST_KEY => {
                let message = format!("this key has {} parts, more than any setting", parts.len());
                Err(Diagnostic::new(message).at(spot, "here").help("write `node.key`, such as `sft.optimizer.lr`"))
            }
            [node, keys @ ..] if !node.is_empty() && !keys.is_empty() && keys.iter().all(|key| !key.is_empty()) => {
                let spot = spot.clone();
                Ok(Self { selector: node.clone(), set: value.undotted().nested(keys, &spot), spot })
            }
            _ => Err(Diagnostic::new(format!("`{key}` names no setting of a node"))
                .at(spot, "here")
                .help("write `node.key`, such as `sft.optimizer.lr`")),
        }
    }

    /// Reads `set = { "node.key" = value }`, or with bare dotted keys.
    pub fn parse_table(key: &str, set: &Tree, problems: &mut Vec<Diagnostic>) -> Vec<Self> {
        let Some(table) = set.table() else {
            let message = format!("`{key}` is {}, but must be a table of settings", set.value.kind());
            let problem = Diagnostic::new(message).at(&set.spot, "expected a table");
            problems.push(problem.help(r#"write set = { "sft.optimizer.lr" = 1e-4 }"#));
            return Vec::new();
        };
        let mut assignments = Vec::new();
        for (key, spot, value) in ordered(table) {
            match (path::first_dot(key), value.table()) {
                // `sft.optimizer.lr = 1` without quotes: the node is the outermost table.
                (None, Some(_)) => assignments.push(Self {
                    selector: key.to_owned(),
                    spot: spot.clone(),
                    set: value.clone().undotted(),
                }),
                _ => match Self::new(key, spot, value.clone()) {
                    Ok(assignment) => assignments.push(assignment),
                    Err(problem) => problems.push(problem),
                },
            }
        }
        assignments
    }

    /// Parses one `--set node.key=value`.
    pub fn parse(argument: &str) -> Result<Self, Diagnostic> {
        let source = Source::argument(format!("--set {argument}"));
        let start = source.text.len() - argument.len();
        let Some(equals) = argument.find('=') else {
            return Err(Diagnostic::new("`--set` needs a value")
                .at(&source.spot(start, source.text.len()), "no `=` in it")
                .help("write --set node.key=value, such as --set sft.optimizer.lr=1e-4"));
        };
        let value = parse_value(&source, start + equals + 1)?;
        let key = argument[..equals].trim_end();
        Self::new(key, &source.spot(start, start + key.len()), value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_toml_and_a_bare_word_is_a_text() {
        let json = |argument: &str| Assignment::parse(argument).unwrap().set.json().to_string();
        assert_eq!(json("sft.optimizer.lr=1e-4"), r#"{"optimizer":{"lr":0.0001}}"#);
        assert_eq!(json("sft.model.bridge.layers=last"), r#"{"model":{"bridge":{"layers":"last"}}}"#);
        assert_eq!(json("a.b={c.d=[1,2]}"), r#"{"b":{"c":{"d":[1,2]}}}"#);
        assert_eq!(Assignment::parse("scores[v1.5].n=1").unwrap().selector, "scores[v1.5]");
        assert!(Assignment::parse("sft.optimizer.lr").is_err());
        assert!(Assignment::parse("sft=3").is_err());
        assert!(Assignment::parse("sft.a=[1,").is_err());
    }
}
