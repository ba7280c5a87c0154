//! Chooses the images that a report shows: the same prompts for every checkpoint, spread over the tags.
//!
//! The choice depends on the prompts alone, never on how well they were drawn. Knows files, not markup.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use deepgen_contract::eval::{ANSWERS_FILE, BenchmarkItems, IMAGES_FILE, ImageRecord};
use deepgen_contract::settings::Settings;
use serde_json::Value;

use super::data::{
    Mark, NodeReport, Picture, SampleCell, SampleColumn, SampleGrid, SampleRow, checkpoint_label, depths,
};
use crate::store::ArtifactStore;

/// Prompts in a grid.
const NUM_ROWS: usize = 12;
/// Bytes of images in a grid, so that large images do not make a report that no browser opens.
const MAX_BYTES: usize = 12 << 20;

/// The images of one `generate` node.
struct Drawn<'a> {
    node: &'a NodeReport,
    folder: std::path::PathBuf,
    records: Vec<ImageRecord>,
    marks: BTreeMap<(String, usize), Mark>,
}

/// Returns the grids of a run, in the order of the plan.
pub fn grids(nodes: &[NodeReport], store: &ArtifactStore) -> Vec<SampleGrid> {
    let mut groups: Vec<((&str, &BenchmarkItems), Vec<Drawn<'_>>)> = Vec::new();
    for node in nodes {
        let Some(Settings::Generate(generate)) = &node.settings else { continue };
        let Some(drawn) = drawn(node, nodes, store) else { continue };
        let key = (generate.benchmark.as_str(), &generate.items);
        match groups.iter_mut().find(|(other, _)| *other == key) {
            Some((_, group)) => group.push(drawn),
            None => groups.push((key, vec![drawn])),
        }
    }
    let depth = depths(nodes.iter().map(|node| &node.planned));
    groups
        .into_iter()
        .map(|((benchmark, _), mut group)| {
            group.sort_by_key(|drawn| depth[drawn.node.name()]);
            grid(benchmark, &group, nodes)
        })
        .collect()
}

fn drawn<'a>(node: &'a NodeReport, nodes: &[NodeReport], store: &ArtifactStore) -> Option<Drawn<'a>> {
    let folder = store.path(&node.manifest.as_ref()?.fingerprint);
    let text = fs::read_to_string(folder.join(IMAGES_FILE)).ok()?;
    let records: Vec<ImageRecord> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let judged = nodes.iter().find(|other| {
        other.manifest.is_some() && other.planned.node.inputs.get("images").is_some_and(|images| images == node.name())
    });
    let marks = judged.map_or_else(BTreeMap::new, |score| {
        read_marks(&store.path(&score.planned.fingerprint).join(ANSWERS_FILE), &records)
    });
    (!records.is_empty()).then_some(Drawn { node, folder, records, marks })
}

/// Reads what the judge said of each image. A line belongs to the image that it names, or to that of its own number.
fn read_marks(path: &Path, records: &[ImageRecord]) -> BTreeMap<(String, usize), Mark> {
    let Ok(text) = fs::read_to_string(path) else { return BTreeMap::new() };
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap_or(Value::Null)).collect();
    let in_order = lines.len() == records.len();
    let mut marks = BTreeMap::new();
    for (index, line) in lines.iter().enumerate() {
        let named = line.get("item").and_then(Value::as_str).map(|item| {
            let copy = line.get("copy").and_then(Value::as_u64).unwrap_or(0);
            (item.to_owned(), usize::try_from(copy).unwrap_or(0))
        });
        let ordered = || in_order.then(|| (records[index].item.clone(), records[index].copy));
        if let (Some(key), Some(mark)) = (named.or_else(ordered), find_mark(line)) {
            marks.insert(key, mark);
        }
    }
    marks
}

/// Returns the first verdict inside a value: an object with a boolean `strict`.
fn find_mark(value: &Value) -> Option<Mark> {
    match value {
        Value::Object(fields) => match fields.get("strict") {
            Some(Value::Bool(strict)) => {
                Some(Mark { strict: *strict, graded: fields.get("graded").and_then(Value::as_f64) })
            }
            _ => fields.values().find_map(find_mark),
        },
        Value::Array(items) => items.iter().find_map(find_mark),
        _ => None,
    }
}

