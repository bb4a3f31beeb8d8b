//! Database rows into domain values. A value that does not decode is [`StoreError::Corrupt`] and names its column.

use std::{path::PathBuf, str::FromStr};

use serde::de::DeserializeOwned;
use sqlx::{Row, sqlite::SqliteRow};

use super::{Result, StoreError, query};
use crate::domain::{
    ApiKey, Artifact, ArtifactKind, AuditEntry, Checkpoint, Dataset, Delivery, DeliveryAttempt, DeliveryStatus,
    Desired, EventKind, Job, JobEvent, JobSample, JobStatus, MetricRow, Model, ModelKind, Quota, Scope, Webhook,
    download::{Download, DownloadStatus},
};

fn corrupt(column: &'static str, found: &dyn ToString) -> StoreError {
    StoreError::Corrupt {
        column,
        found: found.to_string(),
    }
}

fn column<'r, T>(row: &'r SqliteRow, name: &'static str) -> Result<T>
where
    T: sqlx::Decode<'r, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
{
    row.try_get(name).map_err(query("decode a row"))
}

pub(super) fn json<T: DeserializeOwned>(row: &SqliteRow, name: &'static str) -> Result<T> {
    let text: String = column(row, name)?;
    serde_json::from_str(&text).map_err(|error| corrupt(name, &error))
}

fn json_opt<T: DeserializeOwned>(row: &SqliteRow, name: &'static str) -> Result<Option<T>> {
    let text: Option<String> = column(row, name)?;
    text.map(|text| serde_json::from_str(&text).map_err(|error| corrupt(name, &error)))
        .transpose()
}

pub(super) fn unsigned<T: TryFrom<i64>>(row: &SqliteRow, name: &'static str) -> Result<T> {
    let value: i64 = column(row, name)?;
    T::try_from(value).map_err(|_| corrupt(name, &value))
}

pub(super) fn unsigned_opt<T: TryFrom<i64>>(row: &SqliteRow, name: &'static str) -> Result<Option<T>> {
    let value: Option<i64> = column(row, name)?;
    value
        .map(|value| T::try_from(value).map_err(|_| corrupt(name, &value)))
        .transpose()
}

fn parsed<T: FromStr>(row: &SqliteRow, name: &'static str) -> Result<T> {
    let text: String = column(row, name)?;
    text.parse().map_err(|_| corrupt(name, &text))
}

fn spelled<T>(row: &SqliteRow, name: &'static str, parse: fn(&str) -> Option<T>) -> Result<T> {
    let text: String = column(row, name)?;
    parse(&text).ok_or_else(|| corrupt(name, &text))
}

fn path(row: &SqliteRow, name: &'static str) -> Result<PathBuf> {
    Ok(PathBuf::from(column::<String>(row, name)?))
}

/// A request number that is newer than the newest one served.
fn outstanding(row: &SqliteRow, request: &'static str, served: &'static str) -> Result<Option<u64>> {
    let (request, served): (u64, u64) = (unsigned(row, request)?, unsigned(row, served)?);
    Ok((request > served).then_some(request))
}

pub(super) fn job(row: &SqliteRow) -> Result<Job> {
    let parent: Option<String> = column(row, "parent_id")?;
    Ok(Job {
        id: parsed(row, "id")?,
        parent_id: parent
            .map(|id| id.parse().map_err(|_| corrupt("parent_id", &id)))
            .transpose()?,
        name: column(row, "name")?,
        tags: json(row, "tags")?,
        notes: column(row, "notes")?,
        priority: column(row, "priority")?,
        status: spelled(row, "status", JobStatus::parse)?,
        desired: spelled(row, "desired", Desired::parse)?,
        base_model: parsed(row, "base_model")?,
        dataset_id: parsed(row, "dataset_id")?,
        family: column(row, "family")?,
        request: json(row, "request")?,
        hyperparameters: json(row, "hyperparameters")?,
        sampling: json(row, "sampling")?,
        export: json(row, "export")?,
        plan: json(row, "plan")?,
        total_steps: unsigned(row, "total_steps")?,
        step: unsigned(row, "step")?,
        phase: column(row, "phase")?,
        attempt: unsigned(row, "attempt")?,
        failed_attempts: unsigned(row, "failed_attempts")?,
        memory_rescues: unsigned(row, "memory_rescues")?,
        not_before_ms: column(row, "not_before_ms")?,
        lease_expires_ms: column(row, "lease_expires_ms")?,
        checkpoint_request: outstanding(row, "checkpoint_request", "checkpoint_served")?,
        sample_request: outstanding(row, "sample_request", "sample_served")?,
        last_seq: unsigned(row, "last_seq")?,
        created_at_ms: column(row, "created_at_ms")?,
        started_at_ms: column(row, "started_at_ms")?,
        finished_at_ms: column(row, "finished_at_ms")?,
        error: json_opt(row, "error")?,
        summary: json(row, "summary")?,
    })
}

