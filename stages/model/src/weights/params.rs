//! Parameters by name: visiting, replacing, freezing, casting.
//!
//! A parameter's name is its path in the module tree with the few renames of `reference_name`, which makes it the
//! reference's tensor name. Knows no file and no architecture.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, FloatDType, Gradients, TensorData};

use super::write::{StoredType, TensorSpec};
use crate::Tensor;

/// Path parts that stand for a reference name which is no field name in Rust.
const PARTS: [(&str, &str); 4] =
    [("net_0_proj", "net.0.proj"), ("net_2", "net.2"), ("mlp_0", "mlp.0"), ("mlp_2", "mlp.2")];
/// Ends of paths: adapters, as PEFT names them.
const SUFFIXES: [(&str, &str); 4] = [
    ("lora.a", "lora_A.default.weight"),
    ("lora.b", "lora_B.default.weight"),
    ("lora.embedding_a", "lora_embedding_A.default"),
    ("lora.embedding_b", "lora_embedding_B.default"),
];

/// Returns the reference's name of the parameter at `path` in the module tree.
fn reference_name(path: &[String]) -> String {
    let rename =
        |part: &String| PARTS.iter().find(|(ours, _)| ours == part).map_or(part.clone(), |(_, name)| (*name).into());
    let name = path.iter().map(rename).collect::<Vec<_>>().join(".");
    for (ours, theirs) in SUFFIXES {
        if let Some(start) = name.strip_suffix(ours) {
            return format!("{start}{theirs}");
        }
    }
    name
}

/// Returns whether a parameter is stored but never trained: the DiT's position table.
pub fn is_buffer(name: &str) -> bool {
    name.ends_with("pos_embed.pos_embed")
}

/// A float parameter of any rank.
pub trait AnyParam {
    /// Returns its shape.
    fn shape(&self) -> Vec<usize>;
    /// Returns whether it collects a gradient.
    fn is_trainable(&self) -> bool;
    /// Returns its value as a vector, off the tape.
    fn value(&self) -> Tensor<1>;
    /// Returns its gradient as a vector, off the tape; `None` when none was computed.
    fn grad(&self, gradients: &Gradients) -> Option<Tensor<1>>;
    /// Like [`AnyParam::grad`], and frees the gradient.
    fn take_grad(&self, gradients: &mut Gradients) -> Option<Tensor<1>>;
}

fn flatten<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let tensor = tensor.without_autodiff();
    let count = tensor.shape().num_elements();
    tensor.reshape([count])
}

impl<const D: usize> AnyParam for Param<Tensor<D>> {
    fn shape(&self) -> Vec<usize> {
        self.lazy_shape().to_vec()
    }

    fn is_trainable(&self) -> bool {
        self.val().is_require_grad()
    }

    fn value(&self) -> Tensor<1> {
        flatten(self.val())
    }

    fn grad(&self, gradients: &Gradients) -> Option<Tensor<1>> {
        self.val().grad(gradients).map(flatten)
    }

    fn take_grad(&self, gradients: &mut Gradients) -> Option<Tensor<1>> {
        self.val().grad_remove(gradients).map(flatten)
    }
}

/// Calls `f` with the name of each float parameter of `module`, in the order of its fields.
pub fn for_each_param<M: Module>(module: &M, f: impl FnMut(&str, &dyn AnyParam)) {
    struct Visitor<F> {
        path: Vec<String>,
        f: F,
    }
    impl<F: FnMut(&str, &dyn AnyParam)> ModuleVisitor for Visitor<F> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            (self.f)(&reference_name(&self.path), param);
        }
    }
    module.visit(&mut Visitor { path: Vec::new(), f });
}

/// A change of parameters of any rank, by name.
pub(super) trait Change {
    fn apply<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

struct Mapper<C> {
    path: Vec<String>,
    change: C,
}

impl<C: Change> ModuleMapper for Mapper<C> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.change.apply(reference_name(&self.path), param)
    }
}

pub(super) fn change<M: Module, C: Change>(module: M, change: C) -> (M, C) {
    let mut mapper = Mapper { path: Vec::new(), change };
    let module = module.map(&mut mapper);
    (module, mapper.change)
}

