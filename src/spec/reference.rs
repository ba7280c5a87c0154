//! `${node.key}`, `${env.NAME}`, `${pipeline.seed}` in settings: how they are written, and what they stand for.
//!
//! A text that is one reference and nothing else takes on the value with its type, tables included; inside a longer text
//! a reference is spelt out. `$${` is a plain `${`. A node's name means the instance with the same axis values as the
//! reader's. Works on merged settings before their types are checked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::diagnostic::Diagnostic;
use super::expand::Instance;
use super::path;
use super::pipeline::NodeTable;
use super::scope::{ENV, HEADER, Scope};
use super::tree::{Entry, Spot, Table, Tree, Value};
use super::wiring::split_selector;

/// Longest text that references may make, in bytes.
const LONGEST_TEXT: usize = 1 << 16;
/// Most values that references may copy in one pipeline.
const MOST_COPIES: usize = 200_000;
/// Deepest chain of references.
const DEEPEST: usize = 64;

/// A stretch of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// As it stands.
    Plain(String),
    /// The keys of a reference.
    Reference(Vec<String>),
}

/// Returns true when a text may hold a reference.
pub fn is_marked(text: &str) -> bool {
    text.contains("${")
}

/// Splits a text at its references; `is_lenient` leaves what cannot be one to the text.
pub fn pieces(text: &str, is_lenient: bool) -> Result<Vec<Piece>, String> {
    let mut all = Vec::new();
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if let Some(before) = rest[..at].strip_suffix('$') {
            plain.push_str(before);
            plain.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        plain.push_str(&rest[..at]);
        let end = rest[at..].find('}').map(|end| at + end);
        let keys = end.map_or_else(Vec::new, |end| path::split(&rest[at + 2..end]));
        let is_name = end.is_some_and(|end| rest[at + 2..end].chars().all(may_be_in_name));
        if !is_name || keys.len() < 2 || keys.iter().any(String::is_empty) {
            match end {
                _ if is_lenient => {
                    plain.push_str("${");
                    rest = &rest[at + 2..];
                    continue;
                }
                Some(end) => return Err(format!("`{}` names nothing", &rest[at..=end])),
                None => return Err("`${` is not closed by `}`".to_owned()),
            }
        }
        let end = end.unwrap_or(at) - at;
        if !plain.is_empty() {
            all.push(Piece::Plain(std::mem::take(&mut plain)));
        }
        all.push(Piece::Reference(keys));
        rest = &rest[at + end + 1..];
    }
    plain.push_str(rest);
    if !plain.is_empty() || all.is_empty() {
        all.push(Piece::Plain(plain));
    }
    Ok(all)
}

/// A shell's `${name:-word}` and its like hold other characters.
fn may_be_in_name(c: char) -> bool {
    c.is_alphanumeric() || "_-.,[]\"/ @+".contains(c)
}

/// Replaces, everywhere in `tree`, the texts all of whose references belong to the scope; others are left for later.
pub fn substitute(tree: &mut Tree, scope: &Scope, problems: &mut Vec<Diagnostic>) {
    if !tree.has_marks() {
        return;
    }
    match &mut tree.value {
        Value::Table(table) => {
            Arc::make_mut(table).iter_mut().for_each(|(_, entry)| substitute(&mut entry.tree, scope, problems));
        }
        Value::List(items) => Arc::make_mut(items).iter_mut().for_each(|item| substitute(item, scope, problems)),
        Value::Text(text) if is_marked(text) => {
            // What is no reference is reported with the settings, unless a shell may have it.
            let Ok(found) = pieces(text, true) else { return };
            let is_ours = |piece: &Piece| matches!(piece, Piece::Reference(keys) if Scope::owns(keys));
            let is_later = |piece: &Piece| matches!(piece, Piece::Reference(keys) if !Scope::owns(keys));
            if !found.iter().any(is_ours) || found.iter().any(is_later) {
                return;
            }
            let spot = tree.spot.clone();
            match joined(&found, &spot, &mut |keys| scope.get(keys, &spot)) {
                // A value that looks like a reference, and a plain `${`, would be read again with the settings.
                Ok(Some(value)) if !value.has_marks() => *tree = value,
                Ok(_) => {}
                Err(problem) => problems.push(problem),
            }
        }
        _ => {}
    }
}

