//! The whole model: its weights in every file, the losses of both tasks through the training step, and sampling.

use std::collections::BTreeMap;

use deepgen_contract::model::{BaseModelConfig, BridgeLayers, ModelSpec, Padding, STACKED_LAYER_STEP};
use deepgen_contract::train::FloatKind;
use deepgen_data::batch::Batch;
use deepgen_data::prompt::{encode_image_to_image, encode_text_to_image};
use deepgen_data::resize::Pixels;
use deepgen_data::sample::Task;
use deepgen_data::tokenizer::Tokenizer;
use deepgen_model::bridge::{Bridge, Condition};
use deepgen_model::deepgen::DeepGen;
use deepgen_model::dit::Dit;
use deepgen_model::flow::TrainingTable;
use deepgen_model::init::Init;
use deepgen_model::parts::Parts;
use deepgen_model::vlm::{Layout, PromptBatch, Reading, hub_name, is_head};
use deepgen_model::weights::{WeightFile, for_each_param, load_into};
use deepgen_model::{Tensor, lora, probe, trainable};

use super::case::{Case, Inputs};
use super::compare::{Checker, OUTPUTS, Quantity};
use super::connector::bridge_config;
use super::error::{ParityError, ParityResult};
use super::readings::Readings;
use super::{hub, language};
use crate::flow_step::{Draws, FlowStep, Part, Recorded, Sigmas};
use crate::optimize::GradientSum;
use crate::sampling::{Drawer, Sampling, draw_latents};

/// What stage 2 trains.
const TRAINABLE: [&str; 3] = ["bridge.*", "dit.*", "vlm.*.lora_*"];

/// The model of a case, with its tokenizer.
struct Whole {
    model: DeepGen,
    tokenizer: Tokenizer,
}

fn unsupported(error: impl std::fmt::Display) -> ParityError {
    ParityError::Unsupported(error.to_string())
}

/// Loads the weights that the `deepgen_*` cases share.
fn load(case: &Case) -> ParityResult<Whole> {
    let tokenizer = Tokenizer::load(&case.folder.join("tokenizer/tokenizer.json")).map_err(unsupported)?;
    let pad = tokenizer.special_tokens().map_err(unsupported)?.pad;
    let table = |key: &str| case.config.at(key).ok_or_else(|| unsupported(format!("`{key}` is missing")));
    let adapters = language::adapters(&table("lora")?)?;
    let (dit_config, dual) = hub::dit(&table("transformer_config")?)?;
    let (vlm_config, _) = hub::vlm(&case.settings("lmm/config.json")?, pad)?;
    // Where the rule does not give six layers, as in a shallow decoder, the case goes on with what it gives.
    let num_layers = vlm_config.language.num_hidden_layers;
    let layers = match BridgeLayers::Rule.resolve(num_layers) {
        Ok(_) => BridgeLayers::Rule,
        Err(_) => BridgeLayers::Listed((1..num_layers).rev().step_by(STACKED_LAYER_STEP).collect()),
    };
    let spec = ModelSpec {
        bridge: Some(bridge_config(&table("connector_config")?, layers, case.config.get("num_queries")?)?),
        base: BaseModelConfig {
            vlm: vlm_config,
            dit: dit_config,
            vae: hub::vae(&case.settings("vae/config.json")?)?,
            scheduler_shift: case.config.get("scheduler/shift")?,
            conditioner: None,
        },
        lora: Some(adapters.clone()),
    };
    let init = Init::new(0, &case.device);
    let whole = case.weights("deepgen.safetensors")?;
    let bridge_file = whole.clone().rename(|name| (!name.starts_with("transformer.")).then(|| name.to_owned()));
    let config = spec.bridge.as_ref().ok_or_else(|| unsupported("no bridge"))?;
    let bridge = Bridge::new(&init, config, &spec.base.vlm.language, &spec.base.dit).map_err(unsupported)?;
    let dit = Dit::with_dual_attention(&init, &spec.base.dit, &dual);
    let vlm = lora::attach(hub::load_vlm(case, "lmm", pad)?, &adapters, 0);
    let parts = Parts {
        vlm: Some(lora::load(vlm, &case.weights("lora.safetensors")?)?),
        bridge: Some(load_into(bridge, &bridge_file, "")?),
        dit: Some(load_into(dit, &whole, "transformer.")?),
        vae: Some(hub::load_vae(case, "vae")?),
        conditioner: None,
        spec,
    };
    Ok(Whole { model: DeepGen::from_parts(parts)?, tokenizer })
}

