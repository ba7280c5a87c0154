//! Tests of planning on the fixture pipeline: verdicts, reasons, and what a person reads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use deepgen_contract::id::{Fingerprint, NodeName};
use rustix::time::{ClockId, clock_gettime};

use super::{Costs, ExternalFiles, Known, NodeRecord, Plan, Reason, Verdict, render, training_sizes};
use crate::commands::explain::{Story, node_text};
use crate::spec::tests::{fixtures, full};
use crate::spec::{Overrides, Resolved, load, load_sweep};

/// A store that is a table.
#[derive(Default)]
struct Store {
    sealed: BTreeSet<Fingerprint>,
    latest: BTreeMap<NodeName, NodeRecord>,
}

impl Known for Store {
    fn is_sealed(&self, fingerprint: &Fingerprint) -> bool {
        self.sealed.contains(fingerprint)
    }

    fn latest(&self, node: &NodeName) -> Option<NodeRecord> {
        self.latest.get(node).cloned()
    }
}

impl Store {
    /// A store in which everything of a plan was run.
    fn after(plan: &Plan) -> Self {
        let mut store = Self::default();
        for planned in &plan.nodes {
            store.sealed.insert(planned.fingerprint);
            let record = NodeRecord {
                fingerprint: planned.fingerprint,
                stage_kind: planned.node.kind,
                code_version: planned.node.kind.code_version(),
                seed: planned.node.seed,
                settings: planned.node.settings.to_value().unwrap(),
                inputs: planned.inputs.clone(),
                content: planned.content.clone(),
            };
            store.latest.insert(planned.node.name.clone(), record);
        }
        store
    }
}

