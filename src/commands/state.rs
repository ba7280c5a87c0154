//! `deepgen state verify | rebuild`: the database behind `run`, compared with the journals or made again from them.
//!
//! `run` repairs it by itself; these are for people who want to see or force it.

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;

use super::artifacts_layout;
use crate::cli::Exit;
use crate::environment;
use crate::progress::format::now_ms;
use crate::store::lock::{Holder, Lock};
use crate::store::state::State;
use crate::store::verification::verify;

/// Arguments of `deepgen state`.
#[derive(Debug, clap::Args)]
pub struct StateArgs {
    /// What to do with it
    #[command(subcommand)]
    pub what: What,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR", global = true)]
    pub artifacts: Option<PathBuf>,
}

/// What to do with the state.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum What {
    /// Compare every row with the journals; exit code 1 when something differs
    Verify,
    /// Set the database aside and make it again from the journals
    Rebuild,
}

/// Verifies or rebuilds the state.
///
/// # Errors
/// When another process uses it, or it cannot be read or written.
pub fn state(args: &StateArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let holder = Holder { pid: std::process::id(), host: environment::host(), since_ms: now_ms() };
    let _lock = Lock::take(&layout.state().join("lock"), &holder)?;
    match args.what {
        What::Verify => {
            let found = verify(&layout)?;
            found.differences.iter().chain(&found.behind).for_each(|line| println!("{line}"));
            if found.differences.is_empty() {
                println!("the state agrees with the journals");
                return Ok(Exit::Done);
            }
            Ok(Exit::Failed)
        }
        What::Rebuild => {
            let (_, repairs) = State::rebuild(&layout, now_ms(), "asked for")?;
            repairs.iter().for_each(|repair| println!("{repair}"));
            Ok(Exit::Done)
        }
    }
}
