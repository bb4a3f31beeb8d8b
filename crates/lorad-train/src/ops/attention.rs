//! Multi-head attention that keeps no score matrix for the backward.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    attach::{Value, attach, saved, with_values},
    buffer::room,
    composed,
    gemm::{Destination, tiles},
    has_kernels,
    kernel::Walk,
    math::{dot, exp, sum, vectorized},
    packed::{Mat, Packed, Panels, WIDTH},
};

/// Query rows whose scores are held at once, per thread.
const QUERY_ROWS: usize = 256;

/// `softmax(q kᵀ / sqrt(d)) v` per head. Keeps q, k and v; the backward computes the scores again, block by block of
/// query rows.
///
/// # Shapes
/// `q` (b, lq, heads · d); `k`, `v` (b, lk, heads · d) -> (b, lq, heads · d). `causal`: position i sees 0..=i.
///
/// # Errors
/// If shapes do not fit.
///
/// # Source
/// Vaswani et al. 2017, eq. 1; the backward by rows is that of Dao et al. 2022 (FlashAttention), §3.1.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (b, lq, c) = q.dims3()?;
    let lk = k.dim(1)?;
    if heads == 0 || !c.is_multiple_of(heads) || k.dims() != [b, lk, c] || v.dims() != [b, lk, c] || lk == 0 {
        bail!(
            "attention of q {:?}, k {:?}, v {:?} in {heads} heads",
            q.dims(),
            k.dims(),
            v.dims()
        )
    }
    if causal && lq != lk {
        bail!("causal attention of {lq} positions on {lk}")
    }
    if !has_kernels(q.device()) {
        return composed::attention(q, k, v, heads, causal);
    }
    let sizes = Sizes {
        heads,
        lq,
        lk,
        d: c / heads,
        causal,
    };
    let (q_, k_, v_) = (saved(q)?, saved(k)?, saved(v)?);
    let blocks = lq.div_ceil(QUERY_ROWS);
    let y = with_values([&q_, &k_, &v_], |[q, k, v]| {
        let mut y = room(q.len());
        let out = Destination::new(&mut y);
        (0..b * heads * blocks).into_par_iter().for_each(|i| {
            let rows = i % blocks * QUERY_ROWS..lq.min((i % blocks + 1) * QUERY_ROWS);
            sizes.forward(q, k, v, i / blocks, rows, &out);
        });
        Ok(y)
    })?;
    attach("attention", &[q, k, v], Value::Cpu(y), (b, lq, c), move |g, _| {
        let (dq, dk, dv) = with_values([&q_, &k_, &v_, g], |[q, k, v, g]| {
            let (mut dq, mut dk, mut dv) = (room(q.len()), room(k.len()), room(v.len()));
            let out = [&mut dq, &mut dk, &mut dv].map(|values| Destination::new(values));
            (0..b * heads)
                .into_par_iter()
                .for_each(|i| sizes.backward([q, k, v, g], i, &out));
            Ok((dq, dk, dv))
        })?;
        Ok([
            Some(Tensor::from_vec(dq, (b, lq, c), g.device())?),
            Some(Tensor::from_vec(dk, (b, lk, c), g.device())?),
            Some(Tensor::from_vec(dv, (b, lk, c), g.device())?),
        ])
    })
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    heads: usize,
    lq: usize,
    lk: usize,
    d: usize,
    causal: bool,
}

impl Sizes {
    /// Where row `row` of head `i` (counted over the batch) of a `(b, l, heads * d)` tensor starts.
    fn at(&self, i: usize, l: usize, row: usize) -> usize {
        (i / self.heads * l + row) * self.heads * self.d + i % self.heads * self.d
    }

