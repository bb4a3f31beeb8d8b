//! The transformers of the UNet: where adapters live.

use candle_core::{Result, Tensor};

use crate::{
    nn::{GroupNorm, LayerNorm, LoraLinear, Params},
    ops,
};

/// Sizes of a [`Transformer2D`].
#[derive(Debug, Clone, Copy)]
pub(super) struct TransformerSizes {
    pub(super) channels: usize,
    pub(super) heads: usize,
    pub(super) layers: usize,
    pub(super) context: usize,
    pub(super) groups: usize,
    pub(super) linear_projection: bool,
}

/// Attention over a picture's pixels and over the prompt.
///
/// # Source
/// diffusers v0.42.1 `models/transformers/transformer_2d.py`, `Transformer2DModel`. On channels-last pictures its
/// convolutional and its linear projections are the same computation.
#[derive(Debug)]
pub(super) struct Transformer2D {
    norm: GroupNorm,
    proj_in: LoraLinear,
    transformer_blocks: Vec<TransformerBlock>,
    proj_out: LoraLinear,
}

impl Transformer2D {
    pub(super) fn load(params: &Params<'_>, sizes: TransformerSizes) -> Result<Self> {
        let c = sizes.channels;
        let projection = |name: &str| {
            let params = params.at(name);
            if sizes.linear_projection {
                LoraLinear::load(&params, c, c, true)
            } else {
                LoraLinear::load_conv1x1(&params, c, c)
            }
        };
        Ok(Self {
            norm: GroupNorm::load(&params.at("norm"), c, sizes.groups, 1e-6)?,
            proj_in: projection("proj_in")?,
            transformer_blocks: (0..sizes.layers)
                .map(|i| TransformerBlock::load(&params.at(format_args!("transformer_blocks.{i}")), sizes))
                .collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    /// # Shapes
    /// `x` (b, h, w, c); `context` (b, l, d) -> as `x`.
    pub(super) fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let mut tokens = self
            .proj_in
            .forward(&ops::reshape(&self.norm.forward(x)?, (b, h * w, c))?)?;
        for block in &self.transformer_blocks {
            tokens = block.forward(&tokens, context)?;
        }
        ops::add(&ops::reshape(&self.proj_out.forward(&tokens)?, (b, h, w, c))?, x)
    }
}

/// Self-attention, attention over the prompt, gated MLP.
///
/// # Source
/// diffusers v0.42.1 `models/attention.py`, `BasicTransformerBlock`.
#[derive(Debug)]
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    /// `ff.net.0.proj`, into the two halves of GEGLU.
    ff_in: LoraLinear,
    /// `ff.net.2`.
    ff_out: LoraLinear,
}

impl TransformerBlock {
    fn load(params: &Params<'_>, sizes: TransformerSizes) -> Result<Self> {
        let c = sizes.channels;
        let norm = |name: &str| LayerNorm::load(&params.at(name), c, 1e-5);
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: Attention::load(&params.at("attn1"), c, c, sizes.heads)?,
            norm2: norm("norm2")?,
            attn2: Attention::load(&params.at("attn2"), c, sizes.context, sizes.heads)?,
            norm3: norm("norm3")?,
            ff_in: LoraLinear::load(&params.at("ff.net.0.proj"), c, 8 * c, true)?,
            ff_out: LoraLinear::load(&params.at("ff.net.2"), 4 * c, c, true)?,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let normed = self.norm1.forward(x)?;
        let x = ops::add(&self.attn1.forward(&normed, &normed)?, x)?;
        let x = ops::add(&self.attn2.forward(&self.norm2.forward(&x)?, context)?, &x)?;
        let h = ops::geglu(&self.ff_in.forward(&self.norm3.forward(&x)?)?)?;
        ops::add(&self.ff_out.forward(&h)?, &x)
    }
}

/// Multi-head attention with its projections.
///
/// # Source
/// diffusers v0.42.1 `models/attention_processor.py`, `Attention` (no bias on q, k, v).
#[derive(Debug)]
struct Attention {
    to_q: LoraLinear,
    to_k: LoraLinear,
    to_v: LoraLinear,
    to_out: LoraLinear,
    heads: usize,
}

impl Attention {
    fn load(params: &Params<'_>, channels: usize, context: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            to_q: LoraLinear::load(&params.at("to_q"), channels, channels, false)?,
            to_k: LoraLinear::load(&params.at("to_k"), context, channels, false)?,
            to_v: LoraLinear::load(&params.at("to_v"), context, channels, false)?,
            to_out: LoraLinear::load(&params.at("to_out.0"), channels, channels, true)?,
            heads,
        })
    }

    /// # Shapes
    /// `x` (b, n, c); `context` (b, m, d) -> (b, n, c).
    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (q, k, v) = (
            self.to_q.forward(x)?,
            self.to_k.forward(context)?,
            self.to_v.forward(context)?,
        );
        self.to_out.forward(&ops::attention(&q, &k, &v, self.heads, false)?)
    }
}
