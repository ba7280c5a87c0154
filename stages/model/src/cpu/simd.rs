//! Loops that the compiler turns into vector code, compiled for AVX-512, AVX2 and the baseline and chosen at run time.
//!
//! Knows no tensor. Sums keep lanes that are added up in a fixed order.

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
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5.000_000_3e-1);
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    (p * r).mul_add(r, r + 1.0) * power
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Sum of f(i) over 0..len, in 64 lanes: four vectors, so that an addition need not wait for the one before.
#[inline(always)]
pub(super) fn sum(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    const WIDE: usize = 4 * LANES;
    let mut lanes = [0.0f32; LANES];
    let wide = len / WIDE * WIDE;
    if wide > 0 {
        let mut four = [0.0f32; WIDE];
        let mut start = 0;
        while start < wide {
            for (lane, total) in four.iter_mut().enumerate() {
                *total += f(start + lane);
            }
            start += WIDE;
        }
        for lane in 0..LANES {
            lanes[lane] = (four[lane] + four[lane + LANES]) + (four[lane + 2 * LANES] + four[lane + 3 * LANES]);
        }
    }
    let whole = len / LANES * LANES;
    let mut start = wide;
    while start < whole {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(start + lane);
        }
        start += LANES;
    }
    // Halves are added on halves: a chain of additions would take four times as long.
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    let mut total = lanes[0];
    for i in whole..len {
        total += f(i);
    }
    total
}

/// Largest element; NaN may be lost.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    const WIDE: usize = 4 * LANES;
    let mut lanes = [f32::NEG_INFINITY; WIDE];
    let (chunks, rest) = values.as_chunks::<WIDE>();
    for chunk in chunks {
        for (best, &value) in lanes.iter_mut().zip(chunk) {
            *best = if value > *best { value } else { *best };
        }
    }
    let mut best = [f32::NEG_INFINITY; LANES];
    for (i, &value) in lanes.iter().enumerate() {
        let best = &mut best[i % LANES];
        *best = if value > *best { value } else { *best };
    }
    best.iter().chain(rest).fold(f32::NEG_INFINITY, |best, &value| if value > best { value } else { best })
}

kernel! {
    /// total += part.
    pub(super) fn add_assign(total: &mut [f32], part: &[f32]) {
        for (total, &part) in total.iter_mut().zip(part) {
            *total += part;
        }
    }
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
            assert_eq!(sum(len, |i| values[i]), (len * (len - 1) / 2) as f32);
            assert_eq!(max(&values[..len]), (len - 1) as f32);
        }
    }
}
