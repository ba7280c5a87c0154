//! Edits: a source scene, an instruction, and the target scene in which nothing else has changed.
//!
//! The objects an instruction names are unique in the source, so every instruction has exactly one meaning.

use deepgen_contract::shapes::{Clause, Expectation, Object, Place, PromptKind, Scene, ShapesWorld, WordClause};

use super::caption::{any_object, any_scene};
use super::draw::Draw;
use super::phrase::{a, colour_hints, corner_name, corners, noun, shape_hints};
use super::prompt::{MAX_ATTEMPTS, Prompt, ShapesError, Split};

/// Most objects of a source scene.
const MAX_OBJECTS: usize = 3;
/// Share of source scenes with a word, where the edit is not of the word.
const WORD_SHARE: f64 = 0.25;

/// A source scene, what to do, and the result.
#[derive(Debug, Clone, PartialEq)]
pub struct Edit {
    /// Before.
    pub source: Scene,
    /// After.
    pub target: Scene,
    /// The instruction; its answer key names the cells that stay.
    pub prompt: Prompt,
}

impl Edit {
    /// Returns what decides whether the edit is held out: the instruction with its source.
    pub fn key(&self) -> String {
        let mut key = self.prompt.text.clone();
        for object in &self.source.objects {
            key += &format!("|{} {} {}", noun(object.shape, Some(object.colour)), object.row, object.col);
        }
        if let Some(word) = &self.source.word {
            key += &format!("|{} {}", word.text, word.row);
        }
        key
    }
}

/// Draws an edit of `kind`.
///
/// # Errors
/// When `kind` is no kind of edit, or the world has no such edit on this side of the split.
pub fn edit(world: &ShapesWorld, kind: PromptKind, split: Split, draw: &mut Draw) -> Result<Edit, ShapesError> {
    if !kind.is_edit() {
        return Err(ShapesError::WrongKind { kind, wanted: "edit" });
    }
    for _ in 0..MAX_ATTEMPTS {
        let word_share = if kind == PromptKind::ChangeWord { 1.0 } else { WORD_SHARE };
        let source = any_scene(world, draw, MAX_OBJECTS, word_share);
        let Some(edit) = compose(world, kind, source, draw) else { continue };
        if split.admits(kind, &edit.key()) {
            return Ok(edit);
        }
    }
    Err(ShapesError::NoPrompt { kind, split })
}

/// Makes an edit of `source`, or none if it has nothing for this kind to act on.
fn compose(world: &ShapesWorld, kind: PromptKind, source: Scene, draw: &mut Draw) -> Option<Edit> {
    let mut target = source.clone();
    let mut expectation = Expectation::default();
    let gone = |object: &Object| Clause { count: 0, exact: true, ..Clause::one(object.shape) };
    let text = match kind {
        PromptKind::Recolour | PromptKind::ReasonRecolour => {
            let (index, object, alone) = pick_unique(&source, kind == PromptKind::Recolour, draw)?;
            let others: Vec<_> = world.colours.iter().copied().filter(|&colour| colour != object.colour).collect();
            let colour = draw.pick(&others);
            target.objects[index].colour = colour;
            expectation.include.push(present(&target.objects[index]));
            if kind == PromptKind::ReasonRecolour {
                let hint = draw.pick(&shape_hints(object.shape));
                format!("make the object with {hint} the colour of {}", draw.pick(&colour_hints(colour)))
            } else if alone && draw.chance(0.5) {
                format!("make the {} {}", object.shape.name(), colour.name())
            } else {
                format!("change the {} to {}", noun(object.shape, Some(object.colour)), colour.name())
            }
        }
        PromptKind::Add => {
            let room: Vec<_> = corners(world).into_iter().filter(|&cell| !source.is_occupied(cell)).collect();
            let cell = *room.get(draw.below(room.len().max(1)))?;
            let object = any_object(world, draw, cell);
            target.objects.push(object);
            target.sort();
            expectation.include.push(present(&object));
            format!("add {} {}", a(&object), corner_name(cell))
        }
        PromptKind::Remove | PromptKind::ReasonRemove => {
            let (index, object, _) = pick_unique(&source, false, draw)?;
            target.objects.remove(index);
            expectation.include.push(gone(&object));
            match kind {
                PromptKind::Remove => format!("remove the {}", object.shape.name()),
                _ => format!("remove the object with {}", draw.pick(&shape_hints(object.shape))),
            }
        }
        PromptKind::Replace => {
            let (index, object, _) = pick_unique(&source, false, draw)?;
            let others: Vec<_> = world.shapes.iter().copied().filter(|&shape| shape != object.shape).collect();
            let shape = draw.pick(&others);
            target.objects[index].shape = shape;
            expectation.include = vec![present(&target.objects[index]), gone(&object)];
            format!("replace the {} with a {}", object.shape.name(), shape.name())
        }
        PromptKind::ChangeWord => {
            let word = target.word.as_mut()?;
            let others: Vec<_> = world.words.iter().filter(|&other| *other != word.text).cloned().collect();
            word.text = draw.pick(&others);
            expectation.words.push(WordClause { text: word.text.clone(), row: Some(word.row) });
            format!("change the word to \"{}\"", word.text)
        }
        _ => return None,
    };
    expectation.unchanged = world.all_cells().filter(|&cell| source.agrees_at(&target, cell)).collect();
    Some(Edit { source, target, prompt: Prompt { kind, text, expectation } })
}

