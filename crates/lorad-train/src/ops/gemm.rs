//! Matrix products of the CPU ops: rows that lie anywhere times a frozen matrix packed once.
//!
//! A kernel ([`super::kernel`]) keeps a tile of sums in registers and walks a block of the inner dimension; the block's weights,
//! unpacked where they are transposed or half ([`super::packed`]), and the rows that meet them stay in the caches. Its left operand is
//! given as *segments*: the caller says where the values of (row, tap) lie. A linear layer has one tap; a convolution has
//! one per kernel position and points into the picture (or at zeros), so that no patch matrix is ever built. This is the
//! "indirect convolution" of Dukhan 2019 (arXiv:1907.02129).
//!
//! Every value is summed in the order of the inner dimension by one thread: results do not depend on the thread count, nor on
//! how wide the processor's registers are.
//! Attention's small products are made of [`tiles`] on the thread that asks.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    buffer::room,
    kernel::{HEIGHT, Isa, MOST_PANELS, Tile, Walk},
    packed::{Operand, Packed, Panels, WIDTH},
};

/// Inner length walked per tile before moving on: the weights of a tile's panels (24 to 96 KB) and the rows of a task (720 KB at
/// most) stay in the second-level cache.
const DEPTH: usize = 384;
/// Rows per task when there are many: each task unpacks the weights that it reads for itself.
const ROWS_PER_TASK: usize = 480;

/// What the product is added to.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// Nothing.
    Zero,
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
    pub(super) fn combine(&self, out: &mut [f32], acc: &[f32], row: usize, width: usize, first: usize) {
        let n = out.len();
        match self {
            Start::Zero => out.copy_from_slice(&acc[..n]),
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

/// A second product into the same destination, of a small inner dimension: an adapter's.
#[derive(Clone, Copy)]
pub(super) struct Beside<'a> {
    /// `(rows, weights' depth)`.
    pub(super) rows: &'a [f32],
    /// As wide as the destination.
    pub(super) weights: &'a Packed,
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
    multiply_beside(dst, weights, taps, segment, start, add, None);
}

/// [`multiply`], plus the product `beside` in the same pass.
///
/// # Panics
/// As [`multiply`], and if `beside` does not fit.
pub(super) fn multiply_beside<'a>(
    dst: &mut [f32],
    weights: Operand<'_>,
    taps: usize,
    segment: impl Fn(usize, usize) -> &'a [f32] + Sync,
    start: Start<'_>,
    add: Option<&[f32]>,
    beside: Option<Beside<'_>>,
) {
    let (depth, width) = (weights.depth(), weights.width());
    if width == 0 || dst.is_empty() {
        return;
    }
    let rows = dst.len() / width;
    assert!(dst.len() == rows * width && depth.is_multiple_of(taps));
    assert!(add.is_none_or(|a| a.len() == dst.len()));
    assert!(beside.is_none_or(|b| {
        let other = b.weights.plain();
        other.width() == width && b.rows.len() == rows * other.depth()
    }));
    let job = Job {
        isa: Isa::best(),
        weights,
        width,
        taps,
        segment_len: depth / taps,
        segment: &segment,
        start,
        add,
        beside,
        dst: Destination::new(dst),
    };
    job.share(rows, depth);
}

struct Job<'j, S> {
    isa: Isa,
    weights: Operand<'j>,
    width: usize,
    taps: usize,
    segment_len: usize,
    segment: &'j S,
    start: Start<'j>,
    add: Option<&'j [f32]>,
    beside: Option<Beside<'j>>,
    dst: Destination,
}

