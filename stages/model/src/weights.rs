//! The one door for weights: names, safetensors files in and out, and parameters by name for whoever trains them.
//!
//! Knows no architecture and no optimiser. A parameter's name is its path in the module tree with the few renames of
//! `reference_name`, which makes it the reference's tensor name. Loading is strict: every missing, unexpected or wrongly
//! shaped tensor is reported, all at once.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, FloatDType, Gradients, TensorData};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, View};

use crate::Tensor;

/// What can go wrong with weights.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file cannot be read or written.
    #[error("cannot access {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file is no safetensors file, or its index is broken.
    #[error("{path} is not a valid weights file: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor that was asked for by name is not there.
    #[error("no tensor named {0}")]
    NoTensor(String),
    /// A file does not fit a module.
    #[error("{0}")]
    Mismatch(Mismatch),
}

/// The differences between a module and a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Names that the module needs and the file lacks.
    pub missing: Vec<String>,
    /// Names that the file has and the module does not know.
    pub unexpected: Vec<String>,
    /// Name, shape in the module, shape in the file.
    pub wrong_shape: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl Mismatch {
    fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.wrong_shape.is_empty()
    }
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "weights do not fit the model")?;
        for name in &self.missing {
            write!(f, "\n  missing: {name}")?;
        }
        for name in &self.unexpected {
            write!(f, "\n  unexpected: {name}")?;
        }
        for (name, ours, theirs) in &self.wrong_shape {
            write!(f, "\n  wrong shape: {name} is {theirs:?}, the model needs {ours:?}")?;
        }
        Ok(())
    }
}

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
trait Change {
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

fn change<M: Module, C: Change>(module: M, change: C) -> (M, C) {
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
pub fn set_trainable<M: Module>(module: M, is_trained: impl Fn(&str) -> bool) -> M {
    struct Select<F>(F);
    impl<F: Fn(&str) -> bool> Change for Select<F> {
        fn apply<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.set_require_grad(!is_buffer(&name) && (self.0)(&name))
        }
    }
    change(module, Select(is_trained)).0
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
        let mut data = param.value().into_data();
        data = TensorData::new(data.into_vec_f32(), param.shape());
        tensors.push((name.to_string(), data));
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

/// Conversions that `TensorData` lacks.
trait IntoF32 {
    fn into_vec_f32(self) -> Vec<f32>;
}

impl IntoF32 for TensorData {
    fn into_vec_f32(self) -> Vec<f32> {
        self.iter::<f32>().collect()
    }
}

/// Number type of stored weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    /// 32 bits.
    F32,
    /// Upper half of an f32, rounded to nearest even.
    Bf16,
}

/// A tensor on its way into a file; converted when it is written, so that only one converted copy exists at a time.
struct Stored<'a> {
    data: &'a TensorData,
    shape: Vec<usize>,
    dtype: StoredType,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            StoredType::F32 => Dtype::F32,
            StoredType::Bf16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.data.iter::<f32>();
        match self.dtype {
            StoredType::F32 => values.flat_map(f32::to_le_bytes).collect(),
            StoredType::Bf16 => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
        }
    }

    fn data_len(&self) -> usize {
        let size = if self.dtype == StoredType::F32 { 4 } else { 2 };
        self.shape.iter().product::<usize>() * size
    }
}

/// Writes a safetensors file under a temporary name, syncs it and renames it: a reader never sees half a file.
///
/// # Errors
/// When the file cannot be written.
pub fn save(
    path: &Path,
    tensors: &[(String, TensorData)],
    dtype: StoredType,
    metadata: &BTreeMap<String, String>,
) -> Result<(), WeightsError> {
    let io = |source| WeightsError::Io { path: path.into(), source };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let views = tensors.iter().map(|(name, data)| (name, Stored { data, shape: shape_of(data), dtype }));
    let metadata: Option<HashMap<String, String>> =
        (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect());
    safetensors::serialize_to_file(views, metadata, &temporary).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => io(source),
        error => WeightsError::Format { path: path.into(), reason: error.to_string() },
    })?;
    File::open(&temporary).and_then(|file| file.sync_all()).map_err(io)?;
    std::fs::rename(&temporary, path).map_err(io)
}

fn shape_of(data: &TensorData) -> Vec<usize> {
    data.shape().to_vec()
}

/// Where a stored tensor lies.
#[derive(Debug, Clone)]
struct Entry {
    shard: usize,
    stored_name: String,
    shape: Vec<usize>,
}

/// One mapped safetensors file.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// Named tensors of a safetensors file, or of a folder of them, mapped into memory.
#[derive(Debug, Clone)]
pub struct WeightFile {
    shards: Vec<Arc<Shard>>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl WeightFile {
    /// Opens a `.safetensors` file, or every `.safetensors` file of a folder.
    ///
    /// # Errors
    /// When a file cannot be read, is malformed, or two files hold the same name.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let mut file = Self { shards: Vec::new(), entries: BTreeMap::new(), metadata: BTreeMap::new() };
        for path in shard_paths(path)? {
            file.add_shard(path)?;
        }
        Ok(file)
    }

