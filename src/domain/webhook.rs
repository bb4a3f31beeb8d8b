//! Webhooks: which events there are, and what follows from an attempt to deliver one.

use serde::{Deserialize, Serialize};

use super::{
    id::{JobId, MessageId, WebhookId},
    job::{JobStatus, text_enum},
};

text_enum!(
    /// What a webhook can be told.
    WebhookEvent {
        /// A job was posted.
        Created = "job.created",
        /// An attempt made its first step.
        Started = "job.started",
        /// It was paused.
        Paused = "job.paused",
        /// Its worker was lost; it goes on by itself.
        Interrupted = "job.interrupted",
        /// Every result file is published.
        Succeeded = "job.succeeded",
        /// It failed; `error` says why.
        Failed = "job.failed",
        /// It was cancelled.
        Cancelled = "job.cancelled",
        /// Somebody asked for a test.
        Test = "webhook.test",
    }
);

impl WebhookEvent {
    /// What a job's new status is told as, if at all.
    pub fn of(to: JobStatus) -> Option<Self> {
        match to {
            JobStatus::Running => Some(Self::Started),
            JobStatus::Paused => Some(Self::Paused),
            JobStatus::Interrupted => Some(Self::Interrupted),
            JobStatus::Succeeded => Some(Self::Succeeded),
            JobStatus::Failed => Some(Self::Failed),
            JobStatus::Cancelled => Some(Self::Cancelled),
            JobStatus::Validating | JobStatus::Queued | JobStatus::Preparing | JobStatus::Saving => None,
        }
    }
}

text_enum!(
    /// Where a delivery stands.
    DeliveryStatus {
        /// Waits for its next attempt.
        Pending = "pending",
        /// The receiver took it.
        Delivered = "delivered",
        /// Given up.
        Failed = "failed",
    }
);

/// A webhook to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewWebhook {
    /// Where to.
    pub url: String,
    /// About what.
    pub events: Vec<WebhookEvent>,
    /// `whsec_…`
    pub secret: String,
    /// For people.
    pub description: String,
}

/// A webhook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    /// `wh_…`
    pub id: WebhookId,
    /// The job that it belongs to; `None`: it hears of all.
    pub job_id: Option<JobId>,
    /// Where to.
    pub url: String,
    /// About what.
    pub events: Vec<WebhookEvent>,
    /// `whsec_…`
    pub secret: String,
    /// For people.
    pub description: String,
    /// Whether it is told anything.
    pub enabled: bool,
    /// Why not.
    pub disabled_reason: Option<String>,
    /// Since when every attempt failed.
    pub failing_since_ms: Option<i64>,
    /// When it was made.
    pub created_at_ms: i64,
}

/// What may change about a webhook.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WebhookPatch {
    /// New address.
    pub url: Option<String>,
    /// New events.
    pub events: Option<Vec<WebhookEvent>>,
    /// New description.
    pub description: Option<String>,
    /// On or off; on also forgets past failures.
    pub enabled: Option<bool>,
}

/// One event on its way to one webhook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// `msg_…`
    pub id: MessageId,
    /// Where to.
    pub webhook_id: WebhookId,
    /// About what.
    pub event: String,
    /// The body.
    pub payload: String,
    /// Where it stands.
    pub status: DeliveryStatus,
    /// Attempts since it was queued.
    pub tries: u32,
    /// When it is tried next.
    pub next_attempt_ms: Option<i64>,
    /// When it happened.
    pub created_at_ms: i64,
    /// What became of each attempt, oldest first.
    pub attempts: Vec<DeliveryAttempt>,
}

/// An attempt to deliver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeliveryAttempt {
    /// When.
    pub t_ms: i64,
    /// How long it took.
    pub duration_ms: u64,
    /// What the receiver answered, if it did.
    pub http_status: Option<u16>,
    /// Why it did not count; `None`: delivered.
    pub error: Option<String>,
}

impl DeliveryAttempt {
    /// 410: the receiver wants nothing more.
    fn is_gone(&self) -> bool {
        self.http_status == Some(410)
    }
}

/// When to try again and when to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetrySchedule {
    /// Pause before the second, third, … attempt.
    pub pauses_ms: Vec<u64>,
    /// A webhook that failed for so long is disabled.
    pub disable_after_ms: i64,
}

/// What follows from an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AfterAttempt {
    /// Done.
    Delivered,
    /// Again at this time.
    Retry(i64),
    /// Not again.
    GiveUp,
    /// Not again, and the webhook is told nothing more.
    Disable(&'static str),
}

impl RetrySchedule {
    /// What follows from `attempt`, the `tries`-th, at a webhook that has been failing since `failing_since_ms`.
    pub fn after(&self, attempt: &DeliveryAttempt, tries: u32, failing_since_ms: Option<i64>) -> AfterAttempt {
        if attempt.error.is_none() {
            return AfterAttempt::Delivered;
        }
        if attempt.is_gone() {
            return AfterAttempt::Disable("the receiver answered 410 Gone");
        }
        if failing_since_ms.is_some_and(|since| attempt.t_ms - since >= self.disable_after_ms) {
            return AfterAttempt::Disable("every attempt failed for days");
        }
        let pause = usize::try_from(tries)
            .ok()
            .and_then(|n| self.pauses_ms.get(n.saturating_sub(1)));
        pause.map_or(AfterAttempt::GiveUp, |pause| {
            AfterAttempt::Retry(attempt.t_ms.saturating_add_unsigned(*pause))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_retried_by_the_schedule_then_given_up_and_days_of_them_disable() {
        let schedule = RetrySchedule {
            pauses_ms: vec![5_000, 300_000],
            disable_after_ms: 1_000_000,
        };
        let attempt = |t_ms, http_status, error: Option<&str>| DeliveryAttempt {
            t_ms,
            duration_ms: 1,
            http_status,
            error: error.map(str::to_owned),
        };
        let failed = attempt(100, Some(500), Some("500"));
        assert_eq!(
            schedule.after(&attempt(1, Some(204), None), 1, Some(0)),
            AfterAttempt::Delivered
        );
        assert_eq!(schedule.after(&failed, 1, None), AfterAttempt::Retry(5_100));
        assert_eq!(schedule.after(&failed, 2, Some(0)), AfterAttempt::Retry(300_100));
        assert_eq!(schedule.after(&failed, 3, Some(0)), AfterAttempt::GiveUp);
        let late = attempt(1_000_000, None, Some("timeout"));
        assert!(matches!(schedule.after(&late, 1, Some(0)), AfterAttempt::Disable(_)));
        assert_eq!(schedule.after(&late, 1, Some(1)), AfterAttempt::Retry(1_005_000));
        assert!(matches!(
            schedule.after(&attempt(1, Some(410), Some("410")), 1, None),
            AfterAttempt::Disable(_)
        ));
    }

    #[test]
    fn every_final_status_is_told() {
        for status in JobStatus::ALL.iter().filter(|status| status.is_final()) {
            assert!(WebhookEvent::of(*status).is_some(), "{status}");
        }
    }
}
