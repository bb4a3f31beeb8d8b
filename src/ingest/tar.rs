//! Tar and tar.gz, read in one pass.
//!
//! The `tar` crate's raw mode reads the blocks; long names and pax records are put together here, because the crate
//! would hold one of any size in memory.

use std::{
    cell::Cell,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::Path,
    rc::Rc,
};

use flate2::read::MultiGzDecoder;
use tar::{Archive, EntryType};

use super::{
    Findings, IngestError, Stop,
    archive::{Shelf, Taken, damaged, too_large, too_many},
    names,
};

/// Longest long-name entry or pax record that is read.
const MAX_EXTENSION_BYTES: u64 = 64 << 10;

/// Counts what comes out of the decompressor, and ends the stream when it is out of proportion.
struct Meter<R> {
    inner: R,
    read: Rc<Cell<u64>>,
    cap: u64,
}

impl<R: Read> Read for Meter<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.read.set(self.read.get() + n as u64);
        if self.read.get() > self.cap {
            return Err(io::Error::other("more bytes than allowed"));
        }
        Ok(n)
    }
}

/// Takes every file out of a tar or tar.gz.
pub(super) fn extract(
    mut file: File,
    path: &Path,
    gzip: bool,
    shelf: &mut Shelf<'_>,
    findings: &mut Findings,
) -> Result<(), Stop> {
    let packed = file.metadata().map_err(IngestError::io("read", path))?.len();
    if !gzip && !ends_with_zeros(&mut file, packed).map_err(IngestError::io("read", path))? {
        return Err(damaged("The tar does not end with an empty block: the upload is cut off.").into());
    }
    file.seek(SeekFrom::Start(0)).map_err(IngestError::io("read", path))?;
    let limits = shelf.limits;
    // Headers and padding take at most 2 KiB an entry beside the files themselves.
    let by_total = limits
        .max_total_bytes
        .saturating_add(limits.max_entries.saturating_mul(2048));
    let by_ratio = packed
        .saturating_mul(limits.max_ratio)
        .max(super::Limits::RATIO_FLOOR_BYTES);
    let read = Rc::new(Cell::new(0));
    let reader: Box<dyn Read> = if gzip {
        Box::new(MultiGzDecoder::new(BufReader::with_capacity(64 << 10, file)))
    } else {
        Box::new(BufReader::with_capacity(64 << 10, file))
    };
    let meter = Meter {
        inner: reader,
        read: Rc::clone(&read),
        cap: by_total.min(by_ratio),
    };
    let mut archive = Archive::new(meter);
    let outcome = walk(&mut archive, shelf, findings);
    if read.get() > by_total.min(by_ratio) {
        return Err(if by_ratio < by_total {
            super::Whole::new(
                "dataset.bomb",
                format!("The archive unpacks to more than {} times its size.", limits.max_ratio),
                "Pictures hardly shrink in an archive; this one holds something else.",
            )
            .into()
        } else {
            too_large(limits).into()
        });
    }
    outcome?;
    // To the end, so that a cut gzip stream shows by its missing checksum.
    io::copy(&mut archive.into_inner(), &mut io::sink())
        .map_err(|_| damaged("The archive is cut off or damaged near its end."))?;
    Ok(())
}

