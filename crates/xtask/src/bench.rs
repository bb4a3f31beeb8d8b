//! `cargo xtask bench`: a training step of lorad beside the reference's, same shapes, same machine, one after the other. Figures
//! for the README and for judging a change; no threshold, since machines differ.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{exec, provision};

/// Steps that only warm caches up.
const WARM_UP: usize = 5;
const STEPS: usize = 45;

/// Times both sides and prints a table.
///
/// # Errors
/// If either side cannot be run.
pub(crate) fn run(root: &Path) -> Result<()> {
    exec::must(&mut exec::cargo([
        "build",
        "--release",
        "--quiet",
        "--workspace",
        "--bin",
        "lorad",
    ]))?;
    let python = provision::oracle(root)?;
    println!(
        "{:<10} {:>14} {:>20} {:>8}",
        "shape", "lorad ms/step", "diffusers+PEFT ms", "ratio"
    );
    for batch in [8, 16] {
        let shape = format!("demo-b{batch}");
        let ours = lorad_ms(root, batch)?;
        let theirs = reference_ms(&python, &shape)?;
        println!("{shape:<10} {ours:>14.1} {theirs:>20.1} {:>8.2}", theirs / ours);
    }
    Ok(())
}

/// Median step of `lorad train` on the bundled base and data.
fn lorad_ms(root: &Path, batch: usize) -> Result<f64> {
    let out = exec::target_dir(root).join("bench");
    fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    let metrics = out.join("metrics.jsonl");
    let mut command = Command::new(exec::target_dir(root).join("release/lorad"));
    command
        .args([
            "train",
            "--base",
            "assets/demo-icons",
            "--data",
            "assets/silhouettes.zip",
            "--out",
        ])
        .arg(&out);
    command
        .arg("--metrics")
        .arg(&metrics)
        .args(["--set", &format!("batch_size={batch}")]);
    command.args(["--set", &format!("max_train_steps={STEPS}"), "--set", "lora_rank=8"]);
    exec::output(&mut command)?;
    let text = fs::read_to_string(&metrics).with_context(|| format!("read {}", metrics.display()))?;
    let steps = text.lines().map(|line| {
        Ok(serde_json::from_str::<Value>(line)?["step_ms"]
            .as_f64()
            .unwrap_or(f64::NAN))
    });
    let mut steps = steps.skip(WARM_UP).collect::<Result<Vec<_>>>()?;
    steps.sort_by(f64::total_cmp);
    steps.get(steps.len() / 2).copied().context("lorad reported no steps")
}

fn reference_ms(python: &Path, shape: &str) -> Result<f64> {
    let mut command = Command::new(python);
    command.args(["tools/reference/bench_step.py", "--shape", shape]);
    let text = exec::output(&mut command)?;
    let line = text.lines().last().context("the reference printed nothing")?;
    let figures: Value = serde_json::from_str(line).with_context(|| format!("read `{line}`"))?;
    figures["median_s"]
        .as_f64()
        .map(|s| s * 1000.0)
        .with_context(|| format!("no `median_s` in `{line}`"))
}
