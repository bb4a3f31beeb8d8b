//! Zip, read from its central directory.
//!
//! Written here rather than taken from a crate because the checks need what libraries hide: two entries with one name,
//! entries whose bytes overlap (the flat zip bomb), names that differ between the two headers, bytes outside any entry.
//! Only stored and deflated entries are read; both are what every zip tool writes.
//!
//! # Source
//! PKWARE APPNOTE 6.3.10, §4.3 (layout), §4.4 (fields), §4.5.3 (zip64).

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::Path,
};

use flate2::bufread::DeflateDecoder;

use super::{
    Findings, IngestError, Stop,
    archive::{Shelf, Taken, damaged, too_large, too_many},
    names,
};

const EOCD_BYTES: u64 = 22;
const EOCD_SEARCH: u64 = EOCD_BYTES + 65_535;
const LOCAL_BYTES: u64 = 30;
const CENTRAL_BYTES: usize = 46;
/// Bytes of central directory per entry that are believed: header, longest name, some extras.
const CENTRAL_PER_ENTRY: u64 = 4096;

const ENCRYPTED: u16 = 1 | 1 << 6 | 1 << 13;
const UTF8: u16 = 1 << 11;
const STORED: u16 = 0;
const DEFLATED: u16 = 8;

/// One row of the central directory.
struct Entry {
    name: Vec<u8>,
    flags: u16,
    method: u16,
    crc32: u32,
    packed: u64,
    unpacked: u64,
    offset: u64,
    made_by: u8,
    external: u32,
    /// Where the data starts; known once the local header is read.
    data_at: u64,
}

impl Entry {
    fn text(&self) -> String {
        match std::str::from_utf8(&self.name) {
            Ok(text) => text.to_owned(),
            // Not flagged as UTF-8 and not UTF-8: an old tool's code page. Any one-to-one reading keeps pairs together.
            Err(_) if self.flags & UTF8 == 0 => self.name.iter().map(|b| char::from(*b)).collect(),
            Err(_) => String::from_utf8_lossy(&self.name).into_owned(),
        }
    }

    fn unix_type(&self) -> u32 {
        // 3: Unix, 19: macOS. Others leave the upper half empty or put other things there.
        if matches!(self.made_by, 3 | 19) {
            (self.external >> 16) & 0o170_000
        } else {
            0
        }
    }

    fn is_dir(&self) -> bool {
        self.name.ends_with(b"/") || self.unix_type() == 0o040_000
    }

    /// What is wrong with the entry by its headers alone.
    fn fault(&self, limits: &super::Limits) -> Option<(&'static str, String)> {
        match self.unix_type() {
            0 | 0o100_000 | 0o040_000 => {}
            0o120_000 => return Some(("entry.symlink", "it is a symbolic link".to_owned())),
            _ => return Some(("entry.special_file", "it is a device, pipe or socket".to_owned())),
        }
        if self.flags & ENCRYPTED != 0 {
            return Some(("entry.encrypted", "it is encrypted".to_owned()));
        }
        if !matches!(self.method, STORED | DEFLATED) {
            let detail = format!(
                "it is packed by method {}; only stored and deflated are read",
                self.method
            );
            return Some(("entry.unsupported_compression", detail));
        }
        if self.method == STORED && self.packed != self.unpacked {
            return Some((
                "entry.size_mismatch",
                "it is stored, yet its two sizes differ".to_owned(),
            ));
        }
        if self.unpacked > limits.max_file_bytes {
            let detail = format!(
                "it declares {} bytes; {} MiB are allowed",
                self.unpacked,
                limits.max_file_bytes >> 20
            );
            return Some(("entry.too_large", detail));
        }
        if self.unpacked > super::Limits::RATIO_FLOOR_BYTES && self.unpacked / limits.max_ratio > self.packed {
            let detail = format!("it declares more than {} times its packed size", limits.max_ratio);
            return Some(("entry.bomb", detail));
        }
        None
    }
}

