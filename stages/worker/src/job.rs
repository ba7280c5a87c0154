//! The frame around every stage: reads `job.json`, opens the device, runs the stage, writes `outcome.json`.
//!
//! Knows the job directory, no stage's work. A panic, a signal and an error all end in an outcome that says what happened.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::base::AssembleSettings;
use deepgen_contract::event::WorkerEventKind;
use deepgen_contract::id::{Fingerprint, NodeName};
use deepgen_contract::job::{
    CHECKPOINTS_DIR, FailureCause, JOB_FILE, JOB_VERSION, JobInput, JobRemedies, JobSpec, METRICS_FILE, OUT_DIR,
    OUTCOME_FILE, Outcome,
};
use deepgen_contract::settings::Settings;
use deepgen_contract::train::FloatKind;
use deepgen_model::Device;

use crate::emit::{Emitter, Metrics};
use crate::error::{JobError, JobResult, OrFail};
use crate::gpu::GpuWatch;
use crate::meter::Meter;
use crate::{files, stages};

/// What a stage hands back.
pub enum JobEnd {
    /// The result is complete.
    Done(JobReport),
    /// A stop was asked for; a checkpoint of this step was written.
    Stopped(u64),
}

/// Final numbers and remarks of a finished stage.
#[derive(Debug, Default)]
pub struct JobReport {
    /// Named `group/name`.
    pub metrics: Metrics,
    /// Remarks for the report.
    pub notes: Vec<String>,
}

/// Files of a result that were made on the way, by their names in it: a checkpoint holds them, so that a resumed job leaves what an
/// undisturbed one would.
pub type KeptFiles = BTreeMap<String, Arc<Vec<u8>>>;

/// What a stage works with.
pub struct JobContext {
    /// The job.
    pub spec: JobSpec,
    /// Its directory.
    pub dir: PathBuf,
    /// Where it reports.
    pub emitter: Emitter,
    /// What it computes on, without autodiff.
    pub device: Device,
    /// Measures the steps of a training.
    pub meter: Meter,
    /// Files of the result that were made on the way, by their names in the result.
    kept: KeptFiles,
    stop: Arc<AtomicBool>,
}

impl JobContext {
    /// Returns the folder that becomes the artifact.
    pub fn out(&self) -> PathBuf {
        self.dir.join(OUT_DIR)
    }