    /// Head `i` of a `(b, l, heads * d)` tensor, as `(l, d)`.
    fn head<'a>(&self, values: &'a [f32], i: usize, l: usize) -> Mat<'a> {
        Mat::rows(&values[self.at(i, l, 0)..], l, self.d, self.heads * self.d)
    }

    /// Scores of a query take this many values: whole panels.
    fn stride(&self) -> usize {
        self.lk.next_multiple_of(WIDTH)
    }

    /// `out[row] = factor * x[row] w` for rows `rows` of head `i` of `x`; `out` has rows [`Self::stride`] apart.
    fn scores(&self, x: &[f32], i: usize, rows: Range<usize>, w: &Packed, factor: f32, out: &mut Vec<f32>) {
        let stride = self.stride();
        out.resize(rows.len() * stride, 0.0);
        let row = |r: usize| &x[self.at(i, self.lq, rows.start + r)..][..self.d];
        tiles(
            Walk::dense(self.d),
            rows.len(),
            row,
            w.panels(),
            &mut |r, first, sums| {
                let out = &mut out[r * stride + first..][..sums.len()];
                out.iter_mut().zip(sums).for_each(|(o, s)| *o = factor * s);
            },
        );
    }

    /// Probabilities of query rows `rows`; `k` is the head's keys, transposed.
    fn probabilities(&self, q: &[f32], i: usize, rows: Range<usize>, k: &Packed, p: &mut Vec<f32>) {
        self.scores(q, i, rows.clone(), k, (self.d as f32).powf(-0.5), p);
        for (p, row) in p.chunks_exact_mut(self.stride()).zip(rows) {
            let seen = if self.causal { row + 1 } else { self.lk };
            p[seen..].fill(f32::NEG_INFINITY);
        }
        softmax_rows(p, self.stride());
    }

    /// `out[row] = factor * p[row] w` to rows `rows` of head `i`.
    fn mix(&self, p: &[f32], w: &Packed, i: usize, rows: Range<usize>, factor: f32, out: &Destination) {
        let row = |r: usize| &p[r * self.stride()..][..self.lk];
        tiles(
            Walk::dense(self.lk),
            rows.len(),
            row,
            w.panels(),
            &mut |r, first, sums| {
                let n = sums.len().min(self.d - first);
                let out = out.slice(self.at(i, self.lq, rows.start + r) + first, n);
                out.iter_mut().zip(sums).for_each(|(o, s)| *o = factor * s);
            },
        );
    }

    /// `out += xᵀ p`, `(d, stride)`, of rows `rows` of head `i` of `x`.
    fn gather(&self, x: &[f32], p: &[f32], i: usize, rows: Range<usize>, out: &mut [f32]) {
        let stride = self.stride();
        let walk = Walk {
            len: rows.len(),
            row_step: self.heads * self.d,
            panel_step: stride,
        };
        let from = self.at(i, self.lq, rows.start);
        let panels = Panels {
            values: p,
            count: stride / WIDTH,
            distance: WIDTH,
        };
        tiles(walk, self.d, |j| &x[from + j..], panels, &mut |j, first, sums| {
            let out = &mut out[j * stride + first..][..sums.len()];
            out.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
        });
    }

    fn forward(&self, q: &[f32], k: &[f32], v: &[f32], i: usize, rows: Range<usize>, out: &Destination) {
        let k = Packed::new(self.head(k, i, self.lk).t());
        let v = Packed::new(self.head(v, i, self.lk));
        let mut p = Vec::new();
        self.probabilities(q, i, rows.clone(), &k, &mut p);
        self.mix(&p, &v, i, rows, 1.0, out);
    }

    /// `dv = pᵀ g`, `dp = g vᵀ`, `ds = p (dp - Σ p dp)`, `dq = ds k`, `dk = dsᵀ q`.
    fn backward(&self, [q, k, v, g]: [&[f32]; 4], i: usize, [out_q, out_k, out_v]: &[Destination; 3]) {
        let Self { lq, lk, d, .. } = *self;
        let (scale, stride) = ((d as f32).powf(-0.5), self.stride());
        let keys = Packed::new(self.head(k, i, lk));
        let (k, v) = (self.head(k, i, lk).t(), self.head(v, i, lk).t());
        let (k, v) = (Packed::new(k), Packed::new(v));
        let (mut dk, mut dv) = (vec![0.0; d * stride], vec![0.0; d * stride]);
        let (mut p, mut dp) = (Vec::new(), Vec::new());
        for start in (0..lq).step_by(QUERY_ROWS) {
            let rows = start..lq.min(start + QUERY_ROWS);
            self.probabilities(q, i, rows.clone(), &k, &mut p);
            self.gather(g, &p, i, rows.clone(), &mut dv);
            self.scores(g, i, rows.clone(), &v, 1.0, &mut dp);
            score_grads(&mut dp, &p, stride);
            self.mix(&dp, &keys, i, rows.clone(), scale, out_q);
            self.gather(q, &dp, i, rows, &mut dk);
        }
        for (from, factor, out) in [(&dk, scale, out_k), (&dv, 1.0, out_v)] {
            // By 16 rows, so that both sides stay in the cache.
            for first in (0..lk).step_by(WIDTH) {
                for (j, from) in from.chunks_exact(stride).enumerate() {
                    for (row, value) in from.iter().enumerate().take(lk).skip(first).take(WIDTH) {
                        out.slice(self.at(i, lk, row) + j, 1)[0] = factor * value;
                    }
                }
            }
        }
    }
}

vectorized! {
    fn softmax_rows(p: &mut [f32], n: usize) {
        for row in p.chunks_exact_mut(n) {
            let mut lanes = [f32::NEG_INFINITY; 8];
            let chunks = row.chunks_exact(8);
            let rest = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m });
            for chunk in chunks {
                for j in 0..8 {
                    lanes[j] = if chunk[j] > lanes[j] { chunk[j] } else { lanes[j] };
                }
            }
            let max = lanes.iter().fold(rest, |m, v| if *v > m { *v } else { m });
            for v in row.iter_mut() {
                *v = exp(*v - max);
            }
            let factor = 1.0 / sum(row);
            for v in row.iter_mut() {
                *v *= factor;
            }
        }
    }
}

vectorized! {
    /// `dp := p (dp - Σ p dp)` per row of `n`.
    fn score_grads(dp: &mut [f32], p: &[f32], n: usize) {
        for (dp, p) in dp.chunks_exact_mut(n).zip(p.chunks_exact(n)) {
            let level = dot(dp, p);
            for (dp, p) in dp.iter_mut().zip(p) {
                *dp = p * (*dp - level);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::testing::{assert_close, assert_same_op, random};

    #[test]
    fn attention_equals_the_composed_one_for_self_cross_and_causal() {
        for (lq, lk, heads, d, causal) in [
            (9, 5, 2, 3, false),
            (16, 16, 4, 8, true),
            (300, 7, 1, 4, false),
            (33, 32, 3, 16, false),
        ] {
            let c = heads * d;
            assert_same_op(
                &[
                    &random(&[2, lq, c], 1),
                    &random(&[2, lk, c], 2),
                    &random(&[2, lk, c], 3),
                ],
                |t| attention(&t[0], &t[1], &t[2], heads, causal),
                |t| composed::attention(&t[0], &t[1], &t[2], heads, causal),
            );
        }
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let q = (random(&[1, 4, 8], 1) * 200.0).unwrap();
        let v = random(&[1, 4, 8], 2);
        assert_close(
            &attention(&q, &q, &v, 2, false).unwrap(),
            &composed::attention(&q, &q, &v, 2, false).unwrap(),
            1e-4,
        );
    }
}
