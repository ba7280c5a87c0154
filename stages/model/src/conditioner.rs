//! The shapes world's own text encoder: it stands for the T5 and CLIP that SD3.5 was trained on.
//!
//! Knows no tokenizer. Not part of the paper: a small bidirectional pre-LN transformer over padded captions.
//! Shapes: b batch, t tokens, d width.

use burn::module::{Module, Param};
use burn::tensor::DType;
use deepgen_contract::model::ConditionerConfig;

use crate::attention::attention;
use crate::init::{Fill, Init};
use crate::nn::{Embedding, LayerNorm, Linear, gelu_tanh, to_f32};
use crate::{IntTensor, Tensor};

/// Epsilon of the norms.
const EPS: f64 = 1e-6;
/// Standard deviation of token and position embeddings.
const EMBEDDING_STD: f64 = 0.7;

#[derive(Module, Debug)]
struct EncoderLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    num_heads: usize,
}

impl EncoderLayer {
    fn new(init: &Init, config: &ConditionerConfig) -> Self {
        let d = config.hidden_size;
        let linear = |name: &str, inputs, outputs| Linear::with_default_init(&init.at(name), inputs, outputs);
        Self {
            layer_norm1: LayerNorm::new(&init.at("layer_norm1"), d, EPS),
            q_proj: linear("q_proj", d, d),
            k_proj: linear("k_proj", d, d),
            v_proj: linear("v_proj", d, d),
            out_proj: linear("out_proj", d, d),
            layer_norm2: LayerNorm::new(&init.at("layer_norm2"), d, EPS),
            fc1: linear("fc1", d, 4 * d),
            fc2: linear("fc2", 4 * d, d),
            num_heads: config.num_attention_heads,
        }
    }

    fn forward(&self, x_btd: Tensor<3>) -> Tensor<3> {
        let [b, t, d] = x_btd.dims();
        let normed = self.layer_norm1.forward(x_btd.clone());
        let heads = |linear: &Linear| {
            linear.forward(normed.clone()).reshape([b, t, self.num_heads, d / self.num_heads]).swap_dims(1, 2)
        };
        let y = attention(heads(&self.q_proj), heads(&self.k_proj), heads(&self.v_proj), None);
        let x_btd = x_btd + self.out_proj.forward(y.swap_dims(1, 2).reshape([b, t, d]));
        let y = self.fc1.forward(self.layer_norm2.forward(x_btd.clone()));
        x_btd + self.fc2.forward(gelu_tanh(y))
    }
}

/// Caption encoder: gives the DiT its text condition and its pooled condition.
#[derive(Module, Debug)]
pub struct Conditioner {
    token_embedding: Embedding,
    /// [tokens, d].
    position_embedding: Param<Tensor<2>>,
    layers: Vec<EncoderLayer>,
    final_norm: LayerNorm,
}

impl Conditioner {
    /// Creates an encoder.
    pub fn new(init: &Init, config: &ConditionerConfig) -> Self {
        let (d, fill) = (config.hidden_size, Fill::Normal(EMBEDDING_STD));
        let layer = |i: usize| EncoderLayer::new(&init.at("layers").at(i), config);
        Self {
            token_embedding: Embedding::new(&init.at("token_embedding"), config.vocab_size, d, fill),
            position_embedding: init.param("position_embedding", [config.num_tokens, d], fill),
            layers: (0..config.num_hidden_layers).map(layer).collect(),
            final_norm: LayerNorm::new(&init.at("final_norm"), d, EPS),
        }
    }

    /// Returns the sequence and its mean over all positions, padding included, as the paper's connector does.
    ///
    /// # Shapes
    /// ids [b, t] -> [b, t, d], [b, d]
    pub fn forward(&self, ids_bt: IntTensor<2>) -> (Tensor<3>, Tensor<2>) {
        let t = ids_bt.dims()[1];
        // It is small and runs once a prompt: f32, on every device.
        let positions = to_f32(self.position_embedding.val().narrow(0, 0, t)).unsqueeze::<3>();
        let x_btd = self.token_embedding.forward(ids_bt, DType::F32) + positions;
        let x_btd = self.final_norm.forward(self.layers.iter().fold(x_btd, |x, layer| layer.forward(x)));
        let pooled = x_btd.clone().mean_dim(1).squeeze_dim::<2>(1);
        (x_btd, pooled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::weights::num_elements;

    #[test]
    fn the_encoder_sees_order_and_has_the_stated_size() {
        let config = ConditionerConfig {
            vocab_size: 20,
            hidden_size: 16,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_tokens: 6,
        };
        let device = Device::flex();
        let encoder = Conditioner::new(&Init::new(3, &device), &config);
        assert_eq!(num_elements(&encoder), config.num_elements());
        let run = |ids: [i32; 3]| encoder.forward(IntTensor::<1>::from_ints(ids, &device).unsqueeze::<2>());
        let (sequence, pooled) = run([1, 2, 3]);
        assert_eq!((sequence.dims(), pooled.dims()), ([1, 3, 16], [1, 16]));
        let (_, swapped) = run([2, 1, 3]);
        let distance = (pooled - swapped).abs().max().into_scalar::<f32>();
        assert!(distance > 1e-3, "{distance}");
    }
}
