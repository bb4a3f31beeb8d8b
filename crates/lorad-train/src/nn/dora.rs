//! Weight-decomposed adapters: a frozen layer's outputs scaled to trained magnitudes.

use std::sync::{Mutex, PoisonError};

use candle_core::{Result, Tensor, Var};

use super::{ModuleKind, Params};
use crate::{
    lora::{Adapter, init::row_squares},
    ops::{self, RescaleConstants},
};

/// Below it a norm is taken for this: an output without weights has magnitude 0 and stays 0.
const LEAST_NORM: f64 = 1e-12;

/// What one layer needs for it besides the adapter.
///
/// # Source
/// Liu et al. 2024 (DoRA), eq. 5; peft 0.21.2 `tuners/lora/dora.py`: magnitudes start at `‖W‖`, and the norm of `W + ΔW` is a
/// constant for the backward.
#[derive(Debug)]
pub(super) struct Decomposition {
    /// `‖W‖²` of each output, (out,).
    squares: Tensor,
    bias: Option<Tensor>,
    /// The norm that is held, and since when.
    norm: Mutex<Option<(u64, Tensor)>>,
}

impl Decomposition {
    pub(super) fn load(params: &Params<'_>, kind: ModuleKind, has_bias: bool) -> Result<Self> {
        let weight = params
            .weight_type()
            .round(&params.tensor("weight", &kind.weight_shape())?)?;
        let out = weight.dim(0)?;
        Ok(Self {
            squares: row_squares(&weight)?,
            bias: has_bias.then(|| params.tensor("bias", &[out])).transpose()?,
            norm: Mutex::default(),
        })
    }

    /// `‖W + ΔW‖` of each output, outside the graph. While `held` it is the one of the first call since.
    ///
    /// `product` gives `A Wᵀ + b`, (rank, out): with it no weight is needed here.
    ///
    /// # Shapes
    /// -> (out,).
    pub(super) fn norm(
        &self,
        held: Option<u64>,
        adapter: &Adapter,
        product: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut kept = self.norm.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(since), Some((of, norm))) = (held, kept.as_ref())
            && since == *of
        {
            return Ok(norm.clone());
        }
        let (a, scale) = (adapter.a.detach(), adapter.scale());
        let mut product = product(&a)?;
        if let Some(bias) = &self.bias {
            product = product.broadcast_sub(bias)?;
        }
        let (a, b) = (a.flatten_from(1)?, adapter.b.detach().flatten_from(1)?);
        // ‖W + s B A‖² = ‖W‖² + 2 s B·(A Wᵀ)ᵀ + s² B·(B A Aᵀ), row by row.
        let cross = (&b * product.t()?)?.sum(1)?;
        let own = (b.matmul(&a.matmul(&a.t()?)?)? * &b)?.sum(1)?;
        let squares = ((&self.squares + (cross * (2.0 * scale))?)? + (own * (scale * scale))?)?;
        let norm = squares.maximum(LEAST_NORM * LEAST_NORM)?.sqrt()?;
        *kept = held.map(|since| (since, norm.clone()));
        Ok(norm)
    }

    /// What is added after scaling: the bias, and `per_sample` to all pixels of a sample.
    ///
    /// # Shapes
    /// `per_sample` (b, out) -> (b, out) or (out,).
    pub(super) fn shift(&self, per_sample: Option<&Tensor>) -> Result<Option<Tensor>> {
        Ok(match (&self.bias, per_sample) {
            (None, other) => other.cloned(),
            (Some(bias), None) => Some(bias.clone()),
            (Some(bias), Some(per_sample)) => Some(per_sample.broadcast_add(bias)?),
        })
    }

    /// `magnitude / norm · (z − b) + shift`.
    pub(super) fn rescale(
        &self,
        z: &Tensor,
        adapter: &Adapter,
        norm: &Tensor,
        shift: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Some(magnitude) = adapter.magnitude.as_ref().map(Var::as_tensor) else {
            return Ok(z.clone());
        };
        let constants = RescaleConstants {
            norm,
            bias: self.bias.as_ref(),
            shift,
        };
        ops::rescale(z, &ops::reshape(magnitude, magnitude.elem_count())?, constants)
    }
}
