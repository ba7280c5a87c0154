//! Loading: a pipeline or an experiment by its path, with what the command line changes.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::assignment::Assignment;
use super::diagnostic::Diagnostic;
use super::diagnostic::distinct;
use super::include::merged;
use super::project::Project;
use super::resolve::{Request, resolve};
use super::resolved::Resolved;
use super::stage_file::StageFile;
use super::sweep::Experiment;
use super::tree::Tree;

/// What the command line changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Overrides {
    /// `--profile`.
    pub profile: Option<String>,
    /// Each `--variant`, lowest first.
    pub variants: Vec<String>,
    /// Each `--set node.key=value`.
    pub set: Vec<String>,
    /// `--smoke`: two steps of every stage.
    pub smoke: bool,
    /// Values of variables that stand before the environment's.
    pub env: BTreeMap<String, String>,
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
        let variants = self.variants.iter().map(|name| Request::argument("variant", name)).collect();
        Request {
            profile: self.profile.as_deref().map(|name| Request::argument("profile", name)),
            variants,
            assignments,
            is_smoke: self.smoke,
        }
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

fn kind_of(tree: &Tree) -> FileKind {
    match tree.get("pipeline").map(|pipeline| pipeline.text().is_some()) {
        Some(true) => FileKind::Experiment,
        None if tree.get("kind").is_some() => FileKind::Stage,
        // Only an experiment has a list of variants; it may lack its first line.
        None if tree.get("variant").is_some_and(|variant| variant.table().is_none()) => FileKind::Experiment,
        None if tree.get("compare").is_some() || tree.get("axes").is_some() => FileKind::Experiment,
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
    let Some((mut project, tree)) = open(path, overrides, &mut problems) else { return Err(distinct(problems)) };
    let file = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let resolved = match kind_of(&tree) {
        FileKind::Experiment => Experiment::parse(&tree, &mut problems)
            .and_then(|experiment| experiment.resolve(&mut project, &file, &request, &mut problems)),
        FileKind::Pipeline => Some(resolve(&mut project, (&file, tree), &request, &mut problems).resolved),
        FileKind::Stage => {
            let problem = Diagnostic::new(format!("`{}` is a stage file", path.display()));
            let kind = tree.get("kind").map_or(&tree.spot, |kind| &kind.spot);
            problems.push(problem.at(kind, "says so").help("a stage runs as a node of a pipeline: see `pipelines/`"));
            None
        }
    };
    match resolved {
        Some(resolved) if problems.is_empty() => {
            Ok(Resolved { sources: project.sources(), overrides: overrides.clone(), ..resolved })
        }
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

/// Finds every problem of a file: of a pipeline under each of its profiles and variants unless one is chosen, of a stage
/// file by itself.
pub fn check(path: &Path, overrides: &Overrides) -> Vec<Diagnostic> {
    let mut problems = Vec::new();
    let Some((mut project, tree)) = open(path, overrides, &mut problems) else { return distinct(problems) };
    match kind_of(&tree) {
        FileKind::Stage => {
            if let Some(stage) = StageFile::parse(tree, &mut problems) {
                stage.check(&mut problems);
            }
        }
        FileKind::Experiment => {
            let request = overrides.request(&mut problems);
            if let Some(experiment) = Experiment::parse(&tree, &mut problems) {
                experiment.resolve(&mut project, path, &request, &mut problems);
            }
        }
        FileKind::Pipeline => {
            let request = overrides.request(&mut problems);
            let names = resolve(&mut project, (path, tree.clone()), &request, &mut problems);
            let mut again =
                |request: Request| drop(resolve(&mut project, (path, tree.clone()), &request, &mut problems));
            if request.profile.is_none() {
                for profile in &names.profiles {
                    again(Request { profile: Some(Request::argument("profile", profile)), ..request.clone() });
                }
            }
            if request.variants.is_empty() {
                for variant in &names.variants {
                    again(Request { variants: vec![Request::argument("variant", variant)], ..request.clone() });
                }
            }
        }
    }
    distinct(problems)
}

/// Returns the names that a pipeline, or the pipeline of an experiment, offers: for completion on the command line.
pub fn names(path: &Path) -> Option<Names> {
    let mut problems = Vec::new();
    let (mut project, mut tree) = open(path, &Overrides::default(), &mut problems)?;
    let mut file = path.to_owned();
    if kind_of(&tree) == FileKind::Experiment {
        file = Experiment::parse(&tree, &mut problems)?.pipeline_file();
        tree = merged(&project, &project.read(&file).ok()?, &mut problems);
    }
    // A file with problems still has names.
    let outcome = resolve(&mut project, (&file, tree), &Request::default(), &mut problems);
    let nodes = outcome.resolved.nodes.iter().map(|node| node.name.0.clone()).collect();
    Some(Names { nodes, profiles: outcome.profiles, variants: outcome.variants })
}

/// The names that a pipeline offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// Nodes under its own profile.
    pub nodes: Vec<String>,
    /// Profiles.
    pub profiles: Vec<String>,
    /// Variants.
    pub variants: Vec<String>,
}

fn open(path: &Path, overrides: &Overrides, problems: &mut Vec<Diagnostic>) -> Option<(Project, Tree)> {
    let opened = || {
        let project = Project::around(path)?.with_variables(&overrides.env);
        let source = project.read(path)?;
        Ok((project, source))
    };
    match opened() {
        Ok((project, source)) => {
            let tree = merged(&project, &source, problems);
            Some((project, tree))
        }
        Err(problem) => {
            problems.push(problem);
            None
        }
    }
}
