//! `plan.json`: what a run set out to do, saved so that every later program can read it.
//!
//! Settings are kept as raw JSON, not as the types of the day: a run of last year must still be shown, compared and made
//! again after a settings type has changed. What cannot be understood any more is left out, never an error. Knows the
//! file; [`crate::plan`] makes what is in it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::settings::Settings;
use deepgen_contract::stage::StageKind;
use litemap::LiteMap;
use serde::de::DeserializeOwned;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::external::write_atomically_with;
use super::layout::PLAN_FILE;
use crate::plan::{Part, Plan, PlannedNode, Sources, Verdict, parts, value_leaves};
use crate::spec::{Origin, Overrides, Resolved, Sweep};

/// Version of [`SavedPlan`]: 2 added where it was planned, content hashes and code versions.
pub const PLAN_VERSION: u32 = 2;

/// What a run set out to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedPlan<Graph = SavedGraph> {
    /// [`PLAN_VERSION`] of the writer.
    pub version: u32,
    /// Name of the pipeline or experiment.
    pub pipeline: String,
    /// Chosen profile.
    pub profile: String,
    /// Seed of the pipeline.
    pub seed: u64,
    /// The pipeline or experiment file; unknown before version 2.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// Project folder; unknown before version 2.
    #[serde(default)]
    pub root: Option<PathBuf>,
    /// Folder in which the command was given; unknown before version 2.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// What the command line changed; unknown before version 2.
    #[serde(default)]
    pub overrides: Option<Overrides>,
    /// Variables of the environment that the pipeline declares, as they were.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Text of each file that it was planned from, by its path in the project; unknown before version 2.
    #[serde(default)]
    pub sources: BTreeMap<String, String>,
    /// Its variants, when the run is a sweep.
    #[serde(default, deserialize_with = "or_default")]
    pub sweep: Option<Sweep>,
    /// Nodes with their fingerprints and the verdicts at the start of the run.
    pub plan: Graph,
}

/// The nodes of a saved plan; each stands after its inputs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedGraph {
    /// Nodes.
    pub nodes: Vec<SavedPlanned>,
}

/// A node with its identity and what was to be done about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedPlanned {
    /// The node.
    pub node: SavedNode,
    /// Identity of its result.
    pub fingerprint: Fingerprint,
    /// The node's own identity, where a person accepted another's result in its place.
    #[serde(default)]
    pub stands_for: Option<Fingerprint>,
    /// Fingerprints of the inputs by port.
    #[serde(default)]
    pub inputs: LiteMap<String, Fingerprint>,
    /// Hashes of external content by settings key; unknown before version 2.
    #[serde(default)]
    pub content: LiteMap<String, String>,
    /// True when it was cut to a few steps by `--smoke`.
    #[serde(default)]
    pub is_smoke: bool,
    /// What was to be done; nothing when an older program said it in other words.
    #[serde(default, deserialize_with = "or_default")]
    pub verdict: Option<Verdict>,
}

/// A resolved node as it was saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedNode {
    /// Name with its axis values.
    pub name: NodeName,
    /// Name of the stage file.
    #[serde(default)]
    pub stage: String,
    /// Name of that stage's kind, which this program need not know.
    #[serde(default)]
    pub kind: String,
    /// Code version of that kind at the time; 1 before version 2, when all were.
    #[serde(default = "one")]
    pub code_version: u32,
    /// Settings as [`Settings`] wrote them: `{"stage_kind": .., "settings": {..}}`.
    #[serde(default)]
    pub settings: Value,
    /// Where each leaf of the settings came from.
    #[serde(default, deserialize_with = "understood")]
    pub origins: LiteMap<String, Origin>,
    /// Node wired to each port.
    #[serde(default)]
    pub inputs: LiteMap<String, NodeName>,
    /// Seed of the job.
    #[serde(default)]
    pub seed: u64,
    /// Device of the job.
    #[serde(default)]
    pub device: String,
    /// Threads of the job.
    #[serde(default)]
    pub threads: usize,
    /// Share of the executor's slots.
    #[serde(default, deserialize_with = "or_default")]
    pub slots: LiteMap<String, f64>,
}

fn one() -> u32 {
    1
}

/// Reads a value, or takes the default when it is of another program.
fn or_default<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).unwrap_or_default())
}

