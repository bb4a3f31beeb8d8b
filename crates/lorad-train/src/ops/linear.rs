//! Linear layers on frozen weights, with or without an adapter beside them.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor, bail};

use super::{
    attach::{Value, attach, saved, with_values},
    buffer::room,
    composed,
    gemm::{Beside, Start, multiply, multiply_beside, product_over_rows},
    has_kernels,
    packed::{Mat, Packed, WeightType},
};

/// `y = x Wᵀ + b` with frozen `W` and `b`: only `x` gets a gradient. Cloning shares the weights.
#[derive(Debug, Clone)]
pub struct FrozenLinear(Arc<Weights>);

#[derive(Debug)]
struct Weights {
    in_features: usize,
    out_features: usize,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Cpu {
        /// `(in, out)`; the backward reads it transposed.
        weight: Packed,
        bias: Option<Vec<f32>>,
    },
    Device {
        /// `(out, in)`.
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl FrozenLinear {
    /// Packs the weights.
    ///
    /// # Shapes
    /// `weight` (out, in), `bias` (out), f32.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        Self::with_type(weight, bias, WeightType::F32)
    }

    /// [`Self::new`] with the weight, not the bias, held as `dtype`. All arithmetic is in f32 nonetheless.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn with_type(weight: &Tensor, bias: Option<&Tensor>, dtype: WeightType) -> Result<Self> {
        let (out_features, in_features) = weight.dims2()?;
        if bias.is_some_and(|b| b.dims() != [out_features]) {
            bail!("bias {bias:?} beside a weight ({out_features}, {in_features})")
        }
        let place = if has_kernels(weight.device()) {
            let weight = with_values([&saved(weight)?], |[w]| {
                let matrix = Mat::rows(w, out_features, in_features, in_features).t();
                Ok(Packed::with(in_features, out_features, dtype, |p| (matrix, p)))
            })?;
            Place::Cpu {
                weight,
                bias: bias.map(Tensor::to_vec1).transpose()?,
            }
        } else {
            Place::Device {
                weight: saved(weight)?.to_dtype(dtype.on_devices())?,
                bias: bias.map(saved).transpose()?,
            }
        };
        Ok(Self(Arc::new(Weights {
            in_features,
            out_features,
            place,
        })))
    }

    /// A layer of that size without weights, for dry builds. It cannot run.
    pub fn placeholder(in_features: usize, out_features: usize) -> Self {
        Self(Arc::new(Weights {
            in_features,
            out_features,
            place: Place::Cpu {
                weight: Packed::default(),
                bias: None,
            },
        }))
    }

