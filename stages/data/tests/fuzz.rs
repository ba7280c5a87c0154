//! Damaged input of every format, made by mutation: no panic, no endless loop, bounded memory (`make fuzz-data`).
//!
//! Each target starts from small valid files and changes them; a case that fails is written to the temporary folder and
//! named. `FUZZ_SECONDS` is the time of a target, 10 by default; `FUZZ_SEED` repeats a run.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use deepgen_contract::data::{FilterSettings, InspectRequest, SourceSettings};
use deepgen_data::decode::decode;
use deepgen_data::guess::guess;
use deepgen_data::inspect::{Looking, inspect};
use deepgen_data::sources::{self, SourcePlace};
use image::{ImageFormat, Rgb, RgbImage};

/// Longest time a case may take.
const CASE_LIMIT: Duration = Duration::from_secs(10);
/// Largest input that mutation makes, in bytes.
const MAX_INPUT: usize = 64 << 10;

/// Counts the bytes in use, and the most there were.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Numbers that look random (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 33) as usize % bound.max(1)
    }
}

/// Bytes that formats give a meaning to.
const TOKENS: [&[u8]; 14] = [
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0\0\0\0\0",
    b"77777777777",
    b"\x80\0\0\0\0\0\0\0\0\0\xff\xff",
    b"../../etc/passwd",
    b"ustar\0",
    b"{\"caption\":",
    b"[[[[[[[[[[[[[[[[",
    b"null",
    b"\\ud800",
    b"PAR1",
    b"IHDR",
    b"\xff\xd8\xff\xc4",
];

fn mutate(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len());
        match random.below(9) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = random.next() as u8,
            2 => bytes.truncate(at),
            3 => {
                let token = TOKENS[random.below(TOKENS.len())];
                let end = (at + token.len()).min(bytes.len());
                bytes.splice(at..end, token.iter().copied());
            }
            4 => {
                let token = TOKENS[random.below(TOKENS.len())];
                bytes.splice(at..at, token.iter().copied());
            }
            5 => {
                let end = (at + random.below(600)).min(bytes.len());
                bytes.drain(at..end);
            }
            6 => {
                let end = (at + random.below(1200)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, part);
            }
            7 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            // Headers are at the front.
            _ if !bytes.is_empty() => {
                let at = random.below(bytes.len().min(64));
                bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)];
            }
            _ => {}
        }
    }
    bytes.truncate(MAX_INPUT);
    bytes
}

/// One target at a time: the count of memory is the program's.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Feeds mutated seeds to `target` for the time given; a case may use `memory` bytes beyond what was in use before.
fn fuzz(name: &str, seeds: &[Vec<u8>], memory: usize, target: &dyn Fn(&[u8])) {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (seconds, seed) = (number("FUZZ_SECONDS", 10), number("FUZZ_SEED", 1));
    let failed = std::env::temp_dir().join(format!("deepgen-fuzz-{name}-{}", std::process::id()));
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let started = Instant::now();
    // The watch ends the program when a case hangs, since nothing else can.
    let (case_started, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut num_cases = 0u64;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(100));
                let now = started.elapsed().as_millis() as u64;
                if now.saturating_sub(case_started.load(Ordering::Relaxed)) > CASE_LIMIT.as_millis() as u64 {
                    eprintln!("{name}: a case takes longer than {CASE_LIMIT:?}: {}", failed.display());
                    std::process::abort();
                }
            }
        });
        while started.elapsed() < Duration::from_secs(seconds) {
            let bytes = if num_cases < seeds.len() as u64 {
                seeds[num_cases as usize].clone()
            } else {
                mutate(seeds, &mut random)
            };
            std::fs::write(&failed, &bytes).unwrap();
            let before = IN_USE.load(Ordering::Relaxed);
            PEAK.store(before, Ordering::Relaxed);
            case_started.store(started.elapsed().as_millis() as u64, Ordering::Relaxed);
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target(&bytes)));
            let used = PEAK.load(Ordering::Relaxed).saturating_sub(before);
            let wrong = match outcome {
                Err(_) => Some("a panic".to_owned()),
                Ok(()) if used > memory => Some(format!("{used} bytes of memory, more than {memory}")),
                Ok(()) => None,
            };
            if let Some(wrong) = wrong {
                is_over.store(true, Ordering::Relaxed);
                panic!("{name}, case {num_cases}: {wrong}: {}", failed.display());
            }
            num_cases += 1;
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let _ = std::fs::remove_file(&failed);
    println!("{name}: {num_cases} cases in {seconds} s");
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
#[ignore = "takes FUZZ_SECONDS; make fuzz-data"]
fn image_headers() {
    let seeds = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP].map(picture);
    // Four million pixels are free of questions, as 16-bit RGBA and as RGB, and some more when the file is not small.
    fuzz("image", &seeds, 1 << 30, &|bytes| drop(decode(bytes)));
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz-data"]
fn tar_shards() {
    let (_dir, path) = folder();
    let path = path.join("a.tar");
    fuzz("tar", &[shard()], 1 << 30, &|bytes| look(&path, bytes, None));
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz-data"]
fn compressed_shards() {
    let (_dir, folder) = folder();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&shard()).unwrap();
    let (gz, zst) = (folder.join("a.tar.gz"), folder.join("a.tar.zst"));
    // The content inside is mutated, too, or a checksum would guard it.
    let target = |bytes: &[u8]| match bytes.first() {
        Some(0x1f) => look(&gz, bytes, None),
        Some(0x28) => look(&zst, bytes, None),
        _ => look(&zst, &zstd::encode_all(bytes, 1).unwrap(), None),
    };
    let seeds = [gzip.finish().unwrap(), zstd::encode_all(&*shard(), 1).unwrap(), shard()];
    fuzz("compressed", &seeds, 1 << 30, &target);
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz-data"]
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
    let target = |bytes: &[u8]| {
        look(&json, bytes, None);
        look(&jsonl, bytes, None);
    };
    fuzz("json", &seeds, 64 << 20, &target);
}

#[test]
#[ignore = "takes FUZZ_SECONDS; make fuzz-data"]
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
    fuzz("parquet", &seeds, 3 << 30, &|bytes| look(&path, bytes, Some(&settings)));
    let _ = std::panic::take_hook();
}
