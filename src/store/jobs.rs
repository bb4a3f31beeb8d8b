//! Jobs: insert, read, list, change, delete; and what users ask of them.

use lorad_faults::Point;
use serde_json::json;
use sqlx::{QueryBuilder, Row, Sqlite};

use super::{
    Result, Store, StoreError, Tx, access, commit,
    idempotency::{self, IdempotencyKey, StoredAnswer},
    outbox, query, rows,
};
use crate::domain::{
    Action, CancelMode, Change, Desired, EventKind, InitFrom, Job, JobEvent, JobId, JobPatch, JobStatus, NewJob,
    WebhookEvent, now_ms,
};

/// Which jobs to list.
#[derive(Debug, Clone, Default)]
pub struct JobFilter {
    /// Any of these; empty: all.
    pub status: Vec<JobStatus>,
    /// Part of the name, upper and lower case alike, or of the id.
    pub q: Option<String>,
    /// One of the job's tags.
    pub tag: Option<String>,
    /// Only jobs older than this one.
    pub after: Option<JobId>,
    /// At most so many, 1..=1000.
    pub limit: u32,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Page<T> {
    /// Newest first.
    pub data: Vec<T>,
    /// Whether more follow.
    pub has_more: bool,
}

/// Makes the answer that an idempotency key stores from the stored job.
type AnswerOf<'a> = &'a (dyn Fn(&Job) -> StoredAnswer + Send + Sync);

impl Store {
    /// Stores a job as `queued`, with its first event, and with the answer to its idempotency key if it has one: all or
    /// nothing. `answer` makes that answer from the stored job.
    ///
    /// # Errors
    /// If base model, dataset or the adapter to start from do not exist (any more), or the database fails.
    pub async fn insert_job(&self, new: &NewJob, idempotency: Option<(&IdempotencyKey, AnswerOf<'_>)>) -> Result<Job> {
        let now = now_ms();
        let mut tx = self.begin().await?;
        let inserted = sqlx::query(
            "INSERT INTO jobs (id, parent_id, name, tags, notes, priority, status, base_model, dataset_id, family, request,
                 hyperparameters, sampling, export, plan, total_steps, created_at_ms)
             VALUES (?, ?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(new.id.to_string())
        .bind(new.parent_id.map(|id| id.to_string()))
        .bind(&new.name)
        .bind(rows::text("tags", &new.tags)?)
        .bind(&new.notes)
        .bind(new.priority)
        .bind(new.base_model.as_str())
        .bind(new.dataset_id.to_string())
        .bind(&new.family)
        .bind(rows::text("request", &new.request)?)
        .bind(rows::text("hyperparameters", &new.hyperparameters)?)
        .bind(rows::text("sampling", &new.sampling)?)
        .bind(rows::text("export", &new.export)?)
        .bind(rows::text("plan", &new.plan)?)
        .bind(rows::int(new.plan.total_steps))
        .bind(now)
        .execute(&mut *tx)
        .await;
        match inserted {
            Ok(_) => {}
            Err(sqlx::Error::Database(error)) if error.is_foreign_key_violation() => {
                return Err(StoreError::NotFound {
                    what: "base model or dataset",
                    id: format!("{} / {}", new.base_model, new.dataset_id),
                });
            }
            Err(source) => return Err(query("insert a job")(source)),
        }
        if let Some(init) = InitFrom::of(&new.request) {
            require_file(&mut tx, &init).await?;
        }
        if let Some(owner) = new.owner {
            access::own_job(&mut tx, new.id, owner).await?;
        }
        let data = json!({"from": null, "to": JobStatus::Queued, "reason": "posted", "attempt": 0});
        append(&mut tx, new.id, EventKind::Status, now, 0, data).await?;
        let job = load(&mut tx, new.id).await?;
        if let Some(webhook) = &new.webhook {
            outbox::insert(&mut tx, webhook, Some(job.id)).await?;
        }
        outbox::emit(&mut tx, &job, WebhookEvent::Created, &json!({"reason": "posted"}), now).await?;
        if let Some((key, answer)) = idempotency {
            idempotency::finish(&mut tx, key, &answer(&job)).await?;
        }
        commit(tx, Point::InsertJob).await.map_err(query("insert a job"))?;
        Ok(job)
    }

    /// One job.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn job(&self, id: JobId) -> Result<Job> {
        let row = sqlx::query("SELECT * FROM jobs WHERE id = ?")
            .bind(id.to_string())
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a job"))?;
        rows::job(&row.ok_or_else(|| not_found(id))?)
    }

    /// Jobs, newest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn jobs(&self, filter: &JobFilter) -> Result<Page<Job>> {
        let limit = filter.limit.clamp(1, 1000);
        let mut sql = QueryBuilder::<Sqlite>::new("SELECT * FROM jobs WHERE 1 = 1");
        if !filter.status.is_empty() {
            sql.push(" AND status IN (");
            let mut list = sql.separated(", ");
            for status in &filter.status {
                list.push_bind(status.as_str());
            }
            sql.push(")");
        }
        if let Some(q) = &filter.q {
            // instr, not LIKE: `%` and `_` in what a user types mean themselves.
            sql.push(" AND (instr(lower(name), lower(").push_bind(q.clone());
            sql.push(")) > 0 OR instr(id, ").push_bind(q.clone()).push(") > 0)");
        }
        if let Some(tag) = &filter.tag {
            sql.push(" AND EXISTS (SELECT 1 FROM json_each(tags) WHERE value = ")
                .push_bind(tag.clone())
                .push(")");
        }
        if let Some(after) = filter.after {
            sql.push(" AND id < ").push_bind(after.to_string());
        }
        sql.push(" ORDER BY id DESC LIMIT ").push_bind(i64::from(limit) + 1);
        let rows = sql.build().fetch_all(&self.readers).await.map_err(query("list jobs"))?;
        let has_more = rows.len() > limit as usize;
        let data = rows.iter().take(limit as usize).map(rows::job).collect::<Result<_>>()?;
        Ok(Page { data, has_more })
    }