    /// Writes a file of the result that later steps will not make again.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn keep_file(&mut self, name: &str, bytes: Vec<u8>) -> JobResult<()> {
        self.write_out(name, &bytes)?;
        self.kept.insert(name.to_owned(), Arc::new(bytes));
        Ok(())
    }

    /// Returns the files that were kept.
    pub fn kept_files(&self) -> &KeptFiles {
        &self.kept
    }

    /// Puts the kept files of a checkpoint in the place of those kept so far.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn restore_files(&mut self, files: KeptFiles) -> JobResult<()> {
        for name in self.kept.keys().filter(|name| !files.contains_key(*name)) {
            let path = self.out().join(name);
            fs::remove_file(&path).or_io(|| format!("remove {}", path.display()))?;
        }
        for (name, bytes) in &files {
            self.write_out(name, bytes)?;
        }
        self.kept = files;
        Ok(())
    }

    fn write_out(&self, name: &str, bytes: &[u8]) -> JobResult<()> {
        let path = self.out().join(name);
        let folder = path.parent().unwrap_or(&self.dir);
        fs::create_dir_all(folder).and_then(|()| fs::write(&path, bytes)).or_io(|| format!("write {}", path.display()))
    }

    /// Returns the folder for checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.dir.join(CHECKPOINTS_DIR)
    }

    /// Returns the input wired to `port`.
    ///
    /// # Errors
    /// When there is none.
    pub fn input(&self, port: &str) -> JobResult<&JobInput> {
        self.spec
            .inputs
            .get(port)
            .ok_or_else(|| JobError::input(format!("node {} has no input `{port}`", self.spec.node)))
    }

    /// Returns the folder of the input wired to `port`, which must hold `kind`.
    ///
    /// # Errors
    /// When there is none or it holds something else.
    pub fn input_path(&self, port: &str, kind: ArtifactKind) -> JobResult<PathBuf> {
        let input = self.input(port)?;
        if input.kind != kind {
            return Err(JobError::input(format!("input `{port}` holds {}, not {kind}", input.kind)));
        }
        Ok(input.path.clone())
    }

    /// Returns the path that a setting names, relative to the project's root.
    pub fn resolve(&self, path: &str) -> PathBuf {
        self.spec.project_root.join(path)
    }

    /// Says that this stage does not compute its batches in parts, if that was asked for; `why` says what else there is to do.
    pub fn warn_of_undivided(&mut self, why: &str) {
        let division = self.spec.remedies.micro_batch_division;
        if division > 1 {
            self.emitter
                .warn(format!("memory ran out before and micro-batches in {division} parts were asked for: {why}"));
        }
    }

    /// Returns true once a stop was asked for.
    pub fn is_stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl JobContext {
    /// Returns the context of work that is no node's: without inputs, its events in `dir`, its settings of no meaning.
    ///
    /// # Errors
    /// When `dir` cannot be written.
    pub fn outside_of_a_job(dir: &Path, device: Device) -> JobResult<Self> {
        fs::create_dir_all(dir).or_io(|| format!("create {}", dir.display()))?;
        let spec = JobSpec {
            version: JOB_VERSION,
            node: NodeName("none".into()),
            stage: "none".into(),
            fingerprint: Fingerprint([0; 32]),
            attempt: 1,
            seed: 0,
            device: "cpu".into(),
            threads: 1,
            project_root: dir.to_owned(),
            settings: Settings::Assemble(AssembleSettings { dtype: FloatKind::F32 }),
            inputs: BTreeMap::new(),
            earlier_attempts: Vec::new(),
            slot_ids: BTreeMap::new(),
            peak_tflops: None,
            frozen_cache: None,
            remedies: JobRemedies::default(),
        };
        let (emitter, meter) = (Emitter::open(dir)?, Meter::new(None, None));
        Ok(Self { spec, dir: dir.to_owned(), emitter, device, meter, kept: KeptFiles::new(), stop: Arc::default() })
    }
}

#[cfg(test)]
impl JobContext {
    /// Returns the context of a job without inputs in `dir`, as a first attempt or as one after `earlier`.
    pub fn for_test(dir: &Path, earlier: &[&Path]) -> Self {
        let mut context = Self::outside_of_a_job(dir, Device::flex()).unwrap();
        context.spec.earlier_attempts = earlier.iter().map(|path| path.to_path_buf()).collect();
        context
    }

