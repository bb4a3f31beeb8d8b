//! What runs inside `lorad worker`: one attempt at one job.
//!
//! Reads `spec.json`, runs the trainer on its own thread (`crate::trainer`), spools each event to `events.jsonl` and posts
//! it to the server. The training loop never waits for the network: it appends to the spool and goes on. Knows no job
//! states and no database. Called by the command line's `worker` and started by `executor::local`.

mod post;
mod spool;

pub(crate) use spool::read_spool;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use lorad_faults::{Point, write_all};
use lorad_proto::{
    PROTOCOL_VERSION,
    command::Command,
    event::{StopReason, WorkerEvent},
    spec::AttemptSpec,
};

use crate::{
    checkpoint::verified_step,
    domain::attempt::{EXIT_FAILED, EXIT_TEMPFAIL, EXIT_USAGE},
    executor::local::EXIT_FILE,
    trainer::{self, Reporter},
};
use post::Poster;
use spool::Spool;

/// The attempt's secret token.
pub const ENV_TOKEN: &str = "LORAD_ATTEMPT_TOKEN";
/// Socket to report to.
pub const ENV_SOCKET: &str = "LORAD_AGENT_SOCKET";
/// Pause between posts when there is nothing to say, milliseconds.
pub const ENV_HEARTBEAT_MS: &str = "LORAD_HEARTBEAT_MS";
/// Lease, milliseconds.
pub const ENV_LEASE_MS: &str = "LORAD_LEASE_MS";
/// Niceness to take on.
pub const ENV_NICE: &str = "LORAD_NICE";
/// Most bytes to allocate; 0: no limit.
pub const ENV_MEMORY_BYTES: &str = "LORAD_MEMORY_BYTES";