pub(super) fn event(row: &SqliteRow) -> Result<JobEvent> {
    Ok(JobEvent {
        seq: unsigned(row, "seq")?,
        kind: spelled(row, "kind", EventKind::parse)?,
        t_ms: column(row, "t_ms")?,
        attempt: unsigned(row, "attempt")?,
        data: json(row, "data")?,
    })
}

pub(super) fn metric(row: &SqliteRow) -> Result<MetricRow> {
    Ok(MetricRow {
        step: unsigned(row, "step")?,
        attempt: unsigned(row, "attempt")?,
        t_ms: column(row, "t_ms")?,
        epoch: column(row, "epoch")?,
        loss: column(row, "loss")?,
        lr: column(row, "lr")?,
        grad_norm: column(row, "grad_norm")?,
        step_ms: column(row, "step_ms")?,
        samples_per_s: column(row, "samples_per_s")?,
        extra: json(row, "extra")?,
    })
}

pub(super) fn artifact(row: &SqliteRow) -> Result<Artifact> {
    Ok(Artifact {
        job_id: parsed(row, "job_id")?,
        name: column(row, "name")?,
        kind: spelled(row, "kind", ArtifactKind::parse)?,
        bytes: unsigned(row, "bytes")?,
        sha256: column(row, "sha256")?,
        attempt: unsigned(row, "attempt")?,
        created_at_ms: column(row, "created_at_ms")?,
    })
}

pub(super) fn sample(row: &SqliteRow) -> Result<JobSample> {
    Ok(JobSample {
        file: column(row, "file")?,
        step: unsigned(row, "step")?,
        prompt_index: unsigned(row, "prompt_index")?,
        prompt: column(row, "prompt")?,
        seed: column::<i64>(row, "seed")?.cast_unsigned(),
        width: unsigned(row, "width")?,
        height: unsigned(row, "height")?,
        t_ms: column(row, "t_ms")?,
    })
}

pub(super) fn checkpoint(row: &SqliteRow) -> Result<Checkpoint> {
    Ok(Checkpoint {
        step: unsigned(row, "step")?,
        attempt: unsigned(row, "attempt")?,
        path: path(row, "path")?,
        bytes: unsigned(row, "bytes")?,
        sha256: column(row, "sha256")?,
        t_ms: column(row, "t_ms")?,
    })
}

pub(super) fn dataset(row: &SqliteRow) -> Result<Dataset> {
    Ok(Dataset {
        id: parsed(row, "id")?,
        name: column(row, "name")?,
        modality: column(row, "modality")?,
        path: path(row, "path")?,
        n_items: unsigned(row, "n_items")?,
        bytes: unsigned(row, "bytes")?,
        sha256: column(row, "sha256")?,
        builtin: column(row, "builtin")?,
        report: json(row, "report")?,
        created_at_ms: column(row, "created_at_ms")?,
    })
}

pub(super) fn model(row: &SqliteRow) -> Result<Model> {
    Ok(Model {
        id: parsed(row, "id")?,
        kind: spelled(row, "kind", ModelKind::parse)?,
        path: path(row, "path")?,
        source: column(row, "source")?,
        licence: column(row, "licence")?,
        builtin: column(row, "builtin")?,
        info: json(row, "info")?,
        created_at_ms: column(row, "created_at_ms")?,
    })
}

pub(super) fn api_key(row: &SqliteRow) -> Result<ApiKey> {
    Ok(ApiKey {
        id: parsed(row, "id")?,
        name: column(row, "name")?,
        scope: spelled(row, "scope", Scope::parse)?,
        prefix: column(row, "prefix")?,
        quota: Quota {
            requests_per_minute: unsigned_opt(row, "max_requests_per_minute")?,
            queued_jobs: unsigned_opt(row, "max_queued_jobs")?,
            running_jobs: unsigned_opt(row, "max_running_jobs")?,
            dataset_bytes: unsigned_opt(row, "max_dataset_bytes")?,
        },
        created_at_ms: column(row, "created_at_ms")?,
        expires_at_ms: column(row, "expires_at_ms")?,
        revoked_at_ms: column(row, "revoked_at_ms")?,
        last_used_at_ms: column(row, "last_used_at_ms")?,
    })
}

