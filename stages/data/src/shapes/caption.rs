//! Scenes with a caption, of every kind that is not an edit or a question.
//!
//! A caption says only part of what its scene shows; the rest is drawn by chance, as in real data.

use deepgen_contract::shapes::{
    Cell, Colour, Object, Placement, PromptKind, Relation, Scene, Shape, ShapesWorld, Word,
};

use super::draw::Draw;
use super::parse::expectation_of;
use super::phrase::{
    COUNT_HINTS, NUMBERS, a, colour_hints, corner_name, corners, describe, noun, plural_noun, quoted, row_name,
    shape_hints,
};
use super::prompt::{MAX_ATTEMPTS, Prompt, ShapesError, Split};

/// Most objects and words of a scene that is described in full: more would make captions longer than small models read.
const MAX_DESCRIBED: usize = 2;
/// Share of fully described scenes that have a word.
const DESCRIBED_WORD_SHARE: f64 = 0.25;

/// A scene and what is said of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Captioned {
    /// What the image shows.
    pub scene: Scene,
    /// The caption.
    pub prompt: Prompt,
}

/// Draws a scene with a caption of `kind`.
///
/// # Errors
/// When `kind` is no kind of caption, or the world has no such caption on this side of the split.
pub fn caption(world: &ShapesWorld, kind: PromptKind, split: Split, draw: &mut Draw) -> Result<Captioned, ShapesError> {
    for _ in 0..MAX_ATTEMPTS {
        let (scene, text) = compose(world, kind, draw)?;
        if split.admits(kind, &text) {
            let expectation = expectation_of(&text, world).expect("the parser knows every caption of the grammar");
            return Ok(Captioned { scene, prompt: Prompt { kind, text, expectation } });
        }
    }
    Err(ShapesError::NoPrompt { kind, split })
}

fn compose(world: &ShapesWorld, kind: PromptKind, draw: &mut Draw) -> Result<(Scene, String), ShapesError> {
    let mut scene = Scene { objects: Vec::new(), word: None, background: draw.pick(&world.backgrounds) };
    let text = match kind {
        PromptKind::Single | PromptKind::Colour | PromptKind::ImplicitObject => {
            let cell = any_cells(world, draw, 1)[0];
            let object = any_object(world, draw, cell);
            scene.objects.push(object);
            match kind {
                PromptKind::Single => format!("a {}", noun(object.shape, None)),
                PromptKind::Colour => a(&object),
                _ => {
                    let shape = draw.pick(&shape_hints(object.shape));
                    format!("a shape with {shape} in the colour of {}", draw.pick(&colour_hints(object.colour)))
                }
            }
        }
        PromptKind::Where => {
            let cell = draw.pick(&corners(world));
            let object = any_object(world, draw, cell);
            scene.objects.push(object);
            format!("{} {}", a(&object), corner_name(cell))
        }
        PromptKind::Two | PromptKind::Attr => {
            let (shapes, colours) = (draw.sample(&world.shapes, 2), draw.sample(&world.colours, 2));
            let free = [draw.pick(&world.colours), draw.pick(&world.colours)];
            for (i, cell) in any_cells(world, draw, 2).into_iter().enumerate() {
                let colour = if kind == PromptKind::Attr { colours[i] } else { free[i] };
                scene.objects.push(at(cell, shapes[i], colour));
            }
            scene.sort();
            let named = |object: &Object| noun(object.shape, (kind == PromptKind::Attr).then_some(object.colour));
            format!("a {} and a {}", named(&scene.objects[0]), named(&scene.objects[1]))
        }
        PromptKind::Count | PromptKind::ImplicitCount => {
            let (number, hint) = draw.pick(&COUNT_HINTS);
            let (shape, colour) = (draw.pick(&world.shapes), draw.pick(&world.colours));
            scene.objects = any_cells(world, draw, number).into_iter().map(|cell| at(cell, shape, colour)).collect();
            scene.sort();
            let things = plural_noun(shape, draw.chance(0.5).then_some(colour));
            match kind {
                PromptKind::Count => format!("{} {things}", NUMBERS[number]),
                _ => format!("as many {things} as {hint}"),
            }
        }
        PromptKind::Position => {
            let relation = draw.pick(&Relation::ALL);
            let shapes = draw.sample(&world.shapes, 2);
            let mut along = open_choice(world, draw, &Vec::from_iter(0..world.cells), 2);
            let line = open_choice(world, draw, &Vec::from_iter(0..world.cells), 1)[0];
            along.sort_unstable();
            if matches!(relation, Relation::RightOf | Relation::Below) {
                along.reverse();
            }
            let cell = |place| match relation {
                Relation::LeftOf | Relation::RightOf => Cell { row: line, col: place },
                Relation::Above | Relation::Below => Cell { row: place, col: line },
            };
            let objects = [0, 1].map(|i| at(cell(along[i]), shapes[i], draw.pick(&world.colours)));
            scene.objects = objects.to_vec();
            scene.sort();
            format!("{} {} {}", a(&objects[0]), relation.name(), a(&objects[1]))
        }
        PromptKind::Describe => {
            let mut room = corners(world).to_vec();
            if draw.chance(DESCRIBED_WORD_SHARE) {
                let word = any_word(world, draw);
                room.retain(|cell| cell.row != word.row);
                scene.word = Some(word);
            }
            let most = MAX_DESCRIBED - usize::from(scene.word.is_some());
            let number = 1 + draw.below(most.min(room.len()));
            scene.objects = draw.sample(&room, number).into_iter().map(|cell| any_object(world, draw, cell)).collect();
            scene.sort();
            describe(&scene, world)
        }
        PromptKind::Text | PromptKind::TextWhere | PromptKind::TextObject => {
            let mut word = any_word(world, draw);
            if kind == PromptKind::Text {
                word.row = open_choice(world, draw, &world.word_rows(), 1)[0];
            }
            let quoted = quoted(&word);
            let row = word.row;
            scene.word = Some(word);
            match kind {
                PromptKind::Text => quoted,
                PromptKind::TextWhere => format!("{quoted} at the {}", row_name(row)),
                _ => {
                    let room: Vec<Cell> = world.all_cells().filter(|cell| cell.row != row).collect();
                    let cell = open_choice(world, draw, &room, 1)[0];
                    let object = any_object(world, draw, cell);
                    scene.objects.push(object);
                    let relation = if row == 0 { Relation::Above } else { Relation::Below };
                    format!("{quoted} {} {}", relation.name(), a(&object))
                }
            }
        }
        _ => return Err(ShapesError::WrongKind { kind, wanted: "caption" }),
    };
    Ok((scene, text))
}

