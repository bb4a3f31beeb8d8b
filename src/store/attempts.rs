//! Attempts: claimed by the scheduler, ended by it, their results published.

use std::path::{Path, PathBuf};

use lorad_faults::Point;
use lorad_proto::{
    event::{Results, WorkerEvent},
    problem::Problem,
};
use serde_json::{Map, Value, json};

pub use super::ingest::{Applied, WorkerBatch};
use super::{
    NewArtifact, Result, Store, StoreError, Tx, catalogue, commit,
    jobs::{append, fail, load, transition},
    measured, query, rows,
};
use crate::domain::{
    Change, Checkpoint, Desired, Ended, EventKind, Exit, Job, JobId, JobStatus, Outcome, RetryLimits, now_ms,
};

/// One run of a worker process.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// Whose.
    pub job_id: JobId,
    /// From 1.
    pub attempt: u32,
    /// SHA-256 of its secret token, hex.
    pub token_sha256: String,
    /// `cpu`, `cuda:0`, …
    pub device: String,
    /// Its directory, absolute.
    pub dir: PathBuf,
    /// Its process, once started.
    pub pid: Option<u32>,
    /// Start time of that process in clock ticks since boot; tells a reused pid.
    pub pid_start: Option<u64>,
    /// Worker events stored so far.
    pub acked_seq: u64,
    /// Its final event, if it came.
    pub final_event: Option<WorkerEvent>,
    /// When it was claimed.
    pub started_at_ms: i64,
    /// When its process was seen dead.
    pub ended_at_ms: Option<i64>,
}

impl Attempt {
    /// Result files that wait for publication.
    pub fn results(&self) -> Option<&Results> {
        match &self.final_event {
            Some(WorkerEvent::Done { results }) => Some(results),
            Some(WorkerEvent::Stopped { results, .. }) => results.as_ref(),
            _ => None,
        }
    }
}

/// What the scheduler brings to a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewAttempt<'a> {
    /// The free device.
    pub device: &'a str,
    /// SHA-256 of the attempt's secret token, hex.
    pub token_sha256: &'a str,
    /// Folder that holds `<job>/attempts/<n>`.
    pub jobs_dir: &'a Path,
    /// Length of the first lease.
    pub lease_ms: i64,
    /// Memory that is free for the job, if that is known and matters on this device.
    pub memory_bytes: Option<u64>,
}

/// A claimed job with all that its worker needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Claimed {
    /// The job, now `preparing`.
    pub job: Job,
    /// Directory of the attempt, absolute; not made yet.
    pub dir: PathBuf,
    /// Folder of the base model.
    pub base_path: PathBuf,
    /// Folder of the dataset.
    pub dataset_path: PathBuf,
    /// Checkpoints to resume from, best first.
    pub checkpoints: Vec<Checkpoint>,
}