    /// Applies the layer to the last dimension, and adds `residual` if there is one.
    ///
    /// # Shapes
    /// `x` (…, in); `residual` (…, out) -> (…, out).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        let (m, shape) = self.sizes(x)?;
        if let Some(r) = residual
            && r.dims() != shape.dims()
        {
            bail!("residual {:?} on an output of {shape:?}", r.dims())
        }
        let weights = match &self.0.place {
            Place::Device { weight, bias } => {
                let y = composed::frozen_linear(weight, bias.as_ref(), x)?;
                return residual.map_or(Ok(y.clone()), |r| y + r);
            }
            Place::Cpu { .. } => self.clone(),
        };
        let input = saved(x)?;
        let y = match residual {
            None => with_values([&input], |[x]| Ok(self.apply(x, m, None, None)))?,
            Some(r) => with_values([&input, &saved(r)?], |[x, r]| Ok(self.apply(x, m, Some(r), None)))?,
        };
        let x_shape = x.shape().clone();
        let backward = move |g: &Tensor, needed: [bool; 3]| {
            let dx = if needed[0] {
                let dx = with_values([g], |[g]| Ok(weights.input_grad(g, m, None)))?;
                Some(Tensor::from_vec(dx, x_shape.clone(), g.device())?)
            } else {
                None
            };
            Ok([dx, Some(g.clone()), None])
        };
        match residual {
            None => attach("frozen-linear", &[x], Value::Cpu(y), shape, backward),
            Some(r) => attach("frozen-linear", &[x, r], Value::Cpu(y), shape, backward),
        }
    }

    /// Rows and the output's shape.
    fn sizes(&self, x: &Tensor) -> Result<(usize, Shape)> {
        let (k, n) = (self.0.in_features, self.0.out_features);
        let mut dims = x.dims().to_vec();
        match dims.last_mut() {
            Some(last) if *last == k => *last = n,
            _ => bail!("linear layer ({n}, {k}) on an input of shape {:?}", x.dims()),
        }
        Ok((x.elem_count() / k, Shape::from(dims)))
    }

    fn apply(&self, x: &[f32], m: usize, residual: Option<&[f32]>, adapter: Option<Beside<'_>>) -> Vec<f32> {
        let Place::Cpu { weight, bias } = &self.0.place else {
            return Vec::new();
        };
        let k = self.0.in_features;
        let mut y = room(m * self.0.out_features);
        let start = bias.as_deref().map_or(Start::Zero, Start::Row);
        let row = |i: usize, _| &x[i * k..(i + 1) * k];
        multiply_beside(&mut y, weight.plain(), 1, row, start, residual, adapter);
        y
    }

    /// `g W`, plus the adapter's share.
    fn input_grad(&self, g: &[f32], m: usize, adapter: Option<Beside<'_>>) -> Vec<f32> {
        let Place::Cpu { weight, .. } = &self.0.place else {
            return Vec::new();
        };
        let n = self.0.out_features;
        let mut dx = room(m * self.0.in_features);
        let row = |i: usize, _| &g[i * n..(i + 1) * n];
        multiply_beside(&mut dx, weight.swapped(1), 1, row, Start::Zero, None, adapter);
        dx
    }
}

/// A frozen linear layer with an adapter beside it, as one node of the graph:
/// `y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ`. Gradients go to `x`, `A` and `B`; of the forward `x` and `x Aᵀ` are kept.
///
/// # Shapes
/// `x` (…, in); `a` (rank, in); `b` (out, rank) -> (…, out).
///
/// # Errors
/// If shapes do not fit.
///
/// # Source
/// Hu et al. 2021, eq. 3; gradients by the chain rule.
pub fn lora_linear(base: &FrozenLinear, x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let (k, n) = (base.0.in_features, base.0.out_features);
    let (m, shape) = base.sizes(x)?;
    let r = match (a.dims(), b.dims()) {
        (&[r, a_in], &[b_out, b_r]) if r == b_r && a_in == k && b_out == n => r,
        _ => bail!("adapter A {:?}, B {:?} beside a layer ({n}, {k})", a.dims(), b.dims()),
    };
    if let Place::Device { weight, bias } = &base.0.place {
        let y = composed::frozen_linear(weight, bias.as_ref(), x)?;
        return y + composed::low_rank(x, a, b, scale)?;
    }
    let scale = scale as f32;
    let (saved_x, saved_a, saved_b) = (saved(x)?, saved(a)?, saved(b)?);
    let (y, h) = with_values([&saved_x, &saved_a, &saved_b], |[x, a, b]| {
        let at = Packed::new(Mat::rows(a, r, k, k).t());
        let h = scaled_product(x, &at, m, scale);
        let weights = &Packed::new(Mat::rows(b, n, r, r).t());
        Ok((base.apply(x, m, None, Some(Beside { rows: &h, weights })), h))
    })?;
    let base = base.clone();
    let backward = move |grad: &Tensor, needed: [bool; 3]| {
        with_values([&saved_x, &saved_a, &saved_b, grad], |[x, a, b, g]| {
            // u = scale · g B is the gradient of x Aᵀ; h = scale · x Aᵀ was kept.
            let u = scaled_product(g, &Packed::new(Mat::rows(b, n, r, r)), m, scale);
            let da = product_over_rows(&u, r, x, k);
            let dbt = product_over_rows(&h, r, g, n);
            let db = transpose(&dbt, r, n);
            // An untracked input (the prompt's embeddings) needs no gradient: skipping it saves a product with W.
            let dx = if needed[0] {
                let weights = &Packed::new(Mat::rows(a, r, k, k));
                let dx = base.input_grad(g, m, Some(Beside { rows: &u, weights }));
                Some(Tensor::from_vec(dx, saved_x.shape(), grad.device())?)
            } else {
                None
            };
            Ok([
                dx,
                Some(Tensor::from_vec(da, (r, k), grad.device())?),
                Some(Tensor::from_vec(db, (n, r), grad.device())?),
            ])
        })
    };
    attach("lora-linear", &[x, a, b], Value::Cpu(y), shape, backward)
}

