//! What a viewer of a job sees: stored events under one number, and transient progress.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::job::text_enum;

text_enum!(
    /// Kinds of stored events; the names of the Server-Sent Events.
    EventKind {
        /// `{from, to, reason, attempt}`
        Status = "status",
        /// `{cols, rows, attempt}`, one batch of optimizer steps.
        Metrics = "metrics",
        /// `{level, message}`
        Log = "log",
        /// `{step, prompt_index, prompt, seed, file, width, height, bytes, sha256}`
        Sample = "sample",
        /// `{step, bytes, sha256}`
        Checkpoint = "checkpoint",
        /// `{code, severity, step, detail}`
        Alert = "alert",
    }
);

/// A stored event. `seq` grows by one with each event of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobEvent {
    /// From 1, without gaps within a job.
    pub seq: u64,
    /// What kind.
    pub kind: EventKind,
    /// When it happened, milliseconds since the epoch.
    pub t_ms: i64,
    /// Attempt that it belongs to; 0: none.
    pub attempt: u32,
    /// Depends on the kind.
    pub data: Value,
}

/// How far the running attempt is. Never stored, at most two a second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// `loading`, `caching`, `checking_gradients`, `sampling`, `training`, `exporting`.
    pub phase: String,
    /// Units done in this phase; in training: optimizer steps.
    pub step: u64,
    /// Units in this phase; 0: unknown.
    pub total: u64,
    /// Passes over the data.
    pub epoch: Option<f64>,
    /// Optimizer steps per second, smoothed.
    pub it_s: Option<f64>,
    /// Until the last step, seconds.
    pub eta_s: Option<f64>,
}
