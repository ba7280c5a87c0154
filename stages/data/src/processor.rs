//! The libraries' image processors: Qwen2-VL's patches and CLIP's crop, as transformers computes them.
//!
//! DeepGen itself uses neither for its references (docs/spec/model.md section 2.8): these serve the vision-language model by
//! itself and the CLIP reward. Knows no tensor.

use image::RgbImage;
use thiserror::Error;

use crate::resample::{Precision, bicubic};
use crate::resize::Pixels;

/// Most elongated image that Qwen2-VL takes.
const MAX_ASPECT: f64 = 200.0;

/// Why an image cannot be prepared.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ProcessorError {
    /// It is too elongated.
    #[error("an image of {height}x{width} is more elongated than {MAX_ASPECT} to 1")]
    TooElongated {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// It has no pixels.
    #[error("the image has no pixels")]
    Empty,
}

/// Returns height and width as multiples of `factor`, near the image's aspect, within the range of pixels.
///
/// # Errors
/// When the image is empty or too elongated.
pub fn smart_resize(
    height: usize,
    width: usize,
    factor: usize,
    [min_pixels, max_pixels]: [usize; 2],
) -> Result<(usize, usize), ProcessorError> {
    if height == 0 || width == 0 {
        return Err(ProcessorError::Empty);
    }
    let (h, w, f) = (height as f64, width as f64, factor as f64);
    if h.max(w) / h.min(w) > MAX_ASPECT {
        return Err(ProcessorError::TooElongated { height, width });
    }
    // Python rounds halves to even.
    let near = |side: f64| (side / f).round_ties_even() * f;
    let (rows, columns) = (near(h), near(w));
    let (rows, columns) = if rows * columns > max_pixels as f64 {
        let shrink = (h * w / max_pixels as f64).sqrt();
        let side = |side: f64| ((side / shrink / f).floor() * f).max(f);
        (side(h), side(w))
    } else if rows * columns < min_pixels as f64 {
        let grow = (min_pixels as f64 / (h * w)).sqrt();
        let side = |side: f64| (side * grow / f).ceil() * f;
        (side(h), side(w))
    } else {
        (rows, columns)
    };
    Ok((rows as usize, columns as usize))
}

/// Map from bytes to the model's numbers: `(byte * scale - mean) / std`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalization {
    /// Factor of the bytes.
    pub scale: f64,
    /// Mean of each channel.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
}

impl Normalization {
    /// Applies the map, channels first.
    pub fn apply(&self, image: &RgbImage) -> Pixels {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let plane = width * height;
        let mut values = vec![0.0; 3 * plane];
        for (i, pixel) in image.pixels().enumerate() {
            for (channel, &byte) in pixel.0.iter().enumerate() {
                let scaled = (f64::from(byte) * self.scale) as f32;
                values[channel * plane + i] = (scaled - self.mean[channel]) / self.std[channel];
            }
        }
        Pixels { height, width, values }
    }
}

/// Sizes of Qwen2-VL's patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchShape {
    /// Side of a patch in pixels.
    pub side: usize,
    /// Patches of a merged cell, per side.
    pub merge: usize,
    /// Frames of a patch; a picture is repeated.
    pub frames: usize,
}

/// A picture cut to patches.
#[derive(Debug, Clone, PartialEq)]
pub struct Patches {
    /// Frames, rows and columns of patches.
    pub grid: [usize; 3],
    /// Values of one patch.
    pub width: usize,
    /// The patches one after another, grouped by merged cell.
    pub values: Vec<f32>,
}

