//! Result files of a job: the adapter in three formats, the merged pipeline on request, the resolved configuration, and
//! a receipt that says each file was read back from disk and gives the adapter that was trained.
//!
//! Knows no family: what it must know of the base is in [`BaseTraits`]. Called by the families' `Task::export`.

mod adapter;
mod formats;
mod merged;
mod metadata;
pub mod read;
mod receipt;
mod tensors;

use std::{
    fs::{self, File},
    io::{Cursor, Write},
    path::{Path, PathBuf},
};

use lorad_proto::{
    event::{ResultFile, ResultKind},
    spec::file_stem,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use self::{adapter::HostAdapter, formats::PeftPart};
use crate::{Result, TrainError, lora::AdapterSet, task::ExportContext};

/// The diffusers file; the name that `load_lora_weights(folder)` looks for.
pub const DIFFUSERS_FILE: &str = "pytorch_lora_weights.safetensors";
/// The merged pipeline.
pub const MERGED_FILE: &str = "fine_tuned_model.zip";
/// What was read back.
pub const RECEIPT_FILE: &str = "receipt.json";
/// The resolved configuration.
pub const CONFIG_FILE: &str = "job.json";

/// Why a DoRA adapter gets no kohya file.
///
/// # Source
/// ComfyUI `comfy/weight_adapter/base.py` (`weight_decompose`) divides by `‖W‖`, LyCORIS `modules/locon.py` by `‖W + ΔW‖`.
pub const NO_KOHYA_DORA: &str =
    "its readers disagree about what DoRA's magnitudes are relative to, so each file would be wrong in some of them";

/// What the exporters must know of the base model.
#[derive(Debug, Clone)]
pub struct BaseTraits {
    /// Its folder; read again for the merged pipeline.
    pub dir: PathBuf,
    /// Whether it is of the 2.x line (wider text encoder), which tools keep apart from 1.x.
    pub is_v2: bool,
    /// Whether it predicts velocity.
    pub v_prediction: bool,
    /// Side of the training pictures, pixels.
    pub resolution: u32,
    /// Number of training items.
    pub n_items: usize,
}

impl BaseTraits {
    /// `ss_base_model_version`.
    ///
    /// # Source
    /// kohya-ss/sd-scripts `library/train_util.py` (`get_model_version_str_for_sd1_sd2`).
    fn kohya_version(&self) -> String {
        let version = if self.is_v2 { "sd_v2" } else { "sd_v1" };
        format!("{version}{}", if self.v_prediction { "_v" } else { "" })
    }

    /// `modelspec.architecture`.
    ///
    /// # Source
    /// kohya-ss/sd-scripts `library/sai_model_spec.py` (`ARCH_SD_V1`, `ARCH_SD_V2_512`, `ARCH_SD_V2_768_V`).
    fn modelspec_architecture(&self) -> String {
        let architecture = match (self.is_v2, self.v_prediction) {
            (false, _) => "stable-diffusion-v1",
            (true, false) => "stable-diffusion-v2-512",
            (true, true) => "stable-diffusion-v2-768-v",
        };
        format!("{architecture}/lora")
    }
}

/// One export.
#[derive(Debug)]
pub struct ExportJob<'a> {
    /// The adapter as it is now.
    pub adapters: &'a AdapterSet,
    /// The job.
    pub context: &'a ExportContext<'a>,
    /// The base.
    pub base: BaseTraits,
}

/// Writes every result file under `dir`, reads each back, compares, and writes the receipt last.
///
/// Files written before, under the same names, are replaced one by one (temporary name, fsync, rename).
///
/// # Errors
/// An adapter with values that are not numbers; a file that cannot be written or does not read back as it was meant. Then
/// no receipt is written.
pub fn write_results(dir: &Path, job: &ExportJob<'_>) -> Result<Vec<ResultFile>> {
    let spec = job.context.spec;
    let adapter = HostAdapter::copy(job.adapters)?;
    let stem = file_stem(&spec.job_name);
    fs::create_dir_all(dir).map_err(TrainError::io("create", dir))?;
    let mut written = Vec::new();
    let mut checks = Vec::new();

    let file = write_file(
        dir,
        DIFFUSERS_FILE,
        ResultKind::Diffusers,
        &formats::diffusers(&adapter).to_bytes(),
    )?;
    checks.push(receipt::check_diffusers(dir, &file, &adapter)?);
    written.push(file);

    if !adapter.is_dora() {
        let mut kohya = formats::kohya(&adapter, metadata::kohya(&adapter, &job.base, job.context));
        let data = kohya.data();
        metadata::with_hashes(&mut kohya.metadata, &data);
        let file = write_file(
            dir,
            &format!("{stem}-kohya.safetensors"),
            ResultKind::Kohya,
            &kohya.to_bytes(),
        )?;
        checks.push(receipt::check_kohya(dir, &file, &adapter)?);
        written.push(file);
    }

    let file = write_file(
        dir,
        &format!("{stem}-peft.zip"),
        ResultKind::Peft,
        &peft_zip(&adapter, job)?,
    )?;
    checks.push(receipt::check_peft(dir, &file, &adapter)?);
    written.push(file);

    if spec.export.merged_pipeline {
        let path = dir.join(MERGED_FILE);
        let merged = replace_file(&path, |file| merged::write(file, &job.base.dir, &adapter))?;
        let file = describe(dir, MERGED_FILE, ResultKind::Merged)?;
        checks.push(receipt::check_merged(&path, &file, &merged, &adapter)?);
        written.push(file);
    }

    written.push(write_file(
        dir,
        CONFIG_FILE,
        ResultKind::Config,
        &json_bytes(&config(job)),
    )?);
    let receipt = receipt::document(&adapter, job.context.steps, &checks);
    written.push(write_file(
        dir,
        RECEIPT_FILE,
        ResultKind::Receipt,
        &json_bytes(&receipt),
    )?);
    Ok(written)
}

