//! Sources on disk, in the formats that the readers of real data read (docs/spec/data.md section 2).
//!
//! The same settings and seed give the same bytes: nothing is timed, numbered by chance or ordered by a file system.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use deepgen_contract::shapes::{PromptKind, Scene, ShapesSource, SourceFormat};
use serde_json::{Value, json};

use super::caption::{Captioned, caption};
use super::draw::Draw;
use super::edit::{Edit, edit};
use super::prompt::{Prompt, ShapesError, Split};
use super::question::{Question, question};
use super::render::png;
use crate::atomic;

/// Samples of a shard.
const SHARD_SAMPLES: usize = 1000;
/// Prompts in a row that are not new, after which a prompt set is taken to hold all there are.
const STALE_PROMPTS: usize = 2000;
/// Name of a list of records.
const LIST: &str = "data.json";
/// Folder of the images of a list.
const IMAGES: &str = "images";
/// Folder of the caption files of a list.
const CAPTIONS: &str = "captions";

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenSource {
    /// How it lies on disk.
    pub format: SourceFormat,
    /// The list of records, the text file of prompts, or the folder of shards.
    pub index: PathBuf,
    /// Folder that image paths are relative to.
    pub image_root: PathBuf,
    /// Folder that annotation paths are relative to; that of the images unless the format has one of its own.
    pub annotation_root: PathBuf,
    /// Samples, or prompts.
    pub num_samples: usize,
}

/// Makes a source below `dir`, which is created.
///
/// # Errors
/// When the settings contradict each other, the world has no such prompts, or a file cannot be written.
pub fn write_source(settings: &ShapesSource, seed: u64, dir: &Path) -> Result<WrittenSource, ShapesError> {
    settings.validate().map_err(ShapesError::Settings)?;
    let writer = Writer { settings, seed, dir, weights: settings.weights.among(settings.kind.kinds()) };
    writer.make_dir("")?;
    match settings.format {
        SourceFormat::Tar => writer.shards(),
        SourceFormat::CaptionList => writer.caption_list(),
        SourceFormat::Blip3o => writer.blip3o_list(),
        SourceFormat::EditList => writer.edit_list(),
        SourceFormat::QaList => writer.question_list(),
        SourceFormat::Prompts => writer.prompts(),
    }
}

struct Writer<'a> {
    settings: &'a ShapesSource,
    seed: u64,
    dir: &'a Path,
    weights: Vec<(PromptKind, f64)>,
}

