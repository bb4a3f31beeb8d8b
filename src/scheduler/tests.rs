//! The scheduler against an executor that starts nothing: every interleaving can be played.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use async_trait::async_trait;
use lorad_proto::{
    PROTOCOL_VERSION,
    catalog::{BaseModelInfo, Plan},
    dataset::Report,
    event::{Envelope, ResultFile, ResultKind, Results, StepMetrics, WorkerEvent},
    spec::{AttemptSpec, Export, Sampling},
};
use serde_json::{Map, json};
use sha2::{Digest, Sha256};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    agent_api::Heard,
    app::DataDir,
    blobs::Blobs,
    config::Config,
    domain::{CancelMode, Dataset, DatasetId, Job, JobId, Model, ModelKind, NewJob, now_ms},
    downloads::Downloads,
    events::Events,
    executor::{Launch, Stop},
    store::Store,
    trainer::TrainerCatalog,
};

/// Processes that exist only as entries.
#[derive(Default)]
struct FakeExecutor {
    devices: Vec<String>,
    processes: Mutex<HashMap<AttemptKey, Observed>>,
    launches: Mutex<Vec<Launch>>,
    signals: Mutex<Vec<(AttemptKey, Stop)>>,
    adoptable: Mutex<HashSet<AttemptKey>>,
    refuses: bool,
}

impl FakeExecutor {
    fn dies(&self, key: AttemptKey, exit: Exit) {
        self.processes.lock().unwrap().insert(key, Observed::Exited(exit));
    }
}

#[async_trait]
impl Executor for FakeExecutor {
    fn caps(&self) -> &[String] {
        &self.devices
    }

    async fn submit(&self, launch: &Launch) -> std::io::Result<Started> {
        if self.refuses {
            return Err(std::io::Error::other("no more processes"));
        }
        self.processes.lock().unwrap().insert(launch.key, Observed::Running);
        self.launches.lock().unwrap().push(launch.clone());
        Ok(Started {
            pid: 4242,
            pid_start: Some(1),
        })
    }

    fn adopt(&self, key: AttemptKey, _: Started, _: PathBuf) -> bool {
        let adopted = self.adoptable.lock().unwrap().contains(&key);
        if adopted {
            self.processes.lock().unwrap().insert(key, Observed::Running);
        }
        adopted
    }

    fn stop(&self, key: AttemptKey, how: Stop) {
        self.signals.lock().unwrap().push((key, how));
    }

    fn observe(&self, key: AttemptKey) -> Observed {
        self.processes
            .lock()
            .unwrap()
            .get(&key)
            .cloned()
            .unwrap_or(Observed::Unknown)
    }

    fn forget(&self, key: AttemptKey) {
        self.processes.lock().unwrap().remove(&key);
    }
}

struct World {
    app: App,
    scheduler: Scheduler,
    executor: Arc<FakeExecutor>,
    dataset: DatasetId,
    _dir: tempfile::TempDir,
}

