//! Floating-point operations of training, counted from the sizes of a model.
//!
//! A multiplication with its addition counts as two operations. Counted are matrix products, convolutions and attention,
//! forwards and backwards. A plan counts text-to-image samples; a running job counts its samples as they are: the padded
//! prompt, the image, and the references, which the vision tower, the autoencoder and the DiT read too. Left out are norms,
//! activations, the optimiser, recomputation and judges. Arithmetic only: what a machine makes of it is measured.

use crate::model::{
    BaseModelConfig, BridgeConfig, DitConfig, LanguageConfig, LoraConfig, ModelSpec, Padding, VaeConfig, VisionConfig,
};
use crate::rl::RlSettings;

/// Tokens of a prompt where they are padded to the longest of a batch: captions of the release's data are about as long.
pub const ASSUMED_PROMPT_TOKENS: usize = 128;

/// Operations of one forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Forward {
    /// Products with weights.
    pub linear: f64,
    /// Products of activations with each other: attention.
    pub attention: f64,
}

impl Forward {
    /// Returns all of them.
    pub fn total(self) -> f64 {
        self.linear + self.attention
    }

    fn and(self, other: Self) -> Self {
        Self { linear: self.linear + other.linear, attention: self.attention + other.attention }
    }

    /// Returns a training step: forwards, and backwards with or without gradients of the weights.
    fn trained(self, reach: Reach) -> f64 {
        match reach {
            Reach::None => self.total(),
            // One more product for the gradient of the input; attention has two inputs.
            Reach::Through => 2.0 * self.linear + 3.0 * self.attention,
            Reach::Trained => 3.0 * self.total(),
        }
    }
}

/// How far gradients get in a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// Nothing before it learns.
    None,
    /// It is frozen, something before it learns.
    Through,
    /// It learns.
    Trained,
}

/// What learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Trained {
    /// The bridge with its think tokens.
    pub bridge: bool,
    /// The diffusion transformer.
    pub dit: bool,
    /// Adapters on the decoder.
    pub lora: bool,
}

fn product(rows: usize, inputs: usize, outputs: usize) -> f64 {
    2.0 * rows as f64 * inputs as f64 * outputs as f64
}

fn attention(queries: usize, keys: usize, width: usize) -> f64 {
    // Scores, then their product with the values.
    2.0 * product(queries, width, keys)
}

impl Trained {
    /// Returns what the names of trained parameters belong to.
    pub fn of_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        names.into_iter().fold(Self::default(), |trained, name| Self {
            bridge: trained.bridge || name.starts_with("bridge."),
            dit: trained.dit || name.starts_with("dit."),
            lora: trained.lora || name.contains("lora_"),
        })
    }
}

/// Sizes of the sequences that a sample of an image side makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Prompt and think tokens: what the decoder, the bridge and the DiT's condition have.
    pub condition: usize,
    /// Patches of the image in the DiT.
    pub image: usize,
}

impl Lengths {
    /// Returns the lengths for an image of `height` x `width` pixels.
    pub fn of(base: &BaseModelConfig, bridge: &BridgeConfig, (height, width): (usize, usize)) -> Self {
        let prompt = match bridge.padding {
            Padding::Fixed(tokens) => tokens,
            Padding::Longest => ASSUMED_PROMPT_TOKENS.min(bridge.max_length),
        };
        Self { condition: prompt + bridge.num_queries, image: patches(base, (height, width)) }
    }
}

/// Patches of an image of `height` x `width` pixels in the DiT.
fn patches(base: &BaseModelConfig, (height, width): (usize, usize)) -> usize {
    let patch = base.vae.downscale() * base.dit.patch_size;
    (height / patch) * (width / patch)
}

/// Sizes of one sample of a running job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleSize {
    /// Tokens of the prompt with its padding; think tokens are not counted.
    pub prompt: usize,
    /// Height and width of the image, in pixels.
    pub image: (usize, usize),
    /// Height and width of each reference, in pixels.
    pub references: Vec<(usize, usize)>,
}

/// Returns the vision tower over an image of `height` x `width` pixels, its merger included.
pub fn vision(config: &VisionConfig, (height, width): (usize, usize)) -> Forward {
    let merge = config.spatial_merge_size;
    let tokens = config.num_tokens(height, width);
    let patches = tokens * merge * merge;
    let (h, m) = (config.hidden_size, config.intermediate_size);
    let block = 4.0 * product(patches, h, h) + 3.0 * product(patches, h, m);
    let merged = h * merge * merge;
    let embedded = config.in_channels * config.temporal_patch_size * config.patch_size * config.patch_size;
    let ends = product(patches, embedded, h)
        + product(tokens, merged, merged)
        + product(tokens, merged, config.out_hidden_size);
    let window = (config.window_size / config.patch_size).pow(2).min(patches);
    let attended = |block: usize| match config.fullatt_block_indexes.contains(&block) {
        true => attention(patches, patches, h),
        false => attention(patches, window, h),
    };
    Forward { linear: config.depth as f64 * block + ends, attention: (0..config.depth).map(attended).sum() }
}

