//! Random numbers drawn on the host from a counter-based generator: same seed and name, same numbers, on every device.
//!
//! Knows no module and no step. A stream is named, so that two consumers of one seed never share numbers; Burn's global
//! generator is never used.

use std::cell::RefCell;

use burn::tensor::TensorData;

use crate::{Device, Tensor};

/// Increment of splitmix64 (Steele et al. 2014): odd, close to 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A named stream of random numbers (splitmix64 over a counter).
#[derive(Debug, Clone)]
pub struct Stream {
    state: u64,
}

impl Stream {
    /// Starts the stream `name` of `seed`.
    pub fn new(seed: u64, name: &str) -> Self {
        let key = name.bytes().fold(mix(seed ^ GOLDEN), |key, byte| mix(key.wrapping_add(GOLDEN) ^ u64::from(byte)));
        Self { state: key }
    }

    /// Returns the next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// Returns the next number in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Returns `count` numbers uniform in [-bound, bound).
    pub fn uniforms(&mut self, count: usize, bound: f64) -> Vec<f32> {
        (0..count).map(|_| ((2.0 * self.unit() - 1.0) * bound) as f32).collect()
    }

    /// Returns `count` numbers from N(0, std^2), by the Box-Muller transform.
    pub fn normals(&mut self, count: usize, std: f64) -> Vec<f32> {
        let mut values = Vec::with_capacity(count + 1);
        while values.len() < count {
            // 1 - u is in (0, 1], so that the logarithm is finite.
            let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt() * std;
            let (sin, cos) = (2.0 * std::f64::consts::PI * self.unit()).sin_cos();
            values.push((radius * cos) as f32);
            values.push((radius * sin) as f32);
        }
        values.truncate(count);
        values
    }
}

/// Draws a standard normal tensor from the stream `name` of `seed`.
pub fn noise<const D: usize>(seed: u64, name: &str, shape: [usize; D], device: &Device) -> Tensor<D> {
    let values = Stream::new(seed, name).normals(shape.iter().product(), 1.0);
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Rows of a batch that one pass takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Rows before them.
    pub first: usize,
    /// How many they are; at least 1.
    pub count: usize,
    /// Rows of the whole batch.
    pub total: usize,
}

impl Rows {
    /// Returns all rows of a batch.
    pub fn all(total: usize) -> Self {
        Self { first: 0, count: total, total }
    }
}

/// Where dropout stands.
#[derive(Debug, Clone)]
pub(crate) struct Dropout {
    stream: Stream,
    rows: Rows,
}

impl Dropout {
    /// Draws the mask of a tensor whose first axis holds the rows, each `rows` entries one after the other: of the whole
    /// batch's mask the part that belongs to them.
    fn mask(&mut self, shape: &[usize], probability: f64) -> Vec<f32> {
        let keep = (1.0 / (1.0 - probability)) as f32;
        let threshold = (probability * 65536.0) as u64;
        let count: usize = shape.iter().product();
        let Rows { first, count: own, total } = self.rows;
        // Where the first axis is no multiple of the rows, as with images of several sizes, the part draws for itself.
        let (before, all) = match shape[0].is_multiple_of(own) {
            true => (count / own * first, count / own * total),
            false => (0, count),
        };
        let mut bits = 0;
        let mask = (0..all).map(|i| {
            bits = if i % 4 == 0 { self.stream.next_u64() } else { bits >> 16 };
            if bits & 0xFFFF < threshold { 0.0 } else { keep }
        });
        // The whole of it is drawn: what comes next must stand where it would stand for the whole batch.
        let whole: Vec<f32> = mask.collect();
        if all == count { whole } else { whole[before..before + count].to_vec() }
    }
}

thread_local! {
    static DROPOUT: RefCell<Option<Dropout>> = const { RefCell::new(None) };
}

/// Runs `forward` with dropout switched on, its masks drawn in order from `seed`.
///
/// `rows` are those of a batch that `forward` takes: together the parts of a batch have the masks of the whole.
/// Outside of it every dropout is the identity, which is what inference and a frozen model want.
pub fn with_dropout<R>(seed: u64, rows: Rows, forward: impl FnOnce() -> R) -> R {
    with_dropout_at(Some(Dropout { stream: Stream::new(seed, "dropout"), rows }), forward)
}

