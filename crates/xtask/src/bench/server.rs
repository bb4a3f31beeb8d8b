//! What server and worker add to a training step: the demo's job through `lorad demo`, beside the same job by `lorad train`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::Value;
use walkdir::WalkDir;

use super::{Effort, median, number};
use crate::exec;

/// What is run without a server: base, pictures and settings of `configs/demo.json`.
const DEMO: &str = "configs/demo.json";

/// Runs both in turns and prints the medians.
pub(super) fn run(root: &Path, effort: Effort) -> Result<()> {
    let program = exec::target_dir(root).join("release/lorad");
    let scratch = exec::target_dir(root).join("bench-server");
    let (mut alone, mut served, mut between) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        if scratch.exists() {
            fs::remove_dir_all(&scratch).with_context(|| format!("empty {}", scratch.display()))?;
        }
        fs::create_dir_all(&scratch).with_context(|| format!("make {}", scratch.display()))?;
        alone.push(without_server(&program, &scratch)?);
        let (step_ms, gap_ms) = with_server(&program, &scratch)?;
        served.push(step_ms);
        between.push(gap_ms);
    }
    let (alone, served, between) = (median(alone), median(served), median(between));
    println!("| demo job | ms/step | between steps |");
    println!("|---|---|---|");
    println!("| lorad train | {alone:.2} | |");
    println!("| server and worker | {served:.2} | {between:.3} |");
    println!(
        "steps under a server: {:+.1} % of those without; between steps {:.2} % of a step",
        100.0 * (served / alone - 1.0),
        100.0 * between / served
    );
    Ok(())
}

/// Median wall time of a step, milliseconds.
fn without_server(program: &Path, scratch: &Path) -> Result<f64> {
    let demo: Value = serde_json::from_slice(&fs::read(DEMO)?).with_context(|| format!("read {DEMO}"))?;
    let metrics = scratch.join("metrics.jsonl");
    let mut command = Command::new(program);
    command
        .args([
            "train",
            "--base",
            "demo-icons",
            "--data",
            "assets/silhouettes.zip",
            "--out",
        ])
        .arg(scratch.join("out"))
        .arg("--data-dir")
        .arg(scratch.join("none"))
        .arg("--metrics")
        .arg(&metrics);
    for (name, value) in demo["hyperparameters"]
        .as_object()
        .context("the demo has no hyperparameters")?
    {
        command.arg("--set").arg(format!("{name}={value}"));
    }
    exec::output(&mut command)?;
    let steps = lines(&metrics)?;
    let steps = steps.iter().map(|step| number(step, "step_ms"));
    Ok(median(steps.collect::<Result<_>>()?))
}

/// Median wall time of a step, and the mean time from the end of a step to the start of the next where nothing else was due.
fn with_server(program: &Path, scratch: &Path) -> Result<(f64, f64)> {
    let data = scratch.join("data");
    exec::output(
        Command::new(program)
            .args(["demo", "--exit", "--bind", "127.0.0.1:0", "--data-dir"])
            .arg(&data),
    )?;
    let spool: PathBuf = WalkDir::new(&data)
        .into_iter()
        .filter_map(Result::ok)
        .map(walkdir::DirEntry::into_path)
        .find(|path| path.ends_with("events.jsonl"))
        .context("the demo left no events")?;
    let events = lines(&spool)?;
    let is_step = |event: &Value| event["type"] == "step";
    let steps = events.iter().filter(|e| is_step(e)).map(|e| number(e, "step_ms"));
    let steps: Vec<f64> = steps.collect::<Result<_>>()?;
    let mut gaps = Vec::new();
    for pair in events.windows(2).filter(|pair| pair.iter().all(is_step)) {
        gaps.push(number(&pair[1], "t_ms")? - number(&pair[0], "t_ms")? - number(&pair[1], "step_ms")?);
    }
    // Clock readings are whole milliseconds: the mean is exact where a single gap is not.
    Ok((median(steps), gaps.iter().sum::<f64>() / gaps.len().max(1) as f64))
}

fn lines(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("read `{line}`")))
        .collect()
}
