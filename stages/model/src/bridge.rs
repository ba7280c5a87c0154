//! Stacked Channel Bridging: learned queries, projectors and the connector between decoder and DiT
//! (docs/spec/model.md section 3).
//!
//! The connector is bidirectional, without mask, positions or final norm: padding reaches it as content.
//! Knows neither decoder nor DiT, only their widths. Legend: b batch, t positions, s stacked channels, c connector
//! width, h heads, d channels of a head.

use burn::module::{Module, Param};
use deepgen_contract::model::{BridgeConfig, DitConfig, LanguageConfig};

use crate::Tensor;
use crate::attention::attention;
use crate::init::{Fill, Init};
use crate::nn::{LayerNorm, Linear, gelu_tanh};
use crate::probe::tap;

/// Standard deviation of the feed-forward layers' fresh biases.
const MLP_BIAS_STD: f64 = 1e-6;

/// What the DiT is conditioned on.
#[derive(Debug, Clone)]
pub struct Condition {
    /// `[batch, positions, joint width]`: the text stream, padding included.
    pub sequence: Tensor<3>,
    /// `[batch, pooled width]`.
    pub pooled: Tensor<2>,
}

impl Condition {
    /// Returns rows `start .. start + len` of the batch.
    pub fn rows(&self, start: usize, len: usize) -> Self {
        Self {
            sequence: self.sequence.clone().narrow(0, start, len),
            pooled: self.pooled.clone().narrow(0, start, len),
        }
    }

    /// Returns the condition cut off from the tape.
    pub fn detach(self) -> Self {
        Self { sequence: self.sequence.detach(), pooled: self.pooled.detach() }
    }
}

/// Bidirectional attention of the connector.
#[derive(Module, Debug)]
pub struct ConnectorAttention {
    /// Queries.
    pub q_proj: Linear,
    /// Keys.
    pub k_proj: Linear,
    /// Values.
    pub v_proj: Linear,
    /// Output.
    pub out_proj: Linear,
    num_heads: usize,
}

/// Feed-forward layer of the connector.
#[derive(Module, Debug)]
pub struct ConnectorMlp {
    /// In.
    pub fc1: Linear,
    /// Out.
    pub fc2: Linear,
}

/// One pre-norm layer of the connector.
#[derive(Module, Debug)]
pub struct ConnectorLayer {
    /// Norm before attention.
    pub layer_norm1: LayerNorm,
    /// Attention.
    pub self_attn: ConnectorAttention,
    /// Norm before the feed-forward layer.
    pub layer_norm2: LayerNorm,
    /// Feed-forward layer.
    pub mlp: ConnectorMlp,
}

/// The connector: a transformer encoder.
#[derive(Module, Debug)]
pub struct Connector {
    /// Its layers.
    pub layers: Vec<ConnectorLayer>,
}

/// Everything between the decoder's hidden states and the DiT.
#[derive(Module, Debug)]
pub struct Bridge {
    /// Think tokens `[queries, decoder width]`; absent without think tokens.
    pub meta_queries: Option<Param<Tensor<2>>>,
    /// Stacked states to the connector.
    pub projector_1: Linear,
    /// The connector.
    pub connector: Connector,
    /// Mean of the connector's output to the pooled condition; starts at zero.
    pub projector_2: Linear,
    /// Connector's output to the text stream; starts at zero.
    pub projector_3: Linear,
    #[module(skip)]
    layers: Vec<usize>,
}

impl ConnectorLayer {
    fn new(init: &Init, config: &BridgeConfig) -> Self {
        let (c, m) = (config.hidden_size, config.intermediate_size);
        let norm = |name: &str| LayerNorm::new(&init.at(name), c, config.layer_norm_eps);
        let projection = |name: &str| Linear::with_xavier_init(&init.at("self_attn").at(name), c, c);
        let dense = |name: &str, inputs, outputs| {
            let bias = Some(Fill::Normal(MLP_BIAS_STD));
            Linear::new(&init.at("mlp").at(name), inputs, outputs, Fill::xavier(inputs, outputs), bias)
        };
        Self {
            layer_norm1: norm("layer_norm1"),
            self_attn: ConnectorAttention {
                q_proj: projection("q_proj"),
                k_proj: projection("k_proj"),
                v_proj: projection("v_proj"),
                out_proj: projection("out_proj"),
                num_heads: config.num_attention_heads,
            },
            layer_norm2: norm("layer_norm2"),
            mlp: ConnectorMlp { fc1: dense("fc1", c, m), fc2: dense("fc2", m, c) },
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = x.clone() + self.self_attn.forward(self.layer_norm1.forward(x));
        x.clone() + self.mlp.forward(self.layer_norm2.forward(x))
    }
}

impl ConnectorAttention {
    fn forward(&self, x_btc: Tensor<3>) -> Tensor<3> {
        let [b, t, c] = x_btc.dims();
        let heads =
            |x: Tensor<3>| -> Tensor<4> { x.reshape([b, t, self.num_heads, c / self.num_heads]).swap_dims(1, 2) };
        let q = heads(self.q_proj.forward(x_btc.clone()));
        let k = heads(self.k_proj.forward(x_btc.clone()));
        let v = heads(self.v_proj.forward(x_btc));
        self.out_proj.forward(attention(q, k, v, None).swap_dims(1, 2).reshape([b, t, c]))
    }
}

impl ConnectorMlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.fc2.forward(gelu_tanh(self.fc1.forward(x)))
    }
}

