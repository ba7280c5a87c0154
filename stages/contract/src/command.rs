//! The `command` stage: any external program as a node, with its placeholders.
//!
//! Knows how a command is written and filled in; starts nothing. The orchestrator runs it itself, without a worker.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use crate::artifact::ArtifactKind;
use crate::settings::ExternalPath;

/// Settings of a `command` node: a program and its arguments, or a line for the shell.
///
/// `{name}` stands for what only the job knows: see [`Placeholder`]. `{{name}}` is the text `{name}`; other braces
/// are text, and `${NAME}` is left to the shell.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct CommandSettings {
    /// Program and arguments, each passed as it is. Either this or `shell`.
    pub argv: Vec<String>,
    /// A line for `/bin/sh -e`; placeholders are quoted where that is needed. Its exit status is kept even when the
    /// orchestrator dies meanwhile, so that a long command is adopted and not run again.
    pub shell: String,
    /// Variables set for the program, on top of the environment that the orchestrator was started in.
    pub env: BTreeMap<String, String>,
    /// Files and folders that must lie in `{out}` afterwards, relative to it; the attempt fails when one is missing.
    pub outputs: Vec<String>,
    /// What the result is for the ports of other stages.
    pub output_kind: ArtifactKind,
    /// JSON file in `{out}` whose numbers become the node's metrics; tables inside it name groups (`group/name`).
    pub metrics: Option<String>,
    /// Files and folders outside the artifact store that the command reads, such as its scripts; in a file relative to
    /// that file, here to the project's root. Their content is part of the fingerprint.
    #[cfg_attr(feature = "schema", schemars(extend("items" = {"type": "string", "format": "path"})))]
    pub files: Vec<String>,
    /// Exit codes that count as success.
    pub success: Vec<i32>,
}

/// What only the job knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placeholder<'a> {
    /// `{input.NAME}`: folder of the sealed result wired to a port.
    Input(&'a str),
    /// `{out}`: folder that becomes the result.
    Out,
    /// `{seed}`: the node's seed.
    Seed,
    /// `{threads}`: threads that the executor gives to a job that computes.
    Threads,
    /// `{device}`: the executor's device.
    Device,
    /// `{root}`: the project's root.
    Root,
    /// `{job}`: the attempt's own folder, in which the command starts.
    Job,
}

/// A part of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Text as it is.
    Text(&'a str),
    /// Something to fill in.
    Placeholder(Placeholder<'a>),
}

/// Names of the placeholders, for messages.
pub const PLACEHOLDERS: [&str; 7] = ["input.NAME", "out", "seed", "threads", "device", "root", "job"];

impl<'a> Placeholder<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        Some(match name {
            "out" => Self::Out,
            "seed" => Self::Seed,
            "threads" => Self::Threads,
            "device" => Self::Device,
            "root" => Self::Root,
            "job" => Self::Job,
            name => Self::Input(name.strip_prefix("input.").filter(|port| !port.is_empty())?),
        })
    }
}

/// Splits a template into its pieces.
///
/// # Errors
/// The name in braces that is no placeholder.
pub fn pieces(template: &str) -> Result<Vec<Piece<'_>>, &str> {
    let mut pieces = Vec::new();
    let (mut text_from, mut at) = (0, 0);
    let bytes = template.as_bytes();
    while at < bytes.len() {
        if bytes[at..].starts_with(b"{{")
            && let Some(name) = name_at(&template[at + 2..])
            && template[at + 2 + name.len()..].starts_with("}}")
        {
            pieces.push(Piece::Text(&template[text_from..at]));
            pieces.push(Piece::Text(&template[at + 1..at + name.len() + 3]));
            at += name.len() + 4;
            text_from = at;
            continue;
        }
        let is_shell = at > 0 && bytes[at - 1] == b'$';
        let name = (bytes[at] == b'{' && !is_shell).then(|| name_at(&template[at + 1..])).flatten();
        let Some(name) = name else {
            at += 1;
            continue;
        };
        let placeholder = Placeholder::parse(name).ok_or(name)?;
        pieces.push(Piece::Text(&template[text_from..at]));
        pieces.push(Piece::Placeholder(placeholder));
        at += name.len() + 2;
        text_from = at;
    }
    pieces.push(Piece::Text(&template[text_from..]));
    pieces.retain(|piece| *piece != Piece::Text(""));
    Ok(pieces)
}