impl Store {
    /// Takes the next job for a free device: higher priority first, then older. `None`: nothing to do, or the next job needs
    /// more memory than is free; no later one overtakes it.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn claim(&self, new: &NewAttempt<'_>) -> Result<Option<Claimed>> {
        let now = now_ms();
        let mut tx = self.begin().await?;
        // A job whose last process is not dead yet waits: two attempts must never share a device or a directory.
        let row = sqlx::query(
            "UPDATE jobs SET status = 'preparing', attempt = attempt + 1, phase = 'loading', lease_expires_ms = ?
             WHERE id = (
                 SELECT id FROM jobs AS waiting
                 WHERE status = 'queued' AND not_before_ms <= ? AND desired IN ('run', 'cancel_save')
                     AND NOT EXISTS (SELECT 1 FROM job_attempts WHERE ended_at_ms IS NULL AND (job_id = waiting.id OR device = ?))
                     AND NOT EXISTS (SELECT 1 FROM api_keys WHERE id = waiting.key_id AND max_running_jobs <= (
                         SELECT count(*) FROM jobs WHERE key_id = api_keys.id AND status IN ('preparing', 'running', 'saving')))
                 ORDER BY priority DESC, id LIMIT 1)
                 AND json_extract(plan, '$.memory_bytes') <= ?
             RETURNING *",
        )
        .bind(now + new.lease_ms)
        .bind(now)
        .bind(new.device)
        .bind(new.memory_bytes.map_or(i64::MAX, rows::int))
        .fetch_optional(&mut *tx)
        .await
        .map_err(query("claim a job"))?;
        let Some(row) = row else { return Ok(None) };
        let job = rows::job(&row)?;
        let dir = new
            .jobs_dir
            .join(job.id.to_string())
            .join("attempts")
            .join(job.attempt.to_string());
        sqlx::query(
            "INSERT INTO job_attempts (job_id, attempt, token_sha256, device, dir, started_at_ms) VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(job.id.to_string())
        .bind(job.attempt)
        .bind(new.token_sha256)
        .bind(new.device)
        .bind(dir.to_string_lossy().into_owned())
        .bind(now)
        .execute(&mut *tx)
        .await
        .map_err(query("claim a job"))?;
        let data = json!({"from": JobStatus::Queued, "to": JobStatus::Preparing, "reason": "claimed",
            "attempt": job.attempt, "device": new.device});
        append(&mut tx, job.id, EventKind::Status, now, job.attempt, data).await?;
        let base_path = path_of(&mut tx, "SELECT path FROM models WHERE id = ?", job.base_model.as_str()).await?;
        let dataset_path = path_of(
            &mut tx,
            "SELECT path FROM datasets WHERE id = ?",
            &job.dataset_id.to_string(),
        )
        .await?;
        let checkpoints = checkpoints(&mut tx, job.id).await?;
        let job = load(&mut tx, job.id).await?;
        commit(tx, Point::ClaimJob).await.map_err(query("claim a job"))?;
        Ok(Some(Claimed {
            job,
            dir,
            base_path,
            dataset_path,
            checkpoints,
        }))
    }

