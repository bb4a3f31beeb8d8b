//! Free devices take jobs: claim, write the specification, start the worker.

use std::{io::Read, path::PathBuf};

use lorad_proto::{
    PROTOCOL_VERSION,
    spec::{AttemptSpec, BaseModelRef, DatasetRef},
};
use sha2::{Digest, Sha256};

use super::Scheduler;
use crate::{
    checkpoint::verified_step,
    domain::{Checkpoint, Exit},
    executor::Launch,
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
            };
            if let Some(claimed) = self.app.store.claim(&new).await? {
                self.app.changed(claimed.job.clone());
                self.start(&claimed, device, token).await?;
            }
        }
        Ok(())
    }

    async fn start(&mut self, claimed: &Claimed, device: &str, token: String) -> Result<(), StoreError> {
        let (job, settings) = (&claimed.job, &self.app.config.scheduler);
        let key = (job.id, job.attempt);
        let launch = Launch {
            key,
            dir: claimed.dir.clone(),
            token,
            socket: self.app.data.agent_socket(),
            threads: settings.threads,
            nice: settings.nice,
            heartbeat_ms: settings.heartbeat_ms,
            lease_ms: settings.lease_ms,
        };
        let started = match write_spec(&self.spec(claimed, device)) {
            Ok(()) => self.executor.submit(&launch).await,
            Err(error) => Err(error),
        };
        match started {
            Ok(process) => {
                self.api.heard.note(key);
                tracing::info!(job.id = %job.id, job.attempt = job.attempt, job.family = job.family, device, pid = process.pid,
                    "started a worker");
                self.app
                    .store
                    .set_attempt_process(job.id, job.attempt, process.pid, process.pid_start)
                    .await
            }
            Err(error) => {
                tracing::error!(job.id = %job.id, %error, "a worker was not started");
                let attempt = self.app.store.attempt(job.id, job.attempt).await?;
                self.end(&attempt, &Exit::NotStarted(error.to_string())).await
            }
        }
    }

    fn spec(&self, claimed: &Claimed, device: &str) -> AttemptSpec {
        let job = &claimed.job;
        AttemptSpec {
            protocol: PROTOCOL_VERSION,
            job_id: job.id.to_string(),
            job_name: job.name.clone(),
            attempt: job.attempt,
            family: job.family.clone(),
            base_model: BaseModelRef {
                id: job.base_model.to_string(),
                path: claimed.base_path.clone(),
            },
            dataset: DatasetRef {
                id: job.dataset_id.to_string(),
                path: claimed.dataset_path.clone(),
            },
            hyperparameters: job.hyperparameters.clone(),
            sampling: job.sampling.clone(),
            export: job.export.clone(),
            device: device.to_owned(),
            threads: match self.app.config.scheduler.threads {
                0 => None,
                n => usize::try_from(n).ok(),
            },
            attempt_dir: claimed.dir.clone(),
            resume_from: newest_intact(&claimed.checkpoints),
        }
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
    let file = spec.attempt_dir.join("spec.json");
    std::fs::write(file, serde_json::to_vec_pretty(spec)?)
}

/// 32 random bytes, hex.
fn new_token() -> std::io::Result<String> {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex::encode(bytes))
}
