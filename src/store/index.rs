//! `index.json` of a run: its nodes in the order of the plan, small enough to be read at a glance.
//!
//! The plan beside it holds every setting and takes long to read for ten thousand nodes.

use std::fs;
use std::io;
use std::path::Path;

use deepgen_contract::id::{Fingerprint, NodeName};
use serde::{Deserialize, Serialize};

use super::external::write_atomically;
use super::saved::{SavedPlan, SavedPlanned};
use crate::plan::Plan;

/// Version of [`RunIndex`].
const INDEX_VERSION: u32 = 1;
/// Name of the index in a run's folder.
pub const INDEX_FILE: &str = "index.json";

/// The nodes of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunIndex {
    version: u32,
    /// Name, stage and fingerprint of each node; each stands after its inputs.
    pub nodes: Vec<(NodeName, String, Fingerprint)>,
}

impl RunIndex {
    /// Returns the index of a plan.
    pub fn of(plan: &Plan) -> Self {
        let node = |planned: &crate::plan::PlannedNode| {
            (planned.node.name.clone(), planned.node.stage.clone(), planned.fingerprint)
        };
        Self { version: INDEX_VERSION, nodes: plan.nodes.iter().map(node).collect() }
    }

    /// Writes the index into a run's folder.
    ///
    /// # Errors
    /// When the file system says no.
    pub fn write(&self, run_dir: &Path) -> io::Result<()> {
        write_atomically(&run_dir.join(INDEX_FILE), &serde_json::to_vec(self)?)
    }

    /// Reads the index of a run; one of an older program is made from its plan.
    ///
    /// # Errors
    /// When there is neither.
    pub fn read(run_dir: &Path) -> io::Result<Self> {
        let index = fs::read(run_dir.join(INDEX_FILE)).ok();
        let index = index.and_then(|text| serde_json::from_slice::<Self>(&text).ok());
        match index.filter(|index| index.version == INDEX_VERSION) {
            Some(index) => Ok(index),
            None => {
                let node = |saved: SavedPlanned| (saved.node.name, saved.node.stage, saved.fingerprint);
                let nodes = SavedPlan::read(run_dir)?.plan.nodes.into_iter().map(node).collect();
                Ok(Self { version: INDEX_VERSION, nodes })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_of_version_1_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let fingerprint = "ab".repeat(32);
        let text = format!(r#"{{"version":1,"nodes":[["images[geneval]","generate","{fingerprint}"]]}}"#);
        fs::write(dir.path().join(INDEX_FILE), &text).unwrap();
        let index = RunIndex::read(dir.path()).unwrap();
        let node = (NodeName("images[geneval]".into()), "generate".into(), Fingerprint([0xab; 32]));
        assert_eq!(index.nodes, [node]);
        index.write(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join(INDEX_FILE)).unwrap(), text);
    }
}
