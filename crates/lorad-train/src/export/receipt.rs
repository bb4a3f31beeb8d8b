//! The proof that goes with the results: each file is read back from disk by its own format's rules, ΔW of every module
//! is rebuilt from it, and compared with the adapter that was trained.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{Cursor, Read},
    path::Path,
};

use lorad_proto::{event::ResultFile, problem::Problem};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use zip::ZipArchive;

use super::{
    adapter::{HostAdapter, relative_error},
    formats::{self, PeftPart, Rebuilt},
    merged::{self, Merged},
    tensors::TensorFile,
    zip_error,
};
use crate::{Result, TrainError};

/// f32 storage of B times a scale: rounding of one product. More is a wrong file.
const MAX_RELATIVE_ERROR: f64 = 1e-6;

/// What reading one file back showed.
#[derive(Debug)]
pub(super) struct Check {
    file: ResultFile,
    keys: Vec<String>,
    n_modules: usize,
    max_relative_error: f64,
    extra: Value,
}

pub(super) fn check_diffusers(dir: &Path, file: &ResultFile, adapter: &HostAdapter) -> Result<Check> {
    let stored = read(dir, file)?;
    let found = formats::read_diffusers(&stored);
    compare(file, &stored, &found, adapter, str::to_owned, 2)
}

pub(super) fn check_kohya(dir: &Path, file: &ResultFile, adapter: &HostAdapter) -> Result<Check> {
    let stored = read(dir, file)?;
    let found = formats::read_kohya(&stored);
    compare(file, &stored, &found, adapter, formats::kohya_name, 3)
}

pub(super) fn check_peft(dir: &Path, file: &ResultFile, adapter: &HostAdapter) -> Result<Check> {
    let path = dir.join(&file.name);
    let bytes = fs::read(&path).map_err(TrainError::io("read", &path))?;
    let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(zip_error(&path))?;
    let mut entry = |name: &str| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        zip.by_name(name)
            .map_err(zip_error(&path))?
            .read_to_end(&mut bytes)
            .map_err(TrainError::io("read", &path))?;
        Ok(bytes)
    };
    let (mut keys, mut worst) = (Vec::new(), 0.0_f64);
    for PeftPart { folder, root, adapter } in formats::peft_parts(adapter) {
        let config: Value = serde_json::from_slice(&entry(&format!("{folder}adapter_config.json"))?)
            .map_err(|e| wrong(file, &format!("{folder}adapter_config.json: {e}")))?;
        let stored = TensorFile::from_bytes(&file.name, &entry(&format!("{folder}adapter_model.safetensors"))?)?;
        let found = formats::read_peft(&stored, &config, root);
        let check = compare(file, &stored, &found, &adapter, str::to_owned, 2)?;
        keys.extend(check.keys.into_iter().map(|key| format!("{folder}{key}")));
        worst = worst.max(check.max_relative_error);
    }
    Ok(Check {
        file: file.clone(),
        keys,
        // Every module lies in at least one folder, and each folder was compared as a whole.
        n_modules: adapter.modules.len(),
        max_relative_error: worst,
        extra: json!({}),
    })
}

/// Every entry of the merged archive reads back (its checksum holds), and adapted weights are the base's plus ΔW, but for one
/// rounding to their dtype.
pub(super) fn check_merged(path: &Path, file: &ResultFile, merged: &Merged, adapter: &HostAdapter) -> Result<Check> {
    let archive = File::open(path).map_err(TrainError::io("read", path))?;
    let mut zip = ZipArchive::new(archive).map_err(zip_error(path))?;
    let mut keys = Vec::new();
    let mut modules = BTreeSet::new();
    let mut worst = 0.0_f64;
    for i in 0..zip.len() {
        let entry = zip.by_index(i).map_err(zip_error(path))?;
        let name = entry.name().map_err(zip_error(path))?.into_owned();
        let mut entry = Hashing {
            inner: entry,
            hasher: Sha256::new(),
        };
        let weights = merged.entries.get(&name);
        if let Some(weights) = weights {
            let found = merged::reread(&name, &mut entry, &weights.base, adapter)?;
            worst = worst.max(found.worst);
            modules.extend(found.modules);
        }
        // To the end: only there does the archive check its own sum.
        std::io::copy(&mut entry, &mut std::io::sink()).map_err(TrainError::io("read", path))?;
        if weights.is_some_and(|weights| hex::encode(entry.hasher.finalize()) != weights.sha256) {
            return Err(wrong(file, &format!("{name} differs from what was written")).into());
        }
        keys.push(name);
    }
    if let Some(lost) = merged.entries.keys().find(|name| !keys.contains(name)) {
        return Err(wrong(file, &format!("{lost} is missing")).into());
    }
    if let Some(lost) = adapter.modules.keys().find(|module| !modules.contains(*module)) {
        return Err(wrong(file, &format!("module {lost} is missing")).into());
    }
    Ok(Check {
        file: file.clone(),
        keys,
        n_modules: modules.len(),
        max_relative_error: worst,
        extra: json!({"compared": "the merged weight, stored as the base's dtype", "dtypes": merged.dtypes}),
    })
}

