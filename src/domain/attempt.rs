//! One run of a worker process: how it can end, and what that means for its job. Pure decisions, tested without
//! processes.

use lorad_proto::{
    command::Command,
    event::{StopReason, WorkerEvent},
    problem::Problem,
};

use super::job::{Desired, Job, JobStatus};

/// Exit code of a worker that lost its lease or was told to stop by a signal: it wrote a checkpoint first.
pub const EXIT_TEMPFAIL: i32 = 75;
/// Exit code of a worker that reported its failure.
pub const EXIT_FAILED: i32 = 3;
/// Code of the failure of a worker that found no room on the disk: no fault of its job, which waits and goes on.
pub const STORAGE_FULL: &str = "storage.full";
/// Pause before a job that found no room is tried again, in first backoffs.
const STORAGE_FULL_BACKOFFS: i64 = 16;

/// Exit code of a worker that could not use its attempt directory.
pub const EXIT_USAGE: i32 = 64;

/// How a worker process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// By this signal, because memory ran out.
    OutOfMemory(i32),
    /// It is gone, and nobody saw how (it outlived the server that started it).
    Unknown,
    /// It could not be started.
    NotStarted(String),
    /// It could not be started because the disk is full.
    NoSpace(String),
    /// The server ended after it claimed the job and before it started a worker.
    NeverStarted,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}{}", signal_name(*signal)),
            Self::OutOfMemory(signal) => write!(f, "signal {signal}{}: out of memory", signal_name(*signal)),
            Self::Unknown => f.write_str("gone"),
            Self::NotStarted(why) => write!(f, "not started: {why}"),
            Self::NoSpace(why) => write!(f, "no room on the disk: {why}"),
            Self::NeverStarted => f.write_str("never started"),
        }
    }
}

impl Exit {
    /// Tells a process that was refused memory from another crash, by the last words of Rust's runtime.
    #[must_use]
    pub fn explained_by(self, log_tail: &str) -> Self {
        match self {
            Self::Signal(SIGABRT) if log_tail.contains("memory allocation of ") => Self::OutOfMemory(SIGABRT),
            other => other,
        }
    }
}

/// What `abort()` raises.
const SIGABRT: i32 = 6;

fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        _ => "",
    }
}

/// What is known when a worker process has ended.
#[derive(Debug, Clone)]
pub struct Ended<'a> {
    /// The job's status.
    pub status: JobStatus,
    /// What was asked.
    pub desired: Desired,
    /// The attempt's final event, if it came.
    pub final_event: Option<&'a WorkerEvent>,
    /// Whether this attempt wrote a checkpoint.
    pub progressed: bool,
    /// Whether any attempt did.
    pub has_checkpoint: bool,
    /// Interruptions in a row without a new checkpoint, before this one.
    pub failed_attempts: u32,
    /// Times that an attempt ran out of memory, before this one.
    pub memory_rescues: u32,
    /// How it ended.
    pub exit: &'a Exit,
    /// Last lines of its log.
    pub log_tail: &'a str,
}

/// When to give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryLimits {
    /// Interruptions in a row without a new checkpoint after which a job fails.
    pub max_failed_attempts: u32,
    /// First pause before a retry, milliseconds; doubles with each.
    pub backoff_ms: i64,
    /// Longest pause, milliseconds.
    pub max_backoff_ms: i64,
}

/// What becomes of the job.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Its state is settled already, or its results are being published.
    Settled,
    /// It goes back to the queue and resumes from the newest checkpoint.
    Requeue {
        /// Pause before the next attempt, milliseconds.
        delay_ms: i64,
        /// The new count of interruptions in a row.
        failed_attempts: u32,
        /// For the event.
        reason: String,
    },
    /// It goes back to the queue, and the next attempt begins with half the micro-batch.
    Shrink {
        /// For the event.
        reason: String,
    },
    /// It failed.
    Fail(Problem),
    /// It is cancelled.
    Cancel,
}