/// The job as it was resolved, without paths of this machine.
fn config(job: &ExportJob<'_>) -> Value {
    let spec = job.context.spec;
    json!({
        "job_id": spec.job_id, "name": spec.job_name, "family": spec.family, "base_model": spec.base_model.id,
        "dataset_id": spec.dataset.id, "hyperparameters": spec.hyperparameters, "sampling": spec.sampling,
        "export": spec.export, "device": spec.device, "steps": job.context.steps, "epoch": job.context.epoch,
        "init_adapter": spec.init_adapter.as_ref().and_then(|file| file.file_name()?.to_str()),
        "started_at_ms": job.context.started_at_ms, "lorad_version": env!("CARGO_PKG_VERSION"),
    })
}

fn json_bytes(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// A PEFT folder for each adapted model; see [`formats::peft_parts`].
fn peft_zip(adapter: &HostAdapter, job: &ExportJob<'_>) -> Result<Vec<u8>> {
    let spec = job.context.spec;
    let init = match spec.hyperparameters.get("init_lora_weights") {
        Some(Value::String(name)) if name == "gaussian" => json!("gaussian"),
        // PEFT's name for Kaiming is `true`.
        Some(Value::String(_)) => json!(true),
        _ => json!("gaussian"),
    };
    let dropout = spec.hyperparameters.get("lora_dropout").and_then(Value::as_f64);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for PeftPart { folder, adapter, .. } in &formats::peft_parts(adapter) {
        let config = formats::peft_config(adapter, &spec.base_model.id, &init, dropout.unwrap_or(0.0));
        for (name, bytes) in [
            ("adapter_config.json", json_bytes(&config)),
            ("adapter_model.safetensors", formats::peft(adapter).to_bytes()),
        ] {
            let name = format!("{folder}{name}");
            zip.start_file(name.as_str(), zip_options())
                .map_err(zip_error(Path::new(&name)))?;
            zip.write_all(&bytes).map_err(TrainError::io("pack", name))?;
        }
    }
    let packed = zip.finish().map_err(zip_error(Path::new("adapter.zip")))?;
    Ok(packed.into_inner())
}

/// Stored, not deflated (weights do not shrink); a fixed date, so that the same adapter gives the same bytes.
fn zip_options() -> SimpleFileOptions {
    SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(zip::DateTime::default())
        .unix_permissions(0o644)
        .large_file(true)
}

fn zip_error(path: &Path) -> impl FnOnce(zip::result::ZipError) -> TrainError {
    let path = path.to_owned();
    move |e| TrainError::io("pack", path)(std::io::Error::other(e))
}

fn write_file(dir: &Path, name: &str, kind: ResultKind, bytes: &[u8]) -> Result<ResultFile> {
    let path = dir.join(name);
    replace_file(&path, |file| {
        file.write_all(bytes).map_err(TrainError::io("write", &path))
    })?;
    describe(dir, name, kind)
}

/// Writes under a temporary name, syncs, and renames: a reader sees the old file or the whole new one.
fn replace_file<T>(path: &Path, write: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    let tmp = path.with_extension("part");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&tmp)
        .map_err(TrainError::io("create", &tmp))?;
    let result = write(&mut file)?;
    file.sync_all().map_err(TrainError::io("sync", &tmp))?;
    fs::rename(&tmp, path).map_err(TrainError::io("rename", &tmp))?;
    Ok(result)
}

/// Size and hash of what is on disk, read back.
fn describe(dir: &Path, name: &str, kind: ResultKind) -> Result<ResultFile> {
    let path = dir.join(name);
    let mut file = File::open(&path).map_err(TrainError::io("read", &path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let n = std::io::Read::read(&mut file, &mut buffer).map_err(TrainError::io("read", &path))?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
    Ok(ResultFile {
        name: name.to_owned(),
        kind,
        bytes,
        sha256: hex::encode(hasher.finalize()),
    })
}

#[cfg(test)]
mod tests;
