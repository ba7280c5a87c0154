//! From a caption or an instruction back to what an image of it must show.
//!
//! The rule reward knows only the prompt and the image; the language is small enough to be understood exactly. The
//! source of an edit is not known here, so nothing is said about what must stay.

use deepgen_contract::shapes::{Clause, Colour, Expectation, Link, Place, Relation, Shape, ShapesWorld, WordClause};

use super::phrase::{COUNT_HINTS, NUMBERS, colour_hints, shape_hints};

/// Returns what an image must show for `text`, or nothing if the grammar has no such prompt.
pub fn expectation_of(text: &str, world: &ShapesWorld) -> Option<Expectation> {
    let text = text.trim().trim_end_matches('.').to_lowercase();
    let reader = Reader { last: world.cells - 1 };
    reader.edit(&text).or_else(|| reader.caption(&text))
}

/// Reads phrases in a world whose last row and column have this index.
struct Reader {
    last: usize,
}

impl Reader {
    fn edit(&self, text: &str) -> Option<Expectation> {
        let include = |include: Vec<Clause>| Some(Expectation { include, ..Expectation::default() });
        if let Some(rest) = text.strip_prefix("make the ") {
            let (what, colour) = match rest.split_once(" the colour of ") {
                Some((what, hint)) => (what, hinted_colour(hint)?),
                None => rest.rsplit_once(' ').and_then(|(what, colour)| Some((what, named_colour(colour)?)))?,
            };
            let clause = target(what)?;
            return include(vec![Clause { colour: Some(colour), ..clause }]);
        }
        if let Some(rest) = text.strip_prefix("change the word to ") {
            let words = vec![WordClause { text: quoted(rest)?, row: None }];
            return Some(Expectation { words, ..Expectation::default() });
        }
        if let Some(rest) = text.strip_prefix("change the ") {
            let (what, colour) = rest.split_once(" to ")?;
            let old = target(what)?;
            let new = Clause { colour: Some(named_colour(colour)?), ..old.clone() };
            return include(vec![new, Clause { count: 0, exact: true, ..old }]);
        }
        if let Some(rest) = text.strip_prefix("add ") {
            return include(vec![self.item(rest)?]);
        }
        if let Some(rest) = text.strip_prefix("remove the ") {
            return include(vec![Clause { count: 0, exact: true, ..target(rest)? }]);
        }
        let (old, new) = text.strip_prefix("replace the ")?.split_once(" with ")?;
        include(vec![self.item(new)?, Clause { count: 0, exact: true, ..target(old)? }])
    }

    fn caption(&self, text: &str) -> Option<Expectation> {
        let mut found = Expectation::default();
        if let Some(rest) = text.strip_prefix("as many ") {
            let (things, hint) = rest.split_once(" as ")?;
            let (count, _) = COUNT_HINTS.into_iter().find(|(_, known)| *known == hint)?;
            found.include.push(Clause { count, exact: true, ..plural(things)? });
            return Some(found);
        }
        if text.starts_with("the word ") || text.contains(" and the word ") {
            return self.words_and_items(text);
        }
        for relation in Relation::ALL {
            if let Some((one, other)) = text.split_once(&format!(" {} ", relation.name())) {
                let link = Some(Link { relation, other: 1 });
                found.include = vec![Clause { relation: link, ..self.item(one)? }, self.item(other)?];
                return Some(found);
            }
        }
        found.include = text.split(" and ").map(|part| self.item(part)).collect::<Option<_>>()?;
        Some(found)
    }

    fn words_and_items(&self, text: &str) -> Option<Expectation> {
        let mut found = Expectation::default();
        for part in text.split(" and ") {
            let Some(rest) = part.strip_prefix("the word ") else {
                found.include.push(self.item(part)?);
                continue;
            };
            let (word, place) = rest.split_once(' ').unwrap_or((rest, ""));
            let row = match place {
                "" => None,
                "at the top" => Some(0),
                "at the bottom" => Some(self.last),
                // A word fills its row and stands at the top or at the bottom, so a relation to it says which.
                place => {
                    let (row, item) = match place.strip_prefix("above ") {
                        Some(item) => (0, item),
                        None => (self.last, place.strip_prefix("below ")?),
                    };
                    found.include.push(self.item(item)?);
                    Some(row)
                }
            };
            found.words.push(WordClause { text: quoted(word)?, row });
        }
        Some(found)
    }

    /// Reads `a red circle`, `a red circle at the top left`, `three red squares`, `a shape with no corners in ..`.
    fn item(&self, text: &str) -> Option<Clause> {
        let (what, place) = match text.split_once(" at the ") {
            Some((what, place)) => (what, Some(self.corner(place)?)),
            None => (text, None),
        };
        let (first, rest) = what.split_once(' ')?;
        let clause = match first {
            "a" | "the" => match rest.strip_prefix("shape with ").or_else(|| rest.strip_prefix("object with ")) {
                Some(hints) => {
                    let (shape, colour) = hints.split_once(" in the colour of ")?;
                    Clause { colour: Some(hinted_colour(colour)?), ..Clause::one(hinted_shape(shape)?) }
                }
                None => singular(rest)?,
            },
            number => {
                let count = NUMBERS.iter().position(|&known| known == number)?;
                Clause { count, exact: true, ..plural(rest)? }
            }
        };
        Some(Clause { place, ..clause })
    }

