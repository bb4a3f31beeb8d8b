//! 3x3 convolutions of stride 1 with a border of one, by Winograd's F(2x2, 3x3): 16 products where the direct way takes 36.
//!
//! Pictures are cut into tiles of 2x2 results. Every tile's 4x4 values and every kernel are brought into another basis, there
//! the convolution is 16 independent matrix products over the channels, and its results are brought back. All
//! coefficients are 0, ±1 and 1/2, so that the error stays near that of the direct sum. Kernels are transformed block by block
//! as they are needed: keeping them transformed would take 16/9 of their memory.
//!
//! Lavin & Gray 2016 (arXiv:1509.09308), §4.1.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use rayon::prelude::*;

use super::{
    gemm::{Destination, Start, multiply},
    packed::{Operand, WIDTH},
};

/// Values of a tile, and positions in the other basis.
const POINTS: usize = 16;
/// Input channels whose kernels are transformed at once.
const CHANNELS: usize = 64;
/// Bytes of transformed input, and of transformed kernels, held at once.
const HELD_BYTES: usize = 12 << 20;

/// Sizes of the pictures.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pictures {
    pub(super) batch: usize,
    pub(super) height: usize,
    pub(super) width: usize,
}

impl Pictures {
    fn tiles_down(&self) -> usize {
        self.height.div_ceil(2)
    }

    fn tiles_across(&self) -> usize {
        self.width.div_ceil(2)
    }

    fn tiles(&self) -> usize {
        self.batch * self.tiles_down() * self.tiles_across()
    }

    /// Picture, and row and column of the first result.
    fn place(&self, tile: usize) -> (usize, usize, usize) {
        let (down, across) = (self.tiles_down(), self.tiles_across());
        (tile / (down * across), tile / across % down * 2, tile % across * 2)
    }

    /// Whether this way is the faster one: with few tiles, transforming the kernels costs more than it saves, with few
    /// channels the pictures.
    pub(super) fn suit(&self, weights: Operand<'_>) -> bool {
        self.tiles() >= 48 && weights.depth() >= 9 * 64 && weights.width() >= 64
    }
}

/// `dst = start + add + conv(x)`.
///
/// # Shapes
/// `dst` (b, h, w, n); `x` (b, h, w, k); `weights` (9 taps * k, n), with `mirrored` the last tap first; `add` as `dst`.
pub(super) fn convolve(
    dst: &mut [f32],
    x: &[f32],
    pictures: Pictures,
    weights: Operand<'_>,
    mirrored: bool,
    start: Start<'_>,
    add: Option<&[f32]>,
) {
    let (k, n) = (weights.depth() / 9, weights.width());
    let pixels = pictures.batch * pictures.height * pictures.width;
    assert!(dst.len() == pixels * n && x.len() == pixels * k && add.is_none_or(|a| a.len() == dst.len()));
    let job = Job {
        x,
        pictures,
        weights,
        mirrored,
        k,
        n,
        start,
        add,
        dst: Destination::new(dst),
        zeros: vec![0.0; k],
    };
    let tiles = pictures.tiles();
    let tiles_per = (HELD_BYTES / (4 * POINTS * k)).clamp(192.min(tiles), tiles);
    let panels = n.div_ceil(WIDTH);
    let panels_per = (HELD_BYTES / (4 * POINTS * k * WIDTH)).clamp(1, panels);
    let columns_per = panels_per * WIDTH;
    let mut input = Borrowed::new(POINTS * tiles_per * k);
    let mut kernels = Borrowed::new(POINTS * columns_per * k);
    let mut results = Borrowed::new(POINTS * tiles_per * columns_per);
    for first in (0..tiles).step_by(tiles_per) {
        let rows = tiles_per.min(tiles - first);
        // (16, rows, k)
        let input = &mut input.0[..POINTS * rows * k];
        let points = Destination::new(input);
        (0..rows)
            .into_par_iter()
            .with_min_len(4)
            .for_each(|row| job.to_basis(first + row, rows, row, &points));
        for panel in (0..panels).step_by(panels_per) {
            let count = panels_per.min(panels - panel);
            // (16, count, k, 16)
            let kernels = &mut kernels.0[..POINTS * count * k * WIDTH];
            let places = Destination::new(kernels);
            let steps = k.div_ceil(CHANNELS);
            (0..count * steps).into_par_iter().for_each(|task| {
                let (p, from) = (task / steps, task % steps * CHANNELS);
                let inner = from..(from + CHANNELS).min(k);
                let n = inner.len() * WIDTH;
                let mut out = std::array::from_fn(|point| places.slice(((point * count + p) * k + from) * WIDTH, n));
                job.kernels_to_basis(panel + p, inner, &mut out);
            });
            // (16, rows, columns)
            let columns = (n - panel * WIDTH).min(count * WIDTH);
            let results = &mut results.0[..POINTS * rows * columns];
            let (input, kernels) = (&*input, &*kernels);
            results
                .par_chunks_exact_mut(rows * columns)
                .enumerate()
                .for_each(|(point, results)| {
                    let weights = Operand::Panels {
                        values: &kernels[point * count * k * WIDTH..(point + 1) * count * k * WIDTH],
                        depth: k,
                        width: columns,
                    };
                    let input = &input[point * rows * k..(point + 1) * rows * k];
                    multiply(
                        results,
                        weights,
                        1,
                        |i, _| &input[i * k..(i + 1) * k],
                        Start::Zero,
                        None,
                    );
                });
            let results = &*results;
            (0..rows)
                .into_par_iter()
                .with_min_len(4)
                .for_each(|row| job.leave_basis(first + row, panel * WIDTH, columns, rows, row, results));
        }
    }
}