/// Why a worker could not even begin.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("cannot read {0}")]
    Spec(std::path::PathBuf, #[source] std::io::Error),
    #[error("{0} is no attempt specification of this version")]
    Parse(std::path::PathBuf, #[source] serde_json::Error),
    #[error("the attempt was written for protocol {0}, this worker speaks {PROTOCOL_VERSION}")]
    Protocol(u32),
    #[error("{0} is missing or wrong: a worker is started by the server")]
    Environment(&'static str),
    #[error("cannot open the spool in {0}")]
    Spool(std::path::PathBuf, #[source] std::io::Error),
    #[error("cannot set up the connection to the server")]
    Client(#[source] reqwest::Error),
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
}

/// Runs the attempt in `attempt_dir` to its end and returns the process's exit code: 0 done, stopped or paused, 3 failed,
/// 64 nothing could be begun, 75 ended early with a checkpoint to resume from.
pub fn run(attempt_dir: &Path) -> i32 {
    run_with(attempt_dir, trainer::run_attempt)
}

/// [`run`] with another trainer, for tests of everything around it.
pub fn run_with<T>(attempt_dir: &Path, train: T) -> i32
where
    T: FnOnce(AttemptSpec, Arc<dyn Reporter>) -> WorkerEvent + Send + 'static,
{
    let code = match begin(attempt_dir) {
        Ok((spec, poster, runtime)) => runtime.block_on(attempt(spec, poster, train)),
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "the worker cannot begin");
            EXIT_USAGE
        }
    };
    // For a server that is not this process's parent. A lost note only makes the end look like a crash.
    let note = serde_json::json!({"code": code}).to_string();
    let written = std::fs::File::create(attempt_dir.join(EXIT_FILE))
        .and_then(|mut file| write_all(Point::WriteExitNote, &mut file, note.as_bytes()));
    if let Err(error) = written {
        tracing::warn!(%error, "the exit note was not written");
    }
    code
}

fn begin(attempt_dir: &Path) -> Result<(AttemptSpec, Poster, tokio::runtime::Runtime), StartError> {
    let spec = read_spec(&attempt_dir.join("spec.json"))?;
    let millis = |name: &'static str| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .map(Duration::from_millis)
            .ok_or(StartError::Environment(name))
    };
    let (heartbeat, lease) = (millis(ENV_HEARTBEAT_MS)?, millis(ENV_LEASE_MS)?);
    let token = std::env::var(ENV_TOKEN).map_err(|_| StartError::Environment(ENV_TOKEN))?;
    let socket = std::env::var_os(ENV_SOCKET).ok_or(StartError::Environment(ENV_SOCKET))?;
    if let Some(nice) = std::env::var(ENV_NICE).ok().and_then(|text| text.parse().ok())
        && let Err(error) = rustix::process::nice(nice)
    {
        tracing::warn!(nice, %error, "the niceness was not changed");
    }
    if let Some(bytes) = std::env::var(ENV_MEMORY_BYTES).ok().and_then(|text| text.parse().ok()) {
        limit_memory(bytes);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(StartError::Runtime)?;
    let spool = Spool::create(attempt_dir).map_err(|error| StartError::Spool(attempt_dir.to_owned(), error))?;
    let client = reqwest::Client::builder()
        .unix_socket(Path::new(&socket))
        .timeout(Duration::from_secs(30))
        .build()
        .map_err(StartError::Client)?;
    let poster = Poster {
        client,
        url: format!("http://lorad/internal/attempts/{}/{}/events", spec.job_id, spec.attempt),
        token,
        heartbeat,
        lease,
        spool: Arc::new(spool),
    };
    Ok((spec, poster, runtime))
}

/// Lets the system refuse this process more than `bytes` of memory to write to (0: no limit), besides the stack of the
/// training thread, which is mostly never touched.
fn limit_memory(bytes: u64) {
    if bytes == 0 {
        return;
    }
    let limit = Some(bytes.saturating_add(trainer::TRAINING_STACK_BYTES));
    let limit = rustix::process::Rlimit {
        current: limit,
        maximum: limit,
    };
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Data, limit) {
        tracing::warn!(bytes, %error, "the memory of this worker is not limited");
    }
}

fn read_spec(path: &Path) -> Result<AttemptSpec, StartError> {
    let bytes = std::fs::read(path).map_err(|error| StartError::Spec(path.to_owned(), error))?;
    let spec: AttemptSpec =
        serde_json::from_slice(&bytes).map_err(|error| StartError::Parse(path.to_owned(), error))?;
    if spec.protocol != PROTOCOL_VERSION {
        return Err(StartError::Protocol(spec.protocol));
    }
    Ok(spec)
}

/// What the trainer talks to.
struct SpoolReporter {
    spool: Arc<Spool>,
    /// SIGTERM came.
    terminated: Arc<AtomicBool>,
}

impl Reporter for SpoolReporter {
    fn emit(&self, event: WorkerEvent) {
        self.spool.append(event);
    }

    fn command(&self) -> Command {
        let command = self.spool.command();
        // What the user asked weighs more than the signal, except "go on".
        match command {
            Command::None | Command::Checkpoint { .. } | Command::Sample { .. }
                if self.terminated.load(Ordering::Relaxed) =>
            {
                Command::Drain
            }
            command => command,
        }
    }
}

async fn attempt<T>(spec: AttemptSpec, poster: Poster, train: T) -> i32
where
    T: FnOnce(AttemptSpec, Arc<dyn Reporter>) -> WorkerEvent + Send + 'static,
{
    let spool = poster.spool.clone();
    let terminated = Arc::new(AtomicBool::new(false));
    spawn_signal_watch(terminated.clone());
    spool.append(WorkerEvent::Hello {
        protocol: PROTOCOL_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        device: spec.device.clone(),
        resumed_from_step: spec.resume_from.as_deref().and_then(|dir| verified_step(dir, None)),
    });
    let reporter = Arc::new(SpoolReporter {
        spool: spool.clone(),
        terminated,
    });
    let training = tokio::task::spawn_blocking(move || train(spec, reporter));
    let posting = tokio::spawn(poster.run());
    let final_event = match training.await {
        Ok(event) => event,
        Err(error) => WorkerEvent::Failed {
            problem: lorad_proto::problem::Problem::new(
                "worker.panicked",
                "The worker hit a bug",
                format!("The attempt's thread ended without a result: {error}"),
            ),
        },
    };
    let code = match &final_event {
        WorkerEvent::Failed { .. } => EXIT_FAILED,
        WorkerEvent::Stopped {
            reason: StopReason::Drained | StopReason::Fenced,
            ..
        } => EXIT_TEMPFAIL,
        _ => 0,
    };
    spool.append(final_event);
    match posting.await {
        Ok(post::Ended::Acknowledged) => code,
        // The spool holds everything; the server reads it when it sees this process dead.
        Ok(post::Ended::Fenced | post::Ended::LeaseOver) | Err(_) => EXIT_TEMPFAIL,
    }
}

fn spawn_signal_watch(terminated: Arc<AtomicBool>) {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut sigterm) => {
            tokio::spawn(async move {
                while sigterm.recv().await.is_some() {
                    tracing::info!("told to stop by SIGTERM: writing a checkpoint first");
                    terminated.store(true, Ordering::Relaxed);
                }
            });
        }
        Err(error) => tracing::warn!(%error, "SIGTERM will end this worker without a checkpoint"),
    }
}
