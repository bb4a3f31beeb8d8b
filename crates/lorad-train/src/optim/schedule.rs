//! Learning-rate schedules: pure functions of the optimizer step.

use serde::{Deserialize, Serialize};

/// Shape of the schedule after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// Stays.
    Constant,
    /// Falls to 0 in a straight line.
    Linear,
    /// Falls to 0 along half a cosine.
    Cosine,
}

/// Learning rate of optimizer step `step` (from 1) of `total_steps`.
///
/// Warm-up counts from 0, as in diffusers: with `warmup_steps > 0` the first step has learning rate 0.
///
/// # Source
/// diffusers v0.42.1 `optimization.py`: `get_constant_schedule_with_warmup`, `get_linear_schedule_with_warmup`,
/// `get_cosine_schedule_with_warmup` (half a cycle).
pub fn learning_rate(scheduler: LrScheduler, base: f64, warmup_steps: u64, total_steps: u64, step: u64) -> f64 {
    let done = step.saturating_sub(1);
    if done < warmup_steps {
        return base * done as f64 / warmup_steps.max(1) as f64;
    }
    let remaining = total_steps.saturating_sub(warmup_steps).max(1) as f64;
    let progress = (done - warmup_steps) as f64 / remaining;
    base * match scheduler {
        LrScheduler::Constant => 1.0,
        LrScheduler::Linear => (1.0 - progress).max(0.0),
        LrScheduler::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// `tests/golden/optim/lr.json`, made by diffusers' `get_scheduler`.
    #[test]
    fn every_schedule_equals_diffusers_at_every_step() {
        #[derive(Deserialize)]
        struct Case {
            lr_scheduler: LrScheduler,
            learning_rate: f64,
            lr_warmup_steps: u64,
            total_steps: u64,
            lr: Vec<f64>,
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/optim/lr.json");
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(cases.len() >= 6);
        for c in cases {
            for (i, expected) in c.lr.iter().enumerate() {
                let lr = learning_rate(
                    c.lr_scheduler,
                    c.learning_rate,
                    c.lr_warmup_steps,
                    c.total_steps,
                    i as u64 + 1,
                );
                assert!(
                    (lr - expected).abs() <= 1e-12,
                    "{:?} step {}: {lr}, not {expected}",
                    c.lr_scheduler,
                    i + 1
                );
            }
        }
    }
}
