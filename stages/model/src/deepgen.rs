//! The whole model: vision-language model, bridge, DiT and autoencoder, wired as in docs/spec/model.md section 0.
//!
//! Wires only: arithmetic lives in the parts. Draws nothing: noise levels and noise are arguments. Gradient flows through
//! the decoder to the think tokens and through the DiT to the bridge; the vision tower and the autoencoder get none.
//! Knows no tokenizer, no optimiser and no schedule of its own.

use burn::module::Module;
use burn::tensor::{DType, FloatDType};
use deepgen_contract::model::{BridgeConfig, ModelSpec};

use crate::bridge::{Bridge, Condition};
use crate::dit::{self, Dit};
use crate::flow::{add_noise, ragged_loss};
use crate::nn::to_dtype;
use crate::parts::{Parts, PartsError};
use crate::vae::{Posterior, Vae};
use crate::vlm::{PromptBatch, Reading, Vlm, VlmError};
use crate::{Device, Tensor};

/// DeepGen: reads prompts and reference images, predicts velocities of latents.
#[derive(Module, Debug)]
pub struct DeepGen {
    /// Reads prompts.
    pub vlm: Vlm,
    /// Turns hidden states into conditions.
    pub bridge: Bridge,
    /// Predicts velocities.
    pub dit: Dit,
    /// Images to latents and back.
    pub vae: Vae,
    #[module(skip)]
    spec: ModelSpec,
    #[module(skip)]
    bridge_config: BridgeConfig,
    #[module(skip)]
    compute: DType,
}

/// Clean latents with what was drawn for them: what a loss is computed on.
#[derive(Debug, Clone, Default)]
pub struct FlowTargets {
    /// Clean latents `[channels, h, w]` of each sample; sizes may differ.
    pub latents: Vec<Tensor<3>>,
    /// Noise of the same shapes.
    pub noise: Vec<Tensor<3>>,
    /// Noise level of each sample, from [`crate::flow::TrainingTable`].
    pub sigmas: Vec<f32>,
    /// Latents of each sample's references; a list per sample, or no list at all for text to image.
    pub references: Vec<Vec<Tensor<3>>>,
}

/// What a forward pass of training gives.
#[derive(Debug, Clone)]
pub struct FlowOutput {
    /// Predicted velocities, one per sample.
    pub velocities: Vec<Tensor<3>>,
    /// Mean over samples of each sample's mean squared error.
    pub loss: Tensor<1>,
}

impl DeepGen {
    /// Puts the parts together.
    ///
    /// # Errors
    /// Names the first part that is missing.
    pub fn from_parts(parts: Parts) -> Result<Self, PartsError> {
        let bridge_config = parts.spec.bridge.clone().ok_or(PartsError::Missing("bridge"))?;
        Ok(Self {
            vlm: parts.vlm.ok_or(PartsError::Missing("vision-language model"))?,
            bridge: parts.bridge.ok_or(PartsError::Missing("bridge"))?,
            dit: parts.dit.ok_or(PartsError::Missing("diffusion transformer"))?,
            vae: parts.vae.ok_or(PartsError::Missing("autoencoder"))?,
            spec: parts.spec,
            bridge_config,
            compute: DType::F32,
        })
    }

    /// Computes in `dtype` from now on, whatever types the parameters are held in. Norm statistics, softmax, rotary
    /// angles, timestep sinusoid and loss stay in f32 (docs/spec/model.md section 8).
    pub fn computing_in(self, dtype: FloatDType) -> Self {
        Self { vlm: self.vlm.computing_in(dtype), compute: dtype.into(), ..self }
    }

    /// Takes the parts apart; the base's own text encoder is not among them.
    pub fn into_parts(self) -> Parts {
        Parts {
            spec: self.spec,
            vlm: Some(self.vlm),
            bridge: Some(self.bridge),
            dit: Some(self.dit),
            vae: Some(self.vae),
            conditioner: None,
        }
    }