    /// Asks for a stop, as a signal would.
    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Runs the job in `dir` and writes its outcome.
///
/// # Errors
/// When even the outcome cannot be written, or `job.json` cannot be read.
pub fn run(dir: &Path) -> anyhow::Result<Outcome> {
    let dir = dir.canonicalize().map_err(|error| anyhow::anyhow!("job directory {}: {error}", dir.display()))?;
    let path = dir.join(JOB_FILE);
    let text = fs::read_to_string(&path).map_err(|error| anyhow::anyhow!("read {}: {error}", path.display()))?;
    let spec: JobSpec = serde_json::from_str(&text).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    anyhow::ensure!(spec.version == JOB_VERSION, "{}: version {} is not {JOB_VERSION}", path.display(), spec.version);
    let started = Instant::now();
    // Inside the pool an operation starts on this thread instead of being handed over.
    let job = || deepgen_model::in_thread_pool(|| execute(spec, &dir));
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
    let outcome = match ended {
        Ok(Ok((JobEnd::Done(report), throughput))) => {
            let seconds = started.elapsed().as_secs_f64();
            Outcome::Done { metrics: report.metrics, notes: report.notes, seconds, throughput }
        }
        Ok(Ok((JobEnd::Stopped(step), _))) => Outcome::Stopped { step },
        Ok(Err(error)) => Outcome::Failed { cause: error.cause, message: error.message },
        Err(panic) => {
            let message = panic_message(panic.as_ref());
            Outcome::Failed { cause: panic_cause(&message), message }
        }
    };
    files::write_json(&dir.join(OUTCOME_FILE), &outcome)?;
    Ok(outcome)
}

/// Runs the stage; returns how it ended and what the machine made of it.
fn execute(spec: JobSpec, dir: &Path) -> JobResult<(JobEnd, Metrics)> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).or_io(|| "register a signal handler")?;
    }
    let mut emitter = Emitter::open(dir)?;
    let device = crate::device::open(&spec.device)?;
    emitter.emit(WorkerEventKind::Started { pid: std::process::id(), device: spec.device.clone() });
    let out = dir.join(OUT_DIR);
    if out.exists() {
        fs::remove_dir_all(&out).or_io(|| format!("clear {}", out.display()))?;
    }
    fs::create_dir_all(&out).or_io(|| format!("create {}", out.display()))?;
    let settings = spec.settings.clone();
    let meter = Meter::new(spec.peak_tflops, GpuWatch::of_device(&spec.device));
    let mut context = JobContext { spec, dir: dir.to_owned(), emitter, device, meter, kept: KeptFiles::new(), stop };
    match &settings {
        Settings::Train(_) => {}
        Settings::Rl(_) => {
            context.warn_of_undivided("this stage has none to divide; lower `rollout.prompts` or `sft.batch`");
        }
        Settings::Generate(_) => context.warn_of_undivided("this stage does not divide; lower `batch`"),
        _ => context.warn_of_undivided("this stage does not divide"),
    }
    let end = match &settings {
        Settings::Import(settings) => stages::import::run(settings, &mut context),
        Settings::Prepare(settings) => stages::prepare::run(settings, &mut context),
        Settings::Mix(settings) => stages::mix::run(settings, &mut context),
        Settings::Train(settings) => stages::train::run(settings, &mut context),
        Settings::Rl(settings) => stages::mrgrpo::run(settings, &mut context),
        Settings::Handoff(settings) => stages::handoff::run(settings, &mut context),
        Settings::Generate(settings) => stages::generate::run(settings, &mut context),
        Settings::Score(settings) => stages::score::run(settings, &mut context),
        Settings::BaseTokenizer(settings) => stages::base_tokenizer::run(settings, &mut context),
        Settings::BaseVae(settings) => stages::base_vae::run(settings, &mut context),
        Settings::BaseVlm(settings) => stages::base_vlm::run(settings, &mut context),
        Settings::BaseDit(settings) => stages::base_dit::run(settings, &mut context),
        Settings::Assemble(settings) => stages::assemble::run(settings, &mut context),
        Settings::Command(_) => Err(JobError::input("a command is started by deepgen itself, without a worker")),
    }?;
    let lines = context.emitter.metric_lines();
    if !lines.is_empty() {
        files::write_text(&context.out().join(METRICS_FILE), &(lines.join("\n") + "\n"))
            .or_io(|| format!("write {METRICS_FILE}"))?;
    }
    Ok((end, context.meter.summary()))
}

/// What a device says of itself when its memory is full. `cubecl-runtime` 0.11 (`server/base.rs`): an allocation that failed, one
/// beyond the device, one while a kernel was started; the CUDA driver's own name of it; wgpu 30 (`wgpu-hal/src/lib.rs`,
/// `wgpu-core/src/device/mod.rs`).
const FULL_MEMORY: [&str; 6] = [
    "out of device memory",
    "can't allocate buffer of size",
    "out-of-memory error",
    "cuda_error_out_of_memory",
    "out of memory",
    "not enough memory left",
];

/// Returns why a worker panicked: memory that is full on a device can be told from a broken invariant by its message alone.
pub fn panic_cause(message: &str) -> FailureCause {
    let message = message.to_lowercase();
    match FULL_MEMORY.iter().any(|words| message.contains(words)) {
        true => FailureCause::OutOfMemory,
        false => FailureCause::Internal,
    }
}

/// Returns what a panic said.
pub fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into());
    format!("the worker panicked: {text}; stderr.log holds the place")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_memory_of_a_device_is_told_from_a_bug() {
        for message in [
            "called `Result::unwrap()` on an `Err` value: out of device memory allocating 8589934592 bytes",
            "can't allocate buffer of size: 99999999999",
            "An out-of-memory error happened during launch\nCaused by:\n  ...",
            "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
            "wgpu error: Out of Memory",
            "wgpu error: Not enough memory left.",
        ] {
            assert_eq!(panic_cause(message), FailureCause::OutOfMemory, "{message}");
        }
        assert_eq!(panic_cause("index out of bounds: the len is 3"), FailureCause::Internal);
    }
}
