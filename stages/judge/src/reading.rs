//! What is in the pixels of a shapes-world image: objects with shape, colour and box, and words.
//!
//! Never sees a scene description: it knows only the world's palette, masks and font. Every pixel is taken as a
//! blend of the background and one colour; masks and glyphs are then matched against the pixels of one colour by
//! intersection over union at every offset. There are no connected components, so touching shapes and crumbs, which
//! autoencoders and young models leave, do not matter.

use deepgen_contract::shapes::{Background, Cell, Colour, GLYPH_HEIGHT, GLYPH_WIDTH, Shape, ShapesWorld, glyph};
use image::RgbImage;

use crate::bits::{BitRows, Template};

/// Least intersection over union of an object; clean images give 1, and a wrong shape in a clean image at most 0.83.
const OBJECT_THRESHOLD: f32 = 0.62;
/// Least intersection over union of a word, glyphs and all other ink of its rows taken together.
const WORD_THRESHOLD: f32 = 0.55;
/// A pixel belongs to a colour when it is at least this much of it.
const ON_THRESHOLD: f32 = 0.5;
/// Two findings whose boxes are nearer than this share of their side are one.
const MERGE_SHARE: f32 = 0.6;

/// A rectangle of pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PixelBox {
    /// Leftmost column.
    pub x: usize,
    /// Topmost row.
    pub y: usize,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl PixelBox {
    /// Returns column and row of the centre.
    pub fn centre(&self) -> (f32, f32) {
        (self.x as f32 + self.width as f32 / 2.0, self.y as f32 + self.height as f32 / 2.0)
    }

    fn is_near(&self, other: &Self) -> bool {
        let ((ax, ay), (bx, by)) = (self.centre(), other.centre());
        (ax - bx).abs() < MERGE_SHARE * (self.width + other.width) as f32 / 2.0
            && (ay - by).abs() < MERGE_SHARE * (self.height + other.height) as f32 / 2.0
    }
}

/// An object that was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FoundObject {
    /// Shape.
    pub shape: Shape,
    /// Colour.
    pub colour: Colour,
    /// Where.
    pub at: PixelBox,
    /// Intersection over union with the shape's mask.
    pub score: f32,
}

/// A word that was found.
#[derive(Debug, Clone, PartialEq)]
pub struct FoundWord {
    /// Lower-case text.
    pub text: String,
    /// Where.
    pub at: PixelBox,
    /// Intersection over union with the word's mask.
    pub score: f32,
}

/// What an image shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Objects, the surest first.
    pub objects: Vec<FoundObject>,
    /// Words from the top down.
    pub words: Vec<FoundWord>,
    /// Background.
    pub background: Background,
    /// Side of a cell in pixels.
    pub cell_size: usize,
}

impl Found {
    /// Returns the cell that holds the centre of a box.
    pub fn cell(&self, at: &PixelBox) -> Cell {
        let (x, y) = at.centre();
        Cell { row: y as usize / self.cell_size, col: x as usize / self.cell_size }
    }

    /// Returns the surest object centred in `cell`.
    pub fn object_at(&self, cell: Cell) -> Option<&FoundObject> {
        self.objects.iter().find(|object| self.cell(&object.at) == cell)
    }

    /// Returns the word in the row of cells `row`.
    pub fn word_in(&self, row: usize) -> Option<&FoundWord> {
        self.words.iter().find(|word| self.cell(&word.at).row == row)
    }

    /// Returns the mean fit of everything found; 0 when nothing was.
    pub fn quality(&self) -> f32 {
        let scores: Vec<f32> = self.objects.iter().map(|o| o.score).chain(self.words.iter().map(|w| w.score)).collect();
        if scores.is_empty() { 0.0 } else { scores.iter().sum::<f32>() / scores.len() as f32 }
    }
}

/// Reads text in images.
pub trait TextReader: Send + Sync {
    /// Returns the lines of text in reading order.
    fn lines(&self, image: &RgbImage) -> Vec<String>;
}

/// Reads images of one world.
#[derive(Debug, Clone)]
pub struct Reader {
    backgrounds: Vec<Background>,
    /// Colours of objects, and the colour of words if it is not among them.
    colours: Vec<Colour>,
    num_object_colours: usize,
    shapes: Vec<(Shape, Template)>,
    glyphs: Vec<(char, Template)>,
    letter_scale: usize,
    cell_size: usize,
}

