//! Memory of training, counted from the sizes of a model: weights, gradients, moments and activations in f32, on one device,
//! without sharding. Arithmetic only: what a machine makes of it is measured.

use serde::Serialize;

use crate::flops::{Lengths, Trained};
use crate::model::{ModelSpec, ParameterCounts};

/// Bytes of training, on one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Memory {
    /// All weights, frozen ones included; in stage 3 also the policy before the first update.
    pub weights: u64,
    /// Gradients of what trains.
    pub gradients: u64,
    /// Both moments of AdamW.
    pub optimizer: u64,
    /// What the backward pass needs of a micro-batch, by the rule of Korthikanti et al. 2022 (arXiv 2205.05198,
    /// equation 2) at four bytes an element.
    pub activations: u64,
}

impl Memory {
    /// Returns all of it.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations
    }
}

const BYTES: u64 = 4;

/// Returns the bytes that activations of a transformer's layers take: equation 2 of Korthikanti et al. 2022 at f32.
fn layer_activations(layers: usize, tokens: usize, width: usize, heads: usize) -> u64 {
    let per_layer = 2 * tokens * width * 34 + 2 * 5 * heads * tokens * tokens;
    (layers * per_layer) as u64
}

/// Returns the bytes of training on `batch` samples at once; `reference` adds a second copy of what trains.
pub fn of_training(
    model: &ModelSpec,
    parts: &ParameterCounts,
    (trainable, trained): (u64, Trained),
    (batch, side): (u64, (usize, usize)),
    reference: bool,
) -> Option<Memory> {
    let config = model.bridge.as_ref()?;
    let base = &model.base;
    let lengths = Lengths::of(base, config, side);
    let ParameterCounts { language, vision, dit, dit_position_table, vae, bridge, lora, conditioner } = *parts;
    let all = language + vision + dit + dit_position_table + vae + bridge + lora + conditioner;
    let (decoder, transformer) = (&base.vlm.language, &base.dit);
    let is_behind_language = trained.lora || (trained.bridge && config.num_queries > 0);
    let mut activations = layer_activations(
        transformer.num_layers,
        lengths.image + lengths.condition,
        transformer.width(),
        transformer.num_attention_heads,
    );
    if trained.bridge || trained.lora {
        let (layers, heads) = (config.num_hidden_layers, config.num_attention_heads);
        activations += layer_activations(layers, lengths.condition, config.hidden_size, heads);
    }
    if is_behind_language {
        let (layers, heads) = (decoder.num_hidden_layers, decoder.num_attention_heads);
        activations += layer_activations(layers, lengths.condition, decoder.hidden_size, heads);
    }
    Some(Memory {
        weights: BYTES * (all + if reference { trainable } else { 0 }),
        gradients: BYTES * trainable,
        optimizer: 2 * BYTES * trainable,
        activations: batch * activations,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;

    #[test]
    fn memory_of_what_trains_is_four_times_its_weights_in_f32() {
        let model = Preset::Deepgen5b.spec();
        let counts = model.parameter_counts().unwrap();
        let trained = Trained { bridge: true, ..Trained::default() };
        let memory =
            |batch| of_training(&model, &counts, (counts.bridge, trained), (batch, (512, 512)), false).unwrap();
        let one = memory(1);
        assert_eq!((one.gradients, one.optimizer), (4 * 432_449_532, 8 * 432_449_532));
        assert_eq!(memory(3).activations, 3 * one.activations);
        // 24 blocks of 1024 + 256 tokens, width 1536, 24 heads; 6 of 256, 2048, 32; 36 of 256, 2048, 16.
        let layer = |tokens: u64, width: u64, heads: u64| 68 * tokens * width + 10 * heads * tokens * tokens;
        let by_hand = 24 * layer(1280, 1536, 24) + 6 * layer(256, 2048, 32) + 36 * layer(256, 2048, 16);
        assert_eq!(one.activations, by_hand);
    }
}
