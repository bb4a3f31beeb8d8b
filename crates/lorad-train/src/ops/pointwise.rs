//! Ops without reductions: activations, GEGLU, sums, concatenation, upsampling.

use candle_core::{D, Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    attach::{Value, attach, saved, with_values},
    buffer::room,
    composed, has_kernels,
    math::{gelu_and_derivative, sigmoid, vectorized},
};

/// An elementwise activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x Φ(x)`, by the error function.
    Gelu,
    /// `x · sigmoid(1.702 x)`.
    QuickGelu,
}

impl Activation {
    #[inline(always)]
    fn value_and_derivative(self, x: f32) -> (f32, f32) {
        match self {
            Self::Silu => {
                let s = sigmoid(x);
                (x * s, s * (1.0 + x * (1.0 - s)))
            }
            Self::Gelu => gelu_and_derivative(x),
            Self::QuickGelu => {
                let s = sigmoid(1.702 * x);
                (x * s, s * (1.0 + 1.702 * x * (1.0 - s)))
            }
        }
    }
}

/// Values per task of an elementwise op.
const CHUNK: usize = 8 << 10;

/// Applies an activation.
///
/// # Errors
/// If a tensor operation fails.
pub fn activation(x: &Tensor, kind: Activation) -> Result<Tensor> {
    if !has_kernels(x.device()) {
        return composed::activation(x, kind);
    }
    let saved_x = saved(x)?;
    let mut y = room(x.elem_count());
    with_values([&saved_x], |[x]| {
        y.par_chunks_mut(CHUNK)
            .zip(x.par_chunks(CHUNK))
            .for_each(|(y, x)| activate(x, kind, y));
        Ok(())
    })?;
    let shape = x.shape().clone();
    attach("activation", &[x], Value::Cpu(y), shape, move |g, _| {
        let mut dx = room(g.elem_count());
        with_values([&saved_x, g], |[x, g]| {
            dx.par_chunks_mut(CHUNK)
                .zip(x.par_chunks(CHUNK).zip(g.par_chunks(CHUNK)))
                .for_each(|(dx, (x, g))| activate_grad(x, g, kind, dx));
            Ok(())
        })?;
        Ok([Some(Tensor::from_vec(dx, g.shape(), g.device())?), None, None])
    })
}

vectorized! {
    fn activate(x: &[f32], kind: Activation, y: &mut [f32]) {
        match kind {
            Activation::Silu => y.iter_mut().zip(x).for_each(|(y, x)| *y = Activation::Silu.value_and_derivative(*x).0),
            Activation::Gelu => y.iter_mut().zip(x).for_each(|(y, x)| *y = Activation::Gelu.value_and_derivative(*x).0),
            Activation::QuickGelu => {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = Activation::QuickGelu.value_and_derivative(*x).0);
            }
        }
    }
}

vectorized! {
    fn activate_grad(x: &[f32], g: &[f32], kind: Activation, dx: &mut [f32]) {
        for ((dx, x), g) in dx.iter_mut().zip(x).zip(g) {
            *dx = g * kind.value_and_derivative(*x).1;
        }
    }
}

/// `hidden · gelu(gate)` with the exact GELU.
///
/// # Shapes
/// `x` (…, 2n), hidden first -> (…, n).
///
/// # Errors
/// If the last dimension is odd.
///
/// # Source
/// Shazeer 2020; diffusers v0.42.1 `models/activations.py`, `GEGLU`.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let double = x.dim(D::Minus1)?;
    if double == 0 || !double.is_multiple_of(2) {
        bail!("GEGLU of shape {:?}", x.dims())
    }
    if !has_kernels(x.device()) {
        return composed::geglu(x);
    }
    let n = double / 2;
    let saved_x = saved(x)?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = n;
    }
    let rows = (CHUNK / double).max(1);
    let mut y = room(x.elem_count() / 2);
    with_values([&saved_x], |[x]| {
        y.par_chunks_mut(rows * n)
            .zip(x.par_chunks(rows * double))
            .for_each(|(y, x)| geglu_rows(x, n, y));
        Ok(())
    })?;
    attach("geglu", &[x], Value::Cpu(y), shape, move |g, _| {
        let mut dx = room(saved_x.elem_count());
        with_values([&saved_x, g], |[x, g]| {
            dx.par_chunks_mut(rows * double)
                .zip(x.par_chunks(rows * double).zip(g.par_chunks(rows * n)))
                .for_each(|(dx, (x, g))| geglu_grad(x, g, n, dx));
            Ok(())
        })?;
        Ok([Some(Tensor::from_vec(dx, saved_x.shape(), g.device())?), None, None])
    })
}

