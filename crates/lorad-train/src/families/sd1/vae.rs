//! AutoencoderKL, frozen. Built on the same ops as the UNet rather than on candle-transformers' version: its pictures
//! are channels-last like everything here, and decoding previews is on the path of every sample.

use candle_core::{Device, Result, Tensor, bail};

use super::{
    config::VaeConfig,
    resnet::{ResnetBlock, ResnetSizes},
    weights::BaseFolder,
};
use crate::{
    lora::AdapterSet,
    nn::{Conv2d, GroupNorm, Linear, Loading, Params},
    ops::{self, Conv2dPlus, ConvGeometry},
};

/// Epsilon of every norm of the VAE.
const EPS: f64 = 1e-6;

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
///
/// # Source
/// diffusers v0.42.1 `models/autoencoders/{autoencoder_kl,vae}.py`.
#[derive(Debug)]
pub struct AutoencoderKl {
    /// `None` once it has done its work.
    encoder: Option<Encoder>,
    quant_conv: Option<Linear>,
    post_quant_conv: Option<Linear>,
    decoder: Decoder,
    scaling_factor: f64,
    downscale: usize,
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

    pub(super) fn build(config: &VaeConfig, loading: &Loading<'_>) -> Result<Self> {
        let params = loading.root();
        let c = config.latent_channels;
        let conv = |wanted: bool, name: &str, channels: usize| {
            wanted
                .then(|| Linear::load_conv1x1(&params.at(name), channels, channels))
                .transpose()
        };
        Ok(Self {
            encoder: Some(Encoder::load(&params.at("encoder"), config)?),
            quant_conv: conv(config.use_quant_conv, "quant_conv", 2 * c)?,
            post_quant_conv: conv(config.use_post_quant_conv, "post_quant_conv", c)?,
            decoder: Decoder::load(&params.at("decoder"), config)?,
            scaling_factor: config.scaling_factor,
            downscale: config.downscale(),
        })
    }

    /// Drops the encoder's weights; [`Self::encode`] then fails.
    #[must_use]
    pub fn without_encoder(mut self) -> Self {
        self.encoder = None;
        self
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
    pub fn encode(&self, images: &Tensor) -> Result<Posterior> {
        let (_, _, h, w) = images.dims4()?;
        if h % self.downscale != 0 || w % self.downscale != 0 {
            bail!(
                "a picture of {w} x {h}: both sides must be multiples of {}",
                self.downscale
            )
        }
        let Some(encoder) = &self.encoder else {
            bail!("this VAE's encoder was dropped")
        };
        let mut moments = encoder.forward(&images.permute((0, 2, 3, 1))?.contiguous()?)?;
        if let Some(conv) = &self.quant_conv {
            moments = conv.forward(&moments, None)?;
        }
        let moments = moments.permute((0, 3, 1, 2))?.contiguous()?;
        let halves = moments.chunk(2, 1)?;
        let std = (halves[1].clamp(-30.0, 20.0)? * 0.5)?.exp()?;
        Ok(Posterior {
            mean: halves[0].contiguous()?.detach(),
            std: std.contiguous()?.detach(),
        })
    }

    /// Decodes latents of the UNet (scaled): divides by `scaling_factor` first.
    ///
    /// # Shapes
    /// `latents` (b, c, h, w) -> images (b, 3, h * f, w * f), about [-1, 1], not clamped.
    ///
    /// # Errors
    /// Failed tensor operations.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let latents = (latents / self.scaling_factor)?;
        let mut x = latents.permute((0, 2, 3, 1))?.contiguous()?;
        if let Some(conv) = &self.post_quant_conv {
            x = conv.forward(&x, None)?;
        }
        self.decoder.forward(&x)?.permute((0, 3, 1, 2))?.contiguous()
    }
}

fn resnet(config: &VaeConfig, input: usize, output: usize) -> ResnetSizes {
    ResnetSizes {
        input,
        output,
        time: None,
        groups: config.norm_num_groups,
        eps: EPS,
    }
}

/// The residual blocks of one level and the change of resolution after them.
#[derive(Debug)]
struct Level {
    resnets: Vec<ResnetBlock>,
    resample: Option<Conv2d>,
}

impl Level {
    fn load(params: &Params<'_>, n: usize, sizes: ResnetSizes, resample: Option<(&str, ConvGeometry)>) -> Result<Self> {
        let c = sizes.output;
        Ok(Self {
            resnets: (0..n)
                .map(|j| {
                    let input = if j == 0 { sizes.input } else { c };
                    ResnetBlock::load(&params.at(format_args!("resnets.{j}")), ResnetSizes { input, ..sizes })
                })
                .collect::<Result<_>>()?,
            resample: resample
                .map(|(name, geometry)| Conv2d::load(&params.at(name), c, c, geometry))
                .transpose()?,
        })
    }

    fn resnets(&self, x: &Tensor) -> Result<Tensor> {
        self.resnets
            .iter()
            .try_fold(x.clone(), |x, resnet| resnet.forward(&x, None))
    }
}

