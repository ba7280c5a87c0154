//! TOML as a tree in which every key and value remembers where it was written, and the rule by which trees merge.
//!
//! A copy of a tree shares its lists and tables with it until one of the two changes: the same settings stand in the
//! file, in a node's table and in the merged settings. Knows nothing of stages or pipelines.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use litemap::LiteMap;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::Diagnostic;
use super::path;
use super::resolved::{Origin, snug};

/// A text that was read: a file, or one `--set` of the command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// Path relative to the project's root, or `command line`.
    pub name: Arc<str>,
    /// Folder that relative paths in it start from, absolute.
    pub folder: PathBuf,
    /// The whole text.
    pub text: String,
    /// True for the command line.
    pub is_command_line: bool,
    /// Place among the files that are merged into one: a file comes after those it includes.
    pub rank: OnceLock<usize>,
    /// Positions of the newlines.
    newlines: Vec<usize>,
}

impl Source {
    /// Returns a file's text under its name; relative paths in it start from `folder`.
    pub fn file(name: impl Into<Arc<str>>, folder: impl Into<PathBuf>, text: impl Into<String>) -> Arc<Self> {
        let text = text.into();
        let newlines = text.match_indices('\n').map(|(at, _)| at).collect();
        Arc::new(Self {
            name: name.into(),
            folder: folder.into(),
            text,
            is_command_line: false,
            rank: OnceLock::new(),
            newlines,
        })
    }

    /// Returns one argument of the command line, where relative paths start from the working directory.
    pub fn argument(text: impl Into<String>) -> Arc<Self> {
        let folder = std::env::current_dir().unwrap_or_default();
        let (name, text) = ("command line".into(), text.into());
        Arc::new(Self { name, folder, text, is_command_line: true, rank: OnceLock::new(), newlines: Vec::new() })
    }

    /// Returns the line, from 1, of a byte position.
    pub fn line(&self, at: usize) -> usize {
        self.newlines.partition_point(|newline| *newline < at) + 1
    }

    /// Returns the spot of some of its bytes.
    pub fn spot(self: &Arc<Self>, start: usize, end: usize) -> Spot {
        let short = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        Spot { source: self.clone(), start: short(start), end: short(end), profile: None }
    }
}

/// A stretch of a source. Every key and every value has one, so it is kept small: sources end at 4 GiB, and the name of
/// the profile is behind a thin pointer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spot {
    /// Where.
    pub source: Arc<Source>,
    start: u32,
    end: u32,
    /// Profile whose table holds it.
    pub profile: Option<Arc<String>>,
}

impl Spot {
    /// Returns the position of its first byte.
    pub fn start(&self) -> usize {
        self.start as usize
    }

    /// Returns the position behind its last byte.
    pub fn end(&self) -> usize {
        self.end as usize
    }

    /// Returns its place in the order of writing, over all files that are merged into one.
    pub fn order(&self) -> (usize, usize) {
        (self.source.rank.get().copied().unwrap_or(0), self.start())
    }

    /// Returns the line, from 1.
    pub fn line(&self) -> usize {
        self.source.line(self.start())
    }

    /// Returns the origin that a resolved node records.
    pub fn origin(&self) -> Origin {
        if self.source.is_command_line {
            return Origin::CommandLine;
        }
        if *self.source.name == *super::smoke::SOURCE {
            return Origin::Smoke;
        }
        let profile = self.profile.as_deref().cloned();
        Origin::File { file: self.source.name.clone(), line: self.line(), profile }
    }
}

/// A value and where it was written.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Where.
    pub spot: Spot,
    /// What.
    pub value: Value,
    /// Where a reference stands that took the value on.
    pub via: Option<Box<Spot>>,
}

/// What a tree holds.
#[derive(Debug, Clone)]
pub enum Value {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a fraction or an exponent.
    Float(f64),
    /// A text.
    Text(String),
    /// A date or time; no setting has one.
    Date,
    /// A list.
    List(Arc<[Tree]>),
    /// A table.
    Table(Arc<Table>),
}

/// Entries in order of their keys, in one block: a file may hold ten thousands of tables of two or three.
pub type Table = LiteMap<String, Entry>;

