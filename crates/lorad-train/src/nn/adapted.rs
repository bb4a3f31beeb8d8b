//! Frozen layers that an adapter may stand beside, where the job asks for one.

use candle_core::{Result, Tensor};

use super::{AdapterSwitch, Conv2d, Linear, ModuleKind, Params};
use crate::{
    lora::Adapter,
    ops::{self, Conv2dPlus, ConvGeometry},
};

/// A frozen linear layer that an adapter may stand beside.
#[derive(Debug)]
pub struct LoraLinear {
    base: Linear,
    adapter: Option<(Adapter, AdapterSwitch)>,
}

impl LoraLinear {
    /// As [`Linear::load`], with the adapter of this place if the job has one.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape, or the adapter does not fit.
    pub fn load(params: &Params<'_>, in_features: usize, out_features: usize, bias: bool) -> Result<Self> {
        let adapter = params.adapter(ModuleKind::Linear {
            in_features,
            out_features,
        })?;
        Ok(Self {
            base: Linear::load(params, in_features, out_features, bias)?,
            adapter,
        })
    }

    /// As [`Linear::load_conv1x1`]; the adapter's tensors are those of a convolution: `(rank, in, 1, 1)`, `(out, rank, 1, 1)`.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape, or the adapter does not fit.
    pub fn load_conv1x1(params: &Params<'_>, in_channels: usize, out_channels: usize) -> Result<Self> {
        let adapter = params.adapter(ModuleKind::Conv2d {
            in_channels,
            out_channels,
            kernel: 1,
        })?;
        Ok(Self {
            base: Linear::load_conv1x1(params, in_channels, out_channels)?,
            adapter,
        })
    }

    /// `x Wᵀ + b + scale · (x Aᵀ) Bᵀ`, the last term only while the adapters are switched on.
    ///
    /// # Shapes
    /// `x` (…, in) -> (…, out).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.adapter {
            Some((adapter, switch)) if switch.is_on() => {
                let (a, b) = (matrix(&adapter.a)?, matrix(&adapter.b)?);
                ops::lora_linear(&self.base.0, x, &a, &b, adapter.scale())
            }
            _ => self.base.forward(x, None),
        }
    }
}

/// A convolution's factor with kernel 1 as a matrix.
fn matrix(t: &Tensor) -> Result<Tensor> {
    ops::reshape(t, (t.dim(0)?, t.elem_count() / t.dim(0)?))
}

/// A frozen convolution that an adapter may stand beside.
#[derive(Debug)]
pub struct LoraConv2d {
    base: Conv2d,
    geometry: ConvGeometry,
    adapter: Option<(Adapter, AdapterSwitch)>,
}

impl LoraConv2d {
    /// As [`Conv2d::load`], with the adapter of this place if the job has one.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape, or the adapter does not fit.
    pub fn load(params: &Params<'_>, in_channels: usize, out_channels: usize, geometry: ConvGeometry) -> Result<Self> {
        let adapter = params.adapter(ModuleKind::Conv2d {
            in_channels,
            out_channels,
            kernel: geometry.kernel,
        })?;
        Ok(Self {
            base: Conv2d::load(params, in_channels, out_channels, geometry)?,
            geometry,
            adapter,
        })
    }

    /// The convolution plus `scale · B ∗ (A ∗ x)`, the latter only while the adapters are switched on, plus what `plus` holds.
    ///
    /// # Shapes
    /// `x` (b, h, w, in) -> (b, h', w', out).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor, plus: Conv2dPlus<'_>) -> Result<Tensor> {
        let Some((adapter, _)) = self.adapter.as_ref().filter(|(_, switch)| switch.is_on()) else {
            return self.base.forward(x, plus);
        };
        let mut delta = ops::low_rank_conv2d(x, &adapter.a, &adapter.b, adapter.scale(), self.geometry)?;
        if let Some(residual) = plus.residual {
            delta = ops::add(&delta, residual)?;
        }
        let residual = Some(&delta);
        self.base.forward(x, Conv2dPlus { residual, ..plus })
    }
}