fn walk(
    archive: &mut Archive<Meter<Box<dyn Read>>>,
    shelf: &mut Shelf<'_>,
    findings: &mut Findings,
) -> Result<(), Stop> {
    let broken = |n: u64| damaged(format!("The tar is damaged or cut off after {n} entries."));
    let mut n = 0u64;
    let mut long_name: Option<Vec<u8>> = None;
    let entries = archive.entries().map_err(|_| broken(0))?;
    for entry in entries.raw(true) {
        let mut entry = entry.map_err(|_| broken(n))?;
        n += 1;
        if n > shelf.limits.max_entries.saturating_mul(2) {
            return Err(too_many(shelf.limits, n).into());
        }
        let size = entry.size();
        let kind = entry.header().entry_type();
        match kind {
            EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader | EntryType::XGlobalHeader => {
                if size > MAX_EXTENSION_BYTES {
                    return Err(damaged(format!("A name or attribute record of {size} bytes is not believed.")).into());
                }
                let mut record = Vec::new();
                entry.read_to_end(&mut record).map_err(|_| broken(n))?;
                match kind {
                    EntryType::GNULongName => long_name = Some(without_trailing_nul(record)),
                    EntryType::XHeader => match pax(&record) {
                        Some(pax) if pax.sparse_or_sized => {
                            return Err(damaged("Sparse files in tar archives are not read.").into());
                        }
                        Some(pax) => long_name = pax.path.or(long_name),
                        None => return Err(broken(n).into()),
                    },
                    _ => {}
                }
                continue;
            }
            _ => {}
        }
        let raw = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
        let shown = names::shown(&raw);
        let is_dir = kind == EntryType::Directory || raw.ends_with(b"/");
        let fault = match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::Directory => None,
            EntryType::Symlink => Some(("entry.symlink", "it is a symbolic link")),
            EntryType::Link => Some(("entry.hardlink", "it is a hard link")),
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                Some(("entry.special_file", "it is a device or a pipe"))
            }
            _ => Some(("entry.special_file", "it is of a kind that is not read")),
        };
        if let Some((code, detail)) = fault {
            findings.refuse(&shown, code, detail);
            continue;
        }
        let text = match std::str::from_utf8(&raw) {
            Ok(text) => text.to_owned(),
            Err(_) => raw.iter().map(|b| char::from(*b)).collect(),
        };
        let Some(name) = shelf.admit(&raw, &text, is_dir, findings) else {
            continue;
        };
        if shelf.files.len() as u64 >= shelf.limits.max_entries {
            return Err(too_many(shelf.limits, n).into());
        }
        if size > shelf.limits.max_file_bytes {
            let detail = format!(
                "it holds {size} bytes; {} MiB are allowed",
                shelf.limits.max_file_bytes >> 20
            );
            findings.refuse(&name, "entry.too_large", detail);
            continue;
        }
        match shelf.take(&name, &mut entry, None, size)? {
            Taken::Stored { bytes, .. } if bytes == size => {}
            Taken::Stored { .. } => return Err(broken(n).into()),
            Taken::Faulty("entry.damaged", _) => return Err(broken(n).into()),
            Taken::Faulty(code, detail) => findings.refuse(&name, code, detail),
        }
    }
    Ok(())
}

struct Pax {
    path: Option<Vec<u8>>,
    sparse_or_sized: bool,
}

/// Reads the records `<length> <key>=<value>\n` of a pax header. `None`: malformed.
fn pax(record: &[u8]) -> Option<Pax> {
    let mut out = Pax {
        path: None,
        sparse_or_sized: false,
    };
    let mut rest = record;
    while !rest.is_empty() {
        let space = rest.iter().position(|b| *b == b' ')?;
        let len: usize = std::str::from_utf8(&rest[..space]).ok()?.parse().ok()?;
        let body = rest.get(space + 1..len)?.strip_suffix(b"\n")?;
        let eq = body.iter().position(|b| *b == b'=')?;
        let (key, value) = (&body[..eq], &body[eq + 1..]);
        match key {
            b"path" => out.path = Some(value.to_vec()),
            // `size` only stands where the plain field is too small, i.e. beyond 8 GiB.
            b"size" => out.sparse_or_sized = true,
            _ if key.starts_with(b"GNU.sparse") => out.sparse_or_sized = true,
            _ => {}
        }
        rest = &rest[len..];
    }
    Some(out)
}

fn without_trailing_nul(mut name: Vec<u8>) -> Vec<u8> {
    if name.last() == Some(&0) {
        name.pop();
    }
    name
}

/// Whether a plain tar's last block is the empty one that every writer puts there.
fn ends_with_zeros(file: &mut File, length: u64) -> io::Result<bool> {
    let Some(at) = length.checked_sub(512) else {
        return Ok(false);
    };
    file.seek(SeekFrom::Start(at))?;
    let mut block = [0u8; 512];
    file.read_exact(&mut block)?;
    Ok(block.iter().all(|b| *b == 0))
}
