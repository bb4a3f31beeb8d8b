//! Tests of the store against a real file.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, HashSet};

use lorad_proto::{
    PROTOCOL_VERSION,
    catalog::{BaseModelInfo, Plan},
    dataset::Report,
    event::{Envelope, Level, Phase, Results, StepMetrics, StopReason, WorkerEvent},
    problem::Problem,
    spec::{Export, Sampling},
};
use serde_json::{Map, json};
use sqlx::Row;

use super::*;
use crate::domain::{
    Action, CancelMode, Change, Dataset, DatasetId, Desired, Exit, Job, Model, ModelKind, NewJob, Outcome, RetryLimits,
    now_ms,
};

pub(crate) const LIMITS: RetryLimits = RetryLimits {
    max_failed_attempts: 3,
    backoff_ms: 0,
    max_backoff_ms: 0,
};

pub(super) struct Fixture {
    pub(super) store: Store,
    dataset: DatasetId,
    pub(super) dir: tempfile::TempDir,
}

pub(super) async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("db.sqlite3")).await.unwrap();
    let dataset = DatasetId::new();
    store
        .insert_model(&Model {
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
        })
        .await
        .unwrap();
    store
        .insert_dataset(&Dataset {
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
        })
        .await
        .unwrap();
    Fixture { store, dataset, dir }
}

impl Fixture {
    /// Takes every job out of the queue.
    pub(super) async fn clear_queue(&self) {
        for job in self.store.queue().await.unwrap() {
            self.store.request_cancel(job.id, CancelMode::Discard).await.unwrap();
        }
    }

    pub(super) fn new_job(&self, name: &str, priority: i64) -> NewJob {
        NewJob {
            id: JobId::new(),
            parent_id: None,
            name: name.to_owned(),
            tags: vec!["a".to_owned()],
            notes: String::new(),
            priority,
            base_model: "tiny".parse().unwrap(),
            dataset_id: self.dataset,
            family: "sd1".to_owned(),
            request: json!({"name": name}),
            hyperparameters: Map::new(),
            sampling: Sampling::default(),
            export: Export::default(),
            plan: Plan {
                total_steps: 10,
                batches_per_epoch: 2,
                trainable_params: 5,
                memory_bytes: 6,
                ..Plan::default()
            },
            owner: None,
            webhook: None,
        }
    }

    async fn post(&self, name: &str, priority: i64) -> Job {
        self.store
            .insert_job(&self.new_job(name, priority), None)
            .await
            .unwrap()
    }

    async fn claim(&self) -> Option<Claimed> {
        self.claim_on("cpu").await
    }

    async fn claim_on(&self, device: &str) -> Option<Claimed> {
        let new = NewAttempt {
            device,
            token_sha256: &"a".repeat(64),
            jobs_dir: self.dir.path(),
            lease_ms: 1000,
            memory_bytes: None,
        };
        self.store.claim(&new).await.unwrap()
    }

    async fn apply(&self, job: &Job, events: &[Envelope]) -> Result<Applied> {
        let published = HashSet::new();
        self.store
            .apply(&WorkerBatch {
                job: job.id,
                attempt: job.attempt,
                token_sha256: &"a".repeat(64),
                events,
                published: &published,
                lease_ms: 1000,
            })
            .await
    }

    async fn end(&self, job: &Job, exit: Exit) -> (Job, Outcome) {
        self.store
            .end_attempt(job.id, job.attempt, &exit, "", LIMITS)
            .await
            .unwrap()
    }
}

fn numbered(from: u64, events: Vec<WorkerEvent>) -> Vec<Envelope> {
    let number = |(i, event)| Envelope {
        seq: from + i as u64,
        t_ms: 1000,
        event,
    };
    events.into_iter().enumerate().map(number).collect()
}

pub(super) fn hello(resumed_from_step: Option<u64>) -> WorkerEvent {
    WorkerEvent::Hello {
        protocol: PROTOCOL_VERSION,
        version: "test".to_owned(),
        pid: 1,
        device: "cpu".to_owned(),
        resumed_from_step,
    }
}

pub(super) fn step(step: u64) -> WorkerEvent {
    WorkerEvent::Step(StepMetrics {
        step,
        total_steps: 10,
        epoch: 0.5,
        loss: (step != 3).then_some(0.25),
        lr: 1e-4,
        grad_norm: Some(1.0),
        step_ms: 10.0,
        samples_per_s: 100.0,
        extra: BTreeMap::from([("snr".to_owned(), 2.0)]),
    })
}