pub(super) fn webhook(row: &SqliteRow) -> Result<Webhook> {
    let job: Option<String> = column(row, "job_id")?;
    Ok(Webhook {
        id: parsed(row, "id")?,
        job_id: job
            .map(|id| id.parse().map_err(|_| corrupt("job_id", &id)))
            .transpose()?,
        url: column(row, "url")?,
        events: json(row, "events")?,
        secret: column(row, "secret")?,
        description: column(row, "description")?,
        enabled: column(row, "enabled")?,
        disabled_reason: column(row, "disabled_reason")?,
        failing_since_ms: column(row, "failing_since_ms")?,
        created_at_ms: column(row, "created_at_ms")?,
    })
}

/// Without its attempts, which are rows of their own.
pub(super) fn delivery(row: &SqliteRow) -> Result<Delivery> {
    Ok(Delivery {
        id: parsed(row, "id")?,
        webhook_id: parsed(row, "webhook_id")?,
        event: column(row, "event")?,
        payload: column(row, "payload")?,
        status: spelled(row, "status", DeliveryStatus::parse)?,
        tries: unsigned(row, "tries")?,
        next_attempt_ms: column(row, "next_attempt_ms")?,
        created_at_ms: column(row, "created_at_ms")?,
        attempts: Vec::new(),
    })
}

pub(super) fn delivery_attempt(row: &SqliteRow) -> Result<DeliveryAttempt> {
    Ok(DeliveryAttempt {
        t_ms: column(row, "t_ms")?,
        duration_ms: unsigned(row, "duration_ms")?,
        http_status: unsigned_opt(row, "http_status")?,
        error: column(row, "error")?,
    })
}

pub(super) fn audit_entry(row: &SqliteRow) -> Result<AuditEntry> {
    let id: Option<String> = column(row, "key_id")?;
    let name: Option<String> = column(row, "key_name")?;
    let id = id
        .map(|id| id.parse().map_err(|_| corrupt("key_id", &id)))
        .transpose()?;
    Ok(AuditEntry {
        id: column(row, "id")?,
        t_ms: column(row, "t_ms")?,
        key: id.zip(name),
        address: column(row, "address")?,
        method: column(row, "method")?,
        path: column(row, "path")?,
        object: column(row, "object")?,
        status: unsigned(row, "status")?,
        request_id: column(row, "request_id")?,
    })
}

pub(super) fn download(row: &SqliteRow) -> Result<Download> {
    let error: Option<String> = column(row, "error")?;
    Ok(Download {
        id: parsed(row, "id")?,
        repository: column(row, "repository")?,
        revision: column(row, "revision")?,
        commit: column(row, "commit_sha")?,
        licence: column(row, "licence")?,
        status: spelled(row, "status", DownloadStatus::parse)?,
        total_bytes: unsigned(row, "total_bytes")?,
        error: error.map(|_| json(row, "error")).transpose()?,
        created_at_ms: column(row, "created_at_ms")?,
    })
}

pub(super) fn attempt(row: &SqliteRow) -> Result<super::Attempt> {
    Ok(super::Attempt {
        job_id: parsed(row, "job_id")?,
        attempt: unsigned(row, "attempt")?,
        token_sha256: column(row, "token_sha256")?,
        device: column(row, "device")?,
        dir: path(row, "dir")?,
        pid: column::<Option<i64>>(row, "pid")?
            .map(|pid| u32::try_from(pid).map_err(|_| corrupt("pid", &pid)))
            .transpose()?,
        pid_start: column::<Option<i64>>(row, "pid_start")?.map(i64::cast_unsigned),
        acked_seq: unsigned(row, "acked_seq")?,
        final_event: json_opt(row, "final_event")?,
        started_at_ms: column(row, "started_at_ms")?,
        ended_at_ms: column(row, "ended_at_ms")?,
    })
}

/// An unsigned number as SQLite's signed one; none of ours comes near 2^63.
pub(super) fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A value as JSON text.
pub(super) fn text<T: serde::Serialize>(column: &'static str, value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|error| corrupt(column, &error))
}
