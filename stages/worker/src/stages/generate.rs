//! `generate`: the prompts of a benchmark to images, each with a record of how it was made.
//!
//! Positive and negative prompts are read in one batch, so that both get the same padding (docs/spec/sft.md section 8.1).
//! Departure from the release, whose images depend on batch and process: every image has a noise of its own.

use std::collections::BTreeMap;
use std::sync::Arc;

use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::data::{ImageMode, ImageSettings};
use deepgen_contract::eval::{Conditioning, EVAL_VERSION, GenerateSettings, IMAGES_FILE, ImageRecord};
use deepgen_contract::model::BaseModelConfig;
use deepgen_data::prompt::{encode_image_to_image, encode_text_to_image};
use deepgen_data::resize::{Pixels, fit};
use deepgen_data::tokenizer::Tokenizer;
use deepgen_model::bridge::Condition;
use deepgen_model::conditioner::Conditioner;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::dit::Dit;
use deepgen_model::parts::Parts;
use deepgen_model::random::Stream;
use deepgen_model::vae::Vae;
use deepgen_model::vlm::PromptBatch;
use deepgen_model::{Device, Tensor};

use crate::error::{JobError, JobResult, OrFail};
use crate::feed::{stack, tensor};
use crate::items::{self, Item};
use crate::job::{JobContext, JobEnd, JobReport};
use crate::padded_ids::pad_right;
use crate::sampling::{Drawer, Sampling, draw, initial_noise};
use crate::{files, model_folder};

/// Writes the images and `images.jsonl`.
///
/// # Errors
/// When the weights lack a part, or the items cannot be read.
pub fn run(settings: &GenerateSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let root = context.spec.project_root.clone();
    let items = items::load(&settings.items, |path| root.join(path))?;
    let painter = Painter::open(settings, context)?;
    let out = context.out();
    for folder in ["images", "sources"] {
        std::fs::create_dir_all(out.join(folder)).or_io(|| format!("create {folder}"))?;
    }
    let copies = settings.sampler.images_per_prompt.max(1);
    let total = (items.len() * copies) as u64;
    // One pass per kind, so that a batch has sources in all rows or in none.
    let (edits, prompts): (Vec<&Item>, Vec<&Item>) = items.iter().partition(|item| item.source.is_some());
    let mut lines: BTreeMap<(usize, usize), String> = BTreeMap::new();
    let position: BTreeMap<&str, usize> = items.iter().enumerate().map(|(i, item)| (item.id.as_str(), i)).collect();
    for group in [prompts, edits] {
        let wanted: Vec<(&Item, usize)> =
            (0..copies).flat_map(|copy| group.iter().map(move |item| (*item, copy))).collect();
        for batch in wanted.chunks(settings.batch.max(1)) {
            if context.is_stop_requested() {
                return Ok(JobEnd::Stopped(lines.len() as u64));
            }
            let images = painter.paint(batch)?;
            for ((item, copy), image) in batch.iter().zip(images) {
                let file = format!("images/{}.{copy}.png", file_name(&item.id));
                image.save(out.join(&file)).or_io(|| format!("write {file}"))?;
                let source = match &item.source {
                    Some(source) => {
                        let file = format!("sources/{}.png", file_name(&item.id));
                        source.save(out.join(&file)).or_io(|| format!("write {file}"))?;
                        Some(file)
                    }
                    None => None,
                };
                let record = painter.record(item, *copy, file, source, context)?;
                let line = serde_json::to_string(&record).or_io(|| "write a record")?;
                lines.insert((position[item.id.as_str()], *copy), line);
            }
            context.emitter.progress(lines.len() as u64, total, "images");
        }
    }
    let text: String = lines.values().map(|line| format!("{line}\n")).collect();
    files::write_text(&out.join(IMAGES_FILE), &text).or_io(|| "write the records")?;
    let metrics = [("images/count".to_owned(), lines.len() as f64)].into();
    Ok(JobEnd::Done(JobReport { metrics, notes: Vec::new() }))
}

/// Item identities hold only what a file name may.
fn file_name(id: &str) -> String {
    id.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect()
}

/// Who turns prompts into conditions, and what draws under them.
enum Model {
    /// The VLM through the bridge, and DiT and autoencoder.
    Bridged(Box<DeepGen>),
    /// The base's own text encoder.
    Base(Box<BaseModel>),
}

/// The parts that draw under the base's own text encoder.
struct BaseModel {
    conditioner: Conditioner,
    num_tokens: usize,
    dit: Dit,
    vae: Vae,
    base: BaseModelConfig,
}

impl Model {
    fn drawer(&self) -> Drawer<'_> {
        match self {
            Self::Bridged(model) => model.as_ref().into(),
            Self::Base(parts) => Drawer { dit: &parts.dit, vae: &parts.vae, base: &parts.base },
        }
    }
}

struct Painter {
    model: Model,
    tokenizer: Tokenizer,
    settings: GenerateSettings,
    sampling: Sampling,
    image: ImageSettings,
    device: Device,
}

