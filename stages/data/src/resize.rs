//! Images to the model's sizes and numbers, and back (docs/spec/data.md section 3, docs/spec/sft.md section 6).
//!
//! Bicubic (a = -0.5), widened by the reduction factor, with 8 bits between the passes, as Pillow does; within 2/255
//! of it. Knows nothing of files.

use std::cell::RefCell;

use deepgen_contract::data::{ImageMode, ImageSettings};
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;
use thiserror::Error;

/// Most bytes between the passes that are kept for the next image: those of an image of some megapixels.
const KEPT_BYTES: usize = 16 << 20;

/// An image as the model sees it: channels, rows, columns; values in -1..=1.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `3 * height * width` values, red plane first.
    pub values: Vec<f32>,
}

/// Why an image could not be brought to size.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// The image has no pixels, or the aimed size has none.
    #[error("cannot resize {from_width}x{from_height} to {width}x{height}")]
    NoPixels {
        /// Width at hand.
        from_width: u32,
        /// Height at hand.
        from_height: u32,
        /// Aimed width.
        width: u32,
        /// Aimed height.
        height: u32,
    },
    /// The resampler refused.
    #[error("resizing failed: {0}")]
    Resampler(String),
}

/// Returns the width and height that an image of `width` x `height` is resized to.
pub fn target_size(width: u32, height: u32, settings: &ImageSettings) -> (u32, u32) {
    match settings.mode {
        ImageMode::Exact => (settings.size, settings.size),
        ImageMode::FixPixels => {
            // f64 in this order: rounding up turns any upward error into a whole unit.
            let ratio = f64::from(settings.size) / (f64::from(height) * f64::from(width)).sqrt();
            let unit = f64::from(settings.unit);
            let side = |pixels: u32| (f64::from(pixels) * ratio / unit).ceil() as u32 * settings.unit;
            (side(width), side(height))
        }
    }
}

/// Resizes the whole image, without crop.
///
/// # Errors
/// When a side is 0.
pub fn resize(image: &RgbImage, width: u32, height: u32) -> Result<RgbImage, ResizeError> {
    let (from_width, from_height) = image.dimensions();
    if (from_width, from_height) == (width, height) {
        return Ok(image.clone());
    }
    if [from_width, from_height, width, height].contains(&0) {
        return Err(ResizeError::NoPixels { from_width, from_height, width, height });
    }
    // Columns first and then rows, with bytes between, as Pillow does: the resampler by itself begins with the rows, and
    // where a pass overshoots and is clamped the order shows.
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    SCRATCH.with_borrow_mut(|(resizer, between)| {
        let mut pass = |bytes: &[u8], from: (u32, u32), out: &mut [u8], rows: u32| {
            let failed = |error: &dyn std::fmt::Display| ResizeError::Resampler(error.to_string());
            let source = ImageRef::new(from.0, from.1, bytes, PixelType::U8x3).map_err(|e| failed(&e))?;
            let mut target = Image::from_slice_u8(width, rows, out, PixelType::U8x3).map_err(|e| failed(&e))?;
            resizer.resize(&source, &mut target, &options).map_err(|e| failed(&e))
        };
        let mut resized = RgbImage::new(width, height);
        if height == from_height || width == from_width {
            pass(image.as_raw(), (from_width, from_height), &mut resized, height)?;
            return Ok(resized);
        }
        between.resize(3 * width as usize * from_height as usize, 0);
        pass(image.as_raw(), (from_width, from_height), between, from_height)?;
        pass(between, (width, from_height), &mut resized, height)?;
        if between.len() > KEPT_BYTES {
            *between = Vec::new();
        }
        Ok(resized)
    })
}

thread_local! {
    /// The resampler's tables and the rows between its passes, kept from image to image.
    static SCRATCH: RefCell<(Resizer, Vec<u8>)> = RefCell::new((Resizer::new(), Vec::new()));
}

/// Resizes by the settings' rule and maps to -1..=1.
///
/// # Errors
/// When the image or the aimed size has no pixels.
pub fn fit(image: &RgbImage, settings: &ImageSettings) -> Result<Pixels, ResizeError> {
    let (width, height) = target_size(image.width(), image.height(), settings);
    if image.dimensions() == (width, height) {
        return Ok(to_pixels(image));
    }
    Ok(to_pixels(&resize(image, width, height)?))
}