/// Returns the clause of exactly this object at its place.
fn present(object: &Object) -> Clause {
    let place = Some(Place { row: Some(object.row), col: Some(object.col) });
    Clause { colour: Some(object.colour), place, ..Clause::one(object.shape) }
}

/// Draws an object whose shape (or, if `by_colour`, whose shape and colour) no other has: its index, itself, and
/// whether the shape alone tells it apart.
fn pick_unique(scene: &Scene, by_colour: bool, draw: &mut Draw) -> Option<(usize, Object, bool)> {
    let count = |object: &Object, colour: bool| {
        let same = |other: &&Object| other.shape == object.shape && (!colour || other.colour == object.colour);
        scene.objects.iter().filter(same).count()
    };
    let unique: Vec<_> = (0..scene.objects.len())
        .map(|index| (index, scene.objects[index], count(&scene.objects[index], false) == 1))
        .filter(|(_, object, alone)| *alone || by_colour && count(object, true) == 1)
        .collect();
    unique.get(draw.below(unique.len().max(1))).copied()
}

#[cfg(test)]
mod tests {
    use super::super::parse::expectation_of;
    use super::*;
    use deepgen_contract::shapes::SourceKind;
    use std::collections::BTreeSet;

    fn kinds() -> impl Iterator<Item = PromptKind> {
        [SourceKind::Edits, SourceKind::UnireasonEdits].into_iter().flat_map(|kind| kind.kinds()).copied()
    }

    #[test]
    fn an_edit_changes_exactly_what_it_says() {
        let world = ShapesWorld::default();
        for kind in kinds() {
            for place in 0..400 {
                let made = edit(&world, kind, Split::Train, &mut Draw::new(1, "test", place)).unwrap();
                let Edit { source, target, prompt } = &made;
                let changed = world.all_cells().filter(|&cell| !source.agrees_at(target, cell)).count();
                assert_eq!(changed, if kind == PromptKind::ChangeWord { 2 } else { 1 }, "{made:?}");
                assert_eq!(prompt.expectation.unchanged.len() + changed, 4);
                assert!(prompt.expectation.is_met_by(target, Some(source)), "{made:?}");
                assert!(!prompt.expectation.is_met_by(source, Some(source)), "{made:?}");
                assert!(target.objects.is_sorted_by_key(Object::cell), "{made:?}");

                let read = expectation_of(&prompt.text, &world).unwrap_or_else(|| panic!("{}", prompt.text));
                assert!(read.is_met_by(target, None), "{made:?}");
                assert!(!read.is_met_by(source, None), "{made:?}");
            }
        }
    }

    #[test]
    fn doing_more_than_asked_is_noticed() {
        let world = ShapesWorld::default();
        for place in 0..100 {
            let made = edit(&world, PromptKind::Recolour, Split::Train, &mut Draw::new(2, "test", place)).unwrap();
            let mut spoilt = made.target.clone();
            let Some(cell) = made.prompt.expectation.unchanged.iter().find(|&&cell| !spoilt.is_occupied(cell)) else {
                continue;
            };
            spoilt.objects.push(any_object(&world, &mut Draw::new(2, "spoil", place), *cell));
            assert!(!made.prompt.expectation.is_met_by(&spoilt, Some(&made.source)));
        }
    }

    #[test]
    fn training_and_held_out_edits_are_disjoint() {
        let world = ShapesWorld::default();
        for kind in kinds() {
            let keys = |split| -> BTreeSet<String> {
                let key = |place| edit(&world, kind, split, &mut Draw::new(3, "test", place)).unwrap().key();
                (0..300).map(key).collect()
            };
            assert!(keys(Split::Train).is_disjoint(&keys(Split::HeldOut)), "{kind:?}");
        }
        let wrong = edit(&world, PromptKind::Single, Split::Train, &mut Draw::new(3, "test", 0));
        assert!(matches!(wrong, Err(ShapesError::WrongKind { .. })));
    }
}
