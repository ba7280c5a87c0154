//! Names that mean the same everywhere in a pipeline file: `${pipeline.seed}`, and the variables that `[env]` declares.
//!
//! The environment is open only through that table: a variable that it does not declare cannot be read. Asks whoever
//! holds the environment for a value; does not know where the names are used.

use std::collections::BTreeMap;

use super::diagnostic::Diagnostic;
use super::fields::{Fields, ordered};
use super::tree::{Spot, Tree, Value};

/// First part of the names of variables.
pub const ENV: &str = "env";
/// First part of the names of the header, and in assignments: `pipeline.seed = 7`.
pub const HEADER: &str = "pipeline";
/// Name of the chosen profile in conditions.
pub const PROFILE: &str = "profile";

/// Types of a variable without a default.
const TYPES: [&str; 4] = ["text", "whole", "number", "truth"];

/// The names and their values.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    header: BTreeMap<&'static str, Tree>,
    env: BTreeMap<String, Option<Tree>>,
}

/// Answers what a variable of the environment holds.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Scope {
    /// Returns the scope of a file whose `[env]` is `env`.
    pub fn new(
        header: BTreeMap<&'static str, Tree>,
        env: Option<&Tree>,
        environment: Environment<'_>,
        problems: &mut Vec<Diagnostic>,
    ) -> Self {
        let mut scope = Self { header, env: BTreeMap::new() };
        let Some(tree) = env else { return scope };
        let Some(table) = tree.table() else {
            let message = format!("`{ENV}` is {}, but must be a table of variables", tree.value.kind());
            problems.push(Diagnostic::new(message).at(&tree.spot, "expected a table"));
            return scope;
        };
        for (name, spot, tree) in ordered(table) {
            scope.env.insert(name.to_owned(), variable((name, spot), tree, environment, problems));
        }
        scope
    }

    /// Returns the values of the variables, as they are used.
    pub fn values(&self) -> BTreeMap<String, String> {
        let text = |tree: &Tree| tree.text().map_or_else(|| tree.json().to_string(), str::to_owned);
        self.env.iter().filter_map(|(name, tree)| Some((name.clone(), text(tree.as_ref()?)))).collect()
    }

    /// Returns true for a name that belongs here and not to a node.
    pub fn owns(keys: &[String]) -> bool {
        keys.first().is_some_and(|key| key == ENV || key == HEADER)
    }

    /// Returns the value of a name written at `spot`; nothing, silently, for a variable whose problem is reported.
    pub fn get(&self, keys: &[String], spot: &Spot) -> Result<Option<Tree>, Diagnostic> {
        let unknown = |what: &str, name: &str, valid: Vec<&str>| {
            let problem = Diagnostic::new(format!("{what} `{name}`")).at(spot, "unknown name");
            if valid.is_empty() {
                return problem.help(format!("declare it: add {name} = \"its default\" to a table [env]"));
            }
            problem.nearest(name, valid)
        };
        match keys {
            [first, name] if first == ENV => match self.env.get(name) {
                Some(tree) => Ok(tree.clone()),
                None => Err(unknown("[env] declares no", name, self.env.keys().map(String::as_str).collect())),
            },
            [first, name] if first == HEADER => match self.header.get(name.as_str()) {
                Some(tree) => Ok(Some(tree.clone())),
                None => Err(unknown("`pipeline` has no", name, self.header.keys().copied().collect())),
            },
            _ => Err(Diagnostic::new(format!("`{}` is no name", keys.join(".")))
                .at(spot, "here")
                .help("write `env.NAME`, `pipeline.seed`, `pipeline.name` or `pipeline.profile`")),
        }
    }
}

/// Reads one variable: `NAME = default`, or a table that says more.
fn variable(
    (name, spot): (&str, &Spot),
    tree: &Tree,
    environment: Environment<'_>,
    problems: &mut Vec<Diagnostic>,
) -> Option<Tree> {
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        let problem = Diagnostic::new(format!("`{name}` is no name of a variable")).at(spot, "here");
        problems.push(problem.help("letters, digits and `_`"));
        return None;
    }
    let (mut default, mut kind) = (Some(tree.clone()), None);
    if tree.table().is_some() {
        let key = format!("{ENV}.{name}");
        let mut fields = Fields::new(&key, tree, &["default", "type", "description"], problems)?;
        fields.text("description");
        kind = fields.text("type");
        default = fields.tree("default").cloned();
    }
    let kind = match (&kind, &default) {
        (Some((kind, spot)), _) if !TYPES.contains(&kind.as_str()) => {
            let problem = Diagnostic::new(format!("unknown type `{kind}` of `{ENV}.{name}`")).at(spot, "no such type");
            problems.push(problem.nearest(kind, TYPES));
            return None;
        }
        (Some((kind, _)), _) => kind.as_str(),
        (None, Some(default)) => match default.value {
            Value::Bool(_) => "truth",
            Value::Int(_) => "whole",
            Value::Float(_) => "number",
            _ => "text",
        },
        (None, None) => "text",
    };
    if let Some(tree) = default.as_ref().filter(|tree| !fits(&tree.value, kind)) {
        let message = format!("the default of `{ENV}.{name}` is {}, but must be {}", tree.value.kind(), word(kind));
        problems.push(Diagnostic::new(message).at(&tree.spot, format!("expected {}", word(kind))));
        return None;
    }
    match (environment(name), default) {
        (Some(found), _) => match parsed(&found, kind) {
            Some(value) => Some(Tree { value, ..Tree::empty(spot.clone()) }),
            None => {
                let message =
                    format!("the variable {name} of the environment is `{found}`, but must be {}", word(kind));
                let problem = Diagnostic::new(message).at(spot, "declared here");
                problems.push(problem.help(format!("set {name} to {}, or unset it", word(kind))));
                None
            }
        },
        (None, Some(default)) => Some(default),
        (None, None) => {
            let problem =
                Diagnostic::new(format!("the variable {name} is not set in the environment")).at(spot, "required here");
            problems.push(problem.help(format!("set it ({name}=... deepgen ...), or give it a default here")));
            None
        }
    }
}

fn word(kind: &str) -> &'static str {
    match kind {
        "whole" => "a whole number",
        "number" => "a number",
        "truth" => "true or false",
        _ => "a text",
    }
}

fn fits(value: &Value, kind: &str) -> bool {
    match value {
        Value::Text(_) => kind == "text",
        Value::Int(_) => kind == "whole" || kind == "number",
        Value::Float(_) => kind == "number",
        Value::Bool(_) => kind == "truth",
        _ => false,
    }
}

fn parsed(text: &str, kind: &str) -> Option<Value> {
    match kind {
        "whole" => text.trim().parse().ok().map(Value::Int),
        "number" => text.trim().parse().ok().filter(|number: &f64| number.is_finite()).map(Value::Float),
        "truth" => match text.trim() {
            "true" | "1" => Some(Value::Bool(true)),
            "false" | "0" => Some(Value::Bool(false)),
            _ => None,
        },
        _ => Some(Value::Text(text.to_owned())),
    }
}