    fn corner(&self, text: &str) -> Option<Place> {
        let (row, col) = text.split_once(' ')?;
        let side = |name: &str, near: &str, far: &str| match name {
            name if name == near => Some(0),
            name if name == far => Some(self.last),
            _ => None,
        };
        Some(Place { row: Some(side(row, "top", "bottom")?), col: Some(side(col, "left", "right")?) })
    }
}

/// Reads what an instruction points at: `circle`, `red circle`, `object with no corners`.
fn target(text: &str) -> Option<Clause> {
    match text.strip_prefix("object with ").or_else(|| text.strip_prefix("shape with ")) {
        Some(hint) => Some(Clause::one(hinted_shape(hint)?)),
        None => singular(text),
    }
}

fn singular(text: &str) -> Option<Clause> {
    noun(text, Shape::name)
}

fn plural(text: &str) -> Option<Clause> {
    noun(text, Shape::plural)
}

fn noun(text: &str, name: fn(Shape) -> &'static str) -> Option<Clause> {
    let (colour, shape) = match text.split_once(' ') {
        Some((colour, shape)) => (Some(named_colour(colour)?), shape),
        None => (None, text),
    };
    let shape = Shape::ALL.into_iter().find(|&known| name(known) == shape)?;
    Some(Clause { colour, ..Clause::one(shape) })
}

fn named_colour(text: &str) -> Option<Colour> {
    Colour::ALL.into_iter().find(|colour| colour.name() == text)
}

fn hinted_colour(text: &str) -> Option<Colour> {
    Colour::ALL.into_iter().find(|&colour| colour_hints(colour).contains(&text))
}

fn hinted_shape(text: &str) -> Option<Shape> {
    Shape::ALL.into_iter().find(|&shape| shape_hints(shape).contains(&text))
}

fn quoted(text: &str) -> Option<String> {
    let word = text.strip_prefix('"')?.strip_suffix('"')?;
    (!word.is_empty() && !word.contains('"')).then(|| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Expectation> {
        expectation_of(text, &ShapesWorld::default())
    }

    fn include(text: &str) -> Vec<Clause> {
        read(text).unwrap_or_else(|| panic!("`{text}` was not understood")).include
    }

    #[test]
    fn captions_are_understood() {
        let red = Clause { colour: Some(Colour::Red), ..Clause::one(Shape::Circle) };
        let blue = Clause { colour: Some(Colour::Blue), ..Clause::one(Shape::Square) };
        assert_eq!(include("a circle"), [Clause::one(Shape::Circle)]);
        assert_eq!(include("A red circle and a blue square."), [red.clone(), blue.clone()]);
        let link = Some(Link { relation: Relation::LeftOf, other: 1 });
        let beside = Clause { relation: link, ..red.clone() };
        assert_eq!(include("a red circle left of a blue square"), [beside, blue]);
        let place = Some(Place { row: Some(0), col: Some(1) });
        assert_eq!(include("a red circle at the top right"), [Clause { place, ..red }]);
        let three = Clause { count: 3, exact: true, ..Clause::one(Shape::Cross) };
        assert_eq!(include("three crosses"), [three]);
    }

    #[test]
    fn words_are_understood() {
        let word = |row| vec![WordClause { text: "go".to_owned(), row }];
        assert_eq!(read("the word \"go\"").unwrap().words, word(None));
        assert_eq!(read("the word \"go\" at the bottom").unwrap().words, word(Some(1)));
        let above = read("the word \"go\" above a red circle").unwrap();
        assert_eq!((above.words, above.include), (word(Some(0)), include("a red circle")));
        let full = read("a red circle at the top left and the word \"go\" at the bottom").unwrap();
        assert_eq!((full.words, full.include.len()), (word(Some(1)), 1));
    }

    #[test]
    fn implied_things_are_understood() {
        assert_eq!(include("the shape with three sides in the colour of the sky"), include("a blue triangle"));
        assert_eq!(include("a shape with no corners in the colour of blood"), include("a red circle"));
        assert_eq!(include("as many squares as a triangle has sides"), include("three squares"));
        assert_eq!(include("make the object with four sides the colour of grass"), include("make the square green"));
        assert_eq!(include("remove the object with no corners"), include("remove the circle"));
    }

    #[test]
    fn instructions_are_understood() {
        assert_eq!(include("make the circle blue"), include("a blue circle"));
        assert_eq!(include("add a red circle at the top left"), include("a red circle at the top left"));
        let gone = Clause { count: 0, exact: true, ..Clause::one(Shape::Square) };
        assert_eq!(include("remove the square"), vec![gone.clone()]);
        assert_eq!(include("replace the square with a circle"), [Clause::one(Shape::Circle), gone]);
        let changed = include("change the red circle to blue");
        assert_eq!(
            (changed[0].colour, changed[1].colour, changed[1].count),
            (Some(Colour::Blue), Some(Colour::Red), 0)
        );
        assert_eq!(read("change the word to \"hi\"").unwrap().words[0].text, "hi");
    }

    #[test]
    fn other_texts_are_not_understood() {
        for text in [
            "",
            "circle",
            "a pink circle",
            "a circle and",
            "five circles",
            "a photo of a dog",
            "make the circle",
            "change the word to hi",
            "the word \"\"",
            "a circle at the top",
            "as many circles as a fish has wheels",
            "remove the",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