pub(super) fn checkpoint(step: u64) -> WorkerEvent {
    WorkerEvent::Checkpoint {
        step,
        dir: format!("step-{step}"),
        bytes: 10,
        sha256: "c".repeat(64),
    }
}

pub(super) fn done() -> WorkerEvent {
    WorkerEvent::Done {
        results: Results {
            files: Vec::new(),
            summary: Map::new(),
        },
    }
}

#[tokio::test]
async fn the_database_allows_exactly_the_transitions_of_the_state_machine() {
    let f = fixture().await;
    let rows = sqlx::query("SELECT from_status, to_status FROM job_transitions")
        .fetch_all(&f.store.writer)
        .await
        .unwrap();
    let mut in_database: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let mut in_rust: Vec<(String, String)> = JobStatus::ALL
        .iter()
        .flat_map(|from| {
            Change::ALL
                .iter()
                .filter_map(move |change| Some((*from, from.next(*change).ok()?)))
        })
        .map(|(from, to)| (from.to_string(), to.to_string()))
        .collect();
    in_database.sort();
    in_rust.sort();
    in_rust.dedup();
    assert_eq!(in_database, in_rust);
}

#[tokio::test]
async fn the_trigger_aborts_an_illegal_transition_and_a_falling_fence() {
    let f = fixture().await;
    let job = f.post("a", 0).await;
    for sql in [
        "UPDATE jobs SET status = 'running'",
        "UPDATE jobs SET status = 'succeeded', finished_at_ms = 1",
        "UPDATE jobs SET attempt = -1",
        "UPDATE jobs SET status = 'nonsense'",
        "UPDATE jobs SET finished_at_ms = 1",
    ] {
        assert!(
            sqlx::query(sql).execute(&f.store.writer).await.is_err(),
            "{sql} was taken"
        );
    }
    assert_eq!(f.store.job(job.id).await.unwrap(), job);
}

#[tokio::test]
async fn the_pragmas_hold_on_every_connection() {
    let f = fixture().await;
    for pool in [&f.store.writer, &f.store.readers] {
        let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(pool).await.unwrap();
        assert_eq!(mode, "wal");
        for (pragma, expected) in [
            ("PRAGMA synchronous", 2_i64),
            ("PRAGMA foreign_keys", 1),
            ("PRAGMA busy_timeout", 5000),
        ] {
            let value: i64 = sqlx::query_scalar(pragma).fetch_one(pool).await.unwrap();
            assert_eq!(value, expected, "{pragma}");
        }
    }
    let write = sqlx::query("DELETE FROM jobs").execute(&f.store.readers).await;
    assert!(write.is_err(), "a reader wrote");
}

#[tokio::test]
async fn higher_priority_starts_first_then_the_older_one() {
    let f = fixture().await;
    for (name, priority) in [("first", 0), ("second", 0), ("urgent", 5)] {
        f.post(name, priority).await;
    }
    let mut order = Vec::new();
    for device in ["cpu", "cuda:0", "cuda:1"] {
        order.push(f.claim_on(device).await.unwrap().job.name);
    }
    assert_eq!(order, ["urgent", "first", "second"]);
}

#[tokio::test]
async fn a_device_takes_no_second_job_before_the_first_process_is_dead() {
    let f = fixture().await;
    f.post("a", 0).await;
    f.post("b", 0).await;
    let first = f.claim().await.unwrap().job;
    assert!(f.claim().await.is_none());
    f.apply(
        &first,
        &numbered(
            1,
            vec![
                hello(None),
                WorkerEvent::Failed {
                    problem: Problem::new("x", "x", "x"),
                },
            ],
        ),
    )
    .await
    .unwrap();
    assert!(f.claim().await.is_none(), "the job is over, its process is not");
    f.end(&first, Exit::Code(3)).await;
    assert_eq!(f.claim().await.unwrap().job.name, "b");
}