/// Replaces parameter values: `f` gets a name and a value as a vector off the tape and returns the new value.
///
/// Whether a parameter collects a gradient stays as it was.
pub fn map_params<M: Module>(module: M, f: impl FnMut(&str, Tensor<1>) -> Tensor<1>) -> M {
    struct Replace<F>(F);
    impl<F: FnMut(&str, Tensor<1>) -> Tensor<1>> Change for Replace<F> {
        fn apply<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|tensor| {
                let (shape, is_autodiff) = (tensor.dims(), tensor.is_autodiff());
                let require_grad = tensor.is_require_grad();
                let new = (self.0)(&name, flatten(tensor)).reshape(shape);
                if is_autodiff { Tensor::from_inner(new).set_require_grad(require_grad) } else { new }
            })
        }
    }
    change(module, Replace(f)).0
}

/// Decides by name which parameters collect a gradient; buffers never do.
///
/// A parameter that trains is held in f32 from here on, so that small updates are not rounded away; a frozen one stays in
/// the type it was loaded in.
pub fn set_trainable<M: Module>(module: M, is_trained: impl Fn(&str) -> bool) -> M {
    struct Select<F>(F);
    impl<F: Fn(&str) -> bool> Change for Select<F> {
        fn apply<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if is_buffer(&name) || !(self.0)(&name) {
                return param.set_require_grad(false);
            }
            param
                .map(|tensor| if tensor.dtype() == DType::F32 { tensor } else { master(tensor) })
                .set_require_grad(true)
        }
    }
    change(module, Select(is_trained)).0
}

/// Returns an f32 copy that is a leaf of the tape, if there is one.
fn master<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    let is_autodiff = tensor.is_autodiff();
    let copy = tensor.without_autodiff().cast(FloatDType::F32);
    if is_autodiff { Tensor::from_inner(copy) } else { copy }
}

/// Takes a module apart: `f` gets each parameter in the order of [`specs`], of which only one exists at a time.
///
/// A fresh module of any size can so be written to disk without being in memory.
///
/// # Errors
/// The first error of `f`; nothing is drawn after it.
pub fn drain<M: Module, E>(module: M, f: impl FnMut(&str, TensorData) -> Result<(), E>) -> Result<(), E> {
    struct Drain<F, E>(F, Option<E>);
    impl<E, F: FnMut(&str, TensorData) -> Result<(), E>> Change for Drain<F, E> {
        fn apply<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (device, shape, id) = (param.lazy_device(), param.lazy_shape(), param.id);
            if self.1.is_none() {
                let value = param.into_value().without_autodiff().into_data();
                self.1 = (self.0)(&name, value).err();
            }
            let empty = shape.clone();
            Param::uninitialized(id, move |device, _| Tensor::zeros(empty, device), device, false, shape)
        }
    }
    let (_, drain) = change(module, Drain(f, None));
    drain.1.map_or(Ok(()), Err)
}

/// Returns names and shapes of all float parameters as they are to be written, in the order of the module's fields.
pub fn specs<M: Module>(module: &M, dtype: StoredType) -> Vec<TensorSpec> {
    let mut specs = Vec::new();
    for_each_param(module, |name, param| {
        specs.push(TensorSpec { name: name.into(), shape: param.shape(), dtype });
    });
    specs
}

/// Casts every parameter; on a tape the cast is differentiable, so gradients reach the parameters it was made from.
pub fn cast<M: Module>(module: M, dtype: FloatDType) -> M {
    struct Cast(FloatDType);
    impl Change for Cast {
        fn apply<const D: usize>(&mut self, _name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|tensor| crate::nn::to_dtype(tensor, DType::from(self.0)))
        }
    }
    change(module, Cast(dtype)).0
}

/// Returns names and values of all float parameters, in the order of the module's fields.
pub fn visit<M: Module>(module: &M) -> Vec<(String, TensorData)> {
    let mut tensors = Vec::new();
    for_each_param(module, |name, param| {
        let values: Vec<f32> = param.value().into_data().iter::<f32>().collect();
        tensors.push((name.to_string(), TensorData::new(values, param.shape())));
    });
    tensors
}

/// Returns the number of elements of all float parameters, buffers left out.
pub fn num_elements<M: Module>(module: &M) -> u64 {
    let mut count = 0;
    for_each_param(module, |name, param| {
        if !is_buffer(name) {
            count += param.shape().iter().product::<usize>() as u64;
        }
    });
    count
}
