//! The words and phrases of the language about scenes, as tables that both speakers and readers use.
//!
//! Knows single phrases; how they make a prompt is in `caption`, `edit` and `question`, how one is understood in
//! `parse`.

use deepgen_contract::shapes::{Cell, Colour, Object, Scene, Shape, ShapesWorld, Word};

/// Words of the counts 0..=4.
pub(super) const NUMBERS: [&str; 5] = ["zero", "one", "two", "three", "four"];

/// Things that come in a number, as `as many squares as a triangle has sides` puts it.
pub(super) const COUNT_HINTS: [(usize, &str); 6] = [
    (2, "a person has eyes"),
    (2, "a bicycle has wheels"),
    (3, "a triangle has sides"),
    (3, "a traffic light has lamps"),
    (4, "a square has corners"),
    (4, "a dog has legs"),
];

/// Returns what a shape is described by where its name is not said, each after `with`.
pub(super) fn shape_hints(shape: Shape) -> [&'static str; 2] {
    match shape {
        Shape::Circle => ["no corners", "the outline of a wheel"],
        Shape::Square => ["four sides", "the outline of a window"],
        Shape::Triangle => ["three sides", "the outline of a tent"],
        Shape::Cross => ["two crossing bars", "the outline of a plus sign"],
        Shape::Diamond => ["one corner down", "the outline of a kite"],
    }
}

/// Returns what has this colour, each after `the colour of`.
pub(super) fn colour_hints(colour: Colour) -> [&'static str; 2] {
    match colour {
        Colour::Red => ["blood", "a tomato"],
        Colour::Green => ["grass", "a leaf"],
        Colour::Blue => ["the sky", "the sea"],
        Colour::Yellow => ["the sun", "a lemon"],
        Colour::Purple => ["grapes", "a plum"],
        Colour::White => ["snow", "milk"],
    }
}

/// Returns `red circle`.
pub(super) fn noun(shape: Shape, colour: Option<Colour>) -> String {
    colour.map_or_else(|| shape.name().to_owned(), |colour| format!("{} {}", colour.name(), shape.name()))
}

/// Returns `red circles`.
pub(super) fn plural_noun(shape: Shape, colour: Option<Colour>) -> String {
    colour.map_or_else(|| shape.plural().to_owned(), |colour| format!("{} {}", colour.name(), shape.plural()))
}

/// Returns `a red circle`.
pub(super) fn a(object: &Object) -> String {
    format!("a {}", noun(object.shape, Some(object.colour)))
}

/// Returns the cells that have a name: the corners, in reading order.
pub(super) fn corners(world: &ShapesWorld) -> [Cell; 4] {
    let last = world.cells - 1;
    [(0, 0), (0, last), (last, 0), (last, last)].map(|(row, col)| Cell { row, col })
}

/// Returns `top` or `bottom`.
pub(super) fn row_name(row: usize) -> &'static str {
    if row == 0 { "top" } else { "bottom" }
}

/// Returns `at the top left` for a corner.
pub(super) fn corner_name(corner: Cell) -> String {
    format!("at the {} {}", row_name(corner.row), if corner.col == 0 { "left" } else { "right" })
}

/// Returns `the word "go"`.
pub(super) fn quoted(word: &Word) -> String {
    format!("the word \"{}\"", word.text)
}

/// Returns everything that a scene shows, with its place: objects at corners in reading order, the word in its turn.
///
/// Places other than corners have no name; an object there is described as one at the nearest corner would be, so
/// only scenes with objects at corners are described exactly.
pub fn describe(scene: &Scene, world: &ShapesWorld) -> String {
    let mut parts: Vec<(Cell, String)> = scene
        .objects
        .iter()
        .map(|object| {
            let nearest = |place: usize| if 2 * place < world.cells { 0 } else { world.cells - 1 };
            let corner = Cell { row: nearest(object.row), col: nearest(object.col) };
            (object.cell(), format!("{} {}", a(object), corner_name(corner)))
        })
        .collect();
    if let Some(word) = &scene.word {
        parts.push((Cell { row: word.row, col: 0 }, format!("{} at the {}", quoted(word), row_name(word.row))));
    }
    parts.sort_by_key(|(cell, _)| *cell);
    let parts: Vec<String> = parts.into_iter().map(|(_, part)| part).collect();
    if parts.is_empty() { "nothing".to_owned() } else { parts.join(" and ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use deepgen_contract::shapes::Background;

    #[test]
    fn hints_are_distinct() {
        let mut shapes: Vec<_> = Shape::ALL.into_iter().flat_map(shape_hints).collect();
        let mut colours: Vec<_> = Colour::ALL.into_iter().flat_map(colour_hints).collect();
        for hints in [&mut shapes, &mut colours] {
            let all = hints.len();
            hints.sort_unstable();
            hints.dedup();
            assert_eq!(hints.len(), all);
        }
    }

    #[test]
    fn a_description_is_in_reading_order() {
        let world = ShapesWorld::default();
        let mut scene = Scene {
            objects: vec![Object { shape: Shape::Cross, colour: Colour::Red, row: 0, col: 1 }],
            word: Some(Word { text: "go".to_owned(), row: 1 }),
            background: Background::Black,
        };
        assert_eq!(describe(&scene, &world), "a red cross at the top right and the word \"go\" at the bottom");
        scene.objects[0].row = 1;
        scene.word = Some(Word { text: "go".to_owned(), row: 0 });
        assert_eq!(describe(&scene, &world), "the word \"go\" at the top and a red cross at the bottom right");
        scene.objects.clear();
        scene.word = None;
        assert_eq!(describe(&scene, &world), "nothing");
    }
}
