//! Benchmarks of the shapes world: held-out prompts, the same number of each kind, with their answer keys.

use std::collections::BTreeSet;

use deepgen_contract::shapes::{BenchmarkItem, ShapesSuite, ShapesWorld};

use super::caption::caption;
use super::draw::Draw;
use super::edit::edit;
use super::prompt::{ShapesError, Split};

/// Draws after which an item may repeat an earlier prompt: some kinds have fewer than a benchmark asks for.
const NEW_ATTEMPTS: usize = 30;

/// Makes the first `count` items of a suite; a longer benchmark begins with the items of a shorter one.
///
/// Kinds with held-out prompts draw from those only; the others (single objects, single colours, lone words) share
/// their few captions with the training sources.
///
/// # Errors
/// When the world is not valid, or too small to have held-out prompts.
pub fn benchmark(
    suite: ShapesSuite,
    world: &ShapesWorld,
    seed: u64,
    count: usize,
) -> Result<Vec<BenchmarkItem>, ShapesError> {
    world.validate().map_err(ShapesError::Settings)?;
    let stream = format!("shapes/benchmark/{}", suite.name());
    let mut seen = BTreeSet::new();
    let mut items = Vec::with_capacity(count);
    for index in 0..count {
        let kind = suite.kinds()[index % suite.kinds().len()];
        let mut draw = Draw::new(seed, &stream, index as u64);
        let mut next = || -> Result<_, ShapesError> {
            if kind.is_edit() {
                let edit = edit(world, kind, Split::HeldOut, &mut draw)?;
                return Ok((edit.key(), edit.prompt, Some(edit.source)));
            }
            let prompt = caption(world, kind, Split::HeldOut, &mut draw)?.prompt;
            Ok((prompt.text.clone(), prompt, None))
        };
        let (mut key, mut prompt, mut source) = next()?;
        for _ in 0..NEW_ATTEMPTS {
            if !seen.contains(&key) {
                break;
            }
            (key, prompt, source) = next()?;
        }
        seen.insert(key);
        items.push(BenchmarkItem {
            id: format!("{}-{index:05}", suite.name()),
            tag: kind.tag().to_owned(),
            prompt: prompt.text,
            expectation: prompt.expectation,
            source,
        });
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::super::prompt::is_held_out;
    use super::*;

    #[test]
    fn suites_are_stratified_repeatable_and_held_out() {
        let world = ShapesWorld::default();
        for suite in ShapesSuite::ALL {
            let kinds = suite.kinds();
            let items = benchmark(suite, &world, 9, 10 * kinds.len()).unwrap();
            assert_eq!(items, benchmark(suite, &world, 9, 10 * kinds.len()).unwrap());
            assert_eq!(items[..5], benchmark(suite, &world, 9, 5).unwrap());
            for kind in kinds {
                let of_kind: Vec<_> = items.iter().filter(|item| item.tag == kind.tag()).collect();
                assert_eq!(of_kind.len(), 10);
                for item in of_kind {
                    assert_eq!(item.source.is_some(), kind.is_edit());
                    assert_eq!(item.expectation.unchanged.is_empty(), !kind.is_edit());
                    if kind.has_held_out() && !kind.is_edit() {
                        assert!(is_held_out(*kind, &item.prompt), "{item:?}");
                    }
                }
            }
            let text = serde_json::to_string(&items).unwrap();
            assert_eq!(serde_json::from_str::<Vec<BenchmarkItem>>(&text).unwrap(), items);
        }
    }

    #[test]
    fn the_tags_are_those_of_the_real_benchmarks() {
        let tags = |suite: ShapesSuite| suite.kinds().iter().map(|kind| kind.tag()).collect::<Vec<_>>();
        let geneval = ["single_object", "two_object", "counting", "colors", "position", "color_attr"];
        assert_eq!(tags(ShapesSuite::Geneval), geneval);
        let gedit = ["color_alter", "subject-add", "subject-remove", "subject-replace", "text_change"];
        assert_eq!(tags(ShapesSuite::Gedit), gedit);
    }
}
