//! The levels of the UNet: residual blocks, transformers, and a change of resolution.

use candle_core::{Result, Tensor, bail};

use super::transformer::{Transformer2D, TransformerSizes};
use crate::{
    families::sd1::resnet::{ResnetBlock, ResnetSizes},
    nn::{Conv2d, Params},
    ops::{self, Conv2dPlus, ConvGeometry},
};

/// A residual block and the transformer after it, where the level has one.
#[derive(Debug)]
struct Layer {
    resnet: ResnetBlock,
    attention: Option<Transformer2D>,
}

impl Layer {
    fn load(params: &Params<'_>, j: usize, resnet: ResnetSizes, transformer: Option<TransformerSizes>) -> Result<Self> {
        Ok(Self {
            resnet: ResnetBlock::load(&params.at(format_args!("resnets.{j}")), resnet)?,
            attention: transformer
                .map(|sizes| Transformer2D::load(&params.at(format_args!("attentions.{j}")), sizes))
                .transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, time: &Tensor, context: &Tensor) -> Result<Tensor> {
        let x = self.resnet.forward(x, Some(time))?;
        match &self.attention {
            Some(attention) => attention.forward(&x, context),
            None => Ok(x),
        }
    }
}

/// `DownBlock2D` or `CrossAttnDownBlock2D`.
///
/// # Source
/// diffusers v0.42.1 `models/unets/unet_2d_blocks.py`.
#[derive(Debug)]
pub(super) struct DownBlock {
    layers: Vec<Layer>,
    downsampler: Option<Conv2d>,
}

impl DownBlock {
    /// `n` layers; the first takes `resnet.input` channels, the others `resnet.output`.
    pub(super) fn load(
        params: &Params<'_>,
        n: usize,
        resnet: ResnetSizes,
        transformer: Option<TransformerSizes>,
        downsample: bool,
    ) -> Result<Self> {
        let c = resnet.output;
        let layers = (0..n)
            .map(|j| {
                let input = if j == 0 { resnet.input } else { c };
                Layer::load(params, j, ResnetSizes { input, ..resnet }, transformer)
            })
            .collect::<Result<_>>()?;
        let conv = || Conv2d::load(&params.at("downsamplers.0.conv"), c, c, ConvGeometry::new(3, 2, 1));
        Ok(Self {
            layers,
            downsampler: downsample.then(conv).transpose()?,
        })
    }

    /// Pushes every intermediate result, for the way up.
    pub(super) fn forward(
        &self,
        mut x: Tensor,
        time: &Tensor,
        context: &Tensor,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        for layer in &self.layers {
            x = layer.forward(&x, time, context)?;
            skips.push(x.clone());
        }
        if let Some(conv) = &self.downsampler {
            x = conv.forward(&x, Conv2dPlus::default())?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// `UNetMidBlock2DCrossAttn`.
#[derive(Debug)]
pub(super) struct MidBlock {
    first: Layer,
    second: ResnetBlock,
}

impl MidBlock {
    pub(super) fn load(params: &Params<'_>, resnet: ResnetSizes, transformer: TransformerSizes) -> Result<Self> {
        Ok(Self {
            first: Layer::load(params, 0, resnet, Some(transformer))?,
            second: ResnetBlock::load(&params.at("resnets.1"), resnet)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, time: &Tensor, context: &Tensor) -> Result<Tensor> {
        self.second.forward(&self.first.forward(x, time, context)?, Some(time))
    }
}

/// `UpBlock2D` or `CrossAttnUpBlock2D`.
#[derive(Debug)]
pub(super) struct UpBlock {
    layers: Vec<Layer>,
    upsampler: Option<Conv2d>,
}

impl UpBlock {
    /// One layer per entry of `skip_channels`, in the order in which they are taken; the first layer's other input has
    /// `resnet.input` channels.
    pub(super) fn load(
        params: &Params<'_>,
        skip_channels: &[usize],
        resnet: ResnetSizes,
        transformer: Option<TransformerSizes>,
        upsample: bool,
    ) -> Result<Self> {
        let c = resnet.output;
        let layers = skip_channels
            .iter()
            .enumerate()
            .map(|(j, skip)| {
                let input = skip + if j == 0 { resnet.input } else { c };
                Layer::load(params, j, ResnetSizes { input, ..resnet }, transformer)
            })
            .collect::<Result<_>>()?;
        let conv = || Conv2d::load(&params.at("upsamplers.0.conv"), c, c, ConvGeometry::new(3, 1, 1));
        Ok(Self {
            layers,
            upsampler: upsample.then(conv).transpose()?,
        })
    }

    pub(super) fn forward(
        &self,
        mut x: Tensor,
        time: &Tensor,
        context: &Tensor,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        for layer in &self.layers {
            let Some(skip) = skips.pop() else {
                bail!("the way up has more layers than the way down has results")
            };
            x = layer.forward(&ops::cat_channels(&x, &skip)?, time, context)?;
        }
        match &self.upsampler {
            Some(conv) => conv.forward(&ops::upsample_nearest_2x(&x)?, Conv2dPlus::default()),
            None => Ok(x),
        }
    }
}
