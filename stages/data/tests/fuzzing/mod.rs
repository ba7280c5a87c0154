//! The harness of fuzz targets: damaged input made by mutation, with limits on time and memory (`make fuzz`).
//!
//! A case that fails is written to the temporary folder and named. `FUZZ_SECONDS` is the time of a target, 10 by default;
//! `FUZZ_SEED` repeats a run. Knows no format. Also a module of the model crate's tests.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longest time a case may take.
const CASE_LIMIT: Duration = Duration::from_secs(10);
/// Largest input that mutation makes, in bytes.
const MAX_INPUT: usize = 64 << 10;

/// Counts the bytes in use, and the most there were.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Numbers that look random (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 33) as usize % bound.max(1)
    }
}

/// Bytes that many formats give a meaning to; a target may add its own.
const TOKENS: [&[u8]; 8] = [
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0\0\0\0\0",
    b"\x80\0\0\0\0\0\0\0\0\0\xff\xff",
    b"../../etc/passwd",
    b"[[[[[[[[[[[[[[[[",
    b"null",
    b"\\ud800",
];

fn mutate(seeds: &[Vec<u8>], tokens: &[&[u8]], random: &mut Random) -> Vec<u8> {
    let token = |random: &mut Random| {
        let place = random.below(TOKENS.len() + tokens.len());
        *TOKENS.get(place).unwrap_or_else(|| &tokens[place - TOKENS.len()])
    };
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len());
        match random.below(9) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = random.next() as u8,
            2 => bytes.truncate(at),
            3 => {
                let token = token(random);
                let end = (at + token.len()).min(bytes.len());
                bytes.splice(at..end, token.iter().copied());
            }
            4 => {
                let token = token(random);
                bytes.splice(at..at, token.iter().copied());
            }
            5 => {
                let end = (at + random.below(600)).min(bytes.len());
                bytes.drain(at..end);
            }
            6 => {
                let end = (at + random.below(1200)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, part);
            }
            7 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            // Headers are at the front.
            _ if !bytes.is_empty() => {
                let at = random.below(bytes.len().min(64));
                bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)];
            }
            _ => {}
        }
    }
    bytes.truncate(MAX_INPUT);
    bytes
}

/// One target at a time: the count of memory is the program's.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// What a target is made of.
pub struct Target<'a> {
    /// Its name in messages.
    pub name: &'a str,
    /// Small valid files.
    pub seeds: &'a [Vec<u8>],
    /// Bytes that its formats give a meaning to.
    pub tokens: &'a [&'a [u8]],
    /// Most bytes that a case may use beyond what was in use before.
    pub memory: usize,
}

/// Feeds mutated seeds to `target` for the time given.
pub fn fuzz(Target { name, seeds, tokens, memory }: &Target<'_>, target: &dyn Fn(&[u8])) {
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (seconds, seed) = (number("FUZZ_SECONDS", 10), number("FUZZ_SEED", 1));
    let failed = std::env::temp_dir().join(format!("deepgen-fuzz-{name}-{}", std::process::id()));
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let started = Instant::now();
    // The watch ends the program when a case hangs, since nothing else can.
    let (case_started, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut num_cases = 0u64;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(100));
                let now = started.elapsed().as_millis() as u64;
                if now.saturating_sub(case_started.load(Ordering::Relaxed)) > CASE_LIMIT.as_millis() as u64 {
                    eprintln!("{name}: a case takes longer than {CASE_LIMIT:?}: {}", failed.display());
                    std::process::abort();
                }
            }
        });
        while started.elapsed() < Duration::from_secs(seconds) {
            let bytes = if num_cases < seeds.len() as u64 {
                seeds[num_cases as usize].clone()
            } else {
                mutate(seeds, tokens, &mut random)
            };
            std::fs::write(&failed, &bytes).unwrap();
            let before = IN_USE.load(Ordering::Relaxed);
            PEAK.store(before, Ordering::Relaxed);
            case_started.store(started.elapsed().as_millis() as u64, Ordering::Relaxed);
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target(&bytes)));
            let used = PEAK.load(Ordering::Relaxed).saturating_sub(before);
            let wrong = match outcome {
                Err(_) => Some("a panic".to_owned()),
                Ok(()) if used > *memory => Some(format!("{used} bytes of memory, more than {memory}")),
                Ok(()) => None,
            };
            if let Some(wrong) = wrong {
                is_over.store(true, Ordering::Relaxed);
                panic!("{name}, case {num_cases}: {wrong}: {}", failed.display());
            }
            num_cases += 1;
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let _ = std::fs::remove_file(&failed);
    println!("{name}: {num_cases} cases in {seconds} s");
}
