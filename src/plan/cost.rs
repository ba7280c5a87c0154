//! What will run, in time, GPU-hours and disk, from what equal stages took before. Arithmetic over records.
//!
//! A node is compared with the sealed results of the same kind of stage on the same kind of device; of these the same
//! stage file counts first, then the nearest amount of work, then the newest. Time and disk grow with the work: samples
//! trained on, images drawn, records prepared. Where there is no such result the cost is unknown, and said to be.

use std::collections::BTreeMap;

use deepgen_contract::data::SourceSettings;
use deepgen_contract::eval::{BenchmarkItems, GenerateSettings};
use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::settings::Settings;
use deepgen_contract::stage::StageKind;
use serde::Serialize;

use super::plan::{Plan, PlannedNode, Verdict};

/// Amount of work of a node, in units that only its kind of stage has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// What time grows with.
    pub time: f64,
    /// What disk grows with.
    pub disk: f64,
}

/// What a sealed result took.
#[derive(Debug, Clone, PartialEq)]
pub struct PastJob {
    /// Node that made it.
    pub node: NodeName,
    /// Name of its stage file.
    pub stage: String,
    /// Kind of that stage.
    pub kind: StageKind,
    /// Device of the job, such as `cuda:0`.
    pub device: String,
    /// Its work.
    pub work: Work,
    /// Seconds that its attempts ran, all together.
    pub seconds: f64,
    /// Bytes of its files.
    pub bytes: u64,
    /// When it was sealed, milliseconds since 1970.
    pub sealed_ms: u64,
}

/// A sealed result as far as its cost is concerned: what [`past_jobs`] takes.
#[derive(Debug, Clone, PartialEq)]
pub struct PastResult {
    /// What it took; its work is filled in.
    pub job: PastJob,
    /// Its settings.
    pub settings: Settings,
    /// Fingerprints of its inputs by port.
    pub inputs: BTreeMap<String, Fingerprint>,
}

/// What a node is expected to cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// Seconds that its job runs.
    pub seconds: f64,
    /// GPUs it holds times hours; 0 on a CPU.
    pub gpu_hours: f64,
    /// Bytes of its result.
    pub bytes: u64,
    /// Node whose result this is taken from.
    pub like: NodeName,
    /// When that was sealed, milliseconds since 1970.
    pub like_sealed_ms: u64,
    /// How many times as much work this is.
    pub factor: f64,
}

/// What a plan is expected to cost.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Costs {
    /// Costs of the nodes that will run and are like one that ran before.
    pub nodes: BTreeMap<NodeName, Cost>,
    /// Nodes that will run and are like none.
    pub unknown: Vec<NodeName>,
    /// Those of them that need a GPU.
    pub unknown_on_gpu: Vec<NodeName>,
    /// Seconds of all known ones, one after the other.
    pub seconds: f64,
    /// GPU-hours of all known ones.
    pub gpu_hours: f64,
    /// Bytes of all known ones.
    pub bytes: u64,
}

impl Costs {
    /// Returns what the nodes that will run, or wait for something that is missing, are expected to cost.
    pub fn of(plan: &Plan, past: &[PastJob]) -> Self {
        let settings: BTreeMap<&NodeName, &Settings> =
            plan.nodes.iter().map(|planned| (&planned.node.name, &planned.node.settings)).collect();
        let mut costs = Self::default();
        for planned in plan.nodes.iter().filter(|planned| planned.verdict != Verdict::Cached) {
            let input = |port: &str| settings.get(planned.node.inputs.get(port)?).copied();
            match cost(planned, work(&planned.node.settings, &input), past) {
                Some(cost) => {
                    costs.seconds += cost.seconds;
                    costs.gpu_hours += cost.gpu_hours;
                    costs.bytes += cost.bytes;
                    costs.nodes.insert(planned.node.name.clone(), cost);
                }
                None => {
                    if gpus(planned) > 0.0 {
                        costs.unknown_on_gpu.push(planned.node.name.clone());
                    }
                    costs.unknown.push(planned.node.name.clone());
                }
            }
        }
        costs
    }
}

/// Returns jobs with their work; inputs are looked up among the same results.
pub fn past_jobs(results: Vec<(Fingerprint, PastResult)>) -> Vec<PastJob> {
    let settings: BTreeMap<Fingerprint, Settings> =
        results.iter().map(|(fingerprint, result)| (*fingerprint, result.settings.clone())).collect();
    let with_work = |(_, result): (Fingerprint, PastResult)| {
        let input = |port: &str| settings.get(result.inputs.get(port)?);
        PastJob { work: work(&result.settings, &input), ..result.job }
    };
    results.into_iter().map(with_work).collect()
}

