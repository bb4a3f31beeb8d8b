//! A base model's folder in the diffusers layout: which files, which tensors, and whether they fit the configs.
//!
//! Reads headers first and tensors one by one; sizes in a header are checked against the file before anything is
//! allocated. Python pickles are never opened. Called by the family (inspection, opening) and by the models' `load`.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use lorad_proto::problem::{FieldError, Problem};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{
    config::{ClipConfig, UNetConfig, VaeConfig, short_name},
    keys::{self, Part},
    single,
    tokenizer::ClipTokenizer,
};
use crate::nn::{ExpectedTensor, TensorSource};

/// A base model's folder with its configs read. Cheap: no tensor is loaded.
#[derive(Debug, Clone)]
pub struct BaseFolder {
    /// The folder.
    pub dir: PathBuf,
    /// `unet/config.json`.
    pub unet: UNetConfig,
    /// `vae/config.json`.
    pub vae: VaeConfig,
    /// `text_encoder/config.json`.
    pub text_encoder: ClipConfig,
}

impl BaseFolder {
    /// Reads the configs.
    ///
    /// # Errors
    /// A missing or unreadable config, or one with options that are not supported (all named at once).
    pub fn open(dir: &Path) -> Result<Self, Problem> {
        let base = Self {
            dir: dir.to_owned(),
            unet: UNetConfig::read(&dir.join("unet/config.json"))?,
            vae: VaeConfig::read(&dir.join("vae/config.json"))?,
            text_encoder: ClipConfig::read(&dir.join("text_encoder/config.json"))?,
        };
        let mut errors = Vec::new();
        let mut equal = |pointer: &str, what: &str, found: usize, other: &str, expected: usize| {
            if found != expected {
                errors.push(FieldError::new(
                    pointer,
                    "contradiction",
                    format!("{what} is {found}, but {other} is {expected}"),
                ));
            }
        };
        equal(
            "/unet/cross_attention_dim",
            "the UNet's cross_attention_dim",
            base.unet.cross_attention_dim,
            "the text encoder's hidden_size",
            base.text_encoder.hidden_size,
        );
        equal(
            "/unet/in_channels",
            "the UNet's in_channels",
            base.unet.in_channels,
            "the VAE's latent_channels",
            base.vae.latent_channels,
        );
        equal(
            "/unet/out_channels",
            "the UNet's out_channels",
            base.unet.out_channels,
            "the VAE's latent_channels",
            base.vae.latent_channels,
        );
        if errors.is_empty() {
            return Ok(base);
        }
        let detail: Vec<&str> = errors.iter().map(|e| e.detail.as_str()).collect();
        Err(Problem::new(
            "base_model.parts_do_not_fit",
            "The parts of the base model do not fit together",
            detail.join("; "),
        )
        .with_hint("Inpainting, depth and image-variation bases are not supported.")
        .with_errors(errors))
    }

    /// Whether the weights lie in a checkpoint elsewhere, see [`super::single`].
    pub fn is_single_file(&self) -> bool {
        self.dir.join(single::POINTER).is_file()
    }

    /// `scheduler/scheduler_config.json`.
    pub fn scheduler_config(&self) -> PathBuf {
        self.dir.join("scheduler/scheduler_config.json")
    }

    /// Reads `tokenizer/`.
    ///
    /// # Errors
    /// `base_model.bad_tokenizer`, also if it knows more tokens than the text encoder.
    pub fn tokenizer(&self) -> Result<ClipTokenizer, Problem> {
        let tokenizer =
            ClipTokenizer::from_dir(&self.dir.join("tokenizer"), self.text_encoder.max_position_embeddings)?;
        let (found, known) = (tokenizer.vocab_size(), self.text_encoder.vocab_size);
        if found > known {
            return Err(Problem::new(
                "base_model.bad_tokenizer",
                "The tokenizer cannot be used",
                format!("tokenizer/ has {found} tokens, but the text encoder's vocab_size is {known}"),
            ));
        }
        Ok(tokenizer)
    }

