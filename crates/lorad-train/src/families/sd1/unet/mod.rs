//! UNet2DConditionModel, trainable through its adapters. Inside, pictures are channels-last; the boundary keeps
//! diffusers' shapes.

mod blocks;
mod time;
mod transformer;

use candle_core::{Device, Result, Tensor, bail};

use self::{
    blocks::{DownBlock, MidBlock, Pass, UpBlock},
    time::TimeEmbedding,
    transformer::TransformerSizes,
};
use super::{
    config::{BlockKind, UNetConfig},
    resnet::ResnetSizes,
    weights::BaseFolder,
};
use crate::{
    lora::AdapterSet,
    nn::{AdaptableModule, AdapterControls, Conv2d, GroupNorm, Loading, TensorSource, dropout},
    ops::{self, Conv2dPlus, ConvGeometry, WeightType},
};

/// The UNet of Stable Diffusion 1.x and 2.x: frozen weights, adapters beside them.
///
/// # Source
/// diffusers v0.42.1 `models/unets/unet_2d_condition.py`, `UNet2DConditionModel`.
#[derive(Debug)]
pub struct UNet2DConditionModel {
    conv_in: Conv2d,
    time_embedding: TimeEmbedding,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    downscale: usize,
    controls: AdapterControls,
}

impl UNet2DConditionModel {
    /// Loads the frozen weights and puts the adapters keyed `unet.…` beside them.
    ///
    /// # Errors
    /// Weights that do not fit the config; adapters that do not fit, or that no module takes.
    pub fn load(base: &BaseFolder, device: &Device, adapters: &AdapterSet) -> crate::Result<Self> {
        let weights = base.weights(super::keys::Part::Unet)?;
        Ok(Self::from_source(
            &base.unet,
            &weights,
            device,
            adapters,
            WeightType::F32,
        )?)
    }

