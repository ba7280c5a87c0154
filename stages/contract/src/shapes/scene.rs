//! Scenes of the shapes world and their exact pixels.
//!
//! A scene is objects on a grid plus at most one word that fills a row. Knows geometry and colours, not language.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::font::{GLYPH_HEIGHT, GLYPH_WIDTH, glyph, word_mask};

/// What an object looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// A disc.
    Circle,
    /// A square slightly smaller than the disc is wide, so the two differ in their corners.
    Square,
    /// A triangle with its apex up.
    Triangle,
    /// A plus sign.
    Cross,
    /// A square standing on a corner.
    Diamond,
}

impl Shape {
    /// Every shape, in order.
    pub const ALL: [Self; 5] = [Self::Circle, Self::Square, Self::Triangle, Self::Cross, Self::Diamond];

    /// Returns the word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Circle => "circle",
            Self::Square => "square",
            Self::Triangle => "triangle",
            Self::Cross => "cross",
            Self::Diamond => "diamond",
        }
    }

    /// Returns the word for several.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Circle => "circles",
            Self::Square => "squares",
            Self::Triangle => "triangles",
            Self::Cross => "crosses",
            Self::Diamond => "diamonds",
        }
    }

    /// Returns whether the shape covers the pixel in column `i` and row `j` of its `size` by `size` box.
    ///
    /// The masks are defined on 12 pixels; another size scales them.
    pub fn covers(self, i: usize, j: usize, size: usize) -> bool {
        let unit = 12.0 / size as f64;
        let x = ((i as f64 + 0.5) * unit - 6.0).abs();
        let y = ((j as f64 + 0.5) * unit - 6.0).abs();
        match self {
            Self::Circle => x * x + y * y <= 36.0,
            Self::Square => x <= 5.0 && y <= 5.0,
            Self::Triangle => x <= (j + 1) as f64 * unit * 0.5,
            Self::Cross => x <= 2.0 || y <= 2.0,
            Self::Diamond => x + y <= 6.0,
        }
    }
}

/// Colour of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Colour {
    Red,
    Green,
    Blue,
    Yellow,
    Purple,
    White,
}

impl Colour {
    /// Every colour, in order.
    pub const ALL: [Self; 6] = [Self::Red, Self::Green, Self::Blue, Self::Yellow, Self::Purple, Self::White];
    /// Colour in which words are drawn.
    pub const WORD: Self = Self::White;

    /// Returns the word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Red => "red",
            Self::Green => "green",
            Self::Blue => "blue",
            Self::Yellow => "yellow",
            Self::Purple => "purple",
            Self::White => "white",
        }
    }

    /// Returns its pixel value.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [230, 40, 40],
            Self::Green => [40, 200, 60],
            Self::Blue => [50, 80, 240],
            Self::Yellow => [240, 220, 40],
            Self::Purple => [170, 60, 200],
            Self::White => [240, 240, 240],
        }
    }
}

/// Colour of everything that no shape and no word covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Background {
    Black,
    Grey,
}

impl Background {
    /// Every background, in order.
    pub const ALL: [Self; 2] = [Self::Black, Self::Grey];

    /// Returns its pixel value.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Black => [16, 16, 20],
            Self::Grey => [110, 110, 110],
        }
    }
}

/// A place of the grid, counted from the top left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// Row from the top.
    pub row: usize,
    /// Column from the left.
    pub col: usize,
}

/// Where one object is, seen from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Relation {
    /// Same row, smaller column.
    LeftOf,
    /// Same row, larger column.
    RightOf,
    /// Same column, smaller row.
    Above,
    /// Same column, larger row.
    Below,
}

impl Relation {
    /// Every relation, in order.
    pub const ALL: [Self; 4] = [Self::LeftOf, Self::RightOf, Self::Above, Self::Below];

    /// Returns the words for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::LeftOf => "left of",
            Self::RightOf => "right of",
            Self::Above => "above",
            Self::Below => "below",
        }
    }

    /// Returns whether `a` stands in this relation to `b`.
    pub fn holds(self, a: Cell, b: Cell) -> bool {
        match self {
            Self::LeftOf => a.row == b.row && a.col < b.col,
            Self::RightOf => a.row == b.row && a.col > b.col,
            Self::Above => a.col == b.col && a.row < b.row,
            Self::Below => a.col == b.col && a.row > b.row,
        }
    }
}

/// One shape at one cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// What it is.
    pub shape: Shape,
    /// Its colour.
    pub colour: Colour,
    /// Row from the top.
    pub row: usize,
    /// Column from the left.
    pub col: usize,
}

impl Object {
    /// Returns the cell it occupies.
    pub fn cell(&self) -> Cell {
        Cell { row: self.row, col: self.col }
    }
}

/// A word, which occupies every cell of its row.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Word {
    /// Lower-case text; it is drawn in upper case.
    pub text: String,
    /// Row from the top.
    pub row: usize,
}

/// Everything that an image shows.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scene {
    /// Objects in reading order, at distinct cells.
    pub objects: Vec<Object>,
    /// The word, if there is one.
    pub word: Option<Word>,
    /// What lies behind.
    pub background: Background,
}

