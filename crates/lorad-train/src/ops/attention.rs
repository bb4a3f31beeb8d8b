//! Multi-head attention that keeps no score matrix for the backward.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    attach::{Value, attach, saved, with_values},
    buffer::room,
    composed,
    gemm::{Into, matmul},
    math::{dot, exp, sum, vectorized},
    packed::Mat,
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
    if !q.device().is_cpu() {
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
        let parts: Vec<Vec<f32>> = (0..b * heads * blocks)
            .into_par_iter()
            .map(|i| {
                let rows = i % blocks * QUERY_ROWS..lq.min((i % blocks + 1) * QUERY_ROWS);
                sizes.forward(q, k, v, i / blocks, rows)
            })
            .collect();
        let parts: Vec<Vec<f32>> = parts.chunks(blocks).map(<[Vec<f32>]>::concat).collect();
        Ok(sizes.interleave(&parts, lq))
    })?;
    attach("attention", &[q, k, v], Value::Cpu(y), (b, lq, c), move |g, _| {
        let (dq, dk, dv) = with_values([&q_, &k_, &v_, g], |[q, k, v, g]| {
            let parts: Vec<[Vec<f32>; 3]> = (0..b * heads)
                .into_par_iter()
                .map(|i| sizes.backward([q, k, v, g], i))
                .collect();
            let [mut dq, mut dk, mut dv] = [(); 3].map(|()| Vec::with_capacity(parts.len()));
            for [a, b, c] in parts {
                dq.push(a);
                dk.push(b);
                dv.push(c);
            }
            Ok((
                sizes.interleave(&dq, lq),
                sizes.interleave(&dk, lk),
                sizes.interleave(&dv, lk),
            ))
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
    /// Rows `rows` of head `i` (counted over the batch) of a `(b, l, heads * d)` tensor.
    fn head<'a>(&self, values: &'a [f32], i: usize, l: usize, rows: std::ops::Range<usize>) -> Mat<'a> {
        let c = self.heads * self.d;
        let at = (i / self.heads * l + rows.start) * c + i % self.heads * self.d;
        Mat::rows(&values[at..], rows.len(), self.d, c)
    }

    /// Probabilities of query rows `rows`.
    fn probabilities(&self, q: Mat<'_>, k: Mat<'_>, rows: std::ops::Range<usize>, p: &mut Vec<f32>) {
        p.resize(rows.len() * self.lk, 0.0);
        matmul(p, self.lk, q, k.t(), (self.d as f32).powf(-0.5), Into::Overwrite);
        if self.causal {
            for (p, row) in p.chunks_exact_mut(self.lk).zip(rows) {
                p[row + 1..].fill(f32::NEG_INFINITY);
            }
        }
        softmax_rows(p, self.lk);
    }

    fn forward(&self, q: &[f32], k: &[f32], v: &[f32], i: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
        let (k, v) = (
            self.head(k, i, self.lk, 0..self.lk),
            self.head(v, i, self.lk, 0..self.lk),
        );
        let mut p = Vec::new();
        self.probabilities(self.head(q, i, self.lq, rows.clone()), k, rows.clone(), &mut p);
        let mut y = room(rows.len() * self.d);
        matmul(
            &mut y,
            self.d,
            Mat::rows(&p, rows.len(), self.lk, self.lk),
            v,
            1.0,
            Into::Overwrite,
        );
        y
    }

    /// `dv = pᵀ g`, `dp = g vᵀ`, `ds = p (dp - Σ p dp)`, `dq = ds k`, `dk = dsᵀ q`.
    fn backward(&self, [q, k, v, g]: [&[f32]; 4], i: usize) -> [Vec<f32>; 3] {
        let Self { lq, lk, d, .. } = *self;
        let scale = (d as f32).powf(-0.5);
        let (k, v) = (self.head(k, i, lk, 0..lk), self.head(v, i, lk, 0..lk));
        let (mut dq, mut dk, mut dv) = (room(lq * d), vec![0.0; lk * d], vec![0.0; lk * d]);
        let (mut p, mut dp) = (Vec::new(), Vec::new());
        for start in (0..lq).step_by(QUERY_ROWS) {
            let rows = start..lq.min(start + QUERY_ROWS);
            let n = rows.len();
            let (q, g) = (self.head(q, i, lq, rows.clone()), self.head(g, i, lq, rows.clone()));
            self.probabilities(q, k, rows.clone(), &mut p);
            matmul(&mut dv, d, Mat::rows(&p, n, lk, lk).t(), g, 1.0, Into::Add);
            dp.resize(n * lk, 0.0);
            matmul(&mut dp, lk, g, v.t(), 1.0, Into::Overwrite);
            score_grads(&mut dp, &p, lk);
            let ds = Mat::rows(&dp, n, lk, lk);
            matmul(&mut dq[start * d..], d, ds, k, scale, Into::Overwrite);
            matmul(&mut dk, d, ds.t(), q, scale, Into::Add);
        }
        [dq, dk, dv]
    }

    /// Per-head `(l, d)` parts to `(b, l, heads * d)`.
    fn interleave(&self, parts: &[Vec<f32>], l: usize) -> Vec<f32> {
        let (d, c) = (self.d, self.heads * self.d);
        let mut out = room(parts.len() * l * d);
        out.par_chunks_mut(l * c)
            .zip(parts.par_chunks(self.heads))
            .for_each(|(out, parts)| {
                for (h, part) in parts.iter().enumerate() {
                    for (row, values) in out.chunks_exact_mut(c).zip(part.chunks_exact(d)) {
                        row[h * d..(h + 1) * d].copy_from_slice(values);
                    }
                }
            });
        out
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
