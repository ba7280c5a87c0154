//! Identity of a node's result, and the difference between two of them.
//!
//! [`Identity::parts`] is the one walk over everything that counts: a fingerprint is its hash, an explanation compares
//! two of its lists, so "why did this run again?" cannot disagree with the decision. A node's name is no part of it:
//! variants of a sweep share results.

use std::collections::BTreeMap;
use std::fmt;

use deepgen_contract::id::Fingerprint;
use deepgen_contract::settings::Settings;
use deepgen_contract::stage::StageKind;
use litemap::LiteMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of the encoding; raised when equal identities would get other fingerprints.
pub const FINGERPRINT_VERSION: u32 = 1;

/// Everything that a node's result depends on.
#[derive(Debug, Clone)]
pub struct Identity<'a> {
    /// Kind of its stage.
    pub stage_kind: StageKind,
    /// Version of that kind's code.
    pub code_version: u32,
    /// Resolved settings.
    pub settings: &'a Settings,
    /// Seed of the job.
    pub seed: u64,
    /// Fingerprints of its inputs by port.
    pub inputs: &'a LiteMap<String, Fingerprint>,
    /// Hashes of external content by settings key.
    pub content: &'a LiteMap<String, String>,
}

/// What a part belongs to, in the order in which differences are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Section {
    /// Kind of the stage.
    StageKind,
    /// Version of its code.
    CodeVersion,
    /// A setting.
    Setting,
    /// The seed.
    Seed,
    /// An input.
    Input,
    /// Content of an external path.
    Content,
}

impl Section {
    /// Returns the name that people read.
    pub fn name(self) -> &'static str {
        match self {
            Self::StageKind => "stage kind",
            Self::CodeVersion => "code version",
            Self::Setting => "setting",
            Self::Seed => "seed",
            Self::Input => "input",
            Self::Content => "content",
        }
    }
}

/// One thing that counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// What it belongs to.
    pub section: Section,
    /// Dotted key, port or path; empty where there is only one.
    pub key: String,
    /// The value, spelt exactly: JSON for settings, hexadecimal for hashes.
    pub text: String,
}

impl Identity<'_> {
    /// Returns every part in a fixed order: the one walk.
    pub fn parts(&self) -> Vec<Part> {
        let of = Sources { seed: self.seed, inputs: self.inputs, content: self.content };
        parts(self.stage_kind.name(), self.code_version, setting_leaves(self.settings), &of)
    }

    /// Returns the hash of all parts.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&FINGERPRINT_VERSION.to_le_bytes());
        for part in self.parts() {
            // Lengths keep apart what would run together.
            for field in [part.section.name(), &part.key, &part.text] {
                hasher.update(&(field.len() as u64).to_le_bytes());
                hasher.update(field.as_bytes());
            }
        }
        Fingerprint(*hasher.finalize().as_bytes())
    }
}

/// What a result depends on beside code and settings.
#[derive(Debug, Clone, Copy)]
pub struct Sources<'a> {
    /// Seed of the job.
    pub seed: u64,
    /// Fingerprints of its inputs by port.
    pub inputs: &'a LiteMap<String, Fingerprint>,
    /// Hashes of external content by settings key.
    pub content: &'a LiteMap<String, String>,
}

/// Returns every part of an identity whose settings are given by their leaves.
pub fn parts(stage_kind: &str, code_version: u32, leaves: Vec<(String, String)>, of: &Sources<'_>) -> Vec<Part> {
    let mut parts = Vec::with_capacity(leaves.len() + of.inputs.len() + of.content.len() + 3);
    let mut add = |section, key: String, text: String| parts.push(Part { section, key, text });
    add(Section::StageKind, String::new(), stage_kind.to_owned());
    add(Section::CodeVersion, String::new(), code_version.to_string());
    for (key, text) in leaves {
        add(Section::Setting, key, text);
    }
    add(Section::Seed, String::new(), of.seed.to_string());
    for (port, fingerprint) in of.inputs {
        add(Section::Input, port.clone(), fingerprint.to_string());
    }
    for (key, hash) in of.content {
        add(Section::Content, key.clone(), hash.clone());
    }
    parts
}

/// Returns the leaves of settings by dotted key, spelt as JSON.
///
/// A list of scalars is a leaf. Numbers are written in the shortest form that reads back to the same bits.
pub fn setting_leaves(settings: &Settings) -> Vec<(String, String)> {
    // Settings hold finite numbers and string keys only, which always have a JSON form.
    value_leaves(&settings.to_value().unwrap_or(Value::Null))
}

