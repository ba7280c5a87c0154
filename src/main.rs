//! The `deepgen` program; see [`deepgen::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    deepgen::cli::main()
}
