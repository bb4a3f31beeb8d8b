//! The innermost loop of the matrix products: a tile of sums that stays in registers while a block of the inner dimension goes by.
//!
//! Chosen at run time: AVX-512 with tiles of 6 x 64, AVX2 with 6 x 16, or what the compiler makes of the baseline. Wide tiles
//! need few loads per product; one processor's 512-bit units may be no faster than two of 256 bits, but the loads are fewer
//! all the same. All of them add in the same order, and where products are fused with the sum, give the same bits.

use super::packed::WIDTH;

/// Rows of a tile.
pub(super) const HEIGHT: usize = 6;
/// Panels of a tile, at most.
pub(super) const MOST_PANELS: usize = 4;

/// The sums of a tile: row `r`, column `j` of panel `p` at `[r][16 * p + j]`.
pub(super) type Tile = [[f32; MOST_PANELS * WIDTH]; HEIGHT];

/// How the inner dimension is walked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Walk {
    /// Its length.
    pub(super) len: usize,
    /// Values from one to the next in a row.
    pub(super) row_step: usize,
    /// Values from one to the next in a panel.
    pub(super) panel_step: usize,
}

impl Walk {
    /// Rows and panels without gaps.
    pub(super) fn dense(len: usize) -> Self {
        Self {
            len,
            row_step: 1,
            panel_step: WIDTH,
        }
    }

    fn fits(&self, x: &[&[f32]], w: &[&[f32]]) -> bool {
        let last = self.len.saturating_sub(1);
        self.len == 0
            || (x.iter().all(|x| x.len() > last * self.row_step)
                && w.iter().all(|w| w.len() >= last * self.panel_step + WIDTH))
    }
}

/// Which instructions a product uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Isa {
    /// 16 products at a time.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 8 products at a time.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What every processor of this architecture has.
    Baseline,
}

impl Isa {
    /// All that this processor has, the fastest first.
    pub(super) fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let found = [
            std::is_x86_feature_detected!("avx512f").then_some(Self::Avx512),
            (std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")).then_some(Self::Avx2),
        ];
        #[cfg(not(target_arch = "x86_64"))]
        let found: [Option<Self>; 0] = [];
        found.into_iter().flatten().chain([Self::Baseline])
    }

    /// The fastest that this processor has.
    pub(super) fn best() -> Self {
        Self::available().next().unwrap_or(Self::Baseline)
    }

    /// Panels of a whole tile.
    pub(super) fn panels(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => MOST_PANELS,
            _ => 1,
        }
    }

    /// `tile[r] = x[r] * w`, plus the old `tile[r]` if `add`: `x` are the rows (6 at most), `w` the panels ([`Self::panels`] at most).
    ///
    /// # Panics
    /// If there are more, or one is too short.
    #[inline]
    pub(super) fn accumulate(self, walk: Walk, x: &[&[f32]], w: &[&[f32]], add: bool, tile: &mut Tile) {
        assert!(walk.fits(x, w), "a segment is too short");
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                #[expect(unsafe_code, reason = "calling functions compiled for a detected feature")]
                // SAFETY: the processor has AVX-512 (`available`), and the lengths were checked just above.
                unsafe {
                    match w.len() {
                        1 => x86::rows_512::<1>(walk, x, w, add, tile),
                        2 => x86::rows_512::<2>(walk, x, w, add, tile),
                        3 => x86::rows_512::<3>(walk, x, w, add, tile),
                        _ => x86::rows_512::<4>(walk, x, w, add, tile),
                    }
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                #[expect(unsafe_code, reason = "calling a function compiled for detected features")]
                // SAFETY: the processor has AVX2 and FMA (`available`), and the lengths were checked just above.
                unsafe {
                    x86::rows_256(walk, x, w[0], add, tile);
                }
            }
            // On aarch64 a fused multiply-add is an instruction of the baseline, on old x86 a slow library call.
            Self::Baseline => rows::<{ cfg!(target_arch = "aarch64") }>(walk, x, w[0], add, tile),
        }
    }
}

#[inline(always)]
fn rows<const FMA: bool>(walk: Walk, x: &[&[f32]], w: &[f32], add: bool, tile: &mut Tile) {
    match x {
        [a] => panel::<1, FMA>(walk, &[a], w, add, tile),
        [a, b] => panel::<2, FMA>(walk, &[a, b], w, add, tile),
        [a, b, c] => panel::<3, FMA>(walk, &[a, b, c], w, add, tile),
        [a, b, c, d] => panel::<4, FMA>(walk, &[a, b, c, d], w, add, tile),
        [a, b, c, d, e] => panel::<5, FMA>(walk, &[a, b, c, d, e], w, add, tile),
        [a, b, c, d, e, f] => panel::<6, FMA>(walk, &[a, b, c, d, e, f], w, add, tile),
        _ => unreachable!("a tile has one to six rows"),
    }
}

