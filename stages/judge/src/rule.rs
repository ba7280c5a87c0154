//! The rule judge of the shapes world: what was read in an image against what it must show.
//!
//! Knows readings and expectations, not prompts. Semantics are GenEval's (docs/spec/evaluation.md section 2): clauses
//! ask for at least a count unless they are exact, further objects do no harm, and positions come from the boxes. An
//! edit is scored like GEdit: `SC = min(success, preservation)`, `PQ` from the fit of the masks, `O = sqrt(SC PQ)`.

use std::collections::BTreeMap;

use deepgen_contract::shapes::{Cell, Clause, Expectation, Link, Relation, ShapesWorld, WordClause};

use crate::judge::{Answer, Judge, JudgeError, Question};
use crate::reading::{Found, FoundObject, PixelBox, Reader};
use crate::text::similarity;
use crate::verdict::Verdict;

/// Changes when the same pixels may get another verdict: part of the judge's identity.
const VERSION: u32 = 1;
/// Share of both boxes' sides by which an offset shrinks before its direction counts.
const POSITION_SHRINK: f32 = 0.1;
/// Least component of the unit offset that counts as a direction.
const DIRECTION_THRESHOLD: f32 = 0.5;

/// The rule judge.
#[derive(Debug, Clone)]
pub struct RuleJudge {
    reader: Reader,
    identity: String,
}

impl RuleJudge {
    /// Returns the judge of images of `world`.
    ///
    /// # Errors
    /// When images of the world cannot be read (see [`Reader::new`]).
    pub fn new(world: &ShapesWorld) -> Result<Self, String> {
        Ok(Self { reader: Reader::new(world)?, identity: format!("rule {VERSION} {world:?}") })
    }

    /// Returns the reader that the judge looks through.
    pub fn reader(&self) -> &Reader {
        &self.reader
    }
}

impl Judge for RuleJudge {
    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn is_rule(&self) -> bool {
        true
    }

    fn ask(&self, question: &Question) -> Result<Answer, JudgeError> {
        let expectation = question.expectation.as_ref().ok_or(JudgeError::NoExpectation)?;
        let (source, result) = match &question.images[..] {
            [result] => (None, result),
            [source, result] => (Some(self.reader.read(source)), result),
            images => {
                let expected = "an image, or a source and its edit";
                return Err(JudgeError::NumImages { expected, found: images.len() });
            }
        };
        Ok(Answer::Verdict(conclude(expectation, &self.reader.read(result), source.as_ref())))
    }
}

/// Returns the verdict on an image, and with a source on it as an edit of that.
///
/// Parts of every image: those of `objects`, `colours`, `binding`, `relations`, `counts`, `places` and `characters`
/// that were asked about, whose mean is the graded score; `words` (whole words read exactly), `questions` (each thing
/// asked for, yes or no), `quality` (fit of the masks) and `rating`. Of an edit also `success`, `preservation`, `sc`,
/// `pq` and `overall`.
pub fn conclude(expectation: &Expectation, found: &Found, source: Option<&Found>) -> Verdict {
    let mut verdict = compare(expectation, found);
    let quality = f64::from(found.quality());
    let Some(source) = source else {
        // WISE's weights: realism and aesthetics are both the fit.
        verdict.push("rating", 0.7 * f64::from(verdict.graded) + 0.3 * quality, 1.0);
        return verdict;
    };
    let (kept, preservation) = preservation(&expectation.unchanged, found, source);
    let before = compare(expectation, source);
    // An image handed back unchanged has done nothing, however much of the target it showed already.
    let (now, then) = (f64::from(verdict.graded), f64::from(before.graded));
    let success = if verdict.strict { 1.0 } else { ((now - then) / (1.0 - then).max(1e-6)).clamp(0.0, 1.0) };
    let sc = success.min(preservation);
    verdict.strict &= kept;
    verdict.graded = ((success + preservation) / 2.0) as f32;
    verdict.push("success", success, 1.0);
    verdict.push("preservation", preservation, 1.0);
    verdict.push("sc", sc, 1.0);
    verdict.push("pq", quality, 1.0);
    verdict.push("overall", (sc * quality).sqrt(), 1.0);
    // RISE's weights: consistency, reasoning, visual plausibility.
    verdict.push("rating", 0.3 * preservation + 0.5 * success + 0.2 * quality, 1.0);
    verdict
}

/// Sums of one component over clauses.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    got: f64,
    of: f64,
}

impl Tally {
    fn add(&mut self, got: f64, of: f64) {
        self.got += got;
        self.of += of;
    }

    fn share(self) -> f64 {
        self.got / self.of
    }
}

