//! Damaged input of every format, made by mutation: no panic, no endless loop, bounded memory (`make fuzz`).

use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use deepgen_contract::data::{FilterSettings, InspectRequest, SourceSettings};
use deepgen_data::decode::decode;
use deepgen_data::guess::guess;
use deepgen_data::inspect::{Looking, inspect};
use deepgen_data::sources::{self, SourcePlace};
use image::{ImageFormat, Rgb, RgbImage};

mod fuzzing;

use fuzzing::{Target, fuzz};

/// Bytes that the formats of data give a meaning to.
const TOKENS: [&[u8]; 6] = [b"77777777777", b"ustar\0", b"{\"caption\":", b"PAR1", b"IHDR", b"\xff\xd8\xff\xc4"];

fn target<'a>(name: &'a str, seeds: &'a [Vec<u8>], memory: usize) -> Target<'a> {
    Target { name, seeds, tokens: &TOKENS, memory }
}

fn picture(format: ImageFormat) -> Vec<u8> {
    let image = RgbImage::from_fn(33, 21, |x, y| Rgb([x as u8 * 7, y as u8 * 11, (x * y) as u8]));
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn shard() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let long = format!("{}/d.png", "folder/".repeat(30));
    let caption = br#"{"caption":"a picture"}"#;
    let png = picture(ImageFormat::Png);
    let files: [(&str, &[u8]); 5] =
        [("a.png", &png), ("a.json", caption), ("b.jpg", &[7; 900]), ("b.txt", b"text"), (&long, b"x")];
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes).unwrap();
    }
    builder.append_pax_extensions([("path", b"e.png".as_slice())]).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    header.set_cksum();
    builder.append(&header, &b"y"[..]).unwrap();
    builder.into_inner().unwrap()
}

/// Looks through a file as a source of the kind that its name tells.
fn look(path: &Path, bytes: &[u8], settings: Option<&SourceSettings>) {
    std::fs::write(path, bytes).unwrap();
    let request = InspectRequest { source: path.to_string_lossy().into(), ..InspectRequest::default() };
    let settings = settings.cloned().or_else(|| guess(&request).ok());
    let folder = path.parent().unwrap();
    let place = SourcePlace { seed: 0, project_root: folder, out_dir: folder };
    let Some(Ok(source)) = settings.map(|settings| sources::open(&settings, place)) else { return };
    let filters = FilterSettings { min_side: 0, min_aspect: 0.01, max_aspect: 100.0 };
    let looking = Looking { filters: &filters, limit: 0, num_samples: 0, num_threads: 1 };
    let _ = inspect(source.as_ref(), "fuzz", &looking);
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    (dir, path)
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz"]
fn image_headers() {
    let seeds = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP].map(picture);
    // Four million pixels are free of questions, as 16-bit RGBA and as RGB, and some more when the file is not small.
    fuzz(&target("image", &seeds, 1 << 30), &|bytes| drop(decode(bytes)));
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz"]
fn tar_shards() {
    let (_dir, path) = folder();
    let path = path.join("a.tar");
    fuzz(&target("tar", &[shard()], 1 << 30), &|bytes| look(&path, bytes, None));
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz"]
fn compressed_shards() {
    let (_dir, folder) = folder();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&shard()).unwrap();
    let (gz, zst) = (folder.join("a.tar.gz"), folder.join("a.tar.zst"));
    // The content inside is mutated, too, or a checksum would guard it.
    let case = |bytes: &[u8]| match bytes.first() {
        Some(0x1f) => look(&gz, bytes, None),
        Some(0x28) => look(&zst, bytes, None),
        _ => look(&zst, &zstd::encode_all(bytes, 1).unwrap(), None),
    };
    let seeds = [gzip.finish().unwrap(), zstd::encode_all(&*shard(), 1).unwrap(), shard()];
    fuzz(&target("compressed", &seeds, 1 << 30), &case);
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz"]
fn json_records() {
    let (_dir, folder) = folder();
    std::fs::write(folder.join("a.png"), picture(ImageFormat::Png)).unwrap();
    std::fs::write(folder.join("a.txt"), r#"{"caption":"a"}"#).unwrap();
    let (json, jsonl) = (folder.join("a.json"), folder.join("b.jsonl"));
    let seeds: Vec<Vec<u8>> = [
        r#"[{"image":"a.png","annotation":"a.txt"},{"image":"a.png","annotation":"a.txt"}]"#,
        r#"[{"txt":"a \u00e9 \ud83d\ude00","image_path":"a.png","type":"T2I_SFT","image":""}]"#,
        r#"[{"input_image":["a.png","a.png"],"output_image":"a.png","instruction":"b"}]"#,
        r#"[{"image":"a.png","question":"b","answer":"c"}]"#,
        "{\"file_name\":\"a.png\",\"text\":\"a\"}\n{\"file_name\":\"a.png\",\"text\":\"b\"}\n",
        "{\"input_image\":[\"a.png\"],\"output_image\":\"a.png\",\"instruction\":\"b\"}\n",
        "{\"prompt\":\"b\"}\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec();
    let case = |bytes: &[u8]| {
        look(&json, bytes, None);
        look(&jsonl, bytes, None);
    };
    fuzz(&target("json", &seeds, 64 << 20), &case);
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz"]
fn parquet_files() {
    use parquet::data_type::ByteArrayType;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;

    let (_dir, folder) = folder();
    let path = folder.join("a.parquet");
    let schema = "message m { optional binary image; optional binary text (UTF8); }";
    let schema = std::sync::Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let seeds = [parquet::basic::Compression::SNAPPY, parquet::basic::Compression::UNCOMPRESSED].map(|codec| {
        let properties = WriterProperties::builder().set_compression(codec).build();
        let mut bytes = Vec::new();
        let mut writer =
            SerializedFileWriter::new(&mut bytes, schema.clone(), std::sync::Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for value in [picture(ImageFormat::Png), b"a picture".to_vec()] {
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&[value.into()], Some(&[1]), None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        bytes
    });
    let settings = SourceSettings::Parquet {
        files: path.to_string_lossy().into(),
        text_column: "text".into(),
        image_column: "image".into(),
        reference_column: String::new(),
        max_references: 0,
    };
    // A panic of the reader is caught and told as damage; its message is only noise here.
    std::panic::set_hook(Box::new(|_| {}));
    fuzz(&target("parquet", &seeds, 3 << 30), &|bytes| look(&path, bytes, Some(&settings)));
    let _ = std::panic::take_hook();
}
