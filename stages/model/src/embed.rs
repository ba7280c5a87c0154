//! Entrances of the DiT: latent patches with their position table, timestep with pooled text (docs/spec/model.md 4.2).
//!
//! Knows no block and no sequence. Departure from the reference: the patch convolution (kernel = stride) is computed as a
//! linear layer over flattened patches, which is the same sum.
//! Shapes: b batch, c latent channels, h and w latent sides, y and x patch rows and columns, n = y x tokens, d width.

use burn::module::{Module, Param};
use burn::tensor::TensorData;
use deepgen_contract::model::DitConfig;

use crate::Tensor;
use crate::init::{Fill, Init};
use crate::nn::{Conv2d, Linear, like, product, silu, to_dtype};

/// Channels of the timestep sinusoid.
const SINUSOID_CHANNELS: usize = 256;
/// Base of the geometric row of wavelengths.
const SINUSOID_BASE: f64 = 10_000.0;

/// Latent patches to tokens, plus a centred crop of the stored position table.
#[derive(Module, Debug)]
pub struct PatchEmbed {
    /// Weight [d, c, patch, patch].
    pub proj: Conv2d,
    /// Stored table [1, side * side, d]; never trained.
    pub pos_embed: Param<Tensor<3>>,
    /// Side of the table in patches.
    pub table_side: usize,
}

impl PatchEmbed {
    /// Creates the embedding of a DiT; the table follows the reference's formula.
    pub fn new(init: &Init, config: &DitConfig) -> Self {
        let (patch, side, width) = (config.patch_size, config.pos_embed_max_size, config.width());
        let base = config.sample_size / patch;
        let fan_in = config.in_channels * patch * patch;
        let proj = init.at("proj");
        Self {
            proj: Conv2d {
                weight: proj.param("weight", [width, config.in_channels, patch, patch], Fill::xavier(fan_in, width)),
                bias: Some(proj.param("bias", [width], Fill::Zeros)),
                stride: patch,
                padding: 0,
            },
            pos_embed: init.buffer([1, side * side, width], move || position_table(side, base, width)),
            table_side: side,
        }
    }

    /// # Shapes
    /// [b, c, h, w] -> [b, n, d]
    pub fn forward(&self, x_bchw: Tensor<4>) -> Tensor<3> {
        let [_, _, h, w] = x_bchw.dims();
        let patch = self.proj.stride;
        let weight = self.proj.weight.val();
        let [width, c, _, _] = weight.dims();
        let patches = patchify(x_bchw, patch);
        let bias = self.proj.bias.as_ref().map(Param::val);
        let tokens = product(patches, weight.reshape([width, c * patch * patch]), bias);
        let positions = like(&tokens, self.crop(h / patch, w / patch));
        tokens + positions
    }

    /// Returns the positions of a grid of `rows` x `columns` patches.
    ///
    /// # Shapes
    /// -> [1, rows * columns, d]
    fn crop(&self, rows: usize, columns: usize) -> Tensor<3> {
        let side = self.table_side;
        let table = self.pos_embed.val();
        let width = table.dims()[2];
        let (top, left) = ((side - rows) / 2, (side - columns) / 2);
        table.reshape([side, side, width]).slice([top..top + rows, left..left + columns]).reshape([
            1,
            rows * columns,
            width,
        ])
    }
}

/// Cuts a latent into patches, row by row, each flattened as (channel, patch row, patch column).
///
/// # Shapes
/// [b, c, h, w] -> [b, n, c * patch * patch]
pub fn patchify(x_bchw: Tensor<4>, patch: usize) -> Tensor<3> {
    let [b, c, h, w] = x_bchw.dims();
    let (rows, columns) = (h / patch, w / patch);
    x_bchw.reshape([b, c, rows, patch, columns, patch]).permute([0, 2, 4, 1, 3, 5]).reshape([
        b,
        rows * columns,
        c * patch * patch,
    ])
}

/// Puts tokens flattened as (patch row, patch column, channel) back into a latent.
///
/// # Shapes
/// [b, n, patch * patch * c] -> [b, c, rows * patch, columns * patch]
pub fn unpatchify(x_bnk: Tensor<3>, rows: usize, columns: usize, patch: usize) -> Tensor<4> {
    let [b, _, k] = x_bnk.dims();
    let c = k / (patch * patch);
    x_bnk.reshape([b, rows, columns, patch, patch, c]).permute([0, 5, 1, 3, 2, 4]).reshape([
        b,
        c,
        rows * patch,
        columns * patch,
    ])
}

