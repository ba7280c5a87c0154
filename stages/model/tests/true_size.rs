//! The whole 5B model on this machine: drawn at random onto the disk, loaded as views of the files, run once at 512x512.
//!
//! Ignored by default: it writes 14 GB into the folder for temporary files and takes minutes. It prints what it measures.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use burn::module::Module;
use deepgen_contract::model::{ModelSpec, Preset};
use deepgen_model::bridge::Bridge;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::dit::Dit;
use deepgen_model::init::Init;
use deepgen_model::parts::{self, Parts};
use deepgen_model::random::noise;
use deepgen_model::vae::Vae;
use deepgen_model::vlm::{PromptBatch, Vlm};
use deepgen_model::weights::{Held, StoredType, WeightWriter, drain, specs};
use deepgen_model::{Device, Tensor};

/// Largest memory of its own that the process may take: mapped files are the system's to keep or drop.
const MAX_OWN_GIB: f64 = 12.0;

/// Returns a line of `/proc/self/status` in GiB.
fn status(key: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<f64>().unwrap() / (1 << 20) as f64
}

/// Watches the memory that is the process's own.
struct Watch {
    peak_kib: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
}

impl Watch {
    fn start() -> Self {
        let (peak_kib, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (peak, over) = (Arc::clone(&peak_kib), Arc::clone(&is_over));
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                peak.fetch_max((status("RssAnon") * (1 << 20) as f64) as u64, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { peak_kib, is_over }
    }

    /// Returns the peak since the last call in GiB.
    fn peak(&self) -> f64 {
        self.peak_kib.swap(0, Ordering::Relaxed) as f64 / (1 << 20) as f64
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

fn write<M: Module>(folder: &Path, file: &str, module: M) {
    let stem = file.trim_end_matches(".safetensors");
    let mut writer =
        WeightWriter::new(folder, stem, specs(&module, StoredType::Bf16), &Default::default(), u64::MAX).unwrap();
    drain(module, |name, data| writer.push(name, &data)).unwrap();
    writer.finish().unwrap();
}

fn draw(folder: &Path, spec: &ModelSpec) {
    let init = Init::new(1, &Device::flex());
    let base = &spec.base;
    write(folder, parts::VLM_FILE, Vlm::new(&init.at("vlm"), &base.vlm));
    write(folder, parts::DIT_FILE, Dit::new(&init.at("dit"), &base.dit));
    write(folder, parts::VAE_FILE, Vae::new(&init.at("vae"), &base.vae));
    let bridge = spec.bridge.as_ref().unwrap();
    let bridge = Bridge::new(&init.at("bridge"), bridge, &base.vlm.language, &base.dit).unwrap();
    write(folder, parts::BRIDGE_FILE, bridge);
    std::fs::write(folder.join(parts::SPEC_FILE), serde_json::to_string(spec).unwrap()).unwrap();
}

#[test]
#[ignore = "writes 14 GB and takes minutes: make test-true-size"]
fn the_whole_model_is_drawn_saved_loaded_and_run_within_this_machine() {
    let folder = tempfile::tempdir().unwrap();
    let watch = Watch::start();
    let started = Instant::now();
    let spec = ModelSpec { lora: None, ..Preset::Deepgen5b.spec() };
    draw(folder.path(), &spec);
    let bytes: u64 = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    println!(
        "drawn and written: {:.2} GB in {:.0} s, peak {:.1} GiB",
        bytes as f64 / 1e9,
        started.elapsed().as_secs_f64(),
        watch.peak()
    );

    let started = Instant::now();
    let device = Device::flex();
    let parts = Parts::load_held(folder.path(), &device, Held::AsStored).unwrap();
    let model = DeepGen::from_parts(parts).unwrap();
    println!("loaded: {:.2} s, peak {:.1} GiB", started.elapsed().as_secs_f64(), watch.peak());

    let started = Instant::now();
    let ids = (0..24).map(|i| 1000 + 37 * i).collect();
    let condition = model.condition(&PromptBatch::text(vec![ids])).unwrap();
    assert_eq!(condition.sequence.dims(), [1, 24 + 128, 4096]);
    assert!(condition.sequence.clone().abs().max().into_scalar::<f32>() == 0.0, "a fresh bridge gives zeros");
    println!("prompt read: {:.1} s, peak {:.1} GiB", started.elapsed().as_secs_f64(), watch.peak());

    let started = Instant::now();
    let latents = noise(1, "latents", [1, 16, 64, 64], &device);
    let velocity = model.velocity(latents, Tensor::from_floats([500.0], &device), &condition, &[]);
    assert_eq!(velocity.dims(), [1, 16, 64, 64]);
    let size = velocity.abs().mean().into_scalar::<f32>();
    assert!(size.is_finite() && size > 0.0, "{size}");
    println!("velocity at 512x512: {:.1} s, peak {:.1} GiB", started.elapsed().as_secs_f64(), watch.peak());
    println!("peak of the whole process, mapped files included: {:.1} GiB", status("VmHWM"));
    assert!(status("RssAnon") < MAX_OWN_GIB);
}
