//! Elementary functions that the compiler turns into vector instructions: no branches, no library calls.

/// Compiles a function twice, for AVX2 and for the baseline, and picks at run time. Both give the same bits: no
/// fused multiply-add is used, and the order of every sum is written out.
macro_rules! vectorized {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn body($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) {
                    body($($arg),*);
                }
                if std::is_x86_feature_detected!("avx2") {
                    #[expect(unsafe_code, reason = "calling a function compiled for a feature that was just detected")]
                    // SAFETY: the processor has AVX2.
                    unsafe {
                        return avx2($($arg),*);
                    }
                }
            }
            body($($arg),*)
        }
    };
}
pub(super) use vectorized;

/// `e^x`, relative error below 2e-7; 0 below -87.3, saturating above 88.
///
/// # Source
/// Cephes `expf`: argument reduction by ln 2 in two parts, polynomial of degree 5.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let clamped = if x > 88.0 { 88.0 } else { x };
    let clamped = if clamped < -87.3 { -87.3 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let y = p * r * r + r + 1.0;
    // 2^n: the low bits of `shifted` hold n.
    let two_n = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let y = y * two_n;
    if x < -87.3 { 0.0 } else { y }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Exact (erf) GELU and its derivative: `(x Φ(x), Φ(x) + x φ(x))`, absolute error below 3e-7.
///
/// # Source
/// Abramowitz & Stegun 7.1.26 for the tail of Φ; its `e^{-x²/2}` also gives the density φ.
#[inline(always)]
pub(super) fn gelu_and_derivative(x: f32) -> (f32, f32) {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = 1.061_405_4;
    let p = p * t - 1.453_152_1;
    let p = p * t + 1.421_413_8;
    let p = p * t - 0.284_496_72;
    let p = p * t + 0.254_829_6;
    let e = exp(-z * z);
    let tail = 0.5 * p * t * e; // 1 - Φ(|x|)
    let cdf = if x < 0.0 { tail } else { 1.0 - tail };
    let density = e * 0.398_942_3;
    (x * cdf, cdf + x * density)
}

/// Sum in eight lanes, then pairwise: the same order on every machine.
#[inline(always)]
pub(super) fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let chunks = values.chunks_exact(8);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v;
        }
    }
    fold(lanes) + rest
}

/// Dot product, order as in [`sum`].
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let (ca, cb) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in ca.zip(cb) {
        for i in 0..8 {
            lanes[i] += x[i] * y[i];
        }
    }
    fold(lanes) + rest
}

#[inline(always)]
fn fold(l: [f32; 8]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_three_ulps_of_the_library() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01 + 0.003;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= 3e-7 * exact, "exp({x}) = {ours}, not {exact}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    /// `math.erf` of CPython 3.11: x, gelu(x), gelu'(x).
    #[test]
    fn gelu_equals_the_error_function_form() {
        for (x, y, dy) in [
            (-4.0, -1.266_85e-4, -5.036_5e-4),
            (-1.5, -0.100_210_8, -0.127_469_2),
            (-0.3, -0.114_626_7, 0.267_672_2),
            (0.0, 0.0, 0.5),
            (0.7, 0.530_625_4, 0.976_614_1),
            (3.0, 2.995_950_3, 1.011_945_5),
        ] {
            let (a, b) = gelu_and_derivative(x);
            assert!(
                (a - y).abs() < 4e-7 && (b - dy).abs() < 4e-7,
                "gelu({x}) = {a}, {b}; expected {y}, {dy}"
            );
        }
    }
}
