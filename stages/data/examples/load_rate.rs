//! How many images a second one core decodes, resizes and normalises (`make bench-data`).
//!
//! `load_rate prepare SOURCE OUT` prepares a folder with `metadata.jsonl` or a tar shard; `load_rate time OUT SIZE` then
//! reads every sample once, in order, on one thread, and prints JSON: images, CPU and wall seconds. `load_rate dump OUT
//! SIZE N FILE` writes the numbers of the first N images, `width height values...` in f32 little endian, to compare.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use deepgen_contract::data::{FilterSettings, ImageMode, ImageSettings, InspectRequest, PrepareSettings};
use deepgen_data::dataset::PreparedDataset;
use deepgen_data::guess::guess;
use deepgen_data::prepare::{PreparePlace, prepare};
use deepgen_data::resize::{Pixels, fit};
use deepgen_data::source::DataSource;

/// The worker's allocator, which keeps what was freed for the next image.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// As in the worker.
const KEEP_FREED_MS: std::ffi::c_long = 10_000;

/// mimalloc's number of the option `purge_delay`, which the bindings do not name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    // SAFETY: sets a number that the allocator reads when it next frees.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, KEEP_FREED_MS) };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments {
        ["prepare", source, out] => {
            let source = guess(&InspectRequest { source: source.into(), ..InspectRequest::default() })?;
            let filters = FilterSettings { min_side: 80, min_aspect: 0.1, max_aspect: 10.0 };
            let settings = PrepareSettings { source, nominal_size: 0, filters, dedupe: false };
            let place = PreparePlace { seed: 0, project_root: Path::new("."), out_dir: Path::new(out), num_threads: 1 };
            prepare(&settings, &place, &mut |_| true)?;
        }
        ["time", out, size] => {
            let dataset = PreparedDataset::open(Path::new(out))?;
            let (started, cpu) = (Instant::now(), cpu_seconds()?);
            let mut sum = 0.0;
            for index in 0..dataset.len() {
                sum += f64::from(numbers(&dataset, index, size)?.values[0]);
            }
            let (cpu, wall) = (cpu_seconds()? - cpu, started.elapsed().as_secs_f64());
            println!("{{\"images\": {}, \"cpu\": {cpu}, \"wall\": {wall}, \"sum\": {sum}}}", dataset.len());
        }
        ["dump", out, size, count, file] => {
            let dataset = PreparedDataset::open(Path::new(out))?;
            let mut file = std::io::BufWriter::new(std::fs::File::create(file)?);
            for index in 0..dataset.len().min(count.parse()?) {
                let pixels = numbers(&dataset, index, size)?;
                for value in [pixels.width as f32, pixels.height as f32].iter().chain(&pixels.values) {
                    file.write_all(&value.to_le_bytes())?;
                }
            }
            file.flush()?;
        }
        _ => return Err("usage: load_rate prepare SOURCE OUT | time OUT SIZE | dump OUT SIZE N FILE".into()),
    }
    Ok(())
}

fn numbers(dataset: &PreparedDataset, index: u64, size: &str) -> Outcome<Pixels> {
    let settings = ImageSettings { size: size.parse()?, unit: 32, mode: ImageMode::FixPixels };
    Ok(fit(&dataset.get(index)?.image, &settings)?)
}

/// Returns the CPU time of this process, in seconds.
fn cpu_seconds() -> Outcome<f64> {
    let text = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // Fields 14 and 15 of proc(5), in hundredths of a second; the name before the bracket was cut off.
    let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / 100.0)
}
