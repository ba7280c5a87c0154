//! What a plan amounts to: parameters of each part, what trains, iterations, updates, batches, resolution.
//!
//! Arithmetic over resolved settings; it loads no weights. Operations and memory are counted in the contract; time is
//! measured, not counted ([`super::cost`]).

use std::collections::BTreeMap;

use deepgen_contract::flops::{self, RlIteration, Trained};
use deepgen_contract::id::NodeName;
use deepgen_contract::memory::{self, Memory};
use deepgen_contract::model::{ModelSpec, ParameterCounts};
use deepgen_contract::settings::Settings;
use deepgen_contract::train::{LoopSettings, LoraHandoff, OptimizerSettings, Schedule};
use serde::Serialize;

use crate::spec::{Resolved, ResolvedNode};

/// Sizes of a training node.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainingSizes {
    /// The node.
    pub node: NodeName,
    /// Elements of each part of the model it trains in.
    pub parts: ParameterCounts,
    /// Elements that train, by part.
    pub trainable: BTreeMap<&'static str, u64>,
    /// Batches of stages 1 and 2, rollouts with their updates in stage 3.
    pub iterations: u64,
    /// Steps of the optimiser; of stage 3 at least one an iteration, its number depends on the rewards.
    pub updates: Option<u64>,
    /// Samples of an update, or images of a rollout in stage 3, on one device; the global batch is this times devices.
    pub batch: Option<u64>,
    /// Iterations, or updates in stage 3, that warm up.
    pub warmup: u64,
    /// Image sides in pixels.
    pub resolution: String,
    /// Floating-point operations of an update of stages 1 and 2, or of an iteration of stage 3, on one device.
    pub flops_per_step: Option<f64>,
    /// Operations of all of them.
    pub flops_total: Option<f64>,
    /// Bytes on one device.
    pub memory: Option<Memory>,
}

/// A node whose model cannot be built, and why.
pub type Unbuildable = (NodeName, String);

/// Returns the sizes of every training node whose model is known; of one that cannot be built, the reason.
pub fn training_sizes(resolved: &Resolved) -> Vec<Result<TrainingSizes, Unbuildable>> {
    let nodes: BTreeMap<&NodeName, &ResolvedNode> =
        resolved.nodes.iter().map(|node| (&node.name, node.as_ref())).collect();
    resolved.nodes.iter().filter_map(|node| sizes_of(node, &nodes)).collect()
}

fn sizes_of(
    node: &ResolvedNode,
    nodes: &BTreeMap<&NodeName, &ResolvedNode>,
) -> Option<Result<TrainingSizes, Unbuildable>> {
    let patterns = match &node.settings {
        Settings::Train(train) => &train.trainable,
        Settings::Rl(rl) => &rl.trainable,
        _ => return None,
    };
    let model = model_of(node, nodes)?;
    let counted = model.parameter_counts().map_err(|problem| (node.name.clone(), problem));
    Some(counted.map(|parts| {
        let trainable = trainable_parts(patterns, &parts);
        let input = |port: &str| nodes.get(node.inputs.get(port)?).map(|node| &node.settings);
        let (iterations, updates, batch, warmup, resolution) = match &node.settings {
            Settings::Rl(rl) => {
                let images = (rl.rollout.prompts * rl.rollout.group_size) as u64;
                let resolution = format!("{}x{}", rl.rollout.height, rl.rollout.width);
                (rl.policy.iterations, None, Some(images), warmup(&rl.optimizer, rl.policy.iterations), resolution)
            }
            Settings::Train(train) => {
                let LoopSettings { max_iters, accumulation, .. } = train.train;
                let micro_batch = match input("data") {
                    Some(Settings::Mix(mix)) => Some(mix.micro_batch as u64 * accumulation),
                    _ => None,
                };
                let resolution = format!("{0}x{0}", train.image.size);
                let updates = max_iters / accumulation.max(1);
                (max_iters, Some(updates), micro_batch, warmup(&train.optimizer, max_iters), resolution)
            }
            _ => unreachable!("only training nodes have patterns"),
        };
        let operations = operations(&model, &parts, &trainable, &node.settings, batch);
        let (flops_per_step, memory) = operations.map_or((None, None), |(flops, memory)| (flops, memory));
        let steps = updates.unwrap_or(iterations);
        TrainingSizes {
            node: node.name.clone(),
            parts,
            trainable,
            iterations,
            updates,
            batch,
            warmup,
            resolution,
            flops_per_step,
            flops_total: flops_per_step.map(|flops| flops * steps as f64),
            memory,
        }
    }))
}

