//! The audit log.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use lorad_faults::Point;

use super::{Result, Store, commit, query, rows};
use crate::domain::AuditEntry;

/// How long an entry waits for others to be written with: no request pays for a flush of the disk of its own.
const GATHER: Duration = Duration::from_millis(100);

/// Entries that are not written yet, each with the number to keep.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    waiting: Mutex<Vec<(AuditEntry, u64)>>,
    /// Held while entries are on their way into the database.
    writing: tokio::sync::Mutex<()>,
}

impl Store {
    /// Notes an entry, to be written within a tenth of a second; the newest `max_entries` are kept. A crash can lose what
    /// was noted in that time, an orderly end does not.
    pub fn note_audit(&self, entry: AuditEntry, max_entries: u64) {
        let is_first = {
            let mut waiting = self.audit.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.push((entry, max_entries));
            waiting.len() == 1
        };
        if is_first {
            let store = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(GATHER).await;
                if let Err(error) = store.flush_audit().await {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "entries of the audit log are lost"
                    );
                }
            });
        }
    }

    /// Writes what was noted.
    ///
    /// # Errors
    /// If the database fails; the entries are lost then.
    pub(super) async fn flush_audit(&self) -> Result<()> {
        let _writing = self.audit.writing.lock().await;
        let noted = std::mem::take(&mut *self.audit.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        let Some((_, max_entries)) = noted.last() else {
            return Ok(());
        };
        let max_entries = rows::int(*max_entries);
        let mut tx = self.begin().await?;
        let mut newest = 0;
        for (entry, _) in &noted {
            newest = sqlx::query(
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
        }
        sqlx::query("DELETE FROM audit WHERE id <= ?")
            .bind(newest.saturating_sub(max_entries))
            .execute(&mut *tx)
            .await
            .map_err(query("shorten the audit log"))?;
        commit(tx, Point::Manage).await.map_err(query("write the audit log"))
    }

    /// Entries, newest first, older than `after` if given; and whether more follow. What was noted before the call is there.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn audit(&self, after: Option<i64>, limit: u32) -> Result<(Vec<AuditEntry>, bool)> {
        self.flush_audit().await?;
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
