//! `deepgen gc`: what in the artifacts folder no kept run needs; says so, and removes it when told to.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use super::artifacts_layout;
use super::runs::is_pinned;
use super::table::Table;
use crate::cli::Exit;
use crate::environment;
use crate::progress::format::{bytes, count, now_ms};
use crate::store::garbage::{self, Decision, Policy, RunNeeds, Thing};
use crate::store::index::RunIndex;
use crate::store::lock::{Holder, Lock};
use crate::store::{Layout, runs};

/// A result that is being removed has this before its name, so that half of it is never taken for a whole one.
const REMOVING: &str = "removing-";

/// Arguments of `deepgen gc`.
///
/// Kept are the results of the newest runs and of pinned ones (`deepgen runs --pin RUN`), the last good checkpoint of
/// every node that is not finished, and the journal, plan and report of every run.
#[derive(Debug, clap::Args)]
pub struct GcArgs {
    /// Remove; without this only tell what would go
    #[arg(long)]
    pub delete: bool,
    /// Keep the results of so many of the newest runs
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub keep_runs: usize,
    /// Give up the results of the oldest of these runs until all takes no more than this, such as 50GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub budget: Option<u64>,
    /// Say of everything why it is kept or goes
    #[arg(long, short)]
    pub verbose: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// What `--json` prints of a thing.
#[derive(Debug, Serialize)]
struct DecidedJson<'a> {
    thing: &'a Thing,
    decision: &'a Decision,
}

/// Tells what may go, and removes it when asked to.
///
/// # Errors
/// When another process works in the folder, or something cannot be removed.
pub fn gc(args: &GcArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let host = environment::host();
    // Telling needs no lock: it may be asked while a run goes on.
    let _lock = match args.delete {
        true => {
            let holder = Holder { pid: std::process::id(), host: host.clone(), since_ms: now_ms() };
            Some(Lock::take(&layout.state().join("lock"), &holder)?)
        }
        false => None,
    };
    let needs = runs::list(&layout).into_iter().map(|run| needs(&layout, run)).collect::<Result<Vec<_>>>()?;
    let things = garbage::find(&layout, &host);
    let decisions = garbage::decide(&things, &needs, Policy { num_runs: args.keep_runs, budget: args.budget });
    let decided = || things.iter().zip(&decisions);
    if args.json {
        let all: Vec<_> = decided().map(|(thing, decision)| DecidedJson { thing, decision }).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else if args.verbose {
        print!("{}", verbose(&layout, decided()));
    }
    if args.delete {
        for (thing, _) in decided().filter(|(_, decision)| !decision.keep) {
            remove(&layout, &thing.path).with_context(|| format!("cannot remove {}", thing.path.display()))?;
        }
    }
    if !args.json {
        print!("{}", totals(decided(), args));
    }
    Ok(Exit::Done)
}

fn needs(layout: &Layout, run: String) -> Result<RunNeeds> {
    let index = RunIndex::read(&layout.run(&run)).with_context(|| {
        format!("what run {run} needs cannot be read, so nothing is removed; remove its folder if it may go")
    })?;
    let fingerprints = index.nodes.into_iter().map(|(_, _, fingerprint)| fingerprint).collect();
    Ok(RunNeeds { is_pinned: is_pinned(layout, &run), run, fingerprints })
}

fn verbose<'a>(layout: &Layout, decided: impl Iterator<Item = (&'a Thing, &'a Decision)>) -> String {
    let mut table = Table::new(&["", "what", "node", "size", "why", "path"]);
    for (thing, decision) in decided {
        let path = thing.path.strip_prefix(layout.root()).unwrap_or(&thing.path);
        table.row([
            if decision.keep { "keep".into() } else { "remove".into() },
            thing.what.name().into(),
            thing.node.clone(),
            bytes(thing.bytes),
            decision.why.clone(),
            path.display().to_string(),
        ]);
    }
    table.to_string()
}

fn totals<'a>(decided: impl Iterator<Item = (&'a Thing, &'a Decision)>, args: &GcArgs) -> String {
    let mut going: BTreeMap<(&str, &str), (usize, u64)> = BTreeMap::new();
    let (mut freed, mut kept) = (0, 0);
    for (thing, decision) in decided {
        if decision.keep {
            kept += thing.bytes;
            continue;
        }
        freed += thing.bytes;
        let (num, size) = going.entry((thing.what.name(), &decision.why)).or_default();
        *num += 1;
        *size += thing.bytes;
    }
    let mut text = String::new();
    for ((what, why), (num, size)) in &going {
        text.push_str(&format!("{}  {num} x {what}: {why}\n", bytes(*size)));
    }
    let verb = if args.delete { "freed" } else { "would be freed" };
    text.push_str(&format!("{} {verb}, {} kept\n", bytes(freed), bytes(kept)));
    if let Some(budget) = args.budget.filter(|budget| kept > *budget) {
        let over = bytes(kept - budget);
        text.push_str(&format!("{over} over the budget: pinned runs, the newest one and last good checkpoints stay\n"));
    }
    if !args.delete && !going.is_empty() {
        let num = going.values().map(|(num, _)| num).sum();
        text.push_str(&format!("nothing was removed: --delete removes {}, -v says more\n", count(num, "thing")));
    }
    text
}

/// Removes a file or a folder; a sealed result loses its name first.
fn remove(layout: &Layout, path: &Path) -> io::Result<()> {
    let is_result = path.parent() == Some(&layout.store());
    let path = match (is_result, path.file_name()) {
        (true, Some(name)) if !name.as_encoded_bytes().starts_with(REMOVING.as_bytes()) => {
            let aside = layout.store().join(format!("{REMOVING}{}", name.to_string_lossy()));
            fs::rename(path, &aside)?;
            aside
        }
        _ => path.to_owned(),
    };
    let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
    match removed {
        // It lay in a folder that went before it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Reads a size such as `50GB`, `1.5TiB` or a number of bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let units = [
        ("KiB", 1u64 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("KB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
    let text = text.trim();
    let unit = units.iter().find(|(unit, _)| text.len() > unit.len() && text.ends_with(unit));
    let (number, unit) = unit.map_or((text, 1), |(unit, size)| (&text[..text.len() - unit.len()], *size));
    match number.trim().parse::<f64>() {
        Ok(number) if number >= 0.0 && number.is_finite() => Ok((number * unit as f64) as u64),
        _ => Err("write a size such as 50GB, 500MiB or 1.5TB".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_with_decimal_or_binary_units() {
        let sizes = ["50GB", "1.5 TiB", "500MiB", "12", "7B"].map(|text| parse_size(text).unwrap());
        assert_eq!(sizes, [50_000_000_000, 3 << 39, 500 << 20, 12, 7]);
        for wrong in ["", "GB", "fifty", "-1GB", "5GX"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
