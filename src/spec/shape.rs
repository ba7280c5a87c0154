//! What settings of a stage kind may look like, and the check of a tree against it.
//!
//! A shape is read once from the JSON Schema of the settings' type, so types and checks cannot disagree. Knows nothing
//! of merging: it sees one tree, each value of which knows where it was written.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use deepgen_contract::settings::schema;
use deepgen_contract::stage::StageKind;
use serde_json::Value as Json;

use super::diagnostic::{Diagnostic, quoted_list};
use super::location::from_root;
use super::path;
use super::reference::is_marked;
use super::tree::{Spot, Table, Tree, Value};

/// What a value may look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// Anything.
    Any,
    /// `true` or `false`.
    Bool,
    /// A whole number, with its least and greatest value.
    Int(Option<f64>, Option<f64>),
    /// A number.
    Number,
    /// A text.
    Text,
    /// A file or folder: a text, relative to the file that holds it until it is settled.
    Path,
    /// A list, and its length when that is fixed.
    List(Box<Shape>, Option<usize>),
    /// A table with any keys.
    Map(Box<Shape>),
    /// A table with these keys.
    Fields(BTreeMap<String, Field>),
    /// A table whose `kind` decides on the other keys.
    Tagged(BTreeMap<String, BTreeMap<String, Field>>),
    /// One of these words, or a table with one key that stands for its value.
    Choice(Vec<String>, BTreeMap<String, Shape>),
}

/// A key of a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// What its value may look like.
    pub shape: Shape,
    /// True when it must be there.
    pub is_required: bool,
}

/// Returns the shape of the settings of `kind`.
pub fn of(kind: StageKind) -> &'static Shape {
    static SHAPES: OnceLock<BTreeMap<&'static str, Shape>> = OnceLock::new();
    let shapes = SHAPES.get_or_init(|| {
        let read = |kind: StageKind| {
            let root = Json::from(schema(kind));
            (kind.name(), read(&root, &root))
        };
        StageKind::ALL.into_iter().map(read).collect()
    });
    shapes.get(kind.name()).expect("every kind was read")
}

/// Reads a shape from JSON Schema, as written by the derive macro for this project's settings.
fn read(schema: &Json, root: &Json) -> Shape {
    if let Some(reference) = schema["$ref"].as_str() {
        let target = root.pointer(reference.trim_start_matches('#')).unwrap_or(&Json::Null);
        let Shape::Fields(mut fields) = read(target, root) else { return read(target, root) };
        fields.extend(read_fields(schema, root));
        return Shape::Fields(fields);
    }
    for combination in ["oneOf", "anyOf"] {
        if let Some(options) = schema[combination].as_array() {
            let options: Vec<&Json> = options.iter().filter(|option| option["type"] != "null").collect();
            return match options.as_slice() {
                [only] => read(only, root),
                _ => read_options(&options, root),
            };
        }
    }
    if let Some(words) = words(schema) {
        return Shape::Choice(words, BTreeMap::new());
    }
    let kind = match &schema["type"] {
        // `["string", "null"]`: TOML has no null, so the key is simply left out.
        Json::Array(kinds) => kinds.iter().find_map(|kind| kind.as_str().filter(|kind| *kind != "null")),
        kind => kind.as_str(),
    };
    match kind {
        Some("boolean") => Shape::Bool,
        Some("integer") => Shape::Int(schema["minimum"].as_f64(), schema["maximum"].as_f64()),
        Some("number") => Shape::Number,
        Some("string") if schema["format"] == "path" => Shape::Path,
        Some("string") => Shape::Text,
        Some("array") => {
            let items = schema["prefixItems"].get(0).unwrap_or(&schema["items"]);
            let (least, most) = (schema["minItems"].as_u64(), schema["maxItems"].as_u64());
            let length = least.filter(|_| least == most).and_then(|length| usize::try_from(length).ok());
            Shape::List(Box::new(read(items, root)), length)
        }
        Some("object") if schema["additionalProperties"].is_object() => {
            Shape::Map(Box::new(read(&schema["additionalProperties"], root)))
        }
        Some("object") => Shape::Fields(read_fields(schema, root)),
        _ => Shape::Any,
    }
}