    /// Opens the weight files of one part (headers only).
    ///
    /// # Errors
    /// No file, only pickles, or a header that does not fit its file.
    pub fn weights(&self, part: Part) -> Result<WeightFiles, Problem> {
        match single::weights_of(&self.dir)? {
            Some(file) => WeightFiles::open_single(file, part),
            None => WeightFiles::open(&self.dir.join(part.folder()), part),
        }
    }

    /// Every tensor of every part, in order, with its shape and its first bytes: what tells one base from another without
    /// reading all weights.
    ///
    /// # Errors
    /// As [`Self::weights`], or if a file cannot be read.
    pub fn tensor_index(&self) -> Result<Vec<TensorHead>, Problem> {
        const FIRST_BYTES: usize = 64;
        let mut index = Vec::new();
        for part in Part::ALL {
            let weights = self.weights(part)?;
            for (key, tensor) in &weights.tensors {
                let (path, file) = &weights.files[tensor.file];
                let mut start = vec![0; tensor.bytes.min(FIRST_BYTES)];
                file.read_exact_at(&mut start, tensor.begin)
                    .map_err(|e| unreadable(path, &format!("cannot be read: {e}")))?;
                index.push(TensorHead {
                    name: format!("{}/{key}", part.folder()),
                    shape: tensor.shape.clone(),
                    start,
                });
            }
        }
        Ok(index)
    }

    /// Compares every part's files with its config, by headers only.
    ///
    /// # Errors
    /// `base_model.missing_key`, `base_model.shape_mismatch`, `base_model.unexpected_key` (the first that occurs gives
    /// the code): *all* differences of *all* parts, each with file, key, what was expected and what was found.
    pub fn check(&self) -> Result<(), Problem> {
        let mut faults = Vec::new();
        for part in Part::ALL {
            self.weights(part)?
                .compare(&keys::expected_tensors(self, part)?, &mut faults);
        }
        faults.sort_by_key(|f: &Fault| f.kind);
        let Some(first) = faults.first() else { return Ok(()) };
        let (code, title) = first.kind.code_and_title();
        let shown: Vec<&str> = faults.iter().take(5).map(|f| f.detail.as_str()).collect();
        let more = if faults.len() > shown.len() {
            format!("; and {} more", faults.len() - shown.len())
        } else {
            String::new()
        };
        Err(Problem::new(code, title, format!("{}{more}", shown.join("; ")))
            .with_hint("The config.json beside the file must belong to it.")
            .with_errors(
                faults
                    .into_iter()
                    .map(|f| FieldError::new(f.pointer, f.kind.code_and_title().0, f.detail))
                    .collect(),
            ))
    }
}

/// One tensor of a base, as far as telling bases apart needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorHead {
    /// `unet/conv_in.weight`.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Its first bytes as stored.
    pub start: Vec<u8>,
}

/// The order is the order in which they are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum FaultKind {
    Missing,
    Shape,
    Dtype,
    Unexpected,
}

impl FaultKind {
    fn code_and_title(self) -> (&'static str, &'static str) {
        match self {
            Self::Missing => ("base_model.missing_key", "A tensor of the base model is missing"),
            Self::Shape => (
                "base_model.shape_mismatch",
                "A tensor of the base model has the wrong shape",
            ),
            Self::Dtype => (
                "base_model.unsupported_dtype",
                "A tensor of the base model has an unsupported type",
            ),
            Self::Unexpected => (
                "base_model.unexpected_key",
                "The base model has a tensor that its config does not explain",
            ),
        }
    }
}

struct Fault {
    kind: FaultKind,
    pointer: String,
    detail: String,
}

/// Where a tensor lies.
#[derive(Debug, Clone)]
pub(super) struct StoredTensor {
    file: usize,
    dtype: String,
    pub(super) shape: Vec<usize>,
    /// Absolute offset in the file.
    begin: u64,
    bytes: usize,
}

