//! How nodes run and where, as written: slots, retries, times, `[executor.local]`.
//!
//! Knows the keys and how layers of them merge; nothing of what nodes compute.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::diagnostic::Diagnostic;
use super::fields::{Fields, SlotTable};
use super::policy::{Backoff, REMEDIES, Remedies};
use super::tree::{Spot, Tree};

/// Keys of `[executor.local]`.
pub const EXECUTOR_KEYS: [&str; 6] = ["slots", "device", "threads", "peak_tflops", "frozen_cache", "worker"];
/// Keys of `frozen_cache`.
const CACHE_KEYS: [&str; 2] = ["path", "size"];
/// Least `peak_tflops`: no device is slower than a billion operations a second.
const LEAST_PEAK_TFLOPS: f64 = 0.001;
/// Keys of `backoff`.
pub const BACKOFF_KEYS: [&str; 3] = ["first", "factor", "most"];

/// `[executor.local]`, or a profile's change of it.
#[derive(Debug, Clone, Default)]
pub struct ExecutorTable {
    /// Capacities.
    pub slots: Option<Vec<SlotTable>>,
    /// Device.
    pub device: Option<String>,
    /// Threads.
    pub threads: Option<usize>,
    /// Peak of the device, in TFLOP/s.
    pub peak_tflops: Option<f64>,
    /// Folder of what frozen parts compute, where it was named, and its size in GiB.
    pub frozen_cache: Option<((String, Spot), f64)>,
    /// Worker binary, and where it was named.
    pub worker: Option<(PathBuf, Spot)>,
}

/// How a node runs, as opposed to what it computes.
#[derive(Debug, Clone, Default)]
pub struct RunTable {
    /// Seed of its own.
    pub seed: Option<u64>,
    /// Further attempts.
    pub retries: Option<u32>,
    /// Shares of slots.
    pub slots: Option<Vec<SlotTable>>,
    /// Pauses: first in seconds, factor, longest in seconds.
    pub backoff: [Option<f64>; 3],
    /// Remedies switched on or off, by name.
    pub remedies: BTreeMap<String, bool>,
    /// Longest time of an attempt in seconds; 0 for none.
    pub timeout_s: Option<f64>,
    /// Longest time without progress in seconds; 0 for none.
    pub stall_s: Option<f64>,
    /// Priority.
    pub priority: Option<i64>,
}

/// Keys of a node that say how it runs.
pub const RUN_KEYS: [&str; 8] = ["retries", "seed", "slots", "backoff", "remedies", "timeout", "stall", "priority"];

impl RunTable {
    /// Lays `over` on top.
    pub fn merge(&mut self, over: &Self) {
        self.seed = over.seed.or(self.seed);
        self.retries = over.retries.or(self.retries);
        self.slots = over.slots.clone().or_else(|| self.slots.take());
        for (below, above) in self.backoff.iter_mut().zip(over.backoff) {
            *below = above.or(*below);
        }
        self.remedies.extend(over.remedies.clone());
        self.timeout_s = over.timeout_s.or(self.timeout_s);
        self.stall_s = over.stall_s.or(self.stall_s);
        self.priority = over.priority.or(self.priority);
    }

    /// Returns the pauses between attempts.
    pub fn backoff(&self) -> Backoff {
        let [first_s, factor, most_s] = self.backoff;
        let default = Backoff::default();
        Backoff {
            first_s: first_s.unwrap_or(default.first_s),
            factor: factor.unwrap_or(default.factor),
            most_s: most_s.unwrap_or(default.most_s),
        }
    }

    /// Returns what is done about failures.
    pub fn remedies(&self) -> Remedies {
        let mut remedies = Remedies::default();
        for (name, is_on) in &self.remedies {
            if let Some(switch) = remedies.switch(name) {
                *switch = *is_on;
            }
        }
        remedies
    }
}

/// Reads `[executor]`.
pub fn parse_executor(key: &str, tree: &Tree, problems: &mut Vec<Diagnostic>) -> ExecutorTable {
    let Some(fields) = Fields::new(key, tree, &["local"], problems) else { return ExecutorTable::default() };
    let Some(local) = fields.tree("local") else { return ExecutorTable::default() };
    let key = format!("{key}.local");
    let Some(mut fields) = Fields::new(&key, local, &EXECUTOR_KEYS, problems) else { return ExecutorTable::default() };
    let slots = fields.slots("slots");
    let device = fields.text("device");
    let threads = fields.whole("threads").and_then(|threads| usize::try_from(threads).ok()).filter(|t| *t > 0);
    let peak_tflops = fields.number("peak_tflops", LEAST_PEAK_TFLOPS);
    let frozen_cache = fields.tree("frozen_cache");
    let worker = fields.text("worker").map(|(worker, spot)| (worker.into(), spot));
    let device = device.and_then(|(device, spot)| match is_device(&device) {
        true => Some(device),
        false => {
            problems.push(
                Diagnostic::new(format!("unknown device `{device}`"))
                    .at(&spot, "no such device")
                    .help("a device is `cpu`, `wgpu`, `wgpu:1`, `cuda` or `cuda:1`"),
            );
            None
        }
    });
    let frozen_cache = frozen_cache.and_then(|tree| parse_cache(&format!("{key}.frozen_cache"), tree, problems));
    ExecutorTable { slots, device, threads, peak_tflops, frozen_cache, worker }
}

/// Reads `frozen_cache`: a folder, and how much it may hold.
fn parse_cache(key: &str, tree: &Tree, problems: &mut Vec<Diagnostic>) -> Option<((String, Spot), f64)> {
    let mut fields = Fields::new(key, tree, &CACHE_KEYS, problems)?;
    fields.require("path", &tree.spot);
    fields.require("size", &tree.spot);
    let (path, size) = (fields.text("path"), fields.gib("size"));
    Some((path?, size?))
}

fn is_device(device: &str) -> bool {
    match device.split_once(':') {
        Some((kind, index)) => matches!(kind, "wgpu" | "cuda") && index.parse::<u32>().is_ok(),
        None => matches!(device, "cpu" | "wgpu" | "cuda"),
    }
}

/// Reads what a node's table says of how it runs.
pub fn parse_run(key: &str, fields: &mut Fields<'_, '_>, problems: &mut Vec<Diagnostic>) -> RunTable {
    let mut run = RunTable {
        seed: fields.whole("seed"),
        retries: fields.whole("retries").map(|retries| u32::try_from(retries).unwrap_or(u32::MAX)),
        slots: fields.slots("slots"),
        timeout_s: fields.seconds("timeout"),
        stall_s: fields.seconds("stall"),
        priority: fields.int("priority"),
        ..RunTable::default()
    };
    let inner = |name: &str| format!("{key}.{name}");
    if let Some(tree) = fields.tree("backoff")
        && let Some(mut fields) = Fields::new(&inner("backoff"), tree, &BACKOFF_KEYS, problems)
    {
        run.backoff = [fields.seconds("first"), fields.number("factor", 1.0), fields.seconds("most")];
    }
    if let Some(tree) = fields.tree("remedies")
        && let Some(mut fields) = Fields::new(&inner("remedies"), tree, &REMEDIES, problems)
    {
        let switch = |name: &str| Some((name.to_owned(), fields.truth(name)?));
        run.remedies = REMEDIES.into_iter().filter_map(switch).collect();
    }
    run
}
