//! API keys, browser sessions, and what a key may still use.

use lorad_faults::Point;
use sqlx::Row;

use super::{Result, Store, StoreError, Tx, catalogue, commit, query, rows};
use crate::domain::{ApiKey, ApiKeyPatch, Dataset, KeyId, NewApiKey, Scope, now_ms};

/// How exact [`ApiKey::last_used_at_ms`] is: a write with every request would be one too many.
const USE_RECORDED_EVERY_MS: i64 = 60_000;

impl Store {
    /// Stores a key.
    ///
    /// # Errors
    /// [`StoreError::Exists`] in the unlikely case that another key begins with the same characters.
    pub async fn insert_key(&self, new: &NewApiKey) -> Result<ApiKey> {
        let id = KeyId::new();
        let quota = new.quota;
        let done = self.write(Point::Manage, sqlx::query(
            "INSERT INTO api_keys (id, name, scope, prefix, sha256, max_requests_per_minute, max_queued_jobs, max_running_jobs,
                 max_dataset_bytes, created_at_ms, expires_at_ms)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (prefix) DO NOTHING",
        )
        .bind(id.to_string())
        .bind(&new.name)
        .bind(new.scope.as_str())
        .bind(&new.prefix)
        .bind(&new.sha256)
        .bind(quota.requests_per_minute)
        .bind(quota.queued_jobs)
        .bind(quota.running_jobs)
        .bind(quota.dataset_bytes.map(rows::int))
        .bind(now_ms())
        .bind(new.expires_at_ms))
        .await
        .map_err(query("store a key"))?;
        if done.rows_affected() == 0 {
            return Err(StoreError::Exists {
                what: "key",
                id: new.prefix.clone(),
            });
        }
        self.key(id).await
    }

    /// Every key that was ever made, newest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn keys(&self) -> Result<Vec<ApiKey>> {
        let rows = sqlx::query("SELECT * FROM api_keys ORDER BY id DESC")
            .fetch_all(&self.readers)
            .await
            .map_err(query("list keys"))?;
        rows.iter().map(rows::api_key).collect()
    }

    /// One key.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn key(&self, id: KeyId) -> Result<ApiKey> {
        let row = sqlx::query("SELECT * FROM api_keys WHERE id = ?")
            .bind(id.to_string())
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a key"))?;
        rows::api_key(&row.ok_or_else(|| not_found(id))?)
    }

    /// The key that begins with `prefix`, and its stored SHA-256 for the caller to compare.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn key_by_prefix(&self, prefix: &str) -> Result<Option<(ApiKey, String)>> {
        let row = sqlx::query("SELECT * FROM api_keys WHERE prefix = ?")
            .bind(prefix)
            .fetch_optional(&self.readers)
            .await
            .map_err(query("find a key"))?;
        row.map(|row| Ok((rows::api_key(&row)?, row.get("sha256")))).transpose()
    }

    /// Whether a key was ever made. Revoked and expired ones count: a server must not open up because its last key ended.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn has_keys(&self) -> Result<bool> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM api_keys)")
            .fetch_one(&self.readers)
            .await
            .map_err(query("look for keys"))
    }

    /// Changes name, end or quotas.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn update_key(&self, id: KeyId, patch: &ApiKeyPatch) -> Result<ApiKey> {
        let mut tx = self.begin().await?;
        let row = sqlx::query("SELECT * FROM api_keys WHERE id = ?")
            .bind(id.to_string())
            .fetch_optional(&mut *tx)
            .await
            .map_err(query("change a key"))?;
        let key = rows::api_key(&row.ok_or_else(|| not_found(id))?)?;
        let quota = patch.quota.unwrap_or(key.quota);
        sqlx::query(
            "UPDATE api_keys SET name = ?, expires_at_ms = ?, max_requests_per_minute = ?, max_queued_jobs = ?,
                 max_running_jobs = ?, max_dataset_bytes = ? WHERE id = ?",
        )
        .bind(patch.name.as_ref().unwrap_or(&key.name))
        .bind(patch.expires_at_ms.unwrap_or(key.expires_at_ms))
        .bind(quota.requests_per_minute)
        .bind(quota.queued_jobs)
        .bind(quota.running_jobs)
        .bind(quota.dataset_bytes.map(rows::int))
        .bind(id.to_string())
        .execute(&mut *tx)
        .await
        .map_err(query("change a key"))?;
        commit(tx, Point::Manage).await.map_err(query("change a key"))?;
        self.key(id).await
    }

    /// Revokes a key and ends its sessions. `keep_an_admin`: not the last valid admin key.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::InUse`] for the last admin key; or if the database fails.
    pub async fn revoke_key(&self, id: KeyId, keep_an_admin: bool) -> Result<()> {
        let now = now_ms();
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE api_keys SET revoked_at_ms = coalesce(revoked_at_ms, ?) WHERE id = ?")
            .bind(now)
            .bind(id.to_string())
            .execute(&mut *tx)
            .await
            .map_err(query("revoke a key"))
            .and_then(|done| (done.rows_affected() > 0).then_some(()).ok_or_else(|| not_found(id)))?;
        let admins_left: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM api_keys WHERE scope = ? AND revoked_at_ms IS NULL
                 AND (expires_at_ms IS NULL OR expires_at_ms > ?)",
        )
        .bind(Scope::Admin.as_str())
        .bind(now)
        .fetch_one(&mut *tx)
        .await
        .map_err(query("revoke a key"))?;
        if keep_an_admin && admins_left == 0 {
            return Err(StoreError::InUse {
                what: "key",
                id: id.to_string(),
                by: "whoever manages the other keys: it is the last admin key".to_owned(),
            });
        }
        sqlx::query("DELETE FROM sessions WHERE key_id = ?")
            .bind(id.to_string())
            .execute(&mut *tx)
            .await
            .map_err(query("end a key's sessions"))?;
        commit(tx, Point::Manage).await.map_err(query("revoke a key"))
    }

    /// Notes that a key was used, once a minute.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn note_key_use(&self, key: &ApiKey, now_ms: i64) -> Result<()> {
        if key
            .last_used_at_ms
            .is_some_and(|last| now_ms - last < USE_RECORDED_EVERY_MS)
        {
            return Ok(());
        }
        self.write(
            Point::Manage,
            sqlx::query("UPDATE api_keys SET last_used_at_ms = ? WHERE id = ? AND coalesce(last_used_at_ms, 0) < ?")
                .bind(now_ms)
                .bind(key.id.to_string())
                .bind(now_ms - USE_RECORDED_EVERY_MS),
        )
        .await
        .map_err(query("note a key's use"))?;
        Ok(())
    }

    /// Starts a session, and drops those that have ended.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn insert_session(&self, sha256: &str, key: KeyId, expires_at_ms: i64) -> Result<()> {
        let now = now_ms();
        let mut tx = self.begin().await?;
        sqlx::query("DELETE FROM sessions WHERE expires_at_ms <= ?")
            .bind(now)
            .execute(&mut *tx)
            .await
            .map_err(query("drop ended sessions"))?;
        sqlx::query("INSERT INTO sessions (sha256, key_id, created_at_ms, expires_at_ms) VALUES (?, ?, ?, ?)")
            .bind(sha256)
            .bind(key.to_string())
            .bind(now)
            .bind(expires_at_ms)
            .execute(&mut *tx)
            .await
            .map_err(query("start a session"))?;
        commit(tx, Point::Manage).await.map_err(query("start a session"))
    }

    /// The key behind a session that has not ended.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn session_key(&self, sha256: &str, now_ms: i64) -> Result<Option<ApiKey>> {
        let row = sqlx::query(
            "SELECT k.* FROM sessions AS s JOIN api_keys AS k ON k.id = s.key_id WHERE s.sha256 = ? AND s.expires_at_ms > ?",
        )
        .bind(sha256)
        .bind(now_ms)
        .fetch_optional(&self.readers)
        .await
        .map_err(query("find a session"))?;
        row.as_ref().map(rows::api_key).transpose()
    }

    /// Ends a session.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn delete_session(&self, sha256: &str) -> Result<()> {
        self.write(
            Point::Manage,
            sqlx::query("DELETE FROM sessions WHERE sha256 = ?").bind(sha256),
        )
        .await
        .map_err(query("end a session"))?;
        Ok(())
    }

    /// Stores a dataset whose files lie in place, as its owner's.
    ///
    /// # Errors
    /// [`StoreError::Quota`] if the owner's datasets would become too large, or if the database fails.
    pub async fn insert_dataset_of(&self, dataset: &Dataset, owner: Option<KeyId>) -> Result<()> {
        let Some(owner) = owner else {
            return self.insert_dataset(dataset).await;
        };
        let mut tx = self.begin().await?;
        let row = sqlx::query(
            "SELECT max_dataset_bytes, (SELECT coalesce(sum(bytes), 0) FROM datasets WHERE key_id = api_keys.id) AS used
             FROM api_keys WHERE id = ?",
        )
        .bind(owner.to_string())
        .fetch_one(&mut *tx)
        .await
        .map_err(query("measure a key's datasets"))?;
        let used: u64 = rows::unsigned(&row, "used")?;
        if let Some(limit) = rows::unsigned_opt::<u64>(&row, "max_dataset_bytes")?
            && used.saturating_add(dataset.bytes) > limit
        {
            return Err(StoreError::Quota {
                what: "bytes of datasets",
                limit,
                used,
            });
        }
        catalogue::insert(&mut tx, dataset).await?;
        sqlx::query("UPDATE datasets SET key_id = ? WHERE id = ?")
            .bind(owner.to_string())
            .bind(dataset.id.to_string())
            .execute(&mut *tx)
            .await
            .map_err(query("name a dataset's owner"))?;
        commit(tx, Point::InsertDataset)
            .await
            .map_err(query("insert a dataset"))
    }
}