#[tokio::test]
async fn a_job_runs_from_post_to_success_and_every_change_is_an_event() {
    let f = fixture().await;
    let posted = f.post("a", 0).await;
    assert_eq!(
        (posted.status, posted.attempt, posted.last_seq),
        (JobStatus::Queued, 0, 1)
    );
    let claimed = f.claim().await.unwrap();
    assert_eq!(claimed.job.attempt, 1);
    let first = numbered(1, vec![hello(None), step(1), step(2), step(3)]);
    let applied = f.apply(&claimed.job, &first).await.unwrap();
    assert_eq!(
        (applied.acked_seq, applied.job.status, applied.job.step),
        (4, JobStatus::Running, 3)
    );
    let rest = numbered(
        5,
        vec![
            WorkerEvent::Phase {
                phase: Phase::Exporting,
                done: 0,
                total: 1,
            },
            done(),
        ],
    );
    let applied = f.apply(&claimed.job, &rest).await.unwrap();
    assert!(applied.publish);
    assert_eq!(applied.job.status, JobStatus::Saving);
    let files = [NewArtifact {
        name: "receipt.json".to_owned(),
        kind: crate::domain::ArtifactKind::Receipt,
        bytes: 2,
        sha256: "d".repeat(64),
    }];
    let job = f
        .store
        .complete(posted.id, 1, &files, &Map::from_iter([("loss".to_owned(), json!(1))]))
        .await
        .unwrap();
    assert_eq!(job.status, JobStatus::Succeeded);
    assert_eq!(f.store.artifacts(job.id).await.unwrap().len(), 1);
    assert_eq!(f.end(&claimed.job, Exit::Code(0)).await.1, Outcome::Settled);

    let events = f.store.events_after(job.id, 0, 1000).await.unwrap();
    let seqs: Vec<u64> = events.iter().map(|event| event.seq).collect();
    assert_eq!(seqs, (1..=job.last_seq).collect::<Vec<_>>());
    let to: Vec<_> = events.iter().filter_map(|event| event.data["to"].as_str()).collect();
    assert_eq!(to, ["queued", "preparing", "running", "saving", "succeeded"]);
    let metrics = events
        .iter()
        .find(|event| event.kind == crate::domain::EventKind::Metrics)
        .unwrap();
    assert_eq!(metrics.data["rows"].as_array().unwrap().len(), 3);
    assert_eq!(
        metrics.data["rows"][2][3],
        json!(null),
        "a loss that is not finite is null"
    );
    let rows = f.store.metrics(job.id, 0, 100).await.unwrap();
    assert_eq!(
        rows.iter().map(|row| row.loss).collect::<Vec<_>>(),
        [Some(0.25), Some(0.25), None]
    );
}

#[tokio::test]
async fn events_sent_twice_are_stored_once_and_a_gap_is_not_jumped() {
    let f = fixture().await;
    f.post("a", 0).await;
    let job = f.claim().await.unwrap().job;
    let events = numbered(1, vec![hello(None), step(1), step(2)]);
    f.apply(&job, &events).await.unwrap();
    let once = f.store.events_after(job.id, 0, 1000).await.unwrap();
    let applied = f.apply(&job, &events).await.unwrap();
    assert_eq!(applied.acked_seq, 3);
    assert_eq!(f.store.events_after(job.id, 0, 1000).await.unwrap(), once);
    let applied = f.apply(&job, &numbered(6, vec![step(5)])).await.unwrap();
    assert_eq!((applied.acked_seq, applied.job.step), (3, 2));
}

#[tokio::test]
async fn an_older_attempt_and_a_wrong_token_cannot_write() {
    let f = fixture().await;
    f.post("a", 0).await;
    let old = f.claim().await.unwrap().job;
    f.apply(&old, &numbered(1, vec![hello(None), step(1)])).await.unwrap();
    let (job, outcome) = f.end(&old, Exit::Signal(9)).await;
    assert!(matches!(outcome, Outcome::Requeue { .. }));
    assert_eq!(job.status, JobStatus::Queued);
    assert!(matches!(
        f.apply(&old, &numbered(3, vec![step(2)])).await,
        Err(StoreError::Fenced { .. })
    ));
    let new = f.claim().await.unwrap().job;
    assert_eq!(new.attempt, 2);
    assert!(matches!(
        f.apply(&old, &numbered(3, vec![step(2)])).await,
        Err(StoreError::Fenced { attempt: 1, .. })
    ));
    let published = HashSet::new();
    let guessed = WorkerBatch {
        job: new.id,
        attempt: 2,
        token_sha256: &"b".repeat(64),
        events: &[],
        published: &published,
        lease_ms: 1000,
    };
    assert!(matches!(f.store.apply(&guessed).await, Err(StoreError::Fenced { .. })));
}

