//! The worker's post and the server's answer: `POST /internal/attempts/{job_id}/{attempt}/events`.

use serde::{Deserialize, Serialize};

use crate::event::Envelope;

/// A batch of events. Also the heartbeat, then with no events.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventsPost {
    /// The attempt's secret token, given to the worker by environment, never on a command line.
    pub token: String,
    /// Events in order of `seq`; may repeat events already sent.
    pub events: Vec<Envelope>,
}

/// The answer to a post.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsReply {
    /// Everything up to this `seq` is stored.
    pub acked_seq: u64,
    /// Milliseconds from now until the lease ends.
    pub lease_ms: u64,
    /// What to do next.
    pub command: Command,
}

/// What the server asks of a worker; honoured at the next step boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Command {
    /// Go on.
    #[default]
    None,
    /// Write a checkpoint now, then go on. `request` grows with each request, so that one is not served twice.
    Checkpoint {
        /// Number of the request.
        request: u64,
    },
    /// Make sample pictures now, then go on.
    Sample {
        /// Number of the request.
        request: u64,
    },
    /// Write a checkpoint and stop.
    Pause,
    /// Stop; with `save`, export what has been trained first.
    Cancel {
        /// Whether to export.
        save: bool,
    },
    /// Write a checkpoint and stop, because the server shuts down.
    Drain,
}
