//! When a run has gone wrong, and what is done about it: back to a healthy checkpoint with half the learning rate, at most
//! twice; half the micro-batch when memory ran out, once. Pure decisions; [`crate::run`] carries them out.

use serde::{Deserialize, Serialize};

/// Rescues of one run; after that it fails.
pub const MAX_RESCUES: u32 = 2;
/// What a rescue multiplies the learning rate by.
pub const LR_FACTOR: f64 = 0.5;

/// Weight of the newest loss in the smoothed one. A diffusion loss varies by its own size from step to step, as timesteps
/// do; smoothed so, by about a tenth.
const SMOOTHING: f64 = 0.02;
/// Steps before the smoothed loss's minimum means anything.
const SETTLED: u64 = 50;
/// The smoothed loss may be so many times its minimum.
const EXPLODED: f64 = 4.0;
/// A first loss below this share of [`Health::observe`]'s `trivial` one is a model that knows something.
const SKILLED: f64 = 0.8;
/// Steps before which nothing is judged.
const LEAST: u64 = 8;
/// Up to this share of what would be an explosion the smoothed loss is calm: a checkpoint from then is worth going back to.
const CALM: f64 = 0.5;

/// What a run's losses have been.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Losses seen.
    seen: u64,
    /// Exponential average, not corrected for its start at 0.
    average: f64,
    /// The first loss: the base model's, before any step.
    base: f64,
    /// Least smoothed loss once settled; 0: not yet.
    lowest: f64,
    /// Newest step at which all was well.
    pub calm_step: u64,
}

/// What one more loss shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// Go on.
    Healthy,
    /// The smoothed loss has risen from `reference` to `smoothed`.
    Exploded {
        /// Now.
        smoothed: f64,
        /// What it is compared with.
        reference: f64,
    },
    /// The loss or its gradient is not a number; nothing was learned from this step.
    NotFinite,
}

impl Health {
    /// Takes the loss of `step` in; `None`: it was not finite.
    ///
    /// `trivial` is the loss of a model that always predicts zeros, if the family knows it. A run whose base model did
    /// better, and which now does worse, has unlearned everything, however gently its loss rose. A loss of exactly 0 says
    /// nothing of the model: no sample of the step counts (black masks).
    pub fn observe(&mut self, step: u64, loss: Option<f64>, trivial: Option<f64>) -> Verdict {
        let Some(loss) = loss else { return Verdict::NotFinite };
        if loss == 0.0 {
            return Verdict::Healthy;
        }
        self.seen += 1;
        self.average += SMOOTHING * (loss - self.average);
        let correction = 1.0 - (1.0 - SMOOTHING).powi(i32::try_from(self.seen).unwrap_or(i32::MAX));
        let smoothed = self.average / correction;
        if self.seen == 1 {
            self.base = loss;
        }
        // The first losses are no measure: a few timesteps that happen to be easy would make every later loss an explosion.
        let settled = self.seen > SETTLED;
        let relative = if settled { EXPLODED * self.lowest } else { f64::INFINITY };
        let trivial = trivial.filter(|trivial| self.base < SKILLED * trivial);
        let limit = relative.min(trivial.unwrap_or(f64::INFINITY));
        if self.seen >= LEAST && smoothed > limit {
            let reference = if settled { self.lowest } else { self.base };
            return Verdict::Exploded { smoothed, reference };
        }
        if self.seen >= SETTLED && (self.lowest == 0.0 || smoothed < self.lowest) {
            self.lowest = smoothed;
        }
        // A base model may begin close to the trivial loss; but one loss is too noisy to be a measure for longer.
        let calm = if settled {
            CALM * limit
        } else {
            (CALM * limit).max(self.base)
        };
        if smoothed <= calm {
            self.calm_step = step;
        }
        Verdict::Healthy
    }
}

/// Which checkpoint to go back to, of those there are (steps, any order): the newest from when all was well, or else the
/// oldest. `None`: there is none, start over.
pub fn choose(checkpoints: &[u64], calm_step: u64) -> Option<u64> {
    let calm = checkpoints.iter().copied().filter(|&step| step <= calm_step).max();
    calm.or_else(|| checkpoints.iter().copied().min())
}