/// A key's place and its value.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Where the key was written.
    pub key: Spot,
    /// The value.
    pub tree: Tree,
}

impl Value {
    /// Returns the word for it in messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bool(_) => "true or false",
            Self::Int(_) => "a whole number",
            Self::Float(_) => "a number",
            Self::Text(_) => "a text",
            Self::Date => "a date",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

impl From<Table> for Value {
    fn from(table: Table) -> Self {
        Self::Table(Arc::new(table))
    }
}

impl Tree {
    /// Returns an empty table at `spot`.
    pub fn empty(spot: Spot) -> Self {
        Self { spot, value: Value::from(Table::default()), via: None }
    }

    /// Returns the table, if it is one.
    pub fn table(&self) -> Option<&Table> {
        match &self.value {
            Value::Table(table) => Some(table),
            _ => None,
        }
    }

    /// Returns the table, if it is one, to change it: no copy of this tree sees the change.
    pub fn table_mut(&mut self) -> Option<&mut Table> {
        match &mut self.value {
            Value::Table(table) => Some(Arc::make_mut(table)),
            _ => None,
        }
    }

    /// Returns the text, if it is one.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns the value of a key, if this is a table that has it.
    pub fn get(&self, key: &str) -> Option<&Tree> {
        self.table()?.get(key).map(|entry| &entry.tree)
    }

    fn kind_key(&self) -> Option<&str> {
        self.get("kind")?.text()
    }

    /// Lays `over` on top: tables merge key by key, anything else is replaced, and so is a table whose `kind` changes.
    pub fn merge(&mut self, over: Tree) {
        let changes_kind = over.kind_key().is_some() && over.kind_key() != self.kind_key();
        match (&mut self.value, over.value) {
            (Value::Table(below), Value::Table(above)) if !changes_kind => {
                let below = Arc::make_mut(below);
                let mut new = Vec::new();
                for (key, entry) in Arc::unwrap_or_clone(above) {
                    match below.get_mut(&key) {
                        Some(old) => {
                            if old.tree.table().is_none() || entry.tree.table().is_none() {
                                old.key = entry.key;
                            }
                            old.tree.merge(entry.tree);
                        }
                        None => new.push((key, entry)),
                    }
                }
                below.extend(new);
            }
            (_, value) => *self = Tree { spot: over.spot, value, via: over.via },
        }
    }

    /// Returns true when a text in it may hold a reference.
    pub fn has_marks(&self) -> bool {
        match &self.value {
            Value::Text(text) => super::reference::is_marked(text),
            Value::List(items) => items.iter().any(Tree::has_marks),
            Value::Table(table) => table.values().any(|entry| entry.tree.has_marks()),
            _ => false,
        }
    }

    /// Returns tables around `self` so that it stands at the end of `keys`.
    pub fn nested(self, keys: &[String], key: &Spot) -> Self {
        keys.iter().rev().fold(self, |tree, part| {
            let spot = tree.spot.clone();
            let table = Table::from_iter([(part.clone(), Entry { key: key.clone(), tree })]);
            Tree { spot, value: table.into(), via: None }
        })
    }

    /// Replaces quoted keys that hold dots, such as `"optimizer.lr"`, by the tables that they spell.
    pub fn undotted(self) -> Self {
        if !self.has_dotted_keys() {
            return self;
        }
        let Value::Table(table) = self.value else { return self };
        let mut all = Tree::empty(self.spot);
        // In order of writing, so that of two spellings of one key the later counts.
        let mut entries: Vec<_> = Arc::unwrap_or_clone(table).into_iter().collect();
        entries.sort_by_key(|(_, entry)| entry.key.order());
        for (key, entry) in entries {
            let mut keys = path::split(&key);
            // Deeper than any setting lies; left as it is, it is an unknown key and not a tower of tables.
            if keys.len() > DEEPEST_KEY {
                keys = vec![key];
            }
            all.merge(entry.tree.undotted().nested(&keys, &entry.key));
        }
        all
    }

    fn has_dotted_keys(&self) -> bool {
        self.table().is_some_and(|table| {
            table
                .iter()
                .any(|(key, entry)| key.contains(['.', '"']) || key.trim() != key || entry.tree.has_dotted_keys())
        })
    }

