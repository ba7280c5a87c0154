//! Completion on the command line: `deepgen completions SHELL` prints a script, which asks this program for candidates;
//! names of nodes, profiles and variants are those of the pipeline that the command line names.
//!
//! Arguments are known by their names, so that a command that takes a `NODE` completes without a word here.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};

use crate::cli::Exit;
use crate::spec::{self, Names};

/// Variable in which the script names the shell it asks for.
const ASKED_IN: &str = "COMPLETE";

/// Arguments of `deepgen completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// Shell
    #[arg(value_parser = ["bash", "zsh", "fish", "elvish", "powershell"])]
    pub shell: String,
}

/// Prints the script that registers completion; `source <(deepgen completions bash)` turns it on.
///
/// # Errors
/// When standard output is closed.
pub fn completions(args: &CompletionsArgs) -> Result<Exit> {
    let shells = Shells::builtins();
    let shell = shells.completer(&args.shell).context("the shell is one of those that are accepted")?;
    let own = std::env::current_exe().context("cannot tell where this program lies")?;
    let own = own.to_string_lossy();
    shell.write_registration(ASKED_IN, "deepgen", "deepgen", &own, &mut io::stdout())?;
    Ok(Exit::Done)
}

/// Answers a script that asks for candidates, and ends the program; returns at once otherwise.
pub fn answer(command: fn() -> Command) {
    CompleteEnv::with_factory(move || with_names(command())).var(ASKED_IN).complete();
}

/// Answers what may stand in place of a word that was begun.
type Candidates = fn(&OsStr) -> Vec<CompletionCandidate>;

/// Lets every argument that takes a name of the pipeline complete it.
fn with_names(mut command: Command) -> Command {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    for name in names {
        command = command.mut_subcommand(name, with_names);
    }
    let takes = |arg: &clap::Arg| -> Option<Candidates> {
        let id = arg.get_id().as_str();
        let value = arg.get_value_names().and_then(<[_]>::last).map_or("", |name| name.as_str());
        match (id, value) {
            ("profile", _) => Some(profiles),
            ("variant", _) => Some(variants),
            ("set", _) => Some(assignments),
            ("node" | "nodes", _) | (_, "NODE") => Some(nodes),
            _ => None,
        }
    };
    // Every argument is touched, in order: one that is changed moves to the end, and positions count.
    let all: Vec<_> = command.get_arguments().map(|arg| (arg.get_id().clone(), takes(arg))).collect();
    for (id, candidates) in all {
        command = command.mut_arg(id, |arg| match candidates {
            Some(candidates) => arg.add(ArgValueCompleter::new(candidates)),
            None => arg,
        });
    }
    command
}

fn nodes(typed: &OsStr) -> Vec<CompletionCandidate> {
    let bases = |names: Names| {
        let base = |name: &String| name.split('[').next().unwrap_or_default().to_owned();
        let mut all: Vec<String> = names.nodes.iter().map(base).collect();
        all.extend(names.nodes);
        all.sort();
        all.dedup();
        all
    };
    candidates(typed, "", bases)
}

fn assignments(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(typed, ".", |names| names.nodes)
}

fn profiles(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(typed, "", |names| names.profiles)
}

fn variants(typed: &OsStr) -> Vec<CompletionCandidate> {
    candidates(typed, "", |names| names.variants)
}

fn candidates(typed: &OsStr, end: &str, choose: fn(Names) -> Vec<String>) -> Vec<CompletionCandidate> {
    let typed = typed.to_string_lossy();
    let names = pipeline(std::env::args_os()).and_then(|file| spec::names(&file)).map(choose).unwrap_or_default();
    let fits = names.into_iter().filter(|name| name.starts_with(&*typed));
    fits.map(|name| CompletionCandidate::new(format!("{name}{end}"))).collect()
}

/// Returns the pipeline that the words of a command line name, or the one that is meant when none is.
fn pipeline(words: impl Iterator<Item = OsString>) -> Option<PathBuf> {
    let mut named = words.map(PathBuf::from).filter(|word| word.extension().is_some_and(|end| end == "toml"));
    named
        .find(|file| file.is_file())
        .or_else(|| Some(Path::new("pipelines/full.toml").to_owned()).filter(|file| file.is_file()))
}
