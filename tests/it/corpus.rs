//! Archives and pictures made in code, honest and hostile. No binary fixtures: what a file does stands where it is made.

use std::io::Write as _;

use flate2::{Compression, Crc, write::DeflateEncoder, write::GzEncoder, write::ZlibEncoder};

/// A PNG of one colour.
pub fn png(width: u32, height: u32) -> Vec<u8> {
    let mut rows = Vec::new();
    for _ in 0..height {
        rows.push(0);
        rows.extend(std::iter::repeat_n([200u8, 40, 40], width as usize).flatten());
    }
    png_with(width, height, &rows)
}

/// A PNG whose header says 60 000 x 60 000 pixels while its data would unpack to zeros for hours.
pub fn png_bomb() -> Vec<u8> {
    png_with(60_000, 60_000, &vec![0; 1 << 20])
}

fn png_with(width: u32, height: u32, rows: &[u8]) -> Vec<u8> {
    let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
    zlib.write_all(rows).unwrap();
    let mut header = Vec::new();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, data) in [
        (b"IHDR", header),
        (b"IDAT", zlib.finish().unwrap()),
        (b"IEND", Vec::new()),
    ] {
        out.extend((data.len() as u32).to_be_bytes());
        let mut crc = Crc::new();
        crc.update(kind);
        crc.update(&data);
        out.extend(kind);
        out.extend(data);
        out.extend(crc.sum().to_be_bytes());
    }
    out
}

/// One entry of a zip, every field of which can lie.
#[derive(Clone)]
pub struct Entry {
    pub name: Vec<u8>,
    pub local_name: Option<Vec<u8>>,
    pub data: Vec<u8>,
    pub deflate: bool,
    pub flags: u16,
    pub method: Option<u16>,
    pub unix_mode: Option<u32>,
    pub declared: Option<u32>,
    pub crc: Option<u32>,
    /// Points at the bytes of the entry with this number.
    pub shares: Option<usize>,
}

impl Entry {
    pub fn new(name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        Self {
            name: name.as_ref().to_vec(),
            local_name: None,
            data: data.as_ref().to_vec(),
            deflate: true,
            flags: 1 << 11,
            method: None,
            unix_mode: None,
            declared: None,
            crc: None,
            shares: None,
        }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

/// A zip.
pub fn zip(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    let mut placed: Vec<(u32, u32)> = Vec::new();
    for entry in entries {
        let packed = if entry.deflate {
            let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(&entry.data).unwrap();
            encoder.finish().unwrap()
        } else {
            entry.data.clone()
        };
        let method = entry.method.unwrap_or(if entry.deflate { 8 } else { 0 });
        let mut crc = Crc::new();
        crc.update(&entry.data);
        let crc = entry.crc.unwrap_or(crc.sum());
        let declared = entry.declared.unwrap_or(entry.data.len() as u32);
        let (offset, packed_len) = match entry.shares {
            Some(other) => placed[other],
            None => (out.len() as u32, packed.len() as u32),
        };
        placed.push((offset, packed_len));
        let common = |name: &[u8]| {
            let mut fields = Vec::new();
            fields.extend(20u16.to_le_bytes());
            fields.extend(entry.flags.to_le_bytes());
            fields.extend(method.to_le_bytes());
            fields.extend([0; 4]);
            fields.extend(crc.to_le_bytes());
            fields.extend(packed_len.to_le_bytes());
            fields.extend(declared.to_le_bytes());
            fields.extend((name.len() as u16).to_le_bytes());
            fields.extend(0u16.to_le_bytes());
            fields
        };
        if entry.shares.is_none() {
            let local = entry.local_name.as_ref().unwrap_or(&entry.name);
            out.extend(b"PK\x03\x04");
            out.extend(common(local));
            out.extend(local);
            out.extend(packed);
        }
        directory.extend(b"PK\x01\x02");
        directory.extend([20, if entry.unix_mode.is_some() { 3 } else { 0 }]);
        directory.extend(common(&entry.name));
        directory.extend([0; 6]); // comment length, disk, internal attributes
        directory.extend((entry.unix_mode.unwrap_or(0) << 16).to_le_bytes());
        directory.extend(offset.to_le_bytes());
        directory.extend(&entry.name);
    }
    let at = out.len() as u32;
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend((entries.len() as u16).to_le_bytes());
    out.extend((entries.len() as u16).to_le_bytes());
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(at.to_le_bytes());
    out.extend([0, 0]);
    out
}

/// `n` pictures with sidecar captions.
pub fn pictures(n: u32) -> Vec<Entry> {
    (0..n)
        .flat_map(|i| {
            [
                Entry::new(format!("p{i}.png"), png(32 + i, 32)),
                Entry::new(format!("p{i}.txt"), format!("picture number {i}")),
            ]
        })
        .collect()
}

/// Two good pictures and something else.
pub fn with_good(extra: impl IntoIterator<Item = Entry>) -> Vec<u8> {
    let mut entries = pictures(2);
    entries.extend(extra);
    zip(&entries)
}

/// One block-aligned tar entry, its name and type as given.
pub fn tar_entry(name: &[u8], kind: u8, link: &[u8], data: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
    header[100..107].copy_from_slice(b"0000644");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link);
    header[257..263].copy_from_slice(b"ustar\0");
    header[263..265].copy_from_slice(b"00");
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let mut out = header.to_vec();
    out.extend(data);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

/// A tar of two good pictures and further raw entries.
pub fn tar(extra: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in pictures(2) {
        out.extend(tar_entry(&entry.name, b'0', b"", &entry.data));
    }
    out.extend(extra.iter().flatten());
    out.extend([0; 1024]);
    out
}

/// Gzip.
pub fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A pax header that names the next entry.
pub fn pax_path(path: &str) -> Vec<u8> {
    pax_record("path", path)
}

/// A pax header with one record.
pub fn pax_record(key: &str, value: &str) -> Vec<u8> {
    let body = format!(" {key}={value}\n");
    let mut len = body.len() + 1;
    while format!("{len}{body}").len() != len {
        len += 1;
    }
    tar_entry(b"pax", b'x', b"", format!("{len}{body}").as_bytes())
}
