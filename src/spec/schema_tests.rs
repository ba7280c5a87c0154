//! The schemas against their copies in git, against what the parsers know, and against our own files.

use std::collections::BTreeSet;
use std::path::Path;

use super::super::pipeline::{CHANGE_KEYS, HEADER_KEYS, NODE_KEYS, PROFILE_KEYS, TOP_KEYS, VARIANT_KEYS};
use super::super::run_table::{BACKOFF_KEYS, EXECUTOR_KEYS, RUN_KEYS};
use super::super::sweep;
use super::super::tree::{self, Source};
use super::*;
use crate::spec::policy::REMEDIES;

/// With `DEEPGEN_UPDATE_SCHEMA=1` in the environment the copies are written.
#[test]
fn the_copies_in_git_are_the_schemas_of_the_types() {
    let folder = Path::new("docs/schema");
    let is_update = std::env::var_os("DEEPGEN_UPDATE_SCHEMA").is_some();
    for (name, schema) in all() {
        let file = folder.join(format!("{name}.json"));
        let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        if is_update {
            std::fs::create_dir_all(folder).unwrap();
            std::fs::write(&file, &text).unwrap();
        }
        let found = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(found == text, "{} is out of date: run `make schema`", file.display());
    }
    let files = std::fs::read_dir(folder).unwrap().count();
    assert_eq!(files, all().len(), "a schema of nothing lies in docs/schema");
}

#[test]
fn the_schemas_know_the_keys_that_the_parsers_know() {
    let keys = |schema: &Json, at: &str| -> BTreeSet<String> {
        let table = if at.is_empty() { schema } else { &schema["$defs"][at] };
        table["properties"].as_object().unwrap_or_else(|| panic!("no {at}")).keys().cloned().collect()
    };
    let set = |keys: &[&[&str]]| -> BTreeSet<String> { keys.concat().into_iter().map(str::to_owned).collect() };
    let (pipeline, experiment) = (pipeline(), experiment());
    assert_eq!(keys(&pipeline, ""), set(&[&TOP_KEYS, &[INCLUDE]]));
    assert_eq!(keys(&pipeline, "HeaderTable"), set(&[&HEADER_KEYS]));
    assert_eq!(keys(&pipeline, "LocalTable"), set(&[&EXECUTOR_KEYS]));
    assert_eq!(keys(&pipeline, "NodeTable"), set(&[&NODE_KEYS, &RUN_KEYS]));
    assert_eq!(keys(&pipeline, "ChangeTable"), set(&[&CHANGE_KEYS, &RUN_KEYS]));
    assert_eq!(keys(&pipeline, "ProfileTable"), set(&[&PROFILE_KEYS]));
    assert_eq!(keys(&pipeline, "VariantTable"), set(&[&VARIANT_KEYS]));
    assert_eq!(keys(&pipeline, "BackoffTable"), set(&[&BACKOFF_KEYS]));
    assert_eq!(keys(&pipeline, "RemediesTable"), set(&[&REMEDIES]));
    assert_eq!(keys(&experiment, ""), set(&[&sweep::EXPERIMENT_KEYS, &[INCLUDE]]));
    assert_eq!(keys(&experiment, "RowTable"), set(&[&sweep::VARIANT_KEYS]));
}

#[test]
fn our_own_files_name_their_schema_and_fit_it() {
    let schemas: std::collections::BTreeMap<String, Json> = all().into_iter().collect();
    let mut num = 0;
    for folder in ["pipelines", "experiments", "stages"] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|end| end != "toml") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let first = text.lines().next().unwrap_or_default();
            let name = first.strip_prefix("#:schema ../docs/schema/").and_then(|name| name.strip_suffix(".json"));
            let schema = name.and_then(|name| schemas.get(name));
            let schema = schema.unwrap_or_else(|| panic!("{} begins with `{first}`", path.display()));
            let (tree, _) = tree::parse(&Source::file("file", "", text));
            let wrong = misfit(schema, schema, &tree.json());
            assert_eq!(wrong, None, "{}", path.display());
            num += 1;
        }
    }
    assert!(num > 15, "{num} files");
}

