//! SD3.5's MMDiT-X with reference images in the sequence (docs/spec/model.md section 4).
//!
//! Knows no text encoder, no noise and no schedule. A uniform batch runs without padding and without a mask; a ragged one
//! is padded on the right and masked, which gives each sample the same result.
//! Shapes: b batch, c latent channels, h and w latent sides, n image tokens, t text tokens, d width.

use burn::module::Module;
use burn::tensor::TensorData;
use deepgen_contract::model::DitConfig;

use crate::dit_block::{EPS, JointBlock, Masks, Modulation};
use crate::embed::{PatchEmbed, TimeTextEmbed, unpatchify};
use crate::fused;
use crate::init::Init;
use crate::nn::{Linear, silu};
use crate::probe::{self, tap};
use crate::{BoolTensor, Tensor};

/// Diffusion transformer: predicts a velocity for noisy latents.
#[derive(Module, Debug)]
pub struct Dit {
    /// Patches and positions.
    pub pos_embed: PatchEmbed,
    /// Timestep and pooled text.
    pub time_text_embed: TimeTextEmbed,
    /// Text condition to the width.
    pub context_embedder: Linear,
    /// Blocks.
    pub transformer_blocks: Vec<JointBlock>,
    /// Scale, then shift, of the last norm.
    pub norm_out: Modulation,
    /// Width to a patch, flattened as (row, column, channel).
    pub proj_out: Linear,
    /// Side of a patch in latent pixels.
    pub patch_size: usize,
}

/// What the velocity depends on besides the latents.
#[derive(Debug, Clone)]
pub struct Condition {
    /// Timestep on the scale 0..1000, f32 [b].
    pub timestep_b: Tensor<1>,
    /// Text condition [b, t, text channels]; never masked.
    pub text_btc: Tensor<3>,
    /// Pooled condition [b, pooled channels].
    pub pooled_bc: Tensor<2>,
}

impl Dit {
    /// Creates a DiT; `init` is the place of the whole model, so that names carry no prefix of their own.
    pub fn new(init: &Init, config: &DitConfig) -> Self {
        let dual: Vec<usize> = (0..config.num_dual_attention_layers).collect();
        Self::with_dual_attention(init, config, &dual)
    }

    /// Creates a DiT whose blocks `dual` carry the second attention, whatever `num_dual_attention_layers` says.
    pub fn with_dual_attention(init: &Init, config: &DitConfig, dual: &[usize]) -> Self {
        let width = config.width();
        let patch = config.in_channels * config.patch_size * config.patch_size;
        let block = |i| JointBlock::new(&init.at("transformer_blocks").at(i), config, i, dual.contains(&i));
        Self {
            pos_embed: PatchEmbed::new(&init.at("pos_embed"), config),
            time_text_embed: TimeTextEmbed::new(&init.at("time_text_embed"), config),
            context_embedder: Linear::with_default_init(
                &init.at("context_embedder"),
                config.joint_attention_dim,
                width,
            ),
            transformer_blocks: (0..config.num_layers).map(block).collect(),
            norm_out: Modulation::new(&init.at("norm_out"), width, 2),
            proj_out: Linear::with_default_init(&init.at("proj_out"), width, patch),
            patch_size: config.patch_size,
        }
    }

