//! Choices by chance, in sequence, from one keyed stream.
//!
//! Knows how to choose, not what is chosen.

use crate::keyed::StreamKey;

/// A sequence of choices that depends on a seed, a name and a place only.
#[derive(Debug, Clone)]
pub struct Draw {
    key: StreamKey,
    place: u64,
}

impl Draw {
    /// Returns the choices that belong to place `index` of the stream `name` under `seed`.
    pub fn new(seed: u64, name: &str, index: u64) -> Self {
        Self { key: StreamKey::derive(seed, name).child(index), place: 0 }
    }

    /// Returns a number below `n`, which must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.place += 1;
        self.key.below(self.place, n as u64) as usize
    }

    /// Returns true with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.place += 1;
        self.key.unit(self.place) < p
    }

    /// Returns one of `items`, which must not be empty.
    pub fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }

    /// Returns `n` of `items`, or all if there are fewer, in the order in which they were drawn.
    pub fn sample<T: Clone>(&mut self, items: &[T], n: usize) -> Vec<T> {
        let mut left = items.to_vec();
        (0..n.min(items.len())).map(|_| left.swap_remove(self.below(left.len()))).collect()
    }

    /// Returns one of `items` with probability proportional to its weight; the weights must have a positive sum.
    pub fn weighted<T: Copy>(&mut self, items: &[(T, f64)]) -> T {
        self.place += 1;
        let mut rest = self.key.unit(self.place) * items.iter().map(|(_, weight)| weight).sum::<f64>();
        for &(item, weight) in items {
            if rest < weight {
                return item;
            }
            rest -= weight;
        }
        // Rounding can leave a crumb after the last subtraction.
        items[items.len() - 1].0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_the_frequencies() {
        let mut draw = Draw::new(1, "weights", 0);
        let mut counts = [0u32; 3];
        for _ in 0..12_000 {
            counts[draw.weighted(&[(0, 1.0), (1, 0.0), (2, 3.0)])] += 1;
        }
        assert_eq!(counts[1], 0);
        assert!((2800..3200).contains(&counts[0]), "{counts:?}");
    }

    #[test]
    fn a_sample_has_no_element_twice() {
        let items: Vec<usize> = (0..6).collect();
        for place in 0..100 {
            let mut drawn = Draw::new(2, "sample", place).sample(&items, 4);
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn.len(), 4);
        }
        assert_eq!(Draw::new(2, "sample", 0).sample(&items, 9).len(), 6);
    }
}