vectorized! {
    fn geglu_rows(x: &[f32], n: usize, y: &mut [f32]) {
        for (x, y) in x.chunks_exact(2 * n).zip(y.chunks_exact_mut(n)) {
            let (hidden, gate) = x.split_at(n);
            for ((y, h), g) in y.iter_mut().zip(hidden).zip(gate) {
                *y = h * gelu_and_derivative(*g).0;
            }
        }
    }
}

vectorized! {
    fn geglu_grad(x: &[f32], g: &[f32], n: usize, dx: &mut [f32]) {
        for ((x, g), dx) in x.chunks_exact(2 * n).zip(g.chunks_exact(n)).zip(dx.chunks_exact_mut(2 * n)) {
            let (hidden, gate) = x.split_at(n);
            let (dh, dgate) = dx.split_at_mut(n);
            let gate = &gate[..n];
            for j in 0..n {
                let (value, derivative) = gelu_and_derivative(gate[j]);
                dh[j] = g[j] * value;
                dgate[j] = g[j] * hidden[j] * derivative;
            }
        }
    }
}

/// `a + b` of equal shapes; the backward hands the same gradient to both, without a copy.
///
/// # Errors
/// If shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dims() != b.dims() {
        bail!("sum of {:?} and {:?}", a.dims(), b.dims())
    }
    if !has_kernels(a.device()) {
        return a + b;
    }
    let mut y = room(a.elem_count());
    with_values([&saved(a)?, &saved(b)?], |[a, b]| {
        y.par_chunks_mut(CHUNK)
            .zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)))
            .for_each(|(y, (a, b))| y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = a + b));
        Ok(())
    })?;
    attach("add", &[a, b], Value::Cpu(y), a.shape().clone(), |g, _| {
        Ok([Some(g.clone()), Some(g.clone()), None])
    })
}

/// Concatenates along the channels, the last dimension.
///
/// # Errors
/// If the other dimensions differ.
pub fn cat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (ca, cb) = (a.dim(D::Minus1)?, b.dim(D::Minus1)?);
    let last = a.rank() - 1;
    if a.rank() != b.rank() || a.dims()[..last] != b.dims()[..last] || ca == 0 || cb == 0 {
        bail!("concatenation of {:?} and {:?} along the channels", a.dims(), b.dims())
    }
    if !has_kernels(a.device()) {
        return Tensor::cat(&[a, b], last);
    }
    let mut shape = a.dims().to_vec();
    shape[last] = ca + cb;
    let (a_shape, b_shape) = (a.shape().clone(), b.shape().clone());
    let rows = (CHUNK / (ca + cb)).max(1);
    let mut y = room(a.elem_count() + b.elem_count());
    with_values([&saved(a)?, &saved(b)?], |[a, b]| {
        y.par_chunks_mut(rows * (ca + cb))
            .zip(a.par_chunks(rows * ca).zip(b.par_chunks(rows * cb)))
            .for_each(|(y, (a, b))| {
                for (y, (a, b)) in y
                    .chunks_exact_mut(ca + cb)
                    .zip(a.chunks_exact(ca).zip(b.chunks_exact(cb)))
                {
                    y[..ca].copy_from_slice(a);
                    y[ca..].copy_from_slice(b);
                }
            });
        Ok(())
    })?;
    attach("cat-channels", &[a, b], Value::Cpu(y), shape, move |g, _| {
        let (mut da, mut db) = (room(a_shape.elem_count()), room(b_shape.elem_count()));
        with_values([g], |[g]| {
            da.par_chunks_mut(rows * ca)
                .zip(db.par_chunks_mut(rows * cb))
                .zip(g.par_chunks(rows * (ca + cb)))
                .for_each(|((da, db), g)| {
                    for ((da, db), g) in da
                        .chunks_exact_mut(ca)
                        .zip(db.chunks_exact_mut(cb))
                        .zip(g.chunks_exact(ca + cb))
                    {
                        da.copy_from_slice(&g[..ca]);
                        db.copy_from_slice(&g[ca..]);
                    }
                });
            Ok(())
        })?;
        Ok([
            Some(Tensor::from_vec(da, &a_shape, g.device())?),
            Some(Tensor::from_vec(db, &b_shape, g.device())?),
            None,
        ])
    })
}