fn at(cell: Cell, shape: Shape, colour: Colour) -> Object {
    Object { shape, colour, row: cell.row, col: cell.col }
}

/// Draws an object for `cell`.
pub(super) fn any_object(world: &ShapesWorld, draw: &mut Draw, cell: Cell) -> Object {
    at(cell, draw.pick(&world.shapes), draw.pick(&world.colours))
}

/// Draws a word and its row.
pub(super) fn any_word(world: &ShapesWorld, draw: &mut Draw) -> Word {
    Word { text: draw.pick(&world.words), row: draw.pick(&world.word_rows()) }
}

/// Chooses `n` different cells for objects whose caption does not place them.
fn any_cells(world: &ShapesWorld, draw: &mut Draw, n: usize) -> Vec<Cell> {
    open_choice(world, draw, &world.all_cells().collect::<Vec<_>>(), n)
}

/// Chooses `n` of `places`, which the caption leaves open, by the world's rule.
fn open_choice<T: Clone>(world: &ShapesWorld, draw: &mut Draw, places: &[T], n: usize) -> Vec<T> {
    match world.placement {
        Placement::ReadingOrder => places[..n.min(places.len())].to_vec(),
        Placement::Free => draw.sample(places, n),
    }
}

/// Draws a scene of up to `most` objects, with a word in a share of cases.
pub(super) fn any_scene(world: &ShapesWorld, draw: &mut Draw, most: usize, word_share: f64) -> Scene {
    let mut room: Vec<Cell> = world.all_cells().collect();
    let mut word = None;
    if draw.chance(word_share) {
        let drawn = any_word(world, draw);
        room.retain(|cell| cell.row != drawn.row);
        word = Some(drawn);
    }
    let number = 1 + draw.below(most.min(room.len()));
    let objects = draw.sample(&room, number).into_iter().map(|cell| any_object(world, draw, cell)).collect();
    let mut scene = Scene { objects, word, background: draw.pick(&world.backgrounds) };
    scene.sort();
    scene
}

#[cfg(test)]
mod tests {
    use super::*;
    use deepgen_contract::shapes::{Background, SourceKind};
    use std::collections::BTreeSet;

