//! A case on disk: its settings, its files, and the device that it is run on.

use std::path::{Path, PathBuf};

use deepgen_model::weights::WeightFile;
use deepgen_model::{Device, Tensor};
use image::RgbImage;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::archive::Archive;
use super::error::{ParityError, ParityResult};
use super::kind::Kind;
use crate::foreign::configs::ConfigFile;

/// A JSON object with its file, so that a missing setting can be named.
#[derive(Debug, Clone)]
pub struct Settings {
    path: PathBuf,
    /// The object.
    pub value: Value,
}

impl Settings {
    /// Reads a JSON file.
    ///
    /// # Errors
    /// When it is missing or no JSON.
    pub fn read(path: &Path) -> ParityResult<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| ParityError::Io { path: path.into(), source })?;
        let value = serde_json::from_str(&text)
            .map_err(|error| ParityError::Format { path: path.into(), reason: error.to_string() })?;
        Ok(Self { path: path.into(), value })
    }

    /// Returns the setting at a path of keys joined by `/`.
    ///
    /// # Errors
    /// When it is missing or has another type.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> ParityResult<T> {
        let value = self.value.pointer(&format!("/{key}")).filter(|value| !value.is_null());
        let parsed = value.and_then(|value| serde_json::from_value(value.clone()).ok());
        let wanted = std::any::type_name::<T>();
        parsed.ok_or_else(|| ParityError::Setting { path: self.path.clone(), key: key.into(), wanted })
    }

    /// Returns the object at `key` as settings of their own.
    pub fn at(&self, key: &str) -> Option<Self> {
        let value = self.value.pointer(&format!("/{key}")).filter(|value| value.is_object())?;
        Some(Self { path: self.path.clone(), value: value.clone() })
    }

    /// Returns the settings as a library's configuration file.
    pub fn as_config_file(&self) -> ConfigFile {
        ConfigFile::of(self.path.display().to_string(), self.value.clone())
    }
}

/// A case.
pub struct Case {
    /// Its name: the folder's.
    pub name: String,
    /// What it compares.
    pub kind: Kind,
    /// Its folder.
    pub folder: PathBuf,
    /// Its config.json.
    pub config: Settings,
    /// Where it is run, with autodiff.
    pub device: Device,
}

impl Case {
    /// Opens the case in `folder`.
    ///
    /// # Errors
    /// When config.json cannot be read or the kind is unknown.
    pub fn open(folder: &Path, device: &Device) -> ParityResult<Self> {
        // A trailing `.` or a relative path has no name of its own.
        let full = folder.canonicalize().map_err(|source| ParityError::Io { path: folder.into(), source })?;
        let name = full.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let config = Settings::read(&full.join("config.json"))?;
        let kind = Kind::of(&config.value, &name)?;
        Ok(Self { name, kind, folder: full, config, device: device.clone() })
    }

    /// Opens a file of reference tensors.
    ///
    /// # Errors
    /// As [`Archive::open`].
    pub fn archive(&self, name: &str) -> ParityResult<Archive> {
        Archive::open(&self.folder.join(name))
    }

    /// Opens the inputs.
    ///
    /// # Errors
    /// As [`Archive::open`].
    pub fn inputs(&self) -> ParityResult<Inputs<'_>> {
        Ok(Inputs { archive: self.archive("inputs.safetensors")?, device: &self.device })
    }

    /// Opens a weights file, or all of a folder.
    ///
    /// # Errors
    /// When it is missing or malformed.
    pub fn weights(&self, name: &str) -> ParityResult<WeightFile> {
        Ok(WeightFile::open(&self.folder.join(name))?)
    }

    /// Reads a JSON file of the case.
    ///
    /// # Errors
    /// As [`Settings::read`].
    pub fn settings(&self, name: &str) -> ParityResult<Settings> {
        Settings::read(&self.folder.join(name))
    }

    /// Opens the case that holds this one's weights: `weights_in` of the settings, a sibling folder.
    ///
    /// # Errors
    /// As [`Case::open`].
    pub fn weights_case(&self) -> ParityResult<Self> {
        let name: String = self.config.get("weights_in")?;
        let parent = self.folder.parent().unwrap_or(&self.folder);
        Self::open(&parent.join(name), &self.device)
    }
}

/// A case's inputs, as tensors on its device.
pub struct Inputs<'a> {
    /// The file.
    pub archive: Archive,
    device: &'a Device,
}

impl Inputs<'_> {
    /// Returns an input.
    ///
    /// # Errors
    /// When it is missing or of another rank.
    pub fn tensor<const D: usize>(&self, name: &str) -> ParityResult<Tensor<D>> {
        let data = self.archive.data(name)?;
        if data.shape().len() != D {
            return Err(ParityError::Unsupported(format!(
                "input `{name}` has the shape {:?}, not {D} axes",
                data.shape()
            )));
        }
        Ok(Tensor::from_data(data, self.device))
    }

    /// Returns a picture `[height, width, 3]` of bytes.
    ///
    /// # Errors
    /// When it is missing or no picture.
    pub fn image(&self, name: &str) -> ParityResult<RgbImage> {
        let array = self.archive.get(name)?;
        let bytes = array.floats().into_iter().map(|value| value as u8).collect();
        let image = match array.shape[..] {
            [height, width, 3] => RgbImage::from_raw(width as u32, height as u32, bytes),
            _ => None,
        };
        image.ok_or_else(|| ParityError::Unsupported(format!("`{name}` of shape {:?} is no picture", array.shape)))
    }

    /// Returns inputs `prefix0`, `prefix1`, ...
    ///
    /// # Errors
    /// As [`Inputs::tensor`].
    pub fn list<const D: usize>(&self, prefix: &str) -> ParityResult<Vec<Tensor<D>>> {
        (0..self.archive.count(prefix)).map(|i| self.tensor(&format!("{prefix}{i}"))).collect()
    }
}
