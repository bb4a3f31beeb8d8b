//! Decoding pictures, in a child process of this same binary under limits on memory, time and output.
//!
//! Two sides of one small pipe protocol:
//! - [`ChildInspector`], in the server, starts `lorad inspect-images`, gives it the list on stdin and reads verdicts;
//! - [`run_child`], in the child, lowers its own limits and confines itself ([`sandbox`]), then decodes one picture after the other.
//!
//! The child prints `ready`, then one [`ImageVerdict`] as JSON a line, in order. When it dies, or is silent for too
//! long, the first picture without a verdict is the one at fault, and a new child goes on with the rest.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufRead as _, BufReader, Read, Seek as _, Write},
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use lorad_proto::{catalog::Catalog, dataset::ImageVerdict};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::sandbox;

/// Name of the hidden subcommand.
pub const SUBCOMMAND: &str = "inspect-images";
const READY: &str = "ready";
/// Address space of the child: a 8192 × 8192 picture with 16-bit RGBA takes 512 MiB, and conversions take copies.
const MAX_ADDRESS_SPACE: u64 = 3 << 30;
/// Largest file that the child may write (a thumbnail).
const MAX_WRITE: u64 = 16 << 20;
/// Deaths of children that one upload may cause before the rest is refused unseen.
const MAX_DEATHS: usize = 8;
/// Longest line that is read from a child.
const MAX_LINE: u64 = 64 << 10;

/// One picture to decode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InspectRequest {
    /// The picture.
    pub file: PathBuf,
    /// Where to write a thumbnail.
    pub thumbnail: Option<PathBuf>,
    /// Most pixels that it may have.
    pub max_pixels: u64,
}

/// Something that decodes pictures and says what they are.
pub trait Inspector: Send + Sync {
    /// One verdict per request, in order.
    ///
    /// # Errors
    /// If no picture could be looked at for reasons that lie not with the pictures.
    fn inspect(&self, requests: &[InspectRequest]) -> io::Result<Vec<ImageVerdict>>;
}

/// Decodes in child processes.
#[derive(Debug, Clone)]
pub struct ChildInspector {
    /// The lorad binary.
    pub exe: PathBuf,
    /// Longest silence for one picture.
    pub per_picture: Duration,
}

impl ChildInspector {
    /// With the usual patience.
    pub fn new(exe: PathBuf) -> Self {
        Self {
            exe,
            per_picture: Duration::from_secs(20),
        }
    }

    /// Runs one child over `requests`; appends verdicts. Whether it came to the end.
    fn run_one(&self, requests: &[InspectRequest], verdicts: &mut Vec<ImageVerdict>) -> io::Result<bool> {
        let mut child = Reaped(self.spawn(requests)?);
        let Some(stdout) = child.0.stdout.take() else {
            return Err(io::Error::other("the child has no stdout"));
        };
        let (send, lines) = mpsc::sync_channel(16);
        let reader = thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            loop {
                let mut line = String::new();
                match (&mut stdout).take(MAX_LINE).read_line(&mut line) {
                    Ok(n) if n > 0 && line.ends_with('\n') && send.send(line).is_ok() => {}
                    _ => break,
                }
            }
        });
        let first = lines.recv_timeout(self.per_picture);
        if first.as_deref().map(str::trim_end) != Ok(READY) {
            let status = child.end()?;
            let _ = reader.join();
            return Err(io::Error::other(format!(
                "{} {SUBCOMMAND} did not start ({status})",
                self.exe.display()
            )));
        }
        let mut n = 0;
        while n < requests.len() {
            let verdict = match lines.recv_timeout(self.per_picture) {
                Ok(line) => serde_json::from_str(&line).ok(),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let _ = child.end()?;
                    verdicts.push(bad(
                        "image.too_slow",
                        format!("decoding took longer than {} s", self.per_picture.as_secs()),
                    ));
                    n += 1;
                    break;
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => None,
            };
            n += 1;
            if let Some(verdict) = verdict {
                verdicts.push(verdict);
            } else {
                let status = child.end()?;
                verdicts.push(bad(
                    "image.decoder_crashed",
                    format!("the decoder {} on this picture", ended(status)),
                ));
                break;
            }
        }
        let _ = child.end()?;
        drop(lines);
        let _ = reader.join();
        Ok(n == requests.len())
    }

    fn spawn(&self, requests: &[InspectRequest]) -> io::Result<Child> {
        // A file, not a pipe: nobody has to feed it while verdicts are read.
        let mut list = tempfile::tempfile()?;
        serde_json::to_writer(&mut list, requests)?;
        list.rewind()?;
        Command::new(&self.exe)
            .arg(SUBCOMMAND)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(list))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
    }
}

