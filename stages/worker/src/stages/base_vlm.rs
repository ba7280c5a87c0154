//! `base_vlm`: trains the small vision-language model of the shapes world's base on captions, questions and text.
//!
//! Not in the paper, which starts from Qwen2.5-VL: this one must truly read images and text, in Qwen's chat template.

use std::collections::BTreeMap;

use burn::module::Module;
use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::base::BaseVlmSettings;
use deepgen_contract::train::OnNonFinite;
use deepgen_data::dataset::PreparedDataset;
use deepgen_data::keyed::StreamKey;
use deepgen_data::resize::fit;
use deepgen_data::source::DataSource;
use deepgen_data::tokenizer::Tokenizer;
use deepgen_model::init::Init;
use deepgen_model::vlm::{PromptBatch, Vlm};
use deepgen_model::weights::{self, StoredType, WeightFile};
use deepgen_model::{Device, Tensor};

use crate::checkpoint::NamedTensors;
use crate::emit::Metrics;
use crate::error::{JobError, JobResult, OrFail};
use crate::feed::{Feed, tensor};
use crate::fit::{FitEnd, FitPlan, Trainer, ensure_finite_loss, fit as run_loop};
use crate::job::{JobContext, JobEnd, JobReport};
use crate::optimize::{self, AdamW, GradientSum, schedule_factor};
use crate::{base_folder, files};

/// Questions that are asked at the end of training and never trained on.
const NUM_HELD_OUT: u64 = 512;
/// What is asked of an image that has a caption.
const DESCRIBE: &str = "Describe the image.";

/// Trains and writes the model, `vlm.json` and the tokenizer.
///
/// # Errors
/// When the data cannot be read, the tokenizer does not fit the settings, or a loss is not finite.
pub fn run(settings: &BaseVlmSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let data = context.input_path("data", ArtifactKind::Mixture)?;
    let questions = context.input_path("questions", ArtifactKind::Dataset)?;
    let tokenizer_path = context.input_path("tokenizer", ArtifactKind::Weights)?.join(base_folder::TOKENIZER_FILE);
    let tokenizer = Tokenizer::load(&tokenizer_path).or_input(|| "the tokenizer")?;
    let found = tokenizer.special_tokens().or_input(|| "the tokenizer")?;
    if found != settings.model.tokens {
        return Err(JobError::input(format!(
            "the tokenizer has the special tokens {found:?}: set `model.tokens` to them"
        )));
    }
    let seed = context.spec.seed;
    let device = context.device.clone().autodiff();
    let mut trainer = VlmTrainer {
        vlm: Some(Vlm::new(&Init::new(seed, &device).at("vlm"), &settings.model)),
        optimizer: AdamW::new(&settings.optimizer),
        feed: Feed::open(&data, &settings.image, seed)?,
        questions: PreparedDataset::open(&questions).or_input(|| "the questions")?,
        tokenizer,
        settings: settings.clone(),
        seed,
        device,
    };
    if trainer.questions.len() <= NUM_HELD_OUT {
        return Err(JobError::input(format!("more than {NUM_HELD_OUT} questions are needed")));
    }
    let plan = FitPlan {
        total: settings.steps,
        unit: "steps",
        boundary: 1,
        log_every: 10,
        validate_every: settings.steps.div_ceil(4),
        sample_every: 0,
        checkpoint: settings.checkpoint.clone(),
        on_non_finite: OnNonFinite::Stop,
    };
    let metrics = match run_loop(&mut trainer, &plan, context)? {
        FitEnd::Finished(metrics) => metrics,
        FitEnd::Stopped(step) => return Ok(JobEnd::Stopped(step)),
    };
    let vlm = trainer.vlm.take().expect("a step leaves the weights in place");
    let out = context.out();
    weights::save(&out.join(base_folder::VLM_FILE), &weights::visit(&vlm), StoredType::F32, &BTreeMap::new())
        .or_io(|| "write the weights")?;
    files::write_json(&out.join(base_folder::VLM_CONFIG_FILE), &settings.model).or_io(|| "write the configuration")?;
    std::fs::copy(&tokenizer_path, out.join(base_folder::TOKENIZER_FILE)).or_io(|| "copy the tokenizer")?;
    Ok(JobEnd::Done(JobReport { metrics, notes: Vec::new() }))
}

struct VlmTrainer {
    vlm: Option<Vlm>,
    optimizer: AdamW,
    feed: Feed,
    questions: PreparedDataset,
    tokenizer: Tokenizer,
    settings: BaseVlmSettings,
    seed: u64,
    device: Device,
}

/// Dialogues with the number of tokens of each answer.
#[derive(Default)]
struct Dialogues {
    prompts: PromptBatch,
    num_targets: Vec<usize>,
}

impl VlmTrainer {
    /// Adds a user turn, about an image or not, and the assistant's answer.
    fn add(&self, dialogues: &mut Dialogues, image: Option<Tensor<3>>, question: &str, answer: &str) -> JobResult<()> {
        let vision = image.as_ref().map_or(String::new(), |image| {
            let [_, height, width] = image.dims();
            let pads = "<|image_pad|>".repeat(self.settings.model.vision.num_tokens(height, width));
            format!("<|vision_start|>{pads}<|vision_end|>\n")
        });
        let encode = |text: &str| self.tokenizer.encode(text).or_input(|| format!("encode {text:?}"));
        let mut ids = encode(&format!("<|im_start|>user\n{vision}{question}<|im_end|>\n<|im_start|>assistant\n"))?;
        let answer = encode(&format!("{answer}<|im_end|>"))?;
        dialogues.num_targets.push(answer.len());
        ids.extend(answer);
        dialogues.prompts.ids.push(ids);
        dialogues.prompts.images.push(image.into_iter().collect());
        Ok(())
    }