impl<'a, S: Fn(usize, usize) -> &'a [f32] + Sync> Job<'_, S> {
    /// Runs the product in tasks.
    fn share(&self, rows: usize, depth: usize) {
        let panels = self.width.div_ceil(WIDTH);
        let threads = rayon::current_num_threads();
        // Below about 200 000 multiplications waking a thread costs more than it brings.
        if threads == 1 || rows * self.width * depth < 200_000 {
            for first in (0..rows).step_by(ROWS_PER_TASK) {
                self.run(first..(first + ROWS_PER_TASK).min(rows), 0..panels);
            }
            return;
        }
        // Columns are split before rows: a task reads its weights once, however many its rows.
        let tiles = rows.div_ceil(HEIGHT);
        let groups = panels.div_ceil(self.isa.panels());
        let wanted = 4 * threads;
        let row_tasks = rows
            .div_ceil(ROWS_PER_TASK)
            .max((wanted / 2).div_ceil(groups).min(tiles));
        let rows_per = tiles.div_ceil(row_tasks) * HEIGHT;
        let panel_tasks = wanted.div_ceil(rows.div_ceil(rows_per)).min(groups);
        let panels_per = groups.div_ceil(panel_tasks) * self.isa.panels();
        let panel_tasks = panels.div_ceil(panels_per);
        (0..rows.div_ceil(rows_per) * panel_tasks)
            .into_par_iter()
            .for_each(|task| {
                let (r, p) = (task / panel_tasks * rows_per, task % panel_tasks * panels_per);
                self.run(r..(r + rows_per).min(rows), p..(p + panels_per).min(panels));
            });
    }

    fn run(&self, rows: Range<usize>, panels: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma")]
            fn wide<'a, S: Fn(usize, usize) -> &'a [f32] + Sync>(
                job: &Job<'_, S>,
                rows: Range<usize>,
                panels: Range<usize>,
            ) {
                job.blocks(rows, panels);
            }
            if self.isa != Isa::Baseline {
                #[expect(
                    unsafe_code,
                    reason = "calling a function compiled for features that were just detected"
                )]
                // SAFETY: the processor has AVX2 and FMA, as every one with AVX-512 does.
                unsafe {
                    return wide(self, rows, panels);
                }
            }
        }
        self.blocks(rows, panels);
    }

    #[inline(always)]
    fn blocks(&self, rows: Range<usize>, panels: Range<usize>) {
        let segment_len = self.segment_len;
        // A block is several whole taps, or a part of one.
        let (taps_per, part) = if segment_len <= DEPTH {
            ((DEPTH / segment_len.max(1)).clamp(1, self.taps), segment_len)
        } else {
            let parts = segment_len.div_ceil(DEPTH);
            (1, segment_len.div_ceil(parts).next_multiple_of(WIDTH))
        };
        let group = self.isa.panels();
        let mut scratch = self.weights.scratch(group * taps_per * part * WIDTH);
        let mut sums: Tile = [[0.0; MOST_PANELS * WIDTH]; HEIGHT];
        for first_tap in (0..self.taps).step_by(taps_per) {
            let taps = first_tap..(first_tap + taps_per).min(self.taps);
            for from in (0..segment_len).step_by(part.max(1)) {
                let inner = from..(from + part).min(segment_len);
                for first in panels.clone().step_by(group) {
                    let panels = first..(first + group).min(panels.end);
                    let block = Block {
                        weights: self.weights.blocks(
                            panels.clone(),
                            taps.clone(),
                            segment_len,
                            inner.clone(),
                            &mut scratch,
                        ),
                        panels,
                        taps: taps.clone(),
                        inner: inner.clone(),
                    };
                    for row in rows.clone().step_by(HEIGHT) {
                        self.tile(row..(row + HEIGHT).min(rows.end), &block, &mut sums);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn tile(&self, rows: Range<usize>, block: &Block<'_>, sums: &mut Tile) {
        let (width, m, count) = (self.width, rows.len(), block.panels.len());
        let first = block.panels.start * WIDTH;
        let n = (count * WIDTH).min(width - first);
        let size = block.inner.len() * WIDTH;
        let is_first = block.taps.start == 0 && block.inner.start == 0;
        let mut add = false;
        if let Some(Beside { rows: values, weights }) = self.beside.filter(|_| is_first) {
            let depth = weights.plain().depth();
            let w = weights
                .plain()
                .blocks(block.panels.clone(), 0..1, depth, 0..depth, &mut []);
            let mut x: [&[f32]; HEIGHT] = [&[]; HEIGHT];
            for (x, row) in x.iter_mut().zip(rows.clone()) {
                *x = &values[row * depth..(row + 1) * depth];
            }
            self.isa
                .accumulate(Walk::dense(depth), &x[..m], &w[..count], false, sums);
            add = true;
        }
        for (i, tap) in block.taps.clone().enumerate() {
            let (mut x, mut w): ([&[f32]; HEIGHT], [&[f32]; MOST_PANELS]) = ([&[]; HEIGHT], [&[]; MOST_PANELS]);
            for (x, row) in x.iter_mut().zip(rows.clone()) {
                *x = &(self.segment)(row, tap)[block.inner.clone()];
            }
            for (w, panel) in w[..count].iter_mut().zip(&block.weights) {
                *w = &panel[i * size..(i + 1) * size];
            }
            let walk = Walk::dense(block.inner.len());
            self.isa.accumulate(walk, &x[..m], &w[..count], add, sums);
            add = true;
        }
        for (row, sums) in rows.zip(sums.iter()) {
            let at = row * width + first;
            let out = self.dst.slice(at, n);
            if !is_first {
                out.iter_mut().zip(sums).for_each(|(o, a)| *o += a);
                continue;
            }
            self.start.combine(out, sums, row, width, first);
            if let Some(add) = self.add {
                out.iter_mut().zip(&add[at..at + n]).for_each(|(o, a)| *o += a);
            }
        }
    }
}

/// A share of the weights: rows `inner` of `taps`, columns of `panels`.
struct Block<'b> {
    panels: Range<usize>,
    taps: Range<usize>,
    inner: Range<usize>,
    /// Per panel `(taps * inner, 16)`.
    weights: [&'b [f32]; MOST_PANELS],
}

#[inline(always)]
fn add_into(out: &mut [f32], acc: &[f32], start: &[f32]) {
    for ((o, a), s) in out.iter_mut().zip(acc).zip(start) {
        *o = s + a;
    }
}

/// `uᵀ x`: `(r, n)` from `u` (m, r) and `x` (m, n), both row-major, each value summed in the order of the rows.
pub(super) fn product_over_rows(u: &[f32], r: usize, x: &[f32], n: usize) -> Vec<f32> {
    let m = u.len() / r.max(1);
    assert!(u.len() == m * r && x.len() == m * n);
    let mut out = room(r * n);
    let destination = Destination::new(&mut out);
    let isa = Isa::best();
    let columns_per = isa.panels() * WIDTH;
    let work = |group: usize| {
        let columns = group * columns_per..n.min((group + 1) * columns_per);
        outer_products(isa, u, r, x, n, columns, &destination);
    };
    let groups = n.div_ceil(columns_per);
    if m * r * n < 200_000 {
        (0..groups).for_each(work);
    } else {
        (0..groups).into_par_iter().for_each(work);
    }
    out
}

/// Columns `columns` of [`product_over_rows`].
fn outer_products(isa: Isa, u: &[f32], r: usize, x: &[f32], n: usize, columns: Range<usize>, out: &Destination) {
    let m = u.len() / r.max(1);
    let walk = Walk {
        len: m,
        row_step: r,
        panel_step: n,
    };
    let whole = columns.len() / WIDTH;
    let rest = columns.start + whole * WIDTH..columns.end;
    let panels: [&[f32]; MOST_PANELS] = std::array::from_fn(|p| {
        if p < whole {
            &x[columns.start + p * WIDTH..]
        } else {
            &[]
        }
    });
    let mut sums: Tile = [[0.0; MOST_PANELS * WIDTH]; HEIGHT];
    for first in (0..r).step_by(4) {
        let rows = first..(first + 4).min(r);
        if whole > 0 {
            let values: [&[f32]; 4] = std::array::from_fn(|i| &u[(first + i).min(r - 1)..]);
            isa.accumulate(walk, &values[..rows.len()], &panels[..whole], false, &mut sums);
            for (i, sums) in rows.clone().zip(&sums) {
                let out = out.slice(i * n + columns.start, whole * WIDTH);
                out.copy_from_slice(&sums[..whole * WIDTH]);
            }
        }
        for i in rows {
            let out = out.slice(i * n + rest.start, rest.len());
            out.fill(0.0);
            for (u, x) in u.chunks_exact(r).zip(x.chunks_exact(n)) {
                out.iter_mut().zip(&x[rest.clone()]).for_each(|(o, x)| *o += u[i] * x);
            }
        }
    }
}

/// `rows` rows times `panels`, on the calling thread: `store(row, first column, sums)` for each row of each tile.
pub(super) fn tiles<'a>(
    walk: Walk,
    rows: usize,
    row: impl Fn(usize) -> &'a [f32],
    panels: Panels<'_>,
    store: &mut impl FnMut(usize, usize, &[f32]),
) {
    let isa = Isa::best();
    let mut sums: Tile = [[0.0; MOST_PANELS * WIDTH]; HEIGHT];
    for first in (0..panels.count).step_by(isa.panels()) {
        let count = isa.panels().min(panels.count - first);
        let mut w: [&[f32]; MOST_PANELS] = [&[]; MOST_PANELS];
        for (p, w) in w[..count].iter_mut().enumerate() {
            *w = &panels.values[(first + p) * panels.distance..];
        }
        for start in (0..rows).step_by(HEIGHT) {
            let m = HEIGHT.min(rows - start);
            let mut x: [&[f32]; HEIGHT] = [&[]; HEIGHT];
            x[..m].iter_mut().enumerate().for_each(|(r, x)| *x = row(start + r));
            isa.accumulate(walk, &x[..m], &w[..count], false, &mut sums);
            for (r, sums) in sums[..m].iter().enumerate() {
                store(start + r, first * WIDTH, &sums[..count * WIDTH]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::packed::{Mat, WeightType};

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
