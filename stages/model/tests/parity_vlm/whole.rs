//! The whole model: losses, gradients, what trains, and a saved model read back.

use std::collections::BTreeMap;

use burn::tensor::FloatDType;
use deepgen_contract::model::{
    BaseModelConfig, BridgeConfig, BridgeLayers, LoraConfig, LoraTargets, ModelSpec, Padding, VaeConfig,
};
use deepgen_model::Tensor;
use deepgen_model::bridge::Bridge;
use deepgen_model::deepgen::{DeepGen, FlowTargets};
use deepgen_model::dit::Dit;
use deepgen_model::flow::TrainingTable;
use deepgen_model::init::Init;
use deepgen_model::lora;
use deepgen_model::parts::Parts;
use deepgen_model::trainable;
use deepgen_model::vae::Vae;
use deepgen_model::vlm::{PromptBatch, hub_name};
use deepgen_model::weights::{StoredType, for_each_param, load_into};
use serde_json::Value;

use super::{Case, FORWARD, GRADIENT, check_gradients, close, close_values, dit_config, number, vlm_config};

const WHOLE: f64 = 3e-4;

/// The whole tiny model of the `deepgen_*` cases, adapters attached.
fn deepgen(pad: u32) -> DeepGen {
    let case = Case::open("deepgen_model");
    let json =
        |name: &str| -> Value { serde_json::from_slice(&std::fs::read(case.folder.join(name)).unwrap()).unwrap() };
    let (connector, vae) = (&case.config["connector_config"], json("vae/config.json"));
    let lora_config = LoraConfig {
        targets: LoraTargets::Auto,
        rank: number(&case.config["lora"], "rank"),
        alpha: case.config["lora"]["alpha"].as_f64().unwrap(),
        dropout: 0.05,
    };
    let spec = ModelSpec {
        base: BaseModelConfig {
            vlm: vlm_config(&json("lmm/hub_style_config.json"), pad),
            dit: dit_config(&case.config["transformer_config"]),
            vae: VaeConfig {
                in_channels: number(&vae, "in_channels"),
                latent_channels: number(&vae, "latent_channels"),
                block_out_channels: serde_json::from_value(vae["block_out_channels"].clone()).unwrap(),
                layers_per_block: number(&vae, "layers_per_block"),
                norm_num_groups: number(&vae, "norm_num_groups"),
                scaling_factor: vae["scaling_factor"].as_f64().unwrap(),
                shift_factor: vae["shift_factor"].as_f64().unwrap(),
            },
            scheduler_shift: case.config["scheduler"]["shift"].as_f64().unwrap(),
            conditioner: None,
        },
        bridge: Some(BridgeConfig {
            layers: BridgeLayers::Rule,
            num_queries: number(&case.config, "num_queries"),
            hidden_size: number(connector, "hidden_size"),
            intermediate_size: number(connector, "intermediate_size"),
            num_hidden_layers: number(connector, "num_hidden_layers"),
            num_attention_heads: number(connector, "num_attention_heads"),
            layer_norm_eps: 1e-6,
            padding: Padding::Longest,
            max_length: 1024,
        }),
        lora: Some(lora_config.clone()),
    };
    let init = Init::new(0, &case.device);
    let base = &spec.base;
    let whole = case.file("deepgen.safetensors");
    let bridge_file = whole.clone().rename(|name| (!name.starts_with("transformer.")).then(|| name.to_string()));
    let vlm = lora::attach(case.vlm(&base.vlm, "lmm/model.safetensors"), &lora_config, 0);
    let bridge = Bridge::new(&init, spec.bridge.as_ref().unwrap(), &base.vlm.language, &base.dit).unwrap();
    let vae_file = case.file("vae/diffusion_pytorch_model.safetensors");
    DeepGen::from_parts(Parts {
        vlm: Some(lora::load(vlm, &case.file("lora.safetensors")).unwrap()),
        bridge: Some(load_into(bridge, &bridge_file, "").unwrap()),
        dit: Some(load_into(Dit::new(&init, &base.dit), &whole, "transformer.").unwrap()),
        vae: Some(load_into(Vae::new(&init, &base.vae), &vae_file, "").unwrap()),
        conditioner: None,
        spec,
    })
    .unwrap()
}