async fn world(devices: &[&str], change: impl FnOnce(&mut Config)) -> World {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::defaults().unwrap();
    config.scheduler.retry_backoff_ms = 0;
    change(&mut config);
    let data = DataDir::new(dir.path().to_owned());
    let store = Store::open(&data.database()).await.unwrap();
    let dataset = DatasetId::new();
    let model = Model {
        id: "tiny".parse().unwrap(),
        kind: ModelKind::Base,
        path: "/models/tiny".into(),
        source: "folder".to_owned(),
        licence: String::new(),
        builtin: false,
        info: BaseModelInfo {
            family: "sd1".to_owned(),
            bytes: 1,
            resolution: 64,
            prediction_type: "epsilon".to_owned(),
            details: Map::new(),
        },
        created_at_ms: now_ms(),
    };
    store.insert_model(&model).await.unwrap();
    let pictures = Dataset {
        id: dataset,
        name: "pictures".to_owned(),
        modality: "image".to_owned(),
        path: "/datasets/pictures".into(),
        n_items: 4,
        bytes: 100,
        sha256: "0".repeat(64),
        builtin: false,
        report: Report::default(),
        created_at_ms: now_ms(),
    };
    store.insert_dataset(&pictures).await.unwrap();
    let app = App {
        ballast: Arc::new(crate::space::Ballast::new(data.ballast(), 0, 0)),
        blobs: Blobs::local(&data.artifacts(), false).unwrap(),
        config: Arc::new(config),
        data: Arc::new(data),
        store,
        events: Events::default(),
        catalog: Arc::new(TrainerCatalog),
        downloads: Downloads::default(),
        traces: crate::traces::Traces::default(),
        wake: Arc::new(Notify::new()),
        shutdown: CancellationToken::new(),
    };
    let executor = Arc::new(FakeExecutor {
        devices: devices.iter().map(|d| (*d).to_owned()).collect(),
        ..FakeExecutor::default()
    });
    World {
        scheduler: scheduler(&app, &executor),
        app,
        executor,
        dataset,
        _dir: dir,
    }
}

fn scheduler(app: &App, executor: &Arc<FakeExecutor>) -> Scheduler {
    let api = AgentApi {
        app: app.clone(),
        heard: Heard::default(),
    };
    Scheduler::new(app.clone(), api, executor.clone())
}

impl World {
    async fn post(&self) -> Job {
        let new = NewJob {
            id: JobId::new(),
            parent_id: None,
            name: "a".to_owned(),
            tags: Vec::new(),
            notes: String::new(),
            priority: 0,
            base_model: "tiny".parse().unwrap(),
            dataset_id: self.dataset,
            family: "sd1".to_owned(),
            request: json!({}),
            hyperparameters: Map::from_iter([("lora_rank".to_owned(), json!(4))]),
            sampling: Sampling::default(),
            export: Export::default(),
            plan: Plan {
                total_steps: 10,
                batches_per_epoch: 1,
                trainable_params: 1,
                memory_bytes: 1,
                ..Plan::default()
            },
            owner: None,
            webhook: None,
        };
        self.app.create_job(&new, None).await.unwrap()
    }

    /// A round, and the starts that it began.
    async fn tick(&mut self) {
        self.scheduler.tick().await.unwrap();
        while let Some(start) = self.scheduler.starts.join_next_with_id().await {
            self.scheduler.finish_start(start).await.unwrap();
        }
    }

    fn last_launch(&self) -> Launch {
        self.executor.launches.lock().unwrap().last().unwrap().clone()
    }

    async fn job(&self, id: JobId) -> Job {
        self.app.store.job(id).await.unwrap()
    }

    /// Posts events as the worker of this launch.
    async fn say(&self, launch: &Launch, events: &[Envelope]) {
        let token = hex::encode(Sha256::digest(launch.token.as_bytes()));
        self.scheduler.api.hear(launch.key, &token, events).await.unwrap();
    }
}

fn numbered(from: u64, events: Vec<WorkerEvent>) -> Vec<Envelope> {
    let number = |(i, event)| Envelope {
        seq: from + i as u64,
        t_ms: 1,
        event,
    };
    events.into_iter().enumerate().map(number).collect()
}

fn hello() -> WorkerEvent {
    WorkerEvent::Hello {
        protocol: PROTOCOL_VERSION,
        version: "test".to_owned(),
        pid: 4242,
        device: "cpu".to_owned(),
        resumed_from_step: None,
    }
}

fn step(step: u64) -> WorkerEvent {
    WorkerEvent::Step(StepMetrics {
        step,
        total_steps: 10,
        epoch: 0.1,
        loss: Some(0.5),
        lr: 1e-3,
        grad_norm: Some(1.0),
        step_ms: 20.0,
        samples_per_s: 1.0,
        extra: std::collections::BTreeMap::new(),
    })
}

