//! Telling archives apart, and the one way by which bytes of an upload reach the disk: counted, hashed, capped.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use super::{Findings, IngestError, Limits, RawFile, Stop, Whole, names, tar, zip};

const HINT_FORMATS: &str = "Upload a .zip, .tar or .tar.gz file.";

/// What a file is, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Magic {
    Zip,
    Gzip,
    Tar,
    /// An archive that is not read here.
    OtherArchive(&'static str),
    Png,
    Jpeg,
    Webp,
    /// A picture, document, model … that is not read here.
    Other(&'static str),
    Unknown,
}

/// Bytes needed by [`magic`].
pub(super) const HEAD_BYTES: usize = 512;

/// Tells what a file is by its first bytes, never by its name.
pub(super) fn magic(head: &[u8]) -> Magic {
    let at = |offset: usize, bytes: &[u8]| head.get(offset..offset + bytes.len()) == Some(bytes);
    match () {
        () if at(0, b"PK\x03\x04") || at(0, b"PK\x05\x06") || at(0, b"PK\x07\x08") => Magic::Zip,
        () if at(0, b"\x1f\x8b") => Magic::Gzip,
        () if at(257, b"ustar") => Magic::Tar,
        () if at(0, b"7z\xbc\xaf\x27\x1c") => Magic::OtherArchive("7z"),
        () if at(0, b"Rar!\x1a\x07") => Magic::OtherArchive("RAR"),
        () if at(0, b"BZh") => Magic::OtherArchive("bzip2"),
        () if at(0, b"\xfd7zXZ\0") => Magic::OtherArchive("xz"),
        () if at(0, b"\x28\xb5\x2f\xfd") => Magic::OtherArchive("zstd"),
        () if at(0, b"\x89PNG\r\n\x1a\n") => Magic::Png,
        () if at(0, b"\xff\xd8\xff") => Magic::Jpeg,
        () if at(0, b"RIFF") && at(8, b"WEBP") => Magic::Webp,
        () if at(0, b"GIF8") => Magic::Other("a GIF picture"),
        () if at(0, b"BM") => Magic::Other("a BMP picture"),
        () if at(0, b"II*\0") || at(0, b"MM\0*") => Magic::Other("a TIFF picture"),
        () if at(4, b"ftypavif") => Magic::Other("an AVIF picture"),
        () if at(4, b"ftyphei") || at(4, b"ftypmif1") => Magic::Other("a HEIC picture"),
        () if at(4, b"ftyp") => Magic::Other("an MP4 video"),
        () if at(0, b"8BPS") => Magic::Other("a Photoshop file"),
        () if at(0, b"\x76\x2f\x31\x01") => Magic::Other("an EXR picture"),
        () if at(0, b"%PDF") => Magic::Other("a PDF document"),
        () if at(0, b"\x7fELF") || at(0, b"MZ") => Magic::Other("a program"),
        () if looks_like_markup(head) => Magic::Other("an SVG, XML or HTML text"),
        () => Magic::Unknown,
    }
}

fn looks_like_markup(head: &[u8]) -> bool {
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let start: Vec<u8> = text.iter().take(14).map(u8::to_ascii_lowercase).collect();
    [&b"<svg"[..], b"<?xml", b"<!doctype html", b"<html"]
        .iter()
        .any(|m| start.starts_with(m))
}

/// Takes every file out of an archive.
pub(super) fn extract(
    path: &Path,
    work: &Path,
    limits: &Limits,
    findings: &mut Findings,
) -> Result<Vec<RawFile>, Stop> {
    let mut file = File::open(path).map_err(IngestError::io("open", path))?;
    let mut head = Vec::new();
    (&mut file)
        .take(HEAD_BYTES as u64)
        .read_to_end(&mut head)
        .map_err(IngestError::io("read", path))?;
    let raw = work.join("raw");
    std::fs::create_dir(&raw).map_err(IngestError::io("create", &raw))?;
    let mut shelf = Shelf::new(raw, limits);
    match magic(&head) {
        Magic::Zip => zip::extract(file, path, &mut shelf, findings)?,
        Magic::Gzip | Magic::Tar => tar::extract(file, path, magic(&head) == Magic::Gzip, &mut shelf, findings)?,
        Magic::OtherArchive(kind) => {
            return Err(Whole::new(
                "dataset.not_an_archive",
                format!("The upload is a {kind} archive, which is not supported."),
                HINT_FORMATS,
            )
            .into());
        }
        _ if head.is_empty() => {
            return Err(Whole::new("dataset.not_an_archive", "The upload is empty.", HINT_FORMATS).into());
        }
        Magic::Png | Magic::Jpeg | Magic::Webp => {
            return Err(Whole::new(
                "dataset.not_an_archive",
                "The upload is a single picture, not an archive.",
                HINT_FORMATS,
            )
            .into());
        }
        Magic::Other(what) => {
            return Err(Whole::new(
                "dataset.not_an_archive",
                format!("The upload is {what}, not an archive."),
                HINT_FORMATS,
            )
            .into());
        }
        Magic::Unknown => {
            return Err(Whole::new(
                "dataset.not_an_archive",
                "The upload is not an archive: its first bytes match neither zip, tar nor gzip.",
                HINT_FORMATS,
            )
            .into());
        }
    }
    Ok(shelf.files)
}

/// Where extracted files are put. Counts what it is given, whatever the archive claims.
pub(super) struct Shelf<'a> {
    dir: PathBuf,
    pub(super) limits: &'a Limits,
    pub(super) files: Vec<RawFile>,
    total_bytes: u64,
    seen: std::collections::HashMap<String, String>,
}

