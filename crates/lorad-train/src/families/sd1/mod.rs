//! Stable Diffusion 1.x and 2.x: UNet2DConditionModel, CLIP text encoder, AutoencoderKL.

pub mod tokenizer;