/// Compares what was found with what is expected, whatever the image came from.
fn compare(expectation: &Expectation, found: &Found) -> Verdict {
    const COMPONENTS: [&str; 7] = ["objects", "colours", "binding", "relations", "counts", "places", "characters"];
    let mut tallies: BTreeMap<&str, Tally> = BTreeMap::new();
    let mut tally = |name: &'static str, got: f64, of: f64| tallies.entry(name).or_default().add(got, of);
    // Shapes and colours are counted apart from each other, so that a model that has learned one of them shows it.
    for (wanted, present) in demands(expectation, found, |clause| Some(clause.shape), |object| object.shape) {
        tally("objects", present.min(wanted) as f64, wanted as f64);
    }
    for (wanted, present) in demands(expectation, found, |clause| clause.colour, |object| object.colour) {
        tally("colours", present.min(wanted) as f64, wanted as f64);
    }
    let mut questions = Vec::new();
    for (index, clause) in expectation.include.iter().enumerate() {
        let checks = check_clause(expectation, index, found);
        let count = clause.count as f64;
        if clause.count == 0 {
            tally("objects", flag(checks.is_counted), 1.0);
            questions.push(checks.is_counted);
            continue;
        }
        questions.push(checks.of_shape >= clause.count);
        if clause.colour.is_some() {
            tally("binding", checks.bound.min(clause.count) as f64, count);
            questions.push(checks.bound >= clause.count);
        }
        if clause.place.is_some() {
            tally("places", checks.matching.min(clause.count) as f64, count);
            questions.push(checks.matching >= clause.count);
        }
        if clause.exact {
            let error = checks.matching.abs_diff(clause.count) as f64;
            tally("counts", (1.0 - error / count).max(0.0), 1.0);
            questions.push(checks.is_counted);
        }
        if clause.relation.is_some() {
            tally("relations", flag(checks.is_related), 1.0);
            questions.push(checks.is_related);
        }
    }
    let mut exact_words = Tally::default();
    for clause in &expectation.words {
        let read = check_word(clause, found);
        tally("characters", read.similarity, 1.0);
        exact_words.add(flag(read.is_exact), 1.0);
        questions.push(read.is_exact);
        if clause.row.is_some() {
            tally("places", flag(read.is_placed), 1.0);
            questions.push(read.is_placed);
        }
    }
    let strict = questions.iter().all(|&held| held);
    let mut verdict = Verdict { strict, graded: 0.0, parts: Vec::new() };
    for name in COMPONENTS {
        if let Some(tally) = tallies.get(name) {
            // Pooling weighs characters by words, and everything else by what was asked for.
            verdict.push(name, tally.share(), tally.of);
        }
    }
    let num_components = verdict.parts.len().max(1) as f64;
    let total: f64 = verdict.parts.iter().map(|part| part.value).sum();
    verdict.graded = (if verdict.parts.is_empty() { 1.0 } else { total / num_components }) as f32;
    if !expectation.words.is_empty() {
        verdict.push("words", exact_words.share(), exact_words.of);
    }
    if !questions.is_empty() {
        let held = questions.iter().filter(|&&held| held).count();
        verdict.push("questions", held as f64 / questions.len() as f64, questions.len() as f64);
    }
    verdict.push("quality", f64::from(found.quality()), 1.0);
    verdict
}

/// Returns for each wanted shape, or colour, how many are wanted over all clauses and how many are there.
fn demands<K: Ord>(
    expectation: &Expectation,
    found: &Found,
    wants: impl Fn(&Clause) -> Option<K>,
    is: impl Fn(&FoundObject) -> K,
) -> Vec<(usize, usize)> {
    let mut wanted: BTreeMap<K, usize> = BTreeMap::new();
    for clause in expectation.include.iter().filter(|clause| clause.count > 0) {
        if let Some(key) = wants(clause) {
            *wanted.entry(key).or_default() += clause.count;
        }
    }
    let present = |key: &K| found.objects.iter().filter(|object| is(object) == *key).count();
    wanted.iter().map(|(key, &count)| (count, present(key))).collect()
}

/// What was found for one clause.
struct ClauseChecks {
    /// Objects of the shape.
    of_shape: usize,
    /// Objects of the shape in the colour.
    bound: usize,
    /// Objects with everything but the relation.
    matching: usize,
    is_counted: bool,
    is_related: bool,
}

fn check_clause(expectation: &Expectation, index: usize, found: &Found) -> ClauseChecks {
    let clause = &expectation.include[index];
    let of_shape: Vec<_> = found.objects.iter().filter(|object| object.shape == clause.shape).collect();
    let is_bound = |object: &&&FoundObject| clause.colour.is_none_or(|colour| colour == object.colour);
    let bound = of_shape.iter().filter(is_bound).count();
    let matching = matching(clause, found).len();
    let is_counted = if clause.exact { matching == clause.count } else { matching >= clause.count };
    let is_related = clause.relation.is_none_or(|link| is_related(expectation, index, link, found));
    ClauseChecks { of_shape: of_shape.len(), bound, matching, is_counted, is_related }
}

