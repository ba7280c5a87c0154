//! Projectors and connector between hidden states and the DiT's conditions.

use deepgen_contract::model::{BridgeConfig, BridgeLayers, DitConfig, LanguageConfig, Padding};
use deepgen_model::bridge::Bridge;
use deepgen_model::init::Init;
use deepgen_model::weights::load_into;
use deepgen_model::{Tensor, probe};

use super::case::{Case, Settings};
use super::compare::{Checker, GRADS, OUTPUTS, Quantity};
use super::error::{ParityError, ParityResult};
use super::readings::Readings;

/// Longest prompt in training (docs/spec/model.md section 2.4).
const MAX_LENGTH: usize = 1024;
/// Epsilon of the connector's norms where the settings state none (docs/spec/model.md section 1).
const NORM_EPS: f64 = 1e-6;

/// Returns a bridge's settings from the connector's.
///
/// # Errors
/// When one is missing.
pub fn bridge_config(connector: &Settings, layers: BridgeLayers, num_queries: usize) -> ParityResult<BridgeConfig> {
    Ok(BridgeConfig {
        layers,
        num_queries,
        hidden_size: connector.get("hidden_size")?,
        intermediate_size: connector.get("intermediate_size")?,
        num_hidden_layers: connector.get("num_hidden_layers")?,
        num_attention_heads: connector.get("num_attention_heads")?,
        layer_norm_eps: connector.get("layer_norm_eps").unwrap_or(NORM_EPS),
        padding: Padding::Longest,
        max_length: MAX_LENGTH,
    })
}

/// `connector`.
///
/// # Errors
/// When the case is not whole.
pub fn run(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let settings = case.config.at("config").ok_or_else(|| ParityError::Unsupported("`config` is missing".into()))?;
    let num_layers: usize = case.config.get("layers")?;
    let width: usize = case.config.get("llm_hidden")?;
    let mut config = bridge_config(&settings, BridgeLayers::Listed((0..num_layers).rev().collect()), 0)?;
    config.layer_norm_eps = case.config.get("layer_norm_eps")?;
    // Of decoder and DiT only the widths matter here.
    let language = LanguageConfig {
        vocab_size: 1,
        hidden_size: width,
        intermediate_size: 1,
        num_hidden_layers: num_layers,
        num_attention_heads: 1,
        num_key_value_heads: 1,
        rms_norm_eps: NORM_EPS,
        rope_theta: 1.0,
        mrope_section: [0; 3],
    };
    let dit = DitConfig {
        sample_size: 2,
        patch_size: 2,
        in_channels: 1,
        num_layers: 1,
        num_attention_heads: 1,
        attention_head_dim: 4,
        joint_attention_dim: case.config.get("joint_dim")?,
        pooled_projection_dim: case.config.get("pooled_dim")?,
        pos_embed_max_size: 1,
        num_dual_attention_layers: 0,
    };
    let fresh = Bridge::new(&Init::new(0, &case.device), &config, &language, &dit).map_err(ParityError::Unsupported)?;
    let bridge = load_into(fresh, &case.weights("weights.safetensors")?, "")?;
    let hidden: Vec<Tensor<3>> = inputs.list("hidden.")?;
    let stacked = Tensor::cat(hidden, 2).require_grad();
    let (condition, readings) = probe::record(|| bridge.forward(stacked.clone()));
    let readings = Readings::new(readings);
    let merged = inputs.archive.floats("merged_hidden")?;
    check.extra("merged_hidden", &stacked.to_data().iter::<f32>().collect::<Vec<_>>(), &merged, Quantity::Exact);
    let mut names = vec!["projector_1".to_owned()];
    names.extend((0..check.outputs().count("layer.")).map(|i| format!("layer.{i}")));
    for name in names {
        let place = format!("bridge.{name}");
        let reading = readings.last(&place).ok_or_else(|| ParityError::Unsupported(format!("no probe at {place}")))?;
        check.data(OUTPUTS, &name, &reading.data, Quantity::Forward)?;
    }
    check.tensor("pooled", condition.pooled.clone(), Quantity::Forward)?;
    check.tensor("sequence", condition.sequence.clone(), Quantity::Forward)?;
    let total = (condition.pooled - inputs.tensor("target_pooled")?).square().mean()
        + (condition.sequence - inputs.tensor("target_sequence")?).square().mean();
    check.scalar("loss", total.clone(), Quantity::Forward)?;
    let gradients = total.backward();
    if let Some(gradient) = stacked.grad(&gradients) {
        check.data(GRADS, "merged_hidden", &gradient.into_data(), Quantity::Gradient)?;
    }
    check.gradients(&bridge, gradients, |name| (name != "merged_hidden").then(|| name.to_owned()))?;
    Ok(())
}