/// Returns the decoder over `tokens`; the language head is not used.
pub fn language(config: &LanguageConfig, tokens: usize) -> Forward {
    let layers = config.num_hidden_layers as f64;
    let products: f64 = config.projections().iter().map(|&(inputs, outputs)| product(tokens, inputs, outputs)).sum();
    Forward { linear: layers * products, attention: layers * attention(tokens, tokens, config.hidden_size) }
}

/// Returns the adapters on the decoder's projections.
fn adapters(config: &LoraConfig, language: &LanguageConfig, tokens: usize) -> Forward {
    let pair = |&(i, o): &(usize, usize)| product(tokens, i, config.rank) + product(tokens, config.rank, o);
    let products: f64 = language.projections().iter().map(pair).sum();
    Forward { linear: language.num_hidden_layers as f64 * products, attention: 0.0 }
}

/// Returns the bridge over `tokens`; `stacked` is the width of what it reads.
pub fn bridge(config: &BridgeConfig, stacked: usize, dit: &DitConfig, tokens: usize) -> Forward {
    let (h, m) = (config.hidden_size, config.intermediate_size);
    let layer = 4.0 * product(tokens, h, h) + product(tokens, h, m) + product(tokens, m, h);
    let layers = config.num_hidden_layers as f64;
    let ends = product(tokens, stacked, h)
        + product(tokens, h, dit.joint_attention_dim)
        + product(1, h, dit.pooled_projection_dim);
    Forward { linear: layers * layer + ends, attention: layers * attention(tokens, tokens, h) }
}

/// Returns the DiT over an image and its condition.
pub fn dit(config: &DitConfig, Lengths { condition, image }: Lengths) -> Forward {
    let d = config.width();
    let patch = config.in_channels * config.patch_size * config.patch_size;
    let mut linear = product(image, patch, d) + product(condition, config.joint_attention_dim, d);
    linear += product(1, 256, d) + product(1, config.pooled_projection_dim, d) + 2.0 * product(1, d, d);
    linear += product(1, d, 2 * d) + product(image, d, patch);
    let mut attended = 0.0;
    for block in 0..config.num_layers {
        let (is_last, is_dual) = (block + 1 == config.num_layers, block < config.num_dual_attention_layers);
        linear +=
            product(1, d, if is_dual { 9 * d } else { 6 * d }) + product(1, d, if is_last { 2 * d } else { 6 * d });
        // Query, key, value and output, then the feed-forward layer of four times the width.
        linear += 12.0 * product(image, d, d) + if is_last { 3.0 } else { 12.0 } * product(condition, d, d);
        attended += attention(image + condition, image + condition, d);
        if is_dual {
            linear += 4.0 * product(image, d, d);
            attended += attention(image, image, d);
        }
    }
    Forward { linear, attention: attended }
}

/// Returns the encoder, or the decoder, of the autoencoder over an image of `height` x `width` pixels.
pub fn vae(config: &VaeConfig, (height, width): (usize, usize), is_decoder: bool) -> Forward {
    let widths = &config.block_out_channels;
    let (first, last) = (widths[0], widths[widths.len() - 1]);
    let pixels = |level: usize| (height >> level) * (width >> level);
    let conv = |level: usize, i: usize, o: usize| product(pixels(level), 9 * i, o);
    let resnet = |level: usize, i: usize, o: usize| {
        conv(level, i, o) + conv(level, o, o) + if i == o { 0.0 } else { product(pixels(level), i, o) }
    };
    let deepest = widths.len() - 1;
    let mut linear = 2.0 * resnet(deepest, last, last) + 4.0 * product(pixels(deepest), last, last);
    if is_decoder {
        linear += conv(deepest, config.latent_channels, last) + conv(0, first, config.in_channels);
        let mut input = last;
        for (step, &output) in widths.iter().rev().enumerate() {
            let level = deepest - step;
            for _ in 0..=config.layers_per_block {
                linear += resnet(level, input, output);
                input = output;
            }
            // Upsampled first, so the convolution runs at the finer level.
            linear += if level > 0 { conv(level - 1, output, output) } else { 0.0 };
        }
    } else {
        linear += conv(0, config.in_channels, first) + conv(deepest, last, 2 * config.latent_channels);
        let mut input = first;
        for (level, &output) in widths.iter().enumerate() {
            for _ in 0..config.layers_per_block {
                linear += resnet(level, input, output);
                input = output;
            }
            linear += if level < deepest { conv(level + 1, output, output) } else { 0.0 };
        }
    }
    Forward { linear, attention: attention(pixels(deepest), pixels(deepest), last) }
}

