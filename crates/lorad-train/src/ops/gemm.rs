//! Matrix products of the CPU ops: rows that lie anywhere times a frozen matrix packed once.
//!
//! The kernel keeps a tile of 6 rows by 16 columns in registers and walks a block of the inner dimension; the block's weights,
//! unpacked where they are transposed or half ([`super::packed`]), and the rows that meet them stay in the caches. Its left operand is
//! given as *segments*: the caller says where the values of (row, tap) lie. A linear layer has one tap; a convolution has
//! one per kernel position and points into the picture (or at zeros), so that no patch matrix is ever built. This is the
//! "indirect convolution" of Dukhan 2019 (arXiv:1907.02129).
//!
//! Every value is summed in the order of the inner dimension by one thread: results do not depend on the thread count.
//! The other operand shapes (attention, adapters) go through the `gemm` crate in [`matmul`].

use std::ops::Range;

use rayon::prelude::*;

use super::packed::{Mat, Operand, WIDTH, fits};

/// Rows of a tile: 6 x 2 accumulators, leaving registers for the operands.
const HEIGHT: usize = 6;
/// Inner length walked per tile before moving on: a panel's share of the weights (24 KB) stays in the first-level cache, the
/// rows of a task (288 KB) in the second.
const DEPTH: usize = 384;
/// Rows per task when there are many: each task unpacks the weights that it reads for itself.
const ROWS_PER_TASK: usize = 192;

/// What the product is added to.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// Nothing.
    Zero,
    /// The destination's old values.
    Old,
    /// One vector for all rows (a bias).
    Row(&'a [f32]),
    /// A vector per group of `rows_per` rows (a bias plus the time embedding of each sample).
    PerGroup {
        /// `(groups, width)`.
        values: &'a [f32],
        /// Rows in a group.
        rows_per: usize,
    },
}

impl Start<'_> {
    /// `out = start + acc` for the columns from `first` of row `row`.
    #[inline(always)]
    pub(super) fn combine(&self, out: &mut [f32], acc: &[f32; WIDTH], row: usize, width: usize, first: usize) {
        let n = out.len();
        match self {
            Start::Zero => out.copy_from_slice(&acc[..n]),
            Start::Old => out.iter_mut().zip(acc).for_each(|(o, a)| *o += a),
            Start::Row(bias) => add_into(out, acc, &bias[first..first + n]),
            Start::PerGroup { values, rows_per } => {
                let from = row / rows_per * width + first;
                add_into(out, acc, &values[from..from + n]);
            }
        }
    }
}

/// A raw view of the destination that tasks write disjoint tiles of.
#[derive(Clone, Copy)]
pub(super) struct Destination {
    data: *mut f32,
    len: usize,
}
#[expect(unsafe_code, reason = "tasks write disjoint tiles of one buffer")]
// SAFETY: `multiply` hands each (row, column) to exactly one task, and outlives its tasks.
unsafe impl Send for Destination {}
#[expect(unsafe_code, reason = "as above")]
// SAFETY: as above.
unsafe impl Sync for Destination {}

impl Destination {
    pub(super) fn new(values: &mut [f32]) -> Self {
        Self {
            data: values.as_mut_ptr(),
            len: values.len(),
        }
    }

    /// The `n` values from `at`.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, unsafe_code, reason = "see the impls of Send and Sync")]
    pub(super) fn slice(&self, at: usize, n: usize) -> &mut [f32] {
        assert!(at + n <= self.len, "a tile leaves the destination");
        // SAFETY: inside the buffer, and no other task touches these values.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), n) }
    }
}

/// `dst[i] = start + add[i] + rows[i] * weights`, where row `i` is the concatenation over taps of `segment(i, tap)`.
///
/// # Panics
/// If a segment is not of `weights.depth() / taps` values, or `dst` and `add` not of `rows * weights.width()`.
pub(super) fn multiply<'a>(
    dst: &mut [f32],
    weights: Operand<'_>,
    taps: usize,
    segment: impl Fn(usize, usize) -> &'a [f32] + Sync,
    start: Start<'_>,
    add: Option<&[f32]>,
) {
    let (depth, width) = (weights.depth(), weights.width());
    if width == 0 || dst.is_empty() {
        return;
    }
    let rows = dst.len() / width;
    assert!(dst.len() == rows * width && depth.is_multiple_of(taps));
    assert!(add.is_none_or(|a| a.len() == dst.len()));
    let job = Job {
        weights,
        width,
        taps,
        segment_len: depth / taps,
        segment: &segment,
        start,
        add,
        dst: Destination::new(dst),
    };
    let panels = width.div_ceil(WIDTH);
    let threads = rayon::current_num_threads();
    // Below about 200 000 multiplications waking a thread costs more than it brings.
    if threads == 1 || rows * width * depth < 200_000 {
        for first in (0..rows).step_by(ROWS_PER_TASK) {
            job.run(first..(first + ROWS_PER_TASK).min(rows), 0..panels);
        }
        return;
    }
    let (rows_per, panels_per) = shares(rows, panels, ROWS_PER_TASK, threads);
    let panel_tasks = panels.div_ceil(panels_per);
    (0..rows.div_ceil(rows_per) * panel_tasks)
        .into_par_iter()
        .for_each(|task| {
            let (r, p) = (task / panel_tasks * rows_per, task % panel_tasks * panels_per);
            job.run(r..(r + rows_per).min(rows), p..(p + panels_per).min(panels));
        });
}

