//! What every request handler holds, and the acts that need more than the store: store, tell the viewers, wake the
//! scheduler.
//!
//! Layout of the data directory:
//!
//! ```text
//! lorad.lock                     held while a server runs, so that there is only one
//! lorad.sqlite3 (-wal, -shm)     the database
//! agent.sock                     where workers report, mode 0600
//! models/<slug>/                 the bundled base models, unpacked
//! datasets/<ds_…>/               ingested datasets (lorad_proto::dataset)
//! jobs/<job_…>/attempts/<n>/     spec.json, events.jsonl, worker.log, checkpoints/, samples/, results/
//! artifacts/<job_…>/<name>       published files
//! cache/                         encoded pictures and texts that jobs share; may be deleted at any time
//! tmp/                           uploads on their way; emptied at the start
//! ballast                        only takes space; given up when the disk is full
//! ```

use std::{path::PathBuf, sync::Arc};

use lorad_proto::catalog::{Catalog, Memory, Plan};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    blobs::Blobs,
    config::Config,
    domain::{Action, CancelMode, Job, JobId, JobPatch, NewJob},
    downloads::Downloads,
    events::Events,
    space::Ballast,
    store::{IdempotencyKey, Store, StoreError, StoredAnswer},
    traces::Traces,
};

/// Makes the answer to an idempotent request from the job it created.
pub type Answer<'a> = &'a (dyn Fn(&Job) -> StoredAnswer + Send + Sync);

/// Paths in the data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataDir {
    root: PathBuf,
}

impl DataDir {
    /// Paths under `root`, which must be absolute: workers run elsewhere.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The directory itself.
    pub fn root(&self) -> PathBuf {
        self.root.clone()
    }

    /// Lock file.
    pub fn lock(&self) -> PathBuf {
        self.root.join("lorad.lock")
    }

    /// Database file.
    pub fn database(&self) -> PathBuf {
        self.root.join("lorad.sqlite3")
    }

    /// Socket that workers report to.
    pub fn agent_socket(&self) -> PathBuf {
        self.root.join("agent.sock")
    }

    /// Unpacked bundled models.
    pub fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    /// Ingested datasets.
    pub fn datasets(&self) -> PathBuf {
        self.root.join("datasets")
    }

    /// Attempts of jobs.
    pub fn jobs(&self) -> PathBuf {
        self.root.join("jobs")
    }

    /// Everything that a job's attempts wrote.
    pub fn job(&self, job: JobId) -> PathBuf {
        self.jobs().join(job.to_string())
    }

    /// Published files.
    pub fn artifacts(&self) -> PathBuf {
        self.root.join("artifacts")
    }

    /// Encoded pictures and texts.
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// The file that only takes space.
    pub fn ballast(&self) -> PathBuf {
        self.root.join("ballast")
    }

    /// Uploads on their way.
    pub fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }
}

/// The running server. Cheap to clone.
#[derive(Clone)]
pub struct App {
    /// Settings.
    pub config: Arc<Config>,
    /// Paths.
    pub data: Arc<DataDir>,
    /// The database.
    pub store: Store,
    /// Published files.
    pub blobs: Blobs,
    /// Space that is given up when there is no other.
    pub ballast: Arc<Ballast>,
    /// News for viewers.
    pub events: Events,
    /// What can be trained.
    pub catalog: Arc<dyn Catalog>,
    /// Base models on their way from a hub.
    pub downloads: Downloads,
    /// Where spans go.
    pub traces: Traces,
    /// Wakes the scheduler.
    pub wake: Arc<Notify>,
    /// Cancelled when the server shuts down: streams end.
    pub shutdown: CancellationToken,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("data", &self.data).finish_non_exhaustive()
    }
}

impl App {
    /// Memory that a worker on the CPU may have.
    pub(crate) fn memory(&self) -> Option<Memory> {
        let limit = match self.config.scheduler.worker_memory_bytes {
            0 => u64::MAX,
            bytes => bytes,
        };
        self.catalog.memory().map(|memory| Memory {
            total_bytes: memory.total_bytes.min(limit),
            available_bytes: memory.available_bytes.min(limit),
        })
    }

    /// Whether a job would start on the CPU if there were more memory: other programs, or other jobs, have it now.
    pub(crate) fn waits_for_memory(&self, plan: &Plan) -> bool {
        self.memory()
            .is_some_and(|memory| plan.memory_bytes > memory.available_bytes)
    }

