//! From merged settings to a [`ResolvedNode`]: paths settled, shapes checked, types given, slots compared with what the
//! executor has.
//!
//! Sees one node at a time.

use std::collections::BTreeMap;
use std::path::Path;

use deepgen_contract::settings::Settings;
use deepgen_contract::stage::StageKind;
use litemap::LiteMap;

use super::command;
use super::diagnostic::Diagnostic;
use super::expand::Instance;
use super::fields::SlotTable;
use super::pipeline::NodeTable;
use super::resolve::{amounts, identities};
use super::resolved::{Executor, Origin, ResolvedNode, snug};
use super::run_table::RunTable;
use super::shape::{self, Check};
use super::tree::Tree;

/// What all nodes share.
pub struct Typing<'a> {
    /// Where jobs run.
    pub executor: &'a Executor,
    /// Seed of nodes that set none.
    pub seed: u64,
    /// The project's root.
    pub root: &'a Path,
    /// Receives the problems.
    pub problems: &'a mut Vec<Diagnostic>,
}

type Shares = (LiteMap<String, f64>, BTreeMap<String, Vec<u32>>);

impl Typing<'_> {
    /// Returns a node without its edges; nothing when its settings are wrong.
    pub fn node(
        &mut self,
        (table, instance): (&NodeTable, &Instance),
        (stage, kind, is_whole): (&str, StageKind, bool),
        (mut settings, lost_members): (Tree, &[String]),
        run: &RunTable,
    ) -> Option<ResolvedNode> {
        drop_members(&mut settings, lost_members, kind);
        shape::of(kind).settle_paths(&mut settings, self.root);
        let typed = self.typed(&settings, table, kind, is_whole)?;
        self.check_members(&settings, instance, kind);
        if let Settings::Command(command) = &typed {
            command::check(command, &settings, table, &instance.inputs, self.problems);
        }
        let uses_device = typed.uses_device();
        let (slots, slot_ids) = self.slots(table, uses_device, run);
        let limit = |seconds: Option<f64>| seconds.filter(|seconds| *seconds > 0.0);
        let mut origins: Vec<(String, Origin)> = Vec::new();
        settings.leaves("", &mut |key, tree| {
            origins.push((key, tree.spot.origin()));
        });
        Some(ResolvedNode {
            name: instance.name.clone(),
            stage: stage.to_owned(),
            kind,
            settings: typed,
            origins: snug(origins),
            inputs: LiteMap::new(),
            seed: run.seed.unwrap_or(self.seed),
            device: if uses_device { self.executor.device.clone() } else { "cpu".to_owned() },
            threads: if uses_device { self.executor.threads } else { 1 },
            peak_tflops: self.executor.peak_tflops.filter(|_| uses_device),
            slots,
            slot_ids,
            needs: Vec::new(),
            retries: run.retries.unwrap_or(0),
            backoff: run.backoff(),
            remedies: run.remedies(),
            timeout_s: limit(run.timeout_s),
            stall_s: limit(run.stall_s),
            priority: run.priority.unwrap_or(0),
        })
    }

    /// Checks the merged settings and gives them their type.
    fn typed(&mut self, settings: &Tree, table: &NodeTable, kind: StageKind, is_whole: bool) -> Option<Settings> {
        let mut found = Vec::new();
        let owner = table.stage.as_ref().map(|(_, spot)| spot);
        Check { problems: &mut found, is_complete: is_whole, owner }.value("", settings, shape::of(kind));
        let is_sound = found.is_empty();
        self.problems.append(&mut found);
        if !is_sound {
            return None;
        }
        match Settings::from_value(kind, settings.json()) {
            Ok(typed) => Some(typed),
            Err(_) if !is_whole => None,
            Err(error) => {
                let message = format!("the settings of `{}` do not fit a `{kind}` stage: {error}", table.name);
                let problem = Diagnostic::new(message).at(&table.spot, "this node");
                let help = format!("`deepgen schema stage {kind}` says what they may be");
                self.problems.push(problem.help(help));
                None
            }
        }
    }

    /// A mixture's `members` must be among its inputs.
    fn check_members(&mut self, settings: &Tree, instance: &Instance, kind: StageKind) {
        if kind != StageKind::Mix {
            return;
        }
        for (name, entry) in settings.get("members").and_then(Tree::table).into_iter().flatten() {
            if !instance.inputs.contains_key(name) {
                self.problems.push(
                    Diagnostic::new(format!("`members.{name}` is no input of `{}`", instance.name))
                        .at(&entry.key, "no such input")
                        .nearest(name, instance.inputs.keys().map(String::as_str)),
                );
            }
        }
    }

    /// Returns a node's shares and the identities it asks for; reports what the executor never has.
    fn slots(&mut self, table: &NodeTable, uses_device: bool, run: &RunTable) -> Shares {
        let Executor { slots: capacity, slot_ids, .. } = self.executor;
        let Some(slots) = &run.slots else {
            let name = if uses_device && capacity.contains_key("gpu") { "gpu" } else { "cpu" };
            let share = capacity.get(name).map(|most| (name.to_owned(), most.min(1.0)));
            return (snug(share), BTreeMap::new());
        };
        for SlotTable { name, spot, amount, ids } in slots {
            let there = |id: &u32| match slot_ids.get(name) {
                Some(ids) => ids.contains(id),
                None => capacity.get(name).is_some_and(|most| f64::from(*id) < *most),
            };
            let absent = ids.iter().flatten().find(|id| !there(id));
            let problem = match (capacity.get(name), absent) {
                (None, _) => Diagnostic::new(format!("there are no `{name}` slots"))
                    .at(spot, "unknown slot")
                    .nearest(name, capacity.keys().map(String::as_str)),
                (Some(_), Some(id)) => Diagnostic::new(format!("`{}` asks for `{name}` {id}", table.name))
                    .at(spot, "not among the executor's")
                    .help(format!("the executor has {}", listed(name, capacity, slot_ids))),
                (Some(most), None) if amount > most => {
                    let message = format!("`{}` takes {amount} `{name}` slots, but there are {most}", table.name);
                    Diagnostic::new(message)
                        .at(spot, "never to be had")
                        .help(format!("ask for less, or raise `executor.local.slots.{name}`"))
                }
                (Some(_), None) => continue,
            };
            self.problems.push(problem);
        }
        (snug(amounts(slots)), identities(slots))
    }
}

/// Takes out the settings of members that are left out.
fn drop_members(settings: &mut Tree, lost: &[String], kind: StageKind) {
    if kind == StageKind::Mix
        && let Some(members) = settings.table_mut().and_then(|table| table.get_mut("members"))
        && let Some(members) = members.tree.table_mut()
    {
        lost.iter().for_each(|name| drop(members.remove(name)));
    }
}

/// Returns the identities of a slot in words.
fn listed(name: &str, capacity: &BTreeMap<String, f64>, ids: &BTreeMap<String, Vec<u32>>) -> String {
    match ids.get(name) {
        Some(ids) => format!("`{name}` {ids:?}"),
        None => format!("{} of `{name}`, counted from 0", capacity.get(name).copied().unwrap_or(0.0)),
    }
}
