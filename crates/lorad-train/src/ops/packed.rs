//! Frozen matrices as the products read them: packed once, used forward and, transposed block by block, backward.

use std::ops::Range;

use candle_core::DType;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::{buffer::room, kernel::MOST_PANELS};

/// Columns of a panel: two AVX2 registers.
pub(super) const WIDTH: usize = 16;

/// How frozen weights are held. Products are always computed in f32; half weights are widened block by block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightType {
    /// 4 bytes a value, as read.
    #[default]
    F32,
    /// 2 bytes a value: 11 significant bits, up to 65504.
    F16,
    /// 2 bytes a value: 8 significant bits, the range of f32.
    Bf16,
}

impl WeightType {
    /// The values that a weight has when it is held so.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn round(self, weight: &candle_core::Tensor) -> candle_core::Result<candle_core::Tensor> {
        weight.to_dtype(self.on_devices())?.to_dtype(DType::F32)
    }

    /// Of a value.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The type of the tensor on a device other than the CPU.
    pub(super) fn on_devices(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// A read-only matrix view: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
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
}

/// Panels of 16 columns as the kernels walk them.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub(super) values: &'a [f32],
    pub(super) count: usize,
    /// Values from the start of one to the start of the next.
    pub(super) distance: usize,
}

#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// A matrix `(depth, width)` as panels of 16 columns, each `(depth, 16)` row-major; the last one padded with zeros.
#[derive(Debug)]
pub(super) struct Packed {
    depth: usize,
    width: usize,
    values: Values,
}

impl Default for Packed {
    fn default() -> Self {
        Self {
            depth: 0,
            width: 0,
            values: Values::F32(Vec::new()),
        }
    }
}

impl Packed {
    /// Packs `matrix` (depth, width) in f32.
    pub(super) fn new(matrix: Mat<'_>) -> Self {
        Self::with(matrix.rows, matrix.cols, WeightType::F32, |p| (matrix, p))
    }

    /// Packs a matrix whose row `p` is row `at(p).1` of `at(p).0`: so that a kernel's taps can be put first on the way.
    ///
    /// # Panics
    /// If a row leaves its view.
    pub(super) fn with<'a>(
        depth: usize,
        width: usize,
        dtype: WeightType,
        at: impl Fn(usize) -> (Mat<'a>, usize) + Sync,
    ) -> Self {
        let panels = width.div_ceil(WIDTH);
        let fill = |index: usize, panel: &mut [f32]| {
            let first = index * WIDTH;
            let n = WIDTH.min(width - first);
            for (p, row) in panel.chunks_exact_mut(WIDTH).enumerate() {
                let (matrix, i) = at(p);
                let start = i * matrix.row_stride + first * matrix.col_stride;
                if matrix.col_stride == 1 {
                    row[..n].copy_from_slice(&matrix.data[start..start + n]);
                } else {
                    for (j, v) in row[..n].iter_mut().enumerate() {
                        *v = matrix.data[start + j * matrix.col_stride];
                    }
                }
            }
        };
        let size = depth * WIDTH;
        let halves = |index: usize| {
            let mut panel = vec![0.0; size];
            fill(index, &mut panel);
            panel
        };
        let values = match dtype {
            WeightType::F32 => {
                let mut values = vec![0.0; panels * size];
                let parts = values.par_chunks_exact_mut(size.max(1)).enumerate();
                // Waking a thread costs more than packing an adapter.
                let at_least = (1_usize << 15).div_ceil(size.max(1));
                parts.with_min_len(at_least).for_each(|(i, panel)| fill(i, panel));
                Values::F32(values)
            }
            WeightType::F16 => {
                let mut values = vec![f16::ZERO; panels * size];
                let parts = values.par_chunks_exact_mut(size.max(1)).enumerate();
                parts.for_each(|(i, panel)| panel.convert_from_f32_slice(&halves(i)));
                Values::F16(values)
            }
            WeightType::Bf16 => {
                let mut values = vec![bf16::ZERO; panels * size];
                let parts = values.par_chunks_exact_mut(size.max(1)).enumerate();
                parts.for_each(|(i, panel)| panel.convert_from_f32_slice(&halves(i)));
                Values::Bf16(values)
            }
        };
        Self { depth, width, values }
    }

