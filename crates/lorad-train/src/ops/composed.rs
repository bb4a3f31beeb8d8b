//! The same functions from differentiable candle ops: what the CPU kernels are tested against, and what runs on other
//! devices. Frozen weights still get no gradient: their products are attached with a backward of their own.

use candle_core::{D, Result, Tensor};

use super::{
    attach::{Value, attach},
    conv::{Conv2dPlus, ConvGeometry},
    pointwise::Activation,
};

/// `x Wᵀ + b`, with gradients for everything tracked.
///
/// # Errors
/// If shapes do not fit.
pub fn linear(weight: &Tensor, bias: Option<&Tensor>, x: &Tensor) -> Result<Tensor> {
    let y = x.broadcast_matmul(&weight.t()?)?;
    bias.map_or(Ok(y.clone()), |b| y.broadcast_add(b))
}

/// `scale · (x Aᵀ) Bᵀ`.
///
/// # Errors
/// If shapes do not fit.
pub fn low_rank(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let (a, b) = (a.to_dtype(x.dtype())?, b.to_dtype(x.dtype())?);
    let x2 = x.reshape(((), x.dim(D::Minus1)?))?;
    let y = (x2.matmul(&a.t()?)?.matmul(&b.t()?)? * scale)?;
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = b.dim(0)?;
    }
    y.reshape(dims)
}

/// [`linear`] on a frozen weight: one product forward, one backward.
pub(super) fn frozen_linear(weight: &Tensor, bias: Option<&Tensor>, x: &Tensor) -> Result<Tensor> {
    let input = x.detach().contiguous()?;
    // A half weight is widened for each use, and only for its time.
    let y = linear(&weight.to_dtype(x.dtype())?, bias, &input)?.contiguous()?;
    let shape = y.shape().clone();
    let weight = weight.clone();
    attach("frozen-linear", &[x], Value::Device(y), shape, move |g, _| {
        Ok([Some(g.broadcast_matmul(&weight.to_dtype(g.dtype())?)?), None, None])
    })
}

/// Convolution of channels-last pictures.
///
/// # Errors
/// If shapes do not fit.
pub fn conv2d(weight: &Tensor, bias: Option<&Tensor>, geometry: ConvGeometry, x: &Tensor) -> Result<Tensor> {
    let mut x = x.permute((0, 3, 1, 2))?.contiguous()?;
    let (before, after) = geometry.padding;
    let padding = if before == after { before } else { 0 };
    if before != after {
        x = x.pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?;
    }
    let y = x
        .conv2d(weight, padding, geometry.stride, 1, 1)?
        .permute((0, 2, 3, 1))?
        .contiguous()?;
    bias.map_or(Ok(y.clone()), |b| y.broadcast_add(b))
}

/// [`conv2d`] on a frozen kernel.
pub(super) fn frozen_conv2d(
    weight: &Tensor,
    bias: Option<&Tensor>,
    geometry: ConvGeometry,
    x: &Tensor,
    plus: Conv2dPlus<'_>,
) -> Result<Tensor> {
    let y = conv2d(&weight.to_dtype(x.dtype())?, bias, geometry, &x.detach())?;
    let shape = y.shape().clone();
    let (_, height, width, _) = x.dims4()?;
    let kernel = weight.clone();
    let y = attach("frozen-conv2d", &[x], Value::Device(y), shape, move |g, _| {
        Ok([
            Some(conv2d_input_grad(
                &kernel.to_dtype(g.dtype())?,
                geometry,
                g,
                height,
                width,
            )?),
            None,
            None,
        ])
    })?;
    let y = match plus.per_sample {
        Some(t) => {
            let (b, c) = t.dims2()?;
            y.broadcast_add(&t.reshape((b, 1, 1, c))?)?
        }
        None => y,
    };
    plus.residual.map_or(Ok(y.clone()), |r| y + r)
}

fn conv2d_input_grad(kernel: &Tensor, geometry: ConvGeometry, g: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let g = g.permute((0, 3, 1, 2))?.contiguous()?;
    let (before, k) = (geometry.padding.0, geometry.kernel);
    let dx = if geometry.stride == 1 {
        let flipped = kernel.transpose(0, 1)?.contiguous()?.flip(&[2, 3])?.contiguous()?;
        g.conv2d(&flipped, k - 1 - before, 1, 1, 1)?
    } else {
        // Without padding, the transposed convolution covers the padded picture (less what no kernel reached).
        let (_, _, gh, gw) = g.dims4()?;
        let full = g.conv_transpose2d(kernel, 0, 0, geometry.stride, 1)?;
        let (fh, fw) = ((gh - 1) * geometry.stride + k, (gw - 1) * geometry.stride + k);
        full.pad_with_zeros(2, 0, (before + h).saturating_sub(fh))?
            .pad_with_zeros(3, 0, (before + w).saturating_sub(fw))?
            .narrow(2, before, h)?
            .narrow(3, before, w)?
    };
    dx.permute((0, 2, 3, 1))?.contiguous()
}

