//! Adafactor: AdamW's second moment as one row and one column per matrix, no first moment.

use std::collections::BTreeMap;

use candle_core::{D, Result, Tensor, bail};

use super::{Layout, Rule};

/// Added to squared gradients.
const EPSILON: f64 = 1e-30;
/// `β₂ = 1 − step^DECAY_RATE`.
const DECAY_RATE: f64 = -0.8;
/// Root mean square that an update may have, per tensor.
const CLIP_THRESHOLD: f64 = 1.0;

/// Settings that do not change during a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdafactorConfig {
    /// Decoupled weight decay per unit of learning rate.
    pub weight_decay: f64,
}

/// Second moment of one tensor of two or more dimensions.
#[derive(Debug)]
struct Factors {
    /// Mean over the last dimension.
    row: Tensor,
    /// Mean over the last but one.
    col: Tensor,
}

/// With a learning rate of its own, neither scaled by the parameters nor relative to the step: what
/// `relative_step=False, scale_parameter=False` is in transformers.
///
/// # Source
/// Shazeer & Stern 2018, as in transformers v5.24.0 `optimization.py`, `Adafactor`.
#[derive(Debug)]
pub(super) struct Adafactor {
    config: AdafactorConfig,
    factors: Vec<Factors>,
}

impl Adafactor {
    pub(super) fn new(config: AdafactorConfig, layout: &Layout) -> Result<Self> {
        let factors = layout
            .tensors()
            .map(|(name, shape)| {
                let n = shape.len();
                if n < 2 {
                    bail!("{name} has {n} dimensions; Adafactor needs two")
                }
                let row = shape[..n - 1].to_vec();
                let col = [&shape[..n - 2], &shape[n - 1..]].concat();
                let zeros = |shape: Vec<usize>| Tensor::zeros(shape, candle_core::DType::F32, layout.device());
                Ok(Factors {
                    row: zeros(row)?,
                    col: zeros(col)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, factors })
    }
}

impl Rule for Adafactor {
    fn update(&mut self, layout: &Layout, step: u64, parameters: Tensor, gradient: &Tensor, lr: f64) -> Result<Tensor> {
        let beta2 = 1.0 - (step as f64).powf(DECAY_RATE);
        let mut updates = Vec::with_capacity(self.factors.len());
        for (gradient, factors) in layout.views(gradient)?.into_iter().zip(&mut self.factors) {
            let square = (gradient.sqr()? + EPSILON)?;
            let mixed = |old: &Tensor, new: Tensor| (old * beta2)? + (new * (1.0 - beta2))?;
            factors.row = mixed(&factors.row, square.mean(D::Minus1)?)?;
            factors.col = mixed(&factors.col, square.mean(D::Minus2)?)?;
            let row = factors
                .row
                .broadcast_div(&factors.row.mean_keepdim(D::Minus1)?)?
                .sqrt()?
                .recip()?
                .unsqueeze(D::Minus1)?;
            let col = factors.col.sqrt()?.recip()?.unsqueeze(factors.col.rank() - 1)?;
            let update = (row.broadcast_mul(&col)? * gradient)?;
            let rms = (update.sqr()?.mean_all()?.sqrt()? / CLIP_THRESHOLD)?.maximum(1.0)?;
            updates.push(update.broadcast_div(&rms)?.flatten_all()?);
        }
        let parameters = (parameters * (1.0 - lr * self.config.weight_decay))?;
        parameters - (Tensor::cat(&updates, 0)? * lr)?
    }

    fn state(&self, layout: &Layout) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for ((name, _), factors) in layout.tensors().zip(&self.factors) {
            state.insert(format!("{name}.exp_avg_sq_row"), factors.row.copy()?);
            state.insert(format!("{name}.exp_avg_sq_col"), factors.col.copy()?);
        }
        Ok(state)
    }

    fn load(&mut self, layout: &Layout, state: &BTreeMap<String, Tensor>) -> Result<()> {
        for ((name, _), factors) in layout.tensors().zip(&mut self.factors) {
            let read = |kind: &str, like: &Tensor| layout.read(&format!("{name}.{kind}"), like.dims(), state);
            *factors = Factors {
                row: read("exp_avg_sq_row", &factors.row)?,
                col: read("exp_avg_sq_col", &factors.col)?,
            };
        }
        Ok(())
    }
}