    /// Marks everything as written in a profile's table.
    pub fn in_profile(mut self, profile: &Arc<String>) -> Self {
        self.spot.profile = Some(profile.clone());
        self.value = match self.value {
            Value::List(items) => Value::List(items.iter().map(|item| item.clone().in_profile(profile)).collect()),
            Value::Table(table) => Arc::unwrap_or_clone(table)
                .into_iter()
                .map(|(key, mut entry)| {
                    entry.key.profile = Some(profile.clone());
                    (key, Entry { key: entry.key, tree: entry.tree.in_profile(profile) })
                })
                .collect::<Table>()
                .into(),
            other => other,
        };
        self
    }

    /// Calls `visit` with the dotted key and the value of every leaf: of everything that is not a table.
    pub fn leaves(&self, prefix: &str, visit: &mut impl FnMut(String, &Tree)) {
        match &self.value {
            Value::Table(table) => {
                for (key, entry) in table.iter() {
                    entry.tree.leaves(&path::join(prefix, key), visit);
                }
            }
            _ => visit(prefix.to_owned(), self),
        }
    }

    /// Returns the value as JSON; infinite numbers and dates become null, which no setting accepts.
    pub fn json(&self) -> serde_json::Value {
        match &self.value {
            Value::Bool(value) => (*value).into(),
            Value::Int(value) => (*value).into(),
            Value::Float(value) => (*value).into(),
            Value::Text(value) => value.as_str().into(),
            Value::Date => serde_json::Value::Null,
            Value::List(items) => items.iter().map(Tree::json).collect(),
            Value::Table(table) => {
                serde_json::Value::Object(table.iter().map(|(key, entry)| (key.clone(), entry.tree.json())).collect())
            }
        }
    }
}

/// Most parts of a dotted key that is taken apart.
pub const DEEPEST_KEY: usize = 16;

/// Beginning of the message of every syntax error but a repeated key.
pub const NOT_TOML: &str = "this is not TOML";

/// Parses a source: the tree as far as it could be read, and every syntax error.
pub fn parse(source: &Arc<Source>) -> (Tree, Vec<Diagnostic>) {
    let (document, errors) = DeTable::parse_recoverable(&source.text);
    let whole = source.spot(0, 0);
    let tree = Tree { spot: whole.clone(), value: table(document.into_inner(), source, 0).into(), via: None };
    let diagnostics = errors.iter().filter_map(|error| syntax_error(error, &tree, &whole)).collect();
    (tree, diagnostics)
}

/// Parses the value that an argument of the command line holds from byte `from` on; a bare word is a text.
pub fn parse_value(source: &Arc<Source>, from: usize) -> Result<Tree, Diagnostic> {
    let text = &source.text[from..];
    let from = from + (text.len() - text.trim_start().len());
    let text = text.trim();
    let spot = source.spot(from, from + text.len());
    match DeValue::parse(text) {
        Ok(value) => Ok(convert(value, source, from)),
        Err(_) if text.starts_with("${") && text.ends_with('}') => {
            Ok(Tree { spot, value: Value::Text(text.to_owned()), via: None })
        }
        Err(_) if !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "_-./:".contains(c)) => {
            Ok(Tree { spot, value: Value::Text(text.to_owned()), via: None })
        }
        Err(error) => Err(Diagnostic::new(format!("this is not a TOML value: {}", error.message()))
            .at(&spot, "the value")
            .help(r#"a text with spaces needs quotes: --set 'node.key="two words"'"#)),
    }
}

fn spot<T>(spanned: &Spanned<T>, source: &Arc<Source>, offset: usize) -> Spot {
    source.spot(spanned.span().start + offset, spanned.span().end + offset)
}

/// Returns the tree of a table that was parsed from the text of `source` from byte `offset` on.
pub fn table(table: DeTable<'_>, source: &Arc<Source>, offset: usize) -> Table {
    snug(table.into_iter().map(|(key, value)| {
        let entry = Entry { key: spot(&key, source, offset), tree: convert(value, source, offset) };
        (key.into_inner().into_owned(), entry)
    }))
}

fn convert(value: Spanned<DeValue<'_>>, source: &Arc<Source>, offset: usize) -> Tree {
    let spot = spot(&value, source, offset);
    let value = match value.into_inner() {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Int(number),
            // Out of range for a whole number, so the check of its type speaks.
            Err(_) => Value::Float(number.as_str().parse().unwrap_or(f64::INFINITY)),
        },
        DeValue::Float(number) => Value::Float(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(value) => Value::Bool(value),
        DeValue::Datetime(_) => Value::Date,
        DeValue::Array(items) => Value::List(items.into_iter().map(|item| convert(item, source, offset)).collect()),
        DeValue::Table(entries) => table(entries, source, offset).into(),
    };
    Tree { spot, value, via: None }
}

/// Turns a parser's error into ours; of a key that stands twice it names both lines.
///
/// Nothing for a key that stands twice only because its table does.
fn syntax_error(error: &toml::de::Error, tree: &Tree, whole: &Spot) -> Option<Diagnostic> {
    let span = error.span().unwrap_or(0..0);
    let spot = whole.source.spot(span.start, span.end);
    if error.message() != "duplicate key" {
        let problem = Diagnostic::new(format!("{NOT_TOML}: {}", error.message())).at(&spot, "here");
        return Some(problem.help(remedy(error.message())));
    }
    let (keys, header) = keys_at(&spot);
    let first = if header.start() <= spot.start() && spot.end() <= header.end() {
        headers(&whole.source).find(|(known, _)| *known == keys).map(|(_, first)| first)
    } else {
        let mut entry: Option<&Entry> = None;
        for key in &keys {
            entry = entry.map_or(tree, |entry| &entry.tree).table().and_then(|table| table.get(key));
        }
        let first = entry.map(|entry| entry.key.clone());
        if first.as_ref().is_some_and(|first| first.start() < header.start()) {
            return None;
        }
        first
    };
    let name = keys.last().cloned().unwrap_or_default();
    let what = match keys.as_slice() {
        [table, name] if table == "node" => format!("two nodes are named `{name}`"),
        _ => format!("`{name}` is written twice"),
    };
    let problem = match first.filter(|first| first.start() < spot.start()) {
        Some(first) => Diagnostic::new(format!("{what}: in line {} and in line {}", first.line(), spot.line()))
            .at(&spot, "again here")
            .at(&first, "first here"),
        None => Diagnostic::new(format!("{what}: once more in line {}", spot.line())).at(&spot, "again here"),
    };
    Some(problem.help("take one of them out, or give it another name"))
}

/// Returns what to do about a syntax error of the parser's.
fn remedy(message: &str) -> &'static str {
    match message {
        _ if message.contains("string") => "close the text with the quotes that it begins with",
        _ if message.contains("unclosed") => "close the bracket",
        _ if message.contains("comma") => "put a comma between the two",
        _ if message.contains("invalid") => "a text needs quotes, and each key its own line: key = \"value\"",
        _ => "write key = value, a line each; the rest of the file is checked all the same",
    }
}

/// Returns every table header with its keys, in order.
fn headers(source: &Arc<Source>) -> impl Iterator<Item = (Vec<String>, Spot)> + '_ {
    let mut start = 0;
    source.text.split_inclusive('\n').filter_map(move |line| {
        let begin = start;
        start += line.len();
        let keys = line.trim_start().strip_prefix('[')?;
        let end = keys.rfind(']')?;
        let from = begin + line.len() - keys.len();
        Some((path::split(keys[..end].trim()), source.spot(from, from + end)))
    })
}

/// Returns the keys, from the root, of the header or assignment that `spot` stands in, and the header it stands under.
fn keys_at(spot: &Spot) -> (Vec<String>, Spot) {
    let above = headers(&spot.source).take_while(|(_, header)| header.start() <= spot.start()).last();
    let (mut keys, header) = above.unwrap_or_else(|| (Vec::new(), spot.source.spot(0, 0)));
    if spot.start() >= header.end() {
        keys.push(path::split(&spot.source.text[spot.start()..spot.end()]).concat());
    }
    (keys, header)
}
