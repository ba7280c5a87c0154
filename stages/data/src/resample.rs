//! Bicubic resampling to the bit: as Pillow does it, and as PyTorch does it for bytes.
//!
//! Both filter rows and then columns, with bytes in between, and differ only in how finely they round the weights. Knows no
//! model and no normalisation.

use image::RgbImage;

/// How finely the weights are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 22 bits, as Pillow.
    Pillow,
    /// As many bits as 16-bit weights hold, as PyTorch's antialiased bicubic for bytes.
    Torch,
}

/// Bits of Pillow's weights.
const PILLOW_BITS: u32 = 22;
/// Pixels on each side that the filter reaches at scale one.
const SUPPORT: f64 = 2.0;
/// The filter's free parameter.
const A: f64 = -0.5;

/// The pixels that one output pixel is made of, and their whole-number weights.
struct Window {
    first: usize,
    weights: Vec<i64>,
}

/// Resizes an image, widening the filter where it shrinks.
///
/// An image that has the size already is returned as it is; so is one without pixels.
pub fn bicubic(image: &RgbImage, width: u32, height: u32, precision: Precision) -> RgbImage {
    let wide = if image.width() == width { image.clone() } else { resize_rows(image, width, precision) };
    if image.height() == height { wide } else { turn(&resize_rows(&turn(&wide), height, precision)) }
}

/// Swaps rows and columns.
fn turn(image: &RgbImage) -> RgbImage {
    RgbImage::from_fn(image.height(), image.width(), |x, y| *image.get_pixel(y, x))
}

fn resize_rows(image: &RgbImage, width: u32, precision: Precision) -> RgbImage {
    let (windows, bits) = windows(image.width() as usize, width as usize, precision);
    RgbImage::from_fn(width, image.height(), |x, y| {
        let window = &windows[x as usize];
        image::Rgb(std::array::from_fn(|channel| {
            let pixels = (window.first..).map(|x| i64::from(image.get_pixel(x as u32, y).0[channel]));
            let sum: i64 = window.weights.iter().zip(pixels).map(|(weight, pixel)| weight * pixel).sum();
            // Half a unit, then an arithmetic shift: rounds to nearest.
            ((sum + (1 << (bits - 1))) >> bits).clamp(0, 255) as u8
        }))
    })
}

fn filter(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// Returns the window of each output pixel of a line, and the bits of its weights.
fn windows(inputs: usize, outputs: usize, precision: Precision) -> (Vec<Window>, u32) {
    let scale = inputs as f64 / outputs as f64;
    let stretch = scale.max(1.0);
    let support = SUPPORT * stretch;
    let exact: Vec<(usize, Vec<f64>)> = (0..outputs)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale;
            // Casts of negative numbers give 0.
            let first = (centre - support + 0.5) as usize;
            let end = ((centre + support + 0.5) as usize).min(inputs);
            let weights: Vec<f64> = (first..end).map(|x| filter((x as f64 - centre + 0.5) / stretch)).collect();
            let sum: f64 = weights.iter().sum();
            (first, weights.into_iter().map(|weight| weight / sum).collect())
        })
        .collect();
    let largest = exact.iter().flat_map(|(_, weights)| weights).fold(0.0, |a: f64, &b| a.max(b));
    let bits = match precision {
        Precision::Pillow => PILLOW_BITS,
        Precision::Torch => {
            let fits = |bits: &u32| (0.5 + largest * f64::from(1u32 << (bits + 1))) < f64::from(1u32 << 15);
            (0..PILLOW_BITS).find(|bits| !fits(bits)).unwrap_or(PILLOW_BITS)
        }
    };
    let whole = |weight: f64| (weight * f64::from(1u32 << bits)).round() as i64;
    let windows =
        exact.into_iter().map(|(first, weights)| Window { first, weights: weights.into_iter().map(whole).collect() });
    (windows.collect(), bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    fn ramp(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([(x * 7) as u8, (y * 5) as u8, (x * y) as u8]))
    }

    #[test]
    fn a_flat_image_stays_flat() {
        let flat = RgbImage::from_pixel(17, 23, Rgb([9, 200, 255]));
        for precision in [Precision::Pillow, Precision::Torch] {
            for (width, height) in [(5, 60), (40, 3)] {
                let resized = bicubic(&flat, width, height, precision);
                assert!(resized.pixels().all(|pixel| pixel.0 == [9, 200, 255]));
            }
        }
    }

    #[test]
    fn shrinking_agrees_with_the_training_resampler_within_a_level() {
        let image = ramp(33, 29);
        let ours = bicubic(&image, 20, 14, Precision::Pillow);
        let theirs = crate::resize::resize(&image, 20, 14).unwrap();
        for (a, b) in ours.as_raw().iter().zip(theirs.as_raw()) {
            assert!(a.abs_diff(*b) <= 2, "{a} {b}");
        }
    }

    #[test]
    fn weights_of_a_window_sum_to_one() {
        for precision in [Precision::Pillow, Precision::Torch] {
            let (windows, bits) = windows(61, 28, precision);
            assert!(windows.iter().all(|window| (window.weights.iter().sum::<i64>() - (1 << bits)).abs() < 16));
        }
    }
}
