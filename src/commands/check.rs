//! `deepgen check`: every problem of some files, and nothing else.

use std::path::PathBuf;

use anyhow::Result;

use super::{Overriding, show};
use crate::cli::Exit;
use crate::spec;

/// Arguments of `deepgen check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Pipeline, experiment or stage files
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    #[command(flatten)]
    pub overriding: Overriding,
}

/// Checks the files, a pipeline under each of its profiles unless one is chosen.
///
/// # Errors
/// None: problems are shown and end with [`Exit::Wrong`].
pub fn check(args: &CheckArgs) -> Result<Exit> {
    let overrides = args.overriding.overrides();
    let problems: Vec<_> = args.files.iter().flat_map(|file| spec::check(file, &overrides)).collect();
    if problems.is_empty() {
        let num = args.files.len();
        println!("{num} file{}: no problems", if num == 1 { "" } else { "s" });
        return Ok(Exit::Done);
    }
    show(&problems);
    Ok(Exit::Wrong)
}
