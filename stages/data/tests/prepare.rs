//! Folders with broken records become data sets that hold exactly the good ones, with a reason for each of the others.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use deepgen_contract::data::{FilterSettings, PrepareSettings, SourceSettings};
use deepgen_contract::shapes::ShapesSource;
use deepgen_data::dataset::{DATASET_FILE, PreparedDataset, QUARANTINE_FILE};
use deepgen_data::prepare::{PrepareError, PreparePlace, PreparedSummary, prepare};
use deepgen_data::sample::SetKind;
use deepgen_data::source::{Broken, DataSource};
use image::{Rgb, RgbImage};
use serde_json::json;

fn settings(source: SourceSettings) -> PrepareSettings {
    let filters = FilterSettings { min_side: 80, min_aspect: 0.1, max_aspect: 10.0 };
    PrepareSettings { source, nominal_size: 0, filters, dedupe: true }
}

fn run(settings: &PrepareSettings, root: &Path, out: &Path) -> Result<PreparedSummary, PrepareError> {
    let place = PreparePlace { seed: 1, project_root: root, out_dir: out, num_threads: 2 };
    prepare(settings, &place, &mut |_| true)
}

fn picture(path: &Path, width: u32, height: u32, red: u8) {
    RgbImage::from_pixel(width, height, Rgb([red, 2, 3])).save(path).unwrap();
}

fn reasons(out: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(out.join(QUARANTINE_FILE)).unwrap();
    let broken = text.lines().map(|line| serde_json::from_str::<Broken>(line).unwrap());
    broken.map(|broken| (broken.key, broken.reason)).collect()
}

