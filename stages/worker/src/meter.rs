//! Where the time of a training goes, and what the machine makes of it: seconds of a step by what they were spent on, images and
//! operations a second, memory.
//!
//! Knows durations and counts, not what is computed. Its numbers depend on the clock and the machine: they are shown and kept
//! beside the result, never in it.

use std::time::{Duration, Instant};

use crate::emit::Metrics;
use crate::gpu::GpuWatch;

/// Bytes of a GiB.
const GIB: f64 = (1u64 << 30) as f64;

/// Sums over some steps.
#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    steps: u64,
    images: u64,
    /// Operations, of the steps where they are known.
    flops: f64,
    seconds: f64,
    /// Waiting for the loader.
    data: f64,
    /// Copying state, and waiting until the checkpoint before was written.
    checkpoint: f64,
}

impl Spent {
    fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.images += other.images;
        self.flops += other.flops;
        self.seconds += other.seconds;
        self.data += other.data;
        self.checkpoint += other.checkpoint;
    }

    /// Returns means over the steps, named `group/name`.
    fn metrics(&self, peak_flops: Option<f64>) -> Metrics {
        let (steps, seconds) = (self.steps.max(1) as f64, self.seconds.max(1e-9));
        let mut metrics = Metrics::from([
            ("time/step_seconds".to_owned(), self.seconds / steps),
            ("time/data_wait_seconds".to_owned(), self.data / steps),
            ("time/checkpoint_seconds".to_owned(), self.checkpoint / steps),
            ("time/compute_seconds".to_owned(), (self.seconds - self.data - self.checkpoint).max(0.0) / steps),
        ]);
        if self.images > 0 {
            metrics.insert("throughput/images_per_second".to_owned(), self.images as f64 / seconds);
        }
        if self.flops > 0.0 {
            metrics.insert("throughput/flops_per_step".to_owned(), self.flops / steps);
            metrics.insert("throughput/tflops".to_owned(), self.flops / seconds / 1e12);
            if let Some(peak) = peak_flops {
                metrics.insert("throughput/mfu".to_owned(), self.flops / seconds / peak);
            }
        }
        metrics
    }
}

/// Measures the steps of one attempt.
pub struct Meter {
    /// Operations a second that the device is said to reach at most.
    peak_flops: Option<f64>,
    gpu: Option<GpuWatch>,
    /// When the current window began, and what of it was spent on something that is no step.
    begun: Instant,
    paused: Duration,
    window: Spent,
    whole: Spent,
}

impl Meter {
    /// Starts the clock. Without `peak_tflops` the peak is the known one of the GPU that `gpu` watches, if it computes in bf16.
    pub fn new(peak_tflops: Option<f64>, gpu: Option<GpuWatch>) -> Self {
        let now = Instant::now();
        let peak_flops = peak_tflops.map(|tflops| tflops * 1e12);
        Self { peak_flops, gpu, begun: now, paused: Duration::ZERO, window: Spent::default(), whole: Spent::default() }
    }

    /// Says that products are computed in bf16: then the GPU's known peak stands in for one that is not set.
    pub fn computes_in_bf16(&mut self) {
        if self.peak_flops.is_none() {
            self.peak_flops = self.gpu.as_ref().and_then(GpuWatch::known_bf16_tflops).map(|tflops| tflops * 1e12);
        }
    }

    /// Forgets the window: what comes now is timed from here.
    pub fn restart(&mut self) {
        self.window = Spent::default();
        (self.begun, self.paused) = (Instant::now(), Duration::ZERO);
    }

    /// Counts the time since `begun` as waiting for data.
    pub fn waited_since(&mut self, begun: Instant) {
        self.window.data += begun.elapsed().as_secs_f64();
    }

    /// Counts the time since `begun` as the stall of a checkpoint, and returns it in seconds.
    pub fn saved_since(&mut self, begun: Instant) -> f64 {
        let seconds = begun.elapsed().as_secs_f64();
        self.window.checkpoint += seconds;
        seconds
    }

