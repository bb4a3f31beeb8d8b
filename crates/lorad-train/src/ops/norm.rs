//! Group norm and layer norm with frozen scale and shift: only the input gets a gradient.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    attach::{Value, attach, saved, with_values},
    buffer::room,
    composed,
    math::{sigmoid, vectorized},
};

/// Group norm, and SiLU on its result if asked for. Keeps `x` and one mean and deviation per group.
///
/// # Shapes
/// `x` (b, …, c), channels last; `weight`, `bias` (c), untracked -> as `x`.
///
/// # Errors
/// If `c` is no multiple of `groups`.
///
/// # Source
/// Wu & He 2018; the gradient is the three-term form of batch norm's with the mean taken over the group.
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, eps: f64, silu: bool) -> Result<Tensor> {
    let dims = x.dims();
    let (b, c) = (dims[0], dims[dims.len() - 1]);
    if groups == 0 || !c.is_multiple_of(groups) || weight.dims() != [c] || bias.dims() != [c] {
        bail!(
            "group norm of shape {dims:?} in {groups} groups, weight {:?}, bias {:?}",
            weight.dims(),
            bias.dims()
        )
    }
    if !x.device().is_cpu() {
        return composed::group_norm(x, weight, bias, groups, eps, silu);
    }
    let saved_x = saved(x)?;
    let (weight, bias): (Vec<f32>, Vec<f32>) = (weight.to_vec1()?, bias.to_vec1()?);
    let per_sample = x.elem_count() / b.max(1);
    let size = c / groups;
    // Per sample and channel: y = x * factor + shift.
    let mut y = room(x.elem_count());
    let mut stats = vec![(0.0_f32, 0.0_f32); b * groups];
    with_values([&saved_x], |[x]| {
        y.par_chunks_mut(per_sample)
            .zip(stats.par_chunks_mut(groups))
            .enumerate()
            .for_each(|(i, (y, stats))| {
                let x = &x[i * per_sample..(i + 1) * per_sample];
                group_stats(x, c, size, eps as f32, stats);
                let (factor, shift) = affine(stats, size, &weight, &bias);
                normalize(x, &factor, &shift, silu, y);
            });
        Ok(())
    })?;
    let shape = x.shape().clone();
    let out_shape = shape.clone();
    attach("group-norm", &[x], Value::Cpu(y), out_shape, move |g, _| {
        let mut dx = room(shape.elem_count());
        with_values([&saved_x, g], |[x, g]| {
            dx.par_chunks_mut(per_sample).enumerate().for_each(|(i, dx)| {
                let range = i * per_sample..(i + 1) * per_sample;
                let stats = &stats[i * groups..(i + 1) * groups];
                let (factor, shift) = affine(stats, size, &weight, &bias);
                group_norm_grad(
                    &x[range.clone()],
                    &g[range],
                    stats,
                    size,
                    (&weight, &factor, &shift),
                    silu,
                    dx,
                );
            });
            Ok(())
        })?;
        Ok([Some(Tensor::from_vec(dx, &shape, g.device())?), None, None])
    })
}

/// Mean and `1 / sqrt(variance + eps)` per group, in two passes; sums per channel first, then over the group in f64.
fn group_stats(x: &[f32], c: usize, size: usize, eps: f32, stats: &mut [(f32, f32)]) {
    let pixels = (x.len() / c) as f64 * size as f64;
    let mut sums = vec![0.0_f32; c];
    channel_sums(x, &mut sums);
    for (stat, sums) in stats.iter_mut().zip(sums.chunks_exact(size)) {
        stat.0 = (sums.iter().map(|v| f64::from(*v)).sum::<f64>() / pixels) as f32;
    }
    let means: Vec<f32> = (0..c).map(|j| stats[j / size].0).collect();
    sums.fill(0.0);
    channel_squares(x, &means, &mut sums);
    for (stat, sums) in stats.iter_mut().zip(sums.chunks_exact(size)) {
        let variance = sums.iter().map(|v| f64::from(*v)).sum::<f64>() / pixels;
        stat.1 = (1.0 / (variance + f64::from(eps)).sqrt()) as f32;
    }
}

/// Per channel: `y = x * factor + shift`.
fn affine(stats: &[(f32, f32)], size: usize, weight: &[f32], bias: &[f32]) -> (Vec<f32>, Vec<f32>) {
    weight
        .iter()
        .zip(bias)
        .enumerate()
        .map(|(j, (w, b))| {
            let (mean, rstd) = stats[j / size];
            (w * rstd, b - mean * rstd * w)
        })
        .unzip()
}