    /// Records the process that runs an attempt.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn set_attempt_process(&self, job: JobId, attempt: u32, pid: u32, pid_start: Option<u64>) -> Result<()> {
        self.write(
            Point::RecordProcess,
            sqlx::query("UPDATE job_attempts SET pid = ?, pid_start = ? WHERE job_id = ? AND attempt = ?")
                .bind(pid)
                .bind(pid_start.map(u64::cast_signed))
                .bind(job.to_string())
                .bind(attempt),
        )
        .await
        .map_err(query("record a process"))?;
        Ok(())
    }

    /// One attempt.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn attempt(&self, job: JobId, attempt: u32) -> Result<Attempt> {
        let row = sqlx::query("SELECT * FROM job_attempts WHERE job_id = ? AND attempt = ?")
            .bind(job.to_string())
            .bind(attempt)
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read an attempt"))?;
        let row = row.ok_or_else(|| StoreError::NotFound {
            what: "attempt",
            id: format!("{job}/{attempt}"),
        })?;
        rows::attempt(&row)
    }

    /// Attempts whose process was not seen dead yet.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn live_attempts(&self) -> Result<Vec<Attempt>> {
        let rows = sqlx::query("SELECT * FROM job_attempts WHERE ended_at_ms IS NULL ORDER BY started_at_ms")
            .fetch_all(&self.readers)
            .await
            .map_err(query("list attempts"))?;
        rows.iter().map(rows::attempt).collect()
    }

    /// Attempts of jobs in `saving` whose results wait for publication.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn unpublished_attempts(&self) -> Result<Vec<Attempt>> {
        let rows = sqlx::query(
            "SELECT a.* FROM job_attempts AS a JOIN jobs AS j ON j.id = a.job_id AND j.attempt = a.attempt
             WHERE j.status = 'saving' AND a.final_event IS NOT NULL",
        )
        .fetch_all(&self.readers)
        .await
        .map_err(query("list attempts"))?;
        let mut attempts: Vec<Attempt> = rows.iter().map(rows::attempt).collect::<Result<_>>()?;
        // One that stopped during the export has nothing to publish: it is settled when its process is seen dead.
        attempts.retain(|attempt| attempt.results().is_some());
        Ok(attempts)
    }

    /// Records that an attempt's process is dead, which frees its device, and settles what that means for the job.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn end_attempt(
        &self,
        job: JobId,
        attempt: u32,
        exit: &Exit,
        log_tail: &str,
        limits: RetryLimits,
    ) -> Result<(Job, Outcome)> {
        let now = now_ms();
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE job_attempts SET ended_at_ms = ?, exit = ? WHERE job_id = ? AND attempt = ? AND ended_at_ms IS NULL")
            .bind(now)
            .bind(exit.to_string())
            .bind(job.to_string())
            .bind(attempt)
            .execute(&mut *tx)
            .await
            .map_err(query("end an attempt"))?;
        let mut job = load(&mut tx, job).await?;
        let outcome = if job.attempt == attempt {
            settle(&mut tx, &mut job, exit, log_tail, limits).await?
        } else {
            Outcome::Settled
        };
        let job = load(&mut tx, job.id).await?;
        commit(tx, Point::EndAttempt).await.map_err(query("end an attempt"))?;
        Ok((job, outcome))
    }

    /// Makes a job final after its results were published: files, summary and status in one transaction.
    ///
    /// A job that was cancelled becomes `cancelled`, and keeps the files only if they were asked for.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the attempt does not own the job any more, or if the database fails.
    pub async fn complete(
        &self,
        job: JobId,
        attempt: u32,
        artifacts: &[NewArtifact],
        summary: &Map<String, Value>,
    ) -> Result<Job> {
        let mut tx = self.begin().await?;
        let mut job = saving(&mut tx, job, attempt).await?;
        let discards = matches!(job.desired, Desired::CancelDiscard | Desired::CancelForce);
        if !discards {
            for artifact in artifacts {
                catalogue::record_artifact(&mut tx, job.id, attempt, artifact).await?;
            }
        }
        sqlx::query("UPDATE jobs SET summary = ? WHERE id = ?")
            .bind(rows::text("summary", summary)?)
            .bind(job.id.to_string())
            .execute(&mut *tx)
            .await
            .map_err(query("store a summary"))?;
        let stopped = matches!(
            stored_final_event(&mut tx, job.id, attempt).await?,
            Some(WorkerEvent::Stopped { .. })
        );
        if discards || stopped {
            transition(
                &mut tx,
                &mut job,
                Change::Cancel,
                if discards { "discarded" } else { "saved" },
            )
            .await?;
        } else {
            measured::record(&mut tx, &job, summary).await?;
            transition(&mut tx, &mut job, Change::Succeed, "published").await?;
        }
        let job = load(&mut tx, job.id).await?;
        commit(tx, Point::CompleteJob).await.map_err(query("complete a job"))?;
        Ok(job)
    }

    /// Fails an active job.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if the attempt does not own the job any more, or if the database fails.
    pub async fn fail_attempt(&self, job: JobId, attempt: u32, problem: &Problem) -> Result<Job> {
        let mut tx = self.begin().await?;
        let mut job = owned(&mut tx, job, attempt).await?;
        fail(&mut tx, &mut job, problem).await?;
        let job = load(&mut tx, job.id).await?;
        commit(tx, Point::FailJob).await.map_err(query("fail a job"))?;
        Ok(job)
    }
}

