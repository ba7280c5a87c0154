//! Activation checkpointing: of a block only the inputs are kept, and the backward runs the block again.
//!
//! Peak memory then holds the inputs of all blocks and the intermediate tensors of one, for one more forward in time. Works
//! on the CPU for blocks whose trained parameters are leaves of the tape; elsewhere the block runs as always, and Burn's
//! own strategy for single operations is the means ([`Device::gradient_checkpointing`]). Gradients are the same sums, of
//! which those of inputs that several blocks share are added up in another order.

use std::cell::Cell;

use burn::module::Module;

use crate::Tensor;

thread_local! {
    static IS_ON: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with checkpointing on or off on this thread.
pub fn with_activation_checkpointing<R>(is_on: bool, f: impl FnOnce() -> R) -> R {
    /// Restores the former state even when `f` panics.
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            IS_ON.set(self.0);
        }
    }
    let _restore = Restore(IS_ON.replace(is_on));
    f()
}

/// Runs a block: `f` of its parameters and of flattened inputs, which may be called again in the backward.
///
/// # Shapes
/// vectors of any lengths
pub(crate) fn run_block<M: Module + 'static, const N: usize>(
    block: &M,
    inputs: [Tensor<1>; N],
    f: impl Fn(&M, [Tensor<1>; N]) -> Tensor<1> + Send + Sync + 'static,
) -> Tensor<1> {
    #[cfg(feature = "flex")]
    if IS_ON.get() && crate::cpu::can_rerun(block, &inputs) {
        return crate::cpu::rerun(block, inputs, f);
    }
    f(block, inputs)
}

/// Returns whether checkpointing is on; a caller need not flatten anything if it is not.
pub(crate) fn is_on() -> bool {
    IS_ON.get()
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use deepgen_contract::model::{DitConfig, LanguageConfig};

    use super::*;
    use crate::Device;
    use crate::dit::{Condition, Dit};
    use crate::flow::loss;
    use crate::init::Init;
    use crate::language::LanguageModel;
    use crate::nn::LoraAdapter;
    use crate::random::{Rows, noise, with_dropout};
    use crate::rope::PositionIds;
    use crate::weights::for_each_param;

    /// Name and values of each gradient, and the loss.
    fn gradients<M: Module>(model: &M, loss: Tensor<1>) -> (f32, Vec<(String, Vec<f32>)>) {
        let value = loss.clone().into_scalar::<f32>();
        let gradients = loss.backward();
        let mut found = Vec::new();
        for_each_param(model, |name, param| {
            if let Some(gradient) = param.grad(&gradients) {
                found.push((name.to_owned(), gradient.into_data().iter::<f32>().collect()));
            }
        });
        (value, found)
    }

    /// Compares gradients: the same parameters have one, and they agree to 1e-5 of each tensor's largest element.
    fn assert_close(plain: &(f32, Vec<(String, Vec<f32>)>), checkpointed: &(f32, Vec<(String, Vec<f32>)>)) {
        assert_eq!(plain.0, checkpointed.0);
        assert_eq!(plain.1.len(), checkpointed.1.len());
        let top = plain.1.iter().flat_map(|(_, values)| values).fold(0f32, |top, value| top.max(value.abs()));
        for ((name, a), (other, b)) in plain.1.iter().zip(&checkpointed.1) {
            assert_eq!(name, other);
            let scale = a.iter().fold(1e-3 * top, |top, value| top.max(value.abs()));
            for (a, b) in a.iter().zip(b) {
                assert!((a - b).abs() <= 1e-5 * scale, "{name}: {a} is not {b}");
            }
        }
    }

    #[test]
    fn a_checkpointed_dit_has_the_gradients_of_a_plain_one() {
        let device = Device::flex().autodiff();
        let config = DitConfig {
            sample_size: 4,
            patch_size: 2,
            in_channels: 4,
            num_layers: 3,
            num_attention_heads: 2,
            attention_head_dim: 8,
            joint_attention_dim: 12,
            pooled_projection_dim: 10,
            pos_embed_max_size: 8,
            num_dual_attention_layers: 1,
        };
        let dit = Dit::new(&Init::new(1, &device), &config);
        // Two sizes, so that masks are there too; the text needs a gradient, as under a trained bridge.
        let latents = [noise(1, "a", [4, 4, 4], &device), noise(2, "b", [4, 4, 8], &device)];
        let run = |is_on| {
            let text = noise::<3>(1, "text", [2, 5, 12], &device).require_grad();
            let condition = Condition {
                timestep_b: Tensor::full([2], 500.0, &device),
                text_btc: text.clone(),
                pooled_bc: noise(1, "pooled", [2, 10], &device),
            };
            let velocities = with_activation_checkpointing(is_on, || dit.forward_ragged(&latents, &condition, &[]));
            let parts = velocities
                .into_iter()
                .zip(&latents)
                .map(|(v, latent)| loss(v.unsqueeze::<4>(), latent.clone().unsqueeze::<4>()));
            gradients(&dit, parts.reduce(|a, b| a + b).unwrap())
        };
        let (plain, checkpointed) = (run(false), run(true));
        assert!(plain.1.len() > 80, "{} gradients", plain.1.len());
        assert_close(&plain, &checkpointed);
    }

    #[test]
    fn a_checkpointed_decoder_draws_the_same_dropout_again_and_leaves_frozen_weights_alone() {
        let device = Device::flex().autodiff();
        let config = LanguageConfig {
            vocab_size: 16,
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            mrope_section: [1, 1, 2],
        };
        let mut decoder = LanguageModel::new(&Init::new(1, &device), &config);
        for (i, layer) in decoder.layers.iter_mut().enumerate() {
            layer.self_attn.q_proj.lora = Some(LoraAdapter {
                a: burn::module::Param::from_tensor(noise(i as u64, "a", [4, 16], &device)),
                b: burn::module::Param::from_tensor(noise(i as u64, "b", [16, 4], &device)),
                scale: 0.5,
                dropout: 0.3,
            });
        }
        let decoder = crate::weights::set_trainable(decoder, |name| name.contains("lora"));
        // Frozen embeddings: no input of the first layer is on the tape.
        let embeds = noise::<3>(1, "embeds", [2, 6, 16], &device);
        let positions = PositionIds { axis: std::array::from_fn(|_| vec![(0..6).collect(); 2]) };
        let run = |is_on| {
            let states = with_activation_checkpointing(is_on, || {
                with_dropout(7, Rows::all(2), || {
                    decoder.hidden_states(embeds.clone(), &positions, &vec![vec![true; 6]; 2], &[1, 3])
                })
            });
            let loss = states.into_iter().map(|state| state.square().mean()).reduce(|a, b| a + b).unwrap();
            gradients(&decoder, loss)
        };
        let (plain, checkpointed) = (run(false), run(true));
        assert_eq!(plain.1.len(), 6);
        assert_close(&plain, &checkpointed);
    }
}