/// Each pixel becomes a 2x2 square; the gradient of a pixel is the sum over its square.
///
/// # Shapes
/// `x` (b, h, w, c) -> (b, 2h, 2w, c).
///
/// # Errors
/// If `x` is of another rank.
pub fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    if !has_kernels(x.device()) {
        return composed::upsample_nearest_2x(x);
    }
    let mut y = room(4 * x.elem_count());
    let line = w * c;
    with_values([&saved(x)?], |[x]| {
        y.par_chunks_mut(4 * line).zip(x.par_chunks(line)).for_each(|(y, x)| {
            let (upper, lower) = y.split_at_mut(2 * line);
            for (square, pixel) in upper.chunks_exact_mut(2 * c).zip(x.chunks_exact(c)) {
                square[..c].copy_from_slice(pixel);
                square[c..].copy_from_slice(pixel);
            }
            lower.copy_from_slice(upper);
        });
        Ok(())
    })?;
    attach(
        "upsample-nearest-2x",
        &[x],
        Value::Cpu(y),
        (b, 2 * h, 2 * w, c),
        move |g, _| {
            let mut dx = room(b * h * line);
            with_values([g], |[g]| {
                dx.par_chunks_mut(line).zip(g.par_chunks(4 * line)).for_each(|(dx, g)| {
                    let (upper, lower) = g.split_at(2 * line);
                    for ((dx, u), l) in dx
                        .chunks_exact_mut(c)
                        .zip(upper.chunks_exact(2 * c))
                        .zip(lower.chunks_exact(2 * c))
                    {
                        for j in 0..c {
                            dx[j] = (u[j] + u[c + j]) + (l[j] + l[c + j]);
                        }
                    }
                });
                Ok(())
            })?;
            Ok([Some(Tensor::from_vec(dx, (b, h, w, c), g.device())?), None, None])
        },
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::testing::{adjoint, assert_same_op, random};

    #[test]
    fn activations_equal_candles() {
        let x = (random(&[3, 41], 1) * 5.0).unwrap();
        for kind in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
            assert_same_op(
                &[&x],
                |t| activation(&t[0], kind),
                |t| composed::activation(&t[0], kind),
            );
        }
    }

    #[test]
    fn geglu_equals_the_composed_one() {
        let x = (random(&[2, 5, 34], 1) * 3.0).unwrap();
        assert_same_op(&[&x], |t| geglu(&t[0]), |t| composed::geglu(&t[0]));
    }

    #[test]
    fn sums_concatenations_and_upsampling_equal_candles() {
        let (a, b) = (random(&[2, 3, 4, 5], 1), random(&[2, 3, 4, 7], 2));
        assert_same_op(
            &[&a, &b],
            |t| cat_channels(&t[0], &t[1]),
            |t| Tensor::cat(&[&t[0], &t[1]], 3),
        );
        assert_same_op(
            &[&a, &random(&[2, 3, 4, 5], 3)],
            |t| add(&t[0], &t[1]),
            |t| &t[0] + &t[1],
        );
        adjoint(&[&a, &b], |t| cat_channels(&t[0], &t[1]));
        adjoint(&[&a], |t| upsample_nearest_2x(&t[0]));
        adjoint(&[&a, &a], |t| add(&t[0], &t[1]));
        assert_same_op(
            &[&a],
            |t| upsample_nearest_2x(&t[0]),
            |t| composed::upsample_nearest_2x(&t[0]),
        );
    }

    #[test]
    fn an_operand_used_twice_gets_both_gradients() {
        let a = random(&[2, 2, 2, 3], 1);
        assert_same_op(
            &[&a],
            |t| cat_channels(&upsample_nearest_2x(&t[0])?, &upsample_nearest_2x(&t[0])?),
            |t| {
                Tensor::cat(
                    &[
                        composed::upsample_nearest_2x(&t[0])?,
                        composed::upsample_nearest_2x(&t[0])?,
                    ],
                    3,
                )
            },
        );
    }
}
