//! Group norm and layer norm with frozen scale and shift: only the input gets a gradient.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    attach::{Value, attach, saved, with_values},
    buffer::room,
    composed,
    gemm::Destination,
    has_kernels,
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
    if !has_kernels(x.device()) {
        return composed::group_norm(x, weight, bias, groups, eps, silu);
    }
    let saved_x = saved(x)?;
    let (weight, bias): (Vec<f32>, Vec<f32>) = (weight.to_vec1()?, bias.to_vec1()?);
    let parts = Parts::new(b, x.elem_count() / (b * c).max(1), c);
    let size = c / groups;
    let (y, stats) = with_values([&saved_x], |[x]| {
        let stats = group_stats(x, &parts, size, eps as f32);
        let affine = affine(&stats, size, &weight, &bias);
        let mut y = room(x.len());
        let out = Destination::new(&mut y);
        parts.for_each(|sample, range| {
            let (factor, shift) = &affine[sample];
            normalize(
                &x[range.clone()],
                factor,
                shift,
                silu,
                out.slice(range.start, range.len()),
            );
        });
        Ok((y, stats))
    })?;
    let shape = x.shape().clone();
    let out_shape = shape.clone();
    attach("group-norm", &[x], Value::Cpu(y), out_shape, move |g, _| {
        let dx = with_values([&saved_x, g], |[x, g]| {
            Ok(group_norm_grad(x, g, &parts, &stats, (&weight, &bias), silu))
        })?;
        Ok([Some(Tensor::from_vec(dx, &shape, g.device())?), None, None])
    })
}

/// Pixels of a part.
const PIXELS: usize = 128;

/// `(samples, pixels, channels)` cut into parts of pixels, which tasks take. The cut, and with it the order of every sum, is the
/// same for any number of threads.
#[derive(Debug, Clone, Copy)]
struct Parts {
    samples: usize,
    pixels: usize,
    channels: usize,
}

impl Parts {
    fn new(samples: usize, pixels: usize, channels: usize) -> Self {
        Self {
            samples,
            pixels,
            channels,
        }
    }

    fn per_sample(&self) -> usize {
        self.pixels.div_ceil(PIXELS)
    }

    /// The sample and the values of a part.
    fn part(&self, i: usize) -> (usize, Range<usize>) {
        let (sample, first) = (i / self.per_sample(), i % self.per_sample() * PIXELS);
        let at = |pixel: usize| (sample * self.pixels + pixel) * self.channels;
        (sample, at(first)..at((first + PIXELS).min(self.pixels)))
    }

    fn for_each(&self, f: impl Fn(usize, Range<usize>) + Sync) {
        let parts = self.samples * self.per_sample();
        (0..parts).into_par_iter().for_each(|i| {
            let (sample, range) = self.part(i);
            f(sample, range);
        });
    }

    /// Sums per sample and channel of what `f` adds up over a part, `N` at once: `(samples, channels)` each.
    fn sums<const N: usize>(&self, f: impl Fn(usize, Range<usize>, &mut [Vec<f32>; N]) + Sync) -> [Vec<f64>; N] {
        let parts: Vec<[Vec<f32>; N]> = (0..self.samples * self.per_sample())
            .into_par_iter()
            .map(|i| {
                let (sample, range) = self.part(i);
                let mut sums = [(); N].map(|()| vec![0.0; self.channels]);
                f(sample, range, &mut sums);
                sums
            })
            .collect();
        let mut totals = [(); N].map(|()| vec![0.0; self.samples * self.channels]);
        for (i, part) in parts.iter().enumerate() {
            let first = i / self.per_sample() * self.channels;
            for (total, part) in totals.iter_mut().zip(part) {
                let total = &mut total[first..first + self.channels];
                total.iter_mut().zip(part).for_each(|(t, p)| *t += f64::from(*p));
            }
        }
        totals
    }
}