impl Writer<'_> {
    /// Returns the choices and the kind of sample `index`.
    fn draw(&self, index: usize) -> (Draw, PromptKind) {
        let mut draw = Draw::new(self.seed, &format!("shapes/{:?}", self.settings.kind), index as u64);
        let kind = draw.weighted(&self.weights);
        (draw, kind)
    }

    fn caption(&self, index: usize) -> Result<Captioned, ShapesError> {
        let (mut draw, kind) = self.draw(index);
        caption(&self.settings.world, kind, Split::Train, &mut draw)
    }

    fn shards(&self) -> Result<WrittenSource, ShapesError> {
        let num_shards = self.settings.count.div_ceil(SHARD_SAMPLES);
        for shard in 0..num_shards {
            let mut archive = tar::Builder::new(Vec::new());
            let first = shard * SHARD_SAMPLES;
            let path = self.dir.join(format!("{shard:05}.tar"));
            let io = |source| ShapesError::Io { path: path.clone(), source };
            for index in first..self.settings.count.min(first + SHARD_SAMPLES) {
                let Captioned { scene, prompt } = self.caption(index)?;
                let note = serde_json::to_vec(&json!({ "caption": prompt.text }))?;
                append(&mut archive, &format!("{index:08}.png"), &png(&scene, &self.settings.world)?).map_err(io)?;
                append(&mut archive, &format!("{index:08}.json"), &note).map_err(io)?;
            }
            let bytes = archive.into_inner().map_err(io)?;
            atomic::write(&path, &bytes).map_err(io)?;
        }
        Ok(self.written(self.dir.to_owned(), "", ""))
    }

    fn caption_list(&self) -> Result<WrittenSource, ShapesError> {
        self.make_dir(CAPTIONS)?;
        let record = |index| {
            let Captioned { scene, prompt } = self.caption(index)?;
            let annotation = format!("{index:08}.json");
            let note = serde_json::to_vec(&json!({ "caption": prompt.text }))?;
            self.write(&format!("{CAPTIONS}/{annotation}"), &note)?;
            Ok(json!({ "image": self.image(&format!("{index:08}"), &scene)?, "annotation": annotation }))
        };
        self.list(record, CAPTIONS)
    }

    fn blip3o_list(&self) -> Result<WrittenSource, ShapesError> {
        let record = |index| {
            let Captioned { scene, prompt } = self.caption(index)?;
            let path = self.image(&format!("{index:08}"), &scene)?;
            Ok(json!({ "type": "T2I_SFT", "txt": prompt.text, "image": "", "image_path": path }))
        };
        self.list(record, IMAGES)
    }

    fn edit_list(&self) -> Result<WrittenSource, ShapesError> {
        let record = |index| {
            let (mut draw, kind) = self.draw(index);
            let Edit { source, target, prompt } = edit(&self.settings.world, kind, Split::Train, &mut draw)?;
            let input = self.image(&format!("{index:08}_input"), &source)?;
            let output = self.image(&format!("{index:08}_output"), &target)?;
            Ok(json!({ "input_image": [input], "output_image": output, "instruction": prompt.text }))
        };
        self.list(record, IMAGES)
    }

    fn question_list(&self) -> Result<WrittenSource, ShapesError> {
        let record = |index| {
            let (mut draw, kind) = self.draw(index);
            let Question { scene, question, answer, .. } = question(&self.settings.world, kind, &mut draw)?;
            let image = self.image(&format!("{index:08}"), &scene)?;
            Ok(json!({ "image": image, "question": question, "answer": answer }))
        };
        self.list(record, IMAGES)
    }

    fn prompts(&self) -> Result<WrittenSource, ShapesError> {
        let mut seen = BTreeSet::new();
        let (mut text, mut lines, mut answers) = (Vec::new(), Vec::new(), Vec::new());
        let mut stale = 0;
        for index in 0.. {
            if seen.len() == self.settings.count || stale == STALE_PROMPTS {
                break;
            }
            let Prompt { kind, text: prompt, expectation } = self.caption(index)?.prompt;
            stale += 1;
            if !seen.insert(prompt.clone()) {
                continue;
            }
            stale = 0;
            writeln!(text, "{prompt}").expect("memory takes any bytes");
            push_line(&mut lines, &json!({ "prompt": prompt }))?;
            push_line(&mut answers, &json!({ "prompt": prompt, "kind": kind, "expectation": expectation }))?;
        }
        self.write("answers.jsonl", &answers)?;
        self.write("prompts.jsonl", &lines)?;
        self.write("prompts.txt", &text)?;
        Ok(WrittenSource { num_samples: seen.len(), ..self.written(self.dir.join("prompts.txt"), "", "") })
    }

    /// Writes the images and the list of their records, one record a line.
    fn list(
        &self,
        record: impl Fn(usize) -> Result<Value, ShapesError>,
        annotation_root: &str,
    ) -> Result<WrittenSource, ShapesError> {
        self.make_dir(IMAGES)?;
        let mut list = Vec::new();
        for index in 0..self.settings.count {
            list.extend_from_slice(if index == 0 { b"[\n" } else { b",\n" });
            serde_json::to_writer(&mut list, &record(index)?)?;
        }
        list.extend_from_slice(b"\n]\n");
        self.write(LIST, &list)?;
        Ok(self.written(self.dir.join(LIST), IMAGES, annotation_root))
    }

    fn written(&self, index: PathBuf, image_root: &str, annotation_root: &str) -> WrittenSource {
        WrittenSource {
            format: self.settings.format,
            index,
            image_root: self.path(image_root),
            annotation_root: self.path(annotation_root),
            num_samples: self.settings.count,
        }
    }

    /// Writes an image and returns its path below the image folder.
    fn image(&self, stem: &str, scene: &Scene) -> Result<String, ShapesError> {
        let name = format!("{stem}.png");
        // Thousands of small files are not synced one by one: the list that makes them count is, and comes last.
        let path = self.dir.join(IMAGES).join(&name);
        std::fs::write(&path, png(scene, &self.settings.world)?).map_err(|source| ShapesError::Io { path, source })?;
        Ok(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), ShapesError> {
        let path = self.dir.join(name);
        // Caption files come by the thousand as well.
        let is_one_of_many = name.contains('/');
        let done = if is_one_of_many { std::fs::write(&path, bytes) } else { atomic::write(&path, bytes) };
        done.map_err(|source| ShapesError::Io { path, source })
    }

    fn make_dir(&self, name: &str) -> Result<(), ShapesError> {
        let path = self.path(name);
        std::fs::create_dir_all(&path).map_err(|source| ShapesError::Io { path, source })
    }

    fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.dir.to_owned() } else { self.dir.join(name) }
    }
}