#[derive(Debug)]
struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<Level>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn load(params: &Params<'_>, config: &VaeConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (levels, same) = (channels.len(), ConvGeometry::new(3, 1, 1));
        // diffusers pads the stride-2 convolution on the right and below only.
        let halve = ConvGeometry {
            kernel: 3,
            stride: 2,
            padding: (0, 1),
        };
        let down_blocks = (0..levels)
            .map(|i| {
                let sizes = resnet(config, channels[i.saturating_sub(1)], channels[i]);
                let resample = (i + 1 < levels).then_some(("downsamplers.0.conv", halve));
                Level::load(
                    &params.at(format_args!("down_blocks.{i}")),
                    config.layers_per_block,
                    sizes,
                    resample,
                )
            })
            .collect::<Result<_>>()?;
        let deepest = channels[levels - 1];
        Ok(Self {
            conv_in: Conv2d::load(&params.at("conv_in"), config.in_channels, channels[0], same)?,
            down_blocks,
            mid_block: MidBlock::load(&params.at("mid_block"), config, deepest)?,
            conv_norm_out: GroupNorm::load(&params.at("conv_norm_out"), deepest, config.norm_num_groups, EPS)?,
            conv_out: Conv2d::load(&params.at("conv_out"), deepest, 2 * config.latent_channels, same)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(x, Conv2dPlus::default())?;
        for level in &self.down_blocks {
            x = level.resnets(&x)?;
            if let Some(conv) = &level.resample {
                x = conv.forward(&x, Conv2dPlus::default())?;
            }
        }
        let x = self.conv_norm_out.forward_silu(&self.mid_block.forward(&x)?)?;
        self.conv_out.forward(&x, Conv2dPlus::default())
    }
}

#[derive(Debug)]
struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<Level>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn load(params: &Params<'_>, config: &VaeConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (levels, same) = (channels.len(), ConvGeometry::new(3, 1, 1));
        let deepest = channels[levels - 1];
        let up_blocks = (0..levels)
            .map(|i| {
                let level = levels - 1 - i;
                let sizes = resnet(config, channels[(level + 1).min(levels - 1)], channels[level]);
                let resample = (level > 0).then_some(("upsamplers.0.conv", same));
                Level::load(
                    &params.at(format_args!("up_blocks.{i}")),
                    config.layers_per_block + 1,
                    sizes,
                    resample,
                )
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            conv_in: Conv2d::load(&params.at("conv_in"), config.latent_channels, deepest, same)?,
            mid_block: MidBlock::load(&params.at("mid_block"), config, deepest)?,
            up_blocks,
            conv_norm_out: GroupNorm::load(&params.at("conv_norm_out"), channels[0], config.norm_num_groups, EPS)?,
            conv_out: Conv2d::load(&params.at("conv_out"), channels[0], config.out_channels, same)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self
            .mid_block
            .forward(&self.conv_in.forward(x, Conv2dPlus::default())?)?;
        for level in &self.up_blocks {
            x = level.resnets(&x)?;
            if let Some(conv) = &level.resample {
                x = conv.forward(&ops::upsample_nearest_2x(&x)?, Conv2dPlus::default())?;
            }
        }
        self.conv_out
            .forward(&self.conv_norm_out.forward_silu(&x)?, Conv2dPlus::default())
    }
}

/// `UNetMidBlock2D`: residual block, single-head attention, residual block.
#[derive(Debug)]
struct MidBlock {
    first: ResnetBlock,
    attention: Option<Attention>,
    second: ResnetBlock,
}

impl MidBlock {
    fn load(params: &Params<'_>, config: &VaeConfig, channels: usize) -> Result<Self> {
        let sizes = resnet(config, channels, channels);
        let attention = || Attention::load(&params.at("attentions.0"), channels, config.norm_num_groups);
        Ok(Self {
            first: ResnetBlock::load(&params.at("resnets.0"), sizes)?,
            attention: config.mid_block_add_attention.then(attention).transpose()?,
            second: ResnetBlock::load(&params.at("resnets.1"), sizes)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x, None)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x, None)
    }
}

#[derive(Debug)]
struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    fn load(params: &Params<'_>, channels: usize, groups: usize) -> Result<Self> {
        let projection = |name: &str| Linear::load(&params.at(name), channels, channels, true);
        Ok(Self {
            group_norm: GroupNorm::load(&params.at("group_norm"), channels, groups, EPS)?,
            to_q: projection("to_q")?,
            to_k: projection("to_k")?,
            to_v: projection("to_v")?,
            to_out: projection("to_out.0")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let tokens = x.reshape((b, h * w, c))?;
        let normed = self.group_norm.forward(&tokens)?;
        let (q, k, v) = (
            self.to_q.forward(&normed, None)?,
            self.to_k.forward(&normed, None)?,
            self.to_v.forward(&normed, None)?,
        );
        let attended = ops::attention(&q, &k, &v, 1, false)?;
        self.to_out.forward(&attended, Some(&tokens))?.reshape((b, h, w, c))
    }
}
