//! AdamW on all adapter tensors at once, with state that can be saved and loaded by name.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor, Var, bail};

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

/// The optimizer. Its tensors are one flat f32 vector in the order of the adapter's names, so that a step is a dozen
/// tensor operations however many modules there are.
///
/// # Source
/// Loshchilov & Hutter 2019, algorithm 2, in the form and order of torch 2.15 `optim/adamw.py`
/// (`_single_tensor_adamw`).
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    vars: Vec<(String, Var)>,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// Steps taken: the exponent of the bias corrections.
    steps: u64,
}

impl AdamW {
    /// # Errors
    /// If there is nothing to train, or a tensor is not f32.
    pub fn new(vars: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        let Some((_, first)) = vars.first() else {
            bail!("an optimizer without parameters")
        };
        if let Some((name, var)) = vars.iter().find(|(_, v)| v.dtype() != DType::F32) {
            bail!("{name} is {:?}; adapters are f32", var.dtype())
        }
        let n: usize = vars.iter().map(|(_, v)| v.elem_count()).sum();
        let zeros = Tensor::zeros(n, DType::F32, first.device())?;
        Ok(Self {
            config,
            exp_avg: zeros.clone(),
            exp_avg_sq: zeros,
            steps: 0,
            vars,
        })
    }

    /// The parameters, in their order in every flat vector.
    pub fn vars(&self) -> &[(String, Var)] {
        &self.vars
    }

    /// All parameters as one flat vector (a copy).
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn flat_parameters(&self) -> Result<Tensor> {
        let parts: Vec<Tensor> = self
            .vars
            .iter()
            .map(|(_, v)| v.as_detached_tensor().flatten_all())
            .collect::<Result<_>>()?;
        Tensor::cat(&parts, 0)
    }

