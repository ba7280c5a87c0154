//! What must be right about a `command` node beyond the types of its settings: one program, placeholders that exist.
//!
//! Sees the typed settings for what they say and the tree for where they say it.

use deepgen_contract::command::{CommandSettings, PLACEHOLDERS, Piece, Placeholder, is_inside, pieces};
use litemap::LiteMap;

use super::diagnostic::{Diagnostic, quoted_list};
use super::pipeline::NodeTable;
use super::tree::{Spot, Tree, Value};

/// Reports a command that could not be filled in, or could not be told from another.
pub fn check<T>(
    command: &CommandSettings,
    settings: &Tree,
    table: &NodeTable,
    inputs: &LiteMap<String, T>,
    problems: &mut Vec<Diagnostic>,
) {
    let wrong = |message: String, spot: &Spot, label: &str| Diagnostic::new(message).at(spot, label);
    let name = &table.name;
    match (command.argv.is_empty(), command.shell.trim().is_empty()) {
        (true, true) => {
            let problem = wrong(format!("`{name}` has no command"), &table.spot, "nothing to run");
            let help = r#"add set.argv = ["program", "argument"] or set.shell = "a line for the shell""#;
            problems.push(problem.help(help));
        }
        (false, false) => {
            let spot = place(settings, "shell").unwrap_or(&table.spot);
            let problem = wrong(format!("`{name}` has both `argv` and `shell`"), spot, "one too many");
            problems.push(problem.help("`argv` starts a program; `shell` is a line for /bin/sh"));
        }
        _ => {}
    }
    for (key, text) in command.templates() {
        let spot = place(settings, &key).unwrap_or(&table.spot);
        match pieces(text) {
            Ok(pieces) => {
                for piece in pieces {
                    if let Piece::Placeholder(Placeholder::Input(port)) = piece
                        && !inputs.contains_key(port)
                    {
                        let problem = wrong(format!("`{{input.{port}}}` is no input of `{name}`"), spot, "not wired");
                        problems.push(match inputs.is_empty() {
                            true => problem.help(format!("add inputs.{port} = \"NODE\"")),
                            false => problem.nearest(port, inputs.keys().map(String::as_str)),
                        });
                    }
                }
            }
            Err(unknown) => {
                let problem = wrong(format!("unknown placeholder `{{{unknown}}}`"), spot, "in here");
                let known = quoted_list(&PLACEHOLDERS);
                problems.push(problem.help(format!(
                    "placeholders are {known} in braces; for the text itself write `{{{{{unknown}}}}}`"
                )));
            }
        }
    }
    let outputs = command.outputs.iter().enumerate().map(|(at, path)| (format!("outputs[{at}]"), path));
    let metrics = command.metrics.iter().map(|path| ("metrics".to_owned(), path));
    for (key, path) in outputs.chain(metrics).filter(|(_, path)| !is_inside(path)) {
        let spot = place(settings, &key).unwrap_or(&table.spot);
        let problem = wrong(format!("`{path}` does not lie in the result"), spot, "not inside {out}");
        problems.push(problem.help("write it relative to `{out}`, such as \"scores.json\""));
    }
}

/// Returns where a key such as `argv[2]` or `env.HOME` was written.
fn place<'a>(settings: &'a Tree, key: &str) -> Option<&'a Spot> {
    let (name, index) = match key.strip_suffix(']').and_then(|key| key.split_once('[')) {
        Some((name, index)) => (name, index.parse::<usize>().ok()),
        None => (key, None),
    };
    let (first, rest) = name.split_once('.').map_or((name, None), |(first, rest)| (first, Some(rest)));
    let mut tree = settings.get(first)?;
    if let Some(rest) = rest {
        tree = tree.get(rest)?;
    }
    if let (Some(index), Value::List(items)) = (index, &tree.value) {
        tree = items.get(index)?;
    }
    Some(&tree.spot)
}