/// Mean and `1 / sqrt(variance + eps)` per sample and group, in two passes; sums per channel and part first, then in f64.
fn group_stats(x: &[f32], parts: &Parts, size: usize, eps: f32) -> Vec<(f32, f32)> {
    let (c, n) = (parts.channels, (parts.pixels * size) as f64);
    let mean_of = |sums: &[f64]| -> Vec<f64> { sums.chunks_exact(size).map(|s| s.iter().sum::<f64>() / n).collect() };
    let [sums] = parts.sums(|_, range, [sums]| channel_sums(&x[range], sums));
    let means: Vec<f32> = mean_of(&sums).into_iter().map(|m| m as f32).collect();
    let of_channels: Vec<f32> = means.iter().flat_map(|m| std::iter::repeat_n(*m, size)).collect();
    let [squares] = parts.sums(|sample, range, [sums]| {
        channel_squares(&x[range], &of_channels[sample * c..(sample + 1) * c], sums);
    });
    let variances = mean_of(&squares).into_iter();
    means
        .into_iter()
        .zip(variances.map(|v| (1.0 / (v + f64::from(eps)).sqrt()) as f32))
        .collect()
}

/// Per sample and channel: `y = x * factor + shift`.
fn affine(stats: &[(f32, f32)], size: usize, weight: &[f32], bias: &[f32]) -> Vec<(Vec<f32>, Vec<f32>)> {
    let of_sample = |stats: &[(f32, f32)]| {
        let channels = weight.iter().zip(bias).enumerate();
        channels
            .map(|(j, (w, b))| {
                let (mean, rstd) = stats[j / size];
                (w * rstd, b - mean * rstd * w)
            })
            .unzip()
    };
    stats.chunks_exact(weight.len() / size).map(of_sample).collect()
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
    parts: &Parts,
    stats: &[(f32, f32)],
    (weight, bias): (&[f32], &[f32]),
    silu: bool,
) -> Vec<f32> {
    let c = parts.channels;
    let size = c * parts.samples / stats.len().max(1);
    let n = (parts.pixels * size) as f64;
    let affine = affine(stats, size, weight, bias);
    let mut dx = room(x.len());
    let out = Destination::new(&mut dx);
    // dx holds g · weight until the means are known; the products are of gw and x.
    let [sums, products] = parts.sums(|sample, range, [sums, products]| {
        let (factor, shift) = &affine[sample];
        let gw = out.slice(range.start, range.len());
        weighted_grads(
            &x[range.clone()],
            &g[range],
            (weight, factor, shift),
            silu,
            gw,
            sums,
            products,
        );
    });
    let (mut rstd, mut slope, mut level) = (vec![0.0; sums.len()], vec![0.0; sums.len()], vec![0.0; sums.len()]);
    for (i, &(mean, r)) in stats.iter().enumerate() {
        let range = i * size..(i + 1) * size;
        let mean_gw = sums[range.clone()].iter().sum::<f64>() / n;
        let with_x = products[range.clone()].iter().sum::<f64>() / n;
        // mean(gw x̂) = (mean(gw x) - mean · mean(gw)) · rstd
        let mean_gwx = (with_x - f64::from(mean) * mean_gw) * f64::from(r);
        for j in range {
            rstd[j] = r;
            // dx = rstd gw - slope x - level
            slope[j] = (f64::from(r) * f64::from(r) * mean_gwx) as f32;
            level[j] = (f64::from(r) * mean_gw - f64::from(mean) * f64::from(r) * f64::from(r) * mean_gwx) as f32;
        }
    }
    parts.for_each(|sample, range| {
        let channels = sample * c..(sample + 1) * c;
        let [rstd, slope, level] = [&rstd, &slope, &level].map(|values| &values[channels.clone()]);
        let dx = out.slice(range.start, range.len());
        finish_grads(&x[range], rstd, slope, level, dx);
    });
    dx
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
    if !has_kernels(x.device()) {
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