/// Maps bytes to -1..=1 (`x / 255 * 2 - 1`), channels first.
pub fn to_pixels(image: &RgbImage) -> Pixels {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let plane = width * height;
    let numbers: [f32; 256] = std::array::from_fn(|byte| byte as f32 / 255.0 * 2.0 - 1.0);
    // A plane after the other: every value is written once, and none before.
    let mut values = Vec::with_capacity(3 * plane);
    for channel in 0..3 {
        values.extend(image.as_raw().chunks_exact(3).map(|pixel| numbers[usize::from(pixel[channel])]));
    }
    Pixels { height, width, values }
}

impl Pixels {
    /// Maps back to bytes: `127.5 x + 128`, clamped to 0..=255, truncated; NaN becomes 0.
    ///
    /// # Errors
    /// When the number of values is not `3 * height * width`.
    pub fn to_rgb(&self) -> Result<RgbImage, ResizeError> {
        let plane = self.height * self.width;
        if self.values.len() != 3 * plane {
            let text = format!("{} values for {}x{} pixels", self.values.len(), self.width, self.height);
            return Err(ResizeError::Resampler(text));
        }
        // A float to integer cast truncates and maps NaN to 0.
        let byte = |x: f32| (127.5 * x + 128.0).clamp(0.0, 255.0) as u8;
        let mut image = RgbImage::new(self.width as u32, self.height as u32);
        for (i, pixel) in image.pixels_mut().enumerate() {
            pixel.0 = std::array::from_fn(|channel| byte(self.values[channel * plane + i]));
        }
        Ok(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    const PAPER: ImageSettings = ImageSettings { size: 512, unit: 32, mode: ImageMode::FixPixels };

    #[test]
    fn fix_pixels_gives_the_sizes_of_the_specification() {
        let table = [
            ((512, 512), (512, 512)),
            ((1024, 1024), (512, 512)),
            ((768, 768), (512, 512)),
            ((1000, 1000), (512, 512)),
            ((1920, 1080), (704, 384)),
            ((1080, 1920), (384, 704)),
            ((1344, 768), (704, 416)),
            ((640, 480), (608, 448)),
            ((1024, 768), (608, 448)),
            ((1536, 1024), (640, 448)),
            ((300, 200), (640, 448)),
            ((2000, 500), (1024, 256)),
            ((3000, 1000), (896, 320)),
            ((100, 900), (192, 1536)),
            ((100, 1000), (192, 1632)),
            ((513, 512), (544, 512)),
        ];
        for ((width, height), expected) in table {
            assert_eq!(target_size(width, height, &PAPER), expected, "{width}x{height}");
        }
        for side in 81..=4096 {
            assert_eq!(target_size(side, side, &PAPER), (512, 512), "{side}");
        }
    }

    #[test]
    fn an_image_that_fits_is_not_resampled() {
        let image = RgbImage::from_fn(32, 32, |x, y| Rgb([x as u8 * 8, y as u8 * 8, 77]));
        assert_eq!(resize(&image, 32, 32).unwrap(), image);
        let exact = ImageSettings { size: 32, unit: 32, mode: ImageMode::Exact };
        assert_eq!(fit(&image, &exact).unwrap(), to_pixels(&image));
    }

    #[test]
    fn shrinking_averages_and_does_not_alias() {
        let stripes = RgbImage::from_fn(64, 64, |x, _| if x % 2 == 0 { Rgb([0; 3]) } else { Rgb([255; 3]) });
        let small = resize(&stripes, 8, 8).unwrap();
        for x in 1..7 {
            let value = small.get_pixel(x, 4).0[0];
            assert!((120..=136).contains(&value), "column {x} is {value}");
        }
    }

    #[test]
    fn bytes_survive_the_way_to_the_model_and_back() {
        let image = RgbImage::from_fn(16, 16, |x, y| Rgb([(y * 16 + x) as u8, 255 - (y * 16 + x) as u8, x as u8]));
        let pixels = to_pixels(&image);
        assert_eq!(pixels.values[0], -1.0);
        assert_eq!(pixels.values[255], 1.0);
        assert_eq!(pixels.to_rgb().unwrap(), image);
    }

    #[test]
    fn values_out_of_range_are_clamped() {
        let pixels = Pixels { height: 1, width: 1, values: vec![-1.5, 1.5, f32::NAN] };
        assert_eq!(pixels.to_rgb().unwrap().get_pixel(0, 0).0, [0, 255, 0]);
        assert!(Pixels { height: 2, width: 1, values: vec![0.0; 3] }.to_rgb().is_err());
    }
}