/// Our name of a parameter of the whole model.
fn whole_name(name: &str) -> String {
    match (name.strip_prefix("transformer."), name.starts_with("lmm.")) {
        (Some(rest), _) => format!("dit.{rest}"),
        (None, true) => format!("vlm.{}", hub_name(name)),
        (None, false) => format!("bridge.{name}"),
    }
}

/// `deepgen_model`: every stored tensor arrives in its parameter unchanged.
///
/// # Errors
/// When the case is not whole.
pub fn weights(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let Whole { model, .. } = load(case)?;
    let vlm_name = |name: &str| format!("vlm.{}", hub_name(name));
    let vae_name = |name: &str| format!("vae.{name}");
    type Rename<'a> = &'a dyn Fn(&str) -> String;
    let files: [(&str, Rename<'_>); 4] =
        [("deepgen.safetensors", &whole_name), ("lora.safetensors", &vlm_name), ("lmm", &vlm_name), ("vae", &vae_name)];
    let mut values: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for_each_param(&model, |name, param| {
        values.insert(name.to_owned(), param.value().into_data().iter::<f32>().collect());
    });
    let mut num_covered = 0;
    for (file, rename) in files {
        let stored: WeightFile = case.weights(file)?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for name in stored.names() {
            let own = rename(name);
            // The tied head's adapter is inert in the reference, and ours has none (docs/spec/model.md section 6).
            if is_head(own.trim_start_matches("vlm.")) {
                continue;
            }
            let own = values.get(&own).ok_or_else(|| unsupported(format!("{file}: {name} has no parameter {own}")))?;
            ours.extend(own.iter().copied());
            theirs.extend(stored.get(name)?.iter::<f32>());
            num_covered += 1;
        }
        check.extra(&format!("values of {file}"), &ours, &theirs, Quantity::Exact);
    }
    let note = format!("{num_covered} stored tensors, {} parameters", values.len());
    check.claim("every parameter comes from a file", num_covered == values.len(), note);
    let keys: Vec<String> = case.config.get("module_keys_lmm_with_adapter_sample")?;
    let unknown: Vec<&String> = keys.iter().filter(|key| !values.contains_key(&vlm_name(key))).collect();
    check.claim("module names are known", unknown.is_empty(), format!("{} names, unknown {unknown:?}", keys.len()));
    Ok(())
}

/// Images of the inputs as the loader gives them.
fn pixels(inputs: &Inputs<'_>, name: &str) -> ParityResult<Pixels> {
    let array = inputs.archive.get(name)?;
    match array.shape[..] {
        [3, height, width] => Ok(Pixels { height, width, values: array.floats() }),
        _ => Err(unsupported(format!("{name} has the shape {:?}, no image's", array.shape))),
    }
}

/// References of each of `count` samples.
fn references(inputs: &Inputs<'_>, count: usize) -> ParityResult<Vec<Vec<Pixels>>> {
    let own = |i: usize| {
        let prefix = format!("pixel_values_src.{i}.");
        (0..inputs.archive.count(&prefix)).map(|j| pixels(inputs, &format!("{prefix}{j}"))).collect()
    };
    (0..count).map(own).collect()
}

/// Token ids of prompts with their references.
fn encode(whole: &Whole, texts: &[String], references: &[Vec<Pixels>]) -> ParityResult<Vec<Vec<u32>>> {
    let vision = &whole.model.spec().base.vlm.vision;
    let ids = texts.iter().zip(references).map(|(text, own)| {
        if own.is_empty() {
            return encode_text_to_image(&whole.tokenizer, text);
        }
        let lengths: Vec<usize> = own.iter().map(|image| vision.num_tokens(image.height, image.width)).collect();
        encode_image_to_image(&whole.tokenizer, text, &lengths)
    });
    ids.map(|ids| ids.map_err(unsupported)).collect()
}

/// Lays prompts out as the model does.
fn lay_out(model: &DeepGen, prompts: &PromptBatch) -> ParityResult<Layout> {
    let reading = Reading {
        queries: model.bridge.queries(),
        padding: Padding::Longest,
        max_length: None,
        entries: &[],
        is_vision_trained: false,
    };
    Ok(model.vlm.embed(prompts, &reading)?.1)
}

fn check_ids(check: &mut Checker, layout: &Layout, order: &[usize]) -> ParityResult<()> {
    let ids: Vec<i64> = order.iter().flat_map(|&row| layout.ids[row].iter().map(|&id| i64::from(id))).collect();
    check.integers("input_ids", ids, &[order.len(), layout.ids.first().map_or(0, Vec::len)])?;
    language::check_positions(check, layout, order)
}

/// `deepgen_t2i_loss` and `deepgen_i2i_loss`.
///
/// # Errors
/// When the case is not whole.
pub fn loss(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let mut whole = load(&case.weights_case()?)?;
    let texts: Vec<String> = case.config.get("texts")?;
    let references = references(&inputs, texts.len())?;
    let ids = encode(&whole, &texts, &references)?;
    let images =
        (0..texts.len()).map(|i| pixels(&inputs, &format!("pixel_values.{i}"))).collect::<ParityResult<_>>()?;
    let is_edit = references.iter().any(|own| !own.is_empty());
    let batch = Batch {
        task: if is_edit { Task::ImageToImage } else { Task::TextToImage },
        keys: Vec::new(),
        texts,
        ids,
        images,
        references,
        replaced: Vec::new(),
    };
    let flow = FlowStep {
        table: TrainingTable::new(whole.model.spec().base.scheduler_shift),
        sigma_dtype: FloatKind::F32,
        draws: Draws::Recorded(recorded(&inputs, &batch)?),
        device: case.device.clone(),
        cache: None,
    };
    let (model, _) = trainable::select(whole.model, &TRAINABLE.map(str::to_owned)).map_err(unsupported)?;
    whole.model = model;
    let model = &whole.model;
    let prompts = flow.prompts(model, &Part::whole(&batch)).map_err(unsupported)?;
    let layout = lay_out(model, &prompts)?;
    let order: Vec<usize> = (0..batch.ids.len()).collect();
    check_ids(check, &layout, &order)?;
    language::check_mask(check, &layout, &order)?;
    check_vision(check, model, &prompts)?;
    let layers: Vec<usize> = case.config.get("selected_hidden_layers")?;
    check.claim("selected layers", model.bridge.layers() == layers, format!("{:?}", model.bridge.layers()));

    let (loss, readings) = probe::record(|| flow.loss(model, &Part::whole(&batch), "parity", &Sigmas::Drawn));
    let loss = loss?;
    check_readings(check, &Readings::new(readings), &batch)?;
    check.scalar("loss", loss.clone(), Quantity::Forward)?;
    let sum = check.gradients(model, loss.backward(), |name| Some(whole_name(name)))?;
    check_groups(case, check, &sum)
}

/// The stated random numbers: posterior noise of the references, sample by sample, then of the targets.
fn recorded(inputs: &Inputs<'_>, batch: &Batch) -> ParityResult<Recorded> {
    let mut next = 0;
    let mut posterior = || {
        next += 1;
        inputs.archive.floats(&format!("vae_noise.{}", next - 1))
    };
    let references = batch.references.iter().map(|own| own.iter().map(|_| posterior()).collect());
    let references: Vec<Vec<Vec<f32>>> = references.collect::<ParityResult<_>>()?;
    let targets = batch.images.iter().map(|_| posterior()).collect::<ParityResult<_>>()?;
    let noise = (0..batch.images.len()).map(|i| inputs.archive.floats(&format!("noise.{i}")));
    let uniforms = inputs.archive.floats("u")?.into_iter().map(f64::from).collect();
    Ok(Recorded { uniforms, noise: noise.collect::<ParityResult<_>>()?, targets, references })
}

/// What the vision tower is given and makes of every reference.
fn check_vision(check: &mut Checker, model: &DeepGen, prompts: &PromptBatch) -> ParityResult<()> {
    let images: Vec<Tensor<3>> = prompts.images.iter().flatten().cloned().collect();
    let visual = &model.vlm.visual;
    let merge = model.spec().base.vlm.vision.spatial_merge_size;
    for (k, (image, tokens)) in images.iter().zip(visual.encode(&images)).enumerate() {
        let [_, height, width] = image.dims();
        let grid = visual.grid(height, width);
        let patches = [1, (grid.rows * merge) as i64, (grid.columns * merge) as i64];
        check.integers(&format!("vit_grid_thw.{k}"), patches.to_vec(), &[3])?;
        let prepared: Tensor<3> = visual.scale(image.clone().unsqueeze::<4>()).squeeze_dim(0);
        check.tensor(&format!("vit_input.{k}"), prepared, Quantity::Whole)?;
        check.tensor(&format!("vit_embeds.{k}"), tokens, Quantity::Whole)?;
    }
    Ok(())
}

/// Everything on the way from prompts to velocities.
fn check_readings(check: &mut Checker, readings: &Readings, batch: &Batch) -> ParityResult<()> {
    for (name, place) in [
        ("inputs_embeds", "vlm.inputs_embeds"),
        ("merged_hidden", "bridge.stacked"),
        ("pooled", "bridge.pooled"),
        ("sequence", "bridge.sequence"),
        ("timesteps", "dit.timestep"),
    ] {
        let reading = readings.last(place).ok_or_else(|| unsupported(format!("no probe at {place}")))?;
        let quantity = if name == "timesteps" { Quantity::Schedule } else { Quantity::Whole };
        check.data(OUTPUTS, name, &reading.data, quantity)?;
    }
    for (name, place) in [("noisy", "dit.latents"), ("model_pred", "dit.velocity")] {
        for (i, (shape, values)) in readings.samples(place).into_iter().enumerate() {
            check.floats(OUTPUTS, &format!("{name}.{i}"), values, &shape, Quantity::Whole)?;
        }
    }
    let most = batch.references.iter().map(Vec::len).max().unwrap_or(0);
    for place in 0..most {
        let owners = (0..batch.references.len()).filter(|&i| batch.references[i].len() > place);
        for (i, (shape, values)) in owners.zip(readings.samples(&format!("dit.reference.{place}"))) {
            check.floats(OUTPUTS, &format!("ref_latents.{i}.{place}"), values, &shape, Quantity::Whole)?;
        }
    }
    Ok(())
}

/// Gradient norms by group, and the parameters that no gradient reaches.
fn check_groups(case: &Case, check: &mut Checker, sum: &GradientSum) -> ParityResult<()> {
    let mut squares: BTreeMap<String, f64> = BTreeMap::new();
    for (name, gradient) in sum.iter() {
        let part = name.strip_prefix("bridge.").unwrap_or(name).split('.').next().unwrap_or_default();
        let group = match (name.starts_with("vlm.visual."), part) {
            (true, _) => "lora.visual",
            (false, "vlm") => "lora.text",
            (false, "dit") => "transformer",
            (false, part) => part,
        };
        let square = f64::from(gradient.clone().square().sum().into_scalar::<f32>());
        *squares.entry(group.into()).or_default() += square;
    }
    let norms: BTreeMap<String, f64> = case.config.get("grad_norm_per_group")?;
    for (group, theirs) in &norms {
        let ours = squares.get(group).copied().unwrap_or(0.0).sqrt();
        check.extra(&format!("gradient norm of {group}"), &[ours as f32], &[*theirs as f32], Quantity::Gradient);
    }
    let others: Vec<&String> = squares.keys().filter(|group| !norms.contains_key(*group)).collect();
    check.claim("no other group gets a gradient", others.is_empty(), format!("{others:?}"));
    let without: Vec<String> = case.config.get("trainable_without_gradient")?;
    let reached: Vec<&String> = without
        .iter()
        .filter(|name| {
            let gradient = sum.get(&whole_name(name));
            gradient.is_some_and(|gradient| gradient.abs().max().into_scalar::<f32>() > 0.0)
        })
        .collect();
    let note = format!("{} parameters without a gradient; reached {reached:?}", without.len());
    check.claim("parameters without a gradient have none", reached.is_empty(), note);
    Ok(())
}

/// `deepgen_t2i_generate` and `deepgen_i2i_generate`.
///
/// # Errors
/// When the case is not whole.
pub fn generate(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let whole = load(&case.weights_case()?)?;
    let model = &whole.model;
    let (positive, negative): (Vec<String>, Vec<String>) =
        (case.config.get("prompts")?, case.config.get("cfg_prompts")?);
    let count = positive.len();
    let [height, width] = case.config.get("height_width")?;
    let sampling =
        Sampling { steps: case.config.get("steps")?, guidance: case.config.get("cfg_scale")?, height, width };
    if !sampling.is_guided() || negative.len() != count {
        return Err(unsupported("sampling without guidance states no negative prompts"));
    }
    let sources = references(&inputs, count)?;
    let images: Vec<Vec<Tensor<3>>> =
        sources.iter().map(|own| own.iter().map(|image| crate::feed::tensor(image, &case.device)).collect()).collect();
    let prompts = |texts: &[String]| -> ParityResult<PromptBatch> {
        Ok(PromptBatch::new(encode(&whole, texts, &sources)?, images.clone()))
    };
    let (negative, positive) = (prompts(&negative)?, prompts(&positive)?);
    let layout = lay_out(model, &negative.clone().followed_by(positive.clone()))?;
    // The reference reads the prompts first, and hands the negative ones to the DiT first.
    let order: Vec<usize> = (count..2 * count).chain(0..count).collect();
    check_ids(check, &layout, &order)?;
    let condition = model.guidance_condition(negative, positive)?;
    let (first, second) = (condition.rows(0, count), condition.rows(count, count));
    check.tensor("pooled", Tensor::cat(vec![second.pooled, first.pooled], 0), Quantity::Whole)?;
    check.tensor("sequence", Tensor::cat(vec![second.sequence, first.sequence], 0), Quantity::Whole)?;

    let mut draws = inputs.list::<4>("vae_noise.")?.into_iter();
    let mut encode = |image: &Tensor<3>| -> ParityResult<Tensor<3>> {
        let noise = draws.next().ok_or_else(|| unsupported("there is too little vae_noise"))?;
        Ok(model.encode(image.clone().unsqueeze::<4>(), noise).squeeze_dim(0))
    };
    let latents = images.iter().map(|own| own.iter().map(&mut encode).collect());
    let latents: Vec<Vec<Tensor<3>>> = latents.collect::<ParityResult<_>>()?;
    sample(check, model, (&sampling, &condition, &latents), inputs.tensor("init_noise")?)
}

fn sample(
    check: &mut Checker,
    model: &DeepGen,
    (sampling, condition, references): (&Sampling, &Condition, &[Vec<Tensor<3>>]),
    noise: Tensor<4>,
) -> ParityResult<()> {
    let shape = noise.dims();
    let count = shape[0];
    let drawer: Drawer<'_> = model.into();
    let (latents, readings) = probe::record(|| draw_latents(drawer, sampling, condition, references, noise));
    let readings = Readings::new(readings);
    let (states, velocities) = (readings.samples("dit.latents"), readings.samples("dit.velocity"));
    let joined = |samples: &[(Vec<usize>, Vec<f32>)]| samples.iter().flat_map(|(_, values)| values.clone()).collect();
    for step in 0..sampling.steps {
        let first = step * 2 * count;
        let state: Vec<f32> = joined(&states[first..first + count]);
        check.floats(OUTPUTS, &format!("latents.{step}"), state, &shape, Quantity::Whole)?;
        let velocity: Vec<f32> = joined(&velocities[first..first + 2 * count]);
        let doubled = [2 * count, shape[1], shape[2], shape[3]];
        check.floats(OUTPUTS, &format!("pred.{step}"), velocity, &doubled, Quantity::Whole)?;
    }
    for (step, reading) in readings.of("dit.timestep").into_iter().enumerate() {
        check.data(OUTPUTS, &format!("timestep.{step}"), &reading.data, Quantity::Schedule)?;
    }
    check.tensor("images", model.decode(latents), Quantity::Pixels)
}
