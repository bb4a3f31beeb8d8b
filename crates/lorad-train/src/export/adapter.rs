//! The adapter as exporters see it: host copies, f64 products.

use std::collections::BTreeMap;

use lorad_proto::problem::Problem;

use super::tensors::Host;
use crate::{Result, lora::AdapterSet};

/// One module's factors on the host.
#[derive(Debug, Clone)]
pub(super) struct Factors {
    pub(super) a: Host,
    pub(super) b: Host,
    /// DoRA's.
    pub(super) magnitude: Option<Host>,
    pub(super) alpha: f64,
}

impl Factors {
    pub(super) fn rank(&self) -> usize {
        self.a.shape.first().copied().unwrap_or(0)
    }

    /// `alpha / rank`.
    pub(super) fn scale(&self) -> f64 {
        self.alpha / self.rank() as f64
    }

    /// `scale · B·A`, row by row.
    pub(super) fn delta(&self) -> Vec<f64> {
        delta(&self.a, &self.b, self.scale())
    }

    /// The weight that does what the layer and its adapter do: `W + ΔW`, with magnitudes `m / ‖W + ΔW‖ (W + ΔW)`, row by row.
    /// `None` if `W` has another size.
    ///
    /// # Source
    /// peft 0.21.2 `tuners/lora/variants.py`, `DoraLinearVariant.merge_safe`.
    pub(super) fn merged(&self, weight: &[f64]) -> Option<Vec<f64>> {
        let delta = self.delta();
        if delta.len() != weight.len() {
            return None;
        }
        let mut merged: Vec<f64> = weight.iter().zip(delta).map(|(w, d)| w + d).collect();
        if let Some(magnitude) = &self.magnitude {
            let width = (merged.len() / magnitude.values.len().max(1)).max(1);
            for (row, &m) in merged.chunks_exact_mut(width).zip(&magnitude.values) {
                let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
                row.iter_mut().for_each(|v| *v *= f64::from(m) / norm);
            }
        }
        Some(merged)
    }
}

/// A copy of an [`AdapterSet`], keyed by module path (`unet.…`).
#[derive(Debug, Clone)]
pub(super) struct HostAdapter {
    /// The rank of most modules.
    pub(super) rank: usize,
    /// The alpha of most modules.
    pub(super) alpha: f64,
    pub(super) modules: BTreeMap<String, Factors>,
}

impl HostAdapter {
    pub(super) fn copy(adapters: &AdapterSet) -> Result<Self> {
        if adapters.modules.is_empty() {
            return Err(Problem::new(
                "export.unsupported_adapter",
                "The adapter cannot be exported",
                "It has no modules.",
            )
            .into());
        }
        let mut modules = BTreeMap::new();
        for (path, module) in &adapters.modules {
            let factors = Factors {
                a: Host::from_tensor(module.a.as_tensor())?,
                b: Host::from_tensor(module.b.as_tensor())?,
                magnitude: module
                    .magnitude
                    .as_ref()
                    .map(|m| Host::from_tensor(m.as_tensor()))
                    .transpose()?,
                alpha: module.alpha,
            };
            let tensors = [Some(&factors.a), Some(&factors.b), factors.magnitude.as_ref()];
            if tensors
                .into_iter()
                .flatten()
                .flat_map(|t| &t.values)
                .any(|v| !v.is_finite())
            {
                return Err(Problem::new(
                    "export.not_finite",
                    "The adapter holds values that are not numbers",
                    format!("{path} has infinite or undefined values."),
                )
                .with_hint("Training diverged: lower learning_rate.")
                .into());
            }
            modules.insert(path.clone(), factors);
        }
        Ok(Self {
            rank: most_frequent(&modules.values().map(Factors::rank).collect::<Vec<_>>()),
            alpha: most_frequent(&modules.values().map(|f| f.alpha).collect::<Vec<_>>()),
            modules,
        })
    }

    /// Whether any module has magnitudes.
    pub(super) fn is_dora(&self) -> bool {
        self.modules.values().any(|f| f.magnitude.is_some())
    }

    /// The largest rank.
    pub(super) fn max_rank(&self) -> usize {
        self.modules.values().map(Factors::rank).max().unwrap_or(0)
    }
}

/// The first of those that come most often.
fn most_frequent<T: Copy + PartialEq + Default>(values: &[T]) -> T {
    let mut best = (T::default(), 0);
    for &value in values {
        let n = values.iter().filter(|other| **other == value).count();
        if n > best.1 {
            best = (value, n);
        }
    }
    best.0
}

/// `scale · B·A`, row by row, in f64. `b`: (out, rank, …1); `a`: (rank, in…).
pub(super) fn delta(a: &Host, b: &Host, scale: f64) -> Vec<f64> {
    let rank = a.shape.first().copied().unwrap_or(0).max(1);
    let n_in = a.values.len() / rank;
    let n_out = b.values.len() / rank;
    let mut out = vec![0.0; n_out * n_in];
    for (row, factors) in out.chunks_exact_mut(n_in.max(1)).zip(b.values.chunks_exact(rank)) {
        for (&factor, a_row) in factors.iter().zip(a.values.chunks_exact(n_in.max(1))) {
            let factor = scale * f64::from(factor);
            for (sum, &value) in row.iter_mut().zip(a_row) {
                *sum += factor * f64::from(value);
            }
        }
    }
    out
}

/// Largest difference over the largest value of `expected`; infinite if the lengths differ or a value is not a number.
pub(super) fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    // `f64::max` passes over NaN, so they are looked for first.
    if found.len() != expected.len() || found.iter().chain(expected).any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let largest = expected.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    let error = found
        .iter()
        .zip(expected)
        .fold(0.0_f64, |m, (f, e)| m.max((f - e).abs()));
    if error == 0.0 {
        0.0
    } else {
        error / largest.max(f64::MIN_POSITIVE)
    }
}
