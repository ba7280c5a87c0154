//! What frozen parts make of an image, kept on disk: the autoencoder's moments and the vision tower's tokens.
//!
//! An entry is named by the pixels that the part sees, after resizing, and lies in a folder named by the part's weights and by
//! the type and device that it computes in and on. Every entry carries its hash, which is checked when it is read; what does not
//! agree is computed again and said. Nothing is added beyond the budget. Latents are not kept: they are drawn anew from their
//! moments each time, so that training computes the same with and without.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{DType, TensorData};
use deepgen_contract::job::FrozenCache as Place;
use deepgen_data::resize::Pixels;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::vae::Posterior;
use deepgen_model::weights::for_each_param;
use deepgen_model::{Device, Tensor};

use crate::emit::Emitter;
use crate::error::{JobResult, OrFail};
use crate::feed::{stack, tensor};

/// First bytes of an entry's body; the digit is the version of the format.
const MAGIC: &[u8; 16] = b"deepgen-frozen-1";
/// Version of what the parts compute; raised when the same weights would make other numbers of the same pixels.
const CODE_VERSION: u32 = 1;
/// Bytes of a hash.
const HASH: usize = 32;
/// Largest entry that is read, in bytes.
const MAX_ENTRY: u64 = 1 << 30;
/// First words of the folders of each part.
const PARTS: [&str; 2] = ["moments", "vision"];
/// Names of the parameters of each part.
const PREFIXES: [&str; 2] = ["vae.encoder.", "vlm.visual."];

/// Cached answers of a model's frozen parts.
#[derive(Debug)]
pub struct FrozenCache {
    /// Entries of the autoencoder, if nothing changes it.
    moments: Option<Entries>,
    /// Entries of the vision tower, if nothing changes it.
    vision: Option<Entries>,
    max_bytes: u64,
    tally: Mutex<Tally>,
}

/// What a cache has done so far.
#[derive(Debug, Default)]
struct Tally {
    /// Bytes in the folder.
    num_bytes: u64,
    /// True when nothing more is added.
    is_full: bool,
    num_found: u64,
    num_computed: u64,
    /// What became noteworthy since somebody asked.
    messages: Vec<String>,
}

