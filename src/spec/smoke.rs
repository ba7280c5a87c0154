//! `--smoke`: a layer over the settings of every node that leaves two steps of each stage and few items.
//!
//! One rule a kind of stage, none a pipeline: the whole graph runs from end to end in a minute or so, through the same
//! code and the same files, and its results have fingerprints of their own. Values are only ever lowered; what `--set`
//! says counts more.

use std::sync::Arc;

use deepgen_contract::stage::StageKind;

use super::path;
use super::tree::{Source, Tree, Value};

/// Questions that are left: `base_vlm` holds 512 out.
const NUM_QUESTIONS: i64 = 640;

/// Name of the layer's source.
pub const SOURCE: &str = "--smoke";

/// Returns the largest values that are left, by key; a key in a list stands for all of its items.
fn caps(kind: StageKind) -> &'static [(&'static str, i64)] {
    match kind {
        // Enough for a held-out part, a few batches, and every word that a tokenizer must know.
        StageKind::Prepare => &[("source.shapes.count", 64)],
        StageKind::Mix => &[("micro_batch", 2)],
        StageKind::Train => &[
            ("train.max_iters", 2),
            ("train.accumulation", 1),
            ("train.log_every", 1),
            ("warm_start.iters", 2),
            ("validation.every", 2),
            ("validation.num_samples", 2),
            ("checkpoint.every", 1),
        ],
        StageKind::Rl => &[
            ("policy.iterations", 2),
            ("rollout.prompts", 2),
            ("rollout.group_size", 2),
            ("rollout.steps", 4),
            ("sft.batch", 2),
            ("evaluation.every", 2),
            ("evaluation.num_prompts", 2),
            ("evaluation.steps", 2),
            ("checkpoint.every", 1),
        ],
        StageKind::Generate => &[("items.count", 12), ("sampler.steps", 2), ("sampler.images_per_prompt", 1)],
        StageKind::Score => &[("resamples", 20)],
        StageKind::BaseVae => &[("phases.steps", 2), ("checkpoint.every", 1)],
        StageKind::BaseVlm => &[("steps", 2), ("checkpoint.every", 1)],
        StageKind::BaseDit => &[("steps", 2), ("pretrain.steps", 2), ("validate_every", 2), ("checkpoint.every", 1)],
        _ => &[],
    }
}

/// Returns the layer's source.
pub fn source() -> Arc<Source> {
    Source::file(SOURCE, "", SOURCE)
}

/// Lowers the settings of a node of this kind.
pub fn lower(settings: &mut Tree, kind: StageKind, source: &Arc<Source>) {
    let kind_of_source = ["source", "shapes", "kind"].iter().try_fold(&*settings, |tree, key| tree.get(key));
    let asks = kind_of_source.and_then(Tree::text) == Some("qa");
    for (key, most) in caps(kind) {
        cap(settings, &path::split(key), if asks { NUM_QUESTIONS } else { *most }, source);
    }
}

fn cap(tree: &mut Tree, keys: &[String], most: i64, source: &Arc<Source>) {
    match (&mut tree.value, keys) {
        (Value::Int(number), []) if *number > most && !tree.spot.source.is_command_line => {
            *number = most;
            tree.spot = source.spot(0, source.text.len());
        }
        (Value::Table(table), [key, rest @ ..]) => {
            if let Some(entry) = Arc::make_mut(table).get_mut(key) {
                cap(&mut entry.tree, rest, most, source);
            }
        }
        (Value::List(items), keys) => {
            let lowered = source.spot(0, source.text.len());
            let before: Vec<serde_json::Value> = items.iter().map(Tree::json).collect();
            Arc::make_mut(items).iter_mut().for_each(|item| cap(item, keys, most, source));
            // The origin of a list is one for all of it.
            if items.iter().map(Tree::json).ne(before) {
                tree.spot = lowered;
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use deepgen_contract::settings::Settings;

    use super::*;
    use crate::spec::tests::{fixtures, overrides};
    use crate::spec::{Origin, Overrides, Resolved, load};

    fn smoke(set: &[&str]) -> Resolved {
        let overrides = Overrides { smoke: true, ..overrides(None, set) };
        load(&fixtures().join("pipelines/full.toml"), &overrides).unwrap()
    }

    #[test]
    fn every_stage_takes_two_steps_and_explains_whose_word_that_is() {
        let resolved = smoke(&["sft.train.max_iters=3"]);
        let node = |name: &str| resolved.nodes.iter().find(|node| node.name.0 == name).unwrap();
        let Settings::Train(pretrain) = &node("pretrain").settings else { panic!("pretrain trains") };
        assert_eq!((pretrain.train.max_iters, pretrain.train.accumulation, pretrain.warm_start.iters), (2, 1, 2));
        assert_eq!(node("pretrain").origins.get("train.max_iters"), Some(&Origin::Smoke));
        let Settings::Train(sft) = &node("sft").settings else { panic!("sft trains") };
        assert_eq!(sft.train.max_iters, 3, "--set counts more");
        let Settings::Generate(images) = &node("images[geneval,handoff-2]").settings else { panic!("images") };
        assert_eq!(images.sampler.steps, 2);
        assert!(node("handoff-1").origins.values().all(|origin| *origin != Origin::Smoke));
    }

    #[test]
    fn nothing_is_raised_and_lists_are_lowered_item_by_item() {
        let (source, below) = (super::source(), Source::file("a.toml", "", "phases = [{ steps = 9 }, { steps = 1 }]"));
        let (mut tree, problems) = crate::spec::tree::parse(&below);
        assert!(problems.is_empty());
        lower(&mut tree, StageKind::BaseVae, &source);
        assert_eq!(tree.json()["phases"], serde_json::json!([{ "steps": 2 }, { "steps": 1 }]));
        assert_eq!(tree.get("phases").unwrap().spot.source.name.as_ref(), SOURCE);
    }
}