    /// [`Self::load`] with the weights held as `dtype`; adapters, activations and arithmetic stay f32.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_as(
        base: &BaseFolder,
        device: &Device,
        adapters: &AdapterSet,
        dtype: WeightType,
    ) -> crate::Result<Self> {
        let weights = base.weights(super::keys::Part::Unet)?;
        Ok(Self::from_source(&base.unet, &weights, device, adapters, dtype)?)
    }

    /// [`Self::load_as`] from any source of tensors.
    ///
    /// # Errors
    /// What the source returns; adapters that do not fit, or that no module takes.
    pub fn from_source(
        config: &UNetConfig,
        source: &dyn TensorSource,
        device: &Device,
        adapters: &AdapterSet,
        dtype: WeightType,
    ) -> Result<Self> {
        let loading = Loading::new(source, device, adapters, "unet").with_weight_type(dtype);
        let model = Self::build(config, &loading)?;
        loading.finish()?;
        Ok(model)
    }

    /// [`Self::load`] with candle's layer norm, which drops the gradient; see [`Loading::with_stock_layer_norm`].
    #[doc(hidden)]
    pub fn load_with_stock_layer_norm(
        base: &BaseFolder,
        device: &Device,
        adapters: &AdapterSet,
    ) -> crate::Result<Self> {
        let weights = base.weights(super::keys::Part::Unet)?;
        let loading = Loading::new(&weights, device, adapters, "unet").with_stock_layer_norm();
        Ok(Self::build(&base.unet, &loading)?)
    }

    pub(super) fn build(config: &UNetConfig, loading: &Loading<'_>) -> Result<Self> {
        let params = loading.root();
        let channels = &config.block_out_channels;
        let levels = channels.len();
        let same = ConvGeometry::new(3, 1, 1);
        let resnet = |input: usize, output: usize| ResnetSizes {
            input,
            output,
            time: Some(TimeEmbedding::width(config)),
            groups: config.norm_num_groups,
            eps: config.norm_eps,
        };
        let transformer = |level: usize| TransformerSizes {
            channels: channels[level],
            heads: config.num_attention_heads[level],
            layers: config.transformer_layers_per_block[level],
            context: config.cross_attention_dim,
            groups: config.norm_num_groups,
            linear_projection: config.use_linear_projection,
        };
        let with_attention =
            |kind: BlockKind, level: usize| (kind == BlockKind::CrossAttention).then(|| transformer(level));

        // Channels of what the way down leaves for the way up.
        let mut skips = vec![channels[0]];
        let mut down_blocks = Vec::with_capacity(levels);
        for level in 0..levels {
            let (n, last) = (config.layers_per_block[level], level + 1 == levels);
            let input = channels[level.saturating_sub(1)];
            down_blocks.push(DownBlock::load(
                &params.at(format_args!("down_blocks.{level}")),
                n,
                resnet(input, channels[level]),
                with_attention(config.down_blocks[level], level),
                !last,
            )?);
            skips.extend(std::iter::repeat_n(channels[level], if last { n } else { n + 1 }));
        }
        let deepest = channels[levels - 1];
        let mid_block = MidBlock::load(
            &params.at("mid_block"),
            resnet(deepest, deepest),
            transformer(levels - 1),
        )?;
        let mut up_blocks = Vec::with_capacity(levels);
        let mut input = deepest;
        for (i, level) in (0..levels).rev().enumerate() {
            let n = config.layers_per_block[level] + 1;
            let Some(rest) = skips.len().checked_sub(n) else {
                bail!("up_blocks.{i} has no input left to take")
            };
            let taken: Vec<usize> = skips.drain(rest..).rev().collect();
            up_blocks.push(UpBlock::load(
                &params.at(format_args!("up_blocks.{i}")),
                &taken,
                resnet(input, channels[level]),
                with_attention(config.up_blocks[i], level),
                level > 0,
            )?);
            input = channels[level];
        }
        Ok(Self {
            conv_in: Conv2d::load(&params.at("conv_in"), config.in_channels, channels[0], same)?,
            time_embedding: TimeEmbedding::load(&params.at("time_embedding"), config)?,
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out: GroupNorm::load(
                &params.at("conv_norm_out"),
                channels[0],
                config.norm_num_groups,
                config.norm_eps,
            )?,
            conv_out: Conv2d::load(&params.at("conv_out"), channels[0], config.out_channels, same)?,
            downscale: config.downscale(),
            controls: AdapterControls::new(loading),
        })
    }

    /// Predicts noise or velocity, as the base was trained to.
    ///
    /// # Shapes
    /// `sample` (b, c, h, w); `timesteps` (b,), any dtype, one per sample; `encoder_hidden_states` (b, l, d) -> (b, c, h, w).
    ///
    /// # Errors
    /// Heights or widths that are not multiples of the UNet's downscale; failed tensor operations.
    pub fn forward(&self, sample: &Tensor, timesteps: &Tensor, encoder_hidden_states: &Tensor) -> Result<Tensor> {
        let (b, _, h, w) = sample.dims4()?;
        if h % self.downscale != 0 || w % self.downscale != 0 {
            bail!("latents of {h} x {w}: both must be multiples of {}", self.downscale)
        }
        if timesteps.dims() != [b] || encoder_hidden_states.dim(0)? != b {
            bail!(
                "{b} samples with timesteps {:?} and prompts {:?}",
                timesteps.dims(),
                encoder_hidden_states.dims()
            )
        }
        let time = self.time_embedding.forward(timesteps)?;
        let context = encoder_hidden_states.contiguous()?;
        let pixels = sample.permute((0, 2, 3, 1))?.contiguous()?;
        let pass = Pass {
            time: &time,
            context: &context,
            recompute: self.controls.checkpointing(),
        };
        // A tape knows the gradients of adapters and of the prompt, and its ops are those of the CPU.
        let trains = self.controls.are_enabled() || context.track_op();
        let taped = trains && pixels.device().is_cpu() && !(pixels.track_op() || time.track_op());
        let out = if taped {
            // The tape runs on another thread.
            let dropout = dropout::current();
            let run = || dropout::with_dropout(dropout, || self.channels_last(&pixels, &pass));
            ops::on_tape_from(self.controls.adapters(), &[&context], run)?
        } else {
            self.channels_last(&pixels, &pass)?
        };
        out.permute((0, 3, 1, 2))?.contiguous()
    }

    /// # Shapes
    /// `pixels` (b, h, w, c) -> (b, h, w, c).
    fn channels_last(&self, pixels: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let mut x = self.conv_in.forward(pixels, Conv2dPlus::default())?;
        let mut skips = vec![x.clone()];
        for block in &self.down_blocks {
            x = block.forward(x, pass, &mut skips)?;
        }
        x = self.mid_block.forward(&x, pass)?;
        for block in &self.up_blocks {
            x = block.forward(x, pass, &mut skips)?;
        }
        self.conv_out
            .forward(&self.conv_norm_out.forward_silu(&x)?, Conv2dPlus::default())
    }

    /// What can be turned on and off.
    pub fn controls(&self) -> &AdapterControls {
        &self.controls
    }
}

/// Every Linear and 1x1 convolution inside the transformer blocks and every convolution of the residual blocks and between
/// levels, in the order of the model, paths without `unet.`.
///
/// # Errors
/// If the config cannot make a model.
pub fn adaptable_modules(config: &UNetConfig) -> Result<Vec<AdaptableModule>> {
    let none = AdapterSet::default();
    let loading = Loading::dry(&none);
    UNet2DConditionModel::build(config, &loading)?;
    Ok(loading.adaptable())
}
