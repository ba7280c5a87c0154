//! `deepgen data inspect` with the real worker, on every kind of source: made by hand, and of the shapes world.
//!
//! Ignored by default, as `e2e` is, and run with it by `make test-e2e`.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use image::{ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};

fn bin() -> PathBuf {
    std::env::var("DEEPGEN_E2E_BIN").expect("run this through `make test-e2e`").into()
}

fn inspect(source: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(bin().join("deepgen"));
    command.args(["data", "inspect"]).arg(source).args(arguments).stdin(Stdio::null());
    command.output().expect("deepgen starts")
}

/// Returns what was found, as JSON, and checks that the contact sheet has a picture for each sample.
fn found(source: &Path, arguments: &[&str]) -> Value {
    let sheet = tempfile::Builder::new().suffix(".png").tempfile().unwrap();
    let path = sheet.path().to_str().unwrap();
    let output = inspect(source, &[&["--json", "--sheet", path], arguments].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", source.display());
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let num_samples = found["samples"].as_array().unwrap().len() as u32;
    if found["width"].is_null() {
        assert!(said.contains("there is no contact sheet"), "{said}");
    } else {
        let sheet = image::open(path).expect("a contact sheet").to_rgb8();
        // Six pictures a row, 160 pixels each with a margin of two.
        assert_eq!(sheet.dimensions(), (num_samples.min(6) * 164, num_samples.div_ceil(6) * 164));
        for sample in 0..num_samples {
            let (x, y) = (sample % 6 * 164 + 82, sample / 6 * 164 + 82);
            assert_ne!(sheet.get_pixel(x, y).0, [40; 3], "sample {sample} is empty");
        }
    }
    found
}

fn counts(found: &Value) -> (&str, &str, u64, u64) {
    let text = |key: &str| found[key].as_str().unwrap();
    (text("format"), text("kind"), found["num_seen"].as_u64().unwrap(), found["num_good"].as_u64().unwrap())
}

fn picture(number: u32, format: ImageFormat) -> Vec<u8> {
    let image = RgbImage::from_fn(120, 90, |x, y| Rgb([x as u8, y as u8, number as u8 * 20 + 60]));
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// Seven pictures and what is said of them, in every format that is read.
fn write_all(dir: &Path) {
    let images = dir.join("images");
    fs::create_dir_all(&images).unwrap();
    fs::create_dir_all(dir.join("captions")).unwrap();
    let mut shard = tar::Builder::new(Vec::new());
    let mut add = |name: String, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        shard.append_data(&mut header, name, bytes).unwrap();
    };
    let (mut captions, mut blip, mut edits, mut questions) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut lines, mut prompts) = (String::new(), String::new());
    for number in 0..7 {
        let (name, text) = (format!("{number}.jpg"), format!("picture {number}"));
        let jpeg = picture(number, ImageFormat::Jpeg);
        fs::write(images.join(&name), &jpeg).unwrap();
        fs::write(dir.join(format!("captions/{number}.json")), json!({"caption": text}).to_string()).unwrap();
        captions.push(json!({"image": name, "annotation": format!("{number}.json")}));
        blip.push(json!({"txt": text, "image_path": name, "type": "T2I_SFT", "image": ""}));
        edits.push(json!({"input_image": [name], "output_image": name, "instruction": text}));
        questions.push(json!({"image": name, "question": text, "answer": "yes"}));
        lines.push_str(&format!("{}\n", json!({"file_name": name, "text": text})));
        prompts.push_str(&format!("{text}\n"));
        add(format!("{number}.jpg"), &jpeg);
        add(format!("{number}.json"), json!({"caption": text}).to_string().as_bytes());
    }
    // One more, which is broken.
    captions.push(json!({"image": "none.jpg", "annotation": "0.json"}));
    for (name, list) in
        [("captions.json", captions), ("blip.json", blip), ("edits.json", edits), ("qa.json", questions)]
    {
        fs::write(dir.join(name), Value::from(list).to_string()).unwrap();
    }
    fs::write(images.join("metadata.jsonl"), lines).unwrap();
    fs::write(dir.join("prompts.txt"), &prompts).unwrap();
    fs::create_dir_all(dir.join("prompts")).unwrap();
    let prompts: String = prompts.lines().map(|line| format!("{}\n", json!({"prompt": line}))).collect();
    fs::write(dir.join("prompts/prompts.jsonl"), prompts).unwrap();
    let shard = shard.into_inner().unwrap();
    fs::create_dir_all(dir.join("shards")).unwrap();
    fs::write(dir.join("shards/a-0.tar"), &shard).unwrap();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&shard).unwrap();
    fs::write(dir.join("shards/a-1.tar.gz"), packed.finish().unwrap()).unwrap();
}