    /// Returns the description.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> Device {
        self.vlm.device()
    }

    /// Reads prompts as at inference: nothing is cut.
    ///
    /// # Errors
    /// When the prompts and their images do not fit together or do not fit the padding.
    pub fn condition(&self, prompts: &PromptBatch) -> Result<Condition, VlmError> {
        Ok(self.bridge.forward(self.stacked_states(prompts, None)?))
    }

    /// Reads prompts as in training: over-long ones lose their beginning.
    ///
    /// # Errors
    /// See [`DeepGen::condition`].
    pub fn training_condition(&self, prompts: &PromptBatch) -> Result<Condition, VlmError> {
        Ok(self.bridge.forward(self.stacked_states(prompts, Some(self.bridge_config.max_length))?))
    }

    /// Reads negative and positive prompts in one batch, so that both get the same padding (docs/spec/sft.md 8.1).
    ///
    /// The rows are those that [`crate::sampler::Guided`] expects: all negative ones, then all positive ones. For
    /// editing, both halves carry the same images.
    ///
    /// # Errors
    /// See [`DeepGen::condition`].
    pub fn guidance_condition(&self, negative: PromptBatch, positive: PromptBatch) -> Result<Condition, VlmError> {
        self.condition(&negative.followed_by(positive))
    }

    /// Returns the decoder states that the bridge reads, side by side on the channel axis.
    ///
    /// # Errors
    /// See [`DeepGen::condition`].
    pub fn stacked_states(&self, prompts: &PromptBatch, max_length: Option<usize>) -> Result<Tensor<3>, VlmError> {
        let reading = Reading {
            queries: self.bridge.queries(),
            padding: self.bridge_config.padding,
            max_length,
            entries: self.bridge.layers(),
            is_vision_trained: false,
        };
        Ok(Tensor::cat(self.vlm.hidden_states(prompts, &reading)?, 2))
    }

    /// Predicts the velocity of a uniform batch.
    ///
    /// # Shapes
    /// - `latents_bchw`: `[b, c, h, w]`, returned with the same shape; each reference `[b, c, h_r, w_r]`
    /// - `timestep_b`: `[b]`, 1000 times the noise level, f32
    pub fn velocity(
        &self,
        latents_bchw: Tensor<4>,
        timestep_b: Tensor<1>,
        condition: &Condition,
        references: &[Tensor<4>],
    ) -> Tensor<4> {
        let dtype = self.dtype();
        let references: Vec<Tensor<4>> = references.iter().map(|latent| to_dtype(latent.clone(), dtype)).collect();
        self.dit.forward(to_dtype(latents_bchw, dtype), &self.dit_condition(timestep_b, condition), &references)
    }

    /// Predicts the velocities of samples of any sizes with any references.
    pub fn velocity_ragged(
        &self,
        latents: &[Tensor<3>],
        timestep_b: Tensor<1>,
        condition: &Condition,
        references: &[Vec<Tensor<3>>],
    ) -> Vec<Tensor<3>> {
        let dtype = self.dtype();
        let cast = |latents: &[Tensor<3>]| -> Vec<Tensor<3>> {
            latents.iter().map(|latent| to_dtype(latent.clone(), dtype)).collect()
        };
        let references: Vec<Vec<Tensor<3>>> = references.iter().map(|own| cast(own)).collect();
        self.dit.forward_ragged(&cast(latents), &self.dit_condition(timestep_b, condition), &references)
    }

    /// Computes the flow-matching loss of text to image (no references) or of editing (docs/spec/sft.md sections 1, 2).
    ///
    /// `sigma_dtype` is the type that noise levels are rounded to before mixing.
    ///
    /// # Errors
    /// See [`DeepGen::condition`].
    pub fn flow_loss(
        &self,
        prompts: &PromptBatch,
        targets: &FlowTargets,
        sigma_dtype: FloatDType,
    ) -> Result<FlowOutput, VlmError> {
        let condition = self.training_condition(prompts)?;
        Ok(self.flow_loss_under(&condition, targets, sigma_dtype))
    }

    /// Computes the flow-matching loss under conditions that were made before.
    pub fn flow_loss_under(&self, condition: &Condition, targets: &FlowTargets, sigma_dtype: FloatDType) -> FlowOutput {
        let dtype = self.dtype();
        let batch_of_one = |tensor: &Tensor<3>| to_dtype(tensor.clone(), dtype).unsqueeze::<4>();
        let noisy: Vec<_> = targets
            .latents
            .iter()
            .zip(&targets.noise)
            .zip(&targets.sigmas)
            .map(|((latent, noise), &sigma)| {
                add_noise(batch_of_one(latent), batch_of_one(noise), &[sigma], sigma_dtype)
            })
            .collect();
        let timestep_b = Tensor::cat(noisy.iter().map(|own| own.timestep_b.clone()).collect(), 0);
        let latents: Vec<Tensor<3>> = noisy.iter().map(|own| own.latents.clone().squeeze_dim(0)).collect();
        let velocities = self.velocity_ragged(&latents, timestep_b, condition, &targets.references);
        let pairs = velocities.iter().zip(noisy).map(|(velocity, own)| (velocity.clone().unsqueeze::<4>(), own.target));
        let loss = ragged_loss(pairs);
        FlowOutput { velocities, loss }
    }

    /// Encodes images in [-1, 1] to latents sampled with `noise`, off the tape.
    ///
    /// # Shapes
    /// - `pixels`: `[b, 3, height, width]`; `noise` and the result `[b, c, height / s, width / s]`
    pub fn encode(&self, pixels: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        self.latents(self.posterior(pixels), noise)
    }

    /// Encodes images in [-1, 1] to the autoencoder's moments, off the tape.
    ///
    /// # Shapes
    /// - `pixels`: `[b, 3, height, width]`; the moments are `[b, c, height / s, width / s]`
    pub fn posterior(&self, pixels: Tensor<4>) -> Posterior {
        let Posterior { mean, logvar } = self.vae.encode(to_dtype(pixels, self.dtype()));
        Posterior { mean: mean.detach(), logvar: logvar.detach() }
    }

    /// Samples the DiT's latents from moments with `noise` of their shape, off the tape.
    pub fn latents(&self, posterior: Posterior, noise: Tensor<4>) -> Tensor<4> {
        self.vae.normalize(posterior.sample(to_dtype(noise, self.dtype()))).detach()
    }

    /// Decodes latents to images in about [-1, 1], off the tape.
    ///
    /// # Shapes
    /// - `latents`: `[b, c, h, w]`; returned `[b, 3, h * s, w * s]`
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        self.vae.from_latents(to_dtype(latents, self.dtype())).detach()
    }

    fn dit_condition(&self, timestep_b: Tensor<1>, condition: &Condition) -> dit::Condition {
        let dtype = self.dtype();
        dit::Condition {
            timestep_b,
            text_btc: to_dtype(condition.sequence.clone(), dtype),
            pooled_bc: to_dtype(condition.pooled.clone(), dtype),
        }
    }

    /// Returns the type that the model computes in.
    pub fn dtype(&self) -> DType {
        self.compute
    }
}
