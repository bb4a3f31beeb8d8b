//! A moving average of the adapter, which often draws better pictures than its newest values.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::Optimizer;

/// The average of an optimizer's parameters.
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    /// Flat, in the optimizer's order.
    average: Tensor,
}

impl Ema {
    /// Starts at the parameters as they are.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn new(optimizer: &Optimizer, decay: f64) -> Result<Self> {
        Ok(Self {
            decay,
            average: optimizer.flat_parameters()?,
        })
    }

    /// The decay of update number `step`, from 1: low at first, so that the start is forgotten.
    ///
    /// # Source
    /// diffusers v0.42.1 `training_utils.py`, `EMAModel.get_decay`, without warm-up.
    pub fn decay_at(decay: f64, step: u64) -> f64 {
        let step = step.saturating_sub(1) as f64;
        if step == 0.0 {
            return 0.0;
        }
        decay.min((1.0 + step) / (10.0 + step))
    }

    /// Takes the parameters after optimizer step `step` in.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn update(&mut self, optimizer: &Optimizer, step: u64) -> Result<()> {
        let share = 1.0 - Self::decay_at(self.decay, step);
        let gap = (&self.average - optimizer.flat_parameters()?)?;
        self.average = (&self.average - (gap * share)?)?;
        Ok(())
    }

    /// Flat, in the optimizer's order.
    pub fn average(&self) -> &Tensor {
        &self.average
    }

    /// By name (`<tensor>.ema`), as copies.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn state(&self, optimizer: &Optimizer) -> Result<BTreeMap<String, Tensor>> {
        optimizer.layout().split("ema", &self.average)
    }

    /// Continues from a saved average.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load(&mut self, optimizer: &Optimizer, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.average = optimizer.layout().join("ema", state)?;
        Ok(())
    }
}