    /// The queue, next to start first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn queue(&self) -> Result<Vec<Job>> {
        let rows = sqlx::query("SELECT * FROM jobs WHERE status = 'queued' ORDER BY priority DESC, id")
            .fetch_all(&self.readers)
            .await
            .map_err(query("read the queue"))?;
        rows.iter().map(rows::job).collect()
    }

    /// Number of jobs per status; statuses without jobs are left out.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn job_counts(&self) -> Result<Vec<(JobStatus, u64)>> {
        let rows = sqlx::query("SELECT status, count(*) AS n FROM jobs GROUP BY status ORDER BY status")
            .fetch_all(&self.readers)
            .await
            .map_err(query("count jobs"))?;
        let mut counts = Vec::new();
        for row in rows {
            if let Some(status) = JobStatus::parse(row.get("status")) {
                counts.push((status, rows::unsigned(&row, "n")?));
            }
        }
        Ok(counts)
    }

    /// Changes what a user may change.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn update_job(&self, id: JobId, patch: &JobPatch) -> Result<Job> {
        let mut tx = self.begin().await?;
        let tags = patch.tags.as_ref().map(|tags| rows::text("tags", tags)).transpose()?;
        sqlx::query(
            "UPDATE jobs SET name = coalesce(?, name), tags = coalesce(?, tags), notes = coalesce(?, notes),
                 priority = coalesce(?, priority) WHERE id = ?",
        )
        .bind(patch.name.as_deref())
        .bind(tags)
        .bind(patch.notes.as_deref())
        .bind(patch.priority)
        .bind(id.to_string())
        .execute(&mut *tx)
        .await
        .map_err(query("change a job"))?;
        let job = load(&mut tx, id).await?;
        commit(tx, Point::UpdateJob).await.map_err(query("change a job"))?;
        Ok(job)
    }

    /// Deletes a final job with everything that is stored about it. Its files are the caller's.
    ///
    /// # Errors
    /// [`StoreError::NotAllowed`] unless the job is final and its worker process was seen dead; [`StoreError::InUse`] with the
    /// jobs that start from its files and have not ended.
    pub async fn delete_job(&self, id: JobId) -> Result<()> {
        let mut tx = self.begin().await?;
        let job = load(&mut tx, id).await?;
        let alive: i64 =
            sqlx::query_scalar("SELECT count(*) FROM job_attempts WHERE job_id = ? AND ended_at_ms IS NULL")
                .bind(id.to_string())
                .fetch_one(&mut *tx)
                .await
                .map_err(query("delete a job"))?;
        if !job.status.is_final() || alive > 0 {
            return Err(not_allowed(&job, Action::Delete));
        }
        let dependents = started_from(&mut tx, id).await?;
        if !dependents.is_empty() {
            return Err(StoreError::InUse {
                what: "job",
                id: id.to_string(),
                by: format!("{} to start from", dependents.join(", ")),
            });
        }
        sqlx::query("DELETE FROM jobs WHERE id = ?")
            .bind(id.to_string())
            .execute(&mut *tx)
            .await
            .map_err(query("delete a job"))?;
        commit(tx, Point::DeleteJob).await.map_err(query("delete a job"))
    }

    /// Asks for a cancellation. A job without a worker is cancelled at once, unless there is a checkpoint to save from:
    /// then it is queued once more, to export and stop.
    ///
    /// # Errors
    /// [`StoreError::NotAllowed`] for a final job.
    pub async fn request_cancel(&self, id: JobId, mode: CancelMode) -> Result<Job> {
        let mut tx = self.begin().await?;
        let mut job = load(&mut tx, id).await?;
        if job.status.is_final() {
            return Err(not_allowed(&job, Action::Cancel));
        }
        set_desired(&mut tx, id, mode.desired()).await?;
        if !job.status.is_active() {
            let n_checkpoints: i64 = sqlx::query_scalar("SELECT count(*) FROM job_checkpoints WHERE job_id = ?")
                .bind(id.to_string())
                .fetch_one(&mut *tx)
                .await
                .map_err(query("count checkpoints"))?;
            if mode == CancelMode::Save && n_checkpoints > 0 {
                match job.status {
                    JobStatus::Paused => {
                        transition(&mut tx, &mut job, Change::Resume, "cancel: saving first").await?;
                    }
                    JobStatus::Interrupted => {
                        transition(&mut tx, &mut job, Change::Requeue, "cancel: saving first").await?;
                    }
                    _ => {}
                }
                ready_now(&mut tx, id).await?;
            } else {
                transition(&mut tx, &mut job, Change::Cancel, "requested").await?;
            }
        }
        let job = load(&mut tx, id).await?;
        commit(tx, Point::CancelJob).await.map_err(query("cancel a job"))?;
        Ok(job)
    }

    /// Asks for a pause. A queued job is paused at once.
    ///
    /// # Errors
    /// [`StoreError::NotAllowed`] unless the job is queued, preparing or running and not being cancelled.
    pub async fn request_pause(&self, id: JobId) -> Result<Job> {
        let mut tx = self.begin().await?;
        let mut job = load(&mut tx, id).await?;
        if !job.status.actions().contains(&Action::Pause) || job.desired.is_cancel() {
            return Err(not_allowed(&job, Action::Pause));
        }
        set_desired(&mut tx, id, Desired::Pause).await?;
        if job.status == JobStatus::Queued {
            transition(&mut tx, &mut job, Change::Pause, "requested").await?;
        }
        let job = load(&mut tx, id).await?;
        commit(tx, Point::PauseJob).await.map_err(query("pause a job"))?;
        Ok(job)
    }

    /// Puts a paused job back into the queue, or takes a pause back that the worker has not honoured yet.
    ///
    /// # Errors
    /// [`StoreError::NotAllowed`] unless the job is paused or being paused.
    pub async fn request_resume(&self, id: JobId) -> Result<Job> {
        let mut tx = self.begin().await?;
        let mut job = load(&mut tx, id).await?;
        let pausing = job.status.is_active() && job.desired == Desired::Pause;
        if job.status != JobStatus::Paused && !pausing {
            return Err(not_allowed(&job, Action::Resume));
        }
        set_desired(&mut tx, id, Desired::Run).await?;
        if job.status == JobStatus::Paused {
            transition(&mut tx, &mut job, Change::Resume, "requested").await?;
            ready_now(&mut tx, id).await?;
        }
        let job = load(&mut tx, id).await?;
        commit(tx, Point::ResumeJob).await.map_err(query("resume a job"))?;
        Ok(job)
    }

    /// Asks the worker for a checkpoint ([`Action::Checkpoint`]) or for sample pictures ([`Action::Sample`]) now.
    ///
    /// # Errors
    /// [`StoreError::NotAllowed`] unless the job is running.
    pub async fn request_now(&self, id: JobId, action: Action) -> Result<Job> {
        let mut tx = self.begin().await?;
        let job = load(&mut tx, id).await?;
        if !job.status.actions().contains(&action) {
            return Err(not_allowed(&job, action));
        }
        let sql = match action {
            Action::Checkpoint => "UPDATE jobs SET checkpoint_request = checkpoint_request + 1 WHERE id = ?",
            Action::Sample => "UPDATE jobs SET sample_request = sample_request + 1 WHERE id = ?",
            _ => return Err(not_allowed(&job, action)),
        };
        sqlx::query(sql)
            .bind(id.to_string())
            .execute(&mut *tx)
            .await
            .map_err(query("ask a worker"))?;
        let job = load(&mut tx, id).await?;
        commit(tx, Point::AskJob).await.map_err(query("ask a worker"))?;
        Ok(job)
    }
}

