//! `import-weights`: weights in any known layout into a weights folder.

use deepgen_contract::tool::ImportRequest;
use deepgen_model::parts::SPEC_FILE;

use crate::emit::Emitter;
use crate::error::{JobError, JobResult};
use crate::foreign::source::Collected;
use crate::foreign::target;
use crate::job::JobReport;

/// Reads the source, over its base if there is one, and writes what both hold.
///
/// # Errors
/// When the source is of no known layout, its sizes are not known, or its tensors are not those of the model.
pub fn run(request: &ImportRequest, emitter: &mut Emitter) -> JobResult<JobReport> {
    if request.out.join(SPEC_FILE).exists() {
        return Err(JobError::input(format!("{} holds a model already", request.out.display())));
    }
    let mut found = Collected::open(&request.source)?;
    if let Some(base) = &request.base {
        found = Collected::open(base)?.overlaid_by(found);
    }
    let spec = found.spec(request.preset)?;
    target::verify(&found, &spec)?;
    let mut progress = |done: u64, total: u64| emitter.progress(done >> 20, total >> 20, "MiB");
    target::write_own(&found, &spec, &request.out, request.dtype, &mut progress)?;
    let mut notes = std::mem::take(&mut found.remarks);
    for (part, file) in [
        ("vision-language model", &found.vlm),
        ("diffusion transformer", &found.dit),
        ("autoencoder", &found.vae),
        ("bridge", &found.bridge),
        ("adapters", &found.lora),
        ("text encoder of the base", &found.conditioner),
    ] {
        if let Some(file) = file {
            let elements: usize =
                file.names().filter_map(|name| file.shape(name)).map(|s| s.iter().product::<usize>()).sum();
            notes.push(format!("{part}: {} tensors, {elements} elements", file.names().count()));
        }
    }
    if found.tokenizer.is_none() {
        notes.push("there is no tokenizer.json: put one beside the weights before generating".into());
    }
    Ok(JobReport { metrics: Default::default(), notes })
}
