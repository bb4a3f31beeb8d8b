//! AdamW.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::{Layout, Rule};

/// Settings that do not change during a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay per unit of learning rate.
    pub weight_decay: f64,
}

/// # Source
/// Loshchilov & Hutter 2019, algorithm 2, in the form and order of torch 2.15 `optim/adamw.py`
/// (`_single_tensor_adamw`).
#[derive(Debug)]
pub(super) struct AdamW {
    config: AdamWConfig,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl AdamW {
    pub(super) fn new(config: AdamWConfig, zeros: &Tensor) -> Self {
        Self {
            config,
            exp_avg: zeros.clone(),
            exp_avg_sq: zeros.clone(),
        }
    }
}

impl Rule for AdamW {
    fn update(&mut self, _: &Layout, step: u64, parameters: Tensor, gradient: &Tensor, lr: f64) -> Result<Tensor> {
        let AdamWConfig {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = self.config;
        let exponent = i32::try_from(step).unwrap_or(i32::MAX);
        let (correction1, correction2) = (1.0 - beta1.powi(exponent), 1.0 - beta2.powi(exponent));
        let parameters = (parameters * (1.0 - lr * weight_decay))?;
        self.exp_avg = (&self.exp_avg + ((gradient - &self.exp_avg)? * (1.0 - beta1))?)?;
        self.exp_avg_sq = ((&self.exp_avg_sq * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let denominator = ((self.exp_avg_sq.sqrt()? / correction2.sqrt())? + epsilon)?;
        let update = (self.exp_avg.div(&denominator)? * (lr / correction1))?;
        parameters - update
    }

    fn state(&self, layout: &Layout) -> Result<BTreeMap<String, Tensor>> {
        let mut state = layout.split("exp_avg", &self.exp_avg)?;
        state.extend(layout.split("exp_avg_sq", &self.exp_avg_sq)?);
        Ok(state)
    }

    fn load(&mut self, layout: &Layout, state: &BTreeMap<String, Tensor>) -> Result<()> {
        (self.exp_avg, self.exp_avg_sq) = (layout.join("exp_avg", state)?, layout.join("exp_avg_sq", state)?);
        Ok(())
    }
}
