//! `base_vae`: trains the small autoencoder of the shapes world's base on reconstruction, then measures its latents.
//!
//! Not in the paper, which starts from SD3.5's. Phases as docs/results.md found them: a strong KL first, then sharper.

use std::collections::BTreeMap;

use burn::module::Module;
use deepgen_contract::artifact::ArtifactKind;
use deepgen_contract::base::{BaseVaeSettings, VaePhase};
use deepgen_contract::model::VaeConfig;
use deepgen_contract::train::OnNonFinite;
use deepgen_model::init::Init;
use deepgen_model::random::noise;
use deepgen_model::vae::Vae;
use deepgen_model::weights::{self, StoredType, WeightFile};
use deepgen_model::{Device, Tensor};

use crate::checkpoint::NamedTensors;
use crate::emit::Metrics;
use crate::error::{JobResult, OrFail};
use crate::feed::{Feed, stack};
use crate::fit::{FitEnd, FitPlan, Trainer, ensure_finite_loss, fit};
use crate::job::{JobContext, JobEnd, JobReport};
use crate::optimize::{self, AdamW, GradientSum, schedule_factor};
use crate::{base_folder, files};

/// Batches whose latents give the shift and the scale.
const NUM_MEASURED_BATCHES: u64 = 16;
/// A batch far beyond the last step's, looked at between steps.
const VALIDATION_ITERATION: u64 = 1 << 40;
/// Name prefix of the weights in a checkpoint.
const PREFIX: &str = "vae.";

/// Trains and writes `vae.safetensors` with a `vae.json` that holds the measured shift and scale.
///
/// # Errors
/// When the data cannot be read or a loss is not finite.
pub fn run(settings: &BaseVaeSettings, context: &mut JobContext) -> JobResult<JobEnd> {
    let data = context.input_path("data", ArtifactKind::Mixture)?;
    let feed = Feed::open(&data, &settings.image, context.spec.seed)?;
    let device = context.device.clone().autodiff();
    let vae = Vae::new(&Init::new(context.spec.seed, &device).at("vae"), &settings.model);
    let mut trainer = VaeTrainer {
        vae: Some(vae),
        optimizer: AdamW::new(&settings.optimizer),
        feed,
        settings: settings.clone(),
        seed: context.spec.seed,
        device,
    };
    let plan = FitPlan {
        total: settings.phases.iter().map(|phase| phase.steps).sum(),
        unit: "steps",
        boundary: 1,
        log_every: 10,
        validate_every: 100,
        sample_every: 0,
        checkpoint: settings.checkpoint.clone(),
        on_non_finite: OnNonFinite::Stop,
    };
    if let FitEnd::Stopped(step) = fit(&mut trainer, &plan, context)? {
        return Ok(JobEnd::Stopped(step));
    }
    let vae = trainer.vae.take().expect("fit leaves the weights in place");
    let config = measure(&vae.clone().valid(), settings, &mut trainer.feed, context)?;
    let out = context.out();
    let path = out.join(base_folder::VAE_FILE);
    weights::save(&path, &weights::visit(&vae), StoredType::F32, &BTreeMap::new()).or_io(|| "write the weights")?;
    files::write_json(&out.join(base_folder::VAE_CONFIG_FILE), &config).or_io(|| "write the configuration")?;
    let metrics = BTreeMap::from([
        ("vae/scaling_factor".to_owned(), config.scaling_factor),
        ("vae/shift_factor".to_owned(), config.shift_factor),
    ]);
    Ok(JobEnd::Done(JobReport { metrics, notes: Vec::new() }))
}

struct VaeTrainer {
    vae: Option<Vae>,
    optimizer: AdamW,
    feed: Feed,
    settings: BaseVaeSettings,
    seed: u64,
    device: Device,
}

/// Phase of a step and the step's place in it.
fn phase_at(phases: &[VaePhase], step: u64) -> (&VaePhase, u64) {
    let mut start = 0;
    for phase in phases {
        if step < start + phase.steps {
            return (phase, step - start);
        }
        start += phase.steps;
    }
    (&phases[phases.len() - 1], step)
}