    /// The panels of a matrix in f32.
    ///
    /// # Panics
    /// If it is held in half.
    pub(super) fn panels(&self) -> Panels<'_> {
        let Values::F32(values) = &self.values else {
            unreachable!("panels of a matrix that was not packed in f32")
        };
        Panels {
            values,
            count: self.width.div_ceil(WIDTH),
            distance: self.depth * WIDTH,
        }
    }

    /// The matrix as it is.
    pub(super) fn plain(&self) -> Operand<'_> {
        Operand::Plain(self)
    }

    /// The matrix `(taps * k, n)` as `(taps * n, k)`, each tap transposed.
    pub(super) fn swapped(&self, taps: usize) -> Operand<'_> {
        Operand::Swapped(self, taps)
    }

    /// The values from `at` on, in f32.
    #[inline(always)]
    fn widen(&self, at: usize, out: &mut [f32]) {
        let n = out.len();
        match &self.values {
            Values::F32(v) => out.copy_from_slice(&v[at..at + n]),
            Values::F16(v) => widen_halves(&v[at..at + n], out),
            Values::Bf16(v) => {
                for (o, v) in out.iter_mut().zip(&v[at..at + n]) {
                    *o = f32::from_bits(u32::from(v.to_bits()) << 16);
                }
            }
        }
    }
}

impl Packed {
    /// Rows `columns` (16 at most) of the 16 columns whose first row is at `from`, transposed: `(n, 16)`, missing ones zero.
    #[inline(always)]
    fn turn(&self, from: usize, columns: Range<usize>, out: &mut [f32]) {
        let at = from + columns.start * WIDTH;
        let next = at + self.depth * WIDTH;
        let mut square = [0.0; WIDTH * WIDTH];
        if columns.len() == WIDTH && out.len() == WIDTH * WIDTH {
            match &self.values {
                Values::F32(v) => {
                    prefetch(v, next);
                    transpose(&v[at..at + WIDTH * WIDTH], out);
                }
                Values::F16(v) => {
                    prefetch(v, next);
                    widen_halves(&v[at..at + WIDTH * WIDTH], &mut square);
                    transpose(&square, out);
                }
                Values::Bf16(v) => {
                    prefetch(v, next);
                    self.widen(at, &mut square);
                    transpose(&square, out);
                }
            }
            return;
        }
        let mut turned = [0.0; WIDTH * WIDTH];
        self.widen(at, &mut square[..columns.len() * WIDTH]);
        transpose(&square, &mut turned);
        out.copy_from_slice(&turned[..out.len()]);
    }
}