/// Returns where dropout stands, for [`with_dropout_at`]; `None` when it is off.
pub(crate) fn dropout_place() -> Option<Dropout> {
    DROPOUT.with(|place| place.borrow().clone())
}

/// Runs `forward` with dropout off or at a place of its stream, and puts it back to where it stood before.
pub(crate) fn with_dropout_at<R>(place: Option<Dropout>, forward: impl FnOnce() -> R) -> R {
    /// Restores even when `forward` panics.
    struct Restore(Option<Dropout>);
    impl Drop for Restore {
        fn drop(&mut self) {
            DROPOUT.with(|place| *place.borrow_mut() = self.0.take());
        }
    }
    let _restore = Restore(DROPOUT.with(|current| current.replace(place)));
    forward()
}

/// Zeroes each element with `probability` and rescales the others, inside [`with_dropout`]; else returns `x`.
pub fn dropout<const D: usize>(x: Tensor<D>, probability: f64) -> Tensor<D> {
    if probability <= 0.0 {
        return x;
    }
    let shape = x.dims();
    let mask = DROPOUT.with(|place| place.borrow_mut().as_mut().map(|place| place.mask(&shape, probability)));
    match mask {
        Some(mask) => {
            let dtype = x.dtype();
            let mask = Tensor::<D>::from_data(TensorData::new(mask, shape), &x.device().without_autodiff());
            x * if mask.dtype() == dtype { mask } else { mask.cast(dtype) }
        }
        None => x,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_seed_and_name_only() {
        let a = Stream::new(1, "noise").normals(5, 1.0);
        assert_eq!(a, Stream::new(1, "noise").normals(5, 1.0));
        assert_ne!(a, Stream::new(2, "noise").normals(5, 1.0));
        assert_ne!(a, Stream::new(1, "noisf").normals(5, 1.0));
        // A prefix of a longer draw is the shorter draw.
        assert_eq!(a, Stream::new(1, "noise").normals(6, 1.0)[..5]);
    }

    #[test]
    fn normals_have_the_asked_moments() {
        let values = Stream::new(7, "moments").normals(100_000, 2.0);
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / 1e5;
        let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.03, "{mean}");
        assert!((variance - 4.0).abs() < 0.08, "{variance}");
    }

    #[test]
    fn dropout_acts_only_inside_its_scope_and_keeps_the_mean() {
        let ones = Tensor::<2>::ones([100, 100], &Device::flex());
        assert_eq!(dropout(ones.clone(), 0.25).sum().into_scalar::<f32>(), 10_000.0);
        let dropped = with_dropout(3, Rows::all(100), || dropout(ones.clone(), 0.25));
        let mean = dropped.clone().mean().into_scalar::<f32>();
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
        let again = with_dropout(3, Rows::all(100), || dropout(ones, 0.25));
        assert_eq!(dropped.into_data(), again.into_data());
    }

    #[test]
    fn the_parts_of_a_batch_have_the_masks_of_the_whole() {
        // Two dropouts in a row, of 5 samples with 3 and with 2 rows each, 7 wide.
        let both = |rows: Rows| {
            let ones = |per_row: usize| Tensor::<2>::ones([rows.count * per_row, 7], &Device::flex());
            with_dropout(9, rows, || {
                [3, 2].map(|n| dropout(ones(n), 0.4).into_data().iter::<f32>().collect::<Vec<f32>>())
            })
        };
        let whole = both(Rows::all(5));
        let parts = [(0, 2), (2, 2), (4, 1)].map(|(first, count)| both(Rows { first, count, total: 5 }));
        for place in 0..2 {
            let together: Vec<f32> = parts.iter().flat_map(|part| part[place].iter().copied()).collect();
            assert_eq!(together, whole[place]);
            assert!(whole[place].contains(&0.0));
        }
    }
}
