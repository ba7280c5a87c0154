//! The autoencoder: moments, latents, images, and the gradients of a reconstruction loss.

use deepgen_model::host::copy_out;

use super::case::Case;
use super::compare::{Checker, GRADS, Quantity};
use super::diffusion::check_norms;
use super::error::{ParityError, ParityResult};
use super::hub;

/// Weight of the divergence in the case's loss.
const KL_WEIGHT: f64 = 1e-4;

/// `sd3_vae`.
///
/// # Errors
/// When the case is not whole.
pub fn run(case: &Case, check: &mut Checker) -> ParityResult<()> {
    let inputs = case.inputs()?;
    let vae = hub::load_vae(case, "model")?;
    for size in 0..inputs.archive.count("") {
        let at = |name: &str| inputs.tensor::<4>(&format!("{size}.{name}"));
        let posterior = vae.encode(at("pixel_values")?);
        let latents = vae.to_latents(at("pixel_values")?, at("noise")?);
        let mode = vae.from_latents(vae.normalize(posterior.mean.clone()));
        for (name, ours) in [
            ("mean", posterior.mean.clone()),
            ("logvar", posterior.logvar.clone()),
            ("std", posterior.std()),
            ("latents", latents.clone()),
            ("decoded", vae.from_latents(latents)),
            ("decoded_mode", mode),
        ] {
            check.tensor(&format!("{size}.{name}"), ours, Quantity::Forward)?;
        }
        if !check.outputs().has(&format!("{size}.loss")) {
            continue;
        }
        let pixels = at("pixel_values")?.require_grad();
        let posterior = vae.encode(pixels.clone());
        check.tensor(&format!("{size}.kl"), posterior.kl(), Quantity::Forward)?;
        let decoded = vae.decode(posterior.sample(at("noise")?));
        let total = (decoded - pixels.clone()).square().mean() + posterior.kl().mean().mul_scalar(KL_WEIGHT);
        check.scalar(&format!("{size}.loss"), total.clone(), Quantity::Forward)?;
        let gradients = total.backward();
        let gradient = pixels.grad(&gradients).map(copy_out);
        let gradient = gradient.ok_or_else(|| ParityError::Unsupported("no gradient reached the pixels".into()))?;
        check.data(GRADS, "input.pixel_values", &gradient, Quantity::Gradient)?;
        let sum = check.gradients(&vae, gradients, |name| (!name.starts_with("input.")).then(|| name.to_owned()))?;
        check_norms(case, check, |name| sum.get(name));
    }
    Ok(())
}
