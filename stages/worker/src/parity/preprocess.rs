//! Qwen2.5-VL's image processor and tokenizer.

use deepgen_data::processor::{Normalization, PatchShape, qwen_patches, smart_resize};
use deepgen_data::resample::Precision;
use deepgen_data::tokenizer::Tokenizer;
use serde::Deserialize;

use super::case::Case;
use super::compare::{Checker, OUTPUTS, Quantity};
use super::error::{ParityError, ParityResult};

fn unsupported(error: impl std::fmt::Display) -> ParityError {
    ParityError::Unsupported(error.to_string())
}

/// `qwen25vl_preprocess`.
///
/// # Errors
/// When the case is not whole.
pub fn run(case: &Case, check: &mut Checker) -> ParityResult<()> {
    images(case, check)?;
    sizes(case, check)?;
    texts(case, check)
}

/// Factor from bytes to 0..=1.
const BYTE: f64 = 1.0 / 255.0;

fn images(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let shape = PatchShape {
        side: case.config.get("patch_size")?,
        merge: case.config.get("merge_size")?,
        frames: case.config.get("temporal_patch_size")?,
    };
    let normalization =
        Normalization { scale: BYTE, mean: case.config.get("image_mean")?, std: case.config.get("image_std")? };
    let resample: String = case.config.get("resample")?;
    if resample != "bicubic" {
        return Err(unsupported(format!("resample `{resample}`: only bicubic is implemented")));
    }
    // One 8-bit level is largest in the channel of least spread.
    let level = normalization.std.iter().map(|&std| BYTE / f64::from(std)).fold(0.0, f64::max) * 1.01;
    for (tag, key) in [("default", "processor"), ("small", "small")] {
        let limit = |name: &str| case.config.get(&format!("settings/{key}/{name}"));
        let range = [limit("min_pixels")?, limit("max_pixels")?];
        for (kind, precision, quantity) in
            [("slow", Precision::Pillow, Quantity::Levels(level)), ("fast", Precision::Torch, Quantity::Levels(level))]
        {
            for i in 0..inputs.archive.count("image.") {
                let image = inputs.image(&format!("image.{i}"))?;
                let patches = qwen_patches(&image, range, shape, &normalization, precision).map_err(unsupported)?;
                let grid = patches.grid.iter().map(|&side| side as i64).collect();
                check.integers(&format!("{tag}.{kind}.grid_thw.{i}"), grid, &[1, 3])?;
                let name = format!("{tag}.{kind}.pixel_values.{i}");
                // Not every picture is recorded for both processors.
                if check.outputs().has(&name) {
                    let rows = patches.values.len() / patches.width;
                    check.floats(OUTPUTS, &name, patches.values, &[rows, patches.width], quantity)?;
                }
            }
        }
    }
    Ok(())
}

fn sizes(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let factor = case.config.get::<usize>("patch_size")? * case.config.get::<usize>("merge_size")?;
    let table = check.outputs().rows("smart_resize")?;
    let (num_rows, num_columns) = (table.len(), table.first().map_or(0, Vec::len));
    let mut ours = Vec::new();
    for row in table {
        let [height, width, min, max] = [row[0], row[1], row[2], row[3]].map(|number| number as usize);
        let (rows, columns) = smart_resize(height, width, factor, [min, max]).map_err(unsupported)?;
        ours.extend(row[..4].iter().copied().chain([rows as i64, columns as i64]));
    }
    check.integers("smart_resize", ours, &[num_rows, num_columns])
}

/// `tokenizer_examples.json`.
#[derive(Deserialize)]
struct Examples {
    encode: Vec<Encoded>,
    chat: Vec<Chat>,
    batches: std::collections::BTreeMap<String, Vec<String>>,
    special_ids: std::collections::BTreeMap<String, u32>,
    len: usize,
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    ids: Vec<u32>,
    tokens: Vec<String>,
    decoded: String,
    decoded_skip_special: String,
}

#[derive(Deserialize)]
struct Chat {
    text: String,
    ids: Vec<u32>,
}

fn texts(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let tokenizer = Tokenizer::load(&case.folder.join("tokenizer/tokenizer.json")).map_err(unsupported)?;
    let path = case.folder.join("tokenizer_examples.json");
    let examples: Examples = serde_json::from_value(case.settings("tokenizer_examples.json")?.value)
        .map_err(|error| ParityError::Format { path, reason: error.to_string() })?;
    let encode = |text: &str| tokenizer.encode(text).map_err(unsupported);
    for (i, example) in examples.encode.iter().enumerate() {
        let ids = encode(&example.text)?;
        let tokens: Vec<String> = ids.iter().filter_map(|&id| tokenizer.token(id)).collect();
        let decoded = tokenizer.decode_with_special(&example.ids).map_err(unsupported)?;
        let plain = tokenizer.decode(&example.ids).map_err(unsupported)?;
        let holds = ids == example.ids
            && tokens == example.tokens
            && decoded == example.decoded
            && plain == example.decoded_skip_special;
        let note = format!("{:?}", example.text);
        check.claim(&format!("ids, tokens and texts of example {i}"), holds, note);
    }
    for (i, chat) in examples.chat.iter().enumerate() {
        check.claim(&format!("ids of chat {i}"), encode(&chat.text)? == chat.ids, String::new());
    }
    let special = examples.special_ids.iter().all(|(token, &id)| tokenizer.id(token).is_ok_and(|found| found == id));
    check.claim("special ids", special, format!("{} tokens", examples.special_ids.len()));
    let size = tokenizer.vocab_size();
    check.claim("size of the vocabulary", size == examples.len, format!("{size} of {}", examples.len));
    let pad = tokenizer.special_tokens().map_err(unsupported)?.pad;
    for (name, texts) in &examples.batches {
        let rows: Vec<Vec<u32>> = texts.iter().map(|text| encode(text)).collect::<ParityResult<_>>()?;
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for row in &rows {
            let padding = longest - row.len();
            ids.extend(std::iter::repeat_n(i64::from(pad), padding).chain(row.iter().map(|&id| i64::from(id))));
            mask.extend((0..longest).map(|place| i64::from(place >= padding)));
        }
        check.integers(&format!("tokenizer.{name}.input_ids"), ids, &[rows.len(), longest])?;
        check.integers(&format!("tokenizer.{name}.attention_mask"), mask, &[rows.len(), longest])?;
    }
    Ok(())
}
