//! `export`: a weights folder into a foreign layout.

use deepgen_contract::tool::{ExportLayout, ExportRequest};

use crate::emit::Emitter;
use crate::error::{JobError, JobResult};
use crate::foreign::source::Collected;
use crate::foreign::target;
use crate::job::JobReport;

/// Writes the weights in the layout asked for.
///
/// # Errors
/// When the weights do not fit their own description, or the layout has no place for what they hold.
pub fn run(request: &ExportRequest, emitter: &mut Emitter) -> JobResult<JobReport> {
    if request.out.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(JobError::input(format!("{} is not empty", request.out.display())));
    }
    let found = Collected::open(&request.weights)?;
    let spec = found.spec(None)?;
    target::verify(&found, &spec)?;
    let mut progress = |done: u64, total: u64| emitter.progress(done >> 20, total >> 20, "MiB");
    let (out, dtype) = (&request.out, request.dtype);
    let mut notes = Vec::new();
    match request.layout {
        ExportLayout::Diffusers => {
            target::write_folders(&found, &spec, out, dtype, &mut progress)?;
            if found.lora.is_some() {
                notes.push("the adapters were added into the weights they adapt, as in the release".into());
            }
            if found.conditioner.is_some() {
                notes.push("the base's own text encoder has no place in this layout and was left out".into());
            }
        }
        ExportLayout::Peft => target::write_adapter(&found, &spec, out, dtype, &mut progress)?,
        ExportLayout::Deepgen => target::write_whole(&found, out, dtype, &mut progress)?,
    }
    Ok(JobReport { metrics: Default::default(), notes })
}
