//! `deepgen-worker JOB_DIR`: runs one job directory to its outcome. `deepgen-worker hash DIR`: prints a folder's blake3.
//! `deepgen-worker parity DIR`: compares with the tensors of the reference implementations.
//! `deepgen-worker data inspect REQUEST`: looks through a source of data.
//!
//! The one binary with Burn in it; knows no pipeline. The orchestrator starts it, and so can a person with a shell.

use std::path::Path;
use std::process::ExitCode;

use deepgen_contract::job::Outcome;

mod advantage;
mod base_folder;
mod best;
mod checkpoint;
mod device;
mod ema;
mod emit;
mod error;
mod feed;
mod files;
mod fit;
mod flow_step;
mod foreign;
mod frozen_cache;
mod gpu;
mod guard;
mod inspect;
mod items;
mod job;
mod learner;
mod meter;
mod micro_batches;
mod model_folder;
mod nft;
mod objective;
mod optimize;
mod padded_ids;
mod painter;
mod parity;
mod png;
mod precision;
mod rewards;
mod rollout;
mod samples;
mod sampling;
mod scene_heads;
mod spikes;
mod stages;
mod suspects;
mod tensorboard;
mod tools;
mod warm_start;

/// Training frees and asks for the same large arrays at every step; this allocator hands them out again without clearing.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Milliseconds for which freed memory is kept: a step asks for the same arrays again, and giving them back in between
/// would cost a quarter of its time.
const KEEP_FREED_MS: std::ffi::c_long = 10_000;

/// mimalloc's number of the option `purge_delay`, which the bindings do not name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

fn keep_freed_memory() {
    // SAFETY: sets a number that the allocator reads when it next frees.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, KEEP_FREED_MS) }
}

const USAGE: &str = "usage: deepgen-worker JOB_DIR    run the job described by JOB_DIR/job.json
       deepgen-worker hash DIR   print the blake3 over a folder's files
       deepgen-worker tool DIR   do what DIR/tool.json asks for
       deepgen-worker features   print the devices that this binary was built for
       deepgen-worker data inspect REQUEST   look through a source of data; REQUEST is JSON, such as
                                 '{\"source\": \"sets/a\"}' (deepgen data inspect SOURCE writes it)";

/// Returns the devices that this binary was built for.
fn features() -> Vec<&'static str> {
    let built = [("cpu", true), ("wgpu", cfg!(feature = "wgpu")), ("cuda", cfg!(feature = "cuda"))];
    built.into_iter().filter(|(_, is_built)| *is_built).map(|(name, _)| name).collect()
}

fn main() -> ExitCode {
    keep_freed_memory();
    // SAFETY: no other thread runs yet. Burn's default device prefers CUDA and panics on a machine without one.
    unsafe { std::env::set_var("BURN_DEVICE", "flex") };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.as_slice() {
        [verb, rest @ ..] if verb == "parity" => return parity::run(rest),
        [verb, folder] if verb == "hash" => print_hash(Path::new(folder)),
        [verb] if verb == "features" => {
            println!("{}", features().join(", "));
            return ExitCode::SUCCESS;
        }
        [noun, verb, request] if noun == "data" && verb == "inspect" => inspect::run(request),
        [verb, folder] if verb == "tool" => tools::run(Path::new(folder)).map(exit_code),
        [folder] => run_job(Path::new(folder)),
        _ => {
            eprintln!("{USAGE}\n       {}", parity::USAGE);
            return ExitCode::from(2);
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}

fn print_hash(folder: &Path) -> anyhow::Result<ExitCode> {
    println!("{}", files::hash_folder(folder)?);
    Ok(ExitCode::SUCCESS)
}

fn run_job(folder: &Path) -> anyhow::Result<ExitCode> {
    job::run(folder).map(exit_code)
}

fn exit_code(outcome: Outcome) -> ExitCode {
    match outcome {
        Outcome::Done { .. } | Outcome::Stopped { .. } => ExitCode::SUCCESS,
        Outcome::Failed { message, .. } => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}
