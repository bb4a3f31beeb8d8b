//! Moves jobs: free device → next job → worker process → published results, and picks up what breaks on the way.
//!
//! [`Scheduler::tick`] does everything there is to do and returns; a loop calls it when something wakes it (a posted job,
//! an ended process, a stored final event) and at a slow beat for leases and backoffs. All state that must survive lies
//! in the store, so a tick of a fresh scheduler goes on where a dead one stopped. Knows no HTTP. Started by `serve`.

mod claim;
mod ladder;
mod publish;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::task::JoinSet;

use crate::{
    agent::read_spool,
    agent_api::AgentApi,
    app::App,
    domain::{Exit, JobStatus, Outcome},
    executor::{AttemptKey, Executor, Observed, Started, local},
    store::{Attempt, StoreError},
};
use ladder::{Ladder, Rung};
pub(crate) use publish::sweep;

/// Setting that stops claims; `PUT`ted by the API.
pub const QUEUE_PAUSED: &str = "queue_paused";

/// The scheduler.
pub(crate) struct Scheduler {
    app: App,
    api: AgentApi,
    executor: Arc<dyn Executor>,
    ladders: HashMap<AttemptKey, Ladder>,
    /// Attempts whose worker is being started, by the task that does it.
    starting: HashMap<tokio::task::Id, AttemptKey>,
    starts: JoinSet<std::io::Result<()>>,
    /// Attempts whose results are being published.
    publishing: Arc<Mutex<HashSet<AttemptKey>>>,
    started: Instant,
    /// Whether the disk had room in the last round.
    had_room: bool,
}

impl Scheduler {
    pub(crate) fn new(app: App, api: AgentApi, executor: Arc<dyn Executor>) -> Self {
        Self {
            app,
            api,
            executor,
            ladders: HashMap::new(),
            starting: HashMap::new(),
            starts: JoinSet::new(),
            publishing: Arc::default(),
            started: Instant::now(),
            had_room: true,
        }
    }

