//! A hub on this machine: one repository with the files of a folder, served as Hugging Face's hub would, at one commit.
//! `main` is another commit, which has nothing, so that only who asks for the pinned one gets a model.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use walkdir::WalkDir;

/// The commit of the branch.
const MAIN: &str = "0123456789abcdef0123456789abcdef01234567";

/// A file of the repository.
#[derive(Debug)]
struct Entry {
    at: PathBuf,
    bytes: u64,
    /// Hex.
    sha256: String,
    /// What git calls its content, hex.
    oid: String,
}

#[derive(Debug)]
struct Repository {
    /// `owner/name`.
    name: String,
    commit: String,
    files: BTreeMap<String, Entry>,
    /// Not yet: the largest file ends after half of its bytes, once.
    cut: AtomicBool,
    ranges: AtomicU64,
}

/// The hub; it serves until the program ends.
#[derive(Debug)]
pub(crate) struct Mirror {
    /// `http://127.0.0.1:PORT`
    pub(crate) url: String,
    repository: Arc<Repository>,
}

impl Mirror {
    /// Serves `folder` as the repository `name`.
    ///
    /// # Errors
    /// If it cannot be read, or there is no port.
    pub(crate) fn serve(folder: &Path, name: &str) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut commit = Sha256::new();
        for entry in WalkDir::new(folder).sort_by_file_name() {
            let entry = entry?;
            if entry.file_type().is_file() {
                let path = entry.path().strip_prefix(folder)?.to_string_lossy().into_owned();
                let file = hash(entry.path())?;
                commit.update(format!("{path} {}\n", file.sha256));
                files.insert(path, file);
            }
        }
        ensure!(!files.is_empty(), "{} holds no files", folder.display());
        let repository = Arc::new(Repository {
            name: name.to_owned(),
            commit: hex::encode(commit.finalize())[..40].to_owned(),
            files,
            cut: AtomicBool::new(false),
            ranges: AtomicU64::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").context("listen as a hub")?;
        let url = format!("http://{}", listener.local_addr()?);
        let serving = Arc::clone(&repository);
        thread::spawn(move || {
            for stream in listener.incoming().filter_map(Result::ok) {
                let repository = Arc::clone(&serving);
                thread::spawn(move || {
                    if let Err(error) = repository.answer(&stream) {
                        eprintln!("the mirror: {error:#}");
                    }
                });
            }
        });
        Ok(Self { url, repository })
    }

    /// `owner/name@commit`.
    pub(crate) fn pinned(&self) -> String {
        format!("{}@{}", self.repository.name, self.repository.commit)
    }

    /// Downloads that went on where they had been cut off.
    pub(crate) fn resumed(&self) -> u64 {
        self.repository.ranges.load(Ordering::Relaxed)
    }

    /// Compares a downloaded folder with what was served: every file of it by its SHA-256.
    ///
    /// # Errors
    /// A file that differs, or was never there.
    pub(crate) fn check(&self, folder: &Path) -> Result<()> {
        for entry in WalkDir::new(folder).sort_by_file_name() {
            let entry = entry?;
            if entry.file_type().is_file() {
                let path = entry.path().strip_prefix(folder)?.to_string_lossy().into_owned();
                let served = self.repository.files.get(&path);
                let served = served.with_context(|| format!("{path} was never served"))?;
                ensure!(
                    hash(entry.path())?.sha256 == served.sha256,
                    "{path} differs from what was served"
                );
            }
        }
        Ok(())
    }
}

fn hash(path: &Path) -> Result<Entry> {
    let mut file = File::open(path).with_context(|| format!("read {}", path.display()))?;
    let bytes = file.metadata()?.len();
    let (mut sha256, mut oid) = (Sha256::new(), sha1::Sha1::new());
    oid.update(format!("blob {bytes}\0"));
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file
            .read(&mut buffer)
            .with_context(|| format!("read {}", path.display()))?;
        if n == 0 {
            break;
        }
        sha256.update(&buffer[..n]);
        oid.update(&buffer[..n]);
    }
    Ok(Entry {
        at: path.to_owned(),
        bytes,
        sha256: hex::encode(sha256.finalize()),
        oid: hex::encode(oid.finalize()),
    })
}

impl Repository {
    /// One request, then the connection is closed.
    fn answer(&self, stream: &TcpStream) -> Result<()> {
        let mut reader = BufReader::new(stream);
        let mut request = String::new();
        reader.read_line(&mut request)?;
        let mut start = None;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let line = line.trim().to_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(range) = line.strip_prefix("range: bytes=") {
                start = Some(range.trim_end_matches('-').parse().context("read a range")?);
            }
        }
        let path = request.split(' ').nth(1).unwrap_or_default();
        let path = path.split('?').next().unwrap_or_default();
        let (api, files) = (
            format!("/api/models/{}/", self.name),
            format!("/{}/resolve/{}/", self.name, self.commit),
        );
        if let Some(asked) = path.strip_prefix(&api) {
            return match self.describe(asked) {
                Some(body) => respond(stream, "200 OK", body.to_string().as_bytes()),
                None => respond(stream, "404 Not Found", b""),
            };
        }
        match path.strip_prefix(&files).and_then(|path| self.files.get(path)) {
            Some(file) => self.send(stream, file, start),
            None => respond(stream, "404 Not Found", b""),
        }
    }

    /// What the API says of a revision or of a commit's files.
    fn describe(&self, asked: &str) -> Option<Value> {
        if let Some(revision) = asked.strip_prefix("revision/") {
            let sha = match revision {
                "main" => MAIN,
                commit if commit == self.commit => commit,
                _ => return None,
            };
            return Some(json!({"id": self.name, "sha": sha, "tags": ["diffusers", "license:mit"]}));
        }
        match asked.strip_prefix("tree/")? {
            MAIN => Some(json!([])),
            commit if commit == self.commit => Some(self.files.iter().map(entry).collect()),
            _ => None,
        }
    }

    fn send(&self, mut stream: &TcpStream, file: &Entry, start: Option<u64>) -> Result<()> {
        let largest = self.files.values().map(|file| file.bytes).max() == Some(file.bytes);
        let (begin, mut end) = (start.unwrap_or(0).min(file.bytes), file.bytes);
        let status = match start {
            Some(_) => {
                self.ranges.fetch_add(1, Ordering::Relaxed);
                "206 Partial Content"
            }
            None => "200 OK",
        };
        head(stream, status, end - begin)?;
        if largest && !self.cut.swap(true, Ordering::Relaxed) {
            end = begin + (end - begin) / 2;
        }
        let mut content = File::open(&file.at)?;
        content.seek(SeekFrom::Start(begin))?;
        std::io::copy(&mut content.take(end - begin), &mut stream).context("send a file")?;
        Ok(())
    }
}

/// As a tree lists a file: weights lie in LFS, the rest in git.
fn entry((path, file): (&String, &Entry)) -> Value {
    let mut entry = json!({"type": "file", "path": path, "size": file.bytes, "oid": file.oid});
    if path.ends_with(".safetensors") {
        entry["lfs"] = json!({"oid": file.sha256, "size": file.bytes, "pointerSize": 134});
    }
    entry
}

fn head(mut stream: &TcpStream, status: &str, bytes: u64) -> Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {bytes}\r\nConnection: close\r\n\r\n"
    )?;
    Ok(())
}

fn respond(mut stream: &TcpStream, status: &str, body: &[u8]) -> Result<()> {
    head(stream, status, body.len() as u64)?;
    stream.write_all(body)?;
    Ok(())
}
