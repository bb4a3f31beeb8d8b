//! Webhooks and their outbox: events are stored in the transaction that changes the job.

use std::collections::HashMap;

use serde_json::{Value, json};
use sqlx::Row;

use lorad_faults::Point;

use super::{Result, Store, StoreError, Tx, commit, query, rows};
use crate::domain::{
    AfterAttempt, Delivery, DeliveryAttempt, Job, JobId, JobStatus, MessageId, NewWebhook, Webhook, WebhookEvent,
    WebhookId, WebhookPatch, now_ms,
};

impl Store {
    /// Stores a webhook that hears of every job.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn insert_webhook(&self, new: &NewWebhook) -> Result<Webhook> {
        let mut tx = self.begin().await?;
        let id = insert(&mut tx, new, None).await?;
        commit(tx, Point::Manage).await.map_err(query("store a webhook"))?;
        self.webhook(id).await
    }

    /// Webhooks that hear of every job, newest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn webhooks(&self) -> Result<Vec<Webhook>> {
        let rows = sqlx::query("SELECT * FROM webhooks WHERE job_id IS NULL ORDER BY id DESC")
            .fetch_all(&self.readers)
            .await
            .map_err(query("list webhooks"))?;
        rows.iter().map(rows::webhook).collect()
    }

    /// One webhook.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn webhook(&self, id: WebhookId) -> Result<Webhook> {
        let row = sqlx::query("SELECT * FROM webhooks WHERE id = ?")
            .bind(id.to_string())
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a webhook"))?;
        rows::webhook(&row.ok_or_else(|| not_found("webhook", &id))?)
    }

    /// A job's own webhook, if it has one.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn job_webhook(&self, job: JobId) -> Result<Option<Webhook>> {
        let row = sqlx::query("SELECT * FROM webhooks WHERE job_id = ?")
            .bind(job.to_string())
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a job's webhook"))?;
        row.as_ref().map(rows::webhook).transpose()
    }

    /// Changes a webhook. Switched on, it starts anew: past failures are forgotten.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn update_webhook(&self, id: WebhookId, patch: &WebhookPatch) -> Result<Webhook> {
        let events = patch
            .events
            .as_ref()
            .map(|events| rows::text("events", events))
            .transpose()?;
        let done = self.write(Point::Manage, sqlx::query(
            "UPDATE webhooks SET url = coalesce(?1, url), events = coalesce(?2, events), description = coalesce(?3, description),
                 enabled = coalesce(?4, enabled),
                 disabled_reason = CASE WHEN ?4 = 1 THEN NULL WHEN ?4 = 0 THEN 'switched off' ELSE disabled_reason END,
                 failing_since_ms = CASE WHEN ?4 = 1 THEN NULL ELSE failing_since_ms END
             WHERE id = ?5",
        )
        .bind(patch.url.as_deref())
        .bind(events)
        .bind(patch.description.as_deref())
        .bind(patch.enabled)
        .bind(id.to_string()))
        .await
        .map_err(query("change a webhook"))?;
        if done.rows_affected() == 0 {
            return Err(not_found("webhook", &id));
        }
        self.webhook(id).await
    }

    /// Forgets a webhook with its deliveries.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn delete_webhook(&self, id: WebhookId) -> Result<()> {
        let done = self
            .write(
                Point::Manage,
                sqlx::query("DELETE FROM webhooks WHERE id = ?").bind(id.to_string()),
            )
            .await
            .map_err(query("delete a webhook"))?;
        if done.rows_affected() == 0 {
            return Err(not_found("webhook", &id));
        }
        Ok(())
    }

    /// Queues a test message.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn test_webhook(&self, id: WebhookId) -> Result<Delivery> {
        let mut tx = self.begin().await?;
        let now = now_ms();
        let message = queue(
            &mut tx,
            &id.to_string(),
            WebhookEvent::Test,
            &json!({"webhook_id": id}),
            now,
        )
        .await?;
        commit(tx, Point::Manage).await.map_err(query("queue a test message"))?;
        self.delivery(id, message).await
    }

    /// What is due at `now_ms`, at most `per_webhook` for each webhook.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn due_deliveries(&self, now_ms: i64, per_webhook: u32) -> Result<Vec<(Delivery, Webhook)>> {
        let found = sqlx::query(
            "SELECT * FROM (
                 SELECT d.*, row_number() OVER (PARTITION BY webhook_id ORDER BY next_attempt_ms, d.id) AS place
                 FROM webhook_deliveries AS d JOIN webhooks AS w ON w.id = d.webhook_id
                 WHERE d.status = 'pending' AND d.next_attempt_ms <= ? AND w.enabled = 1)
             WHERE place <= ? ORDER BY next_attempt_ms",
        )
        .bind(now_ms)
        .bind(per_webhook)
        .fetch_all(&self.readers)
        .await
        .map_err(query("find due deliveries"))?;
        let mut due = Vec::new();
        for row in &found {
            let delivery = rows::delivery(row)?;
            let webhook = self.webhook(delivery.webhook_id).await?;
            due.push((delivery, webhook));
        }
        Ok(due)
    }

    /// Records an attempt and what follows from it: log, delivery and webhook in one transaction.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn record_delivery(
        &self,
        delivery: &Delivery,
        attempt: &DeliveryAttempt,
        after: &AfterAttempt,
    ) -> Result<()> {
        let mut tx = self.begin().await?;
        let act = "record a delivery";
        let (status, next) = match after {
            AfterAttempt::Delivered => ("delivered", None),
            AfterAttempt::Retry(at) => ("pending", Some(*at)),
            AfterAttempt::GiveUp | AfterAttempt::Disable(_) => ("failed", None),
        };
        let done = sqlx::query(
            "UPDATE webhook_deliveries SET status = ?, next_attempt_ms = ?, tries = tries + 1 WHERE id = ?",
        )
        .bind(status)
        .bind(next)
        .bind(delivery.id.to_string())
        .execute(&mut *tx)
        .await
        .map_err(query(act))?;
        if done.rows_affected() == 0 {
            return Ok(()); // the webhook was deleted meanwhile
        }
        sqlx::query(
            "INSERT INTO webhook_attempts (delivery_id, attempt, t_ms, duration_ms, http_status, error)
             SELECT ?1, 1 + coalesce(max(attempt), 0), ?2, ?3, ?4, ?5 FROM webhook_attempts WHERE delivery_id = ?1",
        )
        .bind(delivery.id.to_string())
        .bind(attempt.t_ms)
        .bind(rows::int(attempt.duration_ms))
        .bind(attempt.http_status)
        .bind(attempt.error.as_deref())
        .execute(&mut *tx)
        .await
        .map_err(query(act))?;
        let failed_at = attempt.error.is_some().then_some(attempt.t_ms);
        sqlx::query(
            "UPDATE webhooks SET failing_since_ms = CASE WHEN ?1 IS NULL THEN NULL ELSE coalesce(failing_since_ms, ?1) END
             WHERE id = ?2",
        )
        .bind(failed_at)
        .bind(delivery.webhook_id.to_string())
        .execute(&mut *tx)
        .await
        .map_err(query(act))?;
        if let AfterAttempt::Disable(reason) = after {
            sqlx::query("UPDATE webhooks SET enabled = 0, disabled_reason = ? WHERE id = ?")
                .bind(*reason)
                .bind(delivery.webhook_id.to_string())
                .execute(&mut *tx)
                .await
                .map_err(query(act))?;
            // What waits could not be sent before somebody looks; it can be redelivered from the log.
            sqlx::query("UPDATE webhook_deliveries SET status = 'failed', next_attempt_ms = NULL WHERE webhook_id = ? AND status = 'pending'")
                .bind(delivery.webhook_id.to_string())
                .execute(&mut *tx)
                .await
                .map_err(query(act))?;
        }
        commit(tx, Point::Manage).await.map_err(query(act))
    }

    /// Queues a delivery once more, from the start of the schedule.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn redeliver(&self, webhook: WebhookId, id: MessageId) -> Result<Delivery> {
        let done = self.write(Point::Manage, sqlx::query(
            "UPDATE webhook_deliveries SET status = 'pending', tries = 0, next_attempt_ms = ? WHERE id = ? AND webhook_id = ?",
        )
        .bind(now_ms())
        .bind(id.to_string())
        .bind(webhook.to_string()))
        .await
        .map_err(query("queue a delivery again"))?;
        if done.rows_affected() == 0 {
            return Err(not_found("delivery", &id));
        }
        self.delivery(webhook, id).await
    }

    /// One delivery with its attempts.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn delivery(&self, webhook: WebhookId, id: MessageId) -> Result<Delivery> {
        let row = sqlx::query("SELECT * FROM webhook_deliveries WHERE id = ? AND webhook_id = ?")
            .bind(id.to_string())
            .bind(webhook.to_string())
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a delivery"))?;
        let delivery = rows::delivery(&row.ok_or_else(|| not_found("delivery", &id))?)?;
        Ok(self.with_attempts(vec![delivery]).await?.remove(0))
    }

    /// A webhook's deliveries with their attempts, newest first, before `after` if given; and whether more follow.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn deliveries(
        &self,
        webhook: WebhookId,
        after: Option<MessageId>,
        limit: u32,
    ) -> Result<(Vec<Delivery>, bool)> {
        let found = sqlx::query(
            "SELECT * FROM webhook_deliveries WHERE webhook_id = ?1 AND (?2 IS NULL OR id < ?2) ORDER BY id DESC LIMIT ?3",
        )
        .bind(webhook.to_string())
        .bind(after.map(|id| id.to_string()))
        .bind(i64::from(limit) + 1)
        .fetch_all(&self.readers)
        .await
        .map_err(query("list deliveries"))?;
        let has_more = found.len() > limit as usize;
        let page = found
            .iter()
            .take(limit as usize)
            .map(rows::delivery)
            .collect::<Result<_>>()?;
        Ok((self.with_attempts(page).await?, has_more))
    }

    async fn with_attempts(&self, mut deliveries: Vec<Delivery>) -> Result<Vec<Delivery>> {
        let ids: Vec<String> = deliveries.iter().map(|delivery| delivery.id.to_string()).collect();
        let found = sqlx::query(
            "SELECT * FROM webhook_attempts WHERE delivery_id IN (SELECT value FROM json_each(?)) ORDER BY delivery_id, attempt",
        )
        .bind(rows::text("ids", &ids)?)
        .fetch_all(&self.readers)
        .await
        .map_err(query("list attempts to deliver"))?;
        let mut attempts: HashMap<String, Vec<DeliveryAttempt>> = HashMap::new();
        for row in &found {
            attempts
                .entry(row.get("delivery_id"))
                .or_default()
                .push(rows::delivery_attempt(row)?);
        }
        for delivery in &mut deliveries {
            delivery.attempts = attempts.remove(&delivery.id.to_string()).unwrap_or_default();
        }
        Ok(deliveries)
    }

    /// Drops log entries from before `before_ms`; what still waits stays.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn prune_deliveries(&self, before_ms: i64) -> Result<()> {
        self.write(
            Point::Manage,
            sqlx::query("DELETE FROM webhook_deliveries WHERE status <> 'pending' AND created_at_ms < ?")
                .bind(before_ms),
        )
        .await
        .map_err(query("drop old deliveries"))?;
        Ok(())
    }
}

