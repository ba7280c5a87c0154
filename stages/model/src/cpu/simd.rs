//! Loops that the compiler turns into vector code, compiled for AVX-512, AVX2 and the baseline and chosen at run time.
//!
//! Knows no tensor. Sums keep lanes that are added up in a fixed order.

/// Elements of a cache line.
pub(super) const LINE: usize = 16;
/// Lanes that reductions keep apart.
pub(super) const LANES: usize = 16;

/// Defines a function whose body is compiled for several instruction sets.
macro_rules! kernel {
    ($(#[$meta:meta])* pub(super) fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        pub(super) fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $type),*) $(-> $result)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $type),*) $(-> $result)? { body($($arg),*) }
                let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
                if has_avx2
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                {
                    // SAFETY: the features were just detected.
                    return unsafe { avx512($($arg),*) };
                }
                if has_avx2 {
                    // SAFETY: the features were just detected.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(super) use kernel;

/// e^x to about 2 units in the last place (Cephes' expf polynomial); saturates instead of overflowing, and keeps NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, which then lies in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // In this order the comparisons are one instruction each, and let NaN through.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    // In pairs, whose parts do not wait for each other (Estrin's scheme).
    let r2 = r * r;
    let high = r.mul_add(1.987_569_1e-4, 1.398_199_9e-3);
    let middle = r.mul_add(8.333_452e-3, 4.166_579_6e-2);
    let low = r.mul_add(1.666_666_5e-1, 5.000_000_3e-1);
    let p = high.mul_add(r2 * r2, middle.mul_add(r2, low));
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    p.mul_add(r2, r + 1.0) * power
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Sum of f over the elements that equally long slices have at each place, in 64 lanes: four vectors, so that an addition
/// need not wait for the one before.
#[inline(always)]
pub(super) fn sum<const N: usize>(slices: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    const WIDE: usize = 4 * LANES;
    // Blocks of a known size, equally many: a check of bounds in the loops would keep them from becoming vector code.
    let len = slices[0].len();
    let wide = slices.map(|slice| slice[..len].as_chunks::<WIDE>());
    let (wide, rest) = (wide.map(|(wide, _)| &wide[..len / WIDE]), wide.map(|(_, rest)| rest.as_chunks::<LANES>()));
    let (narrow, rest) = (rest.map(|(narrow, _)| &narrow[..len % WIDE / LANES]), rest.map(|(_, rest)| rest));
    let mut lanes = [0.0f32; LANES];
    if !wide[0].is_empty() {
        let mut four = [0.0f32; WIDE];
        for i in 0..wide[0].len() {
            let block = wide.map(|wide| &wide[i]);
            for (lane, total) in four.iter_mut().enumerate() {
                *total += f(block.map(|block| block[lane]));
            }
        }
        for lane in 0..LANES {
            lanes[lane] = (four[lane] + four[lane + LANES]) + (four[lane + 2 * LANES] + four[lane + 3 * LANES]);
        }
    }
    for i in 0..narrow[0].len() {
        let block = narrow.map(|narrow| &narrow[i]);
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(block.map(|block| block[lane]));
        }
    }
    (0..len % LANES).fold(add_up(lanes), |total, i| total + f(rest.map(|rest| rest[i])))
}

/// Sum of all lanes: halves are added on halves, for a chain of additions would take four times as long.
#[inline(always)]
pub(super) fn add_up(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

/// Largest element; NaN may be lost.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    let larger = |best: f32, value: f32| if value > best { value } else { best };
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(best, &value)| *best = larger(*best, value));
    }
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] = larger(lanes[lane], lanes[lane + half]);
        }
    }
    rest.iter().fold(lanes[0], |best, &value| larger(best, value))
}

kernel! {
    /// total += part.
    pub(super) fn add_assign(total: &mut [f32], part: &[f32]) {
        for (total, &part) in total.iter_mut().zip(part) {
            *total += part;
        }
    }
}

/// Asks for the cache line of a place that will be read or written soon; any place will do.
#[inline(always)]
pub(super) fn prefetch(place: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Asks for all cache lines of a slice.
pub(super) fn prefetch_all(values: &[f32]) {
    values.chunks(LINE).for_each(|line| prefetch(line.as_ptr()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_library() {
        for i in -8600..8700 {
            let x = i as f32 * 0.01;
            let relative = (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs();
            assert!(relative < 3e-7, "{x}: {relative:.1e}");
        }
        assert!(exp(-1000.0) < 1e-37 && exp(1000.0).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_cover_the_tail() {
        let values: Vec<f32> = (0..200).map(|i| i as f32).collect();
        for len in [3, 37, 64, 101, 200] {
            assert_eq!(sum([&values[..len]], |[value]| value), (len * (len - 1) / 2) as f32);
            assert_eq!(max(&values[..len]), (len - 1) as f32);
            for at in 0..len {
                let mut one = vec![-2.0; len];
                one[at] = -1.0;
                assert_eq!(max(&one), -1.0, "the largest of {len} is at {at}");
            }
        }
    }
}