impl FrozenCache {
    /// Opens the cache of a model in its folder; `trained` are the names of the parameters that train. A part that they or
    /// adapters change is not cached.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(place: &Place, model: &DeepGen, trained: &[String]) -> JobResult<Self> {
        let mut tally = Tally::default();
        let mut changed: Vec<String> = trained.to_vec();
        // Adapters change a part even where they do not train, and their dropout is drawn anew each time.
        for_each_param(model, |name, _| changed.extend(name.contains("lora_").then(|| name.to_owned())));
        let mut part = |word: &str, prefix: &str| -> JobResult<Option<Entries>> {
            if let Some(name) = changed.iter().find(|name| name.starts_with(prefix)) {
                tally.messages.push(format!("`frozen_cache` keeps no {word}: `{name}` changes what it would keep"));
                return Ok(None);
            }
            let key = weights_key(model, prefix);
            let folder = place.path.join(format!("{word}-{}", &key.to_hex()[..16]));
            fs::create_dir_all(&folder).or_io(|| format!("`frozen_cache`: create {}", folder.display()))?;
            Ok(Some(Entries { folder, key: key.into() }))
        };
        let moments = part(PARTS[0], PREFIXES[0])?;
        let vision = part(PARTS[1], PREFIXES[1])?;
        tally.num_bytes = bytes_in(&place.path);
        if tally.num_bytes >= place.max_bytes {
            // Those of other weights make room.
            let own: Vec<&Path> = moments.iter().chain(&vision).map(|entries| entries.folder.as_path()).collect();
            let removed =
                remove_others(&place.path, &own).or_io(|| format!("make room in {}", place.path.display()))?;
            if removed > 0 {
                tally
                    .messages
                    .push(format!("`frozen_cache` was full: {removed} folders of other weights were removed"));
            }
            tally.num_bytes = bytes_in(&place.path);
        }
        Ok(Self { moments, vision, max_bytes: place.max_bytes, tally: Mutex::new(tally) })
    }

    /// Passes on what became noteworthy since the last call.
    pub fn report(&self, emitter: &mut Emitter) {
        let messages = std::mem::take(&mut self.tally().messages);
        messages.into_iter().for_each(|message| emitter.warn(message));
    }

    /// Says how many answers were there and how many were computed.
    pub fn summarise(&self, emitter: &mut Emitter) {
        self.report(emitter);
        let Tally { num_found, num_computed, num_bytes, .. } = *self.tally();
        emitter.note(format!(
            "frozen cache: {num_found} answers were there, {num_computed} were computed; it holds {num_bytes} bytes"
        ));
    }

    /// Returns the autoencoder's moments of images of one size.
    ///
    /// # Errors
    /// When there is no image or their sizes differ.
    pub fn posterior(&self, model: &DeepGen, images: &[Pixels], device: &Device) -> JobResult<Posterior> {
        let Some(entries) = &self.moments else { return Ok(model.posterior(stack(images, device)?)) };
        let compute = |missing: &[Pixels]| {
            let Posterior { mean, logvar } = model.posterior(stack(missing, device)?);
            let moments = Tensor::cat(vec![mean, logvar], 1);
            Ok((0..missing.len()).map(|i| moments.clone().narrow(0, i, 1).squeeze_dim::<3>(0)).collect())
        };
        let moments = self.through(entries, images, device, compute)?;
        let moments: Tensor<4> = Tensor::stack(moments, 0);
        let z = moments.dims()[1] / 2;
        Ok(Posterior { mean: moments.clone().narrow(1, 0, z), logvar: moments.narrow(1, z, z) })
    }

    /// Returns the vision tower's tokens `[tokens, d]` of each image; nothing when they are not cached.
    pub fn vision(&self, model: &DeepGen, images: &[Pixels], device: &Device) -> JobResult<Option<Vec<Tensor<2>>>> {
        let Some(entries) = &self.vision else { return Ok(None) };
        let compute = |missing: &[Pixels]| {
            let images: Vec<Tensor<3>> = missing.iter().map(|image| tensor(image, device)).collect();
            Ok(model.vlm.encode_images(&images).into_iter().map(Tensor::detach).collect())
        };
        self.through(entries, images, device, compute).map(Some)
    }

    /// Looks up each image, computes those that are missing in one go, and keeps them.
    fn through<const D: usize>(
        &self,
        entries: &Entries,
        images: &[Pixels],
        device: &Device,
        compute: impl FnOnce(&[Pixels]) -> JobResult<Vec<Tensor<D>>>,
    ) -> JobResult<Vec<Tensor<D>>> {
        let names: Vec<blake3::Hash> = images.iter().map(content_hash).collect();
        let mut found: Vec<Option<Tensor<D>>> = names
            .iter()
            .map(|name| {
                let stored = entries.read(name).unwrap_or_else(|reason| {
                    self.say(format!("a damaged entry of `frozen_cache` is computed again: {reason}"));
                    None
                })?;
                (stored.shape().len() == D).then(|| Tensor::from_data(stored, device))
            })
            .collect();
        let missing: Vec<usize> = (0..images.len()).filter(|&i| found[i].is_none()).collect();
        {
            let mut tally = self.tally();
            tally.num_found += (images.len() - missing.len()) as u64;
            tally.num_computed += missing.len() as u64;
        }
        if !missing.is_empty() || images.is_empty() {
            let computed = compute(&missing.iter().map(|&i| images[i].clone()).collect::<Vec<_>>())?;
            for (i, tensor) in missing.into_iter().zip(computed) {
                self.keep(entries, &names[i], &tensor.clone().into_data());
                found[i] = Some(tensor);
            }
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Writes an entry if there is room for it.
    fn keep(&self, entries: &Entries, name: &blake3::Hash, data: &TensorData) {
        let mut tally = self.tally();
        if tally.is_full {
            return;
        }
        let bytes = entries.encode(name, data);
        let size = bytes.len() as u64;
        let why = if tally.num_bytes + size > self.max_bytes {
            "it is full (`frozen_cache.size`)".to_owned()
        } else {
            match entries.write(name, &bytes) {
                Ok(()) => {
                    tally.num_bytes += size;
                    return;
                }
                Err(error) => error.to_string(),
            }
        };
        tally.is_full = true;
        let held = tally.num_bytes;
        tally.messages.push(format!("`frozen_cache` holds {held} bytes and takes no more: {why}"));
    }

    fn say(&self, message: String) {
        self.tally().messages.push(message);
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Entries of one part.
#[derive(Debug)]
struct Entries {
    folder: PathBuf,
    /// Hash of the part's weights.
    key: [u8; HASH],
}

impl Entries {
    fn path(&self, name: &blake3::Hash) -> PathBuf {
        let hex = name.to_hex();
        self.folder.join(&hex[..2]).join(&hex[2..])
    }

    /// Returns an entry as it is written: its hash, then magic, type, shape and numbers.
    fn encode(&self, name: &blake3::Hash, data: &TensorData) -> Vec<u8> {
        let mut body = MAGIC.to_vec();
        let dims = data.shape();
        body.extend([type_code(data.dtype()), dims.len() as u8]);
        dims.iter().for_each(|&dim| body.extend((dim as u64).to_le_bytes()));
        body.extend_from_slice(data.bytes());
        let mut bytes = self.hash(name, &body).to_vec();
        bytes.append(&mut body);
        bytes
    }

    /// The hash is also over the entry's name and the weights: an entry in a wrong place is a damaged one.
    fn hash(&self, name: &blake3::Hash, body: &[u8]) -> [u8; HASH] {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(name.as_bytes()).update(body);
        hasher.finalize().into()
    }

    /// Returns an entry, or nothing when there is none.
    fn read(&self, name: &blake3::Hash) -> Result<Option<TensorData>, String> {
        let path = self.path(name);
        let damaged = |reason: &str| format!("{}: {reason}", path.display());
        let read = || match fs::metadata(&path)?.len() {
            size if size > MAX_ENTRY => Err(std::io::Error::other("it is larger than any entry")),
            _ => fs::read(&path),
        };
        let bytes = match read() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(damaged(&error.to_string())),
        };
        let (hash, body) = bytes.split_at_checked(HASH).ok_or_else(|| damaged("it is cut short"))?;
        if hash != self.hash(name, body) {
            return Err(damaged("its content does not have its hash"));
        }
        decode(body).map(Some).ok_or_else(|| damaged("another version wrote it"))
    }

    /// Writes an entry under another name first: a reader never sees half of it.
    fn write(&self, name: &blake3::Hash, bytes: &[u8]) -> std::io::Result<()> {
        let path = self.path(name);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder)?;
        // Readable by those who share the folder, as far as the user's mask lets them.
        let shared = fs::Permissions::from_mode(0o666);
        let mut file = tempfile::Builder::new().permissions(shared).tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.persist(&path).map_err(|error| error.error)?;
        Ok(())
    }
}

/// The parts compute in one of two types.
fn type_code(dtype: DType) -> u8 {
    u8::from(dtype == DType::BF16)
}

fn decode(body: &[u8]) -> Option<TensorData> {
    let rest = body.strip_prefix(MAGIC)?;
    let (&[code, num_dims], rest) = rest.split_first_chunk::<2>()?;
    let (dims, numbers) = rest.split_at_checked(8 * usize::from(num_dims))?;
    let shape: Vec<usize> = dims.as_chunks::<8>().0.iter().map(|dim| u64::from_le_bytes(*dim) as usize).collect();
    let dtype = if code == 0 { DType::F32 } else { DType::BF16 };
    let count = shape.iter().try_fold(dtype.size(), |count, &dim| count.checked_mul(dim))?;
    (count == numbers.len()).then(|| TensorData::from_bytes_vec(numbers.to_vec(), shape, dtype))
}

/// Returns the hash of the weights whose names begin with `prefix`, of the base's description, and of the type and the
/// device that the model computes in and on.
fn weights_key(model: &DeepGen, prefix: &str) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_derive_key("deepgen frozen cache v1");
    let base = serde_json::to_vec(&model.spec().base).expect("a description has a JSON form");
    let place = format!("{:?} {:?} ", model.dtype(), model.device().without_autodiff());
    hasher.update(&CODE_VERSION.to_le_bytes()).update(place.as_bytes()).update(&base);
    for_each_param(model, |name, param| {
        if name.starts_with(prefix) {
            let data = param.value().into_data();
            hasher.update(format!("{name} {:?} {:?}\n", data.dtype(), param.shape()).as_bytes());
            hasher.update(data.bytes());
        }
    });
    hasher.finalize()
}