impl Scene {
    /// Returns the object at `cell`.
    pub fn object_at(&self, cell: Cell) -> Option<&Object> {
        self.objects.iter().find(|object| object.cell() == cell)
    }

    /// Returns whether a word or an object is at `cell`.
    pub fn is_occupied(&self, cell: Cell) -> bool {
        self.word.as_ref().is_some_and(|word| word.row == cell.row) || self.object_at(cell).is_some()
    }

    /// Returns whether both scenes look the same at `cell`.
    pub fn agrees_at(&self, other: &Self, cell: Cell) -> bool {
        let word = |scene: &Self| scene.word.clone().filter(|word| word.row == cell.row);
        self.background == other.background
            && self.object_at(cell) == other.object_at(cell)
            && word(self) == word(other)
    }

    /// Puts the objects into reading order.
    pub fn sort(&mut self) {
        self.objects.sort_by_key(Object::cell);
    }
}

/// Where objects stand when their caption leaves it open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// In the first cells in reading order: little is left to chance, which a model of a few million parameters learns
    /// in minutes.
    ReadingOrder,
    /// Anywhere.
    Free,
}

/// What can be in a scene, and how large it is drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ShapesWorld {
    /// Height and width of an image in pixels; a multiple of `cells`.
    pub side: usize,
    /// Rows, and columns, of the grid.
    pub cells: usize,
    /// Shapes that are drawn.
    pub shapes: Vec<Shape>,
    /// Colours that are used.
    pub colours: Vec<Colour>,
    /// Backgrounds that are used.
    pub backgrounds: Vec<Background>,
    /// Words that are written, in lower case.
    pub words: Vec<String>,
    /// Side of a shape in pixels.
    pub shape_size: usize,
    /// Side in image pixels of one pixel of the 5x7 font.
    pub letter_scale: usize,
    /// Where objects stand when their caption leaves it open.
    pub placement: Placement,
}

impl Default for ShapesWorld {
    fn default() -> Self {
        Self {
            side: 32,
            cells: 2,
            shapes: Shape::ALL[..4].to_vec(),
            colours: Colour::ALL[..4].to_vec(),
            backgrounds: vec![Background::Black],
            words: ["go", "hi", "no", "up", "ok", "me", "it", "we"].map(str::to_owned).to_vec(),
            shape_size: 12,
            letter_scale: 2,
            placement: Placement::ReadingOrder,
        }
    }
}

impl ShapesWorld {
    /// Checks that everything fits into an image and that prompts have something to choose from.
    ///
    /// # Errors
    /// Names the first setting that is wrong.
    pub fn validate(&self) -> Result<(), String> {
        if self.cells < 2 || !self.side.is_multiple_of(self.cells) {
            return Err(format!("`cells` must be at least 2 and divide `side`, not {} and {}", self.cells, self.side));
        }
        if self.shape_size == 0 || self.shape_size > self.cell_size() {
            return Err(format!("`shape_size` must be 1..={}, not {}", self.cell_size(), self.shape_size));
        }
        let distinct = |count: usize, all: usize| count == all && count >= 2;
        if !distinct(self.shapes.iter().collect::<BTreeSet<_>>().len(), self.shapes.len()) {
            return Err("`shapes` must name at least two, each once".to_owned());
        }
        if !distinct(self.colours.iter().collect::<BTreeSet<_>>().len(), self.colours.len()) {
            return Err("`colours` must name at least two, each once".to_owned());
        }
        if self.backgrounds.is_empty() {
            return Err("`backgrounds` must not be empty".to_owned());
        }
        if self.letter_scale == 0 || GLYPH_HEIGHT * self.letter_scale > self.cell_size() {
            return Err(format!("letters of scale {} do not fit into a cell", self.letter_scale));
        }
        if !distinct(self.words.iter().collect::<BTreeSet<_>>().len(), self.words.len()) {
            return Err("`words` must name at least two, each once".to_owned());
        }
        for word in &self.words {
            if word.is_empty() || word.chars().any(|c| c.is_ascii_uppercase() || glyph(c).is_none()) {
                return Err(format!("word `{word}` must be of the characters a-z and 0-9"));
            }
            if self.word_width(word) > self.side {
                return Err(format!("word `{word}` is wider than an image"));
            }
        }
        Ok(())
    }

    /// Returns the side of a cell in pixels.
    pub fn cell_size(&self) -> usize {
        self.side / self.cells
    }

    /// Returns every cell in reading order.
    pub fn all_cells(&self) -> impl Iterator<Item = Cell> + use<> {
        let cells = self.cells;
        (0..cells * cells).map(move |i| Cell { row: i / cells, col: i % cells })
    }

    /// Returns column and row of the top left pixel of `cell`.
    pub fn cell_origin(&self, cell: Cell) -> (usize, usize) {
        (cell.col * self.cell_size(), cell.row * self.cell_size())
    }