/// Returns the objects with the shape, colour and place of `clause`, the surest first.
fn matching<'a>(clause: &Clause, found: &'a Found) -> Vec<&'a FoundObject> {
    let matches = |object: &&FoundObject| {
        object.shape == clause.shape
            && clause.colour.is_none_or(|colour| colour == object.colour)
            && clause.place.is_none_or(|place| place.contains(found.cell(&object.at)))
    };
    found.objects.iter().filter(matches).collect()
}

/// Every pair of the clause's surest objects and the other clause's must stand in the relation; clauses that match
/// the same object, as two red circles do, are told apart by giving each object to one side only.
fn is_related(expectation: &Expectation, index: usize, link: Link, found: &Found) -> bool {
    let (clause, Some(other)) = (&expectation.include[index], expectation.include.get(link.other)) else {
        return false;
    };
    let (ours, theirs) = (matching(clause, found), matching(other, found));
    if ours.len() < clause.count || theirs.len() < other.count {
        return false;
    }
    let is_same = |a: &FoundObject, b: &FoundObject| a.at == b.at;
    if ours.iter().zip(&theirs).all(|(a, b)| is_same(a, b)) {
        // The same candidates on both sides: some two of them must stand in the relation.
        return ours.iter().any(|a| theirs.iter().any(|b| !is_same(a, b) && stands(link.relation, &a.at, &b.at)));
    }
    let (ours, theirs) = (&ours[..clause.count], &theirs[..other.count]);
    ours.iter().all(|a| theirs.iter().all(|b| stands(link.relation, &a.at, &b.at)))
}

/// Returns whether `a` stands in `relation` to `b` by GenEval's geometry: the centre offset, shrunk by a tenth of both
/// boxes on each axis, has a component beyond half its length.
pub fn stands(relation: Relation, a: &PixelBox, b: &PixelBox) -> bool {
    let ((ax, ay), (bx, by)) = (a.centre(), b.centre());
    let shrink = |offset: f32, sides: usize| (offset.abs() - POSITION_SHRINK * sides as f32).max(0.0) * offset.signum();
    let (x, y) = (shrink(ax - bx, a.width + b.width), shrink(ay - by, a.height + b.height));
    if x.abs() < 1e-3 && y.abs() < 1e-3 {
        return false;
    }
    let length = (ax - bx).hypot(ay - by);
    match relation {
        Relation::LeftOf => x / length < -DIRECTION_THRESHOLD,
        Relation::RightOf => x / length > DIRECTION_THRESHOLD,
        Relation::Above => y / length < -DIRECTION_THRESHOLD,
        Relation::Below => y / length > DIRECTION_THRESHOLD,
    }
}

/// What was read for one wanted word.
struct WordChecks {
    similarity: f64,
    is_exact: bool,
    is_placed: bool,
}

fn check_word(clause: &WordClause, found: &Found) -> WordChecks {
    let similarity = found.words.iter().map(|word| similarity(&word.text, &clause.text)).fold(0.0, f64::max);
    let is_exact = found.words.iter().any(|word| word.text == clause.text);
    let is_placed = clause.row.is_none_or(|row| found.word_in(row).is_some_and(|word| word.text == clause.text));
    WordChecks { similarity, is_exact, is_placed }
}

/// Returns whether every cell that an edit must leave alone looks as in the source, and the graded share: a cell that
/// kept its shape or its colour, but not both, counts half.
fn preservation(unchanged: &[Cell], found: &Found, source: &Found) -> (bool, f64) {
    let agreement = |cell: Cell| {
        if found.background != source.background {
            return 0.0;
        }
        let objects = match (source.object_at(cell), found.object_at(cell)) {
            (None, None) => 1.0,
            (Some(a), Some(b)) => (flag(a.shape == b.shape) + flag(a.colour == b.colour)) / 2.0,
            _ => 0.0,
        };
        let words = match (source.word_in(cell.row), found.word_in(cell.row)) {
            (None, None) => 1.0,
            (Some(a), Some(b)) => similarity(&a.text, &b.text),
            _ => 0.0,
        };
        f64::min(objects, words)
    };
    if unchanged.is_empty() {
        return (true, 1.0);
    }
    let agreements: Vec<f64> = unchanged.iter().map(|&cell| agreement(cell)).collect();
    let kept = agreements.iter().all(|&agreement| agreement == 1.0);
    (kept, agreements.iter().sum::<f64>() / agreements.len() as f64)
}

fn flag(held: bool) -> f64 {
    f64::from(u8::from(held))
}
