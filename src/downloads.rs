//! Downloads of base models, one task each: from the hub into a hidden folder beside the models, checked by the trainer's
//! catalogue, then renamed and registered. A server that restarts goes on with what it finds under way.
//!
//! Called by `http::models` and at the start of the server.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use lorad_proto::{catalog::BaseModelInfo, problem::Problem};
use tokio_util::sync::CancellationToken;

use crate::{
    app::{App, remove_dir},
    domain::{
        Model, ModelId, ModelKind,
        download::{Download, DownloadStatus},
        now_ms,
    },
    hub::{self, Hub, HubId, Progress},
    store::StoreError,
};

/// What runs, by slug.
#[derive(Debug, Clone, Default)]
pub struct Downloads(Arc<Mutex<HashMap<ModelId, Running>>>);

#[derive(Debug, Clone)]
struct Running {
    progress: Arc<Progress>,
    cancel: CancellationToken,
}

impl Downloads {
    fn with<T>(&self, act: impl FnOnce(&mut HashMap<ModelId, Running>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Bytes of a running download that are here.
    pub fn done_bytes(&self, id: &ModelId) -> Option<u64> {
        self.with(|running| Some(running.get(id)?.progress.done_bytes.load(Ordering::Relaxed)))
    }
}

/// Goes on with the downloads that an earlier server has left under way.
///
/// # Errors
/// If the database fails.
pub(crate) async fn resume(app: &App) -> Result<(), StoreError> {
    for download in app.store.downloads().await? {
        if download.status == DownloadStatus::Downloading {
            start(app, download);
        }
    }
    Ok(())
}

/// Starts a recorded download.
pub(crate) fn start(app: &App, download: Download) {
    let running = Running {
        progress: Arc::default(),
        cancel: app.shutdown.child_token(),
    };
    app.downloads
        .with(|all| all.insert(download.id.clone(), running.clone()));
    let app = app.clone();
    tokio::spawn(async move {
        let id = download.id.clone();
        let done = run(&app, &download, &running).await;
        app.downloads.with(|all| all.remove(&id));
        if app.shutdown.is_cancelled() {
            return;
        }
        match done {
            Ok(()) => tracing::info!(model.id = %id, source = download.source(), "a base model was downloaded"),
            // Whoever cancelled it has forgotten it already.
            Err(_) if running.cancel.is_cancelled() => remove_dir(staging(&app, &id)).await,
            Err(problem) => {
                tracing::warn!(model.id = %id, code = problem.code, "a download failed: {}", problem.detail);
                if let Err(error) = app.store.fail_download(&id, &problem).await {
                    tracing::error!(%error, "a failed download was not recorded");
                }
            }
        }
    });
}

/// Ends a download and forgets it. Whether there was one.
///
/// # Errors
/// If the database fails.
pub(crate) async fn cancel(app: &App, id: &ModelId) -> Result<bool, StoreError> {
    let known = app.store.delete_download(id).await?;
    match app.downloads.with(|all| all.get(id).cloned()) {
        // Its task removes the files, when it does not write them any more.
        Some(running) => running.cancel.cancel(),
        None if known => remove_dir(staging(app, id)).await,
        None => {}
    }
    Ok(known)
}

/// Where the files lie until they are a model. The name starts with a dot: listings of models pass it by.
fn staging(app: &App, id: &ModelId) -> PathBuf {
    app.data.models().join(format!(".hub-{id}"))
}

async fn run(app: &App, download: &Download, running: &Running) -> Result<(), Problem> {
    let hub = Hub::new(&app.config.models.hub_endpoint)?;
    let pinned = HubId {
        repository: download.repository.clone(),
        revision: download.commit.clone(),
    };
    let snapshot = tokio::select! {
        snapshot = hub.snapshot(&pinned) => snapshot?,
        () = running.cancel.cancelled() => return Err(internal("cancelled")),
    };
    let files = hub::choose(&snapshot)?;
    let dir = staging(app, &download.id);
    hub::pull(&hub, &snapshot, &files, &dir, &running.progress, &running.cancel).await?;
    let (catalog, looked_at) = (app.catalog.clone(), dir.clone());
    let info: BaseModelInfo = tokio::task::spawn_blocking(move || catalog.inspect_base(&looked_at))
        .await
        .map_err(internal)??;
    let mut path = app.data.models().join(download.id.as_str());
    if tokio::fs::try_exists(&path).await.unwrap_or(true) {
        path = app
            .data
            .models()
            .join(format!("{}-{}", download.id, uuid::Uuid::now_v7().simple()));
    }
    tokio::fs::rename(&dir, &path).await.map_err(internal)?;
    let model = Model {
        id: download.id.clone(),
        kind: ModelKind::Base,
        path: path.clone(),
        source: download.source(),
        licence: download.licence.clone(),
        builtin: false,
        info,
        created_at_ms: now_ms(),
    };
    if let Err(error) = app.store.finish_download(&model).await {
        remove_dir(path).await;
        return Err(internal(error));
    }
    Ok(())
}

fn internal(error: impl std::fmt::Display) -> Problem {
    Problem::new("internal", "The download could not be finished", error.to_string())
}
