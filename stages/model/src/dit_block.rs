//! The joint block of MMDiT-X: two streams, one attention, and in the first blocks a second, image-only attention
//! (docs/spec/model.md 4.4 and 4.5).
//!
//! Knows no embedding and no sequence layout but "image tokens, then text tokens".
//! Shapes: b batch, n image tokens, t text tokens, d width, h heads, e channels of a head.

use burn::module::Module;
use deepgen_contract::model::DitConfig;

use crate::attention::attention;
use crate::checkpointing;
use crate::fused;
use crate::init::Init;
use crate::nn::{Linear, RmsNorm, gelu_tanh};
use crate::{BoolTensor, Tensor};

/// Epsilon of every norm of the DiT.
pub const EPS: f64 = 1e-6;

/// Linear layer that turns the activated condition into shifts, scales and gates.
#[derive(Module, Debug)]
pub struct Modulation {
    /// [parts * d, d].
    pub linear: Linear,
}

impl Modulation {
    /// Creates a modulation of `parts` vectors.
    pub fn new(init: &Init, width: usize, parts: usize) -> Self {
        Self { linear: Linear::with_default_init(&init.at("linear"), width, parts * width) }
    }

    /// # Shapes
    /// silu(temb) [b, d] -> parts of [b, d]
    pub fn forward<const PARTS: usize>(&self, activated_bd: Tensor<2>) -> [Tensor<2>; PARTS] {
        let width = activated_bd.dims()[1];
        let all = self.linear.forward(activated_bd);
        std::array::from_fn(|part| all.clone().narrow(1, part * width, width))
    }
}

/// Linear, tanh-GELU, linear.
#[derive(Module, Debug)]
pub struct FeedForward {
    /// `net.0.proj` [4 d, d].
    pub net_0_proj: Linear,
    /// `net.2` [d, 4 d].
    pub net_2: Linear,
}

impl FeedForward {
    /// Creates the layers.
    pub fn new(init: &Init, width: usize) -> Self {
        Self {
            net_0_proj: Linear::with_default_init(&init.at("net.0.proj"), width, 4 * width),
            net_2: Linear::with_default_init(&init.at("net.2"), 4 * width, width),
        }
    }

    /// # Shapes
    /// [b, n, d] -> [b, n, d]
    pub fn forward(&self, x_bnd: Tensor<3>) -> Tensor<3> {
        self.net_2.forward(gelu_tanh(self.net_0_proj.forward(x_bnd)))
    }
}

/// Splits the width into heads.
fn split_heads(x_bnd: Tensor<3>, head_dim: usize) -> Tensor<4> {
    let [b, n, d] = x_bnd.dims();
    x_bnd.reshape([b, n, d / head_dim, head_dim])
}

/// Attends over [b, n, h, e] tensors and joins the heads again.
fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<BoolTensor<4>>) -> Tensor<3> {
    let [b, n, h, e] = q.dims();
    attention(q.swap_dims(1, 2), k.swap_dims(1, 2), v.swap_dims(1, 2), mask).swap_dims(1, 2).reshape([b, n, h * e])
}

/// Attention over the image tokens alone (`attn2`).
#[derive(Module, Debug)]
pub struct ImageAttention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    to_out: Vec<Linear>,
    head_dim: usize,
}

impl ImageAttention {
    fn new(init: &Init, width: usize, head_dim: usize) -> Self {
        let linear = |name: &str| Linear::with_default_init(&init.at(name), width, width);
        Self {
            to_q: linear("to_q"),
            to_k: linear("to_k"),
            to_v: linear("to_v"),
            norm_q: RmsNorm::new(&init.at("norm_q"), head_dim, EPS),
            norm_k: RmsNorm::new(&init.at("norm_k"), head_dim, EPS),
            to_out: vec![linear("to_out.0")],
            head_dim,
        }
    }

    fn forward(&self, x_bnd: Tensor<3>, mask: Option<BoolTensor<4>>) -> Tensor<3> {
        let heads = |linear: &Linear| split_heads(linear.forward(x_bnd.clone()), self.head_dim);
        let (q, k) = (self.norm_q.forward(heads(&self.to_q)), self.norm_k.forward(heads(&self.to_k)));
        self.to_out[0].forward(attend(q, k, heads(&self.to_v), mask))
    }
}

/// Attention over image and text tokens together (`attn`).
#[derive(Module, Debug)]
pub struct JointAttention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    add_q_proj: Linear,
    add_k_proj: Linear,
    add_v_proj: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    norm_added_q: RmsNorm,
    norm_added_k: RmsNorm,
    to_out: Vec<Linear>,
    /// Absent in the last block, whose text output is dropped.
    to_add_out: Option<Linear>,
    head_dim: usize,
}

