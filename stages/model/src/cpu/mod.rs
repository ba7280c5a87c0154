//! Fused operations for the CPU device, each with a backward of its own: one node on the tape where the composite form
//! needs five to fifteen, and vector code where Burn's CPU backend calls scalar math functions.
//!
//! Knows no module. `fused` decides when these run; a device other than Burn's `flex`, or a type other than f32, never
//! gets here. Reductions have a fixed order, so results do not depend on the number of threads.

mod adamw;
mod attention;
mod conv;
mod conv_weight;
mod cross_entropy;
mod direct;
mod linear;
mod matrix;
mod microkernel;
mod norms;
mod planes;
mod pointwise;
mod product;
mod rerun;
mod rotary;
mod simd;
mod softmax;
mod stored;
mod tiles;
mod transpose;
mod winograd;

use std::cell::RefCell;
use std::fmt::Debug;
use std::marker::PhantomData;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{Autodiff, DispatchDevice, Flex, GradientCheckpointingStrategy};
use burn::tensor::{Bytes, DType};
use rayon::prelude::*;

use crate::{Device, Tensor};

pub(crate) use adamw::{adamw, sum_of_squares};
pub(crate) use attention::{Attention, Mask};
pub(crate) use conv::{Conv, Upsample};
pub(crate) use cross_entropy::CrossEntropy;
pub(crate) use linear::Linear;
pub(crate) use norms::{GroupNorm, LayerNorm, RmsNorm};
pub(crate) use pointwise::{Activation, GatedResidual, GatedSilu};
pub(crate) use rerun::{can_rerun, rerun};
pub(crate) use rotary::Rotary;
pub(crate) use softmax::Softmax;
pub(crate) use stored::StoredLinear;

type Tape = Autodiff<Flex, NoCheckpointing>;
type TapeTensor = <Tape as burn::backend::BackendTypes>::FloatTensorPrimitive;

/// Elements below which a second thread does not pay.
const PARALLEL_ELEMENTS: usize = 1 << 14;

/// An operation on host arrays with its own backward.
pub(crate) trait HostOp<const N: usize>: Clone + Debug + Send + Sync + 'static {
    /// What the forward leaves for the backward, besides the inputs.
    type Saved: Clone + Debug + Send + 'static;
    /// Whether inputs and gradient may have any strides; otherwise they are made contiguous.
    const TAKES_STRIDES: bool = false;

    /// Computes the output.
    fn forward(&self, inputs: &[FlexTensor; N]) -> (FlexTensor, Self::Saved);

    /// Computes the output alone: no backward will follow.
    fn infer(&self, inputs: &[FlexTensor; N]) -> FlexTensor {
        self.forward(inputs).0
    }

    /// Computes the gradients of the inputs that need one.
    fn backward(
        &self,
        inputs: &[FlexTensor; N],
        saved: &Self::Saved,
        grad: &FlexTensor,
        needs: [bool; N],
    ) -> [Option<FlexTensor>; N];
}

/// Runs `f` on a thread of the pool that the CPU operations share their work with.
///
/// A loop that runs outside of the pool hands over to it, and sleeps, at every parallel operation; inside, it takes part.
pub fn in_thread_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// Returns whether the fused operations can take tensors of this device.
fn is_host(device: &Device) -> bool {
    let records_plainly =
        matches!(device.gradient_checkpointing_strategy(), None | Some(GradientCheckpointingStrategy::Disabled));
    records_plainly && matches!(device.clone().without_autodiff().as_dispatch(), DispatchDevice::Flex(_))
}

/// Returns whether a tensor can be an input of a fused operation.
pub(crate) fn takes<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32 && is_host(&tensor.device())
}

/// Returns whether a tensor can be a weight that is held in bf16.
pub(crate) fn holds<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::BF16 && is_host(&tensor.device())
}

/// An input, on the tape or not.
pub(crate) enum Input {
    /// Not on the tape.
    Plain(FlexTensor),
    /// On the tape, with or without a gradient.
    Taped(TapeTensor),
}

impl<const D: usize> From<Tensor<D>> for Input {
    fn from(tensor: Tensor<D>) -> Self {
        if tensor.is_autodiff() {
            Self::Taped(tensor.try_into_primitive::<Tape>().expect("`takes` was asked before"))
        } else {
            Self::Plain(tensor.try_into_primitive::<Flex>().expect("`takes` was asked before"))
        }
    }
}

/// What the tape keeps of an operation.
#[derive(Clone, Debug)]
struct State<O, S, const N: usize> {
    op: O,
    inputs: [FlexTensor; N],
    saved: S,
}

#[derive(Debug)]
struct Step<O>(PhantomData<O>);

