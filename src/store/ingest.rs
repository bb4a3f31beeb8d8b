//! Worker events into rows: one transaction per batch, guarded by the attempt number and its token, idempotent by the
//! worker's own numbering.

use std::collections::{BTreeSet, HashSet};

use lorad_faults::Point;
use lorad_proto::{
    PROTOCOL_VERSION,
    event::{Envelope, Phase, StepMetrics, StopReason, WorkerEvent},
    problem::Problem,
};
use serde_json::{Value, json};

use super::{
    Result, Store, StoreError, Tx,
    attempts::owned,
    catalogue::{self, NewSample},
    commit,
    jobs::{append, fail, load, transition},
    query, rows,
};
use crate::domain::{
    Change, Desired, EventKind, Job, JobId, JobSample, JobStatus, attempt::STORAGE_FULL, metric, now_ms,
};

/// A batch of a worker's events, as posted.
#[derive(Debug, Clone, Copy)]
pub struct WorkerBatch<'a> {
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: u32,
    /// SHA-256 of the token that came with it, hex.
    pub token_sha256: &'a str,
    /// In order of `seq`; may repeat events already stored.
    pub events: &'a [Envelope],
    /// Sample files that were verified and published.
    pub published: &'a HashSet<String>,
    /// Length of the lease that this batch renews.
    pub lease_ms: i64,
}

/// What storing a batch changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Applied {
    /// The job afterwards.
    pub job: Job,
    /// Worker events stored so far.
    pub acked_seq: u64,
    /// Whether result files now wait for publication.
    pub publish: bool,
}

impl Store {
    /// Checks that an attempt may write, without writing. For work that precedes [`Store::apply`].
    ///
    /// # Errors
    /// [`StoreError::Fenced`], or if the database fails.
    pub async fn check_fence(&self, job: JobId, attempt: u32, token_sha256: &str) -> Result<super::Attempt> {
        let current = self
            .job(job)
            .await
            .map_err(|error| fenced_if_missing(error, job, attempt))?;
        let stored = self
            .attempt(job, attempt)
            .await
            .map_err(|error| fenced_if_missing(error, job, attempt))?;
        let may_write = current.attempt == attempt && stored.token_sha256 == token_sha256;
        // A worker whose final event is stored asks again when the answer was lost; it must hear "stored", not "fenced".
        if may_write && (current.status.is_active() || stored.final_event.is_some()) {
            Ok(stored)
        } else {
            Err(StoreError::Fenced { job, attempt })
        }
    }

    /// Stores a batch: rows, job progress, status changes and viewer events in one transaction.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the attempt does not own the job (any more), or if the database fails. Nothing is
    /// stored then.
    pub async fn apply(&self, batch: &WorkerBatch<'_>) -> Result<Applied> {
        let stored = self.check_fence(batch.job, batch.attempt, batch.token_sha256).await?;
        if stored.final_event.is_some() {
            return Ok(Applied {
                job: self.job(batch.job).await?,
                acked_seq: stored.acked_seq,
                publish: false,
            });
        }
        let mut tx = self.begin().await?;
        let mut job = owned(&mut tx, batch.job, batch.attempt).await?;
        let row = sqlx::query("SELECT * FROM job_attempts WHERE job_id = ? AND attempt = ?")
            .bind(job.id.to_string())
            .bind(batch.attempt)
            .fetch_one(&mut *tx)
            .await
            .map_err(query("read an attempt"))?;
        let mut acked = rows::attempt(&row)?.acked_seq;
        let mut applying = Applying {
            tx: &mut tx,
            job: &mut job,
            published: batch.published,
            steps: Vec::new(),
            publish: false,
        };
        for envelope in batch.events {
            // Repeats are skipped; after a gap nothing more is taken, and the answer tells the worker where to go on.
            if envelope.seq <= acked {
                continue;
            }
            if envelope.seq != acked + 1 {
                break;
            }
            applying.event(envelope).await?;
            acked = envelope.seq;
            if envelope.event.is_final() || !applying.job.status.is_active() {
                break;
            }
        }
        applying.flush_steps().await?;
        let publish = applying.publish;
        sqlx::query("UPDATE job_attempts SET acked_seq = ? WHERE job_id = ? AND attempt = ?")
            .bind(rows::int(acked))
            .bind(job.id.to_string())
            .bind(batch.attempt)
            .execute(&mut *tx)
            .await
            .map_err(query("acknowledge events"))?;
        if job.status.is_active() {
            sqlx::query("UPDATE jobs SET lease_expires_ms = ? WHERE id = ?")
                .bind(now_ms() + batch.lease_ms)
                .bind(job.id.to_string())
                .execute(&mut *tx)
                .await
                .map_err(query("renew a lease"))?;
        }
        let job = load(&mut tx, job.id).await?;
        commit(tx, Point::StoreEvents).await.map_err(query("store events"))?;
        Ok(Applied {
            job,
            acked_seq: acked,
            publish,
        })
    }
}