fn grid(benchmark: &str, group: &[Drawn<'_>], nodes: &[NodeReport]) -> SampleGrid {
    let columns = group
        .iter()
        .map(|drawn| SampleColumn { node: drawn.node.name().clone(), label: checkpoint_label(nodes, drawn.node) });
    // The first copy of an item stands for it.
    let firsts: Vec<&ImageRecord> = group[0].records.iter().filter(|record| record.copy == 0).collect();
    let mut rows = Vec::new();
    let mut num_bytes = 0;
    for chosen in choose(&firsts, NUM_ROWS) {
        let mut source = None;
        let cells = group.iter().map(|drawn| {
            let record = drawn.records.iter().find(|record| record.item == chosen.item && record.copy == 0)?;
            let size = Some((record.width, record.height));
            let picture = picture(&drawn.folder, &record.file, size)?;
            if source.is_none() {
                source = record.source.as_ref().and_then(|file| self::picture(&drawn.folder, file, None));
            }
            Some(SampleCell { picture, mark: drawn.marks.get(&(record.item.clone(), 0)).copied() })
        });
        let cells: Vec<Option<SampleCell>> = cells.collect();
        num_bytes += cells.iter().flatten().map(|cell| cell.picture.bytes.len()).sum::<usize>();
        if num_bytes > MAX_BYTES && !rows.is_empty() {
            break;
        }
        rows.push(SampleRow { tag: chosen.tag.clone(), prompt: chosen.prompt.clone(), source, cells });
    }
    SampleGrid { benchmark: benchmark.to_owned(), columns: columns.collect(), rows, num_items: firsts.len() }
}

/// Returns about `num` records: as many of each tag as of any other, evenly spaced within it, in the order of the tags.
fn choose<'a>(records: &[&'a ImageRecord], num: usize) -> Vec<&'a ImageRecord> {
    let mut tags: Vec<(&str, Vec<&'a ImageRecord>)> = Vec::new();
    for &record in records {
        match tags.iter_mut().find(|(tag, _)| *tag == record.tag) {
            Some((_, members)) => members.push(record),
            None => tags.push((record.tag.as_str(), vec![record])),
        }
    }
    let mut shares = vec![0; tags.len()];
    let mut left = num.min(records.len());
    while left > 0 {
        for (share, (_, members)) in shares.iter_mut().zip(&tags) {
            if left > 0 && *share < members.len() {
                *share += 1;
                left -= 1;
            }
        }
    }
    let evenly = |(share, (_, members)): (usize, &(&str, Vec<&'a ImageRecord>))| -> Vec<&'a ImageRecord> {
        (0..share).map(|i| members[(2 * i + 1) * members.len() / (2 * share)]).collect()
    };
    shares.into_iter().zip(&tags).flat_map(evenly).collect()
}

/// Reads an image; nothing when it is missing, of an unknown type, or outside the artifact.
pub fn picture(folder: &Path, file: &str, size: Option<(usize, usize)>) -> Option<Picture> {
    let is_inside = Path::new(file).components().all(|part| matches!(part, std::path::Component::Normal(_)));
    let mime = match Path::new(file).extension()?.to_str()? {
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "webp" => "image/webp",
        _ => return None,
    };
    let bytes = fs::read(folder.join(file)).ok().filter(|_| is_inside)?;
    Some(Picture { mime, bytes, size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_verdict_is_found_however_it_is_wrapped() {
        let verdict = json!({ "strict": false, "graded": 0.5, "parts": [] });
        let found = Some(Mark { strict: false, graded: Some(0.5) });
        assert_eq!(find_mark(&verdict), found);
        assert_eq!(find_mark(&json!([null, { "kind": "verdict", "value": verdict }])), found);
        assert_eq!(find_mark(&json!({ "kind": "text", "value": "strict" })), None);
    }

    #[test]
    fn images_outside_the_artifact_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        fs::write(dir.path().join("secret.png"), "x").unwrap();
        fs::write(dir.path().join("in/own.png"), "x").unwrap();
        assert!(picture(&dir.path().join("in"), "../secret.png", None).is_none());
        assert!(picture(&dir.path().join("in"), "own.png", None).is_some());
    }
}