impl<O: HostOp<N>, const N: usize> Backward<Flex, N> for Step<O> {
    type State = State<O, O::Saved, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let State { op, inputs, saved } = ops.state;
        let mut grad = grads.consume::<Flex>(&ops.node);
        if !O::TAKES_STRIDES {
            grad = dense(grad);
        }
        let needs = ops.parents.each_ref().map(Option::is_some);
        for (parent, gradient) in ops.parents.into_iter().zip(op.backward(&inputs, &saved, &grad, needs)) {
            if let (Some(node), Some(gradient)) = (parent, gradient) {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}

/// Runs an operation, on the tape if one of its inputs is.
pub(crate) fn apply<O: HostOp<N>, const N: usize, const D: usize>(op: O, inputs: [Input; N]) -> Tensor<D> {
    let prepare = |tensor: FlexTensor| if O::TAKES_STRIDES { tensor } else { dense(tensor) };
    if inputs.iter().all(|input| matches!(input, Input::Plain(_))) {
        let inputs = inputs.map(|input| match input {
            Input::Plain(tensor) => prepare(tensor),
            Input::Taped(tensor) => prepare(tensor.into_primitive()),
        });
        return Tensor::from_primitive::<Flex>(op.infer(&inputs));
    }
    let inputs = inputs.map(|input| match input {
        Input::Plain(tensor) => TapeTensor::new(tensor),
        Input::Taped(tensor) => tensor,
    });
    let nodes = inputs.each_ref().map(|input| input.node());
    let inputs = inputs.map(|input| prepare(input.into_primitive()));
    let (output, saved) = op.forward(&inputs);
    let output = match Step::<O>(PhantomData).prepare::<NoCheckpointing>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(State { op, inputs, saved }, output),
        OpsKind::UnTracked(prep) => prep.finish(output),
    };
    Tensor::from_primitive::<Tape>(output)
}

/// Takes a tensor off the tape, as a contiguous array.
pub(crate) fn host<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    dense(tensor.without_autodiff().try_into_primitive::<Flex>().expect("`takes` was asked before"))
}

fn dense(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// Returns the elements of a contiguous array.
fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("inputs were made contiguous and are f32")
}

fn dims(tensor: &FlexTensor) -> &[usize] {
    tensor.layout().shape().as_slice()
}

fn array(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape.to_vec().into()), DType::F32)
}

/// A vector for an operation that writes every element before any is read: clearing it first would cost a pass.
fn unwritten(len: usize) -> Vec<f32> {
    if cfg!(debug_assertions) {
        // Shows up in the tests if an operation breaks the rule.
        return vec![f32::NAN; len];
    }
    let mut values = Vec::with_capacity(len);
    // SAFETY: the capacity is there, every bit pattern is an f32, and the callers write each element before it is read.
    #[allow(clippy::uninit_vec)]
    unsafe {
        values.set_len(len);
    }
    values
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends this thread's scratch array; what it holds is left over from other uses.
fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    // Taken out of the cell: a nested call on the same thread then finds an empty one instead of a borrowed one.
    let mut scratch = SCRATCH.take();
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    let result = f(&mut scratch[..len]);
    SCRATCH.set(scratch);
    result
}

/// What sums begin with.
#[derive(Clone, Copy)]
enum Begin<'a> {
    Zero,
    /// A number for each output: a column of a product, a channel of a convolution.
    With(&'a [f32]),
    /// What stands there.
    GoOn,
}

/// An array that several threads write, each its own elements.
#[derive(Clone, Copy)]
struct Shared<'a>(*mut f32, PhantomData<&'a mut [f32]>);

// SAFETY: who takes a place promises that nobody else writes behind it.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    fn new(values: &'a mut [f32]) -> Self {
        Self(values.as_mut_ptr(), PhantomData)
    }

    /// Returns the place of an element.
    ///
    /// # Safety
    /// The element exists, and no other thread touches what is written behind it.
    unsafe fn from(self, element: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(element) }
    }
}

/// An array whose axes are stored in another order: `strides` are in elements.
fn strided_array(values: Vec<f32>, shape: &[usize], strides: &[usize]) -> FlexTensor {
    let strides = strides.iter().map(|&stride| stride as isize).collect();
    FlexTensor::new(Bytes::from_elems(values), Layout::new(shape.to_vec().into(), strides, 0), DType::F32)
}

/// Calls `f` with the index and the elements of consecutive chunks of `out`, on several threads if it is large.
fn for_chunks(out: &mut [f32], chunk: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if out.len() < PARALLEL_ELEMENTS || out.len() <= chunk {
        out.chunks_mut(chunk).enumerate().for_each(|(i, chunk)| f(i, chunk));
    } else {
        out.par_chunks_mut(chunk).enumerate().for_each(|(i, chunk)| f(i, chunk));
    }
}

/// Like [`for_chunks`], and returns the results in order.
fn map_chunks<T: Send>(out: &mut [f32], chunk: usize, f: impl Fn(usize, &mut [f32]) -> T + Sync + Send) -> Vec<T> {
    if out.len() < PARALLEL_ELEMENTS || out.len() <= chunk {
        out.chunks_mut(chunk).enumerate().map(|(i, chunk)| f(i, chunk)).collect()
    } else {
        out.par_chunks_mut(chunk).enumerate().map(|(i, chunk)| f(i, chunk)).collect()
    }
}

/// Calls `f` for 0..count, on several threads if `elements` is large, and returns the results in order.
fn map_range<T: Send>(count: usize, elements: usize, f: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    if elements < PARALLEL_ELEMENTS || count < 2 {
        (0..count).map(f).collect()
    } else {
        (0..count).into_par_iter().map(f).collect()
    }
}

/// Adds partial sums in their order.
fn add_up(parts: impl IntoIterator<Item = Vec<f32>>, len: usize) -> Vec<f32> {
    let mut total = vec![0.0; len];
    for part in parts {
        simd::add_assign(&mut total, &part);
    }
    total
}