/// Buffers between uses. Fresh memory costs a page fault for every page and a pass of zeros, more than the transforms.
static SPARE: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());
/// Buffers kept.
const SPARES: usize = 6;

/// A buffer of old values, at least as long as asked for.
struct Borrowed(Vec<f32>);

impl Borrowed {
    fn new(len: usize) -> Self {
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is long enough, else the largest, to be made longer.
        let best = (0..spare.len()).min_by_key(|&i| {
            let capacity = spare[i].capacity();
            (capacity < len, capacity.abs_diff(len))
        });
        let mut buffer = best.map_or_else(Vec::new, |i| spare.swap_remove(i));
        drop(spare);
        if buffer.len() < len {
            if buffer.capacity() < len {
                // Not to be copied.
                buffer = Vec::new();
            }
            buffer.resize(len, 0.0);
        }
        Self(buffer)
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARES {
            spare.push(std::mem::take(&mut self.0));
        }
    }
}

struct Job<'j> {
    x: &'j [f32],
    pictures: Pictures,
    weights: Operand<'j>,
    mirrored: bool,
    k: usize,
    n: usize,
    start: Start<'j>,
    add: Option<&'j [f32]>,
    dst: Destination,
    zeros: Vec<f32>,
}

impl Job<'_> {
    /// `Bᵀ d B` of one tile, each point to row `row` of its `(rows, k)` matrix.
    fn to_basis(&self, tile: usize, rows: usize, row: usize, out: &Destination) {
        let Pictures { height, width, .. } = self.pictures;
        let (image, top, left) = self.pictures.place(tile);
        let k = self.k;
        let d: [&[f32]; POINTS] = std::array::from_fn(|i| {
            let (y, x) = ((top + i / 4).wrapping_sub(1), (left + i % 4).wrapping_sub(1));
            if y < height && x < width {
                let at = ((image * height + y) * width + x) * k;
                &self.x[at..at + k]
            } else {
                &self.zeros
            }
        });
        let mut out: [&mut [f32]; POINTS] = std::array::from_fn(|p| out.slice((p * rows + row) * k, k));
        tile_to_basis(&d, &mut out);
    }

    /// `G g Gᵀ` of the kernels of `inner` input channels and 16 output channels, each point to its `(inner, 16)`.
    fn kernels_to_basis(&self, panel: usize, inner: Range<usize>, u: &mut [&mut [f32]; POINTS]) {
        let size = inner.len() * WIDTH;
        let mut taps = [0.0; 9 * CHANNELS * WIDTH];
        let mut rest = &mut taps[..9 * size];
        let mut g: [&[f32]; 9] = [&[]; 9];
        for tap in 0..9 {
            let (own, others) = rest.split_at_mut(size);
            rest = others;
            let place = if self.mirrored { 8 - tap } else { tap };
            g[place] = self
                .weights
                .blocks(panel..panel + 1, tap..tap + 1, self.k, inner.clone(), own)[0];
        }
        kernel_to_basis(&g, u);
    }

    /// `Aᵀ m A` of one tile and the columns from `first`, with what is added to it.
    fn leave_basis(&self, tile: usize, first: usize, columns: usize, rows: usize, row: usize, results: &[f32]) {
        let Pictures { height, width, .. } = self.pictures;
        let (image, top, left) = self.pictures.place(tile);
        let m: [&[f32]; POINTS] = std::array::from_fn(|p| &results[(p * rows + row) * columns..][..columns]);
        for at in (0..columns).step_by(WIDTH) {
            let n = WIDTH.min(columns - at);
            let mut values = [[0.0; WIDTH]; 4];
            from_basis(&m, at, n, &mut values);
            for (i, value) in values.iter().enumerate() {
                let (y, x) = (top + i / 2, left + i % 2);
                if y >= height || x >= width {
                    continue;
                }
                let pixel = (image * height + y) * width + x;
                let place = pixel * self.n + first + at;
                let out = self.dst.slice(place, n);
                self.start.combine(out, value, pixel, self.n, first + at);
                if let Some(add) = self.add {
                    out.iter_mut().zip(&add[place..place + n]).for_each(|(o, a)| *o += a);
                }
            }
        }
    }
}

