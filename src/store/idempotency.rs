//! `Idempotency-Key`: the same request twice has one effect and one answer.

use lorad_faults::Point;
use sqlx::Row;

use super::{Result, Store, Tx, commit, query, rows};
use crate::domain::now_ms;

/// How long answers are kept, milliseconds: 24 hours.
const KEPT_MS: i64 = 24 * 60 * 60 * 1000;

/// A key with what it is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// The header, 1 to 255 characters.
    pub key: String,
    /// Method and path.
    pub scope: String,
    /// SHA-256 of the request body, hex.
    pub body_sha256: String,
}

/// An answer to give again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredAnswer {
    /// HTTP status.
    pub status: u16,
    /// `Location`, if there was one.
    pub location: Option<String>,
    /// JSON body.
    pub body: String,
}

/// What a key means for the request that carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begin {
    /// First time: do it, then store the answer or [`Store::abandon_idempotency`].
    New,
    /// The first request is still at work.
    InFlight,
    /// Done before: give this answer.
    Replay(StoredAnswer),
    /// The key was used with another body.
    OtherBody,
}

impl Store {
    /// Takes a key for a request.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn begin_idempotency(&self, key: &IdempotencyKey) -> Result<Begin> {
        let now = now_ms();
        let mut tx = self.begin().await?;
        sqlx::query("DELETE FROM idempotency_keys WHERE created_at_ms < ?")
            .bind(now - KEPT_MS)
            .execute(&mut *tx)
            .await
            .map_err(query("drop old idempotency keys"))?;
        let row =
            sqlx::query("SELECT body_sha256, status, location, body FROM idempotency_keys WHERE key = ? AND scope = ?")
                .bind(&key.key)
                .bind(&key.scope)
                .fetch_optional(&mut *tx)
                .await
                .map_err(query("read an idempotency key"))?;
        let begin = match row {
            None => {
                sqlx::query(
                    "INSERT INTO idempotency_keys (key, scope, body_sha256, created_at_ms) VALUES (?, ?, ?, ?)",
                )
                .bind(&key.key)
                .bind(&key.scope)
                .bind(&key.body_sha256)
                .bind(now)
                .execute(&mut *tx)
                .await
                .map_err(query("take an idempotency key"))?;
                Begin::New
            }
            Some(row) if row.get::<String, _>("body_sha256") != key.body_sha256 => Begin::OtherBody,
            Some(row) if row.get::<Option<i64>, _>("status").is_none() => Begin::InFlight,
            Some(row) => Begin::Replay(StoredAnswer {
                status: rows::unsigned(&row, "status")?,
                location: row.get("location"),
                body: row.get::<Option<String>, _>("body").unwrap_or_default(),
            }),
        };
        commit(tx, Point::TakeKey)
            .await
            .map_err(query("take an idempotency key"))?;
        Ok(begin)
    }

    /// Gives a key back whose request failed, so that it can be tried again.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn abandon_idempotency(&self, key: &IdempotencyKey) -> Result<()> {
        self.write(
            Point::GiveKeyBack,
            sqlx::query("DELETE FROM idempotency_keys WHERE key = ? AND scope = ? AND status IS NULL")
                .bind(&key.key)
                .bind(&key.scope),
        )
        .await
        .map_err(query("give an idempotency key back"))?;
        Ok(())
    }

    /// Gives back every key whose request was cut off by the end of the process. For the start of the server.
    pub(crate) async fn abandon_cut_off_requests(&self) -> Result<()> {
        self.write(
            Point::GiveKeysBack,
            sqlx::query("DELETE FROM idempotency_keys WHERE status IS NULL"),
        )
        .await
        .map_err(query("give idempotency keys back"))?;
        Ok(())
    }
}

/// Stores the answer, in the transaction of what it answers.
pub(super) async fn finish(tx: &mut Tx, key: &IdempotencyKey, answer: &StoredAnswer) -> Result<()> {
    sqlx::query(
        "INSERT INTO idempotency_keys (key, scope, body_sha256, status, location, body, created_at_ms)
         VALUES (?, ?, ?, ?, ?, ?, ?)
         ON CONFLICT (key, scope) DO UPDATE SET status = excluded.status, location = excluded.location, body = excluded.body",
    )
    .bind(&key.key)
    .bind(&key.scope)
    .bind(&key.body_sha256)
    .bind(i64::from(answer.status))
    .bind(&answer.location)
    .bind(&answer.body)
    .bind(now_ms())
    .execute(&mut **tx)
    .await
    .map_err(query("store an answer"))?;
    Ok(())
}
