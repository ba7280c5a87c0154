//! Decoding and resizing against what Pillow made of the same files (`fixtures/pillow/make.py`).

use std::path::PathBuf;

use deepgen_data::decode::decode;
use deepgen_data::resize::{fit, resize};
use image::RgbImage;

fn path(name: &str) -> PathBuf {
    PathBuf::from("tests/fixtures/pillow").join(name)
}

fn read(name: &str) -> RgbImage {
    decode(&std::fs::read(path(name)).unwrap()).unwrap()
}

/// Returns the largest and the mean difference, in 8-bit levels.
fn difference(a: &RgbImage, b: &RgbImage) -> (u8, f64) {
    assert_eq!(a.dimensions(), b.dimensions());
    let pairs = a.as_raw().iter().zip(b.as_raw());
    let all: Vec<u8> = pairs.map(|(a, b)| a.abs_diff(*b)).collect();
    let mean = all.iter().map(|&d| f64::from(d)).sum::<f64>() / all.len() as f64;
    (all.into_iter().max().unwrap(), mean)
}

#[test]
fn resizing_is_within_two_levels_of_pillow() {
    for name in ["shrink", "grow", "both", "fix_pixels"] {
        let expected = read(&format!("{name}.out.png"));
        let resized = resize(&read(&format!("{name}.in.png")), expected.width(), expected.height()).unwrap();
        let (largest, mean) = difference(&resized, &expected);
        assert!(largest <= 2 && mean < 0.5, "{name}: {largest} at most, {mean} in the mean");
    }
}

#[test]
fn decoding_a_jpeg_is_within_eight_levels_of_pillow() {
    let image = read("jpeg.in.jpg");
    let (largest, mean) = difference(&image, &read("jpeg.decoded.png"));
    assert!(largest <= 8 && mean < 0.6, "{largest} at most, {mean} in the mean");
    let expected = read("jpeg.out.png");
    let (largest, mean) = difference(&resize(&image, 96, 64).unwrap(), &expected);
    assert!(largest <= 8 && mean < 0.6, "{largest} at most, {mean} in the mean");
}

#[test]
fn the_rule_of_the_paper_and_the_numbers_of_the_model_agree_with_pillow() {
    use deepgen_contract::data::{ImageMode, ImageSettings};
    let settings = ImageSettings { size: 64, unit: 16, mode: ImageMode::FixPixels };
    let pixels = fit(&read("fix_pixels.in.png"), &settings).unwrap();
    let expected = read("fix_pixels.out.png");
    assert_eq!((pixels.width as u32, pixels.height as u32), expected.dimensions());
    let plane = pixels.width * pixels.height;
    for (i, pixel) in expected.pixels().enumerate() {
        for channel in 0..3 {
            let wanted = f32::from(pixel.0[channel]) / 255.0 * 2.0 - 1.0;
            assert!((pixels.values[channel * plane + i] - wanted).abs() <= 2.0 * 2.0 / 255.0 + 1e-6);
        }
    }
}
