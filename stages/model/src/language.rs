//! The Qwen2.5-VL text decoder: embeddings in, chosen entries of the hidden-state tuple out
//! (docs/spec/model.md sections 2.2, 2.6, 2.7).
//!
//! Layers that no chosen entry needs are not run. The attention output at padded queries is zero, as under flash
//! attention. Knows nothing of images or prompts. Legend: b batch, l positions, h heads, d channels of a head.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::TensorData;
use deepgen_contract::model::LanguageConfig;

use crate::attention::attention;
use crate::checkpointing;
use crate::fused;
use crate::init::{Fill, Init};
use crate::nn::{Embedding, Linear, RmsNorm, product};
use crate::rope::{PositionIds, Rotary};
use crate::{BoolTensor, Device, Tensor};

/// Standard deviation of fresh weights (`initializer_range` of the Qwen2.5-VL config).
pub const INIT_STD: f64 = 0.02;

/// Causal attention with grouped key and value heads.
#[derive(Module, Debug)]
pub struct SelfAttention {
    /// Queries.
    pub q_proj: Linear,
    /// Keys.
    pub k_proj: Linear,
    /// Values.
    pub v_proj: Linear,
    /// Output, without bias.
    pub o_proj: Linear,
    num_heads: usize,
    num_key_value_heads: usize,
}

/// SiLU-gated feed-forward layer without biases.
#[derive(Module, Debug)]
pub struct GatedMlp {
    /// Gate.
    pub gate_proj: Linear,
    /// Values.
    pub up_proj: Linear,
    /// Output.
    pub down_proj: Linear,
}

/// One pre-norm decoder layer.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Attention.
    pub self_attn: SelfAttention,
    /// Feed-forward layer.
    pub mlp: GatedMlp,
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Norm before the feed-forward layer.
    pub post_attention_layernorm: RmsNorm,
}

/// The decoder with its tied embedding.
#[derive(Module, Debug)]
pub struct LanguageModel {
    /// Token embedding, also the language head.
    pub embed_tokens: Embedding,
    /// Layers.
    pub layers: Vec<DecoderLayer>,
    /// Norm of the last state.
    pub norm: RmsNorm,
    #[module(skip)]
    config: LanguageConfig,
}

/// Keys and values of one layer, rotated already, `[b, h, positions, d]`.
#[derive(Debug, Clone, Default)]
struct KeysValues(Option<(Tensor<4>, Tensor<4>)>);

impl KeysValues {
    fn append(&mut self, k: Tensor<4>, v: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let both = match self.0.take() {
            Some((past_k, past_v)) => (Tensor::cat(vec![past_k, k], 2), Tensor::cat(vec![past_v, v], 2)),
            None => (k, v),
        };
        self.0.insert(both).clone()
    }
}

/// What the decoder remembers of the positions it has read: makes the next token cost one position, not all.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    layers: Vec<KeysValues>,
    is_real: Vec<Vec<bool>>,
}

/// What every layer of one forward pass shares.
struct Context {
    rotary: Rotary,
    /// True where a query may look at a key. A padded query sees nothing, and attention gives it zeros.
    mask_b1ls: BoolTensor<4>,
}

impl Context {
    fn new(positions: &PositionIds, is_real: &[Vec<bool>], config: &LanguageConfig, device: &Device) -> Self {
        let s = is_real.first().map_or(0, Vec::len);
        let l = positions.axis[0].first().map_or(0, Vec::len);
        let has_padding = is_real.iter().flatten().any(|real| !real);
        // Without padding all rows are alike, and one mask serves them all.
        let rows = if has_padding { is_real } else { &is_real[..is_real.len().min(1)] };
        let mut mask = Vec::with_capacity(rows.len() * l * s);
        for row in rows {
            for query in s - l..s {
                mask.extend((0..s).map(|key| row[query] && row[key] && key <= query));
            }
        }
        let mask_b1ls = BoolTensor::from_data(TensorData::new(mask, [rows.len(), 1, l, s]), device);
        Self { rotary: Rotary::text(positions, config, device), mask_b1ls }
    }
}

impl SelfAttention {
    /// `past` holds the keys and values of the positions before, and gets those of `x_bld` appended.
    fn forward(&self, x_bld: Tensor<3>, context: &Context, past: Option<&mut KeysValues>) -> Tensor<3> {
        let [b, l, width] = x_bld.dims();
        let d = width / self.num_heads;
        let heads = |x: Tensor<3>, num: usize| -> Tensor<4> { x.reshape([b, l, num, d]).swap_dims(1, 2) };
        let q = context.rotary.apply(heads(self.q_proj.forward(x_bld.clone()), self.num_heads));
        let k = context.rotary.apply(heads(self.k_proj.forward(x_bld.clone()), self.num_key_value_heads));
        let v = heads(self.v_proj.forward(x_bld), self.num_key_value_heads);
        let (k, v) = match past {
            Some(past) => past.append(k, v),
            None => (k, v),
        };
        let out = attention(q, k, v, Some(context.mask_b1ls.clone()));
        self.o_proj.forward(out.swap_dims(1, 2).reshape([b, l, width]))
    }
}

impl GatedMlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.down_proj.forward(fused::gated_silu(self.gate_proj.forward(x.clone()), self.up_proj.forward(x)))
    }
}

