//! Downloads a model's files into a folder: each resumes where it was cut off, and counts only when its hash is right.

use std::{
    io::Read,
    path::{Component, Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use futures_util::StreamExt;
use lorad_proto::problem::Problem;
use reqwest::header;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

use super::{Hash, Hub, RemoteFile, Snapshot};

/// Times that a file is asked for again after the connection was lost, in a row without a byte.
const TRIES: u32 = 4;
/// HTTP status of an answer to a range.
const PARTIAL_CONTENT: u16 = 206;
/// First pause before that; doubles each time.
const PAUSE: Duration = Duration::from_millis(500);

/// How far a download is.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes on this disk.
    pub done_bytes: AtomicU64,
    /// Bytes in all; 0: not known yet.
    pub total_bytes: AtomicU64,
}

/// Downloads `files` of a snapshot into `dir`. What an earlier call has left there is gone on with.
///
/// # Errors
/// `hub.unreachable` (what is there is kept), `hub.hash_mismatch` and `hub.pickle` (the file is deleted), `hub.cancelled`,
/// `storage.…`.
pub async fn pull(
    hub: &Hub,
    snapshot: &Snapshot,
    files: &[RemoteFile],
    dir: &Path,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<(), Problem> {
    let total = files.iter().map(|file| file.bytes).sum();
    progress.total_bytes.store(total, Ordering::Relaxed);
    let mut before = 0;
    for file in files {
        let to = place(dir, &file.path)?;
        if let Some(parent) = to.parent() {
            tokio::fs::create_dir_all(parent)
                .await
                .map_err(|e| storage(parent, &e))?;
        }
        if !tokio::fs::try_exists(&to).await.unwrap_or(false) {
            let part = PathBuf::from(format!("{}.part", to.display()));
            let url = format!(
                "{}/{}/resolve/{}/{}",
                hub.endpoint, snapshot.repository, snapshot.commit, file.path
            );
            let download = download(hub, &url, file, &part, |done| {
                progress.done_bytes.store(before + done, Ordering::Relaxed);
            });
            tokio::select! {
                done = download => done?,
                () = cancel.cancelled() => return Err(cancelled()),
            }
            verify(file, &part).await?;
            tokio::fs::rename(&part, &to).await.map_err(|e| storage(&to, &e))?;
        }
        before += file.bytes;
        progress.done_bytes.store(before, Ordering::Relaxed);
    }
    Ok(())
}

/// Where a file of the repository lies; its path is foreign text.
fn place(dir: &Path, path: &str) -> Result<PathBuf, Problem> {
    let inside = |part| matches!(part, Component::Normal(_));
    if path.contains('\\') || !Path::new(path).components().all(inside) {
        return Err(Problem::new(
            "hub.answer",
            "The hub's answer cannot be understood",
            format!("The repository names a file {path:?}."),
        ));
    }
    Ok(dir.join(path))
}

/// Downloads what is missing of a file.
async fn download(
    hub: &Hub,
    url: &str,
    file: &RemoteFile,
    part: &Path,
    on_progress: impl Fn(u64) + Send,
) -> Result<(), Problem> {
    let mut failures = 0;
    loop {
        let have = tokio::fs::metadata(part).await.map_or(0, |metadata| metadata.len());
        if have >= file.bytes {
            return Ok(());
        }
        on_progress(have);
        let error = match stream(hub, url, file, part, have, &on_progress).await {
            Ok(()) => return Ok(()),
            Err(Stopped::Lost(problem)) => problem,
            Err(Stopped::Refused(problem)) => return Err(problem),
        };
        let now = tokio::fs::metadata(part).await.map_or(0, |metadata| metadata.len());
        failures = if now > have { 1 } else { failures + 1 };
        if failures > TRIES {
            return Err(error);
        }
        tracing::debug!(path = file.path, have = now, "a download was cut off and goes on");
        tokio::time::sleep(PAUSE * 2_u32.pow(failures - 1)).await;
    }
}

enum Stopped {
    /// Worth another try.
    Lost(Problem),
    /// For good.
    Refused(Problem),
}

async fn stream(
    hub: &Hub,
    url: &str,
    file: &RemoteFile,
    part: &Path,
    have: u64,
    on_progress: &(impl Fn(u64) + Send),
) -> Result<(), Stopped> {
    let lost = |e: reqwest::Error| Stopped::Lost(hub.unreachable(&e));
    let refused = |e: std::io::Error| Stopped::Refused(storage(part, &e));
    let mut request = hub.get(url);
    if have > 0 {
        request = request.header(header::RANGE, format!("bytes={have}-"));
    }
    let response = request.send().await.map_err(lost)?;
    if response.status().is_server_error() {
        let problem = hub.accept(response, &file.path).err();
        return Err(problem.map_or(Stopped::Refused(cancelled()), Stopped::Lost));
    }
    let response = hub.accept(response, &file.path).map_err(Stopped::Refused)?;
    let goes_on = have > 0 && response.status().as_u16() == PARTIAL_CONTENT;
    let mut open = tokio::fs::OpenOptions::new();
    open.create(true).write(true);
    // A server that knows no ranges sends everything again.
    let mut to = if goes_on {
        open.append(true)
    } else {
        open.truncate(true)
    }
    .open(part)
    .await
    .map_err(refused)?;
    let mut done = if goes_on { have } else { 0 };
    let mut body = response.bytes_stream();
    while let Some(bytes) = body.next().await {
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) => {
                to.flush().await.map_err(refused)?;
                return Err(lost(error));
            }
        };
        done += bytes.len() as u64;
        if done > file.bytes {
            return Err(Stopped::Refused(mismatch(
                file,
                &format!("it is longer than {} bytes", file.bytes),
            )));
        }
        to.write_all(&bytes).await.map_err(refused)?;
        on_progress(done);
    }
    to.flush().await.map_err(refused)?;
    to.sync_all().await.map_err(refused)?;
    if done < file.bytes {
        let problem = Problem::new(
            "hub.unreachable",
            "The hub cannot be reached",
            format!("{} ended after {done} of {} bytes.", file.path, file.bytes),
        );
        return Err(Stopped::Lost(
            problem.with_hint("Try again; what has been downloaded is kept."),
        ));
    }
    Ok(())
}