fn push_line(lines: &mut Vec<u8>, value: &Value) -> Result<(), ShapesError> {
    serde_json::to_writer(&mut *lines, value)?;
    lines.push(b'\n');
    Ok(())
}

/// Appends a file without owner or time, so that equal samples give equal shards.
fn append(archive: &mut tar::Builder<Vec<u8>>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    archive.append_data(&mut header, name, bytes)
}

#[cfg(test)]
mod tests {
    use super::super::parse::expectation_of;
    use super::*;
    use deepgen_contract::shapes::{Expectation, KindWeights, ShapesWorld, SourceKind};
    use std::collections::BTreeMap;

    fn settings(kind: SourceKind, format: SourceFormat, count: usize) -> ShapesSource {
        ShapesSource { kind, format, count, world: ShapesWorld::default(), weights: KindWeights::default() }
    }

    fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => found.extend(files(&path).into_iter().map(|(name, bytes)| (path.join(name), bytes))),
                false => drop(found.insert(path.clone(), std::fs::read(&path).unwrap())),
            }
        }
        found.into_iter().map(|(path, bytes)| (path.strip_prefix(dir).unwrap().to_owned(), bytes)).collect()
    }

    fn list(written: &WrittenSource) -> Vec<Value> {
        serde_json::from_slice(&std::fs::read(&written.index).unwrap()).unwrap()
    }

    #[test]
    fn every_source_is_written_twice_to_the_same_bytes() {
        for kind in [
            SourceKind::Captions,
            SourceKind::Text,
            SourceKind::Edits,
            SourceKind::UnireasonT2i,
            SourceKind::UnireasonEdits,
            SourceKind::Qa,
            SourceKind::RlGeneral,
            SourceKind::RlText,
        ] {
            for &format in kind.formats() {
                let write = |seed| {
                    let dir = tempfile::tempdir().unwrap();
                    let written = write_source(&settings(kind, format, 12), seed, dir.path()).unwrap();
                    assert_eq!(written.num_samples, 12);
                    files(dir.path())
                };
                let first = write(1);
                assert!(first.keys().all(|name| !name.to_string_lossy().ends_with(".partial")));
                assert!(first == write(1), "{kind:?} {format:?}");
                assert!(first != write(2), "{kind:?} {format:?}");
            }
        }
    }

    #[test]
    fn lists_have_the_documented_fields() {
        let dir = tempfile::tempdir().unwrap();
        let make =
            |name: &str, kind, format| write_source(&settings(kind, format, 5), 3, &dir.path().join(name)).unwrap();
        let size = |written: &WrittenSource, path: &Value| {
            image::image_dimensions(written.image_root.join(path.as_str().unwrap())).unwrap()
        };

        let written = make("captions", SourceKind::Captions, SourceFormat::CaptionList);
        for record in list(&written) {
            assert_eq!(size(&written, &record["image"]), (32, 32));
            let path = written.annotation_root.join(record["annotation"].as_str().unwrap());
            let note: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            assert!(expectation_of(note["caption"].as_str().unwrap(), &ShapesWorld::default()).is_some());
        }
        let written = make("blip3o", SourceKind::Text, SourceFormat::Blip3o);
        for record in list(&written) {
            assert_eq!((record["type"].as_str(), record["image"].as_str()), (Some("T2I_SFT"), Some("")));
            assert!(record["txt"].as_str().unwrap().starts_with("the word \""));
            assert_eq!(size(&written, &record["image_path"]), (32, 32));
        }
        let written = make("edits", SourceKind::Edits, SourceFormat::EditList);
        for record in list(&written) {
            assert_eq!(record["input_image"].as_array().unwrap().len(), 1);
            assert_eq!(size(&written, &record["input_image"][0]), size(&written, &record["output_image"]));
            assert!(expectation_of(record["instruction"].as_str().unwrap(), &ShapesWorld::default()).is_some());
        }
        let written = make("qa", SourceKind::Qa, SourceFormat::QaList);
        for record in list(&written) {
            assert_eq!(size(&written, &record["image"]), (32, 32));
            assert!(record["question"].as_str().unwrap().ends_with('?'));
            assert!(!record["answer"].as_str().unwrap().is_empty());
        }
    }

    #[test]
    fn shards_pair_an_image_with_its_caption() {
        let dir = tempfile::tempdir().unwrap();
        let source = settings(SourceKind::Captions, SourceFormat::Tar, SHARD_SAMPLES + 2);
        let written = write_source(&source, 4, dir.path()).unwrap();
        assert_eq!(written.index, dir.path());
        let mut archive = tar::Archive::new(std::fs::File::open(dir.path().join("00001.tar")).unwrap());
        let mut names = Vec::new();
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 0);
            names.push(entry.path().unwrap().to_string_lossy().into_owned());
        }
        assert_eq!(names, ["00001000.png", "00001000.json", "00001001.png", "00001001.json"]);
    }

    #[test]
    fn prompt_sets_are_distinct_and_end_when_there_are_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let written =
            write_source(&settings(SourceKind::RlText, SourceFormat::Prompts, 100_000), 5, dir.path()).unwrap();
        let text = std::fs::read_to_string(&written.index).unwrap();
        let prompts: BTreeSet<&str> = text.lines().collect();
        assert_eq!(prompts.len(), written.num_samples);
        // 8 words alone, 16 with a place, and four fifths of 256 with an object.
        assert!((180..=280).contains(&written.num_samples), "{}", written.num_samples);
        assert!(prompts.iter().all(|prompt| prompt.contains('"')));
        let answers = std::fs::read_to_string(dir.path().join("answers.jsonl")).unwrap();
        for (line, prompt) in answers.lines().zip(text.lines()) {
            let answer: Value = serde_json::from_str(line).unwrap();
            assert_eq!(answer["prompt"], prompt);
            let key: Expectation = serde_json::from_value(answer["expectation"].clone()).unwrap();
            assert_eq!(Some(key), expectation_of(prompt, &ShapesWorld::default()));
        }
    }

    #[test]
    fn weights_choose_the_kinds() {
        let dir = tempfile::tempdir().unwrap();
        let mut source = settings(SourceKind::Captions, SourceFormat::Blip3o, 20);
        source.weights.0 = [(PromptKind::Single, 1.0), (PromptKind::Add, 9.0)].into();
        let written = write_source(&source, 6, dir.path()).unwrap();
        assert!(list(&written).iter().all(|record| record["txt"].as_str().unwrap().split(' ').count() == 2));
        source.weights.0 = [(PromptKind::Add, 9.0)].into();
        assert!(matches!(write_source(&source, 6, dir.path()), Err(ShapesError::Settings(_))));
    }
}
