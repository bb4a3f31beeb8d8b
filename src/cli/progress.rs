//! How a job's course is shown on a terminal, for `demo` and `train`: one bar, moved by events. Away from a terminal (a log
//! file, CI) plain lines take its place, at most one a second.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lorad_proto::event::Phase;

/// Between plain lines of the same phase.
const PLAIN_EVERY: Duration = Duration::from_secs(5);
/// Weight of the past in the shown loss: a diffusion loss is noisy, and one step of it says little.
const SMOOTHING: f64 = 0.95;

/// The display of one job.
pub(crate) struct Progress {
    bar: ProgressBar,
    plain: bool,
    phase: Option<Phase>,
    last_plain: Option<Instant>,
    loss: Smoothed,
}

impl Progress {
    /// An empty display on stderr.
    pub(crate) fn new() -> Self {
        let plain = !std::io::stderr().is_terminal();
        let target = if plain {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr_with_hz(10)
        };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        if let Ok(style) = ProgressStyle::with_template("{prefix:>10} {wide_bar} {pos:>4}/{len:<4} {msg}") {
            bar.set_style(style.progress_chars("━╸ "));
        }
        Self {
            bar,
            plain,
            phase: None,
            last_plain: None,
            loss: Smoothed::default(),
        }
    }

    /// A phase and how far it is.
    pub(crate) fn phase(&mut self, phase: Phase, done: u64, total: u64) {
        let is_new = self.phase != Some(phase);
        if is_new {
            self.phase = Some(phase);
            self.bar.set_prefix(label(phase));
            self.bar.set_message(String::new());
            self.last_plain = None;
        }
        if total > 0 {
            self.bar.set_length(total);
            self.bar.set_position(done);
        }
        if self.plain_line_due() {
            match total {
                0 => eprintln!("{}", label(phase)),
                _ => eprintln!("{} {done}/{total}", label(phase)),
            }
        }
    }

    /// An optimizer step.
    pub(crate) fn step(&mut self, step: u64, total: u64, loss: Option<f64>, steps_per_s: f64) {
        if self.phase != Some(Phase::Training) {
            self.phase = Some(Phase::Training);
            self.bar.set_prefix(label(Phase::Training));
            self.last_plain = None;
        }
        self.bar.set_length(total);
        self.bar.set_position(step);
        let shown = self.loss.add(loss);
        let left_s = if steps_per_s > 0.0 {
            (total.saturating_sub(step)) as f64 / steps_per_s
        } else {
            0.0
        };
        let message = format!("loss {shown:.4}  {steps_per_s:.1} steps/s  {} left", duration(left_s));
        self.bar.set_message(message.clone());
        if step == total || self.plain_line_due() {
            self.plain_line(&format!("{} {step}/{total}  {message}", label(Phase::Training)));
        }
    }

    /// A line above the bar.
    pub(crate) fn note(&self, line: &str) {
        if self.plain {
            eprintln!("{line}");
        } else {
            self.bar.suspend(|| eprintln!("{line}"));
        }
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn plain_line_due(&mut self) -> bool {
        if !self.plain || self.last_plain.is_some_and(|last| last.elapsed() < PLAIN_EVERY) {
            return false;
        }
        self.last_plain = Some(Instant::now());
        true
    }

    fn plain_line(&self, line: &str) {
        if self.plain {
            eprintln!("{line}");
        }
    }
}

/// An exponential mean that starts at its first value rather than at zero.
#[derive(Debug, Default)]
struct Smoothed {
    sum: f64,
    weight: f64,
}

impl Smoothed {
    fn add(&mut self, value: Option<f64>) -> f64 {
        if let Some(value) = value {
            self.sum = self.sum * SMOOTHING + value * (1.0 - SMOOTHING);
            self.weight = self.weight * SMOOTHING + (1.0 - SMOOTHING);
        }
        if self.weight > 0.0 {
            self.sum / self.weight
        } else {
            f64::NAN
        }
    }
}

fn label(phase: Phase) -> &'static str {
    match phase {
        Phase::Loading => "loading",
        Phase::Caching => "encoding",
        Phase::CheckingGradients => "checking",
        Phase::Sampling => "drawing",
        Phase::Training => "training",
        Phase::Exporting => "exporting",
    }
}

/// `48 s`, `3 min`, `2 h 5 min`.
pub(crate) fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match (seconds / 3600, seconds / 60 % 60) {
        (0, 0 | 1) if seconds < 100 => format!("{seconds} s"),
        (0, minutes) => format!("{minutes} min"),
        (hours, minutes) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smoothed_loss_starts_at_the_first_value_and_skips_what_is_not_finite() {
        let mut loss = Smoothed::default();
        assert!((loss.add(Some(0.5)) - 0.5).abs() < 1e-12);
        assert!((loss.add(None) - 0.5).abs() < 1e-12);
        let next = loss.add(Some(0.1));
        assert!(next < 0.5 && next > 0.1);
    }

    #[test]
    fn durations_are_readable() {
        assert_eq!(duration(48.2), "48 s");
        assert_eq!(duration(200.0), "3 min");
        assert_eq!(duration(7500.0), "2 h 5 min");
    }
}