    /// Stores a job and starts it as soon as a device is free.
    ///
    /// # Errors
    /// See [`Store::insert_job`].
    pub async fn create_job(
        &self,
        new: &NewJob,
        idempotency: Option<(&IdempotencyKey, Answer<'_>)>,
    ) -> Result<Job, StoreError> {
        let job = self.store.insert_job(new, idempotency).await?;
        Ok(self.changed(job))
    }

    /// Does a write that makes room, or stops what takes it: a full disk must not keep it from being done.
    async fn with_ballast<T, F>(&self, write: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        match write().await {
            Err(error) if error.is_disk_full() && self.ballast.release() => write().await,
            done => done,
        }
    }

    /// Gives back the key of a request that failed. Until that is stored, a repeat of the request would be told to wait: so
    /// it is tried again for as long as the server runs.
    pub(crate) async fn give_key_back(&self, key: IdempotencyKey) {
        const TRY_AGAIN: std::time::Duration = std::time::Duration::from_secs(1);
        let Err(error) = self.store.abandon_idempotency(&key).await else {
            return;
        };
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "an idempotency key was not given back yet"
        );
        let (store, shutdown) = (self.store.clone(), self.shutdown.clone());
        tokio::spawn(shutdown.run_until_cancelled_owned(async move {
            loop {
                tokio::time::sleep(TRY_AGAIN).await;
                if store.abandon_idempotency(&key).await.is_ok() {
                    return;
                }
            }
        }));
    }

    /// Cancels a job, also when the disk is full.
    ///
    /// # Errors
    /// See [`Store::request_cancel`].
    pub async fn cancel_job(&self, id: JobId, mode: CancelMode) -> Result<Job, StoreError> {
        let job = self.with_ballast(|| self.store.request_cancel(id, mode)).await?;
        if job.status.is_final() {
            self.traces.job(&job);
        }
        Ok(self.changed(job))
    }

    /// Pauses a job, also when the disk is full.
    ///
    /// # Errors
    /// See [`Store::request_pause`].
    pub async fn pause_job(&self, id: JobId) -> Result<Job, StoreError> {
        let job = self.with_ballast(|| self.store.request_pause(id)).await?;
        Ok(self.changed(job))
    }

    /// Resumes a job.
    ///
    /// # Errors
    /// See [`Store::request_resume`].
    pub async fn resume_job(&self, id: JobId) -> Result<Job, StoreError> {
        let job = self.store.request_resume(id).await?;
        Ok(self.changed(job))
    }

    /// Asks a running job for a checkpoint or for samples now.
    ///
    /// # Errors
    /// See [`Store::request_now`].
    pub async fn ask_job(&self, id: JobId, action: Action) -> Result<Job, StoreError> {
        let job = self.store.request_now(id, action).await?;
        Ok(self.changed(job))
    }

    /// Changes name, tags, notes or priority.
    ///
    /// # Errors
    /// See [`Store::update_job`].
    pub async fn update_job(&self, id: JobId, patch: &JobPatch) -> Result<Job, StoreError> {
        let job = self.store.update_job(id, patch).await?;
        Ok(self.changed(job))
    }

    /// Removes published files that no row names. Final jobs only: before that, a file is published first and recorded
    /// a moment later.
    pub(crate) async fn sweep_files(&self, id: JobId) {
        let recorded = match self.store.job(id).await {
            Ok(job) if job.status.is_final() => self.store.artifacts(id).await,
            Ok(_) => return,
            Err(StoreError::NotFound { .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        let swept = match recorded {
            Ok(files) => {
                let names: Vec<String> = files.into_iter().map(|file| file.name).collect();
                self.blobs.retain(id, &names).await.map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = swept {
            tracing::warn!(job.id = %id, error, "files that nobody can reach were not removed");
        }
    }

    /// Deletes a final job, also when the disk is full: its rows, then what its attempts wrote, then its published files.
    ///
    /// # Errors
    /// See [`Store::delete_job`]. Files that cannot be removed are logged: the job is gone already.
    pub async fn delete_job(&self, id: JobId) -> Result<(), StoreError> {
        self.with_ballast(|| self.store.delete_job(id)).await?;
        remove_dir(self.data.job(id)).await;
        remove_dir(self.data.artifacts().join(id.to_string())).await;
        Ok(())
    }

    /// Tells viewers and the scheduler that a job changed.
    pub(crate) fn changed(&self, job: Job) -> Job {
        self.events.stored(job.id, job.last_seq);
        self.wake.notify_one();
        job
    }
}

/// Removes a directory that nobody needs any more.
pub(crate) async fn remove_dir(dir: PathBuf) {
    match tokio::fs::remove_dir_all(&dir).await {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(dir = %dir.display(), %error, "a directory was not removed"),
    }
}