#[test]
fn exactly_the_good_records_are_kept_and_each_other_has_its_reason() {
    let root = tempfile::tempdir().unwrap();
    let images = root.path().join("images");
    fs::create_dir(&images).unwrap();
    picture(&images.join("good.png"), 90, 90, 1);
    picture(&images.join("good.jpg"), 100, 90, 2);
    picture(&images.join("at_limit.png"), 80, 90, 3);
    picture(&images.join("over_limit.png"), 81, 81, 4);
    picture(&images.join("ratio.png"), 810, 81, 5);
    picture(&images.join("whole.png"), 90, 90, 6);
    picture(&root.path().join("outside.png"), 90, 90, 7);
    let whole = fs::read(images.join("whole.png")).unwrap();
    fs::write(images.join("cut.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(images.join("empty.png"), []).unwrap();
    fs::write(images.join("text.png"), "no image").unwrap();
    fs::create_dir(images.join("folder.png")).unwrap();
    let captions = root.path().join("captions");
    fs::create_dir(&captions).unwrap();
    fs::write(captions.join("a.json"), r#"{"caption": "a picture"}"#).unwrap();
    fs::write(captions.join("null.json"), r#"{"caption": null}"#).unwrap();
    fs::write(captions.join("blank.json"), r#"{"caption": "  "}"#).unwrap();
    fs::write(captions.join("cut.json"), r#"{"caption": "#).unwrap();
    let cases = [
        ("good.png", "a.json", None),
        ("good.jpg", "a.json", None),
        ("over_limit.png", "a.json", None),
        ("at_limit.png", "a.json", Some("both sides must exceed 80")),
        ("ratio.png", "a.json", Some("width over height must lie between")),
        ("cut.png", "a.json", Some("cannot be decoded")),
        ("empty.png", "a.json", Some("the image file is empty")),
        ("text.png", "a.json", Some("cannot be decoded")),
        ("folder.png", "a.json", Some("folder.png")),
        ("missing.png", "a.json", Some("No such file")),
        ("../outside.png", "a.json", Some("climbs out")),
        ("/etc/passwd", "a.json", Some("lies outside")),
        ("good.png", "../a.json", Some("climbs out")),
        ("good.png", "missing.json", Some("No such file")),
        ("good.png", "null.json", Some("`caption` is null")),
        ("good.png", "blank.json", Some("its text is empty")),
        ("good.png", "cut.json", Some("caption file")),
        ("good.png", "a.json", Some("equal those of an earlier record")),
    ];
    let mut records: Vec<_> =
        cases.iter().map(|(image, annotation, _)| json!({"image": image, "annotation": annotation})).collect();
    records.push(json!({"annotation": "a.json"}));
    records.push(json!(7));
    let index = root.path().join("index");
    fs::create_dir(&index).unwrap();
    fs::write(index.join("1.json"), serde_json::to_vec(&records).unwrap()).unwrap();
    fs::write(index.join("2.json"), r#"[{"image": "whole.png", "annotation": "a.json"}, {"image": "#).unwrap();
    let out = root.path().join("out");
    let source = SourceSettings::CaptionList {
        index: "index".into(),
        images: "images".into(),
        captions: "captions".into(),
        caption_key: "caption".into(),
    };
    let summary = run(&settings(source), root.path(), &out).unwrap();

    let found = reasons(&out);
    let mut num_bad = 0;
    for (i, (image, annotation, expected)) in cases.iter().enumerate() {
        let reason = found.get(&format!("1.json#{i}"));
        match expected {
            None => assert!(reason.is_none(), "{image}, {annotation}: {reason:?}"),
            Some(expected) => {
                num_bad += 1;
                assert!(reason.unwrap().contains(expected), "{image}, {annotation}: {reason:?}");
            }
        }
    }
    assert!(found["1.json#18"].contains("`image` is missing"));
    assert!(found["1.json#19"].contains("a number"));
    assert!(found["2.json#1"].contains("not a JSON array"));
    assert_eq!(found.len(), num_bad + 3);

    let dataset = PreparedDataset::open(&out).unwrap();
    let keys: Vec<_> = (0..dataset.len()).map(|i| dataset.get(i).unwrap().key).collect();
    assert_eq!(keys, ["1.json#0", "1.json#1", "1.json#2", "2.json#0"]);
    assert_eq!(dataset.get(3).unwrap().image.get_pixel(0, 0).0[0], 6);
    assert!(dataset.get(4).is_err());
    assert_eq!((summary.dataset.num_quarantined, summary.dataset.num_duplicates), (num_bad as u64 + 2, 1));
}

#[test]
fn a_source_without_a_good_record_is_an_error_with_a_reason() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("a.json"), r#"[{"txt": "a", "image_path": "none.png"}]"#).unwrap();
    let source = SourceSettings::Blip3o { index: "a.json".into(), images: ".".into() };
    let error = run(&settings(source), root.path(), &root.path().join("out")).expect_err("no image").to_string();
    assert!(error.contains("none of 1 records") && error.contains("none.png"), "{error}");
    assert!(!root.path().join("out").join(DATASET_FILE).exists());
}

#[test]
fn a_file_that_changes_after_preparation_is_named_when_it_is_read() {
    let root = tempfile::tempdir().unwrap();
    picture(&root.path().join("a.png"), 20, 20, 1);
    picture(&root.path().join("b.png"), 20, 30, 2);
    let record = json!([{"input_image": ["a.png"], "output_image": "b.png", "instruction": "change it"}]);
    fs::write(root.path().join("a.json"), record.to_string()).unwrap();
    let source = SourceSettings::EditList { index: "a.json".into(), images: ".".into(), max_references: 1 };
    let out = root.path().join("out");
    run(&settings(source), root.path(), &out).unwrap();
    let dataset = PreparedDataset::open(&out).unwrap();
    assert_eq!(dataset.kind(), SetKind::Edit);
    let sample = dataset.get(0).unwrap();
    assert_eq!((sample.references[0].dimensions(), sample.image.dimensions()), ((20, 20), (20, 30)));
    fs::write(root.path().join("a.png"), "broken").unwrap();
    let error = dataset.get(0).expect_err("no image any more").to_string();
    assert!(error.contains("a.png") && error.contains("a.json#0"), "{error}");
}

#[test]
fn a_damaged_index_is_found_when_it_is_opened() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("p.txt"), "one\ntwo\n\ntwo\n").unwrap();
    let out = root.path().join("out");
    let summary = run(&settings(SourceSettings::Prompts { path: "p.txt".into() }), root.path(), &out).unwrap();
    assert_eq!((summary.dataset.num_samples, summary.dataset.num_duplicates), (2, 1));
    let texts: Vec<_> = PreparedDataset::open(&out).unwrap().texts().map(Result::unwrap).collect();
    assert_eq!(texts, ["one", "two"]);
    assert!(PreparedDataset::open(&out).unwrap().get(0).is_err());
    let index = fs::read(out.join("index.jsonl")).unwrap();
    fs::write(out.join("index.jsonl"), &index[..index.len() - 1]).unwrap();
    assert!(PreparedDataset::open(&out).unwrap_err().to_string().contains("prepare the set again"));
}

#[test]
fn every_source_of_the_shapes_world_is_read_back_and_can_be_moved() {
    for (kind, format, expected) in [
        ("captions", "tar", SetKind::Generation),
        ("captions", "caption_list", SetKind::Generation),
        ("text", "blip3o", SetKind::Generation),
        ("edits", "edit_list", SetKind::Edit),
        ("unireason_edits", "edit_list", SetKind::Edit),
        ("qa", "qa_list", SetKind::Questions),
        ("rl_text", "prompts", SetKind::Prompts),
    ] {
        let root = tempfile::tempdir().unwrap();
        let shapes: ShapesSource =
            serde_json::from_value(json!({"kind": kind, "format": format, "count": 12})).unwrap();
        let mut settings = settings(SourceSettings::Shapes { shapes });
        settings.filters.min_side = 0;
        settings.dedupe = false;
        let summary = run(&settings, root.path(), &root.path().join("out")).unwrap();
        assert_eq!(summary.dataset.num_quarantined, 0, "{kind}: {:?}", summary.examples);
        fs::rename(root.path().join("out"), root.path().join("moved")).unwrap();
        let dataset = PreparedDataset::open(&root.path().join("moved")).unwrap();
        assert_eq!((dataset.kind(), dataset.len()), (expected, summary.dataset.num_samples));
        assert!((1..=12).contains(&dataset.len()));
        match expected {
            SetKind::Generation => assert_eq!(dataset.get(3).unwrap().image.dimensions(), (32, 32)),
            SetKind::Edit => assert_eq!(dataset.get(3).unwrap().references.len(), 1),
            SetKind::Questions => assert!(!dataset.question(3).unwrap().answer.is_empty()),
            SetKind::Prompts => assert!(dataset.record(0).unwrap().text.contains('"')),
        }
    }
}
