//! Qwen2.5-VL: decoder, vision tower, both together, and adapters on them.

use std::collections::BTreeSet;

use deepgen_contract::model::{LoraConfig, LoraTargets, Padding, SpecialTokens};
use deepgen_model::decode::NextPosition;
use deepgen_model::probe;
use deepgen_model::rope::Grid;
use deepgen_model::vision::windows;
use deepgen_model::vlm::{Layout, PromptBatch, Vlm, hub_name, is_adapter};
use deepgen_model::weights::{StoredType, WeightFile, for_each_param};
use deepgen_model::{Tensor, lora};

use super::archive::Archive;
use super::case::{Case, Inputs};
use super::compare::{Checker, OUTPUTS, Quantity};
use super::error::{ParityError, ParityResult};
use super::hub;
use super::readings::Readings;

/// Prompts of a left-padded batch.
pub struct Padded {
    /// Ids of each row without padding.
    pub prompts: Vec<Vec<u32>>,
    /// Id of the padding.
    pub pad: u32,
}

impl Padded {
    /// Reads ids and mask; a mask longer than the ids goes on over queries.
    ///
    /// # Errors
    /// When one of them is missing.
    pub fn read(archive: &Archive, ids: &str, mask: &str) -> ParityResult<Self> {
        let (ids, mask) = (archive.rows(ids)?, archive.rows(mask)?);
        let mut pad = None;
        let prompts = ids.iter().zip(&mask).map(|(ids, mask)| {
            let (real, padding): (Vec<_>, Vec<_>) = ids.iter().zip(mask).partition(|(_, real)| **real != 0);
            pad = pad.or(padding.first().map(|(id, _)| **id as u32));
            real.into_iter().map(|(&id, _)| id as u32).collect()
        });
        let prompts = prompts.collect();
        Ok(Self { prompts, pad: pad.unwrap_or(0) })
    }
}

/// Cuts patch rows of `(1, rows, columns)` grids into one tensor an image, with grids of merged tokens.
///
/// # Errors
/// When a grid has several frames.
pub fn cut_patches(pixels: &Tensor<2>, grids: &[Vec<i64>], merge: usize) -> ParityResult<Vec<(Grid, Tensor<3>)>> {
    let mut start = 0;
    let cut = |grid: &Vec<i64>| {
        let [1, rows, columns] = grid[..] else {
            return Err(ParityError::Unsupported(format!("a grid of {grid:?}: images have one frame")));
        };
        let (rows, columns) = (rows as usize, columns as usize);
        let patches = pixels.clone().narrow(0, start, rows * columns).unsqueeze::<3>();
        start += rows * columns;
        Ok((Grid { rows: rows / merge, columns: columns / merge }, patches))
    };
    grids.iter().map(cut).collect()
}

/// Distributes images over prompts by the number of image tokens that each prompt holds.
fn grids_of_prompts(prompts: &[Vec<u32>], grids: &[Grid], image_pad: u32) -> Vec<Vec<Grid>> {
    let mut left = grids.iter().copied();
    let own = |prompt: &Vec<u32>| {
        let mut num_tokens = prompt.iter().filter(|&&id| id == image_pad).count();
        let mut own = Vec::new();
        while num_tokens > 0 {
            let Some(grid) = left.next() else { break };
            num_tokens = num_tokens.saturating_sub(grid.num_tokens());
            own.push(grid);
        }
        own
    };
    prompts.iter().map(own).collect()
}

/// Compares position ids `[3, b, t]`.
///
/// # Errors
/// When none are expected.
pub fn check_positions(check: &mut Checker, layout: &Layout, order: &[usize]) -> ParityResult<()> {
    let axes = &layout.positions.axis;
    let ours: Vec<i64> = axes.iter().flat_map(|axis| order.iter().flat_map(|&row| axis[row].iter().copied())).collect();
    let length = axes[0].first().map_or(0, Vec::len);
    check.integers("position_ids", ours, &[3, order.len(), length])
}

/// Compares what the library adds to a token's index to get its position.
fn check_deltas(check: &mut Checker, layout: &Layout) -> ParityResult<()> {
    let length = layout.positions.axis[0].first().map_or(0, Vec::len) as i64;
    let largest = |row: usize| layout.positions.axis.iter().flat_map(|axis| axis[row].iter().copied()).max();
    let num_rows = layout.ids.len();
    let ours: Vec<i64> = (0..num_rows).map(|row| largest(row).unwrap_or(0) + 1 - length).collect();
    check.integers("rope_deltas", ours, &[num_rows, 1])
}