fn not_found(id: JobId) -> StoreError {
    StoreError::NotFound {
        what: "job",
        id: id.to_string(),
    }
}

fn not_allowed(job: &Job, action: Action) -> StoreError {
    StoreError::NotAllowed {
        job: job.id,
        status: job.status,
        action,
    }
}

/// Jobs that start from a file of this one and have not ended, at most ten: every attempt of theirs may still read it.
async fn started_from(tx: &mut Tx, id: JobId) -> Result<Vec<String>> {
    sqlx::query_scalar(
        "SELECT id FROM jobs WHERE finished_at_ms IS NULL AND json_extract(request, '$.init_from.job_id') = ?
         ORDER BY id LIMIT 10",
    )
    .bind(id.to_string())
    .fetch_all(&mut **tx)
    .await
    .map_err(query("look for jobs that start from another"))
}

/// Between the check of a request and now its source may have been deleted.
async fn require_file(tx: &mut Tx, InitFrom { job_id, file }: &InitFrom) -> Result<()> {
    sqlx::query("SELECT 1 FROM artifacts WHERE job_id = ? AND name = ?")
        .bind(job_id.to_string())
        .bind(file)
        .fetch_optional(&mut **tx)
        .await
        .map_err(query("look for a file to start from"))?
        .map(drop)
        .ok_or_else(|| StoreError::NotFound {
            what: "adapter to start from",
            id: format!("{job_id} / {file}"),
        })
}

