//! Datasets, models and published files.

use lorad_faults::Point;
use sqlx::Row;

use super::{Result, Store, StoreError, Tx, commit, query, rows};
use crate::domain::{Artifact, ArtifactKind, Dataset, DatasetId, JobId, JobSample, Model, ModelId, now_ms};

/// A file that was published and is to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewArtifact {
    /// File name.
    pub name: String,
    /// What it is.
    pub kind: ArtifactKind,
    /// Size.
    pub bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
}

/// A sample picture that was published and is to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NewSample {
    /// The picture.
    pub(super) sample: JobSample,
    /// Its size.
    pub(super) bytes: u64,
    /// Its SHA-256, hex.
    pub(super) sha256: String,
}

impl Store {
    /// Stores a dataset whose files lie in place.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn insert_dataset(&self, dataset: &Dataset) -> Result<()> {
        let mut tx = self.begin().await?;
        insert(&mut tx, dataset).await?;
        commit(tx, Point::InsertDataset)
            .await
            .map_err(query("insert a dataset"))
    }

    /// One dataset.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn dataset(&self, id: DatasetId) -> Result<Dataset> {
        let row = sqlx::query("SELECT * FROM datasets WHERE id = ?")
            .bind(id.to_string())
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a dataset"))?;
        let row = row.ok_or_else(|| StoreError::NotFound {
            what: "dataset",
            id: id.to_string(),
        })?;
        rows::dataset(&row)
    }

    /// The newest dataset of this name.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn dataset_by_name(&self, name: &str) -> Result<Option<Dataset>> {
        let row = sqlx::query("SELECT * FROM datasets WHERE name = ? ORDER BY id DESC LIMIT 1")
            .bind(name)
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a dataset"))?;
        row.as_ref().map(rows::dataset).transpose()
    }

    /// Datasets, newest first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn datasets(&self) -> Result<Vec<Dataset>> {
        let rows = sqlx::query("SELECT * FROM datasets ORDER BY id DESC")
            .fetch_all(&self.readers)
            .await
            .map_err(query("list datasets"))?;
        rows.iter().map(rows::dataset).collect()
    }

    /// Number of jobs that use a dataset; above 0 it must not change.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn dataset_uses(&self, id: DatasetId) -> Result<u64> {
        let row = sqlx::query("SELECT count(*) AS n FROM jobs WHERE dataset_id = ?")
            .bind(id.to_string())
            .fetch_one(&self.readers)
            .await
            .map_err(query("count a dataset's jobs"))?;
        rows::unsigned(&row, "n")
    }

    /// Forgets a dataset that no job uses. Its files are the caller's.
    ///
    /// # Errors
    /// [`StoreError::InUse`], [`StoreError::NotFound`], or if the database fails.
    pub async fn delete_dataset(&self, id: DatasetId) -> Result<()> {
        let deleted = self
            .write(
                Point::DeleteDataset,
                sqlx::query("DELETE FROM datasets WHERE id = ?").bind(id.to_string()),
            )
            .await;
        deleted_or("dataset", &id.to_string(), deleted)
    }

    /// Registers a model, or refreshes what is known of a built-in one.
    ///
    /// # Errors
    /// [`StoreError::Exists`] if the slug is taken by a model that is not built in, or if the database fails.
    pub async fn insert_model(&self, model: &Model) -> Result<()> {
        let mut tx = self.begin().await?;
        insert_model(&mut tx, model).await?;
        commit(tx, Point::InsertModel).await.map_err(query("register a model"))
    }

    /// One model.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn model(&self, id: &ModelId) -> Result<Model> {
        let row = sqlx::query("SELECT * FROM models WHERE id = ?")
            .bind(id.as_str())
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a model"))?;
        let row = row.ok_or_else(|| StoreError::NotFound {
            what: "model",
            id: id.to_string(),
        })?;
        rows::model(&row)
    }

    /// Models in order of their slugs.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn models(&self) -> Result<Vec<Model>> {
        let rows = sqlx::query("SELECT * FROM models ORDER BY id")
            .fetch_all(&self.readers)
            .await
            .map_err(query("list models"))?;
        rows.iter().map(rows::model).collect()
    }

    /// Forgets a model that no job uses. Its files are the caller's.
    ///
    /// # Errors
    /// [`StoreError::InUse`], [`StoreError::NotFound`], or if the database fails.
    pub async fn delete_model(&self, id: &ModelId) -> Result<()> {
        let deleted = self
            .write(
                Point::DeleteModel,
                sqlx::query("DELETE FROM models WHERE id = ?").bind(id.as_str()),
            )
            .await;
        deleted_or("model", id.as_str(), deleted)
    }

    /// Published files of a job, in order of name.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn artifacts(&self, job: JobId) -> Result<Vec<Artifact>> {
        let rows = sqlx::query("SELECT * FROM artifacts WHERE job_id = ? ORDER BY name")
            .bind(job.to_string())
            .fetch_all(&self.readers)
            .await
            .map_err(query("list files"))?;
        rows.iter().map(rows::artifact).collect()
    }

    /// One published file.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or if the database fails.
    pub async fn artifact(&self, job: JobId, name: &str) -> Result<Artifact> {
        let row = sqlx::query("SELECT * FROM artifacts WHERE job_id = ? AND name = ?")
            .bind(job.to_string())
            .bind(name)
            .fetch_optional(&self.readers)
            .await
            .map_err(query("read a file's entry"))?;
        let row = row.ok_or_else(|| StoreError::NotFound {
            what: "file",
            id: name.to_owned(),
        })?;
        rows::artifact(&row)
    }

    /// Bytes of all published files.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn artifact_bytes(&self) -> Result<u64> {
        let row = sqlx::query("SELECT coalesce(sum(bytes), 0) FROM artifacts")
            .fetch_one(&self.readers)
            .await
            .map_err(query("add up files"))?;
        Ok(row.get::<i64, _>(0).cast_unsigned())
    }
}

