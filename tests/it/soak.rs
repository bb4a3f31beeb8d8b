//! Short jobs for a long time: nothing may grow. `LORAD_TEST_SOAK_S` makes it longer.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use lorad::domain::JobStatus;
use serde_json::json;

use crate::{
    recovery::prepared,
    scripted::{self, Stats},
    server::{ServerProcess, scripted_job, settings, wait},
};

/// What a server holds when no job runs.
#[derive(Debug, Clone, Copy)]
struct Held {
    open_files: u64,
    threads: u64,
    wal_bytes: u64,
    stats: Stats,
}

async fn held(dir: &Path, pid: u32) -> Held {
    let count = |folder: &str| std::fs::read_dir(format!("/proc/{pid}/{folder}")).unwrap().count() as u64;
    let wal = dir.join("data/lorad.sqlite3-wal");
    Held {
        open_files: count("fd"),
        threads: count("task"),
        wal_bytes: wal.metadata().map_or(0, |wal| wal.len()),
        stats: scripted::stats(dir).await,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_runs_short_jobs_for_long_holds_no_more_at_the_end_than_at_the_beginning() {
    let seconds = std::env::var("LORAD_TEST_SOAK_S")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(20);
    let dir = tempfile::tempdir().unwrap();
    let (store, first) = prepared(dir.path(), json!({"steps": 2, "step_ms": 1})).await;
    let server = ServerProcess::start(dir.path(), &settings(dir.path(), &[])).await;
    wait(&store, first.id, "the first end", |job| job.status.is_final()).await;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let (start, mut n_jobs, mut samples) = (Instant::now(), 0, Vec::new());
    while start.elapsed() < Duration::from_secs(seconds) || n_jobs < 12 {
        let script = json!({"steps": 6, "step_ms": 1, "checkpoint_every": 3});
        let job = store
            .insert_job(&scripted_job(first.dataset_id, &script), None)
            .await
            .unwrap();
        // Someone watches it to its end, and someone hangs up.
        let url = format!("http://{}/jobs/{}", server.address, job.id);
        let (watched, left) = (
            http.get(format!("{url}/events")).send().await.unwrap(),
            http.get(format!("{url}/events")).send().await.unwrap(),
        );
        drop(left);
        let done = wait(&store, job.id, "the end", |job| job.status.is_final()).await;
        assert_eq!(done.status, JobStatus::Succeeded);
        watched.bytes().await.unwrap();
        while http.delete(&url).send().await.unwrap().status() == 409 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        n_jobs += 1;
        samples.push(held(dir.path(), server.pid()).await);
    }
    // What is held moves with the moment; its lowest value does not, unless something leaks.
    let third = samples.len() / 3;
    let (early, late) = (&samples[..third], &samples[samples.len() - third..]);
    let flat = |what: &str, of: fn(&Held) -> u64, slack: u64| {
        let highest_early = early.iter().map(of).max().unwrap();
        let lowest_late = late.iter().map(of).min().unwrap();
        assert!(
            lowest_late <= highest_early + slack,
            "{what} grew from at most {highest_early} in the first third to at least {lowest_late} in the last, over {n_jobs} jobs"
        );
        format!("{what} {highest_early} -> {lowest_late}")
    };
    let figures = [
        flat("open files", |held| held.open_files, 0),
        flat("threads", |held| held.threads, 0),
        flat("event topics", |held| held.stats.topics, 0),
        flat("WAL bytes", |held| held.wal_bytes, 4 << 20),
        flat("heap bytes", |held| held.stats.heap_bytes, 4 << 20),
    ];
    println!(
        "soak: {n_jobs} jobs in {} s; {}",
        start.elapsed().as_secs(),
        figures.join(", ")
    );
    let left = std::fs::read_dir(dir.path().join("data/jobs")).unwrap().count();
    assert_eq!(left, 1, "folders of deleted jobs are left");
    server.kill();
}
