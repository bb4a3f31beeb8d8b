//! From an uploaded archive (or a folder) to a dataset on disk, as laid out in [`lorad_proto::dataset`].
//!
//! Everything in an upload is hostile until checked: names and sizes are counted while reading and never trusted from
//! headers, files are stored under generated names, and pictures are decoded only in a child process ([`inspect`]).
//! Anything refused leaves nothing behind: all work happens in a staging folder that is swept on drop and at startup,
//! and a dataset appears at its final path by one rename.
//!
//! Knows no HTTP and no SQL; blocking, so the server calls it from `spawn_blocking`. Called by `http` (uploads), by the
//! server's startup (the bundled dataset) and by `lorad train`.
//!
//! Read [`ingest`] first; the parts, in the order it uses them: [`archive`] (zip, tar) and [`folder`] → [`names`] →
//! [`pairing`] (with [`captions`]) → [`inspect`] → [`publish`].

mod archive;
mod captions;
mod folder;
pub mod inspect;
pub mod library;
mod names;
mod pairing;
mod publish;
pub mod sandbox;
mod tar;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod zip;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use lorad_proto::{
    dataset::{FileVerdict, ImageVerdict, Item, Report, Verdict},
    problem::{FieldError, Problem},
};

use inspect::{InspectRequest, Inspector};

/// How much an upload may hold.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Files and folders in the archive.
    pub max_entries: u64,
    /// Bytes of all files after unpacking.
    pub max_total_bytes: u64,
    /// Bytes of one file after unpacking.
    pub max_file_bytes: u64,
    /// Unpacked bytes per packed byte; only counted beyond [`Limits::RATIO_FLOOR_BYTES`].
    pub max_ratio: u64,
    /// Pixels of one picture.
    pub max_pixels: u64,
    /// Bytes of one caption file.
    pub max_caption_bytes: u64,
    /// Characters of one caption.
    pub max_caption_chars: usize,
}

impl Limits {
    /// Below this size the ratio says nothing: a small file of spaces is no bomb.
    pub const RATIO_FLOOR_BYTES: u64 = 4 << 20;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_entries: 20_000,
            max_total_bytes: 8 << 30,
            max_file_bytes: 64 << 20,
            max_ratio: 200,
            max_pixels: 1 << 26,
            max_caption_bytes: 64 << 10,
            max_caption_chars: 4_000,
        }
    }
}

/// Why no dataset came out.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The upload is at fault.
    #[error("the upload is refused")]
    Refused(Box<Refusal>),
    /// The server's disk is at fault.
    #[error("could not {act} {}", path.display())]
    Io {
        /// What was tried.
        act: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The child process that decodes pictures could not be used at all.
    #[error("the picture inspector could not be started")]
    Inspector(#[source] io::Error),
}

impl IngestError {
    /// For `map_err`: names the act and the path.
    fn io(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { act, path, source }
    }
}

/// What is wrong with an upload. `problem.errors` names every entry at fault; its pointers are relative to the upload,
/// `/<entry name>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Code, detail, hint and the entries.
    pub problem: Problem,
    /// Verdicts on every file that was looked at.
    pub report: Report,
}

/// A finished dataset.
#[derive(Debug, Clone)]
pub struct Ingested {
    /// What was found.
    pub report: Report,
    /// The items, as in `items.jsonl`.
    pub items: Vec<Item>,
    /// Bytes of all files under `files/`.
    pub bytes: u64,
}