/// The micro-batch of a run that ran out of memory with `micro_batch`: half of it, once, so that there are twice as many and
/// a step's samples stay the same. `None`: there is nothing left to try.
pub fn smaller_micro_batch(micro_batch: usize, memory_rescues: u32) -> Option<usize> {
    (micro_batch > 1 && memory_rescues == 0).then(|| micro_batch.div_ceil(2))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rng::{Purpose, Stream};

    /// A loss as diffusion makes them: the timestep decides between nearly nothing and nearly one.
    fn noisy(stream: &mut Stream) -> f64 {
        let t = stream.uniform();
        (1.0 - t).powi(4) * 0.9 + 0.005
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// No false alarm in 5,000 steps of batch 4 whose mean loss does not change.
        #[test]
        fn the_noise_of_timesteps_is_no_explosion(seed in any::<u64>()) {
            let mut stream = Stream::new(seed, Purpose::Timestep, 0);
            let (mut health, mut unjudged) = (Health::default(), Health::default());
            for step in 1..=5000 {
                let loss = (0..4).map(|_| noisy(&mut stream)).sum::<f64>() / 4.0;
                prop_assert_eq!(health.observe(step, Some(loss), Some(1.0)), Verdict::Healthy, "step {}", step);
                prop_assert_eq!(unjudged.observe(step, Some(loss), None), Verdict::Healthy, "step {}", step);
            }
        }

        /// Once settled; before that only the trivial loss is there to compare with.
        #[test]
        fn a_settled_loss_that_rises_tenfold_is_noticed_within_sixty_steps(seed in any::<u64>(), calm in SETTLED + 10..400) {
            let mut stream = Stream::new(seed, Purpose::Timestep, 0);
            let mut health = Health::default();
            let mut noticed = None;
            for step in 1..=calm + 100 {
                let factor = if step > calm { 10.0 } else { 1.0 };
                let loss = factor * (0..4).map(|_| noisy(&mut stream)).sum::<f64>() / 4.0;
                if health.observe(step, Some(loss), None) != Verdict::Healthy {
                    noticed = Some(step);
                    break;
                }
            }
            prop_assert!(noticed.is_some(), "not noticed in 100 steps");
            let noticed = noticed.unwrap_or_default();
            prop_assert!(noticed > calm && noticed <= calm + 60, "calm until {}, noticed at {}", calm, noticed);
            prop_assert!(health.calm_step <= calm + 20, "{:?}", health);
        }
    }

    /// Three easy timesteps, then ordinary ones.
    #[test]
    fn first_losses_that_happen_to_be_small_make_no_explosion_of_the_rest() {
        for trivial in [None, Some(1.0)] {
            let mut health = Health::default();
            let healthy =
                |step| health.observe(step, Some(if step <= 3 { 0.03 } else { 0.3 }), trivial) == Verdict::Healthy;
            assert!((1..=200).all(healthy));
        }
    }

    /// A data set of black masks with one picture that counts: a minimum of 0 would make an explosion of it.
    #[test]
    fn steps_in_which_nothing_counts_are_no_measure_for_the_others() {
        let mut health = Health::default();
        assert!((1..=100).all(|step| health.observe(step, Some(0.0), None) == Verdict::Healthy));
        for step in 101..=1000 {
            let loss = if step % 10 == 0 { 0.3 } else { 0.0 };
            assert_eq!(health.observe(step, Some(loss), None), Verdict::Healthy, "step {step}");
        }
        let mut later = (1001..=1100).map(|step| health.observe(step, Some(3.0), None));
        assert!(later.any(|verdict| matches!(verdict, Verdict::Exploded { .. })));
    }

    #[test]
    fn not_a_number_is_said_at_once() {
        assert_eq!(Health::default().observe(1, None, None), Verdict::NotFinite);
    }

    /// A base model at 0.3 whose loss jumps above 1, what zeros would give, after its first step: there is no calm
    /// stretch to compare with, and none to go back to but the start.
    #[test]
    fn worse_than_predicting_nothing_is_an_explosion_even_from_the_first_step() {
        let mut health = Health::default();
        let mut verdicts =
            (1..=LEAST).map(|step| health.observe(step, Some(if step == 1 { 0.3 } else { 1.3 }), Some(1.0)));
        assert!(verdicts.any(|v| matches!(v, Verdict::Exploded { .. })));
        assert!(health.calm_step <= 1);
        // A base model that knew nothing has nothing to lose.
        let mut health = Health::default();
        assert!((1..=200).all(|step| health.observe(step, Some(1.1), Some(1.0)) == Verdict::Healthy));
    }

    #[test]
    fn a_micro_batch_is_halved_once_and_never_to_nothing() {
        assert_eq!(smaller_micro_batch(8, 0), Some(4));
        assert_eq!(smaller_micro_batch(5, 0), Some(3));
        assert_eq!((smaller_micro_batch(1, 0), smaller_micro_batch(8, 1)), (None, None));
    }

    #[test]
    fn the_newest_calm_checkpoint_is_chosen_else_the_oldest_else_the_start() {
        assert_eq!(choose(&[100, 200, 300], 250), Some(200));
        assert_eq!(choose(&[300, 200], 150), Some(200));
        assert_eq!(choose(&[], 150), None);
    }
}