/// Stores a dataset within a transaction.
pub(super) async fn insert(tx: &mut Tx, dataset: &Dataset) -> Result<()> {
    sqlx::query(
        "INSERT INTO datasets (id, name, modality, path, n_items, bytes, sha256, builtin, report, created_at_ms)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(dataset.id.to_string())
    .bind(&dataset.name)
    .bind(&dataset.modality)
    .bind(dataset.path.to_string_lossy().into_owned())
    .bind(dataset.n_items)
    .bind(rows::int(dataset.bytes))
    .bind(&dataset.sha256)
    .bind(dataset.builtin)
    .bind(rows::text("report", &dataset.report)?)
    .bind(dataset.created_at_ms)
    .execute(&mut **tx)
    .await
    .map_err(query("insert a dataset"))?;
    Ok(())
}

/// As [`Store::insert_model`], within a transaction.
pub(super) async fn insert_model(tx: &mut Tx, model: &Model) -> Result<()> {
    let done = sqlx::query(
        "INSERT INTO models (id, kind, family, path, source, licence, builtin, info, created_at_ms)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
         ON CONFLICT (id) DO UPDATE SET family = excluded.family, path = excluded.path, info = excluded.info,
             licence = excluded.licence WHERE models.builtin = 1 AND excluded.builtin = 1",
    )
    .bind(model.id.as_str())
    .bind(model.kind.as_str())
    .bind(&model.info.family)
    .bind(model.path.to_string_lossy().into_owned())
    .bind(&model.source)
    .bind(&model.licence)
    .bind(model.builtin)
    .bind(rows::text("info", &model.info)?)
    .bind(model.created_at_ms)
    .execute(&mut **tx)
    .await
    .map_err(query("register a model"))?;
    if done.rows_affected() == 0 {
        return Err(StoreError::Exists {
            what: "model",
            id: model.id.to_string(),
        });
    }
    Ok(())
}

fn deleted_or(what: &'static str, id: &str, result: sqlx::Result<sqlx::sqlite::SqliteQueryResult>) -> Result<()> {
    match result {
        Ok(done) if done.rows_affected() == 0 => Err(StoreError::NotFound {
            what,
            id: id.to_owned(),
        }),
        Ok(_) => Ok(()),
        Err(sqlx::Error::Database(error)) if error.is_foreign_key_violation() => Err(StoreError::InUse {
            what,
            id: id.to_owned(),
            by: "at least one job".to_owned(),
        }),
        Err(source) => Err(query("delete an entry")(source)),
    }
}

/// Records a published file; a newer attempt replaces an older one's file of the same name.
pub(super) async fn record_artifact(tx: &mut Tx, job: JobId, attempt: u32, new: &NewArtifact) -> Result<()> {
    sqlx::query(
        "INSERT INTO artifacts (job_id, name, kind, bytes, sha256, attempt, created_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?)
         ON CONFLICT (job_id, name) DO UPDATE SET kind = excluded.kind, bytes = excluded.bytes, sha256 = excluded.sha256,
             attempt = excluded.attempt, created_at_ms = excluded.created_at_ms",
    )
    .bind(job.to_string())
    .bind(&new.name)
    .bind(new.kind.as_str())
    .bind(rows::int(new.bytes))
    .bind(&new.sha256)
    .bind(attempt)
    .bind(now_ms())
    .execute(&mut **tx)
    .await
    .map_err(query("record a file"))?;
    Ok(())
}

/// Records a published sample picture.
pub(super) async fn record_sample(tx: &mut Tx, job: JobId, attempt: u32, new: &NewSample) -> Result<()> {
    let artifact = NewArtifact {
        name: new.sample.file.clone(),
        kind: ArtifactKind::Sample,
        bytes: new.bytes,
        sha256: new.sha256.clone(),
    };
    record_artifact(tx, job, attempt, &artifact).await?;
    let sample = &new.sample;
    sqlx::query(
        "INSERT INTO job_samples (job_id, file, step, prompt_index, prompt, seed, width, height, t_ms)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
         ON CONFLICT (job_id, file) DO UPDATE SET step = excluded.step, prompt_index = excluded.prompt_index,
             prompt = excluded.prompt, seed = excluded.seed, width = excluded.width, height = excluded.height,
             t_ms = excluded.t_ms",
    )
    .bind(job.to_string())
    .bind(&sample.file)
    .bind(rows::int(sample.step))
    .bind(sample.prompt_index)
    .bind(&sample.prompt)
    .bind(sample.seed.cast_signed())
    .bind(sample.width)
    .bind(sample.height)
    .bind(sample.t_ms)
    .execute(&mut **tx)
    .await
    .map_err(query("record a sample"))?;
    Ok(())
}