/// Returns the leaves of a table of settings as it was saved, which may be another program's.
pub fn value_leaves(settings: &Value) -> Vec<(String, String)> {
    let mut leaves = Vec::new();
    collect("", settings, &mut leaves);
    leaves.sort();
    leaves
}

fn collect(key: &str, value: &Value, leaves: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (name, value) in map {
                collect(&crate::spec::path::join(key, name), value, leaves);
            }
        }
        Value::Array(items) if items.iter().any(|item| item.is_object() || item.is_array()) => {
            for (at, item) in items.iter().enumerate() {
                collect(&format!("{key}[{at}]"), item, leaves);
            }
        }
        leaf => leaves.push((key.to_owned(), leaf.to_string())),
    }
}

/// A part that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// What it belongs to.
    pub section: Section,
    /// Its key.
    pub key: String,
    /// Before; absent when it was not there.
    pub old: Option<String>,
    /// Now; absent when it is not there.
    pub new: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_hash = matches!(self.section, Section::Input | Section::Content);
        let side = |value: &Option<String>| match value {
            Some(hash) if is_hash => hash.chars().take(12).collect(),
            Some(value) => value.clone(),
            None => "(absent)".to_owned(),
        };
        match self.section {
            Section::Setting => f.write_str(&self.key)?,
            _ if self.key.is_empty() => f.write_str(self.section.name())?,
            section => write!(f, "{} {}", section.name(), self.key)?,
        }
        write!(f, ": {} -> {}", side(&self.old), side(&self.new))
    }
}

/// Returns what differs between two walks, in the order of sections and keys.
pub fn differences(old: &[Part], new: &[Part]) -> Vec<Difference> {
    let index = |parts: &[Part]| -> BTreeMap<(Section, String), String> {
        parts.iter().map(|part| ((part.section, part.key.clone()), part.text.clone())).collect()
    };
    let (old, mut new) = (index(old), index(new));
    let mut all = BTreeMap::new();
    for (key, before) in old {
        let now = new.remove(&key);
        if now.as_ref() != Some(&before) {
            all.insert(key, (Some(before), now));
        }
    }
    all.extend(new.into_iter().map(|(key, now)| (key, (None, Some(now)))));
    all.into_iter().map(|((section, key), (old, new))| Difference { section, key, old, new }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use deepgen_contract::base::AssembleSettings;
    use deepgen_contract::train::FloatKind;

    fn identity<'a>(
        settings: &'a Settings,
        inputs: &'a LiteMap<String, Fingerprint>,
        content: &'a LiteMap<String, String>,
    ) -> Identity<'a> {
        Identity { stage_kind: StageKind::Assemble, code_version: 1, settings, seed: 42, inputs, content }
    }

    #[test]
    fn each_part_changes_the_fingerprint_and_is_the_one_named() {
        let settings = Settings::Assemble(AssembleSettings { dtype: FloatKind::Bf16 });
        let other = Settings::Assemble(AssembleSettings { dtype: FloatKind::F32 });
        let inputs = LiteMap::from_iter([("vae".to_owned(), Fingerprint([1; 32]))]);
        let moved = LiteMap::from_iter([("vae".to_owned(), Fingerprint([2; 32]))]);
        let (none, content) = (LiteMap::new(), LiteMap::from_iter([("path".to_owned(), "ab".to_owned())]));
        let base = identity(&settings, &inputs, &none);
        let changes = [
            (identity(&other, &inputs, &none), Section::Setting, "dtype"),
            (identity(&settings, &moved, &none), Section::Input, "vae"),
            (identity(&settings, &inputs, &content), Section::Content, "path"),
            (Identity { seed: 43, ..base.clone() }, Section::Seed, ""),
            (Identity { code_version: 2, ..base.clone() }, Section::CodeVersion, ""),
        ];
        for (changed, section, key) in changes {
            assert_ne!(changed.fingerprint(), base.fingerprint(), "{section:?}");
            let found = differences(&base.parts(), &changed.parts());
            assert_eq!((found.len(), found[0].section, found[0].key.as_str()), (1, section, key));
        }
        assert_eq!(base.clone().fingerprint(), base.fingerprint());
        assert!(differences(&base.parts(), &base.parts()).is_empty());
    }

    #[test]
    fn the_encoding_is_fixed_because_sealed_artifacts_are_found_by_it() {
        let settings = Settings::Assemble(AssembleSettings { dtype: FloatKind::Bf16 });
        let (inputs, content) = (LiteMap::new(), LiteMap::new());
        let fingerprint = identity(&settings, &inputs, &content).fingerprint();
        insta::assert_snapshot!(fingerprint);
    }
}
