//! `cargo xtask estimate`: what `lorad train --dry-run` expects beside what the run then takes, for a handful of small
//! jobs. Prints a table for `docs/benchmarks.md`; no threshold, since a busy machine is no fault.

use std::{
    io::Write,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::exec;

/// Name and settings; each differs from the first in what decides memory or time.
const JOBS: [(&str, &[&str]); 7] = [
    ("batch 4", &["batch_size=4"]),
    // As are all but the last of an epoch: 48 pictures.
    ("batch 24", &["batch_size=24"]),
    ("128 px, batch 8", &["batch_size=8", "resolution=128"]),
    (
        "128 px, batch 8, checkpointing",
        &["batch_size=8", "resolution=128", "gradient_checkpointing=on"],
    ),
    ("batch 16, bf16", &["batch_size=16", "mixed_precision=bf16"]),
    (
        "batch 16, rank 64 on transformer",
        &["batch_size=16", "lora_rank=64", "target_modules=transformer"],
    ),
    (
        "256 px, batch 4, accumulation 2",
        &["batch_size=4", "resolution=256", "gradient_accumulation_steps=2"],
    ),
];

/// Runs every job and prints the table.
///
/// # Errors
/// If a run cannot be made.
pub(crate) fn run(root: &Path, steps: u32) -> Result<()> {
    exec::must(&mut exec::cargo([
        "build",
        "--release",
        "--quiet",
        "--workspace",
        "--bin",
        "lorad",
    ]))?;
    let work = std::env::temp_dir().join(format!("lorad-estimate-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    let result = table(root, &work, steps);
    std::fs::remove_dir_all(&work)?;
    result
}

fn table(root: &Path, work: &Path, steps: u32) -> Result<()> {
    println!("| job | memory, estimated MB | measured MB | off by | s/step, estimated | measured | off by |");
    println!("|---|---|---|---|---|---|---|");
    for (name, settings) in JOBS {
        let train = |more: &[&str]| -> Result<Output> {
            let mut command = Command::new(exec::target_dir(root).join("release/lorad"));
            command
                .args(["train", "--base", "demo-icons", "--data", "assets/silhouettes.zip"])
                .args([
                    "--set",
                    &format!("max_train_steps={steps}"),
                    "--set",
                    "checkpoint_every_steps=10000",
                ])
                .arg("--out")
                .arg(work)
                .args(settings.iter().flat_map(|setting| ["--set", *setting]))
                .args(more)
                .envs([exec::AS_A_WORKER])
                .env("LORAD_STORAGE__DATA_DIR", work.join("data"));
            let output = command.output().context("start lorad")?;
            ensure!(
                output.status.success(),
                "{name}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            Ok(output)
        };
        let plan: Value = serde_json::from_slice(&train(&["--dry-run"])?.stdout)?;
        let plan = &plan["plan"];
        let metrics = work.join("metrics.jsonl");
        let run = train(&["--metrics", &metrics.to_string_lossy()])?;
        let said = String::from_utf8_lossy(&run.stderr);
        let peak: f64 = said
            .lines()
            .find_map(|line| line.strip_prefix("peak_memory_bytes: "))
            .context("the run told no peak_memory_bytes")?
            .parse()?;
        let step_s = median_step_s(&metrics)?;
        let number = |key: &str| plan[key].as_f64().with_context(|| format!("no {key} in the plan"));
        let (memory, expected_s) = (number("memory_bytes")?, number("step_s")?);
        let off = |estimated: f64, measured: f64| 100.0 * (estimated / measured - 1.0);
        println!(
            "| {name} | {:.0} | {:.0} | {:+.0} % | {expected_s:.3} | {step_s:.3} | {:+.0} % |",
            memory / 1e6,
            peak / 1e6,
            off(memory, peak),
            off(expected_s, step_s),
        );
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Without the first step, which warms up.
fn median_step_s(metrics: &Path) -> Result<f64> {
    let text = std::fs::read_to_string(metrics)?;
    let mut times = Vec::new();
    for line in text.lines().skip(1) {
        let step: Value = serde_json::from_str(line)?;
        times.push(step["step_ms"].as_f64().context("a step without step_ms")?);
    }
    times.sort_by(f64::total_cmp);
    Ok(times.get(times.len() / 2).context("no steps")? / 1e3)
}
