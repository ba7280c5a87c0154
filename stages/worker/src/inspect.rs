//! `data inspect`: looks through a source of data and prints what is there, for a person or as JSON.
//!
//! A thin layer over the data crate: it parses the request, writes the contact sheet and prints.

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use deepgen_contract::data::InspectRequest;
use deepgen_data::inspect::answer;

/// Answers a request.
///
/// # Errors
/// When the request makes no sense, the source cannot be read, or the sheet cannot be written.
pub fn run(request: &str) -> anyhow::Result<ExitCode> {
    let request: InspectRequest = serde_json::from_str(request).context("the request of `data inspect`")?;
    if let Some(folder) = request.sheet.as_deref().and_then(|sheet| Path::new(sheet).parent()) {
        // Before the source is looked through, which may take long.
        let is_there = folder.as_os_str().is_empty() || folder.is_dir();
        anyhow::ensure!(is_there, "the contact sheet's folder {} is not there", folder.display());
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let scratch = tempfile::tempdir().context("a folder for fetched files")?;
    let (found, picture) = answer(&request, scratch.path(), threads)?;
    let sheet = request.sheet.as_deref().map(Path::new).filter(|_| picture.is_some());
    if let (Some(path), Some(picture)) = (sheet, &picture) {
        picture
            .save_with_format(path, image::ImageFormat::Png)
            .with_context(|| format!("write the contact sheet {}", path.display()))?;
    }
    if request.sheet.is_some() && sheet.is_none() {
        eprintln!("note: none of the shown records has an image: there is no contact sheet");
    }
    let text = match request.json {
        true => format!("{}\n", serde_json::to_string_pretty(&found)?),
        false => found.table(sheet),
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // Who reads has gone, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        outcome => outcome.context("print what was found").map(|()| ExitCode::SUCCESS),
    }
}