/// Returns the name before the next closing brace when it looks like one: other braces are text.
fn name_at(rest: &str) -> Option<&str> {
    let name = rest.split_once('}')?.0;
    let is_name = name.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-'));
    (is_name && name.starts_with(|c: char| c.is_alphabetic())).then_some(name)
}

impl CommandSettings {
    /// Returns every text that may hold placeholders, with its settings key.
    pub fn templates(&self) -> impl Iterator<Item = (String, &str)> {
        let argv = self.argv.iter().enumerate().map(|(at, text)| (format!("argv[{at}]"), text.as_str()));
        let env = self.env.iter().map(|(name, text)| (format!("env.{name}"), text.as_str()));
        argv.chain(std::iter::once(("shell".to_owned(), self.shell.as_str()))).chain(env)
    }

    /// Returns the files and folders outside the artifact store that the command reads.
    pub fn external_paths(&self) -> Vec<ExternalPath> {
        let path = |(at, path): (usize, &String)| ExternalPath {
            key: format!("files[{at}]"),
            path: path.clone(),
            remedy: "put it there, or take it out of `files`".into(),
        };
        self.files.iter().enumerate().map(path).collect()
    }

    /// Returns true when the command asks for the executor's device or its threads.
    pub fn uses_device(&self) -> bool {
        let asks = |piece: &Piece<'_>| {
            matches!(piece, Piece::Placeholder(Placeholder::Device) | Piece::Placeholder(Placeholder::Threads))
        };
        self.templates().any(|(_, text)| pieces(text).is_ok_and(|pieces| pieces.iter().any(asks)))
    }

    /// Returns whether a program ended well.
    pub fn is_success(&self, code: i32) -> bool {
        if self.success.is_empty() { code == 0 } else { self.success.contains(&code) }
    }
}

/// Returns `text` so that a shell reads it as one word; plain text stays as it is.
pub fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:=@%^".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Returns true for a path that stays inside the folder that it is relative to.
pub fn is_inside(path: &str) -> bool {
    let path = Path::new(path);
    path.components().all(|part| matches!(part, Component::Normal(_))) && path.components().next().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Piece<'_> {
        Piece::Placeholder(Placeholder::parse(name).unwrap())
    }

    #[test]
    fn placeholders_are_told_from_other_braces() {
        let text = r#"a {input.images}/x {out} ${HOME} {{seed}} awk '{ print $1 }' {a,b} {"x": {"y": 1}}"#;
        let expected = [
            Piece::Text("a "),
            named("input.images"),
            Piece::Text("/x "),
            named("out"),
            Piece::Text(" ${HOME} "),
            Piece::Text("{seed}"),
            Piece::Text(r#" awk '{ print $1 }' {a,b} {"x": {"y": 1}}"#),
        ];
        assert_eq!(pieces(text).unwrap(), expected);
        assert_eq!(pieces("{output}"), Err("output"));
        assert_eq!(pieces("{input.}"), Err("input."));
        assert_eq!(pieces("").unwrap(), []);
        assert_eq!(pieces("{").unwrap(), [Piece::Text("{")]);
    }

    #[test]
    fn a_command_that_names_the_device_uses_it() {
        let with = |text: &str| CommandSettings { argv: vec![text.into()], ..CommandSettings::default() };
        assert!(with("--device={device}").uses_device());
        assert!(with("{threads}").uses_device());
        assert!(!with("{seed} {out}").uses_device());
    }

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(shell_word("/a/b-c.txt"), "/a/b-c.txt");
        assert_eq!(shell_word("/a b/it's"), r"'/a b/it'\''s'");
        assert_eq!(shell_word(""), "''");
    }
}
