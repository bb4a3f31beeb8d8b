//! Published files, over `object_store`: copied, hashed and fsynced before anyone sees them; read in ranges.
//!
//! Knows no job states and no database. `scheduler` and `agent_api` publish, `http` reads.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::BoxStream};
use lorad_faults::{Moment, Point, pass};
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, WriteMultipart, local::LocalFileSystem};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;

use crate::domain::JobId;

/// Bytes of one read and one part.
const CHUNK: usize = 1 << 20;

/// What can go wrong with published files.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The store's folder cannot be used.
    #[error("cannot use {path} for published files")]
    Root {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: object_store::Error,
    },
    /// The file to publish cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file to publish is not the one that was announced.
    #[error("{path}: announced {announced}, found {found}")]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Size and hash that were announced.
        announced: String,
        /// Size and hash that were found.
        found: String,
    },
    /// The store failed.
    #[error("cannot {act} the published file {name}")]
    Store {
        /// What was tried.
        act: &'static str,
        /// The file's name.
        name: String,
        /// Why.
        #[source]
        source: object_store::Error,
    },
}

impl BlobError {
    /// Whether the disk has no room.
    pub fn is_disk_full(&self) -> bool {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            if let Some(io) = error.downcast_ref::<std::io::Error>() {
                return io.kind() == std::io::ErrorKind::StorageFull;
            }
            cause = error.source();
        }
        false
    }
}

/// A published file being read.
pub struct Content {
    /// Size of the whole file.
    pub size: u64,
    /// The bytes that were asked for.
    pub range: Range<u64>,
    /// They, in pieces.
    pub stream: BoxStream<'static, object_store::Result<Bytes>>,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Content")
            .field("size", &self.size)
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

/// Published files. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
}

impl Blobs {
    /// Files under a local folder, which is made if missing.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn local(root: &Path, fsync: bool) -> Result<Self, BlobError> {
        let at = |source| BlobError::Root {
            path: root.to_owned(),
            source,
        };
        std::fs::create_dir_all(root).map_err(|source| BlobError::Read {
            path: root.to_owned(),
            source,
        })?;
        let store = LocalFileSystem::new_with_prefix(root).map_err(at)?.with_fsync(fsync);
        Ok(Self { store: Arc::new(store) })
    }

    /// Publishes `source` as `name` of a job, if it has the announced size and SHA-256. Replaces a file of that name.
    ///
    /// # Errors
    /// If the file is missing or another one than announced, or the store fails. Nothing becomes visible then.
    pub async fn publish(
        &self,
        job: JobId,
        name: &str,
        source: &Path,
        bytes: u64,
        sha256: &str,
    ) -> Result<(), BlobError> {
        let read = |error| BlobError::Read {
            path: source.to_owned(),
            source: error,
        };
        let mut file = tokio::fs::File::open(source).await.map_err(read)?;
        let upload = self
            .store
            .put_multipart(&location(job, name))
            .await
            .map_err(failed("write", name))?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, CHUNK);
        let mut hash = Sha256::new();
        let mut size = 0_u64;
        let mut buffer = vec![0_u8; CHUNK];
        loop {
            let n = match file.read(&mut buffer).await {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) => {
                    abort(upload, name).await;
                    return Err(read(error));
                }
            };
            hash.update(&buffer[..n]);
            size += n as u64;
            pass(Point::StageFile, Moment::Before).map_err(faulty("write", name))?;
            upload.write(&buffer[..n]);
            upload.wait_for_capacity(4).await.map_err(failed("write", name))?;
            pass(Point::StageFile, Moment::After).map_err(faulty("write", name))?;
        }
        let found = hex::encode(hash.finalize());
        if size != bytes || found != sha256 {
            abort(upload, name).await;
            return Err(BlobError::Mismatch {
                path: source.to_owned(),
                announced: format!("{bytes} bytes, sha256 {sha256}"),
                found: format!("{size} bytes, sha256 {found}"),
            });
        }
        pass(Point::PublishFile, Moment::Before).map_err(faulty("write", name))?;
        upload.finish().await.map_err(failed("write", name))?;
        pass(Point::PublishFile, Moment::After).map_err(faulty("write", name))?;
        Ok(())
    }

    /// Opens a published file; `range` `None`: all of it.
    ///
    /// # Errors
    /// If it is not there (see [`BlobError::is_not_found`]), the range is outside, or the store fails.
    pub async fn open(&self, job: JobId, name: &str, range: Option<Range<u64>>) -> Result<Content, BlobError> {
        let options = GetOptions {
            range: range.map(GetRange::Bounded),
            ..GetOptions::default()
        };
        let result = self
            .store
            .get_opts(&location(job, name), options)
            .await
            .map_err(failed("read", name))?;
        Ok(Content {
            size: result.meta.size,
            range: result.range.clone(),
            stream: result.into_stream(),
        })
    }

    /// Removes a published file; one that is not there is no error.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn remove(&self, job: JobId, name: &str) -> Result<(), BlobError> {
        match self.store.delete(&location(job, name)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(failed("remove", name)(source)),
        }
    }
}