/// Deletes a file that is not what the repository says.
async fn verify(file: &RemoteFile, part: &Path) -> Result<(), Problem> {
    let (expected, path) = (file.clone(), part.to_owned());
    let checked = tokio::task::spawn_blocking(move || check(&expected, &path)).await;
    let checked = checked.unwrap_or_else(|panic| Err(storage(part, &std::io::Error::other(panic))));
    if checked.is_err() {
        tokio::fs::remove_file(part).await.map_err(|e| storage(part, &e))?;
    }
    checked
}

fn check(file: &RemoteFile, path: &Path) -> Result<(), Problem> {
    let at = |e: std::io::Error| storage(path, &e);
    let mut from = std::fs::File::open(path).map_err(at)?;
    let mut buffer = vec![0; 1 << 20];
    let mut sha256 = Sha256::new();
    let mut sha1 = sha1::Sha1::new();
    sha1.update(format!("blob {}\0", file.bytes));
    let mut start = Vec::new();
    loop {
        let n = from.read(&mut buffer).map_err(at)?;
        if n == 0 {
            break;
        }
        if start.is_empty() {
            start = buffer[..n.min(9)].to_vec();
        }
        match file.hash {
            Hash::Sha256(_) => sha256.update(&buffer[..n]),
            Hash::GitSha1(_) => sha1.update(&buffer[..n]),
        }
    }
    let (found, expected) = match &file.hash {
        Hash::Sha256(expected) => (hex::encode(sha256.finalize()), expected),
        Hash::GitSha1(expected) => (hex::encode(sha1.finalize()), expected),
    };
    if !found.eq_ignore_ascii_case(expected) {
        return Err(mismatch(
            file,
            &format!("its hash is {found}, the repository says {expected}"),
        ));
    }
    // A safetensors file begins with the length of its header, and the header with a brace.
    if file.path.ends_with(".safetensors") && start.get(8) != Some(&b'{') {
        return Err(Problem::new(
            "hub.pickle",
            "The file is not what its name says",
            format!("{} does not begin like a safetensors file.", file.path),
        )
        .with_hint("It may be a Python pickle, which can run code; it was deleted."));
    }
    Ok(())
}

fn mismatch(file: &RemoteFile, why: &str) -> Problem {
    Problem::new(
        "hub.hash_mismatch",
        "A downloaded file is damaged",
        format!("{}: {why}.", file.path),
    )
    .with_hint("It was deleted. Try again; if it stays so, the mirror is at fault.")
}

fn cancelled() -> Problem {
    Problem::new("hub.cancelled", "The download was cancelled", "It was asked to stop.")
}

fn storage(path: &Path, error: &std::io::Error) -> Problem {
    let code = if error.kind() == std::io::ErrorKind::StorageFull {
        "storage.full"
    } else {
        "storage.failed"
    };
    Problem::new(
        code,
        "A file could not be written",
        format!("{}: {error}.", path.display()),
    )
    .with_hint("Free some space, or check the permissions of the data directory.")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn check_of(path: &str, bytes: &[u8], hash: Hash) -> Result<(), Problem> {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("x");
        std::fs::write(&at, bytes).unwrap();
        let file = RemoteFile {
            path: path.to_owned(),
            bytes: bytes.len() as u64,
            hash,
        };
        check(&file, &at)
    }

    #[test]
    fn both_kinds_of_hashes_are_checked_and_pickles_told_by_their_first_bytes() {
        // `printf 'hello\n' | git hash-object --stdin`
        let git = Hash::GitSha1("ce013625030ba8dba906f756967f9e9ca394464a".to_owned());
        check_of("a.json", b"hello\n", git.clone()).unwrap();
        assert_eq!(
            check_of("a.json", b"hallo\n", git).unwrap_err().code,
            "hub.hash_mismatch"
        );
        let pickle = b"\x80\x02}q\x00X\x05\x00\x00\x00";
        let sha = Hash::Sha256(hex::encode(Sha256::digest(pickle)));
        check_of("a.json", pickle, sha.clone()).unwrap();
        assert_eq!(check_of("a.safetensors", pickle, sha).unwrap_err().code, "hub.pickle");
    }

    #[test]
    fn a_repository_cannot_write_outside_its_folder() {
        let dir = Path::new("/models/x");
        assert_eq!(
            place(dir, "unet/config.json").unwrap(),
            Path::new("/models/x/unet/config.json")
        );
        for bad in ["../x", "/etc/passwd", "a/../../b", "a\\..\\b", "./a"] {
            assert!(place(dir, bad).is_err(), "{bad}");
        }
    }
}
