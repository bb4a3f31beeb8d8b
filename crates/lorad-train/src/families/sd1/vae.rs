//! AutoencoderKL, frozen.

use candle_core::{Device, Result, Tensor};

use super::{config::VaeConfig, weights::BaseFolder};
use crate::{lora::AdapterSet, nn::Loading};

/// What the encoder says about an image: a normal distribution per latent value, *not yet* multiplied by
/// `scaling_factor`.
#[derive(Debug, Clone)]
pub struct Posterior {
    /// Mean, (b, c, h, w).
    pub mean: Tensor,
    /// Standard deviation, (b, c, h, w).
    pub std: Tensor,
}

/// The VAE.
pub struct AutoencoderKl {
    scaling_factor: f64,
}

impl AutoencoderKl {
    /// Loads the weights.
    ///
    /// # Errors
    /// Weights that do not fit the config.
    pub fn load(base: &BaseFolder, device: &Device) -> crate::Result<Self> {
        let weights = base.weights(super::keys::Part::Vae)?;
        let none = AdapterSet::default();
        Ok(Self::build(&base.vae, &Loading::new(&weights, device, &none, "vae"))?)
    }

    pub(super) fn build(config: &VaeConfig, _loading: &Loading<'_>) -> Result<Self> {
        Ok(Self {
            scaling_factor: config.scaling_factor,
        })
    }

    /// `vae.config.scaling_factor`. The UNet works on `z * scaling_factor`: multiply what [`Self::encode`] gives
    /// (`(mean + std * noise) * scaling_factor`). [`Self::decode`] divides by it itself.
    pub fn scaling_factor(&self) -> f64 {
        self.scaling_factor
    }

    /// Encodes images. The result is unscaled.
    ///
    /// # Shapes
    /// `images` (b, 3, h, w) in [-1, 1] -> mean and std (b, c, h / f, w / f).
    ///
    /// # Errors
    /// Heights or widths that are not multiples of the VAE's downscale.
    pub fn encode(&self, _images: &Tensor) -> Result<Posterior> {
        candle_core::bail!("not written yet")
    }

    /// Decodes latents of the UNet (scaled): divides by `scaling_factor` first.
    ///
    /// # Shapes
    /// `latents` (b, c, h, w) -> images (b, 3, h * f, w * f), about [-1, 1], not clamped.
    ///
    /// # Errors
    /// Failed tensor operations.
    pub fn decode(&self, _latents: &Tensor) -> Result<Tensor> {
        candle_core::bail!("not written yet")
    }
}