fn cost(planned: &PlannedNode, work: Work, past: &[PastJob]) -> Option<Cost> {
    let node = &planned.node;
    let alike =
        past.iter().filter(|job| job.kind == node.kind && device_kind(&job.device) == device_kind(&node.device));
    let distance = |job: &PastJob| (work.time / job.work.time).ln().abs();
    let like = alike.min_by(|a, b| {
        let key = |job: &PastJob| (job.stage != node.stage, distance(job));
        let ((a_other, a_far), (b_other, b_far)) = (key(a), key(b));
        a_other.cmp(&b_other).then(a_far.total_cmp(&b_far)).then(b.sealed_ms.cmp(&a.sealed_ms))
    })?;
    let factor = work.time / like.work.time;
    let seconds = like.seconds * factor;
    Some(Cost {
        seconds,
        gpu_hours: gpus(planned) * seconds / 3600.0,
        bytes: (like.bytes as f64 * work.disk / like.work.disk).round() as u64,
        like: like.node.clone(),
        like_sealed_ms: like.sealed_ms,
        factor,
    })
}

/// `cuda` of `cuda:1`: equal cards are assumed.
fn device_kind(device: &str) -> &str {
    device.split_once(':').map_or(device, |(kind, _)| kind)
}

/// Returns the GPUs that a node holds while it runs.
fn gpus(planned: &PlannedNode) -> f64 {
    let node = &planned.node;
    let is_on_gpu = node.kind.uses_device() && device_kind(&node.device) != "cpu";
    if is_on_gpu { node.slots.get("gpu").copied().unwrap_or(1.0) } else { 0.0 }
}

/// Returns the work of a node; `input` gives the settings of the node wired to a port. Never 0.
fn work<'a>(settings: &Settings, input: &dyn Fn(&str) -> Option<&'a Settings>) -> Work {
    let (time, disk) = match settings {
        Settings::Train(train) => {
            let micro_batch = match input("data") {
                Some(Settings::Mix(mix)) => mix.micro_batch as f64,
                _ => 1.0,
            };
            let iterations = train.train.max_iters + train.warm_start.iters;
            (iterations as f64 * micro_batch * area(train.image.size as usize, train.image.size as usize), 1.0)
        }
        Settings::Rl(rl) => {
            let images = (rl.rollout.prompts * rl.rollout.group_size) as f64;
            let passes = rl.rollout.steps as f64 * (1.0 + 3.0 * rl.policy.timestep_fraction);
            (rl.policy.iterations as f64 * images * passes * area(rl.rollout.height, rl.rollout.width), 1.0)
        }
        Settings::Generate(generate) => {
            let area = images(generate) * area(generate.sampler.height, generate.sampler.width);
            (area * generate.sampler.steps as f64, area)
        }
        Settings::Score(_) => match input("images") {
            Some(Settings::Generate(generate)) => (images(generate), images(generate)),
            _ => (1.0, 1.0),
        },
        Settings::Prepare(prepare) => {
            let records = match &prepare.source {
                SourceSettings::Shapes { shapes } => shapes.count as f64,
                _ => prepare.nominal_size as f64,
            };
            (records, records)
        }
        Settings::BaseVae(vae) => (vae.phases.iter().map(|phase| phase.steps as f64).sum(), 1.0),
        Settings::BaseVlm(vlm) => (vlm.steps as f64, 1.0),
        Settings::BaseDit(dit) => (dit.steps as f64 + 0.2 * dit.pretrain.steps as f64, 1.0),
        _ => (1.0, 1.0),
    };
    Work { time: time.max(1.0), disk: disk.max(1.0) }
}

fn area(height: usize, width: usize) -> f64 {
    (height * width) as f64
}