/// Takes every file out of a zip.
pub(super) fn extract(file: File, path: &Path, shelf: &mut Shelf<'_>, findings: &mut Findings) -> Result<(), Stop> {
    let length = file.metadata().map_err(IngestError::io("read", path))?.len();
    let mut file = BufReader::with_capacity(64 << 10, file);
    let mut entries = match directory(&mut file, length, shelf.limits) {
        Ok(entries) => entries,
        Err(Unreadable::Io(e)) => return Err(IngestError::io("read", path)(e).into()),
        Err(Unreadable::Stop(stop)) => return Err(stop),
    };
    // Names and headers first: a hostile archive is refused, with every entry named, before a byte is unpacked.
    let mut wanted = Vec::new();
    let mut total = 0u64;
    for (i, entry) in entries.iter().enumerate() {
        let Some(name) = shelf.admit(&entry.name, &entry.text(), entry.is_dir(), findings) else {
            continue;
        };
        if let Some((code, detail)) = entry.fault(shelf.limits) {
            findings.refuse(&name, code, detail);
            continue;
        }
        total = total.saturating_add(entry.unpacked);
        wanted.push((i, name));
    }
    for entry in &entries {
        // Folders and ignored entries are not read, but a link is a link under any name.
        if matches!(entry.unix_type(), 0o120_000) && (entry.name.ends_with(b"/")) {
            findings.refuse(&names::shown(&entry.name), "entry.symlink", "it is a symbolic link");
        }
    }
    if total > shelf.limits.max_total_bytes {
        return Err(too_large(shelf.limits).into());
    }
    if let Err(e) = locate(&mut file, &mut entries, length, findings) {
        return Err(match e {
            Unreadable::Io(e) => IngestError::io("read", path)(e).into(),
            Unreadable::Stop(stop) => stop,
        });
    }
    if !findings.refused.is_empty() {
        return Ok(()); // the caller reports; nothing needs unpacking for that
    }
    for (i, name) in wanted {
        unpack(&mut file, path, &entries[i], &name, shelf, findings)?;
    }
    Ok(())
}

fn unpack(
    file: &mut BufReader<File>,
    path: &Path,
    entry: &Entry,
    name: &str,
    shelf: &mut Shelf<'_>,
    findings: &mut Findings,
) -> Result<(), Stop> {
    file.seek(SeekFrom::Start(entry.data_at))
        .map_err(IngestError::io("read", path))?;
    let packed = Read::take(&mut *file, entry.packed);
    let taken = if entry.method == STORED {
        shelf.take(name, packed, Some(entry.packed), entry.unpacked)?
    } else {
        let decoder = DeflateDecoder::new(BufReader::new(packed));
        shelf.take(name, decoder, Some(entry.packed), entry.unpacked)?
    };
    match taken {
        Taken::Faulty(code, detail) => findings.refuse(name, code, detail),
        Taken::Stored { bytes, .. } if bytes != entry.unpacked => {
            findings.refuse(
                name,
                "entry.size_mismatch",
                format!("it declares {} bytes and holds {bytes}", entry.unpacked),
            );
            shelf.untake()?;
        }
        Taken::Stored { crc32, .. } if crc32 != entry.crc32 => {
            findings.refuse(name, "entry.damaged", "its checksum does not match its content");
            shelf.untake()?;
        }
        Taken::Stored { .. } => {}
    }
    Ok(())
}

enum Unreadable {
    Io(io::Error),
    Stop(Stop),
}