impl Reader {
    /// Returns the reader of `world`.
    ///
    /// # Errors
    /// When a shape or a letter is wider than 64 pixels.
    pub fn new(world: &ShapesWorld) -> Result<Self, String> {
        let (size, scale) = (world.shape_size, world.letter_scale);
        if size > 64 || GLYPH_WIDTH * scale > 64 {
            return Err(format!("shapes of {size} and letters of {} pixels: 64 can be read", GLYPH_WIDTH * scale));
        }
        let mut colours = world.colours.clone();
        let num_object_colours = colours.len();
        if !colours.contains(&Colour::WORD) {
            colours.push(Colour::WORD);
        }
        let shapes =
            world.shapes.iter().map(|&shape| (shape, Template::new(size, size, |x, y| shape.covers(x, y, size))));
        let has_digits = world.words.iter().any(|word| word.contains(|c: char| c.is_ascii_digit()));
        let letters = ('a'..='z').chain('0'..='9').filter(|c| has_digits || !c.is_ascii_digit());
        let glyphs = letters.filter_map(|letter| {
            let rows = glyph(letter)?;
            let is_on = |x: usize, y: usize| rows[y / scale] >> (GLYPH_WIDTH - 1 - x / scale) & 1 == 1;
            Some((letter, Template::new(GLYPH_WIDTH * scale, GLYPH_HEIGHT * scale, is_on)))
        });
        Ok(Self {
            backgrounds: world.backgrounds.clone(),
            num_object_colours,
            shapes: shapes.collect(),
            glyphs: glyphs.collect(),
            colours,
            letter_scale: scale,
            cell_size: world.cell_size(),
        })
    }

    /// Returns what `image` shows.
    pub fn read(&self, image: &RgbImage) -> Found {
        let background = self.background(image);
        let masks = self.classify(image, background);
        let ink = self.colours.iter().position(|&colour| colour == Colour::WORD);
        let mut words = ink.map_or_else(Vec::new, |ink| self.words(&masks[ink]));
        let mut objects = self.objects(&masks);
        // A letter can look like a shape in the colour of words, and the other way round: the better fit stays.
        objects.retain(|object| {
            object.colour != Colour::WORD
                || !words.iter().any(|w| overlap(&w.at, &object.at) && w.score >= object.score)
        });
        words.retain(|word| {
            !objects.iter().any(|o| o.colour == Colour::WORD && overlap(&word.at, &o.at) && o.score > word.score)
        });
        words.sort_by_key(|word| (word.at.y, word.at.x));
        Found { objects, words, background, cell_size: self.cell_size }
    }

    /// Returns the known background nearest to the median of the border.
    fn background(&self, image: &RgbImage) -> Background {
        let (width, height) = image.dimensions();
        let is_border = |x: u32, y: u32| x == 0 || y == 0 || x + 1 == width || y + 1 == height;
        let median: [i32; 3] = std::array::from_fn(|channel| {
            let border = image.enumerate_pixels().filter(|(x, y, _)| is_border(*x, *y));
            let mut levels: Vec<u8> = border.map(|(_, _, pixel)| pixel.0[channel]).collect();
            let middle = levels.len() / 2;
            if levels.is_empty() { 0 } else { i32::from(*levels.select_nth_unstable(middle).1) }
        });
        let distance = |background: &Background| -> i32 {
            median.iter().zip(background.rgb()).map(|(&a, b)| (a - i32::from(b)).pow(2)).sum()
        };
        self.backgrounds.iter().copied().min_by_key(distance).unwrap_or(Background::Black)
    }

    /// Returns the pixels of each colour: those that are at least half of it, and less of another blend.
    fn classify(&self, image: &RgbImage, background: Background) -> Vec<BitRows> {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let base = background.rgb().map(f32::from);
        let axes: Vec<([f32; 3], f32)> = self
            .colours
            .iter()
            .map(|colour| {
                let rgb = colour.rgb().map(f32::from);
                let axis: [f32; 3] = std::array::from_fn(|i| rgb[i] - base[i]);
                (axis, dot(axis, axis))
            })
            .collect();
        let mut masks = vec![BitRows::new(width, height); axes.len()];
        for (x, y, pixel) in image.enumerate_pixels() {
            let offset: [f32; 3] = std::array::from_fn(|i| f32::from(pixel.0[i]) - base[i]);
            // The squared distance to the blend, short of the term |offset|^2 that all colours share.
            let blends = axes.iter().enumerate().map(|(class, &(axis, length))| {
                let along = dot(offset, axis);
                let alpha = along / length;
                let clamped = alpha.clamp(0.0, 1.0);
                (class, alpha, clamped * (clamped * length - 2.0 * along))
            });
            let nearest = blends.min_by(|a, b| a.2.total_cmp(&b.2));
            if let Some((class, alpha, _)) = nearest
                && alpha > ON_THRESHOLD
            {
                masks[class].set(x as usize, y as usize);
            }
        }
        masks
    }