#[tokio::test]
async fn a_resumed_attempt_gets_the_newest_checkpoint_and_replaces_repeated_steps() {
    let f = fixture().await;
    f.post("a", 0).await;
    let first = f.claim().await.unwrap().job;
    let events = vec![hello(None), step(1), step(2), checkpoint(2), step(3), step(4)];
    f.apply(&first, &numbered(1, events)).await.unwrap();
    let (job, _) = f.end(&first, Exit::Signal(9)).await;
    assert_eq!(job.failed_attempts, 0, "a checkpoint is progress");
    let second = f.claim().await.unwrap();
    assert_eq!(second.checkpoints[0].step, 2);
    assert!(second.checkpoints[0].path.ends_with("attempts/1/checkpoints/step-2"));
    f.apply(&second.job, &numbered(1, vec![hello(Some(2))])).await.unwrap();
    let steps: Vec<u64> = f
        .store
        .metrics(job.id, 0, 100)
        .await
        .unwrap()
        .iter()
        .map(|row| row.step)
        .collect();
    assert_eq!(steps, [1, 2]);
    assert_eq!(f.store.job(job.id).await.unwrap().step, 2);
    f.apply(&second.job, &numbered(2, vec![step(3)])).await.unwrap();
    assert_eq!(f.store.metrics(job.id, 0, 100).await.unwrap()[2].attempt, 2);
}

#[tokio::test]
async fn three_deaths_without_progress_fail_the_job_with_a_name() {
    let f = fixture().await;
    let job = f.post("a", 0).await;
    for n in 1..=3 {
        let attempt = f.claim().await.unwrap().job;
        assert_eq!(attempt.attempt, n);
        f.end(&attempt, Exit::Signal(9)).await;
    }
    let job = f.store.job(job.id).await.unwrap();
    assert_eq!(job.status, JobStatus::Failed);
    assert_eq!(job.error.unwrap().code, "worker.killed");
    assert!(f.claim().await.is_none());
}

#[tokio::test]
async fn cancelling_works_in_every_phase() {
    let f = fixture().await;
    let queued = f.post("queued", 0).await;
    assert_eq!(
        f.store
            .request_cancel(queued.id, CancelMode::Discard)
            .await
            .unwrap()
            .status,
        JobStatus::Cancelled
    );
    assert!(matches!(
        f.store.request_cancel(queued.id, CancelMode::Force).await,
        Err(StoreError::NotAllowed {
            action: Action::Cancel,
            ..
        })
    ));

    let running = f.post("running", 0).await;
    let attempt = f.claim().await.unwrap().job;
    f.apply(&attempt, &numbered(1, vec![hello(None), step(1)]))
        .await
        .unwrap();
    let asked = f.store.request_cancel(running.id, CancelMode::Discard).await.unwrap();
    assert_eq!(
        (asked.status, asked.desired),
        (JobStatus::Running, Desired::CancelDiscard)
    );
    let stopped = WorkerEvent::Stopped {
        step: 1,
        reason: StopReason::Cancelled,
        results: None,
    };
    let applied = f.apply(&attempt, &numbered(3, vec![stopped])).await.unwrap();
    assert_eq!((applied.job.status, applied.publish), (JobStatus::Cancelled, false));
    f.end(&attempt, Exit::Code(0)).await;

    f.post("dies", 0).await;
    let attempt = f.claim().await.unwrap().job;
    f.store.request_cancel(attempt.id, CancelMode::Force).await.unwrap();
    assert_eq!(f.end(&attempt, Exit::Signal(9)).await.0.status, JobStatus::Cancelled);
}

#[tokio::test]
async fn cancel_with_save_exports_what_was_trained_and_stays_cancelled() {
    let f = fixture().await;
    f.post("a", 0).await;
    let attempt = f.claim().await.unwrap().job;
    f.apply(&attempt, &numbered(1, vec![hello(None), step(1)]))
        .await
        .unwrap();
    f.store.request_cancel(attempt.id, CancelMode::Save).await.unwrap();
    let stopped = WorkerEvent::Stopped {
        step: 1,
        reason: StopReason::Cancelled,
        results: Some(Results {
            files: Vec::new(),
            summary: Map::new(),
        }),
    };
    let applied = f.apply(&attempt, &numbered(3, vec![stopped])).await.unwrap();
    assert!(applied.publish);
    let job = f.store.complete(attempt.id, 1, &[], &Map::new()).await.unwrap();
    assert_eq!(job.status, JobStatus::Cancelled);
}