/// A value; nothing when there is none for a reason that is reported elsewhere.
type Found = Result<Option<Tree>, Diagnostic>;

/// Returns what pieces stand for, given the value of each reference.
fn joined(pieces: &[Piece], spot: &Spot, get: &mut dyn FnMut(&[String]) -> Found) -> Found {
    if let [Piece::Reference(keys)] = pieces {
        return Ok(get(keys)?.map(|tree| Tree { via: Some(Box::new(spot.clone())), ..tree }));
    }
    let mut text = String::new();
    for piece in pieces {
        match piece {
            Piece::Plain(plain) => text.push_str(plain),
            Piece::Reference(keys) => {
                let Some(tree) = get(keys)? else { return Ok(None) };
                match &tree.value {
                    Value::Text(part) => text.push_str(part),
                    Value::Int(_) | Value::Float(_) | Value::Bool(_) => text.push_str(&tree.json().to_string()),
                    other => {
                        let message = format!("`{}` is {}, which has no place in a text", keys.join("."), other.kind());
                        let problem = Diagnostic::new(message).at(spot, "in this text");
                        return Err(problem.help("let the reference be the whole value, or name one of its keys"));
                    }
                }
            }
        }
        if text.len() > LONGEST_TEXT {
            let problem = Diagnostic::new(format!("this text grows beyond {LONGEST_TEXT} bytes")).at(spot, "here");
            return Err(problem.help("let fewer references meet in it"));
        }
    }
    Ok(Some(Tree { value: Value::Text(text), ..Tree::empty(spot.clone()) }))
}

/// The references of all instances of a pipeline.
pub struct References<'a> {
    /// Node tables.
    pub tables: &'a [NodeTable],
    /// Instances.
    pub instances: &'a [Instance],
    /// Merged settings by instance; nothing where the stage is not known.
    pub settings: &'a [Option<Tree>],
    /// Names that belong to no node.
    pub scope: &'a Scope,
    /// Of each table, whether texts of its nodes may hold a shell's `${NAME}`.
    pub lenient: Vec<bool>,
    /// Receives the problems.
    pub problems: Vec<Diagnostic>,
    /// Values of texts with references, by instance and dotted key.
    memory: BTreeMap<(usize, String), Option<Tree>>,
    copies: usize,
}

/// The texts that are being replaced, outermost first.
type Stack = Vec<(usize, String, Spot)>;

impl<'a> References<'a> {
    /// Starts on merged settings.
    pub fn new(
        tables: &'a [NodeTable],
        instances: &'a [Instance],
        settings: &'a [Option<Tree>],
        scope: &'a Scope,
    ) -> Self {
        let (lenient, problems, memory) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { tables, instances, settings, scope, lenient, problems, memory, copies: 0 }
    }

    /// Returns the settings of an instance with every reference replaced; nothing when one of them cannot be.
    pub fn replaced(&mut self, at: usize) -> Option<Tree> {
        let tree = self.settings[at].as_ref()?;
        if !tree.has_marks() {
            return Some(tree.clone());
        }
        self.tree(at, "", tree, &mut Vec::new())
    }

    /// Returns the value of a name as the instance `at` sees it, written at `spot`.
    pub fn value(&mut self, at: usize, keys: &[String], spot: &Spot) -> Option<Tree> {
        match self.lookup(at, keys, spot, &mut Vec::new()) {
            Ok(tree) => tree,
            Err(problem) => {
                self.problems.push(problem);
                None
            }
        }
    }

    /// Returns a text of a condition with its references replaced.
    pub fn text(&mut self, at: usize, tree: &Tree) -> Option<Tree> {
        match &tree.value {
            // No setting has an empty key, so it stands for the condition.
            Value::Text(text) if is_marked(text) => self.marked(at, "", text, &tree.spot, &mut Vec::new()),
            _ => Some(tree.clone()),
        }
    }