impl StoredTensor {
    /// Part `i` of the `n` equal parts of its rows.
    pub(super) fn rows(&self, i: usize, n: usize) -> Self {
        let mut part = self.clone();
        part.bytes = self.bytes / n;
        part.begin += (i * part.bytes) as u64;
        if let Some(rows) = part.shape.first_mut() {
            *rows /= n;
        }
        part
    }
}

/// The tensors of one safetensors file, by the names that it uses.
pub(super) fn read_single(path: &Path) -> Result<Vec<(String, StoredTensor)>, Problem> {
    let file = File::open(path).map_err(|e| unreadable(path, &e.to_string()))?;
    read_header(path, &file, 0)
}

/// The safetensors files of one part, headers read.
#[derive(Debug)]
pub struct WeightFiles {
    files: Vec<(PathBuf, File)>,
    /// By canonical key ([`keys::canonical`]).
    tensors: BTreeMap<String, StoredTensor>,
}

/// A header longer than this is not a header (the safetensors format's own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;

impl WeightFiles {
    fn open(folder: &Path, part: Part) -> Result<Self, Problem> {
        let paths = find_files(folder, part.stem())?;
        let mut this = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        let mut raw = Vec::new();
        for path in paths {
            let file = File::open(&path).map_err(|e| unreadable(&path, &e.to_string()))?;
            let header = read_header(&path, &file, this.files.len())?;
            raw.extend(header);
            this.files.push((path, file));
        }
        let all_keys: Vec<&str> = raw.iter().map(|(k, _)| k.as_str()).collect();
        let names = keys::canonical(part, &all_keys);
        for ((key, stored), name) in raw.iter().zip(names) {
            let Some(name) = name else { continue };
            if this.tensors.insert(name, stored.clone()).is_some() {
                let path = &this.files[stored.file].0;
                return Err(unreadable(path, &format!("holds the tensor {key} more than once")));
            }
        }
        Ok(this)
    }

    /// SHA-256 over every tensor's name, type, shape and bytes.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn content_hash(&self) -> Result<String, Problem> {
        /// Read at a time.
        const CHUNK: usize = 1 << 20;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0_u8; CHUNK];
        for (key, tensor) in &self.tensors {
            hasher.update(format!("{key} {} {:?};", tensor.dtype, tensor.shape));
            let (path, file) = &self.files[tensor.file];
            let mut done = 0;
            while done < tensor.bytes {
                let n = CHUNK.min(tensor.bytes - done);
                file.read_exact_at(&mut buffer[..n], tensor.begin + done as u64)
                    .map_err(|e| unreadable(path, &format!("cannot be read: {e}")))?;
                hasher.update(&buffer[..n]);
                done += n;
            }
        }
        Ok(hex::encode(hasher.finalize()))
    }

    /// One part of a checkpoint in the original naming.
    fn open_single(path: PathBuf, part: Part) -> Result<Self, Problem> {
        let file = File::open(&path).map_err(|e| unreadable(&path, &e.to_string()))?;
        let today = single::to_diffusers(part, &read_header(&path, &file, 0)?);
        let keys: Vec<&str> = today.iter().map(|(key, _)| key.as_str()).collect();
        let names = keys::canonical(part, &keys);
        let tensors = names
            .into_iter()
            .zip(&today)
            .filter_map(|(name, (_, tensor))| Some((name?, tensor.clone())));
        Ok(Self {
            tensors: tensors.collect(),
            files: vec![(path, file)],
        })
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Bytes of all files together.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.bytes as u64).sum()
    }

    /// Number of values.
    pub fn parameters(&self) -> u64 {
        self.tensors
            .values()
            .map(|t| t.shape.iter().product::<usize>() as u64)
            .sum()
    }

    fn compare(&self, expected: &[ExpectedTensor], faults: &mut Vec<Fault>) {
        let default_file = self.files.first().map(|f| short_name(&f.0)).unwrap_or_default();
        let mut left: std::collections::BTreeSet<&str> = self.tensors.keys().map(String::as_str).collect();
        let mut push = |kind, file: &str, key: &str, what: String| {
            faults.push(Fault {
                kind,
                pointer: format!("/{file}/{key}"),
                detail: format!("{file}: {key} {what}"),
            });
        };
        for want in expected {
            left.remove(want.key.as_str());
            let Some(stored) = self.tensors.get(&want.key) else {
                push(
                    FaultKind::Missing,
                    &default_file,
                    &want.key,
                    format!("is missing; expected shape {:?}", want.shape),
                );
                continue;
            };
            let file = short_name(&self.files[stored.file].0);
            if !same_shape(&stored.shape, &want.shape) {
                push(
                    FaultKind::Shape,
                    &file,
                    &want.key,
                    format!("has shape {:?}; expected {:?}", stored.shape, want.shape),
                );
            } else if width(&stored.dtype).is_none() {
                push(
                    FaultKind::Dtype,
                    &file,
                    &want.key,
                    format!("is of type {}; supported: F16, BF16, F32", stored.dtype),
                );
            }
        }
        for key in left {
            let file = short_name(&self.files[self.tensors[key].file].0);
            push(
                FaultKind::Unexpected,
                &file,
                key,
                "is not part of a model with this config".into(),
            );
        }
    }

    fn read(&self, stored: &StoredTensor) -> std::io::Result<Vec<f32>> {
        let mut bytes = vec![0_u8; stored.bytes];
        self.files[stored.file].1.read_exact_at(&mut bytes, stored.begin)?;
        let halves = || bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]]));
        Ok(match stored.dtype.as_str() {
            "F16" => {
                let half: Vec<half::f16> = halves().map(half::f16::from_bits).collect();
                let mut out = vec![0.0; half.len()];
                half.convert_to_f32_slice(&mut out);
                out
            }
            "BF16" => halves().map(|h| half::bf16::from_bits(h).to_f32()).collect(),
            _ => bytes
                .chunks_exact(4)
                .map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]))
                .collect(),
        })
    }
}

