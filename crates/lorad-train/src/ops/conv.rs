//! Two-dimensional convolution on frozen weights, channels last.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    attach::{Value, attach, saved, with_values},
    buffer::room,
    composed,
    gemm::{Start, multiply},
    has_kernels,
    packed::{Mat, Operand, Packed, WeightType},
    tape::is_tracked,
    winograd::{Pictures, convolve},
};

/// Kernel side, stride and padding, the same in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvGeometry {
    /// Side of the square kernel.
    pub kernel: usize,
    /// Step.
    pub stride: usize,
    /// Zeros around the picture: before the first, and after the last row and column.
    pub padding: (usize, usize),
}

impl ConvGeometry {
    /// Same padding on all sides.
    pub fn new(kernel: usize, stride: usize, padding: usize) -> Self {
        Self {
            kernel,
            stride,
            padding: (padding, padding),
        }
    }

    fn output(&self, side: usize) -> Result<usize> {
        let padded = side + self.padding.0 + self.padding.1;
        if padded < self.kernel {
            bail!("a picture side of {side} is smaller than the kernel of {}", self.kernel)
        }
        Ok((padded - self.kernel) / self.stride + 1)
    }
}

/// What is added to a convolution's result in the same pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Conv2dPlus<'a> {
    /// `(b, out)`, the same for every pixel of a sample; must be untracked (the time embedding).
    pub per_sample: Option<&'a Tensor>,
    /// `(b, h', w', out)`; may be tracked.
    pub residual: Option<&'a Tensor>,
}

/// A convolution with frozen kernel and bias: only the picture gets a gradient. Cloning shares the weights.
#[derive(Debug, Clone)]
pub struct FrozenConv2d(Arc<Weights>);

#[derive(Debug)]
struct Weights {
    in_channels: usize,
    out_channels: usize,
    geometry: ConvGeometry,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Cpu {
        /// `(taps * in, out)`; the backward reads it transposed by taps.
        weight: Packed,
        bias: Vec<f32>,
    },
    Device {
        /// `(out, in, kernel, kernel)`.
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl FrozenConv2d {
    /// Packs the weights.
    ///
    /// # Shapes
    /// `weight` (out, in, kernel, kernel) as in checkpoints, `bias` (out).
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, geometry: ConvGeometry) -> Result<Self> {
        Self::with_type(weight, bias, geometry, WeightType::F32)
    }

    /// [`Self::new`] with the kernel, not the bias, held as `dtype`. All arithmetic is in f32 nonetheless.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn with_type(
        weight: &Tensor,
        bias: Option<&Tensor>,
        geometry: ConvGeometry,
        dtype: WeightType,
    ) -> Result<Self> {
        let (out_channels, in_channels, kh, kw) = weight.dims4()?;
        if kh != geometry.kernel || kw != geometry.kernel || bias.is_some_and(|b| b.dims() != [out_channels]) {
            bail!(
                "kernel {:?} with bias {bias:?} as a convolution {geometry:?}",
                weight.dims()
            )
        }
        let place = if has_kernels(weight.device()) {
            let taps = kh * kw;
            let weight = with_values([&saved(weight)?], |[w]| {
                // Row (tap, i) is every output channel's value of that tap and input channel.
                Ok(Packed::with(taps * in_channels, out_channels, dtype, |p| {
                    let from = p % in_channels * taps + p / in_channels;
                    let column = Mat::rows(&w[from..], out_channels, 1, in_channels * taps);
                    (column.t(), 0)
                }))
            })?;
            Place::Cpu {
                weight,
                bias: bias.map_or(Ok(vec![0.0; out_channels]), Tensor::to_vec1)?,
            }
        } else {
            Place::Device {
                weight: saved(weight)?.to_dtype(dtype.on_devices())?,
                bias: bias.map(saved).transpose()?,
            }
        };
        Ok(Self(Arc::new(Weights {
            in_channels,
            out_channels,
            geometry,
            place,
        })))
    }

    /// A layer of that size without weights, for dry builds. It cannot run.
    pub fn placeholder(in_channels: usize, out_channels: usize, geometry: ConvGeometry) -> Self {
        Self(Arc::new(Weights {
            in_channels,
            out_channels,
            geometry,
            place: Place::Cpu {
                weight: Packed::default(),
                bias: Vec::new(),
            },
        }))
    }

