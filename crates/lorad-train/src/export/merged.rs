//! The base pipeline with the adapter merged into the models that it adapts, as a zip of a diffusers folder that loads by itself.
//!
//! Streams: one tensor is in memory at a time. Every file of the base is copied byte for byte, except the weights
//! of these models, whose adapted tensors become `W + ΔW`, summed in f64 and rounded once to the dtype they had.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use lorad_proto::problem::Problem;
use serde_json::{Map, Value};
use walkdir::WalkDir;
use zip::ZipWriter;

use super::{
    adapter::{Factors, HostAdapter, relative_error},
    zip_error, zip_options,
};
use crate::{Result, TrainError};

/// What was merged: for the receipt.
#[derive(Debug, Default)]
pub(super) struct Merged {
    /// Adapted modules.
    pub(super) modules: BTreeSet<String>,
    /// The archive's entries with weights of adapted models.
    pub(super) entries: BTreeMap<String, Entry>,
    /// Dtypes of merged tensors.
    pub(super) dtypes: BTreeSet<String>,
}

/// An archive entry with weights of an adapted model.
#[derive(Debug)]
pub(super) struct Entry {
    /// The base's file that it was made from.
    pub(super) base: PathBuf,
    /// SHA-256 of all its bytes, as computed while writing.
    pub(super) sha256: String,
}

/// What reading merged weights back showed.
#[derive(Debug, Default)]
pub(super) struct Reread {
    /// Adapted modules whose weight was found.
    pub(super) modules: BTreeSet<String>,
    /// Largest difference to `W + ΔW` over the largest such value, of any module.
    pub(super) worst: f64,
}

/// Writes the archive.
///
/// # Errors
/// A base that changed since the job began (a module without its weight), or files that cannot be read or written.
pub(super) fn write(out: &mut File, base: &Path, adapter: &HostAdapter) -> Result<Merged> {
    let mut zip = ZipWriter::new(BufWriter::new(out));
    let mut merged = Merged::default();
    for (from, name) in pipeline_files(base)? {
        zip.start_file(name.as_str(), zip_options()).map_err(zip_error(&from))?;
        let folder = name.split_once('/').map_or("", |(folder, _)| folder);
        if adapts(adapter, folder) && name.ends_with(".safetensors") {
            let sha256 = merge_weights(&from, folder, &mut zip, adapter, &mut merged)?;
            merged.entries.insert(name, Entry { base: from, sha256 });
        } else if name.ends_with(".index.json") {
            let text = fs::read_to_string(&from).map_err(TrainError::io("read", &from))?;
            zip.write_all(plain_name(&text).as_bytes())
                .map_err(TrainError::io("pack", &from))?;
        } else {
            let mut file = File::open(&from).map_err(TrainError::io("read", &from))?;
            std::io::copy(&mut file, &mut zip).map_err(TrainError::io("pack", &from))?;
        }
    }
    let missing: Vec<&String> = adapter
        .modules
        .keys()
        .filter(|m| !merged.modules.contains(*m))
        .collect();
    if let Some(first) = missing.first() {
        return Err(Problem::new(
            "export.base_changed",
            "The base model changed while the job ran",
            format!(
                "{} modules have no weight in {} any more, among them {first}.",
                missing.len(),
                base.display()
            ),
        )
        .into());
    }
    let mut buffer = zip.finish().map_err(zip_error(base))?;
    buffer.flush().map_err(TrainError::io("write", base))?;
    Ok(merged)
}

/// Names without the `fp16` variant: a folder that holds only that variant then loads without being told so.
fn plain_name(name: &str) -> String {
    name.replace(".fp16", "")
}

/// Files of the pipeline with their names in the archive, sorted. Left out: pickles, single-file checkpoints at the top,
/// hidden files, and a variant beside the full weights.
fn pipeline_files(base: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut files = BTreeMap::new();
    for entry in WalkDir::new(base).sort_by_file_name() {
        let entry = entry.map_err(|e| TrainError::io("list", base)(e.into()))?;
        if !entry.path().is_file() {
            continue;
        }
        let Ok(relative) = entry.path().strip_prefix(base) else {
            continue;
        };
        let Some(name) = relative.to_str().map(|n| n.replace('\\', "/")) else {
            continue;
        };
        let hidden = name.split('/').any(|part| part.starts_with('.'));
        let pickle = [".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5"]
            .iter()
            .any(|ext| name.ends_with(ext));
        let top_weights = !name.contains('/') && name.ends_with(".safetensors");
        if hidden || pickle || top_weights {
            continue;
        }
        let plain = plain_name(&name);
        // The full weights win over the variant, whichever comes first.
        if plain == name || !files.contains_key(&plain) && !base.join(&plain).is_file() {
            files.insert(plain, entry.path().to_owned());
        }
    }
    Ok(files.into_iter().map(|(name, path)| (path, name)).collect())
}

