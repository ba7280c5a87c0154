//! SD3's AutoencoderKL: images to latents and back (docs/spec/model.md section 5).
//!
//! Knows no patch and no noise source: the posterior's noise is an argument. There are no quantisation convolutions.
//! Shapes: b batch, c channels, h and w sides; latents are [b, z, h / s, w / s].

use burn::module::Module;
use deepgen_contract::model::VaeConfig;

use crate::Tensor;
use crate::attention::attention;
use crate::fused;
use crate::init::Init;
use crate::nn::{Conv2d, GroupNorm, Linear};

/// Epsilon of every norm.
const EPS: f64 = 1e-6;
/// Range of the log-variance.
const LOGVAR_RANGE: [f64; 2] = [-30.0, 20.0];

/// Norm, SiLU, convolution, twice, around a shortcut.
#[derive(Module, Debug)]
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    /// Present where the width changes.
    conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    fn new(init: &Init, inputs: usize, outputs: usize, groups: usize) -> Self {
        Self {
            norm1: GroupNorm::new(&init.at("norm1"), inputs, groups, EPS),
            conv1: Conv2d::new(&init.at("conv1"), inputs, outputs, 3),
            norm2: GroupNorm::new(&init.at("norm2"), outputs, groups, EPS),
            conv2: Conv2d::new(&init.at("conv2"), outputs, outputs, 3),
            conv_shortcut: (inputs != outputs).then(|| Conv2d::new(&init.at("conv_shortcut"), inputs, outputs, 1)),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = self.conv1.forward(self.norm1.forward_silu(x.clone()));
        let y = self.conv2.forward(self.norm2.forward_silu(y));
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x) + y,
            None => x + y,
        }
    }
}

/// Single-head attention over all pixels, around a shortcut.
#[derive(Module, Debug)]
pub struct PixelAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Vec<Linear>,
}

impl PixelAttention {
    fn new(init: &Init, channels: usize, groups: usize) -> Self {
        let linear = |name: &str| Linear::with_default_init(&init.at(name), channels, channels);
        Self {
            group_norm: GroupNorm::new(&init.at("group_norm"), channels, groups, EPS),
            to_q: linear("to_q"),
            to_k: linear("to_k"),
            to_v: linear("to_v"),
            to_out: vec![linear("to_out.0")],
        }
    }

    fn forward(&self, x_bchw: Tensor<4>) -> Tensor<4> {
        let [b, c, h, w] = x_bchw.dims();
        let pixels = self.group_norm.forward(x_bchw.clone()).reshape([b, c, h * w]).swap_dims(1, 2);
        let head = |linear: &Linear| linear.forward(pixels.clone()).reshape([b, 1, h * w, c]);
        let y = attention(head(&self.to_q), head(&self.to_k), head(&self.to_v), None).reshape([b, h * w, c]);
        x_bchw + self.to_out[0].forward(y).swap_dims(1, 2).reshape([b, c, h, w])
    }
}

/// Resnet, attention, resnet at the smallest side.
#[derive(Module, Debug)]
pub struct MidBlock {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<PixelAttention>,
}

impl MidBlock {
    fn new(init: &Init, channels: usize, groups: usize) -> Self {
        let resnet = |i: usize| ResnetBlock::new(&init.at("resnets").at(i), channels, channels, groups);
        Self {
            resnets: vec![resnet(0), resnet(1)],
            attentions: vec![PixelAttention::new(&init.at("attentions.0"), channels, groups)],
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.resnets[1].forward(self.attentions[0].forward(self.resnets[0].forward(x)))
    }
}

/// A convolution that changes the side, as the reference nests it.
#[derive(Module, Debug)]
pub struct Resample {
    conv: Conv2d,
}

/// Resnets of one side, then a halving of it.
#[derive(Module, Debug)]
pub struct DownBlock {
    resnets: Vec<ResnetBlock>,
    /// Empty at the last level.
    downsamplers: Vec<Resample>,
}

impl DownBlock {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.resnets.iter().fold(x, |x, resnet| resnet.forward(x));
        self.downsamplers.iter().fold(x, |x, down| {
            // The reference pads on the right and at the bottom only.
            down.conv.forward(x.pad((0, 1, 0, 1), 0.0))
        })
    }
}

