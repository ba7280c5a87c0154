//! What the base's text encoder is pre-trained to say of an image: which shape, colour and letters a reader finds where.
//!
//! Knows readings and vectors, not captions. Two sets of heads: one on the pooled vector, one that attends to the
//! sequence with a query per cell. They are thrown away after the pre-training.

use burn::module::{Module, Param};
use burn::tensor::TensorData;
use deepgen_contract::shapes::{Cell, Colour, Shape, ShapesWorld};
use deepgen_data::batch::Batch;
use deepgen_data::resize::Pixels;
use deepgen_judge::reading::{Found, Reader};
use deepgen_model::attention::attention;
use deepgen_model::fused;
use deepgen_model::init::{Fill, Init};
use deepgen_model::nn::Linear;
use deepgen_model::{IntTensor, Tensor};

use crate::error::{JobError, JobResult, OrFail};

/// Letters of a word that are predicted; longer words are cut.
const NUM_LETTERS: usize = 4;
/// Nothing, then a to z.
const NUM_LETTER_CLASSES: usize = 27;
/// Attention heads of the cell queries.
const NUM_HEADS: usize = 4;
/// Marks a field that is unknown for a sample.
const UNKNOWN: i64 = -1;

/// The heads.
#[derive(Module, Debug)]
pub struct SceneHeads {
    /// All fields from the pooled vector.
    pooled: Linear,
    /// A query per cell `[cells, d]`.
    queries: Param<Tensor<2>>,
    key: Linear,
    value: Linear,
    /// Shape and colour from what a cell's query found.
    cell: Linear,
    #[module(skip)]
    fields: Fields,
}

/// Which predictions there are, and the reader that knows the answers.
#[derive(Debug, Clone)]
struct Fields {
    reader: Reader,
    cells: Vec<Cell>,
    num_rows: usize,
}

impl Fields {
    const NUM_SHAPES: usize = Shape::ALL.len() + 1;
    const NUM_COLOURS: usize = Colour::ALL.len() + 1;

    /// Returns the number of classes of each field: those of the image, then those of an edit's changed cell.
    fn sizes(&self) -> Vec<usize> {
        let mut sizes = Vec::new();
        for _ in &self.cells {
            sizes.extend([Self::NUM_SHAPES, Self::NUM_COLOURS]);
        }
        sizes.extend(vec![NUM_LETTER_CLASSES; NUM_LETTERS * self.num_rows]);
        sizes.extend([Self::NUM_SHAPES, Self::NUM_COLOURS, Self::NUM_SHAPES, Self::NUM_COLOURS]);
        sizes.push(self.cells.len() + 1);
        sizes.extend(vec![NUM_LETTER_CLASSES; NUM_LETTERS]);
        sizes
    }

    fn object(&self, found: &Found, cell: Cell) -> [i64; 2] {
        found.object_at(cell).map_or([0, 0], |object| [object.shape as i64 + 1, object.colour as i64 + 1])
    }

    fn letters(word: Option<&str>) -> impl Iterator<Item = i64> {
        let mut letters = [0; NUM_LETTERS];
        for (slot, letter) in letters.iter_mut().zip(word.unwrap_or_default().bytes()) {
            *slot = if letter.is_ascii_lowercase() { i64::from(letter - b'a') + 1 } else { 0 };
        }
        letters.into_iter()
    }

    /// Returns the answers for an image that a caption describes.
    fn of_image(&self, image: &Found) -> Vec<i64> {
        let mut answers: Vec<i64> = self.cells.iter().flat_map(|&cell| self.object(image, cell)).collect();
        for row in 0..self.num_rows {
            answers.extend(Self::letters(image.word_in(row).map(|word| word.text.as_str())));
        }
        answers.resize(self.sizes().len(), UNKNOWN);
        answers
    }

    /// Returns the answers for an edit: what its instruction says of the cell that changes. What an image shows
    /// elsewhere cannot be known from an instruction.
    fn of_edit(&self, source: &Found, target: &Found) -> Vec<i64> {
        let mut answers = vec![UNKNOWN; self.cells.len() * 2 + NUM_LETTERS * self.num_rows];
        let changed = self.cells.iter().position(|&cell| self.object(source, cell) != self.object(target, cell));
        let before = changed.map_or([0, 0], |i| self.object(source, self.cells[i]));
        let after = changed.map_or([0, 0], |i| self.object(target, self.cells[i]));
        answers.extend(before.into_iter().chain(after));
        // Only where something is added does the instruction name the cell.
        answers.push(match changed {
            Some(i) if before == [0, 0] => i as i64 + 1,
            Some(_) => UNKNOWN,
            None => 0,
        });
        let word = |found: &Found| (0..self.num_rows).find_map(|row| found.word_in(row).map(|word| word.text.clone()));
        let new_word = word(target).filter(|text| Some(text) != word(source).as_ref());
        answers.extend(Self::letters(new_word.as_deref()));
        answers
    }
}