/// Writes a result file where a worker would, and the event that announces it.
fn deliver(launch: &Launch, bytes: &[u8]) -> WorkerEvent {
    std::fs::create_dir_all(launch.dir.join("results")).unwrap();
    std::fs::write(launch.dir.join("results/receipt.json"), bytes).unwrap();
    WorkerEvent::Done {
        results: Results {
            files: vec![ResultFile {
                name: "receipt.json".to_owned(),
                kind: ResultKind::Receipt,
                bytes: 2,
                sha256: hex::encode(Sha256::digest(b"{}")),
            }],
            summary: Map::from_iter([("final_loss".to_owned(), json!(0.5))]),
        },
    }
}

/// Ticks until the job is final; publication runs beside the scheduler.
async fn settle(world: &mut World, id: JobId) -> Job {
    for _ in 0..500 {
        world.tick().await;
        let job = world.job(id).await;
        if job.status.is_final() {
            return job;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{:?} never ended", world.job(id).await.status);
}

#[tokio::test]
async fn one_job_per_device_and_the_worker_gets_the_whole_specification() {
    let mut w = world(&["cpu", "cuda:0"], |_| {}).await;
    for _ in 0..3 {
        w.post().await;
    }
    w.tick().await;
    w.tick().await;
    assert_eq!(w.executor.launches.lock().unwrap().len(), 2);
    let launch = w.last_launch();
    let spec: AttemptSpec = serde_json::from_slice(&std::fs::read(launch.dir.join("spec.json")).unwrap()).unwrap();
    assert_eq!((spec.device.as_str(), spec.attempt), ("cuda:0", 1));
    assert_eq!(spec.hyperparameters["lora_rank"], 4);
    assert_eq!(spec.attempt_dir, launch.dir);
    assert!(
        !std::fs::read_to_string(launch.dir.join("spec.json"))
            .unwrap()
            .contains(&launch.token),
        "the token lies on disk"
    );
}

#[tokio::test]
async fn a_paused_queue_starts_nothing() {
    let mut w = world(&["cpu"], |_| {}).await;
    w.app.store.set_setting(QUEUE_PAUSED, "true").await.unwrap();
    w.post().await;
    w.tick().await;
    assert!(w.executor.launches.lock().unwrap().is_empty());
    w.app.store.set_setting(QUEUE_PAUSED, "false").await.unwrap();
    w.tick().await;
    assert_eq!(w.executor.launches.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn results_are_verified_published_and_the_job_succeeds() {
    let mut w = world(&["cpu"], |_| {}).await;
    let job = w.post().await;
    w.tick().await;
    let launch = w.last_launch();
    let done = deliver(&launch, b"{}");
    w.say(&launch, &numbered(1, vec![hello(), step(1), done])).await;
    let job = settle(&mut w, job.id).await;
    assert_eq!(job.status, JobStatus::Succeeded, "{:?}", job.error);
    assert_eq!(job.summary["final_loss"], 0.5);
    assert_eq!(w.app.blobs.open(job.id, "receipt.json", None).await.unwrap().size, 2);
    // They go when the job's success is stored, which the look above may have seen first.
    let start = std::time::Instant::now();
    while launch.dir.join("results").exists() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "published files lie about twice"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    w.post().await;
    w.tick().await;
    assert_eq!(
        w.executor.launches.lock().unwrap().len(),
        1,
        "the device is free before the process is dead"
    );
    w.executor.dies(launch.key, Exit::Code(0));
    w.tick().await;
    assert_eq!(w.executor.launches.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_result_file_that_is_not_the_announced_one_fails_the_job() {
    let mut w = world(&["cpu"], |_| {}).await;
    let job = w.post().await;
    w.tick().await;
    let launch = w.last_launch();
    let done = deliver(&launch, b"[]");
    w.say(&launch, &numbered(1, vec![hello(), step(1), done])).await;
    let job = settle(&mut w, job.id).await;
    assert_eq!(job.error.unwrap().code, "results.unusable");
    assert!(
        w.app
            .blobs
            .open(job.id, "receipt.json", None)
            .await
            .unwrap_err()
            .is_not_found()
    );
}

#[tokio::test]
async fn what_a_dead_worker_spooled_is_taken_before_its_job_is_judged() {
    let mut w = world(&["cpu"], |_| {}).await;
    let job = w.post().await;
    w.tick().await;
    let launch = w.last_launch();
    w.say(&launch, &numbered(1, vec![hello(), step(1)])).await;
    let done = deliver(&launch, b"{}");
    let mut spool = String::new();
    for event in numbered(1, vec![hello(), step(1), step(2), done]) {
        spool.push_str(&serde_json::to_string(&event).unwrap());
        spool.push('\n');
    }
    std::fs::write(launch.dir.join("events.jsonl"), spool).unwrap();
    w.executor.dies(launch.key, Exit::Signal(9));
    let job = settle(&mut w, job.id).await;
    assert_eq!((job.status, job.step), (JobStatus::Succeeded, 2));
}

#[tokio::test]
async fn a_worker_that_cannot_be_started_fails_the_job_after_three_tries() {
    let mut w = world(&["cpu"], |_| {}).await;
    w.executor = Arc::new(FakeExecutor {
        devices: vec!["cpu".to_owned()],
        refuses: true,
        ..FakeExecutor::default()
    });
    w.scheduler = scheduler(&w.app, &w.executor);
    let job = w.post().await;
    let job = settle(&mut w, job.id).await;
    assert_eq!(
        (job.attempt, job.error.unwrap().code.as_str()),
        (3, "worker.not_started")
    );
}

#[tokio::test]
async fn force_cancel_kills_at_once_and_leaves_no_files() {
    let mut w = world(&["cpu"], |_| {}).await;
    let job = w.post().await;
    w.tick().await;
    let launch = w.last_launch();
    w.say(&launch, &numbered(1, vec![hello(), step(1)])).await;
    w.app.cancel_job(job.id, CancelMode::Force).await.unwrap();
    w.tick().await;
    assert_eq!(*w.executor.signals.lock().unwrap(), [(launch.key, Stop::Kill)]);
    w.executor.dies(launch.key, Exit::Signal(9));
    w.tick().await;
    assert_eq!(w.job(job.id).await.status, JobStatus::Cancelled);
    assert!(!w.app.data.job(job.id).exists());
}

#[tokio::test]
async fn a_restarted_scheduler_adopts_a_living_worker_and_settles_a_dead_one() {
    let mut w = world(&["cpu", "cuda:0"], |_| {}).await;
    let (a, b) = (w.post().await, w.post().await);
    w.tick().await;
    let launches = w.executor.launches.lock().unwrap().clone();
    assert_eq!(launches.len(), 2);
    let lives = launches.iter().find(|launch| launch.key.0 == a.id).unwrap().clone();
    w.executor.adoptable.lock().unwrap().insert(lives.key);
    // The server dies and comes back: its executor has seen no process.
    w.executor.processes.lock().unwrap().clear();
    w.scheduler = scheduler(&w.app, &w.executor);
    w.tick().await;
    assert_eq!(w.job(a.id).await.attempt, 1, "a living worker keeps its job");
    assert_eq!(
        w.job(b.id).await.attempt,
        2,
        "a dead worker's job goes on in a new attempt"
    );
    w.say(&lives, &numbered(1, vec![hello(), step(1)])).await;
    assert_eq!(w.job(a.id).await.status, JobStatus::Running);
}

#[tokio::test]
async fn a_silent_worker_loses_its_job_only_when_its_process_is_dead() {
    let mut w = world(&["cpu"], |config| {
        config.scheduler.lease_ms = 0;
        config.scheduler.lease_grace_ms = 0;
        config.scheduler.adopt_window_ms = 0;
        config.scheduler.kill_grace_ms = 0;
    })
    .await;
    let job = w.post().await;
    w.tick().await;
    let launch = w.last_launch();
    tokio::time::sleep(Duration::from_millis(5)).await;
    w.tick().await;
    w.tick().await;
    assert_eq!(
        *w.executor.signals.lock().unwrap(),
        [(launch.key, Stop::Terminate), (launch.key, Stop::Kill)]
    );
    assert_eq!(w.job(job.id).await.attempt, 1);
    w.executor.dies(launch.key, Exit::Signal(9));
    w.tick().await;
    assert_eq!(w.job(job.id).await.attempt, 2);
}

#[tokio::test]
async fn a_follower_sees_every_event_once_and_in_order_across_a_resume() {
    let mut w = world(&["cpu"], |_| {}).await;
    let job = w.post().await;
    let mut follower = w.app.events.follow(&w.app.store, job.id, 0);
    w.tick().await;
    let launch = w.last_launch();
    w.say(&launch, &numbered(1, vec![hello(), step(1), step(2)])).await;
    let done = deliver(&launch, b"{}");
    w.say(&launch, &numbered(4, vec![step(3), done])).await;
    let job = settle(&mut w, job.id).await;
    let mut seen = Vec::new();
    while seen.last() != Some(&job.last_seq) {
        match tokio::time::timeout(Duration::from_secs(5), follower.next())
            .await
            .unwrap()
            .unwrap()
        {
            crate::events::News::Event(event) => seen.push(event.seq),
            crate::events::News::Progress(_) => {}
        }
    }
    assert_eq!(seen, (1..=job.last_seq).collect::<Vec<_>>());
    let mut resumed = w.app.events.follow(&w.app.store, job.id, job.last_seq - 1);
    let news = tokio::time::timeout(Duration::from_secs(5), resumed.next())
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(news, crate::events::News::Event(event) if event.seq == job.last_seq));
}

/// A server that dies after it started a worker and before it wrote its process down.
#[tokio::test]
async fn a_worker_whose_process_was_not_recorded_names_itself_and_keeps_its_device() {
    let mut w = world(&["cpu"], |config| config.scheduler.adopt_window_ms = 0).await;
    let job = w.post().await;
    let token = "the worker's";
    let new = crate::store::NewAttempt {
        device: "cpu",
        token_sha256: &hex::encode(Sha256::digest(token)),
        jobs_dir: &w.app.data.jobs(),
        lease_ms: 60_000,
        memory_bytes: None,
    };
    w.app.store.claim(&new).await.unwrap().unwrap();
    let key = (job.id, 1);
    let launch = Launch {
        key,
        dir: w.app.data.job(job.id).join("attempts/1"),
        token: token.to_owned(),
        socket: PathBuf::new(),
        threads: 0,
        memory_bytes: 0,
        nice: 0,
        heartbeat_ms: 1,
        lease_ms: 1,
    };
    w.executor.adoptable.lock().unwrap().insert(key);
    let me = std::process::id();
    let WorkerEvent::Hello {
        protocol,
        version,
        device,
        resumed_from_step,
        ..
    } = hello()
    else {
        unreachable!()
    };
    let hello = WorkerEvent::Hello {
        protocol,
        version,
        pid: me,
        device,
        resumed_from_step,
    };
    w.say(&launch, &numbered(1, vec![hello])).await;
    w.tick().await;
    let attempt = w.app.store.attempt(job.id, 1).await.unwrap();
    assert_eq!(
        (attempt.ended_at_ms, attempt.pid),
        (None, Some(me)),
        "a living worker was taken for dead"
    );
    assert!(attempt.pid_start.is_some(), "a reused pid could not be told");
    assert_eq!(w.executor.observe(key), Observed::Running, "nobody watches it");
}

#[tokio::test]
async fn a_pause_that_comes_during_the_export_pauses_and_is_no_crash() {
    let mut w = world(&["cpu"], |_| {}).await;
    let job = w.post().await;
    w.tick().await;
    let launch = w.last_launch();
    w.say(&launch, &numbered(1, vec![hello(), step(1)])).await;
    w.app.pause_job(job.id).await.unwrap();
    let exporting = WorkerEvent::Phase {
        phase: lorad_proto::event::Phase::Exporting,
        done: 0,
        total: 1,
    };
    let paused = WorkerEvent::Stopped {
        step: 1,
        reason: lorad_proto::event::StopReason::Paused,
        results: None,
    };
    w.say(&launch, &numbered(3, vec![exporting, paused])).await;
    assert_eq!(w.job(job.id).await.status, JobStatus::Saving);
    assert!(
        w.app.store.unpublished_attempts().await.unwrap().is_empty(),
        "an attempt without results would be published in a loop"
    );
    w.executor.dies(launch.key, Exit::Code(0));
    w.tick().await;
    let job = w.job(job.id).await;
    assert_eq!(
        (job.status, job.failed_attempts, job.error),
        (JobStatus::Paused, 0, None)
    );
    let events = w.app.store.events_after(job.id, 0, 100).await.unwrap();
    let reasons: Vec<_> = events
        .iter()
        .filter_map(|event| event.data["reason"].as_str())
        .collect();
    assert!(!reasons.iter().any(|reason| reason.contains("crash")), "{reasons:?}");
}

#[tokio::test]
async fn what_is_discarded_while_it_is_being_saved_leaves_no_file() {
    let mut w = world(&["cpu"], |_| {}).await;
    for mode in [CancelMode::Discard, CancelMode::Force] {
        let job = w.post().await;
        w.tick().await;
        let launch = w.last_launch();
        let done = deliver(&launch, b"{}");
        w.say(&launch, &numbered(1, vec![hello(), step(1), done])).await;
        w.app.cancel_job(job.id, mode).await.unwrap();
        let job = settle(&mut w, job.id).await;
        assert_eq!(job.status, JobStatus::Cancelled, "{mode}");
        w.executor.dies(launch.key, Exit::Code(0));
        w.tick().await;
        // The publication tidies up after the job became final.
        while !w.scheduler.publishing.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        let folder = w.app.data.artifacts().join(job.id.to_string());
        let left: Vec<_> = std::fs::read_dir(&folder)
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        assert_eq!(left, Vec::<PathBuf>::new(), "{mode}");
        assert!(!w.app.data.job(job.id).exists(), "{mode}");
    }
}

/// The manifest is a pipe: whoever reads it waits until the test writes.
#[tokio::test]
async fn checking_a_large_checkpoint_does_not_hold_up_the_other_device() {
    let mut w = world(&["cpu", "cuda:0"], |_| {}).await;
    let slow = w.post().await;
    w.tick().await;
    let launch = w.last_launch();
    let checkpoint = WorkerEvent::Checkpoint {
        step: 1,
        dir: "x".to_owned(),
        bytes: 1,
        sha256: "0".repeat(64),
    };
    w.say(&launch, &numbered(1, vec![hello(), step(1), checkpoint])).await;
    let dir = launch.dir.join("checkpoints/x");
    std::fs::create_dir_all(&dir).unwrap();
    let pipe = dir.join("manifest.json");
    let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, fifo, mode, 0).unwrap();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let writer = std::thread::spawn(move || {
        // Without a release it gives up, so that a server that waits here fails the test and does not hang it.
        let asked = released.recv_timeout(Duration::from_secs(20)).is_ok();
        std::fs::write(pipe, b"no manifest").unwrap();
        asked
    });
    w.executor.dies(launch.key, Exit::Signal(9));
    let quick = w.post().await;
    w.scheduler.tick().await.unwrap();
    let start = w.scheduler.starts.join_next_with_id().await.unwrap();
    w.scheduler.finish_start(start).await.unwrap();
    assert_eq!(w.last_launch().key.0, quick.id);
    let _ = release.send(());
    assert!(writer.join().unwrap(), "a round waited for the hashes of a checkpoint");
    w.tick().await;
    assert_eq!(w.last_launch().key, (slow.id, 2));
}