    /// Convolves, and adds what `plus` says.
    ///
    /// # Shapes
    /// `x` (b, h, w, in) -> (b, h', w', out).
    ///
    /// # Errors
    /// If shapes do not fit; if `plus.per_sample` is tracked.
    pub fn forward(&self, x: &Tensor, plus: Conv2dPlus<'_>) -> Result<Tensor> {
        let plan = self.plan(x)?;
        let shape = (plan.batch, plan.output.0, plan.output.1, self.0.out_channels);
        let n = self.0.out_channels;
        if let Some(t) = plus.per_sample
            && (is_tracked(t) || t.dims() != [plan.batch, n])
        {
            bail!("{t:?} added per sample to a convolution: it must be untracked, (batch, channels)")
        }
        if let Some(r) = plus.residual
            && r.dims4()? != shape
        {
            bail!("residual {:?} on an output of {shape:?}", r.dims())
        }
        let bias = match &self.0.place {
            Place::Device { weight, bias } => {
                return composed::frozen_conv2d(weight, bias.as_ref(), self.0.geometry, x, plus);
            }
            Place::Cpu { bias, .. } => bias,
        };
        let start = match plus.per_sample {
            None => bias.clone(),
            Some(t) => with_values([&t.contiguous()?], |[t]| {
                Ok(t.iter().enumerate().map(|(i, t)| t + bias[i % n]).collect())
            })?,
        };
        let start = Start::PerGroup {
            values: &start,
            rows_per: if plus.per_sample.is_some() {
                plan.output.0 * plan.output.1
            } else {
                usize::MAX
            },
        };
        let y = match plus.residual {
            None => with_values([&saved(x)?], |[x]| Ok(self.apply(&plan, x, start, None)))?,
            Some(r) => with_values([&saved(x)?, &saved(r)?], |[x, r]| {
                Ok(self.apply(&plan, x, start, Some(r)))
            })?,
        };
        let (this, x_shape) = (self.clone(), x.shape().clone());
        let backward = move |g: &Tensor, needed: [bool; 3]| {
            let dx = if needed[0] {
                let dx = with_values([g], |[g]| Ok(this.input_grad(&plan, g)))?;
                Some(Tensor::from_vec(dx, x_shape.clone(), g.device())?)
            } else {
                None
            };
            Ok([dx, Some(g.clone()), None])
        };
        match plus.residual {
            None => attach("frozen-conv2d", &[x], Value::Cpu(y), shape, backward),
            Some(r) => attach("frozen-conv2d", &[x, r], Value::Cpu(y), shape, backward),
        }
    }

    fn plan(&self, x: &Tensor) -> Result<Plan> {
        let (batch, height, width, channels) = x.dims4()?;
        if channels != self.0.in_channels {
            bail!(
                "convolution of {channels} channels with a kernel for {}",
                self.0.in_channels
            )
        }
        let geometry = self.0.geometry;
        let output = (geometry.output(height)?, geometry.output(width)?);
        if batch * (height * width).max(output.0 * output.1) >= OUTSIDE as usize {
            bail!("a convolution of {batch} pictures of {height}x{width} has too many pixels")
        }
        Ok(Plan {
            batch,
            input: (height, width),
            output,
            geometry,
        })
    }

    fn apply(&self, plan: &Plan, x: &[f32], start: Start<'_>, residual: Option<&[f32]>) -> Vec<f32> {
        let Place::Cpu { weight, .. } = &self.0.place else {
            return Vec::new();
        };
        let mut y = room(plan.batch * plan.output.0 * plan.output.1 * self.0.out_channels);
        if let Some(pictures) = plan.for_winograd(weight.plain()) {
            convolve(&mut y, x, pictures, weight.plain(), false, start, residual);
            return y;
        }
        let taps = plan.input_of_output(self.0.in_channels);
        multiply(
            &mut y,
            weight.plain(),
            plan.taps(),
            |row, tap| taps.segment(x, row, tap),
            start,
            residual,
        );
        y
    }

    fn input_grad(&self, plan: &Plan, g: &[f32]) -> Vec<f32> {
        let Place::Cpu { weight, .. } = &self.0.place else {
            return Vec::new();
        };
        let (k, n) = (self.0.in_channels, self.0.out_channels);
        let mut dx = room(plan.batch * plan.input.0 * plan.input.1 * k);
        if let Some(pictures) = plan.for_winograd(weight.swapped(9)) {
            convolve(&mut dx, g, pictures, weight.swapped(9), true, Start::Zero, None);
            return dx;
        }
        let taps = plan.output_of_input(n);
        multiply(
            &mut dx,
            weight.swapped(plan.taps()),
            plan.taps(),
            |row, tap| taps.segment(g, row, tap),
            Start::Zero,
            None,
        );
        dx
    }
}

/// Sizes of one application.
#[derive(Debug, Clone, Copy)]
struct Plan {
    batch: usize,
    input: (usize, usize),
    output: (usize, usize),
    geometry: ConvGeometry,
}

/// "This tap falls outside the picture."
const OUTSIDE: u32 = u32::MAX;

/// Where each (row, tap) of a product reads its channels: an index of a pixel of the whole batch.
struct Taps {
    pixels: Vec<u32>,
    taps: usize,
    zeros: Vec<f32>,
}

impl Taps {
    #[inline(always)]
    fn segment<'a>(&'a self, values: &'a [f32], row: usize, tap: usize) -> &'a [f32] {
        match self.pixels[row * self.taps + tap] {
            OUTSIDE => &self.zeros,
            pixel => {
                let at = pixel as usize * self.zeros.len();
                &values[at..at + self.zeros.len()]
            }
        }
    }
}

impl Plan {
    fn taps(&self) -> usize {
        self.geometry.kernel * self.geometry.kernel
    }

