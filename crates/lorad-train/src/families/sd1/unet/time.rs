//! The embedding of the timestep: frozen, computed in f32 from each sample's own timestep.

use candle_core::{Result, Tensor};

use crate::{
    families::sd1::config::UNetConfig,
    nn::{Linear, Params},
    ops::{self, Activation},
};

/// Sinusoids followed by a two-layer MLP.
///
/// # Source
/// diffusers v0.42.1 `models/embeddings.py`, `get_timestep_embedding` and `TimestepEmbedding`.
#[derive(Debug)]
pub(super) struct TimeEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    /// Frequencies of the sinusoids.
    frequencies: Vec<f32>,
    flip_sin_to_cos: bool,
}

impl TimeEmbedding {
    /// Width of the result.
    pub(super) fn width(config: &UNetConfig) -> usize {
        config.block_out_channels[0] * 4
    }

    pub(super) fn load(params: &Params<'_>, config: &UNetConfig) -> Result<Self> {
        let (channels, width) = (config.block_out_channels[0], Self::width(config));
        let half = channels / 2;
        let denominator = half as f32 - config.freq_shift as f32;
        let frequencies = (0..half)
            .map(|i| (-(10_000_f32.ln()) * i as f32 / denominator).exp())
            .collect();
        Ok(Self {
            linear_1: Linear::load(&params.at("linear_1"), channels, width, true)?,
            linear_2: Linear::load(&params.at("linear_2"), width, width, true)?,
            frequencies,
            flip_sin_to_cos: config.flip_sin_to_cos,
        })
    }

    /// The embedding with the SiLU that every residual block applies first: computed once for all of them.
    ///
    /// # Shapes
    /// `timesteps` (b,) -> (b, width).
    pub(super) fn forward(&self, timesteps: &Tensor) -> Result<Tensor> {
        // On the device: reading the timesteps back would wait for it.
        let half = self.frequencies.len();
        let frequencies = Tensor::from_slice(&self.frequencies, (1, half), timesteps.device())?;
        let angles = timesteps
            .to_dtype(candle_core::DType::F32)?
            .unsqueeze(1)?
            .broadcast_mul(&frequencies)?;
        let (sin, cos) = (angles.sin()?, angles.cos()?);
        let sinusoids = if self.flip_sin_to_cos {
            Tensor::cat(&[cos, sin], 1)?
        } else {
            Tensor::cat(&[sin, cos], 1)?
        };
        let h = ops::activation(&self.linear_1.forward(&sinusoids, None)?, Activation::Silu)?;
        ops::activation(&self.linear_2.forward(&h, None)?, Activation::Silu)
    }
}
