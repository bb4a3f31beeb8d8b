//! The low-rank path beside a frozen convolution.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    attach::{Value, attach, saved, with_values},
    composed,
    conv::{Conv2dPlus, ConvGeometry, FrozenConv2d},
    gemm::{Start, multiply, product_over_rows},
    packed::{Mat, Packed},
};

/// `scale · B ∗ (A ∗ x)`: `A` convolves as the layer beside it does, but to `rank` channels, and `B` is 1x1. Gradients go to
/// `x`, `A` and `B`; of the forward `x` and `A ∗ x` are kept.
///
/// # Shapes
/// `x` (b, h, w, in); `a` (rank, in, kernel, kernel); `b` (out, rank, 1, 1) -> (b, h', w', out).
///
/// # Errors
/// If shapes do not fit.
///
/// # Source
/// Yeh et al. 2023 (LyCORIS), §3.1; peft 0.21.2 `tuners/lora/layer.py`, `Conv2d`. Gradients by the chain rule.
pub fn low_rank_conv2d(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64, geometry: ConvGeometry) -> Result<Tensor> {
    let n = match (a.dims(), b.dims()) {
        (&[r, _, _, _], &[n, b_r, 1, 1]) if r == b_r => n,
        _ => bail!("adapter A {:?}, B {:?} beside a convolution", a.dims(), b.dims()),
    };
    // As a frozen kernel A passes the gradient on to x; its own comes with B's.
    let h = FrozenConv2d::new(&a.detach(), None, geometry)?.forward(x, Conv2dPlus::default())?;
    let (batch, height, width, r) = h.dims4()?;
    let m = batch * height * width;
    let shape = (batch, height, width, n);
    let (saved_x, saved_b) = (saved(x)?, saved(b)?.reshape((n, r))?);
    if !x.device().is_cpu() {
        let saved_h = (saved(&h)?.reshape((m, r))? * scale)?;
        let y = saved_h.matmul(&saved_b.t()?)?.reshape(shape)?;
        let backward = move |g: &Tensor, _: [bool; 3]| {
            let g = g.reshape((m, n))?;
            let u = (g.matmul(&saved_b)? * scale)?;
            let da = composed::conv2d_kernel_grad(&saved_x, &u.reshape((batch, height, width, r))?, geometry)?;
            let db = g.t()?.matmul(&saved_h)?.reshape((n, r, 1, 1))?;
            Ok([Some(u.reshape((batch, height, width, r))?), Some(da), Some(db)])
        };
        return attach("low-rank-conv2d", &[&h, a, b], Value::Device(y), shape, backward);
    }
    let scale = scale as f32;
    let (y, scaled_h) = with_values([&saved(&h)?, &saved_b], |[h, b]| {
        let h: Vec<f32> = h.iter().map(|v| v * scale).collect();
        let mut y = vec![0.0; m * n];
        let bt = Packed::new(Mat::rows(b, n, r, r).t());
        multiply(&mut y, bt.plain(), 1, |i, _| &h[i * r..(i + 1) * r], Start::Zero, None);
        Ok((y, h))
    })?;
    let backward = move |grad: &Tensor, _: [bool; 3]| {
        with_values([&saved_x, &saved_b, grad], |[x, b, g]| {
            let mut u = vec![0.0; m * r];
            let packed = Packed::new(Mat::rows(b, n, r, r));
            multiply(
                &mut u,
                packed.plain(),
                1,
                |i, _| &g[i * n..(i + 1) * n],
                Start::Zero,
                None,
            );
            u.iter_mut().for_each(|v| *v *= scale);
            let da = kernel_grad(x, saved_x.dims4()?, &u, (height, width, r), geometry)?;
            let dbt = product_over_rows(&scaled_h, r, g, n);
            let db = (0..n * r).map(|i| dbt[i % r * n + i / r]).collect();
            let device = grad.device();
            Ok([
                Some(Tensor::from_vec(u, (batch, height, width, r), device)?),
                Some(da),
                Some(Tensor::from_vec::<_, f32>(db, (n, r, 1, 1), device)?),
            ])
        })
    };
    attach("low-rank-conv2d", &[&h, a, b], Value::Cpu(y), shape, backward)
}