vectorized! {
    /// Adds each pixel's channels to `sums`.
    fn channel_sums(x: &[f32], sums: &mut [f32]) {
        for pixel in x.chunks_exact(sums.len()) {
            for (s, v) in sums.iter_mut().zip(pixel) {
                *s += v;
            }
        }
    }
}

vectorized! {
    /// Adds each pixel's squared distances from the channels' means to `sums`.
    fn channel_squares(x: &[f32], means: &[f32], sums: &mut [f32]) {
        let n = sums.len();
        let means = &means[..n];
        for pixel in x.chunks_exact(n) {
            for j in 0..n {
                let d = pixel[j] - means[j];
                sums[j] += d * d;
            }
        }
    }
}

vectorized! {
    fn normalize(x: &[f32], factor: &[f32], shift: &[f32], silu: bool, y: &mut [f32]) {
        let n = factor.len();
        let shift = &shift[..n];
        for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
            if silu {
                for j in 0..n {
                    let v = x[j] * factor[j] + shift[j];
                    y[j] = v * sigmoid(v);
                }
            } else {
                for j in 0..n {
                    y[j] = x[j] * factor[j] + shift[j];
                }
            }
        }
    }
}

/// `dx = rstd (gw - mean(gw) - x̂ mean(gw x̂))` per group, with `gw = g · weight` (through SiLU first if it was applied).
fn group_norm_grad(
    x: &[f32],
    g: &[f32],
    stats: &[(f32, f32)],
    size: usize,
    (weight, factor, shift): (&[f32], &[f32], &[f32]),
    silu: bool,
    dx: &mut [f32],
) {
    let c = weight.len();
    let pixels = (x.len() / c) as f64 * size as f64;
    let (mut sums, mut products) = (vec![0.0_f32; c], vec![0.0_f32; c]);
    // dx holds g · weight until the means are known; products sums gw · x.
    weighted_grads(x, g, (weight, factor, shift), silu, dx, &mut sums, &mut products);
    let (mut rstd, mut slope, mut level) = (vec![0.0; c], vec![0.0; c], vec![0.0; c]);
    for (i, &(mean, r)) in stats.iter().enumerate() {
        let range = i * size..(i + 1) * size;
        let sum: f64 = sums[range.clone()].iter().map(|v| f64::from(*v)).sum();
        let with_x: f64 = products[range.clone()].iter().map(|v| f64::from(*v)).sum();
        let mean_gw = sum / pixels;
        // mean(gw x̂) = (mean(gw x) - mean · mean(gw)) · rstd
        let mean_gwx = (with_x / pixels - f64::from(mean) * mean_gw) * f64::from(r);
        for j in range {
            rstd[j] = r;
            // dx = rstd gw - slope x - level
            slope[j] = (f64::from(r) * f64::from(r) * mean_gwx) as f32;
            level[j] = (f64::from(r) * mean_gw - f64::from(mean) * f64::from(r) * f64::from(r) * mean_gwx) as f32;
        }
    }
    finish_grads(x, &rstd, &slope, &level, dx);
}

vectorized! {
    fn weighted_grads(
        x: &[f32],
        g: &[f32],
        affine: (&[f32], &[f32], &[f32]),
        silu: bool,
        gw: &mut [f32],
        sums: &mut [f32],
        products: &mut [f32],
    ) {
        let n = sums.len();
        let (weight, factor, shift) = (&affine.0[..n], &affine.1[..n], &affine.2[..n]);
        let products = &mut products[..n];
        for ((x, g), gw) in x.chunks_exact(n).zip(g.chunks_exact(n)).zip(gw.chunks_exact_mut(n)) {
            for j in 0..n {
                let mut d = g[j] * weight[j];
                if silu {
                    let v = x[j] * factor[j] + shift[j];
                    let s = sigmoid(v);
                    d *= s * (1.0 + v * (1.0 - s));
                }
                gw[j] = d;
                sums[j] += d;
                products[j] += d * x[j];
            }
        }
    }
}

vectorized! {
    fn finish_grads(x: &[f32], rstd: &[f32], slope: &[f32], level: &[f32], dx: &mut [f32]) {
        let n = rstd.len();
        let (slope, level) = (&slope[..n], &level[..n]);
        for (x, dx) in x.chunks_exact(n).zip(dx.chunks_exact_mut(n)) {
            for j in 0..n {
                dx[j] = dx[j] * rstd[j] - x[j] * slope[j] - level[j];
            }
        }
    }
}