impl JointAttention {
    fn new(init: &Init, width: usize, head_dim: usize, is_last: bool) -> Self {
        let linear = |name: &str| Linear::with_default_init(&init.at(name), width, width);
        let norm = |name: &str| RmsNorm::new(&init.at(name), head_dim, EPS);
        Self {
            to_q: linear("to_q"),
            to_k: linear("to_k"),
            to_v: linear("to_v"),
            add_q_proj: linear("add_q_proj"),
            add_k_proj: linear("add_k_proj"),
            add_v_proj: linear("add_v_proj"),
            norm_q: norm("norm_q"),
            norm_k: norm("norm_k"),
            norm_added_q: norm("norm_added_q"),
            norm_added_k: norm("norm_added_k"),
            to_out: vec![linear("to_out.0")],
            to_add_out: (!is_last).then(|| linear("to_add_out")),
            head_dim,
        }
    }

    /// Returns the image part and, unless this is the last block, the text part.
    fn forward(
        &self,
        x_bnd: Tensor<3>,
        c_btd: Tensor<3>,
        mask: Option<BoolTensor<4>>,
    ) -> (Tensor<3>, Option<Tensor<3>>) {
        let (n, t) = (x_bnd.dims()[1], c_btd.dims()[1]);
        let image = |linear: &Linear| split_heads(linear.forward(x_bnd.clone()), self.head_dim);
        let text = |linear: &Linear| split_heads(linear.forward(c_btd.clone()), self.head_dim);
        let join = |image, text| Tensor::cat(vec![image, text], 1);
        let k = join(self.norm_k.forward(image(&self.to_k)), self.norm_added_k.forward(text(&self.add_k_proj)));
        let v = join(image(&self.to_v), text(&self.add_v_proj));
        let q_image = self.norm_q.forward(image(&self.to_q));
        let Some(to_add_out) = &self.to_add_out else {
            // The text rows of the last block go nowhere: only image tokens ask.
            let mask = mask.map(|mask| mask.narrow(2, 0, n));
            return (self.to_out[0].forward(attend(q_image, k, v, mask)), None);
        };
        let q = join(q_image, self.norm_added_q.forward(text(&self.add_q_proj)));
        let joint = attend(q, k, v, mask);
        let image = self.to_out[0].forward(joint.clone().narrow(1, 0, n));
        (image, Some(to_add_out.forward(joint.narrow(1, n, t))))
    }
}

/// Pairwise masks of a ragged batch, true = may look.
#[derive(Debug, Clone)]
pub struct Masks {
    /// Over image and text tokens [b, 1, n + t, n + t].
    pub joint: BoolTensor<4>,
    /// Over image tokens [b, 1, n, n].
    pub image: BoolTensor<4>,
}

/// One block of the DiT.
#[derive(Module, Debug)]
pub struct JointBlock {
    norm1: Modulation,
    norm1_context: Modulation,
    attn: JointAttention,
    /// Present in the first blocks.
    attn2: Option<ImageAttention>,
    ff: FeedForward,
    /// Absent in the last block.
    ff_context: Option<FeedForward>,
}

impl JointBlock {
    /// Creates block `index` of a DiT, with or without the second attention.
    pub fn new(init: &Init, config: &DitConfig, index: usize, is_dual: bool) -> Self {
        let (width, head_dim) = (config.width(), config.attention_head_dim);
        let is_last = index + 1 == config.num_layers;
        Self {
            norm1: Modulation::new(&init.at("norm1"), width, if is_dual { 9 } else { 6 }),
            norm1_context: Modulation::new(&init.at("norm1_context"), width, if is_last { 2 } else { 6 }),
            attn: JointAttention::new(&init.at("attn"), width, head_dim, is_last),
            attn2: is_dual.then(|| ImageAttention::new(&init.at("attn2"), width, head_dim)),
            ff: FeedForward::new(&init.at("ff"), width),
            ff_context: (!is_last).then(|| FeedForward::new(&init.at("ff_context"), width)),
        }
    }

