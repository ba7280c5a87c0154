//! The command line: which commands there are, how errors are shown, and the exit codes.
//!
//! Each command lives in [`crate::commands`]; this file parses, dispatches and turns the outcome into an exit code.

use std::fmt;
use std::io;
use std::panic;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::commands;
use crate::store::lock::LockError;

/// Declarative, resumable pipelines for training image generators.
///
/// A pipeline file wires stages into a graph; `run` computes what is not there yet and writes a report. Killed at any
/// moment, the same command goes on where it was.
#[derive(Debug, Parser)]
#[command(name = "deepgen", version, after_help = EXIT_HELP, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_HELP: &str = "Exit codes: 0 done, 1 a node failed or the run could not go on, 2 a file or the command line \
                         is wrong, 3 a bug, 4 another process works in the artifacts folder.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a new project that runs at once
    Init(commands::init::InitArgs),
    /// Say what this machine can do for a run, and what is missing
    Doctor(commands::doctor::DoctorArgs),
    /// Run a pipeline: compute every node whose result is not there yet
    Run(commands::run::RunArgs),
    /// Run all variants of an experiment as one plan, shared nodes once
    Sweep(commands::run::SweepArgs),
    /// Show what a run would do and why, without doing it
    Plan(commands::plan::PlanArgs),
    /// Show a node's settings with the origin of every value, and why it would run
    Explain(commands::explain::ExplainArgs),
    /// Declare that a node's change is without effect: its newest sealed result is used
    Accept(commands::accept::AcceptArgs),
    /// Compare two runs, two nodes or two results: settings, inputs, code, environment, numbers
    Diff(commands::diff::DiffArgs),
    /// Draw the graph of a pipeline as Mermaid, DOT or SVG
    Graph(commands::graph::GraphArgs),
    /// Print the command that makes a run again, and what is different now
    Reproduce(commands::reproduce::ReproduceArgs),
    /// Write one archive of all that a reader of a run needs
    Freeze(commands::freeze::FreezeArgs),
    /// Check a pipeline's files, or sealed artifacts
    Check(commands::check::CheckArgs),
    /// Show where a run stands; works while it goes on
    Status(commands::status::StatusArgs),
    /// Show what a node's worker said and printed
    Logs(commands::logs::LogsArgs),
    /// Show where the report of a run lies
    Report(commands::report::ReportArgs),
    /// List all runs
    Runs(commands::runs::RunsArgs),
    /// Watch a run that goes on elsewhere as if it had been started here
    Attach(commands::attach::AttachArgs),
    /// Stop a run from any terminal: workers write a checkpoint first
    Stop(commands::stop::StopArgs),
    /// Try again what a run left undone, exactly as it was planned then
    Retry(commands::retry::RetryArgs),
    /// Remove results and checkpoints that no kept run needs; dry unless told otherwise
    Gc(commands::gc::GcArgs),
    /// Print the JSON Schema of a kind of file, for editors
    Schema(commands::schema::SchemaArgs),
    /// Print a script that completes commands, and names of nodes, in a shell
    Completions(commands::completions::CompletionsArgs),
    /// Look through a source of data: counts, sizes, captions, what is broken
    Data(commands::data::DataArgs),
    /// Compare the resumable state with the journals, or make it again from them
    State(commands::state::StateArgs),
    /// Draw images from prompts, or make an image again from its own file
    Generate(commands::generate::GenerateArgs),
    /// Read weights of others: released folders, Hugging Face, diffusers, PEFT, whole-model checkpoints
    ImportWeights(commands::weights::ImportArgs),
    /// Write weights for others: released folders, a PEFT adapter, DeepGen's own names
    Export(commands::weights::ExportArgs),
    /// Send a run's settings, numbers and scores to an MLflow server; again, what came since
    ExportMlflow(commands::export_mlflow::ExportMlflowArgs),
}

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Everything asked for is done.
    Done = 0,
    /// A node failed, or the run could not go on.
    Failed = 1,
    /// A file or the command line is wrong; nothing was started.
    Wrong = 2,
    /// A bug of this program.
    Bug = 3,
    /// Another process holds the artifacts folder; nothing was started.
    Busy = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error of the person who asked, with what to do about it: ends with [`Exit::Wrong`].