/// A disk that is a rule: a path holds its own name, unless it lies below `/data`, which is missing.
struct Disk(&'static str);

impl ExternalFiles for Disk {
    fn content_hash(&self, path: &str) -> Option<String> {
        (!path.starts_with("/data") && !path.starts_with("data/Uni")).then(|| format!("{}:{path}", self.0))
    }
}

const DISK: Disk = Disk("v1");

fn plan_of(resolved: &Resolved, known: &dyn Known) -> Plan {
    Plan::build(resolved, known, &DISK)
}

/// The plan of the fixture pipeline, of which nothing ran.
pub fn plan_of_full() -> Plan {
    plan_of(&full(None, &[]), &Store::default())
}

/// Calls the first node otherwise.
pub fn with_name(mut plan: Plan, name: &str) -> Plan {
    Arc::make_mut(&mut plan.nodes[0].node).name = NodeName(name.into());
    plan
}

fn running(plan: &Plan) -> Vec<(&str, String)> {
    let reason = |verdict: &Verdict| match verdict {
        Verdict::Run(reason) => Some(reason.to_string()),
        _ => None,
    };
    plan.nodes.iter().filter_map(|p| Some((p.node.name.0.as_str(), reason(&p.verdict)?))).collect()
}

#[test]
fn a_second_plan_is_cached_and_a_changed_setting_marks_its_node_and_what_follows() {
    let resolved = full(None, &[]);
    let first = plan_of(&resolved, &Store::default());
    assert!(first.nodes.iter().all(|planned| planned.verdict == Verdict::Run(Reason::NeverRan)));
    let store = Store::after(&first);
    assert!(plan_of(&resolved, &store).is_cached());

    let changed = plan_of(&full(None, &["sft.optimizer.lr=1e-4"]), &store);
    let marked = running(&changed);
    let expected = [
        ("sft", "optimizer.lr: 0.0004 -> 0.0001"),
        ("handoff-2", "input checkpoint (sft) will change"),
        ("images[geneval,handoff-2]", "input weights (handoff-2) will change"),
        ("images[cvtg,handoff-2]", "input weights (handoff-2) will change"),
        ("scores[geneval,handoff-2]", "input images (images[geneval,handoff-2]) will change"),
        ("scores[cvtg,handoff-2]", "input images (images[cvtg,handoff-2]) will change"),
    ];
    assert_eq!(marked.iter().map(|(name, reason)| (*name, reason.as_str())).collect::<Vec<_>>(), expected);
}

#[test]
fn the_way_a_node_runs_is_no_part_of_its_result() {
    let resolved = full(None, &[]);
    let store = Store::after(&plan_of(&resolved, &Store::default()));
    let mut other = resolved.clone();
    for node in other.nodes.iter_mut().map(Arc::make_mut) {
        node.device = "cuda:1".into();
        node.threads += 1;
        node.retries += 1;
        node.slots.clear();
    }
    assert!(plan_of(&other, &store).is_cached());
}

#[test]
fn each_kind_of_change_is_named() {
    let resolved = full(None, &[]);
    let first = plan_of(&resolved, &Store::default());
    let reason = |resolved: &Resolved, store: &Store, disk: &Disk, name: &str| {
        let plan = Plan::build(resolved, store, disk);
        match &plan.node(&NodeName(name.into())).unwrap().verdict {
            Verdict::Run(reason) => reason.to_string(),
            other => panic!("{name} is {other}"),
        }
    };
    let store = Store::after(&first);
    let seeded = full(None, &["pipeline.seed=7"]);
    assert_eq!(reason(&seeded, &store, &DISK, "sft"), "seed: 42 -> 7");
    assert_eq!(reason(&resolved, &store, &Disk("v2"), "captions"), "content changed: data/captions.txt");
    assert_eq!(reason(&resolved, &store, &Disk("v2"), "mix"), "input captions (captions) will change");

    let mut newer_code = Store::after(&first);
    newer_code.sealed.clear();
    newer_code.latest.get_mut(&NodeName("mix".into())).unwrap().code_version = 0;
    newer_code.latest.get_mut(&NodeName("mix".into())).unwrap().fingerprint = Fingerprint([0; 32]);
    assert_eq!(reason(&resolved, &newer_code, &DISK, "mix"), "code version: 0 -> 1");
    assert_eq!(reason(&resolved, &newer_code, &DISK, "sft"), "its result is gone from the store");

    let several = full(None, &["sft.optimizer.lr=1e-4", "sft.train.max_iters=5", "sft.optimizer.eps=1e-9"]);
    assert_eq!(reason(&several, &store, &DISK, "sft"), "optimizer.eps: 1e-8 -> 1e-9 and 2 more settings");
}

#[test]
fn an_input_that_was_exchanged_for_another_sealed_one_is_named() {
    let resolved = full(None, &[]);
    let first = plan_of(&resolved, &Store::default());
    let mut store = Store::after(&first);
    let other = full(None, &["pretrain.optimizer.lr=1e-4"]);
    let pretrain = plan_of(&other, &Store::default()).node(&NodeName("pretrain".into())).unwrap().fingerprint;
    store.sealed.insert(pretrain);
    let plan = plan_of(&other, &store);
    assert_eq!(plan.node(&NodeName("pretrain".into())).unwrap().verdict, Verdict::Cached);
    let handoff = &plan.node(&NodeName("handoff-1".into())).unwrap().verdict;
    let Verdict::Run(reason) = handoff else { panic!("{handoff}") };
    assert_eq!(reason.to_string(), "input checkpoint (pretrain) is another result");
}

#[test]
fn a_plan_reads_well() {
    let resolved = full(None, &[]);
    let first = plan_of(&resolved, &Store::default());
    let changed = full(None, &["sft.optimizer.lr=1e-4"]);
    let text = rendered(&changed, &plan_of(&changed, &Store::after(&first)));
    insta::assert_snapshot!(redacted(&text, &first));
}

#[test]
fn the_paper_profile_prints_sizes_and_what_is_missing() {
    let paper = full(Some("paper"), &[]);
    let plan = plan_of(&paper, &Store::default());
    let sizes = training_sizes(&paper);
    let sft = sizes[1].as_ref().unwrap();
    // docs/spec/model.md section 7.
    assert_eq!((sft.parts.language, sft.parts.vision, sft.parts.vae), (3_085_938_688, 668_684_288, 83_819_683));
    assert_eq!((sft.trainable["bridge"], sft.trainable["dit"]), (432_449_532, 2_243_171_520));
    assert_eq!(sizes[0].as_ref().unwrap().trainable, BTreeMap::from([("bridge", 432_449_532)]));
    insta::assert_snapshot!(format!("{}{}", rendered(&paper, &plan), render::sizes(&sizes)));
}

#[test]
fn a_node_is_explained_with_the_origin_of_each_value() {
    let resolved = full(None, &["handoff-2.dtype=bf16", "images[geneval].batch=8"]);
    let plan = plan_of(&resolved, &Store::default());
    let text = |name: &str| node_text(&plan, plan.node(&NodeName(name.into())).unwrap(), &Story::default());
    let both = format!("{}\n{}", text("handoff-2"), text("images[geneval,handoff-2]"));
    insta::assert_snapshot!(redacted(&both, &plan));
}

#[test]
fn the_plan_of_a_sweep_shows_shared_nodes_once() {
    let sweep = load_sweep(&fixtures().join("experiments/architecture.toml"), &Overrides::default()).unwrap();
    let plan = plan_of(&sweep, &Store::default());
    let distinct: BTreeSet<Fingerprint> = plan.nodes.iter().map(|planned| planned.fingerprint).collect();
    assert_eq!(distinct.len(), plan.nodes.len(), "nothing is computed twice");
    insta::assert_snapshot!(rendered(&sweep, &plan));
    let store = Store::after(&plan_of(&full(None, &[]), &Store::default()));
    let cached: Vec<&str> = plan_of(&sweep, &store)
        .nodes
        .iter()
        .filter(|planned| planned.verdict == Verdict::Cached)
        .map(|planned| planned.node.name.base())
        .map(|base| base.split('@').next().unwrap())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .map(|name| resolved_name(name))
        .collect();
    assert!(cached.contains(&"sft"), "the first variant is the plain pipeline, which was run: {cached:?}");
}

fn rendered(resolved: &Resolved, plan: &Plan) -> String {
    render::plan(resolved, plan, &Costs::of(plan, &[]), &BTreeMap::new())
}

fn resolved_name(name: &str) -> &'static str {
    ["base", "captions", "mix", "pretrain", "handoff-1", "sft", "handoff-2", "images", "scores"]
        .into_iter()
        .find(|known| *known == name)
        .unwrap_or("other")
}

