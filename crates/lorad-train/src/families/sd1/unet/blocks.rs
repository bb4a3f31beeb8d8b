//! The levels of the UNet: residual blocks, transformers, and a change of resolution.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::transformer::{Transformer2D, TransformerSizes};
use crate::{
    families::sd1::resnet::{ResnetBlock, ResnetSizes},
    nn::{LoraConv2d, Params, dropout},
    ops::{self, Conv2dPlus, ConvGeometry},
};

/// What every layer of one forward pass reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass<'a> {
    /// `(b, time width)`, SiLU applied.
    pub(super) time: &'a Tensor,
    /// `(b, l, d)`.
    pub(super) context: &'a Tensor,
    /// Gradient checkpointing: layers compute their activations again for the backward.
    pub(super) recompute: bool,
}

/// A residual block and the transformer after it, where the level has one.
#[derive(Debug)]
struct Layer {
    resnet: ResnetBlock,
    attention: Option<Transformer2D>,
}

impl Layer {
    fn load(
        params: &Params<'_>,
        j: usize,
        resnet: ResnetSizes,
        transformer: Option<TransformerSizes>,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            resnet: ResnetBlock::load(&params.at(format_args!("resnets.{j}")), resnet)?,
            attention: transformer
                .map(|sizes| Transformer2D::load(&params.at(format_args!("attentions.{j}")), sizes))
                .transpose()?,
        }))
    }

    /// [`Self::forward`] as a segment of the tape: on `x`, or on `x` and `skip` side by side.
    fn segment(self: &Arc<Self>, x: &Tensor, skip: Option<&Tensor>, pass: &Pass<'_>) -> Result<Tensor> {
        let (this, time) = (Arc::clone(self), pass.time.clone());
        // What is computed again for the backward must drop the same.
        let dropout = dropout::current();
        // The prompt is an input too: where the text encoder is trained, it is tracked.
        let run = move |inputs: &[Tensor]| {
            dropout::with_dropout(dropout.clone(), || match inputs {
                [x, context] => this.forward(x, &time, context),
                [x, context, skip] => this.forward(&ops::cat_channels(x, skip)?, &time, context),
                _ => bail!("a layer with {} inputs", inputs.len()),
            })
        };
        match skip {
            Some(skip) => ops::segment(&[x, pass.context, skip], pass.recompute, run),
            None => ops::segment(&[x, pass.context], pass.recompute, run),
        }
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
    layers: Vec<Arc<Layer>>,
    downsampler: Option<LoraConv2d>,
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
        let conv = || LoraConv2d::load(&params.at("downsamplers.0.conv"), c, c, ConvGeometry::new(3, 2, 1));
        Ok(Self {
            layers,
            downsampler: downsample.then(conv).transpose()?,
        })
    }

    /// Pushes every intermediate result, for the way up.
    pub(super) fn forward(&self, mut x: Tensor, pass: &Pass<'_>, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        for layer in &self.layers {
            x = layer.segment(&x, None, pass)?;
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
    first: Arc<Layer>,
    second: ResnetBlock,
}

impl MidBlock {
    pub(super) fn load(params: &Params<'_>, resnet: ResnetSizes, transformer: TransformerSizes) -> Result<Self> {
        Ok(Self {
            first: Layer::load(params, 0, resnet, Some(transformer))?,
            second: ResnetBlock::load(&params.at("resnets.1"), resnet)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        self.second
            .forward(&self.first.segment(x, None, pass)?, Some(pass.time))
    }
}

/// `UpBlock2D` or `CrossAttnUpBlock2D`.
#[derive(Debug)]
pub(super) struct UpBlock {
    layers: Vec<Arc<Layer>>,
    upsampler: Option<LoraConv2d>,
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
        let conv = || LoraConv2d::load(&params.at("upsamplers.0.conv"), c, c, ConvGeometry::new(3, 1, 1));
        Ok(Self {
            layers,
            upsampler: upsample.then(conv).transpose()?,
        })
    }

    pub(super) fn forward(&self, mut x: Tensor, pass: &Pass<'_>, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        for layer in &self.layers {
            let Some(skip) = skips.pop() else {
                bail!("the way up has more layers than the way down has results")
            };
            x = layer.segment(&x, Some(&skip), pass)?;
        }
        match &self.upsampler {
            Some(conv) => conv.forward(&ops::upsample_nearest_2x(&x)?, Conv2dPlus::default()),
            None => Ok(x),
        }
    }
}