    /// Returns the objects by greedy non-maximum suppression over all shapes, colours and offsets.
    fn objects(&self, masks: &[BitRows]) -> Vec<FoundObject> {
        let mut candidates = Vec::new();
        for (&colour, mask) in self.colours[..self.num_object_colours].iter().zip(masks) {
            let Some((_, first)) = self.shapes.first() else { break };
            let (width, height) = (first.width, first.height);
            for (y, x) in offsets(mask, width, height) {
                let mut rows = [0; 64];
                let area = mask.window(x, y, width, &mut rows[..height]);
                let best = self.shapes.iter().map(|(shape, template)| (*shape, template.fit(&rows, area)));
                let best = best.filter(|(_, score)| *score >= OBJECT_THRESHOLD);
                candidates.extend(best.map(|(shape, score)| {
                    let at = PixelBox { x, y, width, height };
                    FoundObject { shape, colour, at, score }
                }));
            }
        }
        // Ties are broken by position, so that a reading is the same everywhere.
        candidates.sort_by(|a, b| b.score.total_cmp(&a.score).then((a.at.y, a.at.x).cmp(&(b.at.y, b.at.x))));
        let mut kept: Vec<FoundObject> = Vec::new();
        for candidate in candidates {
            if !kept.iter().any(|object| object.at.is_near(&candidate.at)) {
                kept.push(candidate);
            }
        }
        kept
    }

    /// Returns the best readings of the ink, at most one for each band of rows.
    fn words(&self, ink: &BitRows) -> Vec<FoundWord> {
        let scale = self.letter_scale;
        let (letter_width, height, pitch) = (GLYPH_WIDTH * scale, GLYPH_HEIGHT * scale, (GLYPH_WIDTH + 1) * scale);
        let mut candidates = Vec::new();
        for y in 0..(ink.height + 1).saturating_sub(height) {
            let band: u32 = (y..y + height).map(|row| ink.row_count(row)).sum();
            // The thinnest letter has 9 font pixels; half of one is no word.
            if (band as usize) < 5 * scale * scale || ink.width < letter_width {
                continue;
            }
            let letters: Vec<Letter> = (0..=ink.width - letter_width).map(|x| self.best_letter(ink, x, y)).collect();
            let most = (ink.width + scale) / pitch;
            for length in 1..=most {
                let width = length * pitch - scale;
                for x in 0..=ink.width - width {
                    let word = || (0..length).map(|i| &letters[x + i * pitch]);
                    let shared: u32 = word().map(|letter| letter.shared).sum();
                    let area: u32 = word().map(|letter| letter.area).sum();
                    let score = shared as f32 / (area + band - shared) as f32;
                    if score >= WORD_THRESHOLD {
                        candidates.push((score, PixelBox { x, y, width, height }, word().map(|l| l.letter).collect()));
                    }
                }
            }
        }
        candidates
            .sort_by(|a: &(f32, PixelBox, String), b| b.0.total_cmp(&a.0).then((a.1.y, a.1.x).cmp(&(b.1.y, b.1.x))));
        let mut kept: Vec<FoundWord> = Vec::new();
        for (score, at, text) in candidates {
            if kept.iter().all(|word| word.at.y.abs_diff(at.y) >= height) {
                kept.push(FoundWord { text, at, score });
            }
        }
        kept
    }

    fn best_letter(&self, ink: &BitRows, x: usize, y: usize) -> Letter {
        let mut rows = [0; 64 * GLYPH_HEIGHT];
        let height = GLYPH_HEIGHT * self.letter_scale;
        let inside = ink.window(x, y, GLYPH_WIDTH * self.letter_scale, &mut rows[..height]);
        let mut best = Letter { letter: ' ', shared: 0, area: 0 };
        let mut best_fit = f32::MIN;
        for (letter, template) in &self.glyphs {
            let shared = template.shared(&rows);
            let fit = shared as f32 / (template.area + inside - shared) as f32;
            if fit > best_fit {
                best_fit = fit;
                best = Letter { letter: *letter, shared, area: template.area };
            }
        }
        best
    }
}

impl TextReader for Reader {
    fn lines(&self, image: &RgbImage) -> Vec<String> {
        self.read(image).words.into_iter().map(|word| word.text).collect()
    }
}

/// The glyph that fits the ink at one offset best.
struct Letter {
    letter: char,
    shared: u32,
    area: u32,
}

fn dot(a: [f32; 3], b: [f32; 3]) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

fn overlap(a: &PixelBox, b: &PixelBox) -> bool {
    a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height
}

/// Returns rows and columns at which a window of a size fits into `mask`, for masks that are not empty.
fn offsets(mask: &BitRows, width: usize, height: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
    let is_empty = (0..mask.height).all(|row| mask.row_count(row) == 0);
    let rows = if is_empty { 0 } else { (mask.height + 1).saturating_sub(height) };
    let columns = (mask.width + 1).saturating_sub(width);
    (0..rows).flat_map(move |y| (0..columns).map(move |x| (y, x)))
}