super::math::vectorized! {
    fn kernel_to_basis(g: &[&[f32]; 9], u: &mut [&mut [f32]; 16]) {
        let size = g[0].len();
        for at in (0..size).step_by(8) {
            let g: [[f32; 8]; 9] = load(g, at);
            // G g: 4 rows of 3.
            let mut rows = [[[0.0; 8]; 3]; 4];
            for x in 0..3 {
                for j in 0..8 {
                    let (a, b, c) = (g[x][j], g[3 + x][j], g[6 + x][j]);
                    let half = 0.5 * (a + c);
                    rows[0][x][j] = a;
                    rows[1][x][j] = half + 0.5 * b;
                    rows[2][x][j] = half - 0.5 * b;
                    rows[3][x][j] = c;
                }
            }
            for (y, row) in rows.iter().enumerate() {
                let mut line = [[0.0; 8]; 4];
                for j in 0..8 {
                    let (a, b, c) = (row[0][j], row[1][j], row[2][j]);
                    let half = 0.5 * (a + c);
                    line[0][j] = a;
                    line[1][j] = half + 0.5 * b;
                    line[2][j] = half - 0.5 * b;
                    line[3][j] = c;
                }
                for x in 0..4 {
                    u[4 * y + x][at..at + 8].copy_from_slice(&line[x]);
                }
            }
        }
    }

}

super::math::vectorized! {
    /// `Aᵀ m A` of `n` columns (16 at most) from `at`: the four results of a tile.
    fn from_basis(m: &[&[f32]; 16], at: usize, n: usize, out: &mut [[f32; 16]; 4]) {
        let mut half = [[[0.0; WIDTH]; 4]; 2];
        for x in 0..4 {
            let mut column = [[0.0; WIDTH]; 4];
            for (y, to) in column.iter_mut().enumerate() {
                let from = &m[4 * y + x][at..at + n];
                if n == WIDTH { to.copy_from_slice(from) } else { to[..n].copy_from_slice(from) }
            }
            let m = column;
            for j in 0..WIDTH {
                half[0][x][j] = m[0][j] + (m[1][j] + m[2][j]);
                half[1][x][j] = (m[1][j] - m[2][j]) - m[3][j];
            }
        }
        for y in 0..2 {
            let line = &half[y];
            for j in 0..WIDTH {
                out[2 * y][j] = line[0][j] + (line[1][j] + line[2][j]);
                out[2 * y + 1][j] = (line[1][j] - line[2][j]) - line[3][j];
            }
        }
    }
}