#[tokio::test]
async fn a_paused_job_keeps_its_place_and_resumes_or_saves_from_its_checkpoint() {
    let f = fixture().await;
    f.post("a", 0).await;
    let attempt = f.claim().await.unwrap().job;
    f.apply(&attempt, &numbered(1, vec![hello(None), step(1)]))
        .await
        .unwrap();
    assert_eq!(f.store.request_pause(attempt.id).await.unwrap().desired, Desired::Pause);
    let stopped = WorkerEvent::Stopped {
        step: 1,
        reason: StopReason::Paused,
        results: None,
    };
    let applied = f
        .apply(&attempt, &numbered(3, vec![checkpoint(1), stopped]))
        .await
        .unwrap();
    assert_eq!(applied.job.status, JobStatus::Paused);
    f.end(&attempt, Exit::Code(0)).await;
    assert!(f.claim().await.is_none());
    let queued = f.store.request_cancel(attempt.id, CancelMode::Save).await.unwrap();
    assert_eq!(
        (queued.status, queued.desired),
        (JobStatus::Queued, Desired::CancelSave)
    );
    let second = f.claim().await.unwrap();
    assert_eq!((second.job.attempt, second.checkpoints.len()), (2, 1));
}

#[tokio::test]
async fn requests_are_outstanding_until_served() {
    let f = fixture().await;
    f.post("a", 0).await;
    let attempt = f.claim().await.unwrap().job;
    assert!(
        f.store.request_now(attempt.id, Action::Checkpoint).await.is_err(),
        "it does not train yet"
    );
    f.apply(&attempt, &numbered(1, vec![hello(None), step(1)]))
        .await
        .unwrap();
    f.store.request_now(attempt.id, Action::Checkpoint).await.unwrap();
    let job = f.store.request_now(attempt.id, Action::Checkpoint).await.unwrap();
    assert_eq!((job.checkpoint_request, job.sample_request), (Some(2), None));
    let applied = f.apply(&attempt, &numbered(3, vec![checkpoint(1)])).await.unwrap();
    assert_eq!(applied.job.checkpoint_request, None);
}

#[tokio::test]
async fn an_idempotency_key_gives_one_job_and_one_answer() {
    let f = fixture().await;
    let key = IdempotencyKey {
        key: "k".to_owned(),
        scope: "POST /jobs".to_owned(),
        body_sha256: "e".repeat(64),
    };
    assert_eq!(f.store.begin_idempotency(&key).await.unwrap(), Begin::New);
    assert_eq!(f.store.begin_idempotency(&key).await.unwrap(), Begin::InFlight);
    let answer = |job: &Job| StoredAnswer {
        status: 201,
        location: Some(format!("/jobs/{}", job.id)),
        body: "{}".to_owned(),
    };
    let job = f
        .store
        .insert_job(&f.new_job("a", 0), Some((&key, &answer)))
        .await
        .unwrap();
    assert_eq!(
        f.store.begin_idempotency(&key).await.unwrap(),
        Begin::Replay(answer(&job))
    );
    let other = IdempotencyKey {
        body_sha256: "f".repeat(64),
        ..key.clone()
    };
    assert_eq!(f.store.begin_idempotency(&other).await.unwrap(), Begin::OtherBody);
    let fresh = IdempotencyKey {
        key: "k2".to_owned(),
        ..key
    };
    assert_eq!(f.store.begin_idempotency(&fresh).await.unwrap(), Begin::New);
    f.store.abandon_idempotency(&fresh).await.unwrap();
    assert_eq!(f.store.begin_idempotency(&fresh).await.unwrap(), Begin::New);
    f.store.abandon_cut_off_requests().await.unwrap();
    assert_eq!(f.store.begin_idempotency(&fresh).await.unwrap(), Begin::New);
}