/// Decides what a worker's end means for its job.
pub fn after_exit(ended: &Ended<'_>, limits: RetryLimits) -> Outcome {
    if !ended.status.is_active() {
        return Outcome::Settled;
    }
    match ended.final_event {
        Some(WorkerEvent::Done { .. } | WorkerEvent::Stopped { results: Some(_), .. }) => return Outcome::Settled,
        // It did as it was told: no failure, and no reason to wait. A pause ends here only when it came during the export;
        // otherwise the job is paused as soon as the event is stored.
        Some(WorkerEvent::Stopped {
            reason: reason @ (StopReason::Drained | StopReason::Paused),
            ..
        }) if !ended.desired.is_cancel() => {
            let reason = if *reason == StopReason::Paused {
                "paused"
            } else {
                "drained"
            };
            return Outcome::Requeue {
                delay_ms: 0,
                failed_attempts: ended.failed_attempts,
                reason: reason.to_owned(),
            };
        }
        _ => {}
    }
    let no_room = match (ended.final_event, ended.exit) {
        (Some(WorkerEvent::Failed { problem }), _) if problem.code == STORAGE_FULL => Some(&problem.detail),
        (None, Exit::NoSpace(why)) => Some(why),
        _ => None,
    };
    if let Some(why) = no_room
        && !ended.desired.is_cancel()
    {
        // Space is a matter of time, and a pause costs less than a job.
        return Outcome::Requeue {
            delay_ms: limits
                .backoff_ms
                .saturating_mul(STORAGE_FULL_BACKOFFS)
                .min(limits.max_backoff_ms),
            failed_attempts: ended.failed_attempts,
            reason: format!("{STORAGE_FULL}: {why}"),
        };
    }
    if *ended.exit == Exit::NeverStarted && !ended.desired.is_cancel() {
        // A server that dies says nothing about the job: three such deaths must not make it a broken one.
        return Outcome::Requeue {
            delay_ms: 0,
            failed_attempts: ended.failed_attempts,
            reason: "server.ended: no worker was started".to_owned(),
        };
    }
    let failed_attempts = if ended.progressed { 0 } else { ended.failed_attempts + 1 };
    let gives_up = failed_attempts >= limits.max_failed_attempts;
    // A worker that dies while it should save what it has is worth another try, but only from a checkpoint.
    if ended.desired.is_cancel() && (ended.desired != Desired::CancelSave || !ended.has_checkpoint || gives_up) {
        return Outcome::Cancel;
    }
    let problem = exit_problem(ended.exit, ended.log_tail);
    if matches!(ended.exit, Exit::OutOfMemory(_)) {
        // The same again would end the same way.
        return if ended.memory_rescues == 0 {
            let reason = format!("{}: {}; the micro-batch is halved", problem.code, ended.exit);
            Outcome::Shrink { reason }
        } else {
            Outcome::Fail(problem)
        };
    }
    if gives_up || matches!(ended.exit, Exit::Code(EXIT_USAGE)) {
        return Outcome::Fail(problem);
    }
    let doublings = failed_attempts.saturating_sub(1).min(30);
    let delay_ms = if failed_attempts == 0 {
        0
    } else {
        limits
            .backoff_ms
            .saturating_mul(1 << doublings)
            .min(limits.max_backoff_ms)
    };
    Outcome::Requeue {
        delay_ms,
        failed_attempts,
        reason: format!("{}: {}", problem.code, ended.exit),
    }
}

/// Names what ended a worker, for its job's `error`.
pub fn exit_problem(exit: &Exit, log_tail: &str) -> Problem {
    let log_tail = log_tail.trim();
    let said = if log_tail.is_empty() {
        String::new()
    } else {
        format!(" Its last lines: {log_tail}")
    };
    match exit {
        Exit::OutOfMemory(_) => Problem::new(
            "worker.out_of_memory",
            "The training process ran out of memory",
            format!("The worker ended by {exit}.{said}"),
        )
        .with_hint(
            "Set gradient_checkpointing to on, mixed_precision to bf16, lower batch_size (and raise \
             gradient_accumulation_steps) or resolution; or raise scheduler.worker_memory_bytes, if it is set.",
        ),
        Exit::Signal(9) => Problem::new(
            "worker.killed",
            "The training process was killed",
            format!("The worker ended by {exit}.{said}"),
        )
        .with_hint(
            "Most often the system ran out of memory and killed it (`dmesg | grep -i oom` tells). Lower batch_size or \
             resolution, or give the machine more memory.",
        ),
        Exit::Signal(_) => Problem::new(
            "worker.killed",
            "The training process was killed",
            format!("The worker ended by {exit}.{said}"),
        )
        .with_hint("If you did not end it yourself, the job's worker log says more."),
        Exit::Code(EXIT_TEMPFAIL) => Problem::new(
            "worker.lost",
            "The training process lost the server",
            format!("The worker gave up its lease.{said}"),
        )
        .with_hint("The server did not answer for a whole lease; look at the load and the disk of the machine."),
        Exit::Code(_) => Problem::new(
            "worker.crashed",
            "The training process crashed",
            format!("The worker ended with {exit} and reported nothing.{said}"),
        )
        .with_hint("The job's worker log says more."),
        Exit::Unknown | Exit::NeverStarted => Problem::new(
            "worker.lost",
            "The training process is gone",
            format!("The worker ended while no server watched it.{said}"),
        )
        .with_hint("The job's worker log says more."),
        Exit::NoSpace(why) => Problem::new(STORAGE_FULL, "The disk is full", why.clone())
            .with_hint("Free space in the data directory; the job goes on by itself."),
        Exit::NotStarted(why) => Problem::new(
            "worker.not_started",
            "The training process could not be started",
            why.clone(),
        )
        .with_hint("Check that the lorad program still lies where it was started from, and that memory and processes are left."),
    }
}

