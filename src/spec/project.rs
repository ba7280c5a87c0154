//! The project around a file: its root folder and its stage files, each read once.
//!
//! The only part of `spec` that reads the disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::diagnostic::Diagnostic;
use super::stage_file::StageFile;
use super::tree::{Source, Spot};

/// Folder of the stage files, beside `pipelines/`.
const STAGES_DIR: &str = "stages";

/// A project folder with the stage files read so far.
#[derive(Debug)]
pub struct Project {
    /// The folder.
    pub root: PathBuf,
    stages: BTreeMap<String, Option<StageFile>>,
}

impl Project {
    /// Finds the project that `file` belongs to: the nearest ancestor with stage files.
    pub fn around(file: &Path) -> Result<Self, Diagnostic> {
        let file = std::path::absolute(file).map_err(|error| unreadable(file, &error))?;
        let root = file.ancestors().skip(1).find(|folder| !stage_names(folder).is_empty());
        match root {
            Some(root) => Ok(Self::at(root)),
            None => Err(Diagnostic::new(format!("`{}` is in no project", file.display()))
                .help("a project is a folder with stage files, `stages/*.toml`, and its pipelines lie below it")),
        }
    }

    /// Returns the project at a folder, whether it has stage files or not.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned(), stages: BTreeMap::new() }
    }

    /// Reads a file under its name relative to the root.
    pub fn read(&self, file: &Path) -> Result<Arc<Source>, Diagnostic> {
        let text = std::fs::read_to_string(file).map_err(|error| unreadable(file, &error))?;
        let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
        let name = file.strip_prefix(&self.root).unwrap_or(&file);
        Ok(Source::file(name.to_string_lossy(), text))
    }

    /// Reads the stage file that is named at `spot`, unless it was read before.
    pub fn read_stage(&mut self, name: &str, spot: &Spot, problems: &mut Vec<Diagnostic>) {
        let path = self.root.join(STAGES_DIR).join(format!("{name}.toml"));
        if self.stages.contains_key(name) {
            return;
        }
        let valid = stage_names(&self.root);
        if !valid.iter().any(|stage| stage == name) {
            problems.push(
                Diagnostic::new(format!("there is no stage `{name}`"))
                    .at(spot, format!("no file {STAGES_DIR}/{name}.toml"))
                    .nearest(name, valid.iter().map(String::as_str)),
            );
            return;
        }
        let stage = match self.read(&path) {
            Ok(source) => StageFile::parse(&source, problems),
            Err(problem) => {
                problems.push(problem);
                None
            }
        };
        self.stages.insert(name.to_owned(), stage);
    }

    /// Returns a stage file that was read and understood.
    pub fn stage(&self, name: &str) -> Option<&StageFile> {
        self.stages.get(name)?.as_ref()
    }

    /// Returns every profile that a stage file read so far knows.
    pub fn profiles(&self) -> impl Iterator<Item = &str> {
        self.stages.values().flatten().flat_map(|stage| stage.profiles.keys().map(String::as_str))
    }
}

/// Returns the names of the stage files below `root`, sorted.
fn stage_names(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join(STAGES_DIR)).into_iter().flatten().flatten();
    let files = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "toml"));
    // The manifests of the crates that implement stages lie one folder deeper.
    let mut names: Vec<String> = files.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    names
}

/// Describes a file that cannot be read, with the nearest name in its folder.
fn unreadable(file: &Path, error: &std::io::Error) -> Diagnostic {
    let problem = Diagnostic::new(format!("cannot read `{}`: {error}", file.display()));
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names: Vec<String> = beside.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).filter(|name| name.ends_with(".toml")).collect();
    let found = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if error.kind() == std::io::ErrorKind::NotFound { problem.nearest(found, names) } else { problem }
}