struct Stored {
    key: String,
    dtype: String,
    begin: u64,
    bytes: usize,
}

/// Whether the model in `folder` has adapters.
fn adapts(adapter: &HostAdapter, folder: &str) -> bool {
    adapter.modules.keys().any(|m| m.split('.').next() == Some(folder))
}

/// The adapted module whose weight `key` is, in a file of `folder`.
fn adapted<'a>(adapter: &'a HostAdapter, folder: &str, key: &str) -> Option<(&'a String, &'a Factors)> {
    let module = key.strip_suffix(".weight")?;
    let found = adapter.modules.get_key_value(&format!("{folder}.{module}"));
    // Text encoders saved by transformers 5 leave this out.
    found.or_else(|| adapter.modules.get_key_value(&format!("{folder}.text_model.{module}")))
}

/// Copies one safetensors file of `folder` tensor by tensor, merging. Returns the SHA-256 of what was written, header included.
fn merge_weights(
    from: &Path,
    folder: &str,
    out: &mut impl Write,
    adapter: &HostAdapter,
    merged: &mut Merged,
) -> Result<String> {
    use sha2::Digest;
    let mut file = BufReader::new(File::open(from).map_err(TrainError::io("read", from))?);
    let mut hasher = sha2::Sha256::new();
    let (header, tensors) = read_header(from, &mut file)?;
    let mut write = |bytes: &[u8]| {
        hasher.update(bytes);
        out.write_all(bytes).map_err(TrainError::io("pack", from))
    };
    write(&header)?;
    let mut position = 0;
    for stored in tensors {
        if stored.begin != position {
            return Err(unreadable(from, &format!("{} does not follow the tensor before it", stored.key)).into());
        }
        position += stored.bytes as u64;
        let mut bytes = vec![0; stored.bytes];
        file.read_exact(&mut bytes).map_err(TrainError::io("read", from))?;
        if let Some((module, factors)) = adapted(adapter, folder, &stored.key) {
            let changed = factors.merged(&decode(&bytes, &stored.dtype)).ok_or_else(|| {
                let what = "has another type or shape than when the job began";
                unreadable(from, &format!("{} ({}) {what}", stored.key, stored.dtype))
            })?;
            encode(&mut bytes, &stored.dtype, &changed);
            merged.modules.insert(module.clone());
            merged.dtypes.insert(stored.dtype);
        }
        write(&bytes)?;
    }
    Ok(hex::encode(hasher.finalize()))
}

/// Reads merged weights beside the base's, tensor by tensor: `W' - W` against ΔW, as a user of the file would see it.
///
/// # Errors
/// A value that differs from `W + ΔW` by more than its dtype's rounding, a tensor that should be a copy and is not, or a
/// file that cannot be read.
pub(super) fn reread(name: &str, entry: &mut impl Read, base: &Path, adapter: &HostAdapter) -> Result<Reread> {
    let entry_path = Path::new(name);
    let mut base_file = BufReader::new(File::open(base).map_err(TrainError::io("read", base))?);
    let (_, base_tensors) = read_header(base, &mut base_file)?;
    let (_, tensors) = read_header(entry_path, entry)?;
    let keys = |tensors: &[Stored]| -> Vec<String> { tensors.iter().map(|t| t.key.clone()).collect() };
    if keys(&tensors) != keys(&base_tensors) {
        return Err(differs(name, "its tensors are not the base's").into());
    }
    let folder = name.split_once('/').map_or("", |(folder, _)| folder);
    let mut found = Reread::default();
    for (stored, original) in tensors.iter().zip(&base_tensors) {
        let (mut after, mut before) = (vec![0; stored.bytes], vec![0; original.bytes]);
        entry
            .read_exact(&mut after)
            .map_err(TrainError::io("read", entry_path))?;
        base_file
            .read_exact(&mut before)
            .map_err(TrainError::io("read", base))?;
        let Some((module, factors)) = adapted(adapter, folder, &stored.key) else {
            if after != before {
                return Err(differs(name, &format!("{} has no adapter and changed", stored.key)).into());
            }
            continue;
        };
        let (after, before) = (decode(&after, &stored.dtype), decode(&before, &original.dtype));
        let expected = factors.merged(&before).unwrap_or_default();
        let error = relative_error(&after, &expected);
        if error > rounding(&stored.dtype) {
            return Err(differs(name, &format!("{} differs from W + ΔW by {error:.1e}", stored.key)).into());
        }
        found.worst = found.worst.max(error);
        found.modules.insert(module.clone());
    }
    Ok(found)
}

