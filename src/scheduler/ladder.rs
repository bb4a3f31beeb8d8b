//! The kill ladder: command (by the worker's own poll) → SIGTERM → SIGKILL. When to climb, as a pure decision.

use std::time::{Duration, Instant};

use crate::domain::Desired;

/// What is known about a live worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    /// Whether its job is active and its own.
    pub(super) owns_job: bool,
    /// Whether its final event is stored: it should be gone soon.
    pub(super) delivered: bool,
    /// What was asked of the job.
    pub(super) desired: Desired,
    /// Whether it was not heard for a whole lease and grace.
    pub(super) lease_over: bool,
}

/// A signal that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rung {
    Terminate,
    Kill,
}

/// Where one worker stands.
#[derive(Debug, Default)]
pub(super) struct Ladder {
    /// Since when it should stop by itself.
    unwanted: Option<Instant>,
    terminated: Option<Instant>,
    killed: bool,
}

impl Ladder {
    /// The signal that is due now, each only once.
    pub(super) fn step(&mut self, seen: Seen, now: Instant, grace: Duration) -> Option<Rung> {
        let kill_at_once = seen.desired == Desired::CancelForce && seen.owns_job && !seen.delivered;
        let unwanted = !seen.owns_job || seen.delivered || seen.desired == Desired::CancelDiscard || seen.lease_over;
        if kill_at_once {
            return self.kill();
        }
        if !unwanted {
            self.unwanted = None;
            return None;
        }
        if let Some(terminated) = self.terminated {
            return if now.duration_since(terminated) >= grace {
                self.kill()
            } else {
                None
            };
        }
        // A worker that was just told so gets its time to obey; one that is silent will not hear the command.
        let since = *self.unwanted.get_or_insert(now);
        if seen.lease_over || now.duration_since(since) >= grace {
            self.terminated = Some(now);
            return Some(Rung::Terminate);
        }
        None
    }

    fn kill(&mut self) -> Option<Rung> {
        if self.killed {
            return None;
        }
        self.killed = true;
        Some(Rung::Kill)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(10);
    const WELL: Seen = Seen {
        owns_job: true,
        delivered: false,
        desired: Desired::Run,
        lease_over: false,
    };

    fn climb(seen: Seen, seconds: u64) -> Vec<(u64, Rung)> {
        let (mut ladder, start) = (Ladder::default(), Instant::now());
        (0..seconds)
            .filter_map(|s| Some((s, ladder.step(seen, start + Duration::from_secs(s), GRACE)?)))
            .collect()
    }

    #[test]
    fn a_worker_that_does_its_job_is_left_alone() {
        for desired in [Desired::Run, Desired::Pause, Desired::CancelSave] {
            assert_eq!(climb(Seen { desired, ..WELL }, 1000), []);
        }
    }

    #[test]
    fn one_that_should_be_gone_is_asked_by_command_then_by_signal_then_killed() {
        let expected = [(10, Rung::Terminate), (20, Rung::Kill)];
        for seen in [
            Seen {
                owns_job: false,
                ..WELL
            },
            Seen {
                delivered: true,
                ..WELL
            },
            Seen {
                desired: Desired::CancelDiscard,
                ..WELL
            },
        ] {
            assert_eq!(climb(seen, 100), expected, "{seen:?}");
        }
    }

    #[test]
    fn a_silent_one_is_not_waited_for_and_force_means_now() {
        assert_eq!(
            climb(
                Seen {
                    lease_over: true,
                    ..WELL
                },
                100
            ),
            [(0, Rung::Terminate), (10, Rung::Kill)]
        );
        let force = Seen {
            desired: Desired::CancelForce,
            ..WELL
        };
        assert_eq!(climb(force, 100), [(0, Rung::Kill)]);
    }
}