/// Resnets of one side, then a doubling of it.
#[derive(Module, Debug)]
pub struct UpBlock {
    resnets: Vec<ResnetBlock>,
    /// Empty at the last level.
    upsamplers: Vec<Resample>,
}

impl UpBlock {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.resnets.iter().fold(x, |x, resnet| resnet.forward(x));
        self.upsamplers.iter().fold(x, |x, up| up.conv.forward(fused::upsample_nearest(x)))
    }
}

fn resnets(init: &Init, count: usize, inputs: usize, outputs: usize, groups: usize) -> Vec<ResnetBlock> {
    let width = |i: usize| if i == 0 { inputs } else { outputs };
    (0..count).map(|i| ResnetBlock::new(&init.at("resnets").at(i), width(i), outputs, groups)).collect()
}

/// Image to the moments of its latent.
#[derive(Module, Debug)]
pub struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn new(init: &Init, config: &VaeConfig) -> Self {
        let widths = &config.block_out_channels;
        let (first, last, groups) = (widths[0], widths[widths.len() - 1], config.norm_num_groups);
        let block = |i: usize| {
            let at = init.at("down_blocks").at(i);
            let conv = |_| Resample {
                conv: Conv2d::new(&at.at("downsamplers.0.conv"), widths[i], widths[i], 3).with_stride(2, 0),
            };
            DownBlock {
                resnets: resnets(&at, config.layers_per_block, widths[i.saturating_sub(1)], widths[i], groups),
                downsamplers: (i + 1 < widths.len()).then_some(()).into_iter().map(conv).collect(),
            }
        };
        Self {
            conv_in: Conv2d::new(&init.at("conv_in"), config.in_channels, first, 3),
            down_blocks: (0..widths.len()).map(block).collect(),
            mid_block: MidBlock::new(&init.at("mid_block"), last, groups),
            conv_norm_out: GroupNorm::new(&init.at("conv_norm_out"), last, groups, EPS),
            conv_out: Conv2d::new(&init.at("conv_out"), last, 2 * config.latent_channels, 3),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.down_blocks.iter().fold(self.conv_in.forward(x), |x, block| block.forward(x));
        self.conv_out.forward(self.conv_norm_out.forward_silu(self.mid_block.forward(x)))
    }
}

/// Latent to image.
#[derive(Module, Debug)]
pub struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(init: &Init, config: &VaeConfig) -> Self {
        let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last, groups) = (widths[0], widths[widths.len() - 1], config.norm_num_groups);
        let block = |i: usize| {
            let at = init.at("up_blocks").at(i);
            let conv = |_| Resample { conv: Conv2d::new(&at.at("upsamplers.0.conv"), widths[i], widths[i], 3) };
            UpBlock {
                resnets: resnets(&at, config.layers_per_block + 1, widths[i.saturating_sub(1)], widths[i], groups),
                upsamplers: (i + 1 < widths.len()).then_some(()).into_iter().map(conv).collect(),
            }
        };
        Self {
            conv_in: Conv2d::new(&init.at("conv_in"), config.latent_channels, first, 3),
            mid_block: MidBlock::new(&init.at("mid_block"), first, groups),
            up_blocks: (0..widths.len()).map(block).collect(),
            conv_norm_out: GroupNorm::new(&init.at("conv_norm_out"), last, groups, EPS),
            conv_out: Conv2d::new(&init.at("conv_out"), last, config.in_channels, 3),
        }
    }

    fn forward(&self, z: Tensor<4>) -> Tensor<4> {
        let x = self.mid_block.forward(self.conv_in.forward(z));
        let x = self.up_blocks.iter().fold(x, |x, block| block.forward(x));
        self.conv_out.forward(self.conv_norm_out.forward_silu(x))
    }
}

