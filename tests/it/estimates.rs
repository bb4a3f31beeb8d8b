//! What estimates are for: finished jobs correct the next one, and what needs more memory than there is does not start.

use std::time::Duration;

use lorad::domain::{CancelMode, Job, JobId, JobStatus, NewJob};
use lorad_proto::catalog::Plan;
use serde_json::{Value, json};

use crate::{
    client::{Client, demo_job},
    corpus::{pictures, zip},
    server::{TestServer, scripted_job},
};

const JOB_WITHIN: Duration = Duration::from_secs(300);
const FINAL: [&str; 3] = ["succeeded", "failed", "cancelled"];

async fn dry_run(client: &Client, job: &Value) -> Value {
    let (status, answer) = client.post("/jobs?dry_run=true", job).await;
    assert_eq!(status, 200, "{answer:#}");
    answer["plan"].clone()
}

fn seconds(plan: &Value, name: &str) -> f64 {
    plan[name].as_f64().unwrap()
}

fn assert_near(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 1e-9, "{found}, expected {expected}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_job_corrects_the_next_estimates() {
    let client = Client::start().await;
    let mut job = demo_job(&client).await;
    job["hyperparameters"]["max_train_steps"] = json!(6);
    let mut other = job.clone();
    other["hyperparameters"]["batch_size"] = json!(2);
    let (before, other_before) = (dry_run(&client, &job).await, dry_run(&client, &other).await);
    assert_eq!(
        (&before["measured"], &other_before["measured"]),
        (&json!(false), &json!(false))
    );
    assert!(client.store().measured_runs("cpu", 10).await.unwrap().is_empty());

    let (status, posted) = client.post("/jobs", &job).await;
    assert_eq!(status, 201, "{posted:#}");
    let id = posted["id"].as_str().unwrap();
    let done = client.wait_for(id, &FINAL, JOB_WITHIN).await;
    assert_eq!(done["status"], "succeeded", "{done:#}");

    // The row is what the job's own figures say: the median of its steps but the first.
    let runs = client.store().measured_runs("cpu", 10).await.unwrap();
    let [run] = runs.as_slice() else { panic!("{runs:?}") };
    let rows = client.store().metrics(id.parse().unwrap(), 2, 6).await.unwrap();
    let mut times: Vec<f64> = rows.iter().map(|row| row.step_ms / 1e3).collect();
    times.sort_by(f64::total_cmp);
    assert_eq!(times.len(), 5);
    assert_near(run.measured_step_s, times[2]);
    assert_near(run.modelled_step_s, seconds(&before, "step_s"));
    assert_eq!(
        (run.base_model.as_str(), run.workload.as_str()),
        ("demo-icons", before["workload"].as_str().unwrap())
    );

    // The same again takes what it took. All else grows in the same measure, and memory does not change.
    let (after, other_after) = (dry_run(&client, &job).await, dry_run(&client, &other).await);
    let factor = run.measured_step_s / run.modelled_step_s;
    assert_eq!(
        (&after["measured"], &other_after["measured"]),
        (&json!(true), &json!(true))
    );
    assert_near(seconds(&after, "step_s"), run.measured_step_s);
    assert_near(seconds(&after, "duration_s"), seconds(&before, "duration_s") * factor);
    assert_ne!(other_after["workload"], after["workload"]);
    assert_near(
        seconds(&other_after, "step_s"),
        seconds(&other_before, "step_s") * factor,
    );
    assert_eq!(after["memory_bytes"], before["memory_bytes"]);

    // What was learnt outlives the job.
    let gone = client
        .http
        .delete(client.url(&format!("/jobs/{id}")))
        .send()
        .await
        .unwrap();
    assert_eq!(gone.status(), 204);
    assert_near(seconds(&dry_run(&client, &job).await, "step_s"), run.measured_step_s);
}