impl From<io::Error> for Unreadable {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

impl From<super::Whole> for Unreadable {
    fn from(w: super::Whole) -> Self {
        Self::Stop(Stop::Whole(w))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn read_at(file: &mut BufReader<File>, at: u64, len: u64) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(at))?;
    let mut bytes = Vec::new();
    Read::take(&mut *file, len).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == len {
        Ok(bytes)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Finds the end record and reads the central directory.
fn directory(file: &mut BufReader<File>, length: u64, limits: &super::Limits) -> Result<Vec<Entry>, Unreadable> {
    let no_end = || damaged("The zip has no end record: the upload is cut off or has bytes after its end.");
    if length < EOCD_BYTES {
        return Err(no_end().into());
    }
    let tail_at = length.saturating_sub(EOCD_SEARCH);
    let tail = read_at(file, tail_at, length - tail_at)?;
    // Strict: the comment must reach exactly to the end, so that two readers cannot find two different records.
    let end = (0..=tail.len() - EOCD_BYTES as usize)
        .rev()
        .find(|i| {
            tail[*i..].starts_with(b"PK\x05\x06")
                && *i + EOCD_BYTES as usize + usize::from(u16_at(&tail, i + 20)) == tail.len()
        })
        .ok_or_else(no_end)?;
    let record = &tail[end..];
    let end_at = tail_at + end as u64;
    let mut count = u64::from(u16_at(record, 10));
    let mut size = u64::from(u32_at(record, 12));
    let mut offset = u64::from(u32_at(record, 16));
    let mut directory_end = end_at;
    if (count == 0xffff || size == 0xffff_ffff || offset == 0xffff_ffff)
        && let Some(locator_at) = end_at.checked_sub(20)
    {
        let locator = read_at(file, locator_at, 20)?;
        if locator.starts_with(b"PK\x06\x07") {
            let at = u64_at(&locator, 8);
            if at.checked_add(56).is_none_or(|end| end > locator_at) {
                return Err(damaged("The zip64 end record lies outside the file.").into());
            }
            let record = read_at(file, at, 56)?;
            if !record.starts_with(b"PK\x06\x06") {
                return Err(damaged("The zip64 end record is missing.").into());
            }
            count = u64_at(&record, 32);
            size = u64_at(&record, 40);
            offset = u64_at(&record, 48);
            directory_end = at;
        }
    }
    if u16_at(record, 4) != 0 && u16_at(record, 4) != 0xffff {
        return Err(damaged("The zip is one part of several; upload a single file.").into());
    }
    if count > limits.max_entries {
        return Err(too_many(limits, count).into());
    }
    if offset.checked_add(size) != Some(directory_end) || size > count.saturating_mul(CENTRAL_PER_ENTRY) {
        return Err(damaged("The zip's directory does not lie where its end record says.").into());
    }
    let bytes = read_at(file, offset, size)?;
    let mut entries = Vec::new();
    let mut at = 0usize;
    for _ in 0..count {
        let (entry, next) = central_entry(&bytes, at).ok_or_else(|| {
            damaged(format!(
                "The zip's directory breaks off after {} entries.",
                entries.len()
            ))
        })?;
        entries.push(entry);
        at = next;
    }
    if at != bytes.len() {
        return Err(damaged("The zip's directory holds more than its end record counts.").into());
    }
    Ok(entries)
}

fn central_entry(bytes: &[u8], at: usize) -> Option<(Entry, usize)> {
    let head = bytes.get(at..at + CENTRAL_BYTES)?;
    if !head.starts_with(b"PK\x01\x02") {
        return None;
    }
    let name_len = usize::from(u16_at(head, 28));
    let extra_len = usize::from(u16_at(head, 30));
    let comment_len = usize::from(u16_at(head, 32));
    let name_at = at + CENTRAL_BYTES;
    let name = bytes.get(name_at..name_at + name_len)?.to_vec();
    let extra = bytes.get(name_at + name_len..name_at + name_len + extra_len)?;
    let next = name_at + name_len + extra_len + comment_len;
    if next > bytes.len() {
        return None;
    }
    let mut entry = Entry {
        name,
        flags: u16_at(head, 8),
        method: u16_at(head, 10),
        crc32: u32_at(head, 16),
        packed: u64::from(u32_at(head, 20)),
        unpacked: u64::from(u32_at(head, 24)),
        offset: u64::from(u32_at(head, 42)),
        made_by: (u16_at(head, 4) >> 8) as u8,
        external: u32_at(head, 38),
        data_at: 0,
    };
    zip64(&mut entry, extra)?;
    Some((entry, next))
}

/// Replaces the fields that are full by those of the zip64 extra, in its fixed order.
fn zip64(entry: &mut Entry, extra: &[u8]) -> Option<()> {
    let mut rest = extra;
    while rest.len() >= 4 {
        let len = usize::from(u16_at(rest, 2));
        let body = rest.get(4..4 + len)?;
        if u16_at(rest, 0) == 1 {
            let mut at = 0;
            for field in [&mut entry.unpacked, &mut entry.packed, &mut entry.offset] {
                if *field == 0xffff_ffff {
                    body.get(at..at + 8)?;
                    *field = u64_at(body, at);
                    at += 8;
                }
            }
        }
        rest = &rest[4 + len..];
    }
    Some(())
}

/// Reads every local header, and checks that no two entries share bytes.
fn locate(
    file: &mut BufReader<File>,
    entries: &mut [Entry],
    length: u64,
    findings: &mut Findings,
) -> Result<(), Unreadable> {
    let mut ranges = Vec::with_capacity(entries.len());
    for entry in entries.iter_mut() {
        let shown = names::shown(&entry.name);
        if entry.offset.checked_add(LOCAL_BYTES).is_none_or(|end| end > length) {
            findings.refuse(&shown, "entry.damaged", "its header lies outside the archive");
            continue;
        }
        let head = read_at(file, entry.offset, LOCAL_BYTES)?;
        let name_len = u64::from(u16_at(&head, 26));
        let extra_len = u64::from(u16_at(&head, 28));
        let data_at = entry.offset + LOCAL_BYTES + name_len + extra_len;
        let end = data_at.checked_add(entry.packed);
        if !head.starts_with(b"PK\x03\x04") || end.is_none_or(|end| end > length) {
            findings.refuse(&shown, "entry.damaged", "its data lies outside the archive");
            continue;
        }
        if read_at(file, entry.offset + LOCAL_BYTES, name_len)? != entry.name {
            findings.refuse(&shown, "entry.name_mismatch", "its two headers name it differently");
            continue;
        }
        entry.data_at = data_at;
        ranges.push((entry.offset, end.unwrap_or(length), shown));
    }
    ranges.sort();
    for pair in ranges.windows(2) {
        if pair[0].1 > pair[1].0 {
            let detail = format!("it shares bytes with {}", pair[0].2);
            findings.refuse(&pair[1].2, "entry.overlap", detail);
        }
    }
    Ok(())
}