/// Gradient of a kernel: per tap, the product of what left through it and what it read.
///
/// # Shapes
/// `x` (b, h, w, in) as `of`; `u` (b, h', w', r), `to` = (h', w', r) -> (r, in, kernel, kernel).
fn kernel_grad(
    x: &[f32],
    of: (usize, usize, usize, usize),
    u: &[f32],
    to: (usize, usize, usize),
    geometry: ConvGeometry,
) -> Result<Tensor> {
    let (channels, kernel, r) = (of.3, geometry.kernel, to.2);
    let taps = kernel * kernel;
    if geometry == ConvGeometry::new(1, 1, 0) {
        let gradient = product_over_rows(u, r, x, channels);
        return Tensor::from_vec(gradient, (r, channels, 1, 1), &candle_core::Device::Cpu);
    }
    let mut gradient = vec![0.0; r * channels * taps];
    let mut read = vec![0.0; u.len() / r.max(1) * channels];
    for tap in 0..taps {
        gather(&mut read, x, of, (to.0, to.1), geometry, (tap / kernel, tap % kernel));
        let part = product_over_rows(u, r, &read, channels);
        for (i, value) in part.into_iter().enumerate() {
            gradient[i * taps + tap] = value;
        }
    }
    Tensor::from_vec(gradient, (r, channels, kernel, kernel), &candle_core::Device::Cpu)
}

/// What each output pixel reads through one tap: pixels of `x`, or zeros outside.
fn gather(
    read: &mut [f32],
    x: &[f32],
    (_, height, width, channels): (usize, usize, usize, usize),
    to: (usize, usize),
    geometry: ConvGeometry,
    (ky, kx): (usize, usize),
) {
    let source = |output: usize, tap: usize, side: usize| {
        let at = (output * geometry.stride + tap).checked_sub(geometry.padding.0)?;
        (at < side).then_some(at)
    };
    read.par_chunks_mut(to.1 * channels)
        .enumerate()
        .for_each(|(line, row)| {
            let Some(y) = source(line % to.0, ky, height) else {
                return row.fill(0.0);
            };
            for (output, pixel) in row.chunks_exact_mut(channels).enumerate() {
                match source(output, kx, width) {
                    None => pixel.fill(0.0),
                    Some(column) => {
                        let at = ((line / to.0 * height + y) * width + column) * channels;
                        pixel.copy_from_slice(&x[at..at + channels]);
                    }
                }
            }
        });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::testing::{adjoint, assert_close, assert_same_op, random, values};

    const DOWN: ConvGeometry = ConvGeometry {
        kernel: 3,
        stride: 2,
        padding: (0, 1),
    };

    /// Geometry, height, width, in, out, rank.
    fn cases() -> [(ConvGeometry, [usize; 5]); 5] {
        [
            (ConvGeometry::new(3, 1, 1), [5, 4, 3, 5, 2]),
            (ConvGeometry::new(3, 1, 1), [8, 8, 32, 48, 8]),
            (ConvGeometry::new(3, 2, 1), [8, 6, 16, 17, 3]),
            (ConvGeometry::new(1, 1, 0), [4, 4, 8, 16, 4]),
            (DOWN, [6, 8, 4, 6, 20]),
        ]
    }

    fn operands(geometry: ConvGeometry, [h, w, k, n, r]: [usize; 5]) -> [Tensor; 3] {
        let side = geometry.kernel;
        [
            random(&[2, h, w, k], 3),
            random(&[r, k, side, side], 4),
            random(&[n, r, 1, 1], 5),
        ]
    }

    #[test]
    fn the_low_rank_path_equals_two_composed_convolutions_in_value_and_all_three_gradients() {
        for (geometry, sizes) in cases() {
            let [x, a, b] = operands(geometry, sizes);
            assert_same_op(
                &[&x, &a, &b],
                |t| low_rank_conv2d(&t[0], &t[1], &t[2], 0.7, geometry),
                |t| {
                    let h = composed::conv2d(&t[1], None, geometry, &t[0])?;
                    composed::conv2d(&t[2], None, ConvGeometry::new(1, 1, 0), &h)? * 0.7
                },
            );
        }
    }

    #[test]
    fn the_low_rank_path_is_the_adjoint_of_itself_in_each_operand() {
        for (geometry, sizes) in cases() {
            let [x, a, b] = operands(geometry, sizes);
            adjoint(&[&x], |t| low_rank_conv2d(&t[0], &a, &b, 0.7, geometry));
            adjoint(&[&a], |t| low_rank_conv2d(&x, &t[0], &b, 0.7, geometry));
            adjoint(&[&b], |t| low_rank_conv2d(&x, &a, &t[0], 0.7, geometry));
        }
    }

    #[test]
    fn the_kernels_gradient_on_devices_equals_the_one_on_the_cpu() {
        for (geometry, sizes) in cases() {
            let [x, a, _] = operands(geometry, sizes);
            let h = composed::conv2d(&a, None, geometry, &x).unwrap();
            let (_, height, width, r) = h.dims4().unwrap();
            let u = random(h.dims(), 6);
            let cpu = kernel_grad(
                &values(&x),
                x.dims4().unwrap(),
                &values(&u),
                (height, width, r),
                geometry,
            )
            .unwrap();
            assert_close(&cpu, &composed::conv2d_kernel_grad(&x, &u, geometry).unwrap(), 1e-5);
        }
    }
}
