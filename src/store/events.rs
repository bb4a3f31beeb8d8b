//! What viewers read: events after a cursor, log tails, metrics, samples, checkpoints.

use futures_util::TryStreamExt as _;
use sqlx::Row as _;

use super::{Page, Result, Store, query, rows};
use crate::domain::{Checkpoint, EventKind, JobEvent, JobId, JobSample, MetricRow};

impl Store {
    /// Events with a number above `after`, oldest first, at most `limit`.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn events_after(&self, job: JobId, after: u64, limit: u32) -> Result<Vec<JobEvent>> {
        let rows = sqlx::query("SELECT * FROM job_events WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?")
            .bind(job.to_string())
            .bind(rows::int(after))
            .bind(limit)
            .fetch_all(&self.readers)
            .await
            .map_err(query("read events"))?;
        rows.iter().map(rows::event).collect()
    }

    /// The events after a viewer's cursor, oldest first: at most `limit`, and no more once `bytes` of their data are read.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn events_page(&self, job: JobId, after: u64, limit: u32, bytes: usize) -> Result<Page<JobEvent>> {
        let mut rows = sqlx::query("SELECT * FROM job_events WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?")
            .bind(job.to_string())
            .bind(rows::int(after))
            .bind(limit)
            .fetch(&self.readers);
        let (mut data, mut taken) = (Vec::new(), 0);
        while let Some(row) = rows.try_next().await.map_err(query("read events"))? {
            taken += row.get::<&str, _>("data").len();
            data.push(rows::event(&row)?);
            if taken >= bytes {
                break;
            }
        }
        let has_more = taken >= bytes || data.len() == limit as usize;
        Ok(Page { data, has_more })
    }

    /// The newest `limit` events of one kind, oldest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn newest_events(&self, job: JobId, kind: EventKind, limit: u32) -> Result<Vec<JobEvent>> {
        let rows = sqlx::query("SELECT * FROM job_events WHERE job_id = ? AND kind = ? ORDER BY seq DESC LIMIT ?")
            .bind(job.to_string())
            .bind(kind.as_str())
            .bind(limit)
            .fetch_all(&self.readers)
            .await
            .map_err(query("read events"))?;
        rows.iter().rev().map(rows::event).collect()
    }

    /// Steps `from..=to`, in order.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn metrics(&self, job: JobId, from: u64, to: u64) -> Result<Vec<MetricRow>> {
        let rows = sqlx::query("SELECT * FROM job_metrics WHERE job_id = ? AND step BETWEEN ? AND ? ORDER BY step")
            .bind(job.to_string())
            .bind(rows::int(from))
            .bind(rows::int(to))
            .fetch_all(&self.readers)
            .await
            .map_err(query("read metrics"))?;
        rows.iter().map(rows::metric).collect()
    }

    /// The newest step's figures.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn newest_metric(&self, job: JobId) -> Result<Option<MetricRow>> {
        let row = sqlx::query("SELECT * FROM job_metrics WHERE job_id = ? ORDER BY step DESC LIMIT 1")
            .bind(job.to_string())
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read metrics"))?;
        row.as_ref().map(rows::metric).transpose()
    }

    /// Sample pictures in order of step and prompt.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn samples(&self, job: JobId) -> Result<Vec<JobSample>> {
        let rows = sqlx::query("SELECT * FROM job_samples WHERE job_id = ? ORDER BY step, prompt_index, file")
            .bind(job.to_string())
            .fetch_all(&self.readers)
            .await
            .map_err(query("read samples"))?;
        rows.iter().map(rows::sample).collect()
    }

    /// Checkpoints, newest first. Workers delete old ones by themselves, so a directory may be gone.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn checkpoints(&self, job: JobId) -> Result<Vec<Checkpoint>> {
        let rows = sqlx::query("SELECT * FROM job_checkpoints WHERE job_id = ? ORDER BY step DESC, attempt DESC")
            .bind(job.to_string())
            .fetch_all(&self.readers)
            .await
            .map_err(query("read checkpoints"))?;
        rows.iter().map(rows::checkpoint).collect()
    }
}