fn all_rows(layout: &Layout) -> Vec<usize> {
    (0..layout.ids.len()).collect()
}

/// Returns every entry of the hidden-state tuple.
fn all_states(vlm: &Vlm, embeds: Tensor<3>, layout: &Layout) -> Vec<Tensor<3>> {
    let entries: Vec<usize> = (0..=vlm.config().language.num_hidden_layers).collect();
    vlm.model.hidden_states(embeds, &layout.positions, &layout.is_real, &entries)
}

fn check_states(check: &mut Checker, states: &[Tensor<3>]) -> ParityResult<()> {
    for (entry, state) in states.iter().enumerate() {
        check.tensor(&format!("hidden_states.{entry}"), state.clone(), Quantity::Forward)?;
    }
    Ok(())
}

/// `qwen25vl_text`.
///
/// # Errors
/// When the case is not whole.
pub fn text(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let padded = Padded::read(&inputs.archive, "input_ids", "attention_mask")?;
    let vlm = hub::load_vlm(case, "model", padded.pad)?;
    let none = vec![Vec::new(); padded.prompts.len()];
    let layout = Layout::new(&padded.prompts, &none, &vlm.config().tokens, (Padding::Longest, 0, None))?;
    check_positions(check, &layout, &all_rows(&layout))?;
    check_deltas(check, &layout)?;
    let states = all_states(&vlm, vlm.assemble(&layout, Vec::new(), None), &layout);
    check_states(check, &states)?;
    if let Some(last) = states.last() {
        check.tensor("logits", vlm.logits(last.clone()), Quantity::Forward)?;
    }
    let num_tokens = check.outputs().rows("generated_ids")?.first().map_or(0, Vec::len);
    let batch = PromptBatch::text(padded.prompts);
    let generated = vlm.generate_greedily(&batch, num_tokens, NextPosition::LessPadding)?;
    let ids: Vec<i64> = generated.ids.iter().flatten().map(|&id| i64::from(id)).collect();
    check.integers("generated_ids", ids, &[batch.ids.len(), num_tokens])?;
    let logits: Tensor<3> = Tensor::stack(generated.logits, 1);
    let [rows, steps, vocabulary] = logits.dims();
    let margins = logits.clone().into_data().iter::<f32>().collect::<Vec<_>>();
    let margins = margins.chunks(vocabulary).map(|step| {
        let mut sorted = step.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted[0] - sorted[1]
    });
    check.floats(OUTPUTS, "generated_margin", margins.collect(), &[rows, steps], Quantity::Forward)?;
    check.tensor("generated_logits", logits, Quantity::Forward)
}

/// `qwen25vl_vision`.
///
/// # Errors
/// When the case is not whole.
pub fn vision(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let vlm = hub::load_vlm(case, "model", 0)?;
    let merge = vlm.config().vision.spatial_merge_size;
    let per_cell = merge * merge;
    let images = cut_patches(&inputs.tensor("pixel_values")?, &inputs.archive.rows("grid_thw")?, merge)?;
    let (mut order, mut ends) = (Vec::new(), vec![0]);
    let mut tokens = Vec::new();
    let mut probed: Vec<Readings> = Vec::new();
    let mut start = 0;
    for (i, (grid, patches)) in images.into_iter().enumerate() {
        let windows = windows(grid, vlm.visual.window_cells());
        for window in &windows {
            ends.push(ends.last().copied().unwrap_or(0) + (window.len() * per_cell) as i64);
        }
        let own_order: Vec<usize> = windows.into_iter().flatten().collect();
        order.extend(own_order.iter().map(|cell| (start + cell) as i64));
        start += grid.num_tokens();
        let (own, readings) = probe::record(|| vlm.visual.forward(patches, grid));
        // Our tower works through its windows in an order of its own.
        let working = vlm.visual.working_order(grid);
        let raster: Vec<usize> = (0..grid.num_tokens()).collect();
        let (patches, rest) = readings.into_iter().partition(|reading| reading.place == "vision.patch_embed");
        // The reference embeds patches in raster order and permutes them afterwards.
        let patches = Readings::new(patches).reorder(&working, &raster);
        probed.push(patches.followed_by(Readings::new(rest).reorder(&working, &own_order)));
        let own: Tensor<2> = own.squeeze_dim(0);
        check.tensor(&format!("image_embeds.{i}"), own.clone(), Quantity::Forward)?;
        tokens.push(own);
    }
    let (num_cells, num_ends) = (order.len(), ends.len());
    check.integers("window_index", order, &[num_cells])?;
    check.integers("cu_window_seqlens", ends, &[num_ends])?;
    for place in Readings::places(&probed) {
        let name = match place.strip_prefix("vision.") {
            Some("merger") => "merger_window_order",
            Some(name) => name,
            None => continue,
        };
        let (values, width) = Readings::joined(&probed, &place);
        check.floats(OUTPUTS, name, values.clone(), &[values.len() / width, width], Quantity::Forward)?;
    }
    let loss = (Tensor::cat(tokens, 0) - inputs.tensor("target")?).square().mean();
    check.scalar("loss", loss.clone(), Quantity::Forward)?;
    check.gradients(&vlm, loss.backward(), |name| Some(hub_name(name)))?;
    Ok(())
}

