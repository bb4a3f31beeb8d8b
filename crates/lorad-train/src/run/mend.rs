//! What the loop does when something is wrong: samples that show no gradient, memory that runs out, losses that explode.
//! The decisions are in [`crate::rescue`].

use std::fs;

use lorad_proto::{
    event::{Level, WorkerEvent},
    problem::Problem,
};

use super::{CHECKED_WINDOWS, Run};
use crate::{
    Result, TrainError, checkpoint,
    data::Order,
    rescue::{self, Verdict},
    selfcheck,
};

impl Run<'_> {
    /// Compares the gradient with the loss on the first samples whose loss shows anything.
    pub(super) fn check_gradients(&self, order: &Order) -> Result<()> {
        let mut cursor = 0;
        for step in 1..=order.steps_per_epoch().min(CHECKED_WINDOWS) {
            let window = order.window(step, cursor);
            cursor += window.n_samples as u64;
            for batch in &window.micro_batches {
                if let Some(check) = selfcheck::directional_derivative(self.task, batch)? {
                    self.reporter.log(Level::Info, &check.to_string());
                    return Ok(());
                }
            }
        }
        self.reporter.emit(WorkerEvent::Alert {
            code: "gradients.not_checked".to_owned(),
            severity: Level::Warn,
            step: self.state.step,
            detail:
                "The loss of the first pictures is 0 whatever the adapter does: their masks are black, and nothing can \
                     be learned from them."
                    .to_owned(),
        });
        Ok(())
    }

    /// Halves the micro-batch after memory ran out: twice as many of them make the same step, up to the order of sums.
    ///
    /// # Errors
    /// `failure`, if that was done before or there is nothing to halve.
    pub(super) fn shrink(&mut self, failure: TrainError) -> Result<()> {
        let before = self.micro_batch;
        let Some(smaller) = rescue::smaller_micro_batch(before, self.state.memory_rescues) else {
            return Err(failure);
        };
        self.micro_batch = smaller;
        self.state.memory_rescues += 1;
        self.save_soon = true;
        self.reporter.emit(WorkerEvent::Alert {
            code: "memory.rescued".to_owned(),
            severity: Level::Warn,
            step: self.state.step,
            detail: format!(
                "Memory ran out with {before} samples at a time. From here on it is {smaller} at a time and as many more \
                 micro-batches per step: the result is the same up to rounding, and takes a little longer. \
                 ({}.)",
                failure.into_problem().detail.trim_end_matches('.')
            ),
        });
        Ok(())
    }

    /// Goes back to a healthy checkpoint with a smaller learning rate.
    ///
    /// # Errors
    /// The failure of the run, if it has been rescued often enough or must not be.
    pub(super) fn rescue(&mut self, step: u64, lr: f64, verdict: Verdict) -> Result<()> {
        let what = match verdict {
            Verdict::Exploded { smoothed, reference } => {
                format!("the smoothed loss rose to {smoothed:.3e}, from {reference:.3e}")
            }
            Verdict::NotFinite | Verdict::Healthy => "the loss or its gradient was not a number".to_owned(),
        };
        if !self.settings.self_rescue || self.state.rescues >= rescue::MAX_RESCUES {
            return Err(self.diverged(step, lr, &what, verdict)?);
        }
        let root = self.checkpoints();
        let mut steps = checkpoint::list(&root);
        // What the attempt began with: step 0, or a checkpoint of an earlier attempt.
        let origin = self.origin.clone();
        steps.extend(origin.iter().map(|snapshot| snapshot.state.step));
        let from = rescue::choose(&steps, self.state.health.calm_step);
        let snapshot = match (from, origin) {
            (Some(from), Some(origin)) if from == origin.state.step => origin,
            (Some(from), _) => checkpoint::read(&root.join(checkpoint::dir_name(from)))?,
            (None, _) => return Err(self.diverged(step, lr, &what, verdict)?),
        };
        let (rescues, lr_factor) = (self.state.rescues + 1, self.state.lr_factor * rescue::LR_FACTOR);
        let memory_rescues = self.state.memory_rescues;
        let train_ms = self.state.train_ms;
        self.restore(snapshot)?;
        self.state.rescues = rescues;
        self.state.memory_rescues = memory_rescues;
        self.state.lr_factor = lr_factor;
        self.state.train_ms = train_ms;
        let back = self.state.step;
        for unhealthy in steps.into_iter().filter(|&s| s > back) {
            let dir = root.join(checkpoint::dir_name(unhealthy));
            fs::remove_dir_all(&dir).map_err(TrainError::io("remove", &dir))?;
        }
        self.saved_at = Some(back);
        self.save_soon = true;
        self.reporter.emit(WorkerEvent::Alert {
            code: "run.rescued".to_owned(),
            severity: Level::Warn,
            step,
            detail: format!(
                "At step {step}, {what}. Back to step {back} with half the learning rate ({rescues} of {} rescues).",
                rescue::MAX_RESCUES
            ),
        });
        Ok(())
    }

    /// The failure of a run that no rescue helps any more, naming what is kept.
    pub(super) fn diverged(&mut self, step: u64, lr: f64, what: &str, verdict: Verdict) -> Result<TrainError> {
        // The step that was not a number changed nothing: what was before it may still be good.
        if verdict == Verdict::NotFinite && self.state.step > 0 {
            self.save()?;
        }
        let calm = checkpoint::list(&self.checkpoints())
            .into_iter()
            .filter(|&s| s <= self.state.health.calm_step)
            .max();
        let kept = match calm {
            Some(step) => format!("The adapter after step {step} is kept as a checkpoint."),
            None => "There was no good step before it to keep.".to_owned(),
        };
        let rescues = match self.state.rescues {
            0 => String::new(),
            n => format!(" {n} rescues did not help."),
        };
        let (code, title) = match verdict {
            Verdict::NotFinite => ("loss.not_finite", "The loss is not a number any more"),
            _ => ("loss.exploded", "The loss has exploded"),
        };
        Ok(Problem::new(
            code,
            title,
            format!("At step {step}, with learning rate {lr:e}, {what}.{rescues} {kept}"),
        )
        .with_hint("Lower learning_rate (by 3 to 10 times), set max_grad_norm to 1, or look for broken pictures.")
        .into())
    }
}