/// Returns the table [side * side, width]: sines and cosines of the column, then of the row.
fn position_table(side: usize, base: usize, width: usize) -> Vec<f32> {
    let num_frequencies = width / 4;
    let axis = |cell: usize| {
        let position = cell as f64 * base as f64 / side as f64;
        let angle = move |k: usize| position * SINUSOID_BASE.powf(-(k as f64) / num_frequencies as f64);
        let sines = (0..num_frequencies).map(move |k| angle(k).sin() as f32);
        sines.chain((0..num_frequencies).map(move |k| angle(k).cos() as f32))
    };
    let mut table = Vec::with_capacity(side * side * width);
    for row in 0..side {
        for column in 0..side {
            table.extend(axis(column));
            table.extend(axis(row));
        }
    }
    table
}

/// Returns cosines then sines of the timestep over 256 channels, in f32.
///
/// # Shapes
/// [b] -> [b, 256]
pub fn sinusoid(timestep_b: Tensor<1>) -> Tensor<2> {
    let b = timestep_b.dims()[0];
    let half = SINUSOID_CHANNELS / 2;
    let frequencies: Vec<f32> = (0..half).map(|k| SINUSOID_BASE.powf(-(k as f64) / half as f64) as f32).collect();
    let frequencies = Tensor::<2>::from_data(TensorData::new(frequencies, [1, half]), &timestep_b.device());
    let angles = timestep_b.reshape([b, 1]) * frequencies;
    Tensor::cat(vec![angles.clone().cos(), angles.sin()], 1)
}

/// Two linear layers with a SiLU between them.
#[derive(Module, Debug)]
pub struct ConditionMlp {
    /// Into the width.
    pub linear_1: Linear,
    /// Inside the width.
    pub linear_2: Linear,
}

impl ConditionMlp {
    /// Creates the layers.
    pub fn new(init: &Init, inputs: usize, width: usize) -> Self {
        // The reference draws these from N(0, 0.02^2).
        let layer =
            |name: &str, inputs| Linear::new(&init.at(name), inputs, width, Fill::Normal(0.02), Some(Fill::Zeros));
        Self { linear_1: layer("linear_1", inputs), linear_2: layer("linear_2", width) }
    }

    /// # Shapes
    /// [b, inputs] -> [b, d]
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.linear_2.forward(silu(self.linear_1.forward(x)))
    }
}

/// Sum of the embedded timestep and the embedded pooled text: what modulates every block.
#[derive(Module, Debug)]
pub struct TimeTextEmbed {
    /// Of the sinusoid.
    pub timestep_embedder: ConditionMlp,
    /// Of the pooled text.
    pub text_embedder: ConditionMlp,
}

impl TimeTextEmbed {
    /// Creates the embedding of a DiT.
    pub fn new(init: &Init, config: &DitConfig) -> Self {
        let width = config.width();
        Self {
            timestep_embedder: ConditionMlp::new(&init.at("timestep_embedder"), SINUSOID_CHANNELS, width),
            text_embedder: ConditionMlp::new(&init.at("text_embedder"), config.pooled_projection_dim, width),
        }
    }

    /// `timestep_b` is on the scale 0..1000, in f32.
    ///
    /// # Shapes
    /// [b], [b, pooled] -> [b, d]
    pub fn forward(&self, timestep_b: Tensor<1>, pooled: Tensor<2>) -> Tensor<2> {
        let time = to_dtype(sinusoid(timestep_b), pooled.dtype());
        self.timestep_embedder.forward(time) + self.text_embedder.forward(pooled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::random::noise;

    #[test]
    fn patches_are_cut_in_raster_order_with_the_channel_slowest() {
        let values: Vec<f32> = (0..32).map(|v| v as f32).collect();
        let x = Tensor::<4>::from_data(TensorData::new(values, [1, 2, 4, 4]), &Device::flex());
        let tokens = patchify(x, 2).into_data().try_to_vec::<f32>().unwrap();
        assert_eq!(tokens[..8], [0., 1., 4., 5., 16., 17., 20., 21.]);
        assert_eq!(tokens[8..10], [2., 3.]);
    }

    #[test]
    fn unpatchify_undoes_a_patchify_with_the_channel_moved_last() {
        let x = noise(1, "x", [2, 3, 4, 6], &Device::flex());
        let tokens = patchify(x.clone(), 2).reshape([2, 6, 3, 2, 2]).permute([0, 1, 3, 4, 2]).reshape([2, 6, 12]);
        assert_eq!(unpatchify(tokens, 2, 3, 2).into_data(), x.into_data());
    }

    #[test]
    fn the_sinusoid_of_zero_is_ones_then_zeros() {
        let values = sinusoid(Tensor::from_floats([0.0], &Device::flex())).into_data().try_to_vec::<f32>().unwrap();
        assert!(values[..128].iter().all(|&v| v == 1.0) && values[128..].iter().all(|&v| v == 0.0));
    }
}
