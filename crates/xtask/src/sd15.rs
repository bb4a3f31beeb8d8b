//! `cargo xtask sd15`: one training step at Stable Diffusion 1.5's size, from a diffusers folder, from a checkpoint in one file,
//! and from the folder as a server downloads it from a hub at a pinned commit; of the UNet alone and of the text encoder too.
//! Weights are random, so only that it runs, that all bases give the same adapter, that the result files hold it, and what it
//! takes can be seen. Not part of `test`, but for its tiny form: it takes minutes and gigabytes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{exec, mirror::Mirror, provision, server::Server};

/// How large the models are.
pub(crate) struct Size {
    /// What `tools/reference/single_file.py` calls it.
    flag: &'static str,
    /// Side of the training picture, pixels.
    resolution: u32,
    /// Modules of the preset `attention` in the UNet.
    unet_modules: u64,
    /// Adapted modules of the text encoder.
    text_encoder_modules: u64,
}

impl Size {
    /// As Stable Diffusion 1.5.
    pub(crate) fn full(resolution: u32) -> Self {
        Self {
            flag: "--full",
            resolution,
            unet_modules: 128,
            text_encoder_modules: 48,
        }
    }

    /// As small as its layout allows, to try the command itself.
    pub(crate) fn tiny() -> Self {
        Self {
            flag: "--tiny",
            resolution: 64,
            unet_modules: 56,
            text_encoder_modules: 8,
        }
    }
}

/// The repository of the hub, and what the server calls the model.
const REPOSITORY: &str = "someone/sd15";
const MODEL: &str = "sd15";
/// Longest wait for the download.
const PATIENCE: Duration = Duration::from_secs(1800);

/// A folder that goes when the run ends, whatever the end is.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("lorad-sd15-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} could not be removed: {error}", self.0.display());
        }
    }
}

/// What one run took.
struct Figures {
    total_s: f64,
    step_s: f64,
    peak_bytes: f64,
    loss: f64,
}

/// Makes the bases, runs all, checks the result files and prints a table.
///
/// # Errors
/// If a part cannot be run, a downloaded file or a result file is not what it should be, or the bases give different adapters.
pub(crate) fn run(root: &Path, size: &Size) -> Result<()> {
    exec::build_all()?;
    let lorad = exec::target_dir(root).join("release/lorad");
    let python = provision::oracle(root)?;
    let scratch = Scratch::new()?;
    let bases = scratch.0.join("bases");
    let script = root.join("tools/reference/single_file.py");
    exec::must(Command::new(python).arg(script).arg(size.flag).arg(&bases))?;
    let data = scratch.0.join("data");
    fs::create_dir(&data)?;
    fs::copy(root.join("docs/img/job.png"), data.join("picture.png"))?;
    fs::write(data.join("picture.txt"), "a page with a curve")?;
    let downloaded = download(root, &bases.join("diffusers"), &scratch.0.join("server"))?;

    println!("| trained | base | whole run s | step s | peak GB | loss |");
    println!("|---|---|---|---|---|---|");
    for (trained, text_encoder) in [("UNet", false), ("UNet, text encoder", true)] {
        let mut adapters = Vec::new();
        for (kind, base) in [
            ("folder", bases.join("diffusers")),
            ("one file", bases.join("single/model.safetensors")),
            ("hub", downloaded.clone()),
        ] {
            let out = scratch.0.join("out");
            let mut command = Command::new(&lorad);
            command
                // Where the checkpoint in one file is taken in.
                .env("LORAD_STORAGE__DATA_DIR", scratch.0.join("data-dir"))
                .arg("train")
                .arg("--base")
                .arg(base)
                .arg("--data")
                .arg(&data)
                .arg("--out")
                .arg(&out)
                .args(["--set", "max_train_steps=1"])
                .args(["--set", &format!("resolution={}", size.resolution)])
                .args(["--set", &format!("train_text_encoder={text_encoder}")]);
            if kind == "folder" {
                command.arg("--merged-pipeline");
            }
            let figures = train(&mut command, &out)?;
            println!(
                "| {trained} | {kind} | {:.0} | {:.1} | {:.2} | {:.4} |",
                figures.total_s,
                figures.step_s,
                figures.peak_bytes / 1e9,
                figures.loss
            );
            let of_text_encoder = if text_encoder { size.text_encoder_modules } else { 0 };
            check_receipt(&out, size.unet_modules + of_text_encoder)?;
            adapters.push((kind, fs::read(out.join("pytorch_lora_weights.safetensors"))?));
            fs::remove_dir_all(&out)?;
        }
        for (kind, adapter) in &adapters[1..] {
            ensure!(
                *adapter == adapters[0].1,
                "{trained}: the base as {kind} gives another adapter than as {}",
                adapters[0].0
            );
        }
    }
    Ok(())
}