/// Our name of a parameter in the whole model.
fn whole_name(name: &str) -> Option<String> {
    match (name.strip_prefix("transformer."), name.starts_with("lmm.")) {
        (Some(rest), _) => Some(format!("dit.{rest}")),
        (None, true) => Some(format!("vlm.{}", hub_name(name))),
        (None, false) => Some(format!("bridge.{name}")),
    }
}

fn indexed<const D: usize>(case: &Case, name: &str, count: usize) -> Vec<Tensor<D>> {
    (0..count).map(|i| case.input(&format!("{name}.{i}"))).collect()
}

struct Step {
    prompts: PromptBatch,
    targets: FlowTargets,
}

fn step(case: &Case, model: &DeepGen, prompts: Vec<Vec<u32>>, num_references: &[usize]) -> Step {
    let num = prompts.len();
    let mut images = vec![Vec::new(); num];
    for (i, &count) in num_references.iter().enumerate() {
        images[i] = (0..count).map(|j| case.input(&format!("pixel_values_src.{i}.{j}"))).collect::<Vec<Tensor<3>>>();
    }
    let num_draws = num + num_references.iter().sum::<usize>();
    let mut draws = indexed::<4>(case, "vae_noise", num_draws).into_iter();
    let mut encode = |pixels: &Tensor<3>| -> Tensor<3> {
        model.encode(pixels.clone().unsqueeze::<4>(), draws.next().unwrap()).squeeze_dim(0)
    };
    let references: Vec<Vec<Tensor<3>>> = images.iter().map(|own| own.iter().map(&mut encode).collect()).collect();
    let latents = indexed::<3>(case, "pixel_values", num).iter().map(&mut encode).collect();
    let table = TrainingTable::new(model.spec().base.scheduler_shift);
    let sigmas: Vec<f32> = case.input::<1>("u").into_data().iter::<f32>().map(|u| table.sigma(f64::from(u))).collect();
    let timesteps = Tensor::<1>::from_floats(sigmas.as_slice(), &case.device).mul_scalar(1000.0);
    case.check("timesteps", timesteps, 1e-6);
    Step {
        prompts: PromptBatch::new(prompts, images),
        targets: FlowTargets { latents, noise: indexed(case, "noise", num), sigmas, references },
    }
}

fn check_step(case: &Case, model: &DeepGen, step: &Step) {
    case.check("merged_hidden", model.stacked_states(&step.prompts, Some(1024)).unwrap(), WHOLE);
    let condition = model.training_condition(&step.prompts).unwrap();
    case.check("pooled", condition.pooled, WHOLE);
    case.check("sequence", condition.sequence, WHOLE);
    let output = model.flow_loss(&step.prompts, &step.targets, FloatDType::F32).unwrap();
    for (i, velocity) in output.velocities.into_iter().enumerate() {
        case.check(&format!("model_pred.{i}"), velocity, WHOLE);
    }
    close_values("loss", &output.loss.to_data(), &case.output("loss"), FORWARD);
    let gradients = output.loss.backward();
    check_gradients(model, &gradients, &case.file("grads.safetensors"), whole_name);

    let mut squares: BTreeMap<String, f64> = BTreeMap::new();
    for_each_param(model, |name, param| {
        if let Some(gradient) = param.grad(&gradients) {
            assert!(!name.starts_with("vlm.visual.") && !name.starts_with("vae."), "a gradient reached {name}");
            let part = name.strip_prefix("bridge.").unwrap_or(name).split('.').next().unwrap();
            let group = match (name.contains(".lora_"), part) {
                (true, _) => "lora.text",
                (false, "dit") => "transformer",
                (false, "vlm") => return,
                (false, part) => part,
            };
            let square = f64::from(gradient.square().sum().into_scalar::<f32>());
            *squares.entry(group.into()).or_default() += square;
        }
    });
    for (group, norm) in case.config["grad_norm_per_group"].as_object().unwrap() {
        let (ours, theirs) = (squares[group].sqrt(), norm.as_f64().unwrap());
        println!("norm {group}: {ours} {theirs}");
        assert!((ours / theirs - 1.0).abs() < GRADIENT, "gradient norm of {group}: {ours}, expected {theirs}");
    }
}