/// Returns the images that a node draws; prompts in a file are not counted, so they compare only with themselves.
fn images(generate: &GenerateSettings) -> f64 {
    let items = match &generate.items {
        BenchmarkItems::Shapes { count, .. } => *count as f64,
        _ => 1.0,
    };
    items * generate.sampler.images_per_prompt as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::nothing::Nothing;
    use crate::spec::tests::full;

    fn past(plan: &Plan, node: &str, seconds: f64, device: &str) -> Vec<PastJob> {
        let result = |planned: &PlannedNode| {
            let node = &planned.node;
            let job = PastJob {
                node: node.name.clone(),
                stage: node.stage.clone(),
                kind: node.kind,
                device: device.into(),
                work: Work { time: 1.0, disk: 1.0 },
                seconds,
                bytes: 1000,
                sealed_ms: 1,
            };
            (
                planned.fingerprint,
                PastResult {
                    job,
                    settings: node.settings.clone(),
                    inputs: planned.inputs.clone().into_iter().collect(),
                },
            )
        };
        let all = past_jobs(plan.nodes.iter().map(result).collect());
        all.into_iter().filter(|job| job.node.0 == node).collect()
    }

    #[test]
    fn time_grows_with_iterations_and_images_and_only_like_devices_are_compared() {
        let plan = |set: &[&str]| Plan::build(&full(None, set), &Nothing, &Nothing);
        let before = plan(&["sft.train.max_iters=100"]);
        let jobs = past(&before, "sft", 60.0, "cpu");
        let now = plan(&["sft.train.max_iters=250", "mix.micro_batch=8"]);
        let batch = |plan: &Plan| match &plan.node(&NodeName("mix".into())).unwrap().node.settings {
            Settings::Mix(mix) => mix.micro_batch as f64,
            _ => panic!("mix is a mixture"),
        };
        let warm = match &now.node(&NodeName("sft".into())).unwrap().node.settings {
            Settings::Train(train) => train.warm_start.iters as f64,
            _ => panic!("sft trains"),
        };
        let costs = Costs::of(&now, &jobs);
        let sft = &costs.nodes[&NodeName("sft".into())];
        let expected = 60.0 * (250.0 + warm) / (100.0 + warm) * batch(&now) / batch(&before);
        assert!((sft.seconds - expected).abs() < 1e-6, "{} is not {expected}", sft.seconds);
        assert_eq!((sft.bytes, sft.gpu_hours), (1000, 0.0));
        // Another stage file of the same kind is the next best.
        assert!(costs.nodes.contains_key(&NodeName("pretrain".into())));
        assert!(costs.unknown.iter().any(|node| node.0 == "images[geneval,handoff-1]"));

        let on_gpu = Costs::of(&now, &past(&before, "sft", 60.0, "cuda:1"));
        assert!(on_gpu.nodes.is_empty(), "a GPU says nothing of a CPU");

        let drawn = past(&before, "images[geneval,handoff-2]", 10.0, "cpu");
        let more = plan(&["images.sampler.steps=7", "images.sampler.images_per_prompt=9"]);
        let (old, new) = (&before.nodes, &more.nodes);
        let sampler =
            |nodes: &[PlannedNode]| match &nodes.iter().find(|p| p.node.name == drawn[0].node).unwrap().node.settings {
                Settings::Generate(generate) => {
                    (generate.sampler.steps as f64, generate.sampler.images_per_prompt as f64)
                }
                _ => panic!("images are generated"),
            };
        let ((old_steps, old_images), (new_steps, new_images)) = (sampler(old), sampler(new));
        let cost = &Costs::of(&more, &drawn).nodes[&drawn[0].node];
        let factor = new_steps * new_images / (old_steps * old_images);
        assert!((cost.seconds - 10.0 * factor).abs() < 1e-9 && (cost.factor - factor).abs() < 1e-12);
        assert_eq!(cost.bytes, (1000.0 * new_images / old_images).round() as u64, "disk grows with images alone");
    }

    #[test]
    fn gpu_hours_are_gpus_times_hours() {
        let mut plan = Plan::build(&full(None, &[]), &Nothing, &Nothing);
        let jobs = past(&plan, "sft", 1800.0, "cuda:0");
        for planned in &mut plan.nodes {
            let node = std::sync::Arc::make_mut(&mut planned.node);
            node.device = if node.kind.uses_device() { "cuda:1".into() } else { "cpu".into() };
            node.slots = [("gpu".to_owned(), 2.0)].into_iter().collect();
        }
        let costs = Costs::of(&plan, &jobs);
        assert!((costs.nodes[&NodeName("sft".into())].gpu_hours - 1.0).abs() < 1e-9);
        assert!(costs.unknown_on_gpu.iter().all(|node| node.0.starts_with("images")));
        assert!(!costs.unknown_on_gpu.is_empty() && costs.unknown.len() > costs.unknown_on_gpu.len());
    }
}
