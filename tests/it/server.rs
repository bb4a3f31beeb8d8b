//! Servers for tests, and what tests ask of them.

use std::{
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use lorad::{
    config::Config,
    domain::{Dataset, DatasetId, Job, JobId, Model, ModelKind, NewJob, now_ms},
    serve::{ServerHandle, serve},
    store::Store,
};
use lorad_proto::{
    catalog::{BaseModelInfo, Plan},
    dataset::Report,
    spec::{Export, Sampling},
};
use serde_json::{Map, Value};

use crate::scripted;

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A server in this process whose workers run the scripted trainer.
pub struct TestServer {
    pub handle: ServerHandle,
    pub dir: tempfile::TempDir,
    dataset: DatasetId,
}

/// Settings of a server in `dir`, with what the test wants on top.
pub fn settings(dir: &Path, more: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
    let mut settings = vec![
        ("server.bind", "127.0.0.1:0".to_owned()),
        ("storage.data_dir", dir.join("data").display().to_string()),
        ("scheduler.tick_ms", "100".to_owned()),
        ("scheduler.retry_backoff_ms", "50".to_owned()),
        ("scheduler.heartbeat_ms", "200".to_owned()),
        ("scheduler.kill_grace_ms", "2000".to_owned()),
        (
            "scheduler.worker_program",
            scripted::worker_program(dir).display().to_string(),
        ),
    ];
    settings.extend(more.iter().map(|(key, value)| (*key, (*value).to_owned())));
    settings
}

/// A model and a dataset that only the scripted trainer can use.
pub async fn furnish(store: &Store) -> DatasetId {
    let model = Model {
        id: "scripted".parse().unwrap(),
        kind: ModelKind::Base,
        path: "/nonexistent".into(),
        source: "folder".to_owned(),
        licence: String::new(),
        builtin: false,
        info: BaseModelInfo {
            family: "scripted".to_owned(),
            bytes: 1,
            resolution: 64,
            prediction_type: "epsilon".to_owned(),
            details: Map::new(),
        },
        created_at_ms: now_ms(),
    };
    store.insert_model(&model).await.unwrap();
    let dataset = DatasetId::new();
    store
        .insert_dataset(&Dataset {
            id: dataset,
            name: "none".to_owned(),
            modality: "image".to_owned(),
            path: "/nonexistent".into(),
            n_items: 1,
            bytes: 1,
            sha256: "0".repeat(64),
            builtin: false,
            report: Report::default(),
            created_at_ms: now_ms(),
        })
        .await
        .unwrap();
    dataset
}

/// A job for the scripted trainer.
pub fn scripted_job(dataset: DatasetId, script: &Value) -> NewJob {
    NewJob {
        id: JobId::new(),
        parent_id: None,
        name: "scripted".to_owned(),
        tags: Vec::new(),
        notes: String::new(),
        priority: 0,
        base_model: "scripted".parse().unwrap(),
        dataset_id: dataset,
        family: "scripted".to_owned(),
        request: script.clone(),
        hyperparameters: script.as_object().unwrap().clone(),
        sampling: Sampling::default(),
        export: Export::default(),
        plan: Plan {
            total_steps: script["steps"].as_u64().unwrap_or(20),
            batches_per_epoch: 10,
            trainable_params: 1,
            memory_bytes: 1,
            ..Plan::default()
        },
        owner: None,
        webhook: None,
    }
}

impl TestServer {
    pub async fn start() -> Self {
        Self::with(&[]).await
    }

    pub async fn with(more: &[(&'static str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::from_layers(None, std::collections::HashMap::new(), &settings(dir.path(), more)).unwrap();
        let handle = serve(config).await.unwrap();
        let dataset = furnish(&handle.app().store).await;
        Self { handle, dir, dataset }
    }

    pub fn store(&self) -> &Store {
        &self.handle.app().store
    }

    pub fn dataset(&self) -> DatasetId {
        self.dataset
    }

    pub async fn post(&self, script: Value) -> Job {
        self.handle
            .app()
            .create_job(&scripted_job(self.dataset, &script), None)
            .await
            .unwrap()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.handle.address())
    }

    pub async fn wait(&self, job: JobId, what: &str, until: impl Fn(&Job) -> bool) -> Job {
        wait(self.store(), job, what, until).await
    }

    pub async fn ended(&self, job: JobId) -> Job {
        self.wait(job, "the end", |job| job.status.is_final()).await
    }

    /// Waits until no worker process is alive.
    pub async fn idle(&self) {
        let start = Instant::now();
        while !self.store().live_attempts().await.unwrap().is_empty() {
            assert!(start.elapsed() < PATIENCE, "a worker process does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Polls a job until it is as wanted.
pub async fn wait(store: &Store, id: JobId, what: &str, until: impl Fn(&Job) -> bool) -> Job {
    let start = Instant::now();
    loop {
        let job = store.job(id).await.unwrap();
        if until(&job) {
            return job;
        }
        assert!(
            !job.status.is_final(),
            "{what} never came: {} {:?}",
            job.status,
            job.error
        );
        assert!(
            start.elapsed() < PATIENCE,
            "{what} did not come in time: {} at step {}",
            job.status,
            job.step
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Every step's figures, and that none is missing, doubled or wrong.
pub async fn assert_every_step(store: &Store, job: &Job, steps: u64) {
    let rows = store.metrics(job.id, 0, u64::MAX).await.unwrap();
    let found: Vec<u64> = rows.iter().map(|row| row.step).collect();
    assert_eq!(found, (1..=steps).collect::<Vec<_>>());
    for row in rows {
        // JSON text gives a number back to the last bit but one.
        let error = row.loss.unwrap() * row.step as f64 - 1.0;
        assert!(error.abs() < 1e-12, "step {}: {:?}", row.step, row.loss);
    }
    let events = store.events_after(job.id, 0, 100_000).await.unwrap();
    let seqs: Vec<u64> = events.iter().map(|event| event.seq).collect();
    assert_eq!(seqs, (1..=job.last_seq).collect::<Vec<_>>());
}

/// A server in a process of its own, to be killed.
pub struct ServerProcess {
    child: Child,
    pub address: String,
}

impl ServerProcess {
    /// Starts one and does not wait until it is up; its address is not known.
    pub fn spawn(dir: &Path, settings: &[(&str, String)]) -> Self {
        let mut command = scripted::server_command(&dir.join("data"), settings);
        let quiet = std::process::Stdio::null;
        Self {
            child: command.stdout(quiet()).stderr(quiet()).spawn().unwrap(),
            address: String::new(),
        }
    }

    pub async fn start(dir: &Path, settings: &[(&str, String)]) -> Self {
        let data: PathBuf = dir.join("data");
        let note = data.join(scripted::ADDRESS_FILE);
        let _ = std::fs::remove_file(&note);
        let mut command = scripted::server_command(&data, settings);
        command.stdout(std::process::Stdio::null());
        let mut child = command.spawn().unwrap();
        let start = Instant::now();
        let address = loop {
            if let Ok(address) = std::fs::read_to_string(&note) {
                break address;
            }
            assert!(child.try_wait().unwrap().is_none(), "the server process ended");
            assert!(start.elapsed() < PATIENCE, "the server process does not start");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        Self { child, address }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`, and waits until it is gone; so does dropping it.
    pub fn kill(self) {
        drop(self);
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `kill -9` for a process that is not a child of this one.
pub fn kill_9(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

/// A signal for a process that is not a child of this one.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}
