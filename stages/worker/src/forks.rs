//! Several things computed at a time from the same weights, each on a thread of its own.
//!
//! Burn keeps tapes that share a tensor under one lock, so that backward passes on them wait for each other. A fork shares
//! the numbers of the weights and not their tape. Knows threads, not what is computed: results come back in order and do
//! not depend on the number of threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use burn::module::Module;

/// Stack of a thread that computes, as large as that of a main thread: a tape is walked with it.
const STACK_BYTES: usize = 8 << 20;

/// Returns `compute(weights, i)` for i in 0..`count`, computed on at most `threads` threads.
///
/// With one thread the weights are `model` itself; with more they are forks of it, so gradients belong to the fork.
pub fn on_forks<M: Module, R: Send>(
    model: &M,
    threads: usize,
    count: usize,
    compute: impl Fn(&M, usize) -> R + Sync,
) -> Vec<R> {
    let threads = threads.min(count);
    let devices = model.devices();
    let Some(device) = devices.first().filter(|_| threads > 1) else {
        return (0..count).map(|at| compute(model, at)).collect();
    };
    let forks: Vec<M> = (0..threads).map(|_| model.clone().fork(device)).collect();
    let results: Vec<Mutex<Option<R>>> = (0..count).map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let work = |fork: M| {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(result) = results.get(at) else { break };
            let made = compute(&fork, at);
            *result.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(made);
        }
    };
    thread::scope(|scope| {
        for fork in forks {
            let builder = thread::Builder::new().name("micro-batch".into()).stack_size(STACK_BYTES);
            // Without a thread to be had the others do its share; the last resort is this one.
            if builder.spawn_scoped(scope, || work(fork)).is_err() {
                tracing::warn!("no thread could be started; micro-batches take turns");
            }
        }
    });
    let taken = |result: Mutex<Option<R>>| result.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let left = |(at, result)| taken(result).unwrap_or_else(|| compute(model, at));
    results.into_iter().enumerate().map(left).collect()
}