/// The parts that a sample passes.
struct Passes {
    vision: Forward,
    language: Forward,
    adapters: Forward,
    bridge: Forward,
    dit: Forward,
    encoder: Forward,
}

/// Returns the parts for a text-to-image sample as a plan assumes it.
fn assumed_passes(model: &ModelSpec, side: (usize, usize)) -> Option<Passes> {
    passes(model, Lengths::of(&model.base, model.bridge.as_ref()?, side), side, &[])
}

fn passes(model: &ModelSpec, lengths: Lengths, side: (usize, usize), references: &[(usize, usize)]) -> Option<Passes> {
    let config = model.bridge.as_ref()?;
    let base = &model.base;
    let stacked =
        config.layers.resolve(base.vlm.language.num_hidden_layers).ok()?.len() * base.vlm.language.hidden_size;
    Some(Passes {
        language: language(&base.vlm.language, lengths.condition),
        adapters: model
            .lora
            .as_ref()
            .map_or(Forward::default(), |lora| adapters(lora, &base.vlm.language, lengths.condition)),
        bridge: bridge(config, stacked, &base.dit, lengths.condition),
        dit: dit(&base.dit, lengths),
        encoder: references.iter().fold(vae(&base.vae, side, false), |sum, &side| sum.and(vae(&base.vae, side, false))),
        vision: references.iter().fold(Forward::default(), |sum, &side| sum.and(vision(&base.vlm.vision, side))),
    })
}

/// Returns the operations of a training step on one text-to-image sample; nothing without a bridge.
pub fn training_sample(model: &ModelSpec, trained: Trained, side: (usize, usize)) -> Option<f64> {
    Some(training(model, trained, &assumed_passes(model, side)?))
}

/// Returns the operations of a training step on a sample of these sizes; nothing without a bridge.
pub fn training_step(model: &ModelSpec, trained: Trained, sample: &SampleSize) -> Option<f64> {
    let SampleSize { prompt, image, references } = sample;
    let references_in_dit: usize = references.iter().map(|&side| patches(&model.base, side)).sum();
    let lengths = Lengths {
        condition: prompt + model.bridge.as_ref()?.num_queries,
        image: patches(&model.base, *image) + references_in_dit,
    };
    Some(training(model, trained, &passes(model, lengths, *image, references)?))
}

fn training(model: &ModelSpec, trained: Trained, passes: &Passes) -> f64 {
    let has_queries = model.bridge.as_ref().is_some_and(|bridge| bridge.num_queries > 0);
    // Gradients go back through the DiT and the bridge to the think tokens, which the decoder reads.
    let language = if trained.lora || (trained.bridge && has_queries) { Reach::Through } else { Reach::None };
    let bridge = match (trained.bridge, language) {
        (true, _) => Reach::Trained,
        (false, Reach::None) => Reach::None,
        (false, _) => Reach::Through,
    };
    let dit = match (trained.dit, bridge) {
        (true, _) => Reach::Trained,
        (false, Reach::None) => Reach::None,
        (false, _) => Reach::Through,
    };
    let adapters = if trained.lora { Reach::Trained } else { language };
    passes.vision.total()
        + passes.language.trained(language)
        + passes.adapters.trained(adapters)
        + passes.bridge.trained(bridge)
        + passes.dit.trained(dit)
        + passes.encoder.total()
}

/// Numbers of an iteration of stage 3.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RlIteration {
    /// Prompts.
    pub prompts: usize,
    /// Images.
    pub images: usize,
    /// Denoising steps of an image.
    pub steps: usize,
    /// Steps of an image that are trained on.
    pub trained_steps: usize,
    /// Passes of the DiT for a step: 2 with guidance.
    pub passes: usize,
    /// Whether the policy is compared with itself before the first update.
    pub has_reference: bool,
    /// Samples of the auxiliary loss, averaged over iterations.
    pub auxiliary: f64,
}

