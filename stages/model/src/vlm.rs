//! The vision-language model: prompts and reference images in, hidden states of the decoder out
//! (docs/spec/model.md sections 2.4 to 2.8, 9.3).
//!
//! Pads on the left, replaces image tokens by vision rows, appends the learned queries, cuts over-long prompts at their
//! beginning. Knows no tokenizer and no template: prompts are token ids. Legend: b batch, l tokens, t tokens and
//! queries, d decoder width, v rows of all images.

use burn::module::Module;
use burn::tensor::{DType, FloatDType, TensorData};
use deepgen_contract::model::{LanguageConfig, Padding, VlmConfig};

use crate::fused;
use crate::init::{Fill, Init};
use crate::language::{INIT_STD, LanguageModel};
pub use crate::layout::{Frame, Layout, VlmError};
use crate::nn::{Linear, to_dtype};
use crate::probe::tap;
use crate::rope::Grid;
use crate::vision::VisionTower;
use crate::weights::{Held, WeightFile, WeightsError, load_into_held};
use crate::{Device, IntTensor, Tensor};

/// Prompts with their reference images.
#[derive(Debug, Clone, Default)]
pub struct PromptBatch {
    /// Token ids of each prompt, without padding.
    pub ids: Vec<Vec<u32>>,
    /// Images `[3, height, width]` in [-1, 1] of each prompt, in the order of their image tokens.
    pub images: Vec<Vec<Tensor<3>>>,
    /// What [`Vlm::encode_images`] gave for all of the images in order, if that was done before.
    pub vision: Option<Vec<Tensor<2>>>,
    /// Sizes of the batch that these prompts are a part of; nothing for a batch of its own.
    pub within: Frame,
}

impl PromptBatch {
    /// Makes a batch of prompts with their images.
    pub fn new(ids: Vec<Vec<u32>>, images: Vec<Vec<Tensor<3>>>) -> Self {
        Self { ids, images, vision: None, within: Frame::default() }
    }

    /// Makes a batch of prompts without images.
    pub fn text(ids: Vec<Vec<u32>>) -> Self {
        let images = vec![Vec::new(); ids.len()];
        Self::new(ids, images)
    }

    /// Returns the prompts of `self` followed by those of `other`.
    pub fn followed_by(mut self, other: Self) -> Self {
        self.ids.extend(other.ids);
        self.images.extend(other.images);
        self.vision = self.vision.zip(other.vision).map(|(own, other)| [own, other].concat());
        self.within = self.within.with(other.within);
        self
    }
}

/// How a batch of prompts is read.
#[derive(Debug, Clone)]
pub struct Reading<'a> {
    /// Learned queries `[queries, d]`, appended to every prompt.
    pub queries: Option<Tensor<2>>,
    /// Padding on the left.
    pub padding: Padding,
    /// Longest prompt, image tokens not counted; `None` cuts nothing, as at inference.
    pub max_length: Option<usize>,
    /// Entries of the hidden-state tuple to return.
    pub entries: &'a [usize],
    /// Whether gradient flows into the vision tower. DeepGen never lets it.
    pub is_vision_trained: bool,
}

/// The vision-language model.
#[derive(Module, Debug)]
pub struct Vlm {
    /// Vision tower.
    pub visual: VisionTower,
    /// Text decoder.
    pub model: LanguageModel,
    /// Language head of its own; absent when the embedding is the head, as in the release.
    pub lm_head: Option<Linear>,
    #[module(skip)]
    config: VlmConfig,
    #[module(skip)]
    compute: DType,
}

impl Vlm {
    /// Creates a model with fresh weights.
    pub fn new(init: &Init, config: &VlmConfig) -> Self {
        Self {
            visual: VisionTower::new(&init.at("visual"), &config.vision),
            model: LanguageModel::new(&init.at("model"), &config.language),
            lm_head: None,
            config: config.clone(),
            compute: DType::F32,
        }
    }

    /// Computes in `dtype` from now on, whatever types the parameters are held in.
    pub fn computing_in(self, dtype: FloatDType) -> Self {
        Self { compute: dtype.into(), ..self }
    }

    /// Returns the type that the model computes in.
    pub fn dtype(&self) -> DType {
        self.compute
    }

    /// Gives the model a language head of its own, with fresh weights.
    pub fn with_own_head(mut self) -> Self {
        let LanguageConfig { vocab_size, hidden_size, .. } = self.config.language;
        let init = Init::new(0, &self.device()).at("lm_head");
        self.lm_head = Some(Linear::new(&init, hidden_size, vocab_size, Fill::Normal(INIT_STD), None));
        self
    }

