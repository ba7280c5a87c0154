//! `assemble`: puts tokenizer, autoencoder, VLM and DiT of the shapes world's base into one folder that `import` reads.

use std::path::Path;

use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::base::AssembleSettings;
use deepgen_contract::model::{BaseModelConfig, ModelSpec, VaeConfig, VlmConfig};
use deepgen_contract::train::FloatKind;
use deepgen_model::conditioner::Conditioner;
use deepgen_model::dit::Dit;
use deepgen_model::init::Init;
use deepgen_model::parts::Parts;
use deepgen_model::vae::Vae;
use deepgen_model::vlm::Vlm;
use deepgen_model::weights::{self, StoredType, WeightFile};
use serde::de::DeserializeOwned;

use super::base_dit::DitDescription;
use crate::base_folder as names;
use crate::error::{JobResult, OrFail};
use crate::job::{JobContext, JobEnd, JobReport};

/// Reads the members `tokenizer`, `vae`, `vlm` and `dit` and writes the base.
///
/// # Errors
/// When a member is missing or does not fit its own description.
pub fn run(settings: &AssembleSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let member = |name: &str| context.input_path(name, ArtifactKind::Weights);
    let (tokenizer, vae, vlm, dit) = (member("tokenizer")?, member("vae")?, member("vlm")?, member("dit")?);
    let vae_config: VaeConfig = read(&vae.join(names::VAE_CONFIG_FILE))?;
    let vlm_config: VlmConfig = read(&vlm.join(names::VLM_CONFIG_FILE))?;
    let description: DitDescription = read(&dit.join(names::DIT_CONFIG_FILE))?;
    let open = |path: std::path::PathBuf| WeightFile::open(&path).or_input(|| path.display());
    let init = Init::new(0, &context.device);
    let wrong = || "a member does not fit its description";
    let parts = Parts {
        vae: Some(
            weights::load_into(Vae::new(&init, &vae_config), &open(vae.join(names::VAE_FILE))?, "").or_input(wrong)?,
        ),
        vlm: Some(
            weights::load_into(Vlm::new(&init, &vlm_config), &open(vlm.join(names::VLM_FILE))?, "").or_input(wrong)?,
        ),
        dit: Some(
            weights::load_into(Dit::new(&init, &description.dit), &open(dit.join(names::DIT_FILE))?, "")
                .or_input(wrong)?,
        ),
        conditioner: Some(
            weights::load_into(
                Conditioner::new(&init, &description.conditioner),
                &open(dit.join(names::CONDITIONER_FILE))?,
                "",
            )
            .or_input(wrong)?,
        ),
        bridge: None,
        spec: ModelSpec {
            base: BaseModelConfig {
                vlm: vlm_config,
                dit: description.dit,
                vae: vae_config,
                scheduler_shift: description.scheduler_shift,
                conditioner: Some(description.conditioner),
            },
            bridge: None,
            lora: None,
        },
    };
    let out = context.out();
    parts.save(&out, stored_type(settings.dtype)).or_io(|| "write the base")?;
    let from = tokenizer.join(names::TOKENIZER_FILE);
    std::fs::copy(&from, out.join(names::TOKENIZER_FILE)).or_io(|| "copy the tokenizer")?;
    let counts = parts.spec.parameter_counts().or_input(|| "count the parameters")?;
    let elements = counts.language + counts.vision + counts.dit + counts.vae + counts.conditioner;
    let hash = crate::files::hash_folder(&out).or_io(|| "hash the base")?;
    let metrics = [("model/num_elements".to_owned(), elements as f64)].into();
    Ok(JobEnd::Done(JobReport { metrics, notes: vec![format!("blake3 of the folder: {hash}")] }))
}

/// Returns the number format on disk.
pub fn stored_type(dtype: FloatKind) -> StoredType {
    match dtype {
        FloatKind::Bf16 => StoredType::Bf16,
        FloatKind::F32 => StoredType::F32,
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> JobResult<T> {
    let text = std::fs::read_to_string(path).or_io(|| path.display())?;
    serde_json::from_str(&text).or_input(|| path.display())
}