impl Bridge {
    /// Creates a bridge by the reference's initialisation: a fresh bridge gives conditions that are exactly zero.
    ///
    /// # Errors
    /// When the stacked layers do not exist in the decoder.
    pub fn new(init: &Init, config: &BridgeConfig, language: &LanguageConfig, dit: &DitConfig) -> Result<Self, String> {
        let layers = config.layers.resolve(language.num_hidden_layers)?;
        let (width, c) = (language.hidden_size, config.hidden_size);
        let zeros = |name: &str, outputs| Linear::new(&init.at(name), c, outputs, Fill::Zeros, Some(Fill::Zeros));
        let query_std = 1.0 / (width as f64).sqrt();
        Ok(Self {
            meta_queries: (config.num_queries > 0)
                .then(|| init.param("meta_queries", [config.num_queries, width], Fill::Normal(query_std))),
            projector_1: Linear::with_default_init(&init.at("projector_1"), layers.len() * width, c),
            connector: Connector {
                layers: (0..config.num_hidden_layers)
                    .map(|i| ConnectorLayer::new(&init.at("connector.layers").at(i), config))
                    .collect(),
            },
            projector_2: zeros("projector_2", dit.pooled_projection_dim),
            projector_3: zeros("projector_3", dit.joint_attention_dim),
            layers,
        })
    }

    /// Returns the entries of the hidden-state tuple that are stacked, in channel order.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// Returns the think tokens, if the bridge has any.
    pub fn queries(&self) -> Option<Tensor<2>> {
        self.meta_queries.as_ref().map(Param::val)
    }

    /// Turns the stacked hidden states into the DiT's conditions.
    ///
    /// # Shapes
    /// - `stacked_bts`: `[batch, positions, stacked layers * decoder width]`
    pub fn forward(&self, stacked_bts: Tensor<3>) -> Condition {
        tap(|| "bridge.stacked".into(), &stacked_bts);
        let mut x = self.projector_1.forward(stacked_bts);
        tap(|| "bridge.projector_1".into(), &x);
        for (i, layer) in self.connector.layers.iter().enumerate() {
            x = layer.forward(x);
            tap(|| format!("bridge.layer.{i}"), &x);
        }
        let mean = x.clone().mean_dim(1).squeeze_dim(1);
        let condition = Condition { pooled: self.projector_2.forward(mean), sequence: self.projector_3.forward(x) };
        tap(|| "bridge.pooled".into(), &condition.pooled);
        tap(|| "bridge.sequence".into(), &condition.sequence);
        condition
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use deepgen_contract::model::{BridgeLayers, Padding};

    #[test]
    fn a_fresh_bridge_gives_zero_conditions_and_only_the_last_projectors_learn_at_first() {
        let device = Device::flex().autodiff();
        let config = BridgeConfig {
            layers: BridgeLayers::Listed(vec![2, 1]),
            num_queries: 0,
            hidden_size: 8,
            intermediate_size: 12,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            layer_norm_eps: 1e-6,
            padding: Padding::Longest,
            max_length: 8,
        };
        let language = LanguageConfig {
            vocab_size: 4,
            hidden_size: 4,
            intermediate_size: 4,
            num_hidden_layers: 3,
            num_attention_heads: 1,
            num_key_value_heads: 1,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            mrope_section: [1, 1, 0],
        };
        let dit = DitConfig {
            sample_size: 8,
            patch_size: 2,
            in_channels: 4,
            num_layers: 1,
            num_attention_heads: 1,
            attention_head_dim: 4,
            joint_attention_dim: 6,
            pooled_projection_dim: 5,
            pos_embed_max_size: 4,
            num_dual_attention_layers: 0,
        };
        let bridge = Bridge::new(&Init::new(1, &device), &config, &language, &dit).unwrap();
        assert!(bridge.queries().is_none());
        let condition = bridge.forward(Tensor::<3>::ones([1, 3, 8], &device));
        assert_eq!(condition.sequence.dims(), [1, 3, 6]);
        assert_eq!(condition.pooled.dims(), [1, 5]);
        assert_eq!(condition.sequence.clone().abs().sum().into_scalar::<f32>(), 0.0);
        let grads = (condition.sequence.sum() + condition.pooled.sum()).backward();
        let size = |w: &Param<Tensor<2>>| w.val().grad(&grads).map_or(0.0, |g| g.abs().sum().into_scalar::<f32>());
        assert!(size(&bridge.projector_3.weight) > 0.0);
        assert_eq!(size(&bridge.projector_1.weight), 0.0);
    }
}
