//! Batches of images and texts without a prompt template, and images as tensors.
//!
//! Serves the stages that train the base, which know no chat template. A batch is a function of the seed and its number.

use std::path::Path;

use burn::tensor::TensorData;
use deepgen_contract::data::ImageSettings;
use deepgen_data::batch::Batch;
use deepgen_data::mixture::Mixture;
use deepgen_data::resize::{Pixels, fit};
use deepgen_data::stream::Shard;
use deepgen_model::{Device, Tensor};

use crate::error::{JobError, JobResult, OrFail};

/// Batches of a mixture.
pub struct Feed {
    mixture: Mixture,
    image: ImageSettings,
    shard: Shard,
}

impl Feed {
    /// Opens the mixture in `folder`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(folder: &Path, image: &ImageSettings, seed: u64) -> JobResult<Self> {
        let mixture = Mixture::open(folder).or_input(|| "the mixture")?;
        Ok(Self { mixture, image: image.clone(), shard: Shard::single(seed) })
    }

    /// Returns batch `iteration`; its ids are empty.
    ///
    /// # Errors
    /// When a sample cannot be read: prepared data sets hold none that could not.
    pub fn batch(&self, iteration: u64) -> JobResult<Batch> {
        let slot = self.mixture.slot(self.shard, iteration).or_input(|| "the mixture")?;
        let mut batch = Batch {
            task: slot.task,
            keys: Vec::new(),
            texts: Vec::new(),
            ids: Vec::new(),
            images: Vec::new(),
            references: Vec::new(),
            replaced: Vec::new(),
        };
        for item in slot.items {
            let sample = self.mixture.sample(item).or_io(|| "read a sample")?;
            let sized = |image| fit(image, &self.image).or_input(|| sample.key.clone());
            batch.images.push(sized(&sample.image)?);
            batch.references.push(sample.references.iter().map(sized).collect::<JobResult<_>>()?);
            batch.texts.push(sample.text);
            batch.keys.push(sample.key);
        }
        Ok(batch)
    }
}

/// Returns one image as a tensor `[3, height, width]` in -1..=1.
pub fn tensor(pixels: &Pixels, device: &Device) -> Tensor<3> {
    Tensor::from_data(TensorData::new(pixels.values.clone(), [3, pixels.height, pixels.width]), device)
}

/// Returns images of one size as a tensor `[images, 3, height, width]` in -1..=1.
///
/// # Errors
/// When there is none or their sizes differ.
pub fn stack(images: &[Pixels], device: &Device) -> JobResult<Tensor<4>> {
    let first = images.first().ok_or_else(|| JobError::internal("a batch without images"))?;
    if !have_one_size(images) {
        return Err(JobError::input("the images of a batch differ in size: set `image.mode` to `exact`"));
    }
    let values: Vec<f32> = images.iter().flat_map(|image| image.values.iter().copied()).collect();
    Ok(Tensor::from_data(TensorData::new(values, [images.len(), 3, first.height, first.width]), device))
}

/// Returns true when all images have the size of the first.
pub fn have_one_size(images: &[Pixels]) -> bool {
    images.windows(2).all(|pair| (pair[0].height, pair[0].width) == (pair[1].height, pair[1].width))
}