    fn kinds() -> impl Iterator<Item = PromptKind> {
        [SourceKind::Captions, SourceKind::Text, SourceKind::UnireasonT2i]
            .into_iter()
            .flat_map(|kind| kind.kinds())
            .copied()
    }

    /// A larger world with every shape, colour and background.
    fn rich() -> ShapesWorld {
        ShapesWorld {
            side: 96,
            cells: 4,
            shapes: Shape::ALL.to_vec(),
            colours: Colour::ALL.to_vec(),
            backgrounds: Background::ALL.to_vec(),
            placement: Placement::Free,
            ..ShapesWorld::default()
        }
    }

    #[test]
    fn every_caption_parses_back_to_what_its_scene_shows() {
        for world in [ShapesWorld::default(), rich()] {
            for kind in kinds() {
                for place in 0..300 {
                    let made = caption(&world, kind, Split::Train, &mut Draw::new(3, "test", place)).unwrap();
                    let (scene, prompt) = (&made.scene, &made.prompt);
                    assert!(prompt.expectation.is_met_by(scene, None), "{} {scene:?}", prompt.text);
                    let cells: BTreeSet<_> = scene.objects.iter().map(Object::cell).collect();
                    assert_eq!(cells.len(), scene.objects.len(), "{scene:?}");
                    assert!(scene.objects.is_sorted_by_key(Object::cell));
                    let word_row = scene.word.as_ref().map(|word| word.row);
                    assert!(cells.iter().all(|cell| Some(cell.row) != word_row), "{scene:?}");
                }
            }
        }
    }

    #[test]
    fn a_scene_without_one_of_its_parts_no_longer_fits() {
        let world = ShapesWorld::default();
        for kind in kinds() {
            for place in 0..50 {
                let made = caption(&world, kind, Split::Train, &mut Draw::new(4, "test", place)).unwrap();
                for i in 0..made.scene.objects.len() {
                    let mut less = made.scene.clone();
                    less.objects.remove(i);
                    assert!(!made.prompt.expectation.is_met_by(&less, None), "{} {less:?}", made.prompt.text);
                }
                if made.scene.word.is_some() {
                    let less = Scene { word: None, ..made.scene.clone() };
                    assert!(!made.prompt.expectation.is_met_by(&less, None), "{}", made.prompt.text);
                }
            }
        }
    }

    #[test]
    fn training_and_held_out_captions_are_disjoint() {
        let world = ShapesWorld::default();
        for kind in kinds().filter(|kind| kind.has_held_out()) {
            let texts = |split| -> BTreeSet<String> {
                let text = |place| caption(&world, kind, split, &mut Draw::new(5, "test", place)).unwrap().prompt.text;
                (0..400).map(text).collect()
            };
            let (train, held_out) = (texts(Split::Train), texts(Split::HeldOut));
            assert!(train.is_disjoint(&held_out), "{kind:?}");
            assert!(!held_out.is_empty() && train.len() > held_out.len(), "{kind:?}");
            if kind == PromptKind::Two {
                assert_eq!((train.len(), held_out.len()), (9, 3));
            }
        }
    }

    #[test]
    fn reading_order_leaves_no_place_to_chance() {
        let world = ShapesWorld::default();
        for kind in [PromptKind::Single, PromptKind::Two, PromptKind::Count] {
            for place in 0..50 {
                let scene = caption(&world, kind, Split::Train, &mut Draw::new(7, "test", place)).unwrap().scene;
                let cells: Vec<Cell> = scene.objects.iter().map(Object::cell).collect();
                assert_eq!(cells, world.all_cells().take(cells.len()).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn captions_read_as_the_grammar_says() {
        let world = ShapesWorld::default();
        let of = |kind| caption(&world, kind, Split::Train, &mut Draw::new(6, "test", 0)).unwrap().prompt.text;
        assert!(of(PromptKind::Single).starts_with("a "));
        assert_eq!(of(PromptKind::Colour).split(' ').count(), 3);
        assert!(of(PromptKind::Two).contains(" and a "));
        assert!(of(PromptKind::Where).contains(" at the "));
        assert!(of(PromptKind::Text).starts_with("the word \""));
        assert!(of(PromptKind::ImplicitCount).starts_with("as many "));
        let wrong = caption(&world, PromptKind::Add, Split::Train, &mut Draw::new(6, "test", 0));
        assert!(matches!(wrong, Err(ShapesError::WrongKind { .. })));
    }
}
