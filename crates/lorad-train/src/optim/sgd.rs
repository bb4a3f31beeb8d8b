//! Gradient descent with momentum.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::{Layout, Rule};

/// Settings that do not change during a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdConfig {
    /// Decay of the velocity; 0: plain gradient descent.
    pub momentum: f64,
    /// Look ahead along the velocity (Nesterov).
    pub nesterov: bool,
    /// Coupled weight decay: added to the gradient as `weight_decay · θ`.
    pub weight_decay: f64,
}

/// # Source
/// torch 2.15 `optim/sgd.py` (`_single_tensor_sgd`, no dampening).
#[derive(Debug)]
pub(super) struct Sgd {
    config: SgdConfig,
    /// Zeros before the first step, so that it equals the gradient after it, as there.
    velocity: Tensor,
}

impl Sgd {
    pub(super) fn new(config: SgdConfig, zeros: &Tensor) -> Self {
        Self {
            config,
            velocity: zeros.clone(),
        }
    }
}

impl Rule for Sgd {
    fn update(&mut self, _: &Layout, _: u64, parameters: Tensor, gradient: &Tensor, lr: f64) -> Result<Tensor> {
        let SgdConfig {
            momentum,
            nesterov,
            weight_decay,
        } = self.config;
        let gradient = (gradient + (&parameters * weight_decay)?)?;
        self.velocity = ((&self.velocity * momentum)? + &gradient)?;
        let direction = if nesterov {
            (gradient + (&self.velocity * momentum)?)?
        } else {
            self.velocity.clone()
        };
        parameters - (direction * lr)?
    }

    fn state(&self, layout: &Layout) -> Result<BTreeMap<String, Tensor>> {
        layout.split("momentum_buffer", &self.velocity)
    }

    fn load(&mut self, layout: &Layout, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.velocity = layout.join("momentum_buffer", state)?;
        Ok(())
    }
}
