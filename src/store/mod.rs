//! The database: SQLite in WAL mode, the only place with SQL.
//!
//! One writer connection and a pool of readers; every write is one short `BEGIN IMMEDIATE` transaction that also appends
//! the events which viewers see. Knows no HTTP, no processes and no trainer. Callers: `app` (requests), `scheduler`
//! (claims, exits), `agent_api` (worker events), `http` (reads), `ingest` (datasets).

mod attempts;
mod catalogue;
mod downloads;
mod events;
mod idempotency;
mod ingest;
mod jobs;
mod measured;
mod rows;
mod upkeep;

use std::{path::Path, time::Duration};

use sqlx::{
    Row, Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

pub use attempts::{Applied, Attempt, Claimed, NewAttempt, WorkerBatch};
pub use catalogue::NewArtifact;
pub use idempotency::{Begin, IdempotencyKey, StoredAnswer};
pub(crate) use ingest::phase_name;
pub use jobs::{JobFilter, Page};

use crate::domain::{Action, IllegalChange, JobId, JobStatus};

/// The oldest SQLite that is used: 3.51.3 fixes a corruption of WAL databases that a checkpoint racing a reset could
/// cause. The bundled one is newer or equal; this check guards builds against a system library.
const SQLITE_MIN_VERSION: [u32; 3] = [3, 51, 3];

/// What can go wrong in the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database could not be opened or migrated.
    #[error("cannot open the database {path}")]
    Open {
        /// Its file.
        path: String,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// A migration failed.
    #[error("cannot bring the database up to date")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    /// The SQLite library is too old to be safe.
    #[error("SQLite {found} is too old: at least 3.51.3 is needed")]
    TooOld {
        /// Its version.
        found: String,
    },
    /// A statement failed.
    #[error("database: cannot {act}")]
    Query {
        /// What was tried.
        act: &'static str,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// A stored value is not what it must be.
    #[error("database: {column} holds {found}")]
    Corrupt {
        /// Which column.
        column: &'static str,
        /// What stands there.
        found: String,
    },
    /// There is no such thing.
    #[error("no {what} {id}")]
    NotFound {
        /// `job`, `dataset`, `model`, `file`
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The id is taken.
    #[error("{what} {id} exists already")]
    Exists {
        /// `dataset`, `model`
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// Something else needs it.
    #[error("{what} {id} is used by {by}")]
    InUse {
        /// `dataset`, `model`
        what: &'static str,
        /// Its id.
        id: String,
        /// What needs it.
        by: String,
    },
    /// The job's state does not allow the action; [`JobStatus::actions`] lists what it does.
    #[error("{job} is {status}: {action} is not possible")]
    NotAllowed {
        /// The job.
        job: JobId,
        /// Where it stands.
        status: JobStatus,
        /// What was asked.
        action: Action,
    },
    /// The state machine refused a change.
    #[error("{job}")]
    Illegal {
        /// The job.
        job: JobId,
        /// What was refused.
        #[source]
        source: IllegalChange,
    },
    /// A newer attempt owns the job, or the token is wrong.
    #[error("{job} attempt {attempt} does not own the job")]
    Fenced {
        /// The job.
        job: JobId,
        /// The attempt that tried to write.
        attempt: u32,
    },
}

/// Result of the store.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Turns a driver error into [`StoreError::Query`].
pub(super) fn query(act: &'static str) -> impl FnOnce(sqlx::Error) -> StoreError {
    move |source| StoreError::Query { act, source }
}

/// A write transaction.
pub(super) type Tx = Transaction<'static, Sqlite>;

/// The database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    writer: SqlitePool,
    readers: SqlitePool,
}

impl Store {
    /// Opens (or creates) the database file and brings its schema up to date.
    ///
    /// # Errors
    /// If the file cannot be opened, is not a database of this program, or SQLite is too old.
    pub async fn open(file: &Path) -> Result<Self> {
        let at = |source| StoreError::Open {
            path: file.display().to_string(),
            source,
        };
        let options = SqliteConnectOptions::new()
            .filename(file)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // FULL: an acknowledged event survives a power cut. NORMAL would lose the newest transactions.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(5))
            .foreign_keys(true)
            .pragma("wal_autocheckpoint", "1000")
            .pragma("temp_store", "memory");
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options.clone())
            .await
            .map_err(at)?;
        let version: String = sqlx::query("SELECT sqlite_version()")
            .fetch_one(&writer)
            .await
            .map_err(at)?
            .get(0);
        if !is_at_least(&version, SQLITE_MIN_VERSION) {
            return Err(StoreError::TooOld { found: version });
        }
        sqlx::migrate!("./migrations")
            .run(&writer)
            .await
            .map_err(StoreError::Migrate)?;
        let readers = SqlitePoolOptions::new()
            .max_connections(4)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options.pragma("query_only", "on"))
            .await
            .map_err(at)?;
        Ok(Self { writer, readers })
    }

    /// Starts a write: waits for the one writer connection, then takes SQLite's write lock at once, so that a
    /// read-then-write never fails half-way with `SQLITE_BUSY_SNAPSHOT`.
    pub(super) async fn begin(&self) -> Result<Tx> {
        self.writer
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(query("begin a write"))
    }

    /// Checks that the database answers; for the readiness probe.
    ///
    /// # Errors
    /// If it does not.
    pub async fn ping(&self) -> Result<()> {
        sqlx::query("SELECT 1")
            .fetch_one(&self.readers)
            .await
            .map_err(query("answer a ping"))?;
        Ok(())
    }

    /// SQLite's own check of the file; for `doctor` and after an unclean stop.
    ///
    /// # Errors
    /// If the check itself fails.
    ///
    /// Returns the faults found, empty when the file is sound.
    pub async fn quick_check(&self) -> Result<Vec<String>> {
        let rows = sqlx::query("PRAGMA quick_check")
            .fetch_all(&self.readers)
            .await
            .map_err(query("check the file"))?;
        let lines: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        Ok(lines.into_iter().filter(|line| line != "ok").collect())
    }

    /// A setting that the API changes.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn setting(&self, name: &str) -> Result<Option<String>> {
        let row = sqlx::query("SELECT value FROM settings WHERE name = ?")
            .bind(name)
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a setting"))?;
        Ok(row.map(|row| row.get(0)))
    }

    /// Changes a setting.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn set_setting(&self, name: &str, value: &str) -> Result<()> {
        sqlx::query(
            "INSERT INTO settings (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        )
        .bind(name)
        .bind(value)
        .execute(&self.writer)
        .await
        .map_err(query("write a setting"))?;
        Ok(())
    }

    /// Writes the log back into the database file and closes every connection.
    pub async fn close(&self) {
        self.readers.close().await;
        if let Err(error) = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
            .execute(&self.writer)
            .await
        {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the write-ahead log was not truncated"
            );
        }
        self.writer.close().await;
    }
}

fn is_at_least(version: &str, minimum: [u32; 3]) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let found: [u32; 3] = std::array::from_fn(|_| parts.next().unwrap_or(0));
    found >= minimum
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
