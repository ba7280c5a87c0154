//! A problem in a file or on the command line: what is wrong, where, and the nearest valid name.
//!
//! Knows how problems look, not how they are found.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::sync::Arc;

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, NamedSource, SourceCode};

use super::tree::{NOT_TOML, Spot, Tree};

/// One problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// What is wrong: lower case, no full stop.
    pub message: String,
    /// Where; the first is the place to look at.
    pub labels: Vec<Label>,
    /// What to do about it.
    pub help: Option<String>,
}

/// A place and what is to be seen there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// Where.
    pub spot: Spot,
    /// What.
    pub text: String,
}

impl Diagnostic {
    /// Returns a problem without a place.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), labels: Vec::new(), help: None }
    }

    /// Adds a place.
    #[must_use]
    pub fn at(mut self, spot: &Spot, text: impl Into<String>) -> Self {
        self.labels.push(Label { spot: spot.clone(), text: text.into() });
        self
    }

    /// Adds the place of a value, and before it that of the reference that took it on.
    #[must_use]
    pub fn at_value(self, tree: &Tree, text: impl Into<String>) -> Self {
        match &tree.via {
            Some(via) => self.at(via, "this reference leads to it").at(&tree.spot, text),
            None => self.at(&tree.spot, text),
        }
    }

    /// Says what to do.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Says which of the valid names is nearest to `found`, or lists them.
    #[must_use]
    pub fn nearest<'a>(self, found: &str, valid: impl IntoIterator<Item = &'a str>) -> Self {
        let valid: Vec<&str> = valid.into_iter().collect();
        match nearest(found, &valid) {
            Some(name) => self.help(format!("did you mean `{name}`?")),
            None if valid.is_empty() => self,
            None => self.help(format!("valid: {}", quoted_list(&valid))),
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Returns the valid name that `found` was probably meant to be.
pub fn nearest<'a>(found: &str, valid: &[&'a str]) -> Option<&'a str> {
    let score = |name: &str| {
        // A name that holds the other whole, such as `lr` for `learning_lr`, is near whatever its length.
        let is_part = found.len() > 2 && (name.contains(found) || found.contains(name) && name.len() > 2);
        let edits = strsim::damerau_levenshtein(&found.to_lowercase(), &name.to_lowercase());
        let length = found.chars().count().max(name.chars().count());
        // Of two single letters each is near the other, which says nothing.
        let allowed = (length / 3).max(usize::from(length > 1));
        (edits <= allowed || is_part).then_some(edits)
    };
    valid.iter().filter_map(|name| Some((score(name)?, *name))).min().map(|(_, name)| name)
}

/// Returns the names in back quotes, with commas; the first twenty of a long list.
pub fn quoted_list(names: &[&str]) -> String {
    let mut text = names.iter().take(20).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > 20 {
        let _ = write!(text, " and {} more", names.len() - 20);
    }
    text
}

/// Leaves out repetitions, since one wrong line of a stage file shows in every node that uses it, and consequences.
pub fn distinct(problems: Vec<Diagnostic>) -> Vec<Diagnostic> {
    let mut seen = BTreeSet::new();
    let key = |problem: &Diagnostic| {
        let place = problem.labels.first().map(|label| (Arc::as_ptr(&label.spot.source) as usize, label.spot.start()));
        (problem.message.clone(), place)
    };
    // What follows from a line that could not be read is no problem of its own.
    let line = |problem: &Diagnostic| {
        problem.labels.first().map(|label| (Arc::as_ptr(&label.spot.source) as usize, label.spot.line()))
    };
    let is_syntax = |problem: &Diagnostic| problem.message.starts_with(NOT_TOML);
    let unread: BTreeSet<_> = problems.iter().filter(|problem| is_syntax(problem)).filter_map(line).collect();
    let mut distinct: Vec<Diagnostic> = problems
        .into_iter()
        .filter(|problem| is_syntax(problem) || line(problem).is_none_or(|line| !unread.contains(&line)))
        .filter(|problem| seen.insert(key(problem)))
        .collect();
    // From top to bottom of each file; the files in the order in which they were first complained about.
    let mut files: Vec<usize> = Vec::new();
    distinct.sort_by_cached_key(|problem| {
        problem.labels.first().map(|label| {
            let file = Arc::as_ptr(&label.spot.source) as usize;
            let at = files.iter().position(|known| *known == file).unwrap_or(files.len());
            if at == files.len() {
                files.push(file);
            }
            (at, label.spot.start())
        })
    });
    distinct
}

/// How problems are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Colours and box drawing, for a terminal.
    Terminal,
    /// ASCII, for a pipe or a file.
    Plain,
}

/// Returns all problems as a person reads them: each with file, line, column and caret.
pub fn render(diagnostics: &[Diagnostic], style: Style) -> String {
    let theme = match style {
        Style::Terminal => GraphicalTheme::unicode(),
        Style::Plain => GraphicalTheme::none(),
    };
    let handler =
        GraphicalReportHandler::new_themed(theme).with_links(false).with_width(120).without_syntax_highlighting();
    let mut text = String::new();
    for diagnostic in diagnostics {
        // Rendering into a string cannot fail.
        let _ = handler.render_report(&mut text, &Report::new(diagnostic));
        text.push('\n');
    }
    let num = diagnostics.len();
    let _ = writeln!(text, "{num} problem{}; nothing was started", if num == 1 { "" } else { "s" });
    text
}

/// The form in which the drawing library wants a problem: one source, byte ranges.
#[derive(Debug)]
struct Report {
    message: String,
    help: Option<String>,
    source: Option<NamedSource<String>>,
    labels: Vec<LabeledSpan>,
}

impl Report {
    fn new(diagnostic: &Diagnostic) -> Self {
        let first = diagnostic.labels.first().map(|label| &label.spot.source);
        let (mut labels, mut elsewhere) = (Vec::new(), Vec::new());
        for label in &diagnostic.labels {
            let spot = &label.spot;
            if Some(&spot.source) == first {
                let length =
                    spot.end().saturating_sub(spot.start()).max(usize::from(spot.start() < spot.source.text.len()));
                labels.push(LabeledSpan::new(Some(label.text.clone()), spot.start(), length));
            } else {
                elsewhere.push(format!("{}:{}: {}", spot.source.name, spot.line(), label.text));
            }
        }
        elsewhere.extend(diagnostic.help.clone());
        Self {
            message: diagnostic.message.clone(),
            help: (!elsewhere.is_empty()).then(|| elsewhere.join("\n")),
            source: first.map(|source| NamedSource::new(&*source.name, source.text.clone())),
            labels,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Report {}

impl miette::Diagnostic for Report {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.source.as_ref().map(|source| source as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        (!self.labels.is_empty())
            .then(|| Box::new(self.labels.iter().cloned()) as Box<dyn Iterator<Item = LabeledSpan>>)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_name_finds_its_neighbour_and_a_strange_one_does_not() {
        let valid = ["optimizer", "train", "trainable"];
        assert_eq!(nearest("optimiser", &valid), Some("optimizer"));
        assert_eq!(nearest("trian", &valid), Some("train"));
        assert_eq!(nearest("banana", &valid), None);
        assert_eq!(nearest("lrr", &["lr"]), Some("lr"));
    }
}
