//! Free devices take jobs: claim, choose the checkpoint, write the specification, start the worker.
//!
//! The claim is part of a round; what follows runs beside it, because checking the hashes of a checkpoint of gigabytes
//! must not hold up the other devices.

use std::{io::Read, path::PathBuf, sync::Arc};

use lorad_faults::{Point, write_all};
use lorad_proto::{
    PROTOCOL_VERSION,
    spec::{AttemptSpec, BaseModelRef, Cache, DatasetRef},
};
use sha2::{Digest, Sha256};

use super::Scheduler;
use crate::{
    agent_api::AgentApi,
    checkpoint::verified_step,
    domain::{Checkpoint, Exit},
    executor::{Executor, Launch},
    store::{Claimed, NewAttempt, StoreError},
};

impl Scheduler {
    pub(super) async fn fill_devices(&mut self) -> Result<(), StoreError> {
        let executor = self.executor.clone();
        for device in executor.caps() {
            let token = match new_token() {
                Ok(token) => token,
                Err(error) => {
                    tracing::error!(%error, "no random numbers from the system: no job can be started");
                    return Ok(());
                }
            };
            let new = NewAttempt {
                device,
                token_sha256: &hex::encode(Sha256::digest(token.as_bytes())),
                jobs_dir: &self.app.data.jobs(),
                lease_ms: i64::try_from(self.app.config.scheduler.lease_ms).unwrap_or(i64::MAX),
                memory_bytes: self
                    .app
                    .memory()
                    .filter(|_| device == "cpu")
                    .map(|memory| memory.available_bytes),
            };
            if let Some(claimed) = self.app.store.claim(&new).await? {
                self.app.changed(claimed.job.clone());
                let key = (claimed.job.id, claimed.job.attempt);
                let start = start(self.api.clone(), executor.clone(), claimed, device.clone(), token);
                let task = self.starts.spawn(start);
                self.starting.insert(task.id(), key);
            }
        }
        Ok(())
    }

    /// Takes note of starts that came to their end since the last round.
    pub(super) async fn finish_starts(&mut self) -> Result<(), StoreError> {
        while let Some(start) = self.starts.try_join_next_with_id() {
            self.finish_start(start).await?;
        }
        Ok(())
    }

    pub(super) async fn finish_start(&mut self, start: Start) -> Result<(), StoreError> {
        let (task, started) = match start {
            Ok((task, started)) => (task, started),
            Err(panic) => (panic.id(), Err(std::io::Error::other(panic))),
        };
        let Some(key) = self.starting.remove(&task) else {
            return Ok(());
        };
        if let Err(error) = started {
            tracing::error!(job.id = %key.0, %error, "a worker was not started");
            let attempt = self.app.store.attempt(key.0, key.1).await?;
            let exit = match error.kind() {
                std::io::ErrorKind::StorageFull => Exit::NoSpace(error.to_string()),
                _ => Exit::NotStarted(error.to_string()),
            };
            self.end(&attempt, &exit).await?;
        }
        Ok(())
    }
}

/// How a start went, by its task.
pub(super) type Start = Result<(tokio::task::Id, std::io::Result<()>), tokio::task::JoinError>;

async fn start(
    api: AgentApi,
    executor: Arc<dyn Executor>,
    claimed: Claimed,
    device: String,
    token: String,
) -> std::io::Result<()> {
    let app = &api.app;
    let settings = &app.config.scheduler;
    let key = (claimed.job.id, claimed.job.attempt);
    let launch = Launch {
        key,
        dir: claimed.dir.clone(),
        token,
        socket: app.data.agent_socket(),
        threads: settings.threads,
        nice: settings.nice,
        heartbeat_ms: settings.heartbeat_ms,
        lease_ms: settings.lease_ms,
        memory_bytes: settings.worker_memory_bytes,
    };
    let (threads, family) = (settings.threads, claimed.job.family.clone());
    let cache = Cache {
        dir: Some(app.data.cache()),
        max_bytes: app.config.storage.cache_bytes,
    };
    let init_adapter = claimed
        .job
        .init_from()
        .map(|init| app.data.artifacts().join(init.job_id.to_string()).join(init.file));
    let prepare = move || write_spec(&spec(claimed, device, threads, cache, init_adapter));
    tokio::task::spawn_blocking(prepare)
        .await
        .map_err(std::io::Error::other)??;
    let process = executor.submit(&launch).await?;
    api.heard.note(key);
    tracing::info!(job.id = %key.0, job.attempt = key.1, family, pid = process.pid, "started a worker");
    if let Err(error) = app
        .store
        .set_attempt_process(key.0, key.1, process.pid, process.pid_start)
        .await
    {
        // The worker itself says who it is, with its first post.
        tracing::warn!(job.id = %key.0, error = &error as &dyn std::error::Error, "a worker's process was not recorded");
    }
    Ok(())
}

/// What the worker is told. Reads checkpoints, so it may take long.
fn spec(claimed: Claimed, device: String, threads: u64, cache: Cache, init_adapter: Option<PathBuf>) -> AttemptSpec {
    let job = claimed.job;
    AttemptSpec {
        protocol: PROTOCOL_VERSION,
        job_id: job.id.to_string(),
        job_name: job.name,
        attempt: job.attempt,
        family: job.family,
        base_model: BaseModelRef {
            id: job.base_model.to_string(),
            path: claimed.base_path,
        },
        dataset: DatasetRef {
            id: job.dataset_id.to_string(),
            path: claimed.dataset_path,
        },
        hyperparameters: job.hyperparameters,
        sampling: job.sampling,
        export: job.export,
        device,
        threads: match threads {
            0 => None,
            n => usize::try_from(n).ok(),
        },
        cache,
        after_out_of_memory: job.memory_rescues > 0,
        attempt_dir: claimed.dir,
        init_adapter,
        resume_from: newest_intact(&claimed.checkpoints),
    }
}

/// The newest checkpoint that is still there, whole by its hashes. Older ones are only looked at when newer ones are not.
fn newest_intact(checkpoints: &[Checkpoint]) -> Option<PathBuf> {
    checkpoints
        .iter()
        .find(|checkpoint| verified_step(&checkpoint.path, Some(&checkpoint.sha256)) == Some(checkpoint.step))
        .map(|checkpoint| checkpoint.path.clone())
}

fn write_spec(spec: &AttemptSpec) -> std::io::Result<()> {
    std::fs::create_dir_all(&spec.attempt_dir)?;
    let mut file = std::fs::File::create(spec.attempt_dir.join("spec.json"))?;
    write_all(Point::WriteSpec, &mut file, &serde_json::to_vec_pretty(spec)?)
}

/// 32 random bytes, hex.
fn new_token() -> std::io::Result<String> {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex::encode(bytes))
}
