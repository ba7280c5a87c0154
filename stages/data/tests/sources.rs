//! Sources of every format come in through one door: exactly the good records of a damaged source are used, packed
//! images are found again, and what is inspected is what is prepared.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Cursor;
use std::path::Path;

use deepgen_contract::data::{FilterSettings, InspectRequest, PrepareSettings, SourceSettings};
use deepgen_data::dataset::{PACK_FILE, PreparedDataset, QUARANTINE_FILE};
use deepgen_data::guess::guess;
use deepgen_data::inspect::{Looking, inspect};
use deepgen_data::prepare::{PreparePlace, PreparedSummary, prepare};
use deepgen_data::source::{Broken, Cause, DataSource};
use deepgen_data::sources::{self, SourcePlace};
use image::{ImageFormat, Rgb, RgbImage};
use serde_json::json;

fn filters() -> FilterSettings {
    FilterSettings { min_side: 80, min_aspect: 0.1, max_aspect: 10.0 }
}

fn run(source: SourceSettings, root: &Path, out: &Path) -> PreparedSummary {
    let settings = PrepareSettings { source, nominal_size: 0, filters: filters(), dedupe: true };
    let place = PreparePlace { seed: 1, project_root: root, out_dir: out, num_threads: 2 };
    prepare(&settings, &place, &mut |_| true).unwrap()
}

/// Encodes a picture whose first pixels spell `number`.
fn picture(number: u32, width: u32, height: u32, format: ImageFormat) -> Vec<u8> {
    let mut image = RgbImage::from_pixel(width, height, Rgb([200; 3]));
    let [a, b, c, _] = number.to_le_bytes();
    image.put_pixel(0, 0, Rgb([a, b, c]));
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn quarantined(out: &Path) -> BTreeMap<String, Broken> {
    let text = fs::read_to_string(out.join(QUARANTINE_FILE)).unwrap();
    let broken = text.lines().map(|line| serde_json::from_str::<Broken>(line).unwrap());
    broken.map(|broken| (broken.key.clone(), broken)).collect()
}

/// Spoils record `number` in one of ten ways; returns how it is reported.
fn spoil(way: u32, images: &Path, number: u32, record: &mut serde_json::Value) -> Cause {
    let file = images.join(format!("{number}.png"));
    match way {
        0 => {
            fs::remove_file(&file).unwrap();
            Cause::Missing
        }
        1 => {
            let whole = fs::read(&file).unwrap();
            fs::write(&file, &whole[..whole.len() / 2]).unwrap();
            Cause::Undecodable
        }
        2 => {
            fs::write(&file, []).unwrap();
            Cause::Undecodable
        }
        3 => {
            fs::write(&file, picture(number, 80, 90, ImageFormat::Png)).unwrap();
            Cause::TooSmall
        }
        4 => {
            fs::write(&file, picture(number, 1000, 100, ImageFormat::Png)).unwrap();
            Cause::AspectRatio
        }
        5 => {
            record["text"] = json!(" \t");
            Cause::Text
        }
        6 => {
            record["image"] = json!(format!("../{number}.png"));
            Cause::Path
        }
        7 => {
            record.as_object_mut().unwrap().remove("text");
            Cause::Record
        }
        8 => {
            // A header that claims 3.6 thousand million pixels; its checksum is right.
            let mut bytes = picture(number, 90, 90, ImageFormat::Png);
            bytes[16..20].copy_from_slice(&60_000u32.to_be_bytes());
            bytes[20..24].copy_from_slice(&60_000u32.to_be_bytes());
            let mut crc = flate2::Crc::new();
            crc.update(&bytes[12..29]);
            bytes[29..33].copy_from_slice(&crc.sum().to_be_bytes());
            fs::write(&file, bytes).unwrap();
            Cause::TooLarge
        }
        _ => {
            // The same picture and text as record 0.
            fs::copy(images.join("0.png"), &file).unwrap();
            record["text"] = json!("picture 0");
            Cause::Duplicate
        }
    }
}

#[test]
fn a_source_with_three_percent_broken_in_ten_ways_gives_exactly_the_good_ones() {
    let root = tempfile::tempdir().unwrap();
    let images = root.path().join("images");
    fs::create_dir(&images).unwrap();
    let mut lines = String::new();
    let mut expected = BTreeMap::new();
    for number in 0..1000u32 {
        fs::write(images.join(format!("{number}.png")), picture(number, 90, 100, ImageFormat::Png)).unwrap();
        let mut record = json!({"image": format!("{number}.png"), "text": format!("picture {number}")});
        if number % 33 == 32 {
            let cause = spoil(number / 33 % 10, &images, number, &mut record);
            expected.insert(format!("a.jsonl:{}", number + 1), cause);
        }
        lines += &format!("{record}\n");
    }
    assert_eq!(expected.len(), 30);
    fs::write(root.path().join("a.jsonl"), lines).unwrap();
    let source = SourceSettings::JsonLines {
        index: "a.jsonl".into(),
        images: "images".into(),
        text_key: "text".into(),
        image_key: "image".into(),
        reference_key: String::new(),
        max_references: 0,
    };
    let out = root.path().join("out");
    let summary = run(source, root.path(), &out);
    let found: BTreeMap<_, _> = quarantined(&out).into_iter().map(|(key, broken)| (key, broken.cause)).collect();
    assert_eq!(found, expected);
    assert_eq!((summary.dataset.num_samples, summary.dataset.num_quarantined), (970, 27));
    assert_eq!(summary.dataset.num_duplicates, 3);
    assert_eq!(summary.dataset.causes.values().sum::<u64>(), 30);
    let dataset = PreparedDataset::open(&out).unwrap();
    let used: BTreeSet<u32> = (0..dataset.len())
        .map(|i| {
            let sample = dataset.get(i).unwrap();
            let [a, b, c] = sample.image.get_pixel(0, 0).0;
            let number = u32::from_le_bytes([a, b, c, 0]);
            assert_eq!(sample.text, format!("picture {number}"));
            number
        })
        .collect();
    let good = (0..1000).filter(|number| !expected.contains_key(&format!("a.jsonl:{}", number + 1)));
    assert_eq!(used, good.collect());
}

/// Writes a tar shard of pictures, one of them cut short, with a caption each.
fn shard(numbers: std::ops::Range<u32>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for number in numbers {
        let (ending, format) =
            [("png", ImageFormat::Png), ("jpg", ImageFormat::Jpeg), ("webp", ImageFormat::WebP)][number as usize % 3];
        let mut image = picture(number, 90 + number, 100, format);
        if number == 7 {
            image.truncate(image.len() / 2);
        }
        let caption = json!({"caption": format!("picture {number}")}).to_string().into_bytes();
        for (ending, bytes) in [(ending, image), ("json", caption)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, format!("{number:04}.{ending}"), &*bytes).unwrap();
        }
    }
    builder.into_inner().unwrap()
}