#[test]
fn a_misspelt_key_does_not_fit() {
    let misfits = |schema: &Json, text: &str| {
        let (tree, problems) = tree::parse(&Source::file("file", "", text));
        assert!(problems.is_empty(), "{problems:?}");
        misfit(schema, schema, &tree.json()).is_some()
    };
    let pipeline = pipeline();
    assert!(!misfits(&pipeline, "[node.a]\nstage = \"sft\"\ntimeout = \"3h\"\nslots.gpu = [1]\n"));
    assert!(misfits(&pipeline, "[node.a]\nstage = \"sft\"\ntimeoud = \"3h\"\n"));
    assert!(misfits(&pipeline, "[node.a]\nretries = \"two\"\n"));
    let train = stage(StageKind::Train);
    assert!(!misfits(&train, "kind = \"train\"\noptimizer.lr = \"${env.LR}\"\n[profile.x]\noptimizer.lr = 1\n"));
    assert!(misfits(&train, "kind = \"train\"\noptimizer.lr = \"fast\"\n"));
    assert!(misfits(&train, "kind = \"train\"\n[profile.x]\noptimizer.lrr = 1\n"));
    assert!(misfits(&train, "kind = \"rl\"\n"));
}

/// Returns where and how a value does not fit a schema; knows the words that our schemas use.
fn misfit(root: &Json, schema: &Json, value: &Json) -> Option<String> {
    if schema == &Json::Bool(true) {
        return None;
    }
    if schema == &Json::Bool(false) {
        return Some(format!("{value} must not be there"));
    }
    if let Some(target) = schema["$ref"].as_str() {
        let target = root.pointer(target.trim_start_matches('#')).expect("a reference leads somewhere");
        if let Some(wrong) = misfit(root, target, value) {
            return Some(wrong);
        }
    }
    if let Some(options) = schema["anyOf"].as_array().or(schema["oneOf"].as_array()) {
        let wrong: Vec<String> = options.iter().map_while(|option| misfit(root, option, value)).collect();
        if wrong.len() == options.len() {
            return Some(wrong.join(" / "));
        }
    }
    let is = |kind: &str| match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        _ => value.is_null(),
    };
    let kinds: Vec<&str> = match &schema["type"] {
        Json::String(kind) => vec![kind],
        Json::Array(kinds) => kinds.iter().filter_map(Json::as_str).collect(),
        _ => Vec::new(),
    };
    if !kinds.is_empty() && !kinds.iter().any(|kind| is(kind)) {
        return Some(format!("{value} is no {kinds:?}"));
    }
    if schema.get("const").is_some_and(|only| only != value) {
        return Some(format!("{value} is not {}", schema["const"]));
    }
    if schema["enum"].as_array().is_some_and(|words| !words.contains(value)) {
        return Some(format!("{value} is none of {}", schema["enum"]));
    }
    if schema["minimum"].as_f64().zip(value.as_f64()).is_some_and(|(least, number)| number < least) {
        return Some(format!("{value} is too small"));
    }
    // The one pattern in use asks for a reference.
    if schema.get("pattern").is_some() && value.as_str().is_some_and(|text| !text.contains("${")) {
        return Some(format!("{value} is no reference"));
    }
    if let (Some(items), Some(values)) = (schema.get("items"), value.as_array())
        && let Some(wrong) = values.iter().find_map(|value| misfit(root, items, value))
    {
        return Some(wrong);
    }
    let of_key = |(key, inner): (&String, &Json)| {
        let known = schema["properties"].get(key).or(schema.get("additionalProperties"));
        known.and_then(|known| misfit(root, known, inner)).map(|wrong| format!("{key}: {wrong}"))
    };
    value.as_object()?.iter().find_map(of_key)
}
