//! Loading: a pipeline or an experiment by its path, with what the command line changes.

use std::path::Path;

use super::assignment::Assignment;
use super::diagnostic::Diagnostic;
use super::pipeline::Pipeline;
use super::project::Project;
use super::resolve::{Request, distinct, resolve};
use super::resolved::Resolved;
use super::stage_file::{PAPER_PROFILE, StageFile};
use super::sweep::Experiment;
use super::tree::{self, Source};

/// What the command line changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--profile`.
    pub profile: Option<String>,
    /// Each `--set node.key=value`.
    pub set: Vec<String>,
    /// `--smoke`: two steps of every stage.
    pub smoke: bool,
}

impl Overrides {
    fn request(&self, problems: &mut Vec<Diagnostic>) -> Request {
        let mut assignments = Vec::new();
        for argument in &self.set {
            match Assignment::parse(argument) {
                Ok(assignment) => assignments.push(assignment),
                Err(problem) => problems.push(problem),
            }
        }
        let profile = self.profile.as_deref().map(Request::profile_argument);
        Request { profile, assignments, is_smoke: self.smoke }
    }
}

/// What a file is, by what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// `[pipeline]`.
    Pipeline,
    /// `pipeline = "..."`.
    Experiment,
    /// `kind = "..."`.
    Stage,
}

fn kind_of(source: &std::sync::Arc<Source>) -> FileKind {
    let (tree, _) = tree::parse(source);
    match tree.get("pipeline").map(|pipeline| pipeline.text().is_some()) {
        Some(true) => FileKind::Experiment,
        None if tree.get("kind").is_some() => FileKind::Stage,
        // Only an experiment has variants; it may lack its first line.
        None if tree.get("variant").is_some() || tree.get("compare").is_some() => FileKind::Experiment,
        _ => FileKind::Pipeline,
    }
}

/// Loads a pipeline, or an experiment if the file is one.
///
/// # Errors
/// All problems that were found, in order; never an empty list.
pub fn load(path: &Path, overrides: &Overrides) -> Result<Resolved, Vec<Diagnostic>> {
    let mut problems = Vec::new();
    let request = overrides.request(&mut problems);
    let (mut project, source) = open(path, &problems)?;
    let resolved = match kind_of(&source) {
        FileKind::Experiment => Experiment::parse(&source, &mut problems)
            .and_then(|experiment| experiment.resolve(&mut project, path, &request, &mut problems)),
        FileKind::Pipeline => {
            let pipeline = Pipeline::parse(&source, &mut problems);
            let file = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            Some(resolve(&mut project, (&file, &pipeline), &request, &mut problems))
        }
        FileKind::Stage => {
            let problem = Diagnostic::new(format!("`{}` is a stage file", path.display()));
            problems.push(problem.help("a stage runs as a node of a pipeline: see `pipelines/`"));
            None
        }
    };
    match resolved {
        Some(resolved) if problems.is_empty() => Ok(resolved),
        _ => Err(distinct(problems)),
    }
}

/// Loads an experiment.
///
/// # Errors
/// All problems that were found, in order; never an empty list.
pub fn load_sweep(path: &Path, overrides: &Overrides) -> Result<Resolved, Vec<Diagnostic>> {
    let resolved = load(path, overrides)?;
    match resolved.sweep {
        Some(_) => Ok(resolved),
        None => Err(vec![
            Diagnostic::new(format!("`{}` is a pipeline, not an experiment", path.display()))
                .help(r#"an experiment names a pipeline, as pipeline = "pipelines/full.toml", and its variants"#),
        ]),
    }
}

/// Finds every problem of a file: of a pipeline under each of its profiles unless one is chosen, of a stage file by itself.
pub fn check(path: &Path, overrides: &Overrides) -> Vec<Diagnostic> {
    let (mut project, source) = match open(path, &[]) {
        Ok(opened) => opened,
        Err(problems) => return problems,
    };
    let mut problems = Vec::new();
    match kind_of(&source) {
        FileKind::Stage => {
            if let Some(stage) = StageFile::parse(&source, &mut problems) {
                stage.check(&mut problems);
            }
        }
        FileKind::Experiment => return load(path, overrides).err().unwrap_or_default(),
        FileKind::Pipeline => {
            let request = overrides.request(&mut problems);
            let pipeline = Pipeline::parse(&source, &mut problems);
            resolve(&mut project, (path, &pipeline), &request, &mut problems);
            if request.profile.is_none() {
                let mut profiles: Vec<String> = project.profiles().map(str::to_owned).collect();
                profiles.extend(pipeline.profiles.keys().cloned());
                profiles.push(PAPER_PROFILE.to_owned());
                profiles.sort();
                profiles.dedup();
                for profile in profiles {
                    let profile = Some(Request::profile_argument(&profile));
                    let request = Request { profile, ..request.clone() };
                    resolve(&mut project, (path, &pipeline), &request, &mut problems);
                }
            }
        }
    }
    distinct(problems)
}

fn open(path: &Path, so_far: &[Diagnostic]) -> Result<(Project, std::sync::Arc<Source>), Vec<Diagnostic>> {
    let with = |problem| so_far.iter().cloned().chain([problem]).collect::<Vec<_>>();
    let opened = || {
        if !path.is_file() {
            // Said first: a missing file is in no project either.
            Project::at(path.parent().unwrap_or(path)).read(path)?;
        }
        let project = Project::around(path)?;
        let source = project.read(path)?;
        Ok((project, source))
    };
    opened().map_err(with)
}
