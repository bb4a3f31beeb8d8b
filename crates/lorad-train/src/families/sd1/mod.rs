//! Stable Diffusion 1.x and 2.x: UNet2DConditionModel, CLIP text encoder, AutoencoderKL.

pub mod clip;
pub mod config;
pub mod keys;
mod resnet;
pub mod tokenizer;
pub mod unet;
pub mod vae;
pub mod weights;
