//! `base_dit`: trains the small diffusion transformer of the shapes world's base under its own text encoder.
//!
//! Not in the paper, which starts from SD3.5: first the text encoder learns alone to say what the images of its captions
//! show (as T5 and CLIP come to SD3.5 pre-trained), then both learn flow matching together (docs/spec/sft.md section 2).

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::FloatDType;
use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::base::BaseDitSettings;
use deepgen_contract::model::{ConditionerConfig, DitConfig, VaeConfig};
use deepgen_contract::train::OnNonFinite;
use deepgen_data::batch::Batch;
use deepgen_data::tokenizer::Tokenizer;
use deepgen_model::conditioner::Conditioner;
use deepgen_model::dit::{Condition, Dit};
use deepgen_model::flow::{TrainingTable, add_noise, loss};
use deepgen_model::init::Init;
use deepgen_model::random::{Stream, noise};
use deepgen_model::vae::Vae;
use deepgen_model::weights::{self, StoredType, WeightFile};
use deepgen_model::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::checkpoint::NamedTensors;
use crate::emit::Metrics;
use crate::error::{JobResult, OrFail};
use crate::feed::{Feed, stack};
use crate::fit::{FitEnd, FitPlan, Trainer, ensure_finite_loss, fit};
use crate::job::{JobContext, JobEnd, JobReport};
use crate::optimize::{self, AdamW, GradientSum, schedule_factor};
use crate::scene_heads::SceneHeads;
use crate::{base_folder, files, padded_ids};

/// Batches of the fixed-noise validation.
const NUM_VALIDATION_BATCHES: u64 = 4;
/// First of the batches that validation looks at, far beyond the last step's.
const VALIDATION_ITERATION: u64 = 1 << 40;

/// What `assemble` needs to know of the DiT.
#[derive(Debug, Serialize, Deserialize)]
pub struct DitDescription {
    /// Sizes.
    pub dit: DitConfig,
    /// Sizes of its text encoder.
    pub conditioner: ConditionerConfig,
    /// Shift of the schedule it was trained with.
    pub scheduler_shift: f64,
}

/// What trains.
#[derive(Module, Debug)]
struct BaseDit {
    dit: Dit,
    conditioner: Conditioner,
    heads: SceneHeads,
}

/// Trains and writes the DiT, its text encoder and `dit.json`.
///
/// # Errors
/// When the data or an input cannot be read or a loss is not finite.
pub fn run(settings: &BaseDitSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let data = context.input_path("data", ArtifactKind::Mixture)?;
    let tokenizer = context.input_path("tokenizer", ArtifactKind::Weights)?.join(base_folder::TOKENIZER_FILE);
    let vae = load_vae(context)?;
    let seed = context.spec.seed;
    let device = context.device.clone().autodiff();
    let init = Init::new(seed, &device);
    let model = BaseDit {
        dit: start_at_identity(Dit::new(&init.at("dit"), &settings.model)),
        conditioner: Conditioner::new(&init.at("conditioner"), &settings.conditioner),
        heads: SceneHeads::new(&init.at("heads"), settings.conditioner.hidden_size, &settings.pretrain.world)?,
    };
    let mut trainer = DitTrainer {
        model: Some(model),
        vae,
        optimizer: AdamW::new(&settings.optimizer),
        feed: Feed::open(&data, &settings.image, seed)?,
        tokenizer: Tokenizer::load(&tokenizer).or_input(|| "the tokenizer")?,
        table: TrainingTable::new(settings.shift),
        settings: settings.clone(),
        seed,
        device,
    };
    let plan = FitPlan {
        total: settings.pretrain.steps + settings.steps,
        unit: "steps",
        boundary: 1,
        log_every: 10,
        validate_every: settings.validate_every,
        sample_every: 0,
        checkpoint: settings.checkpoint.clone(),
        on_non_finite: OnNonFinite::Stop,
    };
    let metrics = match fit(&mut trainer, &plan, context)? {
        FitEnd::Finished(metrics) => metrics,
        FitEnd::Stopped(step) => return Ok(JobEnd::Stopped(step)),
    };
    let model = trainer.model.take().expect("a step leaves the weights in place");
    write(&model, settings, context)?;
    Ok(JobEnd::Done(JobReport { metrics, notes: Vec::new() }))
}

