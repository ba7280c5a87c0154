//! The pickles of PyTorch checkpoints, read by a machine that knows dictionaries, tuples and tensors and calls nothing: whatever
//! else a checkpoint holds is passed over.
//!
//! Knows neither the archive around a pickle nor where storages lie.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use safetensors::tensor::Dtype;

/// Deepest nesting of dictionaries, and of tuples.
pub(super) const MAX_DEPTH: usize = 100;

/// Part of a storage.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) key: Rc<str>,
    pub(super) dtype: Dtype,
    offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) stride: Vec<usize>,
}

impl View {
    /// Returns the bytes from its first element to its last, in a storage that lies at `range`; nothing when they reach
    /// beyond it.
    pub(super) fn place(&self, range: &Range<usize>) -> Option<Range<usize>> {
        let size = element_size(self.dtype);
        let start = self.offset.checked_mul(size)?.checked_add(range.start)?;
        let last =
            self.shape.iter().zip(&self.stride).try_fold(0usize, |last, (len, stride)| {
                last.checked_add(len.saturating_sub(1).checked_mul(*stride)?)
            })?;
        let used = if self.shape.contains(&0) { 0 } else { last.checked_add(1)?.checked_mul(size)? };
        let end = start.checked_add(used)?;
        (end <= range.end).then_some(start..end)
    }
}

/// Items of a dictionary, in order.
pub(super) type Dict = Vec<(Value, Value)>;

/// What the pickle machine knows; everything else is `Other`.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Other,
    Int(i64),
    Text(Rc<str>),
    Tuple {
        items: Rc<[Value]>,
        /// Tuples inside of each other: they are dropped one inside the other, which costs stack.
        depth: usize,
    },
    /// By its number: dictionaries may hold each other.
    Dict(usize),
    /// Module and name of a class or function.
    Global(Rc<str>),
    Storage {
        key: Rc<str>,
        dtype: Dtype,
    },
    Tensor(Rc<View>),
}

impl Value {
    fn size(&self) -> Result<usize, String> {
        match self {
            Self::Int(number) => usize::try_from(*number).map_err(|_| "a tensor has a negative size".into()),
            _ => Err("a tensor's size is no number".into()),
        }
    }

    fn sizes(&self) -> Result<Vec<usize>, String> {
        match self {
            Self::Tuple { items, .. } => items.iter().map(Self::size).collect(),
            _ => Err("a tensor's shape is no tuple".into()),
        }
    }
}

/// Storage classes of PyTorch.
fn storage_type(class: &str) -> Result<Dtype, String> {
    Ok(match class {
        "torch.DoubleStorage" => Dtype::F64,
        "torch.FloatStorage" => Dtype::F32,
        "torch.HalfStorage" => Dtype::F16,
        "torch.BFloat16Storage" => Dtype::BF16,
        "torch.LongStorage" => Dtype::I64,
        "torch.IntStorage" => Dtype::I32,
        "torch.ShortStorage" => Dtype::I16,
        "torch.CharStorage" => Dtype::I8,
        "torch.ByteStorage" => Dtype::U8,
        "torch.BoolStorage" => Dtype::BOOL,
        other => return Err(format!("a storage of type {other} is not supported")),
    })
}

/// Returns the bytes of an element.
pub(super) fn element_size(dtype: Dtype) -> usize {
    dtype.bitsize().div_ceil(8)
}

/// Returns the `N` bytes at `at` as a number.
pub(super) fn little<const N: usize>(file: &[u8], at: usize) -> Result<u64, String> {
    let bytes = at.checked_add(N).and_then(|end| file.get(at..end)).ok_or("the file ends too early")?;
    Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

/// Returns what a pickle holds, and the dictionaries that it names by number.
///
/// # Errors
/// Says what is damaged or not supported.
pub(super) fn unpickle(bytes: &[u8]) -> Result<(Value, Vec<Dict>), String> {
    Unpickler::new(bytes).run()
}

struct Unpickler<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: BTreeMap<u64, Value>,
    dicts: Vec<Dict>,
}

