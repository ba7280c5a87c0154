//! Images for the fixtures of the report's tests: a prompt drawn more or less well.

use image::{Rgb, RgbImage};

/// Returns whether a checkpoint of this skill gets an item right.
pub fn is_right(skill: f64, index: usize) -> bool {
    (index * 37 % 24) as f64 / 24.0 < 0.06 + 0.3 * skill
}

/// Returns an image of 32 by 32 pixels: each object that the prompt names, in its own cell, under noise.
pub fn draw(prompt: &str, skill: f64, index: usize) -> RgbImage {
    let mut image = RgbImage::from_pixel(32, 32, Rgb([16, 16, 20]));
    let mut colour = [240, 240, 240];
    let mut cell = index % 4;
    // An instruction names the shape before its new colour.
    let named = ["red", "green", "blue", "yellow"].into_iter().find(|name| prompt.ends_with(name));
    let words: Vec<&str> = named.into_iter().chain(prompt.split(' ')).collect();
    for word in words {
        match word {
            "red" => colour = [230, 40, 40],
            "green" => colour = [40, 200, 60],
            "blue" => colour = [50, 80, 240],
            "yellow" => colour = [240, 220, 40],
            "circle" | "square" | "triangle" | "cross" => {
                // One that cannot draw it yet takes another colour.
                let seen = if is_right(skill, index) { colour } else { [colour[2], colour[0], colour[1]] };
                shape(&mut image, word, seen, cell);
                cell = (cell + 1) % 4;
            }
            _ => {}
        }
    }
    let noise = (90.0 / (1.0 + 2.0 * skill)) as i32;
    let mut state = index as u32 + 1;
    for pixel in image.pixels_mut() {
        for channel in &mut pixel.0 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let shift = (state >> 16) as i32 % (noise + 1) - noise / 2;
            *channel = (i32::from(*channel) + shift).clamp(0, 255) as u8;
        }
    }
    image
}

fn shape(image: &mut RgbImage, name: &str, colour: [u8; 3], cell: usize) {
    for j in 0..12u32 {
        for i in 0..12u32 {
            let (x, y) = ((f64::from(i) - 5.5).abs(), (f64::from(j) - 5.5).abs());
            let is_on = match name {
                "circle" => x * x + y * y <= 36.0,
                "square" => x <= 5.0 && y <= 5.0,
                "triangle" => x <= f64::from(j + 1) * 0.5,
                _ => x <= 2.0 || y <= 2.0,
            };
            if is_on {
                let (left, top) = (16 * (cell as u32 % 2) + 2, 16 * (cell as u32 / 2) + 2);
                image.put_pixel(left + i, top + j, Rgb(colour));
            }
        }
    }
}