    /// The pictures, if Winograd's way can compute this and is the faster one.
    fn for_winograd(&self, weights: Operand<'_>) -> Option<Pictures> {
        let pictures = Pictures {
            batch: self.batch,
            height: self.input.0,
            width: self.input.1,
        };
        let fits = self.geometry == ConvGeometry::new(3, 1, 1);
        (fits && pictures.suit(weights)).then_some(pictures)
    }

    /// Per output pixel and tap: the input pixel under it.
    fn input_of_output(&self, channels: usize) -> Taps {
        let (stride, padding, (height, width)) = (self.geometry.stride, self.geometry.padding.0, self.input);
        self.table(self.output, self.input, channels, |(oy, ox), (ky, kx)| {
            let y = (oy * stride + ky).wrapping_sub(padding);
            let x = (ox * stride + kx).wrapping_sub(padding);
            (y < height && x < width).then(|| y * width + x)
        })
    }

    /// Per input pixel and tap: the output pixel that it reaches through it.
    fn output_of_input(&self, channels: usize) -> Taps {
        let (stride, padding, (height, width)) = (self.geometry.stride, self.geometry.padding.0, self.output);
        self.table(self.input, self.output, channels, |(iy, ix), (ky, kx)| {
            let (y, x) = ((iy + padding).checked_sub(ky)?, (ix + padding).checked_sub(kx)?);
            let inside =
                y.is_multiple_of(stride) && x.is_multiple_of(stride) && y / stride < height && x / stride < width;
            inside.then(|| y / stride * width + x / stride)
        })
    }

    fn table(
        &self,
        of: (usize, usize),
        from: (usize, usize),
        channels: usize,
        at: impl Fn((usize, usize), (usize, usize)) -> Option<usize> + Sync,
    ) -> Taps {
        let (kernel, taps) = (self.geometry.kernel, self.taps());
        let mut pixels = vec![OUTSIDE; self.batch * of.0 * of.1 * taps];
        pixels
            .par_chunks_mut(of.1 * taps)
            .enumerate()
            .for_each(|(line, entries)| {
                let (image, y) = (line / of.0, line % of.0);
                for (i, entry) in entries.iter_mut().enumerate() {
                    let (x, tap) = (i / taps, i % taps);
                    if let Some(pixel) = at((y, x), (tap / kernel, tap % kernel)) {
                        // `forward` has checked that the batch's pixels fit.
                        *entry = (image * from.0 * from.1 + pixel) as u32;
                    }
                }
            });
        Taps {
            pixels,
            taps,
            zeros: vec![0.0; channels],
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::testing::{adjoint, assert_same_op, random};

    #[test]
    fn every_geometry_equals_candles_convolution_in_value_and_gradient() {
        for (geometry, h, w, k, n) in [
            (ConvGeometry::new(3, 1, 1), 5, 4, 3, 5),
            (ConvGeometry::new(3, 1, 1), 8, 8, 32, 48),
            (ConvGeometry::new(3, 1, 1), 13, 11, 64, 72),
            (ConvGeometry::new(3, 1, 1), 12, 12, 71, 64),
            (ConvGeometry::new(3, 2, 1), 8, 6, 16, 17),
            (ConvGeometry::new(1, 1, 0), 4, 4, 8, 16),
            (
                ConvGeometry {
                    kernel: 3,
                    stride: 2,
                    padding: (0, 1),
                },
                6,
                8,
                4,
                6,
            ),
        ] {
            let (weight, bias) = (random(&[n, k, geometry.kernel, geometry.kernel], 1), random(&[n], 2));
            let layer = FrozenConv2d::new(&weight, Some(&bias), geometry).unwrap();
            assert_same_op(
                &[&random(&[3, h, w, k], 3)],
                |t| layer.forward(&t[0], Conv2dPlus::default()),
                |t| composed::conv2d(&weight, Some(&bias), geometry, &t[0]),
            );
            let plain = FrozenConv2d::new(&weight, None, geometry).unwrap();
            adjoint(&[&random(&[3, h, w, k], 4)], |t| {
                plain.forward(&t[0], Conv2dPlus::default())
            });
        }
    }

    #[test]
    fn a_residual_and_a_vector_per_sample_are_added_in_the_same_pass() {
        let (weight, t) = (random(&[7, 5, 3, 3], 1), random(&[2, 7], 2));
        let geometry = ConvGeometry::new(3, 1, 1);
        let layer = FrozenConv2d::new(&weight, None, geometry).unwrap();
        assert_same_op(
            &[&random(&[2, 4, 4, 5], 3), &random(&[2, 4, 4, 7], 4)],
            |x| {
                layer.forward(
                    &x[0],
                    Conv2dPlus {
                        per_sample: Some(&t),
                        residual: Some(&x[1]),
                    },
                )
            },
            |x| {
                composed::conv2d(&weight, None, geometry, &x[0])?
                    .broadcast_add(&t.reshape((2, 1, 1, 7))?)?
                    .add(&x[1])
            },
        );
    }
}