/// `L` values from `at` of each slice. Not by `from_fn`, which is not inlined into functions of other features.
#[inline(always)]
fn load<const L: usize, const N: usize>(from: &[&[f32]; N], at: usize) -> [[f32; L]; N] {
    let mut values = [[0.0; L]; N];
    for (to, from) in values.iter_mut().zip(from) {
        to.copy_from_slice(&from[at..at + L]);
    }
    values
}

super::math::vectorized! {
    fn tile_to_basis(d: &[&[f32]; 16], out: &mut [&mut [f32]; 16]) {
        let k = d[0].len();
        let whole = k / 8 * 8;
        for at in (0..whole).step_by(8) {
            let d: [[f32; 8]; 16] = load(d, at);
            let v = basis(&d);
            for (out, v) in out.iter_mut().zip(&v) {
                out[at..at + 8].copy_from_slice(v);
            }
        }
        for at in whole..k {
            let d: [[f32; 1]; 16] = load(d, at);
            for (out, v) in out.iter_mut().zip(&basis(&d)) {
                out[at] = v[0];
            }
        }
    }
}

/// `Bᵀ d B`.
#[inline(always)]
fn basis<const N: usize>(d: &[[f32; N]; 16]) -> [[f32; N]; 16] {
    let mut rows = [[0.0; N]; 16];
    for x in 0..4 {
        for j in 0..N {
            let (a, b, c, e) = (d[x][j], d[4 + x][j], d[8 + x][j], d[12 + x][j]);
            rows[x][j] = a - c;
            rows[4 + x][j] = b + c;
            rows[8 + x][j] = c - b;
            rows[12 + x][j] = b - e;
        }
    }
    let mut out = [[0.0; N]; 16];
    for y in 0..4 {
        for j in 0..N {
            let (a, b, c, e) = (
                rows[4 * y][j],
                rows[4 * y + 1][j],
                rows[4 * y + 2][j],
                rows[4 * y + 3][j],
            );
            out[4 * y][j] = a - c;
            out[4 * y + 1][j] = b + c;
            out[4 * y + 2][j] = c - b;
            out[4 * y + 3][j] = b - e;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::ops::{
        Conv2dPlus, ConvGeometry, FrozenConv2d, composed,
        testing::{adjoint, assert_close, random},
    };

    #[test]
    fn odd_pictures_with_everything_added_equal_the_direct_convolution() {
        let geometry = ConvGeometry::new(3, 1, 1);
        let (weight, bias, t) = (random(&[72, 65, 3, 3], 1), random(&[72], 2), random(&[3, 72], 5));
        let layer = FrozenConv2d::new(&weight, Some(&bias), geometry).unwrap();
        let (x, residual) = (random(&[3, 9, 11, 65], 3), random(&[3, 9, 11, 72], 4));
        let plus = Conv2dPlus {
            per_sample: Some(&t),
            residual: Some(&residual),
        };
        let exact = composed::conv2d(&weight, Some(&bias), geometry, &x)
            .unwrap()
            .broadcast_add(&t.reshape((3, 1, 1, 72)).unwrap())
            .unwrap()
            .add(&residual)
            .unwrap();
        assert_close(&layer.forward(&x, plus).unwrap(), &exact, 1e-5);
    }

    /// More tiles and more columns than are held at once, so that every loop goes round.
    #[test]
    fn many_tiles_and_columns_are_done_in_parts_and_backward_is_the_adjoint() {
        let geometry = ConvGeometry::new(3, 1, 1);
        let (wide, weight) = (random(&[64, 1500, 3, 3], 1), random(&[700, 320, 3, 3], 2));
        for (weight, shape) in [(wide, [1, 34, 34, 1500]), (weight, [1, 50, 50, 320])] {
            let layer = FrozenConv2d::new(&weight, None, geometry).unwrap();
            let x = random(&shape, 3);
            let y = layer.forward(&x, Conv2dPlus::default()).unwrap();
            assert_close(&y, &composed::conv2d(&weight, None, geometry, &x).unwrap(), 1e-5);
            adjoint(&[&x], |t| layer.forward(&t[0], Conv2dPlus::default()));
        }
    }
}