    fn tree(&mut self, at: usize, key: &str, tree: &Tree, stack: &mut Stack) -> Option<Tree> {
        self.copies += usize::from(!stack.is_empty());
        let value = match &tree.value {
            Value::Text(text) if is_marked(text) => return self.marked(at, key, text, &tree.spot, stack),
            Value::Table(table) => {
                let mut all = Some(Table::with_capacity(table.len()));
                for (name, entry) in table.iter() {
                    // The others are looked at too, so that all problems are found at once.
                    let inner = self.tree(at, &path::join(key, name), &entry.tree, stack);
                    match (inner, &mut all) {
                        (Some(tree), Some(all)) => {
                            all.insert(name.clone(), Entry { key: entry.key.clone(), tree });
                        }
                        _ => all = None,
                    }
                }
                all?.into()
            }
            Value::List(items) => {
                let items: Vec<Option<Tree>> = items
                    .iter()
                    .enumerate()
                    .map(|(place, item)| self.tree(at, &format!("{key}[{place}]"), item, stack))
                    .collect();
                Value::List(items.into_iter().collect::<Option<_>>()?)
            }
            other => other.clone(),
        };
        Some(Tree { spot: tree.spot.clone(), value, via: tree.via.clone() })
    }

    fn marked(&mut self, at: usize, key: &str, text: &str, spot: &Spot, stack: &mut Stack) -> Option<Tree> {
        if let Some(known) = self.memory.get(&(at, key.to_owned())).filter(|_| !key.is_empty()) {
            return known.clone();
        }
        let found = self.computed(at, key, text, spot, stack);
        let found = found.unwrap_or_else(|problem| {
            self.problems.push(problem);
            None
        });
        if !key.is_empty() {
            self.memory.insert((at, key.to_owned()), found.clone());
        }
        found
    }

    fn computed(&mut self, at: usize, key: &str, text: &str, spot: &Spot, stack: &mut Stack) -> Found {
        let wrong = |message: String| Diagnostic::new(message).at(spot, "here");
        let is_lenient = self.lenient.get(self.instances[at].table).copied().unwrap_or(false);
        let pieces = pieces(text, is_lenient).map_err(|message| {
            wrong(message).help("write `${node.key}`, `${env.NAME}` or `${pipeline.seed}`; `$${` is a plain `${`")
        })?;
        if let Some(from) = stack.iter().position(|(other, known, _)| *other == at && known == key) {
            return Err(self.circle(&stack[from..]));
        }
        if stack.len() >= DEEPEST {
            return Err(wrong(format!("references lead on more than {DEEPEST} times")).help("let it name the value"));
        }
        if self.copies > MOST_COPIES {
            return Err(wrong("references copy too much into each other".to_owned()).help("name single values"));
        }
        stack.push((at, key.to_owned(), spot.clone()));
        let joined = joined(&pieces, spot, &mut |keys| self.lookup(at, keys, spot, stack));
        stack.pop();
        joined
    }

    fn circle(&self, round: &[(usize, String, Spot)]) -> Diagnostic {
        let name = |(at, key, _): &(usize, String, Spot)| format!("{}.{key}", self.instances[*at].name);
        let names: Vec<String> = round.iter().chain(round.first()).map(name).collect();
        let mut problem = Diagnostic::new(format!("settings refer to each other in a circle: {}", names.join(" -> ")));
        for (place, (_, _, spot)) in round.iter().enumerate() {
            problem = problem.at(spot, format!("refers to `{}`", names[place + 1]));
        }
        problem.help("one of them must be a value")
    }

    fn lookup(&mut self, at: usize, keys: &[String], spot: &Spot, stack: &mut Stack) -> Found {
        if Scope::owns(keys) {
            return self.scope.get(keys, spot);
        }
        let (node, keys) = keys.split_first().expect("a reference has two parts or more");
        let targets = self.targets(at, node, spot)?;
        let mut found: Option<(Tree, usize)> = None;
        for target in targets {
            let Some(settings) = &self.settings[target] else { return Ok(None) };
            let tree = self.below(target, settings, keys, spot, stack)?;
            let Some(tree) = tree else { return Ok(None) };
            match &found {
                Some((first, other)) if first.json() != tree.json() => {
                    let names = [*other, target].map(|at| format!("`{}`", self.instances[at].name));
                    let message = format!("`{node}.{}` differs between {} and {}", keys.join("."), names[0], names[1]);
                    let help =
                        format!("name one of them, such as `${{{}.{}}}`", self.instances[target].name, keys.join("."));
                    return Err(Diagnostic::new(message).at(spot, "which one?").help(help));
                }
                Some(_) => {}
                None => found = Some((tree, target)),
            }
        }
        Ok(found.map(|(tree, _)| tree))
    }