/// A child that is dead when this is dropped.
struct Reaped(Child);

impl Reaped {
    /// Gives the child a moment to end by itself, then kills it.
    fn end(&mut self) -> io::Result<ExitStatus> {
        for _ in 0..50 {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(2));
        }
        self.0.kill()?;
        self.0.wait()
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ended(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(24), _) => "used up its processor time".to_owned(),
        (Some(signal), _) => format!("was ended by signal {signal}"),
        (None, Some(code)) => format!("ended with code {code}"),
        (None, None) => "ended".to_owned(),
    }
}

fn bad(code: &str, detail: String) -> ImageVerdict {
    ImageVerdict::Bad {
        code: code.to_owned(),
        detail,
    }
}

impl Inspector for ChildInspector {
    fn inspect(&self, requests: &[InspectRequest]) -> io::Result<Vec<ImageVerdict>> {
        let mut verdicts = Vec::with_capacity(requests.len());
        let mut deaths = 0;
        while verdicts.len() < requests.len() {
            if deaths == MAX_DEATHS {
                let detail = format!("not looked at: the decoder died on {MAX_DEATHS} other pictures");
                verdicts.push(bad("image.not_checked", detail));
                continue;
            }
            let rest = &requests[verdicts.len()..];
            if !self.run_one(rest, &mut verdicts)? {
                deaths += 1;
            }
        }
        Ok(verdicts)
    }
}

/// The child's side: reads the list from `input`, writes verdicts to `output`.
///
/// # Errors
/// If the list cannot be read, the limits cannot be set, or the server has gone away.
pub fn run_child(catalog: &dyn Catalog, input: impl Read, mut output: impl Write) -> io::Result<()> {
    let requests: Vec<InspectRequest> = serde_json::from_reader(input)?;
    limit_self(requests.len() as u64)?;
    let folders = |of: fn(&InspectRequest) -> Option<&PathBuf>| -> Vec<PathBuf> {
        let parents = requests
            .iter()
            .filter_map(|request| Some(of(request)?.parent()?.to_owned()));
        let distinct: BTreeSet<PathBuf> = parents.collect();
        distinct.into_iter().collect()
    };
    sandbox::confine(
        &folders(|request| Some(&request.file)),
        &folders(|request| request.thumbnail.as_ref()),
    );
    writeln!(output, "{READY}")?;
    output.flush()?;
    for request in &requests {
        let verdict = look_at(catalog, request);
        serde_json::to_writer(&mut output, &verdict)?;
        writeln!(output)?;
        output.flush()?;
    }
    Ok(())
}

/// The decoder's own limits come first; this one, which the server's owner sets, can only be narrower.
fn look_at(catalog: &dyn Catalog, request: &InspectRequest) -> ImageVerdict {
    match catalog.inspect_image(&request.file, request.thumbnail.as_deref()) {
        ImageVerdict::Ok { width, height, .. } if u64::from(width) * u64::from(height) > request.max_pixels => bad(
            "image.too_large",
            format!("{width} x {height} pixels; at most {} are allowed", request.max_pixels),
        ),
        verdict => verdict,
    }
}

/// Lowers this process's own limits; they cannot be raised again.
fn limit_self(n_pictures: u64) -> io::Result<()> {
    let limits = [
        (Resource::As, MAX_ADDRESS_SPACE),
        (Resource::Fsize, MAX_WRITE),
        (Resource::Core, 0),
        (Resource::Nofile, 64),
        (Resource::Cpu, 30 + 5 * n_pictures),
    ];
    for (resource, limit) in limits {
        let limit = Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        };
        setrlimit(resource, limit)?;
    }
    Ok(())
}

/// Decodes in this process. For `lorad train`, where the user's own pictures cost at most the user's own process, and
/// for tests.
pub struct InProcess<'a>(pub &'a dyn Catalog);

impl Inspector for InProcess<'_> {
    fn inspect(&self, requests: &[InspectRequest]) -> io::Result<Vec<ImageVerdict>> {
        Ok(requests
            .iter()
            .map(|r| match File::open(&r.file) {
                Ok(_) => look_at(self.0, r),
                Err(e) => bad("image.unreadable", format!("cannot be opened: {e}")),
            })
            .collect())
    }
}
