//! A whole block as one node on the tape: its backward runs the block again on a tape of its own (see `checkpointing`).

use std::fmt::{Debug, Formatter};
use std::marker::PhantomData;
use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::DType;

use super::{HostOp, Tape, TapeTensor, apply, array, dense, takes};
use crate::Tensor;
use crate::random::{self, Dropout};
use crate::weights::map_params;

type Run<M, const N: usize> = Arc<dyn Fn(&M, [Tensor<1>; N]) -> Tensor<1> + Send + Sync>;

/// What the tape keeps of a block.
struct State<M, const N: usize> {
    block: M,
    inputs: [FlexTensor; N],
    run: Run<M, N>,
    /// Where dropout stood before the block, if it was on.
    dropout: Option<Dropout>,
}

impl<M: Clone, const N: usize> Clone for State<M, N> {
    fn clone(&self) -> Self {
        let (block, inputs) = (self.block.clone(), self.inputs.clone());
        Self { block, inputs, run: self.run.clone(), dropout: self.dropout.clone() }
    }
}

impl<M, const N: usize> Debug for State<M, N> {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("inputs", &self.inputs).finish_non_exhaustive()
    }
}

/// What a block's parameters need.
#[derive(Default)]
struct Needs {
    has_trained: bool,
    /// A parameter that was computed on the tape: its gradient would have to travel on, which an undeclared parent's cannot.
    has_computed: bool,
    has_other_type: bool,
}

impl ModuleVisitor for Needs {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // A frozen parameter may be held in any type.
        let value = param.val();
        if value.is_autodiff() {
            // The leaves of a tape are those that keep their gradient.
            let is_leaf = value.is_require_grad();
            self.has_trained |= is_leaf;
            self.has_other_type |= is_leaf && value.dtype() != DType::F32;
            self.has_computed |= !is_leaf && is_tracked(&value);
        }
    }
}

/// An operation that is never recorded: asking to record it tells whether its input is on the tape.
#[derive(Debug)]
struct Probe;

impl Backward<Flex, 1> for Probe {
    type State = ();

    fn backward(self, _: Ops<(), 1>, _: &mut Gradients, _: &mut Checkpointer) {}
}

fn is_tracked<const D: usize>(tensor: &Tensor<D>) -> bool {
    if !tensor.is_autodiff() {
        return false;
    }
    let tensor: TapeTensor = tensor.clone().try_into_primitive::<Tape>().expect("`takes` was asked before");
    let prepared = Probe.prepare::<NoCheckpointing>([tensor.node()]).compute_bound().stateful();
    matches!(prepared, OpsKind::Tracked(_))
}

/// Returns whether a block can be one node: what trains is f32 on the CPU, and something needs a gradient.
pub(crate) fn can_rerun<M: Module, const N: usize>(block: &M, inputs: &[Tensor<1>; N]) -> bool {
    if !inputs.iter().all(takes) {
        return false;
    }
    let mut needs = Needs::default();
    block.visit(&mut needs);
    !needs.has_computed && !needs.has_other_type && (needs.has_trained || inputs.iter().any(is_tracked))
}

/// Runs a block of which [`can_rerun`] was true.
pub(crate) fn rerun<M: Module + 'static, const N: usize>(
    block: &M,
    mut inputs: [Tensor<1>; N],
    run: impl Fn(&M, [Tensor<1>; N]) -> Tensor<1> + Send + Sync + 'static,
) -> Tensor<1> {
    if !inputs.iter().any(is_tracked) {
        // Parameters alone train: without an input on the tape the backward would never reach the block.
        let first = inputs[0].clone().without_autodiff();
        inputs[0] = Tensor::from_inner(first).require_grad();
    }
    let dropout = random::dropout_place();
    let plain = inputs.each_ref().map(|input| input.clone().without_autodiff());
    let output = run(&block.valid(), plain.clone());
    let tensors = inputs
        .map(|input| Tensor::from_inner(input).try_into_primitive::<Tape>().expect("`can_rerun` was asked before"));
    let nodes = tensors.each_ref().map(|tensor: &TapeTensor| tensor.node());
    let inputs = plain.map(super::host);
    let state = State { block: block.clone(), inputs, run: Arc::new(run), dropout };
    let prepared = Rerun::<M>(PhantomData).prepare::<NoCheckpointing>(nodes).compute_bound().stateful();
    let output = match prepared {
        OpsKind::Tracked(prepared) => prepared.finish(state, super::host(output)),
        OpsKind::UnTracked(prepared) => prepared.finish(super::host(output)),
    };
    Tensor::from_primitive::<Tape>(output)
}

struct Rerun<M>(PhantomData<fn() -> M>);

impl<M> Debug for Rerun<M> {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rerun")
    }
}

impl<M: Module + 'static, const N: usize> Backward<Flex, N> for Rerun<M> {
    type State = State<M, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let State { block, inputs, run, dropout } = ops.state;
        let grad = dense(grads.consume::<Flex>(&ops.node));
        // New leaves: the inner tape must share no node with the outer one, which is locked while it runs.
        let fresh = map_params(block.clone(), |_, value| value);
        let mut leaves = Vec::with_capacity(N);
        for (input, parent) in inputs.into_iter().zip(&ops.parents) {
            let leaf = Tensor::<1>::from_inner(Tensor::from_primitive::<Flex>(input));
            leaves.push(if parent.is_some() { leaf.require_grad() } else { leaf });
        }
        let arguments: [Tensor<1>; N] = std::array::from_fn(|i| leaves[i].clone());
        let output = random::with_dropout_at(dropout, || run(&fresh, arguments));
        let mut inner = apply::<_, 1, 1>(Seed { grad }, [output.into()]).backward();
        for (parent, leaf) in ops.parents.iter().zip(leaves) {
            if let (Some(node), Some(gradient)) = (parent, leaf.grad_remove(&mut inner)) {
                grads.register::<Flex>(node.id, super::host(gradient));
            }
        }
        let mut found = Found { inner: &mut inner, gradients: Vec::new() };
        fresh.visit(&mut found);
        let gradients = found.gradients.into_iter();
        block.visit(&mut Register { outer: grads, gradients });
    }
}

/// Takes the gradients of parameters, in their order.
struct Found<'a> {
    inner: &'a mut burn::tensor::Gradients,
    gradients: Vec<Option<FlexTensor>>,
}

impl ModuleVisitor for Found<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        let gradient = if value.is_require_grad() { value.grad_remove(self.inner) } else { None };
        self.gradients.push(gradient.map(super::host));
    }
}

/// Hands them to the parameters of the outer tape.
struct Register<'a, I> {
    outer: &'a mut Gradients,
    gradients: I,
}

impl<I: Iterator<Item = Option<FlexTensor>>> ModuleVisitor for Register<'_, I> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(Some(gradient)) = self.gradients.next() {
            let tensor = param.val().try_into_primitive::<Tape>().expect("`can_rerun` was asked before");
            self.outer.register::<Flex>(tensor.id(), gradient);
        }
    }
}

/// The end of an inner tape: a number whose gradient with respect to the block's output is the outer one.
#[derive(Clone, Debug)]
struct Seed {
    grad: FlexTensor,
}

impl HostOp<1> for Seed {
    type Saved = ();
    const TAKES_STRIDES: bool = true;

    fn forward(&self, _: &[FlexTensor; 1]) -> (FlexTensor, ()) {
        (array(vec![0.0], &[1]), ())
    }

    fn backward(&self, _: &[FlexTensor; 1], _: &(), _: &FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(self.grad.clone())]
    }
}