/// Returns the hash of what a part sees of an image.
fn content_hash(image: &Pixels) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(image.height as u64).to_le_bytes()).update(&(image.width as u64).to_le_bytes());
    let mut bytes = Vec::with_capacity(4 * image.values.len());
    image.values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
    hasher.update(&bytes);
    hasher.finalize()
}

/// Removes the folders of other weights' entries, those that this program made; returns how many.
fn remove_others(folder: &Path, own: &[&Path]) -> std::io::Result<usize> {
    let mut num_removed = 0;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_ours = path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            PARTS.iter().any(|part| name.strip_prefix(part).is_some_and(|rest| rest.starts_with('-')))
        });
        if path.is_dir() && is_ours && !own.contains(&path.as_path()) {
            fs::remove_dir_all(&path)?;
            num_removed += 1;
        }
    }
    Ok(num_removed)
}

/// Returns the bytes of all files below a folder.
fn bytes_in(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes_in(&entry.path()),
        Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |meta| meta.len()),
        _ => 0,
    };
    entries.flatten().map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(folder: &Path, key: u8) -> Entries {
        Entries { folder: folder.to_owned(), key: [key; HASH] }
    }

    #[test]
    fn an_entry_is_read_as_it_was_written_and_never_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let entries = entries(folder.path(), 1);
        let (name, other) = (blake3::hash(b"a"), blake3::hash(b"b"));
        let data = TensorData::new(vec![1.5f32, -0.0, f32::MIN_POSITIVE, 3e38], [2, 2]);
        assert_eq!(entries.read(&name), Ok(None));
        let bytes = entries.encode(&name, &data);
        entries.write(&name, &bytes).unwrap();
        let read = entries.read(&name).unwrap().unwrap();
        assert_eq!((read.bytes(), read.shape(), read.dtype()), (data.bytes(), data.shape(), data.dtype()));

        // Any byte changed or missing, another name, other weights.
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            entries.write(&name, &damaged).unwrap();
            assert!(entries.read(&name).is_err(), "byte {at}");
            entries.write(&name, &bytes[..at]).unwrap();
            assert!(entries.read(&name).is_err(), "cut at {at}");
        }
        entries.write(&other, &bytes).unwrap();
        assert!(entries.read(&other).is_err());
        let foreign = self::entries(folder.path(), 2);
        assert!(foreign.read(&other).is_err());
    }

    #[test]
    fn only_folders_of_other_weights_make_room() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["moments-1", "moments-2", "vision-1", "mine"] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("x"), [0; 10]).unwrap();
        }
        assert_eq!(bytes_in(folder.path()), 40);
        assert_eq!(remove_others(folder.path(), &[&folder.path().join("moments-2")]).unwrap(), 2);
        assert_eq!(bytes_in(folder.path()), 20);
        assert!(folder.path().join("mine").exists());
    }
}