impl Blobs {
    /// Removes a job's files except those of these names.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn retain(&self, job: JobId, names: &[String]) -> Result<(), BlobError> {
        let kept: Vec<_> = names.iter().map(|name| location(job, name)).collect();
        let mut files = self
            .store
            .list(Some(&object_store::path::Path::from_iter([job.to_string()])));
        while let Some(file) = files.next().await {
            let at = file.map_err(failed("list", ""))?.location;
            if !kept.contains(&at) {
                let name = at.filename().unwrap_or_default().to_owned();
                self.store.delete(&at).await.map_err(failed("remove", &name))?;
            }
        }
        Ok(())
    }
}

impl BlobError {
    /// Whether the file is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Store {
                source: object_store::Error::NotFound { .. },
                ..
            }
        )
    }
}

fn location(job: JobId, name: &str) -> object_store::path::Path {
    // Two parts, each percent-encoded where it must be: a name never becomes a path.
    object_store::path::Path::from_iter([job.to_string(), name.to_owned()])
}

fn failed(act: &'static str, name: &str) -> impl FnOnce(object_store::Error) -> BlobError {
    let name = name.to_owned();
    move |source| BlobError::Store { act, name, source }
}

/// For `map_err` on a fault point.
fn faulty(act: &'static str, name: &str) -> impl FnOnce(std::io::Error) -> BlobError {
    let failed = failed(act, name);
    move |error| {
        failed(object_store::Error::Generic {
            store: "fault point",
            source: Box::new(error),
        })
    }
}

/// Removes what a process that died while it published left in staging: `<name>#<n>` beside the published files, whose own
/// names hold no `#`. For the start of the server, when nobody publishes.
///
/// # Errors
/// If a folder cannot be read, or a file not be removed.
pub fn sweep_staging(root: &Path) -> std::io::Result<()> {
    for job in std::fs::read_dir(root)? {
        let job = job?;
        if !job.file_type()?.is_dir() {
            continue;
        }
        for file in std::fs::read_dir(job.path())? {
            let file = file?;
            let name = file.file_name().to_string_lossy().into_owned();
            if name.rsplit_once('#').is_some_and(|(_, n)| n.parse::<u32>().is_ok()) {
                std::fs::remove_file(file.path())?;
            }
        }
    }
    Ok(())
}

async fn abort(upload: WriteMultipart, name: &str) {
    if let Err(error) = upload.abort().await {
        tracing::warn!(name, %error, "an unfinished upload was not removed");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::TryStreamExt;

    use super::*;

    async fn read(blobs: &Blobs, job: JobId, name: &str, range: Option<Range<u64>>) -> Vec<u8> {
        let content = blobs.open(job, name, range).await.unwrap();
        content.stream.try_collect::<Vec<Bytes>>().await.unwrap().concat()
    }

    #[tokio::test]
    async fn a_published_file_reads_back_whole_and_in_ranges() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::local(&dir.path().join("artifacts"), true).unwrap();
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| i.to_le_bytes()[1]).collect();
        let source = dir.path().join("x");
        std::fs::write(&source, &bytes).unwrap();
        let sha256 = hex::encode(Sha256::digest(&bytes));
        let (job, name) = (JobId::new(), "a name % with odd # characters.zip");
        blobs
            .publish(job, name, &source, bytes.len() as u64, &sha256)
            .await
            .unwrap();
        assert_eq!(read(&blobs, job, name, None).await, bytes);
        assert_eq!(read(&blobs, job, name, Some(5..17)).await, bytes[5..17]);
        blobs.remove(job, name).await.unwrap();
        assert!(blobs.open(job, name, None).await.unwrap_err().is_not_found());
    }

    #[tokio::test]
    async fn a_file_that_is_not_the_announced_one_is_not_published() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("artifacts");
        let blobs = Blobs::local(&root, false).unwrap();
        let source = dir.path().join("x");
        std::fs::write(&source, b"tampered").unwrap();
        let job = JobId::new();
        let announced = hex::encode(Sha256::digest(b"original"));
        let error = blobs.publish(job, "x", &source, 8, &announced).await.unwrap_err();
        assert!(matches!(error, BlobError::Mismatch { .. }), "{error}");
        assert!(blobs.open(job, "x", None).await.unwrap_err().is_not_found());
        let left: Vec<_> = std::fs::read_dir(root.join(job.to_string()))
            .map(|entries| entries.flatten().collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "{left:?}");
    }
}