fn words(schema: &Json) -> Option<Vec<String>> {
    let word = |value: &Json| value.as_str().map(str::to_owned);
    match (&schema["const"], schema["enum"].as_array()) {
        (Json::String(only), _) => Some(vec![only.clone()]),
        (_, Some(words)) => Some(words.iter().filter_map(word).collect()),
        _ => None,
    }
}

fn read_fields(schema: &Json, root: &Json) -> BTreeMap<String, Field> {
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
    let properties = schema["properties"].as_object().into_iter().flatten();
    properties
        .map(|(key, value)| {
            let is_required = required.contains(&key.as_str());
            (key.clone(), Field { shape: read(value, root), is_required })
        })
        .collect()
}

fn read_options(options: &[&Json], root: &Json) -> Shape {
    let (mut choice, mut payloads, mut tagged) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    for option in options {
        if let Some(found) = words(option) {
            choice.extend(found);
            continue;
        }
        let Shape::Fields(mut fields) = read(option, root) else { return Shape::Any };
        let kind = option["properties"].get("kind").and_then(words);
        match kind.as_deref() {
            Some([kind]) => {
                fields.remove("kind");
                tagged.insert(kind.clone(), fields);
            }
            _ => payloads.extend(fields.into_iter().map(|(key, field)| (key, field.shape))),
        }
    }
    if tagged.is_empty() { Shape::Choice(choice, payloads) } else { Shape::Tagged(tagged) }
}

/// A check under way.
pub struct Check<'a> {
    /// Receives the problems.
    pub problems: &'a mut Vec<Diagnostic>,
    /// False when keys may still be missing, as in a stage file that some node completes.
    pub is_complete: bool,
    /// For keys that are missing: the node that lacks them.
    pub owner: Option<&'a Spot>,
}

