//! `generate`: images from prompts, each with the whole story of its making in its PNG file, and the way back from there.
//!
//! An image is reproduced by drawing its batch again: prompts of a batch are padded to the longest, and padding reaches the
//! model (docs/spec/model.md section 2.6).

use std::path::{Path, PathBuf};

use deepgen_contract::data::{ImageMode, ImageSettings};
use deepgen_contract::eval::Conditioning;
use deepgen_contract::model::{BaseModelConfig, ModelSpec};
use deepgen_contract::precision::{ComputeType, PrecisionSettings};
use deepgen_contract::tool::{BatchRow, GENERATION_VERSION, GenerateRequest, GenerationRecord, HashedPath};
use deepgen_contract::train::FloatKind;
use deepgen_data::decode::decode;
use deepgen_data::resize::{Pixels, fit};
use deepgen_model::parts::SPEC_FILE;
use image::RgbImage;

use crate::emit::Emitter;
use crate::error::{JobError, JobResult, OrFail};
use crate::job::JobReport;
use crate::painter::{Order, Painter};
use crate::sampling::Sampling;
use crate::{device, files, png, precision};

/// The recipe's sampler (docs/spec/sft.md section 8).
const RELEASE: (usize, f64, usize) = (50, 4.0, 512);
/// Steps and guidance that small models are evaluated with (`stages/generate.toml`, profile `shapes`).
const SMALL: (usize, f64) = (10, 3.0);
/// Images side by side in a grid, at most.
const GRID_COLUMNS: usize = 4;

/// Draws what is asked for.
///
/// # Errors
/// When weights, prompts or references cannot be read, or are not what the image to repeat was made from.
pub fn run(request: &GenerateRequest, device_name: &str, emitter: &mut Emitter) -> JobResult<JobReport> {
    let repeated = request.from.as_deref().map(png::read_record).transpose()?;
    let device_name = repeated.as_ref().map_or(device_name, |record| record.device.as_str());
    let device = device::open(device_name)?;
    let folder = match (&request.weights, &repeated) {
        (Some(folder), _) => folder.clone(),
        (None, Some(record)) => record.weights.path.clone(),
        (None, None) => return Err(JobError::input("no weights were named")),
    };
    emitter.note(format!("hashing {}", folder.display()));
    let blake3 = files::hash_folder(&folder).or_input(|| format!("hash {}", folder.display()))?;
    let weights = HashedPath { path: folder.clone(), blake3 };
    let spec = read_spec(&folder)?;
    let plan = match repeated {
        Some(record) => Plan::repeating(record, &weights)?,
        None => Plan::new(request, &weights, &spec.base, device_name, precision::kind(auto_compute(&device)))?,
    };
    let compute = match plan.template.compute {
        FloatKind::Bf16 => ComputeType::Bf16,
        FloatKind::F32 => ComputeType::F32,
    };
    let precision = PrecisionSettings { compute, ..PrecisionSettings::default() };
    let conditioning = if spec.bridge.is_some() { Conditioning::Bridge } else { Conditioning::BaseEncoder };
    let painter = Painter::open(&folder, conditioning, &precision, &device)?;
    let mut images = Vec::new();
    let mut notes = Vec::new();
    let total = plan.total();
    for (number, batch) in plan.batches.iter().enumerate() {
        let orders = batch.iter().map(|row| plan.order(row)).collect::<JobResult<Vec<_>>>()?;
        let record = &plan.template;
        let sampling =
            Sampling { steps: record.steps, guidance: record.cfg, height: record.height, width: record.width };
        let drawn = painter.paint(&orders, &sampling, record.seed, &record.negative)?;
        for (row, image) in drawn.into_iter().enumerate() {
            if plan.only.is_some_and(|only| only != row) {
                continue;
            }
            let path = output_path(&request.out, images.len(), total)?;
            let record = GenerationRecord { batch: batch.clone(), row, ..plan.template.clone() };
            png::write(&path, &image, Some(&record))?;
            notes.push(path.display().to_string());
            images.push(image);
        }
        emitter.progress(number as u64 + 1, plan.batches.len() as u64, "batches");
    }
    if request.grid {
        let path = match request.out.extension() {
            Some(_) => request.out.with_extension("grid.png"),
            None => request.out.join("grid.png"),
        };
        png::write(&path, &grid(&images), None)?;
        notes.push(path.display().to_string());
    }
    let metrics = [("images/count".to_owned(), images.len() as f64)].into();
    Ok(JobReport { metrics, notes })
}

fn auto_compute(device: &deepgen_model::Device) -> burn::tensor::FloatDType {
    precision::compute_type(&PrecisionSettings::default(), device)
}

fn read_spec(folder: &Path) -> JobResult<ModelSpec> {
    let path = folder.join(SPEC_FILE);
    let text = std::fs::read_to_string(&path)
        .or_input(|| format!("{}: not a weights folder (`deepgen import-weights` makes one)", path.display()))?;
    serde_json::from_str(&text).or_input(|| path.display())
}

/// What is drawn.
struct Plan {
    batches: Vec<Vec<BatchRow>>,
    /// The record of every image but for its batch and row.
    template: GenerationRecord,
    /// The one row of the one batch that is wanted.
    only: Option<usize>,
}