impl RlIteration {
    /// Returns the numbers of settings; without auxiliary data there is no auxiliary loss.
    pub fn of(settings: &RlSettings, has_data: bool) -> Self {
        let rollout = &settings.rollout;
        let sft = &settings.sft;
        Self {
            prompts: rollout.prompts,
            images: rollout.prompts * rollout.group_size,
            steps: rollout.steps,
            trained_steps: (rollout.steps as f64 * settings.policy.timestep_fraction).round() as usize,
            passes: if rollout.guidance > 0.0 { 2 } else { 1 },
            has_reference: settings.policy.beta > 0.0,
            auxiliary: if has_data && sft.coef > 0.0 { sft.batch as f64 / sft.every.max(1) as f64 } else { 0.0 },
        }
    }
}

/// Returns the operations of an iteration of stage 3: conditions, rollout, decoding, updates, auxiliary loss.
pub fn rl_iteration(model: &ModelSpec, iteration: &RlIteration, side: (usize, usize)) -> Option<f64> {
    let parts = assumed_passes(model, side)?;
    let condition = parts.language.total() + parts.adapters.total() + parts.bridge.total();
    let images = iteration.images as f64;
    let rollout = images * (iteration.steps * iteration.passes) as f64 * parts.dit.total();
    let decoded = images * vae(&model.base.vae, side, true).total();
    let reference = if iteration.has_reference { parts.dit.total() } else { 0.0 };
    let updates = images * iteration.trained_steps as f64 * (parts.dit.trained(Reach::Trained) + reference);
    let only_dit = Trained { dit: true, ..Trained::default() };
    let auxiliary = iteration.auxiliary * training_sample(model, only_dit, side)?;
    Some(iteration.prompts as f64 * condition + rollout + decoded + updates + auxiliary)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;

    /// The paper's model after stage 2.
    fn paper() -> ModelSpec {
        Preset::Deepgen5b.spec()
    }

    #[test]
    fn the_decoder_counts_as_computed_by_hand() {
        // A layer's products at the released sizes: q and o 2048 x 2048, k and v 2048 x 256, three of 2048 x 11008.
        let weights = 2.0 * 2048.0 * 2048.0 + 2.0 * 2048.0 * 256.0 + 3.0 * 2048.0 * 11008.0;
        assert_eq!(weights, 77_070_336.0);
        let model = paper();
        let forward = language(&model.base.vlm.language, 256);
        assert_eq!(forward.linear, 36.0 * 2.0 * 256.0 * weights);
        assert_eq!(forward.attention, 36.0 * 4.0 * 256.0 * 256.0 * 2048.0);
        // docs/spec/model.md section 7: all but embedding, biases and norms are in products.
        let rest = 151_936 * 2048 + 36 * (2048 + 2 * 256 + 2 * 2048) + 2048;
        assert_eq!(36.0 * weights, (3_085_938_688_u64 - rest) as f64);
    }

    #[test]
    fn a_small_transformer_counts_as_computed_by_hand() {
        let config = DitConfig {
            sample_size: 4,
            patch_size: 2,
            in_channels: 1,
            num_layers: 2,
            num_attention_heads: 1,
            attention_head_dim: 2,
            joint_attention_dim: 3,
            pooled_projection_dim: 5,
            pos_embed_max_size: 4,
            num_dual_attention_layers: 1,
        };
        let forward = dit(&config, Lengths { condition: 3, image: 4 });
        // Ends: patches 4x4->2, condition 3x3->2, time 256->2->2, pooled 5->2->2, last norm 2->4, out 4x2->4.
        let ends = 2.0 * (4.0 * 4.0 * 2.0 + 3.0 * 3.0 * 2.0 + 512.0 + 4.0 + 10.0 + 4.0 + 8.0 + 4.0 * 2.0 * 4.0);
        // First block: modulation 2->18 and 2->12, image 12 and dual 4 products of 4x2x2, condition 12 of 3x2x2.
        let first = 2.0 * (36.0 + 24.0 + 16.0 * 16.0 + 12.0 * 12.0);
        // Last block: modulation 2->12 and 2->4, image 12 products, condition query, key, value alone.
        let last = 2.0 * (24.0 + 8.0 + 12.0 * 16.0 + 3.0 * 12.0);
        assert_eq!(forward.linear, ends + first + last);
        assert_eq!(forward.attention, 2.0 * 4.0 * 49.0 * 2.0 + 4.0 * 16.0 * 2.0);
    }

    #[test]
    fn a_small_autoencoder_counts_as_computed_by_hand() {
        let config = VaeConfig {
            in_channels: 3,
            latent_channels: 2,
            block_out_channels: vec![4, 8],
            layers_per_block: 1,
            norm_num_groups: 1,
            scaling_factor: 1.0,
            shift_factor: 0.0,
        };
        let (fine, coarse) = (64.0, 16.0);
        let conv = |pixels: f64, i: f64, o: f64| 2.0 * pixels * 9.0 * i * o;
        let middle = 4.0 * conv(coarse, 8.0, 8.0) + 4.0 * 2.0 * coarse * 64.0;
        let encoder = conv(fine, 3.0, 4.0)
            + 2.0 * conv(fine, 4.0, 4.0)
            + conv(coarse, 4.0, 4.0)
            + conv(coarse, 4.0, 8.0)
            + conv(coarse, 8.0, 8.0)
            + 2.0 * coarse * 32.0
            + conv(coarse, 8.0, 4.0);
        assert_eq!(vae(&config, (8, 8), false).linear, encoder + middle);
        assert_eq!(vae(&config, (8, 8), false).attention, 4.0 * 16.0 * 16.0 * 8.0);
        let decoder = conv(coarse, 2.0, 8.0)
            + 4.0 * conv(coarse, 8.0, 8.0)
            + conv(fine, 8.0, 8.0)
            + (conv(fine, 8.0, 4.0) + conv(fine, 4.0, 4.0) + 2.0 * fine * 32.0)
            + 2.0 * conv(fine, 4.0, 4.0)
            + conv(fine, 4.0, 3.0);
        assert_eq!(vae(&config, (8, 8), true).linear, decoder + middle);
    }

    #[test]
    fn gradients_reach_what_they_must() {
        let model = paper();
        let side = (512, 512);
        let parts = assumed_passes(&model, side).unwrap();
        let of = |trained: Trained| training_sample(&model, trained, side).unwrap();
        let frozen = of(Trained::default());
        let only_dit = of(Trained { dit: true, ..Trained::default() });
        assert!(
            (only_dit - frozen - 2.0 * parts.dit.total()).abs() < 1e6,
            "the DiT alone learns: nothing else goes back"
        );
        let bridge = of(Trained { bridge: true, ..Trained::default() });
        let back = 2.0 * parts.bridge.total() + parts.dit.linear + 2.0 * parts.dit.attention;
        let through = parts.language.linear + 2.0 * parts.language.attention + parts.adapters.linear;
        assert!((bridge - frozen - back - through).abs() < 1e6, "think tokens are before the decoder");
        let all = of(Trained { bridge: true, dit: true, lora: true });
        assert!((all - bridge - parts.dit.linear - parts.adapters.linear).abs() < 1e6);
    }

    #[test]
    fn a_sample_without_references_counts_as_the_plan_assumes_and_each_reference_adds_to_three_parts() {
        let model = paper();
        let (trained, side) = (Trained { bridge: true, dit: true, lora: true }, (512, 512));
        let mut sample = SampleSize { prompt: ASSUMED_PROMPT_TOKENS, image: side, references: Vec::new() };
        let plain = training_step(&model, trained, &sample).unwrap();
        assert_eq!(plain, training_sample(&model, trained, side).unwrap());
        sample.references.push(side);
        let edit = training_step(&model, trained, &sample).unwrap();
        // The prompt is as long as before: its image tokens are part of the given length.
        let dit = |image: usize| dit(&model.base.dit, Lengths { condition: 256, image }).total();
        let read = vision(&model.base.vlm.vision, side).total() + vae(&model.base.vae, side, false).total();
        let expected = read + 3.0 * (dit(2048) - dit(1024));
        assert!(((edit - plain) / expected - 1.0).abs() < 1e-9, "{} is not {expected}", edit - plain);
    }

    #[test]
    fn a_small_vision_tower_counts_as_computed_by_hand() {
        let config = VisionConfig {
            depth: 2,
            hidden_size: 4,
            intermediate_size: 6,
            num_heads: 1,
            in_channels: 3,
            patch_size: 2,
            temporal_patch_size: 2,
            spatial_merge_size: 2,
            window_size: 4,
            fullatt_block_indexes: vec![1],
            out_hidden_size: 5,
            input_scale: [1, 1],
        };
        // 8 x 8 pixels: 16 patches in four windows of 4, 4 merged tokens of width 16.
        let forward = vision(&config, (8, 8));
        let blocks = 2.0 * 2.0 * 16.0 * (4.0 * 16.0 + 3.0 * 24.0);
        let ends = 2.0 * (16.0 * 24.0 * 4.0 + 4.0 * 16.0 * 16.0 + 4.0 * 16.0 * 5.0);
        assert_eq!(forward.linear, blocks + ends);
        assert_eq!(forward.attention, 4.0 * 16.0 * 4.0 * 4.0 + 4.0 * 16.0 * 16.0 * 4.0);
    }
}