async fn settle(tx: &mut Tx, job: &mut Job, exit: &Exit, log_tail: &str, limits: RetryLimits) -> Result<Outcome> {
    let checkpoints = checkpoints(tx, job.id).await?;
    let final_event = stored_final_event(tx, job.id, job.attempt).await?;
    let ended = Ended {
        status: job.status,
        desired: job.desired,
        final_event: final_event.as_ref(),
        progressed: checkpoints.iter().any(|checkpoint| checkpoint.attempt == job.attempt),
        has_checkpoint: !checkpoints.is_empty(),
        failed_attempts: job.failed_attempts,
        memory_rescues: job.memory_rescues,
        exit,
        log_tail,
    };
    let outcome = crate::domain::attempt::after_exit(&ended, limits);
    match &outcome {
        Outcome::Settled => {}
        Outcome::Requeue {
            delay_ms,
            failed_attempts,
            reason,
        } => {
            let counts = (*failed_attempts, job.memory_rescues);
            requeue(tx, job, now_ms() + delay_ms, counts, reason).await?;
        }
        Outcome::Shrink { reason } => {
            let counts = (job.failed_attempts, job.memory_rescues + 1);
            requeue(tx, job, now_ms(), counts, reason).await?;
        }
        Outcome::Fail(problem) => fail(tx, job, problem).await?,
        Outcome::Cancel => transition(tx, job, Change::Cancel, "requested").await?,
    }
    Ok(outcome)
}

async fn requeue(
    tx: &mut Tx,
    job: &mut Job,
    not_before_ms: i64,
    (failed_attempts, memory_rescues): (u32, u32),
    reason: &str,
) -> Result<()> {
    transition(tx, job, Change::Interrupt, reason).await?;
    sqlx::query("UPDATE jobs SET not_before_ms = ?, failed_attempts = ?, memory_rescues = ? WHERE id = ?")
        .bind(not_before_ms)
        .bind(failed_attempts)
        .bind(memory_rescues)
        .bind(job.id.to_string())
        .execute(&mut **tx)
        .await
        .map_err(query("requeue a job"))?;
    transition(tx, job, Change::Requeue, reason).await?;
    if job.desired == Desired::Pause {
        transition(tx, job, Change::Pause, "requested").await?;
    }
    Ok(())
}

async fn path_of(tx: &mut Tx, sql: &'static str, id: &str) -> Result<PathBuf> {
    let path: String = sqlx::query_scalar(sql)
        .bind(id)
        .fetch_one(&mut **tx)
        .await
        .map_err(query("find a job's inputs"))?;
    Ok(PathBuf::from(path))
}

async fn checkpoints(tx: &mut Tx, job: JobId) -> Result<Vec<Checkpoint>> {
    let rows = sqlx::query("SELECT * FROM job_checkpoints WHERE job_id = ? ORDER BY step DESC, attempt DESC")
        .bind(job.to_string())
        .fetch_all(&mut **tx)
        .await
        .map_err(query("read checkpoints"))?;
    rows.iter().map(rows::checkpoint).collect()
}

async fn stored_final_event(tx: &mut Tx, job: JobId, attempt: u32) -> Result<Option<WorkerEvent>> {
    let row = sqlx::query("SELECT * FROM job_attempts WHERE job_id = ? AND attempt = ?")
        .bind(job.to_string())
        .bind(attempt)
        .fetch_optional(&mut **tx)
        .await
        .map_err(query("read an attempt"))?;
    Ok(row
        .as_ref()
        .map(rows::attempt)
        .transpose()?
        .and_then(|attempt| attempt.final_event))
}

/// The job, if this attempt owns it and it is active.
pub(super) async fn owned(tx: &mut Tx, job: JobId, attempt: u32) -> Result<Job> {
    let job = load(tx, job).await?;
    if job.attempt == attempt && job.status.is_active() {
        Ok(job)
    } else {
        Err(StoreError::Fenced { job: job.id, attempt })
    }
}

async fn saving(tx: &mut Tx, job: JobId, attempt: u32) -> Result<Job> {
    let job = owned(tx, job, attempt).await?;
    if job.status == JobStatus::Saving {
        Ok(job)
    } else {
        Err(StoreError::Fenced { job: job.id, attempt })
    }
}