/// How reading one entry went.
pub(super) enum Taken {
    /// All of it was stored.
    Stored {
        /// Bytes.
        bytes: u64,
        /// For archives that carry one.
        crc32: u32,
    },
    /// The entry is at fault; nothing of it was kept.
    Faulty(&'static str, String),
}

impl<'a> Shelf<'a> {
    pub(super) fn new(dir: PathBuf, limits: &'a Limits) -> Self {
        Self {
            dir,
            limits,
            files: Vec::new(),
            total_bytes: 0,
            seen: std::collections::HashMap::new(),
        }
    }

    /// Checks a name, also against those already seen. `None`: refused (noted), or the archive's root.
    pub(super) fn admit(&mut self, raw: &[u8], text: &str, is_dir: bool, findings: &mut Findings) -> Option<String> {
        let name = match names::checked(text) {
            Ok(name) if name.is_empty() && is_dir => return None,
            Ok(name) if name.is_empty() => {
                findings.refuse(&names::shown(raw), "entry.no_name", "the entry has no name");
                return None;
            }
            Ok(name) => name,
            Err((code, detail)) => {
                findings.refuse(&names::shown(raw), code, detail);
                return None;
            }
        };
        if is_dir {
            return None; // folders exist by the files in them
        }
        if let Some(earlier) = self.seen.insert(names::fold(&name), name.clone()) {
            let detail = if earlier == name {
                "the archive holds this name twice".to_owned()
            } else {
                format!("on some systems this is the same name as {earlier}")
            };
            findings.refuse(&name, "entry.duplicate_name", detail);
            return None;
        }
        if let Some(why) = names::ignored(&name) {
            findings.note(&name, lorad_proto::dataset::Verdict::Ignored, "ignored", why);
            return None;
        }
        Some(name)
    }

