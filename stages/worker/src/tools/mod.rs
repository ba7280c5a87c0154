//! `deepgen-worker tool DIR`: work outside of any pipeline, as `DIR/tool.json` asks for it.
//!
//! Says how far it is in `events.jsonl` and how it ended in `outcome.json`, as a job does.

mod export;
mod generate;
mod import;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use deepgen_contract::job::{OUTCOME_FILE, Outcome};
use deepgen_contract::tool::{TOOL_FILE, TOOL_VERSION, ToolRequest, ToolSpec};

use crate::emit::Emitter;
use crate::error::JobResult;
use crate::files;
use crate::job::{JobReport, panic_cause, panic_message};

/// Does what `dir/tool.json` asks for.
///
/// # Errors
/// When the request cannot be read or the outcome cannot be written.
pub fn run(dir: &Path) -> anyhow::Result<Outcome> {
    let path = dir.join(TOOL_FILE);
    let text = std::fs::read_to_string(&path).map_err(|error| anyhow::anyhow!("read {}: {error}", path.display()))?;
    let spec: ToolSpec = serde_json::from_str(&text).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    anyhow::ensure!(spec.version == TOOL_VERSION, "{}: version {} is not {TOOL_VERSION}", path.display(), spec.version);
    let started = Instant::now();
    let work = || deepgen_model::in_thread_pool(|| execute(&spec, dir));
    let outcome = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(Ok(report)) => {
            let seconds = started.elapsed().as_secs_f64();
            Outcome::Done { metrics: report.metrics, notes: report.notes, seconds, throughput: BTreeMap::new() }
        }
        Ok(Err(error)) => Outcome::Failed { cause: error.cause, message: error.message },
        Err(panic) => {
            let message = panic_message(panic.as_ref());
            Outcome::Failed { cause: panic_cause(&message), message }
        }
    };
    files::write_json(&dir.join(OUTCOME_FILE), &outcome)?;
    Ok(outcome)
}

fn execute(spec: &ToolSpec, dir: &Path) -> JobResult<JobReport> {
    let mut emitter = Emitter::open(dir)?;
    match &spec.request {
        ToolRequest::Import(request) => import::run(request, &mut emitter),
        ToolRequest::Export(request) => export::run(request, &mut emitter),
        ToolRequest::Generate(request) => generate::run(request, &spec.device, &mut emitter),
    }
}
