//! What breaks, and what is still there afterwards: processes killed with `kill -9` at a bad moment.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use lorad::{
    config::Config,
    domain::{EventKind, Job, JobStatus, NewJob, now_ms},
    serve::{ServeError, serve},
    store::Store,
    trainer::TrainerCatalog,
};
use lorad_proto::{
    catalog::{Catalog, Plan},
    event::{Envelope, WorkerEvent},
    spec::Sampling,
};
use serde_json::{Value, json};

use crate::scripted::let_go;
use crate::server::{
    PATIENCE, ServerProcess, TestServer, assert_every_step, furnish, kill_9, scripted_job, settings, wait,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_is_noticed_at_once_named_and_resumed_from_its_checkpoint() {
    // A tick comes every 30 s: only the end of the process itself can wake the scheduler sooner.
    let server = TestServer::with(&[("scheduler.tick_ms", "30000")]).await;
    let job = server
        .post(json!({"steps": 60, "step_ms": 1, "checkpoint_every": 10, "hold_at": 25}))
        .await;
    server.wait(job.id, "the step to die at", |job| job.step == 25).await;
    let pid = server.store().attempt(job.id, 1).await.unwrap().pid.unwrap();
    let killed_at = now_ms();
    kill_9(pid);
    let job = server.ended(job.id).await;
    assert_eq!((job.status, job.attempt), (JobStatus::Succeeded, 2));
    assert_every_step(server.store(), &job, 60).await;

    let statuses = server
        .store()
        .newest_events(job.id, EventKind::Status, 100)
        .await
        .unwrap();
    let lost = statuses.iter().find(|event| event.data["to"] == "interrupted").unwrap();
    assert!(
        lost.data["reason"].as_str().unwrap().contains("SIGKILL"),
        "{}",
        lost.data
    );
    let noticed_ms = lost.t_ms - killed_at;
    println!("a killed worker was noticed after {noticed_ms} ms");
    assert!(
        noticed_ms < 10_000,
        "noticed after {noticed_ms} ms: by a tick, not by its end"
    );
    let first_of_second = server.store().metrics(job.id, 21, 21).await.unwrap();
    assert_eq!(first_of_second[0].attempt, 2, "it did not resume from step 20");
    assert_eq!(
        server.store().metrics(job.id, 20, 20).await.unwrap()[0].attempt,
        1,
        "it repeated what was checkpointed"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_checkpoint_is_passed_over_for_an_older_one() {
    let server = TestServer::start().await;
    let job = server
        .post(json!({"steps": 60, "step_ms": 1, "checkpoint_every": 10, "hold_at": 25}))
        .await;
    server.wait(job.id, "two checkpoints", |job| job.step == 25).await;
    let newest = server.store().checkpoints(job.id).await.unwrap()[0].clone();
    assert_eq!(newest.step, 20);
    let pid = server.store().attempt(job.id, 1).await.unwrap().pid.unwrap();
    std::fs::write(newest.path.join("state.json"), b"[]").unwrap();
    kill_9(pid);
    let job = server.ended(job.id).await;
    assert_eq!((job.status, job.attempt), (JobStatus::Succeeded, 2));
    assert_eq!(server.store().metrics(job.id, 11, 11).await.unwrap()[0].attempt, 2);
    assert_every_step(server.store(), &job, 60).await;
}

/// Waits until a worker's spool holds such an event.
async fn spooled(attempt_dir: &Path, is_it: impl Fn(&WorkerEvent) -> bool) {
    let start = Instant::now();
    loop {
        let text = std::fs::read_to_string(attempt_dir.join("events.jsonl")).unwrap_or_default();
        let mut events = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Envelope>(line).ok());
        if events.any(|envelope| is_it(&envelope.event)) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "the event was never spooled");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until a worker has ended by itself; the note it left.
async fn exited(attempt_dir: &Path) -> Value {
    let start = Instant::now();
    loop {
        let note = std::fs::read(attempt_dir.join("exit.json")).unwrap_or_default();
        if let Ok(note) = serde_json::from_slice(&note) {
            return note;
        }
        assert!(start.elapsed() < PATIENCE, "the worker does not end");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A data directory with one job in it, before any server runs.
pub async fn prepared(dir: &Path, script: Value) -> (Store, Job) {
    let data = dir.join("data");
    std::fs::create_dir_all(&data).unwrap();
    let store = Store::open(&data.join("lorad.sqlite3")).await.unwrap();
    let dataset = furnish(&store).await;
    let job = store.insert_job(&scripted_job(dataset, &script), None).await.unwrap();
    (store, job)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_loses_no_event_and_its_worker_trains_on() {
    let dir = tempfile::tempdir().unwrap();
    let (store, job) = prepared(dir.path(), json!({"steps": 150, "step_ms": 5, "hold_at": 60})).await;
    let settings = settings(dir.path(), &[]);
    let first = ServerProcess::start(dir.path(), &settings).await;
    wait(&store, job.id, "training", |job| job.step >= 5).await;
    let attempt = store.attempt(job.id, 1).await.unwrap();
    first.kill();
    let known = store.job(job.id).await.unwrap().step;
    // It may have been at step 60 already; then it is let go and trains the rest without a server.
    let_go(&attempt.dir);
    spooled(&attempt.dir, |event| matches!(event, WorkerEvent::Done { .. })).await;
    assert_eq!(
        store.job(job.id).await.unwrap().step,
        known,
        "someone writes without a server"
    );
    let second = ServerProcess::start(dir.path(), &settings).await;
    let job = wait(&store, job.id, "the end", |job| job.status.is_final()).await;
    assert_eq!(
        (job.status, job.attempt),
        (JobStatus::Succeeded, 1),
        "the worker was not taken over"
    );
    assert!(known <= 60, "step {known} was reached before it was allowed");
    assert_every_step(&store, &job, 150).await;

    let url = format!("http://{}/jobs/{}/files/receipt.json", second.address, job.id);
    assert_eq!(
        reqwest::get(url).await.unwrap().json::<Value>().await.unwrap(),
        json!({"step": 150})
    );
    second.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_takes_over_a_worker_that_still_trains() {
    let dir = tempfile::tempdir().unwrap();
    let (store, job) = prepared(dir.path(), json!({"steps": 60, "step_ms": 1, "hold_at": 20})).await;
    let settings = settings(dir.path(), &[]);
    let first = ServerProcess::start(dir.path(), &settings).await;
    wait(&store, job.id, "the hold", |job| job.step == 20).await;
    first.kill();
    let second = ServerProcess::start(dir.path(), &settings).await;
    let attempt = store.attempt(job.id, 1).await.unwrap();
    let_go(&attempt.dir);
    let job = wait(&store, job.id, "the end", |job| job.status.is_final()).await;
    assert_eq!((job.status, job.attempt), (JobStatus::Succeeded, 1));
    assert_every_step(&store, &job, 60).await;
    second.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_ends_while_no_server_runs_has_not_worked_in_vain() {
    let dir = tempfile::tempdir().unwrap();
    let script = json!({"steps": 40, "step_ms": 1, "hold_at": 10});
    let (store, job) = prepared(dir.path(), script).await;
    // A short lease: it waits that long for an answer before it ends by itself.
    let settings = settings(dir.path(), &[("scheduler.lease_ms", "2000")]);
    let first = ServerProcess::start(dir.path(), &settings).await;
    wait(&store, job.id, "the hold", |job| job.step == 10).await;
    let attempt = store.attempt(job.id, 1).await.unwrap();
    first.kill();
    let_go(&attempt.dir);
    exited(&attempt.dir).await;
    let second = ServerProcess::start(dir.path(), &settings).await;
    let job = wait(&store, job.id, "the end", |job| job.status.is_final()).await;
    assert_eq!((job.status, job.attempt), (JobStatus::Succeeded, 1));
    assert_every_step(&store, &job, 40).await;
    second.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn server_and_worker_killed_together_is_a_resume_from_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let script = json!({"steps": 60, "step_ms": 1, "checkpoint_every": 10, "hold_at": 25});
    let (store, job) = prepared(dir.path(), script).await;
    let settings = settings(dir.path(), &[]);
    let first = ServerProcess::start(dir.path(), &settings).await;
    wait(&store, job.id, "a checkpoint and more", |job| job.step == 25).await;
    let pid = store.attempt(job.id, 1).await.unwrap().pid.unwrap();
    first.kill();
    kill_9(pid);
    let second = ServerProcess::start(dir.path(), &settings).await;
    let job = wait(&store, job.id, "the end", |job| job.status.is_final()).await;
    assert_eq!((job.status, job.attempt), (JobStatus::Succeeded, 2));
    assert_every_step(&store, &job, 60).await;
    second.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_cut_off_for_a_whole_lease_checkpoints_and_stops_and_the_job_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let (store, job) = prepared(dir.path(), json!({"steps": 60, "step_ms": 1, "hold_at": 30})).await;
    let settings = settings(dir.path(), &[("scheduler.lease_ms", "2000")]);
    let first = ServerProcess::start(dir.path(), &settings).await;
    wait(&store, job.id, "the hold", |job| job.step == 30).await;
    let attempt = store.attempt(job.id, 1).await.unwrap();
    let start = Instant::now();
    first.kill();
    let note = exited(&attempt.dir).await;
    // Its lease runs from the last answer, which came at most a heartbeat (200 ms) and a post before the kill.
    assert!(
        start.elapsed() > Duration::from_millis(1000),
        "it gave up before its lease was over"
    );
    assert_eq!(note["code"], 75);
    let second = ServerProcess::start(dir.path(), &settings).await;
    let job = wait(&store, job.id, "the end", |job| job.status.is_final()).await;
    assert_eq!((job.status, job.attempt), (JobStatus::Succeeded, 2));
    assert_every_step(&store, &job, 60).await;
    let rows = store.metrics(job.id, 0, 60).await.unwrap();
    assert!(
        rows[29].attempt == 1 && rows[30].attempt == 2,
        "it did not go on from the checkpoint that the worker wrote when it was cut off"
    );
    second.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_on_one_data_directory_are_refused() {
    let server = TestServer::start().await;
    let again = settings(server.dir.path(), &[]);
    let config = Config::from_layers(None, std::collections::HashMap::new(), &again).unwrap();
    let refused = serve(config).await.unwrap_err();
    assert!(matches!(refused, ServeError::Locked { .. }));
    // Who, where, and what to do.
    for part in [
        format!("(process {})", std::process::id()),
        server.dir.path().join("data").display().to_string(),
        "--data-dir".to_owned(),
    ] {
        assert!(refused.to_string().contains(&part), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shut_down_server_leaves_its_worker_to_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let (store, job) = prepared(dir.path(), json!({"steps": 100, "step_ms": 1, "hold_at": 10})).await;
    let settings = settings(dir.path(), &[]);
    let config = || Config::from_layers(None, std::collections::HashMap::new(), &settings).unwrap();
    let first = serve(config()).await.unwrap();
    wait(&store, job.id, "the hold", |job| job.step == 10).await;
    first.shutdown().await;
    let second = serve(config()).await.unwrap();
    let_go(&store.attempt(job.id, 1).await.unwrap().dir);
    let job = wait(&store, job.id, "the end", |job| job.status.is_final()).await;
    assert_eq!((job.status, job.attempt), (JobStatus::Succeeded, 1));
    assert_every_step(&store, &job, 100).await;
    second.shutdown().await;
}

/// The trainer itself in the worker, on the bundled base and data.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_training_run_resumes_and_ends_with_every_file() {
    let program = env!("CARGO_BIN_EXE_lorad");
    let server = TestServer::with(&[("scheduler.worker_program", program)]).await;
    let client = reqwest::Client::new();
    let dataset = server.store().dataset_by_name("silhouettes").await.unwrap().unwrap();
    let request = json!({
        "name": "killed", "base_model": "demo-icons", "dataset_id": dataset.id,
        "hyperparameters": {"max_train_steps": 24, "batch_size": 2, "lora_rank": 2, "checkpoint_every_steps": 4},
    });
    let posted = client.post(server.url("/jobs")).json(&request).send().await.unwrap();
    assert_eq!(posted.status(), 201, "{}", posted.text().await.unwrap());
    let id = posted.json::<Value>().await.unwrap()["id"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let reached = |job: &Job| job.step >= 9;
    server.wait(id, "two checkpoints", reached).await;
    kill_9(server.store().attempt(id, 1).await.unwrap().pid.unwrap());
    let job = server.ended(id).await;
    assert_eq!(
        (job.status, job.attempt, job.step),
        (JobStatus::Succeeded, 2, 24),
        "{:?}",
        job.error
    );

    let rows = server.store().metrics(id, 0, 1000).await.unwrap();
    assert_eq!(
        rows.iter().map(|row| row.step).collect::<Vec<_>>(),
        (1..=24).collect::<Vec<_>>()
    );
    assert!(
        rows[7].attempt == 1 && rows[23].attempt == 2,
        "it began again from the start"
    );
    let files = server.store().artifacts(id).await.unwrap();
    for name in [
        "pytorch_lora_weights.safetensors",
        "killed-kohya.safetensors",
        "killed-peft.zip",
        "receipt.json",
        "job.json",
    ] {
        let file = files
            .iter()
            .find(|file| file.name == name)
            .unwrap_or_else(|| panic!("no {name}"));
        let bytes = reqwest::get(server.url(&format!("/jobs/{id}/files/{name}")))
            .await
            .unwrap()
            .bytes()
            .await
            .unwrap();
        assert_eq!(bytes.len() as u64, file.bytes, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_ran_out_of_memory_is_tried_once_more_with_half_the_micro_batch() {
    let server = TestServer::start().await;
    let job = server
        .post(json!({"steps": 20, "checkpoint_every": 4, "exhaust": 10, "step_ms": 1}))
        .await;
    let job = server.ended(job.id).await;
    assert_eq!(
        (job.status, job.attempt, job.memory_rescues),
        (JobStatus::Succeeded, 2, 1)
    );
    assert_every_step(server.store(), &job, 20).await;
    let events = server.store().events_after(job.id, 0, 1000).await.unwrap();
    assert!(
        events
            .iter()
            .any(|event| event.data.to_string().contains("the micro-batch is halved")),
        "nobody was told"
    );

    let again = server
        .post(json!({"steps": 20, "exhaust": 3, "always": true, "step_ms": 1}))
        .await;
    let again = server.ended(again.id).await;
    assert_eq!((again.status, again.attempt), (JobStatus::Failed, 2));
    assert_eq!(again.error.unwrap().code, "worker.out_of_memory");
}

/// Between what 48 and what 24 pictures of 128 pixels take at a time.
const LIMIT_BYTES: u64 = 500 << 20;

/// The trainer itself, in a worker that may not allocate what its first micro-batch needs. Put into the queue past the API, which
/// would have refused it.
#[tokio::test(flavor = "multi_thread")]
async fn a_training_run_under_a_memory_limit_halves_its_micro_batch_and_ends() {
    let catalog = TrainerCatalog;
    let program = env!("CARGO_BIN_EXE_lorad");
    let limit = LIMIT_BYTES.to_string();
    let server = TestServer::with(&[
        ("scheduler.worker_program", program),
        ("scheduler.worker_memory_bytes", &limit),
        ("scheduler.nice", "0"),
    ])
    .await;
    let store = server.store();
    let dataset = store.dataset_by_name("silhouettes").await.unwrap().unwrap();
    let model = store.model(&"demo-icons".parse().unwrap()).await.unwrap();
    let given = json!({"max_train_steps": 1, "batch_size": 48, "lora_rank": 2, "resolution": 128, "enable_bucket": false,
        "gradient_checkpointing": "off"});
    let hyperparameters = catalog.resolve("sd1", &model.info, given.as_object().unwrap()).unwrap();
    let plan = catalog
        .plan(
            "sd1",
            &model.path,
            &model.info,
            &hyperparameters,
            &Sampling::default(),
            &dataset.path,
        )
        .unwrap();
    assert!(
        plan.memory_bytes > LIMIT_BYTES * 5 / 4,
        "the limit is not tight any more: {} bytes are planned",
        plan.memory_bytes
    );
    let new = NewJob {
        base_model: model.id,
        dataset_id: dataset.id,
        family: "sd1".to_owned(),
        hyperparameters,
        // What the scheduler waits for.
        plan: Plan {
            memory_bytes: 1,
            ..plan
        },
        ..scripted_job(dataset.id, &json!({}))
    };
    let mut job = server.handle.app().create_job(&new, None).await.unwrap();
    // Two attempts at real work, on machines that do other work meanwhile.
    let begun = Instant::now();
    while !job.status.is_final() {
        assert!(begun.elapsed() < 5 * PATIENCE, "{} at step {}", job.status, job.step);
        tokio::time::sleep(Duration::from_millis(50)).await;
        job = store.job(job.id).await.unwrap();
    }
    assert_eq!(
        (job.status, job.attempt, job.memory_rescues, job.step),
        (JobStatus::Succeeded, 2, 1, 1),
        "{:?}",
        job.error
    );
    assert_eq!(job.summary["micro_batch"], 24);
    let alerts = store.newest_events(job.id, EventKind::Alert, 10).await.unwrap();
    assert!(
        alerts.iter().any(|alert| alert.data["code"] == "memory.rescued"),
        "{alerts:?}"
    );
}