/// Rows and panels per task. Columns are split before rows: a task reads its weights once, however many its rows.
fn shares(rows: usize, panels: usize, most_rows: usize, threads: usize) -> (usize, usize) {
    let tiles = rows.div_ceil(HEIGHT);
    let wanted = 4 * threads;
    let row_tasks = rows.div_ceil(most_rows).max((wanted / 2).div_ceil(panels).min(tiles));
    let rows_per = tiles.div_ceil(row_tasks) * HEIGHT;
    let panel_tasks = wanted.div_ceil(rows.div_ceil(rows_per)).min(panels);
    (rows_per, panels.div_ceil(panel_tasks))
}

struct Job<'j, S> {
    weights: Operand<'j>,
    width: usize,
    taps: usize,
    segment_len: usize,
    segment: &'j S,
    start: Start<'j>,
    add: Option<&'j [f32]>,
    dst: Destination,
}

impl<'a, S: Fn(usize, usize) -> &'a [f32] + Sync> Job<'_, S> {
    fn run(&self, rows: Range<usize>, panels: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma")]
            fn fused<'a, S: Fn(usize, usize) -> &'a [f32] + Sync>(
                job: &Job<'_, S>,
                rows: Range<usize>,
                panels: Range<usize>,
            ) {
                job.blocks::<true>(rows, panels);
            }
            if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                #[expect(
                    unsafe_code,
                    reason = "calling a function compiled for features that were just detected"
                )]
                // SAFETY: the processor has AVX2 and FMA.
                unsafe {
                    return fused(self, rows, panels);
                }
            }
        }
        // Elsewhere a fused multiply-add is an instruction of the baseline (aarch64) or a slow library call (old x86).
        self.blocks::<{ cfg!(target_arch = "aarch64") }>(rows, panels);
    }

    #[inline(always)]
    fn blocks<const FMA: bool>(&self, rows: Range<usize>, panels: Range<usize>) {
        let segment_len = self.segment_len;
        // A block is several whole taps, or a part of one.
        let (taps_per, part) = if segment_len <= DEPTH {
            ((DEPTH / segment_len.max(1)).clamp(1, self.taps), segment_len)
        } else {
            let parts = segment_len.div_ceil(DEPTH);
            (1, segment_len.div_ceil(parts).next_multiple_of(WIDTH))
        };
        let mut scratch = vec![0.0; taps_per * part * WIDTH];
        for first_tap in (0..self.taps).step_by(taps_per) {
            let taps = first_tap..(first_tap + taps_per).min(self.taps);
            for from in (0..segment_len).step_by(part.max(1)) {
                let inner = from..(from + part).min(segment_len);
                for panel in panels.clone() {
                    let weights = self
                        .weights
                        .block(panel, taps.clone(), segment_len, inner.clone(), &mut scratch);
                    let block = Block {
                        panel,
                        taps: taps.clone(),
                        inner: inner.clone(),
                        weights,
                    };
                    let mut row = rows.start;
                    while row + HEIGHT <= rows.end {
                        self.tile::<HEIGHT, FMA>(row, &block);
                        row += HEIGHT;
                    }
                    match rows.end - row {
                        1 => self.tile::<1, FMA>(row, &block),
                        2 => self.tile::<2, FMA>(row, &block),
                        3 => self.tile::<3, FMA>(row, &block),
                        4 => self.tile::<4, FMA>(row, &block),
                        5 => self.tile::<5, FMA>(row, &block),
                        _ => {}
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn tile<const M: usize, const FMA: bool>(&self, row: usize, block: &Block<'_>) {
        let width = self.width;
        let first = block.panel * WIDTH;
        let n = WIDTH.min(width - first);
        let mut acc = [[0.0_f32; WIDTH]; M];
        let size = block.inner.len() * WIDTH;
        for (i, tap) in block.taps.clone().enumerate() {
            let x: [&[f32]; M] = std::array::from_fn(|r| &(self.segment)(row + r, tap)[block.inner.clone()]);
            accumulate::<M, FMA>(&x, &block.weights[i * size..(i + 1) * size], &mut acc);
        }
        let is_first = block.taps.start == 0 && block.inner.start == 0;
        for (r, acc) in acc.iter().enumerate() {
            let at = (row + r) * width + first;
            let out = self.dst.slice(at, n);
            if !is_first {
                out.iter_mut().zip(acc).for_each(|(o, a)| *o += a);
                continue;
            }
            self.start.combine(out, acc, row + r, width, first);
            if let Some(add) = self.add {
                out.iter_mut().zip(&add[at..at + n]).for_each(|(o, a)| *o += a);
            }
        }
    }
}

/// A share of the weights: rows `inner` of `taps`, 16 columns.
struct Block<'b> {
    panel: usize,
    taps: Range<usize>,
    inner: Range<usize>,
    /// `(taps * inner, 16)`.
    weights: &'b [f32],
}

#[inline(always)]
fn add_into(out: &mut [f32], acc: &[f32; WIDTH], start: &[f32]) {
    for ((o, a), s) in out.iter_mut().zip(acc).zip(start) {
        *o = s + a;
    }
}

/// `acc[r] += x[r] * w`; `w` is `(len, 16)`.
#[inline(always)]
fn accumulate<const M: usize, const FMA: bool>(x: &[&[f32]; M], w: &[f32], acc: &mut [[f32; WIDTH]; M]) {
    let mut c = *acc;
    let len = w.len() / WIDTH;
    assert!(x.iter().all(|x| x.len() == len), "a segment of the wrong length");
    for p in 0..len {
        #[expect(
            unsafe_code,
            reason = "bounds checks in the innermost loop cost a third of its speed"
        )]
        // SAFETY: `p < len`, `w` holds `16 * len` values and every row `len` (asserted above).
        let (w, x): (&[f32; WIDTH], [f32; M]) = unsafe {
            (
                &*w.as_ptr().add(p * WIDTH).cast::<[f32; WIDTH]>(),
                std::array::from_fn(|r| *x[r].get_unchecked(p)),
            )
        };
        for r in 0..M {
            for j in 0..WIDTH {
                c[r][j] = if FMA {
                    x[r].mul_add(w[j], c[r][j])
                } else {
                    c[r][j] + x[r] * w[j]
                };
            }
        }
    }
    *acc = c;
}

/// `uᵀ x`: `(r, n)` from `u` (m, r) and `x` (m, n), both row-major, each value summed in the order of the rows.
pub(super) fn product_over_rows(u: &[f32], r: usize, x: &[f32], n: usize) -> Vec<f32> {
    let m = u.len() / r.max(1);
    assert!(u.len() == m * r && x.len() == m * n);
    let mut out = vec![0.0; r * n];
    let columns = Destination::new(&mut out);
    let panels = n.div_ceil(WIDTH);
    let work = |panel: usize| {
        let first = panel * WIDTH;
        let width = WIDTH.min(n - first);
        outer_products(u, r, x, n, first..first + width, |i| {
            columns.slice(i * n + first, width)
        });
    };
    if m * r * n < 200_000 {
        (0..panels).for_each(work);
    } else {
        (0..panels).into_par_iter().with_min_len(2).for_each(work);
    }
    out
}

/// Columns `columns` (16 at most) of [`product_over_rows`], to `row(i)` for each of the `r` rows.
fn outer_products<'d>(
    u: &[f32],
    r: usize,
    x: &[f32],
    n: usize,
    columns: Range<usize>,
    row: impl Fn(usize) -> &'d mut [f32],
) {
    for first in (0..r).step_by(4) {
        let rows = first..(first + 4).min(r);
        let mut acc = [[0.0; WIDTH]; 4];
        if columns.len() == WIDTH && rows.len() == 4 {
            outer_product_tile(u, r, x, n, (first, columns.start), &mut acc);
        } else {
            for (u, x) in u.chunks_exact(r).zip(x.chunks_exact(n)) {
                for (acc, u) in acc.iter_mut().zip(&u[rows.clone()]) {
                    acc.iter_mut().zip(&x[columns.clone()]).for_each(|(a, x)| *a += u * x);
                }
            }
        }
        for (acc, i) in acc.iter().zip(rows) {
            row(i).copy_from_slice(&acc[..columns.len()]);
        }
    }
}

