//! `deepgen accept NODE`: declares that a changed identity gives the same result as the newest sealed one.
//!
//! For changes that a person knows to be without effect. The record says who, when, and what had changed; plan, explain
//! and the report show it, and it can be taken back.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::table::Table;
use super::{Overriding, choose_nodes, load_or_report, results_of};
use crate::cli::{Exit, Wrong};
use crate::environment;
use crate::plan::{Difference, Known, Plan, PlannedNode, Verdict, render};
use crate::progress::format::{count, now_ms, utc};
use crate::store::accepted::{self, Acceptance, Signature};
use crate::store::{ArtifactStore, Layout};

/// Arguments of `deepgen accept`.
#[derive(Debug, clap::Args)]
pub struct AcceptArgs {
    /// Node, such as sft or images[geneval]
    #[arg(required_unless_present = "list")]
    pub node: Option<String>,
    /// Pipeline or experiment file
    #[arg(default_value = "pipelines/full.toml")]
    pub file: PathBuf,
    #[command(flatten)]
    pub overriding: Overriding,
    /// Why the change is without effect; kept with the record
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub note: String,
    /// List what was accepted so far
    #[arg(long, conflicts_with = "revoke")]
    pub list: bool,
    /// Take back what was accepted for the node: it runs again
    #[arg(long)]
    pub revoke: bool,
    /// Print the list as JSON
    #[arg(long, requires = "list")]
    pub json: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// Records, takes back or lists.
///
/// # Errors
/// When there is no such node, nothing to accept, or the record cannot be written.
pub fn accept(args: &AcceptArgs) -> Result<Exit> {
    if args.list {
        return list(&super::artifacts_layout(args.artifacts.as_deref())?, args.json);
    }
    let Some(resolved) = load_or_report(&args.file, &args.overriding, false) else { return Ok(Exit::Wrong) };
    let (plan, store) = results_of(&resolved, args.artifacts.as_deref())?;
    let chosen = choose_nodes(&plan, args.node.as_deref().unwrap_or_default())?;
    let by = Signature { user: environment::user(), host: environment::host(), at_ms: now_ms() };
    if args.revoke {
        return revoke(&chosen, &store, &by);
    }
    let mut records = Vec::new();
    for planned in chosen {
        if planned.verdict != Verdict::Cached {
            records.push(record(planned, &store, &args.note, &by)?);
        }
    }
    if records.is_empty() {
        println!("nothing to accept: the result is there already");
    }
    for record in &records {
        record
            .write(store.layout())
            .with_context(|| format!("cannot write into {}", store.layout().accepted().display()))?;
        println!("{}: {} stands for {} from now on", record.node, record.from.short(), record.to.short());
        print!("{}", render::differences(&record.differences, "  "));
    }
    Ok(Exit::Done)
}

fn record(planned: &PlannedNode, store: &ArtifactStore, note: &str, by: &Signature) -> Result<Acceptance> {
    let name = &planned.node.name;
    if matches!(planned.verdict, Verdict::Blocked(_)) {
        let why = "its identity is not known while inputs are missing: see `deepgen plan`";
        return Err(Wrong(format!("`{name}` cannot be accepted: {why}")).into());
    }
    let (Some(latest), Some(differences)) = (store.latest(name), Plan::differences(planned, store)) else {
        return Err(Wrong(format!("`{name}` cannot be accepted: it never ran, so there is no result to use")).into());
    };
    if store.manifest(&latest.fingerprint).is_ok_and(|made| made.is_smoke) && !planned.is_smoke {
        let why = "its newest result is of a smoke test";
        return Err(Wrong(format!("`{name}` cannot be accepted: {why}; run it")).into());
    }
    if !store.is_sealed(&latest.fingerprint) {
        let why = format!("its newest result {} is gone or does not verify", latest.fingerprint.short());
        return Err(Wrong(format!("`{name}` cannot be accepted: {why}; run it again")).into());
    }
    let ids = (latest.fingerprint, planned.fingerprint);
    Ok(Acceptance::new(name.clone(), ids, differences, note.to_owned(), by.clone()))
}

fn revoke(chosen: &[&PlannedNode], store: &ArtifactStore, by: &Signature) -> Result<Exit> {
    let known = accepted::read_all(store.layout());
    let mut num = 0;
    for planned in chosen {
        let Some(identity) = planned.stands_for else { continue };
        let Some(record) = known.get(&identity) else { continue };
        Acceptance { revoked: Some(by.clone()), ..record.clone() }
            .write(store.layout())
            .with_context(|| format!("cannot write into {}", store.layout().accepted().display()))?;
        println!("{}: {} stands for {} no longer", record.node, record.from.short(), record.to.short());
        num += 1;
    }
    if num == 0 {
        let names: Vec<&str> = chosen.iter().map(|planned| planned.node.name.0.as_str()).collect();
        return Err(Wrong(format!("nothing was accepted for {}; see `deepgen accept --list`", names.join(", "))).into());
    }
    Ok(Exit::Done)
}

fn list(layout: &Layout, is_json: bool) -> Result<Exit> {
    let mut all: Vec<Acceptance> = accepted::read_all(layout).into_values().collect();
    all.sort_by_key(|record| record.by.at_ms);
    if is_json {
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["node", "result", "stands for", "by", "when", "changed", "note"]);
    for record in &all {
        let note = match &record.revoked {
            Some(revoked) => format!("taken back by {} on {}", revoked.user, utc(revoked.at_ms)),
            None => record.note.clone(),
        };
        table.row([
            record.node.to_string(),
            record.from.short(),
            record.to.short(),
            record.by.user.clone(),
            utc(record.by.at_ms),
            summary(&record.differences),
            note,
        ]);
    }
    if all.is_empty() {
        println!("nothing was accepted so far");
    } else {
        print!("{table}");
    }
    Ok(Exit::Done)
}

/// Names the first difference and counts the others.
pub fn summary(differences: &[Difference]) -> String {
    match differences {
        [] => "nothing".to_owned(),
        [one] => one.to_string(),
        [first, more @ ..] => format!("{first} and {}", count(more.len(), "more change")),
    }
}