/// Where the data comes from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// A zip, tar or tar.gz file; which one is found by its first bytes.
    Archive(&'a Path),
    /// A folder, read without following links.
    Folder(&'a Path),
}

/// One file taken out of an upload, lying in the staging folder under a generated name.
#[derive(Debug, Clone)]
struct RawFile {
    /// Checked, `/`-separated name in the upload.
    name: String,
    /// Where its bytes lie.
    path: PathBuf,
    bytes: u64,
    sha256: String,
    /// First bytes, to tell what it is.
    head: Vec<u8>,
}

/// What was found so far. `refused` may name a file more than once (e.g. several rows of one `metadata.csv`).
#[derive(Debug, Default)]
struct Findings {
    refused: Vec<(String, &'static str, String)>,
    others: BTreeMap<String, FileVerdict>,
}

impl Findings {
    fn refuse(&mut self, file: &str, code: &'static str, detail: impl Into<String>) {
        self.refused.push((file.to_owned(), code, detail.into()));
    }

    fn note(&mut self, file: &str, verdict: Verdict, code: &str, detail: impl Into<String>) {
        self.others.entry(file.to_owned()).or_insert_with(|| FileVerdict {
            file: file.to_owned(),
            verdict,
            code: Some(code.to_owned()),
            detail: Some(detail.into()),
        });
    }

    fn ok(&mut self, file: &str) {
        self.others.entry(file.to_owned()).or_insert_with(|| FileVerdict {
            file: file.to_owned(),
            verdict: Verdict::Ok,
            code: None,
            detail: None,
        });
    }

    /// One verdict per file, in order of name; the first refusal of a file wins.
    fn verdicts(&self) -> Vec<FileVerdict> {
        let mut by_name = self.others.clone();
        for (file, code, detail) in self.refused.iter().rev() {
            by_name.insert(
                file.clone(),
                FileVerdict {
                    file: file.clone(),
                    verdict: Verdict::Refused,
                    code: Some((*code).to_owned()),
                    detail: Some(detail.clone()),
                },
            );
        }
        by_name.into_values().collect()
    }

    fn into_refusal(self, code: &'static str, detail: String, hint: &str) -> IngestError {
        let errors = self
            .refused
            .iter()
            .map(|(file, code, detail)| {
                FieldError::new(format!("/{}", pointer_escape(file)), *code, format!("{file}: {detail}"))
            })
            .collect();
        let report = Report {
            files: self.verdicts(),
            ..Report::default()
        };
        IngestError::Refused(Box::new(Refusal {
            problem: Problem::new(code, title_of(code), detail)
                .with_hint(hint)
                .with_errors(errors),
            report,
        }))
    }
}

/// A problem with the upload as a whole, beside the findings on single entries.
#[derive(Debug)]
struct Whole {
    code: &'static str,
    detail: String,
    hint: &'static str,
}

impl Whole {
    fn new(code: &'static str, detail: impl Into<String>, hint: &'static str) -> Self {
        Self {
            code,
            detail: detail.into(),
            hint,
        }
    }
}

/// Ends an extraction: the upload as a whole is at fault, or the disk is.
#[derive(Debug)]
enum Stop {
    Whole(Whole),
    Server(IngestError),
}

impl From<IngestError> for Stop {
    fn from(e: IngestError) -> Self {
        Self::Server(e)
    }
}

impl From<Whole> for Stop {
    fn from(w: Whole) -> Self {
        Self::Whole(w)
    }
}

fn title_of(code: &str) -> &'static str {
    match code {
        "dataset.not_an_archive" => "Not a supported archive",
        "dataset.damaged" => "The archive is damaged",
        "dataset.too_large" => "The dataset is too large",
        "dataset.too_many_entries" => "The archive holds too many entries",
        "dataset.bomb" => "The archive unpacks to far more than it holds",
        "dataset.empty" => "The dataset holds no pictures",
        "dataset.only_regularisation" => "The dataset holds nothing to train on",
        _ => "The dataset is refused",
    }
}

/// Escapes one reference token of a JSON pointer (RFC 6901).
fn pointer_escape(token: &str) -> String {
    token.replace('~', "~0").replace('/', "~1")
}

/// Reads `source`, checks everything, and publishes a dataset at `dest`.
///
/// `staging` is a folder on the same filesystem as `dest`; the work happens in a fresh folder inside it, which is gone
/// afterwards whatever happens.
///
/// # Errors
/// [`IngestError::Refused`] names every entry at fault at once; the others are the server's fault. In both cases
/// nothing is left behind, and `dest` does not exist.
pub fn ingest(
    source: Source<'_>,
    staging: &Path,
    dest: &Path,
    limits: &Limits,
    inspector: &dyn Inspector,
) -> Result<Ingested, IngestError> {
    let work = tempfile::Builder::new()
        .prefix("ingest-")
        .tempdir_in(staging)
        .map_err(IngestError::io("create a folder in", staging))?;
    let mut findings = Findings::default();
    let extracted = match source {
        Source::Archive(path) => archive::extract(path, work.path(), limits, &mut findings),
        Source::Folder(path) => folder::extract(path, work.path(), limits, &mut findings),
    };
    let raw = match extracted {
        Ok(raw) => raw,
        Err(Stop::Server(e)) => return Err(e),
        Err(Stop::Whole(w)) => return Err(findings.into_refusal(w.code, w.detail, w.hint)),
    };

    let candidates = pairing::pair(raw, limits, &mut findings)?;
    let requests: Vec<InspectRequest> = candidates
        .iter()
        .enumerate()
        .map(|(n, c)| InspectRequest {
            file: c.raw.path.clone(),
            thumbnail: Some(work.path().join(format!("thumb-{n}.png"))),
            max_pixels: limits.max_pixels,
        })
        .collect();
    let masks: Vec<usize> = (0..candidates.len())
        .filter(|&n| candidates[n].mask.is_some())
        .collect();
    let mut requests = requests;
    requests.extend(masks.iter().filter_map(|&n| {
        let (raw, _) = candidates[n].mask.as_ref()?;
        Some(InspectRequest {
            file: raw.path.clone(),
            thumbnail: None,
            max_pixels: limits.max_pixels,
        })
    }));
    let verdicts = inspector.inspect(&requests).map_err(IngestError::Inspector)?;
    check_masks(&candidates, &masks, &verdicts, &mut findings);
    let mut pictures = Vec::with_capacity(candidates.len());
    for ((candidate, request), verdict) in candidates.into_iter().zip(requests).zip(verdicts) {
        match verdict {
            ImageVerdict::Ok { width, height, .. } => {
                findings.ok(&candidate.raw.name);
                pictures.push(publish::Picture {
                    candidate,
                    thumbnail: request.thumbnail,
                    width,
                    height,
                });
            }
            ImageVerdict::Bad { code, detail } => {
                findings.refuse(&candidate.raw.name, known_code(&code), detail);
            }
        }
    }

    if !findings.refused.is_empty() {
        let n = findings.refused.len();
        let detail = match findings.refused.first() {
            Some((file, _, first)) if n == 1 => format!("{file}: {first}"),
            _ => format!("{n} problems in the upload; each is listed in `errors`."),
        };
        return Err(findings.into_refusal(
            "dataset.refused",
            detail,
            "Fix or remove the listed files and upload again. Nothing was stored.",
        ));
    }
    // Pictures whose captions are at fault are no candidates, so this comes after the refusals.
    let pictures: Vec<_> = pictures.into_iter().filter(|p| p.candidate.caption.is_some()).collect();
    if pictures.is_empty() {
        return Err(findings.into_refusal(
            "dataset.empty",
            "No picture with a caption was found.".to_owned(),
            "Upload a zip or tar.gz of PNG, JPEG or WebP pictures, each with a caption: `name.png` beside `name.txt`, or one `metadata.jsonl` with `file_name` and `text`.",
        ));
    }
    if pictures.iter().all(|p| p.candidate.is_reg) {
        return Err(findings.into_refusal(
            "dataset.only_regularisation",
            "Every picture is a regularisation image.".to_owned(),
            "Add the pictures to train on beside the folder `reg`.",
        ));
    }
    publish::publish(pictures, findings, work.path(), dest)
}

/// The verdicts on the masks follow those on the pictures. A mask has its picture's size, so that it needs no guess about
/// how it was cut.
fn check_masks(candidates: &[pairing::Candidate], masks: &[usize], verdicts: &[ImageVerdict], findings: &mut Findings) {
    for (&n, verdict) in masks.iter().zip(verdicts.iter().skip(candidates.len())) {
        let Some((mask, _)) = &candidates[n].mask else { continue };
        match (verdict, verdicts.get(n)) {
            (ImageVerdict::Bad { code, detail }, _) => findings.refuse(&mask.name, known_code(code), detail.clone()),
            (
                ImageVerdict::Ok { width, height, .. },
                Some(ImageVerdict::Ok {
                    width: w, height: h, ..
                }),
            ) if (width, height) != (w, h) => {
                let detail = format!(
                    "it is {width} x {height} pixels, but {} is {w} x {h}",
                    candidates[n].raw.name
                );
                findings.refuse(&mask.name, "mask.wrong_size", detail);
            }
            (ImageVerdict::Ok { .. }, _) => findings.ok(&mask.name),
        }
    }
}

/// Codes of the inspector are text from another process; only known ones go on.
fn known_code(code: &str) -> &'static str {
    const KNOWN: [&str; 13] = [
        "image.truncated",
        "image.too_large",
        "image.too_small",
        "image.too_slow",
        "image.unsupported_format",
        "image.animated",
        "image.damaged",
        "image.undecodable",
        "image.empty",
        "image.decoder_crashed",
        "image.not_checked",
        "image.unreadable",
        "trainer.not_built",
    ];
    KNOWN.iter().find(|k| **k == code).copied().unwrap_or("image.damaged")
}

/// Removes what an earlier process left in the staging folder, and creates the folder if there is none.
///
/// # Errors
/// If the folder cannot be created or emptied.
pub fn sweep_staging(staging: &Path) -> io::Result<()> {
    std::fs::create_dir_all(staging)?;
    for entry in std::fs::read_dir(staging)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