impl<'a> Unpickler<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, stack: Vec::new(), marks: Vec::new(), memo: BTreeMap::new(), dicts: Vec::new() }
    }

    /// Returns what the pickle stands for, and its dictionaries by number.
    fn run(mut self) -> Result<(Value, Vec<Dict>), String> {
        loop {
            let opcode = self.number::<1>()? as u8;
            match opcode {
                b'.' => return Ok((self.pop()?, self.dicts)),
                0x80 => drop(self.number::<1>()?),
                0x95 => drop(self.number::<8>()?),
                b'(' => self.marks.push(self.stack.len()),
                b'N' | 0x88 | 0x89 | b']' | 0x8f => self.stack.push(Value::Other),
                b'}' => self.push_dict(),
                b')' => self.push_tuple(Vec::new())?,
                b'K' => self.push_int::<1>()?,
                b'M' => self.push_int::<2>()?,
                b'J' => self.push_int::<4>()?,
                0x8a => self.push_long()?,
                b'G' => {
                    self.number::<8>()?;
                    self.stack.push(Value::Other);
                }
                b'X' => self.push_text::<4>()?,
                0x8c => self.push_text::<1>()?,
                b'U' | b'C' => self.skip_bytes::<1>()?,
                b'T' | b'B' => self.skip_bytes::<4>()?,
                b'c' => {
                    let name = format!("{}.{}", self.line()?, self.line()?);
                    self.stack.push(Value::Global(name.into()));
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Value::Text(name), Value::Text(module)) = (name, module) else {
                        return Err("a class without a name".into());
                    };
                    self.stack.push(Value::Global(format!("{module}.{name}").into()));
                }
                b'q' => self.remember::<1>()?,
                b'r' => self.remember::<4>()?,
                0x94 => drop(self.memo.insert(self.memo.len() as u64, self.top()?.clone())),
                b'h' => self.recall::<1>()?,
                b'j' => self.recall::<4>()?,
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push_tuple(items)?;
                }
                0x85..=0x87 => {
                    let first = self.stack.len().checked_sub(usize::from(opcode) - 0x84).ok_or(UNDERFLOW)?;
                    let items = self.stack.split_off(first);
                    self.push_tuple(items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(vec![key, value])?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set_items(items)?;
                }
                b'a' => drop(self.pop()?),
                b'e' | 0x90 => drop(self.pop_to_mark()?),
                b'b' | b'0' => drop(self.pop()?),
                b'R' | 0x81 => {
                    let (arguments, class) = (self.pop()?, self.pop()?);
                    match call(&class, &arguments)? {
                        Made::Value(value) => self.stack.push(value),
                        Made::Dict => self.push_dict(),
                    }
                }
                b'Q' => {
                    let id = self.pop()?;
                    self.stack.push(storage(&id)?);
                }
                other => return Err(format!("the pickle has the unknown opcode {other:#04x}")),
            }
        }
    }

    fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Dict::new());
    }

    fn push_tuple(&mut self, items: Vec<Value>) -> Result<(), String> {
        let depth_of = |item: &Value| if let Value::Tuple { depth, .. } = item { *depth } else { 0 };
        let depth = 1 + items.iter().map(depth_of).max().unwrap_or(0);
        if depth > MAX_DEPTH {
            return Err("its tuples hold each other too deeply".into());
        }
        self.stack.push(Value::Tuple { items: items.into(), depth });
        Ok(())
    }

    fn number<const N: usize>(&mut self) -> Result<u64, String> {
        let number = little::<N>(self.bytes, self.at)?;
        self.at += N;
        Ok(number)
    }

    fn take(&mut self, len: u64) -> Result<&[u8], String> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len)).ok_or("a text is too long")?;
        let bytes = self.bytes.get(self.at..end).ok_or("the pickle ends too early")?;
        self.at = end;
        Ok(bytes)
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let len = rest.iter().position(|&byte| byte == b'\n').ok_or("the pickle ends too early")?;
        self.at += len + 1;
        Ok(String::from_utf8_lossy(&rest[..len]).into_owned())
    }

    fn push_int<const N: usize>(&mut self) -> Result<(), String> {
        let number = self.number::<N>()?;
        let signed = if N == 4 { i64::from(number as u32 as i32) } else { number as i64 };
        self.stack.push(Value::Int(signed));
        Ok(())
    }

    fn push_long(&mut self) -> Result<(), String> {
        let len = self.number::<1>()?;
        let bytes = self.take(len)?;
        if bytes.len() > 8 {
            self.stack.push(Value::Other);
            return Ok(());
        }
        let is_negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut all = [if is_negative { 0xff } else { 0 }; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        self.stack.push(Value::Int(i64::from_le_bytes(all)));
        Ok(())
    }

    fn push_text<const N: usize>(&mut self) -> Result<(), String> {
        let len = self.number::<N>()?;
        let text = String::from_utf8_lossy(self.take(len)?).into();
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn skip_bytes<const N: usize>(&mut self) -> Result<(), String> {
        let len = self.number::<N>()?;
        self.take(len)?;
        self.stack.push(Value::Other);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack.pop().ok_or_else(|| UNDERFLOW.into())
    }

    fn top(&self) -> Result<&Value, String> {
        self.stack.last().ok_or_else(|| UNDERFLOW.into())
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len()).ok_or(UNDERFLOW)?;
        Ok(self.stack.split_off(mark))
    }

    fn set_items(&mut self, items: Vec<Value>) -> Result<(), String> {
        if let Value::Dict(dict) = *self.top()? {
            self.dicts[dict].extend(items.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())));
        }
        Ok(())
    }

    fn remember<const N: usize>(&mut self) -> Result<(), String> {
        let key = self.number::<N>()?;
        let value = self.top()?.clone();
        self.memo.insert(key, value);
        Ok(())
    }

    fn recall<const N: usize>(&mut self) -> Result<(), String> {
        let key = self.number::<N>()?;
        let value = self.memo.get(&key).ok_or("the pickle refers to nothing")?.clone();
        self.stack.push(value);
        Ok(())
    }
}