fn fenced_if_missing(error: StoreError, job: JobId, attempt: u32) -> StoreError {
    match error {
        StoreError::NotFound { .. } => StoreError::Fenced { job, attempt },
        other => other,
    }
}

/// A batch being stored.
struct Applying<'a> {
    tx: &'a mut Tx,
    job: &'a mut Job,
    published: &'a HashSet<String>,
    /// Steps not written yet, with their times: consecutive steps become one viewer event.
    steps: Vec<(i64, StepMetrics)>,
    publish: bool,
}

impl Applying<'_> {
    async fn event(&mut self, envelope: &Envelope) -> Result<()> {
        let t_ms = envelope.t_ms;
        if let WorkerEvent::Step(step) = &envelope.event {
            self.steps.push((t_ms, step.clone()));
            return Ok(());
        }
        self.flush_steps().await?;
        match &envelope.event {
            WorkerEvent::Step(_) => Ok(()),
            WorkerEvent::Hello {
                protocol,
                pid,
                device,
                resumed_from_step,
                ..
            } => self.hello(t_ms, *protocol, *pid, device, *resumed_from_step).await,
            WorkerEvent::Phase { phase, .. } => self.phase(*phase).await,
            WorkerEvent::Sample(sample) => self.sample(t_ms, sample).await,
            WorkerEvent::Checkpoint {
                step,
                dir,
                bytes,
                sha256,
            } => self.checkpoint(t_ms, *step, dir, *bytes, sha256).await,
            WorkerEvent::Log { level, message } => {
                self.append(EventKind::Log, t_ms, json!({"level": level, "message": message}))
                    .await
            }
            WorkerEvent::Alert {
                code,
                severity,
                step,
                detail,
            } => {
                let data = json!({"code": code, "severity": severity, "step": step, "detail": detail});
                self.append(EventKind::Alert, t_ms, data).await
            }
            WorkerEvent::Done { .. } | WorkerEvent::Failed { .. } | WorkerEvent::Stopped { .. } => {
                self.final_event(&envelope.event).await
            }
        }
    }

    async fn append(&mut self, kind: EventKind, t_ms: i64, data: Value) -> Result<()> {
        append(self.tx, self.job.id, kind, t_ms, self.job.attempt, data).await?;
        Ok(())
    }

    async fn hello(&mut self, t_ms: i64, protocol: u32, pid: u32, device: &str, resumed: Option<u64>) -> Result<()> {
        if protocol != PROTOCOL_VERSION {
            let problem = Problem::new(
                "worker.protocol",
                "Server and worker are of different versions",
                format!("The worker speaks protocol {protocol}, this server {PROTOCOL_VERSION}."),
            )
            .with_hint("Install server and worker from the same build, then retry the job.");
            return fail(self.tx, self.job, &problem).await;
        }
        let from = resumed.unwrap_or(0);
        sqlx::query("UPDATE job_attempts SET resumed_from = ? WHERE job_id = ? AND attempt = ?")
            .bind(resumed.map(rows::int))
            .bind(self.job.id.to_string())
            .bind(self.job.attempt)
            .execute(&mut **self.tx)
            .await
            .map_err(query("record a resume"))?;
        self.drop_steps_after(from).await?;
        self.set_step(from).await?;
        let message = match resumed {
            Some(step) => format!(
                "attempt {} on {device}, process {pid}, resumed from step {step}",
                self.job.attempt
            ),
            None => format!("attempt {} on {device}, process {pid}", self.job.attempt),
        };
        self.append(EventKind::Log, t_ms, json!({"level": "info", "message": message}))
            .await
    }

    async fn phase(&mut self, phase: Phase) -> Result<()> {
        let name = phase_name(phase);
        if self.job.phase.as_deref() != Some(name) {
            sqlx::query("UPDATE jobs SET phase = ? WHERE id = ?")
                .bind(name)
                .bind(self.job.id.to_string())
                .execute(&mut **self.tx)
                .await
                .map_err(query("record a phase"))?;
            self.job.phase = Some(name.to_owned());
        }
        if phase == Phase::Exporting {
            self.save("exporting").await?;
        }
        Ok(())
    }

    async fn save(&mut self, reason: &str) -> Result<()> {
        if matches!(self.job.status, JobStatus::Preparing | JobStatus::Running) {
            transition(self.tx, self.job, Change::Save, reason).await?;
        }
        Ok(())
    }

    /// Forgets steps that are taken once more: the old figures would stand beside the new ones.
    async fn drop_steps_after(&mut self, step: u64) -> Result<()> {
        sqlx::query("DELETE FROM job_metrics WHERE job_id = ? AND step > ?")
            .bind(self.job.id.to_string())
            .bind(rows::int(step))
            .execute(&mut **self.tx)
            .await
            .map_err(query("drop repeated steps"))?;
        Ok(())
    }

    async fn set_step(&mut self, step: u64) -> Result<()> {
        sqlx::query("UPDATE jobs SET step = ? WHERE id = ?")
            .bind(rows::int(step))
            .bind(self.job.id.to_string())
            .execute(&mut **self.tx)
            .await
            .map_err(query("record a step"))?;
        self.job.step = step;
        Ok(())
    }

    async fn flush_steps(&mut self) -> Result<()> {
        let steps = std::mem::take(&mut self.steps);
        let (Some((first_ms, _)), Some((last_ms, last))) = (steps.first(), steps.last()) else {
            return Ok(());
        };
        if self.job.status == JobStatus::Preparing {
            transition(self.tx, self.job, Change::Train, "first step").await?;
            sqlx::query("UPDATE jobs SET started_at_ms = coalesce(started_at_ms, ?) WHERE id = ?")
                .bind(first_ms)
                .bind(self.job.id.to_string())
                .execute(&mut **self.tx)
                .await
                .map_err(query("record the first step"))?;
        }
        let mut reached = self.job.step;
        for (t_ms, step) in &steps {
            // The run has gone back to an earlier checkpoint; it may end before it is as far again.
            if step.step <= reached {
                self.drop_steps_after(step.step).await?;
            }
            reached = step.step;
            self.metric(*t_ms, step).await?;
        }
        self.set_step(last.step).await?;
        let data = metrics_event(&steps, self.job.attempt);
        self.append(EventKind::Metrics, *last_ms, data).await
    }

    async fn metric(&mut self, t_ms: i64, step: &StepMetrics) -> Result<()> {
        // SQLite stores NaN as NULL; infinities are made NULL here, so that a reader sees "not finite" in one spelling.
        let finite = |value: Option<f64>| value.filter(|v| v.is_finite());
        let extra: std::collections::BTreeMap<_, _> = step.extra.iter().filter(|(_, v)| v.is_finite()).collect();
        sqlx::query(
            "INSERT INTO job_metrics (job_id, step, attempt, t_ms, epoch, loss, lr, grad_norm, step_ms, samples_per_s, extra)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
             ON CONFLICT (job_id, step) DO UPDATE SET attempt = excluded.attempt, t_ms = excluded.t_ms,
                 epoch = excluded.epoch, loss = excluded.loss, lr = excluded.lr, grad_norm = excluded.grad_norm,
                 step_ms = excluded.step_ms, samples_per_s = excluded.samples_per_s, extra = excluded.extra",
        )
        .bind(self.job.id.to_string())
        .bind(rows::int(step.step))
        .bind(self.job.attempt)
        .bind(t_ms)
        .bind(step.epoch)
        .bind(finite(step.loss))
        .bind(step.lr)
        .bind(finite(step.grad_norm))
        .bind(step.step_ms)
        .bind(step.samples_per_s)
        .bind(rows::text("extra", &extra)?)
        .execute(&mut **self.tx)
        .await
        .map_err(query("store a step"))?;
        Ok(())
    }

    async fn sample(&mut self, t_ms: i64, sample: &lorad_proto::event::Sample) -> Result<()> {
        if !self.published.contains(&sample.file) {
            let data = json!({"code": "sample.unreadable", "severity": "warn", "step": sample.step,
                "detail": format!("{}: the picture is missing or not the one announced", sample.file)});
            return self.append(EventKind::Alert, t_ms, data).await;
        }
        let new = NewSample {
            sample: JobSample {
                file: sample.file.clone(),
                step: sample.step,
                prompt_index: sample.prompt_index,
                prompt: sample.prompt.clone(),
                seed: sample.seed,
                width: sample.width,
                height: sample.height,
                t_ms,
            },
            bytes: sample.bytes,
            sha256: sample.sha256.clone(),
        };
        catalogue::record_sample(self.tx, self.job.id, self.job.attempt, &new).await?;
        self.served("UPDATE jobs SET sample_served = sample_request WHERE id = ?")
            .await?;
        let data = serde_json::to_value(sample).unwrap_or_default();
        self.append(EventKind::Sample, t_ms, data).await
    }

    async fn checkpoint(&mut self, t_ms: i64, step: u64, dir: &str, bytes: u64, sha256: &str) -> Result<()> {
        if !crate::domain::artifact::is_plain_file_name(dir) {
            let data = json!({"code": "checkpoint.unreadable", "severity": "warn", "step": step,
                "detail": "a checkpoint was announced under a name that is no plain directory name"});
            return self.append(EventKind::Alert, t_ms, data).await;
        }
        // `dir` of the attempt is stored absolute by the claim; the path is made in SQL so that it is read only once.
        sqlx::query(
            "INSERT INTO job_checkpoints (job_id, step, attempt, path, bytes, sha256, t_ms)
             SELECT job_id, ?, attempt, dir || '/checkpoints/' || ?, ?, ?, ? FROM job_attempts WHERE job_id = ? AND attempt = ?
             ON CONFLICT (job_id, step, attempt) DO UPDATE SET path = excluded.path, bytes = excluded.bytes,
                 sha256 = excluded.sha256, t_ms = excluded.t_ms",
        )
        .bind(rows::int(step))
        .bind(dir)
        .bind(rows::int(bytes))
        .bind(sha256)
        .bind(t_ms)
        .bind(self.job.id.to_string())
        .bind(self.job.attempt)
        .execute(&mut **self.tx)
        .await
        .map_err(query("record a checkpoint"))?;
        self.served("UPDATE jobs SET checkpoint_served = checkpoint_request WHERE id = ?")
            .await?;
        let data = json!({"step": step, "bytes": bytes, "sha256": sha256});
        self.append(EventKind::Checkpoint, t_ms, data).await
    }

    async fn served(&mut self, sql: &'static str) -> Result<()> {
        sqlx::query(sql)
            .bind(self.job.id.to_string())
            .execute(&mut **self.tx)
            .await
            .map_err(query("record that a request was served"))?;
        Ok(())
    }

    async fn final_event(&mut self, event: &WorkerEvent) -> Result<()> {
        sqlx::query("UPDATE job_attempts SET final_event = ? WHERE job_id = ? AND attempt = ?")
            .bind(rows::text("final_event", event)?)
            .bind(self.job.id.to_string())
            .bind(self.job.attempt)
            .execute(&mut **self.tx)
            .await
            .map_err(query("store a final event"))?;
        match event {
            WorkerEvent::Done { .. } | WorkerEvent::Stopped { results: Some(_), .. } => {
                self.publish = true;
                self.save("exported").await
            }
            // Settled when its process is seen dead: the job goes back to the queue.
            WorkerEvent::Failed { problem } if problem.code == STORAGE_FULL => Ok(()),
            WorkerEvent::Failed { problem } => fail(self.tx, self.job, problem).await,
            WorkerEvent::Stopped {
                reason: StopReason::Cancelled,
                ..
            } => transition(self.tx, self.job, Change::Cancel, "requested").await,
            WorkerEvent::Stopped {
                reason: StopReason::Paused,
                ..
            } if self.job.status != JobStatus::Saving => {
                transition(self.tx, self.job, Change::Pause, "requested").await?;
                // The pause was taken back while the worker was stopping.
                if self.job.desired == Desired::Run {
                    transition(self.tx, self.job, Change::Resume, "pause taken back").await?;
                }
                Ok(())
            }
            // Drained and fenced attempts are settled when their process is seen dead.
            _ => Ok(()),
        }
    }
}

