//! A second opinion: candle-transformers' VAE, written by other people from the same papers, on the bundled base's weights.
//! Only inference: its layers drop gradients (docs/adr/0003).

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use lorad_train::families::sd1::{vae::AutoencoderKl, weights::BaseFolder};

#[test]
fn the_vae_decodes_as_candle_transformers_does() {
    let folder = support::base_folder("demo");
    let base = BaseFolder::open(&folder).unwrap();
    let ours = AutoencoderKl::load(&base, &Device::Cpu).unwrap();
    let bytes = std::fs::read(folder.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    let config = AutoEncoderKLConfig {
        block_out_channels: base.vae.block_out_channels.clone(),
        layers_per_block: base.vae.layers_per_block,
        latent_channels: base.vae.latent_channels,
        norm_num_groups: base.vae.norm_num_groups,
        use_quant_conv: base.vae.use_quant_conv,
        use_post_quant_conv: base.vae.use_post_quant_conv,
    };
    let weights = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap();
    let stock = AutoEncoderKL::new(weights, 3, 3, config).unwrap();
    let side = 8;
    let values: Vec<f32> = (0..base.vae.latent_channels * side * side)
        .map(|i| (i as f32 * 0.37).sin())
        .collect();
    let latents = Tensor::from_vec(values, (1, base.vae.latent_channels, side, side), &Device::Cpu).unwrap();
    let expected = stock.decode(&(&latents / ours.scaling_factor()).unwrap()).unwrap();
    let found = ours.decode(&latents).unwrap();
    let largest = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let error = largest(&(found - &expected).unwrap()) / largest(&expected);
    assert!(error < 1e-4, "relative error {error:.1e}");
}
