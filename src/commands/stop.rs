//! `deepgen stop`: ends a run from any terminal, gently first.
//!
//! The process that holds the artifacts folder is the one to tell; where it has gone and left workers behind, these are
//! told themselves.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::artifacts_layout;
use super::status::choose_run;
use crate::cli::{Exit, Wrong};
use crate::environment;
use crate::exec::jobdir::JobDir;
use crate::progress::format::count;
use crate::run::event::NodeState;
use crate::run::scheduler::Cancel;
use crate::store::Layout;
use crate::store::glance::glance;
use crate::store::lock::{Holder, Lock};
use crate::store::runs::{self, RunView};

/// Time between two looks whether it has ended.
const POLL: Duration = Duration::from_millis(50);

/// Arguments of `deepgen stop`.
#[derive(Debug, clap::Args)]
pub struct StopArgs {
    /// Name of a run [default: the one that goes on]
    pub run: Option<String>,
    /// Kill the workers at once instead of letting them write a checkpoint; a second `deepgen stop` does the same
    #[arg(long)]
    pub now: bool,
    /// Do not wait for the end
    #[arg(long)]
    pub no_wait: bool,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// Tells the run to stop and waits until it has.
///
/// # Errors
/// When the run goes on on another host or is another one than was named.
pub fn stop(args: &StopArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let lock = layout.state().join("lock");
    let how = if args.now { Cancel::AtOnce } else { Cancel::Gently };
    let Some(holder) = Lock::holder(&lock)? else { return stop_orphans(&layout, args.run.as_deref(), how) };
    let Holder { pid, host, .. } = &holder;
    let run = run_of(&layout, &holder);
    match (&args.run, &run) {
        (_, None) => {
            let what = format!("process {pid} on {host} works in {} on no run", layout.root().display());
            return Err(Wrong(what).into());
        }
        (Some(asked), Some(run)) if asked != run => {
            choose_run(&layout, Some(asked))?;
            return Err(Wrong(format!("run {asked} does not go on; {run} does")).into());
        }
        _ => {}
    }
    if *host != environment::host() {
        return Err(Wrong(format!("the run goes on as process {pid} on {host}: stop it there")).into());
    }
    tell(*pid, how)?;
    let run = run.unwrap_or_default();
    if args.no_wait {
        println!("run {run} was told to stop");
        return Ok(Exit::Done);
    }
    if how == Cancel::Gently {
        eprintln!("stopping {run}: workers write a checkpoint first; `deepgen stop` once more stops at once");
    }
    while Lock::holder(&lock)?.is_some_and(|now| now == holder) {
        std::thread::sleep(POLL);
    }
    let view = glance(&layout.run(&run)).with_context(|| format!("cannot read run {run}"))?;
    println!("run {run}: {}", view.result.map_or("interrupted", |result| result.word()));
    for (node, step) in stopped(&view) {
        match step {
            Some(step) => println!("{node}: stopped at step {step}"),
            None => println!("{node}: stopped without a checkpoint of its own"),
        }
    }
    Ok(Exit::Done)
}

/// Sends what the orchestrator understands. Two signals of one kind may melt into one, so "at once" sends two kinds.
fn tell(pid: u32, how: Cancel) -> Result<()> {
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw).context("the lock names no process")?;
    kill_process(process, Signal::TERM).with_context(|| format!("cannot stop process {pid}"))?;
    if how == Cancel::AtOnce {
        // It may be gone already.
        let _ = kill_process(process, Signal::INT);
    }
    Ok(())
}

/// Returns the run that the holder of the lock works on.
fn run_of(layout: &Layout, holder: &Holder) -> Option<String> {
    let owner = (holder.pid, holder.host.clone());
    let is_its = |run: &String| {
        let view = glance(&layout.run(run)).ok();
        view.is_some_and(|view| view.result.is_none() && view.owners.last() == Some(&owner))
    };
    runs::list(layout).into_iter().rev().find(is_its)
}

fn stopped(view: &RunView) -> impl Iterator<Item = (&str, Option<u64>)> {
    view.nodes.iter().filter_map(|(node, seen)| match seen.state {
        NodeState::Stopped { step, .. } => Some((node.0.as_str(), step)),
        _ => None,
    })
}

/// Stops the workers of a run whose orchestrator has gone.
fn stop_orphans(layout: &Layout, run: Option<&str>, how: Cancel) -> Result<Exit> {
    let run = choose_run(layout, run)?;
    let view = glance(&layout.run(&run)).with_context(|| format!("cannot read run {run}"))?;
    let host = environment::host();
    let mut num = 0;
    for (node, seen) in view.nodes.iter().filter(|(_, seen)| seen.state.is_active()) {
        let dir = JobDir::new(&layout.jobs(), &seen.fingerprint);
        let worker = seen.state.attempt().and_then(|attempt| dir.live_worker(attempt, &host));
        if let Some(worker) = worker {
            worker.signal(how);
            println!("{node}: worker {} was told to stop; its orchestrator had gone", worker.pid);
            num += 1;
        }
    }
    match num {
        0 => println!("no run goes on in {}", layout.root().display()),
        num => println!("run {run}: {} told to stop", count(num, "worker")),
    }
    Ok(Exit::Done)
}