/// The data of a `metrics` event: columns once, then rows. What is not finite is null.
fn metrics_event(steps: &[(i64, StepMetrics)], attempt: u32) -> Value {
    let extra: BTreeSet<&str> = steps
        .iter()
        .flat_map(|(_, step)| step.extra.keys().map(String::as_str))
        .collect();
    let cols: Vec<&str> = metric::COLUMNS.iter().copied().chain(extra.iter().copied()).collect();
    let rows: Vec<Vec<Value>> = steps
        .iter()
        .map(|(t_ms, step)| {
            let mut row = vec![
                json!(step.step),
                json!(t_ms),
                json!(step.epoch),
                json!(step.loss),
                json!(step.lr),
                json!(step.grad_norm),
                json!(step.step_ms),
                json!(step.samples_per_s),
            ];
            row.extend(extra.iter().map(|key| json!(step.extra.get(*key))));
            row
        })
        .collect();
    json!({"cols": cols, "rows": rows, "attempt": attempt, "total_steps": steps.last().map(|(_, step)| step.total_steps)})
}

/// A phase's spelling on the wire.
pub(crate) fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Loading => "loading",
        Phase::Caching => "caching",
        Phase::CheckingGradients => "checking_gradients",
        Phase::Sampling => "sampling",
        Phase::Training => "training",
        Phase::Exporting => "exporting",
    }
}
