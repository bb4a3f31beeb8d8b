//! Random zeros on an adapter's input.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::attach::{Value, attach, saved, with_values};

/// `x` times one of two factors, value by value: `kept` where `mask` is true, `dropped` elsewhere.
///
/// # Shapes
/// As `x`; `mask` has as many values.
///
/// # Errors
/// If the numbers of values differ.
pub fn masked(x: &Tensor, mask: &Arc<Vec<bool>>, kept: f32, dropped: f32) -> Result<Tensor> {
    if mask.len() != x.elem_count() {
        bail!("a mask of {} values on {:?}", mask.len(), x.dims())
    }
    if !x.device().is_cpu() {
        let factors: Vec<f32> = mask.iter().map(|&keep| if keep { kept } else { dropped }).collect();
        return x * Tensor::from_vec(factors, x.shape(), x.device())?.to_dtype(x.dtype())?;
    }
    let mask = Arc::clone(mask);
    let apply = move |x: &Tensor| {
        with_values([x], |[x]| {
            let factor = |(&x, &keep): (&f32, &bool)| x * if keep { kept } else { dropped };
            Ok(x.par_iter().zip(mask.par_iter()).map(factor).collect::<Vec<f32>>())
        })
    };
    let y = apply(&saved(x)?)?;
    let shape = x.shape().clone();
    let backward =
        move |g: &Tensor, _: [bool; 3]| Ok([Some(Tensor::from_vec(apply(g)?, g.shape(), g.device())?), None, None]);
    attach("masked", &[x], Value::Cpu(y), shape, backward)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::testing::{adjoint, assert_same_op, random, values};

    #[test]
    fn a_mask_multiplies_values_and_gradients_by_one_of_two_factors() {
        let x = random(&[3, 5, 7], 1);
        let mask = Arc::new(
            values(&random(&[3, 5, 7], 2))
                .into_iter()
                .map(|v| v > 0.3)
                .collect::<Vec<_>>(),
        );
        let factors: Vec<f32> = mask.iter().map(|&keep| if keep { 2.0 } else { -1.0 }).collect();
        let factors = Tensor::from_vec(factors, x.shape(), x.device()).unwrap();
        assert_same_op(&[&x], |t| masked(&t[0], &mask, 2.0, -1.0), |t| &t[0] * &factors);
        adjoint(&[&x], |t| masked(&t[0], &mask, 2.0, -1.0));
    }
}