/// Makes a job its owner's, unless as many of the owner's jobs wait already as may. Within the job's own transaction, so that
/// two posts at once cannot both take the last place.
pub(super) async fn own_job(tx: &mut Tx, job: crate::domain::JobId, owner: KeyId) -> Result<()> {
    let row = sqlx::query(
        "SELECT max_queued_jobs, (SELECT count(*) FROM jobs WHERE key_id = api_keys.id AND status IN ('validating', 'queued')) AS n
         FROM api_keys WHERE id = ?",
    )
    .bind(owner.to_string())
    .fetch_one(&mut **tx)
    .await
    .map_err(query("count a key's jobs"))?;
    let waiting: u64 = rows::unsigned(&row, "n")?;
    if let Some(limit) = rows::unsigned_opt::<u64>(&row, "max_queued_jobs")?
        && waiting >= limit
    {
        return Err(StoreError::Quota {
            what: "waiting jobs",
            limit,
            used: waiting,
        });
    }
    sqlx::query("UPDATE jobs SET key_id = ? WHERE id = ?")
        .bind(owner.to_string())
        .bind(job.to_string())
        .execute(&mut **tx)
        .await
        .map_err(query("name a job's owner"))?;
    Ok(())
}

fn not_found(id: KeyId) -> StoreError {
    StoreError::NotFound {
        what: "key",
        id: id.to_string(),
    }
}
