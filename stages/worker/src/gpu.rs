//! What `nvidia-smi` says of the GPU that a job computes on: its name, the memory in use, how busy it is.
//!
//! Knows the tool's lines, not what the job does. The tool is asked now and then by a thread of its own; where there is none, or
//! the device is no NVIDIA GPU, nothing is watched.

use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::emit::Metrics;

/// Time between two questions.
const PERIOD: Duration = Duration::from_secs(10);
/// MiB to a GiB.
const MIB: f64 = 1024.0;

/// Most dense bf16 operations a second, in tera, by a part of the name that the driver gives: NVIDIA's data sheets of the H100
/// (SXM 1,979 and PCIe 1,513 with sparsity, which doubles them), H200 (1,979 with sparsity), A100 (312) and L40S (362.05).
const BF16_TFLOPS: [(&str, f64); 5] =
    [("H200", 989.5), ("H100 80GB HBM3", 989.5), ("H100 PCIe", 756.5), ("A100", 312.0), ("L40S", 362.05)];

/// One answer of the tool.
#[derive(Debug, Clone, PartialEq)]
struct Reading {
    name: String,
    memory_gib: f64,
    /// Share of the last moments in which a kernel ran, 0..=1.
    utilisation: f64,
}

/// Readings of some time.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    count: f64,
    utilisation: f64,
    memory_gib: f64,
}

impl Seen {
    fn add(&mut self, reading: &Reading) {
        self.count += 1.0;
        self.utilisation += reading.utilisation;
        self.memory_gib = self.memory_gib.max(reading.memory_gib);
    }

    fn metrics(&self) -> Metrics {
        match self.count > 0.0 {
            true => Metrics::from([
                ("memory/gpu_peak_gib".to_owned(), self.memory_gib),
                ("throughput/gpu_utilisation".to_owned(), self.utilisation / self.count),
            ]),
            false => Metrics::new(),
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    since_last: Seen,
    whole: Seen,
}

/// Watches a GPU until it is dropped.
pub struct GpuWatch {
    name: String,
    shared: Arc<Mutex<Shared>>,
    /// The thread ends when this goes away.
    _alive: Sender<()>,
}

impl GpuWatch {
    /// Watches the GPU behind a device such as `cuda:1`; nothing where it cannot be watched.
    pub fn of_device(device: &str) -> Option<Self> {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let id = gpu_id(device, visible.as_deref())?;
        let first = ask(&id)?;
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (alive, ended) = channel();
        let (name, seen) = (first.name.clone(), Arc::clone(&shared));
        let watch = move || {
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(PERIOD) {
                if let (Some(reading), Ok(mut shared)) = (ask(&id), seen.lock()) {
                    shared.since_last.add(&reading);
                    shared.whole.add(&reading);
                }
            }
        };
        std::thread::Builder::new().name("gpu-watch".into()).spawn(watch).ok()?;
        Some(Self { name, shared, _alive: alive })
    }

    /// Returns the most dense bf16 operations a second, in tera, if this GPU is one of the known ones.
    pub fn known_bf16_tflops(&self) -> Option<f64> {
        BF16_TFLOPS.iter().find(|(part, _)| self.name.contains(part)).map(|(_, tflops)| *tflops)
    }

    /// Returns the readings of the whole time, or those since it was last asked for them.
    pub fn metrics(&self, is_whole: bool) -> Metrics {
        let Ok(mut shared) = self.shared.lock() else { return Metrics::new() };
        match is_whole {
            true => shared.whole.metrics(),
            false => std::mem::take(&mut shared.since_last).metrics(),
        }
    }
}

/// Returns what `nvidia-smi` calls the GPU of a device: its place among the visible ones, if only some are.
fn gpu_id(device: &str, visible: Option<&str>) -> Option<String> {
    let index = match device.split_once(':') {
        Some(("cuda", index)) => index.parse().ok()?,
        None if device == "cuda" => 0usize,
        _ => return None,
    };
    match visible {
        Some(visible) => visible.split(',').nth(index).map(|id| id.trim().to_owned()).filter(|id| !id.is_empty()),
        None => Some(index.to_string()),
    }
}

fn ask(id: &str) -> Option<Reading> {
    let mut command = Command::new("nvidia-smi");
    command.args(["--query-gpu=name,memory.used,utilization.gpu", "--format=csv,noheader,nounits", "-i", id]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

/// Reads `NVIDIA H100 80GB HBM3, 5120, 97`.
fn parse(text: &str) -> Option<Reading> {
    let mut fields = text.lines().next()?.split(',').map(str::trim);
    let (name, memory, busy) = (fields.next()?, fields.next()?, fields.next()?);
    let memory_gib = memory.parse::<f64>().ok()? / MIB;
    Some(Reading { name: name.to_owned(), memory_gib, utilisation: busy.parse::<f64>().ok()? / 100.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(name: &str) -> GpuWatch {
        GpuWatch { name: name.into(), shared: Arc::default(), _alive: channel().0 }
    }

    #[test]
    fn a_line_of_the_tool_is_read_and_one_without_numbers_is_not() {
        let reading = parse("NVIDIA H100 80GB HBM3, 5120, 97\n").unwrap();
        assert_eq!((reading.memory_gib, reading.utilisation), (5.0, 0.97));
        assert_eq!(parse("NVIDIA H100 80GB HBM3, [N/A], [N/A]"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_device_is_found_among_the_visible_ones() {
        assert_eq!(gpu_id("cuda", None), Some("0".into()));
        assert_eq!(gpu_id("cuda:2", None), Some("2".into()));
        assert_eq!(gpu_id("cuda:1", Some("4,7")), Some("7".into()));
        assert_eq!(gpu_id("cuda:1", Some("4")), None);
        assert_eq!(gpu_id("cpu", None), None);
        assert_eq!(gpu_id("wgpu:0", None), None);
    }

    #[test]
    fn a_peak_is_known_for_named_cards_only() {
        assert_eq!(watch("NVIDIA H100 80GB HBM3").known_bf16_tflops(), Some(989.5));
        assert_eq!(watch("NVIDIA A100-SXM4-80GB").known_bf16_tflops(), Some(312.0));
        assert_eq!(watch("NVIDIA GeForce GTX 1080").known_bf16_tflops(), None);
    }

    #[test]
    fn readings_since_the_last_question_are_taken_and_those_of_all_time_stay() {
        let watch = watch("a");
        let reading = |memory_gib, utilisation| Reading { name: "a".into(), memory_gib, utilisation };
        for reading in [reading(1.0, 0.5), reading(3.0, 0.7)] {
            let mut shared = watch.shared.lock().unwrap();
            shared.since_last.add(&reading);
            shared.whole.add(&reading);
        }
        let metrics = watch.metrics(false);
        assert_eq!(metrics["memory/gpu_peak_gib"], 3.0);
        assert!((metrics["throughput/gpu_utilisation"] - 0.6).abs() < 1e-12);
        assert!(watch.metrics(false).is_empty());
        assert_eq!(watch.metrics(true)["memory/gpu_peak_gib"], 3.0);
    }
}
