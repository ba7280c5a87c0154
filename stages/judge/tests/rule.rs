//! The rule judge on painted scenes: GenEval's clauses, positions, words, and edits.

use std::sync::Arc;

use deepgen_contract::shapes::{
    Background, Cell, Clause, Colour, Expectation, Link, Object, Place, Relation, Scene, Shape, ShapesWorld, Word,
    WordClause,
};
use deepgen_judge::judge::{Answer, Judge, JudgeError, Question};
use deepgen_judge::rule::RuleJudge;
use deepgen_judge::verdict::Verdict;
use image::RgbImage;

fn object(shape: Shape, colour: Colour, row: usize, col: usize) -> Object {
    Object { shape, colour, row, col }
}

fn scene(objects: &[Object], word: Option<(&str, usize)>) -> Scene {
    let word = word.map(|(text, row)| Word { text: text.into(), row });
    Scene { objects: objects.to_vec(), word, background: Background::Black }
}

fn paint(scene: &Scene) -> Arc<RgbImage> {
    Arc::new(RgbImage::from_raw(32, 32, ShapesWorld::default().paint(scene)).unwrap())
}

fn judge(scene: &Scene, source: Option<&Scene>, expectation: &Expectation) -> Verdict {
    let judge = RuleJudge::new(&ShapesWorld::default()).unwrap();
    let question = Question::by_rule(paint(scene), source.map(paint), expectation.clone());
    match judge.ask(&question).unwrap() {
        Answer::Verdict(verdict) => verdict,
        Answer::Text(text) => panic!("{text}"),
    }
}

fn include(clauses: &[Clause]) -> Expectation {
    Expectation { include: clauses.to_vec(), ..Expectation::default() }
}

fn coloured(shape: Shape, colour: Colour) -> Clause {
    Clause { colour: Some(colour), ..Clause::one(shape) }
}

fn value(verdict: &Verdict, part: &str) -> f64 {
    verdict.part(part).unwrap_or_else(|| panic!("no part {part} in {verdict:?}")).0
}

use Colour::{Blue, Green, Red};
use Shape::{Circle, Square, Triangle};

#[test]
fn extra_objects_do_no_harm_unless_the_count_is_exact() {
    let three = scene(&[object(Circle, Red, 0, 0), object(Circle, Red, 0, 1), object(Circle, Blue, 1, 0)], None);
    let at_least = |count, exact| include(&[Clause { count, exact, ..Clause::one(Circle) }]);
    assert!(judge(&three, None, &at_least(2, false)).strict);
    assert!(judge(&three, None, &at_least(3, true)).strict);
    let two = judge(&three, None, &at_least(2, true));
    assert!(!two.strict);
    assert_eq!(value(&two, "counts"), 0.5);
    assert_eq!(value(&two, "objects"), 1.0);
    let four = judge(&three, None, &at_least(4, true));
    assert_eq!((value(&four, "counts"), value(&four, "objects")), (0.75, 0.75));
    assert!(!judge(&three, None, &at_least(4, false)).strict);
}

#[test]
fn colours_and_shapes_count_apart_and_binding_together() {
    let wanted = include(&[coloured(Circle, Red), coloured(Square, Blue)]);
    let right = judge(&scene(&[object(Circle, Red, 0, 0), object(Square, Blue, 1, 1)], None), None, &wanted);
    assert!(right.strict && right.graded == 1.0);
    let swapped = judge(&scene(&[object(Circle, Blue, 0, 0), object(Square, Red, 1, 1)], None), None, &wanted);
    assert!(!swapped.strict);
    assert_eq!((value(&swapped, "objects"), value(&swapped, "colours"), value(&swapped, "binding")), (1.0, 1.0, 0.0));
    assert_eq!(value(&swapped, "questions"), 0.5);
    let half = judge(&scene(&[object(Triangle, Red, 0, 0)], None), None, &wanted);
    assert_eq!((value(&half, "objects"), value(&half, "colours"), value(&half, "binding")), (0.0, 0.5, 0.0));
    assert_eq!(judge(&scene(&[], None), None, &wanted).graded, 0.0);
}

#[test]
fn positions_come_from_the_boxes() {
    let wanted = |relation| {
        let circle = Clause { relation: Some(Link { relation, other: 1 }), ..coloured(Circle, Red) };
        include(&[circle, coloured(Square, Blue)])
    };
    let at = |row, col| scene(&[object(Circle, Red, 0, 0), object(Square, Blue, row, col)], None);
    for (relation, beside, below, diagonal) in [
        (Relation::LeftOf, true, false, true),
        (Relation::RightOf, false, false, false),
        (Relation::Above, false, true, true),
        (Relation::Below, false, false, false),
    ] {
        for ((row, col), expected) in [((0, 1), beside), ((1, 0), below), ((1, 1), diagonal)] {
            let verdict = judge(&at(row, col), None, &wanted(relation));
            assert_eq!(verdict.strict, expected, "{relation:?} {row} {col}");
            assert_eq!(value(&verdict, "relations"), f64::from(u8::from(expected)));
        }
    }
    // Without the other object there is no position.
    assert!(!judge(&scene(&[object(Circle, Red, 0, 0)], None), None, &wanted(Relation::LeftOf)).strict);
}