    /// Returns both streams; the last block returns the text stream as it came.
    ///
    /// `activated_bd` is silu(temb).
    ///
    /// # Shapes
    /// [b, n, d], [b, t, d], [b, d] -> [b, n, d], [b, t, d]
    pub fn forward(
        &self,
        x_bnd: Tensor<3>,
        c_btd: Tensor<3>,
        activated_bd: Tensor<2>,
        masks: Option<&Masks>,
    ) -> (Tensor<3>, Tensor<3>) {
        let (modulation, second) = self.image_modulation(activated_bd.clone());
        let [shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp] = modulation;
        let x_in = fused::adaptive_norm(x_bnd.clone(), scale_msa, shift_msa, EPS);
        let joint_mask = masks.map(|masks| masks.joint.clone());
        let Some(ff_context) = &self.ff_context else {
            let [c_scale, c_shift] = self.norm1_context.forward(activated_bd);
            let c_in = fused::adaptive_norm(c_btd.clone(), c_scale, c_shift, EPS);
            let (attended, _) = self.attn.forward(x_in, c_in, joint_mask);
            let x = fused::gated_residual(x_bnd.clone(), gate_msa, attended);
            let x = self.second_attention(x, x_bnd, second, masks);
            return (self.image_feed_forward(x, shift_mlp, scale_mlp, gate_mlp), c_btd);
        };
        let [c_shift_msa, c_scale_msa, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp] =
            self.norm1_context.forward(activated_bd);
        let c_in = fused::adaptive_norm(c_btd.clone(), c_scale_msa, c_shift_msa, EPS);
        let (attended, c_attended) = self.attn.forward(x_in, c_in, joint_mask);
        let x = fused::gated_residual(x_bnd.clone(), gate_msa, attended);
        let x = self.second_attention(x, x_bnd, second, masks);
        let x = self.image_feed_forward(x, shift_mlp, scale_mlp, gate_mlp);
        let c = match c_attended {
            Some(c_attended) => fused::gated_residual(c_btd, c_gate_msa, c_attended),
            None => c_btd,
        };
        let c_in = fused::adaptive_norm(c.clone(), c_scale_mlp, c_shift_mlp, EPS);
        (x, fused::gated_residual(c, c_gate_mlp, ff_context.forward(c_in)))
    }

    /// [`JointBlock::forward`], kept on the tape by its inputs alone where activation checkpointing is on.
    ///
    /// # Shapes
    /// As [`JointBlock::forward`].
    pub fn forward_checkpointed(
        &self,
        x_bnd: Tensor<3>,
        c_btd: Tensor<3>,
        activated_bd: Tensor<2>,
        masks: Option<&Masks>,
    ) -> (Tensor<3>, Tensor<3>) {
        if !checkpointing::is_on() {
            return self.forward(x_bnd, c_btd, activated_bd, masks);
        }
        let (image, text, condition) = (x_bnd.dims(), c_btd.dims(), activated_bd.dims());
        let [num_image, num_text] = [image, text].map(|shape| shape.iter().product::<usize>());
        let num_condition = condition.iter().product::<usize>();
        let inputs = [x_bnd.reshape([num_image]), c_btd.reshape([num_text]), activated_bd.reshape([num_condition])];
        let masks = masks.cloned();
        let both = checkpointing::run_block(self, inputs, move |block, [x, c, activated]| {
            let (x, c) = block.forward(x.reshape(image), c.reshape(text), activated.reshape(condition), masks.as_ref());
            Tensor::cat(vec![x.reshape([num_image]), c.reshape([num_text])], 0)
        });
        let x = both.clone().narrow(0, 0, num_image).reshape(image);
        (x, both.narrow(0, num_image, num_text).reshape(text))
    }

    /// Returns shift, scale, gate of attention and of the feed-forward, and those of the second attention.
    fn image_modulation(&self, activated_bd: Tensor<2>) -> ([Tensor<2>; 6], Option<[Tensor<2>; 3]>) {
        match &self.attn2 {
            Some(_) => {
                let [a, b, c, d, e, f, g, h, i] = self.norm1.forward(activated_bd);
                ([a, b, c, d, e, f], Some([g, h, i]))
            }
            None => (self.norm1.forward(activated_bd), None),
        }
    }

    /// Adds the second attention, whose input is the block's own input and not the state after the first one.
    fn second_attention(
        &self,
        x: Tensor<3>,
        input: Tensor<3>,
        modulation: Option<[Tensor<2>; 3]>,
        masks: Option<&Masks>,
    ) -> Tensor<3> {
        let (Some(attention), Some([shift, scale, gate])) = (&self.attn2, modulation) else {
            return x;
        };
        let normed = fused::adaptive_norm(input, scale, shift, EPS);
        fused::gated_residual(x, gate, attention.forward(normed, masks.map(|masks| masks.image.clone())))
    }

    fn image_feed_forward(&self, x: Tensor<3>, shift: Tensor<2>, scale: Tensor<2>, gate: Tensor<2>) -> Tensor<3> {
        let normed = fused::adaptive_norm(x.clone(), scale, shift, EPS);
        fused::gated_residual(x, gate, self.ff.forward(normed))
    }
}
