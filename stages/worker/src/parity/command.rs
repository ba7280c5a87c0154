//! The command: finds cases, runs each, prints a line per tensor and a summary.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use deepgen_model::Device;
use serde::Serialize;

use super::case::Case;
use super::compare::{Checker, GRADS, Line, OUTPUTS};
use super::error::{ParityError, ParityResult};
use super::kind::Kind;
use super::{autoencoder, clip, connector, curve, diffusion, language, optimizer, policy, preprocess, whole};
use crate::device;

/// How the command is called.
pub const USAGE: &str = "deepgen-worker parity DIR [--case NAME] [--device cpu|wgpu|cuda] [--json]
                                 compare with the reference tensors of the cases in DIR";

/// The command's arguments.
struct Arguments {
    folder: PathBuf,
    case: Option<String>,
    device: String,
    is_json: bool,
}

impl Arguments {
    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut parsed = Self { folder: PathBuf::new(), case: None, device: "cpu".into(), is_json: false };
        let mut rest = arguments.iter();
        let mut folders = Vec::new();
        while let Some(argument) = rest.next() {
            let mut value = || rest.next().cloned().ok_or_else(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--case" => parsed.case = Some(value()?),
                "--device" => parsed.device = value()?,
                "--json" => parsed.is_json = true,
                option if option.starts_with('-') => return Err(format!("there is no option {option}")),
                folder => folders.push(PathBuf::from(folder)),
            }
        }
        match <[PathBuf; 1]>::try_from(folders) {
            Ok([folder]) => Ok(Self { folder, ..parsed }),
            Err(folders) => Err(format!("one folder of cases is needed, not {}", folders.len())),
        }
    }
}

/// What came of one case.
#[derive(Serialize)]
struct Outcome {
    case: String,
    lines: Vec<Line>,
    error: Option<String>,
}

impl Outcome {
    fn num_failed(&self) -> usize {
        self.lines.iter().filter(|line| !line.passed).count() + usize::from(self.error.is_some())
    }
}

/// Runs the command; the exit code is 0 when everything passed, 1 when something did not, 2 for a wrong command line.
pub fn run(arguments: &[String]) -> ExitCode {
    let arguments = match Arguments::parse(arguments) {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("error: {message}\nusage: {USAGE}");
            return ExitCode::from(2);
        }
    };
    let opened = device::open(&arguments.device).map_err(ParityError::from);
    let found = opened.and_then(|device| Ok((device, find(&arguments.folder, arguments.case.as_deref())?)));
    let (device, folders) = match found {
        Ok(found) => found,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let is_cpu = arguments.device == "cpu";
    let mut outcomes = Vec::new();
    for folder in folders {
        let outcome = deepgen_model::in_thread_pool(|| run_case(&folder, &device.clone().autodiff(), is_cpu));
        print(&outcome, arguments.is_json);
        outcomes.push(outcome);
    }
    let num_failed: usize = outcomes.iter().map(Outcome::num_failed).sum();
    print_summary(&outcomes, arguments.is_json);
    if num_failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Returns the folders of cases: `folder` itself if it is one, else those in it; of these, the one called `wanted`.
fn find(folder: &Path, wanted: Option<&str>) -> ParityResult<Vec<PathBuf>> {
    let io = |source| ParityError::Io { path: folder.into(), source };
    if folder.join("config.json").is_file() && wanted.is_none() {
        return Ok(vec![folder.into()]);
    }
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        // A hidden folder is no case; any other one is, so that a case without its config is an error.
        let is_hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if path.is_dir() && !is_hidden {
            folders.push(path);
        }
    }
    folders.sort();
    let name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if let Some(wanted) = wanted {
        let names = folders.iter().map(name).collect::<Vec<_>>().join(", ");
        folders.retain(|path| name(path) == wanted);
        if folders.is_empty() {
            let message = format!("{} holds no case `{wanted}`; it holds: {names}", folder.display());
            return Err(ParityError::NoCase(message));
        }
    }
    if folders.is_empty() {
        return Err(ParityError::NoCase(format!("{} holds no case", folder.display())));
    }
    Ok(folders)
}

fn run_case(folder: &Path, device: &Device, is_cpu: bool) -> Outcome {
    let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let result = catch_unwind(AssertUnwindSafe(|| compare(folder, device, is_cpu)));
    let result = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(ParityError::Panic(text.unwrap_or("without a message").to_owned()))
    });
    match result {
        Ok(lines) => Outcome { case: name, lines, error: None },
        Err(error) => Outcome { case: name, lines: Vec::new(), error: Some(error.to_string()) },
    }
}