impl TensorSource for WeightFiles {
    fn tensor(&self, key: &str, shape: &[usize], device: &Device) -> candle_core::Result<Tensor> {
        let Some(stored) = self.tensors.get(key) else {
            candle_core::bail!("tensor {key} is missing; expected shape {shape:?}");
        };
        let path = &self.files[stored.file].0;
        if !same_shape(&stored.shape, shape) {
            candle_core::bail!(
                "{}: {key} has shape {:?}; expected {shape:?}",
                short_name(path),
                stored.shape
            );
        }
        if width(&stored.dtype).is_none() {
            candle_core::bail!("{}: {key} is of type {}", short_name(path), stored.dtype);
        }
        let values = self.read(stored)?;
        Tensor::from_vec(values, shape, &Device::Cpu)?
            .to_device(device)?
            .to_dtype(DType::F32)
    }
}

/// Equal, or a linear weight stored as a 1x1 convolution (old VAE attention).
fn same_shape(found: &[usize], expected: &[usize]) -> bool {
    found == expected || (expected.len() == 2 && found.len() == 4 && found[..2] == *expected && found[2..] == [1, 1])
}

fn width(dtype: &str) -> Option<u64> {
    match dtype {
        "F16" | "BF16" => Some(2),
        "F32" => Some(4),
        _ => None,
    }
}

fn unreadable(path: &Path, what: &str) -> Problem {
    Problem::new(
        "base_model.unreadable_file",
        "A weight file of the base model cannot be read",
        format!("{}: {what}", short_name(path)),
    )
    .with_hint("Is the download complete?")
}

