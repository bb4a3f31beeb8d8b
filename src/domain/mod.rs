//! What the server talks about: ids, jobs and their state machine, events, metrics, artifacts, datasets, models.
//!
//! Pure values and decisions. Knows neither axum nor sqlx, no files and no clock except [`now_ms`]. Everyone uses it.

pub mod access;
pub mod artifact;
pub mod attempt;
pub mod dataset;
pub mod download;
pub mod estimate;
pub mod event;
pub mod id;
pub mod job;
pub mod metric;
pub mod model;
pub mod webhook;

pub use access::{ApiKey, ApiKeyPatch, AuditEntry, NewApiKey, Quota, Scope};
pub use artifact::{Artifact, ArtifactKind, Checkpoint, JobSample};
pub use attempt::{Ended, Exit, Outcome, RetryLimits};
pub use dataset::Dataset;
pub use event::{EventKind, JobEvent, Progress};
pub use id::{DatasetId, IdError, JobId, KeyId, MessageId, ModelId, WebhookId};
pub use job::{Action, CancelMode, Change, Desired, IllegalChange, InitFrom, Job, JobPatch, JobStatus, NewJob};
pub use metric::{Bucket, MetricRow, Series, downsample};
pub use model::{Model, ModelKind};
pub use webhook::{
    AfterAttempt, Delivery, DeliveryAttempt, DeliveryStatus, NewWebhook, RetrySchedule, Webhook, WebhookEvent,
    WebhookPatch,
};

/// The wall clock, milliseconds since the Unix epoch, UTC.
pub fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
