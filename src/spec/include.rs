//! `include = ["other.toml"]`: the files that a file builds on, merged below it in order.
//!
//! Paths are relative to the file that holds them. Knows nothing of what the files say.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::diagnostic::Diagnostic;
use super::location;
use super::pieces;
use super::project::Project;
use super::tree::{Source, Spot, Tree, Value};

/// The key, at the top of a file.
pub const INCLUDE: &str = "include";

/// Returns a file's tree with those of the files it includes below it.
pub fn merged(project: &Project, source: &Arc<Source>, problems: &mut Vec<Diagnostic>) -> Tree {
    let mut open = vec![file_of(source)];
    let mut reader = Reader { project, problems, num_read: 0 };
    reader.tree(source, &mut open)
}

fn file_of(source: &Source) -> PathBuf {
    location::normal(&source.folder.join(Path::new(&*source.name).file_name().unwrap_or_default()))
}

struct Reader<'a> {
    project: &'a Project,
    problems: &'a mut Vec<Diagnostic>,
    num_read: usize,
}

impl Reader<'_> {
    /// Reads one file; `open` holds the files that are being read, outermost first.
    fn tree(&mut self, source: &Arc<Source>, open: &mut Vec<PathBuf>) -> Tree {
        let (mut tree, errors) = pieces::parse(source);
        self.problems.extend(errors);
        let included = tree.table_mut().and_then(|table| table.remove(INCLUDE));
        let Some(entry) = included else {
            self.rank(source);
            return tree;
        };
        let mut whole = Tree::empty(tree.spot.clone());
        for (path, spot) in self.paths(&entry.tree) {
            if let Some(below) = self.file(&path, &spot, source, open) {
                whole.merge(below);
            }
        }
        self.rank(source);
        whole.merge(tree);
        whole
    }

    fn rank(&mut self, source: &Source) {
        self.num_read += 1;
        // Each source is read by one reader, once.
        let _ = source.rank.set(self.num_read);
    }

    fn paths(&mut self, tree: &Tree) -> Vec<(String, Spot)> {
        let items = match &tree.value {
            Value::List(items) => items,
            _ => std::slice::from_ref(tree),
        };
        let mut paths = Vec::new();
        for item in items {
            match item.text() {
                Some(path) => paths.push((path.to_owned(), item.spot.clone())),
                None => {
                    let message = format!("`{INCLUDE}` is {}, but must be a list of files", item.value.kind());
                    let problem = Diagnostic::new(message).at(&item.spot, "expected a text");
                    self.problems.push(problem.help(r#"write include = ["other.toml"]"#));
                }
            }
        }
        paths
    }

    fn file(&mut self, path: &str, spot: &Spot, from: &Source, open: &mut Vec<PathBuf>) -> Option<Tree> {
        let file = location::normal(&from.folder.join(path));
        if let Some(at) = open.iter().position(|known| *known == file) {
            let name = |file: &PathBuf| self.project.name_of(file);
            let round: Vec<String> = open[at..].iter().chain([&file]).map(name).collect();
            let problem = Diagnostic::new(format!("files include each other: {}", round.join(" -> ")));
            self.problems.push(problem.at(spot, "closes the circle").help("take this one out"));
            return None;
        }
        match self.project.read_named(path, spot) {
            Ok(source) => {
                open.push(file);
                let tree = self.tree(&source, open);
                open.pop();
                Some(tree)
            }
            Err(problem) => {
                self.problems.push(problem);
                None
            }
        }
    }
}