/// The files of one part, in order of preference: full precision first, single before sharded.
fn find_files(folder: &Path, stem: &str) -> Result<Vec<PathBuf>, Problem> {
    for variant in ["", ".fp16"] {
        let single = folder.join(format!("{stem}{variant}.safetensors"));
        if single.is_file() {
            return Ok(vec![single]);
        }
        for index in [
            format!("{stem}.safetensors.index{variant}.json"),
            format!("{stem}{variant}.safetensors.index.json"),
        ] {
            let index = folder.join(index);
            if index.is_file() {
                return shards(folder, &index);
            }
        }
    }
    let name = short_name(&folder.join(format!("{stem}.safetensors")));
    let pickle = ["bin", "ckpt", "pt", "pth"].iter().find(|ext| {
        std::fs::read_dir(folder).is_ok_and(|entries| {
            entries
                .flatten()
                .any(|e| e.path().extension().is_some_and(|found| found == **ext))
        })
    });
    Err(match pickle {
        Some(ext) => Problem::new(
            "base_model.pickle",
            "The base model has only Python pickles",
            format!("{name} is missing, and a .{ext} file is there instead; pickles can run code and are never opened"),
        )
        .with_hint("Get the safetensors version of this model, or convert it with diffusers: pipe.save_pretrained(dir, safe_serialization=True)."),
        None => Problem::new(
            "base_model.missing_file",
            "A file of the base model is missing",
            format!("{name} is missing"),
        )
        .with_hint("Looked for fp32 and fp16 safetensors, single and sharded."),
    })
}

fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, Problem> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(|e| unreadable(index, &e.to_string()))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| unreadable(index, &format!("is not an index: {e}")))?;
    let mut names: Vec<&String> = parsed.weight_map.values().collect();
    names.sort();
    names.dedup();
    names
        .into_iter()
        .map(|name| {
            // The index is foreign data: it may name files of its own folder only.
            if name.contains(['/', '\\']) || !name.ends_with(".safetensors") {
                return Err(unreadable(
                    index,
                    &format!("names {name:?}, which is not a safetensors file beside it"),
                ));
            }
            let path = folder.join(name);
            if path.is_file() {
                Ok(path)
            } else {
                Err(unreadable(index, &format!("names {name}, which is missing")))
            }
        })
        .collect()
}

fn read_header(path: &Path, file: &File, file_index: usize) -> Result<Vec<(String, StoredTensor)>, Problem> {
    #[derive(Deserialize)]
    struct Entry {
        dtype: String,
        shape: Vec<usize>,
        data_offsets: [u64; 2],
    }
    let bad = |what: &str| unreadable(path, what);
    let file_bytes = file.metadata().map_err(|e| bad(&e.to_string()))?.len();
    let mut length = [0_u8; 8];
    file.read_exact_at(&mut length, 0)
        .map_err(|_| bad("is shorter than a safetensors header"))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES || header_bytes + 8 > file_bytes {
        return Err(bad(&format!(
            "claims a header of {header_bytes} bytes in a file of {file_bytes} bytes"
        )));
    }
    let data = 8 + header_bytes;
    let header_len = usize::try_from(header_bytes).map_err(|_| bad("has too long a header"))?;
    let mut header = vec![0_u8; header_len];
    file.read_exact_at(&mut header, 8).map_err(|e| bad(&e.to_string()))?;
    let mut entries: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|e| bad(&format!("has a header that is not a JSON object: {e}")))?;
    entries.remove("__metadata__");
    let mut out = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        let entry: Entry =
            serde_json::from_value(value).map_err(|e| bad(&format!("has a malformed entry {key}: {e}")))?;
        let [begin, end] = entry.data_offsets;
        if begin > end || end > file_bytes - data {
            return Err(bad(&format!(
                "has {key} at bytes {begin} to {end}, but holds {} bytes of data",
                file_bytes - data
            )));
        }
        let elements = entry
            .shape
            .iter()
            .try_fold(1_u64, |n, &d| n.checked_mul(u64::try_from(d).ok()?));
        let needed = elements.and_then(|n| n.checked_mul(width(&entry.dtype).unwrap_or(1)));
        if width(&entry.dtype).is_some() && needed != Some(end - begin) {
            return Err(bad(&format!(
                "has {key} of type {} and shape {:?} in {} bytes",
                entry.dtype,
                entry.shape,
                end - begin
            )));
        }
        let stored = StoredTensor {
            file: file_index,
            dtype: entry.dtype,
            shape: entry.shape,
            begin: data + begin,
            bytes: usize::try_from(end - begin).map_err(|_| bad("is too large"))?,
        };
        out.push((key, stored));
    }
    Ok(out)
}
