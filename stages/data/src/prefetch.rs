//! Runs a numbered job ahead of its consumer on several threads, in bounded memory, and hands results out in order.
//!
//! The result of a number must not depend on other numbers; then the order and the results are those of one thread.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

struct State<T> {
    /// Next number to hand out.
    wanted: u64,
    /// Next number that a thread takes up.
    next: u64,
    end: u64,
    ready: BTreeMap<u64, T>,
    stopped: bool,
    /// A thread ended by a panic.
    panicked: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    depth: u64,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No code panics while it holds the lock, so its content is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Results of a numbered job, in order.
pub struct Prefetch<T> {
    shared: Arc<Shared<T>>,
    threads: Vec<JoinHandle<()>>,
}

impl<T: Send + 'static> Prefetch<T> {
    /// Starts `num_threads` threads that run `job` for `numbers`, at most `depth` ahead of the consumer; both are at
    /// least 1.
    pub fn new(
        numbers: Range<u64>,
        depth: usize,
        num_threads: usize,
        job: impl Fn(u64) -> T + Send + Sync + 'static,
    ) -> Self {
        let Range { start, end } = numbers;
        let ready = BTreeMap::new();
        let state = State { wanted: start, next: start, end, ready, stopped: false, panicked: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), depth: depth.max(1) as u64 });
        let job = Arc::new(job);
        let threads = (0..num_threads.max(1)).map(|_| {
            let (shared, job) = (Arc::clone(&shared), Arc::clone(&job));
            std::thread::spawn(move || run(&shared, &*job))
        });
        let threads = threads.collect();
        Self { shared, threads }
    }
}

fn run<T>(shared: &Shared<T>, job: &dyn Fn(u64) -> T) {
    let _guard = PanicGuard(shared);
    loop {
        let mut state = shared.lock();
        while !state.stopped && state.next < state.end && state.next >= state.wanted + shared.depth {
            state = shared.wait(state);
        }
        if state.stopped || state.next >= state.end {
            return;
        }
        let number = state.next;
        state.next += 1;
        drop(state);
        let result = job(number);
        shared.lock().ready.insert(number, result);
        shared.changed.notify_all();
    }
}

/// Tells the consumer when a thread ends by a panic, which would otherwise leave it waiting.
struct PanicGuard<'a, T>(&'a Shared<T>);

impl<T> Drop for PanicGuard<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().panicked = true;
            self.0.changed.notify_all();
        }
    }
}

impl<T> Iterator for Prefetch<T> {
    type Item = T;

    /// # Panics
    /// When a job panicked.
    fn next(&mut self) -> Option<T> {
        let mut state = self.shared.lock();
        loop {
            let number = state.wanted;
            if number >= state.end {
                return None;
            }
            if let Some(result) = state.ready.remove(&number) {
                state.wanted += 1;
                drop(state);
                self.shared.changed.notify_all();
                return Some(result);
            }
            assert!(!state.panicked, "a loader thread panicked");
            state = self.shared.wait(state);
        }
    }
}

impl<T> Drop for Prefetch<T> {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic was already told to the consumer.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn results_come_in_order_whatever_the_threads_do() {
        for (depth, num_threads) in [(1, 1), (3, 2), (8, 4)] {
            let job = |n: u64| {
                if n.is_multiple_of(3) {
                    std::thread::yield_now();
                }
                n * n
            };
            let all: Vec<u64> = Prefetch::new(5..300, depth, num_threads, job).collect();
            assert_eq!(all, (5..300).map(|n| n * n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn threads_stay_within_the_depth_and_end_when_dropped() {
        let started = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&started);
        let mut results = Prefetch::new(0..u64::MAX, 4, 3, move |n| {
            count.fetch_add(1, Ordering::SeqCst);
            n
        });
        for expected in 0..10 {
            assert_eq!(results.next(), Some(expected));
        }
        drop(results);
        assert!((10..=14).contains(&started.load(Ordering::SeqCst)));
    }

    #[test]
    #[should_panic(expected = "a loader thread panicked")]
    fn a_panic_reaches_the_consumer() {
        let results = Prefetch::new(0..10, 2, 1, |n| if n == 4 { panic!("job {n}") } else { n });
        assert_eq!(results.count(), 10);
    }
}
