//! The last step of weight-decomposed adapters.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::attach::{Value, attach, saved, with_values};

/// Rows that one task sums up: the order of a sum depends on it and on nothing else.
const ROWS: usize = 64;

/// What [`rescale`] takes for constant.
#[derive(Debug, Clone, Copy)]
pub struct Constants<'a> {
    /// Norm of each output's weights, (c,).
    pub norm: &'a Tensor,
    /// Taken off before scaling, (c,): a bias is not scaled.
    pub bias: Option<&'a Tensor>,
    /// Added after scaling, (groups, c), each to as many rows as the others.
    pub shift: Option<&'a Tensor>,
}

/// `magnitude / norm · (z − bias) + shift` over the last dimension. Gradients go to `z` and `magnitude`.
///
/// # Shapes
/// `z` (…, c); `magnitude` (c,) -> as `z`.
///
/// # Errors
/// If shapes do not fit.
///
/// # Source
/// Liu et al. 2024 (DoRA), eq. 5, with the norm out of the graph as in their §4.3; peft 0.21.2 `tuners/lora/dora.py`.
pub fn rescale(z: &Tensor, magnitude: &Tensor, constants: Constants<'_>) -> Result<Tensor> {
    let c = magnitude.dims1()?;
    let Constants { norm, bias, shift } = constants;
    let fits = z.dims().last() == Some(&c)
        && norm.dims() == [c]
        && bias.is_none_or(|b| b.dims() == [c])
        && shift.is_none_or(|s| s.dims().last() == Some(&c) && z.elem_count().is_multiple_of(s.elem_count()));
    if !fits {
        bail!("{:?} scaled by {c} magnitudes with {constants:?}", z.dims())
    }
    if !z.device().is_cpu() {
        let z = bias.map_or(Ok(z.clone()), |b| z.broadcast_sub(b))?;
        let y = z.broadcast_mul(&(magnitude / norm)?)?;
        let Some(shift) = shift else { return Ok(y) };
        let groups = shift.elem_count() / c;
        let grouped = y
            .reshape((groups, (), c))?
            .broadcast_add(&shift.reshape((groups, 1, c))?)?;
        return grouped.reshape(y.shape());
    }
    let zeros = Tensor::zeros(c, candle_core::DType::F32, z.device())?;
    let (norm, bias) = (saved(norm)?, saved(bias.unwrap_or(&zeros))?);
    let shift = saved(shift.unwrap_or(&zeros))?;
    let rows = z.elem_count() / c;
    let rows_per_shift = rows / (shift.elem_count() / c).max(1);
    let (saved_z, saved_m) = (saved(z)?, saved(magnitude)?);
    let y = with_values(
        [&saved_z, &saved_m, &norm, &bias, &shift],
        |[z, m, norm, bias, shift]| {
            let mut y = vec![0.0; z.len()];
            let work = |(row, (y, z)): (usize, (&mut [f32], &[f32]))| {
                let shift = &shift[row / rows_per_shift * c..][..c];
                for j in 0..c {
                    y[j] = m[j] / norm[j] * (z[j] - bias[j]) + shift[j];
                }
            };
            y.par_chunks_mut(c).zip(z.par_chunks(c)).enumerate().for_each(work);
            Ok(y)
        },
    )?;
    let backward = move |grad: &Tensor, needed: [bool; 3]| {
        with_values([grad, &saved_z, &saved_m, &norm, &bias], |[g, z, m, norm, bias]| {
            let dz = if needed[0] {
                let mut dz = vec![0.0; g.len()];
                dz.par_chunks_mut(c).zip(g.par_chunks(c)).for_each(|(dz, g)| {
                    for j in 0..c {
                        dz[j] = m[j] / norm[j] * g[j];
                    }
                });
                Some(Tensor::from_vec(dz, saved_z.shape(), grad.device())?)
            } else {
                None
            };
            let sums: Vec<Vec<f32>> = g
                .par_chunks(ROWS * c)
                .zip(z.par_chunks(ROWS * c))
                .map(|(g, z)| {
                    let mut sum = vec![0.0; c];
                    for (g, z) in g.chunks_exact(c).zip(z.chunks_exact(c)) {
                        for j in 0..c {
                            sum[j] += g[j] * (z[j] - bias[j]);
                        }
                    }
                    sum
                })
                .collect();
            let total = |j: usize| sums.iter().map(|sum| f64::from(sum[j])).sum::<f64>() / f64::from(norm[j]);
            let dm: Vec<f32> = (0..c).map(|j| total(j) as f32).collect();
            Ok([dz, Some(Tensor::from_vec(dm, c, grad.device())?), None])
        })
    };
    attach(
        "dora-rescale",
        &[z, magnitude],
        Value::Cpu(y),
        z.shape().clone(),
        backward,
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::testing::{adjoint, assert_same_op, random};

    #[test]
    fn scaling_by_magnitudes_equals_the_composed_ops_in_value_and_both_gradients() {
        for (rows, c, groups) in [(3, 5, 1), (130, 17, 2), (64, 8, 4)] {
            let norm = (random(&[c], 1).abs().unwrap() + 0.5).unwrap();
            let (bias, shift) = (random(&[c], 2), random(&[groups, c], 3));
            let all = Constants {
                norm: &norm,
                bias: Some(&bias),
                shift: Some(&shift),
            };
            let composed = |t: &[Tensor], groups: usize| {
                let y = t[0].broadcast_sub(&bias)?.broadcast_mul(&(&t[1] / &norm)?)?;
                y.reshape((groups, (), c))?
                    .broadcast_add(&shift.reshape((groups, 1, c))?)?
                    .reshape(t[0].shape())
            };
            let z = random(&[groups, rows, c], 4);
            assert_same_op(
                &[&z, &random(&[c], 5)],
                |t| rescale(&t[0], &t[1], all),
                |t| composed(t, groups),
            );
            let plain = Constants {
                bias: None,
                shift: None,
                ..all
            };
            let m = random(&[c], 5);
            adjoint(&[&z], |t| rescale(&t[0], &m, plain));
            adjoint(&[&m], |t| rescale(&z, &t[0], plain));
        }
    }
}
