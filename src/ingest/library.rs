//! Datasets of a running server: from a file in staging to a row in the store, and back.
//!
//! Knows the store's functions and the data directory, no HTTP. Called by `http` and by the server's startup.

use std::{io::Write as _, path::Path};

use sha2::{Digest as _, Sha256};

use super::{IngestError, Limits, Source, ingest, inspect::ChildInspector, sweep_staging};
use crate::{
    app::{App, remove_dir},
    domain::{Dataset, DatasetId, now_ms},
    store::StoreError,
};

/// Name of the dataset that comes with the binary.
pub const BUNDLED: &str = "silhouettes";
static BUNDLED_ZIP: &[u8] = include_bytes!("../../assets/silhouettes.zip");

/// Why a dataset was not added.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// The upload is at fault, or the disk.
    #[error(transparent)]
    Ingest(#[from] IngestError),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The data directory cannot be used.
    #[error("cannot tidy up {path}")]
    Tidy {
        /// Where.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl From<&crate::config::Limits> for Limits {
    fn from(limits: &crate::config::Limits) -> Self {
        Self {
            max_entries: limits.archive_entries,
            max_total_bytes: limits.archive_unpacked_bytes,
            max_ratio: limits.archive_ratio,
            max_pixels: limits.image_pixels,
            max_caption_chars: usize::try_from(limits.caption_chars).unwrap_or(usize::MAX),
            ..Self::default()
        }
    }
}

/// Checks an archive and publishes its files as a dataset that the store does not know yet.
///
/// # Errors
/// See [`ingest`].
pub async fn prepare(app: &App, archive: &Path, name: &str, sha256: &str) -> Result<Dataset, IngestError> {
    let id = DatasetId::new();
    let (staging, dest) = (app.data.tmp(), app.data.datasets().join(id.to_string()));
    let limits = Limits::from(&app.config.limits);
    let inspector = inspector(app)?;
    let archive = archive.to_owned();
    let done = tokio::task::spawn_blocking({
        let dest = dest.clone();
        move || ingest(Source::Archive(&archive), &staging, &dest, &limits, &inspector)
    });
    let ingested = done
        .await
        .map_err(|panic| IngestError::Inspector(std::io::Error::other(panic)))??;
    Ok(Dataset {
        id,
        name: name.to_owned(),
        modality: "image".to_owned(),
        path: dest,
        n_items: ingested.report.n_items,
        bytes: ingested.bytes,
        sha256: sha256.to_owned(),
        builtin: false,
        report: ingested.report,
        created_at_ms: now_ms(),
    })
}

fn inspector(app: &App) -> Result<ChildInspector, IngestError> {
    let program = &app.config.scheduler.worker_program;
    let exe = if program.as_os_str().is_empty() {
        std::env::current_exe().map_err(IngestError::Inspector)?
    } else {
        program.clone()
    };
    Ok(ChildInspector::new(exe))
}

/// Removes the files of a dataset that the store does not know (any more).
pub async fn discard(dataset: &Dataset) {
    remove_dir(dataset.path.clone()).await;
}

/// At the start of the server: empties staging, removes folders that no row knows (a crash between the two), and makes
/// sure that the bundled dataset is there.
///
/// # Errors
/// If the data directory or the database cannot be used.
pub async fn start(app: &App) -> Result<(), LibraryError> {
    let tidy = |path: &Path| {
        let path = path.to_owned();
        move |source| LibraryError::Tidy { path, source }
    };
    let (tmp, datasets) = (app.data.tmp(), app.data.datasets());
    sweep_staging(&tmp).map_err(tidy(&tmp))?;
    std::fs::create_dir_all(&datasets).map_err(tidy(&datasets))?;
    let known = app.store.datasets().await?;
    for entry in std::fs::read_dir(&datasets).map_err(tidy(&datasets))? {
        let path = entry.map_err(tidy(&datasets))?.path();
        if !known.iter().any(|dataset| dataset.path == path) {
            tracing::info!(path = %path.display(), "removing a dataset folder that the database does not know");
            remove_dir(path).await;
        }
    }
    let sha256 = hex::encode(Sha256::digest(BUNDLED_ZIP));
    let current = |d: &Dataset| d.builtin && d.sha256 == sha256 && d.path.is_dir();
    if known.iter().any(current) {
        return Ok(());
    }
    let mut archive = tempfile::NamedTempFile::new_in(&tmp).map_err(tidy(&tmp))?;
    archive.write_all(BUNDLED_ZIP).map_err(tidy(&tmp))?;
    let mut dataset = prepare(app, archive.path(), BUNDLED, &sha256).await?;
    dataset.builtin = true;
    app.store.insert_dataset(&dataset).await?;
    tracing::info!(dataset = %dataset.id, n_items = dataset.n_items, "the bundled dataset is ready");
    Ok(())
}
