//! `handoff`: the weights that the next stage reads, from a checkpoint and the weights it started from.
//!
//! The released code loses the adapters here (docs/spec/sft.md section 9); this one merges or carries them, and writes
//! where every part came from.

use std::collections::BTreeMap;

use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::model::ModelSpec;
use deepgen_contract::precision::PrecisionSettings;
use deepgen_contract::train::{HandoffSettings, LoraHandoff, TrainedSource};
use deepgen_model::deepgen::DeepGen;
use deepgen_model::lora;
use deepgen_model::weights::WeightFile;

use super::assemble::stored_type;
use crate::base_folder::TOKENIZER_FILE;
use crate::error::{JobError, JobResult, OrFail};
use crate::job::{JobContext, JobEnd, JobReport};
use crate::model_folder::{self, BEST_FILE, EMA_FILE, SPEC_FILE, TRAINED_FILE};

/// Writes the weights.
///
/// # Errors
/// When the checkpoint does not belong to the weights.
pub fn run(settings: &HandoffSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let weights = context.input_path("weights", ArtifactKind::Weights)?;
    let checkpoint = context.input_path("checkpoint", ArtifactKind::Checkpoint)?;
    let device = context.device.clone();
    let path = checkpoint.join(SPEC_FILE);
    let text = std::fs::read_to_string(&path).or_io(|| path.display())?;
    let spec: ModelSpec = serde_json::from_str(&text).or_input(|| path.display())?;
    let parts = model_folder::load_parts(&weights, &PrecisionSettings::default(), &device)?;
    let parts = model_folder::extend(parts, &spec, context.spec.seed, &device)?;
    let model = DeepGen::from_parts(parts).or_input(|| "put the parts together")?;
    let file = match settings.from {
        TrainedSource::Last => TRAINED_FILE,
        TrainedSource::Ema if checkpoint.join(EMA_FILE).exists() => EMA_FILE,
        TrainedSource::Ema => {
            return Err(JobError::input(
                "`from = \"ema\"`, but the training kept no moving average: set its `train.ema`, or `from` to `last`",
            ));
        }
        TrainedSource::Best if checkpoint.join(BEST_FILE).exists() => BEST_FILE,
        TrainedSource::Best => {
            return Err(JobError::input(
                "`from = \"best\"`, but the training kept no best weights: set its `train.keep_best` (`policy.keep_best` \
                 of stage 3), or `from` to `last`",
            ));
        }
    };
    let trained = WeightFile::open(&checkpoint.join(file)).or_input(|| "the checkpoint")?;
    let mut origins: BTreeMap<String, u64> = BTreeMap::new();
    for name in trained.names() {
        let part = name.split('.').next().unwrap_or(name).to_owned();
        *origins.entry(part).or_default() += 1;
    }
    let mut parts = model_folder::lay_over(model, &trained, "")?.into_parts();
    let mut notes: Vec<String> = origins
        .iter()
        .map(|(part, count)| format!("{count} tensors of {part} come from the checkpoint's {file}"))
        .collect();
    if parts.spec.lora.is_some() && settings.lora == LoraHandoff::Merge {
        parts.vlm = parts.vlm.take().map(lora::merge);
        parts.spec.lora = None;
        notes.push("the adapters were merged into the weights they adapt".into());
    }
    let out = context.out();
    parts.save(&out, stored_type(settings.dtype)).or_io(|| "write the weights")?;
    std::fs::copy(weights.join(TOKENIZER_FILE), out.join(TOKENIZER_FILE)).or_io(|| "copy the tokenizer")?;
    Ok(JobEnd::Done(JobReport { metrics: BTreeMap::new(), notes }))
}