#[test]
fn the_whole_model_gives_the_text_to_image_loss_and_its_gradients() {
    let case = Case::open("deepgen_t2i_loss");
    let (prompts, pad) = case.prompts("outputs.safetensors", "outputs.safetensors", "attention_mask_with_queries");
    let model = deepgen(pad.unwrap());
    let step = step(&case, &model, prompts, &[]);
    check_step(&case, &model, &step);
}

#[test]
fn the_whole_model_gives_the_editing_loss_and_its_gradients() {
    let case = Case::open("deepgen_i2i_loss");
    let (prompts, pad) = case.prompts("outputs.safetensors", "outputs.safetensors", "attention_mask_with_queries");
    let model = deepgen(pad.unwrap());
    let step = step(&case, &model, prompts, &[1, 2]);
    let images: Vec<Tensor<3>> = step.prompts.images.iter().flatten().cloned().collect();
    for (i, (image, tokens)) in images.iter().zip(model.vlm.visual.encode(&images)).enumerate() {
        let scaled: Tensor<3> = model.vlm.visual.scale(image.clone().unsqueeze::<4>()).squeeze_dim(0);
        case.check(&format!("vit_input.{i}"), scaled, FORWARD);
        case.check(&format!("vit_embeds.{i}"), tokens, FORWARD);
    }
    for (i, own) in step.targets.references.iter().enumerate() {
        for (j, latent) in own.iter().enumerate() {
            case.check(&format!("ref_latents.{i}.{j}"), latent.clone(), FORWARD);
        }
    }
    check_step(&case, &model, &step);
}

#[test]
fn only_what_is_selected_gets_gradients_and_they_are_the_same() {
    let case = Case::open("deepgen_t2i_loss");
    let (prompts, pad) = case.prompts("outputs.safetensors", "outputs.safetensors", "attention_mask_with_queries");
    let (model, trainable) = trainable::select(deepgen(pad.unwrap()), &["bridge.*".into()]).unwrap();
    assert_eq!(trainable.num_elements, model.spec().parameter_counts().unwrap().bridge);
    let step = step(&case, &model, prompts, &[]);
    let loss = model.flow_loss(&step.prompts, &step.targets, FloatDType::F32).unwrap().loss;
    let gradients = loss.backward();
    for_each_param(&model, |name, param| {
        assert_eq!(param.grad(&gradients).is_some(), name.starts_with("bridge."), "{name}");
    });
    let expected = case.file("grads.safetensors");
    check_gradients(&model, &gradients, &expected, |name| whole_name(name).filter(|name| name.starts_with("bridge.")));
}

#[test]
fn a_saved_model_loads_back_the_same() {
    let case = Case::open("deepgen_t2i_loss");
    let (prompts, pad) = case.prompts("outputs.safetensors", "outputs.safetensors", "attention_mask_with_queries");
    let model = deepgen(pad.unwrap());
    let prompts = PromptBatch::text(prompts);
    let before = model.condition(&prompts).unwrap();
    let folder = tempfile::tempdir().unwrap();
    model.into_parts().save(folder.path(), StoredType::F32).unwrap();
    let loaded = DeepGen::from_parts(Parts::load(folder.path(), &case.device).unwrap()).unwrap();
    let after = loaded.condition(&prompts).unwrap();
    assert_eq!(before.sequence.to_data(), after.sequence.to_data());
    assert_eq!(before.pooled.to_data(), after.pooled.to_data());

    // Guidance: negative rows first, and each half as if it had been read with the other.
    let negative = PromptBatch::text(vec![prompts.ids[0][..4].to_vec(); prompts.ids.len()]);
    let both = loaded.guidance_condition(negative, prompts).unwrap();
    close("positive half", both.rows(2, 2).sequence, &after.sequence.to_data(), 1e-5);
}
