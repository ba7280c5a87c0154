//! The `deepgen` program; see [`deepgen::cli`].

use std::process::ExitCode;

/// A plan of ten thousand nodes is millions of small allocations.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// mimalloc's number of the option `disallow_arena_alloc`, which the bindings do not name. Without it what is freed stays in
/// the arena and counts: twice the memory for a run of ten thousand nodes.
const DISALLOW_ARENA_ALLOC: libmimalloc_sys::mi_option_t = 26;

/// Commands that look and are gone: with an arena they ask the system for memory a few times instead of a thousand, and free none.
const BRIEF: [&str; 3] = ["report", "runs", "status"];

fn main() -> ExitCode {
    let is_brief = std::env::args_os().nth(1).is_some_and(|command| BRIEF.iter().any(|brief| command == *brief));
    if !is_brief {
        // SAFETY: sets a number that the allocator reads when it next needs pages.
        unsafe { libmimalloc_sys::mi_option_set(DISALLOW_ARENA_ALLOC, 1) }
    }
    deepgen::cli::main()
}
