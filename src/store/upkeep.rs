//! Looking after the database as a whole: a copy while it is in use, a move to another directory, what fsck compares.

use std::path::Path;

use lorad_faults::Point;
use sqlx::Row;

use super::{Result, Store, commit, query, rows};
use crate::domain::{Artifact, Checkpoint, Job};

/// Setting that holds the data directory under which the stored paths lie.
const DATA_ROOT: &str = "data_root";

impl Store {
    /// Copies the database to a file that does not exist yet, as it is at one moment, while it is in use.
    ///
    /// # Errors
    /// If the file exists or the database fails.
    pub async fn copy_to(&self, file: &Path) -> Result<()> {
        sqlx::query("VACUUM INTO ?")
            .bind(file.to_string_lossy().into_owned())
            .execute(&self.writer)
            .await
            .map_err(query("copy itself"))?;
        Ok(())
    }

    /// Forgets the processes of attempts that have not ended. For a copy: they are the original's, and a server on the
    /// copy must neither take them over nor end them.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn forget_processes(&self) -> Result<()> {
        sqlx::query("UPDATE job_attempts SET pid = NULL, pid_start = NULL WHERE ended_at_ms IS NULL")
            .execute(&self.writer)
            .await
            .map_err(query("forget processes"))?;
        Ok(())
    }

    /// Rewrites stored paths when the data directory is another one than last time: it was moved, or restored elsewhere.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn settle_in(&self, root: &Path) -> Result<()> {
        let now = root.to_string_lossy().into_owned();
        let before = self.setting(DATA_ROOT).await?;
        let Some(before) = before.filter(|before| *before != now) else {
            return self.set_setting(DATA_ROOT, &now).await;
        };
        let mut tx = self.begin().await?;
        for sql in [
            "UPDATE datasets SET path = ?1 || substr(path, length(?2) + 1) WHERE substr(path, 1, length(?2) + 1) = ?2 || '/'",
            "UPDATE models SET path = ?1 || substr(path, length(?2) + 1) WHERE substr(path, 1, length(?2) + 1) = ?2 || '/'",
            "UPDATE job_attempts SET dir = ?1 || substr(dir, length(?2) + 1) WHERE substr(dir, 1, length(?2) + 1) = ?2 || '/'",
            "UPDATE job_checkpoints SET path = ?1 || substr(path, length(?2) + 1)
             WHERE substr(path, 1, length(?2) + 1) = ?2 || '/'",
            // In the same transaction: a directory that moved into itself must not be moved twice.
            "UPDATE settings SET value = ?1 WHERE name = 'data_root' AND value = ?2",
        ] {
            sqlx::query(sql)
                .bind(&now)
                .bind(&before)
                .execute(&mut *tx)
                .await
                .map_err(query("move stored paths"))?;
        }
        commit(tx, Point::MovePaths).await.map_err(query("move stored paths"))
    }

    /// Every published file.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn all_artifacts(&self) -> Result<Vec<Artifact>> {
        let rows = sqlx::query("SELECT * FROM artifacts ORDER BY job_id, name")
            .fetch_all(&self.readers)
            .await
            .map_err(query("list files"))?;
        rows.iter().map(rows::artifact).collect()
    }

    /// Jobs that will run on, with their checkpoints, newest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn unfinished(&self) -> Result<Vec<(Job, Vec<Checkpoint>)>> {
        let rows = sqlx::query("SELECT * FROM jobs WHERE finished_at_ms IS NULL ORDER BY id")
            .fetch_all(&self.readers)
            .await
            .map_err(query("list jobs"))?;
        let mut found = Vec::new();
        for row in &rows {
            let job = rows::job(row)?;
            let checkpoints = self.checkpoints(job.id).await?;
            found.push((job, checkpoints));
        }
        Ok(found)
    }

    /// Rows that name a row which is not there, as text for people.
    ///
    /// # Errors
    /// If the check itself fails.
    pub async fn dangling_rows(&self) -> Result<Vec<String>> {
        let rows = sqlx::query("PRAGMA foreign_key_check")
            .fetch_all(&self.readers)
            .await
            .map_err(query("check its references"))?;
        Ok(rows
            .iter()
            .map(|row| {
                format!(
                    "{} names a missing row of {}",
                    row.get::<String, _>(0),
                    row.get::<String, _>(2)
                )
            })
            .collect())
    }
}