impl Check<'_> {
    /// Checks `tree`, which stands at the dotted `key`.
    pub fn value(&mut self, key: &str, tree: &Tree, shape: &Shape) {
        match (shape, &tree.value) {
            // What a reference stands for is known only once a node uses it.
            (_, Value::Text(text)) if !self.is_complete && is_marked(text) => {}
            (Shape::Any, _) | (Shape::Bool, Value::Bool(_)) => {}
            (Shape::Text | Shape::Path, Value::Text(_)) => {}
            (Shape::Int(least, most), Value::Int(number)) => self.range(key, tree, *number, (*least, *most)),
            (Shape::Number, Value::Int(_)) => {}
            (Shape::Number, Value::Float(number)) if number.is_finite() => {}
            (Shape::List(item, length), Value::List(items)) => {
                if let Some(length) = length.filter(|length| *length != items.len()) {
                    let message = format!("`{key}` has {} values, but must have {length}", items.len());
                    self.problems.push(Diagnostic::new(message).at_value(tree, "here"));
                }
                for (at, value) in items.iter().enumerate() {
                    self.value(&format!("{key}[{at}]"), value, item);
                }
            }
            (Shape::Map(item), Value::Table(table)) => {
                for (name, entry) in table.iter() {
                    self.value(&path::join(key, name), &entry.tree, item);
                }
            }
            (Shape::Fields(fields), Value::Table(table)) => self.fields(key, tree, table, fields, false),
            (Shape::Tagged(variants), Value::Table(table)) => self.tagged(key, tree, table, variants),
            (Shape::Choice(words, payloads), _) => self.choice(key, tree, words, payloads),
            (shape, value) => {
                let message = format!("`{key}` is {}, but must be {}", value.kind(), shape.expectation());
                self.problems
                    .push(Diagnostic::new(message).at_value(tree, format!("expected {}", shape.expectation())));
            }
        }
    }

    fn range(&mut self, key: &str, tree: &Tree, number: i64, (least, most): (Option<f64>, Option<f64>)) {
        // Bounds of settings are small; f64 holds them exactly.
        let number_f64 = number as f64;
        let bound = match (least, most) {
            (Some(least), _) if number_f64 < least => format!("at least {least}"),
            (_, Some(most)) if number_f64 > most => format!("at most {most}"),
            _ => return,
        };
        let message = format!("`{key}` is {number}, but must be {bound}");
        self.problems.push(Diagnostic::new(message).at_value(tree, format!("must be {bound}")));
    }

    fn fields(&mut self, key: &str, tree: &Tree, table: &Table, fields: &BTreeMap<String, Field>, has_kind: bool) {
        for (name, entry) in table {
            if has_kind && name == "kind" {
                continue;
            }
            match fields.get(name) {
                Some(field) => self.value(&path::join(key, name), &entry.tree, &field.shape),
                None => {
                    let of = if key.is_empty() { String::new() } else { format!(" in `{key}`") };
                    let problem = Diagnostic::new(format!("unknown key `{name}`{of}")).at(&entry.key, "not a setting");
                    self.problems.push(match deeper(fields, name) {
                        Some(inside) => problem.help(format!("did you mean `{}`?", path::join(key, &inside))),
                        None => problem.nearest(name, fields.keys().map(String::as_str)),
                    });
                }
            }
        }
        let missing = fields.iter().filter(|(name, field)| field.is_required && !table.contains_key(*name));
        let missing: Vec<String> = missing.map(|(name, _)| path::join(key, name)).collect();
        if self.is_complete && !missing.is_empty() {
            let names: Vec<&str> = missing.iter().map(String::as_str).collect();
            let noun = if names.len() == 1 { "setting" } else { "settings" };
            let mut problem = Diagnostic::new(format!("missing {noun} {}", quoted_list(&names)));
            problem = problem.help(format!("add set.{} = ..., or give it a default in the stage file", names[0]));
            // An empty span is the root of a file, where a caret would say nothing.
            match self.owner.filter(|_| tree.spot.start() == tree.spot.end()) {
                Some(owner) => problem = problem.at(owner, "this node needs it"),
                None => problem = problem.at_value(tree, "not here"),
            }
            self.problems.push(problem);
        }
    }

    fn tagged(&mut self, key: &str, tree: &Tree, table: &Table, variants: &BTreeMap<String, BTreeMap<String, Field>>) {
        let kinds = || variants.keys().map(String::as_str);
        let all: Vec<&str> = kinds().collect();
        let Some(kind) = table.get("kind") else {
            if self.is_complete {
                let message = format!("missing setting `{}`", path::join(key, "kind"));
                let help = format!("one of {}", quoted_list(&all));
                self.problems.push(Diagnostic::new(message).at_value(tree, "not here").help(help));
            }
            return;
        };
        match kind.tree.text().and_then(|kind| variants.get(kind)) {
            Some(fields) => self.fields(key, tree, table, fields, true),
            None => {
                let found = kind.tree.text().unwrap_or_default();
                self.problems.push(
                    Diagnostic::new(format!("`{}` is none of {}", path::join(key, "kind"), quoted_list(&all)))
                        .at_value(&kind.tree, "unknown kind")
                        .nearest(found, kinds()),
                );
            }
        }
    }

    fn choice(&mut self, key: &str, tree: &Tree, words: &[String], payloads: &BTreeMap<String, Shape>) {
        let names = || words.iter().chain(payloads.keys()).map(String::as_str);
        let all: Vec<&str> = names().collect();
        if let Some(table) = tree.table().filter(|table| table.len() == 1)
            && let Some((name, entry)) = table.first()
            && let Some(shape) = payloads.get(name)
        {
            return self.value(&path::join(key, name), &entry.tree, shape);
        }
        match tree.text() {
            Some(word) if words.iter().any(|known| known == word) => {}
            Some(word) if payloads.contains_key(word) => {
                let message = format!("`{key}` = `{word}` needs a value: write `{{ {word} = .. }}`");
                self.problems.push(Diagnostic::new(message).at_value(tree, "without a value"));
            }
            found => self.problems.push(
                Diagnostic::new(format!("`{key}` is none of {}", quoted_list(&all)))
                    .at_value(tree, "not a choice")
                    .nearest(found.unwrap_or_default(), names()),
            ),
        }
    }
}