impl SceneHeads {
    /// Creates the heads for encodings of `width`.
    ///
    /// # Errors
    /// When the world cannot be read.
    pub fn new(init: &Init, width: usize, world: &ShapesWorld) -> JobResult<Self> {
        let reader = Reader::new(world).map_err(JobError::input)?;
        let fields = Fields { reader, cells: world.all_cells().collect(), num_rows: world.cells };
        let linear = |name: &str, outputs| Linear::with_default_init(&init.at(name), width, outputs);
        Ok(Self {
            pooled: linear("pooled", fields.sizes().iter().sum()),
            queries: init.param("queries", [fields.cells.len(), width], Fill::Normal(1.0)),
            key: linear("key", width),
            value: linear("value", width),
            cell: linear("cell", Fields::NUM_SHAPES + Fields::NUM_COLOURS),
            fields,
        })
    }

    /// Returns the mean cross-entropy per field of what the encodings say against what the batch's images show.
    ///
    /// # Shapes
    /// [b, t, d], [b, d] -> [1]
    ///
    /// # Errors
    /// When an image cannot be turned into bytes.
    pub fn loss(&self, sequence_btd: Tensor<3>, pooled_bd: Tensor<2>, batch: &Batch) -> JobResult<Tensor<1>> {
        let answers = self.answers(batch)?;
        let device = pooled_bd.device();
        let [b, t, d] = sequence_btd.dims();
        let logits = self.pooled.forward(pooled_bd);
        let (mut start, mut terms) = (0, Vec::new());
        for (field, size) in self.fields.sizes().into_iter().enumerate() {
            let column: Vec<i64> = answers.iter().map(|row| row[field]).collect();
            terms.extend(cross_entropy(logits.clone().narrow(1, start, size), &column, &device));
            start += size;
        }
        let num_cells = self.fields.cells.len();
        let heads = |x: Tensor<3>, n: usize| x.reshape([b, n, NUM_HEADS, d / NUM_HEADS]).swap_dims(1, 2);
        let queries = self.queries.val().unsqueeze::<3>().expand([b, num_cells, d]);
        let found = attention(
            heads(queries, num_cells),
            heads(self.key.forward(sequence_btd.clone()), t),
            heads(self.value.forward(sequence_btd), t),
            None,
        );
        let found = self.cell.forward(found.swap_dims(1, 2).reshape([b * num_cells, d]));
        for (part, start, size) in [(0, 0, Fields::NUM_SHAPES), (1, Fields::NUM_SHAPES, Fields::NUM_COLOURS)] {
            let column: Vec<i64> =
                answers.iter().flat_map(|row| (0..num_cells).map(move |cell| row[2 * cell + part])).collect();
            let term = cross_entropy(found.clone().narrow(1, start, size), &column, &device);
            // One term stands for all cells.
            terms.extend(term.map(|term| term.mul_scalar(num_cells as f64)));
        }
        let count = terms.len();
        terms
            .into_iter()
            .reduce(|a, b| a + b)
            .map(|sum| sum.div_scalar(count as f64))
            .ok_or_else(|| JobError::internal("a batch without a known field"))
    }

    fn answers(&self, batch: &Batch) -> JobResult<Vec<Vec<i64>>> {
        let read = |pixels: &Pixels| -> JobResult<Found> {
            Ok(self.fields.reader.read(&pixels.to_rgb().or_input(|| "an image of the batch")?))
        };
        let mut rows = Vec::with_capacity(batch.images.len());
        for (i, image) in batch.images.iter().enumerate() {
            let target = read(image)?;
            rows.push(match batch.references.get(i).and_then(|own| own.first()) {
                Some(source) => self.fields.of_edit(&read(source)?, &target),
                None => self.fields.of_image(&target),
            });
        }
        Ok(rows)
    }
}

/// Mean cross-entropy over the rows whose class is known; none if there is no such row.
fn cross_entropy(logits: Tensor<2>, classes: &[i64], device: &deepgen_model::Device) -> Option<Tensor<1>> {
    let known: Vec<i64> = (0..classes.len()).filter(|&i| classes[i] != UNKNOWN).map(|i| i as i64).collect();
    if known.is_empty() {
        return None;
    }
    let count = known.len();
    let targets = known.iter().map(|&i| classes[i as usize] as usize).collect();
    let rows = IntTensor::from_data(TensorData::new(known, [count]), device);
    Some(fused::cross_entropy(logits.select(0, rows), targets))
}
