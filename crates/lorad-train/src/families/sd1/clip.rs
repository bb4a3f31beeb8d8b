//! CLIPTextModel, frozen.

use candle_core::{Device, Result, Tensor, bail};

use super::{
    config::{ClipActivation, ClipConfig},
    weights::BaseFolder,
};
use crate::{
    lora::AdapterSet,
    nn::{LayerNorm, Linear, Loading, Params},
    ops::{self, Activation},
};

/// The text encoder.
///
/// # Source
/// transformers v5.24 `models/clip/modeling_clip.py`, `CLIPTextTransformer`.
#[derive(Debug)]
pub struct ClipTextModel {
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<EncoderLayer>,
    final_layer_norm: LayerNorm,
}

impl ClipTextModel {
    /// Loads the weights.
    ///
    /// # Errors
    /// Weights that do not fit the config.
    pub fn load(base: &BaseFolder, device: &Device) -> crate::Result<Self> {
        let weights = base.weights(super::keys::Part::TextEncoder)?;
        let none = AdapterSet::default();
        Ok(Self::build(
            &base.text_encoder,
            &Loading::new(&weights, device, &none, "text_encoder"),
        )?)
    }

    pub(super) fn build(config: &ClipConfig, loading: &Loading<'_>) -> Result<Self> {
        let params = loading.root().at("text_model");
        let width = config.hidden_size;
        Ok(Self {
            token_embedding: params
                .at("embeddings.token_embedding")
                .tensor("weight", &[config.vocab_size, width])?,
            position_embedding: params
                .at("embeddings.position_embedding")
                .tensor("weight", &[config.max_position_embeddings, width])?,
            layers: (0..config.num_hidden_layers)
                .map(|i| EncoderLayer::load(&params.at(format_args!("encoder.layers.{i}")), config))
                .collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::load(&params.at("final_layer_norm"), width, config.layer_norm_eps)?,
        })
    }

    /// Last hidden state after the final layer norm. No padding mask, as in Stable Diffusion.
    ///
    /// # Shapes
    /// `ids` (b, l) u32 -> (b, l, d).
    ///
    /// # Errors
    /// An id outside the vocabulary, or a sequence longer than the position table.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, l) = ids.dims2()?;
        let (positions, width) = self.position_embedding.dims2()?;
        if l > positions {
            bail!("{l} tokens for a text encoder of {positions} positions")
        }
        let tokens = self
            .token_embedding
            .index_select(&ids.flatten_all()?, 0)?
            .reshape((b, l, width))?;
        let mut x = tokens.broadcast_add(&self.position_embedding.narrow(0, 0, l)?)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        self.final_layer_norm.forward(&x)
    }
}

/// Pre-norm self-attention and MLP.
#[derive(Debug)]
struct EncoderLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
}

impl EncoderLayer {
    fn load(params: &Params<'_>, config: &ClipConfig) -> Result<Self> {
        let width = config.hidden_size;
        let norm = |name: &str| LayerNorm::load(&params.at(name), width, config.layer_norm_eps);
        let projection = |name: &str| Linear::load(&params.at(name), width, width, true);
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            q_proj: projection("self_attn.q_proj")?,
            k_proj: projection("self_attn.k_proj")?,
            v_proj: projection("self_attn.v_proj")?,
            out_proj: projection("self_attn.out_proj")?,
            heads: config.num_attention_heads,
            layer_norm2: norm("layer_norm2")?,
            fc1: Linear::load(&params.at("mlp.fc1"), width, config.intermediate_size, true)?,
            fc2: Linear::load(&params.at("mlp.fc2"), config.intermediate_size, width, true)?,
            activation: match config.hidden_act {
                ClipActivation::QuickGelu => Activation::QuickGelu,
                ClipActivation::Gelu => Activation::Gelu,
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.layer_norm1.forward(x)?;
        let (q, k, v) = (
            self.q_proj.forward(&h, None)?,
            self.k_proj.forward(&h, None)?,
            self.v_proj.forward(&h, None)?,
        );
        let x = self
            .out_proj
            .forward(&ops::attention(&q, &k, &v, self.heads, true)?, Some(x))?;
        let h = self.fc1.forward(&self.layer_norm2.forward(&x)?, None)?;
        self.fc2.forward(&ops::activation(&h, self.activation)?, Some(&x))
    }
}
