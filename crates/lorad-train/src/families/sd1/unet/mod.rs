//! UNet2DConditionModel, trainable through its adapters.

use candle_core::{Device, Result, Tensor};

use super::{config::UNetConfig, weights::BaseFolder};
use crate::{
    lora::AdapterSet,
    nn::{AdaptableModule, AdapterSwitch, Loading},
};

/// The UNet of Stable Diffusion 1.x and 2.x: frozen weights, adapters beside them.
pub struct UNet2DConditionModel {
    switch: AdapterSwitch,
}

impl UNet2DConditionModel {
    /// Loads the frozen weights and puts the adapters keyed `unet.…` beside them.
    ///
    /// # Errors
    /// Weights that do not fit the config; adapters that do not fit, or that no module takes.
    pub fn load(base: &BaseFolder, device: &Device, adapters: &AdapterSet) -> crate::Result<Self> {
        let weights = base.weights(super::keys::Part::Unet)?;
        let loading = Loading::new(&weights, device, adapters, "unet");
        let model = Self::build(&base.unet, &loading)?;
        loading.finish()?;
        Ok(model)
    }

    pub(super) fn build(_config: &UNetConfig, loading: &Loading<'_>) -> Result<Self> {
        Ok(Self {
            switch: loading.switch(),
        })
    }

    /// Predicts noise or velocity, as the base was trained to.
    ///
    /// # Shapes
    /// `sample` (b, c, h, w); `timesteps` (b,), any dtype, one per sample; `encoder_hidden_states` (b, l, d) -> (b, c, h, w).
    ///
    /// # Errors
    /// Heights or widths that are not multiples of the UNet's downscale; failed tensor operations.
    pub fn forward(&self, _sample: &Tensor, _timesteps: &Tensor, _encoder_hidden_states: &Tensor) -> Result<Tensor> {
        candle_core::bail!("not written yet")
    }

    /// Whether the adapters take part in [`Self::forward`]. On at first.
    pub fn set_adapters_enabled(&self, on: bool) {
        self.switch.set(on);
    }
}

/// Every Linear and 1x1 convolution inside the transformer blocks, in the order of the model, paths without `unet.`.
///
/// # Errors
/// If the config cannot make a model.
pub fn adaptable_modules(config: &UNetConfig) -> Result<Vec<AdaptableModule>> {
    let none = AdapterSet::default();
    let loading = Loading::dry(&none);
    UNet2DConditionModel::build(config, &loading)?;
    Ok(loading.adaptable())
}
