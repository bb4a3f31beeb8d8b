//! The server's side of the worker protocol: an HTTP route on a Unix socket in the data directory (mode 0600), never on
//! the public listener. Guarded by the attempt's token; idempotent by the worker's own numbering.
//!
//! Called by workers (`agent`), and by `scheduler` for the spool of a worker that died.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use lorad_proto::{
    command::{EventsPost, EventsReply},
    event::{Envelope, Phase, Sample, StepMetrics, WorkerEvent},
};
use sha2::{Digest, Sha256};

use crate::{
    app::App,
    domain::{JobId, Progress, artifact::is_plain_file_name, attempt::command_for},
    executor::AttemptKey,
    store::{Applied, Attempt, StoreError, WorkerBatch},
};

/// Largest post: 500 events of far more than usual size.
const MAX_POST_BYTES: usize = 64 << 20;

/// Who was heard when, and how fast they train. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heard {
    attempts: Arc<Mutex<HashMap<AttemptKey, Voice>>>,
}

#[derive(Debug)]
struct Voice {
    at: Instant,
    /// Time of a step, smoothed, milliseconds.
    step_ms: Option<f64>,
}

impl Heard {
    fn with<T>(&self, act: impl FnOnce(&mut HashMap<AttemptKey, Voice>) -> T) -> T {
        act(&mut self.attempts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes that a worker was heard, or that its lease starts now.
    pub(crate) fn note(&self, key: AttemptKey) {
        self.with(|attempts| {
            attempts
                .entry(key)
                .or_insert(Voice {
                    at: Instant::now(),
                    step_ms: None,
                })
                .at = Instant::now();
        });
    }

    /// When it was last heard.
    pub(crate) fn last(&self, key: AttemptKey) -> Option<Instant> {
        self.with(|attempts| attempts.get(&key).map(|voice| voice.at))
    }

    /// Forgets an attempt that has ended.
    pub(crate) fn forget(&self, key: AttemptKey) {
        self.with(|attempts| attempts.remove(&key));
    }

    fn smooth(&self, key: AttemptKey, step_ms: f64) -> f64 {
        self.with(|attempts| {
            let voice = attempts.entry(key).or_insert(Voice {
                at: Instant::now(),
                step_ms: None,
            });
            let smoothed = voice.step_ms.map_or(step_ms, |old| 0.9 * old + 0.1 * step_ms);
            voice.step_ms = Some(smoothed);
            smoothed
        })
    }
}

/// What the worker's route holds.
#[derive(Debug, Clone)]
pub(crate) struct AgentApi {
    pub(crate) app: App,
    pub(crate) heard: Heard,
}

/// The worker's routes.
pub(crate) fn router(api: AgentApi) -> Router {
    Router::new()
        .route("/internal/attempts/{job}/{attempt}/events", post(events))
        .layer(DefaultBodyLimit::max(MAX_POST_BYTES))
        .with_state(api)
}

async fn events(
    State(api): State<AgentApi>,
    Path((job, attempt)): Path<(JobId, u32)>,
    Json(post): Json<EventsPost>,
) -> Response {
    let token_sha256 = hex::encode(Sha256::digest(post.token.as_bytes()));
    match api.hear((job, attempt), &token_sha256, &post.events).await {
        Ok(applied) => Json(EventsReply {
            acked_seq: applied.acked_seq,
            lease_ms: api.app.config.scheduler.lease_ms,
            command: command_for(&applied.job, false),
        })
        .into_response(),
        Err(StoreError::Fenced { .. }) => StatusCode::CONFLICT.into_response(),
        Err(error) => {
            tracing::error!(job.id = %job, error = &error as &dyn std::error::Error, "worker events were not stored");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

impl AgentApi {
    /// Takes a batch from a living worker.
    pub(crate) async fn hear(
        &self,
        key: AttemptKey,
        token_sha256: &str,
        events: &[Envelope],
    ) -> Result<Applied, StoreError> {
        // First of all who it is: a server that dies between starting a worker and writing down its process would leave
        // one that the next server cannot find, and its device would be given away while it still trains on it.
        if let Some(pid) = events.iter().find_map(pid_of_hello) {
            let stored = self.app.store.check_fence(key.0, key.1, token_sha256).await?;
            if stored.pid.is_none() {
                let start = crate::executor::start_time(pid);
                self.app.store.set_attempt_process(key.0, key.1, pid, start).await?;
                self.app.wake.notify_one();
            }
        }
        let applied = self.take(key, token_sha256, events).await?;
        self.heard.note(key);
        Ok(applied)
    }

    /// Stores a batch: sample pictures are published first, then everything goes into one transaction, then viewers hear.
    pub(crate) async fn take(
        &self,
        key: AttemptKey,
        token_sha256: &str,
        events: &[Envelope],
    ) -> Result<Applied, StoreError> {
        let (job, attempt) = key;
        let stored = self.app.store.check_fence(job, attempt, token_sha256).await?;
        let published = self.publish_samples(&stored, events).await;
        let batch = WorkerBatch {
            job,
            attempt,
            token_sha256,
            events,
            published: &published,
            lease_ms: i64::try_from(self.app.config.scheduler.lease_ms).unwrap_or(i64::MAX),
        };
        let applied = match self.app.store.apply(&batch).await {
            Ok(applied) => applied,
            Err(error) => {
                if !published.is_empty() {
                    self.app.sweep_files(job).await;
                }
                return Err(error);
            }
        };
        self.app.events.stored(job, applied.job.last_seq);
        if applied.acked_seq > stored.acked_seq && applied.job.status.is_final() {
            self.app.traces.job(&applied.job);
        }
        self.progress(key, &applied, events);
        if applied.publish || !applied.job.status.is_active() {
            self.app.wake.notify_one();
        }
        Ok(applied)
    }

    async fn publish_samples(&self, attempt: &Attempt, events: &[Envelope]) -> HashSet<String> {
        let mut published = HashSet::new();
        for envelope in events.iter().filter(|envelope| envelope.seq > attempt.acked_seq) {
            if let WorkerEvent::Sample(sample) = &envelope.event
                && self.publish_sample(attempt, sample).await
            {
                published.insert(sample.file.clone());
            }
        }
        published
    }

    async fn publish_sample(&self, attempt: &Attempt, sample: &Sample) -> bool {
        if !is_plain_file_name(&sample.file) {
            return false;
        }
        let path = attempt.dir.join("samples").join(&sample.file);
        match self
            .app
            .blobs
            .publish(attempt.job_id, &sample.file, &path, sample.bytes, &sample.sha256)
            .await
        {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(job.id = %attempt.job_id, error = &error as &dyn std::error::Error, "a sample was not published");
                false
            }
        }
    }

    fn progress(&self, key: AttemptKey, applied: &Applied, events: &[Envelope]) {
        let mut newest = None;
        for envelope in events {
            match &envelope.event {
                WorkerEvent::Phase { phase, done, total } => newest = Some(phase_progress(*phase, *done, *total)),
                WorkerEvent::Step(step) => newest = Some(self.step_progress(key, step)),
                _ => {}
            }
        }
        if let Some(progress) = newest
            && applied.job.status.is_active()
        {
            self.app.events.progress(key.0, progress);
        }
    }

    fn step_progress(&self, key: AttemptKey, step: &StepMetrics) -> Progress {
        let step_ms = self.heard.smooth(key, step.step_ms);
        let left = step.total_steps.saturating_sub(step.step) as f64;
        Progress {
            step: step.step,
            total: step.total_steps,
            epoch: Some(step.epoch),
            it_s: (step_ms > 0.0).then(|| 1000.0 / step_ms),
            eta_s: Some(left * step_ms / 1000.0),
            ..phase_progress(Phase::Training, 0, 0)
        }
    }
}

fn pid_of_hello(envelope: &Envelope) -> Option<u32> {
    match envelope.event {
        WorkerEvent::Hello { pid, .. } => Some(pid),
        _ => None,
    }
}

fn phase_progress(phase: Phase, done: u64, total: u64) -> Progress {
    Progress {
        phase: crate::store::phase_name(phase).to_owned(),
        step: done,
        total,
        epoch: None,
        it_s: None,
        eta_s: None,
    }
}