    /// Returns the dialogues of a step: text alone, or half captions and half questions.
    fn dialogues(&self, step: u64) -> JobResult<(Dialogues, &'static str)> {
        let mut dialogues = Dialogues::default();
        let batch = self.feed.batch(step)?;
        let is_text = self.settings.text_every > 0 && step.is_multiple_of(self.settings.text_every);
        let is_edit = batch.references.iter().any(|own| !own.is_empty());
        if is_text || is_edit {
            for text in &batch.texts {
                self.add(&mut dialogues, None, "Generate an image.", text)?;
            }
            return Ok((dialogues, "train/loss_text"));
        }
        let half = batch.texts.len() / 2;
        for (text, image) in batch.texts.iter().zip(&batch.images).take(half) {
            self.add(&mut dialogues, Some(tensor(image, &self.device)), DESCRIBE, text)?;
        }
        let draws = StreamKey::derive(self.seed, "base-vlm/questions").child(step);
        for place in 0..half as u64 {
            let index = draws.below(place, self.questions.len() - NUM_HELD_OUT);
            self.add_question(&mut dialogues, index, true)?;
        }
        Ok((dialogues, "train/loss_image"))
    }

    /// Adds question `index`; without its answer, the prompt ends where the answer would begin.
    fn add_question(&self, dialogues: &mut Dialogues, index: u64, with_answer: bool) -> JobResult<String> {
        let sample = self.questions.question(index).or_io(|| "read a question")?;
        let pixels = fit(&sample.image, &self.settings.image).or_input(|| sample.key.clone())?;
        let device = if with_answer { self.device.clone() } else { self.device.clone().without_autodiff() };
        self.add(dialogues, Some(tensor(&pixels, &device)), &sample.question, &sample.answer)?;
        if !with_answer {
            let (ids, num_targets) = (dialogues.prompts.ids.last_mut(), dialogues.num_targets.last());
            if let (Some(ids), Some(num_targets)) = (ids, num_targets) {
                ids.truncate(ids.len() - num_targets);
            }
        }
        Ok(sample.answer)
    }
}

impl Trainer for VlmTrainer {
    fn step(&mut self, step: u64, _context: &mut JobContext) -> JobResult<Metrics> {
        let (dialogues, name) = self.dialogues(step)?;
        let vlm = self.vlm.take().expect("a step leaves the weights in place");
        let loss = vlm.caption_loss(&dialogues.prompts, &dialogues.num_targets).or_input(|| "a dialogue")?;
        let value = f64::from(loss.clone().into_scalar::<f32>());
        ensure_finite_loss(step, name, value, &[])?;
        let lr =
            self.settings.optimizer.lr * schedule_factor(&self.settings.optimizer.schedule, step, self.settings.steps);
        let mut sum = GradientSum::default();
        sum.add(&vlm, loss.backward(), 1.0);
        let (vlm, norm) = self.optimizer.update(vlm, sum.ensure_finite(step)?, lr);
        self.vlm = Some(vlm);
        Ok(Metrics::from([(name.to_owned(), value), ("train/grad_norm".into(), norm), ("train/lr".into(), lr)]))
    }

    /// Asks the held-out questions: an answer is right when its first token, which decides it, is the likeliest.
    fn validate(&mut self, _step: u64, _context: &mut JobContext) -> JobResult<Metrics> {
        let vlm = self.vlm.clone().expect("a step leaves the weights in place").valid();
        let mut by_kind: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
        let first = self.questions.len() - NUM_HELD_OUT;
        for start in (first..self.questions.len()).step_by(64) {
            let mut dialogues = Dialogues::default();
            let mut wanted = Vec::new();
            for index in start..(start + 64).min(self.questions.len()) {
                let answer = self.add_question(&mut dialogues, index, false)?;
                let ids = self.tokenizer.encode(&answer).or_input(|| "encode an answer")?;
                let kind = if answer == "yes" || answer == "no" { "yes_no" } else { "open" };
                wanted.push((ids.first().copied().unwrap_or_default(), kind));
            }
            let logits = vlm.next_token_logits(&dialogues.prompts).or_input(|| "a question")?;
            let best: Vec<i64> = logits.argmax(1).into_data().iter::<i64>().collect();
            for (best, (wanted, kind)) in best.into_iter().zip(wanted) {
                for name in ["all", kind] {
                    let entry = by_kind.entry(name).or_default();
                    *entry = (entry.0 + f64::from(u8::from(best == i64::from(wanted))), entry.1 + 1.0);
                }
            }
        }
        Ok(by_kind
            .into_iter()
            .map(|(kind, (right, all))| (format!("validation/answers_{kind}"), right / all))
            .collect())
    }

    fn tensors(&self) -> NamedTensors {
        let vlm = self.vlm.as_ref().expect("a step leaves the weights in place");
        let weights = weights::visit(vlm).into_iter().map(|(name, data)| (format!("vlm.{name}"), data));
        weights.chain(self.optimizer.tensors()).collect()
    }

    fn restore(&mut self, file: &WeightFile) -> JobResult<()> {
        let vlm = self.vlm.take().expect("a step leaves the weights in place");
        self.vlm = Some(weights::load_into(vlm, file, "vlm.").or_io(|| "read the checkpoint's weights")?);
        self.optimizer.restore(file, optimize::PREFIX, &self.device.clone().without_autodiff())
    }
}
