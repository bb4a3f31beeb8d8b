//! How fast finished jobs were.

use serde_json::{Map, Value};
use sqlx::Row;

use super::{Result, Store, Tx, query, rows};
use crate::domain::{Job, estimate::MeasuredRun, now_ms};

impl Store {
    /// Finished runs on a device, newest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn measured_runs(&self, device: &str, most: u32) -> Result<Vec<MeasuredRun>> {
        let found = sqlx::query(
            "SELECT base_model, workload, modelled_step_s, measured_step_s FROM measured_runs WHERE device = ?
             ORDER BY t_ms DESC LIMIT ?",
        )
        .bind(device)
        .bind(most)
        .fetch_all(&self.readers)
        .await
        .map_err(query("read measured runs"))?;
        Ok(found
            .iter()
            .map(|row| MeasuredRun {
                base_model: row.get("base_model"),
                workload: row.get("workload"),
                modelled_step_s: row.get("modelled_step_s"),
                measured_step_s: row.get("measured_step_s"),
            })
            .collect())
    }
}

/// Records what a finished job's steps took, without the first one, which warms up.
pub(super) async fn record(tx: &mut Tx, job: &Job, summary: &Map<String, Value>) -> Result<()> {
    let modelled = job.plan.modelled_step_s();
    if modelled <= 0.0 {
        return Ok(());
    }
    let id = job.id.to_string();
    sqlx::query(
        "INSERT OR REPLACE INTO measured_runs
             (job_id, device, base_model, workload, modelled_step_s, measured_step_s, memory_bytes, peak_memory_bytes, t_ms)
         SELECT ?1, device, ?2, ?3, ?4, steps.step_ms / 1000.0, ?5, ?6, ?7
         FROM job_attempts, (
             SELECT step_ms FROM job_metrics WHERE job_id = ?1 AND step > 1 ORDER BY step_ms
             LIMIT 1 OFFSET (SELECT count(*) / 2 FROM job_metrics WHERE job_id = ?1 AND step > 1)
         ) AS steps
         WHERE job_id = ?1 AND attempt = ?8",
    )
    .bind(id)
    .bind(job.base_model.as_str())
    .bind(&job.plan.workload)
    .bind(modelled)
    .bind(rows::int(job.plan.memory_bytes))
    .bind(summary.get("peak_memory_bytes").and_then(Value::as_i64))
    .bind(now_ms())
    .bind(job.attempt)
    .execute(&mut **tx)
    .await
    .map_err(query("record a measured run"))?;
    Ok(())
}