/// Images of a batch: their grids by prompt, and their vision rows.
fn see(vlm: &Vlm, inputs: &Inputs<'_>, prompts: &[Vec<u32>]) -> ParityResult<(Vec<Vec<Grid>>, Vec<Tensor<2>>)> {
    let merge = vlm.config().vision.spatial_merge_size;
    let images = cut_patches(&inputs.tensor("pixel_values")?, &inputs.archive.rows("image_grid_thw")?, merge)?;
    let grids: Vec<Grid> = images.iter().map(|(grid, _)| *grid).collect();
    let rows = images.into_iter().map(|(grid, patches)| vlm.visual.forward(patches, grid).squeeze_dim(0)).collect();
    Ok((grids_of_prompts(prompts, &grids, vlm.config().tokens.image_pad), rows))
}

/// `qwen25vl_full`.
///
/// # Errors
/// When the case is not whole.
pub fn full(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let padded = Padded::read(&inputs.archive, "input_ids", "attention_mask")?;
    let vlm = hub::load_vlm(case, "model", padded.pad)?;
    let queries: Tensor<2> = inputs.tensor::<2>("queries")?.require_grad();
    let [num_queries, _] = queries.dims();
    let (grids, rows) = see(&vlm, &inputs, &padded.prompts)?;
    let tokens: &SpecialTokens = &vlm.config().tokens;
    let layout = Layout::new(&padded.prompts, &grids, tokens, (Padding::Longest, num_queries, None))?;
    check_positions(check, &layout, &all_rows(&layout))?;
    check_deltas(check, &layout)?;
    check_mask(check, &layout, &all_rows(&layout))?;
    check.tensor("image_embeds", Tensor::cat(rows.clone(), 0), Quantity::Forward)?;
    let embeds = vlm.assemble(&layout, rows, Some(queries.clone()));
    check.tensor("inputs_embeds", embeds.clone(), Quantity::Forward)?;
    let states = all_states(&vlm, embeds, &layout);
    check_states(check, &states)?;
    let loss = (states[vlm.config().language.num_hidden_layers - 1].clone() - inputs.tensor("target")?).square().mean();
    check.scalar("loss", loss.clone(), Quantity::Forward)?;
    let gradients = loss.backward();
    if let Some(gradient) = queries.grad(&gradients) {
        check.data(super::compare::GRADS, "queries", &gradient.into_data(), Quantity::Gradient)?;
    }
    check.gradients(&vlm, gradients, |name| (name != "queries").then(|| hub_name(name)))?;
    Ok(())
}

/// Compares the mask of real positions, queries included.
///
/// # Errors
/// When none is expected.
pub fn check_mask(check: &mut Checker, layout: &Layout, order: &[usize]) -> ParityResult<()> {
    let ours: Vec<i64> =
        order.iter().flat_map(|&row| layout.is_real[row].iter().map(|&real| i64::from(real))).collect();
    let length = layout.is_real.first().map_or(0, Vec::len);
    check.integers("attention_mask_with_queries", ours, &[order.len(), length])
}

/// Reads the shape of adapters from `rank` and `alpha` of the settings.
///
/// # Errors
/// When one of them is missing.
pub fn adapters(settings: &super::case::Settings) -> ParityResult<LoraConfig> {
    Ok(LoraConfig {
        targets: LoraTargets::Auto,
        rank: settings.get("rank")?,
        alpha: settings.get("alpha")?,
        dropout: settings.get("dropout").unwrap_or(0.0),
    })
}

