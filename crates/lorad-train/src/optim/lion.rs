//! Lion: the sign of a momentum. Half of AdamW's state; wants a learning rate three to ten times smaller.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::{Layout, Rule};

/// Settings that do not change during a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LionConfig {
    /// Share of the momentum in the update.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
    /// Decoupled weight decay per unit of learning rate.
    pub weight_decay: f64,
}

/// # Source
/// Chen et al. 2023, algorithm 2, as in lion-pytorch 0.2.5 (`update_fn`).
#[derive(Debug)]
pub(super) struct Lion {
    config: LionConfig,
    exp_avg: Tensor,
}

impl Lion {
    pub(super) fn new(config: LionConfig, zeros: &Tensor) -> Self {
        Self {
            config,
            exp_avg: zeros.clone(),
        }
    }
}

impl Rule for Lion {
    fn update(&mut self, _: &Layout, _: u64, parameters: Tensor, gradient: &Tensor, lr: f64) -> Result<Tensor> {
        let LionConfig {
            beta1,
            beta2,
            weight_decay,
        } = self.config;
        let parameters = (parameters * (1.0 - lr * weight_decay))?;
        let direction = ((&self.exp_avg * beta1)? + (gradient * (1.0 - beta1))?)?.sign()?;
        self.exp_avg = ((&self.exp_avg * beta2)? + (gradient * (1.0 - beta2))?)?;
        parameters - (direction * lr)?
    }

    fn state(&self, layout: &Layout) -> Result<BTreeMap<String, Tensor>> {
        layout.split("exp_avg", &self.exp_avg)
    }

    fn load(&mut self, layout: &Layout, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.exp_avg = layout.join("exp_avg", state)?;
        Ok(())
    }
}