/// Hashes what is read through it.
struct Hashing<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}

/// `receipt.json`.
pub(super) fn document(adapter: &HostAdapter, steps: u64, checks: &[Check]) -> Value {
    let left_out = adapter
        .is_dora()
        .then(|| json!({"kind": "kohya", "reason": super::NO_KOHYA_DORA}));
    json!({
        "version": 1, "left_out": left_out.into_iter().collect::<Vec<_>>(),
        "adapter": {
            "steps": steps, "rank": adapter.rank, "alpha": formats::number(adapter.alpha),
            "modules": adapter.modules.keys().collect::<Vec<_>>(),
        },
        "max_relative_error_allowed": MAX_RELATIVE_ERROR,
        "files": checks.iter().map(|c| {
            let mut entry = json!({
                "name": c.file.name, "kind": c.file.kind, "bytes": c.file.bytes, "sha256": c.file.sha256,
                "modules_matched": c.n_modules, "max_relative_error": c.max_relative_error, "keys": c.keys,
            });
            if let (Value::Object(entry), Value::Object(extra)) = (&mut entry, &c.extra) {
                entry.extend(extra.clone());
            }
            entry
        }).collect::<Vec<_>>(),
    })
}

fn read(dir: &Path, file: &ResultFile) -> Result<TensorFile> {
    let path = dir.join(&file.name);
    let bytes = fs::read(&path).map_err(TrainError::io("read", &path))?;
    TensorFile::from_bytes(&file.name, &bytes)
}

/// Compares ΔW module by module. `name` is how this format calls a module; `tensors_per_module` how many keys it has besides
/// magnitudes.
fn compare(
    file: &ResultFile,
    stored: &TensorFile,
    found: &BTreeMap<String, Rebuilt<'_>>,
    adapter: &HostAdapter,
    name: impl Fn(&str) -> String,
    tensors_per_module: usize,
) -> Result<Check> {
    let expected: BTreeSet<String> = adapter.modules.keys().map(|m| name(m)).collect();
    let found_names: BTreeSet<String> = found.keys().cloned().collect();
    if expected.len() != adapter.modules.len() {
        return Err(wrong(file, "two modules share one name in this format").into());
    }
    if let Some(lost) = expected.difference(&found_names).next() {
        return Err(wrong(file, &format!("module {lost} is missing")).into());
    }
    if let Some(foreign) = found_names.difference(&expected).next() {
        return Err(wrong(file, &format!("module {foreign} is not part of the adapter")).into());
    }
    let magnitudes = adapter.modules.values().filter(|f| f.magnitude.is_some()).count();
    if stored.tensors.len() != tensors_per_module * adapter.modules.len() + magnitudes {
        return Err(wrong(file, &format!("it holds {} tensors", stored.tensors.len())).into());
    }
    let mut worst = 0.0_f64;
    for (module, factors) in &adapter.modules {
        let rebuilt = &found[&name(module)];
        if rebuilt.magnitude != factors.magnitude.as_ref() {
            return Err(wrong(file, &format!("the magnitudes of {module} differ")).into());
        }
        let error = relative_error(&rebuilt.delta(), &factors.delta());
        // Infinite where a value is not a number.
        if error > MAX_RELATIVE_ERROR {
            return Err(wrong(file, &format!("ΔW of {module} differs by {error:.1e} relative")).into());
        }
        worst = worst.max(error);
    }
    Ok(Check {
        file: file.clone(),
        keys: stored.tensors.keys().cloned().collect(),
        n_modules: adapter.modules.len(),
        max_relative_error: worst,
        extra: json!({}),
    })
}

fn wrong(file: &ResultFile, what: &str) -> Problem {
    Problem::new(
        "export.mismatch",
        "A result file does not hold the adapter that was trained",
        format!("{}: {what}.", file.name),
    )
    .with_hint("This is a bug in lorad; the file must not be used. The newest checkpoint holds the adapter.")
}