const UNDERFLOW: &str = "the pickle takes more than it has put down";

/// What a call gives.
enum Made {
    Value(Value),
    /// An empty dictionary.
    Dict,
}

/// Returns what a class or function gives, for the few that make up a state dict; nothing is run.
fn call(class: &Value, arguments: &Value) -> Result<Made, String> {
    let other = Ok(Made::Value(Value::Other));
    let (Value::Global(name), Value::Tuple { items, .. }) = (class, arguments) else { return other };
    match (name.as_ref(), items.as_ref()) {
        ("collections.OrderedDict", _) => Ok(Made::Dict),
        ("torch._utils._rebuild_parameter", [value, ..]) => Ok(Made::Value(value.clone())),
        ("torch._utils._rebuild_tensor_v2", [Value::Storage { key, dtype }, offset, shape, stride, ..]) => {
            let (shape, stride) = (shape.sizes()?, stride.sizes()?);
            if shape.len() != stride.len() {
                return Err("a tensor's shape and stride have different lengths".into());
            }
            let view = View { key: key.clone(), dtype: *dtype, offset: offset.size()?, shape, stride };
            Ok(Made::Value(Value::Tensor(Rc::new(view))))
        }
        _ => other,
    }
}

/// Returns the storage that a persistent id names: ("storage", class, key, location, elements).
fn storage(id: &Value) -> Result<Value, String> {
    match id {
        Value::Tuple { items, .. } => match items.as_ref() {
            [Value::Text(_), Value::Global(class), Value::Text(key), ..] => {
                Ok(Value::Storage { key: key.clone(), dtype: storage_type(class)? })
            }
            _ => Err("a storage is described in an unknown way".into()),
        },
        _ => Err("a storage is described in an unknown way".into()),
    }
}
