//! A stage file, `stages/<stage>.toml`: the kind of a stage, its default settings, and what profiles change in them.
//!
//! Knows one file, not who uses it.

use std::collections::BTreeMap;
use std::sync::Arc;

use deepgen_contract::stage::StageKind;

use super::diagnostic::Diagnostic;
use super::shape::{self, Check};
use super::tree::{Tree, Value};

/// The profile that changes nothing in stage files: their defaults are the paper's values.
pub const PAPER_PROFILE: &str = "paper";

/// Keys of a stage file beside its settings.
pub const STAGE_KEYS: [&str; 3] = ["kind", "description", "profile"];

/// Returns the profile that `profile` builds on unless a pipeline says otherwise: the sizes of the shapes world are the
/// same in `tiny` and `small`.
pub fn extended(profile: &str) -> Option<&'static str> {
    matches!(profile, "tiny" | "small").then_some("shapes")
}

/// A stage file after parsing.
#[derive(Debug, Clone)]
pub struct StageFile {
    /// Kind of the stage.
    pub kind: StageKind,
    /// Default settings.
    pub defaults: Tree,
    /// What each profile lays on top.
    pub profiles: BTreeMap<String, Tree>,
}

impl StageFile {
    /// Reads a whole stage file; nothing when its kind is not known.
    pub fn parse(mut tree: Tree, problems: &mut Vec<Diagnostic>) -> Option<Self> {
        let root = tree.spot.clone();
        let table = tree.table_mut()?;
        let [kind, description, profile] = STAGE_KEYS.map(|key| table.remove(key));
        let kind = match &kind {
            Some(entry) => parse_kind(&entry.tree, problems)?,
            None => {
                let start = root.source.spot(root.start(), 1.min(root.source.text.len()));
                let problem = Diagnostic::new("missing key `kind`").at(&start, "not in this file");
                problems.push(problem.help(r#"a stage file starts with its kind, such as kind = "train""#));
                return None;
            }
        };
        // For people and for the table in stages/README.md; no program reads it.
        if let Some(entry) = description.filter(|entry| entry.tree.text().is_none()) {
            problems.push(Diagnostic::new("`description` must be a text").at(&entry.tree.spot, "expected a text"));
        }
        let mut profiles = BTreeMap::new();
        if let Some(entry) = profile {
            match entry.tree.value {
                Value::Table(table) => {
                    for (name, entry) in Arc::unwrap_or_clone(table) {
                        let marked = entry.tree.in_profile(&Arc::new(name.clone()));
                        profiles.insert(name, marked);
                    }
                }
                _ => {
                    problems.push(Diagnostic::new("`profile` must be a table").at(&entry.tree.spot, "expected a table"))
                }
            }
        }
        Some(Self { kind, defaults: tree, profiles })
    }

    /// Returns the settings under `profiles`, lowest first, before any pipeline.
    pub fn settings(&self, profiles: &[String]) -> Tree {
        let mut settings = self.defaults.clone();
        for over in profiles.iter().filter_map(|profile| self.profiles.get(profile)) {
            settings.merge(over.clone());
        }
        settings
    }

    /// Checks the defaults and every profile by themselves; keys may be missing, since a pipeline may add them.
    pub fn check(&self, problems: &mut Vec<Diagnostic>) {
        let profiles = self.profiles.keys().map(String::as_str);
        for profile in profiles.chain([PAPER_PROFILE]) {
            let profiles: Vec<String> = extended(profile).into_iter().chain([profile]).map(str::to_owned).collect();
            let mut check = Check { problems, is_complete: false, owner: None };
            check.value("", &self.settings(&profiles), shape::of(self.kind));
        }
    }
}

fn parse_kind(tree: &Tree, problems: &mut Vec<Diagnostic>) -> Option<StageKind> {
    let name = tree.text().unwrap_or_default();
    let kind = StageKind::parse(name);
    if kind.is_none() {
        problems.push(
            Diagnostic::new(format!("unknown kind of stage `{name}`"))
                .at(&tree.spot, "no such kind")
                .nearest(name, StageKind::ALL.iter().map(|kind| kind.name())),
        );
    }
    kind
}