    /// Returns the instances that `node` means to the instance `at`.
    fn targets(&self, at: usize, node: &str, spot: &Spot) -> Result<Vec<usize>, Diagnostic> {
        let (base, labels) = split_selector(node);
        let Some(table) = self.tables.iter().position(|table| table.name == base) else {
            let names = self.tables.iter().map(|table| table.name.as_str());
            let names: BTreeSet<&str> = names.chain([ENV, HEADER]).collect();
            return Err(Diagnostic::new(format!("there is no node `{base}`"))
                .at(spot, "unknown name")
                .nearest(base, names));
        };
        let own = &self.instances[at];
        let of_table = || (0..self.instances.len()).filter(|other| self.instances[*other].table == table);
        let agrees = |other: &usize| {
            let other = &self.instances[*other];
            other.has_labels(&labels) && own.agrees_with(other, &labels)
        };
        if own.table == table && own.has_labels(&labels) {
            return Ok(vec![at]);
        }
        let found: Vec<usize> = of_table().filter(agrees).collect();
        if found.is_empty() {
            let names: Vec<&str> = of_table().map(|other| self.instances[other].name.0.as_str()).collect();
            let message = format!("`{node}` is no instance of `{base}`");
            return Err(Diagnostic::new(message).at(spot, "no such axis value").nearest(node, names));
        }
        Ok(found)
    }

    /// Returns the value at `keys` of an instance's settings, with its own references replaced.
    fn below(&mut self, at: usize, settings: &Tree, keys: &[String], spot: &Spot, stack: &mut Stack) -> Found {
        let mut tree = settings;
        let mut key = String::new();
        let mut replaced;
        for name in keys {
            // On the way to a key may lie a reference to the table that holds it.
            if let Value::Text(text) = &tree.value
                && is_marked(text)
            {
                let Some(whole) = self.marked(at, &key, text, &tree.spot, stack) else { return Ok(None) };
                replaced = whole;
                tree = &replaced;
            }
            match tree.get(name) {
                Some(inner) => tree = inner,
                None => {
                    let what = if key.is_empty() { String::new() } else { format!(" in `{key}`") };
                    let node = &self.instances[at].name;
                    let problem =
                        Diagnostic::new(format!("`{node}` has no setting `{name}`{what}")).at(spot, "unknown name");
                    let valid: Vec<&str> = tree.table().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
                    return Err(match valid.is_empty() {
                        true => problem.help(format!("`{key}` is {}", tree.value.kind())),
                        false => problem.nearest(name, valid),
                    });
                }
            }
            key = path::join(&key, name);
        }
        let tree = tree.clone();
        Ok(self.tree(at, &key, &tree, stack))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_split_at_its_references() {
        let reference = |keys: &[&str]| Piece::Reference(keys.iter().map(|&key| key.to_owned()).collect());
        let plain = |text: &str| Piece::Plain(text.to_owned());
        let pieces = |text: &str| pieces(text, false);
        assert_eq!(pieces("${sft.optimizer.lr}"), Ok(vec![reference(&["sft", "optimizer", "lr"])]));
        assert_eq!(
            pieces("a ${env.X}/${images[v1.5].batch}."),
            Ok(vec![
                plain("a "),
                reference(&["env", "X"]),
                plain("/"),
                reference(&["images[v1.5]", "batch"]),
                plain(".")
            ])
        );
        assert_eq!(pieces("costs $${5}"), Ok(vec![plain("costs ${5}")]));
        assert_eq!(pieces(""), Ok(vec![plain("")]));
        for wrong in ["${sft.lr", "${}", "${sft}", "${sft.}", "${.lr}"] {
            assert!(pieces(wrong).is_err(), "{wrong}");
        }
        let shell = "for f in ${DIR:-a.b}/*; do echo ${f%.png} ${f} ${a.b} \"${x\"; done";
        let (before, after) = shell.split_once("${a.b}").unwrap();
        assert_eq!(super::pieces(shell, true), Ok(vec![plain(before), reference(&["a", "b"]), plain(after)]));
    }
}