/// Returns the operations of a step and the memory of a training node; nothing where the batch is not known.
fn operations(
    model: &ModelSpec,
    parts: &ParameterCounts,
    trainable: &BTreeMap<&'static str, u64>,
    settings: &Settings,
    batch: Option<u64>,
) -> Option<(Option<f64>, Option<Memory>)> {
    let has = |part: &str| trainable.contains_key(part);
    let trained = Trained { bridge: has("bridge"), dit: has("dit"), lora: has("lora") };
    let num: u64 = trainable.values().sum();
    match settings {
        Settings::Train(train) => {
            let side = (train.image.size as usize, train.image.size as usize);
            let batch = batch?;
            let flops = flops::training_sample(model, trained, side).map(|sample| sample * batch as f64);
            let micro_batch = batch / train.train.accumulation.max(1);
            Some((flops, memory::of_training(model, parts, (num, trained), (micro_batch, side), false)))
        }
        Settings::Rl(rl) => {
            let rollout = &rl.rollout;
            let side = (rollout.height, rollout.width);
            let flops = flops::rl_iteration(model, &RlIteration::of(rl, true), side);
            // Counted for the images of one group at once.
            let batch = rollout.group_size as u64;
            Some((flops, memory::of_training(model, parts, (num, trained), (batch, side), true)))
        }
        _ => None,
    }
}

fn warmup(optimizer: &OptimizerSettings, iterations: u64) -> u64 {
    match optimizer.schedule {
        // A share of iterations, which fit f64 exactly.
        Schedule::WarmupCosine { warmup_ratio } => (iterations as f64 * warmup_ratio).round() as u64,
        Schedule::WarmupConstant { warmup_steps }
        | Schedule::WarmupDecay { warmup_steps, .. }
        | Schedule::HalfCosine { warmup_steps, .. } => warmup_steps,
    }
}

/// Returns the model that a node works on, or leaves, by following its weights back to their import.
fn model_of(node: &ResolvedNode, nodes: &BTreeMap<&NodeName, &ResolvedNode>) -> Option<ModelSpec> {
    let input = |port: &str| model_of(nodes.get(node.inputs.get(port)?)?, nodes);
    match &node.settings {
        Settings::Import(import) => Some(ModelSpec { base: import.model.clone(), bridge: None, lora: None }),
        Settings::Train(train) => {
            let lora = train.model.lora.config().cloned();
            Some(ModelSpec { bridge: Some(train.model.bridge.clone()), lora, ..input("weights")? })
        }
        Settings::Handoff(handoff) => {
            let model = input("checkpoint")?;
            let lora = if handoff.lora == LoraHandoff::Merge { None } else { model.lora.clone() };
            Some(ModelSpec { lora, ..model })
        }
        Settings::Rl(_) => input("weights"),
        _ => None,
    }
}

/// Returns the elements of the parts that patterns such as `bridge.*` and `vlm.*lora_*` name.
fn trainable_parts(patterns: &[String], parts: &ParameterCounts) -> BTreeMap<&'static str, u64> {
    let mut trainable = BTreeMap::new();
    for pattern in patterns {
        let (part, _) = pattern.split_once('.').unwrap_or((pattern, ""));
        let mut add = |name, elements| {
            trainable.insert(name, elements);
        };
        match part {
            _ if pattern.contains("lora") => add("lora", parts.lora),
            "bridge" => add("bridge", parts.bridge),
            "dit" => add("dit", parts.dit),
            "vae" => add("vae", parts.vae),
            "vlm" => {
                add("language", parts.language);
                add("vision", parts.vision);
            }
            _ => {}
        }
    }
    trainable
}
