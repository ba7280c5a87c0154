//! The windowed vision tower of Qwen2.5-VL: images in [-1, 1] to merged tokens of the decoder's width
//! (docs/spec/model.md section 2.8).
//!
//! Images of one size go through in one batch. Windows of one size are attended together, so a grid that windows
//! divide evenly needs no mask and no loop. Departure from the reference: ragged windows are ordered by size, which
//! changes nothing after the un-permutation. Knows nothing of prompts; the caller decides whether gradient flows.
//! Legend: n images, p patches, c merged cells, h width of the tower, k channels of a patch, t temporal frames.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::TensorData;
use deepgen_contract::model::VisionConfig;

use crate::attention::attention;
use crate::fused;
use crate::init::{Fill, Init};
use crate::language::INIT_STD;
use crate::nn::{Linear, RmsNorm, gelu_erf, product};
use crate::probe::tap;
use crate::rope::{Grid, Rotary};
use crate::{Device, IntTensor, Tensor};

/// Channel means of CLIP, which the tower was trained with.
const MEAN: [f32; 3] = [0.48145466, 0.4578275, 0.40821073];
/// Channel standard deviations of CLIP.
const STD: [f32; 3] = [0.26862954, 0.261_302_6, 0.275_777_1];
/// Epsilon of the tower's norms.
const NORM_EPS: f64 = 1e-6;

/// The patch embedding's kernel: a 3-D convolution whose stride is its size, hence a matrix product.
#[derive(Module, Debug)]
pub struct PatchKernel {
    /// `[hidden, channels, frames, side, side]`, as in the reference.
    pub weight: Param<Tensor<5>>,
}

/// Holder of the kernel, for the reference's path.
#[derive(Module, Debug)]
pub struct PatchEmbed {
    /// The kernel.
    pub proj: PatchKernel,
}

/// Attention with fused queries, keys and values.
#[derive(Module, Debug)]
pub struct VisionAttention {
    /// Fused projection to queries, keys, values.
    pub qkv: Linear,
    /// Output projection.
    pub proj: Linear,
    num_heads: usize,
}

/// SiLU-gated feed-forward layer with biases.
#[derive(Module, Debug)]
pub struct VisionMlp {
    /// Gate.
    pub gate_proj: Linear,
    /// Values.
    pub up_proj: Linear,
    /// Output.
    pub down_proj: Linear,
}

/// One pre-norm block.
#[derive(Module, Debug)]
pub struct VisionBlock {
    /// Norm before attention.
    pub norm1: RmsNorm,
    /// Attention, windowed or full.
    pub attn: VisionAttention,
    /// Norm before the feed-forward layer.
    pub norm2: RmsNorm,
    /// Feed-forward layer.
    pub mlp: VisionMlp,
}

/// Exact GELU: the parameterless middle entry of the merger, so that its neighbours are numbered 0 and 2.
#[derive(Module, Debug)]
pub struct Gelu;

/// Joins the patches of a merged cell into one token of the decoder's width.
#[derive(Module, Debug)]
pub struct PatchMerger {
    /// Norm of each patch.
    pub ln_q: RmsNorm,
    /// Linear, GELU, linear.
    pub mlp: (Linear, Gelu, Linear),
}

/// The vision tower.
#[derive(Module, Debug)]
pub struct VisionTower {
    /// Patches to vectors.
    pub patch_embed: PatchEmbed,
    /// Blocks.
    pub blocks: Vec<VisionBlock>,
    /// Patches to tokens.
    pub merger: PatchMerger,
    #[module(skip)]
    config: VisionConfig,
}

/// Order in which cells are processed, and the runs of equal windows in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct WindowPlan {
    /// Raster index of the cell at each place.
    order: Vec<usize>,
    /// `(windows, cells in each)`, consecutive in `order`.
    runs: Vec<(usize, usize)>,
}

/// Returns the cells of every window, windows in raster order, cells in raster order within their window.
pub fn windows(grid: Grid, window_cells: usize) -> Vec<Vec<usize>> {
    let mut windows = Vec::new();
    for top in (0..grid.rows).step_by(window_cells) {
        for left in (0..grid.columns).step_by(window_cells) {
            let (bottom, right) = (grid.rows.min(top + window_cells), grid.columns.min(left + window_cells));
            windows.push((top..bottom).flat_map(|r| (left..right).map(move |c| r * grid.columns + c)).collect());
        }
    }
    windows
}