impl Plan {
    fn new(
        request: &GenerateRequest,
        weights: &HashedPath,
        base: &BaseModelConfig,
        device: &str,
        compute: FloatKind,
    ) -> JobResult<Self> {
        let native = base.dit.sample_size * base.vae.downscale();
        let is_small = native < RELEASE.2;
        let (steps, cfg) = if is_small { SMALL } else { (RELEASE.0, RELEASE.1) };
        let [height, width] = request.size.unwrap_or([native.min(RELEASE.2); 2]);
        let unit = base.vae.downscale() * base.dit.patch_size;
        let largest = base.dit.pos_embed_max_size * unit;
        if height == 0 || width == 0 || height % unit != 0 || width % unit != 0 || height.max(width) > largest {
            return Err(JobError::input(format!(
                "an image of {height}x{width} pixels cannot be drawn: sides are multiples of {unit}, at most {largest}"
            )));
        }
        let mut rows = Vec::new();
        for (number, prompt) in request.prompts.iter().enumerate() {
            let images = prompt.images.iter().map(|path| hashed(path)).collect::<JobResult<Vec<_>>>()?;
            for copy in 0..request.count.max(1) {
                let noise = format!("generate/{number}/{copy}");
                rows.push(BatchRow { prompt: prompt.text.clone(), images: images.clone(), noise });
            }
        }
        if rows.is_empty() {
            return Err(JobError::input("there is no prompt"));
        }
        let mut batches: Vec<Vec<BatchRow>> = Vec::new();
        for row in rows {
            // Rows of a batch have the same number of references.
            match batches.last_mut() {
                Some(batch) if batch.len() < request.batch.max(1) && batch[0].images.len() == row.images.len() => {
                    batch.push(row);
                }
                _ => batches.push(vec![row]),
            }
        }
        let template = GenerationRecord {
            version: GENERATION_VERSION,
            deepgen_version: env!("CARGO_PKG_VERSION").into(),
            weights: weights.clone(),
            device: device.into(),
            compute,
            batch: Vec::new(),
            row: 0,
            steps: request.steps.unwrap_or(steps),
            cfg: request.cfg.unwrap_or(cfg),
            height,
            width,
            seed: request.seed,
            negative: request.negative.clone(),
        };
        Ok(Self { batches, template, only: None })
    }

    /// Plans the batch that an image was drawn in.
    fn repeating(record: GenerationRecord, weights: &HashedPath) -> JobResult<Self> {
        if record.weights.blake3 != weights.blake3 {
            return Err(JobError::input(format!(
                "the image was made with other weights: blake3 {}, not {} ({})",
                record.weights.blake3,
                weights.blake3,
                weights.path.display()
            )));
        }
        for image in record.batch.iter().flat_map(|row| &row.images) {
            let found = hashed(&image.path)?;
            if found.blake3 != image.blake3 {
                return Err(JobError::input(format!("the reference {} has changed since", image.path.display())));
            }
        }
        if record.row >= record.batch.len() {
            return Err(JobError::input("the image's record names a row that its batch does not have"));
        }
        let template = GenerationRecord { weights: weights.clone(), batch: Vec::new(), ..record.clone() };
        Ok(Self { batches: vec![record.batch], only: Some(record.row), template })
    }

    fn total(&self) -> usize {
        if self.only.is_some() { 1 } else { self.batches.iter().map(Vec::len).sum() }
    }

    fn order(&self, row: &BatchRow) -> JobResult<Order> {
        let references = row.images.iter().map(|image| self.reference(&image.path)).collect::<JobResult<_>>()?;
        Ok(Order { prompt: row.prompt.clone(), references, noise: row.noise.clone() })
    }

    /// References are squashed to the output's larger side, squared (docs/spec/evaluation.md section 0).
    fn reference(&self, path: &Path) -> JobResult<Pixels> {
        let bytes = std::fs::read(path).or_input(|| path.display())?;
        let image = decode(&bytes).or_input(|| path.display())?;
        let size = self.template.height.max(self.template.width) as u32;
        fit(&image, &ImageSettings { size, unit: 1, mode: ImageMode::Exact }).or_input(|| path.display())
    }
}

fn hashed(path: &Path) -> JobResult<HashedPath> {
    let blake3 = files::hash_file(path).or_input(|| format!("the reference image {}", path.display()))?;
    Ok(HashedPath { path: path.into(), blake3 })
}

/// Returns where image `number` of `total` goes, and makes its folder.
fn output_path(out: &Path, number: usize, total: usize) -> JobResult<PathBuf> {
    let is_file = out.extension().is_some_and(|ending| ending == "png");
    if is_file && total > 1 {
        return Err(JobError::input(format!("{total} images do not fit into one file: name a folder with --out")));
    }
    let path = if is_file { out.to_owned() } else { out.join(format!("{number:04}.png")) };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).or_io(|| format!("create {}", folder.display()))?;
    }
    Ok(path)
}

/// Lays images out side by side, row by row.
fn grid(images: &[RgbImage]) -> RgbImage {
    let columns = images.len().clamp(1, GRID_COLUMNS);
    let (width, height) = images.iter().fold((0, 0), |(w, h), image| (w.max(image.width()), h.max(image.height())));
    let rows = images.len().div_ceil(columns);
    let mut sheet = RgbImage::from_pixel(width * columns as u32, height * rows as u32, image::Rgb([255; 3]));
    for (i, image) in images.iter().enumerate() {
        let (x, y) = ((i % columns) as u32 * width, (i / columns) as u32 * height);
        image::imageops::replace(&mut sheet, image, i64::from(x), i64::from(y));
    }
    sheet
}
