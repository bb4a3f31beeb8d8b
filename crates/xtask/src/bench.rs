//! `cargo xtask bench`: a training step of lorad beside the reference's and beside the same model made of candle's own ops: same
//! shapes, same machine, in turns, so that a change of the machine's mood meets all. Prints a table for `docs/benchmarks.md`;
//! no threshold, since machines differ. `server` in place of a shape: what a server adds to a step.

mod server;

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{exec, provision};

/// Shapes of `tools/reference/bench_step.py` that are run if none is named.
const SHAPES: [&str; 4] = ["demo-b16", "sd15-b1", "sd15-b4", "sd15-64-b1"];
/// Ways that lorad runs a large shape: options of `examples/bench_step.rs`.
const WAYS: [&[&str]; 3] = [&[], &["f16"], &["f16", "checkpointing"]];
/// Shapes whose graph of candle's ops fits into 16 GB.
const COMPOSED: [&str; 3] = ["demo-b8", "demo-b16", "sd15-b1"];

/// Figures of one run.
struct Figures {
    median_s: f64,
    peak_bytes: f64,
    /// Growth of resident memory from the first measured step to the last.
    growth_bytes: f64,
}

/// How often things are run.
#[derive(Clone, Copy)]
pub(crate) struct Effort {
    /// Runs of each side, in turns.
    pub(crate) rounds: usize,
    /// Measured steps of a run; by default 20, for `sd15-…` 3.
    pub(crate) steps: Option<usize>,
}

/// Runs all sides and prints a table.
///
/// # Errors
/// If one of them cannot be run, or lorad's memory grows from step to step.
pub(crate) fn run(root: &Path, shapes: &[String], effort: Effort) -> Result<()> {
    ensure!(effort.rounds > 0, "at least one round");
    exec::must(&mut exec::cargo([
        "build",
        "--release",
        "--quiet",
        "--workspace",
        "--bin",
        "lorad",
        "--example",
        "bench_step",
    ]))?;
    let shapes: Vec<&str> = if shapes.is_empty() {
        SHAPES.to_vec()
    } else {
        shapes.iter().map(String::as_str).collect()
    };
    if shapes == ["server"] {
        return server::run(root, effort);
    }
    let python = provision::oracle(root)?;
    println!("| shape | lorad | s/step | peak GB | beside | s/step | peak GB | speed | memory |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for shape in shapes {
        compare(root, &python, shape, effort)?;
    }
    Ok(())
}

fn compare(root: &Path, python: &Path, shape: &str, effort: Effort) -> Result<()> {
    let ways = if shape.starts_with("sd15") {
        &WAYS[..]
    } else {
        &WAYS[..1]
    };
    let steps = effort
        .steps
        .unwrap_or(if shape.starts_with("sd15") { 3 } else { 20 })
        .to_string();
    let mut ours: Vec<Vec<Figures>> = ways.iter().map(|_| Vec::new()).collect();
    let (mut reference, mut composed) = (Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        for (runs, way) in ours.iter_mut().zip(ways) {
            runs.push(lorad(root, shape, &steps, way)?);
        }
        let mut command = Command::new(python);
        command.args(["tools/reference/bench_step.py", "--shape", shape, "--steps", &steps]);
        reference.push(figures(&mut command)?);
        if COMPOSED.contains(&shape) {
            composed.push(lorad(root, shape, &steps, &["composed"])?);
        }
    }
    for (name, theirs) in [("diffusers + PEFT", &reference), ("candle's ops", &composed)] {
        if theirs.is_empty() {
            continue;
        }
        let (their_s, their_bytes, _) = medians(theirs);
        for (way, ours) in ways.iter().zip(&ours) {
            let (s, bytes, growth) = medians(ours);
            let way = if way.is_empty() {
                "f32".to_owned()
            } else {
                way.join(", ")
            };
            println!(
                "| {shape} | {way} | {s:.3} | {:.2} | {name} | {their_s:.3} | {:.2} | {:.2}x | {:.2}x |",
                bytes / 1e9,
                their_bytes / 1e9,
                their_s / s,
                bytes / their_bytes
            );
            // A leak would grow with every step; the allocator itself settles only after some of them.
            ensure!(
                growth <= 0.05 * bytes + 64e6,
                "{shape}, {way}: resident memory grew by {growth} bytes over the measured steps"
            );
        }
    }
    Ok(())
}

/// Median of the runs' median steps, of their peaks and of their growth.
fn medians(runs: &[Figures]) -> (f64, f64, f64) {
    let of = |figure: fn(&Figures) -> f64| median(runs.iter().map(figure).collect());
    (of(|f| f.median_s), of(|f| f.peak_bytes), of(|f| f.growth_bytes))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn lorad(root: &Path, shape: &str, steps: &str, way: &[&str]) -> Result<Figures> {
    let mut command = Command::new(exec::target_dir(root).join("release/examples/bench_step"));
    command.args([shape, steps]).args(way).envs([exec::AS_A_WORKER]);
    figures(&mut command)
}

/// What either side prints.
fn figures(command: &mut Command) -> Result<Figures> {
    let figures = last_line(&exec::output(command)?)?;
    // The reference does not print these.
    let resident = |name: &str| figures[name].as_f64().unwrap_or(0.0);
    Ok(Figures {
        median_s: number(&figures, "median_s")?,
        peak_bytes: number(&figures, "peak_rss_bytes")?,
        growth_bytes: resident("last_rss_bytes") - resident("first_rss_bytes"),
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
