//! The residual block that the UNet and the VAE share.

use candle_core::{Result, Tensor};

use crate::{
    nn::{GroupNorm, Linear, LoraConv2d, LoraLinear, Params},
    ops::{Conv2dPlus, ConvGeometry},
};

/// Sizes of a [`ResnetBlock`].
#[derive(Debug, Clone, Copy)]
pub(super) struct ResnetSizes {
    /// Channels in.
    pub(super) input: usize,
    /// Channels out.
    pub(super) output: usize,
    /// Width of the time embedding; `None` in the VAE.
    pub(super) time: Option<usize>,
    /// Groups of the norms.
    pub(super) groups: usize,
    /// Epsilon of the norms.
    pub(super) eps: f64,
}

/// Two normalised 3x3 convolutions beside a shortcut.
///
/// # Source
/// diffusers v0.42.1 `models/resnet.py`, `ResnetBlock2D` (`time_embedding_norm="default"`).
#[derive(Debug)]
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: LoraConv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: LoraConv2d,
    conv_shortcut: Option<LoraLinear>,
}

impl ResnetBlock {
    pub(super) fn load(params: &Params<'_>, sizes: ResnetSizes) -> Result<Self> {
        let ResnetSizes {
            input,
            output,
            time,
            groups,
            eps,
        } = sizes;
        let same = ConvGeometry::new(3, 1, 1);
        Ok(Self {
            norm1: GroupNorm::load(&params.at("norm1"), input, groups, eps)?,
            conv1: LoraConv2d::load(&params.at("conv1"), input, output, same)?,
            time_emb_proj: time
                .map(|t| Linear::load(&params.at("time_emb_proj"), t, output, true))
                .transpose()?,
            norm2: GroupNorm::load(&params.at("norm2"), output, groups, eps)?,
            conv2: LoraConv2d::load(&params.at("conv2"), output, output, same)?,
            conv_shortcut: if input == output {
                None
            } else {
                Some(LoraLinear::load_conv1x1(&params.at("conv_shortcut"), input, output)?)
            },
        })
    }

    /// # Shapes
    /// `x` (b, h, w, input); `time` (b, time width), SiLU applied -> (b, h, w, output).
    pub(super) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let time = match (&self.time_emb_proj, time) {
            (Some(proj), Some(time)) => Some(proj.forward(time, None)?),
            _ => None,
        };
        let h = self.norm1.forward_silu(x)?;
        let h = self.conv1.forward(
            &h,
            Conv2dPlus {
                per_sample: time.as_ref(),
                residual: None,
            },
        )?;
        let h = self.norm2.forward_silu(&h)?;
        let shortcut = self.conv_shortcut.as_ref().map(|conv| conv.forward(x)).transpose()?;
        let residual = Some(shortcut.as_ref().unwrap_or(x));
        self.conv2.forward(
            &h,
            Conv2dPlus {
                per_sample: None,
                residual,
            },
        )
    }
}