impl WindowPlan {
    fn new(grid: Grid, window_cells: usize) -> Self {
        let mut by_size: BTreeMap<usize, Vec<Vec<usize>>> = BTreeMap::new();
        for window in windows(grid, window_cells) {
            by_size.entry(window.len()).or_default().push(window);
        }
        let runs = by_size.iter().rev().map(|(&cells, windows)| (windows.len(), cells)).collect();
        Self { order: by_size.into_values().rev().flatten().flatten().collect(), runs }
    }

    fn inverse(&self) -> Vec<usize> {
        let mut inverse = vec![0; self.order.len()];
        for (place, &cell) in self.order.iter().enumerate() {
            inverse[cell] = place;
        }
        inverse
    }
}

impl VisionAttention {
    /// Attends inside each of the consecutive `(windows, patches in each)` runs of the sequence.
    fn forward(&self, x_nph: Tensor<3>, rotary: &Rotary, runs: &[(usize, usize)]) -> Tensor<3> {
        let [n, p, h] = x_nph.dims();
        let d = h / self.num_heads;
        let qkv: Tensor<4> = self.qkv.forward(x_nph).reshape([n, p, 3 * self.num_heads, d]).swap_dims(1, 2);
        let part = |i: usize| qkv.clone().narrow(1, i * self.num_heads, self.num_heads);
        let q = rotary.apply(part(0));
        let k = rotary.apply(part(1));
        let v = part(2);
        let mut start = 0;
        let mut outputs = Vec::with_capacity(runs.len());
        for &(num_windows, len) in runs {
            let fold = |x: &Tensor<4>| -> Tensor<4> {
                let run = x.clone().narrow(2, start, num_windows * len);
                if num_windows == 1 {
                    return run;
                }
                let split: Tensor<5> = run.reshape([n, self.num_heads, num_windows, len, d]).swap_dims(1, 2);
                split.reshape([n * num_windows, self.num_heads, len, d])
            };
            let out = attention(fold(&q), fold(&k), fold(&v), None);
            outputs.push(out.swap_dims(1, 2).reshape([n, num_windows * len, h]));
            start += num_windows * len;
        }
        let joined = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(outputs, 1) };
        self.proj.forward(joined)
    }
}

impl VisionMlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.down_proj.forward(fused::gated_silu(self.gate_proj.forward(x.clone()), self.up_proj.forward(x)))
    }
}

impl PatchMerger {
    fn forward(&self, x_nph: Tensor<3>, patches_per_cell: usize) -> Tensor<3> {
        let [n, p, h] = x_nph.dims();
        let cells = self.ln_q.forward(x_nph).reshape([n, p / patches_per_cell, patches_per_cell * h]);
        self.mlp.2.forward(gelu_erf(self.mlp.0.forward(cells)))
    }
}

impl VisionTower {
    /// Creates a tower with fresh weights.
    pub fn new(init: &Init, config: &VisionConfig) -> Self {
        let (h, m, side) = (config.hidden_size, config.intermediate_size, config.patch_size);
        let linear = |init: &Init, name: &str, inputs, outputs| {
            Linear::new(&init.at(name), inputs, outputs, Fill::Normal(INIT_STD), Some(Fill::Zeros))
        };
        let block = |i: usize| {
            let init = init.at("blocks").at(i);
            VisionBlock {
                norm1: RmsNorm::new(&init.at("norm1"), h, NORM_EPS),
                attn: VisionAttention {
                    qkv: linear(&init, "attn.qkv", h, 3 * h),
                    proj: linear(&init, "attn.proj", h, h),
                    num_heads: config.num_heads,
                },
                norm2: RmsNorm::new(&init.at("norm2"), h, NORM_EPS),
                mlp: VisionMlp {
                    gate_proj: linear(&init, "mlp.gate_proj", h, m),
                    up_proj: linear(&init, "mlp.up_proj", h, m),
                    down_proj: linear(&init, "mlp.down_proj", m, h),
                },
            }
        };
        let kernel = [h, config.in_channels, config.temporal_patch_size, side, side];
        let merged = h * config.spatial_merge_size * config.spatial_merge_size;
        let merger = init.at("merger");
        Self {
            patch_embed: PatchEmbed {
                proj: PatchKernel {
                    weight: init.at("patch_embed.proj").param("weight", kernel, Fill::Normal(INIT_STD)),
                },
            },
            blocks: (0..config.depth).map(block).collect(),
            merger: PatchMerger {
                ln_q: RmsNorm::new(&merger.at("ln_q"), h, NORM_EPS),
                mlp: (
                    linear(&merger, "mlp.0", merged, merged),
                    Gelu,
                    linear(&merger, "mlp.2", merged, config.out_hidden_size),
                ),
            },
            config: config.clone(),
        }
    }

