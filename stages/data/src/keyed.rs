//! Randomness by arithmetic: the value at a place depends on a seed, a name and the place, and on nothing before it.
//!
//! Resuming a stream is therefore a matter of asking for the next place. Knows nothing of samples.

/// Rounds of the Feistel network; eight leave no visible structure in the small domains that we shuffle.
const ROUNDS: u64 = 8;
/// Smallest half of the network's block, in bits: smaller blocks reach only a few of all permutations.
const MIN_HALF_BITS: u32 = 4;

/// Key of one named stream of random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamKey(u64);

impl StreamKey {
    /// Derives the key of the stream `name` under `seed`.
    pub fn derive(seed: u64, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("deepgen data stream v1");
        hasher.update(&seed.to_le_bytes());
        hasher.update(name.as_bytes());
        let mut word = [0; 8];
        word.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        Self(u64::from_le_bytes(word))
    }

    /// Returns the key of a stream below this one, such as one pass over a source.
    pub fn child(self, place: u64) -> Self {
        Self(mix(self.word(place) ^ 0x5851_f42d_4c95_7f2d))
    }

    /// Returns 64 random bits at `place`.
    pub fn word(self, place: u64) -> u64 {
        mix(mix(self.0 ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(self.0))
    }

    /// Returns a number in `0.0..1.0` at `place`, with 53 random bits.
    pub fn unit(self, place: u64) -> f64 {
        (self.word(place) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns a number in `0..n` at `place`; `n` must not be 0.
    pub fn below(self, place: u64, n: u64) -> u64 {
        // The product's high half is below n; its bias, n / 2^64, is far under anything that can be drawn.
        ((u128::from(self.word(place)) * u128::from(n)) >> 64) as u64
    }
}

/// A permutation of `0..n` that is computed element by element.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    key: StreamKey,
    n: u64,
    half_bits: u32,
}

impl Permutation {
    /// Returns the permutation of `0..n` that belongs to `key`; `n` must not be 0.
    pub fn new(key: StreamKey, n: u64) -> Self {
        let bits = u64::BITS - (n - 1).leading_zeros();
        Self { key, n, half_bits: bits.div_ceil(2).max(MIN_HALF_BITS) }
    }

    /// Returns element `i`, for `i` in `0..n`.
    pub fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.n);
        // The network permutes a power of four; walking on until the value falls below n permutes 0..n.
        let mut value = self.encrypt(i);
        while value >= self.n {
            value = self.encrypt(value);
        }
        value
    }

    fn encrypt(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            // Halves have at most 32 bits, so round and half share a word without overlap.
            let next = left ^ (self.key.word(round << 32 | right) >> 17 & mask);
            (left, right) = (right, next);
        }
        left << self.half_bits | right
    }
}

/// Finaliser of SplitMix64: a bijection in which each input bit moves half of the output bits.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_permutation_is_a_bijection() {
        for n in [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 65_537] {
            let permutation = Permutation::new(StreamKey::derive(7, "a").child(n), n);
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let value = permutation.at(i) as usize;
                assert!(!seen[value], "{value} came twice in a permutation of {n}");
                seen[value] = true;
            }
        }
    }

    #[test]
    fn each_element_is_equally_likely_at_each_place() {
        let (n, passes) = (10u64, 20_000u64);
        let key = StreamKey::derive(1, "uniform");
        let mut counts = vec![[0u64; 10]; 10];
        for pass in 0..passes {
            let permutation = Permutation::new(key.child(pass), n);
            for i in 0..n {
                counts[i as usize][permutation.at(i) as usize] += 1;
            }
        }
        let expected = (passes / n) as f64;
        let chi: f64 = counts.iter().flatten().map(|&c| (c as f64 - expected).powi(2) / expected).sum();
        // 81 degrees of freedom: mean 81, standard deviation 12.7.
        assert!((40.0..145.0).contains(&chi), "chi squared {chi}");
    }

    #[test]
    fn small_sets_see_all_their_permutations() {
        let key = StreamKey::derive(3, "small");
        let mut seen = std::collections::BTreeSet::new();
        for pass in 0..2000 {
            let permutation = Permutation::new(key.child(pass), 4);
            seen.insert((0..4).map(|i| permutation.at(i)).collect::<Vec<_>>());
        }
        assert_eq!(seen.len(), 24);
    }

    #[test]
    fn streams_differ_by_seed_and_by_name() {
        let word = |seed, name| StreamKey::derive(seed, name).word(0);
        assert_eq!(word(1, "a"), word(1, "a"));
        assert_ne!(word(1, "a"), word(2, "a"));
        assert_ne!(word(1, "a"), word(1, "b"));
        assert_ne!(StreamKey::derive(1, "a").child(0), StreamKey::derive(1, "a").child(1));
    }
}