impl Trainer for VaeTrainer {
    fn step(&mut self, step: u64, _context: &mut JobContext) -> JobResult<Metrics> {
        let (phase, place) = phase_at(&self.settings.phases, step);
        let (phase, lr) =
            (phase.clone(), phase.lr * schedule_factor(&self.settings.optimizer.schedule, place, phase.steps));
        let batch = self.feed.batch(step)?;
        let pixels = stack(&batch.images, &self.device)?;
        let vae = self.vae.take().expect("a step leaves the weights in place");
        let vae = if place == 0 || step == 0 { select_phase(vae, &phase) } else { vae };
        let posterior = vae.encode(pixels.clone());
        let z = if phase.decoder_only {
            posterior.mean.clone().detach()
        } else {
            let noise = noise(self.seed, &format!("vae/noise/{step}"), posterior.mean.dims(), &self.device);
            posterior.sample(noise)
        };
        let elements: usize = posterior.mean.dims()[1..].iter().product();
        let error = vae.decode(z) - pixels;
        let squared = error.clone().square().mean();
        let mut loss = squared.clone();
        if phase.l1 > 0.0 {
            loss = loss + error.abs().mean().mul_scalar(phase.l1 * 0.1);
        }
        let kl = posterior.kl().mean().div_scalar(elements as f64);
        if !phase.decoder_only {
            loss = loss + kl.clone().mul_scalar(phase.kl);
        }
        let mut metrics = Metrics::new();
        let value = scalar(loss.clone());
        ensure_finite_loss(step, "train/loss", value, &batch.keys)?;
        metrics.insert("train/loss".into(), value);
        let mse = scalar(squared);
        metrics.insert("train/psnr".into(), psnr(mse));
        metrics.insert("train/kl".into(), scalar(kl));
        metrics.insert("train/lr".into(), lr);
        let mut sum = GradientSum::default();
        sum.add(&vae, loss.backward(), 1.0);
        let (vae, norm) = self.optimizer.update(vae, sum.ensure_finite(step)?, lr);
        metrics.insert("train/grad_norm".into(), norm);
        self.vae = Some(vae);
        Ok(metrics)
    }

    fn validate(&mut self, _step: u64, _context: &mut JobContext) -> JobResult<Metrics> {
        let vae = self.vae.clone().expect("a step leaves the weights in place").valid();
        let batch = self.feed.batch(VALIDATION_ITERATION)?;
        let pixels = stack(&batch.images, &self.device.clone().without_autodiff())?;
        let again = vae.decode(vae.encode(pixels.clone()).mean);
        let mse = scalar((again - pixels).square().mean());
        Ok(Metrics::from([("validation/psnr".to_owned(), psnr(mse))]))
    }

    fn tensors(&self) -> NamedTensors {
        let vae = self.vae.as_ref().expect("a step leaves the weights in place");
        let weights = weights::visit(vae).into_iter().map(|(name, data)| (format!("{PREFIX}{name}"), data));
        weights.chain(self.optimizer.tensors()).collect()
    }

    fn restore(&mut self, file: &WeightFile) -> JobResult<()> {
        let vae = self.vae.take().expect("a step leaves the weights in place");
        let vae = weights::load_into(vae, file, PREFIX).or_io(|| "read the checkpoint's weights")?;
        let done = self.optimizer.restore(file, optimize::PREFIX, &self.device.clone().without_autodiff());
        let steps = self.optimizer.updates();
        let (phase, _) = phase_at(&self.settings.phases, steps);
        self.vae = Some(select_phase(vae, phase));
        done
    }
}

fn select_phase(vae: Vae, phase: &VaePhase) -> Vae {
    weights::set_trainable(vae, |name| !phase.decoder_only || name.starts_with("decoder."))
}

fn scalar(x: Tensor<1>) -> f64 {
    f64::from(x.into_scalar::<f32>())
}

/// Pixels span 2.
fn psnr(mse: f64) -> f64 {
    10.0 * (4.0 / mse.max(1e-12)).log10()
}

/// Returns the configuration with the shift and the scale that give sampled latents mean 0 and variance 1.
fn measure(vae: &Vae, settings: &BaseVaeSettings, feed: &mut Feed, context: &JobContext) -> JobResult<VaeConfig> {
    let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
    for index in 0..NUM_MEASURED_BATCHES {
        let batch = feed.batch(index)?;
        let posterior = vae.encode(stack(&batch.images, &context.device)?);
        let noise = noise(context.spec.seed, &format!("vae/measure/{index}"), posterior.mean.dims(), &context.device);
        let z: Vec<f32> = posterior.sample(noise).into_data().iter::<f32>().collect();
        for value in z.iter().map(|&value| f64::from(value)) {
            sum += value;
            squares += value * value;
        }
        count += z.len() as f64;
    }
    let mean: f64 = sum / count;
    let std = (squares / count - mean * mean).sqrt();
    Ok(VaeConfig { shift_factor: mean, scaling_factor: 1.0 / std, ..settings.model.clone() })
}
