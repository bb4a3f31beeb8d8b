//! Base models on their way from a hub.

use lorad_faults::Point;
use lorad_proto::problem::Problem;

use super::{Result, Store, StoreError, catalogue, commit, query, rows};
use crate::domain::{
    Model, ModelId,
    download::{Download, DownloadStatus},
};

impl Store {
    /// Records a download, or starts a failed one of the same slug again.
    ///
    /// # Errors
    /// [`StoreError::Exists`] if a model or another download has the slug, or if the database fails.
    pub async fn insert_download(&self, download: &Download) -> Result<()> {
        let done = self
            .write(
                Point::Manage,
                sqlx::query(
                    "INSERT INTO model_downloads
                 (id, repository, revision, commit_sha, licence, status, total_bytes, error, created_at_ms)
             SELECT ?1, ?2, ?3, ?4, ?5, 'downloading', ?6, NULL, ?7
             WHERE NOT EXISTS (SELECT 1 FROM models WHERE id = ?1)
             ON CONFLICT (id) DO UPDATE SET repository = excluded.repository, revision = excluded.revision,
                 commit_sha = excluded.commit_sha, licence = excluded.licence, status = 'downloading',
                 total_bytes = excluded.total_bytes, error = NULL, created_at_ms = excluded.created_at_ms
                 WHERE model_downloads.status = 'failed'",
                )
                .bind(download.id.as_str())
                .bind(&download.repository)
                .bind(&download.revision)
                .bind(&download.commit)
                .bind(&download.licence)
                .bind(rows::int(download.total_bytes))
                .bind(download.created_at_ms),
            )
            .await
            .map_err(query("record a download"))?;
        if done.rows_affected() == 0 {
            return Err(StoreError::Exists {
                what: "model",
                id: download.id.to_string(),
            });
        }
        Ok(())
    }

    /// Downloads in order of their slugs.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn downloads(&self) -> Result<Vec<Download>> {
        let rows = sqlx::query("SELECT * FROM model_downloads ORDER BY id")
            .fetch_all(&self.readers)
            .await
            .map_err(query("list downloads"))?;
        rows.iter().map(rows::download).collect()
    }

    /// One download, if there is one of that slug.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn download(&self, id: &ModelId) -> Result<Option<Download>> {
        let row = sqlx::query("SELECT * FROM model_downloads WHERE id = ?")
            .bind(id.as_str())
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a download"))?;
        row.as_ref().map(rows::download).transpose()
    }

    /// Records that a download stopped.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn fail_download(&self, id: &ModelId, problem: &Problem) -> Result<()> {
        self.write(
            Point::Manage,
            sqlx::query("UPDATE model_downloads SET status = ?, error = ? WHERE id = ?")
                .bind(DownloadStatus::Failed.as_str())
                .bind(rows::text("error", problem)?)
                .bind(id.as_str()),
        )
        .await
        .map_err(query("record a failed download"))?;
        Ok(())
    }

    /// Forgets a download. Whether there was one.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn delete_download(&self, id: &ModelId) -> Result<bool> {
        let done = self
            .write(
                Point::Manage,
                sqlx::query("DELETE FROM model_downloads WHERE id = ?").bind(id.as_str()),
            )
            .await
            .map_err(query("forget a download"))?;
        Ok(done.rows_affected() > 0)
    }

    /// Registers a model in place of its download.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the download was cancelled meanwhile, or if the database fails.
    pub async fn finish_download(&self, model: &Model) -> Result<()> {
        let mut tx = self.begin().await?;
        let done = sqlx::query("DELETE FROM model_downloads WHERE id = ?")
            .bind(model.id.as_str())
            .execute(&mut *tx)
            .await
            .map_err(query("finish a download"))?;
        if done.rows_affected() == 0 {
            return Err(StoreError::NotFound {
                what: "download",
                id: model.id.to_string(),
            });
        }
        catalogue::insert_model(&mut tx, model).await?;
        commit(tx, Point::Manage).await.map_err(query("finish a download"))
    }
}
