//! Figures of optimizer steps, and how many of them become few without losing what matters.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Columns that every step has, in the order of a `metrics` event; a family's own figures follow in order of name.
pub const COLUMNS: &[&str] = &[
    "step",
    "t",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "step_ms",
    "samples_per_s",
];

/// One optimizer step.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricRow {
    /// From 1.
    pub step: u64,
    /// Attempt that computed it.
    pub attempt: u32,
    /// When, milliseconds since the epoch.
    pub t_ms: i64,
    /// Passes over the data.
    pub epoch: f64,
    /// `None`: not finite.
    pub loss: Option<f64>,
    /// Learning rate.
    pub lr: f64,
    /// `None`: not finite.
    pub grad_norm: Option<f64>,
    /// Wall time, milliseconds.
    pub step_ms: f64,
    /// Training samples per second.
    pub samples_per_s: f64,
    /// Figures of the family.
    pub extra: BTreeMap<String, f64>,
}

impl MetricRow {
    /// A figure by its column name; `None`: not there, or not finite.
    pub fn value(&self, key: &str) -> Option<f64> {
        match key {
            "loss" => self.loss,
            "lr" => Some(self.lr),
            "grad_norm" => self.grad_norm,
            "epoch" => Some(self.epoch),
            "step_ms" => Some(self.step_ms),
            "samples_per_s" => Some(self.samples_per_s),
            other => self.extra.get(other).copied(),
        }
    }
}

/// One figure over the steps, in buckets. The three lists are as long as [`Series::x`]; `None`: no finite value there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// Last value of each bucket.
    pub last: Vec<Option<f64>>,
    /// Smallest.
    pub min: Vec<Option<f64>>,
    /// Largest.
    pub max: Vec<Option<f64>>,
}

/// Figures in columns.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Last step of each bucket.
    pub x: Vec<u64>,
    /// Per figure.
    pub series: BTreeMap<String, Bucket>,
}

/// Puts rows (in order of step) into at most `max_points` buckets of equal row count. With no more rows than points
/// nothing is lost: each row is its own bucket.
pub fn downsample(rows: &[MetricRow], keys: &[String], max_points: usize) -> Series {
    let max_points = max_points.max(1);
    let n_buckets = rows.len().min(max_points);
    let mut out = Series::default();
    for key in keys {
        out.series.insert(key.clone(), Bucket::default());
    }
    for bucket in 0..n_buckets {
        // Even cuts: bucket sizes differ by one at most.
        let rows = &rows[bucket * rows.len() / n_buckets..(bucket + 1) * rows.len() / n_buckets];
        let Some(last) = rows.last() else { continue };
        out.x.push(last.step);
        for (key, column) in &mut out.series {
            let values = || rows.iter().filter_map(|row| row.value(key)).filter(|v| v.is_finite());
            column.last.push(values().next_back());
            column.min.push(values().reduce(f64::min));
            column.max.push(values().reduce(f64::max));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64, loss: Option<f64>) -> MetricRow {
        MetricRow {
            step,
            attempt: 1,
            t_ms: 0,
            epoch: 0.0,
            loss,
            lr: 1e-4,
            grad_norm: Some(1.0),
            step_ms: 1.0,
            samples_per_s: 1.0,
            extra: BTreeMap::new(),
        }
    }

    #[test]
    fn few_rows_are_kept_as_they_are() {
        let rows: Vec<_> = (1..=5).map(|s| row(s, Some(s as f64))).collect();
        let series = downsample(&rows, &["loss".to_owned()], 100);
        assert_eq!(series.x, [1, 2, 3, 4, 5]);
        assert_eq!(
            series.series["loss"].last,
            (1..=5).map(|s| Some(f64::from(s))).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_spike_survives_downsampling() {
        let rows: Vec<_> = (1..=10_000)
            .map(|s| row(s, Some(if s == 4321 { 99.0 } else { 1.0 })))
            .collect();
        let series = downsample(&rows, &["loss".to_owned()], 100);
        assert_eq!(series.x.len(), 100);
        assert_eq!(series.x.last(), Some(&10_000));
        assert!(series.series["loss"].max.contains(&Some(99.0)));
        assert!(series.series["loss"].min.iter().all(|v| *v == Some(1.0)));
    }

    #[test]
    fn steps_without_a_finite_loss_leave_a_hole_and_no_zero() {
        let rows: Vec<_> = (1..=4).map(|s| row(s, (s > 2).then_some(0.5))).collect();
        let series = downsample(&rows, &["loss".to_owned(), "nonsense".to_owned()], 2);
        assert_eq!(series.series["loss"].last, [None, Some(0.5)]);
        assert_eq!(series.series["nonsense"].max, [None, None]);
    }
}
