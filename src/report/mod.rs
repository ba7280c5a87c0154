//! The report of a run: one self-contained HTML file that works offline and, for all it says, without JavaScript.
//!
//! [`read`] gathers everything from the run's folder, its sealed artifacts and its job directories; [`render`] is a pure
//! function of that. Knows no state and takes no lock, so a report can be made while a run goes on.

mod chart;
mod curves;
mod dag;
mod data;
mod differences;
#[cfg(test)]
mod fixture;
mod layout;
mod markup;
mod page;
#[cfg(test)]
mod picture;
mod plan_drawing;
mod provenance;
mod read;
mod sample_grid;
mod samples;
mod score_table;
mod series;
mod sweep_table;
#[cfg(test)]
mod tests;
mod training_samples;
mod trouble;

use std::path::{Path, PathBuf};

pub use data::{NodeReport, ReportData};
pub use page::render;
pub use plan_drawing::svg as plan_svg;
pub use provenance::command;
pub use read::read;
pub use trouble::quoted;

use crate::store::journal::JournalError;
use crate::store::{ArtifactStore, external};

/// Name of the report in a run's folder.
pub const REPORT_FILE: &str = "report.html";

/// A report that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The run's journal cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The run's plan cannot be read, or the report cannot be written.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Makes the report of a run anew and returns its path.
///
/// # Errors
/// When the run cannot be read or the file cannot be written.
pub fn write(run_dir: &Path, store: &ArtifactStore) -> Result<PathBuf, ReportError> {
    let page = render(&read(run_dir, store)?);
    let path = run_dir.join(REPORT_FILE);
    external::write_atomically(&path, page.as_bytes())?;
    Ok(path)
}
