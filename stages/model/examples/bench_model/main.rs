//! `make bench-model`: times this crate beside PyTorch, with the same weights on the same threads, in one run. `make
//! bench-train` is its DiT beside diffusers' transformer.
//!
//! Each case is computed by both sides and compared, value and gradients, before it is timed; then the sides take turns, so
//! that whatever else the machine does falls on both. Prints minimum and median of each side, and of the ratios of
//! neighbouring turns the median with its 95 % interval: who is faster is known where 1 lies outside it.
//!
//! `bench_model [--python PROGRAM] [--modules torch|diffusers] [--threads 1,2] [--seconds S] [--only PART_OF_A_NAME]
//! [--clock wall|cpu]`
//!
//! `--modules diffusers` has the peer compute the DiT by that library's module instead of by plain torch functions.
//! `--clock cpu` takes each process's processor time, which on a busy machine is the fairer measure of one thread.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

mod parts;
mod peer;
mod whole;

use burn::tensor::TensorData;
use deepgen_model::weights::{StoredType, WeightFile, save};
use peer::Peer;

/// The worker's allocator.
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

/// Largest difference between the sides, relative to the largest element of a tensor.
const TOLERANCE: f64 = 1e-4;
/// The same for gradients of whole models, which sum over thousands of terms.
const GRADIENT_TOLERANCE: f64 = 1e-3;

/// Turns of each side that are taken at least, however long they are.
const LEAST_TURNS: usize = 9;
/// Seconds of a turn at least; a case that takes less is run several times.
const TURN_SECONDS: f64 = 0.03;

/// Something that is timed.
type Run = Box<dyn FnMut() + Send>;

/// Something both sides compute.
pub struct Case {
    /// What the table calls it.
    pub name: String,
    /// What the peer calls it.
    pub kind: &'static str,
    /// The peer's sizes.
    pub config: serde_json::Value,
    /// Weights and inputs.
    pub tensors: Vec<(String, TensorData)>,
    /// The forward without a tape; absent where there is none.
    pub forward: Option<Run>,
    /// Forward and backward, and the update where the case has one.
    pub step: Run,
    /// Values and gradients to compare.
    pub outputs: Box<dyn FnMut() -> Vec<(String, TensorData)> + Send>,
}

type Failure = Box<dyn std::error::Error>;

struct Options {
    python: Option<PathBuf>,
    modules: String,
    threads: Vec<usize>,
    seconds: f64,
    only: String,
    uses_cpu_clock: bool,
}

fn options() -> Result<Options, Failure> {
    let mut options = Options {
        python: None,
        modules: "torch".into(),
        threads: vec![1, 2],
        seconds: 2.0,
        only: String::new(),
        uses_cpu_clock: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--python" => options.python = Some(value.into()),
            "--modules" if value == "torch" || value == "diffusers" => options.modules = value,
            "--threads" => options.threads = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--seconds" => options.seconds = value.parse()?,
            "--only" => options.only = value,
            "--clock" if value == "cpu" => options.uses_cpu_clock = true,
            "--clock" if value == "wall" => {}
            _ => {
                let known = "--python, --modules torch|diffusers, --threads, --seconds, --only, --clock wall|cpu";
                return Err(format!("unknown option {name} {value}: {known}").into());
            }
        }
    }
    Ok(options)
}

fn main() -> Result<(), Failure> {
    keep_freed_memory();
    let options = options()?;
    let folder = tempfile::tempdir()?;
    let script = PathBuf::from("benches/model/peer.py");
    let mut peer = match &options.python {
        Some(python) => Peer::start(python, &script, &options.modules),
        None => Err("no --python was given (make bench-model PYTHON=...)".into()),
    };
    match &peer {
        Ok(peer) => println!(
            "deepgen-model beside PyTorch {} ({} modules); milliseconds, minimum / median\n",
            peer.version, options.modules
        ),
        Err(error) => println!("PyTorch cannot be run, so this times deepgen-model alone: {error}\n"),
    }
    println!("| case | threads | ours | PyTorch | ratio [95 %] | largest difference |\n|---|---|---|---|---|---|");
    let mut num_wrong = 0;
    let mut slower = Vec::new();
    let builders = parts::all().into_iter().chain(whole::all());
    for (name, build) in builders {
        if !name.contains(&options.only) {
            continue;
        }
        let mut case = build(name);
        let difference = match &mut peer {
            Ok(peer) => compare(&mut case, peer, folder.path())?,
            Err(_) => None,
        };
        num_wrong += usize::from(difference.as_ref().is_some_and(|(_, is_close)| !is_close));
        for &threads in &options.threads {
            slower.extend(report(&mut case, threads, peer.as_mut().ok(), &difference, &options)?);
        }
    }
    if peer.is_ok() {
        println!("\nslower than PyTorch beyond doubt: {}", slower.len());
        slower.iter().for_each(|line| println!("  {line}"));
    }
    match num_wrong {
        0 => Ok(()),
        _ => Err(format!("{num_wrong} cases do not compute what PyTorch computes").into()),
    }
}

