//! `import`: brings external weights into the artifact store, verified by hash and by shape.

use std::path::Path;

use deepgen_contract::base::{ImportSettings, WeightsLayout};
use deepgen_contract::model::ModelSpec;
use deepgen_model::dit::Dit;
use deepgen_model::init::Init;
use deepgen_model::parts::Parts;
use deepgen_model::vae::Vae;
use deepgen_model::vlm::Vlm;
use deepgen_model::weights::{self, StoredType, WeightFile};

use crate::base_folder::TOKENIZER_FILE;
use crate::error::{JobError, JobResult, OrFail};
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
        WeightsLayout::Diffusers => import_diffusers(settings, &folder, context)?,
    }
    let parts = model_folder::load_parts(&context.out(), &context.device)?;
    let counts = parts.spec.parameter_counts().map_err(JobError::input)?;
    let elements = counts.language + counts.vision + counts.dit + counts.vae;
    Ok(JobEnd::Done(JobReport { metrics: [("model/num_elements".to_owned(), elements as f64)].into(), notes: vec![] }))
}

fn import_deepgen(settings: &ImportSettings, folder: &Path, context: &JobContext) -> JobResult<()> {
    let parts = model_folder::load_parts(folder, &context.device)?;
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

/// Reads the Hugging Face folders `vlm`, `transformer` and `vae`, one after the other, so that only one is in memory.
fn import_diffusers(settings: &ImportSettings, folder: &Path, context: &JobContext) -> JobResult<()> {
    let spec = ModelSpec { base: settings.model.clone(), bridge: None, lora: None };
    let init = Init::new(0, &context.device);
    let open = |name: &str| WeightFile::open(&folder.join(name)).or_input(|| format!("the folder `{name}`"));
    let write = |parts: Parts| parts.save(&context.out(), StoredType::Bf16).or_io(|| "write the weights");
    let vlm = Vlm::new(&init, &settings.model.vlm).load(&open("vlm")?).or_input(|| "the vision-language model")?;
    write(Parts { vlm: Some(vlm), ..Parts::none(spec.clone()) })?;
    let dit = weights::load_into(Dit::new(&init, &settings.model.dit), &open("transformer")?, "")
        .or_input(|| "the diffusion transformer")?;
    write(Parts { dit: Some(dit), ..Parts::none(spec.clone()) })?;
    let vae =
        weights::load_into(Vae::new(&init, &settings.model.vae), &open("vae")?, "").or_input(|| "the autoencoder")?;
    write(Parts { vae: Some(vae), ..Parts::none(spec) })?;
    let tokenizer = [folder.join(TOKENIZER_FILE), folder.join("vlm").join(TOKENIZER_FILE)];
    let found = tokenizer.iter().find(|path| path.exists());
    let found = found.ok_or_else(|| JobError::input(format!("{} holds no {TOKENIZER_FILE}", folder.display())))?;
    std::fs::copy(found, context.out().join(TOKENIZER_FILE)).or_io(|| "copy the tokenizer")?;
    Ok(())
}
