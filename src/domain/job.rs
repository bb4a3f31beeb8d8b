//! Jobs and their state machine. What is (`status`) is kept apart from what was asked (`desired`).
//!
//! The table of legal transitions stands here ([`JobStatus::next`]) and once more in the database (a trigger); a test in
//! `store` compares the two.

use lorad_proto::{
    catalog::Plan,
    problem::Problem,
    spec::{Export, Sampling},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    id::{DatasetId, JobId, KeyId, ModelId},
    webhook::NewWebhook,
};

macro_rules! text_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// Every value, in order.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The value's one spelling, in JSON and in the database.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            /// The value with this spelling.
            pub fn parse(text: &str) -> Option<Self> {
                match text {
                    $($text => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(crate) use text_enum;

text_enum!(
    /// Where a job stands.
    JobStatus {
        /// Its inputs are still being checked or fetched.
        Validating = "validating",
        /// Waits for a device.
        Queued = "queued",
        /// A worker loads the base and encodes the data.
        Preparing = "preparing",
        /// Optimizer steps.
        Running = "running",
        /// Stopped on request; a checkpoint is kept.
        Paused = "paused",
        /// The worker was lost; goes back to the queue by itself.
        Interrupted = "interrupted",
        /// Result files are written, verified and published.
        Saving = "saving",
        /// Final: every result file is published.
        Succeeded = "succeeded",
        /// Final: `error` says why.
        Failed = "failed",
        /// Final: on request.
        Cancelled = "cancelled",
    }
);

text_enum!(
    /// What happens to a job.
    Change {
        /// Its inputs are complete.
        Validated = "validated",
        /// A device slot took it.
        Claim = "claim",
        /// The first optimizer step of an attempt is done.
        Train = "train",
        /// The last step is done, or what was trained so far is to be saved.
        Save = "save",
        /// Every result file is published.
        Succeed = "succeed",
        /// It was paused.
        Pause = "pause",
        /// A paused job was resumed.
        Resume = "resume",
        /// The worker was lost or drained.
        Interrupt = "interrupt",
        /// An interrupted job waits for its next attempt.
        Requeue = "requeue",
        /// It cannot succeed.
        Fail = "fail",
        /// It was cancelled.
        Cancel = "cancel",
    }
);

text_enum!(
    /// What was asked of a job.
    Desired {
        /// Train to the end.
        Run = "run",
        /// Write a checkpoint and stop.
        Pause = "pause",
        /// Stop, export what has been trained.
        CancelSave = "cancel_save",
        /// Stop at the next step, keep nothing.
        CancelDiscard = "cancel_discard",
        /// Kill the worker now, keep nothing.
        CancelForce = "cancel_force",
    }
);

impl Desired {
    /// Whether a cancellation was asked.
    pub fn is_cancel(self) -> bool {
        matches!(self, Self::CancelSave | Self::CancelDiscard | Self::CancelForce)
    }
}

text_enum!(
    /// How to cancel.
    CancelMode {
        /// Export what has been trained.
        Save = "save",
        /// Stop at the next step boundary and keep nothing.
        Discard = "discard",
        /// Kill the worker now and keep nothing.
        Force = "force",
    }
);

impl CancelMode {
    /// What the job's `desired` becomes.
    pub fn desired(self) -> Desired {
        match self {
            Self::Save => Desired::CancelSave,
            Self::Discard => Desired::CancelDiscard,
            Self::Force => Desired::CancelForce,
        }
    }
}

text_enum!(
    /// What a user can do with a job; which of them are open depends on its status.
    Action {
        /// `POST …/cancel`
        Cancel = "cancel",
        /// `POST …/pause`
        Pause = "pause",
        /// `POST …/resume`
        Resume = "resume",
        /// `POST …/checkpoint`
        Checkpoint = "checkpoint",
        /// `POST …/sample`
        Sample = "sample",
        /// `POST …/retry`
        Retry = "retry",
        /// `POST …/clone`
        Clone = "clone",
        /// `DELETE`
        Delete = "delete",
    }
);

/// A change that the state machine does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a job that is {status} cannot {change}")]
pub struct IllegalChange {
    /// Where the job stands.
    pub status: JobStatus,
    /// What was tried.
    pub change: Change,
}

impl JobStatus {
    /// The state machine.
    ///
    /// # Errors
    /// If the change is not allowed here; final states allow none.
    pub fn next(self, change: Change) -> Result<Self, IllegalChange> {
        use Change as C;
        use JobStatus as S;
        let to = match (self, change) {
            (S::Validating, C::Validated) => S::Queued,
            (S::Queued, C::Claim) => S::Preparing,
            (S::Preparing, C::Train) => S::Running,
            (S::Preparing | S::Running, C::Save) => S::Saving,
            (S::Saving, C::Succeed) => S::Succeeded,
            (S::Queued | S::Preparing | S::Running, C::Pause) => S::Paused,
            (S::Paused, C::Resume) | (S::Interrupted, C::Requeue) => S::Queued,
            (S::Preparing | S::Running | S::Saving, C::Interrupt) => S::Interrupted,
            (S::Validating | S::Preparing | S::Running | S::Interrupted | S::Saving, C::Fail) => S::Failed,
            (s, C::Cancel) if !s.is_final() => S::Cancelled,
            (status, change) => return Err(IllegalChange { status, change }),
        };
        Ok(to)
    }

    /// Whether nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Whether a worker may be at it, so that its events are taken.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Preparing | Self::Running | Self::Saving)
    }

    /// What a user can do with a job in this state.
    pub fn actions(self) -> &'static [Action] {
        match self {
            Self::Validating => &[Action::Cancel],
            Self::Queued => &[Action::Cancel, Action::Pause, Action::Clone],
            Self::Preparing => &[Action::Cancel, Action::Pause, Action::Clone],
            Self::Running => &[
                Action::Cancel,
                Action::Pause,
                Action::Checkpoint,
                Action::Sample,
                Action::Clone,
            ],
            Self::Paused => &[Action::Cancel, Action::Resume, Action::Clone],
            Self::Interrupted | Self::Saving => &[Action::Cancel, Action::Clone],
            Self::Succeeded => &[Action::Clone, Action::Delete],
            Self::Failed | Self::Cancelled => &[Action::Retry, Action::Clone, Action::Delete],
        }
    }
}

/// A job to be stored, everything resolved and validated.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// Its id, made by the caller so that files can be laid out first.
    pub id: JobId,
    /// The job that this one retries or clones.
    pub parent_id: Option<JobId>,
    /// For people; 1 to 200 characters.
    pub name: String,
    /// For people.
    pub tags: Vec<String>,
    /// For people.
    pub notes: String,
    /// -1000 to 1000; higher starts first.
    pub priority: i64,
    /// The frozen base.
    pub base_model: ModelId,
    /// What to train on.
    pub dataset_id: DatasetId,
    /// Model family.
    pub family: String,
    /// The request as given.
    pub request: Value,
    /// Every hyperparameter of the family.
    pub hyperparameters: Map<String, Value>,
    /// Sample pictures.
    pub sampling: Sampling,
    /// Extra results.
    pub export: Export,
    /// What it will do.
    pub plan: Plan,
    /// The key that it was posted with.
    pub owner: Option<KeyId>,
    /// Who is told what becomes of it.
    pub webhook: Option<NewWebhook>,
}

