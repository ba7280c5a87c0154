//! JSON Schema of our files, for editors: of a pipeline and an experiment from the types below, of a stage file from the
//! settings' types.
//!
//! The types mirror what [`super::pipeline`] and [`super::sweep`] read; a test holds their keys together. Editors check
//! spelling with it; `deepgen check` checks everything.

#![allow(dead_code, reason = "the types are read for their shape only")]

use std::collections::BTreeMap;

use deepgen_contract::settings;
use deepgen_contract::stage::StageKind;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema, schema_for};
use serde_json::{Value as Json, json};

use super::include::INCLUDE;

/// Any settings: which there are depends on the stage.
type Settings = BTreeMap<String, Json>;
/// Changes by `node.key`, dotted in quotes or as tables.
type Changes = BTreeMap<String, Json>;

/// A pipeline file: nodes wired together.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct PipelineFile {
    /// Files merged below this one, relative to it.
    #[schemars(schema_with = "texts")]
    include: Option<Json>,
    /// What the pipeline is.
    pipeline: Option<HeaderTable>,
    /// Variables of the environment that the file may use as `${env.NAME}`: a default, or a table.
    #[schemars(schema_with = "variables")]
    env: Option<Json>,
    /// Where jobs run.
    executor: Option<ExecutorsTable>,
    /// Nodes by name; `"NAME[VALUE]"` changes some instances.
    node: Option<BTreeMap<String, NodeTable>>,
    /// Changes chosen by `--profile`.
    profile: Option<BTreeMap<String, ProfileTable>>,
    /// Changes chosen by `--variant` and by experiments.
    variant: Option<BTreeMap<String, VariantTable>>,
}

/// `[pipeline]`.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct HeaderTable {
    /// Name of the pipeline.
    name: Option<String>,
    /// For people.
    description: Option<String>,
    /// Seed of every node that sets none.
    seed: Option<u64>,
    /// Profile used unless the command line names another.
    profile: Option<String>,
    /// False: after the first node that failed nothing new starts.
    keep_going: Option<bool>,
}

/// `[executor]`.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct ExecutorsTable {
    /// Child processes of this machine.
    local: Option<LocalTable>,
}

/// `[executor.local]`.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct LocalTable {
    /// Capacity by name: an amount, identities such as `gpu = [0, 1]`, or `memory = "64GiB"`.
    #[schemars(schema_with = "slots")]
    slots: Option<Json>,
    /// `cpu`, `wgpu[:i]` or `cuda[:i]`.
    device: Option<String>,
    /// Threads of a job that computes.
    threads: Option<u64>,
    /// Operations a second that the device reaches at most in the number type that jobs compute in, in tera (10^12), such as
    /// 989 for an H100 in bf16: what the metric `throughput/mfu` is a share of. Without it the data sheet's number of a known
    /// GPU in bf16 is taken, and for other devices `throughput/mfu` is not reported.
    peak_tflops: Option<f64>,
    /// A folder in which jobs that train keep what frozen parts make of images, and look it up: the autoencoder's moments and
    /// the vision tower's tokens. No result depends on it; runs may share it.
    frozen_cache: Option<CacheTable>,
    /// Worker program, relative to this file.
    worker: Option<String>,
}

/// `frozen_cache`.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct CacheTable {
    /// The folder, relative to this file; made if it is not there.
    path: String,
    /// How much it may hold: GiB, or a text such as `200GiB`.
    #[schemars(schema_with = "gib")]
    size: Json,
}