/// The job as the transaction sees it.
pub(super) async fn load(tx: &mut Tx, id: JobId) -> Result<Job> {
    let row = sqlx::query("SELECT * FROM jobs WHERE id = ?")
        .bind(id.to_string())
        .fetch_optional(&mut **tx)
        .await
        .map_err(query("read a job"))?;
    rows::job(&row.ok_or_else(|| not_found(id))?)
}

async fn set_desired(tx: &mut Tx, id: JobId, desired: Desired) -> Result<()> {
    sqlx::query("UPDATE jobs SET desired = ? WHERE id = ?")
        .bind(desired.as_str())
        .bind(id.to_string())
        .execute(&mut **tx)
        .await
        .map_err(query("change what is asked of a job"))?;
    Ok(())
}

/// Ends a backoff.
async fn ready_now(tx: &mut Tx, id: JobId) -> Result<()> {
    sqlx::query("UPDATE jobs SET not_before_ms = 0, failed_attempts = 0 WHERE id = ?")
        .bind(id.to_string())
        .execute(&mut **tx)
        .await
        .map_err(query("end a backoff"))?;
    Ok(())
}

/// Moves a job through its state machine and records the event. Leaving for `failed` needs [`fail`].
pub(super) async fn transition(tx: &mut Tx, job: &mut Job, change: Change, reason: &str) -> Result<()> {
    move_to(tx, job, change, reason, None).await
}

