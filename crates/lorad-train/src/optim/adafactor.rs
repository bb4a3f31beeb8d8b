//! Adafactor: AdamW's second moment as one row and one column per matrix, no first moment.

use std::collections::BTreeMap;

use candle_core::{D, Result, Tensor};

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

/// Second moment of one tensor.
#[derive(Debug)]
enum Moment {
    /// Of two or more dimensions: means over the last dimension, and over the last but one.
    Factored { row: Tensor, col: Tensor },
    /// Of a vector: whole.
    Whole(Tensor),
}

impl Moment {
    /// Each part with the ending of its name.
    fn parts(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Factored { row, col } => vec![("exp_avg_sq_row", row), ("exp_avg_sq_col", col)],
            Self::Whole(whole) => vec![("exp_avg_sq", whole)],
        }
    }
}

/// With a learning rate of its own, neither scaled by the parameters nor relative to the step: what
/// `relative_step=False, scale_parameter=False` is in transformers.
///
/// # Source
/// Shazeer & Stern 2018, as in transformers v5.24.0 `optimization.py`, `Adafactor`.
#[derive(Debug)]
pub(super) struct Adafactor {
    config: AdafactorConfig,
    moments: Vec<Moment>,
}

impl Adafactor {
    pub(super) fn new(config: AdafactorConfig, layout: &Layout) -> Result<Self> {
        let moments = layout
            .tensors()
            .map(|(_, shape)| {
                let n = shape.len();
                let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, layout.device());
                if n < 2 {
                    return Ok(Moment::Whole(zeros(shape)?));
                }
                Ok(Moment::Factored {
                    row: zeros(&shape[..n - 1])?,
                    col: zeros(&[&shape[..n - 2], &shape[n - 1..]].concat())?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, moments })
    }
}

impl Rule for Adafactor {
    fn update(&mut self, layout: &Layout, step: u64, parameters: Tensor, gradient: &Tensor, lr: f64) -> Result<Tensor> {
        let beta2 = 1.0 - (step as f64).powf(DECAY_RATE);
        let mut updates = Vec::with_capacity(self.moments.len());
        for (gradient, moment) in layout.views(gradient)?.into_iter().zip(&mut self.moments) {
            let square = (gradient.sqr()? + EPSILON)?;
            let mixed = |old: &Tensor, new: Tensor| (old * beta2)? + (new * (1.0 - beta2))?;
            let update = match moment {
                Moment::Whole(whole) => {
                    *whole = mixed(whole, square)?;
                    (whole.sqrt()?.recip()? * gradient)?
                }
                Moment::Factored { row, col } => {
                    *row = mixed(row, square.mean(D::Minus1)?)?;
                    *col = mixed(col, square.mean(D::Minus2)?)?;
                    let rows = row.broadcast_div(&row.mean_keepdim(D::Minus1)?)?.sqrt()?.recip()?;
                    let cols = col.sqrt()?.recip()?.unsqueeze(col.rank() - 1)?;
                    (rows.unsqueeze(D::Minus1)?.broadcast_mul(&cols)? * gradient)?
                }
            };
            let rms = (update.sqr()?.mean_all()?.sqrt()? / CLIP_THRESHOLD)?.maximum(1.0)?;
            updates.push(update.broadcast_div(&rms)?.flatten_all()?);
        }
        let parameters = (parameters * (1.0 - lr * self.config.weight_decay))?;
        parameters - (Tensor::cat(&updates, 0)? * lr)?
    }

    fn state(&self, layout: &Layout) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for ((name, _), moment) in layout.tensors().zip(&self.moments) {
            for (part, tensor) in moment.parts() {
                state.insert(format!("{name}.{part}"), tensor.copy()?);
            }
        }
        Ok(state)
    }

    fn load(&mut self, layout: &Layout, state: &BTreeMap<String, Tensor>) -> Result<()> {
        for ((name, _), moment) in layout.tensors().zip(&mut self.moments) {
            let mut parts = Vec::with_capacity(2);
            for (part, like) in moment.parts() {
                parts.push(layout.read(&format!("{name}.{part}"), like.dims(), state)?);
            }
            match (moment, parts.as_slice()) {
                (Moment::Factored { row, col }, [r, c]) => (*row, *col) = (r.clone(), c.clone()),
                (Moment::Whole(whole), [w]) => *whole = w.clone(),
                _ => {}
            }
        }
        Ok(())
    }
}
