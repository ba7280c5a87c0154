//! CLIP: a text tower and an image tower whose outputs meet in one space (Radford et al. 2021), as transformers lays it out.
//!
//! The `clip_sim` reward's model. Knows neither pictures nor texts: pixels are prepared and texts are ids.
//! Shapes: b batch, l positions, d width, c channels, p projection width.

use burn::module::{Module, Param};
use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, TensorData};
use serde::Deserialize;

use crate::attention::attention;
use crate::embed::patchify;
use crate::fused;
use crate::init::{Fill, Init};
use crate::nn::{Embedding, LayerNorm, Linear, gelu_erf};
use crate::weights::{WeightFile, WeightsError, load_into};
use crate::{BoolTensor, IntTensor, Tensor};

/// Standard deviation of fresh embeddings.
const INIT_STD: f64 = 0.02;
/// Slope of the sigmoid in [`HiddenAct::QuickGelu`].
const QUICK_GELU_SLOPE: f64 = 1.702;
/// End-of-text id of old config files, which do not mean it: they meant the largest id of a text.
const LEGACY_EOS: u32 = 2;

/// Activation of the feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenAct {
    /// x sigmoid(1.702 x).
    QuickGelu,
    /// GELU with the error function.
    Gelu,
}

/// The text tower's settings; the defaults are the library's.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct ClipTextConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Longest text.
    pub max_position_embeddings: usize,
    /// Activation.
    pub hidden_act: HiddenAct,
    /// Epsilon of the norms.
    pub layer_norm_eps: f64,
    /// Id of the token that the text's feature is read at.
    pub eos_token_id: u32,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: HiddenAct::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

/// The image tower's settings; the defaults are the library's.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct ClipVisionConfig {
    /// Width.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Image channels.
    pub num_channels: usize,
    /// Side of the images in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Activation.
    pub hidden_act: HiddenAct,
    /// Epsilon of the norms.
    pub layer_norm_eps: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: HiddenAct::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

/// A model's config.json; other keys of it are passed over.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ClipConfig {
    /// Text tower.
    #[serde(default)]
    pub text_config: ClipTextConfig,
    /// Image tower.
    #[serde(default)]
    pub vision_config: ClipVisionConfig,
    /// Width of the space that both towers project to.
    pub projection_dim: usize,
}

/// Self-attention of either tower.
#[derive(Module, Debug)]
pub struct ClipAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    num_heads: usize,
}

/// Feed-forward layer of either tower.
#[derive(Module, Debug)]
pub struct ClipMlp {
    fc1: Linear,
    fc2: Linear,
    #[module(skip)]
    act: HiddenAct,
}

/// One pre-norm layer of either tower.
#[derive(Module, Debug)]
pub struct ClipLayer {
    layer_norm1: LayerNorm,
    self_attn: ClipAttention,
    layer_norm2: LayerNorm,
    mlp: ClipMlp,
}

/// The layers of a tower.
#[derive(Module, Debug)]
pub struct ClipEncoder {
    layers: Vec<ClipLayer>,
}

/// What an encoder's sizes come from.
struct Sizes {
    width: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    act: HiddenAct,
    eps: f64,
}

impl ClipEncoder {
    fn new(init: &Init, sizes: &Sizes) -> Self {
        let d = sizes.width;
        let layer = |i: usize| {
            let init = init.at("layers").at(i);
            let linear = |name: &str, inputs, outputs| Linear::with_default_init(&init.at(name), inputs, outputs);
            ClipLayer {
                layer_norm1: LayerNorm::new(&init.at("layer_norm1"), d, sizes.eps),
                self_attn: ClipAttention {
                    q_proj: linear("self_attn.q_proj", d, d),
                    k_proj: linear("self_attn.k_proj", d, d),
                    v_proj: linear("self_attn.v_proj", d, d),
                    out_proj: linear("self_attn.out_proj", d, d),
                    num_heads: sizes.heads,
                },
                layer_norm2: LayerNorm::new(&init.at("layer_norm2"), d, sizes.eps),
                mlp: ClipMlp {
                    fc1: linear("mlp.fc1", d, sizes.intermediate),
                    fc2: linear("mlp.fc2", sizes.intermediate, d),
                    act: sizes.act,
                },
            }
        };
        Self { layers: (0..sizes.layers).map(layer).collect() }
    }

    fn forward(&self, x_bld: Tensor<3>, mask: Option<&BoolTensor<4>>) -> Tensor<3> {
        self.layers.iter().fold(x_bld, |x, layer| {
            let x = x.clone() + layer.self_attn.forward(layer.layer_norm1.forward(x), mask.cloned());
            x.clone() + layer.mlp.forward(layer.layer_norm2.forward(x))
        })
    }
}