/// `scale · x W` of `m` rows.
fn scaled_product(x: &[f32], weights: &Packed, m: usize, scale: f32) -> Vec<f32> {
    let (k, n) = (weights.plain().depth(), weights.plain().width());
    let mut y = room(m * n);
    multiply(
        &mut y,
        weights.plain(),
        1,
        |i, _| &x[i * k..(i + 1) * k],
        Start::Zero,
        None,
    );
    y.iter_mut().for_each(|v| *v *= scale);
    y
}

/// A row-major `(rows, cols)` matrix as `(cols, rows)`.
fn transpose(matrix: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = room(rows * cols);
    for (i, row) in matrix.chunks_exact(cols).enumerate() {
        for (j, v) in row.iter().enumerate() {
            out[j * rows + i] = *v;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::testing::{adjoint, assert_close, assert_same_op, random};

    #[test]
    fn a_frozen_layer_equals_the_composed_one_with_and_without_residual() {
        for (m, k, n) in [(5, 7, 9), (40, 64, 48)] {
            let (w, b) = (random(&[n, k], 1), random(&[n], 2));
            let layer = FrozenLinear::new(&w, Some(&b)).unwrap();
            assert_same_op(
                &[&random(&[2, m, k], 3), &random(&[2, m, n], 4)],
                |t| layer.forward(&t[0], Some(&t[1])),
                |t| composed::linear(&w, Some(&b), &t[0])? + &t[1],
            );
            assert_same_op(
                &[&random(&[m, k], 3)],
                |t| layer.forward(&t[0], None),
                |t| composed::linear(&w, Some(&b), &t[0]),
            );
            let plain = FrozenLinear::new(&w, None).unwrap();
            adjoint(&[&random(&[m, k], 5), &random(&[m, n], 6)], |t| {
                plain.forward(&t[0], Some(&t[1]))
            });
        }
    }

    #[test]
    fn an_adapted_layer_equals_the_composed_one_in_value_and_all_three_gradients() {
        for (m, k, n, r) in [(5, 7, 9, 2), (33, 64, 48, 8), (64, 96, 32, 20)] {
            let (w, bias) = (random(&[n, k], 1), random(&[n], 2));
            let layer = FrozenLinear::new(&w, Some(&bias)).unwrap();
            assert_same_op(
                &[&random(&[2, m, k], 3), &random(&[r, k], 4), &random(&[n, r], 5)],
                |t| lora_linear(&layer, &t[0], &t[1], &t[2], 0.7),
                |t| composed::linear(&w, Some(&bias), &t[0])? + composed::low_rank(&t[0], &t[1], &t[2], 0.7)?,
            );
        }
    }

    #[test]
    fn a_frozen_weight_gets_no_gradient_and_an_untracked_input_costs_none() {
        let layer = FrozenLinear::new(&random(&[4, 4], 1), None).unwrap();
        let (a, b) = (
            candle_core::Var::from_tensor(&random(&[2, 4], 2)).unwrap(),
            candle_core::Var::from_tensor(&random(&[4, 2], 3)).unwrap(),
        );
        let x = random(&[3, 4], 4);
        let y = lora_linear(&layer, &x, a.as_tensor(), b.as_tensor(), 1.0).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get_ids().count(), 2);
        assert!(grads.get(&x).is_none());
        let untracked = layer.forward(&x, None).unwrap();
        assert!(!untracked.track_op());
        assert_close(
            &untracked,
            &composed::linear(&random(&[4, 4], 1), None, &x).unwrap(),
            1e-6,
        );
    }
}
