//! Matrix products of the CPU ops: rows that lie anywhere times a frozen matrix packed once.
//!
//! The kernel keeps a tile of 6 rows by 16 columns in registers and walks the inner dimension once. Its left operand is
//! given as *segments*: the caller says where the values of (row, tap) lie. A linear layer has one tap; a convolution has
//! one per kernel position and points into the picture (or at zeros), so that no patch matrix is ever built. This is the
//! "indirect convolution" of Dukhan 2019 (arXiv:1907.02129).
//!
//! Every value is summed in the order of the inner dimension by one thread: results do not depend on the thread count.
//! The other operand shapes (attention, adapters) go through the `gemm` crate in [`matmul`].

use rayon::prelude::*;

/// Columns of a tile: two AVX2 registers.
const WIDTH: usize = 16;
/// Rows of a tile: 6 x 2 accumulators, leaving registers for the operands.
const HEIGHT: usize = 6;
/// Bytes of packed weights walked per tile before moving on: a share of the second-level cache.
const BLOCK_BYTES: usize = 192 << 10;
/// Rows per task when there are many.
const ROWS_PER_TASK: usize = 96;

/// A read-only matrix view: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix whose rows lie `row_stride` apart.
    pub(super) fn rows(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// Its transpose.
    pub(super) fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    fn fits(&self) -> bool {
        fits(self.data.len(), self.rows, self.cols, self.row_stride, self.col_stride)
    }
}