/// Lets a server on the data directory `data` download `folder` from a hub; where the model lies then.
fn download(root: &Path, folder: &Path, data: &Path) -> Result<PathBuf> {
    let mirror = Mirror::serve(folder, REPOSITORY)?;
    let settings = [
        ("LORAD_MODELS__HUB_ENDPOINT", mirror.url.as_str()),
        ("HF_TOKEN", ""),
        ("NO_PROXY", "127.0.0.1"),
    ];
    let server = Server::start(root, data, &settings)?;
    let begun = Instant::now();
    let pinned = mirror.pinned();
    server.ask("POST", "/models", Some(&json!({"hub_id": pinned, "id": MODEL})))?;
    let model = loop {
        let model = server.ask("GET", &format!("/models/{MODEL}"), None)?;
        if model["status"] != "downloading" {
            break model;
        }
        ensure!(begun.elapsed() < PATIENCE, "the download does not end: {model}");
        std::thread::sleep(Duration::from_millis(200));
    };
    let took = begun.elapsed();
    ensure!(model["status"] == "ready", "the download failed: {model}");
    ensure!(
        model["source"] == format!("hub:{pinned}"),
        "another commit than the pinned one: {model}"
    );
    ensure!(mirror.resumed() == 1, "a file that was cut off was not gone on with");
    let downloaded = data.join("models").join(MODEL);
    mirror.check(&downloaded)?;
    println!(
        "downloaded {pinned} in {:.0} s, checked there and here",
        took.as_secs_f64()
    );
    Ok(downloaded)
}

/// Runs `lorad train` to its end and watches its memory.
fn train(command: &mut Command, out: &Path) -> Result<Figures> {
    let metrics = out.with_extension("jsonl");
    let log = out.with_extension("log");
    let started = Instant::now();
    let mut child = command
        .arg("--metrics")
        .arg(&metrics)
        .envs([exec::AS_A_WORKER])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log)?)
        .spawn()
        .context("start lorad")?;
    let mut peak_bytes = 0.0_f64;
    let status = loop {
        peak_bytes = peak_bytes.max(peak_of(child.id()).unwrap_or(0.0));
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let total_s = started.elapsed().as_secs_f64();
    ensure!(status.success(), "lorad failed: {}", fs::read_to_string(&log)?);
    let line = fs::read_to_string(&metrics)?;
    let step: Value = serde_json::from_str(&line).with_context(|| format!("read the only step from `{line}`"))?;
    let number = |name: &str| step[name].as_f64().with_context(|| format!("no `{name}` in {step}"));
    Ok(Figures {
        total_s,
        step_s: number("step_ms")? / 1e3,
        peak_bytes,
        loss: number("loss")?,
    })
}

/// Greatest resident memory so far of a process, where the system tells it.
fn peak_of(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0)
}

/// Every adapter file was read back and holds every module.
fn check_receipt(out: &Path, modules: u64) -> Result<()> {
    let receipt: Value = serde_json::from_slice(&fs::read(out.join("receipt.json"))?)?;
    let files = receipt["files"].as_array().context("the receipt lists no files")?;
    ensure!(files.len() >= 3, "only {} files in the receipt", files.len());
    for file in files {
        ensure!(
            file["modules_matched"] == modules,
            "{}: {} modules of {modules}",
            file["name"],
            file["modules_matched"]
        );
    }
    Ok(())
}
