//! `cargo xtask bench`: a training step of lorad beside the reference's: same shapes, same machine, in turns, so that a
//! change of the machine's mood meets both. Prints a table for `docs/benchmarks.md`; no threshold, since machines differ.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{exec, provision};

/// Shapes of `tools/reference/bench_step.py` that are run if none is named.
const SHAPES: [&str; 5] = ["demo-b8", "demo-b16", "sd15-b1", "sd15-b4", "sd15-64-b1"];
/// Ways that lorad runs a large shape: options of `examples/bench_step.rs`.
const WAYS: [&[&str]; 3] = [&[], &["f16"], &["f16", "checkpointing"]];

/// Figures of one run.
struct Figures {
    median_s: f64,
    peak_bytes: f64,
    /// Growth of resident memory from the first measured step to the last.
    growth_bytes: f64,
}

/// Runs both sides and prints a table.
///
/// # Errors
/// If either side cannot be run.
pub(crate) fn run(root: &Path, shapes: &[String], rounds: usize) -> Result<()> {
    ensure!(rounds > 0, "at least one round");
    exec::must(&mut exec::cargo([
        "build",
        "--release",
        "--quiet",
        "--workspace",
        "--example",
        "bench_step",
    ]))?;
    let python = provision::oracle(root)?;
    let shapes: Vec<&str> = if shapes.is_empty() {
        SHAPES.to_vec()
    } else {
        shapes.iter().map(String::as_str).collect()
    };
    println!("| shape | lorad | s/step | peak GB | diffusers + PEFT s/step | peak GB | speed | memory |");
    println!("|---|---|---|---|---|---|---|---|");
    for shape in shapes {
        let ways = if shape.starts_with("sd15") {
            &WAYS[..]
        } else {
            &WAYS[..1]
        };
        let mut ours: BTreeMap<usize, Vec<Figures>> = BTreeMap::new();
        let mut theirs = Vec::new();
        for _ in 0..rounds {
            for (i, way) in ways.iter().enumerate() {
                ours.entry(i).or_default().push(lorad(root, shape, way)?);
            }
            theirs.push(reference(&python, shape)?);
        }
        let (their_s, their_bytes, _) = medians(&theirs);
        for (i, way) in ways.iter().enumerate() {
            let (s, bytes, growth) = medians(&ours[&i]);
            let name = if way.is_empty() {
                "f32".to_owned()
            } else {
                way.join(", ")
            };
            println!(
                "| {shape} | {name} | {s:.3} | {:.2} | {their_s:.3} | {:.2} | {:.2}x | {:.2}x |",
                bytes / 1e9,
                their_bytes / 1e9,
                their_s / s,
                bytes / their_bytes
            );
            // A leak would grow with every step; the allocator itself settles only after some of them.
            ensure!(
                growth <= 0.05 * bytes + 64e6,
                "{shape}, {name}: resident memory grew by {growth} bytes over the measured steps"
            );
        }
    }
    Ok(())
}

/// Median of the runs' median steps, of their peaks and of their growth.
fn medians(runs: &[Figures]) -> (f64, f64, f64) {
    let median = |of: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    (
        median(|f| f.median_s),
        median(|f| f.peak_bytes),
        median(|f| f.growth_bytes),
    )
}

fn lorad(root: &Path, shape: &str, way: &[&str]) -> Result<Figures> {
    let mut command = Command::new(exec::target_dir(root).join("release/examples/bench_step"));
    let steps = if shape.starts_with("sd15") { "3" } else { "20" };
    // As the server starts its workers.
    command
        .args([shape, steps])
        .args(way)
        .env("MIMALLOC_PURGE_DELAY", "1000");
    let figures = last_line(&exec::output(&mut command)?)?;
    let growth = number(&figures, "last_rss_bytes")? - number(&figures, "first_rss_bytes")?;
    Ok(Figures {
        median_s: number(&figures, "median_s")?,
        peak_bytes: number(&figures, "peak_rss_bytes")?,
        growth_bytes: growth,
    })
}

fn reference(python: &Path, shape: &str) -> Result<Figures> {
    let mut command = Command::new(python);
    command.args(["tools/reference/bench_step.py", "--shape", shape]);
    let figures = last_line(&exec::output(&mut command)?)?;
    Ok(Figures {
        median_s: number(&figures, "median_s")?,
        peak_bytes: number(&figures, "peak_rss_bytes")?,
        growth_bytes: 0.0,
    })
}

fn last_line(text: &str) -> Result<Value> {
    let line = text.lines().last().context("the benchmark printed nothing")?;
    serde_json::from_str(line).with_context(|| format!("read `{line}`"))
}

fn number(figures: &Value, name: &str) -> Result<f64> {
    figures[name]
        .as_f64()
        .with_context(|| format!("no `{name}` in `{figures}`"))
}
