//! PNG files that carry the record of their making as a text.
//!
//! Knows the file format, not what the record says.

use std::io::{BufReader, Write};
use std::path::Path;

use deepgen_contract::tool::{GENERATION_VERSION, GenerationRecord, PNG_KEYWORD};
use image::RgbImage;

use crate::error::{JobError, JobResult, OrFail};

/// Writes an image under a temporary name, syncs it and renames it.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, image: &RgbImage, record: Option<&GenerationRecord>) -> JobResult<()> {
    let failed = || format!("write {}", path.display());
    let bytes = encode(image, record).or_io(failed)?;
    let temporary = path.with_extension("png.partial");
    let mut file = std::fs::File::create(&temporary).or_io(failed)?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).or_io(failed)?;
    std::fs::rename(&temporary, path).or_io(failed)
}

/// Returns an image as the bytes of a PNG file.
///
/// # Errors
/// When it cannot be encoded.
pub fn encode(image: &RgbImage, record: Option<&GenerationRecord>) -> Result<Vec<u8>, ::png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(::png::ColorType::Rgb);
    encoder.set_depth(::png::BitDepth::Eight);
    if let Some(record) = record {
        let text = serde_json::to_string(record).map_err(std::io::Error::other)?;
        encoder.add_itxt_chunk(PNG_KEYWORD.into(), text)?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(image.as_raw())?;
    writer.finish()?;
    Ok(bytes)
}

/// Reads how an image was made.
///
/// # Errors
/// When the file is no PNG, or does not say.
pub fn read_record(path: &Path) -> JobResult<GenerationRecord> {
    let file = std::fs::File::open(path).or_input(|| path.display())?;
    let reader = ::png::Decoder::new(BufReader::new(file)).read_info().or_input(|| path.display())?;
    let chunk = reader.info().utf8_text.iter().find(|chunk| chunk.keyword == PNG_KEYWORD);
    let chunk = chunk.ok_or_else(|| {
        JobError::input(format!("{} does not say how it was made: `deepgen generate` did not write it", path.display()))
    })?;
    let record: GenerationRecord =
        serde_json::from_str(&chunk.get_text().or_input(|| path.display())?).or_input(|| path.display())?;
    if record.version == GENERATION_VERSION {
        return Ok(record);
    }
    Err(JobError::input(format!("{}: version {} is not {GENERATION_VERSION}", path.display(), record.version)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use deepgen_contract::tool::{BatchRow, HashedPath};
    use deepgen_contract::train::FloatKind;

    #[test]
    fn a_record_survives_the_file_and_so_do_the_pixels() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let record = GenerationRecord {
            version: GENERATION_VERSION,
            deepgen_version: "0".into(),
            weights: HashedPath { path: "w".into(), blake3: "h".into() },
            device: "cpu".into(),
            compute: FloatKind::F32,
            batch: vec![BatchRow { prompt: "ein r\u{f6}tlicher \"Kreis\"".into(), images: vec![], noise: "n".into() }],
            row: 0,
            steps: 3,
            cfg: 2.5,
            height: 2,
            width: 3,
            seed: u64::MAX,
            negative: String::new(),
        };
        let image = RgbImage::from_fn(3, 2, |x, y| image::Rgb([x as u8, y as u8, 200]));
        write(&path, &image, Some(&record)).unwrap();
        assert_eq!(read_record(&path).unwrap(), record);
        assert_eq!(image::open(&path).unwrap().to_rgb8(), image);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        write(&path, &image, None).unwrap();
        assert!(read_record(&path).unwrap_err().message.contains("does not say"));
    }
}