impl ClipAttention {
    fn forward(&self, x_bld: Tensor<3>, mask: Option<BoolTensor<4>>) -> Tensor<3> {
        let [b, l, d] = x_bld.dims();
        let heads = |linear: &Linear| -> Tensor<4> {
            linear.forward(x_bld.clone()).reshape([b, l, self.num_heads, d / self.num_heads]).swap_dims(1, 2)
        };
        let y = attention(heads(&self.q_proj), heads(&self.k_proj), heads(&self.v_proj), mask);
        self.out_proj.forward(y.swap_dims(1, 2).reshape([b, l, d]))
    }
}

impl ClipMlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = self.fc1.forward(x);
        self.fc2.forward(match self.act {
            HiddenAct::QuickGelu => x.clone() * sigmoid(x.mul_scalar(QUICK_GELU_SLOPE)),
            HiddenAct::Gelu => gelu_erf(x),
        })
    }
}

/// Tokens with their positions.
#[derive(Module, Debug)]
pub struct ClipTextEmbeddings {
    token_embedding: Embedding,
    position_embedding: Embedding,
}

/// The text tower.
#[derive(Module, Debug)]
pub struct ClipText {
    embeddings: ClipTextEmbeddings,
    encoder: ClipEncoder,
    final_layer_norm: LayerNorm,
}

/// The patch embedding's kernel, without bias.
#[derive(Module, Debug)]
pub struct ClipPatchKernel {
    /// [d, c, side, side].
    weight: Param<Tensor<4>>,
}

/// Patches with a class token and positions.
#[derive(Module, Debug)]
pub struct ClipVisionEmbeddings {
    /// [d].
    class_embedding: Param<Tensor<1>>,
    patch_embedding: ClipPatchKernel,
    position_embedding: Embedding,
}

/// The image tower.
#[derive(Module, Debug)]
pub struct ClipVision {
    embeddings: ClipVisionEmbeddings,
    /// The library's spelling.
    pre_layrnorm: LayerNorm,
    encoder: ClipEncoder,
    post_layernorm: LayerNorm,
}

/// Both towers with their projections.
#[derive(Module, Debug)]
pub struct Clip {
    text_model: ClipText,
    vision_model: ClipVision,
    text_projection: Linear,
    visual_projection: Linear,
    /// Logarithm of the scale of logits.
    logit_scale: f32,
    eos_token_id: u32,
}

/// What a tower makes of its inputs.
#[derive(Debug, Clone)]
pub struct TowerOutput {
    /// Last states [b, l, d]: normalised ones of the text tower, raw ones of the image tower.
    pub states: Tensor<3>,
    /// The normalised state that stands for the whole input [b, d].
    pub pooled: Tensor<2>,
    /// Its projection [b, p].
    pub features: Tensor<2>,
}

impl Clip {
    /// Creates a model with fresh weights.
    pub fn new(init: &Init, config: &ClipConfig) -> Self {
        let (text, vision, p) = (&config.text_config, &config.vision_config, config.projection_dim);
        let table = |init: Init, rows, width| Embedding::new(&init, rows, width, Fill::Normal(INIT_STD));
        let (at_text, at_vision) = (init.at("text_model"), init.at("vision_model"));
        let side = vision.patch_size;
        let num_patches = (vision.image_size / side) * (vision.image_size / side);
        let kernel = [vision.hidden_size, vision.num_channels, side, side];
        let projection = |name: &str, d| Linear::new(&init.at(name), d, p, Fill::Normal(INIT_STD), None);
        Self {
            text_model: ClipText {
                embeddings: ClipTextEmbeddings {
                    token_embedding: table(at_text.at("token"), text.vocab_size, text.hidden_size),
                    position_embedding: table(at_text.at("position"), text.max_position_embeddings, text.hidden_size),
                },
                encoder: ClipEncoder::new(
                    &at_text.at("encoder"),
                    &Sizes {
                        width: text.hidden_size,
                        intermediate: text.intermediate_size,
                        layers: text.num_hidden_layers,
                        heads: text.num_attention_heads,
                        act: text.hidden_act,
                        eps: text.layer_norm_eps,
                    },
                ),
                final_layer_norm: LayerNorm::new(&at_text.at("norm"), text.hidden_size, text.layer_norm_eps),
            },
            vision_model: ClipVision {
                embeddings: ClipVisionEmbeddings {
                    class_embedding: at_vision.param("class", [vision.hidden_size], Fill::Normal(INIT_STD)),
                    patch_embedding: ClipPatchKernel {
                        weight: at_vision.param("patch", kernel, Fill::Normal(INIT_STD)),
                    },
                    position_embedding: table(at_vision.at("position"), num_patches + 1, vision.hidden_size),
                },
                pre_layrnorm: LayerNorm::new(&at_vision.at("pre"), vision.hidden_size, vision.layer_norm_eps),
                encoder: ClipEncoder::new(
                    &at_vision.at("encoder"),
                    &Sizes {
                        width: vision.hidden_size,
                        intermediate: vision.intermediate_size,
                        layers: vision.num_hidden_layers,
                        heads: vision.num_attention_heads,
                        act: vision.hidden_act,
                        eps: vision.layer_norm_eps,
                    },
                ),
                post_layernorm: LayerNorm::new(&at_vision.at("post"), vision.hidden_size, vision.layer_norm_eps),
            },
            text_projection: projection("text_projection", text.hidden_size),
            visual_projection: projection("visual_projection", vision.hidden_size),
            logit_scale: 0.0,
            eos_token_id: text.eos_token_id,
        }
    }

