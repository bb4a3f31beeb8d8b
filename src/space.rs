//! Room on the disk under the data directory: how much there is, and a ballast file that is given up when there is none, so
//! that a job can still be cancelled or deleted.
//!
//! Knows no jobs. Called by `app`, `scheduler` and `http`.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

/// Bytes that this user can still write on the disk of `path`.
///
/// # Errors
/// If the system does not say.
pub(crate) fn free_bytes(path: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(path)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// A file that only takes space.
#[derive(Debug)]
pub struct Ballast {
    file: PathBuf,
    bytes: u64,
    /// Free space below which it is not made.
    min_free_bytes: u64,
}

impl Ballast {
    /// One of `bytes` at `file`, as long as more than `min_free_bytes` are free without it; not made yet.
    pub(crate) fn new(file: PathBuf, bytes: u64, min_free_bytes: u64) -> Self {
        Self {
            file,
            bytes,
            min_free_bytes,
        }
    }

    /// Makes the file if it is not there and there is room. A disk without room is no error.
    ///
    /// # Errors
    /// If the disk fails.
    pub(crate) fn keep(&self) -> io::Result<()> {
        if self.bytes == 0 || self.file.exists() {
            return Ok(());
        }
        let parent = self.file.parent().unwrap_or(Path::new("."));
        if free_bytes(parent)? < self.min_free_bytes.saturating_add(self.bytes) {
            return Ok(());
        }
        let file = File::create(&self.file)?;
        // A file of holes would hold no space; where the system cannot allocate, zeros do.
        let allocated = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, self.bytes)
            .map_err(io::Error::from)
            .or_else(|_| io::copy(&mut io::Read::take(io::repeat(0), self.bytes), &mut &file).map(drop));
        if let Err(error) = allocated {
            std::fs::remove_file(&self.file)?;
            return if error.kind() == io::ErrorKind::StorageFull {
                Ok(())
            } else {
                Err(error)
            };
        }
        Ok(())
    }

    /// Gives its space back. Whether it was there.
    pub(crate) fn release(&self) -> bool {
        match std::fs::remove_file(&self.file) {
            Ok(()) => {
                tracing::warn!(bytes = self.bytes, "the disk is full: the ballast file was given up");
                true
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::error!(%error, "the ballast file was not removed");
                }
                false
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ballast_takes_real_space_once_and_only_where_there_is_room() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ballast");
        let ballast = Ballast::new(file.clone(), 1 << 20, 0);
        ballast.keep().unwrap();
        ballast.keep().unwrap();
        assert!(
            file.metadata().unwrap().blocks() * 512 >= 1 << 20,
            "the file holds no space"
        );
        assert!(ballast.release());
        assert!(!ballast.release());
        Ballast::new(file.clone(), 1 << 20, u64::MAX).keep().unwrap();
        assert!(!file.exists());
    }
}