/// Zeroes modulations and the output layer: every block starts as the identity (adaLN-Zero, Peebles and Xie 2023).
fn start_at_identity(dit: Dit) -> Dit {
    weights::map_params(dit, |name, value| {
        let is_modulation = name.contains("norm1.linear") || name.contains("norm1_context.linear");
        let is_output = name.starts_with("norm_out.") || name.starts_with("proj_out.");
        if is_modulation || is_output { value.zeros_like() } else { value }
    })
}

fn write(model: &BaseDit, settings: &BaseDitSettings, context: &JobContext) -> JobResult<()> {
    let out = context.out();
    let save = |name: &str, tensors: &NamedTensors| {
        weights::save(&out.join(name), tensors, StoredType::F32, &BTreeMap::new()).or_io(|| format!("write {name}"))
    };
    save(base_folder::DIT_FILE, &weights::visit(&model.dit))?;
    save(base_folder::CONDITIONER_FILE, &weights::visit(&model.conditioner))?;
    let description = DitDescription {
        dit: settings.model.clone(),
        conditioner: settings.conditioner.clone(),
        scheduler_shift: settings.shift,
    };
    files::write_json(&out.join(base_folder::DIT_CONFIG_FILE), &description).or_io(|| "write the configuration")
}

fn load_vae(context: &JobContext) -> JobResult<Vae> {
    let folder = context.input_path("vae", ArtifactKind::Weights)?;
    let path = folder.join(base_folder::VAE_CONFIG_FILE);
    let text = std::fs::read_to_string(&path).or_io(|| path.display())?;
    let config: VaeConfig = serde_json::from_str(&text).or_input(|| path.display())?;
    let file = WeightFile::open(&folder.join(base_folder::VAE_FILE)).or_input(|| "the autoencoder")?;
    let vae = Vae::new(&Init::new(0, &context.device), &config);
    weights::load_into(vae, &file, "").or_input(|| "the autoencoder")
}

struct DitTrainer {
    model: Option<BaseDit>,
    vae: Vae,
    optimizer: AdamW,
    feed: Feed,
    tokenizer: Tokenizer,
    table: TrainingTable,
    settings: BaseDitSettings,
    seed: u64,
    device: Device,
}

impl DitTrainer {
    /// Returns the text encoder's loss on a batch: what it says of the images against what a reader finds.
    fn pretraining_loss(&self, model: &BaseDit, batch: &Batch) -> JobResult<Tensor<1>> {
        let (sequence, pooled) = model.conditioner.forward(self.ids(&batch.texts, &self.device)?);
        model.heads.loss(sequence, pooled, batch)
    }

    /// Returns the flow-matching loss of a batch; `stream` names its random draws.
    fn flow_loss(&self, model: &BaseDit, batch: &Batch, stream: &str, drop_captions: bool) -> JobResult<Tensor<1>> {
        let plain = self.device.clone().without_autodiff();
        let encode = |images: &[deepgen_data::resize::Pixels], name: &str| -> JobResult<Tensor<4>> {
            let pixels = stack(images, &plain)?;
            let mean_shape = self.vae.encode(pixels.clone()).mean.dims();
            let noise = noise(self.seed, &format!("dit/{name}/{stream}"), mean_shape, &plain);
            Ok(Tensor::from_inner(self.vae.to_latents(pixels, noise)))
        };
        let clean = encode(&batch.images, "posterior")?;
        let references: Vec<_> = batch.references.iter().filter_map(|own| own.first().cloned()).collect();
        let references = if references.is_empty() { Vec::new() } else { vec![encode(&references, "reference")?] };
        let mut draws = Stream::new(self.seed, &format!("dit/draws/{stream}"));
        let count = batch.texts.len();
        // Stratified over the batch: the same distribution, less variance.
        let sigmas: Vec<f32> = (0..count).map(|i| self.table.sigma((i as f64 + draws.unit()) / count as f64)).collect();
        let dropout = self.settings.caption_dropout;
        let texts: Vec<String> = batch
            .texts
            .iter()
            .map(|text| if drop_captions && draws.unit() < dropout { String::new() } else { text.clone() })
            .collect();
        let eps = Tensor::from_inner(noise(self.seed, &format!("dit/noise/{stream}"), clean.dims(), &plain));
        let noisy = add_noise(clean, eps, &sigmas, FloatDType::F32);
        let (text_btc, pooled_bc) = model.conditioner.forward(self.ids(&texts, &self.device)?);
        let condition = Condition { timestep_b: noisy.timestep_b, text_btc, pooled_bc };
        let velocity = model.dit.forward(noisy.latents, &condition, &references);
        Ok(loss(velocity, noisy.target))
    }

