//! The audit log.

use lorad_faults::Point;

use super::{Result, Store, commit, query, rows};
use crate::domain::AuditEntry;

/// Old entries are dropped at every so manieth new one.
const TRIM_EVERY: i64 = 64;

impl Store {
    /// Appends an entry and keeps about `max_entries` of the newest.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn append_audit(&self, entry: &AuditEntry, max_entries: u64) -> Result<()> {
        let mut tx = self.begin().await?;
        let id = sqlx::query(
            "INSERT INTO audit (t_ms, key_id, key_name, address, method, path, object, status, request_id)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(entry.t_ms)
        .bind(entry.key.as_ref().map(|(id, _)| id.to_string()))
        .bind(entry.key.as_ref().map(|(_, name)| name.as_str()))
        .bind(&entry.address)
        .bind(&entry.method)
        .bind(&entry.path)
        .bind(entry.object.as_deref())
        .bind(entry.status)
        .bind(&entry.request_id)
        .execute(&mut *tx)
        .await
        .map_err(query("write the audit log"))?
        .last_insert_rowid();
        if id % TRIM_EVERY == 0 {
            sqlx::query("DELETE FROM audit WHERE id <= ?")
                .bind(id.saturating_sub(rows::int(max_entries)))
                .execute(&mut *tx)
                .await
                .map_err(query("shorten the audit log"))?;
        }
        commit(tx, Point::Manage).await.map_err(query("write the audit log"))
    }

    /// Entries, newest first, older than `after` if given; and whether more follow.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn audit(&self, after: Option<i64>, limit: u32) -> Result<(Vec<AuditEntry>, bool)> {
        let found = sqlx::query("SELECT * FROM audit WHERE id < ? ORDER BY id DESC LIMIT ?")
            .bind(after.unwrap_or(i64::MAX))
            .bind(i64::from(limit) + 1)
            .fetch_all(&self.readers)
            .await
            .map_err(query("read the audit log"))?;
        let has_more = found.len() > limit as usize;
        let page = found
            .iter()
            .take(limit as usize)
            .map(rows::audit_entry)
            .collect::<Result<_>>()?;
        Ok((page, has_more))
    }
}