/// Half the distance between neighbouring values of a float type, relative.
fn rounding(dtype: &str) -> f64 {
    match dtype {
        "F16" => 2.0_f64.powi(-11),
        "BF16" => 2.0_f64.powi(-8),
        _ => 2.0_f64.powi(-24),
    }
}

/// The values behind `bytes`; empty for a type that is no float type here.
fn decode(bytes: &[u8], dtype: &str) -> Vec<f64> {
    match dtype {
        "F16" => bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f64())
            .collect(),
        "BF16" => bytes
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64())
            .collect(),
        "F32" => bytes
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect(),
        _ => Vec::new(),
    }
}

fn differs(name: &str, what: &str) -> Problem {
    Problem::new(
        "export.mismatch",
        "A result file does not hold the adapter that was trained",
        format!("{name}: {what}."),
    )
    .with_hint("This is a bug in lorad, or the base model changed while the job ran; the file must not be used.")
}

/// Puts `values` in the place of those behind `bytes`, each rounded once. The inverse of [`decode`].
fn encode(bytes: &mut [u8], dtype: &str, values: &[f64]) {
    let width = if dtype == "F32" { 4 } else { 2 };
    for (place, &value) in bytes.chunks_exact_mut(width).zip(values) {
        match dtype {
            "F16" => place.copy_from_slice(&f16::from_f64(value).to_le_bytes()),
            "BF16" => place.copy_from_slice(&bf16::from_f64(value).to_le_bytes()),
            _ => place.copy_from_slice(&(value as f32).to_le_bytes()),
        }
    }
}

/// The header's raw bytes (length included) and its tensors in order of offset.
fn read_header(path: &Path, file: &mut impl Read) -> Result<(Vec<u8>, Vec<Stored>)> {
    let mut raw = vec![0; 8];
    file.read_exact(&mut raw).map_err(TrainError::io("read", path))?;
    let mut length = [0; 8];
    length.copy_from_slice(&raw);
    let length = u64::from_le_bytes(length);
    if length > 100_000_000 {
        return Err(unreadable(path, "its header is longer than the format allows").into());
    }
    let mut json = vec![0; length as usize];
    file.read_exact(&mut json).map_err(TrainError::io("read", path))?;
    let header: Map<String, Value> = serde_json::from_slice(&json).map_err(|e| unreadable(path, &e.to_string()))?;
    let mut tensors = Vec::new();
    for (key, entry) in header.iter().filter(|(key, _)| *key != "__metadata__") {
        let parsed = || -> Option<Stored> {
            let offset = |i: usize| entry["data_offsets"][i].as_u64();
            Some(Stored {
                key: key.clone(),
                dtype: entry["dtype"].as_str()?.to_owned(),
                begin: offset(0)?,
                bytes: usize::try_from(offset(1)?.checked_sub(offset(0)?)?).ok()?,
            })
        };
        tensors.push(parsed().ok_or_else(|| unreadable(path, &format!("the header's entry {key} is not valid")))?);
    }
    tensors.sort_by_key(|t| t.begin);
    raw.extend_from_slice(&json);
    Ok((raw, tensors))
}

fn unreadable(path: &Path, what: &str) -> Problem {
    Problem::new(
        "base_model.unreadable_file",
        "A weight file of the base model cannot be read",
        format!("{}: {what}", path.display()),
    )
    .with_hint("Is the download complete, and unchanged since the job began?")
}
