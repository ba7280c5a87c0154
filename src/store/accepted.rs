//! Accepted results: records that say that a changed identity gives the same result as a sealed one.
//!
//! `artifacts/accepted/<identity>.json` holds who said so, when, and what had changed. Planning follows such a record to
//! the sealed artifact, which is used where it lies; nothing is copied, so sealing and tidying up need not know of it.
//! A record is never removed: taking it back is written into it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use deepgen_contract::id::{Fingerprint, NodeName};
use serde::{Deserialize, Serialize};

use super::external::write_atomically;
use super::layout::Layout;
use crate::plan::Difference;

/// Version of [`Acceptance`].
const ACCEPTED_VERSION: u32 = 1;

/// The word of a person that two identities have the same result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Acceptance {
    /// Version of the writer's format.
    pub version: u32,
    /// Node it was said of.
    pub node: NodeName,
    /// Identity of the sealed result that is used.
    pub from: Fingerprint,
    /// Identity that it stands for.
    pub to: Fingerprint,
    /// What had changed.
    pub differences: Vec<Difference>,
    /// Why, in the person's words.
    pub note: String,
    /// Who said it, and when.
    pub by: Signature,
    /// Who took it back, and when.
    pub revoked: Option<Signature>,
}

/// A person at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// User.
    pub user: String,
    /// Host.
    pub host: String,
    /// Milliseconds since 1970.
    pub at_ms: u64,
}

impl Acceptance {
    /// Returns a new record.
    pub fn new(
        node: NodeName,
        (from, to): (Fingerprint, Fingerprint),
        differences: Vec<Difference>,
        note: String,
        by: Signature,
    ) -> Self {
        Self { version: ACCEPTED_VERSION, node, from, to, differences, note, by, revoked: None }
    }

    /// Writes the record; one of the same identity is replaced.
    ///
    /// # Errors
    /// When the file system says no.
    pub fn write(&self, layout: &Layout) -> io::Result<()> {
        write_atomically(&path(layout, &self.to), &serde_json::to_vec_pretty(self)?)
    }
}

/// Returns all records by the identity that they stand for; one that cannot be read is reported and left out.
pub fn read_all(layout: &Layout) -> BTreeMap<Fingerprint, Acceptance> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(layout.accepted()).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|end| end != "json") {
            continue;
        }
        let read = || -> io::Result<Acceptance> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
        match read() {
            Ok(record) if record.version == ACCEPTED_VERSION => drop(all.insert(record.to, record)),
            Ok(record) => {
                tracing::warn!(path = %path.display(), version = record.version, "an acceptance of another program is not followed");
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "an acceptance cannot be read and is not followed");
            }
        }
    }
    all
}

fn path(layout: &Layout, to: &Fingerprint) -> PathBuf {
    layout.accepted().join(format!("{to}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_back_and_a_damaged_one_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        assert!(read_all(&layout).is_empty());
        let by = Signature { user: "ada".into(), host: "here".into(), at_ms: 1 };
        let ids = (Fingerprint([1; 32]), Fingerprint([2; 32]));
        let record = Acceptance::new(NodeName("sft".into()), ids, Vec::new(), "a comment".into(), by.clone());
        record.write(&layout).unwrap();
        fs::write(layout.accepted().join("damaged.json"), "{").unwrap();
        assert_eq!(read_all(&layout), BTreeMap::from([(ids.1, record.clone())]));
        let revoked = Acceptance { revoked: Some(by), ..record };
        revoked.write(&layout).unwrap();
        assert_eq!(read_all(&layout)[&ids.1], revoked);
    }
}