    /// Leaves out the time since `begun`: validation and samples belong to no step.
    pub fn leave_out_since(&mut self, begun: Instant) {
        self.paused += begun.elapsed();
    }

    /// Counts what a step works on.
    pub fn count(&mut self, images: u64, flops: Option<f64>) {
        self.window.images += images;
        self.window.flops += flops.unwrap_or(0.0);
    }

    /// Counts a step.
    pub fn step(&mut self) {
        self.window.steps += 1;
    }

    /// Closes the window: returns its numbers and begins the next one.
    pub fn take(&mut self) -> Metrics {
        self.window.seconds = self.begun.elapsed().saturating_sub(self.paused).as_secs_f64();
        let mut metrics = self.window.metrics(self.peak_flops);
        metrics.extend(self.machine(false));
        self.whole.add(&self.window);
        self.restart();
        metrics
    }

    /// Returns the numbers of all closed windows together; nothing when there was no step.
    pub fn summary(&self) -> Metrics {
        if self.whole.steps == 0 {
            return Metrics::new();
        }
        let mut metrics = self.whole.metrics(self.peak_flops);
        metrics.extend(self.machine(true));
        metrics
    }

    /// Memory of the process, and what is seen of the GPU: of the whole attempt, or since it was last asked for.
    fn machine(&self, is_whole: bool) -> Metrics {
        let peak = peak_bytes(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
        let mut metrics: Metrics =
            peak.map(|bytes| ("memory/process_peak_gib".to_owned(), bytes / GIB)).into_iter().collect();
        if let Some(gpu) = &self.gpu {
            metrics.extend(gpu.metrics(is_whole));
        }
        metrics
    }
}

/// Reads the most memory that a process has had, in bytes, from its `/proc` status.
fn peak_bytes(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok().map(|kib| kib * 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_split_into_what_it_was_spent_on() {
        let spent = Spent { steps: 4, images: 32, flops: 8e12, seconds: 2.0, data: 0.5, checkpoint: 0.3 };
        let metrics = spent.metrics(Some(1e13));
        for (name, expected) in [
            ("time/step_seconds", 0.5),
            ("time/data_wait_seconds", 0.125),
            ("time/checkpoint_seconds", 0.075),
            ("time/compute_seconds", 0.3),
            ("throughput/images_per_second", 16.0),
            ("throughput/flops_per_step", 2e12),
            ("throughput/tflops", 4.0),
            ("throughput/mfu", 0.4),
        ] {
            assert!((metrics[name] - expected).abs() < 1e-12 * expected, "{name} is {}", metrics[name]);
        }
        assert!(!spent.metrics(None).contains_key("throughput/mfu"), "a peak is not guessed");
        assert!(!Spent { flops: 0.0, ..spent }.metrics(Some(1e13)).contains_key("throughput/tflops"));
    }

    #[test]
    fn pauses_and_closed_windows_are_no_part_of_the_next_one() {
        let mut meter = Meter::new(None, None);
        assert!(meter.summary().is_empty());
        let pause = Instant::now();
        std::thread::sleep(Duration::from_millis(60));
        meter.leave_out_since(pause);
        let wait = Instant::now();
        std::thread::sleep(Duration::from_millis(5));
        meter.waited_since(wait);
        meter.count(8, Some(1e6));
        meter.step();
        let first = meter.take();
        assert!(first["time/step_seconds"] < 0.05 && first["time/data_wait_seconds"] >= 0.005, "{first:?}");
        meter.step();
        let second = meter.take();
        assert_eq!(second["time/data_wait_seconds"], 0.0);
        assert!(!second.contains_key("throughput/images_per_second"));
        assert_eq!(meter.summary()["throughput/flops_per_step"], 5e5);
    }

    #[test]
    fn the_peak_of_memory_is_read_from_the_status() {
        assert_eq!(peak_bytes("Name:\ta\nVmPeak:\t  9 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n"), Some(2_097_152.0));
        assert_eq!(peak_bytes("Name:\ta\n"), None);
    }
}