    /// Predicts the velocity of a uniform batch: one target size, and the same references' sizes for every sample.
    ///
    /// # Shapes
    /// [b, c, h, w], references [b, c, h_r, w_r] -> [b, c, h, w]
    pub fn forward(&self, latents_bchw: Tensor<4>, condition: &Condition, references: &[Tensor<4>]) -> Tensor<4> {
        let [_, _, h, w] = latents_bchw.dims();
        tap(|| "dit.latents".into(), &latents_bchw);
        tap(|| "dit.timestep".into(), &condition.timestep_b);
        for (place, reference) in references.iter().enumerate() {
            tap(|| format!("dit.reference.{place}"), reference);
        }
        let mut parts = vec![self.pos_embed.forward(latents_bchw)];
        parts.extend(references.iter().map(|reference| self.pos_embed.forward(reference.clone())));
        let x_bnd = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 1) };
        let (rows, columns) = (h / self.patch_size, w / self.patch_size);
        let (x_bnd, activated_bd) = self.run_blocks(x_bnd, condition, None);
        let tokens = self.output(x_bnd.narrow(1, 0, rows * columns), activated_bd);
        let velocity = unpatchify(tokens, rows, columns, self.patch_size);
        tap(|| "dit.velocity".into(), &velocity);
        velocity
    }

    /// Predicts the velocity of any batch: each sample has its own target size and its own references.
    ///
    /// # Shapes
    /// b times [c, h, w], references b times any number of [c, h_r, w_r] -> b times [c, h, w]
    pub fn forward_ragged(
        &self,
        latents: &[Tensor<3>],
        condition: &Condition,
        references: &[Vec<Tensor<3>>],
    ) -> Vec<Tensor<3>> {
        if let Some(stacked) = stack_references(latents, references) {
            let velocity = self.forward(Tensor::stack(latents.to_vec(), 0), condition, &stacked);
            return velocity.split(1, 0).into_iter().map(|sample| sample.squeeze_dim::<3>(0)).collect();
        }
        tap(|| "dit.timestep".into(), &condition.timestep_b);
        for (i, latent) in latents.iter().enumerate() {
            tap(|| "dit.latents".into(), latent);
            for (place, reference) in references.get(i).into_iter().flatten().enumerate() {
                tap(|| format!("dit.reference.{place}"), reference);
            }
        }
        let embed = |latent: &Tensor<3>| self.pos_embed.forward(latent.clone().unsqueeze::<4>());
        let sequences: Vec<Tensor<3>> = latents
            .iter()
            .enumerate()
            .map(|(i, latent)| {
                let parts = std::iter::once(latent).chain(references.get(i).into_iter().flatten());
                Tensor::cat(parts.map(embed).collect(), 1)
            })
            .collect();
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.dims()[1]).collect();
        let n = lengths.iter().copied().max().unwrap_or(0);
        let padded = sequences.into_iter().map(|sequence| pad_right(sequence, n)).collect();
        let masks = build_masks(&lengths, n, condition.text_btc.dims()[1], &condition.text_btc.device());
        if probe::is_on() {
            // The first token is real: it may look at all real ones.
            tap(|| "dit.token_mask".into(), &masks.image.clone().narrow(2, 0, 1).float());
        }
        let (x_bnd, activated_bd) = self.run_blocks(Tensor::cat(padded, 0), condition, Some(&masks));
        let tokens = self.output(x_bnd, activated_bd);
        latents
            .iter()
            .enumerate()
            .map(|(i, latent)| {
                let [_, h, w] = latent.dims();
                let (rows, columns) = (h / self.patch_size, w / self.patch_size);
                let own = tokens.clone().narrow(0, i, 1).narrow(1, 0, rows * columns);
                let velocity = unpatchify(own, rows, columns, self.patch_size).squeeze_dim::<3>(0);
                tap(|| "dit.velocity".into(), &velocity);
                velocity
            })
            .collect()
    }

    /// Returns the image stream after the last block, and silu(temb).
    fn run_blocks(&self, x_bnd: Tensor<3>, condition: &Condition, masks: Option<&Masks>) -> (Tensor<3>, Tensor<2>) {
        let temb = self.time_text_embed.forward(condition.timestep_b.clone(), condition.pooled_bc.clone());
        tap(|| "dit.tokens".into(), &x_bnd);
        tap(|| "dit.temb".into(), &temb);
        let activated_bd = silu(temb);
        let mut x_bnd = x_bnd;
        let mut c_btd = self.context_embedder.forward(condition.text_btc.clone());
        tap(|| "dit.context".into(), &c_btd);
        for (i, block) in self.transformer_blocks.iter().enumerate() {
            (x_bnd, c_btd) = block.forward_checkpointed(x_bnd, c_btd, activated_bd.clone(), masks);
            tap(|| format!("dit.block.{i}.hidden"), &x_bnd);
            tap(|| format!("dit.block.{i}.context"), &c_btd);
        }
        (x_bnd, activated_bd)
    }

    fn output(&self, x_bnd: Tensor<3>, activated_bd: Tensor<2>) -> Tensor<3> {
        // Unlike in the blocks, the scale comes first here.
        let [scale, shift] = self.norm_out.forward(activated_bd);
        self.proj_out.forward(fused::adaptive_norm(x_bnd, scale, shift, EPS))
    }
}

/// Returns the references as one tensor per place if the batch is uniform.
fn stack_references(latents: &[Tensor<3>], references: &[Vec<Tensor<3>>]) -> Option<Vec<Tensor<4>>> {
    let shape = |tensors: &[Tensor<3>]| tensors.iter().map(Tensor::dims).collect::<Vec<_>>();
    let first = references.first().map(Vec::as_slice).unwrap_or_default();
    let has_one_size = latents.windows(2).all(|pair| pair[0].dims() == pair[1].dims());
    let has_same_references =
        (0..latents.len()).all(|i| shape(references.get(i).map(Vec::as_slice).unwrap_or_default()) == shape(first));
    if !has_one_size || !has_same_references {
        return None;
    }
    let place = |r: usize| Tensor::stack(references.iter().map(|own| own[r].clone()).collect(), 0);
    Some((0..first.len()).map(place).collect())
}

fn pad_right(x_1nd: Tensor<3>, n: usize) -> Tensor<3> {
    let [_, own, d] = x_1nd.dims();
    if own == n {
        return x_1nd;
    }
    let zeros = Tensor::zeros([1, n - own, d], (&x_1nd.device(), x_1nd.dtype()));
    Tensor::cat(vec![x_1nd, zeros], 1)
}

/// Returns the pairwise masks: both tokens real, or a token and itself, so that a padded token has one to look at.
fn build_masks(lengths: &[usize], n: usize, t: usize, device: &crate::Device) -> Masks {
    let pairwise = |total: usize| {
        let mut keep = Vec::with_capacity(lengths.len() * total * total);
        for &length in lengths {
            let is_real = |token: usize| token < length || token >= n;
            for row in 0..total {
                keep.extend((0..total).map(|column| row == column || (is_real(row) && is_real(column))));
            }
        }
        BoolTensor::<4>::from_data(TensorData::new(keep, [lengths.len(), 1, total, total]), device)
    };
    Masks { joint: pairwise(n + t), image: pairwise(n) }
}
