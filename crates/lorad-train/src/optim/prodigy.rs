//! Prodigy: AdamW that finds its own step size.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::{Layout, Rule};

/// Settings that do not change during a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProdigyConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment; its root decays the distance estimate.
    pub beta2: f64,
    /// Added to the root of the second moment, times d.
    pub epsilon: f64,
    /// Decoupled weight decay per unit of step size.
    pub weight_decay: f64,
    /// First estimate of the distance to the solution.
    pub d0: f64,
    /// Factor on the estimate.
    pub d_coef: f64,
    /// AdamW's bias correction.
    pub use_bias_correction: bool,
    /// Keep the estimate from growing too far during the warm-up.
    pub safeguard_warmup: bool,
}

/// d is a tensor, so that a step reads nothing from the device.
///
/// # Source
/// Mishchenko & Defazio 2023, algorithm 4, as in prodigyopt 1.1.2.
#[derive(Debug)]
pub(super) struct Prodigy {
    config: ProdigyConfig,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// Weighted sum of gradients.
    s: Tensor,
    /// The parameters before the first step.
    initial: Tensor,
    /// The distance estimate, (1).
    d: Tensor,
    d_numerator: Tensor,
    /// Steps with a learning rate above 0: the exponent of the bias correction.
    moves: u64,
}

impl Prodigy {
    pub(super) fn new(config: ProdigyConfig, zeros: &Tensor, initial: Tensor) -> Result<Self> {
        let scalar = |v: f64| Tensor::new(&[v as f32], zeros.device());
        Ok(Self {
            exp_avg: zeros.clone(),
            exp_avg_sq: zeros.clone(),
            s: zeros.clone(),
            initial,
            d: scalar(config.d0)?,
            d_numerator: scalar(0.0)?,
            moves: 0,
            config,
        })
    }
}

impl Rule for Prodigy {
    fn update(&mut self, _: &Layout, _: u64, parameters: Tensor, gradient: &Tensor, lr: f64) -> Result<Tensor> {
        // At a learning rate of 0 (the first step of a warm-up) nothing moves and nothing is learned about d.
        if lr == 0.0 {
            return Ok(parameters);
        }
        self.moves += 1;
        let c = self.config;
        let beta3 = c.beta2.sqrt();
        let exponent = i32::try_from(self.moves).unwrap_or(i32::MAX);
        let correction = if c.use_bias_correction {
            (1.0 - c.beta2.powi(exponent)).sqrt() / (1.0 - c.beta1.powi(exponent))
        } else {
            1.0
        };
        let d = self.d.clone();
        let step_size = (&d * (lr * correction))?;
        let relative = (&d / c.d0)?;
        let progress = (gradient * (&self.initial - &parameters)?)?.sum_all()?.reshape(1)?;
        self.d_numerator = ((&self.d_numerator * beta3)? + (&relative * &step_size)?.mul(&progress)?)?;
        self.exp_avg = ((&self.exp_avg * c.beta1)? + gradient.broadcast_mul(&(&d * (1.0 - c.beta1))?)?)?;
        self.exp_avg_sq =
            ((&self.exp_avg_sq * c.beta2)? + gradient.sqr()?.broadcast_mul(&(d.sqr()? * (1.0 - c.beta2))?)?)?;
        let weight = (&relative * if c.safeguard_warmup { &d } else { &step_size })?;
        self.s = ((&self.s * beta3)? + gradient.broadcast_mul(&weight)?)?;
        // A gradient of zeros has no direction: 0 / tiny leaves d as it is.
        let length = self
            .s
            .abs()?
            .sum_all()?
            .reshape(1)?
            .maximum(f64::from(f32::MIN_POSITIVE))?;
        let estimate = (self.d_numerator.div(&length)? * c.d_coef)?;
        self.d = self.d.maximum(&estimate)?;
        let denominator = self.exp_avg_sq.sqrt()?.broadcast_add(&(&self.d * c.epsilon)?)?;
        let decay = parameters.broadcast_mul(&(&step_size * c.weight_decay)?)?;
        let update = self.exp_avg.div(&denominator)?.broadcast_mul(&step_size)?;
        (parameters - decay)? - update
    }

    fn state(&self, layout: &Layout) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (kind, flat) in [
            ("exp_avg", &self.exp_avg),
            ("exp_avg_sq", &self.exp_avg_sq),
            ("s", &self.s),
            ("p0", &self.initial),
        ] {
            state.extend(layout.split(kind, flat)?);
        }
        state.insert(layout.shared_name("prodigy.d"), self.d.copy()?);
        state.insert(layout.shared_name("prodigy.d_numerator"), self.d_numerator.copy()?);
        let moves = u32::try_from(self.moves).unwrap_or(u32::MAX);
        let moves = Tensor::new(&[moves], self.d.device())?;
        state.insert(layout.shared_name("prodigy.moves"), moves);
        Ok(state)
    }

    fn load(&mut self, layout: &Layout, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.exp_avg = layout.join("exp_avg", state)?;
        self.exp_avg_sq = layout.join("exp_avg_sq", state)?;
        self.s = layout.join("s", state)?;
        self.initial = layout.join("p0", state)?;
        self.d = layout.read(&layout.shared_name("prodigy.d"), &[1], state)?;
        self.d_numerator = layout.read(&layout.shared_name("prodigy.d_numerator"), &[1], state)?;
        let moves = layout.read(&layout.shared_name("prodigy.moves"), &[1], state)?;
        self.moves = moves.to_vec1::<u32>()?.first().copied().map_or(0, u64::from);
        Ok(())
    }
}
