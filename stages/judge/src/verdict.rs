//! What is concluded about one image: whether it is right in everything, and graded parts.
//!
//! Knows neither judges nor benchmarks. A part carries a weight, so that a benchmark may pool it: word accuracy over
//! all words of all images is the weighted mean of the part `words`.

use serde::{Deserialize, Serialize};

/// Name of the part that holds `strict` as 0 or 1.
pub const STRICT: &str = "strict";
/// Name of the part that holds `graded`.
pub const GRADED: &str = "graded";

/// A graded component.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Name, such as `colours`.
    pub name: String,
    /// 0 to 1.
    pub value: f64,
    /// Things that were counted: words, questions, objects.
    pub weight: f64,
}

/// Conclusion about one image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// Right in everything that was asked.
    pub strict: bool,
    /// Mean of the components that were asked about, 0 to 1.
    pub graded: f32,
    /// Components, those that were not asked about left out.
    pub parts: Vec<Part>,
}

impl Verdict {
    /// Returns a part's value and weight; `strict` and `graded` are parts of weight 1.
    pub fn part(&self, name: &str) -> Option<(f64, f64)> {
        match name {
            STRICT => Some((f64::from(u8::from(self.strict)), 1.0)),
            GRADED => Some((f64::from(self.graded), 1.0)),
            _ => self.parts.iter().find(|part| part.name == name).map(|part| (part.value, part.weight)),
        }
    }

    /// Adds a part.
    pub fn push(&mut self, name: &str, value: f64, weight: f64) {
        self.parts.push(Part { name: name.to_owned(), value, weight });
    }
}
