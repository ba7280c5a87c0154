//! The project around a file: its root folder, its stage files, each read once, and the environment.
//!
//! The only part of `spec` that looks at the disk and the environment.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::diagnostic::Diagnostic;
use super::embedded;
use super::include::merged;
use super::location;
use super::stage_file::StageFile;
use super::tree::{Source, Spot};

/// Folder of the stage files, beside `pipelines/`.
const STAGES_DIR: &str = "stages";
/// Beginning of the name of a stage file that is built into the program.
pub const BUILT_IN: &str = "built-in ";
/// Folders of pipeline and experiment files: what lies in one of them belongs to the folder above.
const FILE_DIRS: [&str; 2] = ["pipelines", "experiments"];

/// A project folder with the stage files read so far.
#[derive(Debug)]
pub struct Project {
    /// The folder, absolute.
    pub root: PathBuf,
    /// Values that stand before the environment's.
    variables: BTreeMap<String, String>,
    stages: BTreeMap<String, Option<StageFile>>,
    /// Every file that was read, by its name.
    read: RefCell<BTreeMap<Arc<str>, Arc<Source>>>,
}

impl Project {
    /// Finds the project that `file` belongs to: the nearest ancestor with stage files; without any, the folder above
    /// `pipelines/` or `experiments/`; else the file's own folder.
    pub fn around(file: &Path) -> Result<Self, Diagnostic> {
        let file = std::path::absolute(file).map_err(|error| unreadable(file, &error))?;
        let file = location::normal(&file);
        let own = file.parent().unwrap_or(&file);
        let is_file_dir = || own.file_name().is_some_and(|name| FILE_DIRS.iter().any(|dir| name == *dir));
        let with_stages = file.ancestors().skip(1).find(|folder| !stage_files(folder).is_empty());
        let above = || own.parent().filter(|_| is_file_dir()).unwrap_or(own);
        Ok(Self::at(with_stages.unwrap_or_else(above)))
    }

    /// Returns the project at a folder, whether it has stage files or not.
    pub fn at(root: &Path) -> Self {
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
        let root = location::normal(&root);
        Self { root, variables: BTreeMap::new(), stages: BTreeMap::new(), read: RefCell::default() }
    }

    /// Lets values stand before the environment's.
    pub fn with_variables(mut self, variables: &BTreeMap<String, String>) -> Self {
        self.variables.clone_from(variables);
        self
    }

    /// Returns what a variable of the environment holds.
    pub fn variable(&self, name: &str) -> Option<String> {
        self.variables.get(name).cloned().or_else(|| std::env::var(name).ok())
    }

    /// Returns the name of a file in messages: relative to the root, if it lies below.
    pub fn name_of(&self, file: &Path) -> String {
        file.strip_prefix(&self.root).unwrap_or(file).to_string_lossy().into_owned()
    }

    /// Reads a file that `spot` names; a path is relative to the file that holds it.
    pub fn read_named(&self, path: &str, spot: &Spot) -> Result<Arc<Source>, Diagnostic> {
        let folder = &spot.source.folder;
        let problem = match self.read(&location::normal(&folder.join(path))) {
            Ok(source) => return Ok(source),
            Err(problem) => problem.at(spot, "named here, relative to this file"),
        };
        // Written as seen from the root, which is an easy mistake.
        if self.root.join(path).is_file() && folder.starts_with(&self.root) {
            let up = folder.strip_prefix(&self.root).map_or(0, |below| below.components().count());
            return Err(problem.help(format!("did you mean `{}{path}`?", "../".repeat(up))));
        }
        Err(match problem.help {
            Some(_) => problem,
            None => problem.help("correct the path, or take it out"),
        })
    }

    /// Reads a file under its name relative to the root.
    pub fn read(&self, file: &Path) -> Result<Arc<Source>, Diagnostic> {
        let text = std::fs::read_to_string(file).map_err(|error| unreadable(file, &error))?;
        let file = location::normal(&std::path::absolute(file).unwrap_or_else(|_| file.to_owned()));
        let folder = file.parent().unwrap_or(&self.root);
        let source = Source::file(self.name_of(&file), folder, text);
        self.read.borrow_mut().insert(source.name.clone(), source.clone());
        Ok(source)
    }

    /// Returns the text of every file read so far, by its name.
    pub fn sources(&self) -> BTreeMap<String, String> {
        self.read.borrow().iter().map(|(name, source)| (name.to_string(), source.text.clone())).collect()
    }

    /// Reads the stage file that is named at `spot`, unless it was read before.
    pub fn read_stage(&mut self, name: &str, spot: &Spot, problems: &mut Vec<Diagnostic>) {
        if self.stages.contains_key(name) {
            return;
        }
        let own = stage_files(&self.root);
        let valid: BTreeSet<&str> =
            own.iter().map(String::as_str).chain(embedded::STAGES.iter().map(|(name, _)| *name)).collect();
        if !valid.contains(name) {
            problems.push(
                Diagnostic::new(format!("there is no stage `{name}`"))
                    .at(spot, format!("no file {STAGES_DIR}/{name}.toml"))
                    .nearest(name, valid),
            );
            return;
        }
        let folder = self.root.join(STAGES_DIR);
        let source = match own.iter().any(|known| known == name) {
            true => self.read(&folder.join(format!("{name}.toml"))),
            false => {
                let text = embedded::stage(name).unwrap_or_default();
                let source = Source::file(format!("{BUILT_IN}{STAGES_DIR}/{name}.toml"), folder, text);
                self.read.borrow_mut().insert(source.name.clone(), source.clone());
                Ok(source)
            }
        };
        let stage = match source {
            Ok(source) => {
                let tree = merged(self, &source, problems);
                StageFile::parse(tree, problems)
            }
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

/// Returns the project folder that `file` belongs to; nothing when the working directory is gone.
pub fn root_around(file: &Path) -> Option<PathBuf> {
    Project::around(file).ok().map(|project| project.root)
}

/// Returns the names of the stage files below `root`, sorted.
pub fn stage_files(root: &Path) -> Vec<String> {
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
    let mut names: Vec<String> = beside.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let names: Vec<&str> = names.iter().map(String::as_str).filter(|name| name.ends_with(".toml")).collect();
    let found = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if error.kind() == std::io::ErrorKind::NotFound { problem.nearest(found, names) } else { problem }
}
