//! What server and worker add to a training step: the demo's job through `lorad demo`, beside the same job by `lorad train`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
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
    let (mut alone, mut served, mut between, mut spent) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        if scratch.exists() {
            fs::remove_dir_all(&scratch).with_context(|| format!("empty {}", scratch.display()))?;
        }
        fs::create_dir_all(&scratch).with_context(|| format!("make {}", scratch.display()))?;
        alone.push(without_server(&program, &scratch)?);
        let found = with_server(&program, &scratch)?;
        served.push(found.step_ms);
        between.push(found.gap_ms);
        spent.push(found.server_ms);
    }
    let (alone, served, between, spent) = (median(alone), median(served), median(between), median(spent));
    println!("| demo job | ms/step | between steps | processor time of the server |");
    println!("|---|---|---|---|");
    println!("| lorad train | {alone:.2} | | |");
    println!("| server and worker | {served:.2} | {between:.3} | {spent:.3} |");
    let n_cores = std::thread::available_parallelism()?.get() as f64;
    println!(
        "steps under a server: {:+.1} % of those without; between steps {:.2} % of a step; the server takes {:.2} % of the {n_cores} cores",
        100.0 * (served / alone - 1.0),
        100.0 * between / served,
        100.0 * spent / (n_cores * (served + between))
    );
    Ok(())
}

/// What a run under a server took, milliseconds.
struct Served {
    /// Median wall time of a step.
    step_ms: f64,
    /// Mean time from the end of a step to the start of the next where nothing else was due.
    gap_ms: f64,
    /// Processor time of the server, the viewer that `lorad demo` is among it, per step.
    server_ms: f64,
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
        .arg(&metrics)
        .envs([exec::AS_A_WORKER]);
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

fn with_server(program: &Path, scratch: &Path) -> Result<Served> {
    let data = scratch.join("data");
    let mut child = Command::new(program)
        .args(["demo", "--exit", "--bind", "127.0.0.1:0", "--data-dir"])
        .arg(&data)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start lorad")?;
    // Clock and processor time, again and again: which reading stands for which step is known only afterwards.
    let mut readings = Vec::new();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        readings.extend(processor_ms(child.id()).map(|spent| (now_ms(), spent)));
        sleep(Duration::from_millis(20));
    };
    ensure!(status.success(), "`lorad demo` failed: {status}");
    let spool: PathBuf = WalkDir::new(&data)
        .into_iter()
        .filter_map(Result::ok)
        .map(walkdir::DirEntry::into_path)
        .find(|path| path.ends_with("events.jsonl"))
        .context("the demo left no events")?;
    let events = lines(&spool)?;
    let is_step = |event: &Value| event["type"] == "step";
    let of_steps = |name: &str| -> Result<Vec<f64>> {
        let steps = events.iter().filter(|event| is_step(event));
        steps.map(|event| number(event, name)).collect()
    };
    let (steps, times) = (of_steps("step_ms")?, of_steps("t_ms")?);
    let mut gaps = Vec::new();
    for pair in events.windows(2).filter(|pair| pair.iter().all(is_step)) {
        gaps.push(number(&pair[1], "t_ms")? - number(&pair[0], "t_ms")? - number(&pair[1], "step_ms")?);
    }
    let (first, last) = times.first().zip(times.last()).context("the demo made no step")?;
    let at = |time: f64| {
        let later = readings.iter().find(|(t, _)| *t >= time);
        later
            .map(|(_, spent)| *spent)
            .context("no reading of the server's processor time")
    };
    Ok(Served {
        server_ms: (at(*last)? - at(*first)?) / (times.len() - 1).max(1) as f64,
        step_ms: median(steps),
        // Clock readings are whole milliseconds: the mean is exact where a single gap is not.
        gap_ms: gaps.iter().sum::<f64>() / gaps.len().max(1) as f64,
    })
}

fn now_ms() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs_f64() * 1e3
}

/// Processor time that a process has taken, all its threads'.
fn processor_ms(pid: u32) -> Option<f64> {
    /// The unit of `/proc/PID/stat` on Linux.
    const TICK_MS: f64 = 10.0;
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the program's name, which may hold spaces: user and system time are the 12th and 13th field.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |n: usize| fields.get(n)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) * TICK_MS)
}

fn lines(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("read `{line}`")))
        .collect()
}
