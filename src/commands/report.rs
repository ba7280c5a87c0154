//! `deepgen report [RUN]`: writes the report of a run anew and says where it lies.
//!
//! Opens no state and takes no lock, so it works while a run goes on.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::artifacts_layout;
use super::status::choose_run;
use crate::cli::Exit;
use crate::store::ArtifactStore;

/// Arguments of `deepgen report`.
#[derive(Debug, clap::Args)]
pub struct ReportArgs {
    /// Name of a run [default: the newest]
    pub run: Option<String>,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// Makes a run's report and prints its path.
///
/// # Errors
/// When there is no such run, it cannot be read, or the report cannot be written.
pub fn report(args: &ReportArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let run = choose_run(&layout, args.run.as_deref())?;
    let run_dir = layout.run(&run);
    let path = crate::report::write(&run_dir, &ArtifactStore::open(layout))
        .with_context(|| format!("cannot make the report of run {run}"))?;
    println!("{}", path.display());
    Ok(Exit::Done)
}
