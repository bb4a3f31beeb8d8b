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
    /// Falls to 0 along half a cosine, several times, jumping back up in between.
    CosineWithRestarts,
    /// Falls to a last value along a power of what is left.
    Polynomial,
}

/// The learning rate's whole course.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct LrSchedule {
    /// Shape.
    pub lr_scheduler: LrScheduler,
    /// Value after the warm-up.
    pub learning_rate: f64,
    /// Steps over which it rises from 0.
    pub lr_warmup_steps: u64,
    /// Falls of [`LrScheduler::CosineWithRestarts`].
    pub lr_num_cycles: u64,
    /// Exponent of [`LrScheduler::Polynomial`].
    pub lr_power: f64,
    /// Last value of [`LrScheduler::Polynomial`].
    pub lr_end: f64,
}

impl LrSchedule {
    /// Learning rate of optimizer step `step` (from 1) of `total_steps`.
    ///
    /// Warm-up counts from 0, as in diffusers: with `lr_warmup_steps > 0` the first step has learning rate 0.
    ///
    /// # Source
    /// diffusers v0.42.1 `optimization.py`: the `get_…_schedule_with_warmup` of each name; cosine with half a cycle.
    pub fn at(&self, step: u64, total_steps: u64) -> f64 {
        let done = step.saturating_sub(1);
        let (base, warmup) = (self.learning_rate, self.lr_warmup_steps);
        if done < warmup {
            return base * done as f64 / warmup.max(1) as f64;
        }
        let progress = (done - warmup) as f64 / total_steps.saturating_sub(warmup).max(1) as f64;
        let half_cosine = |part: f64| (0.5 * (1.0 + (std::f64::consts::PI * part).cos())).max(0.0);
        match self.lr_scheduler {
            LrScheduler::Constant => base,
            LrScheduler::Linear => base * (1.0 - progress).max(0.0),
            LrScheduler::Cosine => base * half_cosine(progress),
            LrScheduler::CosineWithRestarts if progress >= 1.0 => 0.0,
            LrScheduler::CosineWithRestarts => base * half_cosine((self.lr_num_cycles as f64 * progress).fract()),
            LrScheduler::Polynomial => {
                (base - self.lr_end) * (1.0 - progress).max(0.0).powf(self.lr_power) + self.lr_end
            }
        }
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
            #[serde(flatten)]
            schedule: LrSchedule,
            total_steps: u64,
            lr: Vec<f64>,
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/optim/lr.json");
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(cases.len() >= 14);
        for c in cases {
            for (i, expected) in c.lr.iter().enumerate() {
                let lr = c.schedule.at(i as u64 + 1, c.total_steps);
                assert!(
                    (lr - expected).abs() <= 1e-12,
                    "{:?} step {}: {lr}, not {expected}",
                    c.schedule,
                    i + 1
                );
            }
        }
    }
}
