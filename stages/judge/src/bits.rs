//! Sets of pixels as bits, a row at a time: fast overlap of masks with every window of an image.
//!
//! Knows neither colours nor shapes. Windows and masks are at most 64 pixels wide; images may be wider.

/// Pixels that are on.
#[derive(Debug, Clone)]
pub struct BitRows {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    words_per_row: usize,
    words: Vec<u64>,
}

impl BitRows {
    /// Returns a set without pixels.
    pub fn new(width: usize, height: usize) -> Self {
        // One word more than the pixels need, so that a window may always read the next word.
        let words_per_row = width / 64 + 2;
        Self { width, height, words_per_row, words: vec![0; words_per_row * height] }
    }

    /// Turns a pixel on.
    pub fn set(&mut self, x: usize, y: usize) {
        self.words[y * self.words_per_row + x / 64] |= 1 << (x % 64);
    }

    /// Returns the pixels that are on in row `y`.
    pub fn row_count(&self, y: usize) -> u32 {
        count(&self.words[y * self.words_per_row..][..self.words_per_row])
    }

    /// Fills `rows` with the window whose top left pixel is (`x`, `y`), `width` wide and as high as `rows`, and
    /// returns the pixels that are on in it.
    pub fn window(&self, x: usize, y: usize, width: usize, rows: &mut [u64]) -> u32 {
        let (word, shift) = (x / 64, x % 64);
        let keep = if width == 64 { u64::MAX } else { (1 << width) - 1 };
        for (j, row) in rows.iter_mut().enumerate() {
            let at = (y + j) * self.words_per_row + word;
            let high = if shift == 0 { 0 } else { self.words[at + 1] << (64 - shift) };
            *row = (self.words[at] >> shift | high) & keep;
        }
        count(rows)
    }
}

/// A mask to look for.
#[derive(Debug, Clone)]
pub struct Template {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Pixels that are on.
    pub area: u32,
    rows: Vec<u64>,
}

impl Template {
    /// Returns the mask of the pixels, given as column and row, for which `is_on` holds.
    pub fn new(width: usize, height: usize, is_on: impl Fn(usize, usize) -> bool) -> Self {
        let row = |y: usize| (0..width).filter(|&x| is_on(x, y)).fold(0, |row, x| row | 1 << x);
        let rows: Vec<u64> = (0..height).map(row).collect();
        Self { width, height, area: count(&rows), rows }
    }

    /// Returns the pixels that are on in both the mask and the window.
    pub fn shared(&self, window: &[u64]) -> u32 {
        self.rows.iter().zip(window).map(|(a, b)| (a & b).count_ones()).sum()
    }

    /// Returns the intersection over union with a window that has `area` pixels on.
    pub fn fit(&self, window: &[u64], area: u32) -> f32 {
        let shared = self.shared(window);
        shared as f32 / (self.area + area - shared).max(1) as f32
    }
}

fn count(rows: &[u64]) -> u32 {
    rows.iter().map(|row| row.count_ones()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cross_word_borders() {
        let mut bits = BitRows::new(130, 3);
        for x in [0, 60, 63, 64, 70, 129] {
            bits.set(x, 1);
        }
        assert_eq!((bits.row_count(0), bits.row_count(1)), (0, 6));
        let mut rows = [0; 2];
        assert_eq!(bits.window(60, 1, 12, &mut rows), 4);
        assert_eq!(rows, [0b0100_0001_1001, 0]);
        assert_eq!(bits.window(118, 0, 12, &mut rows), 1);
        assert_eq!(rows, [0, 1 << 11]);
        assert_eq!(bits.window(64, 1, 64, &mut rows[..1]), 2);
    }

    #[test]
    fn the_fit_is_intersection_over_union() {
        let mask = Template::new(4, 2, |x, y| y == 0 && x < 2);
        assert_eq!(mask.area, 2);
        assert_eq!(mask.fit(&[0b0011, 0], 2), 1.0);
        assert_eq!(mask.fit(&[0b0110, 0], 2), 1.0 / 3.0);
        assert_eq!(mask.fit(&[0, 0b0011], 2), 0.0);
        assert_eq!(mask.fit(&[0, 0], 0), 0.0);
    }
}