/// The right operand of a product.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a> {
    /// A packed matrix.
    Plain(&'a Packed),
    /// Its transpose by taps.
    Swapped(&'a Packed, usize),
    /// Panels of `(depth, 16)` that were made for one product.
    Panels {
        /// `(panels, depth, 16)`.
        values: &'a [f32],
        /// Inner dimension.
        depth: usize,
        /// Columns.
        width: usize,
    },
}

impl<'a> Operand<'a> {
    /// Inner dimension.
    pub(super) fn depth(&self) -> usize {
        match self {
            Self::Plain(packed) => packed.depth,
            Self::Swapped(packed, taps) => taps * packed.width,
            Self::Panels { depth, .. } => *depth,
        }
    }

    /// Columns of the product.
    pub(super) fn width(&self) -> usize {
        match self {
            Self::Plain(packed) => packed.width,
            Self::Swapped(packed, taps) => packed.depth / taps,
            Self::Panels { width, .. } => *width,
        }
    }

    /// Room for [`Self::blocks`] of `len` values, if it needs any.
    pub(super) fn scratch(&self, len: usize) -> Vec<f32> {
        match self {
            Self::Panels { .. } => Vec::new(),
            Self::Plain(packed) if matches!(packed.values, Values::F32(_)) => Vec::new(),
            _ => room(len),
        }
    }

    /// Rows `rows` of each tap of `taps` in each panel of `panels` (4 at most), as `(taps * rows, 16)` per panel: in place where
    /// they lie so, else in `scratch`. `segment` is the rows of a whole tap; of several taps, all rows are given; `rows.start`
    /// is a multiple of 16.
    #[inline(always)]
    pub(super) fn blocks<'s>(
        &self,
        panels: Range<usize>,
        taps: Range<usize>,
        segment: usize,
        rows: Range<usize>,
        scratch: &'s mut [f32],
    ) -> [&'s [f32]; MOST_PANELS]
    where
        'a: 's,
    {
        let n = taps.len() * rows.len() * WIDTH;
        let depth = self.depth();
        let at = |panel: usize| (panel * depth + taps.start * segment + rows.start) * WIDTH;
        let mut found: [&[f32]; MOST_PANELS] = [&[]; MOST_PANELS];
        match *self {
            Self::Panels { values, .. } => {
                found
                    .iter_mut()
                    .zip(panels)
                    .for_each(|(f, p)| *f = &values[at(p)..at(p) + n]);
                return found;
            }
            Self::Plain(packed) => {
                if let Values::F32(v) = &packed.values {
                    found
                        .iter_mut()
                        .zip(panels)
                        .for_each(|(f, p)| *f = &v[at(p)..at(p) + n]);
                    return found;
                }
                for (panel, out) in panels.zip(scratch.chunks_exact_mut(n.max(1))) {
                    packed.widen(at(panel), out);
                }
            }
            Self::Swapped(packed, of) => {
                let k = packed.depth / of;
                let mut first = 0;
                for tap in taps {
                    for start in rows.clone().step_by(WIDTH) {
                        let count = WIDTH.min(rows.end - start) * WIDTH;
                        let from = (start / WIDTH * packed.depth + tap * k) * WIDTH;
                        // What is read for one panel after the other lies side by side.
                        for (panel, out) in panels.clone().zip(scratch.chunks_exact_mut(n.max(1))) {
                            let columns = panel * WIDTH..k.min((panel + 1) * WIDTH);
                            packed.turn(from, columns, &mut out[first..first + count]);
                        }
                        first += count;
                    }
                }
            }
        }
        found
            .iter_mut()
            .zip(scratch.chunks_exact(n.max(1)))
            .for_each(|(f, s)| *f = s);
        found
    }
}

/// Asks for the 16 x 16 values at `at`, if there are any: the processor does not foresee steps from panel to panel, and weights
/// of a large model come from main memory.
#[inline(always)]
fn prefetch<T>(values: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(square) = values.get(at..at + WIDTH * WIDTH) {
        // 64 bytes are a line of the cache.
        for line in square.chunks(64 / size_of::<T>()) {
            #[expect(unsafe_code, reason = "the instruction takes a pointer")]
            // SAFETY: the address is that of a value, and nothing is read or written.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast());
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, at);
}

/// `f16` to `f32`; both slices are of one length.
fn widen_halves(from: &[f16], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if from.len() == to.len() && std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("f16c") {
        #[expect(
            unsafe_code,
            reason = "calling a function compiled for features that were just detected"
        )]
        // SAFETY: the processor has AVX2 and F16C.
        unsafe {
            return avx2::widen_halves(from, to);
        }
    }
    from.convert_to_f32_slice(to);
}