super::math::vectorized! {
    fn outer_product_tile(u: &[f32], r: usize, x: &[f32], n: usize, at: (usize, usize), acc: &mut [[f32; 16]; 4]) {
        let mut c = *acc;
        for (u, x) in u.chunks_exact(r).zip(x.chunks_exact(n)) {
            let (u, x) = (&u[at.0..at.0 + 4], &x[at.1..at.1 + 16]);
            for i in 0..4 {
                for j in 0..16 {
                    c[i][j] += u[i] * x[j];
                }
            }
        }
        *acc = c;
    }
}

/// What happens to the destination's old values in [`matmul`].
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Into {
    /// They are overwritten.
    Overwrite,
    /// The product is added to them.
    Add,
}

/// `dst (+)= factor * lhs * rhs` on the calling thread; `dst` is row-major with rows `dst_stride` apart.
///
/// # Panics
/// If shapes do not fit or a view leaves its slice.
pub(super) fn matmul(dst: &mut [f32], dst_stride: usize, lhs: Mat<'_>, rhs: Mat<'_>, factor: f32, into: Into) {
    let (m, k, n) = (lhs.rows, lhs.cols, rhs.cols);
    assert!(rhs.rows == k, "inner sizes {k} and {}", rhs.rows);
    assert!(
        lhs.fits() && rhs.fits() && fits(dst.len(), m, n, dst_stride, 1),
        "a matrix view leaves its slice"
    );
    assert!(dst_stride >= n, "rows of the destination overlap");
    #[expect(
        unsafe_code,
        reason = "gemm's interface is raw pointers; the views were checked just above"
    )]
    // SAFETY: every index that gemm touches lies inside its slice (`fits`), and `dst` is borrowed mutably, so it
    // overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            into == Into::Add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::packed::{Packed, WeightType};

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
            .collect()
    }

    #[test]
    fn packed_products_equal_the_naive_sum_at_every_edge() {
        for (m, k, n, taps) in [
            (1, 1, 1, 1),
            (6, 8, 16, 1),
            (7, 9, 17, 3),
            (200, 36, 33, 9),
            (131, 2048, 40, 4),
        ] {
            let (x, w, bias, add) = (numbers(m * k, 1), numbers(k * n, 2), numbers(n, 3), numbers(m * n, 4));
            let packed = Packed::new(Mat::rows(&w, k, n, n));
            // The transpose by taps of the matrix packed the other way round is the same matrix.
            let seg = k / taps;
            let other = Packed::with(taps * n, seg, WeightType::F32, |row| {
                let (tap, j) = (row / n, row % n);
                (Mat::rows(&w[tap * seg * n..(tap + 1) * seg * n], seg, n, n).t(), j)
            });
            let mut z = vec![0.0; m * n];
            multiply(
                &mut z,
                other.swapped(taps),
                taps,
                |i, t| &x[i * k + t * seg..i * k + (t + 1) * seg],
                Start::Row(&bias),
                Some(&add),
            );
            let mut y = vec![0.0; m * n];
            multiply(
                &mut y,
                packed.plain(),
                taps,
                |i, t| &x[i * k + t * seg..i * k + (t + 1) * seg],
                Start::Row(&bias),
                Some(&add),
            );
            for i in 0..m {
                for j in 0..n {
                    let exact: f64 = (0..k)
                        .map(|p| f64::from(x[i * k + p]) * f64::from(w[p * n + j]))
                        .sum::<f64>()
                        + f64::from(bias[j])
                        + f64::from(add[i * n + j]);
                    assert!(
                        (f64::from(y[i * n + j]) - exact).abs() < 1e-4,
                        "({m},{k},{n}) at {i},{j}"
                    );
                }
            }
            assert_eq!(y, z);
        }
    }

    #[test]
    fn products_over_rows_equal_the_naive_sum_at_every_edge() {
        for (m, r, n) in [(1, 1, 1), (7, 4, 16), (33, 9, 21), (200, 8, 160)] {
            let (u, x) = (numbers(m * r, 1), numbers(m * n, 2));
            let out = product_over_rows(&u, r, &x, n);
            for i in 0..r {
                for j in 0..n {
                    let exact: f64 = (0..m).map(|p| f64::from(u[p * r + i]) * f64::from(x[p * n + j])).sum();
                    assert!((f64::from(out[i * n + j]) - exact).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn half_weights_are_the_rounded_ones() {
        let (x, w) = (numbers(20 * 40, 1), numbers(40 * 33, 2));
        for (dtype, error) in [(WeightType::F16, 2e-3), (WeightType::Bf16, 2e-2)] {
            let pack = |dtype| Packed::with(40, 33, dtype, |p| (Mat::rows(&w, 40, 33, 33), p));
            let run = |packed: &Packed| {
                let mut y = vec![0.0; 20 * 33];
                multiply(
                    &mut y,
                    packed.plain(),
                    1,
                    |i, _| &x[i * 40..(i + 1) * 40],
                    Start::Zero,
                    None,
                );
                let mut back = vec![0.0; 20 * 40];
                multiply(
                    &mut back,
                    packed.swapped(1),
                    1,
                    |i, _| &y[i * 33..(i + 1) * 33],
                    Start::Zero,
                    None,
                );
                y.extend(back);
                y
            };
            let (exact, half) = (run(&pack(WeightType::F32)), run(&pack(dtype)));
            assert!(exact != half && exact.iter().zip(&half).all(|(a, b)| (a - b).abs() < error));
        }
    }
}