/// Resizes, normalises and cuts a picture as Qwen2-VL's image processor does.
///
/// # Errors
/// As [`smart_resize`].
pub fn qwen_patches(
    image: &RgbImage,
    pixel_range: [usize; 2],
    shape: PatchShape,
    normalization: &Normalization,
    precision: Precision,
) -> Result<Patches, ProcessorError> {
    let factor = shape.side * shape.merge;
    let (height, width) = smart_resize(image.height() as usize, image.width() as usize, factor, pixel_range)?;
    let pixels = normalization.apply(&bicubic(image, width as u32, height as u32, precision));
    let PatchShape { side, merge, frames } = shape;
    let (rows, columns) = (height / side, width / side);
    let mut values = Vec::with_capacity(3 * frames * height * width);
    for (cell_row, cell_column) in (0..rows / merge).flat_map(|r| (0..columns / merge).map(move |c| (r, c))) {
        for (row, column) in (0..merge).flat_map(|r| (0..merge).map(move |c| (r, c))) {
            let (top, left) = ((cell_row * merge + row) * side, (cell_column * merge + column) * side);
            for channel in 0..3 {
                for _ in 0..frames {
                    for y in top..top + side {
                        let start = channel * height * width + y * width + left;
                        values.extend_from_slice(&pixels.values[start..start + side]);
                    }
                }
            }
        }
    }
    Ok(Patches { grid: [1, rows, columns], width: 3 * frames * side * side, values })
}

/// Resizes the shorter side to `size`, cuts out the centre and normalises, as CLIP's image processor does.
///
/// # Errors
/// When the image has no pixels.
pub fn clip_pixels(
    image: &RgbImage,
    size: u32,
    [crop_height, crop_width]: [u32; 2],
    normalization: &Normalization,
) -> Result<Pixels, ProcessorError> {
    let (width, height) = image.dimensions();
    if width == 0 || height == 0 {
        return Err(ProcessorError::Empty);
    }
    let longer = |side: u32, other: u32| (u64::from(size) * u64::from(side) / u64::from(other)) as u32;
    let (new_width, new_height) =
        if width <= height { (size, longer(height, width)) } else { (longer(width, height), size) };
    let resized = bicubic(image, new_width, new_height, Precision::Pillow);
    let start = |all: u32, part: u32| (i64::from(all) - i64::from(part)).div_euclid(2);
    let (left, top) = (start(new_width, crop_width), start(new_height, crop_height));
    // What lies outside of the image is black.
    let cropped = RgbImage::from_fn(crop_width, crop_height, |x, y| {
        let (x, y) = (i64::from(x) + left, i64::from(y) + top);
        let inside = (0..i64::from(new_width)).contains(&x) && (0..i64::from(new_height)).contains(&y);
        if inside { *resized.get_pixel(x as u32, y as u32) } else { image::Rgb([0; 3]) }
    });
    Ok(normalization.apply(&cropped))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_multiples_within_the_range() {
        let range = [3136, 12_845_056];
        assert_eq!(smart_resize(61, 83, 28, range), Ok((56, 84)));
        // 42 / 28 = 1.5 rounds to the even 2, 70 / 28 = 2.5 to 2 as well.
        assert_eq!(smart_resize(42, 70, 28, range), Ok((56, 56)));
        // Too few pixels once a side rounds to nothing: both grow by the root of 3136 / (13 * 700), rounded up.
        assert_eq!(smart_resize(13, 700, 28, range), Ok((28, 420)));
        let small = [6272, 9408];
        let (rows, columns) = smart_resize(1080, 1920, 28, small).unwrap();
        assert!(rows * columns <= 9408 && rows % 28 == 0 && columns % 28 == 0);
        assert_eq!(smart_resize(10, 4000, 28, range), Err(ProcessorError::TooElongated { height: 10, width: 4000 }));
    }

    #[test]
    fn patches_of_one_cell_follow_each_other() {
        let image = RgbImage::from_fn(4, 4, |x, y| image::Rgb([(y * 4 + x) as u8; 3]));
        let identity = Normalization { scale: 1.0, mean: [0.0; 3], std: [1.0; 3] };
        let shape = PatchShape { side: 1, merge: 2, frames: 1 };
        let patches = qwen_patches(&image, [1, 100], shape, &identity, Precision::Pillow).unwrap();
        assert_eq!(patches.grid, [1, 4, 4]);
        let red: Vec<f32> = patches.values.iter().step_by(3).copied().collect();
        assert_eq!(red[..8], [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
    }

    #[test]
    fn the_centre_is_cut_out() {
        let image = RgbImage::from_fn(4, 2, |x, _| image::Rgb([x as u8; 3]));
        let identity = Normalization { scale: 1.0, mean: [0.0; 3], std: [1.0; 3] };
        let pixels = clip_pixels(&image, 2, [2, 2], &identity).unwrap();
        assert_eq!(pixels.values[..4], [1.0, 2.0, 1.0, 2.0]);
    }
}