/// Reads the entries of a map that this program understands.
fn understood<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<LiteMap<String, T>, D::Error> {
    let all = BTreeMap::<String, Value>::deserialize(deserializer)?;
    Ok(all.into_iter().filter_map(|(key, value)| Some((key, serde_json::from_value(value).ok()?))).collect())
}

/// The nodes of a plan, saved one after the other: of ten thousand there is never a second copy.
struct Streamed<'a>(&'a Plan);

impl Serialize for Streamed<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        struct Nodes<'a>(&'a Plan);
        impl Serialize for Nodes<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_seq(self.0.nodes.iter().map(SavedPlanned::of))
            }
        }
        let mut graph = serializer.serialize_struct("SavedGraph", 1)?;
        graph.serialize_field("nodes", &Nodes(self.0))?;
        graph.end()
    }
}

/// Writes what a run sets out to do into its folder; `directory` is where the command was given.
///
/// # Errors
/// When the file system says no.
pub fn write_plan(resolved: &Resolved, plan: &Plan, directory: Option<PathBuf>, run_dir: &Path) -> io::Result<()> {
    let saved = SavedPlan::holding(resolved, directory, Streamed(plan));
    write_atomically_with(&run_dir.join(PLAN_FILE), |file| Ok(serde_json::to_writer(file, &saved)?))
}

impl<Graph> SavedPlan<Graph> {
    fn holding(resolved: &Resolved, directory: Option<PathBuf>, plan: Graph) -> Self {
        Self {
            version: PLAN_VERSION,
            pipeline: resolved.name.clone(),
            profile: resolved.profile.clone(),
            seed: resolved.seed,
            file: Some(resolved.experiment_file.as_ref().unwrap_or(&resolved.pipeline_file).clone()),
            root: Some(resolved.root.clone()),
            directory,
            overrides: Some(resolved.overrides.clone()),
            env: resolved.env.clone(),
            sources: resolved.sources.clone(),
            sweep: resolved.sweep.clone(),
            plan,
        }
    }
}

impl SavedPlan {
    /// Returns what is saved of a plan; `directory` is where the command was given.
    pub fn of(resolved: &Resolved, plan: &Plan, directory: Option<PathBuf>) -> Self {
        let nodes = plan.nodes.iter().map(SavedPlanned::of).collect();
        Self::holding(resolved, directory, SavedGraph { nodes })
    }

    /// Reads the plan of a run.
    ///
    /// # Errors
    /// When it is missing or no plan of any version.
    pub fn read(run_dir: &Path) -> io::Result<Self> {
        let path = run_dir.join(PLAN_FILE);
        let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot read {}: {error}", path.display()));
        let text = fs::read(&path).map_err(named)?;
        serde_json::from_slice(&text).map_err(|error| named(error.into()))
    }

    /// Returns the planned node of a name.
    pub fn node(&self, name: &NodeName) -> Option<&SavedPlanned> {
        self.plan.nodes.iter().find(|planned| &planned.node.name == name)
    }
}

impl SavedPlanned {
    /// Returns what is saved of a planned node.
    pub fn of(planned: &PlannedNode) -> Self {
        let node = &planned.node;
        Self {
            node: SavedNode {
                name: node.name.clone(),
                stage: node.stage.clone(),
                kind: node.kind.name().to_owned(),
                code_version: node.kind.code_version(),
                // Settings hold finite numbers and string keys only, which always have a JSON form.
                settings: serde_json::to_value(&node.settings).unwrap_or_default(),
                origins: node.origins.clone(),
                inputs: node.inputs.clone(),
                seed: node.seed,
                device: node.device.clone(),
                threads: node.threads,
                slots: node.slots.clone(),
            },
            fingerprint: planned.fingerprint,
            stands_for: planned.stands_for,
            inputs: planned.inputs.clone(),
            content: planned.content.clone(),
            is_smoke: planned.is_smoke,
            verdict: Some(planned.verdict.clone()),
        }
    }

    /// Returns every part of its identity.
    pub fn parts(&self) -> Vec<Part> {
        let of = Sources { seed: self.node.seed, inputs: &self.inputs, content: &self.content };
        parts(&self.node.kind, self.node.code_version, self.node.leaves(), &of)
    }
}

