//! Initial values of adapters: A random, B zero, so that training starts at the base model.

use candle_core::{Device, Result, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::Adapter;
use crate::{
    nn::ModuleKind,
    rng::{Purpose, Stream, name_counter},
};

/// How A is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraInit {
    /// `N(0, 1 / rank)` (standard deviation `1 / rank`): diffusers' scripts (PEFT `init_lora_weights="gaussian"`).
    Gaussian,
    /// `U(±1 / √fan_in)`: kohya, PEFT's default (`kaiming_uniform_(a=√5)`).
    KaimingUniform,
}

/// A fresh adapter for the module `path`. Its values depend on the seed and its own name only.
///
/// # Errors
/// If a tensor cannot be made.
pub fn fresh(
    path: &str,
    kind: ModuleKind,
    rank: usize,
    alpha: f64,
    init: LoraInit,
    seed: u64,
    device: &Device,
) -> Result<Adapter> {
    let (a_shape, b_shape) = (kind.lora_a_shape(rank), kind.lora_b_shape(rank));
    let mut stream = Stream::new(seed, Purpose::Init, name_counter(path));
    let n: usize = a_shape.iter().product();
    let values: Vec<f32> = match init {
        LoraInit::Gaussian => stream.normals(n).into_iter().map(|z| z / rank as f32).collect(),
        LoraInit::KaimingUniform => {
            let fan_in: usize = a_shape[1..].iter().product();
            let bound = 1.0 / (fan_in as f64).sqrt();
            (0..n)
                .map(|_| ((2.0 * stream.uniform() - 1.0) * bound) as f32)
                .collect()
        }
    };
    Ok(Adapter::new(
        Var::from_tensor(&Tensor::from_vec(values, a_shape, device)?)?,
        Var::zeros(b_shape, candle_core::DType::F32, device)?,
        alpha,
    ))
}

/// The square of each output's weights' norm.
///
/// # Shapes
/// `weight` (out, …) -> (out,).
///
/// # Errors
/// If a tensor operation fails.
pub fn row_squares(weight: &Tensor) -> Result<Tensor> {
    weight.flatten_from(1)?.sqr()?.sum(1)
}

/// DoRA's magnitudes at their start: `‖W‖` of each output, so that training starts at the base model.
///
/// # Shapes
/// `weight` as [`ModuleKind::weight_shape`] -> [`ModuleKind::magnitude_shape`].
///
/// # Errors
/// If a tensor operation fails.
///
/// # Source
/// peft 0.21.2 `tuners/lora/dora.py`, `DoraLinearLayer.update_layer`.
pub fn magnitude(weight: &Tensor, kind: ModuleKind, device: &Device) -> Result<Var> {
    let norms = row_squares(weight)?.sqrt()?;
    Var::from_tensor(&norms.reshape(kind.magnitude_shape())?.to_device(device)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn values(init: LoraInit, path: &str) -> Vec<f32> {
        let kind = ModuleKind::Linear {
            in_features: 400,
            out_features: 3,
        };
        let adapter = fresh(path, kind, 8, 8.0, init, 1, &Device::Cpu).unwrap();
        assert!(
            adapter
                .b
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .iter()
                .all(|&v| v == 0.0)
        );
        adapter.a.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn deviation(values: &[f32]) -> f64 {
        (values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
    }

    #[test]
    fn gaussian_has_deviation_one_over_rank_and_kaiming_the_bound_of_its_fan_in() {
        assert!((deviation(&values(LoraInit::Gaussian, "x")) - 1.0 / 8.0).abs() < 0.005);
        let uniform = values(LoraInit::KaimingUniform, "x");
        assert!(uniform.iter().all(|v| v.abs() <= 0.05));
        assert!((deviation(&uniform) - 0.05 / 3_f64.sqrt()).abs() < 0.001);
    }

    #[test]
    fn each_module_has_its_own_numbers() {
        assert_ne!(values(LoraInit::Gaussian, "x"), values(LoraInit::Gaussian, "y"));
        assert_eq!(values(LoraInit::Gaussian, "x"), values(LoraInit::Gaussian, "x"));
    }
}