/// Layer norm over the last dimension. Keeps `x` and one mean and deviation per row.
///
/// # Shapes
/// `x` (…, c); `weight`, `bias` (c), untracked -> as `x`.
///
/// # Errors
/// If shapes do not fit.
///
/// # Source
/// Ba et al. 2016; gradient as in [`group_norm`].
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let dims = x.dims();
    let c = dims[dims.len() - 1];
    if c == 0 || weight.dims() != [c] || bias.dims() != [c] {
        bail!(
            "layer norm of shape {dims:?}, weight {:?}, bias {:?}",
            weight.dims(),
            bias.dims()
        )
    }
    if !x.device().is_cpu() {
        return composed::layer_norm(x, weight, bias, eps);
    }
    let saved_x = saved(x)?;
    let (weight, bias): (Vec<f32>, Vec<f32>) = (weight.to_vec1()?, bias.to_vec1()?);
    let rows = x.elem_count() / c;
    let chunk = rows_per_task(rows);
    let mut y = room(x.elem_count());
    let mut stats = room(2 * rows);
    with_values([&saved_x], |[x]| {
        y.par_chunks_mut(chunk * c)
            .zip(stats.par_chunks_mut(chunk * 2))
            .enumerate()
            .for_each(|(i, (y, stats))| {
                let x = &x[i * chunk * c..i * chunk * c + y.len()];
                layer_norm_rows(x, &weight, &bias, eps as f32, y, stats);
            });
        Ok(())
    })?;
    let shape = x.shape().clone();
    let out_shape = shape.clone();
    attach("layer-norm", &[x], Value::Cpu(y), out_shape, move |g, _| {
        let mut dx = room(shape.elem_count());
        with_values([&saved_x, g], |[x, g]| {
            dx.par_chunks_mut(chunk * c).enumerate().for_each(|(i, dx)| {
                let range = i * chunk * c..i * chunk * c + dx.len();
                layer_norm_grad(&x[range.clone()], &g[range], &weight, &stats[i * chunk * 2..], dx);
            });
            Ok(())
        })?;
        Ok([Some(Tensor::from_vec(dx, &shape, g.device())?), None, None])
    })
}

fn rows_per_task(rows: usize) -> usize {
    rows.div_ceil(2 * rayon::current_num_threads()).clamp(1, 256)
}

vectorized! {
    fn layer_norm_rows(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32], stats: &mut [f32]) {
        let n = weight.len();
        let bias = &bias[..n];
        for ((x, y), stat) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)).zip(stats.chunks_exact_mut(2)) {
            let mean = super::math::sum(x) / n as f32;
            for j in 0..n {
                y[j] = x[j] - mean;
            }
            let rstd = 1.0 / (super::math::dot(y, y) / n as f32 + eps).sqrt();
            for j in 0..n {
                y[j] = y[j] * rstd * weight[j] + bias[j];
            }
            stat[0] = mean;
            stat[1] = rstd;
        }
    }
}

vectorized! {
    fn layer_norm_grad(x: &[f32], g: &[f32], weight: &[f32], stats: &[f32], dx: &mut [f32]) {
        let n = weight.len();
        for (((x, g), dx), stat) in
            x.chunks_exact(n).zip(g.chunks_exact(n)).zip(dx.chunks_exact_mut(n)).zip(stats.chunks_exact(2))
        {
            let (mean, rstd) = (stat[0], stat[1]);
            for j in 0..n {
                dx[j] = g[j] * weight[j];
            }
            let mean_gw = super::math::sum(dx) / n as f32;
            let mean_gwx = (super::math::dot(dx, x) / n as f32 - mean * mean_gw) * rstd;
            for j in 0..n {
                dx[j] = rstd * (dx[j] - mean_gw - (x[j] - mean) * rstd * mean_gwx);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::testing::{assert_same_op, random};

    #[test]
    fn group_norm_equals_the_composed_one_with_and_without_silu() {
        for (groups, c, silu) in [(1, 6, false), (4, 12, true), (32, 64, true), (3, 9, false)] {
            let (w, b) = (random(&[c], 1), random(&[c], 2));
            assert_same_op(
                &[&random(&[3, 4, 5, c], 3)],
                |t| group_norm(&t[0], &w, &b, groups, 1e-5, silu),
                |t| composed::group_norm(&t[0], &w, &b, groups, 1e-5, silu),
            );
        }
    }

    #[test]
    fn layer_norm_equals_the_composed_one() {
        for c in [3, 8, 64, 77] {
            let (w, b) = (random(&[c], 1), random(&[c], 2));
            assert_same_op(
                &[&random(&[2, 9, c], 3)],
                |t| layer_norm(&t[0], &w, &b, 1e-5),
                |t| composed::layer_norm(&t[0], &w, &b, 1e-5),
            );
        }
    }
}