    /// Returns the merged-token grid of an image of `height` x `width` pixels.
    pub fn grid(&self, height: usize, width: usize) -> Grid {
        let [numerator, denominator] = self.config.input_scale;
        let side = |pixels: usize| {
            pixels * numerator / denominator / (self.config.patch_size * self.config.spatial_merge_size)
        };
        Grid { rows: side(height), columns: side(width) }
    }

    /// Returns the raster index of the cell at each place of the order in which [`VisionTower::forward`] works.
    pub fn working_order(&self, grid: Grid) -> Vec<usize> {
        WindowPlan::new(grid, self.window_cells()).order
    }

    /// Returns the side of an attention window in merged cells.
    pub fn window_cells(&self) -> usize {
        self.config.window_size / self.config.spatial_merge_size / self.config.patch_size
    }

    /// Encodes images `[3, height, width]` in [-1, 1], each to `[tokens, width of the decoder]`.
    ///
    /// Images of equal size share one batch; the results are in the order of the images.
    pub fn encode(&self, images: &[Tensor<3>]) -> Vec<Tensor<2>> {
        let mut by_size: BTreeMap<[usize; 3], Vec<usize>> = BTreeMap::new();
        for (i, image) in images.iter().enumerate() {
            by_size.entry(image.dims()).or_default().push(i);
        }
        let mut encoded: Vec<Option<Tensor<2>>> = vec![None; images.len()];
        for ([_, height, width], members) in by_size {
            let batch: Tensor<4> = Tensor::stack(members.iter().map(|&i| images[i].clone()).collect(), 0);
            let tokens = self.forward(self.patchify(self.prepare(batch)), self.grid(height, width));
            for (row, i) in members.into_iter().enumerate() {
                encoded[i] = Some(tokens.clone().narrow(0, row, 1).squeeze_dim(0));
            }
        }
        encoded.into_iter().flatten().collect()
    }

    /// Scales by `input_scale`: bilinear, half-pixel centres, no antialias.
    ///
    /// # Shapes
    /// - `images`: `[n, 3, height, width]`
    pub fn scale(&self, images: Tensor<4>) -> Tensor<4> {
        let [n, channels, height, width] = images.dims();
        let device = images.device();
        let [numerator, denominator] = self.config.input_scale;
        if numerator == denominator {
            return images;
        }
        let matrix = |inputs: usize| bilinear_matrix(inputs, [numerator, denominator], &device);
        let (rows, columns) = (matrix(height), matrix(width));
        let ([out_height, _], [out_width, _]) = (rows.dims(), columns.dims());
        let flat = images.reshape([n * channels, height, width]);
        let scaled = rows.unsqueeze::<3>().matmul(flat).matmul(columns.transpose().unsqueeze::<3>());
        scaled.reshape([n, channels, out_height, out_width])
    }

    /// Scales, maps to [0, 1] and normalises the channels.
    ///
    /// # Shapes
    /// - `images`: `[n, 3, height, width]` in [-1, 1]
    pub fn prepare(&self, images: Tensor<4>) -> Tensor<4> {
        let device = images.device();
        let constant = |f: fn(usize) -> f32| {
            let values: Vec<f32> = (0..3).map(f).collect();
            Tensor::<4>::from_data(TensorData::new(values, [1, 3, 1, 1]), &device)
        };
        // ((x + 1) / 2 - mean) / std as one affine map.
        self.scale(images) * constant(|c| 0.5 / STD[c]) + constant(|c| (0.5 - MEAN[c]) / STD[c])
    }

    /// Cuts prepared images to rows of patch pixels, grouped by merged cell.
    ///
    /// # Shapes
    /// - `images`: `[n, 3, height, width]`; returned `[n, patches, 3 * frames * side * side]`.
    pub fn patchify(&self, images: Tensor<4>) -> Tensor<3> {
        let [n, channels, height, width] = images.dims();
        let (side, merge) = (self.config.patch_size, self.config.spatial_merge_size);
        let frames = self.config.temporal_patch_size;
        let (rows, columns) = (height / (side * merge), width / (side * merge));
        let images = images.narrow(2, 0, rows * merge * side).narrow(3, 0, columns * merge * side);
        let cut: Tensor<8> = images.reshape([n, channels, rows, merge, side, columns, merge, side]);
        let grouped = cut.permute([0, 2, 5, 3, 6, 1, 4, 7]);
        let num_patches = rows * columns * merge * merge;
        let one_frame: Tensor<4> = grouped.reshape([n, num_patches * channels, 1, side * side]);
        one_frame.repeat_dim(2, frames).reshape([n, num_patches, channels * frames * side * side])
    }