fn fits(len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> bool {
    rows == 0 || cols == 0 || (rows - 1) * row_stride + (cols - 1) * col_stride < len
}

/// A matrix `(depth, width)` as panels of 16 columns, each `(depth, 16)` row-major; the last one padded with zeros.
#[derive(Debug, Default)]
pub(super) struct Packed {
    depth: usize,
    width: usize,
    panels: Vec<f32>,
}

impl Packed {
    /// Packs `matrix` (depth, width).
    pub(super) fn new(matrix: Mat<'_>) -> Self {
        assert!(matrix.fits(), "a matrix view leaves its slice");
        let (depth, width) = (matrix.rows, matrix.cols);
        let mut panels = vec![0.0; width.div_ceil(WIDTH) * depth * WIDTH];
        let pack = |(index, panel): (usize, &mut [f32])| {
            let first = index * WIDTH;
            let n = WIDTH.min(width - first);
            for (p, row) in panel.chunks_exact_mut(WIDTH).enumerate() {
                let start = p * matrix.row_stride + first * matrix.col_stride;
                if matrix.col_stride == 1 {
                    row[..n].copy_from_slice(&matrix.data[start..start + n]);
                } else {
                    for (j, v) in row[..n].iter_mut().enumerate() {
                        *v = matrix.data[start + j * matrix.col_stride];
                    }
                }
            }
        };
        if panels.len() < 1 << 15 {
            panels
                .chunks_exact_mut((depth * WIDTH).max(1))
                .enumerate()
                .for_each(pack);
        } else {
            panels.par_chunks_exact_mut(depth * WIDTH).enumerate().for_each(pack);
        }
        Self { depth, width, panels }
    }

    /// Inner dimension.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// Columns of the product.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Element `(i, j)`.
    pub(super) fn get(&self, i: usize, j: usize) -> f32 {
        self.panels[(j / WIDTH * self.depth + i) * WIDTH + j % WIDTH]
    }
}

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

/// A raw view of the destination that tasks write disjoint tiles of.
#[derive(Clone, Copy)]
struct Destination {
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
    /// The `n` values from `at`.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, unsafe_code, reason = "see the impls of Send and Sync")]
    fn slice(&self, at: usize, n: usize) -> &mut [f32] {
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
    weights: &Packed,
    taps: usize,
    segment: impl Fn(usize, usize) -> &'a [f32] + Sync,
    start: Start<'_>,
    add: Option<&[f32]>,
) {
    let width = weights.width;
    if width == 0 || dst.is_empty() {
        return;
    }
    let rows = dst.len() / width;
    assert!(dst.len() == rows * width && weights.depth.is_multiple_of(taps));
    assert!(add.is_none_or(|a| a.len() == dst.len()));
    let job = Job {
        weights,
        taps,
        segment: &segment,
        start,
        add,
        dst: Destination {
            data: dst.as_mut_ptr(),
            len: dst.len(),
        },
    };
    let panels = width.div_ceil(WIDTH);
    let threads = rayon::current_num_threads();
    // Below about 200 000 multiplications waking a thread costs more than it brings.
    if threads == 1 || rows * width * weights.depth < 200_000 {
        return job.run(0..rows, 0..panels);
    }
    let tiles = rows.div_ceil(HEIGHT);
    let row_tasks = (tiles.div_ceil(ROWS_PER_TASK / HEIGHT)).max(tiles.min(2 * threads));
    let rows_per = tiles.div_ceil(row_tasks) * HEIGHT;
    let row_tasks = rows.div_ceil(rows_per);
    let panel_tasks = (2 * threads).div_ceil(row_tasks).min(panels);
    let panels_per = panels.div_ceil(panel_tasks);
    let panel_tasks = panels.div_ceil(panels_per);
    (0..row_tasks * panel_tasks).into_par_iter().for_each(|task| {
        let (r, p) = (task / panel_tasks * rows_per, task % panel_tasks * panels_per);
        job.run(r..(r + rows_per).min(rows), p..(p + panels_per).min(panels));
    });
}

struct Job<'j, S> {
    weights: &'j Packed,
    taps: usize,
    segment: &'j S,
    start: Start<'j>,
    add: Option<&'j [f32]>,
    dst: Destination,
}

impl<'a, S: Fn(usize, usize) -> &'a [f32] + Sync> Job<'_, S> {
    fn run(&self, rows: std::ops::Range<usize>, panels: std::ops::Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma")]
            fn fused<'a, S: Fn(usize, usize) -> &'a [f32] + Sync>(
                job: &Job<'_, S>,
                rows: std::ops::Range<usize>,
                panels: std::ops::Range<usize>,
            ) {
                job.tiles::<true>(rows, panels);
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
        self.tiles::<{ cfg!(target_arch = "aarch64") }>(rows, panels);
    }

    #[inline(always)]
    fn tiles<const FMA: bool>(&self, rows: std::ops::Range<usize>, panels: std::ops::Range<usize>) {
        let segment_len = self.weights.depth / self.taps;
        let taps_per_block = (BLOCK_BYTES / (segment_len.max(1) * WIDTH * 4)).clamp(1, self.taps);
        for first_tap in (0..self.taps).step_by(taps_per_block) {
            let taps = first_tap..(first_tap + taps_per_block).min(self.taps);
            for panel in panels.clone() {
                let mut row = rows.start;
                while row + HEIGHT <= rows.end {
                    self.tile::<HEIGHT, FMA>(row, panel, taps.clone());
                    row += HEIGHT;
                }
                match rows.end - row {
                    1 => self.tile::<1, FMA>(row, panel, taps.clone()),
                    2 => self.tile::<2, FMA>(row, panel, taps.clone()),
                    3 => self.tile::<3, FMA>(row, panel, taps.clone()),
                    4 => self.tile::<4, FMA>(row, panel, taps.clone()),
                    5 => self.tile::<5, FMA>(row, panel, taps.clone()),
                    _ => {}
                }
            }
        }
    }

    #[inline(always)]
    fn tile<const M: usize, const FMA: bool>(&self, row: usize, panel: usize, taps: std::ops::Range<usize>) {
        let (depth, width) = (self.weights.depth, self.weights.width);
        let segment_len = depth / self.taps;
        let weights = &self.weights.panels[panel * depth * WIDTH..(panel + 1) * depth * WIDTH];
        let first = panel * WIDTH;
        let n = WIDTH.min(width - first);
        let mut acc = [[0.0_f32; WIDTH]; M];
        for tap in taps.clone() {
            let x: [&[f32]; M] = std::array::from_fn(|r| &(self.segment)(row + r, tap)[..segment_len]);
            let w = &weights[tap * segment_len * WIDTH..(tap + 1) * segment_len * WIDTH];
            accumulate::<M, FMA>(&x, w, &mut acc);
        }
        for (r, acc) in acc.iter().enumerate() {
            let at = (row + r) * width + first;
            let out = self.dst.slice(at, n);
            if taps.start > 0 {
                out.iter_mut().zip(acc).for_each(|(o, a)| *o += a);
                continue;
            }
            match self.start {
                Start::Zero => out.copy_from_slice(&acc[..n]),
                Start::Old => out.iter_mut().zip(acc).for_each(|(o, a)| *o += a),
                Start::Row(bias) => add_into(out, acc, &bias[first..first + n]),
                Start::PerGroup { values, rows_per } => {
                    let from = (row + r) / rows_per * width + first;
                    add_into(out, acc, &values[from..from + n]);
                }
            }
            if let Some(add) = self.add {
                out.iter_mut().zip(&add[at..at + n]).for_each(|(o, a)| *o += a);
            }
        }
    }
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
            let mut y = vec![0.0; m * n];
            let seg = k / taps;
            multiply(
                &mut y,
                &packed,
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
            assert_eq!(packed.get(k - 1, n - 1), w[k * n - 1]);
        }
    }

    #[test]
    fn a_transposed_view_packs_like_the_transposed_matrix() {
        let w = numbers(5 * 7, 9);
        let t: Vec<f32> = (0..35).map(|i| w[i % 5 * 7 + i / 5]).collect();
        assert_eq!(
            Packed::new(Mat::rows(&w, 5, 7, 7).t()).panels,
            Packed::new(Mat::rows(&t, 7, 5, 5)).panels
        );
    }
}
