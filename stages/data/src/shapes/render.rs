//! Scenes as images.

use deepgen_contract::shapes::{Scene, ShapesWorld};
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder, RgbImage};

use super::prompt::ShapesError;

/// Returns the image of `scene`.
pub fn render(scene: &Scene, world: &ShapesWorld) -> RgbImage {
    let side = world.side as u32;
    RgbImage::from_raw(side, side, world.paint(scene)).expect("a painted scene has side * side pixels")
}

/// Returns the image of `scene` as a PNG file.
///
/// # Errors
/// When the encoder fails.
pub fn png(scene: &Scene, world: &ShapesWorld) -> Result<Vec<u8>, ShapesError> {
    let (mut bytes, side) = (Vec::new(), world.side as u32);
    PngEncoder::new(&mut bytes).write_image(&world.paint(scene), side, side, ExtendedColorType::Rgb8)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use deepgen_contract::shapes::{Background, Colour, Object, Shape};

    #[test]
    fn a_png_decodes_to_the_painted_scene() {
        let world = ShapesWorld::default();
        let object = Object { shape: Shape::Circle, colour: Colour::Red, row: 0, col: 1 };
        let scene = Scene { objects: vec![object], word: None, background: Background::Black };
        let image = render(&scene, &world);
        assert_eq!(image.get_pixel(24, 8).0, Colour::Red.rgb());
        assert_eq!(image.get_pixel(8, 8).0, Background::Black.rgb());
        let decoded = image::load_from_memory(&png(&scene, &world).unwrap()).unwrap();
        assert_eq!(decoded.into_rgb8(), image);
    }
}