#[derive(Debug)]
pub struct Wrong(pub String);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

/// Parses the command line, runs the command and returns the exit code.
pub fn main() -> ExitCode {
    start_logging();
    commands::completions::answer(Cli::command);
    let cli = Cli::parse();
    quiet_broken_pipes();
    // A panic is a bug and must not look like a failed node.
    match panic::catch_unwind(|| dispatch(&cli.command)) {
        Ok(Ok(exit)) => exit.into(),
        Ok(Err(error)) => {
            eprintln!("error: {error:#}");
            exit_of(&error).into()
        }
        // Who reads has gone, as `head` does: nobody is left to tell anything.
        Err(payload) if is_broken_pipe(payload.as_ref()) => Exit::Done.into(),
        Err(_) => {
            eprintln!("this is a bug in deepgen; the run is safe: the same command goes on with it");
            Exit::Bug.into()
        }
    }
}

fn exit_of(error: &anyhow::Error) -> Exit {
    if error.is::<Wrong>() {
        return Exit::Wrong;
    }
    match error.downcast_ref::<LockError>() {
        Some(LockError::Held { .. }) => Exit::Busy,
        _ => Exit::Failed,
    }
}

fn dispatch(command: &Command) -> anyhow::Result<Exit> {
    match command {
        Command::Init(args) => commands::init::init(args),
        Command::Doctor(args) => commands::doctor::doctor(args),
        Command::Run(args) => commands::run::run(args),
        Command::Sweep(args) => commands::run::sweep(args),
        Command::Plan(args) => commands::plan::plan(args),
        Command::Explain(args) => commands::explain::explain(args),
        Command::Accept(args) => commands::accept::accept(args),
        Command::Diff(args) => commands::diff::diff(args),
        Command::Graph(args) => commands::graph::graph(args),
        Command::Reproduce(args) => commands::reproduce::reproduce(args),
        Command::Freeze(args) => commands::freeze::freeze(args),
        Command::Check(args) => commands::check::check(args),
        Command::Status(args) => commands::status::status(args),
        Command::Logs(args) => commands::logs::logs(args),
        Command::Report(args) => commands::report::report(args),
        Command::Runs(args) => commands::runs::runs(args),
        Command::Attach(args) => commands::attach::attach(args),
        Command::Stop(args) => commands::stop::stop(args),
        Command::Retry(args) => commands::retry::retry(args),
        Command::Gc(args) => commands::gc::gc(args),
        Command::Schema(args) => commands::schema::schema(args),
        Command::Completions(args) => commands::completions::completions(args),
        Command::Data(args) => commands::data::data(args),
        Command::State(args) => commands::state::state(args),
        Command::Generate(args) => commands::generate::generate(args),
        Command::ImportWeights(args) => commands::weights::import(args),
        Command::Export(args) => commands::weights::export(args),
        Command::ExportMlflow(args) => commands::export_mlflow::export_mlflow(args),
    }
}

/// Standard output that is closed early is no bug: such a panic of `println!` says nothing.
fn quiet_broken_pipes() {
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !is_broken_pipe(info.payload()) {
            default(info);
        }
    }));
}

fn is_broken_pipe(payload: &(dyn std::any::Any + Send)) -> bool {
    let is_broken = |text: &String| text.starts_with("failed printing to stdout") && text.contains("Broken pipe");
    payload.downcast_ref::<String>().is_some_and(is_broken)
}

/// Returns what a command line that started a run changed in its pipeline; nothing when this program cannot read it.
pub fn overriding_of(command: &[String]) -> Option<commands::Overriding> {
    match Cli::try_parse_from(command).ok()?.command {
        Command::Run(args) => Some(args.overriding),
        Command::Sweep(args) => Some(args.overriding),
        _ => None,
    }
}

/// Logs for developers go to standard error; `RUST_LOG=deepgen=debug` shows more.
fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false).init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