/// Gradient of a convolution's kernel: per tap, the product of what left through it and what it read.
///
/// # Shapes
/// `x` (b, h, w, in); `u` (b, h', w', out) -> (out, in, kernel, kernel).
pub(super) fn conv2d_kernel_grad(x: &Tensor, u: &Tensor, geometry: ConvGeometry) -> Result<Tensor> {
    let (_, height, width, r) = u.dims4()?;
    let (before, after) = geometry.padding;
    let padded = x.pad_with_zeros(1, before, after)?.pad_with_zeros(2, before, after)?;
    let ut = u.reshape(((), r))?.t()?;
    let read = |tap: usize, n: usize| {
        let at: Vec<u32> = (0..n).map(|i| (i * geometry.stride + tap) as u32).collect();
        Tensor::new(at, x.device())
    };
    let mut taps = Vec::with_capacity(geometry.kernel * geometry.kernel);
    for ky in 0..geometry.kernel {
        let rows = padded.index_select(&read(ky, height)?, 1)?;
        for kx in 0..geometry.kernel {
            let pixels = rows.index_select(&read(kx, width)?, 2)?;
            taps.push(ut.matmul(&pixels.reshape(((), pixels.dim(D::Minus1)?))?)?);
        }
    }
    let k = x.dim(D::Minus1)?;
    Tensor::stack(&taps, 2)?.reshape((r, k, geometry.kernel, geometry.kernel))
}

/// Group norm of channels-last pictures or tokens, then SiLU if asked for.
///
/// # Errors
/// If the channels are no multiple of `groups`.
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize, eps: f64, silu: bool) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let (b, c) = (dims[0], dims[dims.len() - 1]);
    let grouped = x.reshape((b, (), groups, c / groups))?;
    let mean = grouped.mean_keepdim((1, 3))?;
    let centred = grouped.broadcast_sub(&mean)?;
    let variance = centred.sqr()?.mean_keepdim((1, 3))?;
    let y = centred
        .broadcast_div(&(variance + eps)?.sqrt()?)?
        .reshape(dims)?
        .broadcast_mul(weight)?
        .broadcast_add(bias)?;
    if silu { y.silu() } else { Ok(y) }
}

/// Layer norm over the last dimension.
///
/// # Errors
/// If shapes do not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = x.mean_keepdim(D::Minus1)?;
    let centred = x.broadcast_sub(&mean)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred
        .broadcast_div(&(variance + eps)?.sqrt()?)?
        .broadcast_mul(weight)?
        .broadcast_add(bias)
}

/// Elements of scores that candle's CUDA kernels can index (32 bits), with room.
const MAX_SCORES: usize = 1 << 30;

/// Multi-head attention, whole score matrix at once.
///
/// # Errors
/// If shapes do not fit, or if there are more scores than a device kernel can index.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (b, lq, c) = q.dims3()?;
    let lk = k.dim(1)?;
    if b * heads * lq * lk > MAX_SCORES {
        candle_core::bail!("{b} x {heads} x {lq} x {lk} attention scores at once; use a smaller batch or picture")
    }
    let split = |t: &Tensor, l: usize| t.reshape((b, l, heads, c / heads))?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (split(q, lq)?, split(k, lk)?, split(v, lk)?);
    let scale = ((c / heads) as f64).powf(-0.5);
    let mut scores = (q.matmul(&k.t()?)? * scale)?;
    if causal {
        let mask: Vec<f32> = (0..lq * lk)
            .map(|i| if i % lk > i / lk { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        let mask = Tensor::from_vec(mask, (lq, lk), q.device())?.to_dtype(q.dtype())?;
        scores = scores.broadcast_add(&mask)?;
    }
    candle_nn::ops::softmax(&scores, D::Minus1)?
        .matmul(&v)?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((b, lq, c))
}

/// `hidden · gelu(gate)`, `x` = hidden and gate side by side.
///
/// # Errors
/// If the last dimension is odd.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let parts = x.chunk(2, D::Minus1)?;
    parts[0].contiguous()? * parts[1].contiguous()?.gelu_erf()?
}

/// An activation.
///
/// # Errors
/// If a tensor operation fails.
pub fn activation(x: &Tensor, kind: Activation) -> Result<Tensor> {
    match kind {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
    }
}

/// Each pixel becomes a 2x2 square.
///
/// # Errors
/// If `x` is not `(b, h, w, c)`.
pub fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    x.reshape((b, h, 1, w, 1, c))?
        .broadcast_as((b, h, 2, w, 2, c))?
        .contiguous()?
        .reshape((b, h * 2, w * 2, c))
}