    /// Loads a model as transformers saves it.
    ///
    /// # Errors
    /// When a tensor is missing, unknown or of another shape.
    pub fn load(self, file: &WeightFile) -> Result<Self, WeightsError> {
        let scale = file.get("logit_scale")?.iter::<f32>().next().unwrap_or_default();
        // Old files also store the positions' indices.
        let is_weight = |name: &str| name != "logit_scale" && !name.ends_with(".position_ids");
        let weights = file.clone().rename(|name| is_weight(name).then(|| name.to_owned()));
        Ok(Self { logit_scale: scale, ..load_into(self, &weights, "")? })
    }

    /// Reads texts, padded on the right to one length; `is_real` is false on padding.
    pub fn read(&self, ids: &[Vec<u32>], is_real: &[Vec<bool>]) -> TowerOutput {
        let tower = &self.text_model;
        let device = tower.embeddings.token_embedding.weight.lazy_device();
        let (b, l) = (ids.len(), ids.first().map_or(0, Vec::len));
        let flat: Vec<i64> = ids.iter().flatten().map(|&id| i64::from(id)).collect();
        let tokens = tower
            .embeddings
            .token_embedding
            .forward(IntTensor::from_data(TensorData::new(flat, [b, l]), &device), DType::F32);
        let positions = tower.embeddings.position_embedding.weight.val().narrow(0, 0, l).unsqueeze::<3>();
        let mut mask = Vec::with_capacity(b * l * l);
        for row in is_real {
            for query in 0..l {
                mask.extend((0..l).map(|key| key <= query && row[key]));
            }
        }
        let mask = BoolTensor::<4>::from_data(TensorData::new(mask, [b, 1, l, l]), &device);
        let states = tower.final_layer_norm.forward(tower.encoder.forward(tokens + positions, Some(&mask)));
        let [_, _, d] = states.dims();
        let places: Vec<i64> = ids.iter().enumerate().map(|(row, ids)| (row * l + self.end_of(ids)) as i64).collect();
        let places = IntTensor::<1>::from_data(TensorData::new(places, [b]), &device);
        let pooled = states.clone().reshape([b * l, d]).select(0, places);
        TowerOutput { features: self.text_projection.forward(pooled.clone()), pooled, states }
    }

    /// Returns the place of a text's end: the first end-of-text token, or the largest id under old configs.
    fn end_of(&self, ids: &[u32]) -> usize {
        if self.eos_token_id == LEGACY_EOS {
            let largest = ids.iter().max();
            return ids.iter().position(|id| Some(id) == largest).unwrap_or(0);
        }
        ids.iter().position(|&id| id == self.eos_token_id).unwrap_or(0)
    }

    /// Looks at images.
    ///
    /// # Shapes
    /// normalised pixels [b, c, side, side]
    pub fn see(&self, pixels_bchw: Tensor<4>) -> TowerOutput {
        let tower = &self.vision_model;
        let kernel = tower.embeddings.patch_embedding.weight.val();
        let [d, c, side, _] = kernel.dims();
        let [b, _, _, _] = pixels_bchw.dims();
        let patches = fused::linear(patchify(pixels_bchw, side), kernel.reshape([d, c * side * side]), None);
        let class = tower.embeddings.class_embedding.val().reshape([1, 1, d]).expand([b, 1, d]);
        let positions = tower.embeddings.position_embedding.weight.val().unsqueeze::<3>();
        let x = Tensor::cat(vec![class, patches], 1) + positions;
        let states = tower.encoder.forward(tower.pre_layrnorm.forward(x), None);
        let pooled = tower.post_layernorm.forward(states.clone().narrow(1, 0, 1).squeeze_dim::<2>(1));
        TowerOutput { features: self.visual_projection.forward(pooled.clone()), pooled, states }
    }

    /// Returns how well each image fits each text, scaled as in training: [images, texts] of unit vectors.
    pub fn logits_per_image(&self, images: Tensor<2>, texts: Tensor<2>) -> Tensor<2> {
        images.matmul(texts.transpose()).mul_scalar(self.logit_scale.exp())
    }
}

/// Scales features to length one.
pub fn unit(features: Tensor<2>) -> Tensor<2> {
    let length = features.clone().square().sum_dim(1).sqrt();
    features / length
}

/// Returns the cosine of text `i` and image `i`, for as many as there are of both: neither scaled nor clamped.
pub fn similarities(texts: Tensor<2>, images: Tensor<2>) -> Tensor<1> {
    let count = texts.dims()[0].min(images.dims()[0]);
    let pairs = unit(texts.narrow(0, 0, count)) * unit(images.narrow(0, 0, count));
    pairs.sum_dim(1).reshape([count])
}