/// A job of the scripted trainer that was estimated to take half a second per step.
async fn estimated(server: &TestServer, script: Value, memory_bytes: u64) -> Job {
    let new = scripted_job(server.dataset(), &script);
    let plan = Plan {
        step_s: 0.5,
        correction: 1.0,
        workload: "scripted".to_owned(),
        memory_bytes,
        ..new.plan.clone()
    };
    let new = NewJob { plan, ..new };
    server.handle.app().create_job(&new, None).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_jobs_that_trained_to_their_end_are_remembered() {
    let server = TestServer::start().await;
    for (script, status) in [
        (json!({"steps": 5, "step_ms": 3, "fail": 4}), JobStatus::Failed),
        // Its only step warms up.
        (json!({"steps": 1, "step_ms": 3}), JobStatus::Succeeded),
    ] {
        let job = estimated(&server, script, 1).await;
        assert_eq!(server.ended(job.id).await.status, status);
    }
    let job = estimated(&server, json!({"steps": 100_000, "step_ms": 3}), 1).await;
    server.wait(job.id, "training", |job| job.step >= 3).await;
    server.handle.app().cancel_job(job.id, CancelMode::Save).await.unwrap();
    assert_eq!(server.ended(job.id).await.status, JobStatus::Cancelled);
    assert_eq!(server.store().measured_runs("cpu", 10).await.unwrap(), []);

    let job = estimated(&server, json!({"steps": 5, "step_ms": 3}), 1).await;
    assert_eq!(server.ended(job.id).await.status, JobStatus::Succeeded);
    let runs = server.store().measured_runs("cpu", 10).await.unwrap();
    let [run] = runs.as_slice() else { panic!("{runs:?}") };
    assert_near(run.modelled_step_s, 0.5);
    assert_near(run.measured_step_s, 0.003);
    assert!(server.store().measured_runs("cuda:0", 10).await.unwrap().is_empty());
}

/// The demo's job in one of two sizes.
async fn sized(client: &Client, batch_size: u32, gradient_checkpointing: &str) -> Value {
    let mut job = demo_job(client).await;
    job["hyperparameters"]["batch_size"] = json!(batch_size);
    job["hyperparameters"]["gradient_checkpointing"] = json!(gradient_checkpointing);
    job
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_needs_more_memory_than_a_worker_may_have_is_refused_with_figures_and_a_cure_that_helps() {
    let client = Client::start().await;
    let memory = async |batch_size, checkpointing| {
        let plan = dry_run(&client, &sized(&client, batch_size, checkpointing).await).await;
        plan["memory_bytes"].as_u64().unwrap()
    };
    let (large, small) = (memory(64, "off").await, memory(8, "on").await);
    assert!(large > small + (64 << 20), "{large} {small}");
    let limit = u64::midpoint(large, small);

    let client = Client::start_with(&[("scheduler.worker_memory_bytes", &limit.to_string())]).await;
    let job = sized(&client, 64, "off").await;
    let refused = |status: u16, problem: &Value| {
        assert_eq!(
            (status, &problem["code"]),
            (422, &json!("memory.too_small")),
            "{problem:#}"
        );
        let (detail, hint) = (problem["detail"].as_str().unwrap(), problem["hint"].as_str().unwrap());
        for figure in [large >> 20, limit >> 20] {
            assert!(detail.contains(&format!("{figure} MiB")), "{detail}");
        }
        for cure in [
            "batch_size",
            "gradient_accumulation_steps",
            "gradient_checkpointing",
            "resolution",
        ] {
            assert!(hint.contains(cure), "{hint}");
        }
    };
    let (status, problem) = client.post("/jobs?dry_run=true", &job).await;
    refused(status, &problem);
    let (status, problem) = client.post("/jobs", &job).await;
    refused(status, &problem);
    // An archive that came along is gone again.
    let before = client.everything().await;
    let mut with_archive = job.clone();
    with_archive.as_object_mut().unwrap().remove("dataset_id");
    let (status, problem) = client.submit_form(&with_archive.to_string(), zip(&pictures(64))).await;
    assert_eq!(
        (status, &problem["code"]),
        (422, &json!("memory.too_small")),
        "{problem:#}"
    );
    assert_eq!(client.everything().await, before);

    // What the hint says helps.
    let plan = dry_run(&client, &sized(&client, 8, "on").await).await;
    assert!(plan["memory_bytes"].as_u64().unwrap() <= limit, "{plan:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_does_not_fit_at_the_moment_waits_and_says_for_what() {
    let server = TestServer::start().await;
    // No machine has that free, as none has while others use it.
    let large = estimated(&server, json!({"steps": 2, "step_ms": 1}), 1 << 60).await;
    let first = scripted_job(server.dataset(), &json!({"steps": 2, "step_ms": 1}));
    let first = NewJob { priority: 1, ..first };
    let first = server.handle.app().create_job(&first, None).await.unwrap();
    assert_eq!(server.ended(first.id).await.status, JobStatus::Succeeded);
    server.idle().await;
    let queue = async |id: JobId| {
        let answer = reqwest::get(server.url(&format!("/jobs/{id}"))).await.unwrap();
        let job = answer.json::<Value>().await.unwrap();
        assert_eq!(job["status"], "queued", "{job:#}");
        job["queue"].clone()
    };
    assert_eq!(queue(large.id).await, json!({"position": 1, "waits_for": "memory"}));
    let next = server.post(json!({"steps": 2, "step_ms": 1})).await;
    // It keeps its place: what comes later does not overtake it.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(queue(large.id).await, json!({"position": 1, "waits_for": "memory"}));
    assert_eq!(queue(next.id).await, json!({"position": 2}));

    server
        .handle
        .app()
        .cancel_job(large.id, CancelMode::Discard)
        .await
        .unwrap();
    assert_eq!(server.ended(next.id).await.status, JobStatus::Succeeded);
}
