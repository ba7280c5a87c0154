//! `runs/<id>/nodes/`: links from names of nodes to their results, for people and scripts that look around there.
//!
//! Of a plan with more than [`MOST_LINKED`] nodes only those that no other node reads have one: nobody reads a folder of
//! ten thousand links, and each takes as long to make as a file. Knows names and paths, and makes no artifact.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use deepgen_contract::id::{Fingerprint, NodeName};

use super::layout::NODES_DIR;
use crate::plan::Plan;

/// Nodes up to which all of a plan are linked.
const MOST_LINKED: usize = 2000;

/// The links of a run.
#[derive(Debug, Clone)]
pub struct Links {
    folder: PathBuf,
    /// The nodes that have one; of a small plan all have.
    only: Option<BTreeSet<NodeName>>,
}

impl Links {
    /// Returns the links of a run of `plan`; none is made yet.
    pub fn of(plan: &Plan, run_dir: &Path) -> Self {
        Self { folder: run_dir.join(NODES_DIR), only: (plan.nodes.len() > MOST_LINKED).then(|| unread(plan)) }
    }

    /// Links a node to its result, if it has a link; one that is missing harms nothing.
    pub fn make(&self, node: &NodeName, fingerprint: &Fingerprint) {
        if self.only.as_ref().is_some_and(|only| !only.contains(node)) {
            return;
        }
        if let Err(error) = self.replace(&node.0.replace('/', "_"), fingerprint) {
            tracing::debug!(%node, %error, "no link to the artifact");
        }
    }

    fn replace(&self, name: &str, fingerprint: &Fingerprint) -> io::Result<()> {
        let path = self.folder.join(name);
        let make = || symlink(format!("../../../store/{fingerprint}"), &path);
        match make() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&self.folder)?;
                make()
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(&path)?;
                make()
            }
            made => made,
        }
    }
}

/// Returns the nodes whose results no other node reads.
fn unread(plan: &Plan) -> BTreeSet<NodeName> {
    let read: BTreeSet<&NodeName> = plan.nodes.iter().flat_map(|planned| planned.node.inputs.values()).collect();
    let names = plan.nodes.iter().map(|planned| &planned.node.name);
    names.filter(|name| !read.contains(name)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::plan_of_full;

    fn target(links: &Links, name: &str) -> Option<String> {
        Some(fs::read_link(links.folder.join(name)).ok()?.to_string_lossy().into_owned())
    }

    #[test]
    fn a_link_leads_to_the_newest_result() {
        let dir = tempfile::tempdir().unwrap();
        let links = Links::of(&plan_of_full(), dir.path());
        let name = NodeName("bench/a".into());
        links.make(&name, &Fingerprint([1; 32]));
        links.make(&name, &Fingerprint([2; 32]));
        assert_eq!(target(&links, "bench_a"), Some(format!("../../../store/{}", "02".repeat(32))));
    }

    #[test]
    fn of_a_large_plan_only_what_nobody_reads_is_linked() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan_of_full();
        let links = Links { only: Some(unread(&plan)), ..Links::of(&plan, dir.path()) };
        for planned in &plan.nodes {
            links.make(&planned.node.name, &planned.fingerprint);
            let name = &planned.node.name;
            let is_read = plan.nodes.iter().any(|other| other.node.inputs.values().any(|input| input == name));
            assert_eq!(target(&links, &name.0).is_some(), !is_read, "{name}");
        }
        assert!(fs::read_dir(&links.folder).unwrap().count() < plan.nodes.len());
    }
}
