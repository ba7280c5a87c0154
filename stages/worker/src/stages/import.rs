//! `import`: brings external weights into the artifact store, verified by hash and by shape.

use std::path::Path;

use deepgen_contract::base::{ImportSettings, WeightsLayout};
use deepgen_contract::precision::PrecisionSettings;
use deepgen_contract::tool::WrittenType;

use crate::base_folder::TOKENIZER_FILE;
use crate::error::{JobError, JobResult, OrFail};
use crate::foreign::source::Collected;
use crate::foreign::target;
use crate::job::{JobContext, JobEnd, JobReport};
use crate::{files, model_folder};

/// Verifies and copies the weights.
///
/// # Errors
/// When the folder is missing, has another hash, or its tensors do not have the sizes of the settings.
pub fn run(settings: &ImportSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let folder = context.resolve(&settings.path);
    if !folder.is_dir() {
        return Err(JobError::input(format!("{} is missing: get it from {}", folder.display(), settings.origin)));
    }
    if !settings.blake3.is_empty() {
        let hash = files::hash_folder(&folder).or_io(|| format!("hash {}", folder.display()))?;
        if hash != settings.blake3 {
            return Err(JobError::input(format!(
                "{} has the blake3 {hash}, not {}: get it anew from {}, or set `blake3` if the change is meant",
                folder.display(),
                settings.blake3,
                settings.origin
            )));
        }
    }
    match settings.layout {
        WeightsLayout::Deepgen => import_deepgen(settings, &folder, context)?,
        WeightsLayout::Diffusers => import_foreign(settings, &folder, context)?,
    }
    let parts = model_folder::load_parts(&context.out(), &PrecisionSettings::default(), &context.device)?;
    let counts = parts.spec.parameter_counts().map_err(JobError::input)?;
    let elements = counts.language + counts.vision + counts.dit + counts.vae;
    Ok(JobEnd::Done(JobReport { metrics: [("model/num_elements".to_owned(), elements as f64)].into(), notes: vec![] }))
}

fn import_deepgen(settings: &ImportSettings, folder: &Path, context: &JobContext) -> JobResult<()> {
    let parts = model_folder::load_parts(folder, &PrecisionSettings::default(), &context.device)?;
    let (mut wanted, found) = (settings.model.clone(), &parts.spec.base);
    // Measured when the autoencoder was trained; the weights know them.
    (wanted.vae.scaling_factor, wanted.vae.shift_factor) = (found.vae.scaling_factor, found.vae.shift_factor);
    if &wanted != found {
        return Err(JobError::input(format!(
            "the weights in {} have other sizes than `model` says: {} holds them",
            folder.display(),
            model_folder::SPEC_FILE
        )));
    }
    for entry in std::fs::read_dir(folder).or_io(|| format!("list {}", folder.display()))? {
        let entry = entry.or_io(|| format!("list {}", folder.display()))?;
        if entry.path().is_file() {
            let to = context.out().join(entry.file_name());
            std::fs::copy(entry.path(), to).or_io(|| format!("copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Reads weights in a foreign layout, tensor by tensor, whatever their size.
fn import_foreign(settings: &ImportSettings, folder: &Path, context: &mut JobContext) -> JobResult<()> {
    let mut found = Collected::open(folder)?;
    // The settings say what the weights have to be; what the folder says of itself was read for its tensors alone.
    found.vlm_config = Some(settings.model.vlm.clone());
    found.dit_config = Some(settings.model.dit.clone());
    found.vae_config = Some(settings.model.vae.clone());
    found.shift = Some(settings.model.scheduler_shift);
    for (part, is_there) in
        [("vlm", found.vlm.is_some()), ("transformer", found.dit.is_some()), ("vae", found.vae.is_some())]
    {
        if !is_there {
            return Err(JobError::input(format!("{} holds no folder `{part}`", folder.display())));
        }
    }
    if found.tokenizer.is_none() {
        return Err(JobError::input(format!("{} holds no {TOKENIZER_FILE}", folder.display())));
    }
    let spec = found.spec(None)?;
    target::verify(&found, &spec)?;
    for remark in &found.remarks {
        context.emitter.note(remark.clone());
    }
    let out = context.out();
    let emitter = &mut context.emitter;
    let mut progress = |done: u64, total: u64| emitter.progress(done >> 20, total >> 20, "MiB");
    target::write_own(&found, &spec, &out, WrittenType::Bf16, &mut progress)
}