    /// Runs the tower on patch rows of images that share a grid.
    ///
    /// # Shapes
    /// - `patches_npk`: `[n, patches, channels * frames * side * side]`, patches grouped by merged cell
    /// - returned: `[n, cells, width of the decoder]`, cells in raster order
    pub fn forward(&self, patches_npk: Tensor<3>, grid: Grid) -> Tensor<3> {
        let device = patches_npk.device();
        let [n, p, k] = patches_npk.dims();
        let merge = self.config.spatial_merge_size;
        let per_cell = merge * merge;
        let plan = WindowPlan::new(grid, self.window_cells());
        let by_cell = patches_npk.reshape([n, p / per_cell, per_cell * k]);
        let permuted = by_cell.select(1, indices(&plan.order, &device)).reshape([n, p, k]);
        let h = self.config.hidden_size;
        let kernel: Tensor<2> = self.patch_embed.proj.weight.val().reshape([h, k]);
        let mut x = product(permuted, kernel, None);
        tap(|| "vision.patch_embed".into(), &x);

        let places: Vec<(usize, usize)> = plan
            .order
            .iter()
            .flat_map(|&cell| {
                let (row, column) = (cell / grid.columns * merge, cell % grid.columns * merge);
                (0..per_cell).map(move |i| (row + i / merge, column + i % merge))
            })
            .collect();
        let rotary = Rotary::vision(&places, h / self.config.num_heads, &device);
        let windowed: Vec<(usize, usize)> = plan.runs.iter().map(|&(w, cells)| (w, cells * per_cell)).collect();
        let full = [(1, p)];
        for (i, block) in self.blocks.iter().enumerate() {
            let runs = if self.config.fullatt_block_indexes.contains(&i) { &full[..] } else { &windowed[..] };
            x = x.clone() + block.attn.forward(block.norm1.forward(x), &rotary, runs);
            x = x.clone() + block.mlp.forward(block.norm2.forward(x));
            tap(|| format!("vision.block.{i}"), &x);
        }
        let cells = self.merger.forward(x, per_cell);
        tap(|| "vision.merger".into(), &cells);
        cells.select(1, indices(&plan.inverse(), &device))
    }
}

fn indices(order: &[usize], device: &Device) -> IntTensor<1> {
    let values: Vec<i64> = order.iter().map(|&i| i as i64).collect();
    IntTensor::from_data(TensorData::new(values, [order.len()]), device)
}

/// Rows of weights that scale a line of `inputs` pixels by `numerator / denominator`.
fn bilinear_matrix(inputs: usize, [numerator, denominator]: [usize; 2], device: &Device) -> Tensor<2> {
    let outputs = inputs * numerator / denominator;
    let step = denominator as f32 / numerator as f32;
    let mut weights = vec![0f32; outputs * inputs];
    for (i, row) in weights.chunks_exact_mut(inputs).enumerate() {
        let source = ((i as f32 + 0.5) * step - 0.5).max(0.0);
        let low = (source as usize).min(inputs - 1);
        let high = (low + 1).min(inputs - 1);
        let fraction = source - low as f32;
        row[low] += 1.0 - fraction;
        row[high] += fraction;
    }
    Tensor::from_data(TensorData::new(weights, [outputs, inputs]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_that_divide_the_grid_need_one_run() {
        let plan = WindowPlan::new(Grid { rows: 4, columns: 4 }, 2);
        assert_eq!(plan.order, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
        assert_eq!(plan.runs, [(4, 4)]);
    }

    #[test]
    fn ragged_windows_are_grouped_by_size_and_the_order_can_be_undone() {
        let plan = WindowPlan::new(Grid { rows: 3, columns: 5 }, 2);
        assert_eq!(plan.runs, [(2, 4), (3, 2), (1, 1)]);
        let inverse = plan.inverse();
        for (cell, &place) in inverse.iter().enumerate() {
            assert_eq!(plan.order[place], cell);
        }
    }

    #[test]
    fn scaling_by_7_8_keeps_a_linear_ramp() {
        let device = Device::flex();
        let matrix = bilinear_matrix(32, [28, 32], &device);
        let ramp = Tensor::<2>::from_data(TensorData::new((0..32).map(|i| i as f32).collect(), [32, 1]), &device);
        let scaled = matrix.matmul(ramp).into_data().try_to_vec::<f32>().unwrap();
        assert_eq!(scaled.len(), 28);
        for (i, value) in scaled.iter().enumerate() {
            assert!((value - ((i as f32 + 0.5) * 8.0 / 7.0 - 0.5)).abs() < 1e-4);
        }
    }
}
