//! `data inspect`: looks through a source of data and prints what is there, for a person or as JSON.
//!
//! A thin layer over the data crate: it parses the request, writes the contact sheet and prints.

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
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let scratch = tempfile::tempdir().context("a folder for fetched files")?;
    let (found, picture) = answer(&request, scratch.path(), threads)?;
    let sheet = request.sheet.as_deref().map(Path::new).filter(|_| picture.is_some());
    if let (Some(path), Some(picture)) = (sheet, &picture) {
        picture.save(path).with_context(|| format!("write the contact sheet {}", path.display()))?;
    }
    match request.json {
        true => println!("{}", serde_json::to_string_pretty(&found)?),
        false => print!("{}", found.table(sheet)),
    }
    Ok(ExitCode::SUCCESS)
}