    fn add_shard(&mut self, path: PathBuf) -> Result<(), WeightsError> {
        let io = |source| WeightsError::Io { path: path.clone(), source };
        let format = |reason: String| WeightsError::Format { path: path.clone(), reason };
        let file = File::open(&path).map_err(io)?;
        // SAFETY: weights files are written under another name and renamed (see `save`), so a mapped file does not change.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let (_, header): (usize, Metadata) = SafeTensors::read_metadata(&map).map_err(|e| format(e.to_string()))?;
        for (name, info) in header.tensors() {
            let entry = Entry { shard: self.shards.len(), stored_name: name.clone(), shape: info.shape.clone() };
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(format(format!("tensor {name} is also in another file of the folder")));
            }
        }
        self.metadata.extend(header.metadata().clone().into_iter().flatten());
        self.shards.push(Arc::new(Shard { path, map }));
        Ok(())
    }

    /// Returns the names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Returns the shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Returns the free-form metadata of the files.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Gives the tensors other names; `None` leaves one out.
    pub fn rename(mut self, f: impl Fn(&str) -> Option<String>) -> Self {
        let entries = std::mem::take(&mut self.entries);
        self.entries = entries.into_iter().filter_map(|(name, entry)| f(&name).map(|name| (name, entry))).collect();
        self
    }

    /// Reads a tensor as f32, whatever float or integer type it is stored in.
    ///
    /// # Errors
    /// When there is no such tensor, or its type is not supported.
    pub fn get(&self, name: &str) -> Result<TensorData, WeightsError> {
        let entry = self.entries.get(name).ok_or_else(|| WeightsError::NoTensor(name.into()))?;
        let shard = &self.shards[entry.shard];
        let format = |reason: String| WeightsError::Format { path: shard.path.clone(), reason };
        let tensors = SafeTensors::deserialize(&shard.map).map_err(|e| format(e.to_string()))?;
        let tensor = tensors.tensor(&entry.stored_name).map_err(|e| format(e.to_string()))?;
        let bytes = tensor.data();
        let values: Vec<f32> = match tensor.dtype() {
            Dtype::F32 => convert(bytes, f32::from_le_bytes),
            Dtype::F64 => convert(bytes, |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => convert(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => convert(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::I64 => convert(bytes, |b| i64::from_le_bytes(b) as f32),
            Dtype::I32 => convert(bytes, |b| i32::from_le_bytes(b) as f32),
            Dtype::U8 | Dtype::BOOL => convert(bytes, |[b]: [u8; 1]| f32::from(b)),
            other => return Err(format(format!("tensor {name} has the unsupported type {other:?}"))),
        };
        Ok(TensorData::new(values, entry.shape.clone()))
    }
}

fn convert<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| f(*chunk)).collect()
}

fn shard_paths(path: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    if !path.is_dir() {
        return Ok(vec![path.into()]);
    }
    let io = |source| WeightsError::Io { path: path.into(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.is_empty() {
        return Err(WeightsError::Format { path: path.into(), reason: "the folder holds no .safetensors file".into() });
    }
    Ok(paths)
}

/// Loads the tensors of `file` whose names start with `prefix` (dot included) into `module`.
///
/// Which parameters collect gradients, and the device, stay as they were.
///
/// # Errors
/// Lists all missing, unexpected and wrongly shaped tensors; `module` is then given up.
pub fn load_into<M: Module>(module: M, file: &WeightFile, prefix: &str) -> Result<M, WeightsError> {
    let mut mismatch = Mismatch::default();
    let mut known = BTreeSet::new();
    for_each_param(&module, |name, param| {
        let full = format!("{prefix}{name}");
        match file.shape(&full) {
            None => mismatch.missing.push(full.clone()),
            Some(shape) if shape != param.shape() => {
                mismatch.wrong_shape.push((full.clone(), param.shape(), shape.to_vec()));
            }
            Some(_) => {}
        }
        known.insert(full);
    });
    let is_unexpected = |name: &&str| name.starts_with(prefix) && !known.contains(*name);
    mismatch.unexpected = file.names().filter(is_unexpected).map(str::to_string).collect();
    if !mismatch.is_empty() {
        return Err(WeightsError::Mismatch(mismatch));
    }

    struct Load<'a> {
        file: &'a WeightFile,
        prefix: &'a str,
        failure: Option<WeightsError>,
    }
    impl Change for Load<'_> {
        fn apply<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            match self.file.get(&format!("{}{name}", self.prefix)) {
                Ok(data) => {
                    let tensor = Tensor::from_data(data, &param.lazy_device());
                    let id = param.id;
                    param.transform_for_load(tensor, id)
                }
                Err(error) => {
                    self.failure.get_or_insert(error);
                    param
                }
            }
        }
    }
    let (module, load) = change(module, Load { file, prefix, failure: None });
    load.failure.map_or(Ok(module), Err)
}