/// A part's comparison.
type Comparison = fn(&Case, &mut Checker) -> ParityResult<()>;

/// Returns the comparison of a kind and the files that it covers whole.
fn comparison(kind: Kind) -> (Comparison, &'static [&'static str]) {
    match kind {
        Kind::AdamwSchedule => (optimizer::adamw, &[OUTPUTS]),
        Kind::ClipTextImage => (clip::run, &[OUTPUTS]),
        Kind::Connector => (connector::run, &[OUTPUTS, GRADS]),
        Kind::DeepgenI2iGenerate | Kind::DeepgenT2iGenerate => (whole::generate, &[OUTPUTS]),
        Kind::DeepgenI2iLoss | Kind::DeepgenT2iLoss => (whole::loss, &[OUTPUTS, GRADS]),
        Kind::DeepgenModel => (whole::weights, &[]),
        Kind::FlowMatchSampler => (diffusion::sampler, &[OUTPUTS]),
        Kind::GrpoSde => (policy::run, &[OUTPUTS]),
        Kind::Lora => (language::lora, &[OUTPUTS, GRADS, "merged.safetensors"]),
        Kind::Qwen25vlFull => (language::full, &[OUTPUTS, GRADS]),
        Kind::Qwen25vlPreprocess => (preprocess::run, &[OUTPUTS]),
        Kind::Qwen25vlText => (language::text, &[OUTPUTS]),
        Kind::Qwen25vlVision => (language::vision, &[OUTPUTS, GRADS]),
        Kind::Sd3Transformer => (diffusion::uniform, &[OUTPUTS, GRADS]),
        Kind::Sd3TransformerDynamic => (diffusion::ragged, &[OUTPUTS, GRADS]),
        Kind::Sd3Vae => (autoencoder::run, &[OUTPUTS, GRADS]),
        Kind::TrainCurve => (curve::run, &[OUTPUTS]),
    }
}

fn compare(folder: &Path, device: &Device, is_cpu: bool) -> ParityResult<Vec<Line>> {
    let case = Case::open(folder, device)?;
    let (comparison, files) = comparison(case.kind);
    let mut check = Checker::new(&case, files, is_cpu)?;
    comparison(&case, &mut check)?;
    check.finish()
}

fn print(outcome: &Outcome, is_json: bool) {
    let mut out = std::io::stdout().lock();
    // A reader that went away wants no more lines.
    let _ = write_outcome(&mut out, outcome, is_json);
}

fn write_outcome(out: &mut impl Write, outcome: &Outcome, is_json: bool) -> std::io::Result<()> {
    if is_json {
        return writeln!(out, "{}", serde_json::to_string(outcome).map_err(std::io::Error::other)?);
    }
    let case = &outcome.case;
    for line in &outcome.lines {
        let verdict = if line.passed { "pass" } else { "FAIL" };
        let limit = if line.limit == 0.0 { "exact".to_owned() } else { format!("{:.0e}", line.limit) };
        let note = if line.note.is_empty() { String::new() } else { format!("  ({})", line.note) };
        writeln!(
            out,
            "{verdict}  {case}  {}  max {:.1e}  rel {:.1e}  limit {limit}{note}",
            line.tensor, line.max_abs, line.relative
        )?;
    }
    if let Some(error) = &outcome.error {
        writeln!(out, "FAIL  {case}  error: {error}")?;
    }
    Ok(())
}

fn print_summary(outcomes: &[Outcome], is_json: bool) {
    let num_cases = outcomes.len();
    let passed = outcomes.iter().filter(|outcome| outcome.num_failed() == 0).count();
    let num_lines: usize = outcomes.iter().map(|outcome| outcome.lines.len()).sum();
    let num_failed: usize = outcomes.iter().map(Outcome::num_failed).sum();
    let mut out = std::io::stdout().lock();
    let _ = if is_json {
        let summary = serde_json::json!({ "cases": num_cases, "cases_passed": passed, "comparisons": num_lines,
            "failures": num_failed });
        writeln!(out, "{summary}")
    } else {
        for outcome in outcomes.iter().filter(|outcome| outcome.num_failed() > 0) {
            let _ = writeln!(out, "FAIL  {}: {} of {}", outcome.case, outcome.num_failed(), outcome.lines.len());
        }
        writeln!(out, "{passed} of {num_cases} cases pass; {num_lines} comparisons, {num_failed} failures")
    };
}
