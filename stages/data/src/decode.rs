//! Bytes of a PNG, JPEG or WebP file to RGB pixels, with limits that hold before any pixel is allocated.
//!
//! As the release does: alpha is dropped, not composited, and EXIF orientation is ignored.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageReader, Limits, RgbImage};
use thiserror::Error;

/// Largest image that is decoded, in pixels: a header that claims more is refused.
pub const MAX_PIXELS: u64 = 100_000_000;
/// Image that any file may claim to be, in pixels, and pixels a byte beyond that: a photograph has some tens at most.
const FREE_PIXELS: u64 = 4_000_000;
const MAX_PIXELS_PER_BYTE: u64 = 2_000;
/// Largest side, in pixels.
const MAX_SIDE: u32 = 65_535;
/// Most bytes a decoder may allocate: the largest image in 16-bit RGBA.
const MAX_DECODER_BYTES: u64 = MAX_PIXELS * 8;

/// Why bytes gave no image.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// The file is empty.
    #[error("the image file is empty")]
    Empty,
    /// The header claims an absurd size.
    #[error("the image header claims {width}x{height} pixels, more than {MAX_PIXELS} in all")]
    TooLarge {
        /// Claimed width.
        width: u32,
        /// Claimed height.
        height: u32,
    },
    /// The header claims far more than the bytes can hold.
    #[error("the image header claims {width}x{height} pixels in {num_bytes} bytes: a decompression bomb")]
    Bomb {
        /// Claimed width.
        width: u32,
        /// Claimed height.
        height: u32,
        /// Bytes there are.
        num_bytes: usize,
    },
    /// The decoder gave up.
    #[error("the image cannot be decoded: {0}")]
    Decoder(#[from] image::ImageError),
    /// The format could not be guessed from the first bytes.
    #[error("the image cannot be read: {0}")]
    Read(#[from] std::io::Error),
}

/// Decodes a PNG, JPEG or WebP file.
///
/// # Errors
/// When the bytes are no image, are cut short, or claim more than [`MAX_PIXELS`] or far more than they can hold.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, DecodeError> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder()?;
    let (width, height) = decoder.dimensions();
    let num_pixels = u64::from(width) * u64::from(height);
    if num_pixels > MAX_PIXELS {
        return Err(DecodeError::TooLarge { width, height });
    }
    if num_pixels > FREE_PIXELS && num_pixels / MAX_PIXELS_PER_BYTE > bytes.len() as u64 {
        return Err(DecodeError::Bomb { width, height, num_bytes: bytes.len() });
    }
    Ok(DynamicImage::from_decoder(decoder)?.into_rgb8())
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ImageFormat, Rgba, RgbaImage};

    fn png(image: DynamicImage) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn alpha_is_dropped_and_not_composited() {
        let bytes = png(RgbaImage::from_pixel(2, 3, Rgba([9, 8, 7, 0])).into());
        let image = decode(&bytes).unwrap();
        assert_eq!(image.dimensions(), (2, 3));
        assert!(image.pixels().all(|p| p.0 == [9, 8, 7]));
    }

    #[test]
    fn an_absurd_header_is_refused_before_pixels_are_allocated() {
        let mut bytes = png(RgbImage::new(1, 1).into());
        // IHDR: width and height at bytes 16..24, its checksum over type and data at 29..33.
        bytes[16..20].copy_from_slice(&60_000u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&60_000u32.to_be_bytes());
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        let error = decode(&bytes).expect_err("3.6 gigapixels").to_string();
        assert!(error.contains("60000x60000") || error.contains("limit"), "{error}");
    }

    #[test]
    fn a_small_file_that_claims_a_large_image_is_refused() {
        let bytes = png(image::GrayImage::new(6000, 6000).into());
        assert!(bytes.len() > 18_000, "{}", bytes.len());
        assert_eq!(decode(&bytes).unwrap().dimensions(), (6000, 6000));
        let mut bytes = png(RgbImage::new(1, 1).into());
        bytes[16..20].copy_from_slice(&9_000u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&9_000u32.to_be_bytes());
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        assert!(matches!(decode(&bytes), Err(DecodeError::Bomb { width: 9000, .. })));
    }

    #[test]
    fn a_cut_file_is_an_error() {
        let bytes = png(RgbImage::new(40, 40).into());
        assert!(decode(&bytes[..bytes.len() / 2]).is_err());
        assert!(matches!(decode(&[]), Err(DecodeError::Empty)));
        assert!(decode(b"not an image at all").is_err());
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
        })
    }
}
