//! `deepgen export-mlflow [RUN] --uri URL`: a run's settings, numbers and scores for an MLflow server.
//!
//! Takes no lock, so it works while a run goes on; again, it sends what came since.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::artifacts_layout;
use super::status::choose_run;
use crate::cli::{Exit, Wrong};
use crate::mlflow::client::{Client, MlflowError};
use crate::mlflow::export::export;
use crate::mlflow::record::records;
use crate::progress::format::count;
use crate::report;
use crate::store::ArtifactStore;

/// Variable in which MLflow's own client looks for a token, too.
const TOKEN: &str = "MLFLOW_TRACKING_TOKEN";

/// Arguments of `deepgen export-mlflow`.
#[derive(Debug, clap::Args)]
pub struct ExportMlflowArgs {
    /// Name of a run [default: the newest]
    pub run: Option<String>,
    /// Address of the server, such as http://127.0.0.1:5000
    #[arg(long, value_name = "URL")]
    pub uri: String,
    /// Experiment of MLflow, made if there is none [default: the pipeline's name]
    #[arg(long, value_name = "NAME")]
    pub experiment: Option<String>,
    /// Folder of all results [default: artifacts/ in the project]
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
}

/// Exports a run and says where it is found.
///
/// # Errors
/// When there is no such run, it cannot be read, or the server does not answer or refuses.
pub fn export_mlflow(args: &ExportMlflowArgs) -> Result<Exit> {
    let layout = artifacts_layout(args.artifacts.as_deref())?;
    let run = choose_run(&layout, args.run.as_deref())?;
    let run_dir = layout.run(&run);
    let store = ArtifactStore::open(layout);
    let data = report::read(&run_dir, &store).with_context(|| format!("cannot read run {run}"))?;
    let client = Client::new(&args.uri, std::env::var(TOKEN).ok()).map_err(|error| Wrong(error.to_string()))?;
    let experiment = args.experiment.as_deref().unwrap_or(&data.view.pipeline);
    let told = export(&client, experiment, &run, &records(&data, &store)).map_err(|error| match error {
        MlflowError::Refused { status: 401 | 403, .. } => {
            anyhow::anyhow!("{error}; {TOKEN} holds the token that the server asks for")
        }
        error => error.into(),
    })?;
    println!(
        "{run}: {} made, {} gone on with, {} sent",
        count(told.num_created, "run"),
        count(told.num_continued, "run"),
        count(told.num_points, "number"),
    );
    println!("{}/#/experiments/{}/runs/{}", client.uri(), told.experiment, told.parent);
    Ok(Exit::Done)
}
