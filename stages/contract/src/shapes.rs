//! The shapes world as data: scenes of coloured shapes and bitmap words, what an image of one must show, and the
//! settings of the sources and benchmarks made from it.
//!
//! Pure values and arithmetic. Sampling, the caption grammar and files on disk are in `stages/data`; scoring is in
//! `stages/judge`.

mod expectation;
mod font;
mod scene;
mod source;

pub use expectation::{Clause, Expectation, Link, Place, WordClause};
pub use font::{GLYPH_HEIGHT, GLYPH_WIDTH, Mask, glyph, word_mask};
pub use scene::{Background, Cell, Colour, Object, Placement, Relation, Scene, Shape, ShapesWorld, Word};
pub use source::{BenchmarkItem, KindWeights, PromptKind, ShapesSource, ShapesSuite, SourceFormat, SourceKind};