impl Painter {
    fn open(settings: &GenerateSettings, context: &JobContext) -> JobResult<Self> {
        let weights = context.input_path("weights", ArtifactKind::Weights)?;
        let device = context.device.clone();
        let parts = model_folder::load_parts(&weights, &device)?;
        let model = match settings.conditioning {
            Conditioning::Bridge if parts.bridge.is_none() => {
                return Err(JobError::input(
                    "these weights hold no bridge: set `conditioning = \"base_encoder\"`, or wire the weights of a stage",
                ));
            }
            Conditioning::Bridge => {
                Model::Bridged(Box::new(DeepGen::from_parts(parts).or_input(|| "put the parts together")?))
            }
            Conditioning::BaseEncoder => base_model(parts)?,
        };
        let sampler = &settings.sampler;
        let sampling =
            Sampling { steps: sampler.steps, guidance: sampler.guidance, height: sampler.height, width: sampler.width };
        let side = u32::try_from(sampler.height).map_err(|_| JobError::input("`sampler.height` is too large"))?;
        Ok(Self {
            model,
            tokenizer: model_folder::load_tokenizer(&weights)?,
            settings: settings.clone(),
            sampling,
            // Sources of edits are squashed to the output's square (docs/spec/evaluation.md section 0).
            image: ImageSettings { size: side, unit: 1, mode: ImageMode::Exact },
            device,
        })
    }

    fn noise_name(&self, item: &Item, copy: usize) -> String {
        format!("{}/{}/{copy}", self.settings.benchmark, item.id)
    }

    fn paint(&self, batch: &[(&Item, usize)]) -> JobResult<Vec<image::RgbImage>> {
        let sources = batch.iter().filter_map(|(item, _)| item.source.as_ref());
        let sources: Vec<Pixels> = sources
            .map(|source| fit(Arc::as_ref(source), &self.image).or_input(|| "a source image"))
            .collect::<JobResult<_>>()?;
        let names: Vec<String> = batch.iter().map(|(item, copy)| self.noise_name(item, *copy)).collect();
        let drawer = self.model.drawer();
        let noise = initial_noise(drawer.base, &self.sampling, self.settings.seed, &names, &self.device);
        let references = if sources.is_empty() {
            Vec::new()
        } else {
            let names: Vec<String> = names.iter().map(|name| format!("{name}/reference")).collect();
            let posterior = initial_noise(drawer.base, &self.sampling, self.settings.seed, &names, &self.device);
            vec![drawer.vae.to_latents(stack(&sources, &self.device)?, posterior)]
        };
        let condition = self.condition(batch, &sources)?;
        draw(drawer, &self.sampling, &condition, &references, noise)
    }

    /// Returns the conditions: negative rows first when guidance is on.
    fn condition(&self, batch: &[(&Item, usize)], sources: &[Pixels]) -> JobResult<Condition> {
        let positive: Vec<&str> = batch.iter().map(|(item, _)| item.prompt.as_str()).collect();
        let negative = vec![self.settings.sampler.negative.as_str(); batch.len()];
        let model = match &self.model {
            Model::Bridged(model) => model,
            Model::Base(parts) => {
                let texts = if self.sampling.is_guided() { [negative, positive].concat() } else { positive };
                let texts: Vec<String> = texts.into_iter().map(str::to_owned).collect();
                let ids = pad_right(&self.tokenizer, &texts, parts.num_tokens, &self.device)?;
                let (sequence, pooled) = parts.conditioner.forward(ids);
                return Ok(Condition { sequence, pooled });
            }
        };
        let positive = self.prompts(&positive, sources)?;
        match self.sampling.is_guided() {
            true => model.guidance_condition(self.prompts(&negative, sources)?, positive),
            false => model.condition(&positive),
        }
        .or_input(|| "read the prompts")
    }

    fn prompts(&self, texts: &[&str], sources: &[Pixels]) -> JobResult<PromptBatch> {
        let vision = &self.model.drawer().base.vlm.vision;
        let mut batch = PromptBatch::default();
        for (i, text) in texts.iter().enumerate() {
            let ids = match sources.get(i) {
                Some(source) => {
                    let num_tokens = vision.num_tokens(source.height, source.width);
                    encode_image_to_image(&self.tokenizer, text, &[num_tokens])
                }
                None => encode_text_to_image(&self.tokenizer, text),
            };
            batch.ids.push(ids.or_input(|| format!("encode {text:?}"))?);
            let image = |source: &Pixels| -> Tensor<3> { tensor(source, &self.device) };
            batch.images.push(sources.get(i).map(image).into_iter().collect());
        }
        Ok(batch)
    }

    fn record(
        &self,
        item: &Item,
        copy: usize,
        file: String,
        source: Option<String>,
        context: &JobContext,
    ) -> JobResult<ImageRecord> {
        let sampler = &self.settings.sampler;
        Ok(ImageRecord {
            version: EVAL_VERSION,
            benchmark: self.settings.benchmark.clone(),
            item: item.id.clone(),
            tag: item.tag.clone(),
            copy,
            prompt: item.prompt.clone(),
            seed: Stream::new(self.settings.seed, &format!("image/{}", self.noise_name(item, copy))).next_u64(),
            guidance: sampler.guidance,
            steps: sampler.steps,
            height: sampler.height,
            width: sampler.width,
            weights: context.input("weights")?.fingerprint,
            file,
            source,
            expectation: item.expectation.clone(),
        })
    }
}

/// Takes the parts that draw under the base's own text encoder.
fn base_model(parts: Parts) -> JobResult<Model> {
    let found = parts.conditioner.zip(parts.spec.base.conditioner.as_ref().map(|config| config.num_tokens));
    let (conditioner, num_tokens) = found.ok_or_else(|| {
        JobError::input("these weights hold no text encoder of their own: set `conditioning = \"bridge\"`")
    })?;
    let missing = || JobError::input("these weights lack the diffusion transformer or the autoencoder");
    let (dit, vae) = parts.dit.zip(parts.vae).ok_or_else(missing)?;
    Ok(Model::Base(Box::new(BaseModel { conditioner, num_tokens, dit, vae, base: parts.spec.base })))
}