fn settle_fields(fields: &BTreeMap<String, Field>, table: &mut Table, root: &Path) {
    for (name, field) in fields {
        if let Some(entry) = table.get_mut(name) {
            field.shape.settle_paths(&mut entry.tree, root);
        }
    }
}

/// Returns where the key `name` stands inside one of the fields: it was written one table too high.
fn deeper(fields: &BTreeMap<String, Field>, name: &str) -> Option<String> {
    fields.iter().find_map(|(key, field)| {
        let Shape::Fields(inner) = &field.shape else { return None };
        let inside = if inner.contains_key(name) { Some(name.to_owned()) } else { deeper(inner, name) };
        Some(path::join(key, &inside?))
    })
}

impl Shape {
    /// Turns the paths in `tree` from relative to the file that holds each into relative to `root`.
    pub fn settle_paths(&self, tree: &mut Tree, root: &Path) {
        match (self, &mut tree.value) {
            // An address of an object store is relative to nothing.
            (Self::Path, Value::Text(text)) if text.contains("://") => {}
            (Self::Path, Value::Text(text)) => *text = from_root(root, &tree.spot.source.folder, text),
            (Self::List(item, _), Value::List(items)) if item.may_hold_paths() => {
                Arc::make_mut(items).iter_mut().for_each(|tree| item.settle_paths(tree, root));
            }
            (Self::Map(item), Value::Table(table)) if item.may_hold_paths() => {
                Arc::make_mut(table).iter_mut().for_each(|(_, entry)| item.settle_paths(&mut entry.tree, root));
            }
            (Self::Fields(fields), Value::Table(table)) => settle_fields(fields, Arc::make_mut(table), root),
            (Self::Tagged(variants), Value::Table(table)) => {
                let kind = table.get("kind").and_then(|entry| entry.tree.text()).map(str::to_owned);
                if let Some(fields) = kind.and_then(|kind| variants.get(&kind)) {
                    settle_fields(fields, Arc::make_mut(table), root);
                }
            }
            (Self::Choice(_, payloads), Value::Table(table)) => {
                for (name, entry) in Arc::make_mut(table).iter_mut() {
                    if let Some(shape) = payloads.get(name) {
                        shape.settle_paths(&mut entry.tree, root);
                    }
                }
            }
            _ => {}
        }
    }

    /// Returns false when no value of this shape has a path in it, as far as is seen at once.
    fn may_hold_paths(&self) -> bool {
        !matches!(self, Self::Any | Self::Bool | Self::Int(..) | Self::Number | Self::Text)
    }

    fn expectation(&self) -> &'static str {
        match self {
            Self::Any => "anything",
            Self::Bool => "true or false",
            Self::Int(..) => "a whole number",
            Self::Number => "a finite number",
            Self::Text => "a text",
            Self::Path => "a path, as a text",
            Self::List(..) => "a list",
            Self::Map(_) | Self::Fields(_) | Self::Tagged(_) => "a table",
            Self::Choice(..) => "one of a few words",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every shape must be known, or a misspelt key inside it would pass.
    fn no_any(shape: &Shape, at: &str) {
        match shape {
            Shape::Any => panic!("{at} has no shape"),
            Shape::List(item, _) | Shape::Map(item) => no_any(item, at),
            Shape::Fields(fields) => fields.iter().for_each(|(key, field)| no_any(&field.shape, &path::join(at, key))),
            Shape::Tagged(variants) => variants
                .values()
                .for_each(|fields| fields.iter().for_each(|(key, field)| no_any(&field.shape, &path::join(at, key)))),
            Shape::Choice(_, payloads) => payloads.iter().for_each(|(key, shape)| no_any(shape, &path::join(at, key))),
            Shape::Bool | Shape::Int(..) | Shape::Number | Shape::Text | Shape::Path => {}
        }
    }

    #[test]
    fn every_setting_of_every_kind_has_a_shape() {
        for kind in StageKind::ALL {
            no_any(of(kind), kind.name());
        }
    }
}
