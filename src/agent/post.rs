//! Posts the spool to the server, and brings its commands back.

use std::{sync::Arc, time::Duration};

use lorad_proto::command::{EventsPost, EventsReply};
use tokio::time::Instant;

use super::spool::Spool;

/// Events gather this long before they are posted.
const GATHER: Duration = Duration::from_millis(150);
/// Events of one post.
const BATCH: usize = 500;
/// Pauses between tries while the server is out of reach.
const RETRY: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];

/// How the posting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The final event is stored.
    Acknowledged,
    /// A newer attempt owns the job.
    Fenced,
    /// The server did not answer for a whole lease, and the attempt is over.
    LeaseOver,
}

enum Answer {
    Stored(EventsReply),
    Fenced,
    OutOfReach,
}

/// Posts until the final event is acknowledged.
#[derive(Debug)]
pub(super) struct Poster {
    pub(super) client: reqwest::Client,
    pub(super) url: String,
    pub(super) token: String,
    pub(super) heartbeat: Duration,
    pub(super) lease: Duration,
    pub(super) spool: Arc<Spool>,
}

impl Poster {
    pub(super) async fn run(self) -> Ended {
        // The clock of the lease runs from the last answer; it is the worker's own and knows no time of day.
        let mut lease_ends = Instant::now() + self.lease;
        let mut retry = RETRY[0];
        loop {
            match self.post().await {
                Answer::Stored(reply) => {
                    lease_ends = Instant::now() + self.lease;
                    retry = RETRY[0];
                    if self.spool.acknowledge(reply.acked_seq, reply.command) {
                        return Ended::Acknowledged;
                    }
                    self.wait_for_events().await;
                }
                Answer::Fenced => {
                    tracing::warn!("a newer attempt owns the job: stopping without writing");
                    self.spool.fence();
                    return Ended::Fenced;
                }
                Answer::OutOfReach => {
                    if Instant::now() >= lease_ends {
                        if self.spool.is_complete() {
                            return Ended::LeaseOver;
                        }
                        tracing::warn!(
                            "the server did not answer for a whole lease: writing a checkpoint and stopping"
                        );
                        self.spool.drain();
                    }
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(RETRY[1]);
                }
            }
        }
    }

    /// Until there is something to post: events, gathered for a moment, or the next heartbeat.
    async fn wait_for_events(&self) {
        if self.spool.has_pending() && self.spool.batch(BATCH).len() == BATCH {
            return;
        }
        if !self.spool.has_pending() {
            let _ = tokio::time::timeout(self.heartbeat, self.spool.appended()).await;
        }
        if !self.spool.is_complete() {
            tokio::time::sleep(GATHER.min(self.heartbeat)).await;
        }
    }

    async fn post(&self) -> Answer {
        let post = EventsPost {
            token: self.token.clone(),
            events: self.spool.batch(BATCH),
        };
        let response = match self.client.post(&self.url).json(&post).send().await {
            Ok(response) => response,
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "the server is out of reach");
                return Answer::OutOfReach;
            }
        };
        match response.status() {
            reqwest::StatusCode::CONFLICT => Answer::Fenced,
            status if status.is_success() => match response.json().await {
                Ok(reply) => Answer::Stored(reply),
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "the server's answer was not understood"
                    );
                    Answer::OutOfReach
                }
            },
            status => {
                tracing::warn!(%status, "the server could not store events");
                Answer::OutOfReach
            }
        }
    }
}