/// `[node.NAME]`.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct NodeTable {
    /// Stage file's name, without `.toml`.
    stage: Option<String>,
    /// Node wired to each port, such as `weights = "base"` or `images = "images[geneval]"`.
    inputs: Option<BTreeMap<String, String>>,
    /// Nodes that must be done before, though nothing is read of them.
    needs: Option<Vec<String>>,
    /// When the node is there.
    #[schemars(schema_with = "condition")]
    when: Option<Json>,
    /// Changes of the stage's settings.
    set: Option<Settings>,
    /// Axes: a node for each value, or combination of values.
    over: Option<Settings>,
    /// Groups of axes that advance together.
    zip: Option<Vec<Vec<String>>>,
    /// Combinations of axis values that are left out.
    exclude: Option<Vec<Settings>>,
    /// Further attempts after one that failed for a cause that may pass.
    retries: Option<u32>,
    /// Seed of its own.
    seed: Option<u64>,
    /// Share of the executor's slots: an amount, identities such as `gpu = [0, 1]`, or `memory = "16GiB"`.
    #[schemars(schema_with = "slots")]
    slots: Option<Json>,
    /// Pauses between attempts.
    backoff: Option<BackoffTable>,
    /// What is done about a failure before the next attempt; each is on unless switched off.
    remedies: Option<RemediesTable>,
    /// Longest time of an attempt.
    #[schemars(schema_with = "seconds")]
    timeout: Option<Json>,
    /// Longest time without progress.
    #[schemars(schema_with = "seconds")]
    stall: Option<Json>,
    /// Nodes of higher priority start first.
    priority: Option<i64>,
}

/// A node in a profile or a variant.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct ChangeTable {
    /// Changes of settings.
    set: Option<Settings>,
    /// Axes that are added or given other values.
    over: Option<Settings>,
    /// When the node is there.
    #[schemars(schema_with = "condition")]
    when: Option<Json>,
    /// Further attempts after one that failed for a cause that may pass.
    retries: Option<u32>,
    /// Seed of its own.
    seed: Option<u64>,
    /// Share of the executor's slots.
    #[schemars(schema_with = "slots")]
    slots: Option<Json>,
    /// Pauses between attempts.
    backoff: Option<BackoffTable>,
    /// What is done about a failure before the next attempt.
    remedies: Option<RemediesTable>,
    /// Longest time of an attempt.
    #[schemars(schema_with = "seconds")]
    timeout: Option<Json>,
    /// Longest time without progress.
    #[schemars(schema_with = "seconds")]
    stall: Option<Json>,
    /// Nodes of higher priority start first.
    priority: Option<i64>,
}

/// Pauses between attempts.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct BackoffTable {
    /// Before the first further attempt.
    #[schemars(schema_with = "seconds")]
    first: Option<Json>,
    /// Each pause is this many times the one before; at least 1.
    factor: Option<f64>,
    /// Longest pause.
    #[schemars(schema_with = "seconds")]
    most: Option<Json>,
}

/// What is done about a failure before the next attempt.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct RemediesTable {
    /// Out of memory: smaller micro-batches at the same global batch.
    out_of_memory: Option<bool>,
    /// A loss that is not finite: back to the last good checkpoint.
    non_finite: Option<bool>,
    /// No progress for the time of `stall`: killed and tried again.
    stalled: Option<bool>,
    /// The worker vanished: submitted again.
    lost: Option<bool>,
}

/// `[profile.NAME]`.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct ProfileTable {
    /// For people.
    description: Option<String>,
    /// Profile that this one builds on.
    extends: Option<String>,
    /// Changes of nodes.
    node: Option<BTreeMap<String, ChangeTable>>,
    /// Changes of where jobs run.
    executor: Option<ExecutorsTable>,
}

/// `[variant.NAME]`.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct VariantTable {
    /// For people.
    description: Option<String>,
    /// Variant that this one builds on.
    extends: Option<String>,
    /// Changes of nodes.
    node: Option<BTreeMap<String, ChangeTable>>,
    /// Changes of settings, after those of the nodes.
    set: Option<Changes>,
}

/// An experiment file: a pipeline with variants, or axes, or both.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct ExperimentFile {
    /// Files merged below this one, relative to it.
    #[schemars(schema_with = "texts")]
    include: Option<Json>,
    /// Name; that of the file otherwise.
    name: Option<String>,
    /// For people.
    description: Option<String>,
    /// Pipeline file, relative to this one.
    pipeline: Option<String>,
    /// Profile used unless the command line names another.
    profile: Option<String>,
    /// Columns of the comparison: `node.metric`.
    compare: Option<Vec<String>>,
    /// Rows of the comparison.
    variant: Option<Vec<RowTable>>,
    /// Lists of values by `node.key`: every combination is a row.
    axes: Option<Changes>,
    /// Groups of axes that advance together.
    zip: Option<Vec<Vec<String>>>,
    /// Combinations of axis values that are left out.
    exclude: Option<Vec<Changes>>,
}