    /// Ticks until the server shuts down. Workers are left alone then: they train on, and the next server adopts them.
    pub(crate) async fn run(mut self) {
        let beat = Duration::from_millis(self.app.config.scheduler.tick_ms);
        loop {
            let mut done = self.tick().await;
            let shutdown = self.app.shutdown.clone();
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = self.app.wake.notified() => {}
                () = tokio::time::sleep(beat) => {}
                Some(start) = self.starts.join_next_with_id() => done = done.and(self.finish_start(start).await),
            }
            complain(done);
        }
        // Whoever is half started is started, so that its process is known to the next server.
        while let Some(start) = self.starts.join_next_with_id().await {
            complain(self.finish_start(start).await);
        }
    }

    /// One round: ended and lost workers, results to publish, free devices.
    pub(crate) async fn tick(&mut self) -> Result<(), StoreError> {
        self.finish_starts().await?;
        for attempt in self.app.store.live_attempts().await? {
            self.look_after(&attempt).await?;
        }
        for attempt in self.app.store.unpublished_attempts().await? {
            self.publish(attempt);
        }
        if self.has_room() && self.app.store.setting(QUEUE_PAUSED).await?.as_deref() != Some("true") {
            self.fill_devices().await?;
        }
        Ok(())
    }

    /// Whether a job may be started: one that finds a full disk only wastes what it computes. Also makes the ballast again
    /// that was given up.
    fn has_room(&mut self) -> bool {
        let min_free_bytes = self.app.config.storage.min_free_bytes;
        let has_room = match crate::space::free_bytes(&self.app.data.root()) {
            Ok(free) => free >= min_free_bytes,
            // A system that does not say.
            Err(_) => true,
        };
        if let Err(error) = self.app.ballast.keep() {
            tracing::warn!(%error, "the ballast file was not made");
        }
        if has_room != self.had_room {
            if has_room {
                tracing::info!("the disk has room again: jobs are started");
            } else {
                tracing::warn!(
                    min_free_bytes,
                    "the disk is nearly full: no job is started until there is room"
                );
            }
            self.had_room = has_room;
        }
        has_room
    }

    async fn look_after(&mut self, attempt: &Attempt) -> Result<(), StoreError> {
        let key = (attempt.job_id, attempt.attempt);
        match self.executor.observe(key) {
            Observed::Unknown if self.starting.values().any(|starting| *starting == key) => Ok(()),
            Observed::Running => self.climb(attempt).await,
            Observed::Exited(exit) => self.end(attempt, &exit).await,
            Observed::Unknown => self.recover(attempt).await,
        }
    }

    /// An attempt that an earlier server started.
    async fn recover(&mut self, attempt: &Attempt) -> Result<(), StoreError> {
        let key = (attempt.job_id, attempt.attempt);
        let Some(pid) = attempt.pid else {
            // The server died between claim and start, or right after the start: the worker, if there is one, says hello
            // within the adopt window.
            let window = Duration::from_millis(self.app.config.scheduler.adopt_window_ms);
            return if self.started.elapsed() < window && attempt.dir.join("spec.json").exists() {
                Ok(())
            } else {
                // One that said hello has a process; see `AgentApi::hear`.
                self.end(attempt, &Exit::NeverStarted).await
            };
        };
        let process = Started {
            pid,
            pid_start: attempt.pid_start,
        };
        if self.executor.adopt(key, process, attempt.dir.clone()) {
            tracing::info!(job.id = %attempt.job_id, job.attempt = attempt.attempt, pid, "took over a running worker");
            self.api.heard.note(key);
            Ok(())
        } else {
            self.end(attempt, &local::exit_left_in(&attempt.dir)).await
        }
    }

    /// Sends signals where they are due.
    async fn climb(&mut self, attempt: &Attempt) -> Result<(), StoreError> {
        let key = (attempt.job_id, attempt.attempt);
        let job = self.app.store.job(attempt.job_id).await?;
        let settings = &self.app.config.scheduler;
        let heard = self.api.heard.last(key).unwrap_or(self.started);
        let lease = Duration::from_millis(settings.lease_ms + settings.lease_grace_ms);
        let in_adopt_window =
            self.started.elapsed() < Duration::from_millis(settings.adopt_window_ms) && heard < self.started + lease;
        let seen = ladder::Seen {
            owns_job: job.attempt == attempt.attempt && job.status.is_active(),
            delivered: attempt.final_event.is_some(),
            desired: job.desired,
            lease_over: heard.elapsed() > lease && !in_adopt_window,
        };
        let ladder = self.ladders.entry(key).or_default();
        let grace = Duration::from_millis(settings.kill_grace_ms);
        if let Some(rung) = ladder.step(seen, Instant::now(), grace) {
            tracing::warn!(job.id = %job.id, job.attempt = attempt.attempt, ?rung, "ending a worker");
            let how = match rung {
                Rung::Terminate => crate::executor::Stop::Terminate,
                Rung::Kill => crate::executor::Stop::Kill,
            };
            self.executor.stop(key, how);
        }
        Ok(())
    }

    /// A process is dead: take what it spooled, free its device, settle its job.
    async fn end(&mut self, attempt: &Attempt, exit: &Exit) -> Result<(), StoreError> {
        let key = (attempt.job_id, attempt.attempt);
        self.take_spool(attempt).await?;
        let log_tail = local::log_tail(&attempt.dir);
        let exit = &exit.clone().explained_by(&log_tail);
        let limits = self.app.config.retry_limits();
        let (job, outcome) = self
            .app
            .store
            .end_attempt(attempt.job_id, attempt.attempt, exit, &log_tail, limits)
            .await?;
        tracing::info!(job.id = %job.id, job.attempt = attempt.attempt, %exit, ?outcome, status = %job.status, "a worker ended");
        self.app.traces.attempt(attempt, &job, exit, &outcome);
        if matches!(outcome, Outcome::Fail(_) | Outcome::Cancel) {
            self.app.traces.job(&job);
        }
        self.executor.forget(key);
        self.api.heard.forget(key);
        self.ladders.remove(&key);
        self.app.events.end_progress(job.id);
        let live = self.app.store.live_attempts().await?;
        self.app
            .events
            .prune(|id| !live.iter().any(|attempt| attempt.job_id == id));
        if matches!(outcome, Outcome::Cancel) || job.status == JobStatus::Cancelled {
            publish::clean_up(&self.app, &job).await;
        }
        self.app.changed(job);
        Ok(())
    }

    /// Events that the worker wrote but could not post any more.
    async fn take_spool(&self, attempt: &Attempt) -> Result<(), StoreError> {
        loop {
            let stored = self.app.store.attempt(attempt.job_id, attempt.attempt).await?;
            if stored.final_event.is_some() {
                return Ok(());
            }
            let events = match read_spool(&attempt.dir, stored.acked_seq) {
                Ok(events) => events,
                Err(error) => {
                    tracing::error!(job.id = %attempt.job_id, %error, "the spool of a dead worker was not read");
                    return Ok(());
                }
            };
            let batch = &events[..events.len().min(500)];
            if batch.is_empty() {
                return Ok(());
            }
            let key = (attempt.job_id, attempt.attempt);
            match self.api.take(key, &stored.token_sha256, batch).await {
                Ok(applied) if applied.acked_seq > stored.acked_seq => {}
                // Nothing more fits on what is stored, or the job is another attempt's by now.
                Ok(_) | Err(StoreError::Fenced { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn publish(&self, attempt: Attempt) {
        let key = (attempt.job_id, attempt.attempt);
        let publishing = self.publishing.clone();
        if !publishing.lock().unwrap_or_else(PoisonError::into_inner).insert(key) {
            return;
        }
        // A merged pipeline is gigabytes: hashing it must not hold up the other devices.
        let app = self.app.clone();
        tokio::spawn(async move {
            publish::publish(&app, &attempt).await;
            publishing.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            app.wake.notify_one();
        });
    }
}

fn complain(done: Result<(), StoreError>) {
    if let Err(error) = done {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "the scheduler could not finish its round"
        );
    }
}

#[cfg(test)]
mod tests;