    /// Loads base weights in any of the spellings of [`hub_name`]; adapters in `file` are passed over, and so is its head
    /// where the model has none of its own.
    ///
    /// # Errors
    /// When a tensor is missing, unknown or of another shape.
    pub fn load(self, file: &WeightFile) -> Result<Self, WeightsError> {
        self.load_held(file, Held::F32)
    }

    /// Like [`Vlm::load`], held as `held` says.
    ///
    /// # Errors
    /// See [`Vlm::load`].
    pub fn load_held(self, file: &WeightFile, held: Held) -> Result<Self, WeightsError> {
        let has_head = self.lm_head.is_some();
        let file = file
            .clone()
            .rename(|name| Some(hub_name(name)).filter(|name| !is_adapter(name) && (has_head || !is_head(name))));
        load_into_held(self, &file, "", held)
    }

    /// Returns the settings.
    pub fn config(&self) -> &VlmConfig {
        &self.config
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> Device {
        self.model.embed_tokens.weight.lazy_device()
    }

    /// Returns the hidden states that `reading` asks for, each `[b, t, d]`.
    ///
    /// # Errors
    /// See [`Layout::new`].
    pub fn hidden_states(&self, batch: &PromptBatch, reading: &Reading<'_>) -> Result<Vec<Tensor<3>>, VlmError> {
        let (embeds, layout) = self.embed(batch, reading)?;
        Ok(self.model.hidden_states(embeds, &layout.positions, &layout.is_real, reading.entries))
    }

    /// Returns the decoder's input `[b, t, d]`, vision rows and queries in place, and its layout.
    ///
    /// # Errors
    /// See [`Layout::new`].
    pub fn embed(&self, batch: &PromptBatch, reading: &Reading<'_>) -> Result<(Tensor<3>, Layout), VlmError> {
        let grid = |image: &Tensor<3>| {
            let [_, height, width] = image.dims();
            self.visual.grid(height, width)
        };
        let grids: Vec<Vec<Grid>> = batch.images.iter().map(|images| images.iter().map(grid).collect()).collect();
        let num_queries = reading.queries.as_ref().map_or(0, |queries| queries.dims()[0]);
        let cut = (reading.padding, num_queries, reading.max_length);
        let layout = Layout::within(batch.within, &batch.ids, &grids, &self.config.tokens, cut)?;

        let vision = match &batch.vision {
            Some(vision) => vision.clone(),
            None => self.encode_images(&batch.images.concat()),
        };
        let vision = if reading.is_vision_trained { vision } else { vision.into_iter().map(Tensor::detach).collect() };
        let embeds = self.assemble(&layout, vision, reading.queries.clone());
        tap(|| "vlm.inputs_embeds".into(), &embeds);
        Ok((embeds, layout))
    }

    /// Returns the tokens `[tokens, d]` that the vision tower makes of each image `[3, height, width]` in [-1, 1].
    pub fn encode_images(&self, images: &[Tensor<3>]) -> Vec<Tensor<2>> {
        let images: Vec<Tensor<3>> = images.iter().map(|image| to_dtype(image.clone(), self.compute)).collect();
        self.visual.encode(&images)
    }

    /// Returns the decoder's input `[b, t, d]` for a layout, the rows of its images in order, and its queries.
    pub fn assemble(&self, layout: &Layout, vision: Vec<Tensor<2>>, queries: Option<Tensor<2>>) -> Tensor<3> {
        let mut embeds = self.place_images(&layout.ids, vision);
        let [b, _, d] = embeds.dims();
        if let Some(queries) = queries {
            let [q, _] = queries.dims();
            let queries = to_dtype(queries, embeds.dtype()).unsqueeze::<3>().expand([b, q, d]);
            embeds = Tensor::cat(vec![embeds, queries], 1);
        }
        if layout.num_cut == 0 {
            return embeds;
        }
        let [_, t, _] = embeds.dims();
        embeds.narrow(1, layout.num_cut, t - layout.num_cut)
    }

    /// Looks up the ids and puts the vision rows, in order, where the image tokens are.
    fn place_images(&self, ids: &[Vec<u32>], vision: Vec<Tensor<2>>) -> Tensor<3> {
        let device = self.device();
        let (b, l) = (ids.len(), ids.first().map_or(0, Vec::len));
        let flat: Vec<i64> = ids.iter().flatten().map(|&id| i64::from(id)).collect();
        let ids_bl = IntTensor::from_data(TensorData::new(flat, [b, l]), &device);
        let embeds_bld = self.model.embed_tokens.forward(ids_bl, self.compute);
        if vision.is_empty() {
            return embeds_bld;
        }
        // One table of text rows and vision rows; each place of the result names the row it takes.
        let [_, _, d] = embeds_bld.dims();
        let mut next_image_row = (b * l) as i64;
        let rows: Vec<i64> = ids
            .iter()
            .flatten()
            .enumerate()
            .map(|(place, &id)| {
                if id == self.config.tokens.image_pad {
                    next_image_row += 1;
                    next_image_row - 1
                } else {
                    place as i64
                }
            })
            .collect();
        let dtype = embeds_bld.dtype();
        let vision = vision.into_iter().map(|rows| to_dtype(rows, dtype));
        let table = Tensor::cat(std::iter::once(embeds_bld.reshape([b * l, d])).chain(vision).collect(), 0);
        table.select(0, IntTensor::from_data(TensorData::new(rows, [b * l]), &device)).reshape([b, l, d])
    }

    /// Returns the mean cross-entropy of the last `num_targets[row]` tokens of each row: what captioning trains on.
    ///
    /// Gradient flows into the vision tower.
    ///
    /// # Errors
    /// See [`Layout::new`].
    pub fn caption_loss(&self, batch: &PromptBatch, num_targets: &[usize]) -> Result<Tensor<1>, VlmError> {
        let last = [self.config.language.num_hidden_layers];
        let reading = Reading {
            queries: None,
            padding: Padding::Longest,
            max_length: None,
            entries: &last,
            is_vision_trained: true,
        };
        let (embeds, layout) = self.embed(batch, &reading)?;
        let device = embeds.device();
        let [b, l, d] = embeds.dims();
        let mut states = self.model.hidden_states(embeds, &layout.positions, &layout.is_real, &last);
        let state = states.remove(0).reshape([b * l, d]);
        let (mut places, mut targets) = (Vec::new(), Vec::new());
        for (row, (ids, &num)) in layout.ids.iter().zip(num_targets).enumerate() {
            // A row's first token has no predecessor, so it is never a target.
            let first = l.saturating_sub(num).max(1);
            for (position, &id) in ids.iter().enumerate().skip(first) {
                places.push((row * l + position - 1) as i64);
                targets.push(id as usize);
            }
        }
        let num = places.len();
        let predictors = state.select(0, IntTensor::from_data(TensorData::new(places, [num]), &device));
        let logits: Tensor<2> = self.logits(predictors.unsqueeze::<3>()).squeeze_dim(0);
        Ok(fused::cross_entropy(logits, targets))
    }

    /// Returns the logits of the token that follows each prompt, `[b, vocab]`.
    ///
    /// # Errors
    /// See [`Layout::new`].
    pub fn next_token_logits(&self, batch: &PromptBatch) -> Result<Tensor<2>, VlmError> {
        let last = [self.config.language.num_hidden_layers];
        let reading = Reading {
            queries: None,
            padding: Padding::Longest,
            max_length: None,
            entries: &last,
            is_vision_trained: false,
        };
        let state = self.hidden_states(batch, &reading)?.remove(0);
        let [_, l, _] = state.dims();
        Ok(self.logits(state.narrow(1, l - 1, 1)).squeeze_dim(1))
    }

    /// Returns the logits of normalised last states, through the model's own head or the tied embedding.
    ///
    /// # Shapes
    /// - `hidden_bld`: `[b, l, d]`; returned `[b, l, vocab]`
    pub fn logits(&self, hidden_bld: Tensor<3>) -> Tensor<3> {
        match &self.lm_head {
            Some(head) => head.forward(hidden_bld),
            None => self.model.logits(hidden_bld),
        }
    }
}

/// Beginnings of names that wrap the model in whole-model checkpoints and adapter files, outermost first.
const WRAPPERS: [&str; 3] = ["base_model.model.", "module.", "lmm."];
/// Spellings of newer libraries, theirs and the hub's.
const SPELLINGS: [(&str, &str); 3] =
    [("model.visual.", "visual."), ("model.language_model.", "model."), ("language_model.model.", "model.")];

/// Returns the hub spelling of a tensor name in any known spelling, adapters included.
///
/// | found in | example |
/// |---|---|
/// | hub files | `model.layers.0.mlp.up_proj.weight`, `visual.blocks.0.norm1.weight` |
/// | newer libraries | `model.language_model.layers.0...`, `model.visual.blocks.0...` |
/// | whole-model checkpoints | `lmm.` before either; `.base_layer.` where an adapter sits |
/// | adapter files | `base_model.model.` before either; no `.default` |
pub fn hub_name(name: &str) -> String {
    let mut name = name;
    for wrapper in WRAPPERS {
        name = name.strip_prefix(wrapper).unwrap_or(name);
    }
    let spelled = SPELLINGS.iter().find_map(|(theirs, ours)| Some(format!("{ours}{}", name.strip_prefix(theirs)?)));
    let name = spelled.unwrap_or_else(|| name.into()).replace(".base_layer.", ".");
    for kind in ["A", "B"] {
        if let Some(layer) = name.strip_suffix(&format!(".lora_{kind}.weight")) {
            return format!("{layer}.lora_{kind}.default.weight");
        }
        if let Some(layer) = name.strip_suffix(&format!(".lora_embedding_{kind}")) {
            return format!("{layer}.lora_embedding_{kind}.default");
        }
    }
    name
}

/// Returns whether a parameter name, in the hub's spelling, belongs to a language head of its own.
pub fn is_head(name: &str) -> bool {
    name.starts_with("lm_head.")
}

/// Returns whether a parameter name is an adapter's.
pub fn is_adapter(name: &str) -> bool {
    name.contains(".lora_")
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation::log_softmax;

    use super::*;
    use crate::random::noise;
    use crate::weights::for_each_param;
    use deepgen_contract::model::{SpecialTokens, VisionConfig};

    const TOKENS: SpecialTokens = SpecialTokens { pad: 3, vision_start: 7, vision_end: 8, image_pad: 9, video_pad: 10 };

    #[test]
    fn every_spelling_becomes_the_hubs() {
        let layer = "model.layers.0.self_attn.q_proj";
        for (theirs, ours) in [
            ("lmm.model.language_model.layers.0.self_attn.q_proj.base_layer.weight", format!("{layer}.weight")),
            ("lmm.model.layers.0.self_attn.q_proj.weight", format!("{layer}.weight")),
            (
                "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
                format!("{layer}.lora_A.default.weight"),
            ),
            ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight".into()),
            ("lmm.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight".into()),
            (
                "base_model.model.model.language_model.embed_tokens.lora_embedding_B",
                "model.embed_tokens.lora_embedding_B.default".into(),
            ),
        ] {
            assert_eq!(hub_name(theirs), ours);
        }
        assert_eq!(hub_name("lmm.lm_head.base_layer.weight"), "lm_head.weight");
    }

    /// The shapes world's proportions: 32-pixel images are 4 x 4 tokens in four windows.
    fn small() -> VlmConfig {
        VlmConfig {
            language: LanguageConfig {
                vocab_size: 16,
                hidden_size: 64,
                intermediate_size: 96,
                num_hidden_layers: 2,
                num_attention_heads: 2,
                num_key_value_heads: 1,
                rms_norm_eps: 1e-6,
                rope_theta: 1e6,
                mrope_section: [4, 6, 6],
            },
            vision: VisionConfig {
                depth: 2,
                hidden_size: 32,
                intermediate_size: 48,
                num_heads: 2,
                in_channels: 3,
                patch_size: 4,
                temporal_patch_size: 2,
                spatial_merge_size: 2,
                window_size: 16,
                fullatt_block_indexes: vec![1],
                out_hidden_size: 64,
                input_scale: [1, 1],
            },
            tokens: TOKENS,
        }
    }

    fn captioned(device: &Device, caption: &[u32]) -> (Vec<u32>, Vec<Tensor<3>>) {
        let ids = [7].into_iter().chain([9; 16]).chain([8]).chain(caption.iter().copied()).collect();
        (ids, vec![noise(1, "image", [3, 32, 32], device)])
    }

    #[test]
    fn a_caption_of_one_token_costs_its_log_probability_and_teaches_both_towers() {
        let device = Device::flex().autodiff();
        let vlm = Vlm::new(&Init::new(5, &device), &small());
        let (ids, images) = captioned(&device, &[4, 5]);
        let shorter = PromptBatch::new(vec![ids[..ids.len() - 1].to_vec()], vec![images.clone()]);
        let log_probabilities = log_softmax(vlm.next_token_logits(&shorter).unwrap(), 1);
        let expected = -log_probabilities.into_data().iter::<f32>().nth(5).unwrap();
        let loss = vlm.caption_loss(&PromptBatch::new(vec![ids], vec![images]), &[1]).unwrap();
        assert!((loss.clone().into_scalar::<f32>() - expected).abs() < 1e-5);
        let gradients = loss.backward();
        let mut num_without = 0;
        for_each_param(&vlm, |_, param| num_without += usize::from(param.grad(&gradients).is_none()));
        assert_eq!(num_without, 0);
    }

    #[test]
    fn images_of_one_size_encode_in_one_batch_as_they_do_alone() {
        let device = Device::flex();
        let vlm = Vlm::new(&Init::new(5, &device), &small());
        let image = |name: &str, side| noise(2, name, [3, side, side], &device);
        let images = [image("a", 32), image("b", 24), image("c", 32)];
        let together = vlm.visual.encode(&images);
        assert_eq!(together[1].dims(), [9, 64]);
        for (image, tokens) in images.iter().zip(together) {
            let alone = vlm.visual.encode(std::slice::from_ref(image)).remove(0);
            assert!((alone - tokens).abs().max().into_scalar::<f32>() < 1e-5);
        }
    }
}
