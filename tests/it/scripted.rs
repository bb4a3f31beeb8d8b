//! A trainer that only pretends, in the real worker: what it does stands in the hyperparameters. Its loss at step `n` is
//! `1 / n`, so that a test can tell whether every figure arrived.
//!
//! The worker is this very test binary, started through a shell script that turns `worker --attempt-dir D` into a call of
//! [`worker_process`]. In the same way [`server_process`] is a server that can be killed.
//!
//! A test that needs a worker at a certain point holds it there: `hold_at` (a step) and `hold_export` stop the first
//! attempt (`held_attempts`: more of them) until it is killed, commanded or [`let_go`].

use std::{
    collections::BTreeMap,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lorad::{config::Config, trainer::Reporter};
use lorad_proto::{
    command::Command,
    event::{Phase, ResultFile, ResultKind, Results, StepMetrics, StopReason, WorkerEvent},
    problem::Problem,
    spec::AttemptSpec,
};
use serde_json::{Map, json};
use sha2::{Digest, Sha256};

const ATTEMPT_DIR: &str = "LORAD_TEST_ATTEMPT_DIR";
const DATA_DIR: &str = "LORAD_TEST_DATA_DIR";
const LET_GO: &str = "let-go";
const SETTINGS: &str = "LORAD_TEST_SETTINGS";

const STATS_FILE: &str = "stats";

/// Where [`server_process`] writes its address.
pub const ADDRESS_FILE: &str = "address";

/// Writes the script that the server starts as worker.
pub fn worker_program(dir: &Path) -> PathBuf {
    write_program(dir, "", "worker")
}

/// Like [`worker_program`], but with fault points that obey what is armed in `faults` ([`crate::faults`]), also when the
/// real trainer runs, and the real program for everything else that the server starts.
pub fn faulty_program(dir: &Path, faults: &Path, is_real: bool) -> PathBuf {
    let variables = format!(
        "{}='{}' {}",
        crate::faults::DIR,
        faults.display(),
        if is_real { "LORAD_TEST_REAL=1 " } else { "" }
    );
    write_program(dir, &variables, "faulty-worker")
}

fn write_program(dir: &Path, variables: &str, name: &str) -> PathBuf {
    let program = dir.join(format!("{name}.sh"));
    let this = std::env::current_exe().unwrap();
    let other = if variables.is_empty() {
        String::new()
    } else {
        format!("[ \"$1\" = worker ] || exec '{}' \"$@\"\n", env!("CARGO_BIN_EXE_lorad"))
    };
    let script = format!(
        "#!/bin/sh\n{other}{variables}{ATTEMPT_DIR}=\"$3\" exec '{}' scripted::worker_process --exact --nocapture\n",
        this.display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    program
}

/// The command that starts [`server_process`].
pub fn server_command(data_dir: &Path, settings: &[(&str, String)]) -> std::process::Command {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command
        .args(["scripted::server_process", "--exact", "--nocapture"])
        .env(DATA_DIR, data_dir)
        .env(
            SETTINGS,
            serde_json::to_string(&settings.iter().cloned().collect::<BTreeMap<_, _>>()).unwrap(),
        );
    command
}

/// No test but the worker process of tests: without its variable there is nothing to do.
#[test]
fn worker_process() {
    if let Some(dir) = std::env::var_os(ATTEMPT_DIR) {
        crate::faults::obey();
        std::process::exit(match std::env::var_os("LORAD_TEST_REAL") {
            Some(_) => lorad::agent::run(Path::new(&dir)),
            None => lorad::agent::run_with(Path::new(&dir), train),
        });
    }
}

/// No test but the server process of tests: without its variable there is nothing to do.
#[tokio::test(flavor = "multi_thread")]
async fn server_process() {
    let Some(data_dir) = std::env::var_os(DATA_DIR).map(PathBuf::from) else {
        return;
    };
    crate::faults::obey();
    let settings: BTreeMap<String, String> = serde_json::from_str(&std::env::var(SETTINGS).unwrap()).unwrap();
    let flags: Vec<(&str, String)> = settings.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
    let config = Config::load(None, &flags).unwrap();
    lorad::telemetry::init(&config.log);
    let server = lorad::serve::serve(config).await.unwrap();
    let fresh = data_dir.join("address.tmp");
    std::fs::write(&fresh, server.address().to_string()).unwrap();
    std::fs::rename(fresh, data_dir.join(ADDRESS_FILE)).unwrap();
    // What it holds, for tests in another process.
    loop {
        let stats = Stats {
            heap_bytes: crate::HEAP.current_usage() as u64,
            topics: server.app().events.topics() as u64,
        };
        std::fs::write(data_dir.join("stats.tmp"), serde_json::to_vec(&stats).unwrap()).unwrap();
        std::fs::rename(data_dir.join("stats.tmp"), data_dir.join(STATS_FILE)).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What a server process holds.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub struct Stats {
    pub heap_bytes: u64,
    pub topics: u64,
}

/// What the server process on this folder holds, measured after now.
pub async fn stats(dir: &Path) -> Stats {
    let file = dir.join("data").join(STATS_FILE);
    let _ = std::fs::remove_file(&file);
    let start = std::time::Instant::now();
    loop {
        if let Ok(bytes) = std::fs::read(&file) {
            return serde_json::from_slice(&bytes).unwrap();
        }
        assert!(
            start.elapsed() < crate::server::PATIENCE,
            "the server says nothing of itself"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Lets this process, and those that it starts, open as many files as the system allows.
pub fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    )
    .unwrap();
}

/// What the hyperparameters say.
struct Script {
    steps: u64,
    step_ms: u64,
    checkpoint_every: u64,
    /// `abort`, `fail` or `exhaust` (abort as for want of memory, unless the micro-batch was halved) when this step is reached.
    ends: Option<(String, u64)>,
    /// The first attempt waits after this step.
    hold_at: Option<u64>,
    /// The first attempt waits when it has said that it exports.
    hold_export: bool,
    /// After the first step it goes back to the second, once, with half the learning rate.
    rescue: Option<(u64, u64)>,
    /// The last step after that.
    rescued_steps: u64,
    /// Its result is not the one that it announces.
    spoil: bool,
    /// Length of a line that it logs before each step.
    log_bytes: usize,
}

impl Script {
    fn of(spec: &AttemptSpec) -> Self {
        // A job that came over HTTP has the real hyperparameters: its script is its name.
        let named: Option<Map<String, serde_json::Value>> = serde_json::from_str(&spec.job_name).ok();
        let script = named.as_ref().unwrap_or(&spec.hyperparameters);
        let number = |key: &str, default| script.get(key).and_then(serde_json::Value::as_u64).unwrap_or(default);
        let ends = ["abort", "fail", "exhaust"].iter().find_map(|how| {
            let step = script.get(*how)?.as_u64()?;
            Some(((*how).to_owned(), step))
        });
        let steps = number("steps", 20);
        let rescue = script.get("rescue_at").and_then(serde_json::Value::as_u64);
        Self {
            rescue: rescue.map(|at| (at, number("rescue_to", 0))),
            rescued_steps: number("rescued_steps", steps),
            steps,
            step_ms: number("step_ms", 10),
            checkpoint_every: number("checkpoint_every", 0),
            ends,
            hold_at: (u64::from(spec.attempt) <= number("held_attempts", 1))
                .then(|| script.get("hold_at")?.as_u64())
                .flatten(),
            hold_export: spec.attempt == 1 && script.contains_key("hold_export"),
            log_bytes: usize::try_from(number("log_bytes", 0)).unwrap(),
            spoil: script.contains_key("spoil"),
        }
    }
}

/// Lets a held worker go on.
pub fn let_go(attempt_dir: &Path) {
    std::fs::write(attempt_dir.join(LET_GO), b"").unwrap();
}

fn is_held(spec: &AttemptSpec) -> bool {
    std::thread::sleep(Duration::from_millis(5));
    !spec.attempt_dir.join(LET_GO).exists()
}

#[expect(clippy::needless_pass_by_value, reason = "as the real one is called")]
fn train(spec: AttemptSpec, reporter: Arc<dyn Reporter>) -> WorkerEvent {
    let mut script = Script::of(&spec);
    let mut lr = 1e-3;
    let mut step = spec.resume_from.as_deref().map_or(0, step_of);
    // As the real loop does it: nothing is written when nothing is new.
    let mut saved_at = spec.resume_from.as_ref().map(|_| step);
    let mut served = 0;
    reporter.emit(WorkerEvent::Phase {
        phase: Phase::Loading,
        done: 1,
        total: 1,
    });
    loop {
        match reporter.command() {
            Command::Pause => {
                checkpoint(&spec, step, &mut saved_at, &*reporter);
                return stopped(step, StopReason::Paused, None);
            }
            Command::Drain => {
                checkpoint(&spec, step, &mut saved_at, &*reporter);
                return stopped(step, StopReason::Drained, None);
            }
            Command::Cancel { save: true } => {
                return stopped(step, StopReason::Cancelled, export(&spec, &script, step, &*reporter));
            }
            Command::Cancel { save: false } => return stopped(step, StopReason::Cancelled, None),
            Command::Checkpoint { request } if request > served => {
                served = request;
                checkpoint(&spec, step, &mut saved_at, &*reporter);
            }
            _ => {}
        }
        if script.hold_at == Some(step) && is_held(&spec) {
            continue;
        }
        if step >= script.steps {
            break;
        }
        step += 1;
        match &script.ends {
            Some((how, at)) if *at == step && how == "abort" => {
                println!("the scripted trainer aborts at step {step}");
                std::process::abort();
            }
            Some((how, at))
                if *at == step
                    && how == "exhaust"
                    && (!spec.after_out_of_memory || spec.hyperparameters.contains_key("always")) =>
            {
                println!("memory allocation of 123 bytes failed");
                std::process::abort();
            }
            Some((how, at)) if *at == step && how == "fail" => {
                return WorkerEvent::Failed {
                    problem: Problem::new("loss.not_finite", "The loss is not finite", format!("At step {step}."))
                        .with_hint("Lower it."),
                };
            }
            _ => {}
        }
        std::thread::sleep(Duration::from_millis(script.step_ms));
        if script.log_bytes > 0 {
            reporter.emit(WorkerEvent::Log {
                level: lorad_proto::event::Level::Info,
                message: "x".repeat(script.log_bytes),
            });
        }
        reporter.emit(WorkerEvent::Step(StepMetrics {
            step,
            total_steps: script.steps,
            epoch: step as f64 / 10.0,
            loss: Some(1.0 / step as f64),
            lr,
            grad_norm: Some(1.0),
            step_ms: script.step_ms as f64,
            samples_per_s: 1.0,
            extra: BTreeMap::new(),
        }));
        if let Some((_, to)) = script.rescue.take_if(|(at, _)| *at == step) {
            (step, lr) = (to, lr / 2.0);
            script.steps = script.rescued_steps;
            reporter.emit(WorkerEvent::Alert {
                code: "run.rescued".to_owned(),
                severity: lorad_proto::event::Level::Warn,
                step,
                detail: format!("Back to step {to}."),
            });
            continue;
        }
        if script.checkpoint_every > 0 && step.is_multiple_of(script.checkpoint_every) {
            checkpoint(&spec, step, &mut saved_at, &*reporter);
        }
    }
    match export(&spec, &script, step, &*reporter) {
        Some(results) => WorkerEvent::Done { results },
        None => stopped(step, StopReason::Drained, None),
    }
}

fn stopped(step: u64, reason: StopReason, results: Option<Results>) -> WorkerEvent {
    WorkerEvent::Stopped { step, reason, results }
}

fn step_of(checkpoint: &Path) -> u64 {
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(checkpoint.join("manifest.json")).unwrap()).unwrap();
    manifest["step"].as_u64().unwrap()
}

fn checkpoint(spec: &AttemptSpec, step: u64, saved_at: &mut Option<u64>, reporter: &dyn Reporter) {
    if saved_at.replace(step) == Some(step) {
        return;
    }
    let name = format!("{step:08}");
    let dir = spec.attempt_dir.join("checkpoints").join(&name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("state.json"), b"{}").unwrap();
    let entry = json!({"bytes": 2, "sha256": hex::encode(Sha256::digest(b"{}"))});
    let manifest = json!({"version": 1, "step": step, "files": {"state.json": entry}}).to_string();
    std::fs::write(dir.join("manifest.json"), &manifest).unwrap();
    reporter.emit(WorkerEvent::Checkpoint {
        step,
        dir: name,
        bytes: 2,
        sha256: hex::encode(Sha256::digest(manifest.as_bytes())),
    });
}

/// `None`: it was told to stop meanwhile.
fn export(spec: &AttemptSpec, script: &Script, step: u64, reporter: &dyn Reporter) -> Option<Results> {
    reporter.emit(WorkerEvent::Phase {
        phase: Phase::Exporting,
        done: 0,
        total: 1,
    });
    while script.hold_export && is_held(spec) {
        if matches!(reporter.command(), Command::Drain | Command::Pause) {
            return None;
        }
    }
    let dir = spec.attempt_dir.join("results");
    std::fs::create_dir_all(&dir).unwrap();
    let bytes = json!({"step": step}).to_string().into_bytes();
    std::fs::write(
        dir.join("receipt.json"),
        if script.spoil { b"spoilt" } else { &bytes[..] },
    )
    .unwrap();
    Some(Results {
        files: vec![ResultFile {
            name: "receipt.json".to_owned(),
            kind: ResultKind::Receipt,
            bytes: bytes.len() as u64,
            sha256: hex::encode(Sha256::digest(&bytes)),
        }],
        summary: Map::from_iter([("steps".to_owned(), json!(step))]),
    })
}
