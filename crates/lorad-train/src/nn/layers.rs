//! The frozen layers that models are made of: weights of [`crate::ops`]. Each loads from its place in the checkpoint's key
//! tree.

use candle_core::{Result, Tensor};

use super::Params;
use crate::ops::{self, Conv2dPlus, ConvGeometry, FrozenConv2d, FrozenLinear};

/// A frozen linear layer.
#[derive(Debug)]
pub struct Linear(pub(super) FrozenLinear);

impl Linear {
    /// Loads `weight` (out, in) and, with `bias`, `bias` (out).
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load(params: &Params<'_>, in_features: usize, out_features: usize, bias: bool) -> Result<Self> {
        Self::from_weight(params, &[out_features, in_features], bias)
    }

    /// Loads a 1x1 convolution, which on channels-last pictures is a linear layer: `weight` (out, in, 1, 1), `bias` (out).
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load_conv1x1(params: &Params<'_>, in_channels: usize, out_channels: usize) -> Result<Self> {
        Self::from_weight(params, &[out_channels, in_channels, 1, 1], true)
    }

    fn from_weight(params: &Params<'_>, shape: &[usize], bias: bool) -> Result<Self> {
        let (out_features, in_features) = (shape[0], shape[1]);
        let weight = params.tensor("weight", shape)?;
        let bias = if bias {
            Some(params.tensor("bias", &[out_features])?)
        } else {
            None
        };
        if params.is_dry() {
            return Ok(Self(FrozenLinear::placeholder(in_features, out_features)));
        }
        Ok(Self(FrozenLinear::with_type(
            &weight.reshape((out_features, in_features))?,
            bias.as_ref(),
            params.weight_type(),
        )?))
    }

    /// `x Wᵀ + b`, plus `residual` if there is one.
    ///
    /// # Shapes
    /// `x` (…, in); `residual` (…, out) -> (…, out).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        self.0.forward(x, residual)
    }
}

/// A frozen convolution on channels-last pictures.
#[derive(Debug)]
pub struct Conv2d(FrozenConv2d);

impl Conv2d {
    /// Loads `weight` (out, in, kernel, kernel) and `bias` (out).
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load(params: &Params<'_>, in_channels: usize, out_channels: usize, geometry: ConvGeometry) -> Result<Self> {
        let weight = params.tensor("weight", &[out_channels, in_channels, geometry.kernel, geometry.kernel])?;
        let bias = params.tensor("bias", &[out_channels])?;
        if params.is_dry() {
            return Ok(Self(FrozenConv2d::placeholder(in_channels, out_channels, geometry)));
        }
        Ok(Self(FrozenConv2d::with_type(
            &weight,
            Some(&bias),
            geometry,
            params.weight_type(),
        )?))
    }

    /// The convolution, plus what `plus` holds.
    ///
    /// # Shapes
    /// `x` (b, h, w, in) -> (b, h', w', out).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor, plus: Conv2dPlus<'_>) -> Result<Tensor> {
        self.0.forward(x, plus)
    }
}

/// Frozen group normalisation.
#[derive(Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Loads `weight` and `bias`, both (channels).
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load(params: &Params<'_>, channels: usize, groups: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: params.tensor("weight", &[channels])?,
            bias: params.tensor("bias", &[channels])?,
            groups,
            eps,
        })
    }

    /// Normalises over positions and the channels of each group.
    ///
    /// # Shapes
    /// `x` (b, …, channels) -> as `x`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, self.groups, self.eps, false)
    }

    /// The same, followed by SiLU in one pass.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, self.groups, self.eps, true)
    }
}

/// Frozen layer normalisation of the last dimension.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    stock: bool,
}

impl LayerNorm {
    /// Loads `weight` and `bias`, both (channels).
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load(params: &Params<'_>, channels: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: params.tensor("weight", &[channels])?,
            bias: params.tensor("bias", &[channels])?,
            eps,
            stock: params.stock_layer_norm(),
        })
    }

    /// # Shapes
    /// `x` (…, channels) -> as `x`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.stock {
            #[expect(
                clippy::disallowed_types,
                reason = "a mutation that the golden gradient test must notice"
            )]
            let stock = candle_nn::LayerNorm::new(self.weight.clone(), self.bias.clone(), self.eps);
            return candle_core::Module::forward(&stock, x);
        }
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}