/// A job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// `job_…`
    pub id: JobId,
    /// The job that this one retries or clones.
    pub parent_id: Option<JobId>,
    /// For people.
    pub name: String,
    /// For people.
    pub tags: Vec<String>,
    /// For people.
    pub notes: String,
    /// Higher starts first.
    pub priority: i64,
    /// What is.
    pub status: JobStatus,
    /// What was asked.
    pub desired: Desired,
    /// The frozen base.
    pub base_model: ModelId,
    /// What it trains on.
    pub dataset_id: DatasetId,
    /// Model family.
    pub family: String,
    /// The request as given.
    pub request: Value,
    /// Every hyperparameter of the family.
    pub hyperparameters: Map<String, Value>,
    /// Sample pictures.
    pub sampling: Sampling,
    /// Extra results.
    pub export: Export,
    /// What it was expected to do when it was posted.
    pub plan: Plan,
    /// Optimizer steps in all.
    pub total_steps: u64,
    /// Optimizer steps done.
    pub step: u64,
    /// Phase of the running attempt.
    pub phase: Option<String>,
    /// Number of the newest attempt; 0: none yet.
    pub attempt: u32,
    /// Interruptions in a row without a new checkpoint.
    pub failed_attempts: u32,
    /// Times that an attempt ran out of memory and the next one began with half the micro-batch.
    pub memory_rescues: u32,
    /// It is not claimed before this time (backoff).
    pub not_before_ms: i64,
    /// When the worker's lease ends, if it has one.
    pub lease_expires_ms: Option<i64>,
    /// Checkpoint requests not yet served: the newest one's number.
    pub checkpoint_request: Option<u64>,
    /// Sample requests not yet served: the newest one's number.
    pub sample_request: Option<u64>,
    /// Number of its newest event.
    pub last_seq: u64,
    /// When it was posted.
    pub created_at_ms: i64,
    /// When its first attempt made its first step.
    pub started_at_ms: Option<i64>,
    /// When it became final.
    pub finished_at_ms: Option<i64>,
    /// Why it failed.
    pub error: Option<Problem>,
    /// Figures of the finished job.
    pub summary: Map<String, Value>,
}