/// A 16 x 16 matrix, transposed.
fn transpose(from: &[f32], to: &mut [f32]) {
    assert!(from.len() == WIDTH * WIDTH && to.len() == WIDTH * WIDTH);
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        #[expect(
            unsafe_code,
            reason = "calling a function compiled for a feature that was just detected"
        )]
        // SAFETY: the processor has AVX2.
        unsafe {
            return avx2::transpose(from, to);
        }
    }
    for (i, row) in from.chunks_exact(WIDTH).enumerate() {
        for (j, v) in row.iter().enumerate() {
            to[j * WIDTH + i] = *v;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm_loadu_si128, _mm256_cvtph_ps, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_setzero_ps,
        _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };

    use half::{f16, slice::HalfFloatSliceExt};

    use super::WIDTH;

    /// Eight at a time; the library's own conversion is a call for each eight.
    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn widen_halves(from: &[f16], to: &mut [f32]) {
        for (to, from) in to.chunks_exact_mut(8).zip(from.chunks_exact(8)) {
            #[expect(unsafe_code, reason = "load and store take pointers")]
            // SAFETY: eight halves are 16 bytes, and both slices hold eight values.
            unsafe {
                let halves = _mm_loadu_si128(from.as_ptr().cast());
                _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(halves));
            }
        }
        let whole = from.len() / 8 * 8;
        from[whole..].convert_to_f32_slice(&mut to[whole..]);
    }

    /// In four squares of 8 x 8: the compiler does not find these shuffles, and takes ten times as long without them.
    #[target_feature(enable = "avx2")]
    pub(super) fn transpose(from: &[f32], to: &mut [f32]) {
        for i in [0, 8] {
            for j in [0, 8] {
                let mut rows = [_mm256_setzero_ps(); 8];
                for (r, to) in rows.iter_mut().enumerate() {
                    let row = &from[(i + r) * WIDTH + j..][..8];
                    #[expect(unsafe_code, reason = "the load takes a pointer")]
                    // SAFETY: the slice holds the eight values that are read.
                    unsafe {
                        *to = _mm256_loadu_ps(row.as_ptr());
                    }
                }
                for (c, column) in square(rows).into_iter().enumerate() {
                    let out = &mut to[(j + c) * WIDTH + i..][..8];
                    #[expect(unsafe_code, reason = "the store takes a pointer")]
                    // SAFETY: the slice holds the eight values that are written.
                    unsafe {
                        _mm256_storeu_ps(out.as_mut_ptr(), column);
                    }
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn square(r: [__m256; 8]) -> [__m256; 8] {
        // Pairs of rows, then fours, then the halves of the registers.
        let t = [
            _mm256_unpacklo_ps(r[0], r[1]),
            _mm256_unpackhi_ps(r[0], r[1]),
            _mm256_unpacklo_ps(r[2], r[3]),
            _mm256_unpackhi_ps(r[2], r[3]),
            _mm256_unpacklo_ps(r[4], r[5]),
            _mm256_unpackhi_ps(r[4], r[5]),
            _mm256_unpacklo_ps(r[6], r[7]),
            _mm256_unpackhi_ps(r[6], r[7]),
        ];
        let u = [
            _mm256_shuffle_ps::<0x44>(t[0], t[2]),
            _mm256_shuffle_ps::<0xee>(t[0], t[2]),
            _mm256_shuffle_ps::<0x44>(t[1], t[3]),
            _mm256_shuffle_ps::<0xee>(t[1], t[3]),
            _mm256_shuffle_ps::<0x44>(t[4], t[6]),
            _mm256_shuffle_ps::<0xee>(t[4], t[6]),
            _mm256_shuffle_ps::<0x44>(t[5], t[7]),
            _mm256_shuffle_ps::<0xee>(t[5], t[7]),
        ];
        [
            _mm256_permute2f128_ps::<0x20>(u[0], u[4]),
            _mm256_permute2f128_ps::<0x20>(u[1], u[5]),
            _mm256_permute2f128_ps::<0x20>(u[2], u[6]),
            _mm256_permute2f128_ps::<0x20>(u[3], u[7]),
            _mm256_permute2f128_ps::<0x31>(u[0], u[4]),
            _mm256_permute2f128_ps::<0x31>(u[1], u[5]),
            _mm256_permute2f128_ps::<0x31>(u[2], u[6]),
            _mm256_permute2f128_ps::<0x31>(u[3], u[7]),
        ]
    }
}