#[test]
#[ignore = "needs release builds: make test-e2e"]
fn every_kind_of_source_is_told_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    write_all(dir.path());
    let at = |path: &str| dir.path().join(path);
    let (images, captions) = (at("images"), at("captions"));
    let (images, captions) = (images.to_str().unwrap(), captions.to_str().unwrap());
    let beside: &[&str] = &["--images", images];
    type Case<'a> = (&'a str, &'a [&'a str], (&'a str, &'a str, u64, u64));
    let cases: [Case<'_>; 11] = [
        ("captions.json", &["--images", images, "--captions", captions], ("caption_list", "generation", 8, 7)),
        ("blip.json", beside, ("blip3o", "generation", 7, 7)),
        ("edits.json", beside, ("edit_list", "edit", 7, 7)),
        ("qa.json", beside, ("qa_list", "questions", 7, 7)),
        ("images", &[], ("json_lines", "generation", 7, 7)),
        ("images/metadata.jsonl", &[], ("json_lines", "generation", 7, 7)),
        ("shards/a-0.tar", &[], ("tar", "generation", 7, 7)),
        ("shards", &[], ("tar", "generation", 14, 14)),
        ("shards/*.tar.gz", &[], ("tar", "generation", 7, 7)),
        ("prompts.txt", &[], ("prompts", "prompts", 7, 7)),
        ("prompts", &[], ("prompts", "prompts", 7, 7)),
    ];
    for (path, arguments, expected) in cases {
        let found = found(&at(path), arguments);
        assert_eq!(counts(&found), expected, "{path}");
        assert_eq!(found["words"]["median"], 2, "{path}");
        if expected.1 != "prompts" {
            assert_eq!((&found["width"]["min"], &found["height"]["max"]), (&json!(120), &json!(90)), "{path}");
        }
    }
    let broken = found(&at("captions.json"), cases[0].1);
    assert_eq!(broken["broken"]["missing"]["count"], 1);
    assert_eq!(found(&at("shards"), &[])["num_duplicates"], 7, "the packed shard holds the same");
    // The first ones only, and a table for people.
    let part = found(&at("shards"), &["--limit", "3", "--samples", "2"]);
    assert_eq!((part["num_seen"].as_u64(), part["is_complete"].as_bool()), (Some(3), Some(false)));
    let table = String::from_utf8(inspect(&at("blip.json"), beside).stdout).unwrap();
    for line in ["format      blip3o, generation", "records     7", "picture 3", "1.01-1.50 100.0 %"] {
        assert!(table.contains(line), "no `{line}` in\n{table}");
    }
}

#[test]
#[ignore = "needs release builds: make test-e2e"]
fn a_parquet_file_of_another_writer_is_read() {
    let fixture = Path::new("stages/data/tests/fixtures/parquet/images.parquet");
    let found = found(fixture, &["--min-side", "8"]);
    assert_eq!(counts(&found), ("parquet", "generation", 5, 5));
    assert_eq!(found["samples"].as_array().unwrap().len(), 5);
}

#[test]
#[ignore = "needs release builds: make test-e2e"]
fn what_cannot_be_read_is_said_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.csv"), "x").unwrap();
    fs::write(dir.path().join("b.json"), r#"[{"x":1}]"#).unwrap();
    fs::write(dir.path().join("c.txt"), "a prompt\n").unwrap();
    let says = |name: &str, arguments: &[&str], text: &str| {
        let output = inspect(&dir.path().join(name), arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains(text), "{name}: {said}");
    };
    says("a.csv", &[], "cannot tell what this is");
    says("b.json", &[], "none of the keys x");
    says("none.tar", &[], "No such file");
    says("c.txt", &["--sheet", "/no/such/folder/a.png"], "is not there");
}

#[test]
#[ignore = "needs release builds: make test-e2e"]
fn the_shapes_world_is_inspected_before_and_after_it_is_prepared() {
    let dir = tempfile::tempdir().unwrap();
    let formats = [("captions", "tar"), ("captions", "caption_list"), ("captions", "blip3o"), ("edits", "edit_list")];
    let mut pipeline = String::from("[pipeline]\nname = \"sources\"\nprofile = \"tiny\"\n");
    for (kind, format) in formats.into_iter().chain([("rl_general", "prompts")]) {
        pipeline.push_str(&format!(
            "\n[node.{format}]\nstage = \"prepare\"\nset = {{ source = {{ kind = \"shapes\", shapes = {{ kind = \
             \"{kind}\", format = \"{format}\", count = 20 }} }} }}\n"
        ));
    }
    fs::create_dir(dir.path().join("pipelines")).unwrap();
    fs::write(dir.path().join("pipelines/sources.toml"), pipeline).unwrap();
    let mut run = Command::new(bin().join("deepgen"));
    let output = run.args(["run", "pipelines/sources.toml"]).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut num_seen = 0;
    for entry in fs::read_dir(dir.path().join("artifacts/store")).unwrap() {
        let folder = entry.unwrap().path();
        let manifest: Value = serde_json::from_slice(&fs::read(folder.join("manifest.json")).unwrap()).unwrap();
        let format = manifest["node"].as_str().unwrap();
        let small: &[&str] = &["--min-side", "8"];
        let prepared = found(&folder, small);
        assert_eq!(counts(&prepared).2, 20, "{format}");
        let source = folder.join("source");
        let (images, captions) = (source.join("images"), source.join("captions"));
        let (images, captions) = (images.to_str().unwrap(), captions.to_str().unwrap());
        let (source, arguments): (PathBuf, Vec<&str>) = match format {
            "tar" => (source, Vec::new()),
            "prompts" => (source.join("prompts.txt"), Vec::new()),
            "caption_list" => (source.join("data.json"), vec!["--images", images, "--captions", captions]),
            _ => (source.join("data.json"), vec!["--images", images]),
        };
        let before = found(&source, &[small, &arguments[..]].concat());
        assert_eq!(counts(&before), (format, counts(&prepared).1, 20, 20), "{format}");
        assert_eq!(before["words"], prepared["words"], "{format}");
        num_seen += 1;
    }
    assert_eq!(num_seen, 5);
}