impl DecoderLayer {
    fn new(init: &Init, config: &LanguageConfig) -> Self {
        let [q, k, v, o, gate, up, down] = config.projections();
        let linear = |name: &str, (inputs, outputs): (usize, usize), bias| {
            Linear::new(&init.at(name), inputs, outputs, Fill::Normal(INIT_STD), bias)
        };
        let norm = |name: &str| RmsNorm::new(&init.at(name), config.hidden_size, config.rms_norm_eps);
        Self {
            self_attn: SelfAttention {
                q_proj: linear("self_attn.q_proj", q, Some(Fill::Zeros)),
                k_proj: linear("self_attn.k_proj", k, Some(Fill::Zeros)),
                v_proj: linear("self_attn.v_proj", v, Some(Fill::Zeros)),
                o_proj: linear("self_attn.o_proj", o, None),
                num_heads: config.num_attention_heads,
                num_key_value_heads: config.num_key_value_heads,
            },
            mlp: GatedMlp {
                gate_proj: linear("mlp.gate_proj", gate, None),
                up_proj: linear("mlp.up_proj", up, None),
                down_proj: linear("mlp.down_proj", down, None),
            },
            input_layernorm: norm("input_layernorm"),
            post_attention_layernorm: norm("post_attention_layernorm"),
        }
    }

    /// [`DecoderLayer::forward`], kept on the tape by its input alone where activation checkpointing is on.
    fn forward_checkpointed(&self, x: Tensor<3>, context: &Arc<Context>) -> Tensor<3> {
        if !checkpointing::is_on() {
            return self.forward(x, context, None);
        }
        let (shape, context) = (x.dims(), context.clone());
        let count = shape.iter().product::<usize>();
        let run =
            move |layer: &Self, [x]: [Tensor<1>; 1]| layer.forward(x.reshape(shape), &context, None).reshape([count]);
        checkpointing::run_block(self, [x.reshape([count])], run).reshape(shape)
    }

    fn forward(&self, x: Tensor<3>, context: &Context, past: Option<&mut KeysValues>) -> Tensor<3> {
        let x = x.clone() + self.self_attn.forward(self.input_layernorm.forward(x), context, past);
        x.clone() + self.mlp.forward(self.post_attention_layernorm.forward(x))
    }
}

impl LanguageModel {
    /// Creates a decoder with fresh weights.
    pub fn new(init: &Init, config: &LanguageConfig) -> Self {
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        Self {
            embed_tokens: Embedding::new(&init.at("embed_tokens"), vocabulary, hidden, Fill::Normal(INIT_STD)),
            layers: (0..config.num_hidden_layers)
                .map(|i| DecoderLayer::new(&init.at("layers").at(i), config))
                .collect(),
            norm: RmsNorm::new(&init.at("norm"), hidden, config.rms_norm_eps),
            config: config.clone(),
        }
    }

    /// Returns the hidden states named by `entries` (0 = embeddings, k = after k layers, the number of layers = the
    /// last state after the final norm), in the order of `entries`.
    ///
    /// # Shapes
    /// - `embeds_bld`: `[batch, positions, hidden]`; each returned state likewise
    /// - `is_real`: batch x positions, false on padding
    ///
    /// # Panics
    /// When an entry is larger than the number of layers; [`deepgen_contract::model::BridgeLayers::resolve`] forbids it.
    pub fn hidden_states(
        &self,
        embeds_bld: Tensor<3>,
        positions: &PositionIds,
        is_real: &[Vec<bool>],
        entries: &[usize],
    ) -> Vec<Tensor<3>> {
        let last = entries.iter().copied().max().unwrap_or(0);
        assert!(last <= self.layers.len(), "hidden state {last} of a decoder of {} layers", self.layers.len());
        let context = Arc::new(Context::new(positions, is_real, &self.config, &embeds_bld.device()));
        let mut states: Vec<Option<Tensor<3>>> = vec![None; entries.len()];
        let mut keep = |entry: usize, state: &Tensor<3>| {
            for (slot, _) in states.iter_mut().zip(entries).filter(|&(_, &wanted)| wanted == entry) {
                *slot = Some(state.clone());
            }
        };
        let mut x = embeds_bld;
        keep(0, &x);
        for (i, layer) in self.layers.iter().take(last).enumerate() {
            x = layer.forward_checkpointed(x, &context);
            if i + 1 == self.layers.len() {
                x = self.norm.forward(x);
            }
            keep(i + 1, &x);
        }
        states.into_iter().flatten().collect()
    }

    /// Reads on after the positions that `cache` holds, appends the new ones to it, and returns their normalised last
    /// states.
    ///
    /// # Shapes
    /// - `embeds_bld`: `[batch, new positions, hidden]`, returned with the same shape
    /// - `is_real`: batch x new positions, false on padding
    pub fn read_on(
        &self,
        embeds_bld: Tensor<3>,
        positions: &PositionIds,
        is_real: &[Vec<bool>],
        cache: &mut KvCache,
    ) -> Tensor<3> {
        cache.is_real.resize(is_real.len(), Vec::new());
        for (all, new) in cache.is_real.iter_mut().zip(is_real) {
            all.extend(new);
        }
        cache.layers.resize_with(self.layers.len(), KeysValues::default);
        let context = Context::new(positions, &cache.is_real, &self.config, &embeds_bld.device());
        let layers = self.layers.iter().zip(&mut cache.layers);
        self.norm.forward(layers.fold(embeds_bld, |x, (layer, past)| layer.forward(x, &context, Some(past))))
    }

    /// Returns the logits of normalised last states, through the tied embedding.
    ///
    /// # Shapes
    /// - `hidden_bld`: `[batch, positions, hidden]`; returned `[batch, positions, vocab]`
    pub fn logits(&self, hidden_bld: Tensor<3>) -> Tensor<3> {
        product(hidden_bld, self.embed_tokens.weight.val(), None)
    }
}