#[test]
fn two_of_a_kind_can_stand_in_a_relation_to_each_other() {
    let circle = Clause { relation: Some(Link { relation: Relation::LeftOf, other: 1 }), ..coloured(Circle, Red) };
    let wanted = include(&[circle, coloured(Circle, Red)]);
    assert!(judge(&scene(&[object(Circle, Red, 0, 0), object(Circle, Red, 0, 1)], None), None, &wanted).strict);
    assert!(!judge(&scene(&[object(Circle, Red, 0, 0), object(Circle, Red, 1, 0)], None), None, &wanted).strict);
    assert!(!judge(&scene(&[object(Circle, Red, 0, 0)], None), None, &wanted).strict);
}

#[test]
fn places_and_words_are_checked() {
    let place = Place { row: Some(1), col: Some(1) };
    let wanted = include(&[Clause { place: Some(place), ..coloured(Square, Green) }]);
    assert!(judge(&scene(&[object(Square, Green, 1, 1)], None), None, &wanted).strict);
    let elsewhere = judge(&scene(&[object(Square, Green, 0, 1)], None), None, &wanted);
    assert!(!elsewhere.strict);
    assert_eq!((value(&elsewhere, "places"), value(&elsewhere, "binding")), (0.0, 1.0));

    let word =
        |text: &str, row| Expectation { words: vec![WordClause { text: text.into(), row }], ..Expectation::default() };
    let go = scene(&[object(Circle, Red, 1, 0)], Some(("go", 0)));
    assert!(judge(&go, None, &word("go", None)).strict);
    assert!(judge(&go, None, &word("go", Some(0))).strict);
    let below = judge(&go, None, &word("go", Some(1)));
    assert!(!below.strict);
    assert_eq!((value(&below, "words"), value(&below, "places")), (1.0, 0.0));
    let no = judge(&go, None, &word("no", None));
    assert_eq!((no.strict, value(&no, "words"), value(&no, "characters")), (false, 0.0, 0.5));
    assert_eq!(judge(&scene(&[], None), None, &word("go", None)).graded, 0.0);
}

fn edit() -> (Scene, Expectation) {
    let source = scene(&[object(Circle, Red, 0, 0), object(Square, Blue, 1, 1)], None);
    let cell = |row, col| Cell { row, col };
    let unchanged = vec![cell(0, 1), cell(1, 0), cell(1, 1)];
    (source, Expectation { unchanged, ..include(&[coloured(Circle, Green)]) })
}

#[test]
fn a_right_edit_gets_everything_and_an_unedited_image_nothing() {
    let (source, wanted) = edit();
    let right = scene(&[object(Circle, Green, 0, 0), object(Square, Blue, 1, 1)], None);
    let verdict = judge(&right, Some(&source), &wanted);
    assert!(verdict.strict);
    assert_eq!((value(&verdict, "overall"), value(&verdict, "rating")), (1.0, 1.0));
    let untouched = judge(&source, Some(&source), &wanted);
    assert!(!untouched.strict);
    assert_eq!((value(&untouched, "success"), value(&untouched, "preservation")), (0.0, 1.0));
    assert_eq!(value(&untouched, "overall"), 0.0);
}

#[test]
fn what_an_edit_should_leave_alone_is_compared_with_the_source() {
    let (source, wanted) = edit();
    let over = scene(&[object(Circle, Green, 0, 0), object(Square, Red, 1, 1), object(Circle, Red, 0, 1)], None);
    let verdict = judge(&over, Some(&source), &wanted);
    assert!(!verdict.strict, "the target holds, but two cells changed");
    assert_eq!(value(&verdict, "success"), 1.0);
    // One cell kept, one with another colour, one filled.
    assert!((value(&verdict, "preservation") - 0.5).abs() < 1e-9);
    assert!((value(&verdict, "overall") - 0.5f64.sqrt()).abs() < 1e-6);
}

#[test]
fn a_removal_wants_the_object_gone() {
    let source = scene(&[object(Circle, Red, 0, 0), object(Square, Blue, 1, 1)], None);
    let gone = Clause { count: 0, exact: true, ..Clause::one(Square) };
    let wanted = Expectation { unchanged: vec![Cell { row: 0, col: 0 }], ..include(&[gone]) };
    assert!(judge(&scene(&[object(Circle, Red, 0, 0)], None), Some(&source), &wanted).strict);
    let untouched = judge(&source, Some(&source), &wanted);
    assert_eq!((untouched.strict, value(&untouched, "success")), (false, 0.0));
}

#[test]
fn questions_that_do_not_suit_are_refused() {
    let judge = RuleJudge::new(&ShapesWorld::default()).unwrap();
    let image = paint(&scene(&[], None));
    let mut question = Question::by_rule(image.clone(), Some(image.clone()), Expectation::default());
    question.images.push(image);
    assert!(matches!(judge.ask(&question), Err(JudgeError::NumImages { found: 3, .. })));
    question.expectation = None;
    assert!(matches!(judge.ask(&question), Err(JudgeError::NoExpectation)));
}
