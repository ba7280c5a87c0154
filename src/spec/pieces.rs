//! A long file, parsed piece by piece: the parser holds some thirty times the text that it is given, and a pipeline of
//! ten thousand nodes is two megabytes of it.
//!
//! Pieces begin at headers such as `[node.x]`. Whatever might read otherwise as a whole (a piece with an error, a table
//! of which two pieces hold a part) is parsed as a whole, so that nobody can tell.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use toml::de::DeTable;

use super::diagnostic::Diagnostic;
use super::tree::{self, Entry, Source, Table, Tree};

/// Least length of a piece, in bytes.
const PIECE: usize = 1 << 16;

/// Parses a source: the tree as far as it could be read, and every syntax error.
pub fn parse(source: &Arc<Source>) -> (Tree, Vec<Diagnostic>) {
    match in_pieces(source, PIECE) {
        Some(table) => (Tree { value: table.into(), ..Tree::empty(source.spot(0, 0)) }, Vec::new()),
        None => tree::parse(source),
    }
}

/// Parses a source in pieces of a least length; nothing when only the whole can tell what it says.
fn in_pieces(source: &Arc<Source>, least: usize) -> Option<Table> {
    let text = source.text.as_str();
    let first_header = next_boundary(text, 0).filter(|_| text.len() >= 2 * least)?;
    let mut roots: BTreeMap<String, Entry> = BTreeMap::new();
    let mut shared: BTreeMap<String, Vec<(String, Entry)>> = BTreeMap::new();
    let mut start = 0;
    while start < text.len() {
        let end = next_boundary(text, start + least).unwrap_or(text.len());
        let piece = DeTable::parse(&text[start..end]).ok()?;
        for (key, mut entry) in tree::table(piece.into_inner(), source, start) {
            let Some(known) = roots.get_mut(&key) else {
                roots.insert(key, entry);
                continue;
            };
            // A key that was assigned above the first header is no table that headers may add to.
            if known.key.start() < first_header {
                return None;
            }
            let into = shared.entry(key).or_default();
            into.extend(taken(&mut known.tree)?);
            into.extend(taken(&mut entry.tree)?);
        }
        start = end;
    }
    let whole: BTreeSet<&str> = text.lines().filter_map(only_key).collect();
    for (key, entries) in shared {
        let num = entries.len();
        let united: Table = entries.into_iter().collect();
        if united.len() != num || whole.contains(key.as_str()) || !is_bare(&key) {
            return None;
        }
        roots.get_mut(&key)?.tree.value = united.into();
    }
    Some(roots.into_iter().collect())
}

/// Takes the entries out of a table; nothing when it is none.
fn taken(tree: &mut Tree) -> Option<Table> {
    tree.table_mut().map(std::mem::take)
}

/// Returns the position, from `from` on, of a line that begins a table of two keys or more and does not go on with the
/// table that the header before it began.
fn next_boundary(text: &str, from: usize) -> Option<usize> {
    let mut at = from.min(text.len());
    let mut before = None;
    loop {
        let line = match at {
            0 => 0,
            _ => at - 1 + newline(text, at - 1)? + 1,
        };
        let header = header(&text[line..]);
        if let Some(keys) = header {
            if before.is_some_and(|before| before != keys) || from == 0 {
                return Some(line);
            }
            before = Some(keys);
        }
        at = line + 1;
    }
}

/// Returns how far behind `from` the next line ends.
fn newline(text: &str, from: usize) -> Option<usize> {
    text.as_bytes()[from..].iter().position(|byte| *byte == b'\n')
}

/// Returns the first two keys of a header that the text begins with, as they are written; nothing when it has but one.
fn header(text: &str) -> Option<(&str, &str)> {
    let keys = text.strip_prefix('[')?;
    let (first, rest) = keys.split_once('.')?;
    let end = rest.find(['.', ']', '\n', '"', '\''])?;
    (is_bare(first) && is_bare(&rest[..end])).then(|| (first, &rest[..end]))
}

fn is_bare(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

/// Returns the key of a line that may be the header of a table of one key, such as `[node]`.
fn only_key(line: &str) -> Option<&str> {
    let keys = line.trim_start().strip_prefix('[')?;
    let key = keys.split_once(']').map_or(keys, |(key, _)| key);
    (!key.contains('.')).then(|| key.trim().trim_matches(['"', '\'']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Arc<Source> {
        Source::file("p.toml", "/", text)
    }

    /// Returns everything that a tree says: each key and value with its place.
    fn told(tree: &Tree) -> String {
        match tree.table() {
            Some(table) => {
                let one = |(key, entry): (&String, &Entry)| {
                    let Entry { key: spot, tree } = entry;
                    format!(
                        "{key}@{}-{} {}-{} {}\n",
                        spot.start(),
                        spot.end(),
                        tree.spot.start(),
                        tree.spot.end(),
                        told(tree)
                    )
                };
                format!("{{\n{}}}", table.iter().map(one).collect::<String>())
            }
            None => tree.json().to_string(),
        }
    }

    fn assert_same(text: &str) {
        let source = source(text);
        let (whole, errors) = tree::parse(&source);
        assert!(errors.is_empty());
        let pieces = in_pieces(&source, 40).expect("it can be parsed in pieces");
        assert_eq!(told(&Tree { value: pieces.into(), ..whole.clone() }), told(&whole));
    }

    #[test]
    fn pieces_say_what_the_whole_says_each_thing_in_its_place() {
        let mut text = String::from("include = []\n[pipeline]\nname = \"ü\"\n[executor.local]\nslots = { cpu = 2 }\n");
        for at in 0..40 {
            text.push_str(&format!("[node.n{at}]\nstage = \"command\"\nset.argv = [\"a\",\n[1]]\n"));
            if at % 3 == 0 {
                text.push_str(&format!("[node.n{at}.inputs]\nx = \"n1\"\n  # [node.n1]\n"));
            }
        }
        text.push_str("[profile.small.node.n1.set]\nenv.A = '''\n[x\n'''\n[profile.small.node.n2]\npriority = 1\n");
        assert_same(&text);
    }

    #[test]
    fn what_only_the_whole_can_tell_is_left_to_it() {
        let filler: String = (0..9).map(|at| format!("[node.n{at}]\nstage = \"command\"\nretries = 3\n")).collect();
        assert!(in_pieces(&source(&format!("[pipeline]\n{filler}")), 40).is_some());
        for (before, after) in [
            // The same table twice, or opened again as a whole.
            ("", "[node.n1]\nretries = 4\n"),
            ("[node]\n", "[node.m]\n[node]\n"),
            ("", "[node]\n"),
            ("", "['node']\n"),
            // A table that was written where headers may not add to it.
            ("node = { m = {} }\n", ""),
            ("node.m.stage = \"x\"\n", ""),
            // Added to in two places, which TOML allows.
            ("", "[node.n1.set]\nenv.A = 'x'\n"),
            ("[[node.m]]\n", "[[node.m]]\n"),
            // No TOML at all.
            ("", "[node.m]\nset = [1\n"),
            ("[node.a]\nx = '''\n", "'''\n"),
        ] {
            let text = format!("{before}{filler}{after}");
            assert!(in_pieces(&source(&text), 40).is_none(), "{text}");
        }
    }
}