/// Diagonal Gaussian over latents.
#[derive(Debug, Clone)]
pub struct Posterior {
    /// [b, z, h, w].
    pub mean: Tensor<4>,
    /// [b, z, h, w], clamped.
    pub logvar: Tensor<4>,
}

impl Posterior {
    /// Returns the standard deviation [b, z, h, w].
    pub fn std(&self) -> Tensor<4> {
        self.logvar.clone().mul_scalar(0.5).exp()
    }

    /// Returns mean + std * noise.
    pub fn sample(&self, noise: Tensor<4>) -> Tensor<4> {
        self.mean.clone() + self.std() * noise
    }

    /// Returns the divergence from N(0, 1), summed over each latent.
    ///
    /// # Shapes
    /// -> [b]
    pub fn kl(&self) -> Tensor<1> {
        let terms = self.mean.clone().square() + self.logvar.clone().exp() - self.logvar.clone() - 1.0;
        let [b, z, h, w] = terms.dims();
        terms.reshape([b, z * h * w]).sum_dim(1).reshape([b]).mul_scalar(0.5)
    }
}

/// Autoencoder with the affine map between its own latents and the DiT's.
#[derive(Module, Debug)]
pub struct Vae {
    /// Image to moments.
    pub encoder: Encoder,
    /// Latent to image.
    pub decoder: Decoder,
    /// DiT latents are `(z - shift) * scale`.
    pub scale: f64,
    /// See `scale`.
    pub shift: f64,
}

impl Vae {
    /// Creates an autoencoder.
    pub fn new(init: &Init, config: &VaeConfig) -> Self {
        Self {
            encoder: Encoder::new(&init.at("encoder"), config),
            decoder: Decoder::new(&init.at("decoder"), config),
            scale: config.scaling_factor,
            shift: config.shift_factor,
        }
    }

    /// Returns the posterior over the autoencoder's own latents; pixels are in [-1, 1].
    ///
    /// # Shapes
    /// [b, 3, h, w] -> [b, z, h / s, w / s]
    pub fn encode(&self, pixels: Tensor<4>) -> Posterior {
        let moments = self.encoder.forward(pixels);
        let z = moments.dims()[1] / 2;
        let [low, high] = LOGVAR_RANGE;
        Posterior { mean: moments.clone().narrow(1, 0, z), logvar: moments.narrow(1, z, z).clamp(low, high) }
    }

    /// Maps the autoencoder's own latents to the DiT's.
    pub fn normalize(&self, z: Tensor<4>) -> Tensor<4> {
        (z - self.shift).mul_scalar(self.scale)
    }

    /// Undoes [`Vae::normalize`].
    pub fn denormalize(&self, latents: Tensor<4>) -> Tensor<4> {
        latents.div_scalar(self.scale) + self.shift
    }

    /// Encodes images to a sample of the DiT's latents.
    ///
    /// # Shapes
    /// pixels [b, 3, h, w], noise like the result -> [b, z, h / s, w / s]
    pub fn to_latents(&self, pixels: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        self.normalize(self.encode(pixels).sample(noise))
    }

    /// Decodes the DiT's latents.
    ///
    /// # Shapes
    /// [b, z, h, w] -> [b, 3, s h, s w]
    pub fn from_latents(&self, latents: Tensor<4>) -> Tensor<4> {
        self.decode(self.denormalize(latents))
    }

    /// Decodes the autoencoder's own latents.
    ///
    /// # Shapes
    /// [b, z, h, w] -> [b, 3, s h, s w]
    pub fn decode(&self, z: Tensor<4>) -> Tensor<4> {
        self.decoder.forward(z)
    }
}