#[tokio::test]
async fn lists_page_newest_first_and_filter() {
    let f = fixture().await;
    for i in 0..5 {
        f.post(&format!("job 100% {i}"), 0).await;
    }
    let mut names = Vec::new();
    let mut filter = JobFilter {
        limit: 2,
        ..JobFilter::default()
    };
    loop {
        let page = f.store.jobs(&filter).await.unwrap();
        names.extend(page.data.iter().map(|job| job.name.clone()));
        filter.after = page.data.last().map(|job| job.id);
        if !page.has_more {
            break;
        }
    }
    assert_eq!(names, (0..5).rev().map(|i| format!("job 100% {i}")).collect::<Vec<_>>());
    let count = async |filter: JobFilter| {
        f.store
            .jobs(&JobFilter { limit: 100, ..filter })
            .await
            .unwrap()
            .data
            .len()
    };
    let q = |q: &str| JobFilter {
        q: Some(q.to_owned()),
        ..JobFilter::default()
    };
    assert_eq!(
        (count(q("100% 3")).await, count(q("JOB")).await, count(q("_")).await),
        (1, 5, 5)
    );
    assert_eq!(count(q("%3")).await, 0);
    let tag = |tag: &str| JobFilter {
        tag: Some(tag.to_owned()),
        ..JobFilter::default()
    };
    assert_eq!((count(tag("a")).await, count(tag("b")).await), (5, 0));
    let status = JobFilter {
        status: vec![JobStatus::Running, JobStatus::Paused],
        ..JobFilter::default()
    };
    assert_eq!(count(status).await, 0);
}

#[tokio::test]
async fn what_a_job_uses_cannot_be_deleted_and_a_deleted_job_leaves_no_row() {
    let f = fixture().await;
    let job = f.post("a", 0).await;
    assert!(matches!(
        f.store.delete_dataset(f.dataset).await,
        Err(StoreError::InUse { .. })
    ));
    assert!(matches!(
        f.store.delete_model(&"tiny".parse().unwrap()).await,
        Err(StoreError::InUse { .. })
    ));
    assert!(matches!(
        f.store.delete_job(job.id).await,
        Err(StoreError::NotAllowed { .. })
    ));
    f.store.request_cancel(job.id, CancelMode::Force).await.unwrap();
    f.store.delete_job(job.id).await.unwrap();
    for table in [
        "jobs",
        "job_events",
        "job_metrics",
        "job_attempts",
        "artifacts",
        "job_samples",
        "job_checkpoints",
    ] {
        let n: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {table}")))
            .fetch_one(&f.store.writer)
            .await
            .unwrap();
        assert_eq!(n, 0, "{table}");
    }
    f.store.delete_dataset(f.dataset).await.unwrap();
    assert!(matches!(
        f.store.dataset(f.dataset).await,
        Err(StoreError::NotFound { .. })
    ));
}

#[tokio::test]
async fn a_worker_of_another_protocol_fails_the_job_clearly() {
    let f = fixture().await;
    f.post("a", 0).await;
    let attempt = f.claim().await.unwrap().job;
    let alien = WorkerEvent::Hello {
        protocol: PROTOCOL_VERSION + 1,
        version: "9".to_owned(),
        pid: 1,
        device: "cpu".to_owned(),
        resumed_from_step: None,
    };
    let log = WorkerEvent::Log {
        level: Level::Info,
        message: "never stored".to_owned(),
    };
    let applied = f.apply(&attempt, &numbered(1, vec![alien, log])).await.unwrap();
    assert_eq!(applied.job.error.unwrap().code, "worker.protocol");
    assert_eq!(applied.acked_seq, 1);
}

#[test]
fn versions_compare_as_numbers() {
    assert!(is_at_least("3.51.3", SQLITE_MIN_VERSION));
    assert!(is_at_least("3.100.0", SQLITE_MIN_VERSION));
    assert!(!is_at_least("3.51.2", SQLITE_MIN_VERSION));
    assert!(!is_at_least("3.9.9", SQLITE_MIN_VERSION));
}

#[tokio::test]
async fn a_database_of_a_newer_version_is_refused_with_what_to_do_and_left_as_it_is() {
    let f = fixture().await;
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (9999, 'later', 1, x'00', 0)",
    )
    .execute(&f.store.writer)
    .await
    .unwrap();
    f.store.close().await;
    let file = f.dir.path().join("db.sqlite3");
    let before = std::fs::read(&file).unwrap();
    let refused = Store::open(&file).await.unwrap_err();
    assert!(matches!(refused, StoreError::Newer { version: 9999, .. }), "{refused}");
    for part in ["newer lorad", "9999", "restore a backup", "db.sqlite3"] {
        assert!(refused.to_string().contains(part), "{refused}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), before);
}
