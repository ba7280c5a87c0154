//! What an image must show for a prompt to be obeyed, as structured data, and the exact check against a scene.
//!
//! Knows neither the wording of prompts nor pixels: a judge reads a scene out of an image and asks here.

use serde::{Deserialize, Serialize};

use super::scene::{Cell, Colour, Object, Relation, Scene, Shape};

/// A row, a column, or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Row from the top, if it matters.
    pub row: Option<usize>,
    /// Column from the left, if it matters.
    pub col: Option<usize>,
}

impl Place {
    /// Returns whether `cell` is in this place.
    pub fn contains(self, cell: Cell) -> bool {
        self.row.is_none_or(|row| row == cell.row) && self.col.is_none_or(|col| col == cell.col)
    }
}

/// A relation to the object of another clause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// How this clause's object stands to the other.
    pub relation: Relation,
    /// Index in [`Expectation::include`] of the other clause.
    pub other: usize,
}

/// Objects that must be there, or with a count of zero must not.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clause {
    /// The shape.
    pub shape: Shape,
    /// How many.
    pub count: usize,
    /// Whether more than `count` is wrong: counting prompts and removals.
    pub exact: bool,
    /// Their colour, if it matters.
    pub colour: Option<Colour>,
    /// A relation that one of them must have, if any.
    pub relation: Option<Link>,
    /// Where they must be, if it matters.
    pub place: Option<Place>,
}

impl Clause {
    /// Returns a clause for at least one `shape`, with nothing else required.
    pub fn one(shape: Shape) -> Self {
        Self { shape, count: 1, exact: false, colour: None, relation: None, place: None }
    }

    /// Returns whether `object` has the shape, colour and place asked for; relations and counts are not looked at.
    pub fn matches(&self, object: &Object) -> bool {
        self.shape == object.shape
            && self.colour.is_none_or(|colour| colour == object.colour)
            && self.place.is_none_or(|place| place.contains(object.cell()))
    }
}

/// A word that must be there.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WordClause {
    /// Lower-case text.
    pub text: String,
    /// Row from the top, if it matters.
    pub row: Option<usize>,
}

/// Everything that an image must show.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expectation {
    /// Objects.
    pub include: Vec<Clause>,
    /// Words.
    pub words: Vec<WordClause>,
    /// Cells that an edit must leave as they are in its source; empty for a generation prompt.
    pub unchanged: Vec<Cell>,
}

impl Expectation {
    /// Returns whether `scene` satisfies clause `index` of `include`.
    pub fn clause_holds(&self, index: usize, scene: &Scene) -> bool {
        let clause = &self.include[index];
        let matching: Vec<&Object> = scene.objects.iter().filter(|object| clause.matches(object)).collect();
        let counted = if clause.exact { matching.len() == clause.count } else { matching.len() >= clause.count };
        let related = clause.relation.is_none_or(|Link { relation, other }| {
            let others = scene.objects.iter().filter(|object| self.include[other].matches(object));
            others.into_iter().any(|other| matching.iter().any(|one| relation.holds(one.cell(), other.cell())))
        });
        counted && related
    }

    /// Returns whether `scene` satisfies word `index` of `words`.
    pub fn word_holds(&self, index: usize, scene: &Scene) -> bool {
        let wanted = &self.words[index];
        scene.word.as_ref().is_some_and(|word| word.text == wanted.text && wanted.row.is_none_or(|row| row == word.row))
    }

    /// Returns whether every object and word is as it must be and, given the source of an edit, nothing else changed.
    pub fn is_met_by(&self, scene: &Scene, source: Option<&Scene>) -> bool {
        (0..self.include.len()).all(|index| self.clause_holds(index, scene))
            && (0..self.words.len()).all(|index| self.word_holds(index, scene))
            && source.is_none_or(|source| self.unchanged.iter().all(|&cell| scene.agrees_at(source, cell)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::scene::{Background, Word};
    use super::*;

    fn scene() -> Scene {
        Scene {
            objects: vec![
                Object { shape: Shape::Circle, colour: Colour::Red, row: 1, col: 0 },
                Object { shape: Shape::Square, colour: Colour::Blue, row: 1, col: 1 },
            ],
            word: Some(Word { text: "go".to_owned(), row: 0 }),
            background: Background::Black,
        }
    }

    #[test]
    fn every_part_of_a_clause_is_checked() {
        type Change = fn(&mut Clause);
        let table: [(Change, bool); 9] = [
            (|_| (), true),
            (|clause| clause.colour = Some(Colour::Red), true),
            (|clause| clause.colour = Some(Colour::Blue), false),
            (|clause| clause.count = 2, false),
            (|clause| (clause.count, clause.exact) = (0, true), false),
            (|clause| clause.place = Some(Place { row: Some(1), col: None }), true),
            (|clause| clause.place = Some(Place { row: Some(1), col: Some(1) }), false),
            (|clause| clause.relation = Some(Link { relation: Relation::LeftOf, other: 1 }), true),
            (|clause| clause.relation = Some(Link { relation: Relation::Above, other: 1 }), false),
        ];
        for (change, met) in table {
            let mut clause = Clause::one(Shape::Circle);
            change(&mut clause);
            let wanted = Expectation { include: vec![clause, Clause::one(Shape::Square)], ..Expectation::default() };
            assert_eq!(wanted.is_met_by(&scene(), None), met, "{wanted:?}");
        }
    }

    #[test]
    fn words_and_unchanged_cells_are_checked() {
        let word = |text: &str, row| Expectation {
            words: vec![WordClause { text: text.to_owned(), row }],
            ..Expectation::default()
        };
        assert!(word("go", None).is_met_by(&scene(), None));
        assert!(word("go", Some(0)).is_met_by(&scene(), None));
        assert!(!word("go", Some(1)).is_met_by(&scene(), None));
        assert!(!word("hi", None).is_met_by(&scene(), None));

        let mut source = scene();
        source.objects[0].colour = Colour::Green;
        let keep = |row, col| Expectation { unchanged: vec![Cell { row, col }], ..Expectation::default() };
        assert!(!keep(1, 0).is_met_by(&scene(), Some(&source)));
        assert!(keep(1, 1).is_met_by(&scene(), Some(&source)));
        assert!(keep(0, 1).is_met_by(&scene(), Some(&source)));
        source.word = None;
        assert!(!keep(0, 1).is_met_by(&scene(), Some(&source)));
    }
}