    fn ids(&self, texts: &[String], device: &Device) -> JobResult<deepgen_model::IntTensor<2>> {
        padded_ids::pad_right(&self.tokenizer, texts, self.settings.conditioner.num_tokens, device)
    }
}

impl Trainer for DitTrainer {
    fn step(&mut self, step: u64, context: &mut JobContext) -> JobResult<Metrics> {
        let BaseDitSettings { pretrain, optimizer, steps, .. } = &self.settings;
        let is_pretraining = step < pretrain.steps;
        let batch = self.feed.batch(step)?;
        let model = self.model.take().expect("a step leaves the weights in place");
        let (loss, lr) = if is_pretraining {
            let lr = pretrain.lr * schedule_factor(&optimizer.schedule, step, pretrain.steps);
            (self.pretraining_loss(&model, &batch)?, lr)
        } else {
            if step == pretrain.steps {
                context.emitter.note("the text encoder is trained; flow matching begins");
                // Moments of the first phase say nothing about the second.
                self.optimizer = AdamW::new(optimizer);
            }
            let lr = optimizer.lr * schedule_factor(&optimizer.schedule, step - pretrain.steps, *steps);
            (self.flow_loss(&model, &batch, &step.to_string(), true)?, lr)
        };
        let value = f64::from(loss.clone().into_scalar::<f32>());
        let name = match (is_pretraining, batch.references.iter().any(|own| !own.is_empty())) {
            (true, _) => "train/text_encoder_loss",
            (false, false) => "train/loss_text2image",
            (false, true) => "train/loss_image2image",
        };
        ensure_finite_loss(step, name, value, &batch.keys)?;
        let mut sum = GradientSum::default();
        sum.add(&model, loss.backward(), 1.0);
        let (model, norm) = self.optimizer.update(model, sum.ensure_finite(step)?, lr);
        self.model = Some(model);
        Ok(Metrics::from([(name.to_owned(), value), ("train/grad_norm".into(), norm), ("train/lr".into(), lr)]))
    }

    fn validate(&mut self, _step: u64, _context: &mut JobContext) -> JobResult<Metrics> {
        let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for index in 0..NUM_VALIDATION_BATCHES {
            let batch = self.feed.batch(VALIDATION_ITERATION + index)?;
            let model = self.model.as_ref().expect("a step leaves the weights in place");
            let loss = self.flow_loss(model, &batch, &format!("validation/{index}"), false)?;
            let is_edit = batch.references.iter().any(|own| !own.is_empty());
            let name = if is_edit { "validation/loss_image2image" } else { "validation/loss_text2image" };
            let entry = sums.entry(name.to_owned()).or_default();
            *entry = (entry.0 + f64::from(loss.into_scalar::<f32>()), entry.1 + 1.0);
        }
        Ok(sums.into_iter().map(|(name, (sum, count))| (name, sum / count)).collect())
    }

    fn tensors(&self) -> NamedTensors {
        let model = self.model.as_ref().expect("a step leaves the weights in place");
        let weights = weights::visit(model).into_iter().map(|(name, data)| (format!("model.{name}"), data));
        weights.chain(self.optimizer.tensors()).collect()
    }

    fn restore(&mut self, file: &WeightFile) -> JobResult<()> {
        let model = self.model.take().expect("a step leaves the weights in place");
        let model = weights::load_into(model, file, "model.").or_io(|| "read the checkpoint's weights")?;
        self.model = Some(model);
        self.optimizer.restore(file, optimize::PREFIX, &self.device.clone().without_autodiff())
    }
}
