//! Prompts to images: reads prompts and references, draws a batch. Serves the `generate` stage and the tool of that name.
//!
//! Positive and negative prompts are read in one batch, so that both get the same padding (docs/spec/sft.md section 8.1).
//! Departure from the release, whose images depend on batch and process: every image has a noise of its own. Knows no
//! file.

use std::path::Path;

use deepgen_contract::eval::Conditioning;
use deepgen_contract::model::BaseModelConfig;
use deepgen_contract::precision::PrecisionSettings;
use deepgen_data::prompt::{encode_image_to_image, encode_text_to_image};
use deepgen_data::resize::Pixels;
use deepgen_data::tokenizer::Tokenizer;
use deepgen_model::bridge::Condition;
use deepgen_model::conditioner::Conditioner;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::dit::Dit;
use deepgen_model::nn::to_dtype;
use deepgen_model::parts::Parts;
use deepgen_model::vae::Vae;
use deepgen_model::vlm::PromptBatch;
use deepgen_model::{Device, Tensor};
use image::RgbImage;

use crate::error::{JobError, JobResult, OrFail};
use crate::feed::{stack, tensor};
use crate::model_folder;
use crate::padded_ids::pad_right;
use crate::precision;
use crate::sampling::{Drawer, Sampling, draw, initial_noise};

/// An image to draw.
#[derive(Debug, Clone)]
pub struct Order {
    /// Prompt or instruction.
    pub prompt: String,
    /// Reference images; all orders of a batch have as many, of the same sizes in the same order.
    pub references: Vec<Pixels>,
    /// Name of the noise; with the seed it gives the noise.
    pub noise: String,
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

/// A model with its tokenizer, ready to draw.
pub struct Painter {
    model: Model,
    tokenizer: Tokenizer,
    device: Device,
    compute: burn::tensor::FloatDType,
}

impl Painter {
    /// Loads the weights in `folder`.
    ///
    /// # Errors
    /// When they lack a part that `conditioning` needs.
    pub fn open(
        folder: &Path,
        conditioning: Conditioning,
        precision: &PrecisionSettings,
        device: &Device,
    ) -> JobResult<Self> {
        let parts = model_folder::load_parts(folder, precision, device)?;
        let compute = precision::compute_type(precision, device);
        let model = match conditioning {
            Conditioning::Bridge if parts.bridge.is_none() => {
                return Err(JobError::input(
                    "these weights hold no bridge: set `conditioning = \"base_encoder\"`, or wire the weights of a stage",
                ));
            }
            Conditioning::Bridge => {
                let model = DeepGen::from_parts(parts).or_input(|| "put the parts together")?;
                Model::Bridged(Box::new(model.computing_in(compute)))
            }
            Conditioning::BaseEncoder => base_model(parts)?,
        };
        Ok(Self { model, tokenizer: model_folder::load_tokenizer(folder)?, device: device.clone(), compute })
    }

    fn drawer(&self) -> Drawer<'_> {
        match &self.model {
            Model::Bridged(model) => model.as_ref().into(),
            Model::Base(parts) => {
                Drawer { dit: &parts.dit, vae: &parts.vae, base: &parts.base, compute: self.compute.into() }
            }
        }
    }

    /// Draws a batch.
    ///
    /// # Errors
    /// When a prompt cannot be read.
    pub fn paint(&self, orders: &[Order], sampling: &Sampling, seed: u64, negative: &str) -> JobResult<Vec<RgbImage>> {
        let names: Vec<String> = orders.iter().map(|order| order.noise.clone()).collect();
        let drawer = self.drawer();
        let noise = initial_noise(drawer.base, sampling, seed, &names, &self.device);
        let num_references = orders.first().map_or(0, |order| order.references.len());
        let mut references = Vec::with_capacity(num_references);
        for place in 0..num_references {
            let pixels: Vec<Pixels> = orders.iter().map(|order| order.references[place].clone()).collect();
            // The first one keeps the name that a single reference always had.
            let suffix = if place == 0 { "reference".to_owned() } else { format!("reference-{place}") };
            let names: Vec<String> = names.iter().map(|name| format!("{name}/{suffix}")).collect();
            let own = Sampling { height: pixels[0].height, width: pixels[0].width, ..*sampling };
            let posterior = initial_noise(drawer.base, &own, seed, &names, &self.device);
            let pixels = to_dtype(stack(&pixels, &self.device)?, drawer.compute);
            references.push(drawer.vae.to_latents(pixels, to_dtype(posterior, drawer.compute)));
        }
        let condition = self.condition(orders, sampling, negative)?;
        draw(drawer, sampling, &condition, &references, noise)
    }

    /// Returns the conditions: negative rows first when guidance is on.
    fn condition(&self, orders: &[Order], sampling: &Sampling, negative: &str) -> JobResult<Condition> {
        let positive: Vec<&str> = orders.iter().map(|order| order.prompt.as_str()).collect();
        let negative = vec![negative; orders.len()];
        let model = match &self.model {
            Model::Bridged(model) => model,
            Model::Base(parts) => {
                let texts = if sampling.is_guided() { [negative, positive].concat() } else { positive };
                let texts: Vec<String> = texts.into_iter().map(str::to_owned).collect();
                let ids = pad_right(&self.tokenizer, &texts, parts.num_tokens, &self.device)?;
                let (sequence, pooled) = parts.conditioner.forward(ids);
                return Ok(Condition { sequence, pooled });
            }
        };
        let positive = self.prompts(&positive, orders)?;
        match sampling.is_guided() {
            true => model.guidance_condition(self.prompts(&negative, orders)?, positive),
            false => model.condition(&positive),
        }
        .or_input(|| "read the prompts")
    }

    fn prompts(&self, texts: &[&str], orders: &[Order]) -> JobResult<PromptBatch> {
        let vision = &self.drawer().base.vlm.vision;
        let mut batch = PromptBatch::default();
        for (text, order) in texts.iter().zip(orders) {
            let counts: Vec<usize> =
                order.references.iter().map(|image| vision.num_tokens(image.height, image.width)).collect();
            let ids = match counts.as_slice() {
                [] => encode_text_to_image(&self.tokenizer, text),
                counts => encode_image_to_image(&self.tokenizer, text, counts),
            };
            batch.ids.push(ids.or_input(|| format!("encode {text:?}"))?);
            let image = |image: &Pixels| -> Tensor<3> { tensor(image, &self.device) };
            batch.images.push(order.references.iter().map(image).collect());
        }
        Ok(batch)
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