/// A result file of another job that a job starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitFrom {
    /// The job that made it.
    pub job_id: JobId,
    /// Its name among that job's files.
    pub file: String,
}

impl InitFrom {
    /// The adapter that a job starts from, if its request names one.
    pub fn of(request: &Value) -> Option<Self> {
        let init = request.get("init_from")?;
        let file = init.get("file")?.as_str()?.to_owned();
        let job_id = init.get("job_id")?.as_str()?.parse().ok()?;
        super::artifact::is_plain_file_name(&file).then_some(Self { job_id, file })
    }
}

impl Job {
    /// The adapter that the job starts from.
    pub fn init_from(&self) -> Option<InitFrom> {
        InitFrom::of(&self.request)
    }
}

/// What a user may change about a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobPatch {
    /// New name.
    pub name: Option<String>,
    /// New tags.
    pub tags: Option<Vec<String>>,
    /// New notes.
    pub notes: Option<String>,
    /// New priority.
    pub priority: Option<i64>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn final_states_allow_no_change() {
        for status in JobStatus::ALL.iter().filter(|s| s.is_final()) {
            for change in Change::ALL {
                assert!(status.next(*change).is_err(), "{status} took {change}");
            }
        }
    }

    #[test]
    fn every_state_that_is_not_final_can_be_cancelled_and_every_state_is_reachable() {
        let mut reached = vec![JobStatus::Validating];
        let mut i = 0;
        while i < reached.len() {
            if !reached[i].is_final() {
                assert_eq!(reached[i].next(Change::Cancel).unwrap(), JobStatus::Cancelled);
                assert!(reached[i].actions().contains(&Action::Cancel));
            }
            for change in Change::ALL {
                if let Ok(to) = reached[i].next(*change)
                    && !reached.contains(&to)
                {
                    reached.push(to);
                }
            }
            i += 1;
        }
        assert_eq!(reached.len(), JobStatus::ALL.len());
    }

    #[test]
    fn a_job_succeeds_only_from_saving() {
        for status in JobStatus::ALL {
            assert_eq!(status.next(Change::Succeed).is_ok(), *status == JobStatus::Saving);
        }
    }

    #[test]
    fn spellings_survive_text() {
        for status in JobStatus::ALL {
            assert_eq!(JobStatus::parse(status.as_str()), Some(*status));
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
        }
        assert_eq!(JobStatus::parse("Running"), None);
    }

    proptest! {
        #[test]
        fn no_sequence_of_changes_leaves_a_final_state(changes in prop::collection::vec(0..Change::ALL.len(), 0..60)) {
            let mut status = JobStatus::Queued;
            let mut ended = None;
            for change in changes {
                if let Ok(to) = status.next(Change::ALL[change]) {
                    prop_assert!(ended.is_none(), "{status} -> {to}");
                    status = to;
                }
                if status.is_final() {
                    ended = Some(status);
                }
            }
            prop_assert!(ended.is_none_or(|end| end == status));
        }
    }
}