    /// Copies one entry's bytes to a generated name.
    ///
    /// `packed`: bytes that the entry takes in the archive, for the ratio; `declared`: bytes that it claims to hold.
    pub(super) fn take(
        &mut self,
        name: &str,
        mut data: impl Read,
        packed: Option<u64>,
        declared: u64,
    ) -> Result<Taken, Stop> {
        let path = self.dir.join(format!("{:05}", self.files.len()));
        let mut file = File::create(&path).map_err(IngestError::io("create", &path))?;
        let mut sha256 = Sha256::new();
        let mut crc = flate2::Crc::new();
        let mut head = Vec::new();
        let mut bytes = 0u64;
        let mut buffer = vec![0u8; 64 << 10];
        let fault = loop {
            let n = match data.read(&mut buffer) {
                Ok(0) => break None,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break Some(("entry.damaged", "its packed data is damaged or cut off".to_owned())),
            };
            let chunk = &buffer[..n];
            bytes += n as u64;
            self.total_bytes += n as u64;
            if let Some(stop) = self.over_total() {
                let _ = std::fs::remove_file(&path);
                return Err(stop.into());
            }
            if bytes > declared {
                break Some((
                    "entry.size_mismatch",
                    format!("it holds more than the {declared} bytes that it declares"),
                ));
            }
            if bytes > self.limits.max_file_bytes {
                break Some((
                    "entry.too_large",
                    format!("it holds more than {} MiB", self.limits.max_file_bytes >> 20),
                ));
            }
            if packed.is_some_and(|packed| self.is_bomb(bytes, packed)) {
                break Some((
                    "entry.bomb",
                    format!(
                        "it unpacks to more than {} times its packed size",
                        self.limits.max_ratio
                    ),
                ));
            }
            if head.len() < HEAD_BYTES {
                head.extend(chunk.iter().take(HEAD_BYTES - head.len()));
            }
            sha256.update(chunk);
            crc.update(chunk);
            file.write_all(chunk).map_err(IngestError::io("write", &path))?;
        };
        if let Some((code, detail)) = fault {
            drop(file);
            std::fs::remove_file(&path).map_err(IngestError::io("remove", &path))?;
            return Ok(Taken::Faulty(code, detail));
        }
        self.files.push(RawFile {
            name: name.to_owned(),
            path,
            bytes,
            sha256: hex::encode(sha256.finalize()),
            head,
        });
        Ok(Taken::Stored {
            bytes,
            crc32: crc.sum(),
        })
    }

    /// Takes the newest file back, because something about it turned out wrong after it was stored.
    pub(super) fn untake(&mut self) -> Result<(), Stop> {
        if let Some(file) = self.files.pop() {
            std::fs::remove_file(&file.path).map_err(IngestError::io("remove", &file.path))?;
        }
        Ok(())
    }

    /// Whether so many bytes from so many packed ones are out of proportion.
    pub(super) fn is_bomb(&self, bytes: u64, packed: u64) -> bool {
        bytes > Limits::RATIO_FLOOR_BYTES && bytes / self.limits.max_ratio > packed
    }

    fn over_total(&self) -> Option<Whole> {
        (self.total_bytes > self.limits.max_total_bytes).then(|| too_large(self.limits))
    }
}

/// The refusal for more bytes than allowed.
pub(super) fn too_large(limits: &Limits) -> Whole {
    Whole::new(
        "dataset.too_large",
        format!("The upload unpacks to more than {} MiB.", limits.max_total_bytes >> 20),
        "Upload fewer or smaller pictures, or raise the limit in the server's configuration.",
    )
}

/// The refusal for more entries than allowed.
pub(super) fn too_many(limits: &Limits, found: u64) -> Whole {
    Whole::new(
        "dataset.too_many_entries",
        format!(
            "The archive holds {found} or more entries; {} are allowed.",
            limits.max_entries
        ),
        "Split the dataset, or raise the limit in the server's configuration.",
    )
}

/// The refusal for an archive whose structure does not hold.
pub(super) fn damaged(detail: impl Into<String>) -> Whole {
    Whole::new(
        "dataset.damaged",
        detail,
        "The upload may have been cut off. Make the archive again and upload it again.",
    )
}