    /// One update of every parameter.
    ///
    /// # Shapes
    /// `gradient`: flat, in the order of [`Self::vars`].
    ///
    /// # Errors
    /// If the gradient has another length.
    pub fn step(&mut self, gradient: &Tensor, lr: f64) -> Result<()> {
        let AdamWConfig {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = self.config;
        self.steps += 1;
        let exponent = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let (correction1, correction2) = (1.0 - beta1.powi(exponent), 1.0 - beta2.powi(exponent));
        let parameters = (self.flat_parameters()? * (1.0 - lr * weight_decay))?;
        self.exp_avg = (&self.exp_avg + ((gradient - &self.exp_avg)? * (1.0 - beta1))?)?;
        self.exp_avg_sq = ((&self.exp_avg_sq * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let denominator = ((self.exp_avg_sq.sqrt()? / correction2.sqrt())? + epsilon)?;
        let update = (self.exp_avg.div(&denominator)? * (lr / correction1))?;
        let parameters = (parameters - update)?;
        let mut offset = 0;
        for (_, var) in &self.vars {
            let n = var.elem_count();
            var.set(&parameters.narrow(0, offset, n)?.reshape(var.shape())?)?;
            offset += n;
        }
        Ok(())
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The moments by name (`<tensor>.exp_avg`, `<tensor>.exp_avg_sq`), as copies.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        let mut offset = 0;
        for (name, var) in &self.vars {
            let n = var.elem_count();
            for (kind, flat) in [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)] {
                state.insert(
                    format!("{name}.{kind}"),
                    flat.narrow(0, offset, n)?.reshape(var.shape())?.copy()?,
                );
            }
            offset += n;
        }
        Ok(state)
    }

    /// Continues from saved moments after `steps` steps.
    ///
    /// # Errors
    /// If a moment is missing or of another shape.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>, steps: u64) -> Result<()> {
        let flat = |kind: &str| {
            let parts: Vec<Tensor> = self
                .vars
                .iter()
                .map(|(name, var)| match state.get(&format!("{name}.{kind}")) {
                    Some(t) if t.dims() == var.dims() => t.to_device(var.device())?.flatten_all(),
                    Some(t) => bail!("{name}.{kind} has shape {:?}, not {:?}", t.dims(), var.dims()),
                    None => bail!("{name}.{kind} is not in the checkpoint"),
                })
                .collect::<Result<_>>()?;
            Tensor::cat(&parts, 0)
        };
        (self.exp_avg, self.exp_avg_sq) = (flat("exp_avg")?, flat("exp_avg_sq")?);
        self.steps = steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;
    use crate::step::clip_factor;

    fn golden() -> std::collections::HashMap<String, Tensor> {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/golden/optim/adamw.safetensors"
        );
        candle_core::safetensors::load(path, &Device::Cpu).unwrap()
    }

    fn optimizer(golden: &std::collections::HashMap<String, Tensor>) -> AdamW {
        let vars = ["a", "b"]
            .map(|n| {
                (
                    n.to_owned(),
                    Var::from_tensor(&golden[&format!("initial.{n}")]).unwrap(),
                )
            })
            .to_vec();
        let config = AdamWConfig {
            beta1: 0.85,
            beta2: 0.97,
            epsilon: 1e-6,
            weight_decay: 0.1,
        };
        AdamW::new(vars, config).unwrap()
    }

    fn flat_gradient(golden: &std::collections::HashMap<String, Tensor>, step: usize) -> Tensor {
        let parts: Vec<Tensor> = ["a", "b"]
            .iter()
            .map(|n| golden[&format!("grad.{step}.{n}")].flatten_all().unwrap())
            .collect();
        Tensor::cat(&parts, 0).unwrap()
    }

    /// `tests/golden/optim/adamw.safetensors`: eight steps of `torch.optim.AdamW` behind `clip_grad_norm_`.
    #[test]
    fn eight_clipped_steps_equal_torch() {
        let golden = golden();
        let mut optimizer = optimizer(&golden);
        for step in 0..8 {
            let gradient = flat_gradient(&golden, step);
            let norm = f64::from(
                gradient
                    .sqr()
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .sqrt()
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap(),
            );
            let expected = golden[&format!("grad_norm.{step}")]
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()[0];
            assert!((norm / f64::from(expected) - 1.0).abs() < 1e-6);
            optimizer
                .step(&(gradient * clip_factor(norm, 1.5)).unwrap(), 0.01)
                .unwrap();
            for (name, var) in optimizer.vars() {
                let difference = (var.as_tensor() - &golden[&format!("after.{step}.{name}")]).unwrap();
                let error = difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(error < 2e-7, "{name} after step {step}: off by {error:e}");
            }
        }
    }

    #[test]
    fn saved_and_loaded_state_continues_bit_for_bit() {
        let golden = golden();
        let mut straight = optimizer(&golden);
        let mut first = optimizer(&golden);
        for step in 0..3 {
            straight.step(&flat_gradient(&golden, step), 0.01).unwrap();
            first.step(&flat_gradient(&golden, step), 0.01).unwrap();
        }
        let (state, steps) = (first.state().unwrap(), first.steps());
        let mut second = AdamW::new(first.vars().to_vec(), first.config).unwrap();
        second.load_state(&state, steps).unwrap();
        let bits = |o: &AdamW| {
            o.flat_parameters()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .iter()
                .map(|v| v.to_bits())
                .collect::<Vec<_>>()
        };
        for step in 3..8 {
            straight.step(&flat_gradient(&golden, step), 0.01).unwrap();
            second.step(&flat_gradient(&golden, step), 0.01).unwrap();
        }
        assert_eq!(bits(&straight), bits(&second));
        // The saved state is a copy: going on did not change it.
        let again = AdamW::load_state(&mut first, &state, 3);
        assert!(again.is_ok());
        assert!(
            first
                .load_state(&BTreeMap::new(), 3)
                .unwrap_err()
                .to_string()
                .contains("a.exp_avg")
        );
    }
}
