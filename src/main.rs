//! The `deepgen` program; see [`deepgen::cli`].

use std::process::ExitCode;

/// Plans are made of many small texts and tables.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    deepgen::cli::main()
}