/// Moves a job to `failed`.
pub(super) async fn fail(tx: &mut Tx, job: &mut Job, problem: &lorad_proto::problem::Problem) -> Result<()> {
    move_to(
        tx,
        job,
        Change::Fail,
        &problem.code,
        Some(rows::text("error", problem)?),
    )
    .await
}

async fn move_to(tx: &mut Tx, job: &mut Job, change: Change, reason: &str, error: Option<String>) -> Result<()> {
    let to = job
        .status
        .next(change)
        .map_err(|source| StoreError::Illegal { job: job.id, source })?;
    let now = now_ms();
    let leaves_worker = !to.is_active();
    sqlx::query(
        "UPDATE jobs SET status = ?, error = ?, finished_at_ms = ?,
             phase = CASE WHEN ? THEN NULL ELSE phase END,
             lease_expires_ms = CASE WHEN ? THEN NULL ELSE lease_expires_ms END
         WHERE id = ? AND status = ?",
    )
    .bind(to.as_str())
    .bind(error.as_deref())
    .bind(to.is_final().then_some(now))
    .bind(leaves_worker)
    .bind(leaves_worker)
    .bind(job.id.to_string())
    .bind(job.status.as_str())
    .execute(&mut **tx)
    .await
    .map_err(query("change a job's status"))?;
    let data = json!({"from": job.status, "to": to, "reason": reason, "attempt": job.attempt});
    append(tx, job.id, EventKind::Status, now, job.attempt, data).await?;
    let from = std::mem::replace(&mut job.status, to);
    outbox::emit_status(tx, job, from, reason, error.as_deref(), now).await
}

/// Appends an event under the job's next number.
pub(super) async fn append(
    tx: &mut Tx,
    job: JobId,
    kind: EventKind,
    t_ms: i64,
    attempt: u32,
    data: serde_json::Value,
) -> Result<JobEvent> {
    let row = sqlx::query("UPDATE jobs SET last_seq = last_seq + 1 WHERE id = ? RETURNING last_seq")
        .bind(job.to_string())
        .fetch_one(&mut **tx)
        .await
        .map_err(query("number an event"))?;
    let seq: u64 = rows::unsigned(&row, "last_seq")?;
    sqlx::query("INSERT INTO job_events (job_id, seq, kind, t_ms, attempt, data) VALUES (?, ?, ?, ?, ?, ?)")
        .bind(job.to_string())
        .bind(rows::int(seq))
        .bind(kind.as_str())
        .bind(t_ms)
        .bind(attempt)
        .bind(rows::text("data", &data)?)
        .execute(&mut **tx)
        .await
        .map_err(query("append an event"))?;
    Ok(JobEvent {
        seq,
        kind,
        t_ms,
        attempt,
        data,
    })
}