/// Stores a webhook within a transaction; `job`: it hears of this job alone.
pub(super) async fn insert(tx: &mut Tx, new: &NewWebhook, job: Option<JobId>) -> Result<WebhookId> {
    let id = WebhookId::new();
    sqlx::query(
        "INSERT INTO webhooks (id, job_id, url, events, secret, description, created_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(id.to_string())
    .bind(job.map(|job| job.to_string()))
    .bind(&new.url)
    .bind(rows::text("events", &new.events)?)
    .bind(&new.secret)
    .bind(&new.description)
    .bind(now_ms())
    .execute(&mut **tx)
    .await
    .map_err(query("store a webhook"))?;
    Ok(id)
}

/// Puts what happened to a job into the outbox of everyone who wants to hear of it, within the transaction that does it.
pub(super) async fn emit(tx: &mut Tx, job: &Job, event: WebhookEvent, change: &Value, t_ms: i64) -> Result<()> {
    let hooks = sqlx::query(
        "SELECT id FROM webhooks WHERE enabled = 1 AND (job_id IS NULL OR job_id = ?)
             AND EXISTS (SELECT 1 FROM json_each(events) WHERE value = ?)",
    )
    .bind(job.id.to_string())
    .bind(event.as_str())
    .fetch_all(&mut **tx)
    .await
    .map_err(query("find webhooks"))?;
    if hooks.is_empty() {
        return Ok(());
    }
    let data = json!({
        "job_id": job.id, "name": job.name, "tags": job.tags, "base_model": job.base_model, "dataset_id": job.dataset_id,
        "status": job.status, "previous_status": change["from"], "reason": change["reason"], "attempt": job.attempt,
        "step": job.step, "total_steps": job.total_steps, "error": change["error"],
    });
    for hook in hooks {
        queue(tx, hook.get("id"), event, &data, t_ms).await?;
    }
    Ok(())
}

/// What a new status is told as; see [`emit`].
pub(super) async fn emit_status(
    tx: &mut Tx,
    job: &Job,
    from: JobStatus,
    reason: &str,
    error: Option<&str>,
    t_ms: i64,
) -> Result<()> {
    let Some(event) = WebhookEvent::of(job.status) else {
        return Ok(());
    };
    let error: Option<Value> = error.and_then(|text| serde_json::from_str(text).ok());
    emit(
        tx,
        job,
        event,
        &json!({"from": from, "reason": reason, "error": error}),
        t_ms,
    )
    .await
}

async fn queue(tx: &mut Tx, webhook: &str, event: WebhookEvent, data: &Value, t_ms: i64) -> Result<MessageId> {
    let id = MessageId::new();
    let timestamp = jiff::Timestamp::from_millisecond(t_ms).unwrap_or_default().to_string();
    let payload = json!({"type": event, "timestamp": timestamp, "data": data});
    sqlx::query(
        "INSERT INTO webhook_deliveries (id, webhook_id, event, payload, next_attempt_ms, created_at_ms)
         VALUES (?, ?, ?, ?, ?, ?)",
    )
    .bind(id.to_string())
    .bind(webhook)
    .bind(event.as_str())
    .bind(rows::text("payload", &payload)?)
    .bind(t_ms)
    .bind(t_ms)
    .execute(&mut **tx)
    .await
    .map_err(query("queue a delivery"))?;
    Ok(id)
}

fn not_found(what: &'static str, id: &dyn ToString) -> StoreError {
    StoreError::NotFound {
        what,
        id: id.to_string(),
    }
}
