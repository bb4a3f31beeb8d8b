//! CLIPTextModel, frozen.

use candle_core::{Device, Result, Tensor};

use super::{config::ClipConfig, weights::BaseFolder};
use crate::{lora::AdapterSet, nn::Loading};

/// The text encoder.
pub struct ClipTextModel {}

impl ClipTextModel {
    /// Loads the weights.
    ///
    /// # Errors
    /// Weights that do not fit the config.
    pub fn load(base: &BaseFolder, device: &Device) -> crate::Result<Self> {
        let weights = base.weights(super::keys::Part::TextEncoder)?;
        let none = AdapterSet::default();
        Ok(Self::build(
            &base.text_encoder,
            &Loading::new(&weights, device, &none, "text_encoder"),
        )?)
    }

    pub(super) fn build(_config: &ClipConfig, _loading: &Loading<'_>) -> Result<Self> {
        Ok(Self {})
    }

    /// Last hidden state after the final layer norm. No padding mask, as in Stable Diffusion.
    ///
    /// # Shapes
    /// `ids` (b, l) u32 -> (b, l, d).
    ///
    /// # Errors
    /// An id outside the vocabulary, or a sequence longer than the position table.
    pub fn forward(&self, _ids: &Tensor) -> Result<Tensor> {
        candle_core::bail!("not written yet")
    }
}