#[test]
fn compressed_shards_are_packed_and_give_the_samples_of_the_plain_ones() {
    let root = tempfile::tempdir().unwrap();
    for (folder, name) in [("plain", "a.tar"), ("zstd", "a.tar.zst"), ("gzip", "a.tgz")] {
        let folder = root.path().join(folder);
        fs::create_dir(&folder).unwrap();
        let plain = shard(0..12);
        let bytes = match name {
            "a.tar" => plain,
            "a.tgz" => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                std::io::Write::write_all(&mut gzip, &plain).unwrap();
                gzip.finish().unwrap()
            }
            _ => zstd::encode_all(&*plain, 1).unwrap(),
        };
        fs::write(folder.join(name), bytes).unwrap();
    }
    let open = |folder: &str| {
        let source = SourceSettings::Tar { shards: folder.into(), caption_key: "caption".into() };
        let out = root.path().join(format!("out-{folder}"));
        let summary = run(source, root.path(), &out);
        assert_eq!((summary.dataset.num_samples, summary.dataset.num_quarantined), (11, 1));
        assert!(quarantined(&out).keys().all(|key| key.ends_with("/0007")));
        // A packed set stands on its own: it can be moved, and its source removed.
        let moved = root.path().join(format!("moved-{folder}"));
        fs::rename(&out, &moved).unwrap();
        if folder != "plain" {
            assert!(moved.join(PACK_FILE).exists());
            fs::remove_dir_all(root.path().join(folder)).unwrap();
        }
        PreparedDataset::open(&moved).unwrap()
    };
    let plain = open("plain");
    for folder in ["zstd", "gzip"] {
        let packed = open(folder);
        for i in 0..plain.len() {
            let (a, b) = (plain.get(i).unwrap(), packed.get(i).unwrap());
            assert_eq!((a.text, a.image), (b.text, b.image));
        }
    }
}

#[test]
fn a_source_is_looked_through_as_it_would_be_prepared() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.tar");
    fs::write(&path, shard(0..12)).unwrap();
    let request = InspectRequest { source: path.to_string_lossy().into(), ..InspectRequest::default() };
    let settings = guess(&request).unwrap();
    let place = SourcePlace { seed: 0, project_root: root.path(), out_dir: root.path() };
    let source = sources::open(&settings, place).unwrap();
    let filters = filters();
    let mut looking = Looking { filters: &filters, limit: 0, num_samples: 4, num_threads: 2 };
    let (found, sheet) = inspect(&*source, settings.name(), &looking).unwrap();
    assert_eq!((found.num_seen, found.num_good, found.is_complete), (12, 11, true));
    let trouble = &found.broken["undecodable"];
    assert_eq!((trouble.count, trouble.examples[0].key.as_str()), (1, "a.tar/0007"));
    let width = found.width.unwrap();
    assert_eq!((width.min, width.median, width.max), (90, 95, 101));
    assert_eq!(found.characters.unwrap().max, 10);
    assert_eq!(found.aspects.iter().map(|range| range.count).sum::<u64>(), 11);
    assert_eq!(found.samples.len(), 4);
    let sheet = sheet.unwrap();
    assert_eq!(sheet.dimensions(), (4 * 164, 164));
    assert_eq!(sheet.get_pixel(80, 80).0, [200; 3]);
    let table = found.table(None);
    assert!(table.contains("undecodable: 1") && table.contains("11 (91.7 %)"), "{table}");
    looking.limit = 5;
    let (found, _) = inspect(&*source, settings.name(), &looking).unwrap();
    assert_eq!((found.num_seen, found.is_complete), (5, false));
}