#[test]
fn a_thousand_nodes_are_loaded_and_planned_in_well_under_a_second() {
    let benchmarks: Vec<String> = (0..500).map(|at| format!("\"b{at}\"")).collect();
    let text = std::fs::read_to_string(fixtures().join("pipelines/full.toml")).unwrap();
    let text = text.replace(r#"["geneval", "cvtg"]"#, &format!("[{}, \"cvtg\"]", benchmarks.join(", ")));
    let folder = fixtures().join("pipelines");
    let file = tempfile::Builder::new().suffix(".toml").tempfile_in(folder).unwrap();
    std::fs::write(file.path(), text).unwrap();
    // Of this thread alone: other tests and a busy machine do not count.
    let processor_seconds = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
    };
    let begun = processor_seconds();
    let resolved = load(file.path(), &Overrides::default()).unwrap();
    let plan = plan_of(&resolved, &Store::default());
    let seconds = processor_seconds() - begun;
    assert_eq!(plan.nodes.len(), 7 + 501 * 4);
    // Generous, for a slow machine and an unoptimised build: 2011 nodes take about a third of this.
    assert!(seconds < 3.0, "{seconds} s");
}

/// Replaces fingerprints, which depend on every setting, by the node's name.
fn redacted(text: &str, plan: &Plan) -> String {
    plan.nodes.iter().fold(text.to_owned(), |text, planned| {
        let full = planned.fingerprint.to_string();
        text.replace(&full, "FINGERPRINT").replace(&full[..12], "FINGERPRINT-")
    })
}