/// `lora`.
///
/// # Errors
/// When the case is not whole.
pub fn lora(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let padded = Padded::read(&inputs.archive, "input_ids", "attention_mask")?;
    let base = hub::load_vlm(case, "base_model", padded.pad)?;
    let (_, rows) = see(&base, &inputs, &[])?;
    let none = vec![Vec::new(); padded.prompts.len()];
    let layout = Layout::new(&padded.prompts, &none, &base.config().tokens, (Padding::Longest, 0, None))?;
    let run = |vlm: &Vlm| all_states(vlm, vlm.assemble(&layout, Vec::new(), None), &layout);
    let logits = |vlm: &Vlm, states: &[Tensor<3>]| vlm.logits(states[states.len() - 1].clone());
    check.tensor("base_image_embeds", Tensor::cat(rows, 0), Quantity::Forward)?;
    let states = run(&base);
    check.tensor("base_logits", logits(&base, &states), Quantity::Forward)?;

    let config = adapters(&case.config)?;
    let file = case.weights("adapter/adapter_model.safetensors")?;
    let adapted = lora::load(lora::attach(base, &config, 0), &file)?;
    check_adapter_file(case, check, &adapted, &file)?;
    let (_, rows) = see(&adapted, &inputs, &[])?;
    check.tensor("image_embeds", Tensor::cat(rows, 0), Quantity::Forward)?;
    // Only adapters train, chosen as the stages choose.
    let (adapted, _) = deepgen_model::trainable::select(adapted, &["*.lora_*".into()])
        .map_err(|error| ParityError::Unsupported(error.to_string()))?;
    let states = run(&adapted);
    check_states(check, &states)?;
    let found = logits(&adapted, &states);
    check.tensor("logits", found.clone(), Quantity::Forward)?;
    let loss = (found - inputs.tensor("target")?).square().mean();
    check.scalar("loss", loss.clone(), Quantity::Forward)?;
    check.gradients(&adapted, loss.backward(), |name| Some(hub_name(name)))?;

    let merged = lora::merge(adapted);
    let states = run(&merged);
    let expected = check.outputs().data("logits")?;
    check.extra(
        "logits of the merged model",
        &logits(&merged, &states).into_data().iter::<f32>().collect::<Vec<_>>(),
        &expected.iter::<f32>().collect::<Vec<_>>(),
        Quantity::Forward,
    );
    let wanted: Vec<String> = case.archive("merged.safetensors")?.names().map(str::to_owned).collect();
    let mut found = Vec::new();
    for_each_param(&merged, |name, param| {
        found.extend(
            wanted.iter().filter(|theirs| hub_name(theirs) == name).map(|theirs| (theirs.clone(), param.value())),
        );
    });
    for (theirs, value) in found {
        let values = value.into_data().iter::<f32>().collect();
        let shape = case.archive("merged.safetensors")?.get(&theirs)?.shape.clone();
        check.floats("merged.safetensors", &theirs, values, &shape, Quantity::Forward)?;
    }
    Ok(())
}

/// Compares names and values of the adapter file that we write with those of the library's.
fn check_adapter_file(case: &Case, check: &mut Checker, vlm: &Vlm, theirs: &WeightFile) -> ParityResult<()> {
    let path = std::env::temp_dir().join(format!("parity-adapter-{}-{}.safetensors", std::process::id(), case.name));
    lora::save(vlm, &path, StoredType::F32)?;
    let ours = WeightFile::open(&path)?;
    // The file is mapped already.
    let _ = std::fs::remove_file(&path);
    // The library also stores the base of adapted embeddings and heads.
    let names = |file: &WeightFile| -> BTreeSet<String> {
        file.names().filter(|name| is_adapter(&hub_name(name))).map(str::to_owned).collect()
    };
    let (found, wanted) = (names(&ours), names(theirs));
    let differing: Vec<String> = found.symmetric_difference(&wanted).cloned().collect();
    check.claim("names in the adapter file", differing.is_empty(), differing.join(", "));
    let values = |file: &WeightFile| -> ParityResult<Vec<f32>> {
        let mut all = Vec::new();
        for name in found.intersection(&wanted) {
            all.extend(file.get(name)?.iter::<f32>());
        }
        Ok(all)
    };
    check.extra("values in the adapter file", &values(&ours)?, &values(theirs)?, Quantity::Exact);
    let keys: Vec<String> = case.config.get("module_state_dict_keys_with_adapter")?;
    let wanted: BTreeSet<String> = keys.iter().map(|key| hub_name(key)).collect();
    let mut found = BTreeSet::new();
    for_each_param(vlm, |name, _| {
        found.insert(name.to_owned());
    });
    let differing: Vec<String> = found.symmetric_difference(&wanted).cloned().collect();
    check.claim("names in the adapted module", differing.is_empty(), differing.join(", "));
    Ok(())
}
