//! A data directory as a whole: whether everything in it is what the database says ([`fsck`]), and a copy of it while a
//! server is at work ([`backup`]).
//!
//! Knows no HTTP and no processes. Called by the command line.

use std::path::{Path, PathBuf};

use futures_util::StreamExt as _;
use lorad_proto::event::WorkerEvent;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::{
    agent::read_spool,
    app::DataDir,
    blobs::{BlobError, Blobs},
    checkpoint::verified_step,
    domain::{Artifact, JobId},
    store::{Attempt, Store, StoreError},
};

/// Why a data directory could not be checked or copied.
#[derive(Debug, thiserror::Error)]
pub enum UpkeepError {
    /// There is no database in it.
    #[error("{0} is no data directory: it holds no database")]
    NoData(PathBuf),
    /// The target of a backup is in use.
    #[error("{0} is not empty; a backup needs a folder of its own")]
    NotEmpty(PathBuf),
    /// A file could not be read or written.
    #[error("cannot copy {path}")]
    Copy {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The published files cannot be used.
    #[error(transparent)]
    Blobs(#[from] BlobError),
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable: `database.damaged`, `database.dangling`, `file.missing`, `file.damaged`, `file.unreachable`,
    /// `dataset.missing`, `checkpoint.damaged`.
    pub code: &'static str,
    /// What it is about: a job, a file, a folder.
    pub at: String,
    /// One sentence.
    pub detail: String,
}

async fn open(data: &DataDir) -> Result<Store, UpkeepError> {
    // Opening would make an empty one.
    if !data.database().is_file() {
        return Err(UpkeepError::NoData(data.root()));
    }
    Ok(Store::open(&data.database()).await?)
}

/// Checks the database, every published file by its hash, and the checkpoints that jobs would go on from. Changes nothing;
/// a server may be at work.
///
/// # Errors
/// If the check itself cannot be made.
pub async fn fsck(data: &DataDir) -> Result<Vec<Finding>, UpkeepError> {
    let store = open(data).await?;
    let mut findings = Vec::new();
    let mut found = |code, at: String, detail: String| findings.push(Finding { code, at, detail });
    for line in store.quick_check().await? {
        found("database.damaged", data.database().display().to_string(), line);
    }
    for line in store.dangling_rows().await? {
        found("database.dangling", data.database().display().to_string(), line);
    }
    let blobs = Blobs::local(&data.artifacts(), false)?;
    for artifact in store.all_artifacts().await? {
        if let Some((code, detail)) = fault_of(&blobs, &artifact).await {
            found(code, format!("{}/{}", artifact.job_id, artifact.name), detail);
        }
    }
    for name in folder_names(&data.artifacts()) {
        let job = match name.parse::<JobId>() {
            Ok(id) => store.job(id).await.map(drop),
            Err(_) => Err(StoreError::NotFound {
                what: "job",
                id: name.clone(),
            }),
        };
        if matches!(job, Err(StoreError::NotFound { .. })) {
            let detail = "files of a job that is not known".to_owned();
            found(
                "file.unreachable",
                data.artifacts().join(name).display().to_string(),
                detail,
            );
        }
    }
    for dataset in store.datasets().await? {
        if !dataset.path.is_dir() {
            found(
                "dataset.missing",
                dataset.id.to_string(),
                format!("{} is not there", dataset.path.display()),
            );
        }
    }
    for (job, checkpoints) in store.unfinished().await? {
        let total = checkpoints.len();
        // A worker that outlives its server saves on, and deletes what it has saved before: then the newest ones are known
        // from its spool alone, which the next server reads first.
        let spooled = match store.attempt(job.id, job.attempt).await {
            Ok(attempt) => spooled_checkpoints(&attempt),
            Err(StoreError::NotFound { .. }) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let any_whole = tokio::task::spawn_blocking(move || {
            let stored = checkpoints.into_iter().map(|c| (c.path, c.sha256, c.step));
            stored
                .chain(spooled)
                .any(|(path, sha256, step)| verified_step(&path, Some(&sha256)) == Some(step))
        });
        if total > 0 && !any_whole.await.unwrap_or(false) {
            let detail = format!("none of its {total} checkpoints is whole: it would begin anew");
            found("checkpoint.damaged", job.id.to_string(), detail);
        }
    }
    store.close().await;
    Ok(findings)
}

/// Folder, hash and step of the checkpoints that an attempt has announced and the database does not know yet.
fn spooled_checkpoints(attempt: &Attempt) -> Vec<(PathBuf, String, u64)> {
    let events = read_spool(&attempt.dir, attempt.acked_seq).unwrap_or_default();
    let checkpoints = events.into_iter().filter_map(|envelope| match envelope.event {
        WorkerEvent::Checkpoint { step, dir, sha256, .. } => {
            Some((attempt.dir.join("checkpoints").join(dir), sha256, step))
        }
        _ => None,
    });
    checkpoints.collect()
}

async fn fault_of(blobs: &Blobs, artifact: &Artifact) -> Option<(&'static str, String)> {
    let content = match blobs.open(artifact.job_id, &artifact.name, None).await {
        Ok(content) => content,
        Err(error) if error.is_not_found() => return Some(("file.missing", "it is not there".to_owned())),
        Err(error) => return Some(("file.damaged", error.to_string())),
    };
    let (mut hash, mut stream) = (Sha256::new(), content.stream);
    while let Some(chunk) = stream.next().await {
        match chunk {
            Ok(bytes) => hash.update(&bytes),
            Err(error) => return Some(("file.damaged", error.to_string())),
        }
    }
    let found = hex::encode(hash.finalize());
    (found != artifact.sha256).then(|| {
        let detail = format!("its SHA-256 is {found}, it was published with {}", artifact.sha256);
        ("file.damaged", detail)
    })
}

fn folder_names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// What a backup holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Backup {
    /// Files copied.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Copies a data directory to a new folder while a server may be at work: first the database, as it is at one moment,
/// then the files that it names, none of which ever changes. Jobs that were training go on from their newest checkpoint
/// in the copy. Base models that lie elsewhere are not copied.
///
/// # Errors
/// If the folder is not empty, or something cannot be copied.
pub async fn backup(data: &DataDir, to: &Path) -> Result<Backup, UpkeepError> {
    let store = open(data).await?;
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| UpkeepError::Copy { path, source }
    };
    std::fs::create_dir_all(to).map_err(at(to))?;
    if !folder_names(to).is_empty() {
        return Err(UpkeepError::NotEmpty(to.to_owned()));
    }
    let copy = DataDir::new(to.canonicalize().map_err(at(to))?);
    store.copy_to(&copy.database()).await?;
    store.close().await;
    let snapshot = Store::open(&copy.database()).await?;
    snapshot.forget_processes().await?;
    let mut made = Backup { files: 0, bytes: 0 };
    // Checkpoints first: a running worker prunes its old ones.
    for (_, checkpoints) in snapshot.unfinished().await? {
        for checkpoint in checkpoints {
            if let Ok(inside) = checkpoint.path.strip_prefix(data.root()) {
                copy_tree(&checkpoint.path, &copy.root().join(inside), &mut made).map_err(at(&checkpoint.path))?;
            }
        }
    }
    for dataset in snapshot.datasets().await? {
        if let Ok(inside) = dataset.path.strip_prefix(data.root()) {
            copy_tree(&dataset.path, &copy.root().join(inside), &mut made).map_err(at(&dataset.path))?;
        }
    }
    let jobs: std::collections::BTreeSet<String> = snapshot
        .all_artifacts()
        .await?
        .iter()
        .map(|artifact| artifact.job_id.to_string())
        .collect();
    for job in jobs {
        let from = data.artifacts().join(&job);
        copy_tree(&from, &copy.artifacts().join(&job), &mut made).map_err(at(&from))?;
    }
    snapshot.close().await;
    Ok(made)
}

/// Copies a folder and flushes its files. What is gone meanwhile (pruned, deleted) is left out: `fsck` of the copy tells.
fn copy_tree(from: &Path, to: &Path, made: &mut Backup) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(from) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    std::fs::create_dir_all(to)?;
    for entry in entries {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy_tree(&source, &target, made)?;
            continue;
        }
        match std::fs::copy(&source, &target) {
            Ok(bytes) => {
                std::fs::File::open(&target)?.sync_all()?;
                made.files += 1;
                made.bytes += bytes;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    std::fs::File::open(to)?.sync_all()
}
