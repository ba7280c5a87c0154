//! Questions about a scene with their answers, which teach a vision-language model to see it.
//!
//! The object a question names is unique in its scene, so there is one right answer.

use deepgen_contract::shapes::{PromptKind, Scene, Shape, ShapesWorld};

use super::caption::any_scene;
use super::draw::Draw;
use super::phrase::{NUMBERS, noun};
use super::prompt::{MAX_ATTEMPTS, ShapesError, Split};

/// Most objects of a scene that is asked about.
const MAX_OBJECTS: usize = 4;
/// Share of scenes with a word, where the question is not about it.
const WORD_SHARE: f64 = 0.25;
/// Share of counting questions about a shape that is there.
const PRESENT_SHARE: f64 = 0.8;

/// A scene, a question and its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// What the image shows.
    pub scene: Scene,
    /// Kind of question.
    pub kind: PromptKind,
    /// `what colour is the circle?`
    pub question: String,
    /// `red`
    pub answer: String,
}

/// Draws a scene with a question of `kind`.
///
/// # Errors
/// When `kind` is no kind of question.
pub fn question(world: &ShapesWorld, kind: PromptKind, draw: &mut Draw) -> Result<Question, ShapesError> {
    for _ in 0..MAX_ATTEMPTS {
        let word_share = if kind == PromptKind::AskWord { 1.0 } else { WORD_SHARE };
        let scene = any_scene(world, draw, MAX_OBJECTS, word_share);
        let asked = match kind {
            PromptKind::AskColour => ask_colour(&scene, draw),
            PromptKind::AskCount => Some(ask_count(world, &scene, draw)),
            PromptKind::AskPresence => Some(ask_presence(world, &scene, draw)),
            PromptKind::AskWord => {
                scene.word.as_ref().map(|word| ("what does the word say?".to_owned(), word.text.clone()))
            }
            _ => return Err(ShapesError::WrongKind { kind, wanted: "question" }),
        };
        if let Some((question, answer)) = asked {
            return Ok(Question { scene, kind, question, answer });
        }
    }
    Err(ShapesError::NoPrompt { kind, split: Split::Train })
}

fn ask_colour(scene: &Scene, draw: &mut Draw) -> Option<(String, String)> {
    let alone: Vec<_> = scene.objects.iter().filter(|object| count(scene, object.shape) == 1).collect();
    let object = alone.get(draw.below(alone.len().max(1)))?;
    Some((format!("what colour is the {}?", object.shape.name()), object.colour.name().to_owned()))
}

fn ask_count(world: &ShapesWorld, scene: &Scene, draw: &mut Draw) -> (String, String) {
    let shape = match draw.chance(PRESENT_SHARE) {
        true => draw.pick(&scene.objects).shape,
        false => draw.pick(&world.shapes),
    };
    (format!("how many {}?", shape.plural()), NUMBERS[count(scene, shape)].to_owned())
}

fn ask_presence(world: &ShapesWorld, scene: &Scene, draw: &mut Draw) -> (String, String) {
    let with_colour = draw.chance(0.5);
    let is_there = |shape, colour| {
        scene.objects.iter().any(|object| object.shape == shape && (!with_colour || object.colour == colour))
    };
    let present = draw.pick(&scene.objects);
    let absent: Vec<_> = world
        .shapes
        .iter()
        .flat_map(|&shape| world.colours.iter().map(move |&colour| (shape, colour)))
        .filter(|&(shape, colour)| !is_there(shape, colour))
        .collect();
    let ask_absent = !absent.is_empty() && draw.chance(0.5);
    let (shape, colour) = if ask_absent { draw.pick(&absent) } else { (present.shape, present.colour) };
    let thing = noun(shape, with_colour.then_some(colour));
    (format!("is there a {thing}?"), if ask_absent { "no" } else { "yes" }.to_owned())
}

fn count(scene: &Scene, shape: Shape) -> usize {
    scene.objects.iter().filter(|object| object.shape == shape).count()
}

#[cfg(test)]
mod tests {
    use super::super::parse::expectation_of;
    use super::*;

    fn ask(kind: PromptKind) -> impl Iterator<Item = Question> {
        let world = ShapesWorld::default();
        (0..600).map(move |place| question(&world, kind, &mut Draw::new(1, "test", place)).unwrap())
    }

    #[test]
    fn answers_are_true_and_varied() {
        let world = ShapesWorld::default();
        let mut yes = 0;
        for asked in ask(PromptKind::AskPresence) {
            let thing = asked.question.strip_prefix("is there ").unwrap().trim_end_matches('?');
            let holds = expectation_of(thing, &world).unwrap().is_met_by(&asked.scene, None);
            assert_eq!(asked.answer, if holds { "yes" } else { "no" }, "{asked:?}");
            yes += usize::from(holds);
        }
        assert!((200..400).contains(&yes), "{yes}");
        for asked in ask(PromptKind::AskCount) {
            let things = asked.question.strip_prefix("how many ").unwrap().trim_end_matches('?');
            let claim = expectation_of(&format!("{} {things}", asked.answer), &world).unwrap();
            assert!(claim.is_met_by(&asked.scene, None), "{asked:?}");
        }
        for asked in ask(PromptKind::AskColour) {
            let shape = asked.question.strip_prefix("what colour is the ").unwrap().trim_end_matches('?');
            let claim = expectation_of(&format!("one {} {shape}s", asked.answer).replace("crosss", "crosses"), &world);
            assert!(claim.unwrap().is_met_by(&asked.scene, None), "{asked:?}");
        }
        for asked in ask(PromptKind::AskWord) {
            assert_eq!(Some(&asked.answer), asked.scene.word.as_ref().map(|word| &word.text));
        }
    }
}