/// Has both sides compute the case; returns the largest relative difference with its tensor, and whether it is small.
fn compare(case: &mut Case, peer: &mut Peer, folder: &Path) -> Result<Option<(String, bool)>, Failure> {
    let (inputs, outputs) = (folder.join("case.safetensors"), folder.join("out.safetensors"));
    save(&inputs, &case.tensors, StoredType::F32, &Default::default())?;
    peer.load(case.kind, &case.config, &inputs)?;
    case.tensors = Vec::new();
    peer.check(&outputs)?;
    let theirs = WeightFile::open(&outputs)?;
    let ours = (case.outputs)();
    let mut num_compared = 0;
    let (mut worst, mut is_close) = ((0.0, String::new()), true);
    let largest = |name: &str| -> Result<f32, Failure> {
        Ok(theirs.get(name)?.iter::<f32>().fold(0f32, |top, value| top.max(value.abs())))
    };
    // Some gradients are zero but for rounding (a key's bias under softmax): they are held against the largest one.
    let mut floor = 1e-6f32;
    for (name, _) in ours.iter().filter(|(name, _)| name.starts_with("gradient")) {
        floor = floor.max(1e-3 * largest(name)?);
    }
    for (name, data) in &ours {
        let expected: Vec<f32> = theirs.get(name)?.iter::<f32>().collect();
        let values: Vec<f32> = data.iter::<f32>().collect();
        if values.len() != expected.len() {
            return Err(
                format!("{}: {name} has {} elements, PyTorch {}", case.name, values.len(), expected.len()).into()
            );
        }
        num_compared += 1;
        let scale = largest(name)?.max(floor);
        let error = values.iter().zip(&expected).fold(0f32, |top, (a, b)| top.max((a - b).abs()));
        // NaN must not pass: `max` would drop it.
        let relative = if values.iter().all(|v| v.is_finite()) { f64::from(error / scale) } else { f64::INFINITY };
        is_close &= relative <= if name.starts_with("gradient") { GRADIENT_TOLERANCE } else { TOLERANCE };
        if relative >= worst.0 {
            worst = (relative, name.clone());
        }
    }
    if num_compared != theirs.names().count() {
        return Err(format!("{}: {num_compared} tensors here, {} there", case.name, theirs.names().count()).into());
    }
    let verdict = if is_close { "" } else { " WRONG" };
    Ok(Some((format!("{:.0e} of {num_compared} ({}){verdict}", worst.0, worst.1), is_close)))
}

/// Times both sides in turns and prints a line for the forward and one for the step; returns those in which this side is
/// slower beyond doubt.
fn report(
    case: &mut Case,
    threads: usize,
    mut peer: Option<&mut Peer>,
    difference: &Option<(String, bool)>,
    options: &Options,
) -> Result<Vec<String>, Failure> {
    let mut slower = Vec::new();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let sides: [(&str, Option<&mut Run>); 2] = [("forward", case.forward.as_mut()), ("step", Some(&mut case.step))];
    for (what, run) in sides {
        let Some(run) = run else { continue };
        let mut run_ours = |count: usize| -> Vec<f64> {
            let once = |_| {
                let start = now(options.uses_cpu_clock);
                run();
                now(options.uses_cpu_clock) - start
            };
            pool.install(|| (0..count).map(once).collect())
        };
        let mut run_theirs = |count: usize| -> Result<Vec<f64>, Failure> {
            let Some(peer) = &mut peer else { return Ok(Vec::new()) };
            let times = peer.time(what, count, threads, options.uses_cpu_clock)?;
            // PyTorch's idle threads spin for a moment; they should not do so in our time.
            std::thread::sleep(Duration::from_millis(5));
            Ok(times)
        };
        // The first run of each side warms caches and allocators; the second says how many fit into a turn.
        run_ours(1);
        let one = run_ours(1)[0].max(1e-6);
        run_theirs(2)?;
        let per_turn = (TURN_SECONDS / one).ceil().min(200.0) as usize;
        let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let start = Instant::now();
        while ratios.len() < LEAST_TURNS || start.elapsed().as_secs_f64() < options.seconds {
            // Each goes first in every other pair: a machine that gets slower does so for both.
            let is_ours_first = ratios.len() % 2 == 0;
            let early = if is_ours_first { run_ours(per_turn) } else { Vec::new() };
            let their_turn = run_theirs(per_turn)?;
            let our_turn = if is_ours_first { early } else { run_ours(per_turn) };
            ratios.push(our_turn.iter().sum::<f64>() / their_turn.iter().sum::<f64>());
            ours.extend(our_turn);
            theirs.extend(their_turn);
        }
        let cell = |side: Option<(f64, f64)>| {
            side.map_or("-".into(), |(min, median)| format!("{:.3} / {:.3}", min * 1e3, median * 1e3))
        };
        let (ours, theirs) = (summary(ours), summary(theirs));
        let [low, ratio, high] = median_with_interval(ratios);
        let text = if theirs.is_some() { format!("{ratio:.2} [{low:.2}, {high:.2}]") } else { "-".into() };
        let difference = difference.as_ref().map_or("-", |(text, _)| text.as_str());
        println!("| {}, {what} | {threads} | {} | {} | {text} | {difference} |", case.name, cell(ours), cell(theirs));
        if theirs.is_some() && low > 1.0 {
            slower.push(format!("{}, {what}, {threads} thread(s): {text}", case.name));
        }
    }
    Ok(slower)
}

/// Returns the median and the ends of its 95 % interval, which are two of the values: no distribution is assumed, and ranks
/// are those of the normal approximation to the binomial, which for the least number of turns is exact.
fn median_with_interval(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let num = values.len() as f64;
    let half_width = 1.96 * num.sqrt() / 2.0;
    let at_rank = |rank: f64| values[(rank.round().clamp(1.0, num) as usize) - 1];
    [at_rank(num / 2.0 - half_width), values[values.len() / 2], at_rank(num / 2.0 + 1.0 + half_width)]
}

/// Seconds of the wall's clock or of this process's processor time.
fn now(uses_cpu_clock: bool) -> f64 {
    use rustix::time::{ClockId, clock_gettime};
    let clock = if uses_cpu_clock { ClockId::ProcessCPUTime } else { ClockId::Monotonic };
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn summary(mut times: Vec<f64>) -> Option<(f64, f64)> {
    times.sort_by(f64::total_cmp);
    Some((*times.first()?, times[times.len() / 2]))
}