    /// Returns column and row of the top left pixel of a shape's box at `cell`.
    pub fn shape_origin(&self, cell: Cell) -> (usize, usize) {
        let inset = (self.cell_size() - self.shape_size) / 2;
        let (x, y) = self.cell_origin(cell);
        (x + inset, y + inset)
    }

    /// Returns the rows that a word can stand in: the top one and the bottom one.
    pub fn word_rows(&self) -> [usize; 2] {
        [0, self.cells - 1]
    }

    /// Returns the width of `text` in pixels.
    pub fn word_width(&self, text: &str) -> usize {
        (text.chars().count() * (GLYPH_WIDTH + 1)).saturating_sub(1) * self.letter_scale
    }

    /// Returns column and row of the top left pixel of `text` written in `row`.
    pub fn word_origin(&self, text: &str, row: usize) -> (usize, usize) {
        let height = GLYPH_HEIGHT * self.letter_scale;
        (
            self.side.saturating_sub(self.word_width(text)) / 2,
            row * self.cell_size() + self.cell_size().saturating_sub(height) / 2,
        )
    }

    /// Returns the image of `scene`: RGB bytes, row major, `side * side * 3` of them.
    pub fn paint(&self, scene: &Scene) -> Vec<u8> {
        let mut pixels = scene.background.rgb().repeat(self.side * self.side);
        let mut set = |x: usize, y: usize, rgb: [u8; 3]| {
            let at = (y * self.side + x) * 3;
            pixels[at..at + 3].copy_from_slice(&rgb);
        };
        for object in &scene.objects {
            let (left, top) = self.shape_origin(object.cell());
            for i in 0..self.shape_size * self.shape_size {
                let (x, y) = (i % self.shape_size, i / self.shape_size);
                if object.shape.covers(x, y, self.shape_size) {
                    set(left + x, top + y, object.colour.rgb());
                }
            }
        }
        if let Some(word) = &scene.word {
            let mask = word_mask(&word.text, self.letter_scale);
            let (left, top) = self.word_origin(&word.text, word.row);
            for (i, _) in mask.on.iter().enumerate().filter(|(_, on)| **on) {
                set(left + i % mask.width, top + i / mask.width, Colour::WORD.rgb());
            }
        }
        pixels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(shape: Shape) -> Vec<usize> {
        (0..12).map(|j| (0..12).filter(|&i| shape.covers(i, j, 12)).count()).collect()
    }

    #[test]
    fn the_masks_are_those_of_the_definition() {
        assert_eq!(rows(Shape::Circle), [4, 8, 10, 10, 12, 12, 12, 12, 10, 10, 8, 4]);
        assert_eq!(rows(Shape::Square), [0, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 0]);
        assert_eq!(rows(Shape::Triangle), [2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12]);
        assert_eq!(rows(Shape::Cross), [4, 4, 4, 4, 12, 12, 12, 12, 4, 4, 4, 4]);
        assert_eq!(rows(Shape::Diamond), [2, 4, 6, 8, 10, 12, 12, 10, 8, 6, 4, 2]);
    }

    #[test]
    fn the_default_world_is_valid_and_paints_where_it_says() {
        let world = ShapesWorld::default();
        world.validate().unwrap();
        assert_eq!(world.word_origin("go", 0), (5, 1));
        assert_eq!(world.word_origin("go", 1), (5, 17));
        assert_eq!(world.shape_origin(Cell { row: 1, col: 0 }), (2, 18));
        let scene = Scene {
            objects: vec![Object { shape: Shape::Cross, colour: Colour::Blue, row: 1, col: 0 }],
            word: Some(Word { text: "hi".to_owned(), row: 0 }),
            background: Background::Black,
        };
        let pixels = world.paint(&scene);
        let at = |x: usize, y: usize| &pixels[(y * 32 + x) * 3..][..3];
        assert_eq!(at(5, 1), Colour::White.rgb());
        assert_eq!(at(4, 1), Background::Black.rgb());
        assert_eq!(at(7, 24), Colour::Blue.rgb());
        assert_eq!(at(2, 18), Background::Black.rgb());
    }

    #[test]
    fn a_world_that_does_not_fit_is_refused() {
        let changes: [fn(&mut ShapesWorld); 7] = [
            |world| world.cells = 3,
            |world| world.shape_size = 17,
            |world| world.words[0] = "long".to_owned(),
            |world| world.words[0] = "Go".to_owned(),
            |world| world.letter_scale = 3,
            |world| world.colours.truncate(1),
            |world| world.shapes[0] = world.shapes[1],
        ];
        for change in changes {
            let mut world = ShapesWorld::default();
            change(&mut world);
            assert!(world.validate().is_err(), "{world:?}");
        }
    }

    #[test]
    fn relations_need_the_shared_line() {
        let cell = |row, col| Cell { row, col };
        assert!(Relation::LeftOf.holds(cell(0, 0), cell(0, 1)));
        assert!(!Relation::LeftOf.holds(cell(1, 0), cell(0, 1)));
        assert!(Relation::Below.holds(cell(1, 1), cell(0, 1)));
        assert!(!Relation::Above.holds(cell(1, 1), cell(0, 1)));
    }
}
