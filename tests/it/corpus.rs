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

/// A grey JPEG; sides are multiples of 8. Every block is "no change, no detail", which takes two bits.
pub fn jpeg(width: u16, height: u16) -> Vec<u8> {
    fn segment(out: &mut Vec<u8>, marker: u8, data: &[u8]) {
        out.extend([0xff, marker]);
        out.extend((data.len() as u16 + 2).to_be_bytes());
        out.extend(data);
    }
    let mut out = vec![0xff, 0xd8];
    segment(&mut out, 0xdb, &[&[0][..], &[1; 64]].concat());
    let ([h0, h1], [w0, w1]) = (height.to_be_bytes(), width.to_be_bytes());
    segment(&mut out, 0xc0, &[8, h0, h1, w0, w1, 1, 1, 0x11, 0]);
    for table in [0x00, 0x10] {
        // One code of one bit: 0. It means category 0 for DC, end of block for AC.
        let mut data = vec![table, 1];
        data.extend([0; 15]);
        data.push(0);
        segment(&mut out, 0xc4, &data);
    }
    segment(&mut out, 0xda, &[1, 1, 0, 0, 63, 0]);
    let bits = usize::from(width / 8) * usize::from(height / 8) * 2;
    let mut scan = vec![0_u8; bits.div_ceil(8)];
    if bits % 8 != 0 {
        *scan.last_mut().unwrap() = 0xff >> (bits % 8);
    }
    out.extend(scan);
    out.extend([0xff, 0xd9]);
    out
}

/// A lossless WebP of one colour: five codes of one symbol each, so that a pixel takes no bit at all.
pub fn webp(width: u32, height: u32) -> Vec<u8> {
    let (mut bits, mut n) = (0_u128, 0);
    let mut put = |value: u32, count: u32| {
        bits |= u128::from(value) << n;
        n += count;
    };
    put(width - 1, 14);
    put(height - 1, 14);
    // No alpha, version 0, no transform, no colour cache, no groups of codes.
    put(0, 1 + 3 + 1 + 1 + 1);
    for symbol in [40, 200, 40, 255, 0] {
        // A simple code of one symbol of eight bits.
        put(0b101, 3);
        put(symbol, 8);
    }
    let mut data = vec![0x2f];
    data.extend(&bits.to_le_bytes()[..(n as usize).div_ceil(8)]);
    let length = data.len() as u32;
    if length % 2 == 1 {
        data.push(0);
    }
    let mut out = b"RIFF".to_vec();
    out.extend((data.len() as u32 + 12).to_le_bytes());
    out.extend(b"WEBPVP8L");
    out.extend(length.to_le_bytes());
    out.extend(data);
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