/// `[[variant]]` of an experiment.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct RowTable {
    /// Its name.
    name: Option<String>,
    /// For people.
    description: Option<String>,
    /// Variants of the pipeline file that it takes on.
    #[serde(rename = "use")]
    #[schemars(schema_with = "texts")]
    uses: Option<Json>,
    /// Changes of settings.
    set: Option<Changes>,
}

fn texts(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }] })
}

fn seconds(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [{ "type": "number", "minimum": 0 }, { "type": "string" }] })
}

fn slots(_: &mut SchemaGenerator) -> Schema {
    let ids = json!({ "type": "array", "items": { "type": "integer", "minimum": 0 } });
    let share = json!({ "anyOf": [{ "type": "number", "minimum": 0 }, ids, { "type": "string" }] });
    json_schema!({ "type": "object", "additionalProperties": share })
}

fn gib(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [{ "type": "number", "minimum": 0 }, { "type": "string" }] })
}

fn condition(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [{ "type": "boolean" }, { "type": "object" }] })
}

fn variables(_: &mut SchemaGenerator) -> Schema {
    let scalar = json!(["string", "number", "boolean"]);
    let table = json!({
        "type": "object",
        "properties": {
            "default": { "type": scalar },
            "type": { "type": "string", "enum": ["text", "whole", "number", "truth"] },
            "description": { "type": "string" }
        },
        "additionalProperties": false
    });
    json_schema!({ "type": "object", "additionalProperties": { "anyOf": [{ "type": scalar }, table] } })
}

/// Returns the schema of a pipeline file.
pub fn pipeline() -> Json {
    Json::from(schema_for!(PipelineFile))
}

/// Returns the schema of an experiment file.
pub fn experiment() -> Json {
    Json::from(schema_for!(ExperimentFile))
}

/// Returns the schema of a stage file of a kind: its settings, none of them required, each of them a reference if need be.
pub fn stage(kind: StageKind) -> Json {
    let mut schema = Json::from(settings::schema(kind));
    loosen(&mut schema);
    let own = schema["properties"].take();
    let mut properties = own.clone();
    properties["kind"] = json!({ "const": kind.name(), "description": "Kind of the stage." });
    properties["description"] = json!({ "type": "string", "description": "For people." });
    let profile = json!({ "type": "object", "properties": own, "additionalProperties": false });
    properties["profile"] =
        json!({ "type": "object", "additionalProperties": profile, "description": "Changes by profile." });
    let texts = json!([{ "type": "string" }, { "type": "array", "items": { "type": "string" } }]);
    properties[INCLUDE] = json!({ "anyOf": texts, "description": "Files merged below this one, relative to it." });
    schema["properties"] = properties;
    schema["title"] = json!(format!("Stage file of kind {kind}"));
    schema["additionalProperties"] = json!(false);
    schema
}

/// Takes out what holds for whole settings only, and lets `${...}` stand for what is no text.
fn loosen(schema: &mut Json) {
    match schema {
        Json::Object(map) => {
            map.remove("required");
            map.remove("default");
            // Without its `kind` a part of a table may fit several.
            if let Some(options) = map.remove("oneOf") {
                map.insert("anyOf".into(), options);
            }
            map.values_mut().for_each(loosen);
            let is_scalar = ["integer", "number", "boolean"].iter().any(|kind| map.get("type") == Some(&json!(kind)));
            if is_scalar {
                let kind = map.remove("type").unwrap_or_default();
                map.insert("type".into(), json!([kind, "string"]));
                map.insert("pattern".into(), json!(r"\$\{.+\}"));
            }
        }
        Json::Array(items) => items.iter_mut().for_each(loosen),
        _ => {}
    }
}

/// Names of all schemas with what makes them: the files in `docs/schema/`.
pub fn all() -> Vec<(String, Json)> {
    let stages = StageKind::ALL.into_iter().map(|kind| (format!("stage-{kind}"), stage(kind)));
    [("pipeline".to_owned(), pipeline()), ("experiment".to_owned(), experiment())].into_iter().chain(stages).collect()
}

#[cfg(test)]
#[path = "schema_tests.rs"]
mod tests;