#[inline(always)]
fn panel<const M: usize, const FMA: bool>(walk: Walk, x: &[&[f32]; M], w: &[f32], add: bool, tile: &mut Tile) {
    let mut sums = [[0.0; WIDTH]; M];
    if add {
        for (sums, row) in sums.iter_mut().zip(tile.iter()) {
            sums.copy_from_slice(&row[..WIDTH]);
        }
    }
    assert!(walk.fits(x, &[w]), "a segment is too short");
    for p in 0..walk.len {
        #[expect(
            unsafe_code,
            reason = "bounds checks in the innermost loop cost a third of its speed"
        )]
        // SAFETY: `p < len`, and that many fit (asserted above).
        let (w, x): (&[f32; WIDTH], [f32; M]) = unsafe {
            (
                &*w.as_ptr().add(p * walk.panel_step).cast::<[f32; WIDTH]>(),
                std::array::from_fn(|r| *x[r].get_unchecked(p * walk.row_step)),
            )
        };
        for r in 0..M {
            for j in 0..WIDTH {
                sums[r][j] = if FMA {
                    x[r].mul_add(w[j], sums[r][j])
                } else {
                    sums[r][j] + x[r] * w[j]
                };
            }
        }
    }
    for (row, sums) in tile.iter_mut().zip(&sums) {
        row[..WIDTH].copy_from_slice(sums);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #![expect(unsafe_code, reason = "loads and stores by pointer, in the innermost loop")]
    use std::arch::x86_64::{
        _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{HEIGHT, MOST_PANELS, Tile, WIDTH, Walk};

    /// Values of a 256-bit register.
    const HALF: usize = WIDTH / 2;

    /// # Safety
    /// `walk` must fit the rows and the panel.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn rows_256(walk: Walk, x: &[&[f32]], w: &[f32], add: bool, tile: &mut Tile) {
        // SAFETY: passed on.
        unsafe {
            match x.len() {
                1 => panel::<1>(walk, x, w, add, tile),
                2 => panel::<2>(walk, x, w, add, tile),
                3 => panel::<3>(walk, x, w, add, tile),
                4 => panel::<4>(walk, x, w, add, tile),
                5 => panel::<5>(walk, x, w, add, tile),
                6 => panel::<6>(walk, x, w, add, tile),
                _ => unreachable!("a tile has one to six rows"),
            }
        }
    }

    /// By hand, since what the compiler makes of the plain loop depends on its surroundings: it has taken four times as long.
    ///
    /// # Safety
    /// As [`rows_256`]; there are `M` rows.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn panel<const M: usize>(walk: Walk, x: &[&[f32]], w: &[f32], add: bool, tile: &mut Tile) {
        const { assert!(M <= HEIGHT) };
        let mut rows = [std::ptr::null(); M];
        for (to, x) in rows.iter_mut().zip(x) {
            *to = x.as_ptr();
        }
        let column = w.as_ptr();
        // SAFETY: a tile's row holds 16 values; the rest is the caller's promise.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; M];
            if add {
                for (sums, row) in sums.iter_mut().zip(tile.iter()) {
                    *sums = [_mm256_loadu_ps(row.as_ptr()), _mm256_loadu_ps(row.as_ptr().add(HALF))];
                }
            }
            for p in 0..walk.len {
                let (row, panel) = (p * walk.row_step, column.add(p * walk.panel_step));
                let values = [_mm256_loadu_ps(panel), _mm256_loadu_ps(panel.add(HALF))];
                for r in 0..M {
                    let value = _mm256_broadcast_ss(&*rows[r].add(row));
                    sums[r][0] = _mm256_fmadd_ps(value, values[0], sums[r][0]);
                    sums[r][1] = _mm256_fmadd_ps(value, values[1], sums[r][1]);
                }
            }
            for (row, sums) in tile.iter_mut().zip(sums) {
                _mm256_storeu_ps(row.as_mut_ptr(), sums[0]);
                _mm256_storeu_ps(row.as_mut_ptr().add(HALF), sums[1]);
            }
        }
    }

    /// # Safety
    /// `walk` must fit the rows and the `P` panels.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn rows_512<const P: usize>(walk: Walk, x: &[&[f32]], w: &[&[f32]], add: bool, tile: &mut Tile) {
        assert!(w.len() == P && P <= MOST_PANELS, "a tile has one to four panels");
        // SAFETY: passed on.
        unsafe {
            match x.len() {
                1 => panels::<1, P>(walk, x, w, add, tile),
                2 => panels::<2, P>(walk, x, w, add, tile),
                3 => panels::<3, P>(walk, x, w, add, tile),
                4 => panels::<4, P>(walk, x, w, add, tile),
                5 => panels::<5, P>(walk, x, w, add, tile),
                6 => panels::<6, P>(walk, x, w, add, tile),
                _ => unreachable!("a tile has one to six rows"),
            }
        }
    }

    /// # Safety
    /// As [`rows_512`]; there are `M` rows.
    #[target_feature(enable = "avx512f")]
    unsafe fn panels<const M: usize, const P: usize>(
        walk: Walk,
        x: &[&[f32]],
        w: &[&[f32]],
        add: bool,
        tile: &mut Tile,
    ) {
        const { assert!(M <= HEIGHT && P <= MOST_PANELS) };
        // Loops in place of `from_fn`, whose closures are not inlined into a function of other features.
        let (mut rows, mut columns) = ([std::ptr::null(); M], [std::ptr::null(); P]);
        for (to, x) in rows.iter_mut().zip(x) {
            *to = x.as_ptr();
        }
        for (to, w) in columns.iter_mut().zip(w) {
            *to = w.as_ptr();
        }
        // SAFETY: a tile's row holds `P` times 16 values; the rest is the caller's promise.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); P]; M];
            if add {
                for (sums, row) in sums.iter_mut().zip(tile.iter()) {
                    for (q, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_loadu_ps(row.as_ptr().add(q * WIDTH));
                    }
                }
            }
            for p in 0..walk.len {
                let (row, panel) = (p * walk.row_step, p * walk.panel_step);
                let mut values = [_mm512_setzero_ps(); P];
                for q in 0..P {
                    values[q] = _mm512_loadu_ps(columns[q].add(panel));
                }
                for r in 0..M {
                    let value = _mm512_set1_ps(*rows[r].add(row));
                    for q in 0..P {
                        sums[r][q] = _mm512_fmadd_ps(value, values[q], sums[r][q]);
                    }
                }
            }
            for (row, sums) in tile.iter_mut().zip(sums) {
                for (q, sum) in sums.into_iter().enumerate() {
                    _mm512_storeu_ps(row.as_mut_ptr().add(q * WIDTH), sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, factor: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + 1.0) * factor).sin()).collect()
    }

    /// `x w` of `m` rows and `count` panels by one form, the second half of the inner dimension added to the first.
    fn product(isa: Isa, (m, count, len): (usize, usize, usize), row_step: usize, panel_step: usize) -> Vec<f32> {
        let (x, w) = (
            numbers(m + len * row_step * m, 0.37),
            numbers(len * panel_step + 64, 0.11),
        );
        let mut out = vec![0.0; m * count * WIDTH];
        for first in (0..count).step_by(isa.panels()) {
            let mut tile: Tile = [[f32::NAN; MOST_PANELS * WIDTH]; HEIGHT];
            let n = isa.panels().min(count - first);
            for (part, add) in [(0..len / 2, false), (len / 2..len, true)] {
                let walk = Walk {
                    len: part.len(),
                    row_step,
                    panel_step,
                };
                let rows: Vec<&[f32]> = (0..m).map(|r| &x[r * len + part.start * row_step..]).collect();
                let panels: Vec<&[f32]> = (first..first + n)
                    .map(|p| &w[p * WIDTH + part.start * panel_step..])
                    .collect();
                isa.accumulate(walk, &rows, &panels, add, &mut tile);
            }
            for (row, out) in tile.iter().zip(out.chunks_exact_mut(count * WIDTH)) {
                out[first * WIDTH..(first + n) * WIDTH].copy_from_slice(&row[..n * WIDTH]);
            }
        }
        out
    }

    #[test]
    fn every_form_of_the_kernel_gives_the_same_sums_and_those_that_fuse_the_same_bits() {
        for sizes in [(1, 1, 2), (2, 4, 9), (3, 3, 16), (4, 2, 40), (5, 4, 7), (6, 4, 384)] {
            for (row_step, panel_step) in [(1, WIDTH), (3, 64)] {
                let products: Vec<(Isa, Vec<f32>)> = Isa::available()
                    .map(|isa| (isa, product(isa, sizes, row_step, panel_step)))
                    .collect();
                for pair in products.windows(2) {
                    let [(a, x), (b, y)] = pair else { continue };
                    assert_eq!(x.len(), sizes.0 * sizes.1 * WIDTH);
                    let fused = *b != Isa::Baseline || cfg!(target_arch = "aarch64");
                    assert!(!fused || x == y, "{a:?} and {b:?}, {sizes:?}");
                    assert!(
                        x.iter().zip(y).all(|(x, y)| (x - y).abs() < 1e-3),
                        "{a:?} and {b:?}, {sizes:?}"
                    );
                }
            }
        }
    }
}