impl SavedNode {
    /// Returns the kind of its stage, if this program knows it.
    pub fn stage_kind(&self) -> Option<StageKind> {
        StageKind::parse(&self.kind)
    }

    /// Returns its settings, if they are of this program's types.
    pub fn typed(&self) -> Option<Settings> {
        serde_json::from_value(self.settings.clone()).ok()
    }

    /// Returns the leaves of its settings by dotted key, spelt as JSON.
    pub fn leaves(&self) -> Vec<(String, String)> {
        self.settings.get("settings").map_or_else(Vec::new, value_leaves)
    }

    /// Returns where a leaf was written; an item of a list was written where the list was.
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        let mut key = key;
        loop {
            match self.origins.get(key) {
                Some(origin) => return Some(origin),
                None => key = &key[..key.rfind(['.', '['])?],
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> PathBuf {
        PathBuf::from("tests/fixtures/saved")
    }

    #[test]
    fn a_plan_of_version_1_is_read_with_all_it_says() {
        let saved = SavedPlan::read(&examples().join("v1")).unwrap();
        assert_eq!((saved.version, saved.pipeline.as_str(), saved.profile.as_str()), (1, "small", "paper"));
        let names: Vec<&str> = saved.plan.nodes.iter().map(|planned| planned.node.name.0.as_str()).collect();
        assert_eq!(names, ["words", "poems", "mix", "base", "sft", "final"]);
        let sft = saved.node(&NodeName("sft".into())).unwrap();
        assert_eq!(sft.node.stage_kind(), Some(StageKind::Train));
        assert!(sft.node.leaves().contains(&("optimizer.lr".into(), "0.00005".into())));
        assert!(sft.node.origin("trainable[0]").is_some());
        assert_eq!(sft.inputs.len(), 2);
        assert!(matches!(sft.verdict, Some(Verdict::Run(_))));
    }

    #[test]
    fn a_plan_whose_settings_and_words_have_changed_since_is_still_read() {
        let text = fs::read_to_string(examples().join("v1/plan.json")).unwrap();
        let mut plan: Value = serde_json::from_str(&text).unwrap();
        let node = &mut plan["plan"]["nodes"][4];
        node["node"]["settings"]["settings"]["optimizer"]["no_longer"] = 3.into();
        node["node"]["settings"]["settings"].as_object_mut().unwrap().remove("trainable");
        node["node"]["kind"] = "of_old".into();
        node["node"]["origins"]["train.max_iters"] = serde_json::json!({ "kind": "oracle" });
        node["node"]["slots"] = "one".into();
        node["verdict"] = serde_json::json!({ "kind": "dream" });
        plan["sweep"] = serde_json::json!({ "of": "old" });
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(PLAN_FILE), plan.to_string()).unwrap();
        let saved = SavedPlan::read(dir.path()).unwrap();
        let sft = &saved.plan.nodes[4];
        assert_eq!((sft.node.stage_kind(), sft.node.typed(), sft.verdict.clone()), (None, None, None));
        assert!(sft.node.leaves().contains(&("optimizer.no_longer".into(), "3".into())));
        assert!(sft.node.origins.contains_key("optimizer.lr") && !sft.node.origins.contains_key("train.max_iters"));
        assert_eq!(saved.sweep, None);
    }

    #[test]
    fn a_manifest_of_version_1_is_read_and_its_settings_stay_as_they_were() {
        use deepgen_contract::artifact::Manifest;
        let text = fs::read_to_string(examples().join("v1/manifest.json")).unwrap();
        let manifest: Manifest = serde_json::from_str(&text).unwrap();
        assert_eq!(manifest.settings["settings"]["optimizer"]["lr"], 0.00005);
        assert!(manifest.content.is_empty() && manifest.environment.gpus.is_empty());
        let newer = text.replacen("\"optimizer\": {", "\"optimizer\": {\n\"no_longer\": 3,", 1);
        let newer = newer.replacen("\"version\": 1,", "\"version\": 1,\n\"of_tomorrow\": true,", 1);
        let manifest: Manifest = serde_json::from_str(&newer).unwrap();
        assert_eq!(manifest.settings["settings"]["optimizer"]["no_longer"], 3);
    }
}