/// What the server answers a worker of this job.
pub fn command_for(job: &Job, draining: bool) -> Command {
    match job.desired {
        Desired::Pause => Command::Pause,
        Desired::CancelSave => Command::Cancel { save: true },
        Desired::CancelDiscard | Desired::CancelForce => Command::Cancel { save: false },
        Desired::Run if draining => Command::Drain,
        Desired::Run => match (job.checkpoint_request, job.sample_request) {
            (Some(request), _) => Command::Checkpoint { request },
            (None, Some(request)) => Command::Sample { request },
            (None, None) => Command::None,
        },
    }
}

#[cfg(test)]
mod tests {
    use lorad_proto::event::Results;

    use super::*;

    const LIMITS: RetryLimits = RetryLimits {
        max_failed_attempts: 3,
        backoff_ms: 1000,
        max_backoff_ms: 600_000,
    };

    fn ended(exit: &Exit) -> Ended<'_> {
        Ended {
            status: JobStatus::Running,
            desired: Desired::Run,
            final_event: None,
            progressed: false,
            has_checkpoint: false,
            failed_attempts: 0,
            memory_rescues: 0,
            exit,
            log_tail: "",
        }
    }

    #[test]
    fn a_killed_worker_is_tried_again_three_times_and_then_named() {
        let exit = Exit::Signal(9);
        let mut state = ended(&exit);
        for (n, expected_delay) in [(0, 1000), (1, 2000)] {
            state.failed_attempts = n;
            let Outcome::Requeue {
                delay_ms,
                failed_attempts,
                reason,
            } = after_exit(&state, LIMITS)
            else {
                panic!("not requeued after {n}");
            };
            assert_eq!((delay_ms, failed_attempts), (expected_delay, n + 1));
            assert!(reason.contains("SIGKILL"), "{reason}");
        }
        state.failed_attempts = 2;
        state.log_tail = "thread 'train' panicked\n";
        let Outcome::Fail(problem) = after_exit(&state, LIMITS) else {
            panic!("not failed")
        };
        assert_eq!(problem.code, "worker.killed");
        assert!(problem.detail.contains("panicked") && problem.hint.contains("memory"));
    }

    #[test]
    fn a_full_disk_costs_a_job_time_and_nothing_else() {
        let exit = Exit::Code(EXIT_FAILED);
        let full = WorkerEvent::Failed {
            problem: Problem::new(STORAGE_FULL, "The disk is full", "Cannot write x."),
        };
        let state = Ended {
            final_event: Some(&full),
            failed_attempts: 2,
            ..ended(&exit)
        };
        let Outcome::Requeue {
            delay_ms,
            failed_attempts,
            reason,
        } = after_exit(&state, LIMITS)
        else {
            panic!("not requeued");
        };
        assert_eq!((delay_ms, failed_attempts), (16_000, 2));
        let exit = Exit::NoSpace("No space left on device".to_owned());
        assert!(matches!(
            after_exit(&ended(&exit), LIMITS),
            Outcome::Requeue { failed_attempts: 0, .. }
        ));
        assert!(reason.contains("Cannot write x"), "{reason}");
        let cancelled = Ended {
            desired: Desired::CancelDiscard,
            ..state
        };
        assert_eq!(after_exit(&cancelled, LIMITS), Outcome::Cancel);
    }

    #[test]
    fn a_worker_that_ran_out_of_memory_gets_half_the_micro_batch_once() {
        let exit = Exit::Signal(6).explained_by("memory allocation of 123 bytes failed\n");
        assert_eq!(exit, Exit::OutOfMemory(6));
        assert_eq!(Exit::Signal(6).explained_by("assertion failed"), Exit::Signal(6));
        let mut state = ended(&exit);
        let Outcome::Shrink { reason } = after_exit(&state, LIMITS) else {
            panic!("not shrunk")
        };
        assert!(reason.contains("out of memory"), "{reason}");
        state.memory_rescues = 1;
        let Outcome::Fail(problem) = after_exit(&state, LIMITS) else {
            panic!("not failed")
        };
        assert_eq!(problem.code, "worker.out_of_memory");
        state.memory_rescues = 0;
        state.desired = Desired::CancelDiscard;
        assert_eq!(after_exit(&state, LIMITS), Outcome::Cancel);
    }

    #[test]
    fn progress_forgives_earlier_interruptions() {
        let exit = Exit::Signal(11);
        let state = Ended {
            progressed: true,
            failed_attempts: 2,
            ..ended(&exit)
        };
        assert!(matches!(
            after_exit(&state, LIMITS),
            Outcome::Requeue {
                delay_ms: 0,
                failed_attempts: 0,
                ..
            }
        ));
    }

    #[test]
    fn a_cancelled_job_is_not_run_again_unless_there_is_something_to_save() {
        let exit = Exit::Signal(9);
        for desired in [Desired::CancelDiscard, Desired::CancelForce, Desired::CancelSave] {
            assert_eq!(
                after_exit(
                    &Ended {
                        desired,
                        ..ended(&exit)
                    },
                    LIMITS
                ),
                Outcome::Cancel
            );
        }
        let saving = Ended {
            desired: Desired::CancelSave,
            has_checkpoint: true,
            ..ended(&exit)
        };
        assert!(matches!(after_exit(&saving, LIMITS), Outcome::Requeue { .. }));
    }

    #[test]
    fn a_worker_that_delivered_is_settled_however_it_exits() {
        let done = WorkerEvent::Done {
            results: Results {
                files: Vec::new(),
                summary: serde_json::Map::new(),
            },
        };
        for exit in [Exit::Code(0), Exit::Signal(9), Exit::Unknown] {
            let state = Ended {
                status: JobStatus::Saving,
                final_event: Some(&done),
                ..ended(&exit)
            };
            assert_eq!(after_exit(&state, LIMITS), Outcome::Settled);
        }
    }

    #[test]
    fn a_worker_that_cannot_use_its_directory_is_not_retried() {
        assert!(matches!(
            after_exit(&ended(&Exit::Code(EXIT_USAGE)), LIMITS),
            Outcome::Fail(_)
        ));
    }

    #[test]
    fn a_server_that_dies_before_it_starts_a_worker_costs_no_attempt() {
        let state = Ended {
            failed_attempts: 2,
            ..ended(&Exit::NeverStarted)
        };
        assert!(matches!(
            after_exit(&state, LIMITS),
            Outcome::Requeue {
                delay_ms: 0,
                failed_attempts: 2,
                ..
            }
        ));
    }

    #[test]
    fn stopping_as_told_costs_no_attempt_also_during_the_export() {
        for (reason, status, code, word) in [
            (StopReason::Drained, JobStatus::Running, EXIT_TEMPFAIL, "drained"),
            (StopReason::Drained, JobStatus::Saving, EXIT_TEMPFAIL, "drained"),
            (StopReason::Paused, JobStatus::Saving, 0, "paused"),
        ] {
            let stopped = WorkerEvent::Stopped {
                step: 7,
                reason,
                results: None,
            };
            let exit = Exit::Code(code);
            let state = Ended {
                status,
                final_event: Some(&stopped),
                failed_attempts: 2,
                ..ended(&exit)
            };
            assert_eq!(
                after_exit(&state, LIMITS),
                Outcome::Requeue {
                    delay_ms: 0,
                    failed_attempts: 2,
                    reason: word.to_owned(),
                }
            );
        }
    }
}
