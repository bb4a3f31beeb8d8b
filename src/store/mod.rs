//! The database: SQLite in WAL mode, the only place with SQL.
//!
//! One writer connection and a pool of readers; every write is one short `BEGIN IMMEDIATE` transaction that also appends
//! the events which viewers see. Knows no HTTP, no processes and no trainer. Callers: `app` (requests), `scheduler`
//! (claims, exits), `agent_api` (worker events), `http` (reads), `ingest` (datasets).

mod access;
mod attempts;
mod audit;
mod catalogue;
mod downloads;
mod events;
mod idempotency;
mod ingest;
mod jobs;
mod measured;
mod outbox;
mod rows;
mod upkeep;

use std::{
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use lorad_faults::{Moment, Point, pass};
use sqlx::{
    Row, Sqlite, SqlitePool, Transaction,
    migrate::MigrateError,
    query::Query,
    sqlite::{
        SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteQueryResult,
        SqliteSynchronous,
    },
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
    Migrate(#[source] MigrateError),
    /// A newer lorad has changed the database's layout.
    #[error(
        "the database {path} was last used by a newer lorad (it has migration {version}, which this one does not know): \
         use that version again, or restore a backup that is older than the upgrade"
    )]
    Newer {
        /// Its file.
        path: String,
        /// The migration.
        version: i64,
    },
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
        /// `dataset`, `job`, `model`
        what: &'static str,
        /// Its id.
        id: String,
        /// What needs it.
        by: String,
    },
    /// The key that asks has used up what it may.
    #[error("{used} {what} of {limit} are used")]
    Quota {
        /// Of what: `waiting jobs`, `bytes of datasets`.
        what: &'static str,
        /// How much it may have.
        limit: u64,
        /// How much it has.
        used: u64,
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

impl StoreError {
    /// Whether every connection was taken for as long as one waits for it: nothing is wrong but that there is too much to do.
    pub fn is_busy(&self) -> bool {
        matches!(
            self,
            Self::Query {
                source: sqlx::Error::PoolTimedOut,
                ..
            }
        )
    }

    /// Whether the disk has no room: what was tried has not happened, and is worth another try when there is.
    pub fn is_disk_full(&self) -> bool {
        /// `SQLITE_FULL`, and `SQLITE_IOERR_SHMSIZE`: no room for the index of the write-ahead log.
        const FULL: [&str; 2] = ["13", "4874"];
        match self {
            Self::Open { source, .. } | Self::Query { source, .. } => match source {
                sqlx::Error::Database(error) => error.code().is_some_and(|code| FULL.contains(&code.as_ref())),
                sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::StorageFull,
                _ => false,
            },
            _ => false,
        }
    }
}

/// Turns a driver error into [`StoreError::Query`].
pub(super) fn query(act: &'static str) -> impl FnOnce(sqlx::Error) -> StoreError {
    move |source| StoreError::Query { act, source }
}

/// A write transaction.
pub(super) type Tx = Transaction<'static, Sqlite>;

/// Commits a write; the only place that does.
pub(super) async fn commit(tx: Tx, point: Point) -> Result<(), sqlx::Error> {
    pass(point, Moment::Before)?;
    tx.commit().await?;
    Ok(pass(point, Moment::After)?)
}

/// The database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    writer: SqlitePool,
    readers: SqlitePool,
    audit: Arc<audit::Buffer>,
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
        keep_private(file).map_err(|source| at(source.into()))?;
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
            .map_err(|error| match error {
                MigrateError::VersionMissing(version) => StoreError::Newer {
                    path: file.display().to_string(),
                    version,
                },
                other => StoreError::Migrate(other),
            })?;
        let readers = SqlitePoolOptions::new()
            .max_connections(4)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options.pragma("query_only", "on"))
            .await
            .map_err(at)?;
        Ok(Self {
            writer,
            readers,
            audit: Arc::default(),
        })
    }

    /// Starts a write: waits for the one writer connection, then takes SQLite's write lock at once, so that a
    /// read-then-write never fails half-way with `SQLITE_BUSY_SNAPSHOT`.
    pub(super) async fn begin(&self) -> Result<Tx> {
        let mut begun = self.writer.begin_with("BEGIN IMMEDIATE").await;
        if matches!(begun, Err(sqlx::Error::InvalidSavePointStatement)) {
            // SQLite ends a transaction by itself when the disk is full, and the driver still counts it as open: this
            // connection would refuse every write from now on.
            tracing::warn!("the database's writer is connected anew after a failed write");
            let connection = self.writer.acquire().await.map_err(query("begin a write"))?;
            connection.close().await.map_err(query("begin a write"))?;
            begun = self.writer.begin_with("BEGIN IMMEDIATE").await;
        }
        begun.map_err(query("begin a write"))
    }

    /// Runs one statement as a write of its own.
    pub(super) async fn write(
        &self,
        point: Point,
        statement: Query<'_, Sqlite, SqliteArguments>,
    ) -> Result<SqliteQueryResult, sqlx::Error> {
        pass(point, Moment::Before)?;
        let done = statement.execute(&self.writer).await?;
        pass(point, Moment::After)?;
        Ok(done)
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
        self.write(Point::WriteSetting, sqlx::query(
            "INSERT INTO settings (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        )
        .bind(name)
        .bind(value))
        .await
        .map_err(query("write a setting"))?;
        Ok(())
    }

    /// Writes the log back into the database file and closes every connection.
    pub async fn close(&self) {
        if let Err(error) = self.flush_audit().await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "entries of the audit log are lost"
            );
        }
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

/// The database holds the secrets that sign webhooks: it is its owner's alone. SQLite gives the log beside it the same mode.
fn keep_private(file: &Path) -> std::io::Result<()> {
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(file)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    }
    Ok(())
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
